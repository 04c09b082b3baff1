"""What parties of one process share."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from fate_llm.runtime.sharing import Sharing


def test_one_party_computes_at_a_time(together: Any) -> None:
    sharing, inside, seen = Sharing(), [0], []

    def compute() -> None:
        for _ in range(100):
            with sharing.turn():
                inside[0] += 1
                seen.append(inside[0])
                inside[0] -= 1

    together(dict.fromkeys("abcd", compute))
    assert seen == [1] * 400


def test_a_pause_lets_another_compute_and_takes_the_turn_back(together: Any) -> None:
    sharing, order = Sharing(), []
    started, paused = threading.Event(), threading.Event()

    def first() -> None:
        with sharing.turn():
            started.set()
            with sharing.pause():
                assert paused.wait(10)
            order.append("first goes on")
            assert sharing._machine.locked()

    def second() -> None:
        assert started.wait(10)
        with sharing.turn():
            order.append("second")
            paused.set()

    ends = together({"first": first, "second": second})
    assert ends == {"first": None, "second": None}
    assert order == ["second", "first goes on"]


def test_a_turn_and_a_pause_end_with_an_error_inside() -> None:
    sharing = Sharing()
    with pytest.raises(RuntimeError), sharing.turn(), sharing.pause():
        raise RuntimeError
    assert not sharing._machine.locked()


def test_an_object_is_made_once_and_others_wait_for_it(together: Any) -> None:
    sharing, made, waiting = Sharing(), [], threading.Barrier(4, timeout=10)

    def factory() -> object:
        made.append(object())
        return made[-1]

    def ask() -> object:
        waiting.wait()
        return sharing.shared("model", factory)

    ends = together(dict.fromkeys("abcd", ask))
    assert len(made) == 1
    assert all(end is made[0] for end in ends.values())
    assert sharing.shared("other", list) == []


def test_a_making_that_failed_is_tried_again() -> None:
    sharing = Sharing()

    def fails() -> int:
        raise OSError("no model")

    with pytest.raises(OSError):
        sharing.shared("model", fails)
    assert sharing.shared("model", lambda: 5) == 5


def test_while_one_object_is_made_another_can_be(together: Any) -> None:
    sharing, other = Sharing(), threading.Event()

    def slow() -> str:
        assert other.wait(10)
        return "slow"

    def quick() -> str:
        other.set()
        return "quick"

    ends = together({"a": lambda: sharing.shared("a", slow), "b": lambda: sharing.shared("b", quick)})
    assert ends == {"a": "slow", "b": "quick"}
