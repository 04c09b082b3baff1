"""Protections: their own params, the same at all parties, enough of them, and who holds a key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from pydantic import Field

from fate_llm.core.errors import Fault
from fate_llm.core.interfaces import Frozen, Port
from fate_llm.core.values import ArtifactKind, Role
from fate_llm.pipelines.check import check
from fate_llm.pipelines.sums import counted, least_contributors, sums_of, usual_threshold

FaultsOf = Callable[..., list[Fault]]
Valid = Callable[[], dict[str, Any]]


class Boxed:
    """A toy that needs a key holder."""

    class Params(Frozen):
        shared_key: bool = False

    hides_terms = True
    needs_key_holder = True
    summary = "the coordinator sees boxes"
    learns: ClassVar[dict[str, str]] = {"coordinator": "boxes", "key_holder": "the sum"}


class Keeper:
    """A component with a side for the key holder."""

    class Params(Frozen):
        protection: str = Field("open", json_schema_extra={"plugin": "sum"})
        protection_params: dict[str, Any] = Field(default_factory=dict)

    inputs: ClassVar[dict[str, Port]] = {}
    outputs: ClassVar[dict[str, Port]] = {"model": Port(ArtifactKind.MODEL, "A model.")}

    def needs_experiment(self, params: Any) -> str | None:
        return None

    def guest(self, ctx: Any) -> None: ...

    host = arbiter = key_holder = guest


@pytest.fixture(autouse=True)
def more(registry: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry["sum"], "boxed", Boxed)
    monkeypatch.setitem(registry["component"], "keeper", Keeper)


def with_params(valid_text: str, params: str) -> str:
    return valid_text.replace("aggregator: mean, protection: open", params)


def told(faults: list[Fault]) -> list[tuple[str, int | None, str]]:
    return [(fault.code, fault.line, fault.path) for fault in faults]


def kept(**parties: Any) -> dict[str, Any]:
    """A pipeline of a keeper with a protection that needs a key."""
    who = {"guest": "a", "hosts": ["b", "c"], "arbiter": "z", "key_holder": "k"} | parties
    return {
        "version": 1,
        "name": "kept",
        "parties": {role: party for role, party in who.items() if party},
        "tasks": {"keep": {"component": "keeper", "params": {"protection": "boxed"}}},
    }


# --- The params of a protection ----------------------------------------------------------------------------


def test_params_that_the_protection_has_are_fine(valid_text: str, faults_of: FaultsOf) -> None:
    assert faults_of(with_params(valid_text, "protection: sealed, protection_params: {clip: 2, threshold: 3}")) == []


@pytest.mark.parametrize(
    ("params", "code", "path", "message", "hint"),
    [
        ("{clip: 0}", "invalid_value", "clip", "found 0", "greater than 0"),
        ("{clip: high}", "invalid_value", "clip", "found 'high'", "number"),
        ("{clop: 1}", "unknown_key", "clop", "unknown key 'clop'", "did you mean 'clip'?"),
        ("{threshold: 2.5}", "invalid_value", "threshold", "found 2.5", "integer"),
        ("[1]", "invalid_value", "", "a list", "mapping"),
    ],
)
def test_a_param_that_it_does_not_have_is_told_where_it_is_written(
    valid_text: str, faults_of: FaultsOf, params: str, code: str, path: str, message: str, hint: str
) -> None:
    (fault,) = faults_of(with_params(valid_text, f"protection: sealed, protection_params: {params}"))
    place = "tasks.tune.params.protection_params" + (f".{path}" if path else "")
    assert told([fault]) == [(code, 10, place)]
    assert message in fault.message
    assert hint in fault.hint


def test_params_of_no_protection_are_the_fault_of_its_name_alone(valid_text: str, faults_of: FaultsOf) -> None:
    faults = faults_of(with_params(valid_text, "protection: seeled, protection_params: {any: thing}"))
    assert told(faults) == [("unknown_plugin", 10, "tasks.tune.params.protection")]


def test_an_override_with_a_wrong_param_is_told_at_the_override(valid: Valid, faults_of: FaultsOf) -> None:
    given = valid()
    given["tasks"]["tune"]["params"] |= {"protection": "sealed"}
    given["overrides"]["bank-b"]["tune"] = {"params": {"protection_params": {"clip": -1}}}
    (fault,) = faults_of(given)
    assert (fault.code, fault.path) == ("invalid_value", "overrides.bank-b.tune.params.protection_params.clip")


# --- The same at all parties -------------------------------------------------------------------------------


def test_another_protection_at_one_party_is_a_fault(valid: Valid, faults_of: FaultsOf) -> None:
    given = valid()
    given["overrides"]["bank-b"]["tune"] = {"params": {"protection": "sealed"}}
    (fault,) = faults_of(given)
    assert (fault.code, fault.path) == ("protection_differs", "overrides.bank-b.tune.params.protection")
    assert fault.message == "'sealed' at 'bank-b', and 'open' at 'bank-a'"


def test_other_params_at_one_party_are_a_fault_each(valid: Valid, faults_of: FaultsOf) -> None:
    given = valid()
    given["tasks"]["tune"]["params"] |= {"protection": "sealed", "protection_params": {"threshold": 3}}
    given["overrides"]["bank-c"]["tune"] = {"params": {"protection_params": {"clip": 8.0, "threshold": 2}}}
    faults = faults_of(given)
    where = "overrides.bank-c.tune.params.protection_params"
    assert [(fault.code, fault.path) for fault in faults] == [
        ("protection_differs", f"{where}.clip"),
        ("protection_differs", f"{where}.threshold"),
    ]
    assert faults[0].message == "clip: 8.0 at 'bank-c', and 1.0 at 'bank-a'"


def test_the_same_said_in_another_way_is_the_same(valid: Valid, faults_of: FaultsOf) -> None:
    given = valid()
    given["tasks"]["tune"]["params"] |= {"protection": "sealed"}
    given["overrides"]["bank-c"]["tune"] = {"params": {"protection_params": {"clip": 1, "threshold": None}}}
    assert faults_of(given) == []


# --- Enough of them ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hosts", "arbiter", "enough", "hint"),
    [
        ([], "z", False, "at least 3 contributors"),
        (["b"], "z", False, "at least 3 contributors"),
        (["b", "c"], "z", True, ""),
        (["b", "c"], None, False, "at least 4 contributors: a, who adds up, does not count itself"),
        (["b", "c"], "c", False, "at least 4 contributors: c, who adds up"),
        (["b", "c", "d"], None, True, ""),
    ],
)
def test_who_hides_among_too_few_is_told_how_many_it_takes(
    valid: Valid, faults_of: FaultsOf, hosts: list[str], arbiter: str | None, enough: bool, hint: str
) -> None:
    given = valid()
    del given["overrides"]
    given["tasks"]["tune"]["params"]["protection"] = "sealed"
    given |= {"parties": {"guest": "a", "hosts": hosts}, "job": {}}
    if arbiter is not None:
        given["parties"]["arbiter"] = arbiter
    faults = faults_of(given)
    assert [fault.code for fault in faults] == ([] if enough else ["too_few_contributors"])
    for fault in faults:
        assert fault.path == "tasks.tune.params.protection"
        assert f"there are {1 + len(hosts)} contributors" in fault.message
        assert hint in fault.hint


def test_only_those_that_take_part_count(valid: Valid, faults_of: FaultsOf) -> None:
    given = valid()
    given["tasks"]["tune"]["params"]["protection"] = "sealed"
    given["tasks"]["tune"]["parties"] = ["bank-a", "bank-b", "consortium"]
    given["tasks"].pop("score")
    assert [fault.code for fault in faults_of(given)] == ["too_few_contributors"]


def test_a_threshold_that_cannot_be_reached_is_a_fault(valid_text: str, faults_of: FaultsOf) -> None:
    (fault,) = faults_of(with_params(valid_text, "protection: sealed, protection_params: {threshold: 4}"))
    assert told([fault]) == [("threshold_too_large", 10, "tasks.tune.params.protection_params.threshold")]
    assert (fault.message, fault.hint) == ("found 4, but there are 3 contributors that count", "at most 3")


def test_what_shows_terms_needs_nobody_to_hide_among(valid: Valid, faults_of: FaultsOf) -> None:
    given = valid()
    del given["overrides"]
    given |= {"parties": {"guest": "a", "hosts": ["b"]}, "job": {}}
    assert faults_of(given) == []


# --- The key holder ----------------------------------------------------------------------------------------


def test_a_party_of_its_own_holds_the_key() -> None:
    spec = check(kept())
    assert spec.roles_at("k", "keep") == (Role.KEY_HOLDER,)
    assert spec.parties_of("keep") == ("a", "b", "c", "z", "k")
    assert spec.cohort("keep").members == ("a", "b", "c", "z"), "it is no member of the sum"


def test_a_key_holder_takes_part_only_where_a_sum_needs_it() -> None:
    given = kept()
    given["tasks"]["keep"]["params"]["protection"] = "open"
    spec = check(given)
    assert spec.roles_at("k", "keep") == ()
    assert "k" not in spec.parties_of("keep")


@pytest.mark.parametrize(
    ("parties", "code", "text", "hint"),
    [
        ({"key_holder": None}, "key_holder_missing", "none takes part", "add `key_holder: ...` to `parties`"),
        ({"key_holder": "z"}, "key_holder_unfit", "'z' holds the key and adds up", "two different parties"),
        ({"key_holder": "b"}, "key_holder_unfit", "'b' holds the key and contributes", "shared_key: true"),
        (
            {"arbiter": None, "hosts": ["b", "c", "d"], "key_holder": "a"},
            "key_holder_unfit",
            "'a' holds the key and adds up",
            "two different parties",
        ),
    ],
)
def test_who_may_not_hold_the_key_is_told(
    faults_of: FaultsOf, parties: dict[str, Any], code: str, text: str, hint: str
) -> None:
    (fault,) = faults_of(kept(**parties))
    assert (fault.code, fault.path) == (code, "tasks.keep.params.protection")
    assert text in fault.message
    assert hint in fault.hint


def test_a_key_may_be_shared_when_the_pipeline_says_so(faults_of: FaultsOf) -> None:
    given = kept(key_holder="b")
    given["tasks"]["keep"]["params"]["protection_params"] = {"shared_key": True}
    assert faults_of(given) == []
    assert check(given).roles_at("b", "keep") == (Role.HOST, Role.KEY_HOLDER)
    # And never with the one who adds up
    given = kept(key_holder="z")
    given["tasks"]["keep"]["params"]["protection_params"] = {"shared_key": True}
    assert [fault.code for fault in faults_of(given)] == ["key_holder_unfit"]


def test_a_key_holder_that_a_task_leaves_out_is_missing(faults_of: FaultsOf) -> None:
    given = kept()
    given["tasks"]["keep"]["parties"] = ["a", "b", "c", "z"]
    (fault,) = faults_of(given)
    assert (fault.code, fault.hint) == ("key_holder_missing", "let 'k' take part as key_holder")


def test_a_component_without_that_side_cannot_have_such_a_protection(valid: Valid, faults_of: FaultsOf) -> None:
    given = valid()
    given["parties"]["key_holder"] = "keys"
    given["tasks"]["tune"]["params"]["protection"] = "boxed"
    (fault,) = faults_of(given)
    assert fault.code == "key_holder_missing"
    assert "'trainer' has no side for one" in fault.message


# --- What is known of a sum --------------------------------------------------------------------------------


def test_sums_are_found_with_their_params(registry: Any) -> None:
    (use,) = sums_of(Keeper.Params, {"protection": "sealed", "protection_params": {"threshold": 4, "clip": 0.5}})
    cohort = check(kept()).cohort("keep")
    assert (use.name, use.hides_terms, use.needs_key_holder) == ("sealed", True, False)
    assert (use.threshold(cohort), use.clip, use.shared_key) == (4, 0.5, False)
    (usual,) = sums_of(Keeper.Params, {"protection": "sealed"})
    assert usual.threshold(cohort) == 3
    (default,) = sums_of(Keeper.Params, {})
    assert (default.name, default.hides_terms, default.threshold(cohort), default.clip) == ("open", False, None, None)
    (wrong,) = sums_of(Keeper.Params, {"protection": "sealed", "protection_params": {"clip": -1}})
    assert (wrong.params, wrong.threshold(cohort), wrong.clip) == (None, None, None)


def test_one_that_adds_up_does_not_count() -> None:
    with_arbiter, alone = check(kept()).cohort("keep"), check(kept(arbiter=None, hosts=list("bcd"))).cohort("keep")
    assert (counted(with_arbiter), least_contributors(with_arbiter)) == (3, 3)
    assert (counted(alone), least_contributors(alone)) == (3, 4)


@pytest.mark.parametrize(("parties", "threshold"), [(3, 3), (4, 3), (5, 4), (6, 5), (8, 6), (9, 7), (100, 67)])
def test_the_usual_threshold_is_more_than_two_thirds(parties: int, threshold: int) -> None:
    assert usual_threshold(parties) == threshold
    assert 3 * threshold > 2 * parties >= 3 * (threshold - 1)
