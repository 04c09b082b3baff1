"""Control frames: what opens, and that nothing else does."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from fate_llm.core.errors import BadEnvelope, BadSeal, BadSignature, FederationError, InternalError, PeerViolation
from fate_llm.protocols import control
from fate_llm.protocols.control import LARGEST_BODY, LARGEST_FRAME, Opened, is_control_frame, pack, unpack
from fate_llm.security.identity import Identity
from fate_llm.security.sealed_box import OVERHEAD, SealingKey

ALICE, BOB, CAROL = (Identity(bytes([number]) * 32) for number in (1, 2, 3))
BOX, OTHER_BOX = SealingKey(bytes([4]) * 32), SealingKey(bytes([5]) * 32)
HEADER = 4 + 1 + 1 + 5 + 1 + 3 + 24  # of a frame from alice to bob


def packed(body: bytes = b"hello", **changes: Any) -> bytes:
    """A frame from alice to bob."""
    settings = {
        "identity": ALICE,
        "sealing_public": BOX.public,
        "sender": "alice",
        "receiver": "bob",
        "epoch": 7,
        "counter": 1,
        "sent": 1_700_000_000_000_000_000,
        **changes,
    }
    return pack(body=body, **settings)


def opened(frame: bytes | memoryview, **changes: Any) -> Opened:
    settings = {"sender": "alice", "receiver": "bob", "pinned": ALICE.public, "sealing": BOX, **changes}
    return unpack(frame, **settings)


def signed(text: bytes, identity: Identity = ALICE) -> bytes:
    return text + identity.sign(text, purpose="control word")


def sealed_by_hand(content: bytes, header: bytes | None = None) -> bytes:
    """A frame whose sender is authentic and says whatever it likes."""
    start = packed()[:HEADER] if header is None else header
    return signed(start + BOX.public.seal(content, label=start))


@given(st.binary(max_size=2000), st.integers(0, 2**63 - 1), st.integers(1, 2**63 - 1), st.integers(0, 2**63 - 1))
def test_what_was_packed_opens(body: bytes, epoch: int, counter: int, sent: int) -> None:
    frame = packed(body, epoch=epoch, counter=counter, sent=sent)
    assert opened(memoryview(frame)) == Opened("alice", epoch, counter, sent, body)
    assert is_control_frame(frame) and is_control_frame(memoryview(frame))


def test_a_small_frame_has_the_layout_of_the_table() -> None:
    frame = packed(epoch=0x0102, counter=3, sent=5)
    assert frame[:HEADER] == b"FATC\x01\x05alice\x03bob" + struct.pack(">QQQ", 0x0102, 3, 5)
    assert len(frame) == HEADER + OVERHEAD + 5 + len(b"hello") + 64
    assert BOX.open(frame[HEADER:-64], label=frame[:HEADER]) == b"\0" + struct.pack(">I", 5) + b"hello"


def test_no_bit_can_be_changed_anywhere() -> None:
    frame = bytearray(packed())
    for at in range(len(frame)):
        sealed = HEADER <= at < len(frame) - 64
        for bit in [at % 8] if sealed else range(8):
            frame[at] ^= 1 << bit
            with pytest.raises((BadEnvelope, BadSignature)):
                opened(bytes(frame))
            frame[at] ^= 1 << bit
    assert opened(bytes(frame)).body == b"hello"


def test_nothing_can_be_cut_off_or_added() -> None:
    frame = packed()
    for size in range(len(frame)):
        with pytest.raises((BadEnvelope, BadSignature)):
            opened(frame[:size])
    for more in (b"\0", frame[-64:], frame):
        with pytest.raises((BadEnvelope, BadSignature)):
            opened(frame + more)


def test_the_signature_is_checked_before_anything_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> bytes:
        raise AssertionError("opened what nobody signed")

    monkeypatch.setattr(SealingKey, "open", never)
    frame = packed()
    with pytest.raises(BadSignature, match="control word"):
        opened(frame[:-1] + bytes([frame[-1] ^ 1]))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"receiver": "carol"}, BadEnvelope),
        ({"sender": "carol"}, BadEnvelope),
        ({"sender": "bob", "receiver": "alice"}, BadEnvelope),
        ({"sender": "alic", "receiver": "ebob"}, BadEnvelope),
        ({"pinned": BOB.public}, BadSignature),
        ({"sealing": OTHER_BOX}, BadSeal),
    ],
)
def test_it_is_for_one_receiver_from_one_sender(changes: dict[str, Any], error: type[PeerViolation]) -> None:
    with pytest.raises(error):
        opened(packed(), **changes)


def test_a_partner_cannot_pass_on_what_it_was_sent_as_its_own() -> None:
    # Given a frame from alice to bob, When carol signs its box under a header of her own
    frame = packed()
    header = packed(identity=CAROL, sender="carol")[:HEADER]
    stolen = signed(header + frame[HEADER:-64], CAROL)
    # Then the box does not open there
    with pytest.raises(BadSeal):
        opened(stolen, sender="carol", pinned=CAROL.public)


def test_bob_cannot_pass_alices_word_on_to_carol() -> None:
    body = opened(packed()).body
    forged = packed(body, identity=BOB, receiver="carol", sealing_public=OTHER_BOX.public)
    with pytest.raises(BadSignature):
        opened(forged, receiver="carol", sealing=OTHER_BOX)


def test_a_signature_for_another_purpose_does_not_count() -> None:
    text = packed()[:-64]
    with pytest.raises(BadSignature):
        opened(text + ALICE.sign(text, purpose="audit"))


@pytest.mark.parametrize("version", [0, 2, 255])
def test_another_version_is_named(version: int) -> None:
    frame = packed()
    with pytest.raises(BadEnvelope, match=f"version {version}; this installation speaks 1"):
        opened(signed(frame[:4] + bytes([version]) + frame[5:-64]))


@pytest.mark.parametrize("body", [b"", b"FAT", b"FATE\x01", b"fate-dr\x01" + bytes(2000), bytes(3000)])
def test_other_bytes_are_no_control_frame(body: bytes) -> None:
    assert not is_control_frame(body)
    with pytest.raises(BadEnvelope):
        opened(body)


@pytest.mark.parametrize("numbers", [(2**63, 1, 1), (1, 2**63, 1), (1, 1, 2**64 - 1), (1, 0, 1)])
def test_numbers_that_no_database_keeps_are_refused(numbers: tuple[int, int, int]) -> None:
    header = packed()[: HEADER - 24] + struct.pack(">QQQ", *numbers)
    with pytest.raises(BadEnvelope, match="out of range"):
        opened(sealed_by_hand(b"\0\0\0\0\0", header))


@pytest.mark.parametrize(
    "changes",
    [
        {"sender": "Alice"},
        {"receiver": ""},
        {"receiver": "bob\n"},
        {"receiver": "alice"},
        {"receiver": "b" * 65},
        {"epoch": -1},
        {"epoch": 2**63},
        {"counter": 0},
        {"sent": -1},
    ],
)
def test_what_cannot_be_is_a_defect_of_ours(changes: dict[str, Any]) -> None:
    with pytest.raises(InternalError):
        packed(**changes)


@pytest.mark.parametrize("changes", [{"sender": "Älice"}, {"sender": "bob"}, {"sender": "x" * 300}, {"receiver": ""}])
def test_names_that_cannot_be_open_nothing(changes: dict[str, Any]) -> None:
    with pytest.raises(InternalError):
        opened(packed(), **changes)


# --- contents -------------------------------------------------------------------------------------------------------


def frame_of(content: bytes, **settings: Any) -> bytes:
    return zstandard.ZstdCompressor(**settings).compress(content)


def test_a_text_travels_compressed() -> None:
    body = b'{"kind":"news"},' * 5000
    frame = packed(body)
    assert len(frame) < len(body) / 10
    assert opened(frame).body == body


def test_what_does_not_shrink_travels_as_it_is() -> None:
    random = hashlib.shake_256(b"random").digest(600)
    frame = packed(random)
    assert opened(frame).body == random
    assert len(frame) == HEADER + OVERHEAD + 5 + len(random) + 64


@pytest.mark.parametrize(
    "content",
    [
        b"\0\0\0\0\1",
        b"\0\0\0\0\0x",
        b"\2\0\0\0\1x",
        b"\1\0\0\0\1x",
        b"\1\0\0\0\0",
        b"\0" + struct.pack(">I", LARGEST_BODY + 1) + b"x",
        b"\1" + struct.pack(">I", 2**32 - 1) + frame_of(b"x" * 9),
        b"\1" + struct.pack(">I", 8) + frame_of(b"x" * 9),
        b"\1" + struct.pack(">I", 10) + frame_of(b"x" * 9),
        b"\1" + struct.pack(">I", 9) + frame_of(b"x" * 9, write_content_size=False),
        b"\1" + struct.pack(">I", 9) + frame_of(b"x" * 9)[:-1],
        b"\1" + struct.pack(">I", 9) + frame_of(b"x" * 9) + b"x",
        b"\1" + struct.pack(">I", 9) + frame_of(b"x" * 9) * 2,
        b"\1" + struct.pack(">I", 9) + frame_of(b"x" * 9).replace(b"x" * 9, b"x" * 8),
    ],
)
def test_an_authentic_sender_cannot_say_what_is_not_so(content: bytes) -> None:
    with pytest.raises(BadEnvelope, match="control: a content"):
        opened(sealed_by_hand(content))


def test_an_empty_content_may_be_compressed() -> None:
    assert opened(sealed_by_hand(b"\1\0\0\0\0" + frame_of(b""))).body == b""


def test_a_box_too_short_for_a_content_is_refused() -> None:
    for size in range(5):
        with pytest.raises((BadEnvelope, BadSeal)):
            opened(sealed_by_hand(bytes(size)))


def test_bodies_and_frames_have_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "LARGEST_BODY", 1000)
    assert opened(packed(bytes(1000))).body == bytes(1000)
    with pytest.raises(FederationError, match="a word of 1001 bytes to bob; at most 1000"):
        packed(bytes(1001))
    for content in (
        b"\0" + struct.pack(">I", 1001) + bytes(1001),
        b"\1" + struct.pack(">I", 1001) + frame_of(bytes(1001)),
    ):
        with pytest.raises(BadEnvelope, match="with 1001 bytes; forms are 0 and 1, at most 1000"):
            opened(sealed_by_hand(content))
    frame = packed(b"123456")
    monkeypatch.setattr(control, "LARGEST_FRAME", len(frame) - 1)
    with pytest.raises(FederationError, match=f"{len(frame)} bytes packed"):
        packed(b"123456")
    with pytest.raises(BadEnvelope, match=f"a frame of {len(frame)} bytes"):
        opened(frame)


def test_the_largest_text_fits() -> None:
    """Half of hex digits is all the same to a compressor: a record of digests below the limit can be sent."""
    body = hashlib.shake_256(b"digests").hexdigest(LARGEST_BODY // 2).encode("ascii")
    frame = packed(body)
    assert len(body) == LARGEST_BODY and len(frame) < LARGEST_FRAME
    assert opened(frame).body == body


def test_a_frame_is_no_secret_to_a_log() -> None:
    found = opened(packed(b"private"))
    assert "private" not in repr(found)
