"""The plan: order, each party's view, traffic and memory, who learns what."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fate_llm.core.values import Cohort, Role
from fate_llm.pipelines.check import check
from fate_llm.pipelines.plan import Plan, make_plan
from fate_llm.pipelines.plan_protection import ProtectionPlan

pytestmark = pytest.mark.usefixtures("registry")

Valid = Callable[[], dict[str, Any]]


def plan_of(data: dict[str, Any], **changes: Any) -> Plan:
    return make_plan(check({**data, **changes}))


def views(registry: dict[str, dict[str, Any]]) -> list[Any]:
    """What trainers were shown when they estimated."""
    found: list[Any] = registry["component"]["trainer"].views
    return found


def test_tasks_come_in_the_order_of_running(valid: Valid) -> None:
    data = valid()
    data["tasks"] = dict(reversed(data["tasks"].items()))
    assert [task.name for task in plan_of(data).tasks] == ["data", "split", "tune", "score"]


def test_each_party_sees_its_tasks_roles_and_inputs(valid: Valid) -> None:
    # Given bank-c with a model of its own on disk
    data = valid()
    data["overrides"]["bank-c"]["score"] = {"inputs": {"model": [{"path": "mine"}, "tune.model"]}}
    tune, score = plan_of(data).tasks[2:]
    # Then every party's view names it
    assert tune.roles["bank-b"] == (Role.HOST,)
    assert tune.roles["consortium"] == (Role.ARBITER,)
    assert tune.inputs["bank-a"] == {"train": ("split.train",), "test": ("split.test",)}
    assert score.inputs["bank-c"] == {"model": ("mine", "tune.model"), "data": ("split.test",)}
    # And an arbiter without data reads nothing
    assert tune.inputs["consortium"] == {}


def test_bytes_are_added_up_by_party(valid: Valid) -> None:
    # Given four rounds of one kilobyte each way, and scores of unknown size that hosts send to the guest
    plan = plan_of(valid())
    totals = {party.party: party for party in plan.parties}
    # Then the arbiter's are known, and the others' as far as can be
    assert totals["consortium"].bytes_sent == totals["consortium"].bytes_received == 3 * 4 * 1024
    assert totals["bank-a"].bytes_sent == 4 * 1024
    assert totals["bank-a"].bytes_received is None
    assert totals["bank-a"].bytes_received_known == 4 * 1024
    assert totals["bank-b"].bytes_sent is None
    assert totals["bank-b"].bytes_sent_known == 4 * 1024


def test_memory_is_the_peak_of_a_partys_tasks(valid: Valid) -> None:
    data = valid()
    # Given a scorer whose memory is unknown
    totals = plan_of(data).parties[0]
    assert (totals.memory_bytes, totals.memory_bytes_known) == (None, 5 * 2**20)
    # When it is not there
    del data["tasks"]["score"]
    totals = plan_of(data).parties[0]
    # Then the largest task counts
    assert totals.memory_bytes == 5 * 2**20
    # And for an arbiter what coordinating needs
    assert plan_of(data).parties[-1].memory_bytes == 2**20


def test_a_party_without_tasks_needs_nothing(valid: Valid) -> None:
    data = valid()
    data["tasks"] = {"data": data["tasks"]["data"]}
    totals = plan_of(data).parties[-1]
    assert (totals.party, totals.tasks, totals.bytes_sent, totals.memory_bytes) == ("consortium", (), 0, 0)


def test_a_component_sees_params_and_makers_by_party(
    valid: Valid, registry: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    # Given a trainer behind a splitter, which only passes data on, behind a reader
    views(registry).clear()
    make_plan(check(valid()), base=tmp_path)
    # When the trainer estimates
    (view,) = views(registry)
    # Then it sees each party's params, what makes its input, and what makes that
    assert view.task == "tune"
    assert view.base == tmp_path
    assert view.cohort.coordinator == "consortium"
    assert {party: params.rounds for party, params in view.params.items()} == dict.fromkeys(
        ("bank-a", "bank-b", "bank-c", "consortium"), 4
    )
    assert set(view.upstream) == {"train", "train.data", "test", "test.data"}
    assert {party: maker for party, (maker, _) in view.upstream["train"].items()} == dict.fromkeys(
        ("bank-a", "bank-b", "bank-c"), "divider"
    )
    assert {party: params.path for party, (_, params) in view.upstream["train.data"].items()} == {
        "bank-a": "a.jsonl",
        "bank-b": "b.jsonl",
        "bank-c": "c.jsonl",
    }


def test_many_sources_have_makers_of_their_own(valid: Valid, registry: dict[str, dict[str, Any]]) -> None:
    # Given a scorer that looks at what makes its models
    seen: list[Any] = []
    scorer = registry["component"]["scorer"]
    original = scorer.estimate
    data = valid()
    data["tasks"]["alone"] = {**data["tasks"]["tune"], "parties": ["bank-a"]}
    data["tasks"]["score"]["inputs"]["model"] = ["tune.model", "alone.model", {"path": "x"}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorer, "estimate", lambda self, view: (seen.append(view), original(self, view))[1])
        make_plan(check(data))
    # Then each source that a task makes has a key
    upstream = seen[0].upstream
    assert set(upstream["model"]) == {"bank-a", "bank-b", "bank-c"}
    assert set(upstream["model[1]"]) == {"bank-a"}
    assert "model[2]" not in upstream


@pytest.mark.parametrize(
    ("protection", "sentence"),
    [
        ("open", "consortium learns every party's own terms (open: the coordinator sees every term)"),
        ("sealed", "consortium learns totals only (sealed: the coordinator sees the sum)"),
    ],
)
def test_the_plan_says_what_the_coordinator_learns(valid: Valid, protection: str, sentence: str) -> None:
    data = valid()
    data["tasks"]["tune"]["params"]["protection"] = protection
    plan = plan_of(data)
    assert plan.tasks[2].learns == (sentence,)
    assert plan.tasks[0].learns == ()
    assert sentence in str(plan)


def test_alone_there_is_nothing_to_learn(valid: Valid) -> None:
    data = valid()
    data["tasks"] = {name: data["tasks"][name] for name in ("data", "split", "tune")}
    data["tasks"]["tune"]["parties"] = ["bank-a"]
    assert plan_of(data).tasks[2].learns == ()


def test_the_text_shows_everything(valid: Valid) -> None:
    text = str(plan_of(valid(), experiment=True))
    assert text.startswith("demo (experiment: local runtime only)\n")
    for part in (
        "1. data  [source]",
        "3. tune  [trainer]",
        "bank-b as host: train <- split.train; test <- split.test",
        "consortium as arbiter\n",
        "bank-b -> consortium  update  4 x 1.0 KiB",
        "bank-b -> bank-a  models  1 x unknown",
        "memory of a contributor: 5.0 MiB",
        "note: tiny",
        "nothing is sent",
        "unknown, at least 4.0 KiB",
        "12.0 KiB",
    ):
        assert part in text, part
    assert not any(line != line.rstrip() for line in text.splitlines())


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB"), (2**52, "4096.0 TiB")],
)
def test_sizes_are_for_people(valid: Valid, registry: dict[str, dict[str, Any]], count: int, text: str) -> None:
    from fate_llm.core.interfaces import Estimate

    data = valid()
    data["tasks"] = {"data": data["tasks"]["data"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry["component"]["source"], "estimate", lambda self, view: Estimate(memory_bytes=count))
        assert f"memory of a contributor: {text}\n" in str(plan_of(data)) + "\n"


def hidden(valid: Valid, **changes: Any) -> Plan:
    data = valid()
    data["tasks"]["tune"]["params"] |= {"protection": "sealed"} | changes.pop("params", {})
    return plan_of(data, **changes)


def test_the_plan_says_what_each_role_learns_under_a_protection_that_hides(valid: Valid) -> None:
    plan = hidden(valid)
    (found,) = plan.tasks[2].protections
    assert list(found.lines()) == [
        "coordinator consortium: the sum; no term",
        "contributors bank-a, bank-b, bank-c: the sum",
        "threshold: 3 of 3 contributors must stay to the end of a round; with fewer the round is refused and nothing "
        "is opened",
        "values of an update are cut to 1 in size; the result comes with a bound on its error",
    ]
    for line in found.lines():
        assert f"     {line}\n" in str(plan)
    assert plan.tasks[2].as_dict()["protections"] == [
        {
            "protection": "sealed",
            "learns": {"coordinator": "the sum; no term", "contributors": "the sum"},
            "counted": 3,
            "threshold": 3,
            "clip": 1.0,
            "key_holder": None,
            "shared_key": False,
            "notes": list(found.notes()),
        }
    ]


def test_one_that_adds_up_is_said_not_to_count(valid: Valid) -> None:
    parties = {"guest": "bank-a", "hosts": ["bank-b", "bank-c", "bank-d", "bank-e"]}
    (found,) = hidden(valid, parties=parties, params={"protection_params": {"threshold": 4}}).tasks[2].protections
    assert (found.counted, found.threshold) == (4, 4)
    assert any("4 of 4 contributors" in note and "the one that adds up not counted" in note for note in found.notes())


def test_retries_and_rounds_that_were_answered(valid: Valid) -> None:
    (without,) = hidden(valid).tasks[2].protections
    (found,) = hidden(valid, job={"retries": 2}).tasks[2].protections
    assert set(found.notes()) - set(without.notes()) == {
        "a round that was answered is not repeated by a retry: where one party had answered and the job is tried "
        "again, the task fails for good"
    }


def test_what_shows_terms_has_nothing_to_say_of_hiding(valid: Valid) -> None:
    plan = plan_of(valid())
    assert [task.protections for task in plan.tasks] == [(), (), (), ()]
    assert "threshold" not in str(plan)


def test_a_shared_key_is_said_loudly() -> None:
    cohort = Cohort(("a", "b", "c"), "z", 3)
    learns = {"coordinator": "boxes", "key_holder": "the sum", "key_holder with coordinator": "everything"}
    for holder, shared, loud in (("b", True, True), ("k", True, False), ("k", False, False)):
        found = ProtectionPlan("boxed", learns, cohort, 3, None, None, holder, shared, 0)
        text = "\n".join(found.lines())
        assert text.startswith(
            "coordinator z: boxes\nkey holder " + f"{holder}: the sum\nkey holder with coordinator: "
        )
        assert (f"SHARED KEY: {holder} holds the key and contributes" in text) == loud


def test_the_plan_is_plain_values_too(valid: Valid) -> None:
    # Given the plan as `--json` prints it
    found = json.loads(json.dumps(plan_of(valid()).as_dict()))
    # Then it says the same
    assert found["order"] == ["data", "split", "tune", "score"]
    assert found["experiment"] is False
    tune = found["tasks"][2]
    assert tune["roles"]["consortium"] == ["arbiter"]
    assert tune["coordinator"] == "consortium"
    assert tune["quorum"] == 3
    assert tune["traffic"][0] == {
        "sender": "bank-a",
        "receiver": "consortium",
        "what": "update",
        "times": 4,
        "bytes_each": 1024,
        "bytes": 4096,
    }
    assert found["tasks"][3]["traffic"][0]["bytes"] is None
    assert found["parties"]["bank-a"]["roles"] == ["guest"]
    assert found["parties"]["bank-a"]["bytes_received"] is None
    assert found["parties"]["consortium"]["bytes_sent"] == 12288


def test_the_same_pipeline_gives_the_same_text(valid: Valid) -> None:
    assert str(plan_of(valid())) == str(plan_of(valid()))
