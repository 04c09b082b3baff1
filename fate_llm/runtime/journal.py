"""The journal of rounds on a party's disk: the last finished rounds of each side of each conversation.

    <party folder>/journal/<conversation>.<side>/
      current            the name of the last round committed
      round-00007/       meta.json, state.safetensors, keep/<name>/...
      round-00006/       the one before

Rules:
1. A round is written under another name, is on disk with all its files, and is renamed; then `current` is replaced.
   Whatever happens in between leaves the round before or this one, whole.
2. The last two rounds stay; older ones and half-written ones are removed.
3. Positions in the conversation hold inside the attempt that wrote them: another has messages of its own.
4. meta.json lists every file with its bytes: a disk that lost what it had confirmed is found out, and named.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fate_llm.core.canonical import digest
from fate_llm.core.errors import BadEnvelope, DataError, FederationError
from fate_llm.core.interfaces import Kept, Saved
from fate_llm.core.values import Arrays
from fate_llm.protocols.ledger import base_task
from fate_llm.protocols.link.journal import sync_folder, write_all
from fate_llm.protocols.tensors import read_tensors, write_tensors

__all__ = ["RoundFolder", "has_rounds", "journal_folder", "replace_json", "sync_tree"]

_VERSION = 1
_CURRENT, _META, _STATE, _KEEP = "current", "meta.json", "state.safetensors", "keep"
_KEPT_ROUNDS = 2
_LONGEST = 200  # characters of a folder's name; a longer conversation is known by its digest


class RoundFolder:
    """Satisfies `core.interfaces.RoundJournal`. One process and thread at a time has it.

    folder: of this side of this conversation. attempt: of the job.
    """

    def __init__(self, folder: Path, *, attempt: int) -> None:
        self._folder = folder
        self._attempt = attempt

    def load(self) -> Saved | None:
        """The last round committed, or None.

        Raises:
            DataError: the disk does not have what it had confirmed.
        """
        if not self._folder.exists():
            return None
        current = self._current()
        self._tidy(current)
        return None if current is None else self._read(current)

    def commit(
        self,
        number: int,
        fields: Mapping[str, Any],
        tensors: Arrays,
        positions: Mapping[str, Any],
        keep: Mapping[str, Kept],
    ) -> None:
        """Write a round down; see `core.interfaces.RoundJournal.commit`."""
        name = f"round-{number:05d}"
        meta = {"version": _VERSION, "attempt": self._attempt, "number": number, "fields": dict(fields)}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            half = self._write(name, {**meta, "positions": dict(positions)}, tensors, keep)
            if (self._folder / name).exists():  # of a process that was killed before it was the current one
                shutil.rmtree(self._folder / name)
            os.rename(half, self._folder / name)
            sync_folder(self._folder)
            _replace(self._folder / _CURRENT, name.encode())
        except OSError as error:
            raise FederationError(
                f"round {number} cannot be written to the journal in {self._folder}: {error.strerror or error}",
                hint="Make room on that disk and start this party again: it goes on from the round before.",
            ) from None
        self._tidy(name)

    def _write(self, name: str, meta: dict[str, Any], tensors: Arrays, keep: Mapping[str, Kept]) -> Path:
        half = self._folder / f"{name}.partial"
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir()
        with (half / _STATE).open("wb") as stream:
            write_all(stream.fileno(), write_tensors(tensors))
        for kept, thing in keep.items():
            place = half / _KEEP / kept
            place.mkdir(parents=True)
            thing.save(place)
        files = {path.relative_to(half).as_posix(): path.stat().st_size for path in _files(half)}
        (half / _META).write_text(json.dumps({**meta, "keep": sorted(keep), "files": files}), encoding="utf-8")
        sync_tree(half)
        return half

    def _current(self) -> str | None:
        try:
            return (self._folder / _CURRENT).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def _tidy(self, current: str | None) -> None:
        """Remove what is half written, what was never the current round, and what is too old."""
        found = [path.name for path in self._folder.glob("round-*") if path.is_dir()]
        whole = sorted((name for name in found if not name.endswith(".partial")), key=_number)
        stay = [name for name in whole if current is not None and _number(name) <= _number(current)][-_KEPT_ROUNDS:]
        for name in set(found) - set(stay):
            shutil.rmtree(self._folder / name, ignore_errors=True)

    def _read(self, name: str) -> Saved:
        place = self._folder / name
        try:
            meta = json.loads((place / _META).read_text(encoding="utf-8"))
            if meta["version"] != _VERSION:
                raise ValueError(f"version {meta['version']}, this installation reads {_VERSION}")
            for file, size in meta["files"].items():
                if (place / file).stat().st_size != size:
                    raise ValueError(f"{file} has not the {size} bytes that were written")
            tensors = read_tensors(memoryview((place / _STATE).read_bytes()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, BadEnvelope) as error:
            raise DataError(
                f"the journal {place} is damaged: {error}",
                hint="Restore this folder from a backup, or remove it and start the job anew.",
            ) from None
        positions = meta["positions"] if meta["attempt"] == self._attempt else {}
        keep = {kept: place / _KEEP / kept for kept in meta["keep"]}
        return Saved(meta["number"], meta["fields"], tensors, positions, keep)


def journal_folder(party: Path, conversation: str, side: str) -> Path:
    """Where one side (contributor, coordinator) of a conversation has its journal in a party's folder of the job."""
    name = f"{quote(conversation, safe='#')}.{side}"
    if len(name) > _LONGEST:
        name = f"{base_task(conversation)}#{digest(conversation)}.{side}"
    return party / "journal" / name


def has_rounds(party: Path, task: str) -> bool:
    """Whether a task has finished a round: what it left elsewhere for itself is still needed."""
    for path in (party / "journal").glob(f"*/{_CURRENT}"):
        conversation = path.parent.name.rpartition(".")[0].replace("%2F", "/")
        if base_task(conversation) == task and _number(path.read_text(encoding="utf-8")):
            return True
    return False


def _number(name: str) -> int:
    return int(name.removeprefix("round-"))


def replace_json(path: Path, value: Any) -> None:
    """Replace a file by the JSON of `value`, whole or not at all; on disk when this returns."""
    _replace(path, json.dumps(value, ensure_ascii=False, sort_keys=True).encode("utf-8"))


def sync_tree(folder: Path) -> None:
    """Everything below a folder (or the one file `folder`) survives a power cut."""
    for path in _files(folder):
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(file)
        finally:
            os.close(file)
    for place in (folder, *(path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink())):
        sync_folder(place if place.is_dir() else place.parent)


def _files(folder: Path) -> list[Path]:
    found = [folder] if folder.is_file() else folder.rglob("*")
    return sorted(path for path in found if path.is_file() and not path.is_symlink())


def _replace(path: Path, content: bytes) -> None:
    half = path.with_name(path.name + ".partial")
    file = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        write_all(file, [content])
        os.fsync(file)
    finally:
        os.close(file)
    os.replace(half, path)
    sync_folder(path.parent)
