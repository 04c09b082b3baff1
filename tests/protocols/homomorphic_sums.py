"""Sums under CKKS in memory: every machine of one or more rounds, with messages going from one to the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache
from itertools import cycle
from typing import Any

import numpy as np
import pytest

from fate_llm.core.interfaces import (
    SumContribute,
    SumExpired,
    SumFinished,
    SumKeep,
    SumReceived,
    SumScene,
    SumSend,
)
from fate_llm.core.values import Cohort, Payload, SumFloor, Total, Update
from fate_llm.protocols.sums.ckks import CkksSum
from fate_llm.security import ckks
from fate_llm.security.ckks import SecretContext
from fate_llm.security.identity import Identity
from fate_llm.security.signer import RosterSigner

load_context, generate = ckks._load_context, SecretContext.generate
HOLDER, COORDINATOR = "k", "z"
NAMES = "abcdefgh"
IDENTITIES = {name: Identity(bytes([place + 1]) * 32) for place, name in enumerate((*NAMES, HOLDER, COORDINATOR))}
ROSTER = {name: identity.public for name, identity in IDENTITIES.items()}
LAYOUT = {"w": (3,), "v": (2, 2)}
STATE = {"w": np.arange(3, dtype=np.float32), "v": np.zeros((2, 2), np.float32)}


@cache
def pool() -> list[SecretContext]:
    return [generate() for _ in range(3)]


@cache
def parsed(raw: bytes) -> Any:
    return load_context(raw)


def quicken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys out of a pool of three, parsed once: what takes longest in small sums."""
    keys = cycle(pool())
    monkeypatch.setattr(SecretContext, "generate", staticmethod(lambda: next(keys)))
    monkeypatch.setattr(ckks, "_load_context", parsed)


def signer(party: str) -> RosterSigner:
    return RosterSigner(IDENTITIES[party], ROSTER)


def scene_of(party: str, count: int = 3, *, quorum: int | None = None, **changes: Any) -> SumScene:
    cohort = Cohort(tuple(NAMES[:count]), COORDINATOR, count if quorum is None else quorum)
    common = SumScene(cohort, party, LAYOUT, STATE, "job-1", 1, "tune", 1, signer(party), SumFloor(), HOLDER)
    return replace(common, **changes)


def update(*values: float, weight: float = 1.0, **sums: float) -> Update:
    """Of LAYOUT: three values (one: three times that one), and four that are half of the first."""
    first = np.resize(np.array(values or (0.5, -0.25, 0.125), np.float32), 3)
    return Update({"w": first, "v": np.full((2, 2), first[0] / 2, np.float32)}, weight, sums)


def seed(party: str) -> bytes:
    return party.encode().ljust(32, b".")


def flat(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([arrays[name].reshape(-1) for name in sorted(arrays)] or [np.zeros(0)])


def exact_mean(terms: Iterable[Update], clip: float = 1.0) -> list[Fraction]:
    """The weighted mean of clipped values, in exact arithmetic."""
    terms = list(terms)
    weight = sum(Fraction(term.weight) for term in terms)
    rows = [[Fraction(float(np.clip(value, -clip, clip))) for value in flat(term.arrays)] for term in terms]
    each = range(len(rows[0]))
    return [sum(Fraction(t.weight) * row[i] for t, row in zip(terms, rows, strict=True)) / weight for i in each]


def require_within_bound(total: Total, terms: Iterable[Update], clip: float = 1.0) -> None:
    """Of many values, some in exact arithmetic and all in float64, which is good for 1e-15 here."""
    terms = list(terms)
    few = [replace(term, arrays={"": flat(term.arrays)[::501]}) if term.arrays else term for term in terms]
    short = flat(total.mean).size < 100
    for value, wanted in zip(
        flat(total.mean)[:: 1 if short else 501], exact_mean(terms if short else few, clip), strict=True
    ):
        assert abs(Fraction(float(value)) - wanted) <= Fraction(total.error_bound)
    wanted = sum(np.clip(flat(t.arrays).astype(np.float64), -clip, clip) * t.weight for t in terms)
    assert np.abs(flat(total.mean) - wanted / sum(t.weight for t in terms)).max() <= total.error_bound + 1e-15


@dataclass
class Sum:
    """One round. lose: parties whose messages get lost from now on. touch: changes a message on its way.

    A message is (from, to, body, by or for the key holder as such). order: which of those waiting goes next.
    """

    count: int = 3
    params: CkksSum.Params = field(default_factory=CkksSum.Params)
    quorum: int | None = None
    round: int = 1
    scenes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    holder: Any = None
    key_holder: str = HOLDER
    order: Callable[[int], int] = lambda waiting: 0
    touch: Callable[[str, str, Payload], Payload | None] = lambda sender, receiver, body: body
    kept: dict[str, dict[str, SumKeep]] = field(default_factory=dict)
    total: Total | None = None
    waiting: deque[tuple[str, str, Payload, bool]] = field(default_factory=deque)
    sent: list[tuple[str, str, Payload, bool]] = field(default_factory=list)

    def __post_init__(self) -> None:
        protection = CkksSum(self.params)
        self.protection = protection
        self.server = protection.server(self.scene(COORDINATOR))
        self.parties = {p: protection.party(self.scene(p)) for p in NAMES[: self.count]}
        if self.holder is None:
            self.holder = protection.holder(self.holder_scene(), seed(HOLDER))

    def holder_scene(self) -> SumScene:
        """As the rounds make it: of no round's sum."""
        return replace(self.scene(self.key_holder), layout={}, state={}, round=1)

    def scene(self, party: str) -> SumScene:
        changes = {
            "round": self.round,
            "key_holder": self.key_holder,
            **self.scenes.get("", {}),
            **self.scenes.get(party, {}),
        }
        return scene_of(party, self.count, quorum=self.quorum, **changes)

    def contribute(self, party: str, given: Update) -> None:
        self.act(party, self.parties[party].handle(SumContribute(given, seed(party))))

    def act(self, side: str, actions: list[Any]) -> None:
        for action in actions:
            if isinstance(action, SumFinished):
                assert self.total is None
                self.total = action.total
            elif isinstance(action, SumKeep):
                self.kept.setdefault(side, {})[action.name] = action
            else:
                assert isinstance(action, SumSend)
                self.post(side, action.receiver, action.body, action.to_holder)

    def post(self, sender: str, receiver: str, body: Payload, holder: bool) -> None:
        touched = self.touch(sender, receiver, body)
        if touched is not None:
            self.sent.append((sender, receiver, touched, holder))
            self.waiting.append((sender, receiver, touched, holder))

    def step(self) -> None:
        self.waiting.rotate(-self.order(len(self.waiting)))
        self.deliver(*self.waiting.popleft())

    def deliver(self, sender: str, receiver: str, body: Payload, holder: bool) -> None:
        if receiver == COORDINATOR:
            self.act(COORDINATOR, self.server.handle(SumReceived(sender, body, holder)))
        elif holder:
            for action in self.holder.handle(SumReceived(sender, body)):
                if isinstance(action, SumKeep):
                    self.kept.setdefault(HOLDER, {})[action.name] = action
                else:
                    self.post(receiver, action.receiver, action.body, True)
        else:
            self.act(receiver, self.parties[receiver].handle(SumReceived(sender, body)))

    def run(self) -> None:
        while self.waiting:
            self.step()

    def of(self, terms: Mapping[str, Update]) -> Total:
        """The total of these terms; time is over whenever nothing is under way."""
        for party, term in terms.items():
            self.contribute(party, term)
        self.run()
        while self.total is None:
            self.act(COORDINATOR, self.server.handle(SumExpired()))
            self.run()
        return self.total

    def said(self, stage: str, sender: str | None = None) -> list[tuple[str, str, Payload, bool]]:
        return [m for m in self.sent if m[2].fields["stage"] == stage and sender in (None, m[0])]


def changed(body: Payload, **fields: Any) -> Payload:
    return Payload({**body.fields, **fields}, body.tensors)


def flipped(body: Payload, tensor: str, place: int = -40) -> Payload:
    """One bit of a tensor changed."""
    raw = bytearray(np.ascontiguousarray(body.tensors[tensor]).tobytes())
    raw[place] ^= 1
    return Payload(body.fields, {tensor: np.frombuffer(bytes(raw), body.tensors[tensor].dtype)})
