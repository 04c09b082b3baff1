"""What happens in a job, as events: written to each party's log and files, and shown to whoever watches.

An event holds nothing private: counts, names, losses of the party itself. Observers are told in the thread where
it happens, one at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from .jobfolder import PartyFolder

__all__ = ["Event", "EventLog", "Observer"]


@dataclass(frozen=True, slots=True)
class Event:
    """kind: `task_started`, `step`, `round`, ... seconds: since the epoch."""

    kind: str
    party: str
    task: str
    seconds: float
    fields: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {
            "event": self.kind,
            "party": self.party,
            "task": self.task,
            "time": self.seconds,
            **self.fields,
        }


Observer = Callable[[Event], None]
_QUIET = frozenset({"step"})  # too many for the log


class EventLog:
    """Hands events to observers and to the files of the party they belong to. Thread-safe."""

    def __init__(self, *, now: Callable[[], float], observers: tuple[Observer, ...] = ()) -> None:
        self._now = now
        self._observers = observers
        self._lock = threading.Lock()

    def emit(self, folder: PartyFolder | None, party: str, task: str, kind: str, fields: Mapping[str, Any]) -> None:
        """Record one event; folder: the party's, or None for events of the job as a whole."""
        event = Event(kind, party, task, self._now(), dict(fields))
        if folder is not None:
            folder.append("events.jsonl", event.as_dict())
            if kind not in _QUIET:
                folder.append_text("log.txt", _line(event))
        self.pass_on(event)

    def pass_on(self, event: Event) -> None:
        """Tell the observers of an event that is in its party's files already."""
        with self._lock:
            for observer in self._observers:
                observer(event)


def _line(event: Event) -> str:
    stamp = datetime.fromtimestamp(event.seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
    # A value with line breaks would forge lines of the log.
    details = " ".join(f"{key}={value}" for key, value in event.fields.items())
    details = "".join(sign if sign.isprintable() else " " for sign in details)
    return f"{stamp} {event.task or '-'} {event.kind} {details}".rstrip()
