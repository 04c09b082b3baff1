"""Coordinate-wise median: robust to fewer than half of the parties, and so needs to see each update.

Yin et al. 2018, "Byzantine-Robust Distributed Learning", definition 1. Weights are not used: a liar would
choose them.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from fate_llm.core.errors import ProtectionError
from fate_llm.core.interfaces import Frozen
from fate_llm.core.values import Arrays, Total, require_finite, require_same_layout

__all__ = ["PLUGIN", "Median"]


class Median:
    """The median of the parties' differences, value by value (of an even number: the middle mean)."""

    needs_plaintext: ClassVar[bool] = True

    class Params(Frozen):
        pass

    def __init__(self, params: Params | None = None) -> None:
        self._params = params or self.Params()

    def step(self, state: Arrays, total: Total) -> Arrays:
        if not total.terms:
            raise ProtectionError("median needs every party's update, and the protection shows only their sum")
        updates = [total.terms[party].arrays for party in total.contributors]
        for party, arrays in zip(total.contributors, updates, strict=True):
            require_same_layout(state, arrays, what=f"median, update of {party}")
            require_finite(arrays, what=f"median, update of {party}")
        return {
            name: np.asarray(value + np.median(np.stack([u[name] for u in updates]), axis=0).astype(np.float32))
            for name, value in state.items()
        }


PLUGIN = Median
