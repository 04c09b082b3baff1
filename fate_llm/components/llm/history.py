"""What happened round by round: losses as token means over all contributors, and the best state so far.

The evaluation of a round's state travels with the next round's contribution (or the closing sum), so that nothing
but sums of losses and counts of tokens leaves a party, inside the same protected sum as its update.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fate_llm.core.values import Array, Arrays
from fate_llm.protocols.tensors import read_tensors, write_tensors

from .training import Meter, RoundLog

__all__ = ["EarlyStopping", "History", "test_loss"]

Score = Callable[[], tuple[float, int]]
_STOPPING, _HISTORY = "stopping.json", "history.json"
_BEST, _PENDING = "best.safetensors", "evaluated.safetensors"


def test_loss(sums: Mapping[str, float]) -> float | None:
    """Token mean of the held-out loss in aggregated sums, or None when nobody evaluated."""
    tokens = sums.get("test_tokens", 0.0)
    return sums["test_loss_sum"] / tokens if tokens else None


@dataclass(slots=True)
class EarlyStopping:
    """Stop after `patience` evaluations in a row whose loss did not fall by `least`; patience 0: never.

    Satisfies `core.interfaces.Kept`.
    """

    patience: int
    least: float
    best: float = math.inf
    waited: int = 0

    def should_stop(self, sums: Mapping[str, float]) -> bool:
        """Take one round's aggregated sums; True when the rounds should end here."""
        loss = test_loss(sums)
        if not self.patience or loss is None:
            return False
        if loss < self.best - self.least:
            self.best, self.waited = loss, 0
        else:
            self.waited += 1
        return self.waited >= self.patience

    def save(self, folder: Path) -> None:
        _write_json(folder / _STOPPING, {"best": self.best.hex(), "waited": self.waited})

    def restore(self, folder: Path) -> None:
        found = _read_json(folder / _STOPPING)
        self.best, self.waited = float.fromhex(found["best"]), int(found["waited"])


@dataclass(slots=True)
class _Evaluated:
    number: int
    state: Arrays
    loss_sum: float
    tokens: int


@dataclass(slots=True)
class History:
    """One contributor's record of the rounds. rows: one per finished round; row 0 is the first state.

    Satisfies `core.interfaces.Kept`: the evaluation that has not been sent yet is kept with the rest.
    """

    rows: list[dict[str, Any]] = field(default_factory=lambda: [{"round": 0}])
    best_loss: float = math.inf
    best_round: int | None = None
    best_state: Arrays | None = None
    _evaluated: _Evaluated | None = None

    def evaluate(self, number: int, state: Arrays, score: Score) -> None:
        """Score the state of a round on this party's held-out records; the sums go out with the next contribution."""
        loss_sum, tokens = score()
        self._evaluated = _Evaluated(number, state, loss_sum, tokens)

    def to_send(self, local: Meter) -> dict[str, float]:
        """The additive numbers of the next contribution."""
        sums = {"train_loss_sum": local.loss_sum, "train_tokens": float(local.tokens)}
        if self._evaluated is not None:
            sums["test_loss_sum"] = self._evaluated.loss_sum
            sums["test_tokens"] = float(self._evaluated.tokens)
        return sums

    def finish_round(self, log: RoundLog) -> dict[str, Any]:
        """Note a finished round; returns its row. local_loss is this party's own, loss that of all contributors."""
        self.settle(log.sums)
        tokens = log.sums.get("train_tokens", 0.0)
        row: dict[str, Any] = {
            "round": log.number,
            "loss": round(log.sums["train_loss_sum"] / tokens, 6) if tokens else None,
            "local_loss": round(log.local.loss_sum / log.local.tokens, 6) if log.local.tokens else None,
            "tokens": log.local.tokens,
            "contributors": list(log.contributors),
        }
        self.rows.append(row)
        return row

    def settle(self, sums: Mapping[str, float]) -> None:
        """The aggregate of the evaluation sent last: note the test loss of its round, keep the best state."""
        loss, evaluated = test_loss(sums), self._evaluated
        self._evaluated = None
        if loss is None or evaluated is None:
            return
        for row in self.rows:
            if row["round"] == evaluated.number:
                row["test_loss"] = round(loss, 6)
        if loss < self.best_loss:
            self.best_loss, self.best_round, self.best_state = loss, evaluated.number, evaluated.state

    def save(self, folder: Path) -> None:
        evaluated = self._evaluated
        if self.best_state is not None:
            _write_state(folder / _BEST, self.best_state)
        if evaluated is not None:
            _write_state(folder / _PENDING, evaluated.state)
        found: dict[str, Any] = {"rows": self.rows, "best_loss": self.best_loss.hex(), "best_round": self.best_round}
        if evaluated is not None:
            found["evaluated"] = [evaluated.number, evaluated.loss_sum.hex(), evaluated.tokens]
        _write_json(folder / _HISTORY, found)

    def restore(self, folder: Path) -> None:
        found = _read_json(folder / _HISTORY)
        self.rows = found["rows"]
        self.best_loss, self.best_round = float.fromhex(found["best_loss"]), found["best_round"]
        self.best_state = _read_state(folder / _BEST) if self.best_round is not None else None
        self._evaluated = None
        if "evaluated" in found:
            number, loss_sum, tokens = found["evaluated"]
            self._evaluated = _Evaluated(number, _read_state(folder / _PENDING), float.fromhex(loss_sum), tokens)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value) + "\n", encoding="utf-8")


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_state(path: Path, state: Arrays) -> None:
    with path.open("wb") as stream:
        for part in write_tensors(state):
            stream.write(part)


def _read_state(path: Path) -> dict[str, Array]:
    return read_tensors(memoryview(path.read_bytes()))
