"""A transport on top of a transport: private, exact, and in pieces.

What goes in is a message of any size to another party; what comes out at the other end is the same bytes once, in the
order they were sent. In between there may be brokers that lose, repeat, delay, read, change or invent frames.

Rules:
 1. The parties agree on a key per pair and job attempt (`security.agreement`); nothing else travels unsealed.
 2. A message is cut into chunks, each sealed by itself, numbered per direction. Memory beyond the message itself is a
    few chunks on either side.
 3. A chunk is in the outbox before it is sent, and is sent again, if ever, byte for byte as it was.
 4. A chunk is acknowledged to the transport only after it is in the inbox, on disk.
 5. A message is delivered once in the life of a job's folder, unless its reader did not acknowledge it.
 6. Whatever does not open, or is out of place, is refused: counted, reported to the observer, and dropped. What is
    missing then is asked for like anything that got lost.
 7. A party that answers no probe for `Timing.silence` seconds is gone, and whoever waits for it is told. While our own
    transport has no connection, nobody's silence counts.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fate_llm.core.canonical import canonical_json
from fate_llm.core.errors import (
    ConflictingDuplicate,
    FateError,
    FederationError,
    InternalError,
    MessageLost,
    PeerFailed,
    PeerRestarted,
    PeerViolation,
    TransportClosed,
)
from fate_llm.core.interfaces import Buffer, Delivery, Progress, Transport
from fate_llm.security.identity import Identity, PublicIdentity

from .flow import Verdict
from .frames import CHUNK, HEADER, LARGEST, Header, Kind, Report, ReportKind, read_header
from .journal import Position
from .peer import Message, Peer, cut
from .session import Session

__all__ = ["LinkCounters", "SecureLink", "Timing"]

Observer = Callable[[str, Mapping[str, Any]], None]
OnGone = Callable[[str, str, str], None]
_AGREE = Header(Kind.AGREE).to_bytes()
_HOLES = 3  # times in a row that a party asks for what it had reported; once may be an old question


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. None of them bounds how long a transfer or a round may take.

    meet: until another party's first word. silence: without any sign of life from a party that was there.
    keepalive: of quiet, after which a party is asked for a sign of life. probe: without progress, after which a
    receiver is asked what it has. report: until received chunks are reported if nothing else goes that way.
    linger: at the end, without progress, before messages that nobody has reported are given up.
    """

    meet: float = 300.0
    silence: float = 120.0
    keepalive: float = 30.0
    probe: float = 2.0
    report: float = 0.2
    linger: float = 10.0


@dataclass(slots=True)
class LinkCounters:
    """Traffic with one other party. bytes: of messages, before sealing."""

    messages_sent: int = 0
    messages_received: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    chunks_sent_again: int = 0
    duplicates: int = 0
    early: int = 0
    refused: int = 0


class SecureLink:
    """Satisfies `core.interfaces.Transport`. One per party, job and attempt; it owns the transport below.

    identity, roster: this party's key, and everybody's pinned public keys. folder: this party's journal of the job's
    attempt; a process that finds one goes on where the last one was. unreported: bytes on the way to one party beyond
    which `send` waits. window: chunks held that came before their turn. on_gone: told once of a party that will not
    be heard again: its name, an error code, and words.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        job: str,
        attempt: int,
        party: str,
        identity: Identity,
        roster: Mapping[str, PublicIdentity],
        folder: Path,
        timing: Timing = Timing(),
        chunk: int = CHUNK,
        unreported: int = 32 * CHUNK,
        window: int = 4,
        clock: Callable[[], float] = time.monotonic,
        epoch: Callable[[], int] = time.time_ns,
        observer: Observer | None = None,
        on_gone: OnGone | None = None,
    ) -> None:
        self.party = party
        self.counters = {name: LinkCounters() for name in roster if name != party}
        self._transport = transport
        self._timing, self._chunk, self._unreported, self._clock = timing, chunk, unreported, clock
        self._observer, self._on_gone = observer, on_gone
        context = canonical_json(
            {"job": job, "attempt": attempt, "roster": {name: key.to_text() for name, key in roster.items()}}
        )
        self._session = Session(
            folder / "session", me=party, identity=identity, roster=roster, context=context, first_epoch=epoch
        )
        self._agreement = self._session.agreement
        self._changed = threading.Condition()
        self._ready: deque[Delivery] = deque()
        self._early: dict[tuple[str, int], tuple[Header, Delivery]] = {}
        self._window = window
        self._to_ack: list[Delivery] = []
        self._broken: FateError | None = None
        self._closing = False
        self._ending = threading.Lock()
        self._again: queue.SimpleQueue[tuple[Peer, list[Position]] | None] = queue.SimpleQueue()
        self._resender: threading.Thread | None = None
        now = clock()
        self._started = self._greeted = now
        with contextlib.ExitStack() as undo:  # a journal that does not open: nothing stays locked
            undo.callback(self._session.close)
            self._peers = {
                name: Peer(name, folder=folder / name, epoch=self._session.epoch, probe=timing.probe, window=window)
                for name in self.counters
            }
            for peer in self._peers.values():
                self._resume(peer, now)
            for peer in self._peers.values():
                self._greet(peer)
            undo.pop_all()
        self._pump = threading.Thread(target=self._run, name=f"link-{party}", daemon=True)
        self._pump.start()

    def _resume(self, peer: Peer, now: float) -> None:
        """Take up what an earlier process of this party left in its folder."""
        peer.heard = now
        secret = self._agreement.secret(peer.name)
        if secret is None:
            return
        peer.establish(secret, self.party)
        for header, position, frame in peer.recover(now):
            message = peer.take(header, memoryview(frame), again=True)
            peer.remember(position)
            if message is not None:
                self._hand_over(peer, message)

    # --- the seam -------------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        return self._transport.connected

    def send(self, receiver: str, parts: Sequence[Buffer]) -> int:
        """Send one message; returns its bytes when all of it is sealed, on disk and on its way.

        Waits for the receiver's first word, and while too much is on the way to it. To a party that has said goodbye
        nothing is sent any more.

        Raises:
            PeerFailed: the receiver is gone. TransportClosed: the link was closed, or its transport gave up.
            FederationError: nobody of that name, a message above `LARGEST`, or a disk that does not take it; after
                the last the link has ended.
        """
        peer = self._peers.get(receiver)
        if peer is None:
            raise FederationError(f"{receiver} is not a party of this job")
        size = sum(memoryview(part).nbytes for part in parts)
        if size > LARGEST:
            raise FederationError(f"a message of {size} bytes to {receiver}; at most {LARGEST}: send it in parts")
        with peer.sending:
            self._wait_for(peer, lambda: peer.ready)
            peer.last_message += 1
            whole = False
            try:
                whole = self._send_pieces(peer, parts, size)
            finally:
                if not whole and peer.gone is None:
                    text = f"a message to {receiver} was broken off, and nothing can follow it in this process"
                    self._break(FederationError(text, hint="Start this party again: it goes on from its journal."))
        return size

    def _send_pieces(self, peer: Peer, parts: Sequence[Buffer], size: int) -> bool:
        offset = 0
        for piece in cut(parts, self._chunk):
            self._wait_for(peer, lambda: peer.outflow.waiting_bytes < self._unreported)
            if peer.left:
                return True
            number, position, frame = peer.seal(piece, peer.last_message, size, offset)
            with self._changed:
                peer.outflow.add(number, position, len(frame), self._clock())
                peer.unreported, peer.report_due = 0, None
            self._transport.send(peer.name, [frame])
            offset += len(piece)
        counters = self.counters[peer.name]
        counters.messages_sent += 1
        counters.bytes_sent += size
        return True

    def _wait_for(self, peer: Peer, condition: Callable[[], bool]) -> None:
        with self._changed:
            while True:
                self._raise_if_broken()
                if peer.gone is not None:
                    raise PeerFailed(f"{peer.name} cannot be sent to: {peer.gone}")
                if peer.left or condition():
                    return
                self._changed.wait()

    def receive(self, timeout: float | None) -> Delivery | None:
        until = None if timeout is None else self._clock() + timeout
        with self._changed:
            while not self._ready:
                self._raise_if_broken()
                remaining = None if until is None else until - self._clock()
                if remaining is not None and remaining <= 0:
                    return None
                self._changed.wait(remaining)
            return self._ready.popleft()

    def ack(self, delivery: Delivery) -> None:
        if isinstance(delivery.tag, _Tag) and delivery.tag.link is self and not self._closing:
            with contextlib.suppress(TransportClosed):  # closed meanwhile: it comes again
                self._peers[delivery.sender].acknowledge(delivery.tag.message)

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until every party that is still there has reported all that was sent to it.

        timeout: seconds without any progress after which False is returned; None: `Timing.linger`.
        """
        limit = self._timing.linger if timeout is None else timeout
        with self._changed:
            waiting = [p for p in self._peers.values() if p.ready and p.outflow.waiting_bytes]
        for peer in waiting:
            self._tell(peer, ReportKind.PROBE)
        left, since = -1, self._clock()
        with self._changed:
            while True:
                pending = [p for p in self._peers.values() if p.gone is None and not p.left]
                now_left = sum(p.outflow.waiting_bytes for p in pending)
                if not now_left or self._broken is not None:
                    return not now_left
                if now_left != left:
                    left, since = now_left, self._clock()
                remaining = since + limit - self._clock()
                if remaining <= 0:
                    return False
                self._changed.wait(remaining)

    def forget(self, receiver: str) -> None:
        with self._changed:
            self._peers[receiver].left = True
            self._changed.notify_all()
        self._transport.forget(receiver)

    def progress(self, sender: str) -> Progress | None:
        peer = self._peers.get(sender)
        found = peer.inflow.progress if peer is not None else None
        return None if found is None else Progress(*found)

    def close(self, *, finished: bool = False) -> None:
        """Stop. finished: wait for the others to have everything, say goodbye, and leave no journal behind.

        Without it the journal stays, and the next process of this party takes it up. Closing twice is fine.
        """
        # the pump closes when a callback does; it must not wait for a thread that waits for the pump
        if not self._ending.acquire(blocking=threading.current_thread() is not self._pump):
            return
        with contextlib.ExitStack() as held:
            held.callback(self._ending.release)
            if not self._closing:
                self._end(finished)

    def _end(self, finished: bool) -> None:
        if finished:
            with contextlib.suppress(FederationError):  # a transport that has failed: there is nobody to tell
                self._say_goodbye()
        self._closing = True
        self._transport.close(finished=finished)
        if threading.current_thread() is not self._pump:
            self._pump.join()
        self._again.put(None)
        if self._resender is not None:
            self._resender.join()
        with self._changed:
            self._broken = self._broken or TransportClosed(f"the link of {self.party} is closed")
            self._changed.notify_all()
        for peer in self._peers.values():
            with peer.sending:
                peer.close(remove=finished)
        self._session.close(remove=finished)

    def _say_goodbye(self) -> None:
        self.flush()
        for peer in self._peers.values():
            if peer.ready and not peer.left and peer.gone is None:
                self._tell(peer, ReportKind.BYE)
            else:  # what is under way to it holds nobody up
                self._transport.forget(peer.name)
        self._transport.flush(self._timing.linger)

    def _raise_if_broken(self) -> None:
        if self._broken is not None:
            raise self._broken

    # --- for metrics ----------------------------------------------------------------------------------------

    def unreported(self) -> dict[str, int]:
        """Bytes on the way to each party that it has not reported yet."""
        return {name: peer.outflow.waiting_bytes for name, peer in self._peers.items()}

    def round_trips(self) -> dict[str, float]:
        """Seconds from the last probe to its answer, of each party that was ever asked."""
        found = {name: peer.outflow.round_trip for name, peer in self._peers.items()}
        return {name: seconds for name, seconds in found.items() if seconds is not None}

    # --- the pump: everything that comes in, and the clock --------------------------------------------------

    def _run(self) -> None:
        tick = min(self._timing.report, self._timing.probe / 2)
        try:
            while not self._closing:
                delivery = self._transport.receive(0.0 if self._to_ack else tick)
                if delivery is not None:
                    self._take(delivery)
                if delivery is None or len(self._to_ack) >= self._window:
                    self._settle()
                self._tick()
        except FateError as error:
            self._break(error)
        # The boundary of a thread: whoever waits must see why nothing comes any more.
        except Exception as error:
            self._break(InternalError(f"the link stopped: {type(error).__name__}: {error}"))

    def _break(self, error: FateError) -> None:
        with self._changed:
            self._broken = self._broken or error
            self._changed.notify_all()

    def _settle(self) -> None:
        """Acknowledge what is on disk by now."""
        for peer in {d.sender: self._peers[d.sender] for d in self._to_ack if d.sender in self._peers}.values():
            peer.sync()
        for delivery in self._to_ack:
            self._transport.ack(delivery)
        self._to_ack.clear()

    def _take(self, delivery: Delivery) -> None:
        """One frame. It is acknowledged later, except where it is held before its turn."""
        try:
            if not self._heard(delivery):
                return
        except PeerViolation as error:
            self._refuse(delivery.sender, error)
        self._to_ack.append(delivery)

    def _heard(self, delivery: Delivery) -> bool:
        """Whether the frame is done with (and not held)."""
        peer = self._peers.get(delivery.sender)
        if peer is None:
            raise PeerViolation(f"a frame from {delivery.sender!r}, who is not a party of this job")
        header = read_header(delivery.body, chunk=self._chunk)
        if header.kind is Kind.AGREE:
            self._agree(peer, bytes(delivery.body[HEADER:]))
            return True
        if not peer.ready:
            return True  # it will be asked for again once there is a key
        peer.check_session(header)
        if header.kind is Kind.CONTROL:
            report = peer.open_report(header, delivery.body)
            if report is None:
                self.counters[peer.name].duplicates += 1
            else:
                self._reported(peer, report)
            return True
        return self._chunk_came(peer, header, delivery)

    def _chunk_came(self, peer: Peer, header: Header, delivery: Delivery) -> bool:
        counters = self.counters[peer.name]
        verdict = peer.inflow.verdict(header.number)
        if verdict is Verdict.TWICE:
            counters.duplicates += 1
            if not peer.same_as_before(header, delivery.body):
                error = ConflictingDuplicate(f"chunk {header.number} of {peer.name} came twice with other content")
                self._convict(peer, header, delivery.body, error)
                raise error
        elif verdict is Verdict.EARLY and len(self._early) < self._window:
            counters.early += 1
            known = (peer.name, header.number) in self._early
            if not known:
                self._early[peer.name, header.number] = (header, delivery)
            return known
        elif verdict is Verdict.NEXT:
            self._next_chunk(peer, header, delivery.body)
            while (held := self._early.pop((peer.name, peer.inflow.received + 1), None)) is not None:
                self._to_ack.append(held[1])
                self._next_chunk(peer, held[0], held[1].body)
        return True

    def _convict(self, peer: Peer, header: Header, frame: memoryview, error: PeerViolation) -> None:
        """What others make up is dropped, and the right chunk asked for; what a party itself seals stays wrong."""
        if peer.is_its_own(header, frame):
            self._gone(peer, error.code, f"broke the protocol, or lost its journal: {error.message}")

    def _next_chunk(self, peer: Peer, header: Header, frame: memoryview) -> None:
        try:
            message = peer.take(header, frame)
        except PeerViolation as error:
            self._convict(peer, header, frame, error)
            raise
        with self._changed:
            peer.unreported += len(frame)
            if peer.report_due is None:
                peer.report_due = self._clock() + self._timing.report
        if message is not None:
            self._hand_over(peer, message)
        self._alive(peer, header.received)
        if peer.unreported >= self._unreported // 4:
            self._tell(peer, ReportKind.RECEIPT)

    def _hand_over(self, peer: Peer, message: Message) -> None:
        counters = self.counters[peer.name]
        counters.messages_received += 1
        counters.bytes_received += len(message.body)
        with self._changed:
            tag = _Tag(self, message.number)
            self._ready.append(Delivery(peer.name, message.body, tag, redelivered=message.again, verified=True))
            self._changed.notify_all()

    def _agree(self, peer: Peer, content: bytes) -> None:
        before = self._agreement.to_bytes()
        try:
            replies = self._agreement.hear(peer.name, content)
        except PeerRestarted as error:
            self._gone(peer, error.code, "was started again without its journal, and cannot go on with this attempt")
            raise
        if self._agreement.to_bytes() != before:
            self._session.save()
        for reply in replies:
            self._transport.send(peer.name, [_AGREE, reply])
        secret = self._agreement.secret(peer.name)
        if secret is not None and not peer.ready:
            with self._changed:
                peer.establish(secret, self.party)
                peer.heard = self._clock()
                self._changed.notify_all()

    def _reported(self, peer: Peer, report: Report) -> None:
        now = self._clock()
        self._alive(peer, report.received)
        if report.kind is ReportKind.PROBE:
            missing = peer.inflow.received < report.sent  # of what was sent before the probe
            self._tell(peer, ReportKind.ASK if missing else ReportKind.ANSWER, sent=report.sent)
        elif report.kind in (ReportKind.ASK, ReportKind.ANSWER):
            with self._changed:
                wanted = peer.outflow.answered(now)
            if report.kind is ReportKind.ASK and wanted:  # who asks unasked gets nothing: no storms
                self._send_again(peer, report)
        elif report.kind is ReportKind.BYE:
            if peer.inflow.received < report.sent:  # it will not answer; what is missing never comes
                self._gone(
                    peer, PeerFailed.code, f"left before its last {report.sent - peer.inflow.received} chunks came"
                )
            with self._changed:
                peer.left = True
                self._changed.notify_all()
            self._transport.forget(peer.name)

    def _send_again(self, peer: Peer, report: Report) -> None:
        with self._changed:
            positions = peer.outflow.missing(report.received, report.sent)
            peer.holes = peer.holes + 1 if peer.outflow.lacks(report.received) else 0
        if peer.holes >= _HOLES:
            self._gone(
                peer, MessageLost.code, "has lost chunks that it had reported as received: its journal is damaged"
            )
        with self._changed:
            peer.resending += len(positions)
            if self._resender is None and positions:
                self._resender = threading.Thread(target=self._run_again, name=f"link-again-{self.party}", daemon=True)
                self._resender.start()
        if positions:
            self._again.put((peer, positions))

    def _run_again(self) -> None:
        """Sending again may have to wait for room on the way to one party; nobody else waits meanwhile."""
        try:
            while (order := self._again.get()) is not None:
                peer, positions = order
                for position in positions:
                    with self._changed:
                        peer.resending -= 1
                        wanted = peer.outflow.holds(position) and peer.gone is None and not peer.left
                    if wanted and self._broken is None:
                        self.counters[peer.name].chunks_sent_again += 1
                        self._transport.send(peer.name, [peer.kept(position)])
        except FateError as error:
            self._break(error)
        # The boundary of a thread: whoever waits must see why nothing moves any more.
        except Exception as error:
            self._break(InternalError(f"the link stopped sending again: {type(error).__name__}: {error}"))

    def _alive(self, peer: Peer, received: int) -> None:
        """A frame of the party opened: it lives, and has come so far."""
        try:
            with self._changed:
                peer.heard = self._clock()
                done = peer.outflow.reported(received, peer.heard)
                self._changed.notify_all()
        except PeerViolation as error:
            self._gone(peer, error.code, f"broke the protocol, or our journal lost its end: {error.message}")
            raise
        peer.forget(done)

    def _refuse(self, sender: str, error: PeerViolation) -> None:
        if sender in self.counters:
            self.counters[sender].refused += 1
        if self._observer is not None:
            self._observer("refused", {"party": sender[:80], "code": error.code, "message": error.message})

    # --- the clock ------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        now = self._clock()
        if not self._transport.connected:
            self._started = max(self._started, now - self._timing.meet / 2)
            for peer in self._peers.values():
                peer.heard = now
            return
        greet = now - self._greeted >= 4 * self._timing.probe
        self._greeted = now if greet else self._greeted
        for peer in self._peers.values():
            if peer.gone is not None or peer.left:
                continue
            if peer.ready:
                self._tick_peer(peer, now)
            elif now - self._started > self._timing.meet:
                self._gone(peer, "silent", f"has not come within {self._timing.meet:g} s")
            elif greet:
                self._greet(peer)

    def _tick_peer(self, peer: Peer, now: float) -> None:
        quiet = now - peer.heard
        if quiet > self._timing.silence:
            self._gone(peer, "silent", f"has given no sign of life for {quiet:.0f} s")
        elif (peer.outflow.probe_due(now) and not peer.resending) or (
            quiet > self._timing.keepalive < now - peer.asked
        ):
            self._tell(peer, ReportKind.PROBE)
        elif peer.report_due is not None and now >= peer.report_due:
            self._tell(peer, ReportKind.RECEIPT)

    def _greet(self, peer: Peer) -> None:
        if not peer.ready:
            self._transport.send(peer.name, [_AGREE, self._agreement.hello(peer.name)])

    def _tell(self, peer: Peer, kind: ReportKind, *, sent: int | None = None) -> None:
        peer.sync()
        with self._changed:
            peer.unreported, peer.report_due = 0, None
            if kind is ReportKind.PROBE:
                peer.asked = self._clock()
                peer.outflow.probed(peer.asked)
            frame = peer.report(kind, sent)
        self._transport.send(peer.name, [frame])

    def _gone(self, peer: Peer, code: str, why: str) -> None:
        with self._changed:
            if peer.gone is not None or peer.left:
                return
            peer.gone = why
            self._changed.notify_all()
        self._transport.forget(peer.name)  # whoever waits in the middle of sending to it wakes up
        if self._on_gone is not None:
            self._on_gone(peer.name, code, why)


@dataclass(frozen=True, slots=True, eq=False)
class _Tag:
    """Ties an acknowledgement to the link that delivered."""

    link: SecureLink
    message: int
