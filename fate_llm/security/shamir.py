"""A secret cut into shares of which any `threshold` give it back, and fewer say nothing (Shamir 1979).

The secret of 32 bytes is the value at 0 of a polynomial of degree threshold - 1 over the integers modulo the prime
2^521 - 1; a share is the value at the receiver's point. 521 bits leave room for a check: shares of different
polynomials give a value below 2^256 with a probability of 2^-265 only.

That is no proof against a liar. Whoever knows who else gives shares can change its own so that the secret moves by a
number of its choice; with more shares than the threshold that is seen, with exactly as many it is not. So whoever
combines compares the secret with something that was settled before: its public key, or a commitment.

The other coefficients come out of SHAKE-256 of label, randomness, threshold and secret, each part after its length,
66 bytes for each, of which the lowest 521 bits count: uniform but for the two names of 0, a difference of 2^-521.
The secret is in there so that two secrets that are cut with the same randomness by mistake still have unrelated
shares.

Shares say nothing about who made them: whoever needs that seals and signs them.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final

from fate_llm.core.errors import InternalError, PeerViolation

__all__ = ["PRIME", "SECRET_BYTES", "SHARE_BYTES", "combine", "split"]

PRIME: Final = 2**521 - 1
SHARE_BYTES: Final = 66  # big endian
SECRET_BYTES: Final = 32
_RANDOM_BYTES: Final = 32
_POINTS: Final = 1 << 32  # points are below
_LABEL: Final = b"fate_llm/1 shamir coefficients"


def split(secret: bytes, *, threshold: int, points: Sequence[int], random: bytes) -> list[bytes]:
    """The shares of `secret` for `points`, in their order. random: 32 fresh bytes; the same input, the same shares.

    Raises:
        InternalError: another length of secret or randomness, points that are not distinct and from 1 to 2^32 - 1,
            a threshold that is not from 1 to their number.
    """
    if len(secret) != SECRET_BYTES or len(random) != _RANDOM_BYTES:
        raise InternalError(f"{len(secret)} bytes of secret and {len(random)} of randomness; 32 and 32 needed")
    _check_points(points)
    if not 1 <= threshold <= len(points):
        raise InternalError(f"a threshold of {threshold} for {len(points)} shares; from 1 to their number")
    coefficients = [int.from_bytes(secret, "big"), *_coefficients(secret, threshold, random)]
    return [_value(coefficients, point).to_bytes(SHARE_BYTES, "big") for point in points]


def combine(shares: Mapping[int, bytes], *, threshold: int) -> bytes:
    """The secret out of at least `threshold` shares by point; all of them must lie on one polynomial.

    Raises:
        PeerViolation: too few shares, one that is none, shares of different secrets or thresholds, or of something
            that is no secret of 32 bytes. Which of the shares is wrong cannot be known.
        InternalError: points or a threshold that cannot be.
    """
    _check_points(list(shares))
    if threshold < 1:
        raise InternalError(f"a threshold of {threshold}; from 1 on")
    if len(shares) < threshold:
        raise PeerViolation(f"{len(shares)} shares of a secret that needs {threshold}")
    points = sorted(shares)
    values = [_read(point, shares[point]) for point in points]
    first, rest = tuple(points[:threshold]), tuple(points[threshold:])
    at_zero, *at_rest = (sum(map(int.__mul__, factors, values)) % PRIME for factors in _lagrange(first, (0, *rest)))
    if at_rest != values[threshold:]:
        raise PeerViolation(f"the shares of the points {_shown(points)} lie on no polynomial of degree {threshold - 1}")
    if at_zero >> (8 * SECRET_BYTES):
        raise PeerViolation(f"the shares of the points {_shown(points)} hide something that is no secret of 32 bytes")
    return at_zero.to_bytes(SECRET_BYTES, "big")


def _coefficients(secret: bytes, threshold: int, random: bytes) -> list[int]:
    """Of x, x^2, ...: threshold - 1 numbers modulo PRIME."""
    parts = (_LABEL, random, struct.pack(">I", threshold), secret)
    framed = b"".join(struct.pack(">I", len(part)) + part for part in parts)
    stream = hashlib.shake_256(framed).digest(SHARE_BYTES * (threshold - 1))
    pieces = (stream[start : start + SHARE_BYTES] for start in range(0, len(stream), SHARE_BYTES))
    return [(int.from_bytes(piece, "big") & PRIME) % PRIME for piece in pieces]


def _value(coefficients: Sequence[int], point: int) -> int:
    """Of the polynomial at `point`, by Horner's rule."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * point + coefficient) % PRIME
    return value


@lru_cache(maxsize=16)  # of public points only: in a round all secrets have shares of the same few sets
def _lagrange(points: tuple[int, ...], targets: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """For each target the factors by which the values at `points` add up to the polynomial's value there."""
    inverses = []
    for point in points:
        product = 1
        for other in points:
            if other != point:
                product = product * (point - other) % PRIME
        inverses.append(pow(product, -1, PRIME))
    return tuple(
        tuple(
            outer * inverse % PRIME
            for outer, inverse in zip(_products_of_others(points, target), inverses, strict=True)
        )
        for target in targets
    )


def _products_of_others(points: tuple[int, ...], target: int) -> list[int]:
    """For each point the product of target - other over all the other points."""
    before, products = 1, []
    for point in points:
        products.append(before)
        before = before * (target - point) % PRIME
    after = 1
    for index in reversed(range(len(points))):
        products[index] = products[index] * after % PRIME
        after = after * (target - points[index]) % PRIME
    return products


def _read(point: int, share: bytes) -> int:
    if len(share) != SHARE_BYTES:
        raise PeerViolation(f"a share of {len(share)} bytes for the point {point}; it has {SHARE_BYTES}")
    value = int.from_bytes(share, "big")
    if value >= PRIME:
        raise PeerViolation(f"a share for the point {point} that is not below 2^521 - 1")
    return value


def _check_points(points: Sequence[int]) -> None:
    if len(set(points)) != len(points) or not all(1 <= point < _POINTS for point in points):
        raise InternalError(f"the points {_shown(points)} of shares; distinct ones from 1 to 2^32 - 1 needed")


def _shown(points: Sequence[int]) -> str:
    return ", ".join(map(str, points[:8])) + (", ..." if len(points) > 8 else "")
