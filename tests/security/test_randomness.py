"""Unpredictable bytes come from the operating system and from one place."""

from __future__ import annotations

import random

import numpy as np
import pytest

from fate_llm.security.randomness import random_bytes, random_id


@pytest.mark.parametrize("count", [0, 1, 32])
def test_the_number_of_bytes_is_what_was_asked_for(count: int) -> None:
    assert len(random_bytes(count)) == count
    assert len(random_id(count)) == 2 * count
    assert not set(random_id(count)) - set("0123456789abcdef")


def test_a_seed_has_no_influence() -> None:
    seen = set()
    for _ in range(3):
        random.seed(0)
        np.random.seed(0)
        seen |= {random_bytes(16).hex(), random_id(16)}
    assert len(seen) == 6
