"""What one role of one task has said and heard over a durable channel: pure bookkeeping, no I/O.

Rules:
1. A message is consumed when the role takes it from its mailbox, and held (without its body) until the role's journal
   is on disk. Only then it is acknowledged, and never comes again.
2. What is consumed before the rounds of a conversation begin is held until the task has ended: that part of a
   component runs again in every process. What is consumed inside the rounds is acknowledged round by round.
3. Each role has an account of its own, so that one role's commit never acknowledges what another consumed.
4. Positions are places (round, ordinal) by task, kind and peer. They hold inside one attempt only: the next one has
   links, and so messages, of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fate_llm.core.interfaces import Delivery

__all__ = ["Account", "Key", "Place", "base_task", "read_positions"]

Key = tuple[str, str, str]  # task, kind, peer
Place = tuple[int, int]  # round, ordinal


@dataclass(slots=True)
class Account:
    """One role's account. used: how often each name of a sum outside the rounds was used."""

    used: Counter[str] = field(default_factory=Counter)
    _said: dict[Key, Place] = field(default_factory=dict)
    _heard: dict[Key, Place] = field(default_factory=dict)
    _held: list[tuple[int, Delivery]] = field(default_factory=list)
    _count: int = 0

    def said(self, key: Key, place: Place) -> None:
        """A message was sent."""
        self._said[key] = place

    def took(self, key: Key, place: Place, receipt: Delivery | None) -> None:
        """A message was consumed. receipt: what acknowledges it; None for one of the party to itself."""
        if receipt is None:
            return
        self._heard[key] = max(place, self._heard.get(key, place))
        self._held.append((self._count, receipt))
        self._count += 1

    def mark(self) -> int:
        """Where the rounds of a conversation begin; see `release`."""
        return self._count

    def release(self, mark: int) -> list[Delivery]:
        """What was consumed since `mark`, to be acknowledged now."""
        ready = [receipt for number, receipt in self._held if number >= mark]
        self._held = [entry for entry in self._held if entry[0] < mark]
        return ready

    def positions(self, conversation: str) -> dict[str, Any]:
        """How far this role has come in a conversation, as JSON values.

        The rounds of a task speak for the task's named messages as well; a sum inside the task only for itself.
        """
        wanted = {conversation} if "/" in conversation else {conversation, base_task(conversation)}
        return {
            "said": _listed((key, place) for key, place in self._said.items() if key[0] in wanted),
            "heard": _listed((key, place) for key, place in self._heard.items() if key[0] in wanted),
        }

    def restore(self, positions: Mapping[str, Any]) -> None:
        """Go on from positions that an earlier process had."""
        self._said.update(read_positions(positions, "said"))
        self._heard.update(read_positions(positions, "heard"))


def read_positions(positions: Mapping[str, Any], what: str) -> dict[Key, Place]:
    """The places of `what` (said or heard) in positions that `Account.positions` gave."""
    return {(t, kind, peer): (round, ordinal) for t, kind, peer, round, ordinal in positions.get(what, ())}


def base_task(conversation: str) -> str:
    """The task that a conversation belongs to: itself, its further rounds (`task#2`) or a sum in it (`task/name/1`)."""
    return conversation.partition("/")[0].partition("#")[0]


def _listed(places: Iterable[tuple[Key, Place]]) -> list[list[Any]]:
    return [list(entry) for entry in sorted(_flat(places))]


def _flat(places: Iterable[tuple[Key, Place]]) -> Iterator[tuple[str, str, str, int, int]]:
    for (task, kind, peer), (round, ordinal) in places:
        yield task, kind, peer, round, ordinal
