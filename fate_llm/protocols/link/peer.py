"""One party's end of the link to one other party: keys, both directions, and what is kept on disk for them.

Outbox: every sealed chunk, from before it is sent until the other side has reported it; the newest stays as well, so
that a restarted process goes on counting. Inbox: every sealed chunk as it came, until the message it belongs to is
acknowledged, and a note of the last message that was. Both hold ciphertext only.
"""

from __future__ import annotations

import struct
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fate_llm.core.errors import PeerViolation
from fate_llm.core.interfaces import Buffer
from fate_llm.security.agreement import PairSecret
from fate_llm.security.sealing import ReceiveKeys, SendKeys

from .flow import Inflow, Outflow, Place
from .frames import HEADER, TAG, Header, Kind, Report, ReportKind, read_header
from .journal import Position, SegmentLog

__all__ = ["Message", "Peer", "cut"]

_CHUNK, _ACKED = b"C", b"A"
_NOTE = struct.Struct(">QQ")
_REMEMBERED = 256  # tags of received chunks, to tell a copy from a forgery


@dataclass(frozen=True, slots=True)
class Message:
    """A whole message that has come in. again: an earlier process of this party had it already."""

    number: int
    body: memoryview
    again: bool


@dataclass(slots=True)
class _Incoming:
    """A message being put together, and where its chunks are in the inbox."""

    number: int
    buffer: memoryview
    positions: list[Position]
    epoch: int


class Peer:
    """State shared by the link's threads; the link says which lock is held where.

    folder: where outbox and inbox of this pair lie. epoch: which process of this party's life in the job this is.
    """

    def __init__(self, name: str, *, folder: Path, epoch: int, probe: float, window: int) -> None:
        self.name = name
        self.sending = threading.Lock()
        self.outflow = Outflow(probe=probe)
        self.inflow = Inflow(window=window)
        self.last_message = 0  # the last message begun to be sent
        self.heard = 0.0
        self.asked = 0.0
        self.unreported = 0  # bytes received since the last report
        self.durable = 0  # the last chunk received that is on disk: only what is, is reported
        self.resending = 0  # chunks about to be sent again
        self.report_due: float | None = None
        self.gone: str | None = None
        self.left = False
        self._epoch = epoch
        self._outbox = SegmentLog(folder / "outbox")
        self._inbox = SegmentLog(folder / "inbox")
        self._out_lock, self._in_lock = threading.Lock(), threading.Lock()
        self._secret: PairSecret | None = None
        self._reports = 0
        self._reports_seen = 0
        self._reports_epoch = 0
        self._newest: Position | None = None  # of the outbox; kept although it was reported
        self._incoming: _Incoming | None = None
        self._stored: dict[int, tuple[list[Position], int]] = {}  # by whole message: its chunks, its last number
        self._done: set[int] = set()  # acknowledged out of turn: noted once all before them are, too
        self._acked: Position | None = None
        self.holes = 0  # how often in a row the peer asked for what it had reported
        self._tags: dict[int, bytes] = {}

    # --- keys -----------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        return self._secret is not None

    def establish(self, secret: PairSecret, me: str) -> None:
        """From here on frames can be sealed and opened."""
        self._send = SendKeys(secret, sender=me, receiver=self.name, epoch=self._epoch)
        self._send_reports = SendKeys(secret, sender=me, receiver=self.name, epoch=self._epoch, stream="control")
        self._receive = ReceiveKeys(secret, sender=self.name, receiver=me)
        self._receive_reports = ReceiveKeys(secret, sender=self.name, receiver=me, stream="control")
        self._secret = secret

    def _session(self) -> bytes:
        assert self._secret is not None
        return self._secret.session

    # --- sending --------------------------------------------------------------------------------------------

    def seal(self, plaintext: Buffer, message: int, size: int, offset: int) -> tuple[int, Position, bytearray]:
        """The next chunk: its number, where it is kept, and the frame. The caller holds `sending`."""
        number = self.outflow.sent + 1
        received = self.durable
        header = Header(Kind.DATA, self._session(), self._epoch, number, message, size, offset, received).to_bytes()
        frame = bytearray(HEADER + len(plaintext) + TAG)
        frame[:HEADER] = header
        self._send.seal(number, header, plaintext, out=memoryview(frame)[HEADER:])
        with self._out_lock:
            position = self._outbox.append([frame])
        return number, position, frame

    def report(self, kind: ReportKind, sent: int | None = None) -> bytes:
        """A sealed report of both directions. sent: instead of our own, what the probe said that this answers."""
        self._reports += 1
        received = self.durable
        numbers = {"epoch": self._epoch, "number": self._reports, "received": received}
        header = Header(Kind.CONTROL, self._session(), **numbers).to_bytes()
        content = Report(kind, received, self.outflow.sent if sent is None else sent).to_bytes()
        return header + bytes(self._send_reports.seal(self._reports, header, content))

    def forget(self, positions: Sequence[Position]) -> None:
        """These chunks were reported as received."""
        with self._out_lock:
            for position in positions:
                if self._newest is not None:
                    self._outbox.drop(self._newest)
                self._newest = position

    def kept(self, position: Position) -> bytes:
        """A frame once more, byte for byte as it was sent."""
        with self._out_lock:
            return self._outbox.read(position)

    # --- receiving ------------------------------------------------------------------------------------------

    def check_session(self, header: Header) -> None:
        """Raises PeerViolation: the frame belongs to another agreement than the present one."""
        if header.session != self._session():
            raise PeerViolation(f"a frame of {self.name} belongs to another session")

    def same_as_before(self, header: Header, frame: Buffer) -> bool:
        """Whether a chunk that came twice is the same; one too old to be remembered counts as the same."""
        known = self._tags.get(header.number)
        return known is None or known == bytes(frame[-TAG:])

    def take(self, header: Header, frame: memoryview, *, again: bool = False) -> Message | None:
        """Open the next chunk, keep it, and add it to its message; the message when this completes it.

        again: it is read back from the inbox and need not be written.

        Raises:
            BadSeal: changed on its way. PeerViolation: well sealed, but out of place, or larger than our memory.
                Nothing has changed then.
        """
        place = Place(header.message, header.size, header.offset)
        incoming, length = self._incoming, len(frame) - HEADER - TAG
        abandons = incoming is not None and _abandons(header, incoming)
        if not abandons:
            self.inflow.check(place)
        if incoming is None or abandons:
            kept = [] if incoming is None else incoming.positions  # until the message in its place is acknowledged
            incoming = self._begin(header, frame, kept)
            self.inflow.abandon()
        else:
            out = incoming.buffer[header.offset : header.offset + length]
            self._receive.open(header.epoch, header.number, bytes(frame[:HEADER]), frame[HEADER:], out=out)
        if not again:
            with self._in_lock:
                incoming.positions.append(self._inbox.append([_CHUNK, frame]))
        self._tags[header.number] = bytes(frame[-TAG:])
        self._tags.pop(header.number - _REMEMBERED, None)
        self._incoming = incoming
        if not self.inflow.take(place, length):
            return None
        self._incoming = None
        with self._in_lock:
            self._stored[header.message] = (incoming.positions, header.number)
        return Message(header.message, incoming.buffer.toreadonly(), again)

    def _begin(self, header: Header, frame: memoryview, positions: list[Position]) -> _Incoming:
        """Open a message's first chunk; only what it proves of the size is given memory (pages come when written)."""
        content = self._receive.open(header.epoch, header.number, bytes(frame[:HEADER]), frame[HEADER:])
        try:
            buffer = np.empty(header.size, dtype=np.uint8).data
        except (MemoryError, ValueError):
            raise PeerViolation(
                f"{self.name} announces a message of {header.size} bytes, more than fits here"
            ) from None
        buffer[: len(content)] = content
        return _Incoming(header.message, buffer, positions, header.epoch)

    def is_its_own(self, header: Header, frame: memoryview) -> bool:
        """Whether the peer itself sealed this chunk: what is wrong with it then is no accident on the way."""
        try:
            self._receive.open(header.epoch, header.number, bytes(frame[:HEADER]), frame[HEADER:])
        except PeerViolation:
            return False
        return True

    def open_report(self, header: Header, frame: memoryview) -> Report | None:
        """The content of a control frame, or None when it came before.

        Raises:
            BadSeal, BadEnvelope: changed on its way, or no report.
        """
        if (header.epoch, header.number) <= (self._reports_epoch, self._reports_seen):
            return None
        content = self._receive_reports.open(header.epoch, header.number, bytes(frame[:HEADER]), frame[HEADER:])
        found = Report.from_bytes(content)
        self._reports_epoch, self._reports_seen = header.epoch, header.number
        return found

    def acknowledge(self, message: int) -> None:
        """The message is safe with its reader: the inbox need not keep it."""
        with self._in_lock:
            if message not in self._stored:
                return
            self._done.add(message)
            dropped: list[Position] = []
            noted = None
            while (oldest := next(iter(self._stored), 0)) in self._done:
                positions, last = self._stored.pop(oldest)
                self._done.remove(oldest)
                dropped += positions
                noted = (oldest, last)
            if noted is None:
                return
            note = self._inbox.append([_ACKED, _NOTE.pack(*noted)])
            for position in dropped if self._acked is None else [*dropped, self._acked]:
                self._inbox.drop(position)
            self._acked = note

    def sync(self) -> None:
        """What has been received survives a power cut, and may be reported."""
        with self._in_lock:
            received = self.inflow.received
            if received > self.durable:
                self._inbox.sync()
                self.durable = received

    # --- going on after a crash -----------------------------------------------------------------------------

    def recover(self, now: float) -> Iterator[tuple[Header, Position, bytes]]:
        """Read both logs back. Yields chunks of the inbox that the link has to `take` again, in order."""
        for position, frame in self._outbox.recover():
            header = read_header(frame)
            self.outflow.add(header.number, position, len(frame), now)
            whole = header.offset + len(frame) - HEADER - TAG == header.size
            self.last_message = header.message if whole else header.message - 1  # its rest died with the process
        notes: list[tuple[int, int]] = []
        chunks: deque[tuple[Header, Position, bytes]] = deque()
        for position, record in self._inbox.recover():
            if record[:1] == _ACKED:
                notes.append(_NOTE.unpack(record[1:]))
                if self._acked is not None:
                    self._inbox.drop(self._acked)
                self._acked = position
            else:
                chunks.append((read_header(record[1:]), position, record[1:]))
        message, last = max(notes, default=(0, 0))
        self.inflow.restore(last, message)
        self.durable = last
        for header, position, frame in chunks:
            if header.number > last:
                yield header, position, frame
            else:
                self._inbox.drop(position)

    def remember(self, position: Position) -> None:
        """Where a chunk taken again lies in the inbox."""
        if self._incoming is not None:
            self._incoming.positions.append(position)
        elif self.inflow.message in self._stored:
            self._stored[self.inflow.message][0].append(position)

    def close(self, *, remove: bool) -> None:
        with self._out_lock:
            self._outbox.close(remove=remove)
        with self._in_lock:
            self._inbox.close(remove=remove)


def _abandons(header: Header, incoming: _Incoming) -> bool:
    """Whether a message that is coming in will not be ended: its sender's process died, and the next begins anew."""
    return header.offset == 0 and header.message == incoming.number and header.epoch > incoming.epoch


def cut(parts: Sequence[Buffer], chunk: int) -> Iterator[Buffer]:
    """The joined parts in pieces of `chunk` bytes, the last one shorter; copied only where a piece spans parts.

    Nothing at all is one empty piece.
    """
    pending: list[memoryview] = []
    room = chunk
    whole = True
    for part in parts:
        view = memoryview(part).cast("B")
        while len(view):
            taken, view = view[:room], view[room:]
            pending.append(taken)
            room -= len(taken)
            if not room:
                yield pending[0] if len(pending) == 1 else b"".join(pending)
                pending, room, whole = [], chunk, False
    if pending or whole:
        yield pending[0] if len(pending) == 1 else b"".join(pending)
