"""Append-only log in segment files: what must survive the death of the process, and only as long as it must.

Record: length (4 bytes), CRC-32 of the content's first 64 bytes (4 bytes), content. A record that was cut by a crash
ends its segment when the log is opened again; whether the rest of a record is what was written, the seal of what lies
in it tells. A segment is deleted when all its records have been dropped.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from fate_llm.core.errors import FederationError, InternalError, TransportClosed
from fate_llm.core.interfaces import Buffer

__all__ = ["Position", "SegmentLog", "sync_folder", "unwritable", "write_all"]

_PREFIX = struct.Struct(">II")
_SEGMENT = 32 * 1024 * 1024
_CHECKED = 64  # bytes of a record that its CRC covers

Position = tuple[int, int]  # segment, offset


class SegmentLog:
    """One log in one folder. Not thread-safe: its owner has a lock.

    segment: bytes after which a new file is begun.
    """

    def __init__(self, folder: Path, *, segment: int = _SEGMENT) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._segment = segment
        self._live: dict[int, int] = {}  # records not dropped, by segment
        self._file: int | None = None
        self._current = max(self._numbers(), default=0)
        self._end = 0
        self._unsynced = False
        self._unlisted = False  # the file's name may not be on disk yet
        self._closed = False

    def recover(self) -> Iterator[tuple[Position, bytes]]:
        """Every whole record that an earlier process left, in order; new records go to a new segment."""
        for number in self._numbers():
            self._live[number] = 0
            offset = 0
            with self._path(number).open("rb") as stream:
                while (content := _read_record(stream)) is not None:
                    self._live[number] += 1
                    yield (number, offset), content
                    offset += _PREFIX.size + len(content)

    def append(self, parts: Sequence[Buffer]) -> Position:
        """Write one record (the parts, joined); it survives this process as soon as this returns.

        Raises:
            FederationError: the disk does not take it; nothing of it stays. TransportClosed: the log is closed.
        """
        if self._closed:
            raise TransportClosed(f"the journal {self._folder.name} is closed")
        size = sum(len(part) for part in parts)
        head = b"".join(bytes(memoryview(part)[:_CHECKED]) for part in parts[:_CHECKED])[:_CHECKED]
        try:
            file = self._writable()
            position = (self._current, self._end)
            write_all(file, [_PREFIX.pack(size, zlib.crc32(head)), *parts])
        except OSError as error:
            self._cut_back()
            raise unwritable(self._folder, error) from None
        self._end += _PREFIX.size + size
        self._live[self._current] += 1
        self._unsynced = True
        return position

    def read(self, position: Position) -> bytes:
        """A record again.

        Raises:
            InternalError: the file is not what was written.
        """
        number, offset = position
        with self._path(number).open("rb") as stream:
            stream.seek(offset)
            content = _read_record(stream)
        if content is None:
            raise InternalError(f"the journal {self._path(number).name} was changed or cut behind our back")
        return content

    def drop(self, position: Position) -> None:
        """The record is not needed any more. The file goes when all its records have."""
        if self._closed:
            return
        number = position[0]
        self._live[number] -= 1
        if self._live[number] == 0 and number != self._current:
            del self._live[number]
            self._path(number).unlink(missing_ok=True)

    def sync(self) -> None:
        """What was appended survives a power cut as well.

        Raises:
            FederationError: the disk failed.
        """
        if not self._unsynced or self._file is None:
            return
        try:
            os.fdatasync(self._file)
            if self._unlisted:
                sync_folder(self._folder)
        except OSError as error:
            raise unwritable(self._folder, error) from None
        self._unsynced = self._unlisted = False

    def close(self, *, remove: bool = False) -> None:
        """remove: nothing in it is needed any more."""
        self._closed = True
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if remove:
            for number in self._numbers():
                self._path(number).unlink(missing_ok=True)
            self._live.clear()

    def _writable(self) -> int:
        """The file that the next record goes into."""
        if self._file is None or self._end >= self._segment:
            return self._begin()
        return self._file

    def _cut_back(self) -> None:
        """Drop what a failed append left of its record: the next one, and recovery, would trip over it."""
        if self._file is None:
            return
        try:
            os.ftruncate(self._file, self._end)
            os.lseek(self._file, self._end, os.SEEK_SET)
        except OSError:
            self._closed = True

    def _begin(self) -> int:
        if self._file is not None:
            self.sync()
            os.close(self._file)
            self._file = None
        if self._live.get(self._current) == 0:
            self._path(self._current).unlink(missing_ok=True)
            del self._live[self._current]
        self._current += 1
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._file = os.open(self._path(self._current), flags, 0o600)
        self._end = 0
        self._live[self._current] = 0
        self._unlisted = True
        return self._file

    def _numbers(self) -> list[int]:
        return sorted(int(path.stem) for path in self._folder.glob("*.log"))

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:08d}.log"


def unwritable(folder: Path, error: OSError) -> FederationError:
    """What the party's own disk refused, in words."""
    return FederationError(
        f"the link's journal in {folder} cannot be written: {error.strerror or error}",
        hint="Make room on that disk and start this party again: it goes on from its journal.",
    )


def sync_folder(folder: Path) -> None:
    """Names of files that were made or replaced in it survive a power cut."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def write_all(file: int, parts: Sequence[Buffer]) -> None:
    """All of the parts, however often the system takes less than it is given."""
    views = [memoryview(part).cast("B") for part in parts if len(part)]
    while views:
        written = os.writev(file, views[:1000])
        while views and written >= len(views[0]):
            written -= len(views[0])
            views.pop(0)
        if views and written:
            views[0] = views[0][written:]


def _read_record(stream: BinaryIO) -> bytes | None:
    """The next record's content, or None at the end or where a record is not whole."""
    prefix = stream.read(_PREFIX.size)
    if len(prefix) < _PREFIX.size:
        return None
    size, check = _PREFIX.unpack(prefix)
    content = stream.read(size)
    return content if len(content) == size and zlib.crc32(content[:_CHECKED]) == check else None
