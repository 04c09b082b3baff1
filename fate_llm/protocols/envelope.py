"""The one versioned envelope around everything that travels.

Layout: magic `FATE`, version (1 byte), 3 zero bytes, header length (4 bytes, little-endian), header (JSON,
filled up with spaces so that the body starts at a multiple of 8), body (a safetensors container). The digest
in the header is the SHA-256 of the body; the fingerprint of an envelope is the SHA-256 of its header, which
so covers both.

No pickle, no import by name, sizes checked before memory is taken; an unknown version, key or type is
refused.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fate_llm.core.errors import BadEnvelope
from fate_llm.core.interfaces import Buffer
from fate_llm.core.values import Payload

from .strict_json import read_json
from .tensors import read_tensors, write_tensors

__all__ = ["MAX_FIELDS", "MAX_TEXT", "SCHEMA", "VERSION", "Envelope", "body_digest", "decode", "encode"]

VERSION = 1
SCHEMA = "fate_llm/1"
MAX_FIELDS = 4 * 1024 * 1024  # bytes of header; reading takes up to 25 times as much memory
MAX_TEXT = 255  # characters of a name in the header
_PREFIX = struct.Struct("<4sB3sI")
_ZEROS = b"\0\0\0"
_MAGIC = b"FATE"
_TEXTS = ("job", "task", "sender", "receiver", "kind", "schema", "digest")
_NATURALS = ("attempt", "round", "sequence", "ordinal")


@dataclass(frozen=True, slots=True)
class Envelope:
    """One message. sequence: 1, 2, ... per sender, receiver and process. kind: the conversation's name for it.

    ordinal: 1, 2, ... per sender, receiver, task, kind and round; with these it is the same message whichever process
    of its sender sends it. 0: to oneself. round: 0 outside rounds.
    deadline: seconds since the epoch after which nobody waits, or None.
    fingerprint: identity of header and body; two envelopes of one sequence must have the same.
    """

    job: str
    task: str
    sender: str
    receiver: str
    kind: str
    sequence: int
    payload: Payload = field(default_factory=Payload)
    attempt: int = 0
    round: int = 0
    deadline: float | None = None
    ordinal: int = 0
    schema: str = SCHEMA
    digest: str = ""
    fingerprint: bytes = b""


def encode(envelope: Envelope, *, digest: str | None = None) -> list[Buffer]:
    """The envelope as parts to be sent one after the other; tensors are not copied.

    digest: the body's SHA-256 when the caller has it already (a resend).

    Raises:
        ValueError, TypeError: content that `decode` would refuse, or that JSON does not know.
    """
    body = write_tensors(envelope.payload.tensors)
    header: dict[str, Any] = {
        "job": envelope.job,
        "task": envelope.task,
        "sender": envelope.sender,
        "receiver": envelope.receiver,
        "kind": envelope.kind,
        "sequence": envelope.sequence,
        "attempt": envelope.attempt,
        "round": envelope.round,
        "ordinal": envelope.ordinal,
        "deadline": envelope.deadline,
        "schema": envelope.schema,
        "digest": digest if digest is not None else body_digest(body),
        "fields": dict(envelope.payload.fields),
    }
    fault = _fault(header)
    if fault:
        raise ValueError(fault)
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode("utf-8")
    text += b" " * (-(_PREFIX.size + len(text)) % 8)
    if len(text) > MAX_FIELDS:
        raise ValueError(f"header of {len(text)} bytes; at most {MAX_FIELDS}: send large content as tensors")
    return [_PREFIX.pack(_MAGIC, VERSION, _ZEROS, len(text)) + text, *body]


def body_digest(parts: Sequence[Buffer]) -> str:
    """SHA-256 (hex) over the parts of a body."""
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(part)
    return hasher.hexdigest()


def decode(frame: memoryview, *, verify: bool = True) -> Envelope:
    """Read one frame. Tensors are read-only views into it.

    verify: check the body against the digest. Only a caller who has checked the very same bytes may leave it
    out.

    Raises:
        BadEnvelope: anything but a well-formed envelope of this version whose digest fits.
    """
    header, start = _header(frame)
    body = frame[start:]
    if verify and body_digest([body]) != header["digest"]:
        raise BadEnvelope("the body does not fit its digest: the message was changed or cut on its way")
    payload = Payload(fields=header.pop("fields"), tensors=read_tensors(body))
    fingerprint = hashlib.sha256(frame[:start]).digest()
    return Envelope(payload=payload, fingerprint=fingerprint, **header)


def _header(frame: memoryview) -> tuple[dict[str, Any], int]:
    if len(frame) < _PREFIX.size:
        raise BadEnvelope(f"{len(frame)} bytes, fewer than the {_PREFIX.size} of the prefix")
    magic, version, zeros, length = _PREFIX.unpack(frame[: _PREFIX.size])
    if magic != _MAGIC:
        raise BadEnvelope("these bytes do not start like an envelope")
    if version != VERSION:
        raise BadEnvelope(f"envelope version {version}; this installation speaks {VERSION}")
    if zeros != _ZEROS:
        raise BadEnvelope("the bytes kept for later versions are not 0")
    start = _PREFIX.size + length
    if length > MAX_FIELDS or start > len(frame):
        raise BadEnvelope(f"header of {length} bytes in a frame of {len(frame)}")
    try:
        header = read_json(frame[_PREFIX.size : start])
    except ValueError as error:
        raise BadEnvelope(f"the header is not JSON ({type(error).__name__})") from None
    fault = _fault(header)
    if fault:
        raise BadEnvelope(fault)
    return header, start


def _fault(header: object) -> str | None:
    """Why this is no header, or None."""
    if not isinstance(header, dict):
        return "the header is not an object"
    expected = {*_TEXTS, *_NATURALS, "deadline", "fields"}
    if header.keys() != expected:
        wrong = [name[:MAX_TEXT] for name in sorted(set(header) ^ expected)[:5]]
        return f"the header lacks or adds {wrong}"
    for name in _TEXTS:
        text = header[name]
        if not isinstance(text, str) or len(text) > MAX_TEXT or not text.isprintable():
            return f"header field {name!r} must be printable text of at most {MAX_TEXT} characters"
    if header["schema"] != SCHEMA:
        return f"schema {header['schema']!r}; this installation speaks {SCHEMA!r}"
    for name in _NATURALS:
        if type(header[name]) is not int or not 0 <= header[name] < 2**63:
            return f"header field {name!r} must be a whole number of at least 0"
    deadline = header["deadline"]
    if not (deadline is None or (type(deadline) in (int, float) and abs(deadline) < 2**63)):
        return "header field 'deadline' must be seconds or null"
    if not isinstance(header["fields"], dict):
        return "header field 'fields' must be an object"
    return None
