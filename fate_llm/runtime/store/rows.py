"""What the store keeps, as values. Times are seconds since the epoch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["ApprovalRow", "JobRow", "ModelRow", "TaskRow"]


@dataclass(frozen=True)
class JobRow:
    """A job as one machine of this party sees it.

    lead: the machine that leads the job; only the guest has one, and takes part besides, with a row of its own. digest:
    of the signed specification. ended: None while it is not over. machine: what the machine goes on from after a
    crash. trouble: `words.Trouble` as data.
    """

    job: str
    digest: str
    name: str
    initiator: str
    lead: bool
    state: str
    attempt: int
    priority: int
    created: float
    updated: float
    ended: float | None
    specification: dict[str, Any]
    machine: dict[str, Any]
    trouble: dict[str, Any] | None


@dataclass(frozen=True)
class TaskRow:
    """A task of a job at this party, in its latest attempt.

    outputs: name -> digest of an artifact, or a path. fingerprint: digest of all that the outputs follow from, so that
    another job can take them over; empty where they cannot be.
    """

    job: str
    task: str
    attempt: int
    state: str
    started: float | None
    ended: float | None
    outputs: dict[str, str] = field(default_factory=dict)
    fingerprint: str = ""


@dataclass(frozen=True)
class ApprovalRow:
    """A question to the people of this party: may this job run here? decision: None while it waits."""

    job: str
    digest: str
    asked: float
    findings: list[dict[str, Any]]
    summary: dict[str, Any]
    decided: float | None = None
    decision: Literal["approve", "refuse"] | None = None
    by: str = ""
    reason: str = ""


@dataclass(frozen=True)
class ModelRow:
    """A registered model. content: the rest of what is known of it (`artifacts.models.ModelRecord`)."""

    name: str
    version: int
    digest: str
    job: str
    task: str
    created: float
    content: dict[str, Any]
