"""FedAvg: the global state moves by the weighted mean of the updates (McMahan et al. 2017, algorithm 1)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from fate_llm.core.interfaces import Frozen
from fate_llm.core.values import Arrays, Total, require_finite, require_same_layout

__all__ = ["PLUGIN", "FedAvg"]


class FedAvg:
    """Weighted mean of the parties' differences, times a server learning rate (1.0 is plain FedAvg)."""

    needs_plaintext: ClassVar[bool] = False

    class Params(Frozen):
        server_learning_rate: float = Field(default=1.0, gt=0, le=10, description="Factor on the mean difference.")

    def __init__(self, params: Params | None = None) -> None:
        self._rate = np.float32((params or self.Params()).server_learning_rate)

    def step(self, state: Arrays, total: Total) -> Arrays:
        require_same_layout(state, total.mean, what="fedavg")
        require_finite(total.mean, what="fedavg")
        return {name: np.asarray(value + self._rate * total.mean[name]) for name, value in state.items()}


PLUGIN = FedAvg
