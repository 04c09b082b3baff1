"""Room on a party's machine: order, overtaking, no starvation, no overbooking."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fate_llm.core.errors import ConfigurationError, InternalError
from fate_llm.runtime.service.slots import Grant, Refuse, Room, Slots

GIB = 1 << 30


def granted(actions: list[Grant | Refuse]) -> list[str]:
    assert all(isinstance(action, Grant) for action in actions)
    return [action.job for action in actions]


@pytest.fixture
def slots() -> Slots:
    return Slots(Room(cpus=4, memory=8 * GIB, gpus=2), patience=100.0)


def test_what_fits_is_granted_at_once(slots: Slots) -> None:
    assert granted(slots.request("a", Room(2, 4 * GIB, 1), 5, 0.0)) == ["a"]
    assert slots.free == Room(2, 4 * GIB, 1)
    assert slots.queue == ()


def test_what_does_not_fit_waits_for_what_is_given_back(slots: Slots) -> None:
    slots.request("a", Room(gpus=2), 5, 0.0)
    assert slots.request("b", Room(gpus=1), 5, 1.0) == []
    assert slots.explain("b") == "number 1 in the queue, waits for 1 GPUs of 0 free"
    assert slots.explain("a") == ""
    assert granted(slots.release("a", 2.0)) == ["b"]
    assert slots.held == {"b": Room(gpus=1)}


def test_the_higher_priority_goes_first_then_the_older(slots: Slots) -> None:
    slots.request("all", Room(cpus=4), 5, 0.0)
    for job, priority, now in (("old", 5, 1.0), ("young", 5, 2.0), ("urgent", 9, 3.0), ("idle", 0, 0.5)):
        assert slots.request(job, Room(cpus=4), priority, now) == []
    order = []
    holder = "all"
    while slots.waiting:
        (holder,) = granted(slots.release(holder, 10.0))
        order.append(holder)
    assert order == ["urgent", "old", "young", "idle"]


def test_a_job_that_does_not_fit_does_not_block_those_behind(slots: Slots) -> None:
    slots.request("a", Room(cpus=3), 5, 0.0)
    assert slots.request("big", Room(cpus=4), 5, 1.0) == []
    assert granted(slots.request("small", Room(cpus=1), 5, 2.0)) == ["small"]


def test_room_is_held_for_who_was_overtaken_for_too_long(slots: Slots) -> None:
    # Given a big job that has been overtaken until its patience is over
    slots.request("a", Room(cpus=3), 5, 0.0)
    slots.request("big", Room(cpus=4), 5, 0.0)
    assert granted(slots.request("small", Room(cpus=1), 5, 99.0)) == ["small"]
    slots.release("small", 100.0)
    # When others come, Then they get nothing that it waits for, but what it does not need
    assert slots.request("late", Room(cpus=1), 5, 101.0) == []
    assert "held for a job before it" in slots.explain("late")
    assert granted(slots.request("gpu", Room(gpus=1), 5, 102.0)) == ["gpu"]
    # and a higher priority still goes first
    assert granted(slots.request("urgent", Room(cpus=1), 6, 103.0)) == ["urgent"]
    slots.release("urgent", 104.0)
    assert granted(slots.release("a", 105.0)) == ["big"]
    assert granted(slots.release("big", 106.0)) == ["late"]


def test_age_counts_from_the_first_time_a_job_came(slots: Slots) -> None:
    slots.request("all", Room(cpus=4), 5, 0.0)
    slots.request("b", Room(cpus=4), 5, 10.0)
    # A job that gave its room back elsewhere and comes again is as old as it was
    slots.request("a", Room(cpus=4), 5, 20.0, since=5.0)
    assert slots.queue == ("a", "b")
    slots.request("b", Room(cpus=4), 5, 30.0, since=1.0)
    assert slots.queue == ("b", "a")


@pytest.mark.parametrize(
    ("need", "said"),
    [
        (Room(cpus=4.5), "4.5 CPU cores of 4"),
        (Room(memory=9 * GIB), "9 GiB of memory of 8 GiB"),
        (Room(gpus=3), "3 GPUs of 2"),
        (Room(cpus=9, gpus=9), "9 CPU cores of 4, 9 GPUs of 2"),
    ],
)
def test_more_than_there_is_is_refused_at_once(slots: Slots, need: Room, said: str) -> None:
    (refusal,) = slots.request("a", need, 5, 0.0)
    assert isinstance(refusal, Refuse) and said in refusal.reason
    assert not slots.waiting and not slots.held


def test_everything_may_be_said_twice(slots: Slots) -> None:
    need = Room(cpus=3)
    assert granted(slots.request("a", need, 5, 0.0)) == ["a"]
    assert granted(slots.request("a", need, 5, 1.0)) == ["a"]
    assert slots.request("b", need, 5, 2.0) == slots.request("b", need, 5, 3.0) == []
    assert slots.waiting["b"].since == 2.0
    assert granted(slots.release("a", 4.0)) == ["b"]
    assert slots.release("a", 5.0) == []
    assert slots.release("nobody", 5.0) == []


def test_a_request_may_change_while_it_waits(slots: Slots) -> None:
    slots.request("a", Room(cpus=3), 5, 0.0)
    slots.request("b", Room(cpus=2), 5, 1.0)
    assert granted(slots.request("b", Room(cpus=1), 5, 2.0)) == ["b"]
    slots.request("c", Room(cpus=2), 5, 3.0)
    (refusal,) = slots.request("c", Room(cpus=8), 5, 4.0)
    assert isinstance(refusal, Refuse)
    assert "c" not in slots.waiting


def test_a_party_may_lend_less_than_before(slots: Slots) -> None:
    slots.request("a", Room(cpus=4), 5, 0.0)
    slots.request("b", Room(cpus=2), 5, 0.0)
    slots.request("c", Room(cpus=4), 5, 0.0)
    # Who holds room keeps it, who can never have it is told
    (refusal,) = slots.resize(Room(cpus=2), 1.0)
    assert isinstance(refusal, Refuse) and refusal.job == "c"
    assert slots.free == Room(0, 0, 0)
    assert granted(slots.release("a", 2.0)) == ["b"]
    assert granted(slots.request("d", Room(cpus=0.0), 5, 3.0)) == ["d"]
    assert granted(slots.resize(Room(cpus=8), 4.0)) == []


def test_a_party_may_lend_more_than_before(slots: Slots) -> None:
    slots.request("a", Room(cpus=4), 5, 0.0)
    slots.request("b", Room(cpus=2), 5, 0.0)
    assert granted(slots.resize(Room(cpus=6), 1.0)) == ["b"]


@pytest.mark.parametrize("wrong", [{"cpus": -1.0}, {"cpus": float("nan")}, {"memory": -1}, {"gpus": -2}])
def test_room_below_nothing_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="resources: "):
        Room(**wrong)  # type: ignore[arg-type]


def test_fractions_of_cores_add_up() -> None:
    slots = Slots(Room(cpus=1.0))
    names = [f"j{number}" for number in range(10)]
    assert [granted(slots.request(name, Room(cpus=0.1), 5, 0.0)) for name in names] == [[name] for name in names]
    assert slots.request("more", Room(cpus=0.1), 5, 0.0) == []


@pytest.mark.parametrize(
    "data", [{}, {"capacity": {"cpus": "many"}}, {"capacity": {"cpus": -1.0}}, {"capacity": {}, "held": {"a": 1}}]
)
def test_stored_data_that_is_something_else_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(InternalError, match="stored slots"):
        Slots.from_data(data)


ROOMS = st.builds(Room, cpus=st.sampled_from([0.5, 1.0, 2.0, 4.0]), memory=st.integers(0, 4), gpus=st.integers(0, 2))
STEPS = st.lists(
    st.tuples(st.sampled_from(["ask", "ask", "give", "reload"]), st.sampled_from("abcdefg"), ROOMS, st.integers(0, 3)),
    max_size=40,
)


@settings(deadline=None, max_examples=40)
@given(steps=STEPS)
def test_whatever_is_asked_never_more_is_lent_than_there_is(
    steps: list[tuple[str, str, Room, int]],
) -> None:
    slots = Slots(Room(cpus=4.0, memory=4, gpus=2), patience=10.0)
    for now, (what, job, need, priority) in enumerate(steps):
        before = dict(slots.held)
        if what == "reload":
            slots = Slots.from_data(json.loads(json.dumps(slots.to_data())))
            continue
        actions = slots.request(job, need, priority, float(now)) if what == "ask" else slots.release(job, float(now))
        # What is held is exactly what was granted and not given back, and fits
        expected = {name: room for name, room in before.items() if what == "ask" or name != job}
        assert set(slots.held) == set(expected) | {action.job for action in actions if isinstance(action, Grant)}
        assert not slots.capacity.lacks(sum(slots.held.values(), Room()))
        assert not slots.held.keys() & slots.waiting.keys()
        # Nobody waits who could go, unless room is held for one before it
        first = slots.queue[0] if slots.queue else None
        assert first is None or slots.free.lacks(slots.waiting[first].need)


@settings(deadline=None, max_examples=25)
@given(stream=st.lists(ROOMS, min_size=30, max_size=30), needs=ROOMS)
def test_nobody_starves(stream: list[Room], needs: Room) -> None:
    # Given a job that waits for a full machine, and an endless stream of others that hold room for 3 steps each
    slots = Slots(Room(cpus=4.0, memory=4, gpus=2), patience=10.0)
    slots.request("full", Room(cpus=4.0, memory=4, gpus=2), 5, 0.0)
    slots.request("patient", needs, 5, 0.0)
    slots.release("full", 1.0) if "patient" not in slots.held else None
    started: dict[str, int] = {}
    # When patience is over, and all that ran then have ended
    for now, need in enumerate(stream):
        slots.request(f"s{now}", need, 5, float(now))
        for job in slots.held:
            started.setdefault(job, now)
        for job in [job for job in slots.held if job != "patient" and now - started[job] >= 3]:
            slots.release(job, float(now))
    # Then it has had its turn
    assert "patient" in slots.held
