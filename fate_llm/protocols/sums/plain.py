"""Plain sum: the coordinator sees every term.

For parties that trust it, and as the measure for all protections.

Rules:
1. Terms are added in roster order, whatever order they arrive in, so that the result has the same bits every
   time.
2. A term is held only until everyone before it in the roster has been added.
3. A term is checked whole (layout, dtype, finite values, weight, size) before anything changes.
4. No sum of accepted terms can overflow: a term too large for that is refused, so that one party cannot end a
   job.
5. Once the total is out, nothing is added any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, TypeGuard

import numpy as np

from fate_llm.core.errors import InternalError, PeerViolation, ProtectionError, QuorumLost
from fate_llm.core.interfaces import (
    Frozen,
    Layout,
    SumAction,
    SumContribute,
    SumEvent,
    SumExpired,
    SumFinished,
    SumHolder,
    SumReceived,
    SumScene,
    SumSend,
)
from fate_llm.core.values import Array, Cohort, Payload, Total, Update, require_finite

__all__ = ["PLUGIN", "PlainSum"]

_WEIGHTS = (1e-12, 1e12)  # range of a weight that is not 0
_LARGEST_NUMBER = 1e290  # of an additive number; float64 holds the sum of any number of them that a job can have
_STEP = 2.0**-24  # half a step of float32, relative
_TINIEST = 2.0**-149  # the smallest float32 above 0


class PlainSum:
    """Terms travel as they are; the coordinator learns every party's update and weight."""

    hides_terms: ClassVar[bool] = False
    needs_key_holder: ClassVar[bool] = False
    label: ClassVar[str] = "plain"
    summary: ClassVar[str] = "the coordinator sees every party's update, weight and metric sums"
    learns: ClassVar[Mapping[str, str]] = {
        "coordinator": "every party's update, weight and metric sums, each round",
        "contributors": "the global state and the total of the metric sums, each round",
    }

    class Params(Frozen):
        """Nothing to set."""

    def __init__(self, params: Params | None = None) -> None:
        pass

    def party(self, scene: SumScene) -> _Party:
        return _Party(scene.cohort, scene.layout)

    def server(
        self, scene: SumScene, *, keep_terms: bool = False, kept: Mapping[str, Payload] = MappingProxyType({})
    ) -> _Server:
        return _Server(scene.cohort, scene.layout, keep_terms)

    def holder(self, scene: SumScene, seed: bytes, kept: Mapping[str, Payload] = MappingProxyType({})) -> SumHolder:
        raise InternalError("a plain sum has no key holder")


class _Party:
    def __init__(self, cohort: Cohort, layout: Layout) -> None:
        self._coordinator = cohort.coordinator
        self._layout = layout
        self._terms = len(cohort.contributors)
        self._sent = False

    def handle(self, event: SumEvent) -> list[SumAction]:
        if not isinstance(event, SumContribute):
            raise PeerViolation(f"a plain sum sends nothing to contributors, got {type(event).__name__}")
        if self._sent:
            raise InternalError("this sum has its term already; every round has a sum of its own")
        given = event.update
        update = Update(given.arrays, float(given.weight), {k: float(v) for k, v in given.sums.items()})
        fault = _fault(update, self._layout, terms=self._terms)
        if fault:
            raise ProtectionError(f"the update cannot be sent: {fault}")
        self._sent = True
        fields = {"weight": update.weight, "sums": update.sums}
        return [SumSend(self._coordinator, Payload(fields, update.arrays))]


class _Server:
    def __init__(self, cohort: Cohort, layout: Layout, keep_terms: bool) -> None:
        self._cohort = cohort
        self._layout = layout
        self._keep_terms = keep_terms
        self._waiting = list(cohort.contributors)  # roster order, from the first not yet added
        self._early: dict[str, Update] = {}
        self._terms: dict[str, Update] = {}
        self._added: list[str] = []
        self._sum: dict[str, Array] = {}
        self._magnitude = 0.0
        self._weight = 0.0
        self._sums: dict[str, float] = {}
        self._closed = False

    stage: ClassVar[int] = 0

    @property
    def least(self) -> int:
        return max(1, self._cohort.quorum)

    @property
    def able(self) -> frozenset[str]:
        return frozenset(self._cohort.contributors)

    @property
    def awaiting(self) -> frozenset[str]:
        return frozenset() if self._closed else frozenset(p for p in self._waiting if p not in self._early)

    def handle(self, event: SumEvent) -> list[SumAction]:
        if self._closed:
            raise PeerViolation(f"{type(event).__name__} after the end of the sum")
        if isinstance(event, SumReceived):
            return self._received(event.sender, event.body)
        if isinstance(event, SumExpired):
            return self._finish()
        raise PeerViolation(f"{type(event).__name__} is not for the coordinator of a sum")

    def _received(self, sender: str, body: Payload) -> list[SumAction]:
        if sender not in self._cohort.contributors:
            raise PeerViolation(f"{sender} is not a contributor of this sum")
        if sender not in self.awaiting:
            raise PeerViolation(f"{sender} sent a second term for the same sum")
        self._early[sender] = _parse(sender, body, self._layout, terms=len(self._cohort.contributors))
        while self._waiting and self._waiting[0] in self._early:
            self._add(self._waiting.pop(0))
        return self._finish() if not self._waiting else []

    def _add(self, party: str) -> None:
        update = self._early.pop(party)
        weight = np.float32(update.weight)
        for name, array in update.arrays.items():
            product = np.asarray(array * weight)
            if name in self._sum:
                self._sum[name] += product
            else:
                self._sum[name] = product
        self._magnitude += _largest(update) * update.weight
        self._weight += update.weight
        for key, value in update.sums.items():
            self._sums[key] = self._sums.get(key, 0.0) + value
        self._added.append(party)
        if self._keep_terms:
            self._terms[party] = update

    def _finish(self) -> list[SumAction]:
        count = len(self._added) + len(self._early)
        missing = tuple(p for p in self._cohort.contributors if p in self.awaiting)
        if count < max(1, self._cohort.quorum):
            raise QuorumLost(
                f"{count} of {len(self._cohort.contributors)} parties contributed, the quorum is "
                f"{self._cohort.quorum}; missing: {', '.join(missing)}"
            )
        for party in [p for p in self._waiting if p in self._early]:
            self._waiting.remove(party)
            self._add(party)
        total = self._total(missing)
        self._closed = True
        return [SumFinished(total)]

    def _total(self, missing: tuple[str, ...]) -> Total:
        if self._layout and self._weight <= 0.0:
            raise ProtectionError(f"the weights of {', '.join(self._added)} add up to 0: there is no mean")
        scale = np.float32(self._weight or 1.0)
        mean = {name: np.asarray(total / scale) for name, total in self._sum.items()}
        return Total(
            mean,
            self._weight,
            dict(self._sums),
            tuple(self._added),
            missing,
            self._error_bound(),
            dict(self._terms),
        )

    def _error_bound(self) -> float:
        """Weights, products, additions, scale and division round once; products may fall below float32."""
        if not self._weight:
            return 0.0
        count = len(self._added)
        steps = (count + 4) * _STEP
        return steps * self._magnitude / self._weight + (count / self._weight + 1.0) * _TINIEST


def _parse(sender: str, body: Payload, layout: Layout, *, terms: int) -> Update:
    weight, sums = body.fields.get("weight"), body.fields.get("sums")
    if body.fields.keys() != {"weight", "sums"} or not isinstance(sums, dict):
        raise PeerViolation(f"the term of {sender} lacks a weight or its sums")
    if not _number(weight):
        raise PeerViolation(f"the weight of {sender} is not a finite number")
    if not all(isinstance(k, str) and _number(v) for k, v in sums.items()):
        raise PeerViolation(f"the sums of {sender} are not finite numbers")
    update = Update(body.tensors, float(weight), {k: float(v) for k, v in sums.items()})
    fault = _fault(update, layout, terms=terms)
    if fault:
        raise PeerViolation(f"the term of {sender} is refused: {fault}")
    return update


def _number(value: object) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -_LARGEST_NUMBER <= value <= _LARGEST_NUMBER


def _fault(update: Update, layout: Layout, *, terms: int) -> str | None:
    """Why this update is no term of a sum of at most `terms` terms over `layout`, or None."""
    weight = update.weight
    if not (weight == 0 or _WEIGHTS[0] <= weight <= _WEIGHTS[1]):
        return f"the weight must be 0 or from {_WEIGHTS[0]:g} to {_WEIGHTS[1]:g}"
    if not all(_number(value) for value in update.sums.values()):
        return "the sums must be finite numbers"
    if update.arrays.keys() != layout.keys():
        wrong = [name[:80] for name in sorted(update.arrays.keys() ^ layout.keys())[:3]]
        return f"parameter names differ, first {wrong}"
    for name, array in update.arrays.items():
        if array.shape != tuple(layout[name]):
            return f"{name} has shape {list(array.shape)}, expected {list(layout[name])}"
        if array.dtype != np.float32:
            return f"{name} is {array.dtype}, expected float32"
    try:
        require_finite(update.arrays, what="update")
    except ProtectionError as error:
        return error.message
    largest = _largest(update)
    if largest * max(weight, 1.0) * terms * 2 > float(np.finfo(np.float32).max):
        return f"a value of {largest:.3g} with the weight {weight:.3g} is too large to be summed"
    return None


def _largest(update: Update) -> float:
    ends = ((float(a.max(initial=0.0)), -float(a.min(initial=0.0))) for a in update.arrays.values())
    return max((max(pair) for pair in ends), default=0.0)


PLUGIN = PlainSum
