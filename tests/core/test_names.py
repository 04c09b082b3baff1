"""Names and the nearest valid one."""

from __future__ import annotations

import pytest

from fate_llm.core.names import is_name, nearest


@pytest.mark.parametrize("good", ["a", "bank-a", "0", "a.b_c-d", "a" * 64])
def test_valid_names(good: str) -> None:
    assert is_name(good)


@pytest.mark.parametrize("bad", ["", "A", "-a", "a-", ".", "..", "a/b", "a b", "a\n", "ä", "a" * 65, "../x"])
def test_names_that_could_hurt_are_not_valid(bad: str) -> None:
    assert not is_name(bad)


def test_the_nearest_name_is_offered() -> None:
    assert nearest("meidan", ["fedavg", "median"]) == "did you mean 'median'?"


def test_without_a_near_name_the_valid_ones_are_listed_and_cut() -> None:
    assert nearest("zzz", ["b", "a"]) == "valid: a, b"
    assert nearest("zzz", [f"n{i}" for i in range(9)], most=2) == "valid: n0, n1, ..."
    assert nearest("zzz", []) == ""
