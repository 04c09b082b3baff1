"""One party's part of a job: every row of its table, and what holds whatever comes."""

from __future__ import annotations

import json
import re
from copy import deepcopy as copy
from itertools import count
from pathlib import Path
from typing import Any

import pytest

import fate_llm.core
from fate_llm.core.errors import DataError, FateError, InternalError, JobCancelled, PeerFailed
from fate_llm.runtime.service import lead as lead_module
from fate_llm.runtime.service import part
from fate_llm.runtime.service.part import (
    Approved,
    AskHuman,
    Cancel,
    Close,
    Decide,
    Decided,
    Denied,
    Granted,
    Ignored,
    MakeStatement,
    NoRoom,
    Note,
    PartMachine,
    Progress,
    Release,
    Reserve,
    Restarted,
    Say,
    StartWorker,
    Statement,
    StopWorker,
    TellWorker,
    Tick,
    Told,
    Wish,
    WorkerDied,
    WorkerEnded,
)
from fate_llm.runtime.service.words import (
    Ending,
    Finding,
    JobState,
    News,
    PartState,
    PartView,
    Report,
    TaskView,
    Trouble,
)

DIGEST = "ab" * 32
ROOT = Path(fate_llm.core.__file__).parents[2]
PASSES = (Finding(rule="initiators", outcome="pass"),)


class Driver:
    """A machine, a clock, and the lead's words in order."""

    def __init__(self, **settings: Any) -> None:
        self.machine = PartMachine("job", DIGEST, "b", "a", lost_after=60.0, **settings)
        self.now = 1000.0
        self.serials = count(1)

    def do(self, event: Any) -> list[Any]:
        """One event, through the database and back: what it asked for."""
        if isinstance(event, Tick) and not (actions := copy(self.machine).handle(event)):
            self.machine.handle(event)  # nothing to store
            return actions
        before = self.machine.to_data()
        actions = self.machine.handle(event)
        if any(isinstance(action, Ignored) for action in actions):
            assert self.machine.to_data() == before
        stored = json.loads(json.dumps(self.machine.to_data()))
        self.machine = PartMachine.from_data(stored)
        assert self.machine.to_data() == stored
        return actions

    def told(self, state: JobState, attempt: int = 1, **fields: Any) -> list[Any]:
        return self.do(Told(news(state, attempt, serial=next(self.serials), **fields), self.now))

    def tick(self, seconds: float = 1.0) -> list[Any]:
        self.now += seconds
        return self.do(Tick(self.now))

    def wait(self, seconds: float) -> list[Any]:
        """Ticks of a second, and all that they asked for."""
        return [action for _ in range(int(seconds)) for action in self.tick()]

    @property
    def state(self) -> PartState:
        return self.machine.state


def news(state: JobState, attempt: int = 1, *, serial: int = 1, **fields: Any) -> News:
    return News(job="job", digest=fields.pop("digest", DIGEST), serial=serial, state=state, attempt=attempt, **fields)


def kinds(actions: list[Any]) -> list[type]:
    return [type(action) for action in actions if not isinstance(action, Note)]


def said(actions: list[Any]) -> Report:
    (report,) = [action.report for action in actions if isinstance(action, Say)]
    return report


def at(state: PartState, **settings: Any) -> Driver:
    """A part that has come as far as `state` by the usual way."""
    driver = Driver(**settings)
    driver.told(JobState.INVITED)
    if state is PartState.UNHEARD:
        return driver
    if state in (PartState.APPROVAL, PartState.REFUSED):
        outcome = "manual" if state is PartState.APPROVAL else "refuse"
        driver.do(Decided(outcome, (Finding(rule="models", outcome=outcome, found="x", allowed="y"),), driver.now))  # type: ignore[arg-type]
        return driver
    driver.do(Decided("accept", PASSES, driver.now))
    if state is PartState.ACCEPTED:
        return driver
    driver.told(JobState.WAITING)
    if state is PartState.QUEUED:
        return driver
    driver.do(Granted(driver.now))
    if state is PartState.RESERVED:
        return driver
    driver.told(JobState.RUNNING)
    if state is PartState.RUNNING:
        return driver
    error = {PartState.FAILED: DataError("row 3"), PartState.CANCELLED: JobCancelled("enough")}.get(state)
    driver.do(WorkerEnded(1, {"error": error and error.as_dict(), "tasks": {}}, driver.now))
    assert driver.state is state
    return driver


STATES = [state for state in PartState if state is not PartState.LOST]
OPEN = [state for state in STATES if not state.ended]
ENDED = [state for state in STATES if state.ended]
EVENTS: dict[type, Any] = {
    Decided: Decided("accept", PASSES, 1000.0),
    Approved: Approved("ann", "", 1000.0),
    Denied: Denied("ann", "no", 1000.0),
    Granted: Granted(1000.0),
    NoRoom: NoRoom("too big", 1000.0),
    WorkerEnded: WorkerEnded(1, {"error": None}, 1000.0),
    WorkerDied: WorkerDied(1, "killed by signal 9", 1000.0),
    Progress: Progress({}, 1000.0),
    Statement: Statement({"x": 1}, 1000.0),
    Wish: Wish("resume", "ann", "again", 1000.0),
    Tick: Tick(1000.0),
    Restarted: Restarted(1000.0),
    Cancel: Cancel("enough", "ann", 1000.0),
    Told: Told(news(JobState.INVITED), 1000.0),
}


# --- the usual way ------------------------------------------------------------------------------------------------


def test_an_invitation_is_decided_by_the_policy() -> None:
    driver = Driver()
    actions = driver.told(JobState.INVITED)
    assert kinds(actions) == [Decide, Say]
    assert said(actions).state is PartState.UNHEARD and said(actions).digest == DIGEST


def test_what_the_policy_accepts_is_said_and_nothing_starts_yet() -> None:
    driver = at(PartState.UNHEARD)
    actions = driver.do(Decided("accept", PASSES, driver.now))
    assert kinds(actions) == [Say]
    assert said(actions).state is PartState.ACCEPTED and said(actions).findings == PASSES
    assert kinds(driver.told(JobState.READY)) == []


def test_a_part_runs_only_after_room_and_the_lead_s_word() -> None:
    driver = at(PartState.ACCEPTED)
    actions = driver.told(JobState.WAITING)
    assert kinds(actions) == [Reserve, Say] and actions[0].since == driver.now
    actions = driver.do(Granted(driver.now))
    assert kinds(actions) == [Say] and said(actions).state is PartState.RESERVED
    actions = driver.told(JobState.RUNNING, finished=("read",))
    assert actions[0] == StartWorker(1, ("read",), again=False)
    assert said(actions).state is PartState.RUNNING


def test_success_gives_room_back_and_is_signed_and_closed() -> None:
    driver = at(PartState.RUNNING)
    view = {"state": "success", "round": 3, "rounds": 3}
    actions = driver.do(WorkerEnded(1, {"error": None, "tasks": {"train": view}}, driver.now))
    assert kinds(actions) == [Release, MakeStatement, Say]
    assert said(actions).tasks["train"] == TaskView(state="success", round=3, rounds=3)
    actions = driver.do(Statement({"signed": "by b"}, driver.now, 1))
    assert said(actions).statement == {"signed": "by b"}
    ending = Ending(state=JobState.SUCCESS, dossier={"x": 1})
    assert kinds(driver.told(JobState.SUCCESS)) == []
    assert Close(ending) in driver.told(JobState.SUCCESS, ending=ending)
    assert driver.machine.over
    # From here on it is silent, whatever it is told again
    assert driver.wait(100) == []
    assert kinds(driver.told(JobState.SUCCESS, ending=ending)) == []


# --- what is decided here -----------------------------------------------------------------------------------------


def test_a_person_is_asked_and_says_yes() -> None:
    driver = at(PartState.UNHEARD)
    finding = Finding(rule="models", outcome="manual")
    actions = driver.do(Decided("manual", (finding,), driver.now))
    assert kinds(actions) == [AskHuman, Say] and actions[1] == AskHuman((finding,))
    assert driver.state is PartState.APPROVAL
    # The lead may ask for room as much as it likes
    assert driver.told(JobState.WAITING) == driver.told(JobState.RUNNING) == []
    driver.told(JobState.INVITED)
    actions = driver.do(Approved("ann", "fine", driver.now))
    assert actions[0] == Note("approved", {"by": "ann", "reason": "fine"})
    assert driver.state is PartState.ACCEPTED


def test_a_person_says_no() -> None:
    driver = at(PartState.APPROVAL)
    report = said(driver.do(Denied("ann", "not with them", driver.now)))
    assert report.state is PartState.REFUSED and report.reason == "ann said no: not with them"


def test_waiting_for_a_person_outlives_silence_and_restarts() -> None:
    driver = at(PartState.APPROVAL)
    driver.wait(200)
    assert AskHuman in kinds(driver.do(Restarted(driver.now)))
    driver.wait(200)
    assert driver.state is PartState.APPROVAL
    assert said(driver.do(Approved("ann", "", driver.now))).state is PartState.ACCEPTED


def test_a_refusal_names_the_rules() -> None:
    driver = at(PartState.UNHEARD)
    findings = (
        Finding(rule="initiators", outcome="pass"),
        Finding(rule="models", outcome="refuse", found="hub:x", allowed="package:*"),
        Finding(rule="data", outcome="refuse"),
    )
    report = said(driver.do(Decided("refuse", findings, driver.now)))
    assert report.state is PartState.REFUSED
    assert report.reason == "models: hub:x, allowed: package:*; data: this job"
    # What refuses comes first: a word has room for so many
    assert [finding.rule for finding in report.findings] == ["models", "data", "initiators"]


def test_a_policy_that_changes_its_mind_before_the_start_is_heard() -> None:
    for state in (PartState.ACCEPTED, PartState.QUEUED, PartState.RESERVED):
        driver = at(state)
        actions = driver.do(Decided("refuse", (), driver.now))
        assert driver.state is PartState.REFUSED
        assert (Release in kinds(actions)) is (state is not PartState.ACCEPTED)


def test_room_that_will_never_be_there_refuses_the_job() -> None:
    driver = at(PartState.QUEUED)
    report = said(driver.do(NoRoom("the job needs 3 GPUs of 2", driver.now)))
    assert report.state is PartState.REFUSED and report.reason == "the job needs 3 GPUs of 2"


@pytest.mark.parametrize("state", STATES)
def test_news_of_another_digest_change_nothing(state: PartState) -> None:
    driver = at(state)
    for wrong in (news(JobState.RUNNING, 9, serial=99, digest="cd" * 32), news(JobState.RUNNING, 9, serial=99)):
        told = wrong if wrong.digest != DIGEST else wrong.model_copy(update={"job": "other"})
        (ignored,) = driver.do(Told(told, driver.now))
        assert isinstance(ignored, Ignored) and "decided was" in ignored.why


@pytest.mark.parametrize("state", [PartState.UNHEARD, PartState.APPROVAL, PartState.REFUSED])
def test_what_was_not_accepted_does_not_start(state: PartState) -> None:
    driver = at(state)
    for wanted in (JobState.WAITING, JobState.RUNNING):
        assert not {Reserve, StartWorker} & set(kinds(driver.told(wanted)))
    assert not {Reserve, StartWorker} & set(kinds(driver.do(Restarted(driver.now))))
    assert not {Reserve, StartWorker} & set(kinds(driver.do(Granted(driver.now))))


def test_a_part_that_holds_no_room_does_not_start() -> None:
    for state in (PartState.ACCEPTED, PartState.QUEUED):
        driver = at(state)
        actions = driver.told(JobState.RUNNING)
        assert StartWorker not in kinds(actions)
        assert driver.state is PartState.ACCEPTED


# --- order of words -----------------------------------------------------------------------------------------------


def test_older_news_change_nothing_and_are_no_sign_of_life() -> None:
    driver = at(PartState.RESERVED)
    driver.wait(20)
    silence = driver.machine.silence
    (ignored,) = driver.do(Told(news(JobState.INVITED, serial=1), driver.now))
    assert isinstance(ignored, Ignored) and "older" in ignored.why
    assert driver.machine.silence == silence > 0


def test_an_attempt_that_is_over_is_not_taken_up_again() -> None:
    driver = at(PartState.UNHEARD)
    driver.told(JobState.WAITING, 4)
    (ignored,) = driver.told(JobState.WAITING, 3)
    assert isinstance(ignored, Ignored) and "attempt 3 is over" in ignored.why


def test_the_same_news_again_are_a_sign_of_life_and_nothing_else() -> None:
    driver = at(PartState.RUNNING)
    driver.wait(20)
    same = news(JobState.RUNNING, serial=driver.machine.news_serial)
    assert driver.do(Told(same, driver.now)) == []
    assert driver.machine.silence == 0.0


# --- room ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [PartState.QUEUED, PartState.RESERVED])
@pytest.mark.parametrize("wanted", [JobState.READY, JobState.INVITED])
def test_room_is_given_back_when_the_lead_says_so_and_keeps_its_age(state: PartState, wanted: JobState) -> None:
    driver = at(state)
    first = driver.machine.since
    driver.now += 70
    assert kinds(driver.told(wanted)) == [Release, Say]
    assert driver.state is PartState.ACCEPTED
    (reserve, *_) = driver.told(JobState.WAITING)
    assert reserve == Reserve(first)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "state", [s for s in STATES if s not in (PartState.QUEUED, PartState.RESERVED, PartState.RUNNING)]
)
def test_room_that_comes_too_late_is_given_back(state: PartState) -> None:
    assert kinds(at(state).do(Granted(1000.0))) == [Release, Ignored]


# --- workers ------------------------------------------------------------------------------------------------------


def test_a_dead_worker_is_started_again_with_the_same_attempt_after_a_growing_pause() -> None:
    driver = at(PartState.RUNNING)
    pauses = []
    for _ in range(8):
        driver.do(WorkerDied(1, "killed by signal 9", driver.now))
        died = driver.now
        while StartWorker(1, (), again=True) not in (driver.tick(0.25)):
            driver.told(JobState.RUNNING)
            assert driver.state is PartState.RUNNING
        pauses.append(driver.now - died)
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert driver.machine.restarts == 8


def test_a_worker_that_dies_too_often_without_a_round_has_failed() -> None:
    driver = at(PartState.RUNNING, restarts_allowed=2)
    for _ in range(2):
        driver.do(WorkerDied(1, "exit status 1", driver.now))
        driver.told(JobState.RUNNING)
        driver.wait(30)
    actions = driver.do(WorkerDied(1, "exit status 1", driver.now))
    report = said(actions)
    assert Release in kinds(actions) and report.state is PartState.FAILED and report.restarts == 2
    assert report.trouble is not None
    assert report.trouble.message == "the worker of b died 3 times without ending a round (exit status 1)"


def test_a_round_that_ended_forgives_the_deaths_before_it() -> None:
    driver = at(PartState.RUNNING, restarts_allowed=1)
    for number in range(1, 6):
        driver.do(WorkerDied(1, "exit status 1", driver.now))
        driver.told(JobState.RUNNING)
        driver.wait(2)
        driver.do(Progress({"train": TaskView(state="running", round=number, rounds=9)}, driver.now))
    assert driver.state is PartState.RUNNING
    # What was known before is no progress
    driver.do(WorkerDied(1, "exit status 1", driver.now))
    driver.wait(2)
    driver.do(Progress({"train": TaskView(state="running", round=5, rounds=9)}, driver.now))
    driver.do(WorkerDied(1, "exit status 1", driver.now))
    assert driver.state is PartState.FAILED


def test_a_worker_that_refuses_its_order_is_not_started_again() -> None:
    driver = at(PartState.RUNNING)
    report = said(driver.do(WorkerDied(1, "exit status 2", driver.now, refused=True)))
    assert report.state is PartState.FAILED and report.trouble is not None
    assert "would not start (exit status 2)" in report.trouble.message


@pytest.mark.parametrize(
    ("error", "state"), [(DataError("row 3"), PartState.FAILED), (JobCancelled("enough"), PartState.CANCELLED)]
)
def test_an_error_is_reported_as_the_worker_gave_it(error: FateError, state: PartState) -> None:
    driver = at(PartState.RUNNING)
    report = said(driver.do(WorkerEnded(1, {"error": error.as_dict()}, driver.now)))
    assert report.state is state
    assert report.trouble == Trouble(**error.as_dict(), party="b")


def test_an_endless_error_fits_into_a_word() -> None:
    driver = at(PartState.RUNNING)
    error = {"code": "x" * 9000, "message": "m" * 9000, "hint": "h" * 9000}
    report = said(driver.do(WorkerEnded(1, {"error": error}, driver.now)))
    assert report.trouble is not None
    assert report.trouble.message.endswith(" ...") and len(report.trouble.message) == 2000
    Report.model_validate_json(report.model_dump_json())


def test_tasks_only_go_forward_and_there_are_not_too_many() -> None:
    driver = at(PartState.RUNNING)
    driver.do(Progress({"read": TaskView(state="success"), "train": TaskView(state="running", round=4)}, driver.now))
    driver.do(Progress({"read": TaskView(state="running"), "train": TaskView(state="waiting", round=2)}, driver.now))
    assert driver.machine.tasks == {"read": TaskView(state="success"), "train": TaskView(state="waiting", round=4)}
    driver.do(Progress({f"t{number}": TaskView(state="waiting") for number in range(2000)}, driver.now))
    assert len(driver.machine.tasks) <= 1000
    Report.model_validate_json(said(driver.tick()).model_dump_json())


def test_tasks_that_cannot_be_read_are_our_own_fault_and_change_nothing() -> None:
    driver = at(PartState.RUNNING)
    before = driver.machine.state
    with pytest.raises(InternalError, match="last word"):
        driver.machine.handle(WorkerEnded(1, {"error": None, "tasks": {"train": 3}}, driver.now))
    assert driver.machine.state is before


def test_a_worker_is_told_who_has_left_and_who_is_lost_and_again_after_a_restart() -> None:
    driver = at(PartState.RUNNING)
    views = {
        "a": PartView(state=PartState.SUCCESS),
        "b": PartView(state=PartState.RUNNING),
        "c": PartView(state=PartState.FAILED, trouble=Trouble(code="data_invalid", message="row 3")),
        "d": PartView(state=PartState.LOST, reason="silent"),
        "e": PartView(state=PartState.RUNNING),
    }
    expected = [
        TellWorker({"left": "a"}),
        TellWorker({"lost": ["c", "data_invalid", "has ended: row 3"]}),
        TellWorker({"lost": ["d", "peer_failed", "has ended: silent"]}),
    ]
    assert [a for a in driver.told(JobState.RUNNING, parts=views) if isinstance(a, TellWorker)] == expected
    assert TellWorker not in kinds(driver.told(JobState.RUNNING, parts=views))
    actions = driver.do(Restarted(driver.now))
    assert [a for a in actions if isinstance(a, StartWorker | TellWorker)] == [StartWorker(1, (), True), *expected]


# --- stopping -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [state for state in OPEN if state is not PartState.RUNNING])
@pytest.mark.parametrize("end", [state for state in JobState if state.ended])
def test_a_job_that_has_ended_ends_its_parts(state: PartState, end: JobState) -> None:
    driver = at(state)
    actions = driver.told(end)
    assert driver.state is PartState.CANCELLED
    assert said(actions).reason == f"the job has ended: {end}"
    assert (Release in kinds(actions)) is (state in (PartState.QUEUED, PartState.RESERVED))
    assert driver.machine.room == ""


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (JobCancelled("told to"), PartState.CANCELLED),
        (PeerFailed("c failed"), PartState.CANCELLED),
        (DataError("row 3"), PartState.FAILED),
        (None, PartState.SUCCESS),
    ],
)
def test_a_worker_that_is_stopped_keeps_its_room_until_it_is_gone(error: FateError | None, state: PartState) -> None:
    driver = at(PartState.RUNNING)
    actions = driver.told(JobState.FAILED)
    assert kinds(actions) == [StopWorker] and actions[0].reason == "the job has ended: failed"
    assert driver.state is PartState.RUNNING
    assert StopWorker not in kinds(driver.told(JobState.FAILED))
    actions = driver.do(WorkerEnded(1, {"error": error and error.as_dict()}, driver.now))
    assert kinds(actions) == [Release, MakeStatement, Say] and driver.state is state


def test_a_worker_that_dies_while_it_is_stopped_is_not_started_again() -> None:
    driver = at(PartState.RUNNING)
    driver.told(JobState.CANCELLED)
    driver.do(WorkerDied(1, "killed by signal 9", driver.now))
    assert driver.state is PartState.CANCELLED
    assert StartWorker not in kinds(driver.wait(60))


def test_a_person_here_stops_the_worker_at_once_and_tells_the_lead() -> None:
    driver = at(PartState.RUNNING)
    actions = driver.do(Cancel("wrong data", "bob", driver.now))
    assert kinds(actions) == [StopWorker, Say]
    assert said(actions).wish == "cancel" and said(actions).wish_reason == "bob: wrong data"
    report = said(driver.do(WorkerEnded(1, {"error": JobCancelled("x").as_dict()}, driver.now)))
    assert report.state is PartState.CANCELLED and report.reason == "bob: wrong data" and report.wish == "cancel"
    # It holds for attempts that begin before the lead has heard of it
    assert Decide not in kinds(driver.told(JobState.WAITING, 2))
    assert driver.state is PartState.CANCELLED and driver.machine.attempt == 2
    # until the job has ended
    assert said(driver.told(JobState.CANCELLED, 2)).wish == ""
    assert isinstance(driver.do(Cancel("again", "bob", driver.now))[0], Ignored)


@pytest.mark.parametrize("state", [state for state in OPEN if state is not PartState.RUNNING])
def test_a_person_may_stop_at_any_time(state: PartState) -> None:
    driver = at(state)
    report = said(driver.do(Cancel("no", "bob", driver.now)))
    assert report.state is PartState.CANCELLED and report.wish == "cancel"


# --- attempts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [state for state in STATES if state is not PartState.RUNNING])
def test_a_new_attempt_is_decided_anew(state: PartState) -> None:
    driver = at(state)
    actions = driver.told(JobState.WAITING, 2)
    assert Decide(2) in actions and StartWorker not in kinds(actions)
    assert driver.state is PartState.UNHEARD and driver.machine.attempt == 2
    driver.do(Decided("refuse", (), driver.now))
    assert driver.state is PartState.REFUSED


def test_a_new_attempt_waits_until_the_worker_of_the_old_one_is_gone() -> None:
    driver = at(PartState.RUNNING)
    actions = driver.told(JobState.WAITING, 2)
    assert kinds(actions) == [StopWorker] and driver.machine.attempt == 1
    driver.told(JobState.WAITING, 3)  # the lead may have gone on meanwhile
    actions = driver.do(WorkerEnded(1, {"error": JobCancelled("x").as_dict()}, driver.now))
    assert kinds(actions) == [Decide, Release, Say] and driver.machine.attempt == 3
    driver.do(Decided("accept", PASSES, driver.now))
    assert driver.state is PartState.QUEUED


def test_a_person_s_yes_holds_for_the_digest_and_a_no_is_asked_about_again() -> None:
    yes, no = at(PartState.APPROVAL), at(PartState.APPROVAL)
    yes.do(Approved("ann", "", yes.now))
    no.do(Denied("ann", "", no.now))
    for driver in (yes, no):
        driver.told(JobState.WAITING, 2)
    yes.do(Decided("manual", (), yes.now))
    assert yes.state is PartState.QUEUED
    assert AskHuman in kinds(no.do(Decided("manual", (), no.now)))
    assert no.state is PartState.APPROVAL


def test_a_statement_about_an_attempt_before_is_left() -> None:
    driver = at(PartState.SUCCESS)
    driver.told(JobState.CANCELLED, 2)
    assert isinstance(driver.do(Statement({}, driver.now, 1))[0], Ignored)
    assert said(driver.do(Statement({"of": 2}, driver.now, 2))).statement == {"of": 2}


@pytest.mark.parametrize("event", [WorkerEnded(2, {}, 0.0), WorkerDied(2, "", 0.0)])
def test_a_worker_of_an_attempt_that_never_began_is_a_bug(event: Any) -> None:
    with pytest.raises(InternalError, match="attempt 2"):
        at(PartState.RUNNING).machine.handle(event)


@pytest.mark.parametrize("state", ENDED)
def test_what_has_ended_stays_ended_until_a_higher_attempt(state: PartState) -> None:
    driver = at(state)
    for wanted in (JobState.INVITED, JobState.READY, JobState.WAITING, JobState.RUNNING):
        assert not {StartWorker, Reserve, Decide} & set(kinds(driver.told(wanted)))
    driver.do(Restarted(driver.now))
    driver.wait(100)
    assert driver.state is state


# --- silence ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [PartState.QUEUED, PartState.RESERVED, PartState.RUNNING])
def test_a_silent_lead_is_given_up_and_never_too_early(state: PartState) -> None:
    driver = at(state)
    driver.wait(59)
    assert driver.state is state
    actions = driver.tick()
    if state is PartState.RUNNING:
        assert StopWorker in kinds(actions)
        actions = driver.do(WorkerEnded(1, {"error": PeerFailed("a is silent").as_dict()}, driver.now))
    report = said(actions)
    assert Release in kinds(actions) and report.state is PartState.CANCELLED and report.trouble is not None
    assert report.trouble.code == "timeout"
    assert report.trouble.message == "no word from a, which leads the job, for 60 s"
    # When the lead comes back a new attempt is possible
    assert Decide(2) in driver.told(JobState.WAITING, 2)


@pytest.mark.parametrize("state", [PartState.UNHEARD, PartState.APPROVAL, PartState.ACCEPTED])
def test_who_holds_nothing_waits_for_the_lead(state: PartState) -> None:
    driver = at(state)
    driver.wait(150)
    assert driver.state is state


def test_a_service_that_slept_or_whose_clock_was_set_gives_nobody_up() -> None:
    driver = at(PartState.RUNNING)
    assert StopWorker not in kinds(driver.tick(86400.0))
    driver.told(JobState.RUNNING)
    assert StopWorker not in kinds(driver.tick(-86400.0))
    assert driver.wait(20)  # signs of life go on
    assert driver.state is PartState.RUNNING
    driver.do(WorkerDied(1, "killed", driver.now))
    assert StartWorker in kinds(driver.tick(-3600.0))


# --- words --------------------------------------------------------------------------------------------------------


def test_signs_of_life_come_regularly_and_seldom_to_a_silent_lead() -> None:
    driver = at(PartState.ACCEPTED)
    first = [action for action in driver.wait(20) if isinstance(action, Say)]
    assert len(first) == 4 and len({action.report.serial for action in first}) == 1
    driver.wait(200)
    driver.tick(-50.0)
    driver.machine.silence = 3000.0
    driver.tick(1.0)
    assert 2 <= len(driver.wait(700)) <= 3


def test_progress_is_said_soon_but_not_at_once() -> None:
    driver = at(PartState.RUNNING)
    serial = driver.machine.serial
    driver.tick()
    for number in range(1, 40):
        assert driver.do(Progress({"train": TaskView(state="running", round=number)}, driver.now)) == []
    report = said(driver.tick())
    assert report.tasks["train"].round == 39 and report.serial == serial + 1
    assert driver.tick() == []


def test_a_wish_to_resume_is_said_until_the_lead_has_gone_on() -> None:
    driver = at(PartState.FAILED)
    assert isinstance(driver.do(Wish("resume", "ann", "", driver.now))[0], Ignored)  # the job goes on still
    driver.told(JobState.FAILED, ending=Ending(state=JobState.FAILED))
    assert driver.machine.over
    report = said(driver.do(Wish("resume", "ann", "mended", driver.now)))
    assert report.wish == "resume" and report.wish_reason == "ann: mended" and not driver.machine.over
    assert len([a for a in driver.wait(20) if isinstance(a, Say)]) == 4
    assert Decide(2) in driver.told(JobState.WAITING, 2)
    assert driver.machine.wish == ""


def test_a_wish_that_nobody_hears_is_given_up() -> None:
    driver = at(PartState.FAILED)
    ending = Ending(state=JobState.FAILED)
    driver.told(JobState.FAILED, ending=ending)
    driver.do(Wish("resume", "ann", "mended", driver.now))
    actions = driver.wait(62)
    assert Note("wish_unheard", {"seconds": 60.0}) in actions
    assert actions[-1].report.wish == ""
    assert Close(ending) in driver.told(JobState.FAILED, ending=ending)
    assert driver.wait(20) == []


def test_nobody_wishes_a_job_to_go_on_that_has_succeeded() -> None:
    driver = at(PartState.SUCCESS)
    driver.told(JobState.SUCCESS)
    (ignored,) = driver.do(Wish("resume", "ann", "", driver.now))
    assert isinstance(ignored, Ignored) and "success" in ignored.why


# --- after a kill -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "again"),
    [
        (PartState.UNHEARD, [Release, Decide]),
        (PartState.APPROVAL, [Release, AskHuman]),
        (PartState.ACCEPTED, [Release]),
        (PartState.QUEUED, [Reserve]),
        (PartState.RESERVED, [Reserve]),
        (PartState.RUNNING, [Reserve, StartWorker]),
        (PartState.REFUSED, [Release]),
        (PartState.SUCCESS, [Release, MakeStatement]),
        (PartState.FAILED, [Release, MakeStatement]),
        (PartState.CANCELLED, [Release, MakeStatement]),
    ],
)
def test_a_service_that_came_up_again_asks_for_all_that_is_to_be_done(state: PartState, again: list[type]) -> None:
    driver = at(state)
    assert kinds(driver.do(Restarted(driver.now))) == [*again, Say]
    assert driver.state is state
    # and once more, when it was killed again before it could do any of it
    assert kinds(driver.do(Restarted(driver.now))) == [*again, Say]


def test_a_worker_that_was_being_stopped_is_gone_after_a_restart() -> None:
    driver = at(PartState.RUNNING)
    driver.told(JobState.CANCELLED)
    assert kinds(driver.do(Restarted(driver.now))) == [Release, MakeStatement, Say]
    assert driver.state is PartState.CANCELLED
    # and a new attempt that waited for it begins
    driver = at(PartState.RUNNING)
    driver.told(JobState.WAITING, 2)
    assert Decide(2) in driver.do(Restarted(driver.now))


def test_a_worker_that_waited_for_its_start_is_started_by_a_restart() -> None:
    driver = at(PartState.RUNNING)
    driver.do(WorkerDied(1, "killed", driver.now))
    assert StartWorker(1, (), True) in driver.do(Restarted(driver.now))


def test_how_it_ended_is_asked_for_again_when_it_may_not_have_been_kept() -> None:
    driver = at(PartState.SUCCESS)
    ending = Ending(state=JobState.SUCCESS)
    driver.do(Statement({}, driver.now, 1))
    driver.told(JobState.SUCCESS, ending=ending)
    assert Say in kinds(driver.do(Restarted(driver.now)))
    assert Close(ending) in driver.told(JobState.SUCCESS, ending=ending)


def test_stored_data_of_an_earlier_version_can_be_read_and_nonsense_cannot() -> None:
    least = {"job": "job", "digest": DIGEST, "party": "b", "lead": "a"}
    assert PartMachine.from_data(least) == PartMachine("job", DIGEST, "b", "a")
    for wrong in ({}, {**least, "worker": "flying"}, {**least, "tasks": [1]}, {**least, "attempt": "x"}):
        with pytest.raises(InternalError, match="stored part"):
            PartMachine.from_data(wrong)


# --- the table ----------------------------------------------------------------------------------------------------


def rows(heading: str) -> list[tuple[str, str]]:
    """(states, event) of each row of a table of the manual."""
    text = (ROOT / "docs" / "explanation" / "jobs.md").read_text(encoding="utf-8")
    table = text.partition(f"**{heading}**")[2].strip().split("\n\n")[0]
    return [(found[1], found[2]) for found in re.finditer(r"^\| ([^|]+) \| ([^|]+) \| [^|]+ \|$", table, re.M)][2:]


def spelled(event: type) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", " ", event.__name__).lower()


def test_the_manual_s_table_is_the_code_s() -> None:
    names = {"all": STATES, "before": OPEN[:-1], "ended": ENDED}
    shown = [
        (state, event)
        for group, event in rows("Part")
        for name in group.split(", ")
        for state in names.get(name, [PartState(name)] if name not in names else [])
    ]
    assert OPEN[-1] is PartState.RUNNING and len(shown) > 100
    assert len(shown) == len(set(shown)), "a row says the same twice"
    assert set(shown) == {(state, spelled(event)) for state, row in part._TABLE.items() for event in row}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("event", sorted(EVENTS, key=lambda kind: kind.__name__))
def test_a_pair_outside_the_table_is_a_bug_and_changes_nothing(state: PartState, event: type) -> None:
    driver = at(state)
    before = driver.machine.to_data()
    if event in part._TABLE[state]:
        driver.do(EVENTS[event])  # does not raise; `do` sees to it that what is ignored changes nothing
        return
    with pytest.raises(InternalError, match="is not allowed while"):
        driver.machine.handle(EVENTS[event])
    assert driver.machine.to_data() == before


def test_an_event_of_the_lead_s_machine_is_none_of_ours() -> None:
    with pytest.raises(InternalError, match="Submitted"):
        at(PartState.ACCEPTED).machine.handle(lead_module.Submitted(0.0))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("state", "event"),
    [
        *[(s, e) for s in STATES if s is not PartState.APPROVAL for e in (Approved, Denied)],
        *[(s, NoRoom) for s in STATES if s is not PartState.QUEUED],
        *[(s, Decided) for s in (PartState.RUNNING, *ENDED)],
        *[(s, e) for s in ENDED for e in (WorkerEnded, WorkerDied, Progress)],
        *[(s, e) for s in OPEN for e in (Statement, Wish)],
    ],
)
def test_what_comes_too_late_is_ignored(state: PartState, event: type) -> None:
    (ignored,) = at(state).do(EVENTS[event])
    assert isinstance(ignored, Ignored)
