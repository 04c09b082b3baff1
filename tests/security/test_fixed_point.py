"""Fixed point: against a slow reference, at the ends of the ring, and with what is no number."""

from __future__ import annotations

import math
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fate_llm.core.errors import ConfigurationError, InternalError, ProtectionError
from fate_llm.core.values import Array
from fate_llm.security.fixed_point import (
    MOST_TERMS,
    WIDE_BITS,
    WIDE_BYTES,
    WIDE_FRACTION,
    FixedPoint,
    Rounding,
    decode_wide,
    encode_wide,
)

SEED = bytes(range(32))
LAST = 2**31 - 1
BLOCK = 1 << 15
CLIPS = st.floats(1e-6, 1e6, allow_nan=False)
TERMS = st.integers(1, MOST_TERMS)
VALUES = st.floats(-1.5, 1.5, width=32, allow_nan=False)


def array(*values: float) -> Array:
    return np.array(values, np.float32)


def encoded(
    point: FixedPoint, values: Array, *, factor: float = 1.0, seed: bytes = SEED, rounding: Rounding | None = None
) -> Array:
    out = np.full(values.size, 0xDEADBEEF, np.uint32)
    point.encode(values, out, factor=factor, rounding=rounding or Rounding(seed))
    return out


def decoded(point: FixedPoint, words: Array, divisor: float = 1.0) -> Array:
    out = np.full(words.size, np.nan, np.float32)
    point.decode(words, out, divisor=divisor)
    return out


def draws(seed: bytes, count: int) -> list[int]:
    """The first draws of a seed, from single blocks of AES: nothing in common with the stream of the product."""
    cipher = Cipher(AES(seed), ECB()).encryptor()
    blocks = b"".join(cipher.update(index.to_bytes(16, "big")) for index in range(-(-count // 4)))
    return [int.from_bytes(blocks[4 * index : 4 * index + 4], "little") for index in range(count)]


def reference(point: FixedPoint, values: Array, factor: float, seed: bytes) -> list[int]:
    """One value after the other, in Python's floats."""
    found = []
    for value, draw in zip(values.tolist(), draws(seed, values.size), strict=True):
        clipped = min(max(value, -point.clip), point.clip)
        found.append(math.floor(clipped * (factor * point.scale) + draw / 2**32) % 2**32)
    return found


# --- the scale -----------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(terms=TERMS, clip=CLIPS)
@example(terms=8, clip=1.0)
@example(terms=1, clip=0.1)
@example(terms=1000, clip=2.0**-126)
@example(terms=1, clip=2.0**31 - 2)
def test_the_scale_is_the_largest_for_which_no_sum_overflows(terms: int, clip: float) -> None:
    try:
        point = FixedPoint(terms, clip)
    except ConfigurationError:
        assert terms * (math.ceil(Fraction(clip)) + 1) > LAST  # not even one step for 1.0
        return
    scale = point.scale
    assert terms * (math.ceil(Fraction(clip) * Fraction(scale)) + 1) <= LAST
    above = Fraction(clip) * Fraction(math.nextafter(scale, math.inf))
    assert terms * (math.ceil(above) + 1) > LAST
    assert point.step == 1.0 / scale and scale >= 1.0


def test_some_scales_by_hand() -> None:
    assert FixedPoint(8, 1.0).scale == 2**31 // 8 - 2
    assert FixedPoint(1, 2.0).scale == (2**31 - 2) / 2
    assert FixedPoint(1000, 1.0).scale == 2_147_482


@pytest.mark.parametrize("terms", [0, -1, 1001, 10**9, True, 2.0, "8", None])
def test_a_number_of_terms_that_cannot_be_is_refused(terms: object) -> None:
    with pytest.raises(ConfigurationError, match="1 to 1000"):
        FixedPoint(terms, 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("clip", [0.0, -0.0, -1.0, math.nan, math.inf, -math.inf, 1e-39, True, "1", None])
def test_a_clip_that_is_none_is_refused(clip: object) -> None:
    with pytest.raises(ConfigurationError, match="the clip"):
        FixedPoint(8, clip)  # type: ignore[arg-type]


@pytest.mark.parametrize(("terms", "most"), [(1, 2**31 - 2), (8, 2**28 - 2), (1000, 2_147_482)])
def test_a_clip_that_leaves_less_than_a_step_for_one_is_refused(terms: int, most: int) -> None:
    assert FixedPoint(terms, float(most)).scale == 1.0
    for clip in (math.nextafter(float(most), math.inf), most + 1.0, 1e300):
        with pytest.raises(ConfigurationError, match="no whole number") as caught:
            FixedPoint(terms, clip)
        assert f"at most {most};" in caught.value.hint


# --- encoding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 3, 5, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 7])
@pytest.mark.parametrize(("clip", "factor"), [(1.0, 1.0), (0.1, 0.3), (0.013, -0.7), (5.0, 1.0)])
def test_it_is_bit_by_bit_that_of_a_slow_reference(size: int, clip: float, factor: float) -> None:
    point = FixedPoint(8, clip)
    values = np.random.default_rng(size).normal(0.0, 0.3, size).astype(np.float32)
    assert encoded(point, values, factor=factor).tolist() == reference(point, values, factor, SEED)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=9),
    clip=CLIPS,
    terms=TERMS,
    factor=st.floats(-1.0, 1.0),
    seed=st.binary(min_size=32, max_size=32),
)
def test_any_numbers_are_encoded_as_by_the_reference(
    values: list[float], clip: float, terms: int, factor: float, seed: bytes
) -> None:
    # Denormals, negative zeros, the largest of float32: nothing warns, nothing leaves the ring.
    if terms * (math.ceil(clip) + 1) > LAST:
        return
    point, given_ = FixedPoint(terms, clip), array(*values)
    words = encoded(point, given_, factor=factor, seed=seed)
    assert words.tolist() == reference(point, given_, factor, seed)
    assert max(abs(word) for word in words.view(np.int32).tolist()) * terms <= LAST


def test_arrays_of_one_update_go_on_in_the_stream_of_draws() -> None:
    point = FixedPoint(8, 1.0)
    values = np.random.default_rng(0).normal(0, 0.1, 3 * BLOCK).astype(np.float32)
    for cut in (0, 1, 7, BLOCK, BLOCK + 5):
        rounding = Rounding(SEED)
        parts = [encoded(point, part, rounding=rounding) for part in (values[:cut], values[cut:])]
        assert np.array_equal(np.concatenate(parts), encoded(point, values))


def test_other_seeds_draw_otherwise_in_every_bit_of_the_seed() -> None:
    point, values = FixedPoint(2, 1.0), np.full(64, 2**-31, np.float32)
    first = encoded(point, values).tobytes()
    for bit in range(256):
        seed = bytearray(SEED)
        seed[bit // 8] ^= 1 << bit % 8
        assert encoded(point, values, seed=bytes(seed)).tobytes() != first


@pytest.mark.parametrize("fraction", [0.0, 0.03125, 0.5, 0.9])
@pytest.mark.parametrize("whole", [0, 5, -5, -1])
def test_rounding_is_unbiased(fraction: float, whole: int) -> None:
    # Given: a scale of 2^20 exactly, and values that lie a known part of a step above a whole one
    point = FixedPoint(8, (2**28 - 2) / 2**20)
    assert point.scale == 2**20
    count = 200_000
    values = np.full(count, (whole + fraction) / 2**20, np.float32)
    exact = float(values[0]) * 2**20
    # When
    words = encoded(point, values).view(np.int32).astype(np.float64)
    # Then: the mean is the value within five standard deviations, and only the two neighbours occur
    up = exact - math.floor(exact)
    assert abs(words.mean() - exact) <= 5 * math.sqrt(up * (1 - up) / count) + 1e-9
    assert set(words.tolist()) <= {math.floor(exact), math.ceil(exact)}


@settings(max_examples=50, deadline=None)
@given(values=st.lists(VALUES, min_size=1, max_size=30), terms=TERMS, clip=st.sampled_from([0.1, 0.7, 1.0]))
def test_an_encoded_value_is_at_most_a_step_off(values: list[float], terms: int, clip: float) -> None:
    point = FixedPoint(terms, clip)
    for value, word in zip(values, encoded(point, array(*values)).view(np.int32).tolist(), strict=True):
        exact = min(max(Fraction(value), -Fraction(clip)), Fraction(clip)) * Fraction(point.scale)
        assert abs(word - exact) <= 1 + Fraction(1, 2**20)


def test_it_says_how_many_values_were_clipped() -> None:
    tenth = np.float32(0.1)  # a little above 0.1
    assert float(tenth) > 0.1
    point, below = FixedPoint(3, 0.1), np.nextafter(tenth, np.float32(0))
    for values, count in (
        ([below, -below, 0.0], 0),
        ([tenth, below], 1),
        ([-tenth, tenth, 1e30, -3.0, 0.05], 4),
        ([], 0),
    ):
        out = np.empty(len(values), np.uint32)
        assert point.encode(array(*values), out, factor=0.5, rounding=Rounding(SEED)) == count
    many = np.zeros(3 * BLOCK, np.float32)
    many[[0, BLOCK, 3 * BLOCK - 1]] = 2.0
    assert point.encode(many, np.empty(many.size, np.uint32), factor=1.0, rounding=Rounding(SEED)) == 3


@pytest.mark.parametrize("terms", [1, 2, 3, 8, 99, 1000])
@pytest.mark.parametrize("clip", [1.0, 0.1, 1e-6, 3.7, 1000.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sum_there_can_be_does_not_wrap(terms: int, clip: float, sign: int) -> None:
    # Given: terms of values far outside of the clip, each with the worst of many draws
    point = FixedPoint(terms, clip)
    words = encoded(point, np.full(300, sign * 1e30, np.float32)).view(np.int32).astype(np.int64)
    worst = int(np.abs(words).max())
    # Then: with one more for a rounding that these draws did not show the sum is still in the ring
    assert terms * worst <= LAST and terms * (math.ceil(Fraction(clip) * Fraction(point.scale)) + 1) <= LAST
    total = np.array([sign * terms * worst], np.int64).astype(np.uint32)
    mean = float(decoded(point, total, divisor=terms)[0])
    assert abs(mean - sign * clip) <= point.error_bound(terms, terms)


def test_one_term_more_than_planned_would_wrap() -> None:
    point = FixedPoint(8, 1.0)
    word = encoded(point, array(1.0))
    total = np.array([sum([int(word[0])] * 9) % 2**32], np.uint32)
    assert decoded(point, total, divisor=9.0)[0] < 0.0  # this is why the number of terms is settled first
    with pytest.raises(InternalError, match="made for 1 to 8"):
        point.error_bound(9, 9.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK])
def test_what_is_not_finite_is_refused_before_anything_is_written(bad: float, place: int) -> None:
    point, rounding = FixedPoint(8, 1.0), Rounding(SEED)
    values = np.full(2 * BLOCK + 1, 0.25, np.float32)
    values[place] = bad
    out = np.full(values.size, 77, np.uint32)
    with pytest.raises(ProtectionError, match=f"1 of {values.size} values of an update are not finite"):
        point.encode(values, out, factor=1.0, rounding=rounding)
    assert (out == 77).all()
    # ... nor drawn
    values[place] = 0.25
    assert np.array_equal(encoded(point, values, rounding=rounding), encoded(point, values))


def test_nan_with_both_signs_and_any_payload_is_refused() -> None:
    for bits in (0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF):
        with pytest.raises(ProtectionError, match="2 of 3 values"):
            encoded(FixedPoint(8, 1.0), np.array([bits, 0, bits], np.uint32).view(np.float32))


def test_a_term_of_weight_0_is_encoded_as_nothing_at_all() -> None:
    assert not encoded(FixedPoint(8, 1.0), array(-5.0, -0.0, 1e-45, 0.3), factor=0.0).any()


@pytest.mark.parametrize("factor", [1.0000001, -1.1, math.nan, math.inf])
def test_a_factor_out_of_range_is_refused(factor: float) -> None:
    out = np.full(1, 7, np.uint32)
    with pytest.raises(ProtectionError, match="from -1 to 1"):
        FixedPoint(8, 1.0).encode(array(0.5), out, factor=factor, rounding=Rounding(SEED))
    assert out.tolist() == [7]


def test_arrays_of_another_kind_are_refused() -> None:
    point, rounding = FixedPoint(8, 1.0), Rounding(SEED)
    good, out = np.zeros(4, np.float32), np.zeros(4, np.uint32)
    locked = out.copy()
    locked.flags.writeable = False
    for values, words in (
        (good.astype(np.float64), out),
        (good.astype(">f4"), out),
        (good.reshape(2, 2), out),
        (np.zeros(8, np.float32)[::2], out),
        (good, out.astype(np.int32)),
        (good, out[:3]),
        (good, np.zeros(8, np.uint32)[::2]),
        (good, locked),
    ):
        with pytest.raises(InternalError, match=r"needed|cannot be written"):
            point.encode(values, words, factor=1.0, rounding=rounding)
    for words, values in ((out.astype(np.int32), good), (out, good.astype(np.float64)), (out, good[:2])):
        with pytest.raises(InternalError, match="needed"):
            point.decode(words, values, divisor=1.0)


def test_a_seed_of_another_length_and_too_many_draws_are_refused() -> None:
    for length in (0, 16, 31, 33):
        with pytest.raises(InternalError, match="it has 32"):
            Rounding(bytes(length))
    with pytest.raises(InternalError, match="at most 32768"):
        Rounding(SEED).draw(BLOCK + 1)


def test_draws_fill_the_unit_interval() -> None:
    out = Rounding(SEED).draw(BLOCK)
    assert out.min() >= 0.0 and out.max() < 1.0
    counts = np.bincount((out * 64).astype(int), minlength=64)
    chi = float(((counts - BLOCK / 64) ** 2 / (BLOCK / 64)).sum())
    assert 22.0 < chi < 130.0  # 63 degrees of freedom, both tails below 1e-6


def test_neither_way_allocates_anything_of_the_size_of_the_vector() -> None:
    point = FixedPoint(8, 1.0)
    values, words = np.zeros(1 << 20, np.float32), np.zeros(1 << 20, np.uint32)
    values[5] = 3.0
    tracemalloc.start()
    try:
        point.encode(values, words, factor=0.5, rounding=Rounding(SEED))
        point.decode(words, values, divisor=0.5)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20


# --- decoding ------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    words=st.lists(st.integers(0, 2**32 - 1), max_size=20),
    clip=st.sampled_from([0.01, 1.0, 30.0]),
    divisor=st.floats(1e-3, 1e3),
)
def test_decoding_is_that_of_a_slow_reference(words: list[int], clip: float, divisor: float) -> None:
    point = FixedPoint(8, clip)
    signed = [word - 2**32 if word >= 2**31 else word for word in words]
    expected = array(*(number / (point.scale * divisor) for number in signed))
    assert decoded(point, np.array(words, np.uint32), divisor).tobytes() == expected.tobytes()


def test_decoding_works_block_by_block_too() -> None:
    point = FixedPoint(4, 1.0)
    values = np.random.default_rng(3).uniform(-1, 1, 2 * BLOCK + 3).astype(np.float32)
    assert np.abs(decoded(point, encoded(point, values)) - values).max() <= point.error_bound(1, 1.0)


def test_a_total_can_be_decoded_where_it_lies() -> None:
    point = FixedPoint(4, 1.0)
    words = encoded(point, np.random.default_rng(4).uniform(-1, 1, 2 * BLOCK + 3).astype(np.float32))
    expected = decoded(point, words, 0.5)
    point.decode(words, words.view(np.float32), divisor=0.5)
    assert np.array_equal(words.view(np.float32), expected)


@pytest.mark.parametrize("divisor", [0.0, -0.0, -1.0, math.nan, math.inf, 1e-300, 1e-39])
def test_a_divisor_that_is_none_is_refused(divisor: float) -> None:
    point, out = FixedPoint(8, 1.0), array(7.0)
    with pytest.raises(ProtectionError, match="no mean"):
        point.decode(np.ones(1, np.uint32), out, divisor=divisor)
    assert out.tolist() == [7.0]
    with pytest.raises(ProtectionError, match="no mean"):
        point.error_bound(1, divisor)


# --- the bound -----------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    data=st.data(),
    terms=st.integers(1, 12),
    clip=st.sampled_from([0.05, 0.7, 1.0, 20.0]),
    weights=st.lists(st.floats(1e-3, 1e6), min_size=12, max_size=12),
)
def test_the_weighted_mean_is_within_the_bound(
    data: st.DataObject, terms: int, clip: float, weights: list[float]
) -> None:
    # Given: some parties' values and weights, the largest weight agreed before
    point, largest = FixedPoint(12, clip), max(weights)
    weights = weights[:terms]
    terms_of = [array(*data.draw(st.lists(VALUES, min_size=4, max_size=4))) for _ in weights]
    # When: encoded, added in the ring, divided by the sum of factors
    total, counted = np.zeros(4, np.uint32), 0
    for number, (values, weight) in enumerate(zip(terms_of, weights, strict=True)):
        seed = number.to_bytes(32, "big")
        total += encoded(point, values, factor=weight / largest, seed=seed)
        counted = (counted + encode_wide(weight / largest, terms=12)) % 2**128
    divisor = decode_wide(counted)
    mean = decoded(point, total, divisor)
    # Then: each value is within the bound of the exact mean of the clipped values
    bound = point.error_bound(terms, divisor, divisor_error=terms * 2.0**-40)
    limit = Fraction(clip)
    for index in range(4):
        parts = [min(max(Fraction(float(values[index])), -limit), limit) for values in terms_of]
        products = [Fraction(weight) * part for weight, part in zip(weights, parts, strict=True)]
        exact = sum(products, Fraction(0)) / sum(map(Fraction, weights))
        assert abs(Fraction(float(mean[index])) - exact) <= Fraction(bound)


def test_the_bound_is_not_much_more_than_what_happens() -> None:
    # One term, values just above whole steps: some are rounded up by nearly a whole one.
    point = FixedPoint(1000, 1.0)
    values = ((np.arange(20_000) + 0.001) * point.step).astype(np.float32)
    error = np.abs(decoded(point, encoded(point, values)).astype(np.float64) - values.astype(np.float64)).max()
    bound = point.error_bound(1, 1.0, largest=float(values.max()))
    assert 0.95 * bound < error <= bound


def test_the_bound_by_hand() -> None:
    point = FixedPoint(8, 1.0)
    step, half = 1 / (2**28 - 2), 2.0**-24
    assert point.error_bound(8, 8.0) == pytest.approx(step + (1 + step) * half, rel=1e-5)
    assert point.error_bound(3, 1.5, largest=0.0) == pytest.approx(2 * step, rel=1e-5)
    assert point.error_bound(1, 0.5, largest=0.25, divisor_error=0.1) == pytest.approx(2 * step + 0.05, rel=1e-5)
    for terms in (0, -1, 9):
        with pytest.raises(InternalError, match="made for 1 to 8"):
            point.error_bound(terms, 1.0)


# --- wide numbers --------------------------------------------------------------------------------------------------


def test_the_wide_ring() -> None:
    assert (WIDE_BITS, WIDE_BYTES, WIDE_FRACTION) == (128, 16, 40)
    assert encode_wide(1.0, terms=3) == 2**40
    assert encode_wide(-1.0, terms=3) == 2**128 - 2**40
    assert encode_wide(2.0**-41, terms=1) == 0  # half a step goes to the even one
    assert encode_wide(3 * 2.0**-41, terms=1) == 2
    assert encode_wide(-0.0, terms=1) == encode_wide(5e-324, terms=1) == 0


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(-1e20, 1e20), min_size=1, max_size=40))
def test_a_sum_of_wide_numbers_is_exact_to_half_a_step_for_each(values: list[float]) -> None:
    total = sum(encode_wide(value, terms=len(values)) for value in values) % 2**128
    exact = sum(map(Fraction, values), Fraction(0))
    bound = Fraction(len(values), 2**41) + abs(exact) / 2**52
    assert abs(Fraction(decode_wide(total)) - exact) <= bound


@pytest.mark.parametrize("terms", [1, 3, 8, 1000])
def test_a_wide_number_at_the_end_of_the_ring(terms: int) -> None:
    most = float(2**87 // terms)  # terms times it is at most 2^87, and the ring ends there
    while terms * int(most) >= 2**87:
        most = math.nextafter(most, 0.0)
    for sign in (1, -1):
        total = terms * encode_wide(sign * most, terms=terms) % 2**128
        assert decode_wide(total) == pytest.approx(sign * terms * most, rel=1e-15)
        above = math.nextafter(most, math.inf)
        with pytest.raises(ProtectionError, match=f"sum of {terms} terms: at most"):
            encode_wide(sign * above, terms=terms)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_wide_number_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ProtectionError, match="not finite"):
        encode_wide(value, terms=2)


def test_what_no_sum_has_is_an_error_of_ours() -> None:
    for terms in (0, -1, 1001):
        with pytest.raises(InternalError, match="from 1 to 1000"):
            encode_wide(1.0, terms=terms)
    for total in (-1, 2**128):
        with pytest.raises(InternalError, match="outside"):
            decode_wide(total)
