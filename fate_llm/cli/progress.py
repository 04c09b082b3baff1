"""What `submit` shows while a job runs: a live table on a terminal, a line per event elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from fate_llm.runtime.events import Event

__all__ = ["Progress", "size_text"]


def size_text(count: float) -> str:
    """Bytes for people: 1.86 MB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


@dataclass(slots=True)
class _Row:
    """The present state of one party."""

    task: str = "-"
    doing: str = "waiting"
    round: str = "-"
    step: str = "-"
    loss: str = "-"
    sent: str = "-"


class Progress:
    """Observes a job's events. Use as a context manager around the run."""

    def __init__(self, *, stream: IO[str], quiet: bool = False) -> None:
        self._console = Console(file=stream, highlight=False)
        self._quiet = quiet
        self._rows: dict[str, _Row] = {}
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._live: Live | None = None
        if not quiet and self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4, get_renderable=self._table)

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """One line that stays."""
        if not self._quiet:
            self._console.print(_printable(text), soft_wrap=True, markup=False)

    def observe(self, event: Event) -> None:
        """Take one event of the job; called from any thread."""
        with self._lock:
            self._note(event)
            sent = self._rows[event.party].sent if event.party in self._rows else "-"
        text = None if self._quiet else _sentence(event, sent)
        if text is not None and (self._live is None or event.kind in _URGENT):
            self.say(f"{time.monotonic() - self._started:7.1f} s  {text}")

    def _note(self, event: Event) -> None:
        if not event.party:
            return
        row, fields = self._rows.setdefault(event.party, _Row()), event.fields
        if event.task:
            row.task = event.task
        row.doing = _DOING.get(event.kind, row.doing)
        if event.kind == "step" and _numbers(fields, "step", "steps"):
            row.step = f"{fields['step']}/{fields['steps']}"
        if _numbers(fields, "round", "rounds"):
            row.round = f"{fields['round']}/{fields['rounds']}"
        if _numbers(fields, "loss"):
            row.loss = _loss(fields["loss"])
        if _numbers(fields, "sent_bytes"):
            row.sent = size_text(fields["sent_bytes"])

    def _table(self) -> Table:
        table = Table(title=f"{time.monotonic() - self._started:.0f} s", title_justify="left")
        for name in ("party", "task", "doing", "round", "step", "loss", "sent"):
            table.add_column(name)
        with self._lock:
            for party, row in self._rows.items():
                cells = (party, row.task, row.doing, row.round, row.step, row.loss, row.sent)
                table.add_row(*(escape(_printable(cell)) for cell in cells))
        return table


_DOING = {
    "task_started": "starting",
    "encoded": "reading",
    "step": "training",
    "round_state": "new state",
    "round": "training",
    "round_closed": "aggregating",
    "scored": "scoring",
    "task_finished": "done",
    "party_finished": "finished",
    "party_failed": "failed",
}

_URGENT = ("note", "party_failed", "refused", "ignored", "retry")
_DETAILED = ("refused", "ignored", "retry", "data", "trainable", "scored", "task_started", "task_finished")


def _printable(text: str) -> str:
    """Text of another party cannot move the cursor, nor make lines of its own."""
    return "".join(sign if sign.isprintable() else " " for sign in text)


def _numbers(fields: Mapping[str, Any], *names: str) -> bool:
    """Whether these fields are there and numbers: a party's policy may hide some, and a partner may say anything."""
    return all(isinstance(fields.get(name), int | float) for name in names)


def _loss(value: Any) -> str:
    """A loss for people; there is none where nothing was trained on, or where it is not shown."""
    return f"{value:.3f}" if isinstance(value, int | float) else "-"


def _count(fields: Mapping[str, Any], name: str, whole: str) -> str:
    """`round 3/4`; `round 3` where the whole is not shown to us; nothing where nothing is."""
    if name not in fields:
        return ""
    return f"{name} {fields[name]}" + (f"/{fields[whole]}" if whole in fields else "")


def _sentence(event: Event, sent: str) -> str | None:
    """One line for an event, or None for those that are not worth one. sent: what the party has sent so far."""
    fields: Any = event.fields
    who = f"{event.party:<12} {event.task:<10}"
    at = _count(fields, "round", "rounds")
    if event.kind == "round":
        losses = f"local loss {_loss(fields.get('local_loss'))}, all parties' loss {_loss(fields.get('loss'))}"
        tokens = f", {fields['tokens']} tokens trained" if "tokens" in fields else ""
        total = "" if sent == "-" else f", {sent} sent so far"
        return f"{who} {at}, {losses}{tokens}{total}"
    if event.kind == "step" and not (_numbers(fields, "step") or _numbers(fields, "loss")):
        return None  # it trains, and how far it is says too much
    if event.kind == "step":
        step = _count(fields, "step", "steps")
        return f"{who} {at}{' ' if step else ''}{step} loss {_loss(fields.get('loss'))}"
    if event.kind == "round_closed":
        return f"{who} {at} summed{_among(fields)}"
    if event.kind == "note":
        return f"{who} {fields.get('text', '')}"
    if event.kind == "party_failed":
        return f"{who} failed [{fields.get('code', '?')}]: {fields.get('message', '')}"
    if event.kind in _DETAILED:
        details = ", ".join(f"{key} {value}" for key, value in fields.items())
        return f"{who} {event.kind.replace('_', ' ')}{': ' if details else ''}{details}"
    return None


def _among(fields: Mapping[str, Any]) -> str:
    contributors, missing = fields.get("contributors"), fields.get("missing")
    count = f" over {len(contributors)} parties" if isinstance(contributors, list | tuple) else ""
    return count + (
        f", missing {', '.join(map(str, missing))}" if isinstance(missing, list | tuple) and missing else ""
    )
