"""A term as words of the ring, and a total as numbers: the order in which everything lies in one vector."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fate_llm.core.errors import ProtectionError
from fate_llm.core.interfaces import Layout
from fate_llm.core.values import Array, Total, Update
from fate_llm.security.fixed_point import (
    WIDE_BYTES,
    WIDE_FRACTION,
    Rounding,
    decode_wide,
    encode_wide,
)

from .agreement import Agreement

__all__ = ["Words", "check_update", "encode", "encode_numbers", "read_total", "sum_names", "wide_from", "wide_to_bytes"]

_FEWEST_ROWS = 8  # of a table that can be said to be touched in few rows


@dataclass(slots=True)
class Words:
    """words: uint32 (D,), the values of all arrays by sorted name. wide: in Z_2^128, the weight, then the sums."""

    words: Array
    wide: list[int]


def sum_names(each: Mapping[str, Sequence[str]], least: int) -> list[str]:
    """The names of the additive numbers that at least `least` parties have, sorted; who lacks one adds 0.

    What fewer have is no part of the sum: it would show their own numbers.
    """
    found = Counter(name for names in each.values() for name in names)
    return sorted(name for name, count in found.items() if count >= least)


def check_update(update: Update, layout: Layout, *, largest_weight: float, sparse: bool) -> None:
    """Refuse what is no term of this sum, before anything of it leaves.

    sparse: whether tables may be touched in few rows.

    Raises:
        ProtectionError: names, shapes, dtype, a weight out of range, or rows that only this party may have touched.
    """
    if not 0.0 <= update.weight <= largest_weight:
        raise ProtectionError(
            f"this party's weight is not from 0 to {largest_weight:g}",  # others may be told: no number of ours
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
        if not sparse:
            _check_rows(name, array)


def _check_rows(name: str, array: Array) -> None:
    """A table of which few rows are touched: the sum would show the rows of a single party as they are."""
    if array.ndim < 2 or array.shape[0] < _FEWEST_ROWS:
        return
    rows = array.reshape(array.shape[0], -1)
    if not rows.size:
        return
    suspects = rows[rows[:, 0] == 0]  # the others are touched: few rows are read whole
    touched = array.shape[0] - int(np.count_nonzero(~suspects.any(axis=1)))
    if 0 < touched < array.shape[0] / 2:
        raise ProtectionError(
            f"{name}: the update touches few of {array.shape[0]} rows; a row that no other party touches is in the sum "
            "as it is",
            hint="Do not train embeddings under secure aggregation, or set `sparse: allow` and add noise.",
        )


def encode(update: Update, agreement: Agreement) -> tuple[Array, int]:
    """The ring's words of an update's arrays times its weight, and how many values were clipped.

    Raises:
        ProtectionError: a value that is not finite.
    """
    words = np.empty(sum(array.size for array in update.arrays.values()), np.dtype("<u4"))
    draws, factor = Rounding(agreement.rounding), update.weight / agreement.largest_weight
    clipped = start = 0
    for name in sorted(update.arrays):
        values = np.ascontiguousarray(update.arrays[name]).reshape(-1)
        place = words[start : start + values.size]
        clipped += agreement.fixed_point.encode(values, place, factor=factor, rounding=draws)
        start += values.size
    return words, clipped


def encode_numbers(update: Update, names: Sequence[str], terms: int) -> list[int]:
    """The weight and the additive numbers of these names in Z_2^128.

    Raises:
        ProtectionError: not finite, or too large for a sum of so many terms.
    """
    numbers = [update.weight, *(float(update.sums.get(name, 0.0)) for name in names)]
    return [encode_wide(number, terms=terms) for number in numbers]


def wide_to_bytes(wide: Sequence[int]) -> Array:
    """uint8 (k, 16), little endian."""
    packed = b"".join(number.to_bytes(WIDE_BYTES, "little") for number in wide)
    return np.frombuffer(packed, np.uint8).reshape(len(wide), WIDE_BYTES)


def wide_from(array: Array) -> list[int]:
    return [int.from_bytes(row.tobytes(), "little") for row in array]


def read_total(
    total: Words, layout: Layout, names: Sequence[str], agreement: Agreement, by: Sequence[str], missing: Sequence[str]
) -> Total:
    """The weighted mean and the sums, once all masks are off.

    Raises:
        ProtectionError: the weights add up to 0, or to more than parties could have: a mask is still on.
    """
    weight, *sums = (decode_wide(number) for number in total.wide)
    if not -1e-6 <= weight <= len(by) * agreement.largest_weight * (1 + 1e-9):
        raise ProtectionError(f"the weights add up to {weight:g}, which {len(by)} parties cannot have")
    divisor = weight / agreement.largest_weight
    if layout and divisor <= 0.0:
        raise ProtectionError(f"the weights of {', '.join(by)} add up to 0: there is no mean")
    flat = total.words.view(np.float32)  # decoded in place: a vector may be as large as the model
    error = 0.0
    if flat.size:
        agreement.fixed_point.decode(total.words, flat, divisor=divisor)
        uncertain = len(by) * 2.0 ** -(WIDE_FRACTION + 1) / agreement.largest_weight + divisor * 2.0**-51
        error = agreement.fixed_point.error_bound(len(by), divisor, divisor_error=uncertain)
    mean: dict[str, Array] = {}
    start = 0
    for name in sorted(layout):
        size = int(np.prod(layout[name], dtype=np.int64))
        mean[name] = flat[start : start + size].reshape(layout[name])
        start += size
    ordered = {name: mean[name] for name in layout}
    return Total(ordered, weight, dict(zip(names, sums, strict=True)), tuple(by), tuple(missing), error)
