"""What the sides of a sum under CKKS say to each other, read strictly.

    contributor -> coordinator   ready     binding, layout, state, names, floor
    coordinator -> key holder    ask       binding, round
    key holder -> coordinator    keys      binding, signature                      tensor context
    coordinator -> contributor   context   binding, signature, names               tensor context
    contributor -> coordinator   upload    chunk, sizes, signature                 tensor ciphertexts
    coordinator -> contributor   next      have
    coordinator -> key holder    open      round, chunk, total, uploads, sizes     tensor ciphertexts
    key holder -> coordinator    opened    chunk, numbers, signature               tensor words

Every message has its name in the field `stage`, exactly these fields and these tensors. What does not is refused
whole, by an error that names its sender.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np

from fate_llm.core.canonical import digest
from fate_llm.core.errors import PeerViolation
from fate_llm.core.values import Array, Payload
from fate_llm.security.ckks import CIPHERTEXT_BYTES, CONTEXT_BYTES, SLOTS

from .agreed import CHUNK, LIMBS

__all__ = [
    "MOST_NUMBERS",
    "Form",
    "TotalOf",
    "ciphertexts_digest",
    "message",
    "pack",
    "read",
    "read_names",
    "read_signature",
    "read_wide",
    "unpack",
    "words_digest",
]

MOST_NUMBERS: Final = 1000  # additive numbers of a term
_MOST_VALUES: Final = 2**40
_WIDE_DIGITS: Final = 32
_HEX: Final = frozenset("0123456789abcdef")
_FORMS: Final[Mapping[str, Mapping[str, type]]] = {
    "ready": {"binding": str, "layout": str, "state": str, "names": list, "floor": int},
    "ask": {"binding": str, "round": int},
    "keys": {"binding": str, "signature": str},
    "context": {"binding": str, "signature": str, "names": list},
    "upload": {"chunk": int, "sizes": list, "signature": str},
    "next": {"have": int},
    "open": {"round": int, "chunk": int, "total": dict, "uploads": dict, "sizes": list},
    "opened": {"chunk": int, "numbers": list, "signature": str},
}
_TENSORS: Final = {
    "keys": "context",
    "context": "context",
    "upload": "ciphertexts",
    "open": "ciphertexts",
    "opened": "words",
}


@dataclass(frozen=True)
class Form:
    """What a term consists of, the same at all contributors of a sum.

    layout, state: digests. values: how many there are. names: of the additive numbers, sorted.
    """

    layout: str
    state: str
    values: int
    names: tuple[str, ...]

    @property
    def numbers(self) -> int:
        """Weight and additive numbers."""
        return 1 + len(self.names)

    @property
    def slots(self) -> int:
        """Whole numbers that are encrypted: first the limbs of the numbers, then the values."""
        return self.numbers * LIMBS + self.values

    @property
    def ciphertexts(self) -> int:
        return -(-self.slots // SLOTS)

    @property
    def chunks(self) -> int:
        return -(-self.ciphertexts // CHUNK)

    def span(self, chunk: int) -> tuple[int, int]:
        """Which ciphertexts one chunk has: from, to."""
        return chunk * CHUNK, min((chunk + 1) * CHUNK, self.ciphertexts)

    def numbers_in(self, chunk: int) -> int:
        """Weight and additive numbers in one chunk: all are in the first."""
        return self.numbers if chunk == 0 else 0

    def values_in(self, chunk: int) -> int:
        """Values in one chunk."""
        start, stop = self.span(chunk)
        return min(stop * SLOTS, self.slots) - start * SLOTS - self.numbers_in(chunk) * LIMBS

    @property
    def digest(self) -> str:
        return digest(self.fields())

    def fields(self) -> dict[str, Any]:
        return {"layout": self.layout, "state": self.state, "values": self.values, "names": list(self.names)}

    @classmethod
    def read(cls, fields: Mapping[str, Any], sender: str) -> Form:
        """Raises PeerViolation: no form."""
        found = _exactly(fields, {"layout": str, "state": str, "values": int, "names": list}, f"the form of {sender}")
        if not 0 <= found["values"] <= _MOST_VALUES:
            raise PeerViolation(f"a term of {found['values']} values of {sender}")
        return cls(found["layout"], found["state"], found["values"], read_names(found["names"], sender))


@dataclass(frozen=True)
class TotalOf:
    """Which sum is opened. context: digest of the keys. floors: by contributor, in roster order."""

    form: Form
    context: str
    floors: Mapping[str, int]

    @property
    def digest(self) -> str:
        return digest(self.fields())

    def fields(self) -> dict[str, Any]:
        floors = [[party, floor] for party, floor in self.floors.items()]
        return {"form": self.form.fields(), "context": self.context, "floors": floors}

    @classmethod
    def read(cls, fields: Mapping[str, Any], sender: str) -> TotalOf:
        """Raises PeerViolation: nothing that could be opened."""
        found = _exactly(fields, {"form": dict, "context": str, "floors": list}, f"what {sender} wants opened")
        floors: dict[str, int] = {}
        for entry in found["floors"]:
            match entry:
                case [str(party), int(floor)] if party not in floors and not isinstance(floor, bool):
                    floors[party] = floor
                case _:
                    raise PeerViolation(f"{sender} names no contributors, or one of them twice")
        return cls(Form.read(found["form"], sender), found["context"], floors)


def message(kind: str, tensors: Mapping[str, Array] | None = None, **fields: Any) -> Payload:
    return Payload({"stage": kind, **fields}, dict(tensors or {}))


def read(body: Payload, sender: str, kind: str) -> dict[str, Any]:
    """The fields of a message of this kind, with its tensor under its own name.

    Raises:
        PeerViolation: another kind, other fields or tensors.
    """
    stage = body.fields.get("stage")
    if stage != kind:
        raise PeerViolation(f"{sender} says {str(stage)[:40]!r} where {kind!r} is due")
    rest = {name: value for name, value in body.fields.items() if name != "stage"}
    found = _exactly(rest, _FORMS[kind], f"{kind!r} of {sender}")
    tensor = _TENSORS.get(kind)
    if body.tensors.keys() != ({tensor} if tensor else set()):
        raise PeerViolation(f"{kind!r} of {sender} carries {len(body.tensors)} tensors that do not belong to it")
    if tensor:
        array = body.tensors[tensor]
        wanted = np.dtype("<i4") if tensor == "words" else np.dtype(np.uint8)
        if array.dtype != wanted or array.ndim != 1:
            raise PeerViolation(
                f"{tensor} of {sender} is {array.dtype} of {array.ndim} dimensions, not {wanted} of one"
            )
        if tensor == "context" and array.size > CONTEXT_BYTES:
            raise PeerViolation(f"a context of {array.size} bytes of {sender}; at most {CONTEXT_BYTES}")
        found[tensor] = array
    return found


def read_names(names: Sequence[Any], sender: str) -> tuple[str, ...]:
    """Names of additive numbers.

    Raises:
        PeerViolation: too many, not in order, or one twice.
    """
    if not all(isinstance(name, str) for name in names) or list(names) != sorted(set(names)):
        raise PeerViolation(f"the sums of {sender} are not names in order, each once")
    if len(names) > MOST_NUMBERS:
        raise PeerViolation(f"{len(names)} sums of {sender}; at most {MOST_NUMBERS} are added")
    return tuple(names)


def read_signature(text: str, sender: str) -> bytes:
    """Raises PeerViolation: not 64 bytes in hexadecimal digits."""
    if len(text) != 128 or not set(text) <= _HEX:
        raise PeerViolation(f"{sender} sent no signature where one belongs")
    return bytes.fromhex(text)


def read_wide(text: object, sender: str) -> int:
    """A number of Z_2^128 from 32 hexadecimal digits.

    Raises:
        PeerViolation: something else.
    """
    if not isinstance(text, str) or len(text) != _WIDE_DIGITS or not set(text) <= _HEX:
        raise PeerViolation(f"{sender} opens what is no number of {_WIDE_DIGITS} hexadecimal digits")
    return int(text, 16)


def pack(ciphertexts: Sequence[bytes]) -> tuple[list[int], Array]:
    """Sizes, and all bytes in one tensor."""
    return [len(c) for c in ciphertexts], np.frombuffer(b"".join(ciphertexts), np.uint8)


def unpack(sizes: Sequence[Any], tensor: Array, span: tuple[int, int], sender: str) -> list[bytes]:
    """The ciphertexts of one chunk.

    Raises:
        PeerViolation: another number of them, or sizes that do not fit.
    """
    count = span[1] - span[0]
    whole = len(sizes) == count and all(type(size) is int and 0 < size <= CIPHERTEXT_BYTES for size in sizes)
    if not whole or sum(sizes) != tensor.size:
        raise PeerViolation(f"{sender} sent {tensor.size} bytes in {len(sizes)} ciphertexts; {count} are due")
    raw = np.ascontiguousarray(tensor).data
    ends = np.cumsum([0, *sizes]).tolist()
    return [bytes(raw[start:end]) for start, end in pairwise(ends)]


def ciphertexts_digest(ciphertexts: Sequence[bytes]) -> str:
    """Digest over ciphertexts one by one."""
    return digest([hashlib.sha256(c).hexdigest() for c in ciphertexts])


def words_digest(words: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(words).data).hexdigest()


def _exactly(fields: Mapping[str, Any], wanted: Mapping[str, type], what: str) -> dict[str, Any]:
    if fields.keys() != wanted.keys():
        odd = [str(name)[:40] for name in sorted(fields.keys() ^ wanted.keys())[:3]]
        raise PeerViolation(f"{what} has other fields than {sorted(wanted)}, first {odd}")
    for name, kind in wanted.items():
        if type(fields[name]) is not kind:
            raise PeerViolation(f"{what}: {name} is {type(fields[name]).__name__}, not {kind.__name__}")
    return dict(fields)
