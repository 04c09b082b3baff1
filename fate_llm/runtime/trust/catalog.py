"""A party's own names for its data sets and models (`catalog.yaml`): partners name these, never a file.

    version: 1
    entries:
      loans-2025: {path: /data/loans/2025.jsonl, kind: dataset, description: Loans granted in 2025.}

A pipeline says `catalog:loans-2025`. Where it lies is this party's matter, and no other party is told.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from fate_llm.core.canonical import digest, digest_folder
from fate_llm.core.errors import DataError
from fate_llm.core.names import NAME_PATTERN, nearest
from fate_llm.pipelines.resources import CATALOG
from fate_llm.pipelines.schema import Version

from .documents import Strict, read_document, replace_file

__all__ = [
    "EMPTY_CATALOG",
    "Catalog",
    "CatalogEntry",
    "Fingerprint",
    "FingerprintCache",
    "load_catalog",
    "local_catalog",
]

_HINT = "`fate_llm party init` writes an empty one; docs/how-to/data-catalogue.md shows the form."


class CatalogEntry(Strict):
    """What a name stands for. path: relative ones start at the catalogue's folder."""

    path: str = Field(min_length=1, description="File or folder; relative paths start at the catalogue's folder.")
    kind: Literal["dataset", "model"] = Field(description="What lies there.")
    description: str = Field("", max_length=2000, description="For people.")
    records: int | None = Field(None, ge=0, description="How many records, where somebody has counted.")
    format: Literal["jsonl", "json", "csv", "parquet", "dataset"] | None = Field(
        None, description="How a data set is written; the reader goes by the file's suffix."
    )


class _CatalogFile(Strict):
    version: Version
    entries: dict[Annotated[str, StringConstraints(pattern=NAME_PATTERN)], CatalogEntry] = Field(
        default_factory=dict, max_length=10_000
    )


@dataclass(frozen=True, slots=True)
class Catalog:
    """The entries by name. folder: where relative paths start; file: for messages."""

    folder: Path
    entries: Mapping[str, CatalogEntry] = field(default_factory=dict)
    file: Path | None = None

    def entry(self, name: str) -> CatalogEntry:
        """One entry. name: with or without `catalog:`.

        Raises:
            DataError: nothing has this name here.
        """
        name = name.removeprefix(CATALOG)
        if name not in self.entries:
            where = self.file or "the catalogue"
            raise DataError(
                f"{where} has no {name!r}", hint=nearest(name, self.entries) or "It is empty: add an entry."
            )
        return self.entries[name]

    def path(self, name: str) -> Path:
        """Where an entry lies, absolute.

        Raises:
            DataError: nothing has this name here.
        """
        return (self.folder / Path(self.entry(name).path).expanduser()).absolute()

    def paths(self) -> dict[str, str]:
        """Absolute path of every entry by name, without `catalog:`."""
        return {name: str(self.path(name)) for name in self.entries}

    def fingerprint(self, name: str, cache: FingerprintCache | None = None) -> Fingerprint:
        """What lies under a name now. cache: what was read before and has not changed is not read again.

        Raises:
            DataError: nothing has this name, it is not there, cannot be read, or changes while it is read.
        """
        plain, path = name.removeprefix(CATALOG), self.path(name)
        try:
            before = _stamp(path)
            known = cache.get(path, before.text) if cache is not None else None
            found = known if known is not None else digest_folder(path)
            changed = known is None and _stamp(path).text != before.text
        except OSError as error:
            hint = "Mend its path in the catalogue, or its rights."
            raise DataError(f"{CATALOG}{plain} cannot be read: {error.strerror}", hint=hint) from None
        if changed:
            raise DataError(f"{CATALOG}{plain} changes while it is read", hint="Catalogue a copy that stays as it is.")
        if cache is not None and known is None:
            cache.put(path, before.text, found)
        return Fingerprint(plain, found, before.files, before.size, self.entries[plain].records)


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a name stood for at one time. digest: SHA-256 as `core.canonical.digest_folder` gives it; size: bytes."""

    name: str
    digest: str
    files: int
    size: int
    records: int | None = None

    def as_dict(self) -> dict[str, str | int]:
        found: dict[str, str | int] = {
            "name": self.name,
            "digest": self.digest,
            "files": self.files,
            "bytes": self.size,
        }
        return found if self.records is None else {**found, "records": self.records}


@dataclass(frozen=True, slots=True)
class _Stamp:
    text: str
    files: int
    size: int


def _stamp(path: Path) -> _Stamp:
    """Names, sizes and times of change (nanoseconds) of all files: what tells that nothing was written since."""
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    if not files:
        os.stat(path)  # says why, when it is not there
        raise OSError(0, "there is no file in it")
    seen = [(one.relative_to(path).as_posix(), one.stat()) for one in files]
    lines = [[name, stat.st_size, stat.st_mtime_ns, stat.st_ino] for name, stat in seen]
    return _Stamp(digest(lines), len(files), sum(stat.st_size for _, stat in seen))


class FingerprintCache:
    """Digests of large data sets, kept in one file. A damaged or missing file only costs reading again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, list[str]] = {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        for key, value in found.items() if isinstance(found, dict) else ():
            if isinstance(value, list) and len(value) == 2 and all(isinstance(item, str) for item in value):
                self._known[key] = value

    def get(self, path: Path, stamp: str) -> str | None:
        """The digest of what lies at `path`, when it had this stamp."""
        known = self._known.get(str(path))
        return known[1] if known is not None and known[0] == stamp else None

    def put(self, path: Path, stamp: str, found: str) -> None:
        """Keep a digest.

        Raises:
            ConfigurationError: the cache's file cannot be written.
        """
        self._known[str(path)] = [stamp, found]
        text = json.dumps(self._known, indent=1, sort_keys=True)
        replace_file(self._path, text.encode("utf-8"))


EMPTY_CATALOG = Catalog(Path())
"""The catalogue of a party that has none."""


def load_catalog(path: Path) -> Catalog:
    """Read a catalogue.

    Raises:
        ConfigurationError: it cannot be read, or is wrong; all faults at once, each with file and line.
    """
    found = read_document(path, _CatalogFile, "the catalogue", hint=_HINT)
    return Catalog(path.absolute().parent, found.entries, path)


def local_catalog(base: Path, party: str) -> Catalog:
    """The catalogue of a party that is simulated on this machine: `catalog.PARTY.yaml`, else `catalog.yaml`, of `base`.

    Raises:
        ConfigurationError: the file that is there is wrong.
    """
    for path in (base / f"catalog.{party}.yaml", base / "catalog.yaml"):
        if path.is_file():
            return load_catalog(path)
    return Catalog(base)
