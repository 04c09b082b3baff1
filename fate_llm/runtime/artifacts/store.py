"""Outputs of tasks by what is in them: an artifact's name is the SHA-256 of its content.

    objects/ab/<SHA-256 of a file>        each content once, however many artifacts have it
    manifests/<digest>.json               which files an artifact has; written last
    partial/                              what is being written

An artifact is there when its manifest is. Whatever is read is checked against the digest that was asked for, so the
place (a disk, a bucket) needs no trust: it can lose an artifact, and cannot change one, nor write outside the folder
that an artifact is copied to. One process of a party puts and collects garbage; any number may read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fate_llm.core.canonical import canonical_json, digest, digest_file
from fate_llm.core.errors import ConfigurationError, DataError
from fate_llm.core.names import nearest
from fate_llm.core.values import ArtifactKind
from fate_llm.security.randomness import random_id

from .files import BLOCK, Files, blocks_of

__all__ = ["ArtifactRef", "ArtifactStore", "Freed", "StoredFile"]

_MOST_MANIFEST = 16 * 1024 * 1024  # bytes
_HINT = "Put it again from where it came, or restore the place from a copy."


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of an artifact. digest: SHA-256 of its bytes."""

    digest: str
    bytes: int


@dataclass(frozen=True, slots=True)
class ArtifactRef:
    """An artifact in the store. digest: `core.canonical.digest_folder` of what was put. files: how many."""

    digest: str
    kind: str
    bytes: int
    files: int


@dataclass(frozen=True, slots=True)
class Freed:
    """What `gc` removed."""

    artifacts: int
    objects: int
    bytes: int


@dataclass(frozen=True, slots=True)
class _Manifest:
    """folder: False for an artifact that is one file, whose only name is ''."""

    kind: str
    folder: bool
    files: Mapping[str, StoredFile]

    def digest(self) -> str:
        if not self.folder:
            return self.files[""].digest
        return digest({name: file.digest for name, file in self.files.items()})

    def ref(self) -> ArtifactRef:
        size = sum(file.bytes for file in self.files.values())
        return ArtifactRef(self.digest(), self.kind, size, len(self.files))

    def to_bytes(self) -> bytes:
        files = {name: {"digest": file.digest, "bytes": file.bytes} for name, file in self.files.items()}
        return canonical_json({"format": 1, "kind": self.kind, "folder": self.folder, "files": files})


class ArtifactStore:
    """Artifacts under a folder or an fsspec URL. Thread-safe.

    url: a folder, file:///FOLDER, memory://NAME, s3://BUCKET/FOLDER (with its plug-in), ... unique: names for what is
    being written.

    Raises:
        ConfigurationError, MissingExtra: see `Files`.
    """

    def __init__(self, url: str | Path, *, unique: Callable[[], str] = random_id) -> None:
        self._files = Files(str(url), unique=unique)
        self._unique = unique
        self._lock = threading.Lock()  # what a put relies on is not collected meanwhile

    # --- in ------------------------------------------------------------------------------------------------------

    def put(self, path: Path, *, kind: ArtifactKind | str) -> ArtifactRef:
        """Store a file or a folder. Putting it twice stores it once, and mends what was damaged in the store.

        Raises:
            DataError: it is not there, or holds a link or something that is no file, or changed meanwhile.
            StoreLost: the place does not take it; the artifact is not there then.
        """
        found = _found(path)
        with self._lock:
            files = {name: self._put_file(place) for name, place in found.items()}
            manifest = _Manifest(str(kind), path.is_dir(), files)
            self._files.write(_manifest_name(manifest.digest()), [manifest.to_bytes()])
        return manifest.ref()

    def _put_file(self, path: Path) -> StoredFile:
        try:
            name, size = digest_file(path), path.stat().st_size
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}", hint="Store it again.") from None
        try:
            if not self._is_whole(name):
                written = self._files.write(_object_name(name), blocks_of(path))
                if written != name:
                    self._files.remove(_object_name(name))
                    raise DataError(f"{path} changed while it was being stored", hint="Store it when it is finished.")
        except FileNotFoundError:
            raise DataError(f"{path} vanished while it was being stored", hint="Store it again.") from None
        return StoredFile(name, size)

    def _is_whole(self, name: str) -> bool:
        try:
            seen = hashlib.sha256()
            with self._files.open(_object_name(name)) as stream:
                while block := stream.read(BLOCK):
                    seen.update(block)
        except FileNotFoundError:
            return False
        return seen.hexdigest() == name

    # --- out -----------------------------------------------------------------------------------------------------

    def ref(self, name: str) -> ArtifactRef | None:
        """What is known of an artifact; None when it is not there.

        Raises:
            DataError: its manifest is damaged.
        """
        found = self._read_manifest(name)
        return None if found is None else found.ref()

    def contents(self, name: str) -> dict[str, StoredFile]:
        """The files of an artifact by relative name; one that is a single file has the name ''.

        Raises:
            DataError: there is no such artifact, or its manifest is damaged.
        """
        return dict(self._manifest(name).files)

    def get(self, name: str, to: Path) -> ArtifactRef:
        """Copy an artifact to `to`, which must not exist (an empty folder is fine); checked, whole or not at all.

        Raises:
            DataError: no such artifact, or a damaged object, which is named. ConfigurationError: `to` exists or cannot
                be written.
        """
        manifest = self._manifest(name)
        to = Path(os.path.abspath(to))
        if to.is_symlink() or (to.exists() and not (to.is_dir() and not any(to.iterdir()))):
            raise ConfigurationError(f"{to} exists, and is not overwritten", hint="Name another place.")
        partial = to.with_name(f".{to.name}.{self._unique()}.partial")
        try:
            to.parent.mkdir(parents=True, exist_ok=True)
            if manifest.folder:
                partial.mkdir()
            for relative, file in manifest.files.items():
                self._copy(name, relative, file, partial / relative if relative else partial)
            if not manifest.folder and to.is_dir():
                to.rmdir()
            os.rename(partial, to)
        except OSError as error:
            raise ConfigurationError(f"{to} cannot be written: {error.strerror}", hint="Name another place.") from None
        finally:
            if partial.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    partial.unlink()
        return manifest.ref()

    def _copy(self, name: str, relative: str, file: StoredFile, to: Path) -> None:
        to.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(to, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), "wb") as stream:
            for block in self._blocks(name, relative, file):
                stream.write(block)

    def open(self, name: str, relative: str = "") -> Iterator[bytes]:
        """The blocks of one file of an artifact; the last one comes only when all of them were what they must be.

        Raises:
            DataError: there is no such artifact or file, or it is damaged.
        """
        files = self._manifest(name).files
        if relative not in files:
            raise DataError(f"artifact {name[:12]} has no file {relative!r}", hint=nearest(relative, files))
        return self._blocks(name, relative, files[relative])

    def read(self, name: str, relative: str = "", *, most: int = 16 * 1024 * 1024) -> bytes:
        """The bytes of one small file of an artifact.

        Raises:
            DataError: as `open`; or it has more than `most` bytes.
        """
        files = self._manifest(name).files
        if relative in files and files[relative].bytes > most:
            raise DataError(f"{relative!r} of artifact {name[:12]} has {files[relative].bytes} bytes, at most {most}")
        return b"".join(self.open(name, relative))

    def _blocks(self, name: str, relative: str, file: StoredFile) -> Iterator[bytes]:
        """Blocks one behind, so that the last is not given before the whole is known to be right."""
        seen, size, last = hashlib.sha256(), 0, b""
        what = f"object {file.digest} ({relative or 'the file'} of artifact {name})"
        try:
            with self._files.open(_object_name(file.digest)) as stream:
                while (block := stream.read(BLOCK)) and size <= file.bytes:
                    if last:
                        yield last
                    seen.update(block)
                    size, last = size + len(block), block
        except FileNotFoundError:
            raise DataError(f"{what} is missing in {self._files.shown}", hint=_HINT) from None
        if size != file.bytes or seen.hexdigest() != file.digest:
            raise DataError(f"{what} is damaged in {self._files.shown}", hint=_HINT)
        if last:
            yield last

    def verify(self, name: str) -> ArtifactRef:
        """Read all of an artifact.

        Raises:
            DataError: no such artifact; or its damaged and missing objects, all of them named.
        """
        manifest = self._manifest(name)
        faults = []
        for relative, file in manifest.files.items():
            try:
                for _ in self._blocks(name, relative, file):
                    pass
            except DataError as error:
                faults.append(error.message)
        if faults:
            raise DataError("\n".join(faults), hint=_HINT)
        return manifest.ref()

    def digests(self) -> list[str]:
        """All artifacts that are there."""
        names = (name.removeprefix("manifests/").removesuffix(".json") for name, _ in self._files.names("manifests"))
        return [name for name in names if _is_digest(name)]

    # --- what is not needed any more -----------------------------------------------------------------------------

    def gc(self, keep: Collection[str]) -> Freed:
        """Remove all artifacts but those in `keep`, and all objects that no artifact has.

        Raises:
            DataError: the manifest of one that is kept is damaged; nothing was removed.
        """
        with self._lock:
            there = self.digests()
            kept = [self._manifest(name) for name in there if name in keep]
            needed = {_object_name(file.digest) for manifest in kept for file in manifest.files.values()}
            gone = [name for name in there if name not in keep]
            for name in gone:
                self._files.remove(_manifest_name(name))
            loose = [(name, size) for name, size in self._files.names("objects") if name not in needed]
            for name, _ in loose:
                self._files.remove(name)
            self._files.clear_partial()
        return Freed(len(gone), len(loose), sum(size for _, size in loose))

    def _manifest(self, name: str) -> _Manifest:
        found = self._read_manifest(name)
        if found is None:
            raise DataError(f"no artifact {name} in {self._files.shown}", hint="It was never stored, or collected.")
        return found

    def _read_manifest(self, name: str) -> _Manifest | None:
        if not _is_digest(name):
            raise DataError(f"{name[:100]!r} is no digest of an artifact", hint="A digest is 64 hex digits, a to f.")
        try:
            with self._files.open(_manifest_name(name)) as stream:
                content = stream.read(_MOST_MANIFEST + 1)
        except FileNotFoundError:
            return None
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
            found = _parsed(content)
            if found.digest() == name:
                return found
        raise DataError(f"the manifest of artifact {name} in {self._files.shown} is damaged", hint=_HINT)


def _parsed(content: bytes) -> _Manifest:
    """Raises ValueError, TypeError, KeyError or AttributeError for what is no manifest of ours, or could do harm."""
    if len(content) > _MOST_MANIFEST:
        raise ValueError("too long")
    data: Any = json.loads(content)
    files = {name: StoredFile(file["digest"], file["bytes"]) for name, file in data["files"].items()}
    folder = data["folder"]
    if data["format"] != 1 or not isinstance(data["kind"], str) or not isinstance(folder, bool):
        raise ValueError("another format")
    if any(not _is_digest(file.digest) or type(file.bytes) is not int or file.bytes < 0 for file in files.values()):
        raise ValueError("no digests and sizes")
    if not all(_is_safe(name) for name in files) if folder else set(files) != {""}:
        raise ValueError("names that are not those of files in a folder")
    return _Manifest(data["kind"], folder, files)


def _is_safe(name: str) -> bool:
    """A relative path that stays below the folder it is joined to."""
    return "\0" not in name and all(part not in ("", ".", "..") for part in name.split("/"))


def _is_digest(name: object) -> bool:
    return isinstance(name, str) and len(name) == 64 and set(name) <= set("0123456789abcdef")


def _object_name(name: str) -> str:
    return f"objects/{name[:2]}/{name}"


def _manifest_name(name: str) -> str:
    return f"manifests/{name}.json"


def _found(path: Path) -> dict[str, Path]:
    """The files of an artifact by relative name, sorted; {'': path} for a single file."""
    if not path.exists():
        raise DataError(f"{path} does not exist", hint="Give the file or folder that a task wrote.")
    if path.is_file() and not path.is_symlink():
        return {"": path}
    found = {}
    for place in sorted([path, *path.rglob("*")]):
        if place.is_symlink() or not (place.is_dir() or place.is_file()):
            raise DataError(f"{place} is a link or no file: an artifact is files and folders", hint="Copy the content.")
        if place.is_file():
            name = place.relative_to(path).as_posix()
            if any("\ud800" <= char <= "\udfff" for char in name):
                raise DataError(f"the name {os.fsencode(place)!r} is not UTF-8", hint="Rename the file.")
            found[name] = place
    return found
