"""The peer's side of the simulation benchmark: Flower's apps for the same exchange, importable by its Ray workers.

A client keeps its model for as long as its worker process lives, which is kinder than its usual examples.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import _tiny_llama
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import get_peft_model_state_dict, set_peft_model_state_dict

__all__ = ["client_app", "main", "server_app"]

_SETTINGS: dict[str, Any] = {}
_ROUND_ENDS: list[float] = []

client_app = ClientApp()
server_app = ServerApp()


class _Timed(FedAvg):
    """Notes when the mean of each round is there. Nobody has to load it yet, as our side has to."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        result = super().aggregate_train(server_round, replies)
        _ROUND_ENDS.append(time.monotonic())
        return result


@client_app.train()  # type: ignore[untyped-decorator]
def train(message: Message, context: Any) -> Message:
    """Load the global adapter and send it back: no local step."""
    model = _tiny_llama.shared_model()
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    arrays = ArrayRecord(get_peft_model_state_dict(model))
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
    return Message(content=content, reply_to=message)


@server_app.main()  # type: ignore[untyped-decorator]
def serve(grid: Any, context: Any) -> None:
    parties = _SETTINGS["parties"]
    strategy = _Timed(fraction_evaluate=0.0, min_train_nodes=parties, min_available_nodes=parties)
    first = ArrayRecord(get_peft_model_state_dict(_tiny_llama.shared_model()))
    strategy.start(grid=grid, initial_arrays=first, num_rounds=_SETTINGS["rounds"])


def main() -> None:
    from flwr.simulation import run_simulation

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parties", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--cores", type=int, required=True)
    _SETTINGS.update(vars(parser.parse_args()))
    backend = {
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        "init_args": {"num_cpus": _SETTINGS["cores"]},
    }
    run_simulation(
        server_app=server_app,
        client_app=client_app,
        num_supernodes=_SETTINGS["parties"],
        backend_config=backend,
    )
    print(json.dumps({"round_ends": _ROUND_ENDS}))
