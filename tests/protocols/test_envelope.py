"""The envelope: what goes in comes out, and nothing else comes in."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fate_llm.core.errors import BadEnvelope
from fate_llm.core.values import Payload
from fate_llm.protocols import envelope as codec
from fate_llm.protocols.envelope import Envelope, body_digest, decode, encode
from fate_llm.protocols.strict_json import read_json

PREFIX = struct.Struct("<4sB3sI")


def example(**changes: Any) -> Envelope:
    payload = Payload({"weight": 2.5, "names": ["a", "b"], "deep": {"x": None}}, {"w": np.arange(6, dtype=np.float32)})
    given = Envelope("job", "tune", "bank-a", "consortium", "round.term", 7, payload, attempt=1, round=3, deadline=9.5)
    return replace(given, **changes)


def frame(envelope: Envelope) -> bytes:
    return b"".join(encode(envelope))


def rebuilt(header: dict[str, Any] | bytes, body: bytes | None = None, **prefix: Any) -> memoryview:
    """A frame with a header of one's own and a body whose digest fits unless the header says otherwise."""
    body = frame(example())[body_start() :] if body is None else body
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    start = (prefix.get("magic", b"FATE"), prefix.get("version", 1), prefix.get("zeros", b"\0\0\0"))
    return memoryview(PREFIX.pack(*start, prefix.get("length", len(text))) + text + body)


def body_start() -> int:
    return PREFIX.size + int(PREFIX.unpack(frame(example())[: PREFIX.size])[3])


def header(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(frame(example())[PREFIX.size : body_start()])
    return {**found, **changes}


def same(one: Envelope, other: Envelope) -> bool:
    texts = (
        "job",
        "task",
        "sender",
        "receiver",
        "kind",
        "sequence",
        "attempt",
        "round",
        "deadline",
        "schema",
    )
    tensors, others = one.payload.tensors, other.payload.tensors
    return (
        all(getattr(one, name) == getattr(other, name) for name in texts)
        and dict(one.payload.fields) == dict(other.payload.fields)
        and {n: (a.shape, a.dtype, a.tobytes()) for n, a in tensors.items()}
        == {n: (a.shape, a.dtype, a.tobytes()) for n, a in others.items()}
    )


def test_what_goes_in_comes_out() -> None:
    found = decode(memoryview(frame(example())))
    assert same(found, example())
    assert len(found.fingerprint) == 32
    assert len(found.digest) == 64


def test_tensors_are_views_into_the_frame_and_aligned() -> None:
    for length in range(9):
        raw = memoryview(frame(example(task="t" * length)))
        array = decode(raw).payload.tensors["w"]
        assert array.flags.aligned
        assert not array.flags.writeable
        assert np.shares_memory(array, np.frombuffer(raw, np.uint8))


def test_the_fingerprint_covers_header_and_body() -> None:
    base = decode(memoryview(frame(example()))).fingerprint
    assert decode(memoryview(frame(example()))).fingerprint == base
    other_body = example(payload=replace(example().payload, tensors={"w": np.ones(6, np.float32)}))
    other_field = example(payload=replace(example().payload, fields={"weight": 2.0}))
    for other in (example(round=4), other_body, other_field):
        assert decode(memoryview(frame(other))).fingerprint != base


def test_a_digest_that_is_known_is_not_computed_again() -> None:
    given = example()
    known = decode(memoryview(frame(given))).digest
    assert b"".join(encode(given, digest=known)) == frame(given)
    with pytest.raises(BadEnvelope, match="digest"):
        decode(memoryview(b"".join(encode(given, digest="0" * 64))))


def test_a_message_of_an_adapter_is_small() -> None:
    tensors = {f"base_model.layers.{i}.lora_A.weight": np.zeros((8, 480), np.float32) for i in range(120)}
    size = len(frame(example(payload=Payload({"weight": 1.0, "sums": {"loss": 1.5}}, tensors))))
    assert size <= 1.02 * 4 * 460_800


@pytest.mark.parametrize(
    "bad",
    [
        {"payload": Payload({"x": float("nan")})},
        {"payload": Payload({"x": float("inf")})},
        {"task": "t" * 256},
        {"task": "line\nbreak"},
        {"kind": "\x1b[31m"},
        {"sequence": -1},
        {"round": 1.5},
        {"deadline": float("nan")},
        {"schema": "fate_llm/2"},
        {"payload": Payload({"x": "y" * codec.MAX_FIELDS})},
    ],
    ids=lambda bad: next(iter(bad)),
)
def test_what_would_be_refused_there_is_refused_here(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        encode(example(**bad))


MALFORMED: dict[str, memoryview] = {
    "empty": memoryview(b""),
    "eleven bytes": memoryview(b"FATE\1\0\0\0\0\0\0"),
    "other magic": rebuilt(header(), magic=b"FAKE"),
    "version 2": rebuilt(header(), version=2),
    "version 0": rebuilt(header(), version=0),
    "kept bytes in use": rebuilt(header(), zeros=b"\0\1\0"),
    "header longer than the frame": rebuilt(header(), length=2**32 - 1),
    "header of no bytes": rebuilt(header(), length=0),
    "header is a list": rebuilt(b"[]"),
    "header is not JSON": rebuilt(b"{job}"),
    "header is UTF-16": rebuilt(json.dumps(header()).encode("utf-16")),
    "header nests deep": rebuilt(b'{"job":' * 50_000),
    "header says NaN": rebuilt(json.dumps(header(deadline=float("nan"))).encode()),
    "header says 1e999": rebuilt(json.dumps(header()).replace("9.5", "1e999").encode()),
    "fields say Infinity": rebuilt(json.dumps(header(fields={"x": float("inf")})).encode()),
    "fields say 1e999": rebuilt(json.dumps(header()).replace("2.5", "1e999").encode()),
    "a key twice": rebuilt(json.dumps(header()).replace('"job"', '"job": "other", "job"', 1).encode()),
    "a key more": rebuilt(header(more=1)),
    "a key less": rebuilt({k: v for k, v in header().items() if k != "round"}),
    "job is a number": rebuilt(header(job=1)),
    "job is too long": rebuilt(header(job="j" * 256)),
    "job breaks the line": rebuilt(header(job="a\nb")),
    "kind is half a surrogate": rebuilt(header(kind="\ud800")),
    "field is half a surrogate": rebuilt(header(fields={"x": "\udfff"})),
    "sequence is negative": rebuilt(header(sequence=-1)),
    "sequence is a float": rebuilt(header(sequence=1.0)),
    "sequence is true": rebuilt(header(sequence=True)),
    "sequence is 2**63": rebuilt(header(sequence=2**63)),
    "sequence has 5000 digits": rebuilt(json.dumps(header(sequence=77)).replace("77", "7" * 5000).encode()),
    "deadline is text": rebuilt(header(deadline="soon")),
    "deadline is true": rebuilt(header(deadline=True)),
    "schema is unknown": rebuilt(header(schema="other/1")),
    "fields is a list": rebuilt(header(fields=[])),
    "digest is another": rebuilt(header(digest="0" * 64)),
    "body is cut": memoryview(frame(example())[:-1]),
    "body is longer": memoryview(frame(example()) + b"\0"),
    "body is missing": memoryview(frame(example())[: body_start()]),
    "body is no container": rebuilt(header(digest=body_digest([b"abc"])), b"abc"),
}


@pytest.mark.parametrize("which", sorted(MALFORMED))
def test_malformed_frames_are_refused_by_name(which: str) -> None:
    with pytest.raises(BadEnvelope) as caught:
        decode(MALFORMED[which])
    assert len(caught.value.message) < 1_600
    assert caught.value.message.isprintable()


def test_the_frames_above_are_malformed_in_one_way_only() -> None:
    assert same(decode(rebuilt(header())), example())


def test_a_header_beyond_the_limit_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = memoryview(frame(example()))
    monkeypatch.setattr(codec, "MAX_FIELDS", 64)
    with pytest.raises(BadEnvelope, match="header of"):
        decode(raw)


@given(position=st.integers(0, 10**6), value=st.integers(0, 255))
@settings(deadline=None, max_examples=200)
def test_a_changed_byte_of_the_body_is_always_refused(position: int, value: int) -> None:
    raw, start = bytearray(frame(example())), body_start()
    index = start + position % (len(raw) - start)
    if raw[index] == value:
        assert same(decode(memoryview(raw)), example())
        return
    raw[index] = value
    with pytest.raises(BadEnvelope):
        decode(memoryview(raw))


@given(
    position=st.integers(0, 10**6),
    value=st.integers(0, 255),
    cut=st.integers(0, 2),
    more=st.binary(max_size=2),
)
@settings(deadline=None, max_examples=300)
def test_a_changed_frame_is_refused_or_an_envelope_with_the_same_tensors(
    position: int, value: int, cut: int, more: bytes
) -> None:
    raw = bytearray(frame(example()))
    raw[position % len(raw)] = value
    try:
        found = decode(memoryview(bytes(raw[: len(raw) - cut]) + more))
    except BadEnvelope:
        return
    # the header alone is not protected against changes (the channel's encryption will): it must still be
    # whole
    assert found.payload.tensors["w"].tobytes() == example().payload.tensors["w"].tobytes()
    assert same(decode(memoryview(frame(found))), found)


@given(st.binary(max_size=100))
@settings(deadline=None, max_examples=100)
def test_arbitrary_bytes_are_refused(raw: bytes) -> None:
    for start in (b"", b"FATE\1\0\0\0"):
        with pytest.raises(BadEnvelope):
            decode(memoryview(start + raw))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
@settings(deadline=None, max_examples=100)
def test_json_that_means_one_thing_is_read_as_json_does(value: Any) -> None:
    assert read_json(json.dumps(value).encode()) == value


@given(st.text(alphabet='{}[]":,0123456789eE+-.truefalsnI\\u d', max_size=30))
@settings(deadline=None, max_examples=200)
def test_text_that_is_no_json_is_a_value_error(text: str) -> None:
    try:
        value = read_json(text.encode())
    except ValueError:
        return
    assert json.loads(json.dumps(value, allow_nan=False)) == value
