"""One party's work in a job: its tasks in order, each in every role the party holds there.

The same code runs in a thread of the local runtime and in a process of a party's service. Whatever ends the work is
told to the others before this party leaves.

A party that outlives its process (`JobSetting.durable`) notes each finished task on disk, outputs included, before the
task's messages are acknowledged. A process that is started again skips what is noted, and the rounds of the task in
which its predecessor died go on from their journal.
"""

from __future__ import annotations

import json
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fate_llm.core import plugins
from fate_llm.core.errors import DataError, FateError, InternalError
from fate_llm.core.values import Artifact, ArtifactKind, Cohort, Role

from .context import JobSetting, TaskContext
from .journal import has_rounds, replace_json, sync_tree

__all__ = ["Assignment", "InputRef", "PartyRun"]

_NOTES = "finished.json"


@dataclass(frozen=True, slots=True)
class InputRef:
    """Where an input comes from: an output of an earlier task of this party, or a folder on its disk.

    path: as the pipeline names it; relative ones start at the pipeline's folder, `catalog:NAME` is the party's.
    """

    task: str = ""
    output: str = ""
    path: str | None = None


@dataclass(frozen=True, slots=True)
class Assignment:
    """One task as one party runs it. inputs: by port, a list where the port takes many."""

    task: str
    component: str
    roles: tuple[Role, ...]
    cohort: Cohort
    params: Any
    inputs: Mapping[str, InputRef | tuple[InputRef, ...]] = field(default_factory=dict)


class PartyRun:
    """Runs one party's assignments. `outputs` fills as tasks end.

    finished: {task: {output: path}} of tasks that an earlier attempt has finished; they are not run again.
    """

    def __init__(
        self,
        setting: JobSetting,
        assignments: Sequence[Assignment],
        finished: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        self._setting = setting
        self._assignments = tuple(assignments)
        self._finished = finished or {}
        self._noted: list[str] = []  # tasks that this attempt has finished, as the disk has them
        self.outputs: dict[str, dict[str, Artifact]] = {}
        self.error: FateError | None = None
        self.failed_task = ""

    def run(self) -> None:
        """Run all tasks. Never raises: `error` says how it ended, and the others have been told."""
        channel = self._setting.channel
        current = ""
        try:
            self._noted = self._read_notes()
            for assignment in self._assignments:
                current = assignment.task
                channel.check_cancelled()
                self._run_task(assignment)
            channel.announce_done()
            self._emit("", "party_finished")
        except FateError as error:
            self._end(error, current)
        # The process boundary of a party: whatever a component raises must reach the others as an end, not a hang.
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            self._setting.folder.append_text("log.txt", traceback.format_exc())
            self._end(InternalError(text), current)

    def _end(self, error: FateError, task: str) -> None:
        self.error, self.failed_task = error, task
        self._emit(task, "party_failed", code=error.code, message=error.message)
        try:
            self._setting.channel.announce_failure(error, task=task)
        except FateError:
            self._emit(task, "note", text="the others could not be told: the transport is closed")

    def _run_task(self, assignment: Assignment) -> None:
        component = plugins.load("component", assignment.component)()
        if assignment.task in self._finished or assignment.task in self._noted:
            self._take_over(assignment.task, component)
            return
        folder = self._setting.folder
        folder.clear(assignment.task, scratch=not has_rounds(folder.path, assignment.task))
        inputs = {port: self._resolve(ref, component.inputs[port].kind) for port, ref in assignment.inputs.items()}
        self._emit(assignment.task, "task_started", component=assignment.component)
        contexts = [
            TaskContext(
                self._setting,
                task=assignment.task,
                role=role,
                cohort=assignment.cohort,
                params=assignment.params,
                inputs=inputs,
                outputs=tuple(component.outputs),
            )
            for role in assignment.roles
        ]
        calls = [_role_call(component, ctx) for ctx in contexts]
        leave = partial(self._setting.channel.leave, task=assignment.task)
        _together(calls, name=f"{self._setting.party}-{assignment.task}", on_error=leave)
        self.outputs[assignment.task] = self._collect(assignment.task, component)
        self._note(assignment.task)
        self._emit(assignment.task, "task_finished", outputs=sorted(self.outputs[assignment.task]))

    def _take_over(self, task: str, component: Any) -> None:
        """A task that was finished before; who watches may not have heard of it."""
        self.outputs[task] = self._collect(task, component)
        self._setting.channel.finish_task(task)
        if task in self._noted:
            self._emit(task, "task_finished", outputs=sorted(self.outputs[task]))

    def _read_notes(self) -> list[str]:
        """What this attempt has finished in an earlier process; another attempt's end of a task is not everybody's."""
        path = self._setting.folder.path / _NOTES
        if not self._setting.durable or not path.exists():
            return []
        notes = json.loads(path.read_text(encoding="utf-8"))
        return list(notes["tasks"]) if notes["attempt"] == self._setting.attempt else []

    def _note(self, task: str) -> None:
        """The task has ended: first its outputs are on disk, then the note, then its messages are acknowledged."""
        if not self._setting.durable:
            return
        for artifact in self.outputs[task].values():
            sync_tree(artifact.path)
        self._noted.append(task)
        path = self._setting.folder.path / _NOTES
        replace_json(path, {"attempt": self._setting.attempt, "tasks": self._noted})
        self._setting.channel.finish_task(task)

    def _collect(self, task: str, component: Any) -> dict[str, Artifact]:
        """The outputs that were written. A party need not write all: an arbiter may have none."""
        found: dict[str, Artifact] = {}
        for name, port in component.outputs.items():
            path = self._setting.folder.output(task, name)
            if path.exists():
                found[name] = Artifact(port.kind, path, f"{task}.{name}", self._setting.party)
        return found

    def _resolve(self, ref: InputRef | tuple[InputRef, ...], kind: ArtifactKind) -> Artifact | tuple[Artifact, ...]:
        if isinstance(ref, tuple):
            found = [self._find(single, kind) for single in ref]
            return tuple(artifact for artifact in found if artifact is not None)
        artifact = self._find(ref, kind)
        if artifact is None:
            raise InternalError(f"{self._setting.party} has no output {ref.task}.{ref.output}")
        return artifact

    def _find(self, ref: InputRef, kind: ArtifactKind) -> Artifact | None:
        if ref.path is None:
            return self.outputs.get(ref.task, {}).get(ref.output)
        path = self._setting.resolve(ref.path)
        if not path.exists():
            raise DataError(f"the input {ref.path} does not exist at {self._setting.party}")
        return Artifact(kind, path, path.name, self._setting.party)

    def _emit(self, task: str, kind: str, **fields: Any) -> None:
        self._setting.events.emit(self._setting.folder, self._setting.party, task, kind, fields)


def _role_call(component: Any, ctx: TaskContext) -> Callable[[], None]:
    method: Callable[[TaskContext], None] = getattr(component, ctx.role.value)
    return lambda: method(ctx)


def _together(calls: Sequence[Callable[[], None]], *, name: str, on_error: Callable[[Exception], None]) -> None:
    """Run all calls at once: the first here, the others in threads of their own. Raises the first error.

    A coordinator that also contributes runs both sides so. on_error: told at once, so that the other side, which may
    wait for the one that failed, ends as well.
    """
    errors: list[Exception] = []

    def guarded(call: Callable[[], None]) -> None:
        try:
            call()
        # The boundary of a thread: the error is raised again by the thread that started it.
        except Exception as error:
            errors.append(error)
            on_error(error)

    threads = [
        threading.Thread(target=guarded, args=(call,), name=f"{name}-{index}", daemon=True)
        for index, call in enumerate(calls[1:], start=1)
    ]
    for thread in threads:
        thread.start()
    if calls:
        guarded(calls[0])
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
