"""All parties in one process: how a job ends, and whose error it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fate_llm.core.errors import DataError, InternalError, JobCancelled, PeerFailed, QuorumLost
from fate_llm.pipelines import check
from fate_llm.protocols.transports.memory import Fault, FaultKind, MemoryNetwork
from fate_llm.runtime.assign import assignments
from fate_llm.runtime.attempt import Outcome
from fate_llm.runtime.events import Event, EventLog, Observer
from fate_llm.runtime.jobfolder import JobFolder
from fate_llm.runtime.local import LocalJob
from tests.runtime.toys import toy_pipeline


def make(data: dict[str, Any], tmp_path: Path, *observers: Observer, network: MemoryNetwork | None = None) -> LocalJob:
    spec = check(data)
    return LocalJob(
        job_id="job",
        roster=spec.roster,
        assignments=assignments(spec),
        seed=spec.job.seed,
        patience=spec.job.round_deadline,
        base=tmp_path,
        folder=JobFolder.create(tmp_path / "jobs", "job"),
        events=EventLog(now=lambda: 0.0, observers=observers),
        network=network,
    )


def breaking(at: str, *, error: str = "DataError", arbiter: bool = True) -> dict[str, Any]:
    data = toy_pipeline(bad={"component": "breaker", "params": {"at": at, "error": error}})
    if not arbiter:
        del data["parties"]["arbiter"]
    return data


def codes(outcome: Outcome) -> dict[str, str]:
    return {party: error.code for party, error in outcome.errors.items()}


def test_success_brings_every_party_s_outputs(tmp_path: Path) -> None:
    outcome = make(toy_pipeline(), tmp_path).run()
    assert (outcome.status, outcome.error, outcome.errors) == ("success", None, {})
    assert set(outcome.outputs) == {"a", "b", "c", "z"}
    assert Path(outcome.outputs["b"]["words"]["dataset"]).read_text() == "ab ab"
    assert Path(outcome.outputs["c"]["add"]["model"]).read_text() == "9.0"
    assert outcome.outputs["z"] == {"add": {}}


def test_traffic_is_counted_at_both_ends(tmp_path: Path) -> None:
    traffic = make(toy_pipeline(), tmp_path).run().traffic
    assert traffic["a"]["z"]["sent"] == traffic["z"]["a"]["received"] > 0
    assert traffic["a"]["z"]["sent_bytes"] == traffic["z"]["a"]["received_bytes"] > 0
    assert traffic["a"]["b"]["refused"] == 0


@pytest.mark.parametrize("at", ["a", "b", "c", "z"])
def test_the_error_of_the_party_that_failed_is_the_cause(at: str, tmp_path: Path) -> None:
    outcome = make(breaking(at), tmp_path).run()
    assert outcome.status == "failed"
    assert isinstance(outcome.error, DataError)
    assert outcome.error.message == f"broken at {at}"
    assert codes(outcome)[at] == "data_invalid"
    others = set(codes(outcome).values()) - {"data_invalid"}
    assert others <= {PeerFailed.code, QuorumLost.code}


@pytest.mark.parametrize("at", ["a", "b", "c"])
def test_also_where_the_guest_coordinates_and_loses_its_quorum(at: str, tmp_path: Path) -> None:
    # The guest comes first in the roster, and its own error is only what followed.
    outcome = make(breaking(at, arbiter=False), tmp_path).run()
    assert isinstance(outcome.error, DataError)
    assert outcome.error.message == f"broken at {at}"


def test_a_failure_between_parties_comes_before_those_who_only_heard_of_it(tmp_path: Path) -> None:
    outcome = make(breaking("c", error="RoundTimeout"), tmp_path).run()
    assert outcome.error is not None
    assert outcome.error.code in ("timeout", "quorum_lost")
    assert codes(outcome)["a"] == "peer_failed"


def test_a_bug_is_the_cause_too(tmp_path: Path) -> None:
    outcome = make(breaking("b", error="ValueError"), tmp_path).run()
    assert isinstance(outcome.error, InternalError)
    assert "ValueError: broken at b" in outcome.error.message


def test_when_every_party_only_heard_of_a_failure_one_of_them_speaks(tmp_path: Path) -> None:
    outcome = make(breaking("b", error="PeerFailed"), tmp_path).run()
    assert outcome.status == "failed"
    assert outcome.error is not None


def test_what_was_finished_before_a_failure_stays(tmp_path: Path) -> None:
    data = breaking("b")
    data["tasks"] = {"words": {"component": "words"}, **data["tasks"]}
    outcome = make(data, tmp_path).run()
    assert set(outcome.outputs["a"]) == {"words"}


class TestCancel:
    def test_it_wakes_everyone_who_waits(self, tmp_path: Path) -> None:
        waiting: list[str] = []

        def watch(event: Event) -> None:
            if event.kind == "note":
                waiting.append(event.party)
                if len(waiting) == 3:
                    job.cancel("enough")

        job = make(toy_pipeline(wait={"component": "waiter"}), tmp_path, watch)
        outcome = job.run()
        assert outcome.status == "cancelled"
        assert isinstance(outcome.error, JobCancelled)
        assert outcome.error.message == "enough"
        assert set(codes(outcome).values()) == {"cancelled"}

    def test_before_the_start(self, tmp_path: Path) -> None:
        job = make(toy_pipeline(), tmp_path)
        job.cancel("not today")
        outcome = job.run()
        assert outcome.status == "cancelled"
        assert outcome.outputs["a"] == {}

    def test_after_the_end_it_changes_nothing(self, tmp_path: Path) -> None:
        job = make(toy_pipeline(), tmp_path)
        outcome = job.run()
        job.cancel("too late")
        assert outcome.status == "success"

    def test_a_failure_while_all_are_being_stopped_is_still_a_cancelled_job(self, tmp_path: Path) -> None:
        def watch(event: Event) -> None:
            if event.kind == "task_started" and event.task == "bad" and event.party == "b":
                job.cancel("enough")

        data = toy_pipeline(bad={"component": "breaker", "params": {"at": "b"}})
        job = make(data, tmp_path, watch)
        outcome = job.run()
        assert outcome.status == "cancelled"
        assert codes(outcome)["b"] == "data_invalid"

    def test_a_party_may_stop_the_job_for_all(self, tmp_path: Path) -> None:
        outcome = make(breaking("c", error="JobCancelled"), tmp_path).run()
        assert outcome.status == "cancelled"
        assert isinstance(outcome.error, JobCancelled)

    def test_ctrl_c_stops_all_parties(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # Ctrl-C arrives in the main thread while it waits for the parties.
        import threading

        original, calls = threading.Thread.join, []

        def interrupted(self: threading.Thread, timeout: float | None = None) -> None:
            if self.name.startswith("party-") and not calls:
                calls.append(self.name)
                raise KeyboardInterrupt
            original(self, timeout)

        monkeypatch.setattr(threading.Thread, "join", interrupted)
        outcome = make(toy_pipeline(wait={"component": "waiter"}), tmp_path).run()
        assert outcome.status == "cancelled"
        assert outcome.error is not None
        assert "Ctrl-C" in outcome.error.message

    def test_also_while_the_parties_are_being_started(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import threading

        original = threading.Thread.start

        def interrupted(self: threading.Thread) -> None:
            if self.name == "party-c":
                raise KeyboardInterrupt
            original(self)

        monkeypatch.setattr(threading.Thread, "start", interrupted)
        outcome = make(toy_pipeline(wait={"component": "waiter"}), tmp_path).run()
        assert outcome.status == "cancelled"
        assert outcome.outputs["c"] == {}


def test_a_message_that_is_lost_ends_the_job_with_its_name(tmp_path: Path) -> None:
    data = toy_pipeline()
    data["job"]["round_deadline"] = 0.2
    network = MemoryNetwork([Fault(FaultKind.LOSE, "a", "z", 1)])
    outcome = make(data, tmp_path, network=network).run()
    assert outcome.status == "failed"
    assert codes(outcome)["z"] == "quorum_lost"


def test_what_is_refused_is_told(tmp_path: Path) -> None:
    seen: list[Event] = []
    network = MemoryNetwork([Fault(FaultKind.DUPLICATE, "a", "z", 1)])
    outcome = make(toy_pipeline(), tmp_path, seen.append, network=network).run()
    assert outcome.status == "success", "a duplicate is dropped"
    assert outcome.traffic["z"]["a"]["duplicates"] == 1
