"""A job as a whole at the guest's service, as a pure machine: it asks, waits, starts, tries again, and ends.

    PENDING --submitted--> INVITED --all accept--> READY --all are free to begin--> WAITING --all have room--> RUNNING
    RUNNING --all succeed--> SUCCESS        WAITING --not all have room in time--> READY (room is given back)
    RUNNING --a part fails, tries are left--> WAITING (next attempt)        WAITING --a person is asked--> INVITED
    any --refusal, failure--> FAILED, --a person--> CANCELLED, --deadline, silence--> TIMED_OUT
    FAILED, CANCELLED, TIMED_OUT --resume--> WAITING (next attempt)

Rules:
1. Events in, actions out; the time comes with the event. An event that is not in the table is an InternalError; a word
   or a person that comes too late is `Ignored`. Nothing has changed then.
2. What follows is computed from the latest report of each party, never from what happened. So lost, repeated and
   reordered reports change nothing but the time it takes.
3. A report counts for the attempt that it names. Success is all parts' success in one attempt.
4. Workers start only when all parties hold room. Room that does not come everywhere in time is given back everywhere,
   so that two jobs which hold each half of the other's room do not wait for ever; times grow, so that both get it.
5. A party is lost only after `lost_after` seconds in which we were awake and heard nothing of it.
6. An end is decided once and told at once. It is final when all parties that know the job have reported their end and
   what they sign about it, or have been silent for too long; only a person's resume leads on from there.
7. Storing and restarting: see `service.part`, rule 7.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fate_llm.core.canonical import digest as digest_of
from fate_llm.core.errors import (
    ConfigurationError,
    FateError,
    FederationError,
    InternalError,
    JobCancelled,
    PolicyError,
    RoundTimeout,
    error_from,
)

from ..attempt import cause_of
from .part import Cancel, Ignored, Note, Restarted, Tick, cut, trouble_of, waking
from .words import Ending, JobState, News, PartState, PartView, Report, Trouble

__all__ = [
    "Action",
    "Cancel",
    "Dossier",
    "Ended",
    "Event",
    "Heard",
    "Ignored",
    "LeadMachine",
    "MakeDossier",
    "Note",
    "Restarted",
    "Resume",
    "Say",
    "Submitted",
    "Tick",
]

_ACCEPTED = (PartState.ACCEPTED, PartState.QUEUED, PartState.RESERVED)
_BACKOFF = (5.0, 120.0)  # seconds until room is asked for again: at first, at most
_SELDOM = 60.0  # seconds between two words to a party that gives no sign of life
_DOUBLINGS = 4  # how often the time to wait for room doubles, once in three tries


# --- events -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Submitted:
    """The job is signed and stored: ask the parties."""

    now: float


@dataclass(frozen=True, slots=True)
class Heard:
    """A party's report about this job. sender: whose service signed it."""

    report: Report
    sender: str
    now: float


@dataclass(frozen=True, slots=True)
class Resume:
    """A person wants a job that has ended to go on."""

    by: str
    reason: str
    now: float


@dataclass(frozen=True, slots=True)
class Dossier:
    """The answer to `MakeDossier`; None when it could not be put together. attempt: the one that it named."""

    dossier: Mapping[str, Any] | None
    now: float
    attempt: int | None = None


Event = Submitted | Heard | Tick | Cancel | Resume | Dossier | Restarted


# --- actions ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Say:
    """To one party. invite: put the signed specification in, the receiver has not said that it has it."""

    receiver: str
    news: News
    invite: bool


@dataclass(frozen=True, slots=True)
class MakeDossier:
    """Put the dossier together, and answer with `Dossier`. statements: by party, as far as they came."""

    state: JobState
    trouble: Trouble | None
    attempt: int
    statements: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Ended:
    """The job is over for good."""

    ending: Ending


Action = Say | MakeDossier | Ended | Note | Ignored


# --- the machine --------------------------------------------------------------------------------------------


@dataclass(slots=True)
class LeadMachine:
    """One job at the service of its guest.

    party: the guest. members: all parties, guest first. tasks: who runs each task. retries: attempts after failures.
    lost_after, heartbeat: seconds. expires: until when all must have accepted, seconds since the epoch. room_patience:
    seconds that room may take to come. settle: seconds in which the cause of a failure may follow what it caused.
    """

    job: str
    digest: str
    party: str
    members: tuple[str, ...]
    tasks: dict[str, tuple[str, ...]]
    expires: float
    retries: int = 0
    lost_after: float = 600.0
    heartbeat: float = 5.0
    room_patience: float = 60.0
    settle: float = 15.0
    # How it is.
    state: JobState = JobState.PENDING
    since: float = 0.0
    attempt: int = 0
    retried: int = 0
    tries: int = 0
    finished: tuple[str, ...] = ()
    deadline: float = 0.0
    window: float = 0.0
    failing: float | None = None
    trouble: Trouble | None = None
    by_parts: bool = False
    composing: bool = False
    ending: Ending | None = None
    # What the parties said.
    reports: dict[str, Report] = field(default_factory=dict)
    silence: dict[str, float] = field(default_factory=dict)
    lost: dict[str, Trouble] = field(default_factory=dict)
    waited: float = 0.0
    # What was said to them.
    serial: int = 0
    said: str = ""
    said_urgent: str = ""
    said_at: dict[str, float] = field(default_factory=dict)
    clock: float | None = None

    def handle(self, event: Event) -> list[Action]:
        """Apply one event. Returns what the driver must do, in order, after it has stored the machine.

        Raises:
            InternalError: our own service tells what cannot be; nothing has changed.
        """
        step = _TABLE[self.state].get(type(event))
        if step is None:
            raise InternalError(f"{type(event).__name__} is not allowed while the job is {self.state}")
        before = dict(self.silence), self.waited, self.clock
        pause = waking(self.clock, event.now)
        self.silence = {party: seconds + pause for party, seconds in self.silence.items()}
        self.waited += pause
        self.clock = event.now
        actions = step(self, event)
        if any(isinstance(action, Ignored) for action in actions):
            self.silence, self.waited, self.clock = before
            return actions
        return [*actions, *self._follow(event), *self._speak(event)]

    @property
    def final(self) -> bool:
        """Nothing happens any more, but a party that asks is told how it ended."""
        return self.ending is not None

    @property
    def statements(self) -> dict[str, dict[str, Any]]:
        """What the parties have signed about the latest attempt."""
        present = {party: self._present(party) for party in self.members}
        return {party: found.statement for party, found in present.items() if found is not None and found.statement}

    @property
    def parts(self) -> dict[str, PartView]:
        """What everybody in the job may know of each party, in roster order."""
        return {party: self._view(party) for party in self.members}

    # --- events ---

    def _submitted(self, event: Submitted) -> list[Action]:
        self.attempt = 1
        self.silence = dict.fromkeys(self.members, 0.0)
        self.deadline, self.window = self.expires, max(0.0, self.expires - event.now)
        return [self._enter(JobState.INVITED, event.now)]

    def _heard(self, event: Heard) -> list[Action]:
        report, sender = event.report, event.sender
        before = self.reports.get(sender)
        if sender not in self.members:
            return [Ignored(f"{sender} has no part in this job")]
        if report.job != self.job or report.digest != self.digest:
            return [Ignored(f"{sender} speaks of job {report.job}, digest {report.digest[:16]}")]
        if before is not None and report.serial < before.serial:
            return [Ignored(f"report {report.serial} of {sender} is older than {before.serial}")]
        if report.attempt > self.attempt:
            return [Ignored(f"{sender} speaks of attempt {report.attempt}; {self.attempt} is the latest")]
        self.reports[sender] = report
        self.silence[sender] = 0.0
        return []

    def _too_early(self, event: Heard) -> list[Action]:
        return [Ignored(f"{event.sender} has not been asked yet")]

    def _cancel(self, event: Cancel) -> list[Action]:
        return self._end(JobState.CANCELLED, _cancelled(event.by, event.reason, self.party), event.now)

    def _resume(self, event: Resume) -> list[Action]:
        if self.state is JobState.SUCCESS:
            return [Ignored("the job has succeeded: there is nothing to resume")]
        return self._go_on(event.by, event.reason, event.now)

    def _go_on(self, by: str, reason: str, now: float) -> list[Action]:
        self.retried = 0
        return [Note("resume", {"by": by, "reason": reason}), *self._next_attempt(now)]

    def _dossier(self, event: Dossier) -> list[Action]:
        if self.ending is not None or not self.composing or event.attempt not in (None, self.attempt):
            return [Ignored("a dossier that nobody waits for")]
        kept = None if event.dossier is None else dict(event.dossier)
        self.ending = Ending(state=self.state, trouble=self.trouble, dossier=kept)
        return [Ended(self.ending)]

    def _dossier_late(self, event: Dossier) -> list[Action]:
        return [Ignored("the dossier of an end from which the job has gone on")]

    def _late(self, event: Event) -> list[Action]:
        return [Ignored(f"{type(event).__name__.lower()} of a job that is {self.state}")]

    def _tick(self, event: Tick) -> list[Action]:
        return []

    def _restarted(self, event: Restarted) -> list[Action]:
        self.silence = dict.fromkeys(self.members, 0.0)
        self.waited, self.said_at, self.composing = 0.0, {}, False
        return [] if self.ending is None else [Ended(self.ending)]

    # --- what follows from the reports ---

    def _follow(self, event: Event) -> list[Action]:
        """Go on as far as the reports lead."""
        actions: list[Action] = []
        while done := self._step(event.now):
            actions += done
        return actions

    def _step(self, now: float) -> list[Action]:
        if self.state is JobState.PENDING:
            return []
        if self.state.ended:
            return self._finish(now)
        if interrupted := self._interrupted(now):
            return interrupted
        return _STEPS[self.state](self, now)

    def _interrupted(self, now: float) -> list[Action]:
        """What ends the attempt before it has succeeded, whatever it was doing."""
        present = {party: report for party in self.members if (report := self._present(party)) is not None}
        for party, report in present.items():
            if report.wish == "cancel":
                return self._end(JobState.CANCELLED, _cancelled(party, report.wish_reason, party), now)
        refusals = [party for party, report in present.items() if report.state is PartState.REFUSED]
        if refusals:
            text = "; ".join(f"{party} refuses the job: {present[party].reason}" for party in refusals)
            return self._end(JobState.FAILED, trouble_of(PolicyError(text), refusals[0]), now)
        if any(_has_failed(report) for report in present.values()):
            return self._failed(present, now)
        return [] if self.state is JobState.INVITED else self._silent(present, now)

    def _silent(self, present: Mapping[str, Report], now: float) -> list[Action]:
        missing = [
            party
            for party in self.members
            if self.silence.get(party, 0.0) >= self.lost_after and not (party in present and present[party].state.ended)
        ]
        for party in missing:
            text = f"no word from {party} for {self.lost_after:g} s"
            hint = "Look whether that party's service and the broker run; then `fate_llm jobs resume`."
            self.lost[party] = trouble_of(RoundTimeout(text, hint=hint), party)
        if not missing:
            return []
        first = self.lost[missing[0]]
        text = cut("; ".join(self.lost[party].message for party in missing))
        return self._end(JobState.TIMED_OUT, first.model_copy(update={"message": text}), now)

    def _failed(self, present: Mapping[str, Report], now: float) -> list[Action]:
        """A part has failed: wait a little for the cause, then try again or end."""
        cause, party = self._cause(present)
        known = not _is_consequence(cause)
        over = all(p in present and present[p].state.ended for p in self.members)
        if self.failing is None:
            self.failing = now
        if not known and not over and 0 <= now - self.failing < self.settle:
            return []
        stopped = isinstance(cause, ConfigurationError | PolicyError | JobCancelled)
        if not stopped and self.retried < self.retries:
            self.retried += 1
            fields = {"attempt": self.attempt, "party": party, "code": cause.code, "error": cause.message}
            return [Note("retry", fields), *self._next_attempt(now)]
        silent = present[party].state is PartState.CANCELLED and isinstance(cause, RoundTimeout)
        state = JobState.TIMED_OUT if silent else JobState.FAILED
        state = JobState.CANCELLED if isinstance(cause, JobCancelled) else state
        self.by_parts = True
        return self._end(state, trouble_of(cause, party), now)

    def _cause(self, present: Mapping[str, Report]) -> tuple[FateError, str]:
        """The first real cause, and whose it is. Who cancelled itself is known by its wish: no other is a cause."""
        errors = {party: _error(report) for party, report in present.items() if _has_failed(report)}
        real = {party: error for party, error in errors.items() if not isinstance(error, JobCancelled)}
        cause = cause_of(real or errors, cancelled=False)
        assert cause is not None
        return cause, next(party for party, error in errors.items() if error is cause)

    def _invited(self, now: float) -> list[Action]:
        states = {party: self._view(party).state for party in self.members}
        if all(state in _ACCEPTED for state in states.values()):
            self.silence = dict.fromkeys(self.members, 0.0)  # until now nobody had to answer
            return [self._enter(JobState.READY, now)]
        if now < self.deadline:
            return []
        waits = "waits for a person's approval"
        missing = {p: waits if s is PartState.APPROVAL else "has not answered" for p, s in states.items()}
        text = ", ".join(f"{p} {missing[p]}" for p, s in states.items() if s not in _ACCEPTED)
        hint = "Raise job.approval_deadline, or ask the people there."
        error = RoundTimeout(f"not all had accepted at the deadline: {text}", hint=hint)
        return self._end(JobState.TIMED_OUT, trouble_of(error), now)

    def _ready(self, now: float) -> list[Action]:
        if asked := self._asks_people(now):
            return asked
        free = all(self._view(party).state is PartState.ACCEPTED for party in self.members)
        pause = self._pause()
        return [self._enter(JobState.WAITING, now)] if free and not 0 <= now - self.since < pause else []

    def _waiting(self, now: float) -> list[Action]:
        if asked := self._asks_people(now):
            return asked
        if all(self._view(party).state is PartState.RESERVED for party in self.members):
            self.tries = 0
            return [self._enter(JobState.RUNNING, now)]
        if 0 <= now - self.since < self.room_patience * 2.0 ** min(self.tries // 3, _DOUBLINGS):
            return []
        self.tries += 1
        return [self._enter(JobState.READY, now)]

    def _running(self, now: float) -> list[Action]:
        states = {party: self._view(party).state for party in self.members}
        if all(state is PartState.SUCCESS for state in states.values()):
            return self._end(JobState.SUCCESS, None, now)
        without = [party for party, state in states.items() if state in (PartState.ACCEPTED, PartState.QUEUED)]
        if not without:
            return []
        # Its word of room was about an earlier time: nothing of this attempt has begun there.
        return [Note("room_lost", {"attempt": self.attempt, "parties": without}), *self._next_attempt(now)]

    def _asks_people(self, now: float) -> list[Action]:
        """A policy that has changed since wants a person's word: room is not held for as long as that takes."""
        if all(self._view(party).state is not PartState.APPROVAL for party in self.members):
            return []
        self.deadline = max(self.expires, now + self.window)
        return [self._enter(JobState.INVITED, now)]

    def _pause(self) -> float:
        """Seconds until room is asked for again: longer each time, and another for each job."""
        if self.tries == 0:
            return 0.0
        first, most = _BACKOFF
        share = int(digest_of([self.job, self.tries])[:8], 16) / 2.0**32
        return min(most, first * 2.0 ** min(self.tries - 1, 10)) * (0.5 + share)

    def _next_attempt(self, now: float) -> list[Action]:
        present = {party: self._present(party) for party in self.members}

        def done(task: str, party: str) -> bool:
            found = present.get(party)
            return found is not None and task in found.tasks and found.tasks[task].state == "success"

        everywhere = {task for task, parties in self.tasks.items() if all(done(task, party) for party in parties)}
        self.finished = tuple(task for task in self.tasks if task in everywhere or task in self.finished)
        self.attempt += 1
        self.tries, self.failing, self.trouble, self.ending = 0, None, None, None
        self.by_parts = self.composing = False
        self.lost = {}
        self.silence = dict.fromkeys(self.members, 0.0)
        return [self._enter(JobState.WAITING, now)]

    def _enter(self, state: JobState, now: float) -> Note:
        self.state, self.since = state, now
        return Note(f"job_{state}", {"attempt": self.attempt})

    def _end(self, state: JobState, trouble: Trouble | None, now: float) -> list[Action]:
        self.trouble, self.waited = trouble, 0.0
        note = self._enter(state, now)
        cause = {} if trouble is None else {"code": trouble.code, "error": trouble.message, "party": trouble.party}
        return [Note(note.event, {**note.fields, **cause})]

    def _finish(self, now: float) -> list[Action]:
        """The end is final when all have reported theirs, or time is over; a person may wish to go on."""
        for party in self.members:
            report = self._present(party)
            if report is not None and report.wish == "resume" and self.state is not JobState.SUCCESS:
                return self._go_on(party, report.wish_reason, now)
        if self.ending is not None or self.composing:
            return []
        told = {party: self._present(party) for party in self.reports if party not in self.lost}
        if not all(_has_closed(report) for report in told.values()) and self.waited < self.lost_after:
            return []
        present = {party: report for party, report in told.items() if report is not None}
        if self.by_parts and self.state is JobState.FAILED:
            self._look_for_cause(present)
        self.composing = True
        return [MakeDossier(self.state, self.trouble, self.attempt, self.statements)]

    def _look_for_cause(self, present: Mapping[str, Report]) -> None:
        """A party's own error may have come after what it caused."""
        decided = self.trouble
        known = decided is not None and not _is_consequence(error_from(decided.code, decided.message, decided.hint))
        if not known and any(_has_failed(report) for report in present.values()):
            cause, party = self._cause(present)
            if not _is_consequence(cause):
                self.trouble = trouble_of(cause, party)

    # --- views and words ---

    def _present(self, party: str) -> Report | None:
        """The party's latest report, when it speaks of the present attempt."""
        report = self.reports.get(party)
        return report if report is not None and report.attempt == self.attempt else None

    def _view(self, party: str) -> PartView:
        report = self._present(party)
        if party in self.lost and not (report is not None and report.state.ended):
            return PartView(state=PartState.LOST, trouble=self.lost[party])
        if report is None:
            return PartView(state=PartState.UNHEARD)
        return PartView(state=report.state, tasks=report.tasks, trouble=report.trouble, reason=report.reason)

    def _news(self) -> News:
        return News(
            job=self.job,
            digest=self.digest,
            serial=self.serial,
            state=self.state,
            attempt=self.attempt,
            finished=self.finished,
            parts=self.parts,
            ending=self.ending,
        )

    def _speak(self, event: Event) -> list[Action]:
        """At once when it matters, else as a sign of life; once the end is final, to those who ask."""
        if self.state is JobState.PENDING:
            return []
        news = self._news()
        content = news.model_dump(mode="json", exclude={"serial"})
        said = digest_of(content)
        for view in content["parts"].values():
            view["tasks"] = {task: found["state"] for task, found in view["tasks"].items()}
        urgent = digest_of(content)
        known = [p for p in self.members if p in self.reports or not self.state.ended]
        if urgent != self.said_urgent:
            receivers = known
        elif self.final and not isinstance(event, Restarted):
            receivers = [event.sender] if isinstance(event, Heard) else []
        else:
            receivers = [party for party in known if self._due(party, event.now)]
        if not receivers:
            return []
        self.serial += int(said != self.said)
        self.said, self.said_urgent = said, urgent
        self.said_at |= dict.fromkeys(receivers, event.now)
        news = news.model_copy(update={"serial": self.serial})
        return [Say(party, news, party not in self.reports) for party in receivers]

    def _due(self, party: str, now: float) -> bool:
        """Whether it is time for a sign of life; who gives none itself gets fewer."""
        pause = max(self.heartbeat, min(_SELDOM, self.silence.get(party, 0.0) / 10))
        return party not in self.said_at or not 0 <= now - self.said_at[party] < pause

    def to_data(self) -> dict[str, Any]:
        """As JSON values."""
        data: dict[str, Any] = _DATA.dump_python(self, mode="json")
        return data

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> LeadMachine:
        """What `to_data` gave, of this version or an earlier one.

        Raises:
            InternalError: it is something else.
        """
        try:
            return _DATA.validate_python(dict(data))
        except ValidationError as error:
            raise InternalError(f"a stored job cannot be read: {error}") from None


def _has_failed(report: Report) -> bool:
    return report.state in (PartState.FAILED, PartState.CANCELLED, PartState.LOST)


def _has_closed(report: Report | None) -> bool:
    """Nothing more is to come of it: it has ended, and signed what it did."""
    if report is None or not report.state.ended:
        return False
    return report.state is PartState.REFUSED or report.statement is not None


def _error(report: Report) -> FateError:
    if report.trouble is None:
        why = "its part ended without saying why"
        return JobCancelled(why) if report.state is PartState.CANCELLED else FateError(why)
    return error_from(report.trouble.code, report.trouble.message, report.trouble.hint)


def _is_consequence(error: FateError) -> bool:
    """Something that parties suffer from each other; the cause may be elsewhere."""
    return isinstance(error, FederationError | JobCancelled)


def _cancelled(by: str, reason: str, party: str) -> Trouble:
    return trouble_of(JobCancelled(f"cancelled by {by}" + (f": {reason}" if reason else "")), party)


# --- who may say what, and when -----------------------------------------------------------------------------

_Step = Callable[[LeadMachine, Any], list[Action]]
_STEPS: dict[JobState, Callable[[LeadMachine, float], list[Action]]] = {
    JobState.INVITED: LeadMachine._invited,
    JobState.READY: LeadMachine._ready,
    JobState.WAITING: LeadMachine._waiting,
    JobState.RUNNING: LeadMachine._running,
}
_OPEN: dict[type, _Step] = {
    Heard: LeadMachine._heard,
    Tick: LeadMachine._tick,
    Cancel: LeadMachine._cancel,
    Restarted: LeadMachine._restarted,
    Resume: LeadMachine._late,
    Dossier: LeadMachine._dossier_late,
}
_ENDED: dict[type, _Step] = {
    Heard: LeadMachine._heard,
    Tick: LeadMachine._tick,
    Cancel: LeadMachine._late,
    Restarted: LeadMachine._restarted,
    Resume: LeadMachine._resume,
    Dossier: LeadMachine._dossier,
}
_TABLE: dict[JobState, dict[type, _Step]] = {
    JobState.PENDING: {
        Submitted: LeadMachine._submitted,
        Heard: LeadMachine._too_early,
        Tick: LeadMachine._tick,
        Cancel: LeadMachine._cancel,
        Restarted: LeadMachine._restarted,
    },
    **dict.fromkeys((JobState.INVITED, JobState.READY, JobState.WAITING, JobState.RUNNING), _OPEN),
    **dict.fromkeys((JobState.SUCCESS, JobState.FAILED, JobState.CANCELLED, JobState.TIMED_OUT), _ENDED),
}

_DATA: TypeAdapter[LeadMachine] = TypeAdapter(LeadMachine)
