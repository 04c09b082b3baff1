"""Clip: scales an update down so that its Euclidean norm over all parameters is at most a bound.

The party clips its own update before it leaves; no message changes the bound.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import numpy as np
from pydantic import Field

from fate_llm.core.interfaces import Frozen, HookStage
from fate_llm.core.values import Total, Update

__all__ = ["PLUGIN", "Clip", "l2_norm"]


def l2_norm(update: Update) -> float:
    """Euclidean norm over all arrays, accumulated in float64."""
    return math.sqrt(sum(float(np.sum(np.square(a, dtype=np.float64))) for a in update.arrays.values()))


class Clip:
    """Bounds the norm of what a party sends: one odd batch cannot drag the others' model."""

    stage: ClassVar[HookStage] = HookStage.CLIP

    class Params(Frozen):
        norm: float = Field(gt=0, description="Largest Euclidean norm of an update over all its parameters.")

    def __init__(self, params: Params) -> None:
        self._norm = params.norm

    def before_send(self, update: Update, round_number: int) -> Update:
        norm = l2_norm(update)
        if norm <= self._norm:
            return update
        scale = np.float32(self._norm / norm * (1 - 2**-22))  # rounding never leads above the bound
        return replace(update, arrays={name: np.asarray(array * scale) for name, array in update.arrays.items()})

    def after_sum(self, total: Total, round_number: int) -> Total:
        return total


PLUGIN = Clip
