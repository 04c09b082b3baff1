"""What a coordinator sees of a masked vector: nothing that a fair coin would not show. All seeds are fixed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fate_llm.core.values import Array, Update
from fate_llm.protocols.secagg import party as party_module
from tests.masking import Masking, make_update
from tests.protocols.secagg.checks import (
    LONG,
    WIDTH,
    check_both_masks_needed,
    check_fresh_keys,
    check_masks_bound_to_transcript,
    check_masks_of_rounds_differ,
    check_uniform,
    check_whole_key_counts,
    chi_square,
    constant,
    correlation,
    masked_round,
    signed,
    words_of,
)


def test_masked_words_are_uniform_and_have_nothing_in_common_with_what_they_hide() -> None:
    check_uniform()


def test_the_tests_of_chance_see_what_is_not_chance() -> None:
    """They would not be passed by plain words, by a bounded mask, or by one vector twice."""
    draw = np.random.Generator(np.random.PCG64(1))
    update = make_update(0, layout=LONG).arrays["w"].reshape(-1)
    plain = (update * 2**24).astype(np.int32).view(np.uint32)
    bounded = plain + draw.integers(0, 1 << 28, WIDTH, dtype=np.uint32)
    fair = draw.integers(0, 1 << 32, WIDTH, dtype=np.uint32)
    assert chi_square(plain) > 100 and chi_square(bounded) > 100 and abs(chi_square(fair)) < 5
    assert correlation(signed(plain), update) > 100 and abs(correlation(signed(fair), update)) < 5
    assert correlation(signed(plain + fair // 64), update) > 5  # a mask of a 64th of the ring is no mask


def test_one_of_the_two_masks_of_a_party_hides_it_alone() -> None:
    check_both_masks_needed()


def test_no_key_comes_again() -> None:
    check_fresh_keys()


def test_masks_are_bound_to_all_that_was_said() -> None:
    check_masks_bound_to_transcript()


def test_the_same_input_in_two_rounds_gives_unrelated_vectors() -> None:
    check_masks_of_rounds_differ()


def test_the_same_input_of_two_parties_gives_unrelated_vectors() -> None:
    updates = dict.fromkeys(("p000", "p001", "p002"), constant())
    masking = Masking(3, layout=LONG, updates=updates)
    masking.run()
    for one, other in itertools.combinations(masking.names, 2):
        first, second = words_of(masking, one), words_of(masking, other)
        assert abs(chi_square(first - second)) < 5 and abs(chi_square(first + second)) < 5
        assert abs(correlation(signed(first), signed(second))) < 5


def test_every_bit_of_a_mask_key_counts() -> None:
    check_whole_key_counts()


def test_partial_sums_are_as_random_as_single_terms() -> None:
    """All vectors but one, added: the masks towards the missing one stay on."""
    masking = Masking(4, layout=LONG, updates=dict.fromkeys(("p000", "p001", "p002", "p003"), constant()))
    masking.run()
    for left_out in masking.names:
        total = np.zeros(WIDTH, np.uint32)
        for name in masking.names:
            if name != left_out:
                total += words_of(masking, name)
        assert abs(chi_square(total)) < 5


def test_the_average_of_many_rounds_gets_nothing() -> None:
    """An attack that works on bounded masks: the input stays, the masks average away. Here they wrap around."""
    update = np.full(512, 0.75, np.float32)
    layout = {"w": (512,)}
    rounds: list[Array] = []
    for number in range(1, 201):
        masking = Masking(3, layout=layout, round=number, updates={"p000": Update({"w": update}, 2.0**20, {})})
        masking.contribute()
        while not list(masking.messages("masked", to_server=True)):
            masking.step(0)
        rounds.append(signed(words_of(masking, "p000")).astype(np.float64))
    stacked = np.stack(rounds)
    spread = 2.0**32 / np.sqrt(12)  # of one uniform word
    means = stacked.mean(axis=0)
    assert np.abs(means).max() < 5 * spread / np.sqrt(200)  # what chance alone gives
    assert abs(stacked.mean()) < 5 * spread / np.sqrt(200 * 512)  # the input itself is at 0.75 / 3 of the ring's half
    true = 0.75 * masking.agreement("p000").fixed_point.scale
    assert true > 50 * spread / np.sqrt(200 * 512)  # so it would have been seen
    assert abs(chi_square(stacked.astype(np.int64).astype(np.uint32))) < 5
    for lag in (1, 2, 100):
        assert abs(correlation(stacked[lag:], stacked[:-lag])) < 5


def test_the_same_input_in_many_rounds_never_gives_a_word_of_its_own() -> None:
    """Coordinates of one vector among each other: the keystream does not come again within it either."""
    words = words_of(masked_round(update=constant()), "p000")
    half = words.size // 2
    assert abs(correlation(signed(words[:half]), signed(words[half:]))) < 5
    assert abs(correlation(signed(words[:-1]), signed(words[1:]))) < 5
    assert abs(correlation(signed(words[: -65536 // 4]), signed(words[65536 // 4 :]))) < 5
    expected = words.size * (words.size - 1) / 2**33  # pairs that are the same by chance
    assert words.size - np.unique(words).size <= expected + 5 * np.sqrt(expected) + 1


def test_the_wide_numbers_are_masked_as_the_words_are() -> None:
    """The weight and the sums of losses: sixteen uniform bytes each, in every round others."""
    rows = []
    updates = dict.fromkeys(("p000", "p001", "p002"), Update({}, 1.0, {"a": 1.0, "b": 1.0}))
    for number in range(1, 41):
        masking = Masking(3, layout={}, round=number, updates=dict(updates))
        masking.run()
        sent = next(m for m in masking.messages("masked", to_server=True) if m.sender == "p000")
        rows.append(sent.body.tensors["wide"].copy())
    table = np.stack(rows)
    assert table.shape == (40, 3, 16)
    assert abs(chi_square(table)) < 5
    assert len({row.tobytes() for row in table.reshape(-1, 16)}) == 120


@pytest.mark.parametrize("size", [1, 3, 4, 5, 65535, 65536, 65537])
def test_masks_cancel_at_every_length(size: int) -> None:
    """Words, padding and wide numbers share a stream; where one ends another begins."""
    keys = [bytes([number]) * 32 for number in range(1, 4)]
    words, wide = np.arange(size, dtype=np.uint32), [5, (1 << 128) - 1]
    party_module.add_masks(words, wide, plus=keys[:2], minus=keys[2:])
    assert not np.array_equal(words, np.arange(size)) and wide != [5, (1 << 128) - 1]
    party_module.add_masks(words, wide, plus=keys[2:], minus=keys[:2])
    assert np.array_equal(words, np.arange(size)) and wide == [5, (1 << 128) - 1]
