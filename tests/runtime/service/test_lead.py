"""The job as a whole: every row of its table, and what follows from what the parties report."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import fate_llm.core
from fate_llm.core.errors import (
    DataError,
    FateError,
    InternalError,
    JobCancelled,
    PeerFailed,
    PolicyError,
    ProtectionError,
    RoundTimeout,
)
from fate_llm.runtime.service import lead
from fate_llm.runtime.service.lead import (
    Cancel,
    Dossier,
    Ended,
    Heard,
    Ignored,
    LeadMachine,
    MakeDossier,
    Note,
    Restarted,
    Resume,
    Say,
    Submitted,
    Tick,
)
from fate_llm.runtime.service.words import Ending, Finding, JobState, News, PartState, Report, TaskView, Trouble

DIGEST = "ab" * 32
ROOT = Path(fate_llm.core.__file__).parents[2]
PARTIES = ("a", "b", "c")
TASKS = {"read": ("a", "b"), "train": PARTIES, "score": ("a",)}
DONE = TaskView(state="success")


class Driver:
    """A lead, a clock, and reports of three parties with growing serials."""

    def __init__(self, **settings: Any) -> None:
        given = {"expires": 2000.0, "lost_after": 100.0, **settings}
        self.machine = LeadMachine("job", DIGEST, "a", PARTIES, TASKS, **given)
        self.now = 1000.0
        self.serials = dict.fromkeys(PARTIES, 0)

    def do(self, event: Any) -> list[Any]:
        """One event, through the database and back: what it asked for."""
        before = self.machine.to_data()
        actions = self.machine.handle(event)
        if any(isinstance(action, Ignored) for action in actions):
            assert self.machine.to_data() == before
        stored = json.loads(json.dumps(self.machine.to_data()))
        self.machine = LeadMachine.from_data(stored)
        assert self.machine.to_data() == stored
        return actions

    def hear(self, party: str, state: PartState, attempt: int | None = None, **fields: Any) -> list[Any]:
        """A new report of a party; an ended one has its statement."""
        self.serials[party] += 1
        signed = state.ended and state is not PartState.REFUSED
        values = {"serial": self.serials[party], "statement": {"of": party} if signed else None, **fields}
        number = self.machine.attempt if attempt is None else attempt
        report = Report(job="job", digest=DIGEST, state=state, attempt=number, **values)
        return self.do(Heard(report, party, self.now))

    def all(self, state: PartState, but: str = "", **fields: Any) -> list[Any]:
        actions = []
        for party in PARTIES:
            if party not in but:
                actions += self.hear(party, state, **fields)
        return actions

    def again(self) -> None:
        """Signs of life: every party repeats what it said last."""
        for party, report in self.machine.reports.items():
            self.do(Heard(report, party, self.now))

    def tick(self, seconds: float = 1.0) -> list[Any]:
        self.now += seconds
        return self.do(Tick(self.now))

    def wait(self, seconds: float, *, but: str = "abc") -> list[Any]:
        """Ticks of five seconds, in which all parties but these give signs of life."""
        actions = []
        for _ in range(int(seconds / 5)):
            actions += self.tick(5.0)
            for party, report in tuple(self.machine.reports.items()):
                if party not in but:
                    actions += self.do(Heard(report, party, self.now))
        return actions

    @property
    def state(self) -> JobState:
        return self.machine.state


def says(actions: list[Any]) -> dict[str, News]:
    return {action.receiver: action.news for action in actions if isinstance(action, Say)}


def kinds(actions: list[Any]) -> list[type]:
    return [type(action) for action in actions if not isinstance(action, Note | Say)]


def at(state: JobState, **settings: Any) -> Driver:
    """A job that has come as far as `state` by the usual way."""
    driver = Driver(**settings)
    if state is JobState.PENDING:
        return driver
    driver.do(Submitted(driver.now))
    if state is JobState.INVITED:
        return driver
    if state is JobState.CANCELLED:
        driver.hear("b", PartState.ACCEPTED)
        driver.do(Cancel("enough", "ann", driver.now))
        return driver
    if state is JobState.TIMED_OUT:
        driver.hear("b", PartState.APPROVAL)
        driver.now = 2000.0
        driver.do(Tick(driver.now))
        return driver
    driver.all(PartState.ACCEPTED)
    if state is JobState.READY:
        driver.tick(61.0)
        return driver
    if state is JobState.WAITING:
        return driver
    driver.all(PartState.QUEUED)
    driver.all(PartState.RESERVED)
    driver.all(PartState.RUNNING)
    if state is JobState.FAILED:
        driver.hear("b", PartState.FAILED, trouble=trouble(DataError("row 3"), "b"))
    elif state is JobState.SUCCESS:
        driver.all(PartState.SUCCESS, tasks={"train": DONE, "read": DONE, "score": DONE})
    return driver


def trouble(error: FateError, party: str) -> Trouble:
    return Trouble(**error.as_dict(), party=party)


def finish(driver: Driver) -> Ending:
    """Let all end, and put the dossier together."""
    if not driver.machine.composing:
        driver.all(PartState.CANCELLED)
    actions = driver.do(Dossier({"made": True}, driver.now))
    (ended,) = [action for action in actions if isinstance(action, Ended)]
    assert driver.machine.final
    return ended.ending


STATES = list(JobState)
OPEN = [JobState.INVITED, JobState.READY, JobState.WAITING, JobState.RUNNING]
ENDED = [state for state in STATES if state.ended]
REPORT = Report(job="job", digest=DIGEST, serial=99, state=PartState.ACCEPTED, attempt=1)
EVENTS: dict[type, Any] = {
    Submitted: Submitted(1000.0),
    Heard: Heard(REPORT, "b", 1000.0),
    Tick: Tick(1000.0),
    Cancel: Cancel("enough", "ann", 1000.0),
    Resume: Resume("ann", "mended", 1000.0),
    Dossier: Dossier({}, 1000.0),
    Restarted: Restarted(1000.0),
}


@pytest.mark.parametrize("state", STATES)
def test_the_usual_way_leads_to_every_state(state: JobState) -> None:
    assert at(state).state is state


# --- the usual way ------------------------------------------------------------------------------------------------


def test_all_are_invited_with_the_specification_until_they_have_answered() -> None:
    driver = Driver()
    actions = driver.do(Submitted(driver.now))
    assert [(a.receiver, a.invite, a.news.attempt) for a in actions if isinstance(a, Say)] == [
        ("a", True, 1),
        ("b", True, 1),
        ("c", True, 1),
    ]
    driver.hear("b", PartState.UNHEARD)
    actions = driver.tick(6.0)
    assert {a.receiver: a.invite for a in actions if isinstance(a, Say)} == {"a": True, "b": False, "c": True}


def test_room_is_asked_for_when_all_have_accepted() -> None:
    driver = at(JobState.INVITED)
    driver.all(PartState.ACCEPTED, but="c")
    assert driver.state is JobState.INVITED
    actions = driver.hear("c", PartState.ACCEPTED)
    assert [a.event for a in actions if isinstance(a, Note)] == ["job_ready", "job_waiting"]
    assert {news.state for news in says(actions).values()} == {JobState.WAITING}


def test_workers_start_when_all_hold_room() -> None:
    driver = at(JobState.WAITING)
    driver.all(PartState.RESERVED, but="b")
    driver.hear("b", PartState.QUEUED)
    assert driver.state is JobState.WAITING
    news = says(driver.hear("b", PartState.RESERVED))
    assert set(news) == set(PARTIES)
    assert {(n.state, n.attempt) for n in news.values()} == {(JobState.RUNNING, 1)}


def test_success_needs_all_parts_and_is_final_with_all_statements() -> None:
    driver = at(JobState.RUNNING)
    driver.all(PartState.SUCCESS, but="c")
    assert driver.state is JobState.RUNNING
    actions = driver.hear("c", PartState.SUCCESS, statement=None)
    assert driver.state is JobState.SUCCESS and MakeDossier not in kinds(actions)
    assert all(news.ending is None for news in says(actions).values())
    (made,) = [a for a in driver.hear("c", PartState.SUCCESS) if isinstance(a, MakeDossier)]
    assert made == MakeDossier(JobState.SUCCESS, None, 1, {p: {"of": p} for p in PARTIES})
    actions = driver.do(Dossier({"x": 1}, driver.now, 1))
    ending = Ending(state=JobState.SUCCESS, dossier={"x": 1})
    assert Ended(ending) in actions
    assert all(news.ending == ending for news in says(actions).values()) and len(says(actions)) == 3


def test_everybody_sees_how_far_the_others_are() -> None:
    driver = at(JobState.RUNNING)
    tasks = {"train": TaskView(state="running", round=1, rounds=3)}
    driver.now += 1.0
    assert says(driver.hear("b", PartState.RUNNING, tasks=tasks))["a"].parts["b"].tasks == tasks
    # Rounds alone travel with the next sign of life
    further = {"train": TaskView(state="running", round=2, rounds=3)}
    assert says(driver.hear("b", PartState.RUNNING, tasks=further)) == {}
    assert says(driver.tick(6.0))["a"].parts["b"].tasks == further


# --- no -----------------------------------------------------------------------------------------------------------


def test_a_refusal_ends_the_job_and_says_who_and_why() -> None:
    driver = at(JobState.INVITED)
    driver.hear("a", PartState.ACCEPTED)
    refusal = Finding(rule="models", outcome="refuse")
    actions = driver.hear("b", PartState.REFUSED, reason="models: hub:x", findings=(refusal,))
    assert driver.state is JobState.FAILED and set(says(actions)) == {"a", "b"}
    assert driver.machine.trouble is not None
    assert (driver.machine.trouble.code, driver.machine.trouble.party) == (PolicyError.code, "b")
    assert driver.machine.trouble.message == "b refuses the job: models: hub:x"
    # A party that never heard of the job is not waited for, and one that comes late is told
    driver.hear("a", PartState.CANCELLED)
    assert finish(driver).state is JobState.FAILED
    assert says(driver.hear("c", PartState.ACCEPTED))["c"].ending is not None


def test_no_answer_until_the_deadline_ends_the_job_and_says_whose() -> None:
    driver = at(JobState.INVITED)
    driver.hear("a", PartState.ACCEPTED)
    driver.hear("b", PartState.APPROVAL)
    driver.now = 1998.0
    driver.tick(1.0)
    assert driver.state is JobState.INVITED
    driver.tick(1.0)
    assert driver.state is JobState.TIMED_OUT and driver.machine.trouble is not None
    assert driver.machine.trouble.message.endswith("b waits for a person's approval, c has not answered")


# --- room ---------------------------------------------------------------------------------------------------------


def test_room_that_does_not_come_everywhere_is_given_back_and_asked_for_again() -> None:
    driver = at(JobState.WAITING)
    driver.all(PartState.RESERVED, but="c")
    driver.hear("c", PartState.QUEUED)
    driver.wait(55, but="")
    assert driver.state is JobState.WAITING
    actions = driver.wait(5, but="")
    assert {news.state for news in says(actions).values()} == {JobState.READY}
    # It is asked for again only when all have given theirs back
    driver.all(PartState.ACCEPTED, but="b")
    driver.wait(30, but="")
    assert driver.state is JobState.READY
    driver.hear("b", PartState.ACCEPTED)
    assert driver.state is JobState.WAITING and driver.machine.attempt == 1


def test_pauses_grow_and_differ_between_jobs_and_holding_on_takes_longer() -> None:
    def pauses(job: str) -> list[float]:
        machine = LeadMachine(job, DIGEST, "a", PARTIES, TASKS, expires=2000.0)
        found = []
        for tries in range(1, 12):
            machine.tries = tries
            found.append(machine._pause())
        return found

    first, second = pauses("one"), pauses("two")
    assert first != second and pauses("one") == first
    assert 2.5 <= first[0] <= 7.5 and 60 <= first[-1] <= 180
    assert first[4] > first[0]
    driver = at(JobState.WAITING)
    driver.machine.tries = 3
    driver.tick(119.0)
    assert driver.state is JobState.WAITING
    driver.tick(1.0)
    assert driver.state is JobState.READY


@pytest.mark.parametrize("state", [JobState.READY, JobState.WAITING])
def test_a_policy_that_wants_a_person_now_gives_the_room_back_meanwhile(state: JobState) -> None:
    driver = at(state)
    actions = driver.hear("c", PartState.APPROVAL)
    assert {news.state for news in says(actions).values()} == {JobState.INVITED}
    driver.wait(900, but="")
    assert driver.state is JobState.INVITED
    driver.all(PartState.ACCEPTED)
    driver.tick(10.0)
    assert driver.state is JobState.WAITING


def test_a_word_of_room_that_was_about_an_earlier_time_costs_a_number_and_no_retry() -> None:
    driver = at(JobState.RUNNING)
    actions = driver.hear("b", PartState.ACCEPTED)
    assert driver.state is JobState.WAITING and driver.machine.attempt == 2 and driver.machine.retried == 0
    assert Note("room_lost", {"attempt": 1, "parties": ["b"]}) in actions


# --- failures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [DataError("row 3"), PolicyError("not here"), FateError("x"), ProtectionError("not finite")]
)
def test_a_failed_part_ends_the_job_when_no_retries_are_left(error: FateError) -> None:
    driver = at(JobState.RUNNING)
    actions = driver.hear("b", PartState.FAILED, trouble=trouble(error, "b"))
    assert driver.state is JobState.FAILED
    assert {news.state for news in says(actions).values()} == {JobState.FAILED}
    assert finish(driver).trouble == trouble(error, "b")


@pytest.mark.parametrize("error", [FateError("out of memory"), ProtectionError("not finite")])
def test_a_failed_part_is_tried_again_while_retries_are_left(error: FateError) -> None:
    driver = at(JobState.RUNNING, retries=1)
    driver.hear("a", PartState.RUNNING, tasks={"read": DONE, "score": DONE})
    driver.hear("b", PartState.RUNNING, tasks={"read": DONE, "train": DONE})
    actions = driver.hear("c", PartState.FAILED, trouble=trouble(error, "c"))
    news = says(actions)["b"]
    assert (news.state, news.attempt) == (JobState.WAITING, 2)
    # What all that run a task had finished is not run again
    assert news.finished == ("read", "score")
    # In the next attempt nobody has said anything yet
    assert {view.state for view in news.parts.values()} == {PartState.UNHEARD}
    driver.all(PartState.RESERVED)
    driver.hear("c", PartState.FAILED, trouble=trouble(error, "c"))
    assert driver.state is JobState.FAILED and driver.machine.finished == ("read", "score")


@pytest.mark.parametrize("error", [DataError("row 3"), PolicyError("not here")])
def test_what_another_attempt_cannot_mend_is_not_tried_again(error: FateError) -> None:
    driver = at(JobState.RUNNING, retries=5)
    driver.hear("b", PartState.FAILED, trouble=trouble(error, "b"))
    assert driver.state is JobState.FAILED and driver.machine.attempt == 1


def test_the_cause_is_waited_for_before_what_it_caused_decides() -> None:
    driver = at(JobState.RUNNING, retries=5)
    missed = trouble(PeerFailed("c failed"), "b")
    actions = driver.hear("b", PartState.FAILED, trouble=missed)
    # The others learn of it at once
    assert driver.state is JobState.RUNNING and says(actions)["c"].parts["b"].state is PartState.FAILED
    driver.hear("c", PartState.FAILED, trouble=trouble(DataError("row 3"), "c"))
    assert driver.state is JobState.FAILED
    assert driver.machine.trouble == trouble(DataError("row 3"), "c")


def test_the_cause_is_not_waited_for_longer_than_that() -> None:
    driver = at(JobState.RUNNING, retries=1)
    driver.hear("b", PartState.FAILED, trouble=trouble(PeerFailed("c failed"), "b"))
    driver.tick(14.0)
    assert driver.state is JobState.RUNNING
    driver.tick(1.0)
    assert driver.state is JobState.WAITING and driver.machine.attempt == 2


def test_the_cause_is_not_waited_for_when_all_have_ended() -> None:
    driver = at(JobState.RUNNING)
    for party in PARTIES:
        driver.hear(party, PartState.FAILED, trouble=trouble(PeerFailed("somebody"), party))
    assert driver.state is JobState.FAILED and driver.machine.trouble is not None
    assert driver.machine.trouble.code == "peer_failed"


def test_a_cause_that_comes_after_the_decision_is_shown_all_the_same() -> None:
    driver = at(JobState.RUNNING)
    driver.hear("b", PartState.FAILED, trouble=trouble(PeerFailed("c failed"), "b"))
    driver.tick(20.0)
    assert driver.state is JobState.FAILED
    driver.hear("a", PartState.CANCELLED, trouble=trouble(JobCancelled("told to"), "a"))
    driver.hear("c", PartState.FAILED, trouble=trouble(DataError("row 3"), "c"))
    assert finish(driver).trouble == trouble(DataError("row 3"), "c")


def test_a_part_that_gave_the_lead_up_ends_the_job_as_timed_out() -> None:
    driver = at(JobState.RUNNING)
    silent = trouble(RoundTimeout("no word from a, which leads the job, for 100 s"), "b")
    driver.hear("b", PartState.CANCELLED, trouble=silent)
    driver.hear("c", PartState.CANCELLED, trouble=trouble(JobCancelled("b left"), "c"))
    driver.tick(20.0)
    assert driver.state is JobState.TIMED_OUT and driver.machine.trouble == silent


def test_a_part_that_failed_without_saying_why_is_a_failure_too() -> None:
    driver = at(JobState.RUNNING)
    driver.hear("b", PartState.FAILED)
    assert driver.state is JobState.FAILED and driver.machine.trouble is not None
    assert driver.machine.trouble.message == "its part ended without saying why"


# --- silence ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [JobState.READY, JobState.WAITING, JobState.RUNNING])
def test_a_silent_party_ends_the_job_with_its_name_and_never_too_early(state: JobState) -> None:
    driver = at(state)
    driver.again()
    driver.wait(95, but="b")
    assert not driver.state.ended
    driver.again() if state is not JobState.RUNNING else driver.tick(4.0)
    driver.wait(105, but="b")
    assert driver.state is JobState.TIMED_OUT and driver.machine.trouble is not None
    assert driver.machine.trouble.message == "no word from b for 100 s" and driver.machine.trouble.party == "b"
    assert driver.machine.parts["b"].state is PartState.LOST
    # It is not waited for at the end
    driver.all(PartState.CANCELLED, but="b")
    assert finish(driver).state is JobState.TIMED_OUT


def test_nobody_is_lost_while_people_are_asked() -> None:
    driver = at(JobState.INVITED, expires=1e9)
    driver.hear("b", PartState.APPROVAL)
    driver.hear("a", PartState.ACCEPTED)
    driver.wait(500)
    assert driver.state is JobState.INVITED
    # and who was silent meanwhile has its whole time from then on
    driver.all(PartState.ACCEPTED)
    driver.wait(55)
    assert not driver.state.ended


def test_who_has_ended_its_part_may_be_silent() -> None:
    driver = at(JobState.RUNNING)
    driver.hear("b", PartState.SUCCESS)
    driver.wait(300, but="b")
    assert driver.state is JobState.RUNNING


def test_a_service_that_slept_has_heard_nobody() -> None:
    driver = at(JobState.RUNNING)
    driver.tick(86400.0)
    driver.tick(-3600.0)
    assert driver.state is JobState.RUNNING
    driver.wait(90)
    driver.do(Restarted(driver.now))
    driver.wait(90)
    assert driver.state is JobState.RUNNING


def test_parties_that_give_no_sign_of_life_get_fewer() -> None:
    driver = at(JobState.INVITED, expires=1e9)
    actions = driver.wait(600)
    assert 0 < len([a for a in actions if isinstance(a, Say) and a.receiver == "c"]) < 40
    driver.hear("b", PartState.APPROVAL)
    actions = driver.wait(100, but="ac")
    assert len([a for a in actions if isinstance(a, Say) and a.receiver == "b"]) == 20


# --- words --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", OPEN + ENDED)
@pytest.mark.parametrize(
    ("change", "sender", "why"),
    [
        ({}, "eve", "eve has no part"),
        ({"job": "other"}, "b", "speaks of job other"),
        ({"digest": "cd" * 32}, "b", "digest cdcd"),
        ({"attempt": 9}, "b", "attempt 9"),
        ({"serial": 0}, "b", "older"),
    ],
)
def test_words_that_do_not_fit_change_nothing(state: JobState, change: dict[str, Any], sender: str, why: str) -> None:
    driver = at(state)
    if "b" not in driver.machine.reports:
        driver.hear("b", PartState.UNHEARD)
    (ignored,) = driver.do(Heard(REPORT.model_copy(update=change), sender, driver.now))
    assert isinstance(ignored, Ignored) and why in ignored.why


def test_reports_of_an_attempt_before_count_for_nothing() -> None:
    driver = at(JobState.RUNNING, retries=1)
    driver.hear("b", PartState.FAILED, trouble=trouble(FateError("x"), "b"))
    assert driver.machine.attempt == 2
    driver.all(PartState.SUCCESS, attempt=1)
    assert driver.state is JobState.WAITING
    driver.hear("a", PartState.RUNNING, attempt=1, wish="cancel")
    assert driver.state is JobState.WAITING


def test_every_change_has_a_higher_serial_and_a_repetition_has_not() -> None:
    driver = at(JobState.WAITING)
    first = says(driver.tick(6.0))["b"].serial
    assert says(driver.tick(6.0))["b"].serial == first
    assert says(driver.hear("b", PartState.RESERVED))["b"].serial == first + 1


# --- people -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", OPEN)
def test_a_person_at_any_party_cancels(state: JobState) -> None:
    here, there = at(state), at(state)
    here.do(Cancel("wrong data", "ann", here.now))
    there.hear("c", PartState.CANCELLED, wish="cancel", wish_reason="bob: wrong data")
    for driver, who in ((here, "ann: wrong data"), (there, "c: bob: wrong data")):
        assert driver.state is JobState.CANCELLED and driver.machine.trouble is not None
        assert driver.machine.trouble.message == f"cancelled by {who}"


def test_a_job_that_nobody_was_asked_about_is_just_over() -> None:
    driver = Driver()
    actions = driver.do(Cancel("enough", "ann", driver.now))
    assert kinds(actions) == [MakeDossier] and says(actions) == {}
    assert Ended(Ending(state=JobState.CANCELLED, trouble=driver.machine.trouble)) in driver.do(
        Dossier(None, driver.now)
    )


@pytest.mark.parametrize("state", [JobState.FAILED, JobState.CANCELLED, JobState.TIMED_OUT])
@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("there", [True, False])
def test_a_person_at_any_party_resumes(state: JobState, final: bool, there: bool) -> None:
    driver = at(state, retries=2)
    driver.machine.retried = 2
    if final:
        finish(driver)
    wish = {"wish": "resume", "wish_reason": "bob: mended"}
    resumed = driver.hear("b", PartState.FAILED, **wish) if there else driver.do(Resume("ann", "mended", driver.now))
    assert driver.state is JobState.WAITING and driver.machine.attempt == 2
    assert driver.machine.retried == 0 and not driver.machine.final
    assert all(news.ending is None for news in says(resumed).values()) and len(says(resumed)) == 3
    # The wish is fulfilled: said again it changes nothing
    driver.again()
    assert driver.machine.attempt == 2
    # A dossier of the end before comes too late
    assert isinstance(driver.do(Dossier({}, driver.now, 1))[0], Ignored)


def test_a_job_that_has_succeeded_is_not_resumed() -> None:
    driver = at(JobState.SUCCESS)
    assert isinstance(driver.do(Resume("ann", "", driver.now))[0], Ignored)
    driver.hear("b", PartState.SUCCESS, wish="resume")
    assert driver.state is JobState.SUCCESS


# --- the end ------------------------------------------------------------------------------------------------------


def test_the_end_waits_for_all_statements_but_not_for_ever() -> None:
    driver = at(JobState.FAILED)
    driver.hear("a", PartState.CANCELLED)
    driver.hear("b", PartState.FAILED)
    assert MakeDossier not in kinds(driver.wait(95, but=""))
    (made,) = [a for a in driver.wait(10, but="") if isinstance(a, MakeDossier)]
    assert set(made.statements) == {"a", "b"}


def test_a_dossier_is_asked_for_once_and_again_after_a_kill() -> None:
    driver = at(JobState.SUCCESS)
    assert MakeDossier not in kinds(driver.wait(50, but=""))
    assert MakeDossier in kinds(driver.do(Restarted(driver.now)))
    assert isinstance(driver.do(Dossier({}, driver.now, 7))[0], Ignored)
    assert Ended in kinds(driver.do(Dossier({}, driver.now, 1)))
    assert isinstance(driver.do(Dossier({"other": 1}, driver.now, 1))[0], Ignored)
    assert kinds(driver.do(Restarted(driver.now))) == [Ended]


def test_after_the_end_only_who_asks_is_told() -> None:
    driver = at(JobState.SUCCESS)
    ending = finish(driver)
    assert [driver.tick(10.0) for _ in range(20)] == [[]] * 20
    report = driver.machine.reports["c"]
    (word,) = driver.do(Heard(report, "c", driver.now))
    assert word.receiver == "c" and word.news.ending == ending and not word.invite


@pytest.mark.parametrize("state", ENDED)
@pytest.mark.parametrize("said", [s for s in PartState if s is not PartState.UNHEARD])
def test_what_has_ended_stays_ended_whatever_is_reported(state: JobState, said: PartState) -> None:
    driver = at(state)
    driver.all(said)
    driver.all(said, wish="cancel")
    driver.do(Restarted(driver.now))
    driver.wait(300, but="b")
    assert driver.state is state and driver.machine.attempt == 1


# --- after a kill, and the table ----------------------------------------------------------------------------------


@pytest.mark.parametrize("state", OPEN)
def test_a_service_that_came_up_again_tells_everybody(state: JobState) -> None:
    driver = at(state)
    assert set(says(driver.do(Restarted(driver.now)))) == set(PARTIES)
    assert driver.state is state


def test_stored_data_of_an_earlier_version_can_be_read_and_nonsense_cannot() -> None:
    least = {"job": "job", "digest": DIGEST, "party": "a", "members": ["a"], "tasks": {"t": ["a"]}, "expires": 5.0}
    assert LeadMachine.from_data(least) == LeadMachine("job", DIGEST, "a", ("a",), {"t": ("a",)}, 5.0)
    for wrong in ({}, {**least, "state": "flying"}, {**least, "reports": {"a": {}}}):
        with pytest.raises(InternalError, match="stored job"):
            LeadMachine.from_data(wrong)


def rows() -> list[tuple[str, str]]:
    text = (ROOT / "docs" / "explanation" / "jobs.md").read_text(encoding="utf-8")
    table = text.partition("**Lead**")[2].strip().split("\n\n")[0]
    return [(found[1], found[2]) for found in re.finditer(r"^\| ([^|]+) \| ([^|]+) \| [^|]+ \|$", table, re.M)][2:]


def test_the_manual_s_table_is_the_code_s() -> None:
    names = {"all": STATES, "open": OPEN, "ended": ENDED}
    shown = [
        (state, event)
        for group, event in rows()
        for name in group.split(", ")
        for state in names.get(name, [JobState(name)] if name not in names else [])
    ]
    assert len(shown) > 40 and len(shown) == len(set(shown)), "a row says the same twice"
    assert set(shown) == {(state, event.__name__.lower()) for state, row in lead._TABLE.items() for event in row}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("event", sorted(EVENTS, key=lambda kind: kind.__name__))
def test_a_pair_outside_the_table_is_a_bug_and_changes_nothing(state: JobState, event: type) -> None:
    driver = at(state)
    before = driver.machine.to_data()
    if event in lead._TABLE[state]:
        driver.do(EVENTS[event])  # does not raise; `do` sees to it that what is ignored changes nothing
        return
    with pytest.raises(InternalError, match="is not allowed while"):
        driver.machine.handle(EVENTS[event])
    assert driver.machine.to_data() == before


@pytest.mark.parametrize(
    ("state", "event"),
    [
        (JobState.PENDING, Heard),
        *[(state, event) for state in OPEN for event in (Resume, Dossier)],
        *[(state, Cancel) for state in ENDED],
    ],
)
def test_what_comes_at_the_wrong_time_is_ignored(state: JobState, event: type) -> None:
    (ignored,) = at(state).do(EVENTS[event])
    assert isinstance(ignored, Ignored)
