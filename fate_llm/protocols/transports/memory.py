"""Transport between the parties of one process, and the fault injector of every test.

A network is made once; each party connects and gets a transport. Frames are copied on sending, as a wire
would, so that no party can see another's later writes. Faults are scripted: which frame, from whom to whom,
and what happens.

Rules:
1. Order is kept per sender and receiver unless a fault says otherwise.
2. A frame that was received but not acknowledged comes again when its party reconnects. A tag is given with
   each delivery and dies with its connection.
3. Time is counted in frames: a delayed frame arrives after N later frames of the same pair, so that a script
   gives the same story on every machine. So that none can hang, a frame held for `linger` seconds arrives in
   any
   case.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from fate_llm.core.errors import ConfigurationError, TransportClosed
from fate_llm.core.interfaces import Buffer, Delivery, Progress

__all__ = ["PLUGIN", "Fault", "FaultKind", "MemoryNetwork", "MemoryTransport"]


class FaultKind(StrEnum):
    LOSE = "lose"
    DELAY = "delay"
    DUPLICATE = "duplicate"


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to the `nth` frame (1-based) from `sender` to `receiver`.

    by: for DELAY, after how many later frames of the pair it arrives (reordering); None: after `linger` only.
    """

    kind: FaultKind
    sender: str
    receiver: str
    nth: int
    by: int | None = 1


@dataclass(slots=True)
class _Frame:
    sender: str
    body: bytes
    number: int
    redelivered: bool = False


@dataclass(frozen=True, slots=True)
class _Held:
    receiver: str
    frame: _Frame
    fault: Fault
    since: float


class MemoryNetwork:
    """The queues between the parties of one job. Thread-safe.

    linger: seconds after which a delayed frame arrives even without later frames of its pair; None: never.
    """

    def __init__(self, faults: Iterable[Fault] = (), *, linger: float | None = 0.05) -> None:
        self._faults = {(f.sender, f.receiver, f.nth): f for f in faults}
        self._ready: dict[str, deque[_Frame]] = defaultdict(deque)
        self._unacked: dict[str, dict[int, _Frame]] = defaultdict(dict)
        self._held: list[_Held] = []
        self._linger = linger
        self._sent: dict[tuple[str, str], int] = defaultdict(int)
        self._numbers = 0
        self._tags = 0
        self._changed = threading.Condition()

    def connect(self, party: str) -> MemoryTransport:
        """A transport for `party`.

        What an earlier one left unacknowledged comes again, marked as redelivered.
        """
        with self._changed:
            again = self._unacked.pop(party, {})
            for frame in sorted(again.values(), key=lambda f: f.number, reverse=True):
                frame.redelivered = True
                self._ready[party].appendleft(frame)
            self._changed.notify_all()
        return MemoryTransport(self, party)

    def left_over(self) -> dict[str, int]:
        """Frames held or not acknowledged, by receiver; for tests that nothing is left behind."""
        with self._changed:
            counts = {p: len(q) for p, q in self._ready.items()}
            for party, frames in self._unacked.items():
                counts[party] = counts.get(party, 0) + len(frames)
            for held in self._held:
                counts[held.receiver] = counts.get(held.receiver, 0) + 1
            return {party: count for party, count in counts.items() if count}

    def _put(self, sender: str, receiver: str, body: bytes) -> None:
        with self._changed:
            self._sent[sender, receiver] += 1
            nth = self._sent[sender, receiver]
            self._numbers += 1
            frame = _Frame(sender, body, self._numbers)
            fault = self._faults.get((sender, receiver, nth))
            if fault is None:
                self._ready[receiver].append(frame)
            elif fault.kind is FaultKind.DUPLICATE:
                self._ready[receiver].append(frame)
                self._numbers += 1
                self._ready[receiver].append(_Frame(sender, body, self._numbers))
            elif fault.kind is FaultKind.DELAY:
                self._held.append(_Held(receiver, frame, fault, time.monotonic()))
            self._release(sender, receiver, nth)
            self._changed.notify_all()

    def _release(self, sender: str, receiver: str, nth: int) -> None:
        for held in list(self._held):
            due = held.fault.by is not None and nth - held.fault.nth >= held.fault.by
            if (held.fault.sender, held.fault.receiver) == (sender, receiver) and due:
                self._held.remove(held)
                self._ready[receiver].append(held.frame)

    def _release_lingering(self, receiver: str) -> float | None:
        """Deliver what was held too long; the seconds until the next frame of `receiver` will be."""
        remaining: float | None = None
        for held in [h for h in self._held if h.receiver == receiver and self._linger is not None]:
            left = held.since + (self._linger or 0.0) - time.monotonic()
            if left <= 0:
                self._held.remove(held)
                self._ready[receiver].append(held.frame)
            else:
                remaining = left if remaining is None else min(left, remaining)
        return remaining

    def _take(self, party: str, closed: Callable[[], bool], timeout: float | None) -> Delivery | None:
        until = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not closed():
                lingering = self._release_lingering(party)
                if self._ready[party]:
                    return self._deliver(party, self._ready[party].popleft())
                remaining = None if until is None else until - time.monotonic()
                if remaining is not None and remaining <= 0:
                    return None
                waits = [seconds for seconds in (lingering, remaining) if seconds is not None]
                self._changed.wait(min(waits, default=None))
            raise TransportClosed(f"the transport of {party} is closed")

    def _deliver(self, party: str, frame: _Frame) -> Delivery:
        self._tags += 1
        self._unacked[party][self._tags] = frame
        return Delivery(frame.sender, memoryview(frame.body), self._tags, frame.redelivered)

    def _ack(self, party: str, tag: object) -> None:
        with self._changed:
            self._unacked[party].pop(tag, None)  # type: ignore[call-overload]

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


class MemoryTransport:
    """One party's end of a MemoryNetwork. Satisfies `core.interfaces.Transport`."""

    def __init__(self, network: MemoryNetwork, party: str) -> None:
        if not party:
            raise ConfigurationError("a transport needs the name of its party")
        self.address = party
        self._network = network
        self._closed = False

    def send(self, receiver: str, parts: Sequence[Buffer]) -> int:
        if self._closed:
            raise TransportClosed(f"the transport of {self.address} is closed")
        body = b"".join(parts)
        self._network._put(self.address, receiver, body)
        return len(body)

    @property
    def connected(self) -> bool:
        return True

    def flush(self, timeout: float | None = None) -> bool:
        return True  # the network has what was sent

    def forget(self, receiver: str) -> None:
        return

    def progress(self, sender: str) -> Progress | None:
        return None  # frames come whole

    def receive(self, timeout: float | None) -> Delivery | None:
        return self._network._take(self.address, lambda: self._closed, timeout)

    def ack(self, delivery: Delivery) -> None:
        if not self._closed:
            self._network._ack(self.address, delivery.tag)

    def close(self, *, finished: bool = False) -> None:
        self._closed = True
        self._network._wake()


PLUGIN = MemoryNetwork
