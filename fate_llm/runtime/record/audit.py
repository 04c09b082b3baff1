"""A party's audit log on disk: what it decided, and everything that left it, in one signed chain over files.

    <folder>/audit-000001.jsonl ...   the chain (`security.audit_chain`); a new file when one is full
    <folder>/audit.lock               held while a line is written: service and workers write the same chain
    <folder>/audit.damaged            what a crash left of a line, cut off; the chain says so in a line `repaired`
    <folder>/audit.repair             there while that happens

1. A line is on disk (fsync) when `append` returns: what leaves is on record before it leaves.
2. No line, no message: a disk that takes nothing, or a log whose end was changed, is an error.
3. Never content: names, shapes, sizes, digests, verdicts.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from fate_llm import __version__
from fate_llm.core.canonical import canonical_json
from fate_llm.core.errors import (
    BadSignature,
    ConfigurationError,
    FateError,
    FederationError,
    InternalError,
    ProtectionError,
)
from fate_llm.protocols.channel import Passed
from fate_llm.protocols.link.journal import sync_folder, write_all
from fate_llm.security.audit_chain import GENESIS, MAX_LINE, Entry, Head, genesis_line, make_line, read_line
from fate_llm.security.identity import Identity

from .forms import summary_of

__all__ = ["KINDS", "AuditLog", "audit_files"]

KINDS: Final = {
    GENESIS: "the log begins",
    "repaired": "a half-written line was cut off after a crash",
    "decision": "the policy judged a job",
    "approval": "a person decided on a job",
    "submitted": "this party signed a job and invited others",
    "started": "a job's work began here",
    "left": "a message left for another party",
    "received": "a message came from another party",
    "ended": "a job ended here",
    "cancelled": "a person stopped a job",
    "resumed": "a person asked for a job to go on",
    "exported": "a model or a record was copied out",
    "policy_changed": "the policy is another",
    "partner_added": "a party was pinned in the roster",
}
_SEGMENT: Final = 16 * 1024 * 1024  # bytes after which a new file is begun


def audit_files(folder: Path) -> list[Path]:
    """The files of a log, in the order of the chain."""
    return sorted(folder.glob("audit-[0-9][0-9][0-9][0-9][0-9][0-9].jsonl"))


class AuditLog:
    """One party's log. Thread-safe; several processes may have the same folder open."""

    def __init__(
        self, folder: Path, identity: Identity, party: str, now: Callable[[], float], *, segment: int = _SEGMENT
    ) -> None:
        self.folder = folder
        self.party = party
        self._identity = identity
        self._now = now
        self._segment = segment
        self._turn = threading.Lock()
        self._lock: int | None = None
        self._known: tuple[Path, int, Head] | None = None  # file, its size, and the head, after our last line

    @classmethod
    def open(
        cls, folder: Path, identity: Identity, party: str, now: Callable[[], float], *, segment: int = _SEGMENT
    ) -> AuditLog:
        """The log in `folder`, begun if there is none, with what a crash left behind repaired.

        now: seconds since the epoch. segment: bytes after which a new file is begun.

        Raises:
            FederationError: the disk does not take it. ConfigurationError: the log of another party or key.
            ProtectionError: its last lines were changed.
        """
        log = cls(folder, identity, party, now, segment=segment)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            log._lock = os.open(folder / "audit.lock", flags, 0o600)
        except OSError as error:
            raise log._unwritable(error) from None
        try:
            log.head()
        except FateError:
            log.close()
            raise
        return log

    def append(self, kind: str, /, **fields: Any) -> str:
        """Write one line; the hash of it, which is the new head. It is on disk when this returns.

        Raises:
            FederationError: the disk does not take it; nothing of it stays. ProtectionError: the end of the log was
            changed. InternalError: an unknown kind, or fields that are no JSON.
        """
        if kind not in KINDS or kind == GENESIS:
            raise InternalError(
                f"no audit line is of kind {kind!r}; valid: {', '.join(sorted(set(KINDS) - {GENESIS}))}"
            )
        with self._writing() as head:
            return self._write(head, kind, fields).hash

    def left(self, job: str, passed: Passed) -> str:
        """Note a message that is about to leave; see `append`."""
        return self._note("left", "to", job, passed)

    def received(self, job: str, passed: Passed) -> str:
        """Note a message that came; see `append`."""
        return self._note("received", "from", job, passed)

    def _note(self, kind: str, peer: str, job: str, passed: Passed) -> str:
        fields = {
            peer: passed.peer,
            "job": job,
            "task": passed.task,
            "message": passed.kind,
            "round": passed.round,
            "ordinal": passed.ordinal,
            "tensors": summary_of(passed.form),
            "bytes": passed.bytes,
            "digest": passed.digest,
            "protection": passed.protection,
        }
        return self.append(kind, **fields)

    def head(self) -> Head:
        """Number and hash of the last line, of whatever process wrote it."""
        with self._writing() as head:
            return head

    def close(self) -> None:
        """Closing twice is fine."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> AuditLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # --- under the lock -------------------------------------------------------------------------------------------

    @contextmanager
    def _writing(self) -> Iterator[Head]:
        """The head, while nobody else writes; the end of the chain is whole."""
        with self._turn:
            if self._lock is None:
                raise InternalError("the audit log is closed")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX)
                try:
                    yield self._find_head()
                finally:
                    fcntl.flock(self._lock, fcntl.LOCK_UN)
            except OSError as error:
                self._known = None
                raise self._unwritable(error) from None

    def _find_head(self) -> Head:
        if self._known is not None:
            path, size, head = self._known
            if _size(path) == size and not _next_of(path).exists():
                return head
        self._check_owner()
        pending = self._pending()
        for damage in pending:
            self._cut(damage)
        if (found := self._damage()) is not None:
            pending.append(found)
            self._replace("audit.repair", b"".join(damage.to_line() for damage in pending))
            self._cut(found)
        last = self._last()
        head = last.head if last is not None else self._write(Head(), GENESIS, {})
        return self._settle(pending, head) if pending else head

    def _write(self, head: Head, kind: str, fields: Mapping[str, Any]) -> Head:
        """Append one line for good.

        Raises:
            OSError: nothing of it stays.
        """
        line = self._line(head, kind, fields)
        files = audit_files(self.folder)
        path = files[-1] if files else self.folder / "audit-000001.jsonl"
        if (size := _size(path)) >= self._segment:
            path, size = _next_of(path), 0
        self._known = None
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            try:
                write_all(file, [line])
                os.fsync(file)
            except OSError:
                os.ftruncate(file, size)
                raise
        finally:
            os.close(file)
        if size == 0:
            sync_folder(self.folder)
        written = Head(head.n + 1, hashlib.sha256(line[:-1]).hexdigest())
        self._known = (path, size + len(line), written)
        return written

    def _line(self, head: Head, kind: str, fields: Mapping[str, Any]) -> bytes:
        if kind == GENESIS:
            return genesis_line(self._identity, party=self.party, program=__version__, time=self._now())
        return make_line(self._identity, head, time=self._now(), kind=kind, fields=fields)

    def _check_owner(self) -> None:
        """Raises ConfigurationError when the log begins as another party's, or under another key."""
        for path in audit_files(self.folder)[:1]:
            with path.open("rb") as stream:
                line = stream.readline(MAX_LINE + 2)
            try:
                found = json.loads(line)["fields"]
                owner = (found["party"], found["identity"])
            except (ValueError, LookupError, TypeError, RecursionError):
                return  # half-written, or changed: who reads the end will see
            if owner != (self.party, self._identity.public.to_text()):
                raise ConfigurationError(
                    f"the audit log {path} is of {owner[0]} with the key {owner[1]}, and this is {self.party} with "
                    f"{self._identity.public.to_text()}",
                    hint="Move that folder to a safe place, where it can still be verified; a new log is begun then.",
                )

    # --- the end of the chain ---------------------------------------------------------------------------------------

    def _last(self) -> Entry | None:
        """The last line, None when there is none yet. Its goodness has been looked at."""
        for _, _, line in self._backwards():
            return self._read(line)
        return None

    def _backwards(self) -> Iterator[tuple[Path, int, bytes]]:
        """File, offset and bytes of each line, the last one first; that one may lack its newline."""
        for path in reversed(audit_files(self.folder)):
            end = _size(path)
            while end > 0:
                start, line = _last_line(path, end)
                if len(line) > MAX_LINE + 1:
                    raise self._changed(path, start)
                yield path, start, line
                end = start

    def _read(self, line: bytes) -> Entry | None:
        """A whole and good line of ours, else None."""
        try:
            return read_line(line[:-1], self._identity.public) if line.endswith(b"\n") else None
        except (BadSignature, ValueError):
            return None

    def _damage(self) -> _Damage | None:
        """What a crash left at the end: no newline, or blocks that never reached the disk.

        Raises:
            ProtectionError: more is wrong than one write can have left.
        """
        back = self._backwards()
        path, start, line = next(back, (self.folder, 0, b""))
        if not line or self._read(line) is not None:
            return None
        place, at, before = next(back, (path, start, b""))
        if self._read(before) is None and (before or line.endswith(b"\n")):
            raise self._changed(place, at)
        text = base64.b64encode(line).decode("ascii")
        return _Damage(path.name, start, len(line), hashlib.sha256(line).hexdigest(), text)

    def _pending(self) -> list[_Damage]:
        """A repair that a crash interrupted; what is done again of it changes nothing."""
        path = self.folder / "audit.repair"
        try:
            return [_Damage(**json.loads(line)) for line in path.read_bytes().splitlines()]
        except FileNotFoundError:
            return []
        except (ValueError, TypeError):
            raise self._changed(path, 0) from None

    def _cut(self, damage: _Damage) -> None:
        """Take the damaged bytes off the chain, unless that has been done."""
        with (self.folder / Path(damage.file).name).open("r+b") as stream:
            stream.seek(damage.offset)
            if hashlib.sha256(stream.read(damage.size + 1)).hexdigest() == damage.digest:
                stream.truncate(damage.offset)
                os.fsync(stream.fileno())

    def _settle(self, pending: Sequence[_Damage], head: Head) -> Head:
        """Say in the chain what was cut off, and keep it in `audit.damaged`: each once."""
        noted: list[Mapping[str, Any]] = []
        for _, _, line in self._backwards():
            entry = self._read(line)
            if entry is None or entry.kind != "repaired":
                break
            noted.append(entry.fields)
        for damage in pending:
            note = {"file": damage.file, "offset": damage.offset, "bytes": damage.size, "digest": damage.digest}
            if note not in noted:
                head = self._write(head, "repaired", note)
        self._keep(pending)
        (self.folder / "audit.repair").unlink()
        sync_folder(self.folder)
        return head

    def _keep(self, pending: Sequence[_Damage]) -> None:
        with (self.folder / "audit.damaged").open("a+b") as stream:
            os.fchmod(stream.fileno(), 0o600)
            stream.seek(0)
            kept = stream.read()
            lines = [line for line in (damage.to_line() for damage in pending) if line not in kept]
            stream.write(b"".join([b"" if kept[-1:] in (b"", b"\n") else b"\n", *lines]))
            stream.flush()
            os.fsync(stream.fileno())

    def _replace(self, name: str, content: bytes) -> None:
        """Write a file whole and for good."""
        partial = self.folder / f"{name}.partial"
        file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            write_all(file, [content])
            os.fsync(file)
        finally:
            os.close(file)
        os.replace(partial, self.folder / name)
        sync_folder(self.folder)

    def _changed(self, path: Path, offset: int) -> ProtectionError:
        return ProtectionError(
            f"the audit log {path} was changed at byte {offset}: nothing is added to it, and so nothing leaves",
            hint="`fate_llm audit verify` names the lines. Keep the folder as it is, find out who did it, and begin a"
            " new log in its place.",
        )

    def _unwritable(self, error: OSError) -> FederationError:
        return FederationError(
            f"the audit log in {self.folder} cannot be written: {error.strerror or error}; what is not on record does"
            " not leave",
            hint="Make room on that disk, or give the folder back to this user; the job goes on from its journal then.",
        )


@dataclass(frozen=True, slots=True)
class _Damage:
    """Bytes at the end of a file that are no line. content: base64."""

    file: str
    offset: int
    size: int
    digest: str
    content: str

    def to_line(self) -> bytes:
        return canonical_json(asdict(self)) + b"\n"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _next_of(path: Path) -> Path:
    return path.with_name(f"audit-{int(path.stem.removeprefix('audit-')) + 1:06d}.jsonl")


def _last_line(path: Path, end: int) -> tuple[int, bytes]:
    """Offset and bytes of the line that ends at `end`; no more is read than a line can have."""
    with path.open("rb") as stream:
        size = 4096
        while True:
            start = max(0, end - size)
            stream.seek(start)
            found = stream.read(end - start)
            newline = found.rfind(b"\n", 0, len(found) - 1)
            if newline >= 0:
                return start + newline + 1, found[newline + 1 :]
            if start == 0 or size > MAX_LINE + 2:
                return start, found
            size *= 4
