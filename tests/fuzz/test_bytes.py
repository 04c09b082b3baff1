"""Bytes from a peer, or from the wire: whatever they are, an error of our tree, and nothing has changed."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fate_llm.components.hooks.zstd import Zstd
from fate_llm.core.errors import (
    BadEnvelope,
    BadSeal,
    BadSignature,
    ConfigurationError,
    PeerViolation,
)
from fate_llm.core.values import Payload
from fate_llm.protocols import control
from fate_llm.protocols.control import Opened, pack, unpack
from fate_llm.protocols.envelope import Envelope, body_digest, decode, encode
from fate_llm.protocols.link.frames import Header, Kind, Report, ReportKind, read_header
from fate_llm.protocols.tensors import read_tensors
from fate_llm.runtime.doctor_ping import PingFrame
from fate_llm.runtime.service.wording import read_word, write_word
from fate_llm.security.agreement import Agreement
from fate_llm.security.identity import Identity, PublicIdentity
from fate_llm.security.sealed_box import SealingKey, SealingPublic
from fate_llm.security.sealing import open_at_rest, seal_at_rest
from tests.fuzz.hostile import fuzz, json_values, nearly, nearly_json
from tests.runtime.service.test_wording import WORDS

ALICE, BOB = Identity(b"a" * 32), Identity(b"b" * 32)
BOX = SealingKey(b"c" * 32)

PAYLOAD = Payload(
    {"weight": 3, "names": ["a", None]},
    {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([True, False]), "e": np.zeros((0, 2), np.int64)},
)
GOOD = Envelope("job", "task", "a", "b", "term", 1, PAYLOAD)
FRAME = b"".join(encode(GOOD))
START = struct.calcsize("<4sB3sI")


def framed(header: Any, body: bytes) -> bytes:
    """An envelope whose header is any JSON value, with lengths that fit."""
    text = json.dumps(header).encode()
    return struct.pack("<4sB3sI", b"FATE", 1, b"\0\0\0", len(text)) + text + body


def header_and_body() -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<I", FRAME[START - 4 : START])
    return json.loads(FRAME[START : START + length]), FRAME[START + length :]


HEADER, BODY = header_and_body()


# --- envelopes and tensors --------------------------------------------------------------------------------------------


@fuzz(50)
@given(nearly(FRAME))
def test_envelopes(frame: bytes) -> None:
    try:
        found = decode(memoryview(frame))
    except BadEnvelope:
        return
    assert found.fingerprint != decode(memoryview(FRAME)).fingerprint or frame == FRAME


@fuzz(50)
@given(nearly_json(HEADER))
def test_headers_of_envelopes(header: Any) -> None:
    with suppress(BadEnvelope):
        found = decode(memoryview(framed(header, BODY)))
        assert b"".join(encode(found))  # what is taken can be said again


@fuzz(50)
@given(nearly(BODY))
def test_bodies_whose_digest_fits(body: bytes) -> None:
    with suppress(BadEnvelope):
        found = decode(memoryview(framed(HEADER | {"digest": body_digest([body])}, body)))
        assert sum(array.nbytes for array in found.payload.tensors.values()) <= len(body)


@fuzz(50)
@given(nearly_json(json.loads(BODY[8 : 8 + struct.unpack("<Q", BODY[:8])[0]])))
def test_headers_of_tensors(header: Any) -> None:
    text = json.dumps(header).encode()
    values = BODY[8 + struct.unpack("<Q", BODY[:8])[0] :]
    with suppress(BadEnvelope):
        found = read_tensors(memoryview(struct.pack("<Q", len(text)) + text + values))
        assert sum(array.nbytes for array in found.values()) == len(values)


FORM = {"w": (np.dtype(np.float32), (40,)), "b": (np.dtype(np.bool_), (3,))}
PACKED = Zstd().encode(Payload({}, {"w": np.arange(40, dtype=np.float32), "b": np.array([True, False, True])}), 1)


@fuzz(40)
@given(st.sampled_from(sorted(FORM)), st.data())
def test_compressed_tensors(name: str, data: st.DataObject) -> None:
    bad = np.frombuffer(data.draw(nearly(PACKED.tensors[name].tobytes())), np.uint8)
    with suppress(PeerViolation):
        found = Zstd().decode(Payload({}, {**PACKED.tensors, name: bad}), FORM)
        assert {key: (array.dtype, array.shape) for key, array in found.tensors.items()} == FORM


# --- the link ---------------------------------------------------------------------------------------------------------

LINK = Header(Kind.DATA, b"session.", 1, 2, 3, 100, 0, 7).to_bytes() + bytes(116)


@fuzz(50)
@given(nearly(LINK))
def test_frames_of_the_link(frame: bytes) -> None:
    with suppress(BadEnvelope):
        header = read_header(frame)
        assert header.to_bytes() == frame[: len(header.to_bytes())]


@fuzz(40)
@given(
    st.binary(min_size=17, max_size=17) | nearly(Report(ReportKind.ASK, 1, 2).to_bytes()).filter(lambda b: len(b) == 17)
)
def test_reports_of_the_link(content: bytes) -> None:
    with suppress(BadEnvelope):
        assert Report.from_bytes(content).to_bytes() == content


ROSTER = {"a": ALICE.public, "b": BOB.public}


def agreement(me: str) -> Agreement:
    return Agreement(me=me, identity={"a": ALICE, "b": BOB}[me], roster=ROSTER, context=b"job", epoch=1)


FIRST, SECOND = agreement("a"), agreement("b")
HELLO = SECOND.hello("a")
(REPLY,) = FIRST.hear("b", HELLO)
STATE = FIRST.to_bytes()


@fuzz(40)
@given(nearly(HELLO), nearly(REPLY))
def test_key_messages(hello: bytes, reply: bytes) -> None:
    first, second = agreement("a"), SECOND
    for heard, sender, message in ((first, "b", hello), (second, "a", reply)):
        before = heard.to_bytes()
        try:
            heard.hear(sender, message)
        except PeerViolation:
            assert heard.to_bytes() == before, "a refused message has changed something"


# --- what is sealed ---------------------------------------------------------------------------------------------------

SEALED = BOX.public.seal(b"content", label=b"label")
AT_REST = seal_at_rest(b"k" * 32, b"content", label=b"label")


@fuzz(40)
@given(nearly(SEALED), st.binary(max_size=8) | st.just(b"label"))
def test_sealed_boxes(sealed: bytes, label: bytes) -> None:
    if (sealed, label) != (SEALED, b"label"):
        try:
            BOX.open(sealed, label=label)
        except BadSeal:
            return
        raise AssertionError("something else has opened")


@fuzz(40)
@given(nearly(AT_REST))
def test_files_sealed_at_rest(sealed: bytes) -> None:
    if sealed != AT_REST:
        try:
            open_at_rest(b"k" * 32, sealed, label=b"label")
        except BadSeal:
            return
        raise AssertionError("something else has opened")


@fuzz(40)
@given(nearly(BOX.public.to_text().encode()) | nearly(ALICE.public.to_text().encode()))
def test_public_keys_in_words(raw: bytes) -> None:
    text = raw.decode("utf-8", "surrogateescape")
    for kind in (SealingPublic, PublicIdentity):
        with suppress(ConfigurationError):
            assert kind.from_text(text).to_text() == text


# --- words of services ------------------------------------------------------------------------------------------------

WORD = write_word(WORDS[0])
CONTROL = pack(ALICE, BOX.public, "a", "b", 1, 1, 1, WORD)
BODY_AT = 4 + 1 + 4 + 24


def opened(frame: bytes) -> Opened:
    return unpack(frame, sender="a", receiver="b", pinned=ALICE.public, sealing=BOX)


@fuzz(50)
@given(nearly(CONTROL))
def test_control_frames(frame: bytes) -> None:
    if frame != CONTROL:
        try:
            opened(frame)
        except (BadEnvelope, BadSignature):
            return
        raise AssertionError("something else was taken for the sender's word")


@fuzz(40)
@given(nearly(CONTROL[:BODY_AT]))
def test_headers_that_their_sender_has_signed(header: bytes) -> None:
    text = header + BOX.public.seal(b"\0\0\0\0\0", label=header)
    with suppress(BadEnvelope, BadSeal):
        found = opened(text + ALICE.sign(text, purpose="control word"))
        assert (found.sender, found.body) == ("a", b"") and found.counter >= 1


@fuzz(50)
@given(nearly(control._wrapped(WORD)) | nearly(control._wrapped(b"x")))
def test_contents_that_their_sender_has_signed(content: bytes) -> None:
    text = CONTROL[:BODY_AT] + BOX.public.seal(content, label=CONTROL[:BODY_AT])
    with suppress(BadEnvelope):
        found = opened(text + ALICE.sign(text, purpose="control word"))
        assert len(found.body) == struct.unpack(">I", content[1:5])[0] <= control.LARGEST_BODY


@fuzz(50)
@given(st.one_of([nearly_json(json.loads(write_word(word))) for word in WORDS]) | json_values())
def test_words(value: Any) -> None:
    with suppress(PeerViolation):
        found = read_word(json.dumps(value).encode())
        assert read_word(write_word(found)) == found
        assert write_word(read_word(write_word(found))) == write_word(found)


@fuzz(40)
@given(st.one_of([nearly(write_word(word)) for word in WORDS]))
def test_texts_of_words(body: bytes) -> None:
    with suppress(PeerViolation):
        found = read_word(body)
        assert read_word(write_word(found)) == found


PING = PingFrame("ping", b"s" * 16, b"n" * 16, "0" * 64, 17, "1.0", want=2, payload=b"abc").seal(
    ALICE, asker="a", answerer="b"
)


@fuzz(40)
@given(nearly(PING))
def test_pings(frame: bytes) -> None:
    with suppress(BadEnvelope):
        found = PingFrame.parse(frame)
        assert found.seal(ALICE, asker="a", answerer="b")[:-64] == frame[:-64]
