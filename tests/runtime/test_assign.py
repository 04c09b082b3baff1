"""What each party runs, from a checked pipeline."""

from __future__ import annotations

from fate_llm.core.values import Role
from fate_llm.pipelines import check
from fate_llm.runtime.assign import assignments
from fate_llm.runtime.party import Assignment, InputRef
from tests.runtime.toys import toy_pipeline


def assigned(data: dict[str, object]) -> dict[str, dict[str, Assignment]]:
    found = assignments(check(data))
    return {party: {one.task: one for one in some} for party, some in found.items()}


def test_every_party_gets_its_tasks_in_the_order_of_running() -> None:
    data = toy_pipeline()
    data["tasks"] = dict(reversed(data["tasks"].items()))
    found = assignments(check(data))
    assert [one.task for one in found["a"]] == ["words", "add"]
    assert [one.task for one in found["z"]] == ["add"]


def test_an_arbiter_without_data_has_no_inputs() -> None:
    found = assigned(toy_pipeline())
    assert found["z"]["add"].inputs == {}
    assert found["z"]["add"].roles == (Role.ARBITER,)
    assert found["a"]["add"].inputs == {"data": InputRef(task="words", output="dataset")}


def test_params_are_those_of_the_party() -> None:
    found = assigned(toy_pipeline())
    assert (found["a"]["words"].params.times, found["b"]["words"].params.times) == (1, 2)
    assert found["b"]["words"].params.word == "ab"


def test_without_an_arbiter_the_guest_runs_that_side_too() -> None:
    data = toy_pipeline()
    del data["parties"]["arbiter"]
    found = assigned(data)
    assert found["a"]["add"].roles == (Role.GUEST, Role.ARBITER)
    assert found["b"]["add"].roles == (Role.HOST,)
    assert found["b"]["add"].cohort.coordinator == "a"


def test_a_party_of_two_roles_has_both_and_its_inputs() -> None:
    data = toy_pipeline()
    data["parties"]["arbiter"] = "b"
    found = assigned(data)
    assert found["b"]["add"].roles == (Role.HOST, Role.ARBITER)
    assert found["b"]["add"].inputs["data"] == InputRef(task="words", output="dataset")
    assert found["a"]["add"].roles == (Role.GUEST,)


def test_without_guest_and_arbiter_the_first_contributor_coordinates() -> None:
    data = toy_pipeline()
    del data["parties"]["arbiter"]
    data["tasks"]["add"]["parties"] = ["b", "c"]
    found = assigned(data)
    assert "add" not in found["a"]
    assert found["b"]["add"].roles == (Role.HOST, Role.ARBITER)
    assert found["c"]["add"].roles == (Role.HOST,)


def test_an_override_replaces_the_source() -> None:
    data = toy_pipeline()
    data["overrides"]["c"] = {"add": {"inputs": {"data": {"path": "mine/words"}}}}
    found = assigned(data)
    assert found["c"]["add"].inputs["data"] == InputRef(path="mine/words")
    assert found["b"]["add"].inputs["data"] == InputRef(task="words", output="dataset")


def test_a_list_stays_a_list_and_a_single_source_of_such_a_port_becomes_one() -> None:
    data = toy_pipeline()
    data["tasks"]["add"]["inputs"]["more"] = "words.dataset"
    ref = InputRef(task="words", output="dataset")
    assert assigned(data)["a"]["add"].inputs["more"] == (ref,)
    data["tasks"]["add"]["inputs"]["more"] = ["words.dataset", {"path": "/other"}]
    assert assigned(data)["a"]["add"].inputs["more"] == (ref, InputRef(path="/other"))


def test_a_list_may_name_what_only_some_parties_have() -> None:
    data = toy_pipeline()
    data["tasks"]["own"] = {"component": "words", "parties": ["b"]}
    data["tasks"]["add"]["inputs"]["more"] = ["words.dataset", "own.dataset"]
    found = assigned(data)
    assert "own" in found["b"]
    assert "own" not in found["a"]
    assert len(found["a"]["add"].inputs["more"]) == 2  # type: ignore[arg-type]
