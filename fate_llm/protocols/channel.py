"""One party's end of a job's conversation: order restored, duplicates dropped, messages in mailboxes.

Rules:
1. One thread per channel reads the transport; everybody else waits on mailboxes. Delivery is push.
2. Sequence numbers count per sender, receiver and job from 1. Order is restored inside a bounded window.
3. Same sequence and same fingerprint: acknowledged silently. Same sequence, other fingerprint: refused and
   counted.
4. A frame is acknowledged after its message is in a mailbox (or in the window), never before.
5. What is refused is counted and told to the observer; it never reaches a mailbox and never stops the job by
   itself.
6. Every wait has a deadline and ends early when the job is cancelled or the party waited for is gone. It goes on past
   its deadline while a message waited for is coming in: up to `stretch` seconds, and not when it stands still.
7. A message too far ahead of a gap is given up, and with it its sender: what comes later cannot be in order
   any more.
8. A number is used up only when its message could be encoded; a gap is never of our own making.
9. Text of a peer is cut and made printable before anybody is told of it.

A durable channel sits on a transport that is exact and in order, and whose messages outlive this process (a link):
10. Sequence numbers say nothing there: they begin anew with each process. A message is known by its round and ordinal
    among those of its sender, task and kind, and is accepted if these are beyond the last one accepted.
11. A message is acknowledged when its reader says so, after what became of it is on disk (`acknowledge`,
    `finish_task`). What comes twice, or belongs to a task that has ended, is acknowledged at once. Control messages
    never are, so that the next process of this party hears again who has left.
12. What an earlier process has received is in the mailboxes before anything else happens.
"""

from __future__ import annotations

import json
import threading
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fate_llm.core.canonical import digest
from fate_llm.core.errors import (
    ConflictingDuplicate,
    FateError,
    FederationError,
    InternalError,
    JobCancelled,
    MessageLost,
    PeerFailed,
    PeerViolation,
    RoundTimeout,
    TransportClosed,
)
from fate_llm.core.interfaces import Delivery, Transport
from fate_llm.core.values import Payload

from .envelope import Envelope, body_digest, decode, encode
from .ledger import Account, Key, Place, base_task, read_positions
from .tensors import write_tensors

__all__ = ["Counters", "JobChannel", "Left", "Observer", "Passed"]

Observer = Callable[[str, Mapping[str, Any]], None]
_CONTROL = "control."
_FAILED, _CANCELLED, _DONE = "control.failed", "control.cancelled", "control.done"
_LONGEST = 500  # characters of a peer's text
_LOOK = 1.0  # seconds between looks at a message that is late but coming in
_STANDSTILL = 15.0  # seconds without a byte more after which it is not


@dataclass(frozen=True, slots=True)
class Left:
    """A party sends nothing more. code: `done`, or the code of the error it ended with."""

    party: str
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class Passed:
    """A message that is about to leave, or was accepted: what may be known of it, never its content.

    peer: who it goes to or came from. bytes: of its frame. form: {tensor: [dtype, shape]}. digest: SHA-256 (hex) over
    task, kind, round, ordinal, sender, receiver, fields and tensors: the same at both ends, however often it travels.
    protection: how what it carries is protected, as its sender says; empty where nothing is to be, and for what came.
    """

    direction: Literal["sent", "received"]
    peer: str
    task: str
    kind: str
    round: int
    ordinal: int
    bytes: int
    form: Mapping[str, Sequence[Any]]
    digest: str
    protection: str = ""


@dataclass(slots=True)
class Counters:
    """Traffic with one other party: messages and bytes of frames, and what was refused or came twice."""

    sent: int = 0
    sent_bytes: int = 0
    received: int = 0
    received_bytes: int = 0
    duplicates: int = 0
    refused: int = 0


@dataclass(slots=True)
class _Incoming:
    """Order of one sender's messages."""

    expected: int = 1
    waiting: dict[int, Envelope] = field(default_factory=dict)
    seen: dict[int, bytes] = field(default_factory=dict)


class JobChannel:
    """The conversation of `party` in one job. Thread-safe; close it when the party's work is over.

    durable: the transport keeps messages until they are acknowledged, beyond the life of this process. on_passed: told
    of each message before it is handed to the transport (an error there stops it), and of each that is accepted before
    its reader can see it. It must not call the channel.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        job: str,
        party: str,
        members: Sequence[str],
        clock: Callable[[], float] = time.monotonic,
        window: int = 256,
        stretch: float = 600.0,
        observer: Observer | None = None,
        durable: bool = False,
        on_passed: Callable[[Passed], None] | None = None,
    ) -> None:
        self.job = job
        self.party = party
        self.members = tuple(members)
        self.clock = clock
        self.left: dict[str, Left] = {}
        self.counters: dict[str, Counters] = defaultdict(Counters, {member: Counters() for member in members})
        self._transport = transport
        self._window = window
        self._stretch = stretch
        self._moved: dict[str, tuple[int, float]] = {}  # of a late sender: bytes of its message, and since when
        self._observer = observer
        self._changed = threading.Condition()
        self._sending: dict[str, threading.Lock] = {member: threading.Lock() for member in self.members}
        self._next: dict[str, int] = defaultdict(int)
        self._incoming: dict[str, _Incoming] = defaultdict(_Incoming)
        self._mail: dict[Key, deque[Envelope]] = defaultdict(deque)
        self._on_passed = on_passed
        self.durable = durable
        self._ordinals: dict[Key, Place] = {}  # of the last message sent
        self._accepted: dict[Key, Place] = {}  # of the last message accepted
        self._receipts: dict[tuple[Key, Place], Delivery] = {}  # accepted, and consumed for no account
        self._accounts: dict[str, list[Account]] = defaultdict(list)
        self._ended: set[str] = set()  # tasks
        self._hashed: tuple[weakref.ref[Payload] | None, str] = (None, "")
        self._cancelled: str | None = None
        self._broken: FateError | None = None
        if durable:
            self._take_backlog()
        self._reader = threading.Thread(target=self._read, name=f"channel-{party}", daemon=True)
        self._reader.start()

    # --- sending --------------------------------------------------------------------------------------------

    def send(
        self,
        receiver: str,
        *,
        task: str,
        kind: str,
        payload: Payload,
        round: int = 0,
        protection: str = "",
        account: Account | None = None,
    ) -> int:
        """Send one message; returns the bytes of its frame (0 to oneself).

        The payload is not written to later. protection: see `Passed`. account: whose journal will know of it. Rounds
        of one task and kind do not go back.
        """
        if receiver not in self.members:
            raise FederationError(f"{receiver} is not a party of job {self.job}")
        if receiver == self.party:
            own = Envelope(self.job, task, self.party, receiver, kind, 0, payload, round=round)
            with self._changed:
                self._deliver(own)
            return 0
        with self._sending[receiver]:  # numbers leave in order
            number, key = self._next[receiver] + 1, (task, kind, receiver)
            place = self._next_place(key, round)
            envelope = Envelope(
                self.job, task, self.party, receiver, kind, number, payload, round=round, ordinal=place[1]
            )
            body = self._digest_of(payload)
            parts = encode(envelope, digest=body)
            if self._on_passed is not None:
                size = sum(memoryview(part).nbytes for part in parts)
                self._on_passed(_passed("sent", replace(envelope, digest=body), size, protection))
            self._next[receiver], self._ordinals[key] = number, place
            if account is not None:
                account.said(key, place)
            size = self._transport.send(receiver, parts)
            counters = self.counters[receiver]
            counters.sent += 1
            counters.sent_bytes += size
        return size

    def _next_place(self, key: Key, round: int) -> Place:
        """Round and ordinal of the next message. What says how a party ends is not counted."""
        if key[1].startswith(_CONTROL):
            return round, 0
        last = self._ordinals.get(key, (round, 0))
        return round, last[1] + 1 if last[0] == round else 1

    def _digest_of(self, payload: Payload) -> str:
        """The digest of the body, if the last one encoded is this one: what goes to many is hashed once."""
        known, digest = self._hashed
        if known is None or known() is not payload:
            digest = body_digest(write_tensors(payload.tensors))
            self._hashed = (weakref.ref(payload), digest)
        return digest

    def sent_bytes(self) -> int:
        """Bytes of all frames this party has sent in the job."""
        with self._changed:
            return sum(c.sent_bytes for c in self.counters.values())

    def announce_failure(self, error: FateError, *, task: str) -> None:
        """Tell everyone that this party ended with `error`; who waits for it wakes up."""
        told = error.told_others()
        fields = {"code": told["code"], "message": told["message"], "task": task}
        self._tell_all(_CANCELLED if isinstance(error, JobCancelled) else _FAILED, fields)

    def announce_done(self) -> None:
        """Tell everyone that this party has finished all its tasks."""
        self._tell_all(_DONE, {})

    def _tell_all(self, kind: str, fields: Mapping[str, Any]) -> None:
        for member in self.members:
            if member != self.party:
                self.send(member, task="", kind=kind, payload=Payload(fields))

    def leave(self, error: Exception, *, task: str) -> None:
        """One side of this party ended with `error`: whatever of its other sides waits for it wakes up."""
        code = error.code if isinstance(error, FateError) else "internal"
        with self._changed:
            self.left.setdefault(self.party, Left(self.party, code, f"failed in task {task}: {error} [{code}]"))
            self._changed.notify_all()

    # --- receiving ------------------------------------------------------------------------------------------

    def receive(
        self,
        sender: str,
        *,
        task: str,
        kind: str,
        deadline: float | None,
        what: str = "",
        account: Account | None = None,
    ) -> Envelope:
        """The next message of this kind from `sender`.

        deadline: on this channel's clock; None waits until the sender is gone or the job ends.

        Raises:
            RoundTimeout, MessageLost: nothing came in time, or a gap never closed. PeerFailed: the sender
            ended without sending it.
            JobCancelled: the job was stopped. TransportClosed: the channel was closed.
        """
        found = self.next(task=task, kinds=(kind,), senders=(sender,), deadline=deadline, account=account)
        name = what or f"{kind} from {sender}"
        if found is None:
            raise self.overdue(sender, f"task {task}: {name} did not come in time")
        if isinstance(found, Left):
            if found.code == MessageLost.code:
                raise MessageLost(f"task {task}: {name} will not come: {found.reason}")
            raise PeerFailed(f"task {task}: {name} will not come: {found.party} {found.reason}")
        return found

    def next(
        self,
        *,
        task: str,
        kinds: Collection[str],
        senders: Sequence[str],
        deadline: float | None,
        known_left: Collection[str] = (),
        stretch: bool = True,
        account: Account | None = None,
    ) -> Envelope | Left | None:
        """The next message of these kinds and senders; a party newly gone (once); or None at the deadline.

        Messages of a party come before the news that it left. Among several, senders earlier in the list first.
        stretch: whether a message that is coming in is waited for beyond the deadline. account: who consumes it, and
        says when it is acknowledged; without one it is when the task has ended.
        """
        with self._changed:
            while True:
                self._raise_if_over()
                for sender in senders:
                    for kind in kinds:
                        if box := self._mail.get((task, kind, sender)):
                            return self._consume(box.popleft(), account)
                for sender in senders:
                    if sender in self.left and sender not in known_left:
                        return self.left[sender]
                remaining = None if deadline is None else deadline - self.clock()
                if remaining is not None and remaining <= 0:
                    if not stretch or -remaining >= self._stretch or not self._still_coming(senders):
                        return None
                    remaining = _LOOK
                self._changed.wait(remaining)

    def _consume(self, envelope: Envelope, account: Account | None) -> Envelope:
        if account is not None:
            key, place = _key(envelope), _place(envelope)
            account.took(key, place, self._receipts.pop((key, place), None))
        return envelope

    def _still_coming(self, senders: Sequence[str]) -> bool:
        """Whether a message of one of them is on its way in, and moving."""
        now = self.clock()
        moving = False
        for sender in senders:
            coming = self._transport.progress(sender)
            if coming is None:
                self._moved.pop(sender, None)
                continue
            received, since = self._moved.get(sender, (-1, now))
            if coming.received != received:
                self._moved[sender] = (coming.received, now)
            moving = moving or coming.received != received or now - since < _STANDSTILL
        return moving

    def _raise_if_over(self) -> None:
        if self._cancelled is not None:
            raise JobCancelled(self._cancelled)
        if self._broken is not None:
            raise self._broken

    def overdue(self, sender: str, text: str) -> FateError:
        """The error for a wait on `sender` that ran out: MessageLost after a gap, else RoundTimeout."""
        with self._changed:
            line = self._incoming[sender]
            if line.waiting:
                later = min(line.waiting)
                return MessageLost(f"{text}: message {line.expected} from {sender} is lost, {later} has come")
            received = self.counters[sender].received_bytes
            coming = self._transport.progress(sender)
        if coming is not None:
            text = f"{text} ({coming.received} of {coming.expected} bytes of a message from {sender} have come)"
        else:
            text = f"{text} ({received} bytes received from {sender} so far)"
        return RoundTimeout(text)

    # --- what is safe, on a durable channel -----------------------------------------------------------------

    def account(self, task: str) -> Account:
        """An account for one role of a task, closed by `finish_task`."""
        made = Account()
        with self._changed:
            self._accounts[task].append(made)
        return made

    def resume(self, account: Account, positions: Mapping[str, Any]) -> None:
        """The role goes on from these positions: what it had consumed by then is dropped, and never comes again."""
        account.restore(positions)
        with self._changed:
            for key, place in read_positions(positions, "said").items():
                self._ordinals[key] = max(place, self._ordinals.get(key, place))
            known: list[Delivery] = []
            for key, place in read_positions(positions, "heard").items():
                self._accepted[key] = max(place, self._accepted.get(key, place))
                box = self._mail[key]
                while box and _place(box[0]) <= place:
                    known.append(self._receipts.pop((key, _place(box.popleft()))))
                    self.counters[key[2]].duplicates += 1
        self._acknowledge(known)

    def acknowledge(self, account: Account, mark: int) -> None:
        """What the role has consumed since `mark` (see `Account.mark`) is safe on this party's disk."""
        self._acknowledge(account.release(mark))

    def finish_task(self, task: str) -> None:
        """The task has ended, and its end is on disk: none of its messages matters any more, now or later."""
        if not self.durable:
            return
        with self._changed:
            self._ended.add(task)
            done = [receipt for account in self._accounts.pop(task, ()) for receipt in account.release(0)]
            for known in [entry for entry in self._receipts if base_task(entry[0][0]) == task]:
                done.append(self._receipts.pop(known))
            for key in [key for key in self._mail if base_task(key[0]) == task]:
                del self._mail[key]
        self._acknowledge(done)

    def _acknowledge(self, receipts: Sequence[Delivery]) -> None:
        for receipt in receipts:
            self._transport.ack(receipt)

    # --- ending ---------------------------------------------------------------------------------------------

    def cancel(self, reason: str) -> None:
        """Every wait on this channel, present and future, raises JobCancelled."""
        with self._changed:
            self._cancelled = self._cancelled or reason
            self._changed.notify_all()

    def check_cancelled(self) -> None:
        """Raise JobCancelled when the job was stopped."""
        if self._cancelled is not None:
            raise JobCancelled(self._cancelled)

    def lost(self, party: str, code: str, reason: str) -> None:
        """The transport knows that `party` will not be heard again; who waits for it wakes up."""
        with self._changed:
            self.left.setdefault(party, Left(party, code, reason))
            self._changed.notify_all()

    def close(self, *, finished: bool = False) -> None:
        """Stop reading and close the transport. Closing twice is fine. finished: see `Transport.close`."""
        self._transport.close(finished=finished)
        if threading.current_thread() is not self._reader:
            self._reader.join()
        with self._changed:
            self._broken = self._broken or TransportClosed(f"the channel of {self.party} is closed")
            self._changed.notify_all()

    # --- the reading thread ---------------------------------------------------------------------------------

    def _read(self) -> None:
        while True:
            try:
                delivery = self._transport.receive(None)
                if delivery is not None and self._take(delivery):
                    self._transport.ack(delivery)
            except FateError as error:
                return self._break(error)
            # The boundary of a thread: whoever waits must see why nothing comes any more.
            except Exception as error:
                return self._break(InternalError(f"the channel stopped reading: {type(error).__name__}: {error}"))

    def _take_backlog(self) -> None:
        """What an earlier process of this party has received comes before news of who has left since."""
        try:
            while (delivery := self._transport.receive(0.0)) is not None:
                if self._take(delivery):
                    self._transport.ack(delivery)
        except FateError as error:
            self._break(error)

    def _break(self, error: FateError) -> None:
        with self._changed:
            self._broken = self._broken or error
            self._changed.notify_all()

    def _take(self, delivery: Delivery) -> bool:
        """One frame. Whether it is done with, and can be acknowledged."""
        sender, done = delivery.sender, True
        with self._changed:
            counters = self.counters[sender]
            counters.received += 1
            counters.received_bytes += len(delivery.body)
            try:
                envelope = self._open(delivery)
                if self.durable:
                    done = self._accept_kept(envelope, delivery)
                else:
                    self._accept(envelope, len(delivery.body))
            except (PeerViolation, MessageLost) as error:
                self._refuse(sender, error)
            self._changed.notify_all()
        return done

    def _refuse(self, sender: str, error: FateError) -> None:
        self.counters[sender].refused += 1
        if self._observer is not None:
            self._observer("refused", {"party": sender, "code": error.code, "message": _shown(error.message)})

    def _open(self, delivery: Delivery) -> Envelope:
        envelope = decode(delivery.body, verify=not delivery.verified)
        expected = (self.job, delivery.sender, self.party)
        if (envelope.job, envelope.sender, envelope.receiver) != expected:
            raise PeerViolation(
                f"a message of job {envelope.job} from {envelope.sender} to {envelope.receiver} came from "
                f"{delivery.sender} to {self.party} in job {self.job}"
            )
        if envelope.sender not in self.members:
            raise PeerViolation(f"{envelope.sender} is not a party of job {self.job}")
        return envelope

    def _accept_kept(self, envelope: Envelope, delivery: Delivery) -> bool:
        """A message of a durable channel. Whether it is done with: known, or of a task that has ended."""
        key, place = _key(envelope), _place(envelope)
        if envelope.kind.startswith(_CONTROL):
            self._tell_accepted(envelope, len(delivery.body))
            self._deliver(envelope)
            return False
        if base_task(envelope.task) in self._ended or place <= self._accepted.get(key, (-1, 0)):
            self.counters[envelope.sender].duplicates += 1
            return True
        self._tell_accepted(envelope, len(delivery.body))
        self._accepted[key] = place
        self._receipts[key, place] = replace(delivery, body=memoryview(b""))  # what it carries is not held with it
        self._deliver(envelope)
        return False

    def _tell_accepted(self, envelope: Envelope, size: int) -> None:
        if self._on_passed is not None:
            self._on_passed(_passed("received", envelope, size))

    def _accept(self, envelope: Envelope, size: int) -> None:
        line = self._incoming[envelope.sender]
        number = envelope.sequence
        known = line.waiting[number].fingerprint if number in line.waiting else line.seen.get(number)
        if known is not None or number < line.expected:
            self.counters[envelope.sender].duplicates += 1
            if known is not None and known != envelope.fingerprint:
                raise ConflictingDuplicate(f"message {number} of {envelope.sender} came twice with other content")
            return
        if number >= line.expected + self._window:
            sender = envelope.sender
            text = f"message {number} of {sender} came while {line.expected} is missing: outside the window"
            self.left.setdefault(sender, Left(sender, MessageLost.code, text))
            raise MessageLost(text)
        self._tell_accepted(envelope, size)
        line.waiting[number] = envelope
        while line.expected in line.waiting:
            ready = line.waiting.pop(line.expected)
            line.seen[line.expected] = ready.fingerprint
            line.seen.pop(line.expected - self._window, None)
            line.expected += 1
            self._deliver(ready)

    def _deliver(self, envelope: Envelope) -> None:
        if envelope.kind.startswith(_CONTROL):
            self._control(envelope)
        else:
            self._mail[envelope.task, envelope.kind, envelope.sender].append(envelope)
        self._changed.notify_all()

    def _control(self, envelope: Envelope) -> None:
        fields = envelope.payload.fields
        message, code = _shown(fields.get("message", "")), _shown(fields.get("code", "failed"))
        if envelope.kind == _CANCELLED:
            self._cancelled = self._cancelled or f"cancelled by {envelope.sender}: {message}"
        elif envelope.kind == _FAILED:
            reason = f"failed in task {_shown(fields.get('task', '?'))}: {message} [{code}]"
            self.left.setdefault(envelope.sender, Left(envelope.sender, code, reason))
        elif envelope.kind == _DONE:
            self.left.setdefault(envelope.sender, Left(envelope.sender, "done", "has finished its part"))
        else:
            text = f"unknown control message {envelope.kind!r} from {envelope.sender}"
            self._refuse(envelope.sender, PeerViolation(text))


def _key(envelope: Envelope) -> Key:
    return envelope.task, envelope.kind, envelope.sender


def _place(envelope: Envelope) -> Place:
    return envelope.round, envelope.ordinal


def _passed(direction: Literal["sent", "received"], envelope: Envelope, size: int, protection: str = "") -> Passed:
    """envelope.digest: of its body."""
    sent = direction == "sent"
    fields = json.loads(json.dumps(dict(envelope.payload.fields))) if sent else envelope.payload.fields
    identity = {
        "task": envelope.task,
        "kind": envelope.kind,
        "round": envelope.round,
        "ordinal": envelope.ordinal,
        "sender": envelope.sender,
        "receiver": envelope.receiver,
        "fields": digest(fields),
        "body": envelope.digest,
    }
    form = {name: [array.dtype.name, list(array.shape)] for name, array in envelope.payload.tensors.items()}
    peer = envelope.receiver if sent else envelope.sender
    return Passed(
        direction,
        peer,
        envelope.task,
        envelope.kind,
        envelope.round,
        envelope.ordinal,
        size,
        form,
        digest(identity),
        protection,
    )


def _shown(text: object) -> str:
    return "".join(c if c.isprintable() else "?" for c in str(text)[:_LONGEST])
