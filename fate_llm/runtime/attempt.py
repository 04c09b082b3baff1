"""One attempt at a job, whatever runs it: what it is given, what it gives back, and which error counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fate_llm.core.errors import FateError, FederationError, JobCancelled, PeerFailed
from fate_llm.pipelines.schema import PipelineSpec

from .events import EventLog
from .jobfolder import JobFolder
from .party import Assignment

__all__ = ["Attempt", "Order", "Outcome", "Runtime", "cause_of"]

Outputs = Mapping[str, Mapping[str, Mapping[str, str]]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended. status: success, failed or cancelled. outputs: {party: {task: {output: path}}}.

    errors: by party. error: the one that started it, or None. traffic: {party: {peer: counters of frames}}.
    """

    status: str
    outputs: dict[str, dict[str, dict[str, str]]]
    errors: dict[str, FateError] = field(default_factory=dict)
    error: FateError | None = None
    traffic: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Order:
    """What an attempt is to run. number: 1, 2, ... finished: tasks that earlier attempts have finished, by party.

    base: folder that relative paths of the pipeline start from. plan: every party's assignments.
    """

    job_id: str
    number: int
    spec: PipelineSpec
    plan: Mapping[str, Sequence[Assignment]]
    base: Path
    folder: JobFolder
    events: EventLog
    finished: Outputs


class Attempt(Protocol):
    """Runs all parties to their end. `run` in one thread, `cancel` from any other."""

    def run(self) -> Outcome: ...

    def cancel(self, reason: str) -> None: ...


class Runtime(Protocol):
    """Where jobs run. name: what the manifest says; `local` may run experiments."""

    name: str

    def attempt(self, order: Order) -> Attempt: ...


def cause_of(errors: Mapping[str, FateError], *, cancelled: bool) -> FateError | None:
    """The error that started the end: a party's own fault before what parties miss, that before who failed.

    cancelled: a person here stopped the job.
    """

    def distance(error: FateError) -> int:
        if isinstance(error, JobCancelled):
            return 0 if cancelled else 2
        if isinstance(error, FederationError):
            return 4 if isinstance(error, PeerFailed) else 3
        return 1

    return min(errors.values(), key=distance, default=None)
