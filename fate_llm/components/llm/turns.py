"""Turns: parties of one process compute one after the other, each with random state of its own.

accelerate's state and the generators of Python, NumPy and torch are global to a process. A party that takes a turn
finds its own random state, whatever the others drew, so that the result is that of a process of its own.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fate_llm.core.interfaces import Context

__all__ = ["Turns"]


class Turns:
    """One party's turns in one task. seed: 31 bits, where its random state starts."""

    def __init__(self, ctx: Context, seed: int) -> None:
        self._ctx = ctx
        self._seed: int | None = seed
        self._state: tuple[Any, ...] = ()

    @contextmanager
    def take(self) -> Iterator[None]:
        """Hold the machine and this party's random state."""
        with self._ctx.turn():
            outside = _random_state()
            if self._seed is not None:
                _seed_all(self._seed)
                self._seed = None
            else:
                _restore(self._state)
            try:
                yield
            finally:
                _release_threads()
                self._state = _random_state()
                _restore(outside)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Inside `take`: let others compute while this party waits; its random state waits with it."""
        mine = _random_state()
        _release_threads()
        try:
            with self._ctx.pause_turn():
                yield
        finally:
            _restore(mine)


@cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP library that torch has loaded, where it is GNU's."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = [line.split(maxsplit=5)[5] for line in lines if "libgomp" in line]
    return ctypes.CDLL(paths[0]) if paths else None


def _release_threads() -> None:
    """End the worker threads that computed for this thread; they come back when it computes again.

    Every thread has workers of its own. When all parties' workers together outnumber the cores, GNU's OpenMP lets
    them sleep between any two operations, and a training step takes up to twice as long.
    """
    library = _openmp()
    if library is not None and hasattr(library, "omp_pause_resource_all"):
        library.omp_pause_resource_all(ctypes.c_int(1))  # omp_pause_soft


def _random_state() -> tuple[Any, ...]:
    import torch

    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _restore(state: tuple[Any, ...]) -> None:
    import torch

    python, numpy, cpu, cuda = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)


def _seed_all(seed: int) -> None:
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
