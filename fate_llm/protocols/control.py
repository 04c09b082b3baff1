"""One word from one party's service to another's, as bytes: signed by its sender, readable by its receiver only.

A frame, all numbers big-endian:

    offset  bytes
         0      4  "FATC"
         4      1  version, 1
         5      1  bytes of the sender's name, then the name (ASCII)
                1  bytes of the receiver's name, then the name
                8  epoch: of the sender's service; grows with each of its starts
                8  counter: 1, 2, ... within an epoch
                8  when it was sent, nanoseconds since 1970 by the sender's clock
                   sealed box (`security.sealed_box`), labelled with all bytes before it
      last     64  Ed25519 signature over all bytes before it, with a purpose of its own

In the box: one byte (0: the content as it is, 1: one Zstandard frame), the content's length (4 bytes), the content.

Rules:
 1. What is cheap comes first: lengths and names, then the signature, by the key that the roster pins for the party
    whose exchange the frame came from, and only then is the box opened.
 2. The box is bound to its header, and the signature covers both: no bit can be changed, and no box moved to another
    header, receiver or sender.
 3. A content unpacks to the size that was said beforehand, at most LARGEST_BODY, or not at all.
 4. A frame opens as often as it is heard. Who takes words keeps, for each sender, the highest (epoch, counter) heard,
    and passes over all others (`Post`).

Sizes can be seen by whoever carries a frame, those after compression included. No word has a secret and something that
an outsider chooses side by side: nothing is learnt from how well it compresses.

Pure: bytes in, bytes out.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Final

import zstandard

from fate_llm.core.errors import BadEnvelope, FederationError, InternalError
from fate_llm.core.names import is_name
from fate_llm.security.identity import SIGNATURE_BYTES, Identity, PublicIdentity
from fate_llm.security.sealed_box import OVERHEAD, SealingKey, SealingPublic

__all__ = ["LARGEST_BODY", "LARGEST_FRAME", "Opened", "is_control_frame", "pack", "unpack"]

LARGEST_BODY: Final = 16 * 1024 * 1024
LARGEST_FRAME: Final = 15 * 1024 * 1024  # RabbitMQ 4 takes no message above 16 MiB unless told to
_MAGIC: Final = b"FATC"
_VERSION: Final = 1
_START: Final = struct.Struct(">4sB")
_NUMBERS: Final = struct.Struct(">QQQ")
_CONTENT: Final = struct.Struct(">BI")
_PURPOSE: Final = "control word"
_SMALLEST: Final = _START.size + 2 * 2 + _NUMBERS.size + OVERHEAD + _CONTENT.size + SIGNATURE_BYTES
_HIGHEST: Final = 2**63  # epochs, counters and times are below: databases hold no more
_PLAIN: Final = 0
_ZSTD: Final = 1
_WORTH: Final = 512  # bytes of a body below which nothing is compressed
_LEVEL: Final = 3


@dataclass(frozen=True, slots=True)
class Opened:
    """A word as its sender signed it. sent: nanoseconds since 1970, by the sender's clock."""

    sender: str
    epoch: int
    counter: int
    sent: int
    body: bytes = field(repr=False)


def is_control_frame(body: bytes | memoryview) -> bool:
    """Whether bytes out of a control inbox are a word of a service, of whatever version."""
    return bytes(body[: len(_MAGIC)]) == _MAGIC


def pack(
    identity: Identity,
    sealing_public: SealingPublic,
    sender: str,
    receiver: str,
    epoch: int,
    counter: int,
    sent: int,
    body: bytes,
) -> bytes:
    """The frame of one word. identity: the sender's; sealing_public: the receiver's. epoch, counter: never used before.

    Raises:
        FederationError: a body above LARGEST_BODY, or one that makes a frame above LARGEST_FRAME.
        InternalError: names or numbers that cannot be.
    """
    if len(body) > LARGEST_BODY:
        raise FederationError(f"a word of {len(body)} bytes to {receiver}; at most {LARGEST_BODY}", hint=_TOO_MUCH)
    header = _header(sender, receiver, epoch, counter, sent)
    sealed = sealing_public.seal(_wrapped(body), label=header)
    size = len(header) + len(sealed) + SIGNATURE_BYTES
    if size > LARGEST_FRAME:
        raise FederationError(f"a word of {size} bytes packed to {receiver}; at most {LARGEST_FRAME}", hint=_TOO_MUCH)
    text = header + sealed
    return text + identity.sign(text, purpose=_PURPOSE)


def unpack(
    frame: bytes | memoryview,
    *,
    sender: str,
    receiver: str,
    pinned: PublicIdentity,
    sealing: SealingKey,
) -> Opened:
    """What `sender` packed for `receiver`.

    sender: whose exchange it came from. pinned: the key in the roster for it. sealing: the receiver's own.

    Raises:
        BadEnvelope: not a frame of this version from that sender to that receiver, or a content that is none.
        InternalError: names that cannot be.
        BadSignature: the pinned key did not sign it. BadSeal: it does not open under our key.
    """
    if not _SMALLEST <= len(frame) <= LARGEST_FRAME:
        raise BadEnvelope(f"control: a frame of {len(frame)} bytes; valid: {_SMALLEST} to {LARGEST_FRAME}")
    magic, version = _START.unpack_from(frame)
    if magic != _MAGIC or version != _VERSION:
        found = f"version {version}; this installation speaks {_VERSION}" if magic == _MAGIC else "no word of a service"
        raise BadEnvelope(f"control: {found}")
    names = _names(sender, receiver)
    start = _START.size + len(names) + _NUMBERS.size
    if bytes(frame[_START.size : _START.size + len(names)]) != names:
        raise BadEnvelope(f"control: a frame that does not say it is from {sender} to {receiver}")
    if len(frame) < start + OVERHEAD + _CONTENT.size + SIGNATURE_BYTES:
        raise BadEnvelope(f"control: a frame of {len(frame)} bytes, too few for what has to be in it")
    epoch, counter, sent = _NUMBERS.unpack_from(frame, start - _NUMBERS.size)
    if max(epoch, counter, sent) >= _HIGHEST or counter < 1:
        raise BadEnvelope("control: a number of the header is out of range")
    text = bytes(frame[:-SIGNATURE_BYTES])
    pinned.verify(bytes(frame[-SIGNATURE_BYTES:]), text, purpose=_PURPOSE)
    content = sealing.open(memoryview(text)[start:], label=text[:start])
    return Opened(sender, epoch, counter, sent, _unwrapped(content))


_TOO_MUCH: Final = "A job with fewer rounds, tasks or parties has a smaller record."


def _names(sender: str, receiver: str) -> bytes:
    if not is_name(sender) or not is_name(receiver) or sender == receiver:
        raise InternalError(f"a word from {sender!r} to {receiver!r}: two parties with different names")
    return b"".join(bytes([len(name)]) + name for name in (sender.encode("ascii"), receiver.encode("ascii")))


def _header(sender: str, receiver: str, epoch: int, counter: int, sent: int) -> bytes:
    if not (0 <= epoch < _HIGHEST and 1 <= counter < _HIGHEST and 0 <= sent < _HIGHEST):
        raise InternalError(f"epoch {epoch}, counter {counter}, sent {sent}: 0 (counter: 1) to 2^63 - 1")
    return _START.pack(_MAGIC, _VERSION) + _names(sender, receiver) + _NUMBERS.pack(epoch, counter, sent)


def _wrapped(body: bytes) -> bytes:
    """The content of a box: compressed where that makes it smaller."""
    if len(body) >= _WORTH:
        packed = zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True).compress(body)
        if len(packed) < len(body):
            return _CONTENT.pack(_ZSTD, len(body)) + packed
    return _CONTENT.pack(_PLAIN, len(body)) + body


def _unwrapped(content: bytes) -> bytes:
    """What `_wrapped` was given.

    Raises:
        BadEnvelope: a content of another form or size; no more memory than LARGEST_BODY was taken.
    """
    form, size = _CONTENT.unpack_from(content)
    packed = memoryview(content)[_CONTENT.size :]
    if size > LARGEST_BODY or form not in (_PLAIN, _ZSTD):
        raise BadEnvelope(
            f"control: a content of form {form} with {size} bytes; forms are 0 and 1, at most {LARGEST_BODY}"
        )
    if form == _PLAIN:
        if len(packed) != size:
            raise BadEnvelope(f"control: a content of {len(packed)} bytes that says it has {size}")
        return bytes(packed)
    try:
        promised = zstandard.get_frame_parameters(packed)
        if promised.content_size != size or promised.dict_id:
            raise BadEnvelope(f"control: a content for {promised.content_size} bytes that says it has {size}")
        return zstandard.ZstdDecompressor().decompress(packed, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError:
        raise BadEnvelope("control: a content that is no Zstandard frame") from None
