"""Signed pings between the doctors of two parties: the bytes, and who answers them.

A frame, all numbers big-endian:

    offset  bytes
         0      8  "fate-dr" and the version, 1
         8      1  kind: 1 ping, 2 answer
         9     16  session: names the asker's inbox, `session_name`
        25     16  nonce of the ping; an answer repeats it
        41     32  digest of the sender's roster (`Federation.digest`)
        73      8  when it was sent, nanoseconds since 1970 by the sender's clock
        81      8  when the ping had come, by the answerer's clock; 0 in a ping
        89      4  how many bytes of the ping's payload the answer is to repeat; 0 in an answer
        93      4  bytes of payload, at most 2 MiB
        97      1  bytes of the sender's version, at most 64
        98         version (ASCII), payload, signature (64)

The signature is Ed25519 over the names of asker and answerer and everything before it, with a purpose of its own for
each kind, so that neither can be taken for the other, nor for anything else that a party signs.
"""

from __future__ import annotations

import struct
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from fate_llm.core.errors import BadEnvelope, BadSignature
from fate_llm.security.identity import SIGNATURE_BYTES, Identity, PublicIdentity

from .allowance import Allowance

__all__ = ["LARGEST_PAYLOAD", "PingFrame", "Reply", "Responder", "is_ping_frame", "session_name", "verify_frame"]

LARGEST_PAYLOAD: Final = 2 * 1024 * 1024
_MAGIC: Final = b"fate-dr\x01"
_HEAD: Final = struct.Struct(">8sB16s16s32sQQIIB")
_LONGEST_VERSION: Final = 64
_LARGEST: Final = _HEAD.size + _LONGEST_VERSION + LARGEST_PAYLOAD + SIGNATURE_BYTES
_KINDS: Final[dict[int, Literal["ping", "answer"]]] = {1: "ping", 2: "answer"}
_PURPOSE: Final = {"ping": "doctor ping", "answer": "doctor answer"}

_PINGS_KEPT: Final = 100  # of one asker, at once
_PINGS_A_SECOND: Final = 20.0
_BYTES_KEPT: Final = 64 * 1024 * 1024
_BYTES_A_SECOND: Final = 8.0 * 1024 * 1024
_NONCES: Final = 4096  # remembered, against a second delivery


def is_ping_frame(body: bytes | memoryview) -> bool:
    """Whether bytes out of a control inbox are for the doctor, rather than for the party's service."""
    return bytes(body[: len(_MAGIC)]) == _MAGIC


def session_name(session: bytes) -> str:
    """The name, as that of a job, of the inbox that a doctor makes for the time that it runs."""
    return f"doctor-{session.hex()}"


@dataclass(frozen=True, slots=True)
class PingFrame:
    """A ping or an answer; the fields are those of the table above. sent, received: nanoseconds; roster: 64 hex."""

    kind: Literal["ping", "answer"]
    session: bytes
    nonce: bytes
    roster: str
    sent: int
    version: str
    received: int = 0
    want: int = 0
    payload: bytes = field(default=b"", repr=False)

    def seal(self, identity: Identity, *, asker: str, answerer: str) -> bytes:
        """The signed bytes."""
        version = self.version.encode("ascii")[:_LONGEST_VERSION]
        head = _HEAD.pack(
            _MAGIC,
            1 if self.kind == "ping" else 2,
            self.session,
            self.nonce,
            bytes.fromhex(self.roster),
            self.sent,
            self.received,
            self.want,
            len(self.payload),
            len(version),
        )
        text = head + version + self.payload
        return text + identity.sign(_named(asker, answerer) + text, purpose=_PURPOSE[self.kind])

    @classmethod
    def parse(cls, body: bytes | memoryview) -> PingFrame:
        """What bytes say, before anybody has looked at the signature.

        Raises:
            BadEnvelope: they are not such a frame; nothing of them was used.
        """
        if not _HEAD.size + SIGNATURE_BYTES <= len(body) <= _LARGEST:
            raise BadEnvelope(f"{len(body)} bytes are no frame of the doctor's: {_HEAD.size + 64} to {_LARGEST}")
        magic, kind, session, nonce, roster, sent, received, want, size, length = _HEAD.unpack_from(body)
        if magic != _MAGIC or kind not in _KINDS:
            raise BadEnvelope(f"the frame starts as no version of the doctor's does, or is of kind {kind}")
        if len(body) != _HEAD.size + length + size + SIGNATURE_BYTES or length > _LONGEST_VERSION:
            raise BadEnvelope(f"a frame of {len(body)} bytes says that it has {size} of payload and {length} of text")
        if size > LARGEST_PAYLOAD or want > size or (kind == 1 and received) or (kind == 2 and want):
            raise BadEnvelope("a frame asks for more than it brings, or has a field that its kind has not")
        text = bytes(body[_HEAD.size : _HEAD.size + length])
        if not text.isascii() or not text.decode("latin-1").isprintable():
            raise BadEnvelope("the version in a frame is not printable ASCII")
        payload = bytes(body[_HEAD.size + length : _HEAD.size + length + size])
        return cls(_KINDS[kind], session, nonce, roster.hex(), sent, text.decode("ascii"), received, want, payload)


def verify_frame(body: bytes | memoryview, kind: str, pinned: PublicIdentity, *, asker: str, answerer: str) -> None:
    """Return when the pinned key has signed the frame.

    Raises:
        BadSignature: it has not.
    """
    text, signature = bytes(body[:-SIGNATURE_BYTES]), bytes(body[-SIGNATURE_BYTES:])
    pinned.verify(signature, _named(asker, answerer) + text, purpose=_PURPOSE[kind])


def _named(asker: str, answerer: str) -> bytes:
    return f"{asker}\0{answerer}\0".encode("ascii")  # neither can have a zero byte in it


@dataclass(frozen=True, slots=True)
class Reply:
    """What to publish: to the inbox `session_name(session)` of `receiver`."""

    receiver: str
    session: bytes
    frame: bytes = field(repr=False)


class Responder:
    """Answers signed pings of the roster's parties, at a bounded rate, and does and says nothing else.

    clock: nanoseconds since 1970. ticks: seconds that only grow. counts: frames by what became of them; `answered`,
    or why there was no answer.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        party: str,
        pins: Mapping[str, PublicIdentity],
        roster: str,
        version: str,
        clock: Callable[[], int],
        ticks: Callable[[], float],
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._identity, self._party, self._pins = identity, party, pins
        self._roster, self._version = roster, version
        self._clock, self._ticks = clock, ticks
        self._allowed: dict[str, Allowance] = {}
        self._seen: deque[bytes] = deque(maxlen=_NONCES)

    def answer(self, sender: str, body: bytes | memoryview) -> Reply | None:
        """The answer to a frame that the broker says `sender` has sent; None when there is none to give."""
        received = self._clock()
        found = self._accept(sender, body)
        self.counts["answered" if isinstance(found, PingFrame) else found] += 1
        if not isinstance(found, PingFrame):
            return None
        self._seen.append(found.nonce)
        frame = PingFrame(
            "answer",
            found.session,
            found.nonce,
            self._roster,
            self._clock(),
            self._version,
            received=received,
            payload=found.payload[: found.want],
        )
        return Reply(sender, found.session, frame.seal(self._identity, asker=sender, answerer=self._party))

    def _accept(self, sender: str, body: bytes | memoryview) -> PingFrame | str:
        """The ping, or why it is left alone."""
        if sender not in self._pins or sender == self._party:
            return "from nobody of the roster"
        now = self._ticks()
        if sender not in self._allowed:
            self._allowed[sender] = Allowance(_PINGS_KEPT, _BYTES_KEPT, (_PINGS_A_SECOND, _BYTES_A_SECOND), now)
        if not self._allowed[sender].take(len(body), now):
            return "too many"
        try:
            ping = PingFrame.parse(body)
            if ping.kind != "ping":
                return "not a ping"
            verify_frame(body, "ping", self._pins[sender], asker=sender, answerer=self._party)
        except BadEnvelope:
            return "not a ping"
        except BadSignature:
            return "not signed by the key that the roster pins"
        return "seen before" if ping.nonce in self._seen else ping
