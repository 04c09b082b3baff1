"""Both directions as pure machines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fate_llm.core.errors import PeerViolation
from fate_llm.protocols.link.flow import Inflow, Outflow, Place, Verdict


def outflow(count: int, *, probe: float = 2.0, size: int = 10) -> Outflow:
    flow = Outflow(probe=probe)
    for number in range(1, count + 1):
        flow.add(number, (1, number), size, 100.0)
    return flow


def test_what_was_reported_is_let_go_oldest_first_and_once() -> None:
    flow = outflow(5)
    assert (flow.sent, flow.waiting_bytes) == (5, 50)
    assert flow.reported(3, 101.0) == [(1, 1), (1, 2), (1, 3)]
    assert (flow.received, flow.waiting_bytes) == (3, 20)
    assert flow.reported(3, 102.0) == []
    assert flow.reported(1, 102.0) == []  # an old report takes nothing back
    assert flow.received == 3
    assert flow.reported(5, 103.0) == [(1, 4), (1, 5)]
    assert flow.waiting_bytes == 0


def test_a_report_of_what_was_never_sent_is_refused_and_changes_nothing() -> None:
    flow = outflow(2)
    with pytest.raises(PeerViolation, match="chunk 3 is reported as received, of 2"):
        flow.reported(3, 101.0)
    assert (flow.received, flow.waiting_bytes) == (0, 20)
    assert flow.reported(2, 101.0) == [(1, 1), (1, 2)]


def test_only_what_the_receiver_could_know_of_goes_again() -> None:
    flow = outflow(6)
    flow.reported(2, 100.0)
    assert flow.missing(2, 5) == [(1, 3), (1, 4), (1, 5)]
    assert flow.missing(4, 5) == [(1, 5)]
    assert flow.missing(5, 5) == []
    assert flow.missing(0, 6) == [(1, 3), (1, 4), (1, 5), (1, 6)]


def test_what_is_not_kept_any_more_is_known_to_be_lacking() -> None:
    flow = outflow(3)
    assert not flow.lacks(0)
    flow.reported(2, 100.0)
    assert flow.lacks(1)
    assert not flow.lacks(2)
    flow.reported(3, 100.0)
    assert flow.lacks(2)
    assert not flow.lacks(3)


def test_a_probe_is_due_after_quiet_and_each_in_vain_doubles_the_wait() -> None:
    flow = outflow(1)
    assert not flow.probe_due(101.9)
    assert flow.probe_due(102.0)
    waits, now = [], 102.0
    for _ in range(7):
        flow.probed(now)
        start = now
        while not flow.probe_due(now):
            now += 1.0
        waits.append(now - start)
    assert waits == [2.0, 4.0, 8.0, 16.0, 32.0, 32.0, 32.0]
    flow.add(2, (1, 2), 10, now)
    flow.reported(1, now)  # progress
    assert not flow.probe_due(now + 1.9)
    assert flow.probe_due(now + 2.0)


def test_nothing_is_asked_when_nothing_is_open() -> None:
    flow = outflow(1)
    flow.reported(1, 100.0)
    assert not flow.probe_due(1e9)
    flow.add(2, (1, 2), 10, 1e9)
    assert not flow.probe_due(1e9 + 1.9), "quiet counts from when there was something to wait for"
    assert flow.probe_due(1e9 + 2.0)


def test_each_probe_is_answered_once() -> None:
    flow = outflow(1)
    assert not flow.answered(101.0)
    assert flow.round_trip is None
    flow.probed(102.0)
    assert flow.answered(102.5)
    assert flow.round_trip == 0.5
    assert not flow.probe_due(104.4), "an answer without progress is no reason to ask at once"
    assert flow.probe_due(104.5)
    assert not flow.answered(103.0)
    assert flow.round_trip == 0.5


def test_the_window_of_what_comes_early() -> None:
    flow = Inflow(window=3)
    flow.restore(10, 2)
    found = {number: flow.verdict(number) for number in (1, 10, 11, 12, 14, 15, 2**62)}
    assert found == {
        1: Verdict.TWICE,
        10: Verdict.TWICE,
        11: Verdict.NEXT,
        12: Verdict.EARLY,
        14: Verdict.EARLY if 14 <= 13 else Verdict.BEYOND,
        15: Verdict.BEYOND,
        2**62: Verdict.BEYOND,
    }
    assert flow.verdict(13) is Verdict.EARLY


@given(st.lists(st.lists(st.integers(1, 9), max_size=5), max_size=6))
def test_messages_of_any_sizes_are_followed(messages: list[list[int]]) -> None:
    flow = Inflow(window=1)
    count = 0
    for number, pieces in enumerate(messages, start=1):
        size, offset = sum(pieces), 0
        for length in pieces or [0]:
            place = Place(number, size, offset)
            flow.check(place)
            offset += length
            count += 1
            assert flow.take(place, length) == (offset == size)
            assert flow.progress == (None if offset == size else (offset, size))
        assert (flow.message, flow.received) == (number, count)


@pytest.mark.parametrize(
    "place",
    [
        Place(3, 20, 10),  # a message too early
        Place(1, 20, 10),  # one that is over
        Place(2, 21, 10),  # another size midway
        Place(2, 20, 11),  # a gap
        Place(2, 20, 9),  # an overlap
        Place(2, 20, 0),  # from the start again
    ],
)
def test_a_chunk_out_of_place_is_refused_and_changes_nothing(place: Place) -> None:
    flow = Inflow(window=1)
    flow.take(Place(1, 5, 0), 5)
    flow.take(Place(2, 20, 0), 10)
    with pytest.raises(PeerViolation, match="should be"):
        flow.check(place)
    flow.check(Place(2, 20, 10))
    assert flow.take(Place(2, 20, 10), 10)


@pytest.mark.parametrize("place", [Place(1, 5, 0), Place(3, 5, 0), Place(2, 5, 1)])
def test_a_message_begins_at_its_beginning_and_in_turn(place: Place) -> None:
    flow = Inflow(window=1)
    flow.take(Place(1, 5, 0), 5)
    with pytest.raises(PeerViolation):
        flow.check(place)


def test_a_message_that_was_abandoned_is_begun_again_in_its_place() -> None:
    flow = Inflow(window=1)
    flow.take(Place(1, 20, 0), 10)
    flow.abandon()
    assert flow.progress is None
    flow.check(Place(1, 7, 0))
    assert flow.take(Place(1, 7, 0), 7)
    assert (flow.received, flow.message) == (2, 1)
