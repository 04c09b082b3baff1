"""Files under one URL: on this party's disk, or wherever an fsspec plug-in reaches.

A file appears under its name whole or not at all: it is written beside, and renamed. On disk it is flushed before
that, so it is there after a power cut too.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

import fsspec  # type: ignore[import-untyped]
from fsspec.core import url_to_fs  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

from fate_llm.core.errors import ConfigurationError, MissingExtra, StoreLost

__all__ = ["BLOCK", "Files", "blocks_of"]

BLOCK = 1024 * 1024
"""Bytes that are read or written at once."""

_PARTIAL = "partial"


class Files:
    """Files by relative name. unique: gives a name that nobody has used, for what is being written.

    Raises:
        ConfigurationError: no such kind of place, or a folder that cannot be made. MissingExtra: its plug-in is not
            installed.
    """

    def __init__(self, url: str, *, unique: Callable[[], str]) -> None:
        self.shown = _without_password(url)
        self._unique = unique
        scheme = url.partition("://")[0] if "://" in url else "file"
        try:
            self._fs, root = url_to_fs(url)
        except ImportError as error:
            raise MissingExtra(
                f"artifacts in {scheme}:// need an fsspec plug-in that is not installed: {error}",
                hint="Install the package that the message names beside fate_llm.",
            ) from None
        except ValueError:
            known = ", ".join(sorted(fsspec.available_protocols())[:60])
            raise ConfigurationError(f"artifacts cannot be in {scheme}://", hint=f"fsspec knows {known}") from None
        self._root = str(root).rstrip("/")
        self._local = isinstance(self._fs, LocalFileSystem)
        if not self._local and set(self._root) & set("*?["):
            raise ConfigurationError(f"the place of artifacts {self.shown} holds one of * ? [", hint="Rename it.")
        if self._local:
            with self._explained():
                Path(self._root).mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """Read a file.

        Raises:
            FileNotFoundError: it is not there. StoreLost: the place cannot be read.
        """
        with self._explained(), self._fs.open(self._path(name), "rb") as stream:
            yield cast(BinaryIO, stream)

    def exists(self, name: str) -> bool:
        with self._explained():
            return bool(self._fs.exists(self._path(name)))

    def write(self, name: str, blocks: Iterable[bytes]) -> str:
        """Write a file, replacing one of that name. Returns the SHA-256 (64 hex digits) of what was written."""
        partial, final = self._path(f"{_PARTIAL}/{self._unique()}"), self._path(name)
        seen = hashlib.sha256()
        with self._explained():
            for path in (partial, final):
                self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            try:
                with self._fs.open(partial, "wb") as stream:
                    for block in blocks:
                        seen.update(block)
                        stream.write(block)
                    if self._local:
                        stream.flush()
                        os.fsync(stream.fileno())
                self._rename(partial, final)
            # The boundary of a file: nothing half-written stays, whatever it was.
            except BaseException:
                with contextlib.suppress(OSError):
                    self._fs.rm_file(partial)
                raise
        return seen.hexdigest()

    def _rename(self, partial: str, final: str) -> None:
        if not self._local:
            self._fs.mv(partial, final)
            return
        os.replace(partial, final)
        folder = os.open(final.rpartition("/")[0], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def names(self, folder: str) -> list[tuple[str, int]]:
        """(name, bytes) of all files below a folder, sorted."""
        self._fs.invalidate_cache()
        top = self._path(folder)
        with self._explained():
            if not self._fs.exists(top):
                return []
            found = self._fs.find(top, detail=True)
        return sorted((path[len(top) - len(folder) :], int(info["size"] or 0)) for path, info in found.items())

    def remove(self, name: str) -> None:
        """Remove a file; one that is not there is fine."""
        with self._explained(), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def clear_partial(self) -> None:
        """Remove what was being written when a process died."""
        for name, _ in self.names(_PARTIAL):
            self.remove(name)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """What the place refuses, in words."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StoreLost(
                f"the artifacts in {self.shown} cannot be used: {error.strerror or error}",
                hint="Make room there, or make it reachable and writable; nothing half-written was left.",
            ) from None


def blocks_of(path: Path) -> Iterator[bytes]:
    """The bytes of a file of this machine; a link is not followed."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as stream:
        while block := stream.read(BLOCK):
            yield block


def _without_password(url: str) -> str:
    return re.sub(r"(?<=://)[^/]*@", "***@", url)
