"""int8 on the wire: bounds, no bias, and what is kept from round to round."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fate_llm.components.hooks.int8 import BLOCK, Int8, scales_name
from fate_llm.core.errors import PeerViolation, ProtectionError
from fate_llm.core.values import Payload

FLOAT32 = np.dtype(np.float32)


def decoded(sent: Payload, **shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    form = {name: (FLOAT32, shape) for name, shape in shapes.items()}
    return dict(Int8(seed=0).decode(sent, form).tensors)


def there_and_back(values: np.ndarray, *, seed: int = 1, number: int = 1, hook: Int8 | None = None) -> np.ndarray:
    sent = (hook or Int8(seed=seed)).encode(Payload({}, {"w": values}), number)
    return decoded(sent, w=values.shape)["w"]


def steps_of(values: np.ndarray) -> np.ndarray:
    """One step of each value's block, in float64."""
    flat = np.abs(values.astype(np.float64)).reshape(-1)
    largest = [flat[begin : begin + BLOCK].max() for begin in range(0, flat.size, BLOCK)]
    return np.repeat(largest, BLOCK)[: flat.size].reshape(values.shape) / 127


@given(
    values=hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-(2.0**126), 2.0**126, width=32)),
    seed=st.integers(0, 2**31 - 1),
)
@example(values=np.array([1e38, 1e-45, -1e-45, -0.0, 1.0], np.float32), seed=0)
@example(values=np.array([3e-45, -1e-45, 1e-45], np.float32), seed=0)
@example(values=np.array([200e-45, 199e-45, 1e-45], np.float32), seed=0)
@example(values=np.full(5, 0.1, np.float32), seed=2**31 - 1)
@settings(deadline=None, max_examples=300)
def test_no_value_is_off_by_more_than_one_step(values: np.ndarray, seed: int) -> None:
    found = there_and_back(values, seed=seed).astype(np.float64)
    smallest = 2.0**-149  # a step is rounded up to a float32
    limit = np.maximum(steps_of(values) * (1 + 2**-22), smallest)
    assert (np.abs(found - values) <= limit).all()


def test_blocks_have_scales_of_their_own() -> None:
    # Given a huge value in the first of three blocks, the last of which is short
    values = np.full(2 * BLOCK + 5, 1e-3, np.float32)
    values[7] = 1e4
    found = there_and_back(values)
    assert found[7] == pytest.approx(1e4, rel=1e-6)
    np.testing.assert_allclose(found[BLOCK:], 1e-3, rtol=1e-6)


def test_large_tensors_are_rounded_piece_by_piece_with_the_right_scales() -> None:
    # Given more than is rounded at a time (256 blocks), with magnitudes that differ from block to block
    size = 257 * BLOCK + 11
    magnitude = np.repeat(np.float32(10.0) ** (np.arange(258) % 9 - 4).astype(np.float32), BLOCK)[:size]
    values = (np.random.default_rng(1).uniform(-1, 1, size).astype(np.float32) * magnitude).astype(np.float32)
    found = there_and_back(values)
    assert (np.abs(found.astype(np.float64) - values) <= steps_of(values) * (1 + 2**-22)).all()


def test_the_mean_over_draws_is_the_value() -> None:
    # Given a value of 0.3 and one of -126.75 steps, at most 127 steps, When drawn 20,000 times
    values = np.tile(np.array([127, 0.3, -126.75, 1e-3], np.float32), 20_000)
    found = there_and_back(values).astype(np.float64).reshape(-1, 4)
    # Then the mean is right within 6 standard errors, and each is one of the two neighbours
    assert set(np.unique(found[:, 1])) == {0.0, 1.0}
    assert set(np.unique(found[:, 2])) == {-127.0, -126.0}
    assert (found[:, 0] == 127).all()
    error = np.abs(found.mean(0) - values[:4].astype(np.float64))
    spread = np.sqrt([0, 0.3 * 0.7, 0.75 * 0.25, 1e-3])
    assert (error <= 6 * spread / np.sqrt(20_000)).all()


def test_parameters_draw_independently() -> None:
    values = np.full(1000, 0.5, np.float32)
    values[0] = 127
    sent = Int8(seed=3).encode(Payload({}, {"a": values, "b": values}), 1)
    assert (sent.tensors["a"] != sent.tensors["b"]).any()


def test_values_too_large_for_a_scale_do_not_leave() -> None:
    with pytest.raises(ProtectionError, match="w has values that are not finite, or too large"):
        Int8(seed=0).encode(Payload({}, {"w": np.array([np.finfo(np.float32).max], np.float32)}), 1)


# --- error feedback -------------------------------------------------------------------------------------------


def rounds(hook: Int8, terms: list[np.ndarray], counted: list[bool]) -> np.ndarray:
    """The sum, in float64, of the terms that counted, as they were decoded."""
    total = np.zeros(terms[0].shape)
    for number, (term, counts) in enumerate(zip(terms, counted, strict=True), start=1):
        found = there_and_back(term, number=number, hook=hook)
        total += found if counts else 0
        hook.settle(counted=counts)
    return total


def some_terms(count: int, size: int = 500) -> list[np.ndarray]:
    random = np.random.default_rng(8)
    return [random.standard_normal(size).astype(np.float32) for _ in range(count)]


def test_over_the_rounds_only_the_last_rounding_is_missing() -> None:
    terms = some_terms(40)
    exact = np.sum(terms, axis=0, dtype=np.float64)
    step = max(np.abs(t).max() for t in terms) / 127 * 1.05  # what is kept makes terms a little larger
    with_feedback = np.abs(rounds(Int8(seed=1), terms, [True] * 40) - exact).max()
    without = Int8(Int8.Params(error_feedback=False), seed=1)
    assert with_feedback <= step
    assert np.abs(rounds(without, terms, [True] * 40) - exact).max() > 2 * step


def test_values_far_below_a_step_arrive_in_the_end() -> None:
    # Given an update whose small values are a 50th of a step, 100 times
    term = np.array([127.0, 0.02, -0.02, 0.0], np.float32)
    total = rounds(Int8(seed=4), [term] * 100, [True] * 100)
    assert np.abs(total - term.astype(np.float64) * 100).max() <= 1.01


@given(counted=st.lists(st.booleans(), min_size=1, max_size=12))
@settings(deadline=None, max_examples=60)
def test_a_round_that_went_on_without_the_term_is_as_if_it_had_not_been(counted: list[bool]) -> None:
    terms = some_terms(len(counted), size=50)
    kept = [term for term, counts in zip(terms, counted, strict=True) if counts]
    exact = np.sum(kept, axis=0, dtype=np.float64) if kept else np.zeros(50)
    total = rounds(Int8(seed=1), terms, counted)
    assert np.abs(total - exact).max() <= max(np.abs(t).max() for t in terms) / 127 * 1.05


def test_what_was_kept_before_a_lost_round_is_sent_after_it() -> None:
    # Given a round that counted and left something, and a hook that also lost a round after it
    first, lost, third = some_terms(3)
    plain, disturbed = Int8(seed=6), Int8(seed=6)
    for hook in (plain, disturbed):
        rounds(hook, [first], [True])
    disturbed.encode(Payload({}, {"w": lost}), 2)
    disturbed.settle(counted=False)
    # Then the next term is the same, bit for bit
    one, two = (there_and_back(third, number=3, hook=hook) for hook in (plain, disturbed))
    assert one.tobytes() == two.tobytes()
    # and not what it would be had nothing been kept
    assert one.tobytes() != there_and_back(third, number=3, seed=6).tobytes()


def test_a_round_that_was_never_settled_did_not_count_and_settling_twice_changes_nothing() -> None:
    first, second = some_terms(2)
    hook, fresh = Int8(seed=6), Int8(seed=6)
    hook.encode(Payload({}, {"w": first}), 1)
    assert there_and_back(second, number=2, hook=hook).tobytes() == there_and_back(second, number=2, seed=6).tobytes()
    for one in (hook, fresh):
        rounds(one, [first], [True])
    hook.settle(counted=True)
    assert (
        there_and_back(second, number=2, hook=hook).tobytes() == there_and_back(second, number=2, hook=fresh).tobytes()
    )


def test_what_a_lost_term_left_is_forgotten_for_good() -> None:
    first, second = some_terms(2)
    hook = Int8(seed=6)
    hook.encode(Payload({}, {"w": first}), 1)
    hook.settle(counted=False)
    hook.settle(counted=True)
    assert there_and_back(second, number=2, hook=hook).tobytes() == there_and_back(second, number=2, seed=6).tobytes()


def test_the_scalar_and_the_empty_keep_their_shapes_over_rounds() -> None:
    hook = Int8(seed=1)
    given_arrays = {"s": np.array(0.1, np.float32), "e": np.zeros((0, 2), np.float32)}
    for number in (1, 2, 3):
        sent = hook.encode(Payload({}, given_arrays), number)
        hook.settle(counted=True)
        found = decoded(sent, s=(), e=(0, 2))
        assert (found["s"].shape, found["e"].shape) == ((), (0, 2))
        assert found["s"] == pytest.approx(0.1, rel=1e-6)


# --- what peers may not say -----------------------------------------------------------------------------------


def test_the_scales_have_a_name_that_no_parameter_has() -> None:
    values = np.array([1, 2], np.float32)
    given_payload = Payload({}, {"int8.scales": values, "int8.scales'": values * 3})
    assert scales_name(given_payload.tensors) == "int8.scales''"
    form = dict.fromkeys(given_payload.tensors, (FLOAT32, (2,)))
    found = Int8(seed=1).decode(Int8(seed=1).encode(given_payload, 1), form)
    assert found.tensors["int8.scales'"][1] == pytest.approx(6)


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf, 3e36])
def test_a_scale_that_no_honest_party_has_is_refused(bad: float) -> None:
    sent = Int8(seed=1).encode(Payload({}, {"w": np.ones(3, np.float32)}), 1)
    tensors: dict[str, Any] = {**sent.tensors, "int8.scales": np.array([bad], np.float32)}
    with pytest.raises(PeerViolation, match="a scale is negative, not finite or too large"):
        decoded(Payload({}, tensors), w=(3,))


def test_a_step_below_the_lowest_is_refused() -> None:
    sent = Int8(seed=1).encode(Payload({}, {"w": np.ones(3, np.float32)}), 1)
    tensors = {**sent.tensors, "w": np.array([-128, 0, 0], np.int8)}
    with pytest.raises(PeerViolation, match="below -127"):
        decoded(Payload({}, tensors), w=(3,))


def test_a_scale_too_few_is_refused() -> None:
    sent = Int8(seed=1).encode(Payload({}, {"w": np.ones(BLOCK + 1, np.float32)}), 1)
    tensors = {**sent.tensors, "int8.scales": sent.tensors["int8.scales"][:1]}
    with pytest.raises(PeerViolation, match=r"int8\.scales travels as float32 \[1\], expected float32 \[2\]"):
        decoded(Payload({}, tensors), w=(BLOCK + 1,))
