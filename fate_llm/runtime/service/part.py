"""One party's part of a job as a pure machine: what its own policy allows of what the lead wants.

    UNHEARD --policy--> APPROVAL --a person--> ACCEPTED --the lead asks for room--> QUEUED --slots--> RESERVED
    RESERVED --the lead starts the attempt--> RUNNING --the worker's end--> SUCCESS, FAILED, CANCELLED
    policy, person or machine says no: REFUSED. A higher attempt begins at UNHEARD again, from any state.

Rules:
1. Events in, actions out; the time comes with the event. An event that is not in the table is an InternalError; a word
   or a person that comes too late is `Ignored`. Nothing has changed then.
2. The state is a view of facts (what the policy said, what a person said, room, worker, end), so facts and state cannot
   differ; what is to be done follows from the facts and from the lead's latest word.
3. Nothing starts that was not decided for exactly this digest and this attempt; a person's yes holds for the digest.
4. At most one worker: a new attempt begins when the worker of the one before is gone. Attempts only grow.
5. What has ended stays ended, until the lead begins a higher attempt.
6. A worker never starts without room, and room is given back with the worker's end.
7. The driver stores the machine after every event, before it does what the actions say. One that was killed loads it
   and tells it `Restarted`: everything still to be done is then asked for again. Every action may be done twice.
   A tick that gave no action need not be stored.
8. The driver hands in only words whose sender is the lead, and specifications whose digest is `digest`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from fate_llm.core.canonical import digest as digest_of
from fate_llm.core.errors import FateError, FederationError, InternalError, JobCancelled, RoundTimeout, error_from

from .words import Ending, Finding, JobState, News, PartState, PartView, Report, TaskView, Trouble

__all__ = [
    "Action",
    "Approved",
    "AskHuman",
    "Cancel",
    "Close",
    "Decide",
    "Decided",
    "Denied",
    "Event",
    "Granted",
    "Ignored",
    "MakeStatement",
    "NoRoom",
    "Note",
    "PartMachine",
    "Progress",
    "Release",
    "Reserve",
    "Restarted",
    "Say",
    "StartWorker",
    "Statement",
    "StopWorker",
    "TellWorker",
    "Tick",
    "Told",
    "Verdict",
    "Wish",
    "WorkerDied",
    "WorkerEnded",
    "cut",
    "trouble_of",
    "waking",
]

Verdict = Literal["accept", "manual", "refuse"]

_AWAKE = 5.0  # seconds: in a longer pause between two events we slept ourselves, and heard nobody
_LONGEST = 300.0  # seconds between two words to a lead that gives no sign of life
_CALM = 1.0  # seconds between two words of mere progress
_BACKOFF = (0.5, 30.0)  # seconds until a worker that died is started again: at first, at most
_MOST_TASKS = 1000  # what a word may carry
_NOT_URGENT = frozenset({"tasks", "restarts", "findings"})  # of a report


# --- events -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Told:
    """A word of the guest's service about this job."""

    news: News
    now: float


@dataclass(frozen=True, slots=True)
class Decided:
    """The answer of this party's policy. May come again whenever the policy has changed."""

    verdict: Verdict
    findings: tuple[Finding, ...]
    now: float


@dataclass(frozen=True, slots=True)
class Approved:
    """A person of this party says yes to this digest. by: who."""

    by: str
    reason: str
    now: float


@dataclass(frozen=True, slots=True)
class Denied:
    by: str
    reason: str
    now: float


@dataclass(frozen=True, slots=True)
class Granted:
    """The slots have room for the job, and hold it."""

    now: float


@dataclass(frozen=True, slots=True)
class NoRoom:
    """The machine will never have the room."""

    reason: str
    now: float


@dataclass(frozen=True, slots=True)
class WorkerEnded:
    """The worker's last word. end: {"error": None or {"code", "message", "hint"}, "tasks": {task: TaskView}}."""

    attempt: int
    end: Mapping[str, Any]
    now: float


@dataclass(frozen=True, slots=True)
class WorkerDied:
    """The worker is gone without a last word. refused: it did not take its order, another start would not help."""

    attempt: int
    how: str
    now: float
    refused: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the worker's tasks are; those that are not named stay as they were."""

    tasks: Mapping[str, TaskView]
    now: float


@dataclass(frozen=True, slots=True)
class Statement:
    """What this party has signed about its part. attempt: the one `MakeStatement` named."""

    statement: Mapping[str, Any]
    now: float
    attempt: int | None = None


@dataclass(frozen=True, slots=True)
class Cancel:
    """A person of this party stops the job."""

    reason: str
    by: str
    now: float


@dataclass(frozen=True, slots=True)
class Wish:
    """A person of this party wants the job, which has ended, to go on."""

    wish: Literal["resume"]
    by: str
    reason: str
    now: float


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; comes every second or so."""

    now: float


@dataclass(frozen=True, slots=True)
class Restarted:
    """The service came up again: no worker runs, and what the last actions asked for may not have been done."""

    now: float


Event = (
    Told
    | Decided
    | Approved
    | Denied
    | Granted
    | NoRoom
    | WorkerEnded
    | WorkerDied
    | Progress
    | Statement
    | Cancel
    | Wish
    | Tick
    | Restarted
)


# --- actions ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Decide:
    """Ask the policy about the specification, and answer with `Decided`."""

    attempt: int


@dataclass(frozen=True, slots=True)
class AskHuman:
    """Put the job before the people of this party; `Approved` or `Denied` comes whenever it comes."""

    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class Reserve:
    """Ask the slots for room. since: what the job's age in the queue is counted from."""

    since: float


@dataclass(frozen=True, slots=True)
class Release:
    """Give the room back, or leave the queue."""


@dataclass(frozen=True, slots=True)
class StartWorker:
    """finished: tasks that are not run again. again: the same attempt goes on from its journal."""

    attempt: int
    finished: tuple[str, ...]
    again: bool


@dataclass(frozen=True, slots=True)
class StopWorker:
    """Ask the worker to end, and kill it when it does not."""

    reason: str


@dataclass(frozen=True, slots=True)
class TellWorker:
    """message: {"left": party} or {"lost": [party, code, why]}."""

    message: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class MakeStatement:
    """Sign what was sent and received, and answer with `Statement`."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Say:
    """To the lead's service."""

    report: Report


@dataclass(frozen=True, slots=True)
class Note:
    """For the log."""

    event: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Ignored:
    """The event has changed nothing."""

    why: str


@dataclass(frozen=True, slots=True)
class Close:
    """The job is over for good: keep how it ended. It may come back only by a higher attempt."""

    ending: Ending


Action = (
    Decide
    | AskHuman
    | Reserve
    | Release
    | StartWorker
    | StopWorker
    | TellWorker
    | MakeStatement
    | Say
    | Note
    | Ignored
    | Close
)


# --- what both machines of a job count by -------------------------------------------------------------------


def waking(before: float | None, now: float) -> float:
    """Seconds of a pause that count as silence of others: none when a clock was set back, few when we slept."""
    return 0.0 if before is None else min(max(0.0, now - before), _AWAKE)


def cut(text: str, limit: int = 2000) -> str:
    """At most `limit` characters: what a word may carry."""
    return text if len(text) <= limit else text[: limit - 4] + " ..."


def trouble_of(error: FateError, party: str = "") -> Trouble:
    """An error as a word carries it."""
    return Trouble(code=error.code, message=cut(error.message), hint=cut(error.hint), party=party)


# --- the machine --------------------------------------------------------------------------------------------


class _Room(StrEnum):
    NONE = ""
    ASKED = "asked"
    HELD = "held"


class _Worker(StrEnum):
    NONE = ""
    UP = "up"
    PAUSED = "paused"  # it died, and is started again when its time has come
    STOPPING = "stopping"


_Views = dict[str, tuple[PartState, str, str]]


@dataclass(slots=True)
class PartMachine:
    """One party's part of one job.

    party: this one. lead: whose service leads the job. lost_after, heartbeat: seconds. restarts_allowed: deaths of a
    worker inside an attempt between which no round ended. Facts are written by the machine only.
    """

    job: str
    digest: str
    party: str
    lead: str
    lost_after: float = 600.0
    heartbeat: float = 5.0
    restarts_allowed: int = 10
    # What the lead wants.
    news_serial: int = -1
    wanted: JobState = JobState.PENDING
    wanted_attempt: int = 0
    finished: tuple[str, ...] = ()
    others: _Views = field(default_factory=dict)
    # What holds here for the present attempt.
    attempt: int = 0
    verdict: Verdict | None = None
    approved: bool | None = None
    findings: tuple[Finding, ...] = ()
    room: _Room = _Room.NONE
    since: float | None = None
    worker: _Worker = _Worker.NONE
    stop_reason: str = ""
    due: float = 0.0
    deaths: int = 0
    restarts: int = 0
    told: dict[str, str] = field(default_factory=dict)
    tasks: dict[str, TaskView] = field(default_factory=dict)
    end: PartState | None = None
    trouble: Trouble | None = None
    reason: str = ""
    statement: dict[str, Any] | None = None
    signing: bool = False
    alone: bool = False
    # What a person here wants.
    wish: Literal["", "cancel", "resume"] = ""
    wish_reason: str = ""
    wished: float = 0.0
    # What was said and when.
    closed: bool = False
    serial: int = 0
    said: str = ""
    said_urgent: str = ""
    said_at: float | None = None
    silence: float = 0.0
    clock: float | None = None

    @property
    def state(self) -> PartState:
        if self.end is not None:
            return self.end
        if self.worker is not _Worker.NONE:
            return PartState.RUNNING
        if self.verdict is None:
            return PartState.UNHEARD
        if self.verdict == "manual" and not self.approved:
            return PartState.APPROVAL
        by_room = {_Room.NONE: PartState.ACCEPTED, _Room.ASKED: PartState.QUEUED, _Room.HELD: PartState.RESERVED}
        return by_room[self.room]

    @property
    def over(self) -> bool:
        """The job has ended for good here, and nobody waits for a word of it."""
        return self.closed and self.wish != "resume"

    @property
    def standing(self) -> JobState:
        """How the job stands as far as is known here: timed out, when a silent lead was given up."""
        given_up = self.alone and self.end is not None and self.wanted_attempt == self.attempt
        return JobState.TIMED_OUT if given_up and not self.wanted.ended else self.wanted

    def handle(self, event: Event) -> list[Action]:
        """Apply one event. Returns what the driver must do, in order, after it has stored the machine.

        Raises:
            InternalError: our own service tells what cannot be; nothing has changed.
        """
        step = _TABLE[self.state].get(type(event))
        if step is None:
            raise InternalError(f"{type(event).__name__} is not allowed while {self.state}")
        attempt = event.attempt if isinstance(event, WorkerEnded | WorkerDied | Statement) else None
        if attempt is not None and attempt > self.attempt:
            raise InternalError(f"{type(event).__name__} of attempt {attempt} while {self.attempt} is the latest")
        before = self.silence, self.clock
        self.silence += waking(self.clock, event.now)
        self.clock = event.now
        actions: list[Action] = step(self, event)
        if any(isinstance(action, Ignored) for action in actions):
            self.silence, self.clock = before
            return actions
        return [*actions, *self._settle(event)]

    # --- events ---

    def _told(self, event: Told) -> list[Action]:
        news = event.news
        if news.job != self.job or news.digest != self.digest:
            return [Ignored(f"news of job {news.job}, digest {news.digest[:16]}; decided was {self.digest[:16]}")]
        if news.serial < self.news_serial:
            return [Ignored(f"news {news.serial} is older than {self.news_serial}")]
        if news.attempt < self.wanted_attempt:
            return [Ignored(f"attempt {news.attempt} is over: {self.wanted_attempt} was asked for")]
        self.silence = 0.0
        self.news_serial, self.wanted, self.wanted_attempt = news.serial, news.state, news.attempt
        self.finished = news.finished
        self.others = {party: _seen(view) for party, view in news.parts.items() if party != self.party}
        if self.wish == "cancel" and news.state.ended and news.attempt == self.attempt:
            self.wish = self.wish_reason = ""
        return []

    def _decided(self, event: Decided) -> list[Action]:
        self.verdict = event.verdict
        refusals = [f for f in event.findings if f.outcome == "refuse"]
        self.findings = (*refusals, *(f for f in event.findings if f.outcome != "refuse"))[:200]
        actions: list[Action] = [Note("decided", {"verdict": event.verdict, "attempt": self.attempt})]
        if event.verdict == "refuse":
            self._finish(PartState.REFUSED, reason="; ".join(_told_why(f) for f in refusals) or "the policy refuses it")
        elif self.state is PartState.APPROVAL:
            actions.append(AskHuman(self.findings))
        return actions

    def _approved(self, event: Approved) -> list[Action]:
        self.approved = True
        return [Note("approved", {"by": event.by, "reason": event.reason})]

    def _denied(self, event: Denied) -> list[Action]:
        self.approved = False
        self._finish(PartState.REFUSED, reason=f"{event.by} said no" + (f": {event.reason}" if event.reason else ""))
        return [Note("denied", {"by": event.by, "reason": event.reason})]

    def _granted(self, event: Granted) -> list[Action]:
        self.room = _Room.HELD
        return []

    def _granted_late(self, event: Granted) -> list[Action]:
        return [Release(), Ignored(f"room was granted while {self.state}")]

    def _no_room(self, event: NoRoom) -> list[Action]:
        self.room = _Room.NONE
        self._finish(PartState.REFUSED, reason=event.reason)
        return []

    def _worker_ended(self, event: WorkerEnded) -> list[Action]:
        if event.attempt < self.attempt or self.worker is _Worker.PAUSED:
            return [Ignored(f"the end of a worker of attempt {event.attempt} that had been given up")]
        self._progress(Progress(_task_views(event.end.get("tasks", {})), event.now))
        stopping = self.worker is _Worker.STOPPING
        self.worker = _Worker.NONE
        told = event.end.get("error")
        if told is None:
            self._finish(PartState.SUCCESS)
            return [Note("worker_ended", {"attempt": event.attempt})]
        error = error_from(str(told.get("code", "")), str(told.get("message", "")), str(told.get("hint", "")))
        code = str(told.get("code", "")) or error.code
        if stopping and isinstance(error, FederationError | JobCancelled):
            self._finish_stopped()
        else:
            end = PartState.CANCELLED if isinstance(error, JobCancelled) else PartState.FAILED
            trouble = trouble_of(error, self.party).model_copy(update={"code": cut(code)})
            self._finish(end, trouble=trouble, reason=error.message if end is PartState.CANCELLED else "")
        return [Note("worker_ended", {"attempt": event.attempt, "code": code})]

    def _worker_died(self, event: WorkerDied) -> list[Action]:
        if event.attempt < self.attempt or self.worker is _Worker.PAUSED:
            return [Ignored(f"the death of a worker of attempt {event.attempt} that had been given up")]
        note = Note("worker_died", {"attempt": event.attempt, "how": event.how, "deaths": self.deaths + 1})
        if self.worker is _Worker.STOPPING:
            self.worker = _Worker.NONE
            self._finish_stopped()
            return [note]
        self.deaths += 1
        if event.refused or self.deaths > self.restarts_allowed:
            self.worker = _Worker.NONE
            times = "would not start" if event.refused else f"died {self.deaths} times without ending a round"
            error = FateError(
                f"the worker of {self.party} {times} ({event.how})",
                hint="The job's folder has what it wrote to stderr; a process killed by signal 9 often lacked memory.",
            )
            self._finish(PartState.FAILED, trouble=trouble_of(error, self.party))
            return [note]
        first, most = _BACKOFF
        self.worker = _Worker.PAUSED
        self.due = event.now + min(most, first * 2.0 ** (self.deaths - 1))
        return [note]

    def _progress(self, event: Progress) -> list[Action]:
        for task, view in islice(event.tasks.items(), _MOST_TASKS):
            before = self.tasks.get(task)
            if before is None and len(self.tasks) >= _MOST_TASKS:
                continue
            if before is not None and before.state == "success":
                continue
            known = before.round if before is not None else 0
            if view.round > known or view.state == "success":
                self.deaths = 0  # further than ever: a worker that was started again first repeats what was known
            self.tasks[task] = view if view.round >= known else view.model_copy(update={"round": known})
        return []

    def _stated(self, event: Statement) -> list[Action]:
        if event.attempt is not None and event.attempt < self.attempt:
            return [Ignored(f"a statement about attempt {event.attempt}; {self.attempt} has begun")]
        self.statement = dict(event.statement)
        return []

    def _cancel(self, event: Cancel) -> list[Action]:
        if self.wanted.ended and self.wanted_attempt == self.attempt:
            return [Ignored("the job has ended")]
        self.wish, self.wish_reason = "cancel", cut(f"{event.by}: {event.reason}")
        return [Note("cancel", {"by": event.by, "reason": event.reason})]

    def _wish(self, event: Wish) -> list[Action]:
        if not self.wanted.ended or self.wanted is JobState.SUCCESS:
            return [Ignored(f"the job is {self.wanted}: only one that has ended without success can go on")]
        self.wish, self.wish_reason, self.wished = event.wish, cut(f"{event.by}: {event.reason}"), event.now
        return [Note("wish", {"wish": event.wish, "by": event.by, "reason": event.reason})]

    def _tick(self, event: Tick) -> list[Action]:
        actions: list[Action] = []
        if self.wish == "resume" and not 0 <= event.now - self.wished <= self.lost_after:
            self.wish = self.wish_reason = ""
            self.closed = False  # until the lead has heard that it is not wished any more
            actions.append(Note("wish_unheard", {"seconds": self.lost_after}))
        engaged = self.end is None and (self.room is not _Room.NONE or self.worker is not _Worker.NONE)
        if engaged and not self.alone and self.silence >= self.lost_after:
            self.alone = True
            actions.append(Note("lead_lost", {"lead": self.lead, "seconds": round(self.silence)}))
        if self.worker is _Worker.PAUSED and not self._unwanted() and not 0 < self.due - event.now <= _BACKOFF[1]:
            actions += self._start(again=True)
        return actions

    def _restarted(self, event: Restarted) -> list[Action]:
        self.silence, self.said_at, self.closed, self.signing = 0.0, None, False, False
        actions: list[Action] = []
        if self.worker is _Worker.STOPPING:
            self.worker = _Worker.NONE
            self._finish_stopped()
        if self.room is _Room.NONE:
            actions.append(Release())
        elif self.end is None:
            actions.append(Reserve(event.now if self.since is None else self.since))
        if self.worker is not _Worker.NONE:
            actions += self._start(again=True)
        elif self.state is PartState.UNHEARD and self.attempt > 0 and not self._unwanted():
            actions.append(Decide(self.attempt))
        elif self.state is PartState.APPROVAL:
            actions.append(AskHuman(self.findings))
        return actions

    def _late(self, event: Event) -> list[Action]:
        return [Ignored(f"{type(event).__name__} while {self.state}")]

    def _again(self, event: Granted) -> list[Action]:
        return []

    # --- what follows from the facts ---

    def _unwanted(self) -> str:
        """Why this attempt may not go on here; empty when it may."""
        if self.wanted_attempt > self.attempt:
            return f"attempt {self.wanted_attempt} begins"
        if self.wanted.ended:
            return f"the job has ended: {self.wanted}"
        if self.wish == "cancel":
            return self.wish_reason
        return self._silent() if self.alone else ""

    def _silent(self) -> str:
        return f"no word from {self.lead}, which leads the job, for {self.lost_after:g} s"

    def _settle(self, event: Event) -> list[Action]:
        """Bring what is here nearer to what is wanted."""
        actions: list[Action] = []
        if why := self._unwanted():
            if self.worker is _Worker.UP:
                self.worker, self.stop_reason = _Worker.STOPPING, why
                actions.append(StopWorker(why))
            elif self.worker is not _Worker.STOPPING:
                actions += self._end_unwanted(why)
        actions += self._use_room(event.now)
        actions += self._tell_worker()
        if self.end not in (None, PartState.REFUSED) and self.statement is None and not self.signing:
            self.signing = True
            actions.append(MakeStatement(self.attempt))
        actions += self._speak(event)
        if isinstance(event, Told) and event.news.ending is not None and not self.closed and self.end is not None:
            self.closed = True
            actions.append(Close(event.news.ending))
        return actions

    def _end_unwanted(self, why: str) -> list[Action]:
        """No worker is there: the attempt ends, and the next one begins if there is one."""
        self.worker = _Worker.NONE
        actions: list[Action] = []
        if self.wanted_attempt > self.attempt:
            actions += self._begin()
            why = self._unwanted()
        if why and self.end is None:
            self.stop_reason = why
            self._finish_stopped()
        return actions

    def _begin(self) -> list[Action]:
        """Forget the attempt before: this one is decided anew. A person's yes stays, a no is asked about again."""
        self.attempt = self.wanted_attempt
        self.verdict, self.findings = None, ()
        self.approved = self.approved or None
        self.end, self.trouble, self.reason, self.statement = None, None, "", None
        self.stop_reason, self.deaths, self.restarts, self.tasks, self.told = "", 0, 0, {}, {}
        self.alone = self.closed = False
        if self.wish == "resume" and not self.wanted.ended:
            self.wish = self.wish_reason = ""
        return [] if self._unwanted() else [Decide(self.attempt)]

    def _use_room(self, now: float) -> list[Action]:
        """Ask for room, give it back, or start the worker in it."""
        may_run = self.state in (PartState.ACCEPTED, PartState.QUEUED, PartState.RESERVED)
        held = self.room is _Room.HELD
        wanted = self.wanted is JobState.WAITING or (self.wanted is JobState.RUNNING and held)
        if self.worker is _Worker.NONE and not (may_run and wanted):
            if self.room is _Room.NONE:
                return []
            self.room = _Room.NONE
            return [Release()]
        if self.room is _Room.NONE:
            self.room = _Room.ASKED
            self.since = now if self.since is None else self.since
            return [Reserve(self.since)]
        if self.worker is _Worker.NONE and held and self.wanted is JobState.RUNNING:
            return self._start(again=False)
        return []

    def _start(self, *, again: bool) -> list[Action]:
        self.worker, self.told = _Worker.UP, {}
        self.restarts += int(again)
        return [StartWorker(self.attempt, self.finished, again)]

    def _tell_worker(self) -> list[Action]:
        """Who has left or is lost; a worker that was started again is told again."""
        if self.worker is not _Worker.UP or self.wanted_attempt != self.attempt:
            return []
        actions: list[Action] = []
        for party, (state, code, why) in self.others.items():
            how = "left" if state is PartState.SUCCESS else "lost" if state.ended else ""
            if how and self.told.get(party) != how:
                self.told[party] = how
                actions.append(TellWorker({"left": party} if how == "left" else {"lost": [party, code, why]}))
        return actions

    def _finish(self, end: PartState, *, trouble: Trouble | None = None, reason: str = "") -> None:
        self.end, self.trouble, self.reason, self.since, self.signing = end, trouble, cut(reason), None, False

    def _finish_stopped(self) -> None:
        if self.alone and self.wanted_attempt == self.attempt and not self.wanted.ended and self.wish != "cancel":
            hint = "Look whether that party's service and the broker run; the job can be resumed."
            error: FateError = RoundTimeout(self._silent(), hint=hint)
        else:
            error = JobCancelled(self.stop_reason)
        self._finish(PartState.CANCELLED, trouble=trouble_of(error, self.party), reason=error.message)

    # --- words ---

    def _report(self) -> Report:
        return Report(
            job=self.job,
            digest=self.digest,
            serial=self.serial,
            state=self.state,
            attempt=self.attempt,
            findings=self.findings,
            tasks=dict(self.tasks),
            trouble=self.trouble,
            reason=self.reason,
            restarts=self.restarts,
            statement=self.statement,
            wish=self.wish,
            wish_reason=self.wish_reason,
        )

    def _speak(self, event: Event) -> list[Action]:
        """At once when the lead must know it, soon when it is progress, and else as a sign of life."""
        if self.attempt == 0 or self.over:
            return []
        report = self._report()
        content = report.model_dump(mode="json", exclude={"serial"})
        said = digest_of(content)
        urgent = digest_of({name: value for name, value in content.items() if name not in _NOT_URGENT})
        since = None if self.said_at is None else event.now - self.said_at
        pause = _CALM if said != self.said else max(self.heartbeat, min(_LONGEST, self.silence / 10))
        beat = isinstance(event, Tick) and (since is None or not 0 <= since < pause)
        if urgent == self.said_urgent and not beat and not isinstance(event, Restarted):
            return []
        self.serial += int(said != self.said)
        self.said, self.said_urgent, self.said_at = said, urgent, event.now
        return [Say(report.model_copy(update={"serial": self.serial}))]

    def to_data(self) -> dict[str, Any]:
        """As JSON values."""
        data: dict[str, Any] = _DATA.dump_python(self, mode="json")
        return data

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> PartMachine:
        """What `to_data` gave, of this version or an earlier one.

        Raises:
            InternalError: it is something else.
        """
        try:
            return _DATA.validate_python(dict(data))
        except ValidationError as error:
            raise InternalError(f"a stored part of a job cannot be read: {error}") from None


def _told_why(finding: Finding) -> str:
    return f"{finding.rule}: {finding.found or 'this job'}" + (
        f", allowed: {finding.allowed}" if finding.allowed else ""
    )


def _seen(view: PartView) -> tuple[PartState, str, str]:
    """What a worker is told of another party's end."""
    if view.trouble is None:
        return view.state, "peer_failed", f"has ended: {view.reason or view.state}"
    return view.state, view.trouble.code, f"has ended: {view.trouble.message}"


def _task_views(tasks: Mapping[str, Any]) -> dict[str, TaskView]:
    try:
        return {str(task): TaskView.model_validate(view) for task, view in tasks.items()}
    except ValidationError as error:
        raise InternalError(f"the worker's last word has tasks that cannot be read: {error}") from None


# --- who may say what, and when -----------------------------------------------------------------------------

_Step = Callable[[PartMachine, Any], list[Action]]
_ALWAYS: dict[type, _Step] = {
    Told: PartMachine._told,
    Cancel: PartMachine._cancel,
    Tick: PartMachine._tick,
    Restarted: PartMachine._restarted,
}
_LATE: dict[type, _Step] = dict.fromkeys((Approved, Denied, NoRoom, Statement, Wish), PartMachine._late)
_BEFORE: dict[type, _Step] = {
    **_ALWAYS,
    **_LATE,
    Decided: PartMachine._decided,
    Granted: PartMachine._granted_late,
}
_ENDED: dict[type, _Step] = {
    **_ALWAYS,
    **_LATE,
    Decided: PartMachine._late,
    Granted: PartMachine._granted_late,
    WorkerEnded: PartMachine._late,
    WorkerDied: PartMachine._late,
    Progress: PartMachine._late,
    Statement: PartMachine._stated,
    Wish: PartMachine._wish,
}
_TABLE: dict[PartState, dict[type, _Step]] = {
    PartState.UNHEARD: _BEFORE,
    PartState.APPROVAL: {**_BEFORE, Approved: PartMachine._approved, Denied: PartMachine._denied},
    PartState.ACCEPTED: _BEFORE,
    PartState.QUEUED: {**_BEFORE, Granted: PartMachine._granted, NoRoom: PartMachine._no_room},
    PartState.RESERVED: {**_BEFORE, Granted: PartMachine._again},
    PartState.RUNNING: {
        **_ALWAYS,
        **_LATE,
        Decided: PartMachine._late,
        Granted: PartMachine._again,
        WorkerEnded: PartMachine._worker_ended,
        WorkerDied: PartMachine._worker_died,
        Progress: PartMachine._progress,
    },
    PartState.REFUSED: _ENDED,
    PartState.SUCCESS: _ENDED,
    PartState.FAILED: _ENDED,
    PartState.CANCELLED: _ENDED,
}

_DATA: TypeAdapter[PartMachine] = TypeAdapter(PartMachine)
