"""What the services of a federation say to each other about jobs.

Words say how things are, not what happened: each is the whole present state of one job as its sender sees it, and is
sent again and again (when it changes, and as a heartbeat). So none may get lost for good, a repeated one changes
nothing, and a service that was killed needs only its database to go on.

    News      the guest's service to every party of the job: what is wanted now
    Report    a party's service to the guest's: how far it is
    Question, Answer    asked before a job exists: `submit --plan`
    Lines     a party's events of a job, as far as its policy shows them to the guest

The guest's party reports to itself, without a broker. `serial` grows with every change at the sender; a word with a
serial below the last one heard is old. An attempt starts all workers anew (retry, resume); a worker that was killed
inside an attempt is started again by its own service and goes on where it was.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import Field

from fate_llm.core.interfaces import Frozen

__all__ = [
    "Answer",
    "Ending",
    "Estimates",
    "Finding",
    "JobState",
    "Line",
    "Lines",
    "News",
    "PartState",
    "PartView",
    "Question",
    "Report",
    "TaskView",
    "Trouble",
    "Word",
]

Text = Annotated[str, Field(max_length=2000)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Serial = Annotated[int, Field(ge=0, lt=2**53)]
Attempt = Annotated[int, Field(ge=0, lt=2**31)]


class JobState(StrEnum):
    """A job as a whole, at the guest's service.

    pending: checked here, nobody has been asked. invited: asked; at least one party has not accepted yet. ready: all
    have accepted. waiting: parties wait for room on their machines. running, and the four ends.
    """

    PENDING = "pending"
    INVITED = "invited"
    READY = "ready"
    WAITING = "waiting"
    RUNNING = "running"
    SUCCESS = "success"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"

    @property
    def ended(self) -> bool:
        return self in (JobState.SUCCESS, JobState.FAILED, JobState.CANCELLED, JobState.TIMED_OUT)


class PartState(StrEnum):
    """One party's part of a job.

    unheard: no word of it yet (at the guest only). approval: its policy wants a human to decide. accepted, refused.
    queued: waits for room on its machine. reserved: has room, and holds it. running: its worker is up, or is being
    started again. Then the ends; lost: gave no sign of life for `lost_after`.
    """

    UNHEARD = "unheard"
    APPROVAL = "approval"
    ACCEPTED = "accepted"
    REFUSED = "refused"
    QUEUED = "queued"
    RESERVED = "reserved"
    RUNNING = "running"
    SUCCESS = "success"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"

    @property
    def ended(self) -> bool:
        return self in (
            PartState.REFUSED,
            PartState.SUCCESS,
            PartState.FAILED,
            PartState.CANCELLED,
            PartState.LOST,
        )


class Finding(Frozen):
    """What one rule of a policy says of a job. found: what the job asks for. allowed: what the rule allows."""

    rule: Text
    outcome: Literal["pass", "manual", "refuse"]
    found: Text = ""
    allowed: Text = ""


class Trouble(Frozen):
    """An error as `FateError.as_dict` gives it. party: where it began, empty for the job as a whole."""

    code: Text
    message: Text
    hint: Text = ""
    party: Text = ""


class TaskView(Frozen):
    """A task at one party. round: the last one that has ended there, 0 outside rounds."""

    state: Literal["waiting", "running", "success", "failed", "cancelled"]
    round: int = Field(0, ge=0)
    rounds: int = Field(0, ge=0)


class PartView(Frozen):
    """What everybody in the job may know of one party's part."""

    state: PartState
    tasks: dict[str, TaskView] = Field(default_factory=dict, max_length=1000)
    trouble: Trouble | None = None
    reason: Text = ""


class Ending(Frozen):
    """How a job ended, for good. dossier: see `runtime.record.dossier`; None when it could not be put together."""

    state: JobState
    trouble: Trouble | None = None
    dossier: dict[str, Any] | None = None


class News(Frozen):
    """The guest's word to one party.

    specification: the signed job specification as `JobSpecification.to_data` gives it, as long as the receiver has
    not reported its digest. finished: tasks that all their parties had finished when this attempt began; they are not
    run again. parts: the public view of all parties. lines_heard: number up to which the receiver's `Lines` have come
    without a gap; what comes after it is sent again.
    """

    kind: Literal["news"] = "news"
    job: Text
    digest: Digest
    serial: Serial
    state: JobState
    attempt: Attempt = 0
    finished: tuple[Text, ...] = ()
    parts: dict[str, PartView] = Field(default_factory=dict, max_length=1000)
    ending: Ending | None = None
    specification: dict[str, Any] | None = None
    lines_heard: Serial = 0


class Report(Frozen):
    """A party's word to the guest's service.

    attempt: the one that `state` speaks of, 0 before the first. findings: of its policy. restarts: how often its
    worker was started again inside this attempt. statement: what it signed about its part (`runtime.record`), once it
    has ended. wish: what a person at this party asks of the job.
    """

    kind: Literal["report"] = "report"
    job: Text
    digest: Digest
    serial: Serial
    state: PartState
    attempt: Attempt = 0
    findings: tuple[Finding, ...] = Field((), max_length=200)
    tasks: dict[str, TaskView] = Field(default_factory=dict, max_length=1000)
    trouble: Trouble | None = None
    reason: Text = ""
    restarts: int = Field(0, ge=0)
    statement: dict[str, Any] | None = None
    wish: Literal["", "cancel", "resume"] = ""
    wish_reason: Text = ""


class Estimates(Frozen):
    """What a job would cost one party. minutes is None where nobody has measured; memory in bytes."""

    sent_bytes: int | None = None
    received_bytes: int | None = None
    memory_bytes: int | None = None
    minutes: float | None = None
    privacy: Text = "no differential privacy"


class Question(Frozen):
    """Would you take part, and what would it cost? Nothing is kept of it."""

    kind: Literal["question"] = "question"
    question: Text
    specification: dict[str, Any]


class Answer(Frozen):
    """To a question. trouble: why there is no estimate."""

    kind: Literal["answer"] = "answer"
    question: Text
    findings: tuple[Finding, ...] = Field((), max_length=200)
    estimates: Estimates | None = None
    trouble: Trouble | None = None


class Line(Frozen):
    """One event of a party's part. number: 1, 2, ... in the order of that party."""

    number: Serial
    seconds: float
    event: Text
    task: Text = ""
    fields: dict[str, Any] = Field(default_factory=dict, max_length=100)


class Lines(Frozen):
    """Events of a party, for the guest's eyes. What its policy hides is not among them, so numbers have gaps.

    after: number of the line that was shown before the first of these; 0 when there was none.
    """

    kind: Literal["lines"] = "lines"
    job: Text
    digest: Digest
    after: Serial = 0
    lines: tuple[Line, ...] = Field(max_length=500)


Word = Annotated[News | Report | Question | Answer | Lines, Field(discriminator="kind")]
