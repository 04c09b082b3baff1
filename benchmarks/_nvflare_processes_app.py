"""NVFlare's side of an echo round, at the server: a controller that sends arrays and waits for them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.workflows.model_controller import ModelController

__all__ = ["EchoRounds"]


class EchoRounds(ModelController):  # type: ignore[misc]
    """Time every round; write {"seconds": [...]} to `answer`."""

    def __init__(self, answer: str, parties: int, rounds: int, size: int, tensors: int) -> None:
        super().__init__()
        self.answer = answer
        self.parties = parties
        self.rounds = rounds
        self.size = size
        self.tensors = tensors

    def run(self) -> None:
        draw = np.random.default_rng(1)
        each = self.size // 4 // self.tensors
        state = {f"tensor-{n}": draw.standard_normal(each, dtype=np.float32) for n in range(self.tensors)}
        seconds = []
        for number in range(self.rounds):
            started = time.monotonic()
            model = FLModel(params=state, current_round=number, total_rounds=self.rounds)
            replies = self.send_model_and_wait(task_name="train", data=model, min_responses=self.parties)
            seconds.append(time.monotonic() - started)
            if len(replies) != self.parties:
                raise ValueError(f"{len(replies)} of {self.parties} sites answered")
            for reply in replies:
                if not all(np.array_equal(reply.params[name], sent) for name, sent in state.items()):
                    raise ValueError("a site sent other arrays back")
        Path(self.answer).write_text(json.dumps({"seconds": seconds}))
