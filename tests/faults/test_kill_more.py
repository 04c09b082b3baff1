"""Several victims at once, one that stays away for a round, and one that never comes back."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.faults.matrix import Hold, Matrix, open_matrix, toy_job, until
from tests.services import workers_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    with open_matrix(tmp_path_factory.mktemp("more"), "a", "b", "c", "z") as matrix:
        yield matrix


@pytest.fixture
def matrix(federation: Matrix) -> Iterator[Matrix]:
    yield federation
    federation.quiet()


def test_the_guest_s_service_and_the_arbiter_s_worker_at_once(matrix: Matrix) -> None:
    # Given: the arbiter has summed round 2 and kept nothing of it
    hold = Hold("z", "worker", "collect", "", "2", "after")
    job = begun(matrix, hold)
    # When
    matrix.services["a"].kill()
    assert len(matrix.services["z"].kill_worker()) == 1
    matrix.doors.open(hold)
    matrix.services["a"].start()
    # Then
    views = matrix.succeeded(job, toy_job())
    assert {party: view["restarts"] for party, view in views.items()} == {"a": 1, "b": 0, "z": 1}


def test_all_services_at_once(matrix: Matrix) -> None:
    # Given: half of the host's update has left
    hold = Hold("b", "worker", "seal", "", "round.term/2/2")
    job = begun(matrix, hold)
    # When: the power goes, and comes back
    for live in matrix.services.parties.values():
        live.kill()
    until(lambda: not any(workers_of(live.home) for live in matrix.services.parties.values()), "all workers die too")
    matrix.doors.open(hold)
    for live in matrix.services.parties.values():
        live.start()
    # Then
    views = matrix.succeeded(job, toy_job())
    assert [view["restarts"] for view in views.values()] == [1, 1, 1]


def test_a_party_that_misses_a_round_is_left_out_and_rejoins(matrix: Matrix) -> None:
    # Given: three contributors of whom two are enough; c's machine dies in its local training of round 2
    pipeline = toy_job(size=64)
    pipeline["parties"]["hosts"] = ["b", "c"]
    pipeline["job"] |= {"round_deadline": "12s", "quorum": 2}
    away, later = Hold("c", "worker", "work", "", "2"), Hold("z", "worker", "collect", "", "2", "after")
    matrix.doors.shut(later)
    job = begun(matrix, away, pipeline)
    # When: it stays away for longer than the round's deadline, and is back before the last round opens
    matrix.services["c"].kill()
    matrix.doors.open(away)
    matrix.doors.reached(later)
    matrix.services["c"].start().ready()
    until(lambda: events(matrix, job, "c", "resumed"), "c goes on")
    matrix.doors.open(later)
    # Then: the same attempt goes on, without it where it was not there, with it at the end
    views = matrix.services.ended_everywhere(job)
    assert {party: (view["state"], view["attempt"]) for party, view in views.items()} == dict.fromkeys(
        views, ("success", 1)
    ), views
    counted = {event["round"]: event["contributors"] for event in events(matrix, job, "z", "round_closed")}
    assert counted == {1: ["a", "b", "c"], 2: ["a", "b"], 3: ["a", "b", "c"]}
    models = {matrix.services.output(job, party, "steps", "model") for party in "abc"}
    assert len(models) == 1, "all end with one model"
    for party in views:
        matrix.check_dossier(job, party)


@pytest.mark.parametrize(("victim", "seconds"), [("b", 12), ("a", 12)], ids=["host", "guest"])
def test_a_machine_that_never_comes_back(matrix: Matrix, victim: str, seconds: int) -> None:
    # Given
    pipeline = toy_job(size=64)
    pipeline["job"]["lost_after"] = f"{seconds}s"
    hold = Hold(victim, "worker", "work", "", "2")
    job = begun(matrix, hold, pipeline)
    # When: its power is cut for good
    matrix.services[victim].kill()
    # Then: every other party says who was not heard, for how long, and what to do
    for party in sorted({"a", "b", "z"} - {victim}):
        live = matrix.services[party]
        view = live.until(lambda live=live: ended(live.client.job(job)), what="the end")
        assert view["state"] == "timed_out", (party, view)
        assert view["attempt"] == 1
        trouble = view["trouble"]
        assert trouble["code"] == "timeout", (party, view)
        assert f"no word from {victim}" in trouble["message"], (party, view)
        assert f"{seconds} s" in trouble["message"], (party, view)
        assert "resume" in trouble["hint"]
        until(lambda live=live: not workers_of(live.home), f"{party} has no worker")
    # And when it is there again after all, it hears the same
    matrix.doors.open(hold)
    matrix.services[victim].start().ready()
    views = matrix.services.ended_everywhere(job)
    assert {party: view["state"] for party, view in views.items()} == dict.fromkeys(views, "timed_out")


def ended(view: dict[str, Any]) -> dict[str, Any] | None:
    return view if view["state"] in ("timed_out", "failed", "cancelled", "success") else None


def test_a_worker_that_stands_still_is_waited_for(matrix: Matrix) -> None:
    # Given: the host's worker is stopped (SIGSTOP) in the middle of its upload: a machine that swaps, or sleeps
    hold = Hold("b", "worker", "seal", "", "round.term/2/2")
    job = begun(matrix, hold)
    (worker,) = workers_of(matrix.services["b"].home)
    os.kill(worker, signal.SIGSTOP)
    matrix.doors.open(hold)
    # When: the arbiter's worker dies meanwhile
    (before,) = matrix.services["z"].kill_worker()
    until(lambda: set(workers_of(matrix.services["z"].home)) - {before}, "a new worker of z")
    os.kill(worker, signal.SIGCONT)
    # Then
    views = matrix.succeeded(job, toy_job())
    assert {party: view["restarts"] for party, view in views.items()} == {"a": 0, "b": 0, "z": 1}


def test_the_records_of_all_of_it_hold(matrix: Matrix) -> None:
    matrix.check_records()


def begun(matrix: Matrix, hold: Hold, pipeline: dict[str, Any] | None = None) -> str:
    """A job that stands at a stage."""
    matrix.doors.shut(hold)
    job = matrix.submit(pipeline or toy_job())
    matrix.doors.reached(hold)
    return job


def events(matrix: Matrix, job: str, party: str, kind: str) -> list[dict[str, Any]]:
    return [event for event in matrix.services[party].events(job) if event["event"] == kind]
