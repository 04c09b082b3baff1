"""Numbers that can be added without error: float32 as steps in Z_2^32, single numbers as steps in Z_2^128.

A value x of an update is clipped to [-C, C], multiplied by the term's factor f (its weight over the largest one) and
becomes the integer

    v = floor(x * f * s + u),   u uniform in [0, 1)

whose mean is x * f * s (stochastic rounding), stored in two's complement. Sums wrap around in the ring, and come out
right as long as the true sum lies in the ring's signed range: the scale s is the largest for which n terms, each at
the clip and rounded up, still fit. That is settled when a sum is set up, and cannot fail later.

Not a protection by itself. Rounding needs no secrecy; its draws come from AES-256-CTR because that is fast, has the
same bits on every machine and can be seeded with 256 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from fate_llm.core.errors import ConfigurationError, InternalError, ProtectionError
from fate_llm.core.values import Array

__all__ = [
    "MOST_TERMS",
    "WIDE_BITS",
    "WIDE_BYTES",
    "WIDE_FRACTION",
    "FixedPoint",
    "Rounding",
    "decode_wide",
    "encode_wide",
]

MOST_TERMS: Final = 1000  # of one sum
WIDE_BITS: Final = 128
WIDE_BYTES: Final = WIDE_BITS // 8
WIDE_FRACTION: Final = 40  # bits after the point
_WIDE: Final = 1 << WIDE_BITS
_LARGEST: Final = 2**31 - 1  # of the ring, as signed numbers
_SMALLEST_CLIP: Final = 2.0**-126  # the smallest normal number of float32
_BLOCK: Final = 1 << 15  # values worked on at once: their float64 and draws stay in the cache
_SEED_BYTES: Final = 32
_UNIT: Final = 2.0**-32
_WORD: Final = np.dtype("<u4")
_SLACK: Final = 2.0**-20  # steps by which float64 may be off at 2^31: three roundings of 2^-53 each, and margin
_HALF_FLOAT32: Final = 2.0**-24  # half a step of float32, relative
_TINIEST: Final = 2.0**-149  # the smallest float32 above 0


class Rounding:
    """The draws for stochastic rounding of one update: 32 bits for each value, one after the other.

    The same seed gives the same draws. What was drawn is not drawn again, so that several arrays of one update go
    through one object. It holds the room for a block of them (1 MB), which all arrays of an update use again.
    """

    def __init__(self, seed: bytes) -> None:
        """seed: 32 bytes, the key of the stream.

        Raises:
            InternalError: another length.
        """
        if len(seed) != _SEED_BYTES:
            raise InternalError(f"a seed for rounding of {len(seed)} bytes; it has {_SEED_BYTES}")
        self._stream = Cipher(AES(seed), CTR(bytes(16))).encryptor()
        self._bytes = bytearray(4 * _BLOCK + 16)  # the library wants room for a block more
        self._words = np.frombuffer(self._bytes, _WORD, _BLOCK)
        self._draws = np.empty(_BLOCK, np.float64)
        self._steps = np.empty(_BLOCK, np.float64)

    def draw(self, count: int) -> Array:
        """The next `count` numbers k / 2^32 in [0, 1), float64; they stay until the next call. At most 2^15."""
        if not 0 <= count <= _BLOCK:
            raise InternalError(f"{count} draws at once; at most {_BLOCK}")
        self._stream.update_into(_ZEROS[: 4 * count], self._bytes)
        draws = self._draws[:count]
        np.copyto(draws, self._words[:count])
        np.multiply(draws, _UNIT, out=draws)
        return draws

    def steps(self, block: Array, per_unit: float) -> Array:
        """`block` times `per_unit` in float64; it stays until the next call. At most 2^15 values."""
        steps = self._steps[: block.size]
        np.copyto(steps, block)
        np.multiply(steps, per_unit, out=steps)
        return steps


_ZEROS: Final = memoryview(bytes(4 * _BLOCK))


@dataclass(frozen=True)
class FixedPoint:
    """How the float32 values of one sum become integers. terms: the most terms it can have; clip: C above.

    Raises:
        ConfigurationError: terms or a clip for which there is no useful scale.
    """

    terms: int
    clip: float

    def __post_init__(self) -> None:
        if not _is_number(self.terms) or not isinstance(self.terms, int) or not 1 <= self.terms <= MOST_TERMS:
            raise ConfigurationError(f"a sum of {self.terms!r} terms; from 1 to {MOST_TERMS} can be added")
        if not _is_number(self.clip) or not math.isfinite(self.clip) or self.clip < _SMALLEST_CLIP:
            raise ConfigurationError(
                f"the clip {self.clip!r}; it is a finite number from 2^-126 on",
                hint="The clip is the largest absolute value that an update may hold; 1.0 is a good one for LoRA.",
            )
        if self.scale < 1.0:
            most = _LARGEST // self.terms - 1
            raise ConfigurationError(
                f"the clip {self.clip:g} leaves no whole number for 1.0 in a sum of {self.terms} terms",
                hint=f"With {self.terms} terms the clip is at most {most}; steps grow with it, 1.0 is a good one.",
            )

    @cached_property
    def scale(self) -> float:
        """s: the largest float64 with terms * (ceil(clip * s) + 1) <= 2^31 - 1; steps per unit."""
        most = _LARGEST // self.terms - 1  # ceil(clip * s) may reach this
        clip = Fraction(self.clip)
        scale = most / self.clip
        while clip * Fraction(scale) > most:
            scale = math.nextafter(scale, 0.0)
        while clip * Fraction(above := math.nextafter(scale, math.inf)) <= most:
            scale = above
        return scale

    @property
    def step(self) -> float:
        """1 / scale: what an integer more is worth."""
        return 1.0 / self.scale

    def encode(self, values: Array, out: Array, *, factor: float, rounding: Rounding) -> int:
        """Write the integers for `values` (float32, 1-D, in one piece) times `factor` into `out` (uint32).

        factor: from -1 to 1. Returns how many values were outside of the clip. The mean over `rounding` is
        the exact value to 2^-20 of a step.

        Raises:
            ProtectionError: a value that is not finite, or such a factor; nothing was written or drawn.
            InternalError: arrays of another kind or length.
        """
        _require(values, np.dtype("<f4"), "the values")
        _require(out, _WORD, "the words", like=values)
        if not -1.0 <= factor <= 1.0:  # false for NaN
            raise ProtectionError(f"an update counts {factor!r} times the largest weight; from -1 to 1 is possible")
        inside = self._check(values)
        per_unit = factor * self.scale
        limit, clip = abs(self.clip * per_unit), np.float64(self.clip)  # not rounded to float32 to be compared
        clipped = 0
        signed = out.view("<i4")
        for start in range(0, values.size, _BLOCK):
            block = values[start : start + _BLOCK]
            steps = rounding.steps(block, per_unit)
            if not inside:  # products are rounded monotonously: to clip them is to clip the values
                clipped += int(np.count_nonzero((block > clip) | (block < -clip)))
                np.clip(steps, -limit, limit, out=steps)
            np.add(steps, rounding.draw(block.size), out=steps)
            np.floor(steps, out=steps)
            np.copyto(signed[start : start + _BLOCK], steps, casting="unsafe")
        return clipped

    def decode(self, total: Array, out: Array, *, divisor: float) -> None:
        """Write the mean for the ring's words `total` (uint32, 1-D, in one piece) into `out` (float32).

        divisor: the sum of the factors of the terms in `total`, above 0. `out` may be the memory of `total`, seen as
        float32 from its first word on.

        Raises:
            ProtectionError: a divisor that is none, or for which a mean would not fit float32; nothing was written.
            InternalError: arrays of another kind or length.
        """
        _require(total, _WORD, "the words")
        _require(out, np.dtype("<f4"), "the values", like=total)
        unit = self._unit(divisor)
        means, signed = np.empty(_BLOCK, np.float64), total.view("<i4")
        for start in range(0, total.size, _BLOCK):
            block = signed[start : start + _BLOCK]
            mean = means[: block.size]
            np.copyto(mean, block)
            np.divide(mean, unit, out=mean)
            out[start : start + _BLOCK] = mean

    def error_bound(
        self, terms: int, divisor: float, largest: float | None = None, *, divisor_error: float = 0.0
    ) -> float:
        """Bound on |decoded - exact weighted mean of the clipped values|, of any value, for `terms` survivors.

        largest: bound on the exact mean's absolute value, the clip unless known better. divisor_error: bound on how
        far `divisor` (d) is from the exact sum D of the exact factors.

        With T = sum of f * x over n terms, the exact mean is T / D. Each term is rounded to one of the two integers
        beside it, so off by at most a step h; float64 adds less than 2^-20 of a step, as |v| < 2^31 and the
        factor, its product with s and that with x are rounded to 2^-53 each. The ring adds nothing. So

            |T' - T| <= n * h * (1 + 2^-20)
            |T' / d - T / D| <= |T' - T| / d + |T / D| * |D - d| / d
                             <= (n * h * (1 + 2^-20) + largest * divisor_error) / d =: e

        and writing the result, of at most largest + e, as float32 adds 2^-24 of it (2^-149 for the smallest).

        Raises:
            ProtectionError: as `decode`. InternalError: more terms than planned, or none.
        """
        if not 1 <= terms <= self.terms:
            raise InternalError(f"an error bound for {terms} terms of a sum made for 1 to {self.terms}")
        self._unit(divisor)
        bound = self.clip if largest is None else largest
        error = (terms * self.step * (1.0 + _SLACK) + bound * divisor_error) / divisor
        return error + (bound + error) * _HALF_FLOAT32 * (1.0 + _SLACK) + _TINIEST

    def _check(self, values: Array) -> bool:
        """Refuse what is not finite; whether all values are inside of the clip. Reads the memory once."""
        low = high = 0.0
        for start in range(0, values.size, _BLOCK):
            block = values[start : start + _BLOCK]
            least, most = float(np.minimum.reduce(block)), float(np.maximum.reduce(block))  # NaN if there is one
            if not (math.isfinite(least) and math.isfinite(most)):
                bad = int(values.size - np.count_nonzero(np.isfinite(values)))
                raise ProtectionError(f"{bad} of {values.size} values of an update are not finite")
            low, high = min(low, least), max(high, most)
        return -self.clip <= low and high <= self.clip

    def _unit(self, divisor: float) -> float:
        """scale * divisor, once it is sure that no word over it leaves float32."""
        unit = self.scale * divisor
        if not (math.isfinite(unit) and unit > 0.0 and 2.0**31 / unit < float(np.finfo(np.float32).max)):
            raise ProtectionError(
                f"a sum over the divisor {divisor!r} has no mean; it is the sum of the terms' factors, above 0",
                hint="Somebody has to contribute with a weight above 0, small only beside the largest one.",
            )
        return unit


def encode_wide(value: float, *, terms: int) -> int:
    """`value` in steps of 2^-40, rounded to the nearest, in Z_2^128; to be one of at most `terms` terms.

    Raises:
        ProtectionError: not finite, or so large that `terms` of it leave the ring.
        InternalError: terms that no sum has.
    """
    if not 1 <= terms <= MOST_TERMS:
        raise InternalError(f"a number of a sum of {terms} terms; from 1 to {MOST_TERMS} can be added")
    if not math.isfinite(value):
        raise ProtectionError("a weight or an additive number of an update is not finite")
    steps = round(Fraction(value) * (1 << WIDE_FRACTION))
    if terms * abs(steps) >= _WIDE // 2:
        most = (_WIDE // 2 // terms) >> WIDE_FRACTION
        raise ProtectionError(
            f"a weight or an additive number is too large for a sum of {terms} terms: at most {most:.3g}"
        )
    return steps % _WIDE


def decode_wide(total: int) -> float:
    """The number that a sum in Z_2^128 stands for: off by at most 2^-41 for each term, and float64's last bit.

    Raises:
        InternalError: not of the ring.
    """
    if not 0 <= total < _WIDE:
        raise InternalError("a total outside of Z_2^128")
    signed = total - _WIDE if total >= _WIDE // 2 else total
    return signed / (1 << WIDE_FRACTION)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require(array: Array, dtype: np.dtype[np.generic], what: str, *, like: Array | None = None) -> None:
    if array.dtype != dtype or array.ndim != 1 or not array.flags.c_contiguous:
        raise InternalError(
            f"{what} are {array.dtype.str} of shape {array.shape}; {dtype.str}, one dimension and one piece needed"
        )
    if like is not None and array.size != like.size:
        raise InternalError(f"{what} are {array.size}, where {like.size} are needed")
    if like is not None and not array.flags.writeable:
        raise InternalError(f"{what} cannot be written to")
