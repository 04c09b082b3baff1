"""What parties on one machine share: the machine itself, turn by turn, and objects that nobody writes into."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["FileSlot", "Sharing"]

T = TypeVar("T")


class FileSlot:
    """A lock on a file: held by one thread of one process at a time, and released with the process, however it ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = threading.Lock()
        self._file: int | None = None

    def acquire(self) -> bool:
        """Wait for the lock."""
        self._thread.acquire()
        try:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(file, fcntl.LOCK_EX)
            self._file = file
        finally:
            if self._file is None:
                self._thread.release()
        return True

    def release(self) -> None:
        """Give the lock back; only who has it may."""
        if self._file is None:
            raise RuntimeError("the slot is not held")
        file, self._file = self._file, None
        os.close(file)
        self._thread.release()


class Sharing:
    """One per process. Every party's context has it.

    slot: whose holder may compute; by default among the threads of this process, a FileSlot among processes.
    """

    def __init__(self, slot: FileSlot | None = None) -> None:
        self._machine: FileSlot | threading.Lock = slot or threading.Lock()
        self._guard = threading.Lock()
        self._objects: dict[str, Any] = {}
        self._making: dict[str, threading.Lock] = {}

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the machine; others wait until it is released."""
        self._machine.acquire()
        try:
            yield
        finally:
            self._machine.release()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Inside `turn`: give the machine away, and take it back at the end."""
        self._machine.release()
        try:
            yield
        finally:
            self._machine.acquire()

    def shared(self, key: str, factory: Callable[[], T]) -> T:
        """The object of this key, made by the first caller; others wait for it. A failed making is tried again."""
        with self._guard:
            making = self._making.setdefault(key, threading.Lock())
        with making:
            if key not in self._objects:
                made = factory()
                with self._guard:
                    self._objects[key] = made
        found: T = self._objects[key]
        return found
