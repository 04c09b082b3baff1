"""How far a party's tasks are, as its worker's events tell it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..events import Event
from .words import TaskView

__all__ = ["Track"]


class Track:
    """The tasks of one party in one job. views: from an earlier process of the service."""

    def __init__(self, tasks: Iterable[str], views: Mapping[str, TaskView] | None = None) -> None:
        self._views = {task: TaskView(state="waiting") for task in tasks}
        self._views.update({task: view for task, view in (views or {}).items() if task in self._views})

    @property
    def views(self) -> dict[str, TaskView]:
        return dict(self._views)

    def begin(self, finished: Iterable[str]) -> None:
        """An attempt begins: all but the finished tasks wait again; a round that was reached stays to be seen."""
        for task, view in self._views.items():
            state = "success" if task in finished else "waiting"
            self._views[task] = view.model_copy(update={"state": state})

    def note(self, event: Event) -> bool:
        """Take one event; whether it changed anything that others are told."""
        view = self._views.get(event.task)
        if view is None:
            return False
        changed = view
        if event.kind == "task_started":
            changed = view.model_copy(update={"state": "running"})
        elif event.kind == "task_finished":
            changed = view.model_copy(update={"state": "success"})
        elif event.kind in ("round_state", "round_closed") and _counts(event):
            at = {"round": int(event.fields["round"]), "rounds": int(event.fields["rounds"])}
            changed = view.model_copy(update={"state": "running", **at})
        self._views[event.task] = changed
        return changed != view

    def end(self, state: str) -> None:
        """The part is over: what was running ended so (`failed` or `cancelled`)."""
        for task, view in self._views.items():
            if view.state == "running":
                self._views[task] = view.model_copy(update={"state": state})


def _counts(event: Event) -> bool:
    """A worker is a process of ours, but what it says is read with care all the same."""
    return all(type(event.fields.get(key)) is int and event.fields[key] >= 0 for key in ("round", "rounds"))
