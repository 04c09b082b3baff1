"""Shares: any threshold of them give the secret, fewer nothing, and wrong ones an error."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fate_llm.core.errors import InternalError, PeerViolation
from fate_llm.security.shamir import PRIME, SECRET_BYTES, SHARE_BYTES, combine, split

SECRET = bytes(range(100, 132))
RANDOM = bytes(range(32))


def cut(secret: bytes = SECRET, *, threshold: int, count: int, random: bytes = RANDOM) -> dict[int, bytes]:
    points = range(1, count + 1)
    return dict(zip(points, split(secret, threshold=threshold, points=points, random=random), strict=True))


def interpolated(shares: dict[int, bytes], target: int) -> int:
    """Lagrange as in the textbook: one fraction for each point, nothing shared with the product."""
    total = 0
    for point, share in shares.items():
        factor = Fraction(1)
        for other in shares:
            if other != point:
                factor *= Fraction(target - other, point - other)
        total += int.from_bytes(share, "big") * factor.numerator * pow(factor.denominator, -1, PRIME)
    return total % PRIME


def on(coefficients: Sequence[int], points: Sequence[int]) -> dict[int, bytes]:
    """Shares of a polynomial of our own."""
    values = {point: sum(c * point**power for power, c in enumerate(coefficients)) % PRIME for point in points}
    return {point: value.to_bytes(SHARE_BYTES, "big") for point, value in values.items()}


def test_the_prime_is_one_that_shares_fit() -> None:
    assert (SHARE_BYTES, SECRET_BYTES) == (66, 32)
    # Lucas-Lehmer: 2^521 - 1 is a Mersenne prime
    value = 4
    for _ in range(521 - 2):
        value = (value * value - 2) % PRIME
    assert PRIME == 2**521 - 1 and value == 0


def test_shares_against_an_independent_calculation() -> None:
    # Given: the coefficients as the module's head says they are made
    parts = (b"fate_llm/1 shamir coefficients", RANDOM, (3).to_bytes(4, "big"), SECRET)
    stream = hashlib.shake_256(b"".join(len(p).to_bytes(4, "big") + p for p in parts)).digest(2 * 66)
    coefficients = [int.from_bytes(stream[start : start + 66], "big") % 2**521 for start in (0, 66)]
    # Then
    points = (1, 2, 7, 2**32 - 1)
    shares = split(SECRET, threshold=3, points=points, random=RANDOM)
    assert dict(zip(points, shares, strict=True)) == on([int.from_bytes(SECRET, "big"), *coefficients], points)


@pytest.mark.parametrize(("threshold", "count"), [(1, 1), (1, 4), (2, 3), (3, 3), (3, 4), (6, 8), (22, 32), (67, 100)])
def test_any_set_that_is_large_enough_gives_the_secret(threshold: int, count: int) -> None:
    shares = cut(threshold=threshold, count=count)
    sets = itertools.islice(itertools.combinations(shares, threshold), 12)
    for points in [*sets, *itertools.combinations(list(shares)[::-1], threshold)][:20] if count < 10 else [*sets]:
        assert combine({point: shares[point] for point in points}, threshold=threshold) == SECRET
    assert combine(shares, threshold=threshold) == SECRET


@settings(max_examples=50, deadline=None)
@given(
    secret=st.binary(min_size=32, max_size=32),
    random=st.binary(min_size=32, max_size=32),
    points=st.lists(st.integers(1, 2**32 - 1), unique=True, min_size=1, max_size=9),
    data=st.data(),
)
def test_any_secret_any_points(secret: bytes, random: bytes, points: list[int], data: st.DataObject) -> None:
    threshold = data.draw(st.integers(1, len(points)))
    shares = split(secret, threshold=threshold, points=points, random=random)
    assert [len(share) for share in shares] == [SHARE_BYTES] * len(points)
    order = data.draw(st.permutations(list(zip(points, shares, strict=True))))
    few = dict(order[: data.draw(st.integers(threshold, len(points)))])
    assert combine(few, threshold=threshold) == secret
    assert interpolated(dict(order[:threshold]), 0).to_bytes(66, "big")[-32:] == secret


def test_one_share_less_fits_every_secret() -> None:
    """Perfect secrecy, shown: for each other secret there is a polynomial through the shares that are known."""
    shares = cut(threshold=4, count=6)
    known = {point: shares[point] for point in (1, 4, 6)}
    for other in (bytes(32), b"\xff" * 32, SECRET):
        claimed = {**known, 0: other.rjust(66, b"\0")}
        forged = {point: interpolated(claimed, point).to_bytes(66, "big") for point in (2, 3, 5)}
        assert combine({**known, **forged}, threshold=4) == other
    assert forged == {point: shares[point] for point in (2, 3, 5)}  # for the true one: the true shares


def test_too_few_shares_are_refused() -> None:
    shares = cut(threshold=4, count=6)
    for count in range(4):
        with pytest.raises(PeerViolation, match=f"{count} shares of a secret that needs 4"):
            combine(dict(list(shares.items())[:count]), threshold=4)


def test_shares_are_fixed_by_what_comes_in_and_by_all_of_it() -> None:
    first = cut(threshold=3, count=5)
    assert cut(threshold=3, count=5) == first
    assert {**cut(threshold=3, count=9), **first} == cut(threshold=3, count=9)  # more points, the same polynomial
    others = [
        cut(bytes(32), threshold=3, count=5),
        cut(threshold=4, count=5),
        cut(threshold=3, count=5, random=bytes(32)),
    ]
    seen = [set(shares.values()) for shares in (first, *others)]
    assert all(not one & other for one, other in itertools.combinations(seen, 2))


def test_two_secrets_with_the_same_randomness_do_not_give_each_other_away() -> None:
    other = bytes([SECRET[0] ^ 1]) + SECRET[1:]
    first, second = cut(threshold=2, count=3), cut(other, threshold=2, count=3)
    difference = (int.from_bytes(SECRET, "big") - int.from_bytes(other, "big")) % PRIME
    for point in first:
        assert (int.from_bytes(first[point], "big") - int.from_bytes(second[point], "big")) % PRIME != difference


def test_shares_fill_the_field() -> None:
    """521 bits: the top byte is 0 or 1, the rest uniform by chi-square."""
    shares = [
        share for number in range(60) for share in cut(threshold=2, count=5, random=bytes([number]) * 32).values()
    ]
    assert {share[0] for share in shares} == {0, 1}
    data = b"".join(share[1:] for share in shares)
    expected = len(data) / 256
    chi = sum((data.count(value) - expected) ** 2 / expected for value in range(256))
    assert 150.0 < chi < 380.0  # 255 degrees of freedom, both tails below 1e-6


# --- wrong shares --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [1, 3])
@pytest.mark.parametrize("bit", [0, 7, 255, 300, 520])
def test_a_flipped_bit_in_any_share_is_seen_with_a_share_to_spare(extra: int, bit: int) -> None:
    shares = cut(threshold=5, count=5 + extra)
    for point in shares:
        flipped = (int.from_bytes(shares[point], "big") ^ 1 << bit).to_bytes(SHARE_BYTES, "big")
        with pytest.raises(PeerViolation, match="no polynomial of degree 4"):
            combine({**shares, point: flipped}, threshold=5)


def test_without_a_share_to_spare_the_secret_itself_has_to_be_checked() -> None:
    """What the module's head warns of: a liar moves the secret by 5, as its share counts 5 times at 0."""
    shares = cut(threshold=5, count=5)
    moved = {**shares, 1: (int.from_bytes(shares[1], "big") + 1).to_bytes(SHARE_BYTES, "big")}
    found = combine(moved, threshold=5)
    assert int.from_bytes(found, "big") - int.from_bytes(SECRET, "big") == 5
    # What is not aimed is seen all the same: bits at the top leave the 256 bits of a secret.
    for bit in (300, 400, 515):
        flipped = (int.from_bytes(shares[2], "big") ^ 1 << bit).to_bytes(SHARE_BYTES, "big")
        with pytest.raises(PeerViolation, match="no secret of 32 bytes"):
            combine({**shares, 2: flipped}, threshold=5)


def test_shares_under_each_others_points_are_seen() -> None:
    shares = cut(threshold=3, count=4)
    with pytest.raises(PeerViolation, match="points 1, 2, 3, 4 lie on no polynomial of degree 2"):
        combine({**shares, 1: shares[2], 2: shares[1]}, threshold=3)


def test_shares_of_another_secret_round_or_threshold_are_seen() -> None:
    shares = cut(threshold=3, count=5)
    for other in (cut(bytes(32), threshold=3, count=5), cut(threshold=3, count=5, random=bytes(32))):
        with pytest.raises(PeerViolation, match="no polynomial"):
            combine({**shares, 4: other[4]}, threshold=3)
        with pytest.raises(PeerViolation, match="no secret"):
            combine({1: shares[1], 2: shares[2], 4: other[4]}, threshold=3)
    with pytest.raises(PeerViolation, match="no polynomial"):
        combine(shares, threshold=2)  # made for 3


def test_a_value_above_256_bits_is_no_secret() -> None:
    points = range(1, 5)
    assert combine(on([2**256 - 1, 5, 9], points), threshold=3) == b"\xff" * 32
    for value in (2**256, PRIME - 1):
        with pytest.raises(PeerViolation, match="no secret of 32 bytes"):
            combine(on([value, 5, 9], points), threshold=3)


def test_a_share_has_one_spelling() -> None:
    shares = cut(threshold=2, count=3)
    alias = (int.from_bytes(shares[2], "big") + PRIME).to_bytes(SHARE_BYTES, "big")  # the same modulo the prime
    for wrong in (alias, PRIME.to_bytes(SHARE_BYTES, "big"), b"\xff" * SHARE_BYTES):
        with pytest.raises(PeerViolation, match="point 2 that is not below"):
            combine({**shares, 2: wrong}, threshold=2)
    for wrong in (b"", shares[3][1:], shares[3] + b"\0"):
        with pytest.raises(PeerViolation, match=f"{len(wrong)} bytes for the point 3; it has 66"):
            combine({**shares, 3: wrong}, threshold=2)


def test_errors_say_nothing_of_shares() -> None:
    shares = cut(threshold=3, count=20)
    with pytest.raises(PeerViolation) as caught:
        combine({**shares, 1: shares[2]}, threshold=3)
    assert "1, 2, 3, 4, 5, 6, 7, 8, ..." in caught.value.message
    assert shares[2].hex()[:8] not in caught.value.message


# --- our own mistakes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", [[0, 1], [-1, 2], [1, 1], [1, 2**32], [1, 2, 3, 2]])
def test_points_that_cannot_be(points: list[int]) -> None:
    with pytest.raises(InternalError, match="distinct ones from 1"):
        split(SECRET, threshold=1, points=points, random=RANDOM)
    if len(set(points)) == len(points):
        with pytest.raises(InternalError, match="distinct ones from 1"):
            combine({point: bytes(SHARE_BYTES) for point in points}, threshold=1)


@pytest.mark.parametrize("threshold", [0, -1, 4])
def test_thresholds_that_cannot_be(threshold: int) -> None:
    with pytest.raises(InternalError, match="threshold"):
        split(SECRET, threshold=threshold, points=[1, 2, 3], random=RANDOM)
    if threshold < 1:
        with pytest.raises(InternalError, match="threshold"):
            combine(cut(threshold=1, count=2), threshold=threshold)


@pytest.mark.parametrize(
    ("secret", "random"), [(b"", RANDOM), (SECRET[1:], RANDOM), (SECRET, b""), (SECRET, SECRET * 2)]
)
def test_secrets_and_randomness_have_32_bytes(secret: bytes, random: bytes) -> None:
    with pytest.raises(InternalError, match="32 and 32 needed"):
        split(secret, threshold=1, points=[1], random=random)
