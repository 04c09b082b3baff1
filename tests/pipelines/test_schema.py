"""The shape of a pipeline, and who does what in each task."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fate_llm.core.values import Cohort, Role, Roster
from fate_llm.pipelines.graph import circles, order, waits_for
from fate_llm.pipelines.schema import (
    Folder,
    JobSettings,
    PipelineSpec,
    Reference,
    load_component,
    merged,
    parse_duration,
    roles_of_component,
    sources_of,
)

pytestmark = pytest.mark.usefixtures("registry")

Valid = Callable[[], dict[str, Any]]
G, H, A, K = Role.GUEST, Role.HOST, Role.ARBITER, Role.KEY_HOLDER


def spec_of(data: dict[str, Any], **changes: Any) -> PipelineSpec:
    """The spec of plain values, with some of its keys changed."""
    return PipelineSpec.model_validate({**data, **changes})


# --- Values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30s", 30),
        ("10m", 600),
        ("2h", 7200),
        ("1d", 86400),
        ("1.5h", 5400),
        (5, 5),
        (0.5, 0.5),
        ("30d", 2592000),
    ],
)
def test_durations(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["10", "m", "10 m", "-1s", "1h30m", "10M", "", "٣s", "1e3s", 0, -1, True, None, [], "31d", 1e9, "0s"],
)
def test_other_durations_are_refused(text: object) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)


@given(st.one_of(st.text(), st.floats(), st.integers()))
def test_a_duration_is_in_its_bounds_or_refused(value: object) -> None:
    try:
        seconds = parse_duration(value)
    except ValueError:
        return
    assert 0 < seconds <= 30 * 86400


def test_defaults_of_a_job() -> None:
    job = JobSettings.model_validate({})
    assert (job.seed, job.round_deadline, job.quorum, job.retries) == (0, 600.0, None, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"version": "1"},
        {"version": True},
        {"name": 3},
        {"experiment": 1},
        {"experiment": "true"},
        {"tasks": {}},
        {"job": {"seed": "7"}},
        {"job": {"seed": 7.0}},
        {"job": {"seed": 2**63}},
        {"unknown": 1},
        {"parties": {"guest": "x", "hosts": "y"}},
        {"env": ["A-B"]},
    ],
    ids=str,
)
def test_nothing_is_converted_and_nothing_unknown_is_taken(valid: Valid, change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        spec_of(valid(), **change)


def test_a_spec_does_not_change(valid: Valid) -> None:
    spec = spec_of(valid())
    with pytest.raises(ValidationError):
        spec.name = "other"


def test_plain_values_give_the_same_spec(valid: Valid) -> None:
    # Given every part of the language
    data = valid()
    data |= {"description": "d", "experiment": True, "env": ["A"]}
    data["tasks"]["tune"] |= {"roles": ["guest", "host", "arbiter"], "parties": ["bank-a"], "stage": "train"}
    data["tasks"]["score"]["inputs"]["model"] = ["tune.model", {"path": "x"}]
    spec = spec_of(data)
    # When it is written as plain values and read again
    again = PipelineSpec.model_validate(spec.to_data())
    # Then nothing is lost, and the keys are in the language's order
    assert again == spec
    assert again.to_data() == spec.to_data()
    assert list(spec.to_data()) == [key for key in PipelineSpec.model_fields if key in spec.to_data()]
    assert list(spec.to_data()["tasks"]) == list(data["tasks"])


def test_defaults_are_left_out_of_plain_values() -> None:
    data = {"version": 1, "name": "x", "parties": {"guest": "a"}, "tasks": {"t": {"component": "source"}}}
    assert spec_of(data).to_data() == data


def test_sources_are_taken_apart() -> None:
    assert sources_of("a.b.out") == (Reference(task="a.b", output="out"),)
    assert sources_of(Folder(path="x")) == (Folder(path="x"),)
    assert sources_of(("a.x", Folder(path="y"), "b.z")) == (
        Reference(task="a", output="x"),
        Folder(path="y"),
        Reference(task="b", output="z"),
    )
    assert sources_of(()) == ()
    assert str(Reference(task="a.b", output="out")) == "a.b.out"


def test_merging_is_deep_and_copies() -> None:
    # Given nested values
    base = {"a": {"x": 1, "y": [1, 2]}, "b": 1, "c": {"z": 1}}
    over = {"a": {"y": [3], "w": {"v": 1}}, "b": {"n": 1}, "c": None}
    before = copy.deepcopy((base, over))
    # When one is merged over the other
    result = merged(base, over)
    # Then mappings are merged, everything else is replaced, and neither argument is shared or changed
    assert result == {"a": {"x": 1, "y": [3], "w": {"v": 1}}, "b": {"n": 1}, "c": None}
    result["a"]["w"]["v"] = 2
    result["a"]["y"].append(4)
    assert (base, over) == before


TREES = st.recursive(
    st.integers(0, 3), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3), max_leaves=8
)
MAPPINGS = st.dictionaries(st.sampled_from("abc"), TREES, max_size=3)


@given(base=MAPPINGS, over=MAPPINGS)
def test_merging_has_no_surprises(base: dict[str, Any], over: dict[str, Any]) -> None:
    assert merged(base, {}) == base
    assert merged({}, over) == over
    assert merged(base, base) == base
    assert merged(merged(base, over), over) == merged(base, over)


# --- Who does what -------------------------------------------------------------------------------


def test_the_roster_and_its_members(valid: Valid) -> None:
    spec = spec_of(valid())
    assert spec.roster == Roster("bank-a", ("bank-b", "bank-c"), "consortium", None)
    assert spec.members == ("bank-a", "bank-b", "bank-c", "consortium")


def test_an_arbiter_coordinates(valid: Valid) -> None:
    spec = spec_of(valid())
    assert spec.cohort("tune") == Cohort(("bank-a", "bank-b", "bank-c"), "consortium", 3)
    assert spec.parties_of("tune") == ("bank-a", "bank-b", "bank-c", "consortium")
    assert [spec.roles_at(party, "tune") for party in spec.members] == [(G,), (H,), (H,), (A,)]


def test_a_component_without_an_arbiter_runs_at_data_owners(valid: Valid) -> None:
    spec = spec_of(valid())
    assert spec.cohort("split") == Cohort(("bank-a", "bank-b", "bank-c"), "bank-a", 3)
    assert spec.parties_of("split") == ("bank-a", "bank-b", "bank-c")
    assert spec.roles_at("consortium", "split") == ()


def test_without_an_arbiter_the_guest_coordinates(valid: Valid) -> None:
    spec = spec_of(valid(), parties={"guest": "bank-a", "hosts": ["bank-b", "bank-c"]})
    assert spec.cohort("tune").coordinator == "bank-a"
    assert spec.cohort("tune").coordinator_contributes
    # Then the guest also runs the arbiter's side
    assert spec.roles_at("bank-a", "tune") == (G, A)
    assert spec.roles_at("bank-b", "tune") == (H,)


def test_without_the_guest_the_first_contributor_coordinates(valid: Valid) -> None:
    data = valid()
    data["tasks"]["tune"]["parties"] = ["bank-c", "bank-b"]
    spec = spec_of(data)
    assert spec.cohort("tune") == Cohort(("bank-b", "bank-c"), "bank-b", 2)
    assert spec.roles_at("bank-b", "tune") == (H, A)
    assert spec.parties_of("tune") == ("bank-b", "bank-c")


def test_an_organisation_may_be_guest_and_arbiter(valid: Valid) -> None:
    spec = spec_of(valid(), parties={"guest": "bank-a", "hosts": ["bank-b"], "arbiter": "bank-a"})
    assert spec.roles_at("bank-a", "tune") == (G, A)
    assert spec.cohort("tune") == Cohort(("bank-a", "bank-b"), "bank-a", 2)
    assert spec.members == ("bank-a", "bank-b")


def test_a_guest_alone_does_everything(valid: Valid) -> None:
    spec = spec_of(valid(), parties={"guest": "bank-a"}, overrides={}, job={})
    assert spec.cohort("tune") == Cohort(("bank-a",), "bank-a", 1)
    assert spec.roles_at("bank-a", "tune") == (G, A)
    assert spec.roles_at("bank-a", "split") == (G,)


@pytest.mark.parametrize(
    ("roles", "contributors", "coordinator", "runs"),
    [
        (["guest"], ("bank-a",), "bank-a", {"bank-a": (G, A)}),
        (
            ["host", "arbiter"],
            ("bank-b", "bank-c"),
            "consortium",
            {"bank-b": (H,), "bank-c": (H,), "consortium": (A,)},
        ),
        (["host"], ("bank-b", "bank-c"), "bank-b", {"bank-b": (H, A), "bank-c": (H,)}),
        (["arbiter"], (), "consortium", {"consortium": (A,)}),
    ],
)
def test_roles_restrict_who_takes_part(
    valid: Valid,
    roles: list[str],
    contributors: tuple[str, ...],
    coordinator: str,
    runs: dict[str, tuple[Role, ...]],
) -> None:
    data = valid()
    data["tasks"]["tune"]["roles"] = roles
    spec = spec_of(data)
    cohort = spec.cohort("tune")
    assert (cohort.contributors, cohort.coordinator) == (contributors, coordinator)
    assert {party: spec.roles_at(party, "tune") for party in spec.parties_of("tune")} == runs


@pytest.mark.parametrize(("quorum", "least"), [(None, 3), (1, 1), (2, 2), (3, 3)])
def test_the_quorum_is_everyone_unless_given(valid: Valid, quorum: int | None, least: int) -> None:
    spec = spec_of(valid(), job={} if quorum is None else {"quorum": quorum})
    assert spec.cohort("tune").quorum == least


def test_the_quorum_of_a_small_task_is_its_size(valid: Valid) -> None:
    data = valid()
    data["tasks"]["tune"]["parties"] = ["bank-a", "consortium"]
    assert spec_of(data).cohort("tune").quorum == 1


def test_roles_of_a_component_are_its_methods() -> None:
    assert roles_of_component(load_component("trainer")) == {G, H, A}
    assert roles_of_component(load_component("divider")) == {G, H}


def test_params_and_inputs_of_a_party(valid: Valid) -> None:
    data = valid()
    data["tasks"]["data"]["params"]["fields"] = {"question": "frage"}
    data["overrides"]["bank-b"] = {
        "data": {"params": {"path": "b.jsonl", "fields": {"answer": "antwort"}}},
        "split": {"inputs": {"data": {"path": "b"}}},
    }
    spec = spec_of(data)
    assert spec.params_for("bank-a", "data") == {"path": "a.jsonl", "fields": {"question": "frage"}}
    assert spec.params_for("bank-b", "data") == {
        "path": "b.jsonl",
        "fields": {"question": "frage", "answer": "antwort"},
    }
    assert spec.inputs_for("bank-a", "split") == {"data": "data.dataset"}
    assert spec.inputs_for("bank-b", "split") == {"data": Folder(path="b")}
    # And what comes back is no part of the spec
    spec.params_for("bank-a", "data")["fields"]["question"] = "x"
    assert spec.params_for("bank-a", "data")["fields"] == {"question": "frage"}


# --- Order ---------------------------------------------------------------------------------------


def tasks_of(edges: dict[str, list[str]]) -> PipelineSpec:
    """A pipeline of scorers, which take many inputs, with these edges."""
    tasks = {
        name: {"component": "scorer", "inputs": {"model": [f"{before}.model" for before in befores]}}
        for name, befores in edges.items()
    }
    return spec_of({"version": 1, "name": "x", "parties": {"guest": "a"}, "tasks": tasks})


def test_the_order_is_the_files_wherever_that_is_free() -> None:
    spec = tasks_of({"z": [], "a": ["m"], "m": [], "b": ["z"]})
    assert order(spec) == ("z", "m", "a", "b")


def test_a_party_of_its_own_input_counts_in_the_order(valid: Valid) -> None:
    data = valid()
    data["tasks"] = {"split": data["tasks"]["split"], "data": data["tasks"]["data"]}
    data["tasks"]["split"]["inputs"] = {}
    data["overrides"] = {"bank-b": {"split": {"inputs": {"data": "data.dataset"}}}}
    assert order(spec_of(data)) == ("data", "split")


def test_circles_are_found_and_left_out_of_the_order() -> None:
    spec = tasks_of({"free": [], "a": ["c"], "b": ["a"], "c": ["b"], "after": ["c"]})
    assert circles(waits_for(spec)) == [("a", "b", "c")]
    assert order(spec) == ("free",)


GRAPHS = st.integers(1, 8).flatmap(
    lambda size: st.lists(st.tuples(st.integers(0, size - 1), st.integers(0, size - 1)), max_size=16).map(
        lambda pairs: {f"t{n}": sorted({f"t{b}" for a, b in pairs if a == n}) for n in range(size)}
    )
)


@given(GRAPHS)
def test_any_graph_is_ordered_or_has_a_circle(edges: dict[str, list[str]]) -> None:
    # Given any graph of tasks
    spec = tasks_of(edges)
    done = order(spec)
    rings = circles(waits_for(spec))
    # Then all tasks are ordered exactly when there is no circle
    assert (len(done) == len(edges)) == (not rings)
    for index, task in enumerate(done):
        assert set(edges[task]) <= set(done[:index])
    # And a circle is one, in the direction in which data would flow
    for ring in rings:
        for before, after in zip(ring, (*ring[1:], ring[0]), strict=True):
            assert before in edges[after]
