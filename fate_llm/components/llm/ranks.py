"""Several ranks of one party: the same trainer in every process, and one of them that talks to the federation.

`torchrun` starts the processes and says in their environment who they are. Rank 0 has the link, the channel and the
journal; the others take from it what the federation answers.

Rules:
1. Every rank makes the same calls in the same order. What rank 0 alone knows is shared by one function (`share`):
   first whether it went well, then the numbers as JSON, then all tensors as one flat tensor.
2. Rank 0 waits for others, for hours perhaps, and the ranks with it: no wait between ranks runs out before that.
   A rank that dies ends all of them (torchrun sees to it).
3. With one rank nothing of this is there: no process group, no copy, the federation's own rounds.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from fate_llm.core.errors import ConfigurationError, JobCancelled
from fate_llm.core.interfaces import Context, ContributorRound, ContributorRounds, Kept, UpdateHook
from fate_llm.core.values import Array, Arrays, RoundResult

from .templates import Encoded

__all__ = ["DEEPSPEED", "PATIENCE", "RankedRounds", "Ranks", "World", "deepspeed_settings", "split_batch", "world"]

DEEPSPEED = "FATE_LLM_DEEPSPEED"  # environment: the party's own DeepSpeed configuration as JSON; see runtime.launch
PATIENCE = timedelta(days=30)
_NEWS = 10.0  # seconds in which a rank's death is known at rank 0, see runtime.launch
Fields = dict[str, Any]


@dataclass(frozen=True, slots=True)
class World:
    """Who this process is among the ranks of its party."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


def world(environment: Mapping[str, str] = os.environ) -> World:
    """What torchrun says; a world of one where nobody says anything.

    Raises:
        ConfigurationError: RANK, WORLD_SIZE and LOCAL_RANK do not fit together.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    texts = [environment.get(name, default) for name, default in zip(names, ("0", "1", "0"), strict=True)]
    if not all(text.isdecimal() for text in texts) or int(texts[0]) >= int(texts[1]):
        found = ", ".join(f"{name}={text}" for name, text in zip(names, texts, strict=True))
        raise ConfigurationError(f"the environment says {found}", hint="Start several ranks with torchrun.")
    rank, size, local = (int(text) for text in texts)
    return World(rank, size, local)


def deepspeed_settings(environment: Mapping[str, str] = os.environ) -> dict[str, Any] | None:
    """The party's DeepSpeed configuration, or None."""
    text = environment.get(DEEPSPEED)
    if not text:
        return None
    found: dict[str, Any] = json.loads(text)
    return found


def split_batch(batch_size: int, accumulation: int, ranks: int) -> tuple[int, int]:
    """(records of a forward pass of all ranks, forward passes of an optimizer step): the same records in every step.

    Raises:
        ConfigurationError: neither can be divided among the ranks.
    """
    if batch_size % ranks == 0:
        return batch_size, accumulation
    if accumulation % ranks == 0:
        return batch_size * ranks, accumulation // ranks
    raise ConfigurationError(
        f"neither batch_size {batch_size} nor gradient_accumulation {accumulation} can be divided by {ranks} ranks",
        hint="Choose `launch.nproc` of this party so that it divides one of them.",
    )


class Ranks:
    """The ranks of this party, as a component sees them."""

    def __init__(self, world: World) -> None:
        self.world = world

    @property
    def first(self) -> bool:
        """Whether this rank talks to the federation and writes what is kept."""
        return self.world.rank == 0

    def join(self, device: str) -> None:
        """Meet the other ranks; once in a process. device: `cpu` or `cuda`."""
        if self.world.size == 1:
            return
        import torch

        if device == "cuda":
            torch.cuda.set_device(self.world.local_rank)
        if not torch.distributed.is_initialized():
            backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
            torch.distributed.init_process_group(backend, timeout=PATIENCE)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Where ranks compute. One that is killed breaks what the others share, and rank 0's process is ended for it.

        What broke here is then no error of the job: the error waits until it is known that no rank was killed.
        """
        try:
            yield
        except RuntimeError:  # what torch raises when a peer is gone
            if self.world.size > 1:
                time.sleep(_NEWS)
            raise

    def trainer_arguments(self, deepspeed: Mapping[str, Any] | None) -> dict[str, Any]:
        """What the Trainer must know: a batch is cut among the ranks, so that a step sees the records of one rank."""
        found: dict[str, Any] = {} if deepspeed is None else {"deepspeed": dict(deepspeed)}
        if self.world.size > 1:
            found |= {"accelerator_config": {"split_batches": True}, "ddp_timeout": int(PATIENCE.total_seconds())}
        return found

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.total([0.0])

    def total(self, values: Sequence[float]) -> list[float]:
        """The sums over all ranks, the same at each."""
        if self.world.size == 1:
            return list(values)
        import torch

        tensor = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(tensor)
        return [float(value) for value in tensor]

    def share(self, make: Callable[[], tuple[Fields, Arrays]]) -> tuple[Fields, Arrays]:
        """What rank 0 makes, at every rank. Arrays are float32.

        Raises:
            JobCancelled: at the other ranks, when rank 0 failed; rank 0 raises its own error.
        """
        if self.world.size == 1:
            return make()
        return self._lead(make) if self.first else self._follow()

    def _lead(self, make: Callable[[], tuple[Fields, Arrays]]) -> tuple[Fields, Arrays]:
        done = False
        try:
            fields, arrays = make()
            done = True
        finally:
            if not done:
                _broadcast_sizes([0, 0, 0])
        layout = [[name, list(value.shape)] for name, value in arrays.items()]
        text = np.frombuffer(json.dumps({"fields": fields, "layout": layout}).encode("utf-8"), dtype=np.uint8)
        flat = np.concatenate([np.ravel(value) for value in arrays.values()] or [np.empty(0, np.float32)])
        _broadcast_sizes([1, text.size, flat.size])
        _broadcast(text.copy())
        _broadcast(np.ascontiguousarray(flat, dtype=np.float32))
        return fields, arrays

    def _follow(self) -> tuple[Fields, Arrays]:
        done, length, count = _broadcast_sizes([0, 0, 0])
        if not done:
            raise JobCancelled("rank 0 of this party has ended; its own error says why")
        news = json.loads(_broadcast(np.empty(length, np.uint8)).tobytes())
        flat = _broadcast(np.empty(count, np.float32))
        arrays: dict[str, Array] = {}
        for name, shape in news["layout"]:
            size = int(np.prod(shape, dtype=np.int64))
            arrays[name], flat = flat[:size].reshape(shape), flat[size:]
        return news["fields"], arrays

    def same_random_state(self) -> None:
        """Every rank goes on with the random state of rank 0: where a sampler draws from it, all draw alike."""
        if self.world.size == 1:
            return
        import torch

        torch.set_rng_state(torch.from_numpy(_broadcast(torch.get_rng_state().numpy().copy())))

    def portion(self, rows: Sequence[Encoded]) -> Sequence[Encoded]:
        """This rank's part of the rows, as many as any other's: rows without a label fill up what is missing."""
        if self.world.size == 1:
            return rows
        mine = list(rows[self.world.rank :: self.world.size])
        if len(mine) * self.world.size < len(rows) + self.world.size - 1 and len(mine) < -(
            -len(rows) // self.world.size
        ):
            mine.append({**rows[0], "labels": [-100] * len(rows[0]["labels"])})
        return mine

    def contributor_rounds(
        self,
        ctx: Context,
        count: int,
        *,
        protection: str,
        protection_params: Mapping[str, Any],
        hooks: Sequence[UpdateHook],
        keep: Mapping[str, Kept],
    ) -> ContributorRounds:
        """The federation's rounds, for all ranks."""
        alone = self.world.size == 1
        noted = {} if alone else {name: _Noted(kept) for name, kept in keep.items()}
        rounds = ctx.contributor_rounds(
            count,
            protection=protection,
            protection_params=protection_params,
            hooks=hooks,
            keep=keep if alone else noted,
        )
        return rounds if alone else RankedRounds(rounds, self, noted)


def _broadcast(values: Array) -> Array:
    """Rank 0's values into everyone's, in place."""
    import torch

    if values.size:
        torch.distributed.broadcast(torch.from_numpy(values), src=0)
    return values


def _broadcast_sizes(sizes: Sequence[int]) -> list[int]:
    return [int(value) for value in _broadcast(np.array(sizes, dtype=np.int64))]


class _Noted:
    """Something kept, and the folder that it was restored from: the other ranks restore theirs from the same one."""

    def __init__(self, kept: Kept) -> None:
        self.kept = kept
        self.folder: Path | None = None

    def save(self, folder: Path) -> None:
        self.kept.save(folder)

    def restore(self, folder: Path) -> None:
        self.folder = folder
        self.kept.restore(folder)


class RankedRounds:
    """Satisfies `core.interfaces.ContributorRounds` at every rank; only rank 0's real rounds are used."""

    def __init__(self, rounds: ContributorRounds, ranks: Ranks, keep: Mapping[str, _Noted]) -> None:
        self._rounds = rounds
        self._ranks = ranks
        self._keep = keep
        self.journals = False
        self.resumed = 0

    def start(self, state: Arrays) -> Arrays:
        def make() -> tuple[Fields, Arrays]:
            agreed = self._rounds.start(state)
            folders = {name: str(noted.folder) for name, noted in self._keep.items() if noted.folder is not None}
            return {"journals": self._rounds.journals, "resumed": self._rounds.resumed, "folders": folders}, agreed

        fields, agreed = self._ranks.share(make)
        self.journals, self.resumed = fields["journals"], fields["resumed"]
        if not self._ranks.first:
            for name, folder in fields["folders"].items():
                self._keep[name].restore(Path(folder))
        return agreed

    def __iter__(self) -> Iterator[ContributorRound]:
        inner = iter(self._rounds) if self._ranks.first else iter(())
        current: list[ContributorRound] = []

        def make() -> tuple[Fields, Arrays]:
            current[:] = [found] if (found := next(inner, None)) is not None else []
            return {"number": current[0].number if current else None}, {}

        while True:
            self._ranks.barrier()  # every rank has written its part of the checkpoint that is kept now
            fields, _ = self._ranks.share(make)
            if fields["number"] is None:
                return
            yield _RankedRound(self._ranks, fields["number"], current[0] if current else None)


@dataclass(slots=True)
class _RankedRound:
    _ranks: Ranks
    number: int
    _real: ContributorRound | None

    def contribute(self, arrays: Arrays, *, weight: float, sums: Mapping[str, float] | None = None) -> RoundResult:
        def make() -> tuple[Fields, Arrays]:
            assert self._real is not None
            found = self._real.contribute(arrays, weight=weight, sums=sums)
            fields = {"number": found.number, "sums": dict(found.sums), "stop": found.stop}
            return {**fields, "contributors": list(found.contributors)}, found.state

        fields, state = self._ranks.share(make)
        return RoundResult(state, fields["number"], fields["sums"], tuple(fields["contributors"]), fields["stop"])
