"""The two directions of a link between two parties, as pure machines: no I/O, and time is passed in.

The sender counts chunks from 1 and keeps each until the receiver has reported it. The receiver takes chunks in order,
holds a few that came early, and drops what came twice. Nothing is sent again on suspicion: a sender that hears no
report asks (a probe, which travels behind the chunks), and only what the receiver then says is missing goes again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum, auto

from fate_llm.core.errors import PeerViolation

from .journal import Position

__all__ = ["Inflow", "Outflow", "Place", "Verdict"]


@dataclass(frozen=True, slots=True)
class _Kept:
    number: int
    position: Position
    size: int


class Outflow:
    """What one party has sent another. `kept` chunks have not been reported as received.

    probe: seconds without progress after which the receiver is asked; doubles with each probe in vain.
    """

    def __init__(self, *, probe: float) -> None:
        self.sent = 0
        self.received = 0
        self.waiting_bytes = 0
        self.round_trip: float | None = None
        self._kept: deque[_Kept] = deque()
        self._shortest = probe
        self._interval = probe
        self._quiet_since = 0.0
        self._probed: float | None = None

    def add(self, number: int, position: Position, size: int, now: float) -> None:
        """A chunk is about to be sent; numbers grow by 1."""
        if not self._kept:
            self._quiet_since = now
        self.sent = number
        self.waiting_bytes += size
        self._kept.append(_Kept(number, position, size))

    def reported(self, received: int, now: float) -> list[Position]:
        """The receiver has all chunks up to `received`: what need not be kept any more, oldest first.

        Raises:
            PeerViolation: it reports what was never sent.
        """
        if received > self.sent:
            raise PeerViolation(f"chunk {received} is reported as received, of {self.sent} that were sent")
        done = []
        while self._kept and self._kept[0].number <= received:
            kept = self._kept.popleft()
            self.waiting_bytes -= kept.size
            done.append(kept.position)
        if received > self.received:
            self.received = received
            self._quiet_since = now
            self._interval = self._shortest
        return done

    def missing(self, received: int, sent: int) -> list[Position]:
        """What goes again when the receiver lacks chunks of those up to `sent`: all it has not reported, in order."""
        return [kept.position for kept in self._kept if received < kept.number <= sent]

    def holds(self, position: Position) -> bool:
        """Whether the chunk kept there has not been reported since."""
        return bool(self._kept) and self._kept[0].position <= position

    def probe_due(self, now: float) -> bool:
        """Whether it is time to ask."""
        since = self._quiet_since if self._probed is None else max(self._quiet_since, self._probed)
        return bool(self._kept) and now - since >= self._interval

    def probed(self, now: float) -> None:
        """A probe was sent."""
        if self._probed is not None:
            self._interval = min(self._interval * 2, 16 * self._shortest)
        self._probed = now

    def answered(self, now: float) -> bool:
        """Whether this answers a probe: each is answered once. Its round trip includes the queues before it."""
        if self._probed is None:
            return False
        self.round_trip = now - self._probed
        self._probed = None
        self._quiet_since = now
        return True

    def lacks(self, received: int) -> bool:
        """Whether a receiver that has come so far would need chunks that are not kept any more."""
        return received + 1 < (self._kept[0].number if self._kept else self.sent + 1)


class Verdict(Enum):
    NEXT = auto()  # in order: take it
    EARLY = auto()  # something before it is missing: hold it
    TWICE = auto()  # was here before
    BEYOND = auto()  # too far ahead to be held


@dataclass(frozen=True, slots=True)
class Place:
    """Where a chunk stands in its message."""

    message: int
    size: int
    offset: int


class Inflow:
    """What one party has received from another. window: how many chunks ahead of a gap are held."""

    def __init__(self, *, window: int) -> None:
        self.received = 0
        self.message = 0  # the last message that is whole
        self._window = window
        self._open: Place | None = None  # the message being received, and how far it has come

    def verdict(self, number: int) -> Verdict:
        if number <= self.received:
            return Verdict.TWICE
        if number == self.received + 1:
            return Verdict.NEXT
        return Verdict.EARLY if number <= self.received + self._window else Verdict.BEYOND

    def check(self, place: Place) -> None:
        """Whether the next chunk's place follows the one before.

        Raises:
            PeerViolation: it does not.
        """
        expected = self._open or Place(self.message + 1, place.size, 0)
        if place != expected:
            raise PeerViolation(f"a chunk is {place}, the next should be {expected}")

    def take(self, place: Place, length: int) -> bool:
        """The next chunk, checked before, is here; True when it completes its message."""
        self.received += 1
        end = place.offset + length
        if end == place.size:
            self.message, self._open = place.message, None
            return True
        self._open = Place(place.message, place.size, end)
        return False

    def abandon(self) -> None:
        """The message that is coming in will not be ended; the next chunk begins one in its place."""
        self._open = None

    def restore(self, received: int, message: int) -> None:
        """Go on where an earlier process of this party was: the last whole message that was acknowledged."""
        self.received, self.message, self._open = received, message, None

    @property
    def progress(self) -> tuple[int, int] | None:
        """Bytes received and expected of the message that is coming in, or None between messages."""
        return None if self._open is None else (self._open.offset, self._open.size)
