"""The log: what was appended is there after a crash, what was dropped goes, and nothing half is ever read."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fate_llm.core.errors import FederationError, InternalError, TransportClosed
from fate_llm.protocols.link.journal import Position, SegmentLog, write_all


def contents(folder: Path) -> list[bytes]:
    log = SegmentLog(folder)
    found = [content for _, content in log.recover()]
    log.close()
    return found


def filled(folder: Path, records: Sequence[bytes], *, segment: int = 1 << 20) -> list[Position]:
    log = SegmentLog(folder, segment=segment)
    positions = [log.append([record]) for record in records]
    log.close()
    return positions


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.binary(max_size=100), max_size=4), max_size=12), st.integers(1, 200))
def test_what_was_appended_comes_back_in_order(
    tmp_path_factory: pytest.TempPathFactory, records: list[list[bytes]], segment: int
) -> None:
    folder = tmp_path_factory.mktemp("log")
    log = SegmentLog(folder, segment=segment)
    positions = [log.append(parts) for parts in records]
    whole = [b"".join(parts) for parts in records]
    assert [log.read(position) for position in positions] == whole
    log.close()
    again = SegmentLog(folder, segment=segment)
    assert list(again.recover()) == list(zip(positions, whole, strict=True))
    newer = again.append([b"newer"])
    assert newer[0] > max((number for number, _ in positions), default=0), "a new process begins a new file"
    again.close()


def test_a_record_that_was_cut_is_not_read_at_whatever_byte(tmp_path: Path) -> None:
    records = [b"first" * 20, b"last" * 25]
    for kept in range(8 + len(records[1])):
        folder = tmp_path / str(kept)
        filled(folder, records)
        (file,) = folder.glob("*.log")
        os.truncate(file, 8 + len(records[0]) + kept)
        assert contents(folder) == records[:1]
        # and what a next process writes behind it is found
        log = SegmentLog(folder)
        assert [content for _, content in log.recover()] == records[:1]
        log.append([b"new"])
        log.close()
        assert contents(folder) == [records[0], b"new"]


@pytest.mark.parametrize("at", [0, 3, 4, 7, 8, 40])
def test_a_flipped_byte_in_the_middle_ends_its_segment_only(tmp_path: Path, at: int) -> None:
    filled(tmp_path, [b"A" * 50, b"B" * 50, b"C" * 50], segment=100)
    first, second = sorted(tmp_path.glob("*.log"))
    raw = bytearray(first.read_bytes())
    raw[58 + at] ^= 0x10
    first.write_bytes(raw)
    assert contents(tmp_path) == [b"A" * 50, b"C" * 50]
    assert second.stat().st_size == 58


def test_a_changed_record_is_not_read_again(tmp_path: Path) -> None:
    log = SegmentLog(tmp_path)
    position = log.append([b"x" * 80])
    (file,) = tmp_path.glob("*.log")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InternalError, match=r"00000001\.log"):
        log.read(position)
    log.close()


def test_segments_go_when_all_of_theirs_is_dropped_and_not_before(tmp_path: Path) -> None:
    log = SegmentLog(tmp_path, segment=100)
    positions = [log.append([bytes(60)]) for _ in range(6)]  # two to a segment
    log.drop(positions[0])
    log.drop(positions[3])
    assert len(list(tmp_path.glob("*.log"))) == 3
    log.drop(positions[1])
    assert [p.name for p in sorted(tmp_path.glob("*.log"))] == ["00000002.log", "00000003.log"]
    assert log.read(positions[2]) == bytes(60)
    log.close()


def test_the_disk_does_not_grow_with_what_is_dropped(tmp_path: Path) -> None:
    log = SegmentLog(tmp_path, segment=1000)
    for _ in range(1000):
        log.drop(log.append([bytes(100)]))
        assert len(list(tmp_path.glob("*.log"))) <= 2
    log.close()
    # nor with processes that leave nothing to keep
    for _ in range(5):
        again = SegmentLog(tmp_path, segment=1000)
        for position, _ in again.recover():
            again.drop(position)
        again.drop(again.append([b"x"]))
        again.close()
    assert len(list(tmp_path.glob("*.log"))) <= 2


def test_files_are_for_their_owner_only(tmp_path: Path) -> None:
    filled(tmp_path, [b"x"] * 3, segment=1)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("*.log")}
    assert modes == {0o600}


def test_a_closed_log_takes_and_drops_nothing_and_makes_no_file(tmp_path: Path) -> None:
    log = SegmentLog(tmp_path)
    position = log.append([b"x"])
    log.close(remove=True)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TransportClosed):
        log.append([b"y"])
    log.drop(position)
    log.sync()
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_sync_reaches_the_disk_with_the_files_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []

    def note(file: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{file}")).name)

    monkeypatch.setattr(os, "fdatasync", note)
    monkeypatch.setattr(os, "fsync", note)
    log = SegmentLog(tmp_path, segment=50)
    log.sync()
    assert synced == []
    log.append([b"x"])
    log.sync()
    assert synced == ["00000001.log", tmp_path.name]
    log.append([b"x" * 60])
    log.sync()
    log.sync()
    assert synced[2:] == ["00000001.log"]
    log.append([b"y"])  # a new segment: the old one is safe before
    log.append([b"z" * 60])
    log.append([b"y"])
    assert synced[3:] == ["00000002.log", tmp_path.name]
    log.close()


@pytest.mark.parametrize("taken", [0, 5, 30])
def test_a_full_disk_is_named_and_leaves_no_half_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    # Given a log with a record, and a disk that takes a few bytes more
    log = SegmentLog(tmp_path)
    log.append([b"before"])
    real = os.writev

    def full(file: int, views: Sequence[memoryview]) -> int:
        if taken:
            real(file, [b"".join(views)[:taken]])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "writev", full)
    # When a record does not fit, Then that is said
    with pytest.raises(FederationError, match="No space left") as caught:
        log.append([b"does not fit" * 10])
    assert str(tmp_path) in caught.value.message
    # And after room was made all is as if it had not been tried
    monkeypatch.setattr(os, "writev", real)
    position = log.append([b"after"])
    assert log.read(position) == b"after"
    log.close()
    assert contents(tmp_path) == [b"before", b"after"]


def test_a_disk_that_fails_to_sync_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = SegmentLog(tmp_path)
    log.append([b"x"])

    def failing(file: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", failing)
    with pytest.raises(FederationError, match="Input/output error"):
        log.sync()
    log.close()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.binary(max_size=30), max_size=20), st.integers(1, 7))
def test_short_writes_are_gone_on_with(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], at_once: int
) -> None:
    path = tmp_path_factory.mktemp("short") / "file"
    real = os.writev
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "writev", lambda file, views: real(file, [b"".join(views)[:at_once]]))
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        write_all(file, parts)
        os.close(file)
    assert path.read_bytes() == b"".join(parts)
