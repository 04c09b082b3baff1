"""Seeds depend on the job and the labels, and on nothing else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fate_llm.core.seeds import derive_seed


def test_a_seed_is_the_same_everywhere() -> None:
    assert derive_seed(7, "tune", "bank-a") == derive_seed(7, "tune", "bank-a") == 332722015


def test_every_part_counts() -> None:
    seeds = [
        derive_seed(7),
        derive_seed(8),
        derive_seed(7, "a"),
        derive_seed(7, "a", "b"),
        derive_seed(7, "b", "a"),
    ]
    seeds += [derive_seed(7, "ab"), derive_seed(71, "b"), derive_seed(-7)]
    assert len(set(seeds)) == len(seeds)


@given(st.integers(), st.lists(st.text(max_size=5), max_size=3))
def test_a_seed_fits_every_generator(seed: int, labels: list[str]) -> None:
    labels = [label.encode("utf-8", "ignore").decode() for label in labels]
    assert 0 <= derive_seed(seed, *labels) < 2**31
