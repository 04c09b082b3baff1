"""What one party said and heard in one job, message by message: the matter of its statement at the end.

One file of JSON lines in the job's folder, over all attempts and restarts:

    {"attempt", "bytes", "digest", "direction", "kind", "ordinal", "peer", "protection", "round", "task"}
    {"attempt", "closed", "contributors", "missing", "round"}     closed: the task whose round has ended

1. A message is noted before it leaves, and on disk by then; a message that came is on disk after `sync`, which is to be
   called before it is acknowledged. So what a power cut takes away comes again.
2. A line that a crash cut off is dropped when the file is opened: its message had not left, or comes again.
3. What is sent or heard again after a restart is the same message: it counts once.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from fate_llm.core.canonical import canonical_json
from fate_llm.core.errors import FederationError, InternalError
from fate_llm.protocols.channel import Passed
from fate_llm.protocols.link.journal import write_all

__all__ = ["ClosedRound", "Message", "Noted", "Transcript", "read_transcript"]


@dataclass(frozen=True, slots=True)
class Message:
    """One message as one end noted it. attempt: the first in which it was noted."""

    direction: str
    peer: str
    task: str
    kind: str
    round: int
    ordinal: int
    bytes: int
    digest: str
    protection: str
    attempt: int


@dataclass(frozen=True, slots=True)
class ClosedRound:
    """A round that has ended, as this party was told or, at the coordinator, decided it."""

    task: str
    round: int
    contributors: tuple[str, ...]
    missing: tuple[str, ...]
    attempt: int


@dataclass(frozen=True, slots=True)
class Noted:
    """A transcript that was read: each message once, in the order of first notes, and the last word on each round.

    damaged: lines that a power cut left unreadable. What they noted had neither left nor been acknowledged.
    """

    messages: tuple[Message, ...] = ()
    rounds: tuple[ClosedRound, ...] = ()
    damaged: int = 0


class Transcript:
    """Writes one party's transcript of one job. Thread-safe; one process at a time has it open."""

    def __init__(self, path: Path, *, attempt: int = 1) -> None:
        """attempt: of the job, noted with every line.

        Raises:
            FederationError: the disk does not take it.
        """
        self.path = path
        self._attempt = attempt
        self._turn = threading.Lock()
        self._file: int | None = None
        self._dirty = False
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            self._end = os.lseek(self._file, _whole(path), os.SEEK_SET)
            os.ftruncate(self._file, self._end)
        except OSError as error:
            self.close()
            raise self._unwritable(error) from None

    def note(self, passed: Passed) -> None:
        """Note a message before it leaves (on disk when this returns), or when it has come.

        Raises:
            FederationError: the disk does not take it; nothing of it stays.
        """
        line = {
            "attempt": self._attempt,
            "bytes": passed.bytes,
            "digest": passed.digest,
            "direction": passed.direction,
            "kind": passed.kind,
            "ordinal": passed.ordinal,
            "peer": passed.peer,
            "protection": passed.protection,
            "round": passed.round,
            "task": passed.task,
        }
        self._write(line, durable=passed.direction == "sent")

    def closed(self, task: str, round: int, contributors: Sequence[str], missing: Sequence[str] = ()) -> None:
        """Note who was counted in a round that has ended. The last word on a round is what counts."""
        line = {
            "attempt": self._attempt,
            "closed": task,
            "contributors": list(contributors),
            "missing": list(missing),
            "round": round,
        }
        self._write(line, durable=False)

    def heed(self, event: str, task: str, fields: Mapping[str, Any]) -> None:
        """Note what an event of the rounds says of contributors; other events are none of ours."""
        if event in ("round_closed", "round_state") and "contributors" in fields:
            place = str(fields.get("conversation", task))
            self.closed(place, int(fields["round"]), fields["contributors"], fields.get("missing", ()))

    def sync(self) -> None:
        """All that was noted survives a power cut. To be called before what came is acknowledged."""
        with self._turn:
            if self._file is not None and self._dirty:
                try:
                    os.fdatasync(self._file)
                except OSError as error:
                    raise self._unwritable(error) from None
                self._dirty = False

    def close(self) -> None:
        """Closing twice is fine."""
        with self._turn:
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def __enter__(self) -> Transcript:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _write(self, line: Mapping[str, Any], *, durable: bool) -> None:
        content = canonical_json(dict(line)) + b"\n"
        with self._turn:
            if self._file is None:
                raise InternalError(f"the transcript {self.path.name} is closed")
            try:
                write_all(self._file, [content])
                if durable:
                    os.fdatasync(self._file)
            except OSError as error:
                self._cut_back()
                raise self._unwritable(error) from None
            self._end += len(content)
            self._dirty = not durable

    def _cut_back(self) -> None:
        """Drop what a failed write left; a transcript that cannot even do that is closed."""
        if self._file is None:
            return
        try:
            os.ftruncate(self._file, self._end)
            os.lseek(self._file, self._end, os.SEEK_SET)
        except OSError:
            os.close(self._file)
            self._file = None

    def _unwritable(self, error: OSError) -> FederationError:
        return FederationError(
            f"the transcript {self.path} cannot be written: {error.strerror or error}; nothing leaves without it",
            hint="Make room on that disk, or give the folder back to this user; the job goes on from its journal then.",
        )


def read_transcript(path: Path) -> Noted:
    """What was noted, merged over restarts. Empty when there is no file."""
    messages: dict[tuple[str | int, ...], Message] = {}
    rounds: dict[tuple[str, int], ClosedRound] = {}
    damaged = 0
    for line in _lines(path):
        try:
            found = json.loads(line)
            if "closed" in found:
                counted, missing = tuple(found["contributors"]), tuple(found["missing"])
                closed = ClosedRound(found["closed"], found["round"], counted, missing, found["attempt"])
                rounds[closed.task, closed.round] = closed
            else:
                said = Message(**found)
                key = (said.direction, said.peer, said.task, said.kind, said.round, said.ordinal, said.digest)
                messages.setdefault(key, said)
        except (ValueError, TypeError, KeyError):
            damaged += 1
    return Noted(tuple(messages.values()), tuple(rounds.values()), damaged)


def _lines(path: Path) -> Iterator[bytes]:
    """Whole lines; one that a crash cut off is left out."""
    try:
        with path.open("rb") as stream:
            yield from (line for line in stream if line.endswith(b"\n"))
    except FileNotFoundError:
        return


def _whole(path: Path) -> int:
    """Bytes of the file up to the end of its last whole line."""
    with path.open("rb") as stream:
        end = stream.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            stream.seek(start)
            newline = stream.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0
