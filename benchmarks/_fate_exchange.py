"""A component that exchanges the quickstart's adapter and trains nothing: what is left of its rounds is the federation.

The benchmark makes it known the way any plug-in of a third party is: by an entry point of an installed package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from fate_llm.core.interfaces import Context, Estimate, Frozen, Keep, PlanView, Port, PredictRule
from fate_llm.core.values import Array

__all__ = ["PLUGIN", "Exchange", "adapter"]

_RANK, _LAYERS = 8, 30
_SHAPES = {  # SmolLM2-135M: (inputs, outputs) of the projections that the quickstart adapts
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (576, 192),
    "self_attn.v_proj": (576, 192),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (576, 1536),
    "mlp.up_proj": (576, 1536),
    "mlp.down_proj": (1536, 576),
}


def adapter() -> dict[str, Array]:
    """420 tensors, 2.4 million float32 values, by the names of the real ones."""
    draw = np.random.default_rng(7)
    found: dict[str, Array] = {}
    for layer in range(_LAYERS):
        for projection, (inputs, outputs) in _SHAPES.items():
            name = f"base_model.model.model.layers.{layer}.{projection}"
            found[f"{name}.lora_A.weight"] = draw.standard_normal((_RANK, inputs), dtype=np.float32)
            found[f"{name}.lora_B.weight"] = draw.standard_normal((outputs, _RANK), dtype=np.float32)
    return found


class Exchange:
    """Rounds without local steps: every party sends its update and has the mean of all."""

    class Params(Frozen):
        rounds: int = Field(ge=1, description="How often the parties' updates are averaged.")

    inputs: ClassVar[Mapping[str, Port]] = {}
    outputs: ClassVar[Mapping[str, Port]] = {}
    predict_rule: ClassVar[PredictRule] = Keep()

    def needs_experiment(self, params: Any) -> str | None:
        return None

    def estimate(self, view: PlanView) -> Estimate:
        return Estimate()

    def guest(self, ctx: Context) -> None:
        rounds = ctx.contributor_rounds(ctx.params.rounds, protection="plain")
        state = rounds.start(adapter())
        for round in rounds:
            update = {name: 0.1 * value for name, value in state.items()}
            state = round.contribute(update, weight=1.0).state
            ctx.emit("loaded", round=round.number)

    host = guest

    def arbiter(self, ctx: Context) -> None:
        from fate_llm.components.aggregators.fedavg import PLUGIN as FedAvg

        aggregator = FedAvg(FedAvg.Params())
        rounds = ctx.coordinator_rounds(ctx.params.rounds, protection="plain")
        state = rounds.start()
        for round in rounds:
            state = aggregator.step(state, round.collect())
            round.publish(state)


PLUGIN = Exchange
