"""What the link puts on a transport: three kinds of frames with a fixed header of 64 bytes.

    agree    unsealed: a message of the key agreement, which is signed in itself
    data     one sealed chunk of a message
    control  a sealed report of 17 bytes: what has been received and sent so far

No message is larger than `LARGEST`, whatever a header says; memory for one is taken only after its first chunk opened.

The whole header of a sealed frame is the associated data of its seal, and the pair's key is bound to job, attempt,
sender and receiver: a frame that was changed, or belongs elsewhere, does not open.

Header, big-endian: magic `FLK1`, kind (1 byte), 3 zero bytes, session (8 bytes), epoch, number, message, size, offset,
received (8 bytes each). For data, `number` counts chunks of one direction from 1 over all messages, `message` counts
messages from 1, `size` is the whole message's bytes and `offset` where the chunk begins in it. `received` says in every
sealed frame up to which chunk the other direction has come. Fields that a kind does not use are 0.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from fate_llm.core.errors import BadEnvelope
from fate_llm.core.interfaces import Buffer
from fate_llm.security.agreement import MAX_MESSAGE

__all__ = ["CHUNK", "HEADER", "LARGEST", "TAG", "Header", "Kind", "Report", "ReportKind", "read_header"]

CHUNK = 2 * 1024 * 1024  # bytes of plaintext in one data frame, at most
LARGEST = 64 * 2**30  # bytes of one message, at most
TAG = 16  # bytes that sealing adds
_LAYOUT = struct.Struct(">4sB3s8s6Q")
_MAGIC = b"FLK1"
_ZEROS = b"\0\0\0"
_REPORT = struct.Struct(">BQQ")
HEADER = _LAYOUT.size
_HIGHEST = 2**63


class Kind(IntEnum):
    AGREE = 1
    DATA = 2
    CONTROL = 3


@dataclass(frozen=True, slots=True)
class Header:
    """See the module's text."""

    kind: Kind
    session: bytes = bytes(8)
    epoch: int = 0
    number: int = 0
    message: int = 0
    size: int = 0
    offset: int = 0
    received: int = 0

    def to_bytes(self) -> bytes:
        numbers = (self.epoch, self.number, self.message, self.size, self.offset, self.received)
        return _LAYOUT.pack(_MAGIC, self.kind, _ZEROS, self.session, *numbers)


def read_header(frame: Buffer, *, chunk: int = CHUNK) -> Header:
    """The header of a frame; nothing behind it is looked at.

    Raises:
        BadEnvelope: not a frame of this version, or one whose numbers contradict each other or its length.
    """
    most = HEADER + max(chunk + TAG, MAX_MESSAGE)
    if not HEADER <= len(frame) <= most:
        raise BadEnvelope(f"link: a frame of {len(frame)} bytes; valid: {HEADER} to {most}")
    magic, kind, zeros, session, *numbers = _LAYOUT.unpack_from(frame)
    if magic != _MAGIC or zeros != _ZEROS:
        raise BadEnvelope("link: these bytes do not start like a frame of this version")
    if kind not in Kind.__members__.values():
        raise BadEnvelope(f"link: unknown kind of frame {kind}")
    if max(numbers) >= _HIGHEST:
        raise BadEnvelope("link: a number of the header is too large")
    header = Header(Kind(kind), session, *numbers)
    fault = _fault(header, len(frame) - HEADER, chunk)
    if fault:
        raise BadEnvelope(f"link: {fault}")
    return header


def _fault(header: Header, behind: int, chunk: int) -> str | None:
    """Why these numbers cannot be, or None. behind: bytes after the header."""
    if header.kind is Kind.AGREE:
        fits = header == Header(Kind.AGREE)
        return None if fits else "a frame of the agreement has fields of a sealed one"
    if behind < TAG:
        return f"{behind} bytes after the header, fewer than a seal's {TAG}"
    if header.number < 1 or header.epoch < 1:
        return "number and epoch of a sealed frame start at 1"
    if header.kind is Kind.CONTROL:
        fits = (header.message, header.size, header.offset) == (0, 0, 0) and behind == _REPORT.size + TAG
        return None if fits else "a control frame has the wrong size or fields of a chunk"
    if behind > chunk + TAG:
        return f"a chunk of {behind - TAG} bytes; at most {chunk}"
    if header.size > LARGEST:
        return f"a message of {header.size} bytes; at most {LARGEST}"
    if header.message < 1 or header.offset + behind - TAG > header.size:
        return f"a chunk of {behind - TAG} bytes at {header.offset} of a message of {header.size}"
    if behind == TAG and header.size:
        return "an empty chunk of a message that is not empty"
    return None


class ReportKind(IntEnum):
    RECEIPT = 1  # for information
    PROBE = 2  # please answer; who finds chunks missing that were sent before this asks for them
    ASK = 3  # of the chunks that a probe named as sent, those after `received` are missing here: send them again
    BYE = 4  # this party leaves: it sends nothing more, and needs nothing more
    ANSWER = 5  # a receipt that answers a probe


@dataclass(frozen=True, slots=True)
class Report:
    """Content of a control frame. received: up to which chunk all have come. sent: the last chunk sent.

    In what answers a probe, `sent` is the probe's.
    """

    kind: ReportKind
    received: int
    sent: int

    def to_bytes(self) -> bytes:
        return _REPORT.pack(self.kind, self.received, self.sent)

    @classmethod
    def from_bytes(cls, content: Buffer) -> Report:
        """Raises BadEnvelope on an unknown kind or impossible numbers."""
        kind, received, sent = _REPORT.unpack(content)
        if kind not in ReportKind.__members__.values() or max(received, sent) >= _HIGHEST:
            raise BadEnvelope(f"link: unknown report {kind}")
        return cls(ReportKind(kind), received, sent)
