"""Hooks that change how updates travel: what they go together with, and that all parties have the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fate_llm.core.errors import Fault

pytestmark = pytest.mark.usefixtures("registry")

FaultsOf = Callable[..., list[Fault]]
Valid = Callable[[], dict[str, Any]]


def hooks(*names: str) -> str:
    return "hooks: [" + ", ".join(f"{{name: {name}}}" for name in names) + "]"


def with_params(valid_text: str, params: str) -> str:
    return valid_text.replace("aggregator: mean, protection: open", params)


def told(faults: list[Fault]) -> list[tuple[str, int | None, str]]:
    return [(fault.code, fault.line, fault.path) for fault in faults]


@pytest.mark.parametrize("names", [(), ("half",), ("byte", "press"), ("press", "half"), ("clip", "half", "press")])
def test_one_hook_for_each_stage_is_fine_in_any_order(valid_text: str, faults_of: FaultsOf, names: Any) -> None:
    assert faults_of(with_params(valid_text, f"protection: open, {hooks(*names)}")) == []


@pytest.mark.parametrize("name", ["half", "byte", "press"])
def test_terms_that_the_protection_hides_are_not_written_anew(valid_text: str, faults_of: FaultsOf, name: str) -> None:
    # Given a toy sum that hides terms, When a hook of the wire stands beside it
    (fault,) = faults_of(with_params(valid_text, f"protection: sealed, {hooks('clip', name)}"))
    # Then there is one fault, at the hook's line
    assert told([fault]) == [("hook_changes_hidden_terms", 10, "tasks.tune.params.hooks[1].name")]
    assert fault.message == f"{name!r} writes every update anew, and 'sealed' hides them"
    assert "leave the hook out" in fault.hint


def test_other_hooks_go_with_any_protection(valid_text: str, faults_of: FaultsOf) -> None:
    assert faults_of(with_params(valid_text, f"protection: sealed, {hooks('clip')}")) == []


def test_two_hooks_that_write_values_are_a_conflict(valid_text: str, faults_of: FaultsOf) -> None:
    (fault,) = faults_of(with_params(valid_text, hooks("half", "press", "byte")))
    assert told([fault]) == [("hooks_conflict", 10, "tasks.tune.params.hooks[2].name")]
    assert fault.message == "'byte' and 'half' both say how updates travel"


def test_the_same_hook_twice_is_a_conflict_for_the_wire_only(valid_text: str, faults_of: FaultsOf) -> None:
    assert faults_of(with_params(valid_text, hooks("clip", "clip"))) == []
    assert [fault.code for fault in faults_of(with_params(valid_text, hooks("press", "press")))] == ["hooks_conflict"]


def test_all_faults_come_at_once(valid_text: str, faults_of: FaultsOf) -> None:
    faults = faults_of(with_params(valid_text, f"protection: sealed, {hooks('half', 'byte', 'clap')}"))
    assert sorted(fault.code for fault in faults) == [
        "hook_changes_hidden_terms",
        "hook_changes_hidden_terms",
        "hooks_conflict",
        "unknown_plugin",
    ]


def test_a_hook_that_cannot_be_loaded_is_one_fault(valid_text: str, faults_of: FaultsOf) -> None:
    faults = faults_of(with_params(valid_text, f"protection: open, {hooks('stuck')}"))
    assert [fault.code for fault in faults] == ["plugin_unavailable"]


@pytest.mark.parametrize(
    ("everybody", "other", "message"),
    [
        (["half"], [], "updates travel with no hook at 'bank-b', and with half at 'bank-a'"),
        ([], ["half", "press"], "updates travel with half, press at 'bank-b', and with no hook at 'bank-a'"),
        (["half"], ["byte"], "updates travel with byte at 'bank-b', and with half at 'bank-a'"),
    ],
)
def test_a_party_whose_updates_travel_in_another_way_is_told_at_its_override(
    valid: Valid, faults_of: FaultsOf, everybody: list[str], other: list[str], message: str
) -> None:
    given = valid()
    given["tasks"]["tune"]["params"]["hooks"] = [{"name": name} for name in everybody]
    given["overrides"]["bank-b"]["tune"] = {"params": {"hooks": [{"name": name} for name in other]}}
    (fault,) = faults_of(given)
    assert (fault.code, fault.message) == ("hooks_differ", message)
    assert fault.path == "overrides.bank-b.tune.params.hooks"


def test_an_override_of_the_guest_is_the_one_that_differs(valid: Valid, faults_of: FaultsOf) -> None:
    given = valid()
    given["overrides"]["bank-a"] = {"tune": {"params": {"hooks": [{"name": "press"}]}}}
    (fault,) = faults_of(given)
    assert (fault.code, fault.path) == ("hooks_differ", "overrides.bank-a.tune.params.hooks")


def test_parties_may_differ_in_hooks_of_their_own_and_in_the_order(valid: Valid, faults_of: FaultsOf) -> None:
    given = valid()
    given["tasks"]["tune"]["params"]["hooks"] = [{"name": "half"}, {"name": "press"}]
    mine = [{"name": "press"}, {"name": "clip"}, {"name": "half"}]
    given["overrides"]["bank-b"]["tune"] = {"params": {"hooks": mine}}
    assert faults_of(given) == []
