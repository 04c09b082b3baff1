"""Headers: what is built is what is read, and nothing else is."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fate_llm.core.errors import BadEnvelope
from fate_llm.protocols.link.frames import (
    CHUNK,
    HEADER,
    LARGEST,
    TAG,
    Header,
    Kind,
    Report,
    ReportKind,
    read_header,
)
from fate_llm.security.agreement import MAX_MESSAGE

GOOD = Header(Kind.DATA, b"session!", 1, 2, 3, 100, 10, 7)
HIGH = st.integers(1, 2**63 - 1)


def frame(header: Header, behind: int) -> bytes:
    return header.to_bytes() + bytes(behind)


def test_the_layout_is_the_one_that_is_documented() -> None:
    raw = GOOD.to_bytes()
    assert (HEADER, len(raw)) == (64, 64)
    assert raw[:16] == b"FLK1\x02\0\0\0session!"
    assert struct.unpack(">6Q", raw[16:]) == (1, 2, 3, 100, 10, 7)


@given(st.binary(min_size=8, max_size=8), HIGH, HIGH, HIGH, st.integers(0, LARGEST), st.data())
def test_a_data_header_is_read_as_it_was_built(
    session: bytes, epoch: int, number: int, message: int, size: int, data: st.DataObject
) -> None:
    offset = data.draw(st.integers(0, size - 1)) if size else 0
    length = data.draw(st.integers(1, min(size - offset, 64))) if size else 0
    header = Header(Kind.DATA, session, epoch, number, message, size, offset, data.draw(st.integers(0, 2**63 - 1)))
    assert read_header(frame(header, length + TAG), chunk=64) == header


def test_the_other_kinds_are_read_too() -> None:
    control = Header(Kind.CONTROL, b"session!", 1, 5, received=9)
    assert read_header(frame(control, 17 + TAG)) == control
    for length in (0, 2744, MAX_MESSAGE):  # with small chunks as well
        assert read_header(frame(Header(Kind.AGREE), length), chunk=1) == Header(Kind.AGREE)


@pytest.mark.parametrize("length", [0, 1, HEADER - 1, HEADER + CHUNK + TAG + 1])
def test_frames_of_a_wrong_length_are_refused(length: int) -> None:
    whole = Header(Kind.DATA, bytes(8), 1, 1, 1, 2 * CHUNK).to_bytes() + bytes(CHUNK + TAG + 1)
    with pytest.raises(BadEnvelope, match="frame of"):
        read_header(whole[:length])


@pytest.mark.parametrize(
    ("header", "behind"),
    [
        (Header(Kind.DATA, bytes(8), 1, 1, 1, 10), TAG - 1),
        (Header(Kind.DATA, bytes(8), 1, 1, 1, 10), 0),
        (Header(Kind.DATA, bytes(8), 1, 1, 1, 10), TAG),  # empty, of a message that is not
        (Header(Kind.DATA, bytes(8), 1, 1, 1, 10), TAG + 11),  # beyond the message's end
        (Header(Kind.DATA, bytes(8), 1, 1, 1, 10, 9), TAG + 2),
        (Header(Kind.DATA, bytes(8), 1, 1, 1, 0, 1), TAG),
        (Header(Kind.DATA, bytes(8), 1, 1, 0, 10), TAG + 1),
        (Header(Kind.DATA, bytes(8), 1, 0, 1, 10), TAG + 1),
        (Header(Kind.DATA, bytes(8), 0, 1, 1, 10), TAG + 1),
        (Header(Kind.DATA, bytes(8), 1, 1, 1, 1000), TAG + 65),  # above the chunk
        (Header(Kind.DATA, bytes(8), 1, 1, 1, LARGEST + 1), TAG + 1),
        (Header(Kind.DATA, bytes(8), 1, 1, 1, 2**62), TAG + 1),
        (Header(Kind.DATA, bytes(8), 1, 1, 1, 10, received=2**63), TAG + 1),
        (Header(Kind.DATA, bytes(8), 1, 2**63, 1, 10), TAG + 1),
        (Header(Kind.CONTROL, bytes(8), 1, 1), 16 + TAG),
        (Header(Kind.CONTROL, bytes(8), 1, 1), 18 + TAG),
        (Header(Kind.CONTROL, bytes(8), 1, 1, 1), 17 + TAG),
        (Header(Kind.CONTROL, bytes(8), 1, 1, size=1), 17 + TAG),
        (Header(Kind.CONTROL, bytes(8), 1, 1, offset=1), 17 + TAG),
        (Header(Kind.CONTROL, bytes(8), 1, 0), 17 + TAG),
        (Header(Kind.AGREE, received=1), 10),
        (Header(Kind.AGREE, b"session!"), 10),
    ],
)
def test_numbers_that_cannot_be_are_refused(header: Header, behind: int) -> None:
    with pytest.raises(BadEnvelope):
        read_header(frame(header, behind), chunk=64)


@pytest.mark.parametrize(("at", "value"), [(0, 0), (3, ord("2")), (4, 0), (4, 4), (5, 1), (7, 1)])
def test_another_magic_or_kind_is_refused(at: int, value: int) -> None:
    changed = bytearray(frame(GOOD, TAG + 5))
    changed[at] = value
    with pytest.raises(BadEnvelope):
        read_header(changed)


@given(st.binary(max_size=200))
def test_noise_is_refused_by_name_and_by_nothing_else(noise: bytes) -> None:
    for raw in (noise, b"FLK1\x02\0\0\0" + noise, b"FLK1\x03\0\0\0" + noise):
        try:
            header = read_header(raw, chunk=64)
        except BadEnvelope:
            continue
        assert header.to_bytes() == raw[:HEADER]


@given(st.sampled_from(ReportKind), st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1))
def test_a_report_is_read_as_it_was_built(kind: ReportKind, received: int, sent: int) -> None:
    raw = Report(kind, received, sent).to_bytes()
    assert len(raw) == 17
    assert Report.from_bytes(raw) == Report(kind, received, sent)


@pytest.mark.parametrize("raw", [struct.pack(">BQQ", *numbers) for numbers in [(0, 1, 1), (6, 1, 1), (1, 2**63, 0)]])
def test_an_unknown_report_is_refused(raw: bytes) -> None:
    with pytest.raises(BadEnvelope):
        Report.from_bytes(raw)
