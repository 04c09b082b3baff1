"""The values that everything else speaks of: parties, cohorts, updates, totals, payloads, artifacts.

Rules:
1. All are frozen. Arrays inside them belong to whoever made the value; nobody writes into a value received.
2. What is private is a numpy array or a number in `Update.sums`; `repr` shows names, shapes and dtypes only.
3. Parameters are matched by name, never by position.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import ProtectionError

__all__ = [
    "Array",
    "Arrays",
    "Artifact",
    "ArtifactKind",
    "Cohort",
    "Payload",
    "Role",
    "Roster",
    "RoundResult",
    "SumFloor",
    "Total",
    "Update",
    "require_finite",
    "require_same_layout",
]

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]


class Role(StrEnum):
    """What a party does in a job. One party may hold several."""

    GUEST = "guest"
    HOST = "host"
    ARBITER = "arbiter"
    KEY_HOLDER = "key_holder"


@dataclass(frozen=True, slots=True)
class Roster:
    """Who takes part in a job, by role. The order guest, hosts (as listed) is the order of every sum."""

    guest: str
    hosts: tuple[str, ...] = ()
    arbiter: str | None = None
    key_holder: str | None = None

    def __iter__(self) -> Iterator[str]:
        """Every party once, guest first."""
        seen: dict[str, None] = dict.fromkeys((self.guest, *self.hosts))
        for extra in (self.arbiter, self.key_holder):
            if extra is not None:
                seen.setdefault(extra)
        return iter(seen)

    def roles_of(self, party: str) -> frozenset[Role]:
        """The roles a party holds; empty when it is not in the roster."""
        held = {
            Role.GUEST: party == self.guest,
            Role.HOST: party in self.hosts,
            Role.ARBITER: party == self.arbiter,
            Role.KEY_HOLDER: party == self.key_holder,
        }
        return frozenset(role for role, holds in held.items() if holds)

    @property
    def data_owners(self) -> tuple[str, ...]:
        """Guest and hosts, in roster order."""
        return tuple(dict.fromkeys((self.guest, *self.hosts)))


@dataclass(frozen=True, slots=True)
class SumFloor:
    """What a party's own policy asks of every sum that hides terms; no message and no pipeline lowers it.

    contributors: least number of parties in a sum. threshold: least number of parties together with whom the
    coordinator could open a term; None: floor(2n/3) + 1 of n. clip: largest bound on a value's size that the party
    accepts; None: any.
    """

    contributors: int = 3
    threshold: int | None = None
    clip: float | None = None


@dataclass(frozen=True, slots=True)
class Cohort:
    """Who takes part in one task: contributors in roster order, the coordinator, the least number.

    The coordinator is the arbiter; without one it is the guest, without a guest the first contributor.
    """

    contributors: tuple[str, ...]
    coordinator: str
    quorum: int

    @property
    def members(self) -> tuple[str, ...]:
        """Contributors and the coordinator, each once."""
        return tuple(dict.fromkeys((*self.contributors, self.coordinator)))

    @property
    def coordinator_contributes(self) -> bool:
        return self.coordinator in self.contributors


def _shapes(arrays: Arrays) -> str:
    total = sum(int(a.size) for a in arrays.values())
    shown = ", ".join(f"{name}: {a.dtype.name}{list(a.shape)}" for name, a in list(arrays.items())[:3])
    more = ", ..." if len(arrays) > 3 else ""
    return f"{len(arrays)} arrays, {total} values {{{shown}{more}}}"


@dataclass(frozen=True, slots=True, repr=False)
class Update:
    """One party's term of a sum.

    arrays: float32 difference to the round's global state, by parameter name (private).
    weight: how much the term counts, at least 0 (private unless the protection says otherwise).
    sums: additive numbers such as a sum of losses and its count of tokens (private); never averages.
    """

    arrays: Arrays
    weight: float
    sums: Mapping[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Update({_shapes(self.arrays)}, sums={sorted(self.sums)})"


@dataclass(frozen=True, slots=True, repr=False)
class Total:
    """The weighted sum of the terms of those who contributed.

    mean: sum of weight x arrays over the sum of weights, float32 by name.
    sums: the additive numbers, added up. contributors, missing: party ids in roster order.
    error_bound: bound on the absolute error of any value of `mean` against exact arithmetic.
    terms: the single updates, only for aggregators that need plaintext and protections that show it.
    """

    mean: Arrays
    weight: float
    sums: Mapping[str, float]
    contributors: tuple[str, ...]
    missing: tuple[str, ...] = ()
    error_bound: float = 0.0
    terms: Mapping[str, Update] = field(default_factory=dict)

    def __repr__(self) -> str:
        who = f"contributors={list(self.contributors)}, missing={list(self.missing)}"
        return f"Total({_shapes(self.mean)}, {who})"


@dataclass(frozen=True, slots=True, repr=False)
class RoundResult:
    """What a contributor gets at the end of a round.

    state: the new global state (float32 by name). number: the round that ended, 1-based; larger than the
    round contributed to when this party had fallen behind. sums: aggregate of the additive numbers.
    stop: the coordinator ends the rounds here.
    """

    state: Arrays
    number: int
    sums: Mapping[str, float]
    contributors: tuple[str, ...]
    stop: bool = False

    def __repr__(self) -> str:
        return f"RoundResult(round {self.number}, {_shapes(self.state)}, contributors={list(self.contributors)})"


@dataclass(frozen=True, slots=True, repr=False, weakref_slot=True)
class Payload:
    """What one message carries: JSON fields and tensors by name."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    tensors: Arrays = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Payload(fields={sorted(self.fields)}, {_shapes(self.tensors)})"


class ArtifactKind(StrEnum):
    """What lies at an artifact's path."""

    DATASET = "dataset"  # a folder with records.jsonl and dataset.json
    MODEL = "model"  # a PEFT folder or a Hugging Face model folder, with fate_model.json
    METRICS = "metrics"  # a JSON file
    REPORT = "report"  # a folder with report.json, report.md and plots


@dataclass(frozen=True, slots=True)
class Artifact:
    """An output of a task on this party's disk. `name` is `task.output`; `party` is whose it is."""

    kind: ArtifactKind
    path: Path
    name: str
    party: str


def require_same_layout(first: Arrays, second: Arrays, *, what: str) -> None:
    """Refuse two sets of arrays that differ in names or shapes.

    Raises:
        ProtectionError: naming the first few parameters that are missing, unknown or of another shape.
    """
    if first.keys() != second.keys():
        lacking = sorted(first.keys() - second.keys())[:3]
        unknown = sorted(second.keys() - first.keys())[:3]
        raise ProtectionError(
            f"{what}: parameter names differ; missing {lacking or 'none'}, not known here {unknown or 'none'}",
            hint="All parties need the same model and the same peft settings.",
        )
    for name, array in first.items():
        if array.shape != second[name].shape:
            raise ProtectionError(
                f"{what}: {name} has shape {list(second[name].shape)}, expected {list(array.shape)}",
                hint="All parties need the same model and the same peft settings.",
            )


def require_finite(arrays: Arrays, *, what: str) -> None:
    """Refuse NaN and infinity before anything is computed with them or sent.

    Raises:
        ProtectionError: naming the first parameter with a value that is not finite.
    """
    for name, array in arrays.items():
        if array.dtype.kind not in "biu" and not np.isfinite(array).all():  # bfloat16 is no np.floating
            bad = int(array.size - np.isfinite(array).sum())
            raise ProtectionError(f"{what}: {name} has {bad} of {array.size} values that are not finite")
