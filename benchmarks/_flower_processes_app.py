"""Flower's side of an echo round between processes: what `_flower_processes.py` packs and its SuperLink runs.

The server sends the same arrays to two nodes and has theirs back as numpy arrays; nobody computes anything.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

__all__ = ["client_app", "server_app"]

client_app = ClientApp()
server_app = ServerApp()


@client_app.train()  # type: ignore[untyped-decorator]
def echo(message: Message, context: Context) -> Message:
    arrays = message.content["arrays"].to_numpy_ndarrays()
    return Message(content=RecordDict({"arrays": ArrayRecord(arrays)}), reply_to=message)


@server_app.main()  # type: ignore[untyped-decorator]
def serve(grid: Grid, context: Context) -> None:
    """Time every round; write {"seconds": [...]} where the run's settings say."""
    settings = context.run_config
    tensors, size = int(settings["tensors"]), int(settings["size"])
    draw = np.random.default_rng(1)
    state = [draw.standard_normal(size // 4 // tensors, dtype=np.float32) for _ in range(tensors)]
    while len(nodes := list(grid.get_node_ids())) < int(settings["parties"]):
        time.sleep(0.5)
    seconds = [_round(grid, nodes, state) for _ in range(int(settings["rounds"]))]
    Path(str(settings["answer"])).write_text(json.dumps({"seconds": seconds}))


def _round(grid: Grid, nodes: list[int], state: list[Any]) -> float:
    started = time.monotonic()
    record = RecordDict({"arrays": ArrayRecord(state)})
    messages = [Message(content=record, dst_node_id=node, message_type=MessageType.TRAIN) for node in nodes]
    replies = [reply.content["arrays"].to_numpy_ndarrays() for reply in grid.send_and_receive(messages)]
    seconds = time.monotonic() - started
    for reply in replies:
        if not all(np.array_equal(back, sent) for back, sent in zip(reply, state, strict=True)):
            raise ValueError("a node sent other arrays back")
    if len(replies) != len(nodes):
        raise ValueError(f"{len(replies)} of {len(nodes)} nodes answered")
    return seconds
