"""Reading a party's audit log without its key: every line, and what is wrong with the chain."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fate_llm.core.errors import ConfigurationError
from fate_llm.security.audit_chain import MAX_LINE, ChainFault, ChainReader, Entry, Head
from fate_llm.security.identity import PublicIdentity

from .audit import audit_files

__all__ = ["LogFault", "LogReader"]


@dataclass(frozen=True, slots=True)
class LogFault:
    """One thing wrong with a log. file, line: where (from 1), empty and 0 for the log as a whole."""

    file: str
    line: int
    kind: str
    message: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}: " if self.file else ""
        return f"{place}{self.message} [{self.kind}]"

    def as_dict(self) -> dict[str, Any]:
        return {"file": self.file, "line": self.line, "kind": self.kind, "message": self.message}


class LogReader:
    """A log as it is at this moment. Read it by `entries`, once; then the rest is known.

    expected_head: hash of a line that must be in it.
    """

    def __init__(self, folder: Path, public: PublicIdentity, *, expected_head: str | None = None) -> None:
        """Raises ConfigurationError when there is no log in `folder`, or it cannot be read."""
        self.folder = folder
        self.public = public
        self._chain = ChainReader(public, expected_head=expected_head)
        self._starts: list[tuple[str, int]] = []  # of each file: its name, and how many lines came before
        self._unfinished: list[LogFault] = []
        try:
            self._files = _sizes(folder)
        except OSError as error:
            raise ConfigurationError(f"the audit log in {folder} cannot be read: {error.strerror}") from None
        if not self._files:
            raise ConfigurationError(
                f"there is no audit log in {folder}", hint="Name the party's home; its service begins the log."
            )

    def entries(self) -> Iterator[tuple[Entry, bytes]]:
        """Every line that the party signed, in the order of the files, with its bytes as they are there."""
        for path, size in self._files:
            self._starts.append((path.name, self._chain.count))
            for line in _lines(path, size):
                if not line.endswith(b"\n"):
                    place = self._chain.count - self._starts[-1][1] + 1
                    text = f"{len(line)} bytes without an end: a crash, or cut; the party's service says so in its log"
                    self._unfinished.append(LogFault(path.name, place, "unfinished", text))
                elif (entry := self._chain.take(line)) is not None:
                    yield entry, line

    def check(self) -> list[LogFault]:
        """Read all that has not been read, and say what is wrong."""
        if not self._starts:
            for _ in self.entries():
                pass
        return [self._placed(fault) for fault in self._chain.finish()] + self._unfinished

    @property
    def head(self) -> Head:
        """Of the last good line read."""
        return self._chain.head

    @property
    def count(self) -> int:
        """Lines read."""
        return self._chain.count

    @property
    def files(self) -> list[str]:
        return [path.name for path, _ in self._files]

    def _placed(self, fault: ChainFault) -> LogFault:
        if fault.line == 0:
            return LogFault("", 0, fault.kind, fault.message)
        name, before = next((name, before) for name, before in reversed(self._starts) if before < fault.line)
        return LogFault(name, fault.line - before, fault.kind, fault.message)


def _sizes(folder: Path) -> list[tuple[Path, int]]:
    """Files and sizes of a log while nobody is in the middle of a line."""
    with _quiet(folder):
        return [(path, path.stat().st_size) for path in audit_files(folder)]


@contextmanager
def _quiet(folder: Path) -> Iterator[None]:
    try:
        file = os.open(folder / "audit.lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # a copy, that nobody writes to
        yield
        return
    try:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield
    finally:
        os.close(file)


def _lines(path: Path, size: int) -> Iterator[bytes]:
    """The lines of the first `size` bytes; what is longer than a line can be comes in pieces."""
    with path.open("rb") as stream:
        while size > 0 and (line := stream.readline(min(size, MAX_LINE + 2))):
            size -= len(line)
            yield line
