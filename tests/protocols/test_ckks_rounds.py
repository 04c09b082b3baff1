"""Rounds under CKKS as they run: drivers of contributors, coordinator and key holder over channels in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fate_llm.core.errors import ProtectionError
from fate_llm.core.interfaces import SumScene
from fate_llm.core.values import Cohort, RoundResult, Total
from fate_llm.protocols.rounds.driver import ContributorDriver, CoordinatorDriver, HolderDriver, Setting
from fate_llm.protocols.sums.ckks import CkksSum
from tests.protocols.homomorphic_sums import COORDINATOR, HOLDER, quicken, signer

pytest.importorskip("tenseal")

SIZE, ROUNDS, WEIGHT = 9000, 2, 2.0**20
PARTIES = "abc"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known keys, and a ciphertext in each message, so that every term has three."""
    quicken(monkeypatch)
    monkeypatch.setattr("fate_llm.protocols.homomorphic.messages.CHUNK", 1)


def setting(channels: Any, party: str) -> Setting:
    cohort = Cohort(tuple(PARTIES), COORDINATOR, 3)
    found = SumScene(cohort, party, {}, job="job", conversation="tune", signer=signer(party), key_holder=HOLDER)
    return Setting(
        channel=channels[party],
        task="tune",
        cohort=cohort,
        rounds=ROUNDS,
        patience=60.0,
        secure_sum=CkksSum(),
        emit=lambda event, **fields: None,
        protection="ckks",
        scene=found,
    )


def contribute(setting: Setting, party: str) -> list[RoundResult]:
    rounds = ContributorDriver(setting, party)
    rounds.start({"w": np.zeros(SIZE, np.float32)})
    given = {"w": np.full(SIZE, 0.1 * (ord(party) - 96), np.float32)}
    return [round.contribute(given, weight=WEIGHT, sums={"n": 1.5}) for round in rounds]


def coordinate(setting: Setting) -> list[Total]:
    rounds, totals = CoordinatorDriver(setting), []
    state = dict(rounds.start())
    for round in rounds:
        totals.append(round.collect())
        state = {"w": state["w"] + totals[-1].mean["w"]}
        round.publish(state)
    return totals


def test_rounds_with_a_key_holder(
    make_channels: Callable[..., Any], together: Callable[[dict[str, Callable[[], Any]]], dict[str, Any]]
) -> None:
    channels = make_channels((*PARTIES, COORDINATOR, HOLDER))
    calls: dict[str, Callable[[], Any]] = {
        party: lambda party=party: contribute(setting(channels, party), party) for party in PARTIES
    }
    calls[COORDINATOR] = lambda: coordinate(setting(channels, COORDINATOR))
    calls[HOLDER] = lambda: HolderDriver(setting(channels, HOLDER)).run()
    ends = together(calls)
    assert ends[HOLDER] is None, "it ends when the rounds are over"
    for total in ends[COORDINATOR]:
        assert total.contributors == tuple(PARTIES)
        assert np.abs(total.mean["w"] - 0.2).max() <= total.error_bound + 1e-8
        assert (total.weight, total.sums) == (3 * WEIGHT, {"n": 4.5})
    states = {party: ends[party][-1].state["w"].tobytes() for party in PARTIES}
    assert len(set(states.values())) == 1
    assert np.frombuffer(states["a"], np.float32) == pytest.approx(0.4, abs=1e-5)


def test_a_bad_update_ends_its_party_before_anything_of_it_is_sent(
    make_channels: Callable[..., Any], together: Callable[[dict[str, Callable[[], Any]]], dict[str, Any]]
) -> None:
    channels = make_channels((*PARTIES, COORDINATOR, HOLDER))

    def bad() -> None:
        rounds = ContributorDriver(setting(channels, "a"), "a")
        rounds.start({"w": np.zeros(SIZE, np.float32)})
        for round in rounds:
            round.contribute({"w": np.full(SIZE, np.nan, np.float32)}, weight=1.0, sums={})

    def start() -> None:
        CoordinatorDriver(setting(channels, COORDINATOR)).start()

    def others(party: str) -> None:
        ContributorDriver(setting(channels, party), party).start({"w": np.zeros(SIZE, np.float32)})

    ends = together({"a": bad, "b": lambda: others("b"), "c": lambda: others("c"), COORDINATOR: start})
    assert isinstance(ends["a"], ProtectionError)
