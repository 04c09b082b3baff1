"""One contributor in a federation that is made up, with a journal on disk, and killed wherever a test wants it.

The federation's answer to a round is a function of the round and of the first update it got for it, and it stays what
it was: an update that is sent again after a kill must be the same, bit for bit, or the test fails.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from fate_llm.components.homo_llm_trainer import HomoLlmTrainer
from fate_llm.components.llm.history import _read_state, _write_state
from fate_llm.core.values import Array, Arrays, Artifact, Cohort, Role, Roster, RoundResult
from tests.components.fake_context import FakeContext

__all__ = ["Federation", "JournaledRounds", "Killed", "PartyContext", "run_party"]

COHORT = Cohort(("bank-a", "bank-b"), "consortium", 1)
ROSTER = Roster("bank-a", ("bank-b",), "consortium")


class Killed(BaseException):
    """What kill -9 looks like from inside: nothing catches it."""


@dataclass
class Federation:
    """All the others. missed: rounds that end without this party. kill: told where the party is; may raise Killed."""

    missed: frozenset[int] = frozenset()
    kill: Callable[[str, int], None] = lambda place, number: None
    stop_after: int | None = None
    sent: dict[int, dict[str, Array]] = field(default_factory=dict)
    results: dict[int, RoundResult] = field(default_factory=dict)

    def contribute(self, number: int, state: Arrays, update: Arrays, sums: Mapping[str, float]) -> RoundResult:
        mine = {name: value.copy() for name, value in update.items()}
        if number in self.sent:
            assert mine.keys() == self.sent[number].keys()
            assert all(mine[name].tobytes() == self.sent[number][name].tobytes() for name in mine), "another update"
        else:
            self.sent[number] = mine
            self.results[number] = self._result(number, state, mine, sums)
        return self.results[number]

    def _result(self, number: int, state: Arrays, update: Arrays, sums: Mapping[str, float]) -> RoundResult:
        draw = np.random.default_rng(number)
        ended = number + 1 if number in self.missed else number
        share = 0.0 if number in self.missed else 0.5
        new = {
            name: (value + share * update[name] + 1e-3 * draw.standard_normal(value.shape)).astype(np.float32)
            for name, value in state.items()
        }
        loss = draw.uniform(1.0, 5.0)
        both = {"train_loss_sum": 3.0 * loss, "train_tokens": 3.0, "test_loss_sum": 4.0 * loss, "test_tokens": 4.0}
        total = {name: both[name] + (2 * share) * sums.get(name, 0.0) for name in sums}
        parties = ("bank-b",) if number in self.missed else ("bank-a", "bank-b")
        return RoundResult(new, ended, total, parties, stop=ended == self.stop_after)


class JournaledRounds:
    """Satisfies `core.interfaces.ContributorRounds`, as the contract says it: commit when the next round is asked."""

    def __init__(self, federation: Federation, count: int, journal: Path | None, keep: Mapping[str, Any]) -> None:
        self._federation, self._count, self._journal, self._keep = federation, count, journal, keep
        self.journals = journal is not None
        self.resumed = 0
        self._state: Arrays = {}
        self._ended = False

    def start(self, state: Arrays) -> Arrays:
        newest = max((int(p.name) for p in self._journal.iterdir()), default=0) if self._journal else 0
        self._state = dict(state)
        if newest:
            assert self._journal is not None
            folder = self._journal / str(newest)
            self._state = _read_state(folder / "state")
            for name, kept in self._keep.items():
                kept.restore(folder / "keep" / name)
            self.resumed = newest
            self._ended = (folder / "stop").exists() or newest >= self._count
        return self._state

    def __iter__(self) -> Iterator[_Round]:
        number, stop = self.resumed, self._ended
        while not stop and number < self._count:
            taken: list[RoundResult] = []
            yield _Round(self, number + 1, taken)
            number, stop = taken[0].number, taken[0].stop
            self._federation.kill("commit", number)
            self._commit(number, stop)
            self._federation.kill("committed", number)

    def _commit(self, number: int, stop: bool) -> None:
        if self._journal is None:
            return
        partial = self._journal.parent / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        for name, kept in self._keep.items():
            (partial / "keep" / name).mkdir(parents=True)
            kept.save(partial / "keep" / name)
        _write_state(partial / "state", self._state)
        if stop:
            (partial / "stop").touch()
        self._federation.kill("rename", number)
        partial.rename(self._journal / str(number))


@dataclass
class _Round:
    rounds: JournaledRounds
    number: int
    taken: list[RoundResult]

    def contribute(self, arrays: Arrays, *, weight: float, sums: Mapping[str, float] | None = None) -> RoundResult:
        federation = self.rounds._federation
        federation.kill("contribute", self.number)
        result = federation.contribute(self.number, self.rounds._state, arrays, sums or {})
        federation.kill("contributed", self.number)
        self.rounds._state = result.state
        self.taken.append(result)
        return result


class _FinalChannel:
    def __init__(self, federation: Federation) -> None:
        self._federation = federation

    def aggregate(
        self,
        name: str,
        sums: Mapping[str, float] | None,
        *,
        protection: str,
        protection_params: Mapping[str, Any] | None = None,
    ) -> dict[str, float]:
        self._federation.kill("final", 0)
        return dict(sums or {})


@dataclass
class PartyContext(FakeContext):
    """bank-a's context. Steps can be counted and killed; outputs may be asked for again after a kill."""

    federation: Federation = field(default_factory=Federation)
    journal: Path | None = None

    def contributor_rounds(
        self,
        count: int,
        *,
        protection: str,
        protection_params: Mapping[str, Any] = MappingProxyType({}),
        hooks: Any = (),
        keep: Mapping[str, Any] = MappingProxyType({}),
    ) -> JournaledRounds:
        if self.journal is not None:
            self.journal.mkdir(parents=True, exist_ok=True)
        return JournaledRounds(self.federation, count, self.journal, keep)

    def output(self, name: str) -> Path:
        path = self.folder / "outputs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self.federation.kill("output", 0)
        return path

    def emit(self, event: str, **fields: Any) -> None:
        super().emit(event, **fields)
        if event in ("step", "round"):
            self.federation.kill(event, fields[event])


def run_party(
    folder: Path,
    federation: Federation,
    params: HomoLlmTrainer.Params,
    inputs: Mapping[str, Artifact],
    *,
    journal: bool,
) -> PartyContext:
    """One life of bank-a in `folder`: as in a new process, nothing of an earlier one is left but the disk."""
    random.seed(len(federation.sent))  # other state of the process than before
    np.random.seed(1000 + len(federation.sent))
    context = PartyContext(
        "bank-a",
        Role.GUEST,
        ROSTER,
        COHORT,
        params,
        folder,
        _FinalChannel(federation),
        inputs=inputs,
        federation=federation,
        journal=folder / "journal" if journal else None,
    )
    HomoLlmTrainer().guest(context)  # type: ignore[arg-type]
    return context
