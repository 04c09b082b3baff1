"""Jobs on the local runtime without a pipeline file: every party's assignments, and when what happened."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fate_llm.core.values import Cohort, Role, Roster
from fate_llm.runtime.events import Event, EventLog
from fate_llm.runtime.jobfolder import JobFolder
from fate_llm.runtime.local import LocalJob
from fate_llm.runtime.party import Assignment, InputRef

__all__ = ["Diary", "Task", "run_job"]


@dataclass(frozen=True, slots=True)
class Task:
    """A task of all data owners; arbiter: whether the arbiter takes part. inputs: by port, of earlier tasks."""

    name: str
    component: str
    params: dict[str, Any]
    inputs: dict[str, InputRef] = field(default_factory=dict)
    arbiter: bool = False


@dataclass(slots=True)
class Diary:
    """Events with the time they came at, on the clock that all processes share, and the work done until then."""

    pages: list[tuple[float, Event]] = field(default_factory=list)
    work: dict[str, float] = field(default_factory=dict)

    def note(self, event: Event) -> None:
        self.pages.append((time.monotonic(), event))
        self.work[event.kind] = time.process_time()  # of the last event of a kind: seconds of all threads together

    def times(self, kind: str, **wanted: Any) -> list[float]:
        """When events of this kind with these fields came."""
        return [
            at
            for at, event in self.pages
            if event.kind == kind and all(event.fields.get(key) == value for key, value in wanted.items())
        ]


def run_job(parties: Sequence[str], tasks: Iterable[Task], *, own: dict[str, dict[str, Any]], folder: Path) -> Diary:
    """Run the tasks with these data owners and the arbiter `consortium`; own: params of a party that differ.

    Raises the error that ended the job, if one did.
    """
    from fate_llm.core import plugins

    roster = Roster(parties[0], tuple(parties[1:]), "consortium")
    cohort = Cohort(tuple(parties), "consortium", len(parties))
    plan: dict[str, list[Assignment]] = {party: [] for party in roster}
    for task in tasks:
        schema = plugins.load("component", task.component).Params
        for party in roster if task.arbiter else parties:
            params = schema(**{**task.params, **own.get(party, {}).get(task.name, {})})
            inputs = task.inputs if party in parties else {}
            roles = tuple(role for role in Role if role in roster.roles_of(party))
            plan[party].append(Assignment(task.name, task.component, roles, cohort, params, dict(inputs)))
    diary = Diary()
    outcome = LocalJob(
        job_id="benchmark",
        roster=roster,
        assignments=plan,
        seed=7,
        patience=600.0,
        base=folder,
        folder=JobFolder.create(folder, "benchmark"),
        events=EventLog(now=time.time, observers=(diary.note,)),
    ).run()
    if outcome.error is not None:
        raise outcome.error
    return diary
