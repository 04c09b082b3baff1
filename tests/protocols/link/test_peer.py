"""One end of a pair: what is sealed, kept, opened, and found again after a crash."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fate_llm.core.errors import BadEnvelope, BadSeal, FateError, FederationError, PeerViolation
from fate_llm.protocols.link.frames import HEADER, TAG, Report, ReportKind, read_header
from fate_llm.protocols.link.journal import SegmentLog
from fate_llm.protocols.link.peer import Message, Peer, cut
from fate_llm.security.agreement import PairSecret

SECRET = PairSecret(bytes(range(32)), b"session!", 1)


def end(folder: Path, me: str = "a", other: str = "b", *, epoch: int = 1, secret: PairSecret = SECRET) -> Peer:
    peer = Peer(other, folder=folder / me, epoch=epoch, probe=1.0, window=4)
    peer.establish(secret, me)
    return peer


@pytest.fixture
def ends(tmp_path: Path) -> Any:
    a, b = end(tmp_path), end(tmp_path, "b", "a")
    yield a, b
    a.close(remove=False)
    b.close(remove=False)


def sealed(peer: Peer, content: bytes, *, chunk: int = 10, only: int | None = None) -> list[bytes]:
    """Frames of one message. only: how many of its chunks."""
    frames: list[bytes] = []
    offset = 0
    peer.last_message += 1
    for piece in list(cut([content], chunk))[:only]:
        number, position, frame = peer.seal(piece, peer.last_message, len(content), offset)
        peer.outflow.add(number, position, len(frame), 0.0)
        offset += len(piece)
        frames.append(bytes(frame))
    return frames


def taken(peer: Peer, frames: list[bytes]) -> list[bytes]:
    found = (peer.take(read_header(frame), memoryview(frame)) for frame in frames)
    return [bytes(message.body) for message in found if message is not None]


def recovered(peer: Peer) -> list[Message]:
    found = []
    for header, position, frame in peer.recover(0.0):
        message = peer.take(header, memoryview(frame), again=True)
        peer.remember(position)
        if message is not None:
            found.append(message)
    return found


@settings(deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=6), st.integers(1, 17))
def test_pieces_joined_are_the_parts_joined(parts: list[bytes], chunk: int) -> None:
    pieces = [bytes(piece) for piece in cut(parts, chunk)]
    assert b"".join(pieces) == b"".join(parts)
    assert all(len(piece) == chunk for piece in pieces[:-1])
    assert len(pieces) == max(1, -(-len(b"".join(parts)) // chunk))


def test_a_piece_inside_one_part_is_not_copied() -> None:
    part = bytearray(b"0123456789")
    pieces = list(cut([memoryview(part).cast("B")], 4))
    assert all(isinstance(piece, memoryview) and piece.obj is part for piece in pieces)
    wide = np.arange(4, dtype=np.float32)
    assert b"".join(cut([wide.data], 3)) == wide.tobytes()


def test_messages_arrive_whole(ends: tuple[Peer, Peer]) -> None:
    a, b = ends
    for content in (b"", b"x", b"0123456789", b"0123456789a", bytes(1000)):
        assert taken(b, sealed(a, content)) == [content]


@pytest.mark.parametrize("at", [*range(8, HEADER, 3), HEADER, HEADER + 5, HEADER + 9, HEADER + 10, HEADER + 25])
def test_any_changed_bit_is_refused_and_nothing_changed(ends: tuple[Peer, Peer], at: int) -> None:
    a, b = ends
    (frame,) = sealed(a, b"0123456789")
    for bit in (1, 128):
        bad = bytearray(frame)
        bad[at] ^= bit
        with pytest.raises((BadSeal, BadEnvelope, PeerViolation)):
            header = read_header(bad)
            b.check_session(header)
            b.take(header, memoryview(bad))
    assert (b.inflow.received, b.inflow.progress) == (0, None)
    assert taken(b, [frame]) == [b"0123456789"]


def test_a_size_that_is_made_up_takes_no_memory(ends: tuple[Peer, Peer], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = ends
    frames = sealed(a, b"0123456789abc")
    asked: list[int] = []
    real = np.empty

    def counting(size: int, **settings: Any) -> Any:
        asked.append(size)
        return real(size, **settings)

    monkeypatch.setattr(np, "empty", counting)
    bad = bytearray(frames[0])
    bad[40:48] = (2**35).to_bytes(8, "big")
    with pytest.raises(BadSeal):
        b.take(read_header(bad), memoryview(bad))
    assert asked == []
    assert taken(b, frames) == [b"0123456789abc"]
    assert asked == [13]


def test_a_message_that_does_not_fit_into_memory_is_the_peers_fault(
    ends: tuple[Peer, Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = ends
    frames = sealed(a, b"0123456789abc")

    def none(size: int, **settings: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(np, "empty", none)
        with pytest.raises(PeerViolation, match="13 bytes"):
            b.take(read_header(frames[0]), memoryview(frames[0]))
    assert b.is_its_own(read_header(frames[0]), memoryview(frames[0]))
    assert taken(b, frames) == [b"0123456789abc"]


def test_who_sealed_a_chunk_can_be_told(ends: tuple[Peer, Peer]) -> None:
    a, b = ends
    (frame,) = sealed(a, b"x")
    bad = frame[:-1] + bytes([frame[-1] ^ 1])
    assert b.is_its_own(read_header(frame), memoryview(frame))
    assert not b.is_its_own(read_header(bad), memoryview(bad))


def test_copies_are_told_from_forgeries_as_long_as_they_are_remembered(ends: tuple[Peer, Peer]) -> None:
    a, b = ends
    frames = [sealed(a, b"%d" % number)[0] for number in range(300)]
    taken(b, frames)
    for number, frame in enumerate(frames):
        bad = frame[:-1] + bytes([frame[-1] ^ 1])
        assert b.same_as_before(read_header(frame), memoryview(frame))
        assert b.same_as_before(read_header(bad), memoryview(bad)) == (number < 300 - 256)


def test_reports_are_read_once_and_in_turn(ends: tuple[Peer, Peer]) -> None:
    a, b = ends
    first, second = a.report(ReportKind.PROBE), a.report(ReportKind.ASK)
    assert b.open_report(read_header(second), memoryview(second)) == Report(ReportKind.ASK, 0, 0)
    for late in (first, second):
        assert b.open_report(read_header(late), memoryview(late)) is None


def test_a_changed_or_reflected_report_is_refused_and_does_not_spend_its_number(ends: tuple[Peer, Peer]) -> None:
    a, b = ends
    report = a.report(ReportKind.BYE)
    for at in (16, 23, 24, 31, 63, 64, 80, len(report) - 1):
        bad = bytearray(report)
        bad[at] ^= 2
        with pytest.raises(PeerViolation):
            b.open_report(read_header(bad), memoryview(bad))
    with pytest.raises(BadSeal):
        a.open_report(read_header(report), memoryview(report))
    assert b.open_report(read_header(report), memoryview(report)) == Report(ReportKind.BYE, 0, 0)


def test_a_higher_epochs_reports_begin_again_and_the_lower_ones_end(tmp_path: Path, ends: tuple[Peer, Peer]) -> None:
    a, b = ends
    old = [a.report(ReportKind.RECEIPT) for _ in range(3)]
    assert b.open_report(read_header(old[1]), memoryview(old[1])) is not None
    again = end(tmp_path / "again", epoch=2)
    new = again.report(ReportKind.PROBE)
    assert b.open_report(read_header(new), memoryview(new)) == Report(ReportKind.PROBE, 0, 0)
    assert b.open_report(read_header(old[2]), memoryview(old[2])) is None


def test_what_is_sent_again_is_what_was_sent(ends: tuple[Peer, Peer]) -> None:
    a, _ = ends
    frames = sealed(a, bytes(35))
    assert [a.kept(position) for position in a.outflow.missing(0, 4)] == frames


def test_a_sender_goes_on_counting_after_a_crash(tmp_path: Path, ends: tuple[Peer, Peer]) -> None:
    # Given three messages, of which everything was reported
    a, b = ends
    frames = [frame for content in (b"1" * 15, b"2", b"3") for frame in sealed(a, content)]
    taken(b, frames)
    a.forget(a.outflow.reported(4, 1.0))
    a.close(remove=False)
    # When the process starts again, Then it has its newest chunk to count on from
    again = end(tmp_path, epoch=2)
    assert recovered(again) == []
    assert (again.outflow.sent, again.last_message) == (4, 3)
    fresh = sealed(again, b"4")
    assert read_header(fresh[0]).number == 5
    assert taken(b, fresh) == [b"4"]
    again.close(remove=False)


def test_the_newest_chunk_is_there_until_a_newer_one_is(
    tmp_path: Path, ends: tuple[Peer, Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a process that goes on, all of whose chunks were reported, and a disk that takes no new one
    a, _ = ends
    sealed(a, bytes(35))
    a.close(remove=False)
    second = end(tmp_path, epoch=2)
    recovered(second)
    second.forget(second.outflow.reported(4, 1.0))

    def full(file: int, views: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", full)
        with pytest.raises(FederationError):
            sealed(second, b"x")
    second.close(remove=False)
    # Then the third still knows where to count on
    third = end(tmp_path, epoch=3)
    recovered(third)
    assert (third.outflow.sent, third.last_message) == (4, 1)
    third.close(remove=False)


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_a_message_that_died_with_its_process_is_replaced(tmp_path: Path, ends: tuple[Peer, Peer], chunks: int) -> None:
    # Given a sender that dies within a message of four chunks, twice
    a, b = ends
    assert taken(b, sealed(a, b"whole")) == [b"whole"]
    assert taken(b, sealed(a, b"x" * 35, only=chunks)) == []
    a.close(remove=False)
    second = end(tmp_path, epoch=2)
    recovered(second)
    assert taken(b, sealed(second, b"y" * 25, only=2)) == []
    second.close(remove=False)
    # When the receiver is started again, too
    b.close(remove=False)
    b = end(tmp_path, "b", "a", epoch=2)
    assert [bytes(message.body) for message in recovered(b)] == [b"whole"]
    # Then the next process's message comes in its place
    third = end(tmp_path, epoch=3)
    recovered(third)
    assert taken(b, sealed(third, b"z" * 20)) == [b"z" * 20]
    for number in (1, 2):
        b.acknowledge(number)
    b.close(remove=False)
    last = end(tmp_path, "b", "a", epoch=3)
    assert recovered(last) == []
    last.close(remove=False)
    third.close(remove=False)


def test_no_one_else_can_abandon_a_message(ends: tuple[Peer, Peer]) -> None:
    a, b = ends
    frames = sealed(a, b"x" * 35)
    taken(b, frames[:2])
    forged = bytearray(frames[0])
    forged[16:24] = (9).to_bytes(8, "big")  # the epoch
    forged[24:32] = (3).to_bytes(8, "big")  # the number
    with pytest.raises(BadSeal):
        b.take(read_header(forged), memoryview(forged))
    assert taken(b, frames[2:]) == [b"x" * 35]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 35), min_size=1, max_size=6),
    st.permutations(range(1, 7)),
    st.integers(0, 6),
    st.integers(1, 400),
)
def test_what_was_not_acknowledged_comes_again_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], order: list[int], acked: int, segment: int
) -> None:
    """Acknowledged in any order; what is acknowledged before all earlier ones may come again, nothing may be lost."""
    folder = tmp_path_factory.mktemp("peer")
    small: Callable[[Path], SegmentLog] = lambda path: SegmentLog(path, segment=segment)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fate_llm.protocols.link.peer.SegmentLog", small)
        a, b = end(folder), end(folder, "b", "a")
        contents = [bytes([number]) * size for number, size in enumerate(sizes, start=1)]
        for content in contents:
            assert taken(b, sealed(a, content)) == [content]
        done = [number for number in order if number <= len(sizes)][:acked]
        for number in done:
            b.acknowledge(number)
        prefix = 0
        while prefix + 1 in done:
            prefix += 1
        for epoch in (2, 3):
            b.close(remove=False)
            b = end(folder, "b", "a", epoch=epoch)
            found = recovered(b)
            assert [(m.number, bytes(m.body)) for m in found] == list(enumerate(contents, start=1))[prefix:]
            assert all(m.again for m in found)
        assert taken(b, sealed(a, b"next")) == [b"next"]
        a.close(remove=False)
        b.close(remove=False)


def test_part_of_a_message_is_there_after_a_crash(tmp_path: Path, ends: tuple[Peer, Peer]) -> None:
    a, b = ends
    frames = sealed(a, b"0123456789" * 4)
    assert taken(b, frames[:3]) == []
    b.close(remove=False)
    again = end(tmp_path, "b", "a", epoch=2)
    assert recovered(again) == []
    assert again.inflow.progress == (30, 40)
    assert taken(again, frames[3:]) == [b"0123456789" * 4]
    again.close(remove=False)


def test_a_flipped_byte_in_the_inbox_is_a_named_error(tmp_path: Path, ends: tuple[Peer, Peer]) -> None:
    a, b = ends
    taken(b, sealed(a, b"0123456789"))
    b.close(remove=False)
    (file,) = (tmp_path / "b" / "inbox").glob("*.log")
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)
    again = end(tmp_path, "b", "a", epoch=2)
    with pytest.raises(FateError):
        recovered(again)
    again.close(remove=False)


def test_only_ciphertext_is_on_disk(tmp_path: Path, ends: tuple[Peer, Peer]) -> None:
    a, b = ends
    marker = b"MARKER-OF-A-SECRET"
    taken(b, sealed(a, marker * 10, chunk=50))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 2
    for path in files:
        assert path.stat().st_size > 180
        assert marker[:8] not in path.read_bytes()


def test_the_folders_do_not_grow_with_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fate_llm.protocols.link.peer.SegmentLog", lambda path: SegmentLog(path, segment=2000))
    a, b = end(tmp_path), end(tmp_path, "b", "a")
    for number in range(1, 1001):
        taken(b, sealed(a, bytes(25)))
        b.acknowledge(number)
        a.forget(a.outflow.reported(b.inflow.received, 0.0))
        if number % 100 == 0:
            assert sum(path.stat().st_size for path in tmp_path.rglob("*.log")) < 10_000
    a.close(remove=True)
    b.close(remove=True)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_tag_is_as_long_as_it_is_said_to_be(ends: tuple[Peer, Peer]) -> None:
    a, _ = ends
    (frame,) = sealed(a, b"x")
    assert len(frame) == HEADER + 1 + TAG
