"""The rounds over a real transport, a thread per party, and faults as scripted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest

from fate_llm.core.canonical import digest
from fate_llm.core.errors import (
    FateError,
    InternalError,
    MessageLost,
    PeerFailed,
    ProtectionError,
    QuorumLost,
    RoundTimeout,
)
from fate_llm.core.interfaces import Frozen, HookStage
from fate_llm.core.values import Cohort, Payload, RoundResult, Total, Update
from fate_llm.protocols.channel import JobChannel
from fate_llm.protocols.rounds.driver import ContributorDriver, CoordinatorDriver, Setting
from fate_llm.protocols.rounds.machine import HELLO, TERM
from fate_llm.protocols.sums.plain import PlainSum
from fate_llm.protocols.transports.memory import Fault, FaultKind

Make = Callable[..., dict[str, JobChannel]]
MakeCohort = Callable[..., Cohort]
ROUNDS = 4
TARGETS = {"a": 1.0, "b": 4.0, "c": 7.0}
WEIGHTS = {"a": 1.0, "b": 2.0, "c": 5.0}


def vector(value: float) -> dict[str, np.ndarray]:
    return {"w": np.full(3, value, np.float32), "v": np.float32(value) * np.ones((2, 2), np.float32)}


def setting(channel: JobChannel, cohort: Cohort, **changes: Any) -> Setting:
    given = Setting(
        channel=channel,
        task="tune",
        cohort=cohort,
        rounds=ROUNDS,
        patience=20.0,
        secure_sum=PlainSum(),
        emit=lambda event, **fields: None,
    )
    return replace(given, **changes)


def coordinate(given: Setting, *, stop_after: int | None = None, totals: list[Total] | None = None) -> float:
    """Plain FedAvg; the last global value."""
    driver = CoordinatorDriver(given)
    state = driver.start()
    for round in driver:
        total = round.collect()
        if totals is not None:
            totals.append(total)
        state = {name: np.asarray(state[name] + total.mean[name]) for name in state}
        round.publish(state, stop=round.number == stop_after)
    given.channel.announce_done()
    return float(state["w"][0])


def contribute(given: Setting, me: str, *, before: Callable[[int], None] = lambda number: None) -> list[RoundResult]:
    """Every round a party moves half of the way to its own target."""
    driver = ContributorDriver(given, me)
    state = driver.start(vector(0.0))
    results = []
    for round in driver:
        before(round.number)
        step = {name: (np.float32(TARGETS[me]) - value) / np.float32(2) for name, value in state.items()}
        result = round.contribute(step, weight=WEIGHTS[me], sums={"tokens": 10.0})
        results.append(result)
        state = result.state
    return results


def closed_form(parties: str, rounds: int) -> float:
    total = sum(WEIGHTS[p] for p in parties)
    target = sum(WEIGHTS[p] * TARGETS[p] for p in parties) / total
    return target * (1 - 0.5**rounds)


def run(channels: dict[str, JobChannel], cohort: Cohort, together: Any, **changes: Any) -> dict[str, Any]:
    calls: dict[str, Callable[[], Any]] = {
        p: (lambda p=p: contribute(setting(channels[p], cohort, **changes), p)) for p in cohort.contributors
    }
    calls["z"] = lambda: coordinate(setting(channels["z"], cohort, **changes))
    return together(calls)  # type: ignore[no-any-return]


def test_three_parties_get_the_weighted_average_in_closed_form(
    make_channels: Make, make_cohort: MakeCohort, together: Any
) -> None:
    ends = run(make_channels("abcz"), make_cohort(3), together)
    assert ends["z"] == pytest.approx(closed_form("abc", ROUNDS))
    for party in "abc":
        assert [r.number for r in ends[party]] == [1, 2, 3, 4]
        assert float(ends[party][-1].state["w"][0]) == ends["z"]
        assert ends[party][-1].contributors == ("a", "b", "c")
        assert ends[party][-1].sums == {"tokens": 30.0}


FAULTS = [
    tuple(
        Fault(kind, sender, receiver, nth, by)
        for sender, receiver in pairs
        for nth, kind, by in (
            (1, FaultKind.DUPLICATE, 1),
            (2, FaultKind.DELAY, None),
            (3, FaultKind.DUPLICATE, 1),
        )
    )
    for pairs in ([("a", "z"), ("z", "a")], [("b", "z"), ("c", "z"), ("z", "c")])
]


@pytest.mark.parametrize("faults", FAULTS, ids=["first party", "the others"])
def test_duplicates_and_delays_give_the_same_bits(
    make_channels: Make, make_cohort: MakeCohort, together: Any, faults: Sequence[Fault]
) -> None:
    quiet = run(make_channels("abcz"), make_cohort(3), together)
    disturbed = run(make_channels("abcz", faults=tuple(faults), linger=0.01), make_cohort(3), together)
    for party in "abc":
        for one, other in zip(quiet[party], disturbed[party], strict=True):
            assert {n: a.tobytes() for n, a in one.state.items()} == {n: a.tobytes() for n, a in other.state.items()}


def test_a_coordinator_that_also_contributes(make_channels: Make, together: Any) -> None:
    # Given a guest that hosts the aggregator: two threads of one party on one channel
    cohort, channels = Cohort(("a", "b", "c"), "a", 3), make_channels("abc")
    calls = {p: (lambda p=p: contribute(setting(channels[p], cohort), p)) for p in "abc"}
    calls["coordinator"] = lambda: coordinate(setting(channels["a"], cohort))
    ends = together(calls)
    assert ends["coordinator"] == pytest.approx(closed_form("abc", ROUNDS))
    assert float(ends["a"][-1].state["w"][0]) == ends["coordinator"]


def test_the_coordinator_can_stop_early(make_channels: Make, make_cohort: MakeCohort, together: Any) -> None:
    channels, cohort = make_channels("abz"), make_cohort(2)
    calls: dict[str, Callable[[], Any]] = {p: (lambda p=p: contribute(setting(channels[p], cohort), p)) for p in "ab"}
    calls["z"] = lambda: coordinate(setting(channels["z"], cohort), stop_after=2)
    ends = together(calls)
    assert [(r.number, r.stop) for r in ends["a"]] == [(1, False), (2, True)]
    assert ends["z"] == pytest.approx(closed_form("ab", 2))


def test_a_slow_party_is_left_out_and_comes_back(make_channels: Make, make_cohort: MakeCohort, together: Any) -> None:
    # Given a party that does not answer in round 1 until that round has been published without it
    channels, cohort, totals = make_channels("abcz"), make_cohort(3, quorum=2), []
    over = threading.Event()

    def told(event: str, **fields: Any) -> None:
        if event == "round_state" and fields["round"] == 1:
            over.set()

    def slow(number: int) -> None:
        if number == 1:
            assert over.wait(10)

    # only round 1 is short: the others wait for everybody
    short = {"patience": 0.3}

    def coordinate_short() -> float:
        given = setting(channels["z"], cohort, **short)
        driver = CoordinatorDriver(given)
        state = driver.start()
        for round in driver:
            total = round.collect()
            driver._machine.patience = 20.0
            totals.append(total)
            state = {name: np.asarray(state[name] + total.mean[name]) for name in state}
            round.publish(state)
        return float(state["w"][0])

    ends = together(
        {
            "a": lambda: contribute(setting(channels["a"], cohort, emit=told), "a"),
            "b": lambda: contribute(setting(channels["b"], cohort), "b"),
            "c": lambda: contribute(setting(channels["c"], cohort), "c", before=slow),
            "z": coordinate_short,
        }
    )
    # Then round 1 went on without it, and it counts in all later ones
    assert totals[0].missing == ("c",)
    assert [t.contributors for t in totals[1:]] == [("a", "b", "c")] * 3
    assert [r.number for r in ends["c"]] == [1, 2, 3, 4]
    assert ends["c"][0].contributors == ("a", "b")
    assert float(ends["c"][-1].state["w"][0]) == ends["z"]


def test_a_party_late_for_the_last_round_gets_its_state_although_the_coordinator_has_left(
    make_channels: Make, make_cohort: MakeCohort, together: Any
) -> None:
    # Given a party that trains until the coordinator has published the only round and said that it is done
    channels, cohort = make_channels("abz"), make_cohort(2, quorum=1)
    calls: list[tuple[str, int, str]] = []

    def until_the_coordinator_left(number: int) -> None:
        with channels["b"]._changed:
            assert channels["b"]._changed.wait_for(lambda: "z" in channels["b"].left, 10)

    ends = together(
        {
            "a": lambda: contribute(setting(channels["a"], cohort, rounds=1), "a"),
            "b": lambda: contribute(
                setting(channels["b"], cohort, rounds=1, hooks=[Spy(HookStage.CLIP, calls)]),
                "b",
                before=until_the_coordinator_left,
            ),
            "z": lambda: coordinate(setting(channels["z"], cohort, rounds=1, patience=0.3)),
        }
    )
    # Then it has the state of that round, as everybody
    assert [r.contributors for r in ends["b"]] == [("a",)]
    # and sent nothing of its own but its hello, nor ran a hook for what was not sent
    assert channels["b"].counters["z"].sent == 1
    assert calls == []


def test_a_quorum_lost_reaches_everybody_with_a_name(
    make_channels: Make, make_cohort: MakeCohort, together: Any
) -> None:
    # Given three parties that are all needed, When one fails in round 2
    channels, cohort = make_channels("abcz"), make_cohort(3)

    def told_all(party: str, call: Callable[[], Any]) -> Callable[[], Any]:
        def guarded() -> Any:
            try:
                return call()
            except FateError as error:
                channels[party].announce_failure(error, task="tune")
                raise

        return guarded

    def breaks(number: int) -> None:
        if number == 2:
            raise ProtectionError("loss is NaN")

    calls: dict[str, Callable[[], Any]] = {
        "a": lambda: contribute(setting(channels["a"], cohort), "a"),
        "b": lambda: contribute(setting(channels["b"], cohort), "b", before=breaks),
        "c": lambda: contribute(setting(channels["c"], cohort), "c"),
        "z": lambda: coordinate(setting(channels["z"], cohort)),
    }
    ends = together({party: told_all(party, call) for party, call in calls.items()})
    # Then the coordinator names the quorum and its cause, and the others name the coordinator; nobody waits
    # it out
    assert isinstance(ends["z"], QuorumLost)
    assert "loss is NaN" in ends["z"].message
    for party in "ac":
        assert isinstance(ends[party], PeerFailed)
        assert "quorum_lost" in ends[party].message


def test_a_contributor_names_a_coordinator_that_does_not_answer(make_channels: Make, make_cohort: MakeCohort) -> None:
    channels, cohort = make_channels("az"), Cohort(("a",), "z", 1)
    driver = ContributorDriver(setting(channels["a"], cohort, patience=0.02), "a")
    with pytest.raises(RoundTimeout, match=r"the first global state did not come from z within 0\.04 s"):
        driver.start(vector(0.0))


def test_a_lost_state_is_named_as_lost(make_channels: Make, make_cohort: MakeCohort, together: Any) -> None:
    # Given a transport that loses the coordinator's first frame
    channels, cohort = (
        make_channels("az", faults=(Fault(FaultKind.LOSE, "z", "a", 1),)),
        Cohort(("a",), "z", 1),
    )

    def noisy() -> None:
        CoordinatorDriver(setting(channels["z"], cohort)).start()
        channels["z"].announce_done()

    ends = together(
        {"a": lambda: contribute(setting(channels["a"], cohort, patience=0.1), "a"), "z": noisy},
    )
    assert isinstance(ends["a"], MessageLost)
    assert "message 1 from z is lost" in ends["a"].message


def test_terms_that_came_before_the_deadline_count_however_late_the_coordinator_looks(
    make_channels: Make, make_cohort: MakeCohort, together: Any
) -> None:
    # Given a clock by hand: both terms are in the mailbox, and the deadline passes before anybody collects
    now = [0.0]
    cohort = make_cohort(2)
    channels = make_channels("abz", clock=lambda: now[0])
    given = setting(channels["z"], cohort, rounds=1, patience=5.0)

    def late() -> Total:
        driver = CoordinatorDriver(given)
        state = driver.start()
        (round,) = [next(iter(driver))]
        with channels["z"]._changed:
            mail = channels["z"]._mail
            assert channels["z"]._changed.wait_for(
                lambda: all(mail.get(("tune", "round.term", p)) for p in "ab"), timeout=10
            )
        now[0] = 6.0
        total = round.collect()
        round.publish(state)
        return total

    calls: dict[str, Callable[[], Any]] = {
        p: (lambda p=p: contribute(setting(channels[p], cohort, rounds=1), p)) for p in "ab"
    }
    ends = together({**calls, "z": late})
    assert ends["z"].contributors == ("a", "b")


# --- hooks --------------------------------------------------------------------------------------------------


class Spy:
    """Notes its calls, and scales so that the order of two spies shows in the numbers."""

    stage: ClassVar[HookStage] = HookStage.CLIP
    Params: ClassVar[type[Frozen]] = Frozen

    def __init__(self, stage: HookStage, calls: list[tuple[str, int, str]]) -> None:
        self.stage = stage  # type: ignore[misc]
        self.calls = calls

    def before_send(self, update: Update, round_number: int) -> Update:
        self.calls.append(("before", round_number, self.stage.name))
        return update

    def after_sum(self, total: Total, round_number: int) -> Total:
        self.calls.append(("after", round_number, self.stage.name))
        return total


def test_hooks_run_by_their_stage_whatever_the_order_they_are_listed_in(make_channels: Make, together: Any) -> None:
    channels, cohort = make_channels("az"), Cohort(("a",), "z", 1)
    calls: dict[str, list[tuple[str, int, str]]] = {"a": [], "z": []}

    def hooks(side: str) -> list[Spy]:
        return [Spy(stage, calls[side]) for stage in (HookStage.NOISE, HookStage.COMPRESS, HookStage.CLIP)]

    together(
        {
            "a": lambda: contribute(setting(channels["a"], cohort, rounds=2, hooks=hooks("a")), "a"),
            "z": lambda: coordinate(setting(channels["z"], cohort, rounds=2, hooks=hooks("z"))),
        }
    )
    order = ["COMPRESS", "CLIP", "NOISE"]
    assert calls["a"] == [("before", number, stage) for number in (1, 2) for stage in order]
    assert calls["z"] == [("after", number, stage) for number in (1, 2) for stage in order]


# --- loops that call out of turn ----------------------------------------------------------------------------


def test_a_coordinator_that_skips_a_step_is_told(make_channels: Make, together: Any) -> None:
    channels, cohort = make_channels("az"), Cohort(("a",), "z", 1)

    def skips() -> list[str]:
        driver = CoordinatorDriver(setting(channels["z"], cohort))
        state = driver.start()
        texts = []
        rounds = iter(driver)
        round = next(rounds)
        for wrong in (driver.start, lambda: round.publish(state), lambda: next(rounds)):
            with pytest.raises(InternalError) as caught:
                wrong()
            texts.append(caught.value.message)
        round.collect()
        for wrong in (round.collect, lambda: next(iter(driver)).collect()):
            with pytest.raises(InternalError) as caught:
                wrong()
            texts.append(caught.value.message)
        round.publish(state, stop=True)
        return texts

    ends = together({"a": lambda: contribute(setting(channels["a"], cohort), "a"), "z": skips})
    assert isinstance(ends["z"], list), ends["z"]
    assert "cannot be published" in ends["z"][1]
    assert "cannot be collected" in ends["z"][3]


def test_a_contributor_that_contributes_twice_to_a_round_is_told(make_channels: Make, together: Any) -> None:
    channels, cohort = make_channels("az"), Cohort(("a",), "z", 1)

    def twice() -> str:
        driver = ContributorDriver(setting(channels["a"], cohort, rounds=2), "a")
        driver.start(vector(0.0))
        rounds = iter(driver)
        round = next(rounds)
        round.contribute(vector(1.0), weight=1.0)
        with pytest.raises(InternalError) as caught:
            round.contribute(vector(1.0), weight=1.0)
        next(rounds).contribute(vector(1.0), weight=1.0)
        return caught.value.message

    ends = together({"a": twice, "z": lambda: coordinate(setting(channels["z"], cohort, rounds=2))})
    assert "round 1 has its update already" in ends["a"]


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"w": np.zeros(3, np.float32)}, "names differ"),
        (vector(float("nan")), "not finite"),
        ({name: a.astype(np.float64) for name, a in vector(0.0).items()}, "float64"),
    ],
    ids=["names", "NaN", "float64"],
)
def test_an_update_that_cannot_be_summed_is_refused_before_it_is_sent(
    make_channels: Make, together: Any, arrays: dict[str, np.ndarray], text: str
) -> None:
    channels, cohort = make_channels("az"), Cohort(("a",), "z", 1)

    def tries() -> int:
        driver = ContributorDriver(setting(channels["a"], cohort, rounds=1), "a")
        driver.start(vector(0.0))
        sent = channels["a"].sent_bytes()
        (round,) = [next(iter(driver))]
        with pytest.raises(ProtectionError, match=text):
            round.contribute(arrays, weight=1.0)
        assert channels["a"].sent_bytes() == sent
        round.contribute(vector(0.0), weight=1.0)
        return round.number

    ends = together({"a": tries, "z": lambda: coordinate(setting(channels["z"], cohort, rounds=1))})
    assert ends["a"] == 1, ends["a"]


def test_a_party_that_keeps_sending_cannot_keep_a_round_open(
    make_cohort: Callable[..., Cohort], make_channels: Callable[..., dict[str, JobChannel]]
) -> None:
    # Given a round whose time is over, and one of two parties that floods the coordinator with greetings
    now = [0.0]
    channels = make_channels("abz", clock=lambda: now[0])
    cohort = make_cohort(2, quorum=1)
    setting = Setting(channels["z"], "t", cohort, 1, 10.0, PlainSum(), emit=lambda event, **fields: None)
    coordinator = CoordinatorDriver(setting)
    state = {"w": np.zeros(2, np.float32)}
    layout = digest({"w": [2]})
    hello = Payload({"layout": layout}, state)
    channels["a"].send("z", task="t", kind=HELLO, payload=hello)
    channels["b"].send("z", task="t", kind=HELLO, payload=Payload({"layout": layout}))
    coordinator.start()
    term = Payload({"weight": 1.0, "sums": {}}, {"w": np.ones(2, np.float32)})
    channels["a"].send("z", task="t", kind=TERM, payload=term, round=1)
    for _ in range(200):
        channels["b"].send("z", task="t", kind=HELLO, payload=Payload({"layout": layout}))
    while channels["z"].counters["b"].received < 201 or channels["z"].counters["a"].received < 2:
        threading.Event().wait(0.01)  # until the channel's own thread has read it all; the suite's time-out ends it
    now[0] = 100.0
    # When it is collected, then it ends with who contributed, long before the flood is read
    (round,) = [next(iter(coordinator))]
    total = round.collect()
    assert total.contributors == ("a",)
    assert total.missing == ("b",)
    assert sum(len(box) for box in channels["z"]._mail.values()) > 150
