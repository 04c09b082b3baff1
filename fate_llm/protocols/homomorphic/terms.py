"""A term as the whole numbers that are encrypted, and a total of them as numbers again.

    slots 0 to 8 k        the weight and the k - 1 additive numbers: each in Z_2^128, in 8 limbs of 16 bits
    from slot 8 k on      the values of all arrays by sorted name, as steps of `FixedPoint`

Sums of limbs do not carry: the key holder carries, and lets out the numbers alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from fate_llm.core.errors import ProtectionError
from fate_llm.core.interfaces import Layout
from fate_llm.core.values import Array, Total, Update
from fate_llm.security.ckks import LARGEST
from fate_llm.security.fixed_point import WIDE_BITS, WIDE_FRACTION, FixedPoint, Rounding, decode_wide, encode_wide

from .agreed import FLOOD, LIMB_BITS, LIMBS, Agreed

__all__ = ["Term", "check_total", "encode", "flood", "limbs", "numbers_from", "read_total", "values_bound"]

_SMALLEST_WEIGHT: Final = 1e-6  # a weight is known to 2^-41
_LIMB: Final = (1 << LIMB_BITS) - 1
_HALF_FLOAT32: Final = 2.0**-24


@dataclass(frozen=True)
class Term:
    """One party's. weight, sums: in Z_2^128. values: int32, in steps."""

    weight: int
    sums: Mapping[str, int]
    values: Array

    def slots(self, names: Sequence[str], start: int, stop: int) -> Array:
        """The whole numbers (int64) in slots `start` to `stop`; a sum that this party has not is 0."""
        head = limbs([self.weight, *(self.sums.get(name, 0) for name in names)])
        first = self.values[max(0, start - head.size) : max(0, stop - head.size)]
        return np.concatenate([head[start:stop], first.astype(np.int64)])


def limbs(numbers: Sequence[int]) -> Array:
    """Numbers of Z_2^128, each as 8 limbs, the lowest first (int64)."""
    each = [(number >> (LIMB_BITS * place)) & _LIMB for number in numbers for place in range(LIMBS)]
    return np.array(each, np.int64)


def numbers_from(sums: Array) -> list[int]:
    """Totals in Z_2^128 from sums of limbs."""
    rows = sums.reshape(-1, LIMBS).tolist()
    return [sum(int(limb) << (LIMB_BITS * place) for place, limb in enumerate(row)) % (1 << WIDE_BITS) for row in rows]


def encode(update: Update, agreed: Agreed, seed: bytes) -> Term:
    """seed: 32 bytes, for rounding.

    Raises:
        ProtectionError: names, shapes, dtype, a value that is not finite, a weight or number out of range.
    """
    terms = len(agreed.scene.cohort.contributors)
    _check(update, agreed.scene.layout, agreed.largest_weight)
    weight = encode_wide(update.weight, terms=terms)
    sums = {name: encode_wide(float(value), terms=terms) for name, value in update.sums.items()}
    values = np.empty(sum(array.size for array in update.arrays.values()), np.dtype("<u4"))
    draws = Rounding(hashlib.sha256(b"fate_llm/1 ckks rounding\0" + seed).digest())
    start = 0
    for name in sorted(update.arrays):
        flat = np.ascontiguousarray(update.arrays[name]).reshape(-1)
        place = values[start : start + flat.size]
        agreed.fixed.encode(flat, place, factor=update.weight / agreed.largest_weight, rounding=draws)
        start += flat.size
    return Term(weight, sums, values.view("<i4"))


def _check(update: Update, layout: Layout, largest_weight: float) -> None:
    if not (update.weight == 0 or _SMALLEST_WEIGHT <= update.weight <= largest_weight):  # false for NaN
        raise ProtectionError(
            f"this party's weight is neither 0 nor from {_SMALLEST_WEIGHT:g} to {largest_weight:g}",
            hint="Raise `largest_weight` in protection_params above what any party's update can count by.",
        )
    if update.arrays.keys() != layout.keys():
        wrong = [name[:80] for name in sorted(update.arrays.keys() ^ layout.keys())[:3]]
        raise ProtectionError(f"the update cannot be summed: parameter names differ, first {wrong}")
    for name, array in update.arrays.items():
        if array.shape != tuple(layout[name]) or array.dtype != np.float32:
            raise ProtectionError(
                f"the update cannot be summed: {name} is {array.dtype}{list(array.shape)}, "
                f"expected float32{list(layout[name])}"
            )


def values_bound(fixed: FixedPoint, terms: int) -> int:
    """The largest size, in steps, of a sum of so many values: each is at most the clip, rounded up."""
    return terms * (int(np.ceil(fixed.clip * fixed.scale)) + 1)


def check_total(sums: Array, limbs_in_it: int, values_in_it: int, *, terms: int, fixed: FixedPoint) -> None:
    """Whether opened sums (int64, 1-D) can be those of `terms` terms: limbs, then values, then slots that are empty.

    Raises:
        ProtectionError: they cannot: somebody's numbers are out of range, or a ciphertext is not of these keys.
    """
    head, values = sums[:limbs_in_it], sums[limbs_in_it : limbs_in_it + values_in_it]
    rest = sums[limbs_in_it + values_in_it :]
    largest = min(LARGEST, values_bound(fixed, terms))
    if head.size and not (int(head.min()) >= 0 and int(head.max()) <= terms * _LIMB):
        raise ProtectionError(f"the weights or additive numbers of {terms} terms add up to what they cannot")
    if values.size and int(np.abs(values).max()) > largest:
        raise ProtectionError(
            f"a sum of {terms} terms is {int(np.abs(values).max())} steps; with each value within the clip it is at "
            f"most {largest}"
        )
    if rest.any():
        raise ProtectionError("a sum has numbers in slots where no term has any")


def flood(seed: bytes, label: bytes, count: int) -> Array:
    """Whole numbers (int64) around 0, less than FLOOD in size, triangular: the difference of two even draws.

    From SHAKE-256 over a secret seed of 32 bytes and a label that is used once.
    """
    raw = np.frombuffer(hashlib.shake_256(b"fate_llm/1 ckks flood\0" + seed + label).digest(2 * count), np.uint8)
    pairs = (raw & (FLOOD - 1)).astype(np.int64).reshape(count, 2)
    return np.asarray(pairs[:, 0] - pairs[:, 1])


def read_total(
    words: Array,
    numbers: Sequence[int],
    names: Sequence[str],
    agreed: Agreed,
    by: Sequence[str],
    missing: Sequence[str],
) -> Total:
    """The weighted mean out of what was opened. words: int32, all values.

    error_bound: the sum of the whole numbers is exact, and flooding adds less than FLOOD steps to it, so that with the
    step h and the sum d of the terms' factors (weight over the largest one) every value of the mean is off by at most

        (n * h + FLOOD * h) / d        of rounding n terms, and of flooding

    besides how far d is from exact (2^-41 for each weight) and float32's own rounding (`FixedPoint.error_bound`).

    Raises:
        ProtectionError: the weights add up to 0, or to more than the parties can have.
    """
    fixed, terms = agreed.fixed, len(by)
    weight, *sums = (decode_wide(number) for number in numbers)
    if not -1e-6 <= weight <= terms * agreed.largest_weight * (1 + 1e-9):
        raise ProtectionError(f"the weights add up to {weight:g}, which {terms} parties cannot have")
    divisor, layout = weight / agreed.largest_weight, agreed.scene.layout
    if layout and divisor <= 0.0:
        raise ProtectionError(f"the weights of {', '.join(by)} add up to 0: there is no mean")
    flat, error = np.empty(words.size, np.float32), 0.0
    if flat.size:
        fixed.decode(words.view("<u4"), flat, divisor=divisor)
        uncertain = terms * 2.0 ** -(WIDE_FRACTION + 1) / agreed.largest_weight + divisor * 2.0**-51
        error = fixed.error_bound(terms, divisor, divisor_error=uncertain)
        error += FLOOD * fixed.step / divisor * (1.0 + 2 * _HALF_FLOAT32)
    mean: dict[str, Array] = {}
    start = 0
    for name in sorted(layout):
        size = int(np.prod(layout[name], dtype=np.int64))
        mean[name] = flat[start : start + size].reshape(layout[name])
        start += size
    ordered = {name: mean[name] for name in layout}
    return Total(ordered, weight, dict(zip(names, sums, strict=True)), tuple(by), tuple(missing), error)
