"""What a party's side of a sum must not draw or say a second time, on its disk.

    <party folder>/journal/<conversation>.<side>.sums/
      attempt-2/round-00007/NAME.entry      of the round that runs, in the attempt that runs
      lasting/round-00006/NAME.entry        what later attempts of the job must know

Rules:
1. An entry is written under another name, is on disk, and is renamed; its folder is on disk before `keep` returns.
   Whatever happens in between leaves the entry before or this one, whole.
2. What is secret is sealed under a key of this party (AES-256-GCM), bound to job, conversation, side, attempt, round
   and name; the rest carries its SHA-256, taken with all of these but the attempt. No entry stands in for another.
3. A round that closes, and what other attempts left, goes at one stroke (a rename), and is then overwritten and
   removed. What is lasting stays.
4. A side that does not outlive its process writes down what is lasting, and nothing else.

Overwriting reaches what the file system still has in that place: not the copies that a journal or an SSD made.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, unquote

from fate_llm.core.canonical import canonical_json
from fate_llm.core.errors import BadEnvelope, BadSeal, DataError, FederationError, InternalError
from fate_llm.core.interfaces import Buffer, SumKeep
from fate_llm.core.values import Payload
from fate_llm.protocols.link.journal import sync_folder, write_all
from fate_llm.protocols.tensors import read_tensors, write_tensors
from fate_llm.security.sealing import open_at_rest, seal_at_rest

from .journal import journal_folder

__all__ = ["SumFolder", "sum_folder"]

_OPEN, _SEALED = b"FLSUM\x00\x01o", b"FLSUM\x00\x01s"  # what a file starts with: version 1, and how it is written
_DIGEST = hashlib.sha256().digest_size
_LENGTH = 8  # bytes of the length of the fields
_ENTRY, _PARTIAL, _GONE = ".entry", ".partial", ".gone"
_LASTING, _ATTEMPT, _ROUND = "lasting", "attempt-", "round-"
_LONGEST = 200  # characters of a name, as it stands in a file's name
_ZEROS = bytes(1 << 20)


def sum_folder(party: Path, conversation: str, side: str) -> Path:
    """Where one side (contributor, coordinator, key_holder) of a conversation keeps what it must not say twice."""
    return journal_folder(party, conversation, f"{side}.sums")


class SumFolder:
    """Satisfies `core.interfaces.SumJournal`. One process and thread at a time has it.

    folder: `sum_folder`. attempt: of the job. key: 32 bytes that only this party has. durable: this side goes on where
    it was when its process is killed; without it only what is lasting is written.
    """

    def __init__(
        self, folder: Path, *, job: str, conversation: str, side: str, attempt: int, key: bytes, durable: bool
    ) -> None:
        self._folder = folder
        self._attempt = attempt
        self._place = {"job": job, "conversation": conversation, "side": side}
        self._key = key
        self._durable = durable
        self._tidied = False
        self._made: set[Path] = set()  # folders whose names are on disk

    def load(self, round: int) -> Mapping[str, Payload]:
        """By name, what was kept of a round: all of this attempt, and what is lasting of any. The first look removes
        what other attempts left.

        Raises:
            DataError: the disk does not have what it had confirmed.
            FederationError: the disk does not let go of what must be erased.
        """
        with self._disk(round):
            self._tidy()
        found: dict[str, Payload] = {}
        for folder in (self._rounds(lasting=False), self._rounds(lasting=True)):
            for path in sorted((folder / _name(round)).glob(f"*{_ENTRY}")):
                found[unquote(path.name.removesuffix(_ENTRY))] = self._read(path, round)
        return found

    def keep(self, round: int, action: SumKeep) -> None:
        """On disk when this returns.

        Raises:
            FederationError: the disk does not take it.
            InternalError: a name that is too long, or something both secret and lasting.
        """
        if action.secret and action.lasting:
            raise InternalError(f"{action.name!r} is secret and lasting: what is secret goes when its round closes")
        if not action.lasting and not self._durable:
            return
        path = self._path(round, action.name, lasting=action.lasting)
        other = self._path(round, action.name, lasting=True)
        if not action.lasting and other.exists():
            raise InternalError(f"{action.name!r} of round {round} is lasting: it is replaced by what lasts only")
        with self._disk(round):
            self._tidy()
            self._make(path.parent)
            self._write(path, self._parts(round, action))

    def close(self, round: int) -> None:
        """Everything of this round and those before is erased, but for what is lasting.

        Raises:
            FederationError: the disk does not let go of it.
        """
        with self._disk(round):
            self._tidy()
            for path in _listed(self._rounds(lasting=False)):
                if int(path.name.removeprefix(_ROUND)) <= round:
                    _remove(path)

    # --- files ----------------------------------------------------------------------------------------------

    def _rounds(self, *, lasting: bool) -> Path:
        return self._folder / (_LASTING if lasting else f"{_ATTEMPT}{self._attempt}")

    def _path(self, round: int, name: str, *, lasting: bool) -> Path:
        file = quote(name, safe="")
        if not name or len(file) > _LONGEST:
            raise InternalError(f"an entry of a sum's journal called {name[:50]!r}: 1 to {_LONGEST} characters")
        return self._rounds(lasting=lasting) / _name(round) / f"{file}{_ENTRY}"

    def _parts(self, round: int, action: SumKeep) -> list[Buffer]:
        fields = canonical_json(dict(action.body.fields))
        fields += b" " * (-len(fields) % 8)  # tensors are read where they lie, at an address of whole words
        body: list[Buffer] = [len(fields).to_bytes(_LENGTH, "little"), fields, *write_tensors(action.body.tensors)]
        if action.secret:
            return [_SEALED, seal_at_rest(self._key, b"".join(body), label=self._sealing(round, action.name))]
        return [_OPEN, self._digest(round, action.name, body), *body]

    def _label(self, round: int, name: str) -> bytes:
        return canonical_json({**self._place, "round": round, "name": name})

    def _sealing(self, round: int, name: str) -> bytes:
        return canonical_json({**self._place, "attempt": self._attempt, "round": round, "name": name})

    def _digest(self, round: int, name: str, body: list[Buffer]) -> bytes:
        """Over the place as well; not over the attempt, for what is lasting is read in others."""
        known = hashlib.sha256(hashlib.sha256(self._label(round, name)).digest())
        for part in body:
            known.update(part)
        return known.digest()

    def _make(self, folder: Path) -> None:
        """A folder that survives a power cut under its name, as do those above it."""
        if folder in self._made and folder.exists():
            return
        if folder.parent != self._folder.parent.parent:
            self._make(folder.parent)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        sync_folder(folder.parent)
        self._made.add(folder)

    def _write(self, path: Path, parts: list[Buffer]) -> None:
        half = path.with_name(path.name + _PARTIAL)
        file = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            write_all(file, parts)
            os.fsync(file)
        finally:
            os.close(file)
        before = os.open(path, os.O_WRONLY | os.O_CLOEXEC) if path.exists() else None
        try:
            os.replace(half, path)
            sync_folder(path.parent)
            if before is not None:  # it has no name any more, and its content is still there
                _overwrite(before)
        finally:
            if before is not None:
                os.close(before)

    def _read(self, path: Path, round: int) -> Payload:
        name, start = unquote(path.name.removesuffix(_ENTRY)), len(_OPEN)
        try:
            content = memoryview(path.read_bytes())
            if content[:start] == _SEALED:
                opened = open_at_rest(self._key, content[start:], label=self._sealing(round, name))
                return _payload(memoryview(opened))
            if content[:start] != _OPEN:
                raise ValueError("it was not written by this version of fate_llm")
            body = content[start + _DIGEST :]
            if self._digest(round, name, [body]) != content[start : start + _DIGEST]:
                raise ValueError("its content is not what was written")
            return _payload(body)
        except (OSError, ValueError, TypeError, BadEnvelope, BadSeal) as error:
            raise DataError(
                f"the journal {path} is damaged: {error}",
                hint="Restore this file from a backup, or end the job and start a new one: without it this party "
                "cannot tell what it has answered, and answers nothing.",
            ) from None

    def _tidy(self) -> None:
        """The first time: remove what is half written or half removed, and what other attempts left."""
        if self._tidied:
            return
        mine = self._rounds(lasting=False).name
        for path in _listed(self._folder):
            if path.name not in (mine, _LASTING):
                _remove(path)
        for rounds in (self._rounds(lasting=False), self._rounds(lasting=True)):
            for path in _listed(rounds):
                if path.name.endswith(_GONE):
                    _remove(path)
                    continue
                for file in _listed(path):
                    if not file.name.endswith(_ENTRY):
                        _remove(file)
        self._tidied = True

    @contextmanager
    def _disk(self, round: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise FederationError(
                f"round {round} of a sum cannot be written to the journal in {self._folder}: {error.strerror or error}",
                hint="Make room on that disk and start this party again; nothing that was to follow has been sent.",
            ) from None


def _name(round: int) -> str:
    return f"{_ROUND}{round:05d}"


def _listed(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _payload(body: memoryview) -> Payload:
    """Fields and tensors; the tensors are views, which cannot be written to."""
    length = int.from_bytes(body[:_LENGTH], "little")
    fields = json.loads(bytes(body[_LENGTH : _LENGTH + length]))
    if not isinstance(fields, dict):
        raise ValueError("its fields are no mapping")
    return Payload(fields, read_tensors(body[_LENGTH + length :]))


def _remove(path: Path) -> None:
    """Take a file, or a folder with all it has, out of the way at one stroke; then overwrite and remove it."""
    gone = path
    if not path.name.endswith(_GONE):
        gone = path.with_name(path.name + _GONE)
        os.rename(path, gone)
        sync_folder(path.parent)
    if gone.is_dir():
        for inner in _listed(gone):
            _remove_gone(inner)
        os.rmdir(gone)
    else:
        _remove_gone(gone)
    sync_folder(gone.parent)


def _remove_gone(path: Path) -> None:
    if path.is_dir():
        for inner in _listed(path):
            _remove_gone(inner)
        os.rmdir(path)
        return
    file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        _overwrite(file)
    finally:
        os.close(file)
    os.unlink(path)


def _overwrite(file: int) -> None:
    left = os.fstat(file).st_size
    os.lseek(file, 0, os.SEEK_SET)
    while left > 0:
        left -= os.write(file, memoryview(_ZEROS)[:left])
    os.fsync(file)
