"""One round of Flower's SecAgg+ in this process: its workflow at the server, its mod at every client, no network.

Runs in an environment of its own, with flwr and numpy only. The last line printed is a JSON object: the CPU seconds of
each client (in the mod, without what makes its update) and of the server (in the workflow, without the clients), the
bytes of what each client sends and receives, and how the round ended.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.compat.common import recorddict_compat as compat
from flwr.server import LegacyContext, ServerConfig, SimpleClientManager
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.supercore.task_identity import TaskIdentity

STAGES = ("setup", "share_keys", "collect_masked_vectors", "unmask")
_WIDTH, _TENSORS = 1000, 10


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parties", type=int, required=True)
    parser.add_argument("--parameters", type=int, required=True)
    parser.add_argument("--threshold", type=int, required=True)
    parser.add_argument("--largest-weight", type=float, required=True)
    parser.add_argument("--silent", choices=STAGES, help="one client does not answer in this stage nor after it")
    return parser.parse_args()


class Clients:
    """Stands where the grid would be: hands each message to its client's mod, and its answer back."""

    def __init__(self, parties: int, parameters: int, silent: str | None) -> None:
        draw = np.random.default_rng(7)
        self._values = draw.normal(0.0, 0.02, parameters + parties).astype(np.float32)
        self._parameters = parameters
        self._silent = silent
        self._contexts = {node: Context(1, node, {}, RecordDict(), {}) for node in range(1, parties + 1)}
        self._lost: set[int] = set()
        self.seconds = dict.fromkeys(self._contexts, 0.0)
        self.spent = 0.0  # CPU seconds of everything here, which are not the server's
        self.sent = dict.fromkeys(self._contexts, 0)
        self.content = dict.fromkeys(self._contexts, 0)
        self._elsewhere = 0.0

    def send_and_receive(self, messages: list[Message], *, timeout: float | None = None) -> list[Message]:
        started = time.thread_time()
        answers = [answer for message in messages if (answer := self._ask(message)) is not None]
        self.spent += time.thread_time() - started
        return answers

    def _ask(self, message: Message) -> Message | None:
        node = message.metadata.dst_node_id
        stage = message.content.config_records[RECORD_KEY_CONFIGS][Key.STAGE]
        if stage == self._silent and node == len(self._contexts):
            self._lost.add(node)
        if node in self._lost:
            return None
        message.content = self._over_the_wire(node, message.content)
        self._elsewhere = 0.0
        started = time.thread_time()
        answer = secaggplus_mod(message, self._contexts[node], self._train)
        self.seconds[node] += time.thread_time() - started - self._elsewhere
        before = self.content[node]
        answer.content = self._over_the_wire(node, answer.content)
        self.sent[node] += self.content[node] - before
        return answer

    def _over_the_wire(self, node: int, content: RecordDict) -> RecordDict:
        """What the other side has of it: a copy."""
        packed = recorddict_to_proto(content)
        self.content[node] += packed.ByteSize() - _model_bytes(content)
        return recorddict_from_proto(packed)

    def update(self, node: int) -> list[Any]:
        flat = self._values[node - 1 : node - 1 + self._parameters]
        return list(flat.reshape(_TENSORS, -1, _WIDTH))

    def _train(self, message: Message, context: Context) -> Message:
        """What a client would train: made beforehand, so its time does not count."""
        started = time.thread_time()
        status = Status(Code.OK, "")
        fit = FitRes(status, ndarrays_to_parameters(self.update(context.node_id)), weight_of(context.node_id), {})
        answer = Message(compat.fitres_to_recorddict(fit, False), reply_to=message)
        self._elsewhere += time.thread_time() - started
        return answer

    def exact(self, nodes: list[int], places: Any) -> Any:
        weights = [weight_of(node) for node in nodes]
        terms = [w * self._values[places + node - 1].astype(np.float64) for w, node in zip(weights, nodes, strict=True)]
        return sum(terms) / sum(weights)


def _model_bytes(content: RecordDict) -> int:
    """Of the global model that the server's message carries along: no part of the protocol."""
    only = RecordDict(dict(content.array_records.items()))
    return int(recorddict_to_proto(only).ByteSize()) if content.array_records else 0


def weight_of(node: int) -> int:
    return 999 + node


class Kept(FedAvg):
    """Keeps what the sum was."""

    mean: Any = None
    contributors: int = 0

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        self.mean, self.contributors = results[0][1].parameters, len(results)
        return None, {}


def legacy_context(options: argparse.Namespace, strategy: Kept) -> LegacyContext:
    manager = SimpleClientManager()
    for node in range(1, options.parties + 1):
        manager.register(GridClientProxy(node, None, 1))  # type: ignore[arg-type]
    state = RecordDict(
        {"parameters": ArrayRecord([np.zeros(1, np.float32)]), "config": ConfigRecord({"current_round": 1})}
    )
    return LegacyContext(Context(1, 0, {}, state, {}), ServerConfig(num_rounds=1), strategy, manager)


def main() -> None:
    options = arguments()
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1  # messages are made in a task of a run
    logging.getLogger("flwr").setLevel(logging.ERROR)
    clients = Clients(options.parties, options.parameters, options.silent)
    strategy = Kept(min_fit_clients=options.parties, min_available_clients=options.parties)
    workflow = SecAggPlusWorkflow(
        1.0, options.threshold, max_weight=options.largest_weight, clipping_range=1.0, timeout=None
    )
    context = legacy_context(options, strategy)
    ended, started = "with a sum", time.thread_time()
    try:
        workflow(clients, context)  # type: ignore[arg-type]
    except Exception as error:  # boundary: whatever it fails with is what is reported
        ended = f"with {type(error).__name__}: {error}"[:200]
    seconds = time.thread_time() - started - clients.spent
    error = None
    if strategy.mean is not None:
        error = error_of(clients, strategy, options)
    elif ended == "with a sum":
        ended = "without a sum"
    found = {"client_seconds": clients.seconds, "server_seconds": seconds, "ended": ended, "error": error}
    print(json.dumps({**found, "sent": clients.sent, "content": clients.content}))


def error_of(clients: Clients, strategy: Kept, options: argparse.Namespace) -> float:
    """The largest error of every 97th value."""
    from flwr.common import parameters_to_ndarrays

    places = np.arange(0, options.parameters, 97)
    flat = np.concatenate([array.reshape(-1) for array in parameters_to_ndarrays(strategy.mean)])
    nodes = list(range(1, strategy.contributors + 1))
    return float(np.abs(flat[places] - clients.exact(nodes, places)).max())


if __name__ == "__main__":
    main()
