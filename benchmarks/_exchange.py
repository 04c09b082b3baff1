"""A component that exchanges adapters and trains nothing: our side of the simulation benchmark.

The benchmark makes it known the way any plug-in of a third party is: by an entry point of an installed package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import _tiny_llama
from pydantic import Field

from fate_llm.components.llm.adapters import Trainable
from fate_llm.components.llm.models import own_tree
from fate_llm.core.interfaces import Context, Estimate, Frozen, Keep, PlanView, Port, PredictRule

__all__ = ["PLUGIN", "Exchange"]


class Exchange:
    """Rounds without local steps: every party sends its difference to the mean, and loads the new mean."""

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
        with ctx.turn():
            base = ctx.shared("tiny", _tiny_llama.base)
            trainable = Trainable(_tiny_llama.adapted(own_tree(base)))
        rounds = ctx.contributor_rounds(ctx.params.rounds, protection="plain")
        state = rounds.start(trainable.read())
        trainable.load(state)
        for round in rounds:
            with ctx.turn():
                update = trainable.difference(state)
            state = round.contribute(update, weight=1.0).state
            with ctx.turn():
                trainable.load(state)
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
