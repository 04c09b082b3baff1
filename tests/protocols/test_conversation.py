"""A component's view of the channel: names, gathering, and sums outside the rounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fate_llm.core.errors import PeerFailed, ProtectionError, QuorumLost, RoundTimeout
from fate_llm.core.values import Cohort, Payload
from fate_llm.protocols.channel import JobChannel
from fate_llm.protocols.conversation import TaskChannel
from fate_llm.protocols.sums.plain import PlainSum

Make = Callable[..., dict[str, JobChannel]]
MakeCohort = Callable[..., Cohort]


def view(channel: JobChannel, cohort: Cohort, *, task: str = "t", patience: float = 10.0) -> TaskChannel:
    return TaskChannel(channel, task, cohort, patience, lambda name, params: PlainSum(), lambda event, **fields: None)


def test_messages_go_by_task_and_name(make_channels: Make, make_cohort: MakeCohort) -> None:
    channels, cohort = make_channels("abz"), make_cohort(2)
    sender = view(channels["a"], cohort)
    sender.send("b", "x", Payload({"n": 1}))
    sender.send("b", "y", Payload({"n": 2}))
    view(channels["a"], cohort, task="other").send("b", "x", Payload({"n": 3}))
    receiver = view(channels["b"], cohort)
    assert receiver.receive("a", "y").fields == {"n": 2}
    assert receiver.receive("a", "x").fields == {"n": 1}
    assert view(channels["b"], cohort, task="other").receive("a", "x").fields == {"n": 3}


def test_broadcast_reaches_the_cohort_and_nobody_else(make_channels: Make, make_cohort: MakeCohort) -> None:
    channels, cohort = make_channels("abcz"), make_cohort(2)
    view(channels["a"], cohort).broadcast("hi", Payload({"n": 1}))
    for party in "bz":
        assert view(channels[party], cohort).receive("a", "hi").fields == {"n": 1}
    assert channels["a"].counters["c"].sent == 0


def test_gather_returns_the_others_in_roster_order(make_channels: Make, make_cohort: MakeCohort) -> None:
    channels, cohort = make_channels("abcz"), make_cohort(3)
    for party in "cba":
        view(channels[party], cohort).send("z", "n", Payload({"from": party}))
    assert list(view(channels["z"], cohort).gather("n")) == ["a", "b", "c"]


def test_gather_has_one_deadline_for_all(make_channels: Make, make_cohort: MakeCohort) -> None:
    # Given a clock that moves on by itself one second with every look
    now = iter(range(1_000_000))
    channels, cohort = make_channels("abcz", clock=lambda: float(next(now))), make_cohort(3)
    view(channels["a"], cohort).send("z", "n", Payload({}))
    with pytest.raises(RoundTimeout, match="'n' from"):
        view(channels["z"], cohort).gather("n", timeout=3.0)


def test_a_wait_names_what_it_waited_for(make_channels: Make, make_cohort: MakeCohort) -> None:
    channels, cohort = make_channels("abz"), make_cohort(2)
    with pytest.raises(RoundTimeout, match="task t: 'emulator' from z did not come in time"):
        view(channels["a"], cohort).receive("z", "emulator", timeout=0.0)


def aggregate(channel: JobChannel, cohort: Cohort, sums: dict[str, float] | None, times: int = 1) -> Any:
    task = view(channel, cohort, patience=10.0)
    rounds = [task.aggregate("scores", sums, protection="plain") for _ in range(times)]
    return rounds if times > 1 else rounds[0]


def test_aggregate_adds_up_and_everyone_gets_the_sums(
    make_channels: Make, make_cohort: MakeCohort, together: Any
) -> None:
    channels, cohort = make_channels("abcz"), make_cohort(3)
    given = {"a": {"loss": 1.5, "n": 3.0}, "b": {"loss": 2.5, "n": 4.0}, "c": {"loss": 0.0, "n": 0.0}}
    calls = {p: (lambda p=p: aggregate(channels[p], cohort, given[p])) for p in "abc"}
    ends = together({**calls, "z": lambda: aggregate(channels["z"], cohort, None)})
    assert all(end == {"loss": 4.0, "n": 7.0} for end in ends.values()), ends


def test_a_name_can_be_used_again(make_channels: Make, make_cohort: MakeCohort, together: Any) -> None:
    channels, cohort = make_channels("abz"), make_cohort(2)
    calls = {p: (lambda p=p: aggregate(channels[p], cohort, {"n": 2.0}, times=5)) for p in "ab"}
    ends = together({**calls, "z": lambda: aggregate(channels["z"], cohort, None, times=5)})
    assert all(end == [{"n": 4.0}] * 5 for end in ends.values()), ends


def test_late_numbers_of_one_use_never_count_in_the_next(
    make_channels: Make, make_cohort: MakeCohort, together: Any
) -> None:
    # Given a first sum that ended without `b`
    channels, cohort = make_channels("abz"), make_cohort(2, quorum=1)
    views = {party: view(channels[party], cohort, patience=0.2) for party in "abz"}

    def scores(party: str, number: float | None) -> Callable[[], Any]:
        sums = None if number is None else {"n": number}
        return lambda: views[party].aggregate("scores", sums, protection="plain")

    assert together({"a": scores("a", 1.0), "z": scores("z", None)})["z"] == {"n": 1.0}
    # When `b` comes with its number of the first while the others are at the second
    ends = together({"a": scores("a", 2.0), "b": scores("b", 666.0), "z": scores("z", None)})
    # Then the second is without it, and `b` is told that it is too late
    assert ends["z"] == ends["a"] == {"n": 2.0}
    assert isinstance(ends["b"], RoundTimeout)


def test_a_party_that_fails_ends_the_sum_for_all(make_channels: Make, make_cohort: MakeCohort, together: Any) -> None:
    channels, cohort = make_channels("abz"), make_cohort(2)

    def fails() -> None:
        channels["b"].announce_failure(ProtectionError("no"), task="t")

    def told() -> Any:
        try:
            return aggregate(channels["z"], cohort, None)
        except QuorumLost as error:
            channels["z"].announce_failure(error, task="t")
            raise

    ends = together({"a": lambda: aggregate(channels["a"], cohort, {"n": 1.0}), "b": fails, "z": told})
    assert isinstance(ends["z"], QuorumLost)
    assert isinstance(ends["a"], PeerFailed)


def test_a_number_that_is_not_finite_is_refused_before_it_is_sent(
    make_channels: Make, make_cohort: MakeCohort, together: Any
) -> None:
    channels, cohort = make_channels("az"), make_cohort(1)

    def tries() -> None:
        try:
            aggregate(channels["a"], cohort, {"loss": float("nan")})
        except ProtectionError as error:
            channels["a"].announce_failure(error, task="t")
            raise

    ends = together({"a": tries, "z": lambda: aggregate(channels["z"], cohort, None)})
    assert isinstance(ends["a"], ProtectionError)
    assert isinstance(ends["z"], QuorumLost)
