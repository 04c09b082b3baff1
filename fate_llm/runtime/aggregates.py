"""What others see of a party's events while a sum of the job hides its terms: totals, and what counts nothing.

A loss, a weight or a count of records that left a party beside a masked sum would undo what the sum hides. So an event
is shown to others, and streamed to whoever watches, with fields that are known to be none of these; all else stays in
the party's own files. No policy shows more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from .events import Event, Observer

__all__ = ["only_aggregates", "watching_aggregates"]

_NEUTRAL = frozenset(
    {
        "attempt",
        "code",
        "component",
        "contributors",
        "conversation",
        "missing",
        "outputs",
        "party",
        "round",
        "rounds",
        "state",
    }
)
_TOTALS = {"round": frozenset({"loss"}), "scores": frozenset({"rows"})}  # over all contributors of the task
_HERE = frozenset({"round", "rounds", "sent_bytes"})  # besides, for who runs all parties on one machine
_TROUBLE = frozenset({"ignored", "note", "party_failed", "refused", "retry"})  # so that it can be mended


def only_aggregates(event: str, task: str, fields: Mapping[str, Any], hiding: Collection[str]) -> dict[str, Any] | None:
    """The fields that other parties may see; None for an event that would have none left, and for mere steps.

    hiding: the job's tasks whose sums hide terms; when there is none, all fields.
    """
    if not hiding:
        return dict(fields)
    allowed = _NEUTRAL | (_TOTALS.get(event, frozenset()) if task in hiding else frozenset())
    shown = {name: value for name, value in fields.items() if name in allowed}
    return None if event == "step" or (fields and not shown) else shown


def watching_aggregates(observer: Observer, hiding: Collection[str]) -> Observer:
    """An observer of a job whose parties are all on this machine: told of each party's events as the others would see
    them, of its troubles, and that it trains (how many steps tells how many records there are).
    """

    def observe(event: Event) -> None:
        shown = only_aggregates(event.kind, event.task, event.fields, hiding) or {}
        more = {name: value for name, value in event.fields.items() if name in _HERE or event.kind in _TROUBLE}
        if shown or more or not event.fields:
            observer(Event(event.kind, event.party, event.task, event.seconds, shown | more))

    return observe if hiding else observer
