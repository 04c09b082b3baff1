"""Memory that hostile bytes may cost: what is claimed costs nothing, what is there costs a stated factor.

Each is tried in a process of its own, with the largest claims and the most expensive content there are.
"""

from __future__ import annotations

import json
import struct
import sys
from typing import Any

import pytest
import zstandard

from fate_llm.protocols.control import LARGEST_BODY, LARGEST_FRAME, pack
from fate_llm.protocols.envelope import MAX_FIELDS, body_digest
from fate_llm.runtime.service.wording import MEMORY, MOST_VALUES
from fate_llm.security.identity import Identity
from fate_llm.security.sealed_box import SealingKey
from tests.fuzz.hostile import peak_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
]
MIB = 1024 * 1024
CLAIM = MIB  # for a few bytes that claim much: the error, and what the first call imports

# --- envelopes --------------------------------------------------------------------------------------------------------

DECODE = "from fate_llm.protocols.envelope import decode\nwork = lambda frame: decode(memoryview(frame))"


def framed(fields: bytes, body: bytes, length: int | None = None) -> bytes:
    header: dict[str, Any] = dict.fromkeys(("job", "task", "sender", "receiver", "kind"), "x")
    header |= {"sequence": 1, "attempt": 0, "round": 0, "ordinal": 0, "deadline": None}
    header |= {"schema": "fate_llm/1", "digest": body_digest([body])}
    text = json.dumps(header)[:-1].encode() + b',"fields":' + fields + b"}"
    return struct.pack("<4sB3sI", b"FATE", 1, bytes(3), len(text) if length is None else length) + text + body


def tensors(header: bytes) -> bytes:
    return framed(b"{}", struct.pack("<Q", len(header)) + header)


CLAIMS = {
    "header of 4 GiB": framed(b"{}", b"", 2**32 - 1),
    "tensors of 2^64": framed(b"{}", struct.pack("<Q", 2**64 - 1) + b"{}"),
    "a tensor of 2^58": tensors(b'{"a":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (2**58, 2**58)),
    "dimensions of 2^62": tensors(b'{"a":{"dtype":"U8","shape":[%s0],"data_offsets":[0,0]}}' % (b"%d," % 2**62 * 30)),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_an_envelope_takes_no_memory_for_what_it_claims(claim: str) -> None:
    ended, size = peak_of(DECODE, CLAIMS[claim])
    assert ended == "BadEnvelope" and size < CLAIM


@pytest.mark.parametrize("item", [b"[],", b"{},", b'"",', b"1e9,"])
def test_the_fields_of_an_envelope_take_a_bounded_factor(item: bytes) -> None:
    """`protocols.envelope` states 25 times the header. An empty body is no container: all else is decoded."""
    count = (MAX_FIELDS - 1000) // len(item)
    ended, size = peak_of(DECODE, framed(b'{"x":[' + item * count + b"0]}", b""))
    assert ended == "BadEnvelope" and size < 27 * MAX_FIELDS


# --- words of services ------------------------------------------------------------------------------------------------

ALICE, BOX = Identity(b"a" * 32), SealingKey(b"c" * 32)
HEADER = pack(ALICE, BOX.public, "a", "b", 1, 1, 1, b"")[: 4 + 1 + 4 + 24]
OPEN = """
from fate_llm.protocols.control import unpack
from fate_llm.security.identity import Identity
from fate_llm.security.sealed_box import SealingKey
alice, box = Identity(b"a" * 32), SealingKey(b"c" * 32)
work = lambda frame: unpack(bytes(frame), sender="a", receiver="b", pinned=alice.public, sealing=box)
"""


def signed(content: bytes) -> bytes:
    text = HEADER + BOX.public.seal(content, label=HEADER)
    return text + ALICE.sign(text, purpose="control word")


def bomb(**options: Any) -> bytes:
    """A gibibyte in some ten kilobytes."""
    packer = zstandard.ZstdCompressor(**options).compressobj()
    return b"".join(packer.compress(bytes(MIB)) for _ in range(1024)) + packer.flush()


BOMBS = {
    "says 4 GiB": lambda: struct.pack(">BI", 1, 2**32 - 1) + zstandard.compress(b"x"),
    "says little, holds a gibibyte": lambda: struct.pack(">BI", 1, 100) + bomb(),
    "does not say, holds a gibibyte": lambda: struct.pack(">BI", 1, LARGEST_BODY) + bomb(write_content_size=False),
    "a byte too much": lambda: struct.pack(">BI", 1, LARGEST_BODY + 1) + zstandard.compress(bytes(LARGEST_BODY + 1)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_word_unpacks_to_what_is_valid_or_not_at_all(name: str) -> None:
    ended, size = peak_of(OPEN, signed(BOMBS[name]()))
    assert ended == "BadEnvelope" and size < CLAIM


def test_the_largest_word_takes_a_few_times_its_size() -> None:
    ended, size = peak_of(OPEN, pack(ALICE, BOX.public, "a", "b", 1, 1, 1, bytes(LARGEST_BODY)))
    assert ended == "well" and size < 2 * LARGEST_BODY


def test_noise_of_the_largest_size_takes_a_few_times_its_size() -> None:
    ended, size = peak_of(OPEN, HEADER + bytes(LARGEST_FRAME - len(HEADER)))
    assert ended == "BadSignature" and size < 4 * LARGEST_FRAME


READ = "from fate_llm.runtime.service.wording import read_word\nwork = lambda body: read_word(bytes(body))"
START = b'{"kind":"question","question":"q","specification":{"x":'


def filled(begin: bytes, item: bytes, count: int, end: bytes) -> bytes:
    """As many items as count, and a text that fills the word up to the largest."""
    text = START + begin + item * count
    return text + b'"' + b"x" * (LARGEST_BODY - len(text) - len(end) - 2) + b'"' + end


EXPENSIVE = {
    "lists": lambda: filled(b"[", b"[],", MOST_VALUES // 2 - 9, b"]}}"),
    "objects": lambda: filled(b"[", b"{},", MOST_VALUES // 2 - 9, b"]}}"),
    "numbers": lambda: filled(b"[", b"1e9,", MOST_VALUES - 9, b"]}}"),
    "keys": lambda: START + b"{" + b",".join(b'"%032x":0' % n for n in range(MOST_VALUES - 9)) + b"}}}",
    "escapes": lambda: START + b'"' + b"\\ud83d\\ude00" * (LARGEST_BODY // 12 - 100) + b'"}}',
}


@pytest.mark.parametrize("kind", EXPENSIVE)
def test_reading_a_word_takes_the_memory_that_is_stated(kind: str) -> None:
    body = EXPENSIVE[kind]()
    assert 0.8 * LARGEST_BODY < len(body) <= LARGEST_BODY
    ended, size = peak_of(READ, body)
    assert ended == "well" and size < MEMORY


@pytest.mark.parametrize("item", [b"[],", b"{},", b"0,", b"["])
def test_a_word_of_brackets_is_refused_before_it_is_read(item: bytes) -> None:
    ended, size = peak_of(READ, START + b"[" + item * (LARGEST_BODY // len(item) - 100))
    assert ended == "PeerViolation" and size < LARGEST_BODY + CLAIM  # the script's own copy
