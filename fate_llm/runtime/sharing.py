"""What parties of one process share: the machine, turn by turn, and objects that nobody writes into."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

__all__ = ["Sharing"]

T = TypeVar("T")


class Sharing:
    """One per process. Every party's context has it."""

    def __init__(self) -> None:
        self._machine = threading.Lock()
        self._guard = threading.Lock()
        self._objects: dict[str, Any] = {}
        self._making: dict[str, threading.Lock] = {}

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the machine; others wait until it is released."""
        with self._machine:
            yield

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
