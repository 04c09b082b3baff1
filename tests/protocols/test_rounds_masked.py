"""Rounds under secure aggregation over real channels: stages, drop-outs, parties that come back, refusals, journals."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from fate_llm.core.errors import FateError, PolicyError, QuorumLost
from fate_llm.core.interfaces import SumKeep, SumScene
from fate_llm.core.values import Cohort, Payload, RoundResult, SumFloor, Total
from fate_llm.protocols.channel import JobChannel
from fate_llm.protocols.rounds.driver import ContributorDriver, CoordinatorDriver, Setting
from fate_llm.protocols.sums.secagg import SecAgg
from tests.masking import TestSigner

Make = Callable[..., dict[str, JobChannel]]
PARTIES = "abcdefgh"
SHAPE = {"w": (40,), "v": (3, 4)}


@dataclass(slots=True)
class Notebook:
    """Satisfies `core.interfaces.SumJournal` in memory, and remembers what was asked of it."""

    kept: dict[int, dict[str, SumKeep]] = field(default_factory=dict)
    closed: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def load(self, round: int) -> Mapping[str, Payload]:
        return {name: action.body for name, action in self.kept.get(round, {}).items()}

    def keep(self, round: int, action: SumKeep) -> None:
        self.names.append(action.name)
        self.kept.setdefault(round, {})[action.name] = action

    def close(self, round: int) -> None:
        self.closed.append(round)
        for number, actions in self.kept.items():
            if number <= round:
                self.kept[number] = {name: action for name, action in actions.items() if action.lasting}


def cohort_of(count: int, *, quorum: int = 1, coordinator: str = "z") -> Cohort:
    return Cohort(tuple(PARTIES[:count]), coordinator, quorum)


def setting(channel: JobChannel, cohort: Cohort, me: str, *, floor: SumFloor | None = None, **changes: Any) -> Setting:
    scene = SumScene(
        cohort,
        me,
        {},
        job="job",
        conversation="tune",
        signer=TestSigner(me, (*cohort.contributors, "z")),
        floor=floor or SumFloor(),
    )
    given = Setting(
        channel=channel,
        task="tune",
        cohort=cohort,
        rounds=3,
        patience=30.0,
        secure_sum=SecAgg(SecAgg.Params(largest_weight=8.0)),
        emit=lambda event, **fields: None,
        scene=scene,
        sum_journal=Notebook(),
        protection="secagg",
    )
    return replace(given, **changes)


def start_state() -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, np.float32) for name, shape in SHAPE.items()}


def term_of(party: str, number: int) -> dict[str, np.ndarray]:
    draw = np.random.Generator(np.random.PCG64([ord(party), number]))
    return {name: draw.uniform(-0.1, 0.1, shape).astype(np.float32) for name, shape in SHAPE.items()}


def weight_of(party: str) -> float:
    return 1.0 + PARTIES.index(party)


def contribute(given: Setting, me: str, before: Callable[[int], None] = lambda number: None) -> list[RoundResult]:
    driver = ContributorDriver(given, me)
    driver.start(start_state())
    results = []
    for round in driver:
        before(round.number)
        sums = {"n": 1.0 + round.number} if me != "b" or len(given.cohort.contributors) < 8 else {}
        results.append(round.contribute(term_of(me, round.number), weight=weight_of(me), sums=sums))
    return results


def coordinate(given: Setting, totals: list[Total]) -> dict[str, np.ndarray]:
    driver = CoordinatorDriver(given)
    state = dict(driver.start())
    for round in driver:
        total = round.collect()
        totals.append(total)
        state = {name: np.asarray(state[name] + total.mean[name]) for name in state}
        round.publish(state)
    given.channel.announce_done()
    return state


def expected_mean(parties: tuple[str, ...], number: int) -> dict[str, np.ndarray]:
    weight = sum(weight_of(party) for party in parties)
    return {
        name: sum(term_of(party, number)[name].astype(np.float64) * weight_of(party) for party in parties) / weight
        for name in SHAPE
    }


def check_totals(totals: list[Total]) -> None:
    """Every total is the mean over exactly those it names, within its own bound."""
    for number, total in enumerate(totals, 1):
        exact = expected_mean(total.contributors, number)
        assert total.weight == pytest.approx(sum(weight_of(p) for p in total.contributors), abs=1e-9)
        few = len({*total.contributors, *total.missing}) < 8
        assert total.sums["n"] == pytest.approx(sum(1.0 + number for p in total.contributors if p != "b" or few))
        for name in SHAPE:
            assert np.abs(total.mean[name] - exact[name]).max() <= total.error_bound < 1e-5


def run(
    channels: dict[str, JobChannel], cohort: Cohort, together: Any, calls: Mapping[str, Any] = {}, **changes: Any
) -> tuple[dict[str, Any], list[Total]]:
    totals: list[Total] = []
    all_calls: dict[str, Callable[[], Any]] = {
        p: (lambda p=p: contribute(setting(channels[p], cohort, p, **changes), p)) for p in cohort.contributors
    }
    who = cohort.coordinator
    given = setting(channels[who], cohort, who, **changes)
    all_calls["coordinator"] = lambda: _told(channels[who], lambda: coordinate(given, totals))
    return together({**all_calls, **calls}), totals


@pytest.mark.parametrize("count", [3, 4, 8])
def test_all_rounds_give_the_means_and_everybody_the_same_state(make_channels: Make, together: Any, count: int) -> None:
    ends, totals = run(make_channels(PARTIES[:count] + "z"), cohort_of(count), together)
    assert len(totals) == 3, ends
    check_totals(totals)
    for party in PARTIES[:count]:
        assert [result.number for result in ends[party]] == [1, 2, 3]
        assert all((ends[party][-1].state[name] == ends["coordinator"][name]).all() for name in SHAPE)
        assert ends[party][0].sums["n"] == pytest.approx(2.0 * (count if count < 8 else count - 1))


def test_a_number_that_few_parties_have_is_in_no_total(make_channels: Make, together: Any) -> None:
    # Given three parties, of whom b has no number to add: two alone would learn each other's
    channels, cohort = make_channels("abcz"), cohort_of(3)

    def without() -> list[RoundResult]:
        driver = ContributorDriver(setting(channels["b"], cohort, "b"), "b")
        driver.start(start_state())
        return [round.contribute(term_of("b", round.number), weight=weight_of("b")) for round in driver]

    ends, totals = run(channels, cohort, together, {"b": without})
    assert [dict(total.sums) for total in totals] == [{}, {}, {}], ends


def test_a_coordinator_that_contributes_needs_three_others(make_channels: Make, together: Any) -> None:
    cohort = cohort_of(4, coordinator="a")
    ends, totals = run(make_channels("abcd"), cohort, together)
    assert len(totals) == 3, ends
    check_totals(totals)
    few = cohort_of(3, coordinator="a")
    ends, totals = run(make_channels("abc"), few, together)
    assert totals == []
    assert isinstance(ends["coordinator"], PolicyError), ends
    assert "2 parties besides the coordinator" in str(ends["coordinator"])


def test_a_party_killed_in_a_round_is_left_out_and_the_others_go_on(make_channels: Make, together: Any) -> None:
    # Given eight parties (threshold 6), of which h dies in round 2 after its shares are out
    channels = make_channels(PARTIES + "z")
    cohort = cohort_of(8)
    sent = channels["h"].send
    count = {"terms": 0}

    def dies(*arguments: Any, **named: Any) -> int:
        if named["kind"] == "round.term" and named["payload"].fields["stage"] == "masked" and named["round"] == 2:
            count["terms"] += 1
            raise RuntimeError("killed")
        return sent(*arguments, **named)

    channels["h"].send = dies  # type: ignore[method-assign]

    def h() -> Any:
        try:
            return contribute(setting(channels["h"], cohort, "h"), "h")
        except RuntimeError:
            channels["h"].announce_failure(FateError("killed"), task="tune")
            return "killed"

    ends, totals = run(channels, cohort, together, {"h": h})
    # Then its mask is taken off by the others' shares
    assert ends["h"] == "killed" and count == {"terms": 1}
    assert [total.missing for total in totals] == [(), ("h",), ("h",)], ends
    check_totals(totals)


def test_a_party_that_misses_a_round_comes_back_in_the_next(make_channels: Make, together: Any) -> None:
    channels, cohort = make_channels(PARTIES[:4] + "z"), cohort_of(4)

    def slow(number: int) -> None:
        if number == 2:
            time.sleep(3.0)

    calls = {"d": lambda: contribute(setting(channels["d"], cohort, "d", patience=1.5), "d", slow)}
    ends, totals = run(channels, cohort, together, calls, patience=1.5)
    assert [total.missing for total in totals] == [(), ("d",), ()], ends
    check_totals(totals)
    assert [result.number for result in ends["d"]] == [1, 2, 3]


def test_below_the_threshold_the_round_is_refused(make_channels: Make, together: Any) -> None:
    # Given four parties (threshold 3) of which two never offer a term in round 2
    channels, cohort = make_channels(PARTIES[:4] + "z"), cohort_of(4)

    def leaves(party: str) -> Callable[[], Any]:
        def before(number: int) -> None:
            if number == 2:
                channels[party].announce_failure(FateError("killed"), task="tune")
                raise KeyError(party)

        return lambda: contribute(setting(channels[party], cohort, party), party, before)

    ends, totals = run(channels, cohort, together, {"c": leaves("c"), "d": leaves("d")})
    assert [total.missing for total in totals] == [()]
    assert isinstance(ends["coordinator"], QuorumLost)
    assert "round 2" in str(ends["coordinator"]) and "the protection needs 3" in str(ends["coordinator"])


def test_a_party_s_own_policy_is_a_floor(make_channels: Make, together: Any) -> None:
    channels, cohort = make_channels(PARTIES[:4] + "z"), cohort_of(4)
    strict = SumFloor(contributors=5)
    calls = {"b": lambda: contribute(setting(channels["b"], cohort, "b", floor=strict), "b")}

    def refused() -> Any:
        try:
            return calls["b"]()
        except PolicyError as error:
            channels["b"].announce_failure(error, task="tune")
            return error

    ends, totals = run(channels, cohort, together, {"b": refused})
    assert isinstance(ends["b"], PolicyError) and "from 5 on" in str(ends["b"])
    assert len(totals) == 3  # the other three are enough for a threshold of 3 of 4
    assert all(total.missing == ("b",) for total in totals)


def test_what_must_not_be_drawn_twice_is_kept_before_it_is_said_and_erased_at_the_end(
    make_channels: Make, together: Any
) -> None:
    channels, cohort = make_channels(PARTIES[:3] + "z"), cohort_of(3)
    books = {party: Notebook() for party in "abcz"}
    calls: dict[str, Any] = {
        p: (lambda p=p: contribute(setting(channels[p], cohort, p, sum_journal=books[p]), p)) for p in "abc"
    }
    totals: list[Total] = []
    calls["coordinator"] = lambda: coordinate(setting(channels["z"], cohort, "z", sum_journal=books["z"]), totals)
    ends, _ = run(channels, cohort, together, calls)
    assert len(totals) == 3, ends
    for party in "abc":
        assert books[party].names == ["seed", "masked", "consent", "answered"] * 3
        assert books[party].closed == [0, 1, 2, 3]
        assert {number: set(actions) for number, actions in books[party].kept.items()} == {
            number: {"answered"} for number in (1, 2, 3)
        }
    assert books["z"].names == ["keys", "shares", "masked", "consent"] * 3
    assert books["z"].closed == [1, 2, 3]
    assert not any(books["z"].kept.values())


def test_a_round_answered_in_another_attempt_is_not_answered_again(make_channels: Make, together: Any) -> None:
    # Given that a to d have answered round 1 in attempt 1, which nobody published
    cohort = cohort_of(4)
    books = {party: Notebook() for party in "abcd"}
    for party in "abcd":
        answered = Payload({"attempt": 1, "survivors": list("abcd")})
        books[party].keep(1, SumKeep("answered", answered, lasting=True))
    channels = make_channels("abcdz")
    scenes = {p: replace(setting(channels[p], cohort, p).scene, attempt=2) for p in "abcdz"}  # type: ignore[type-var]
    calls: dict[str, Any] = {
        p: (lambda p=p: contribute(setting(channels[p], cohort, p, sum_journal=books[p], scene=scenes[p]), p))
        for p in "abcd"
    }
    totals: list[Total] = []
    calls["coordinator"] = lambda: _told(
        channels["z"], lambda: coordinate(setting(channels["z"], cohort, "z", scene=scenes["z"]), totals)
    )
    ends, _ = run(channels, cohort, together, calls)
    # Then attempt 2 has no sum of it
    assert totals == []
    assert isinstance(ends["coordinator"], QuorumLost), ends


def _told(channel: JobChannel, call: Callable[[], Any]) -> Any:
    """As a party does: the others hear how it ended."""
    try:
        return call()
    except FateError as error:
        channel.announce_failure(error, task="tune")
        channel.leave(error, task="tune")
        raise
