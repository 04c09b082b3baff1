"""The allowance: bursts up to what is kept, then what comes back in a second; never more than that in the long run."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fate_llm.runtime.allowance import Allowance


def fresh(**changes: float) -> Allowance:
    settings = {"messages": 3.0, "size": 100.0, "at": 10.0, **changes}
    return Allowance(settings["messages"], settings["size"], (1.0, 10.0), settings["at"])


def test_a_burst_passes_and_then_what_comes_back() -> None:
    found = fresh()
    assert [found.take(1, 10.0) for _ in range(4)] == [True, True, True, False]
    assert [found.take(1, 10.9), found.take(1, 11.0), found.take(1, 11.0)] == [False, True, False]


def test_bytes_are_counted_as_well() -> None:
    found = fresh()
    assert [found.take(90, 10.0), found.take(11, 10.0), found.take(10, 10.0)] == [True, False, True]
    assert [found.take(20, 11.9), found.take(20, 12.0)] == [False, True]


def test_what_is_too_large_for_all_of_it_never_passes() -> None:
    assert not fresh().take(101, 1e9)


def test_no_more_is_kept_than_at_first() -> None:
    found = fresh()
    assert [found.take(1, 1e6) for _ in range(4)] == [True, True, True, False]


def test_a_debt_is_paid_back_first() -> None:
    found = fresh()
    assert found.take(10, 10.0)
    found.charge(190)
    assert [found.take(1, 20.0), found.take(1, 20.2)] == [False, True]


def test_a_clock_that_stands_still_or_goes_back_gives_nothing() -> None:
    found = fresh()
    assert [found.take(1, seconds) for seconds in (10.0, 9.0, 10.0, 9.0)] == [True, True, True, False]


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(0, 120)), max_size=50))
def test_never_more_than_what_was_kept_and_came_back(steps: list[tuple[float, int]]) -> None:
    found, now, taken, size = fresh(), 10.0, 0, 0
    for pause, length in steps:
        now += pause
        if found.take(length, now):
            taken, size = taken + 1, size + length
        assert taken <= 3 + (now - 10.0) + 1e-6
        assert size <= 100 + 10 * (now - 10.0) + 1e-6
