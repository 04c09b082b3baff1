"""Turns: parties of one process compute one after the other, each with random state of its own.

accelerate's state and the generators of Python, NumPy and torch are global to a process. A party that takes a turn
finds its own random state, whatever the others drew, so that the result is that of a process of its own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
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
                self._state = _random_state()
                _restore(outside)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Inside `take`: let others compute while this party waits; its random state waits with it."""
        mine = _random_state()
        try:
            with self._ctx.pause_turn():
                yield
        finally:
            _restore(mine)


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
