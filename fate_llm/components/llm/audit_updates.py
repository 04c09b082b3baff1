"""Updates of one party as the coordinator would get them: plain, masked for a sum, summed, and with noise.

Stands for a round of `secagg` on one machine, with its arithmetic (`security.fixed_point`, `security.masks`) and
without its messages: keys are drawn here instead of being agreed on. For audits; nothing made here is sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fate_llm.core.errors import InternalError
from fate_llm.core.values import Array, Arrays
from fate_llm.security.fixed_point import WIDE_BITS, FixedPoint, Rounding, decode_wide, encode_wide
from fate_llm.security.masks import KEY_BYTES, add_masks
from fate_llm.security.randomness import random_bytes

from .templates import Encoded
from .training import Meter, make_trainer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["SumRound", "gradient", "mask_alone", "noised", "random_update", "sum_round", "train"]


def gradient(
    model: PreTrainedModel, names: Sequence[str], batch: Mapping[str, torch.Tensor], max_norm: float
) -> dict[str, Array]:
    """The gradient of the batch's mean loss, its norm clipped: what a party sends in FedSGD.

    names: wire names of the trainable parameters, in the model's order. float32 by name.
    """
    import torch

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()
    model.zero_grad(set_to_none=True)
    model(**batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    found: dict[str, Array] = {}
    for name, parameter in zip(names, parameters, strict=True):
        assert parameter.grad is not None
        found[name] = parameter.grad.to("cpu", torch.float32, copy=True).numpy()
    model.zero_grad(set_to_none=True)
    return found


def train(
    model: PreTrainedModel,
    rows: Sequence[Encoded],
    arguments: Mapping[str, Any],
    *,
    folder: Path,
    pad_id: int,
    check: Callable[[], None],
) -> None:
    """Train in place as `homo_llm_trainer` does: its Trainer, its AdamW. check: called after every step."""
    from transformers import TrainerCallback

    class Cancel(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            check()

    options = {"optim": "adamw_torch", "lr_scheduler_type": "constant", **arguments}
    make_trainer(
        model, rows, arguments=options, folder=folder, pad_id=pad_id, meter=Meter(), callbacks=[Cancel()]
    ).train()
    model.zero_grad(set_to_none=True)


# --- on the way --------------------------------------------------------------------------------------------------


class _Keys:
    """Keys of one round: a self mask for every party, a mask for every pair (the first adds, the second subtracts)."""

    def __init__(self, parties: int) -> None:
        self.own = [random_bytes(KEY_BYTES) for _ in range(parties)]
        self.pairs = {(a, b): random_bytes(KEY_BYTES) for b in range(parties) for a in range(b)}

    def mask(self, words: Array, wide: list[int], me: int) -> None:
        plus = [self.own[me], *(key for (first, _), key in self.pairs.items() if first == me)]
        add_masks(words, wide, plus=plus, minus=[key for (_, second), key in self.pairs.items() if second == me])


@dataclass(frozen=True, slots=True, repr=False)
class SumRound:
    """A round of masked sums. masked: the first party's term as the coordinator reads it. mean: what it learns.

    clipped: values of all terms that were outside of the clip.
    """

    masked: dict[str, Array]
    mean: dict[str, Array]
    clipped: int


def sum_round(updates: Sequence[Arrays], fixed: FixedPoint) -> SumRound:
    """All parties' terms masked, added and unmasked, all of weight 1. The updates have one layout.

    Raises:
        InternalError: the masks of the parties did not cancel to the bit.
    """
    keys = _Keys(len(updates))
    size = sum(array.size for array in updates[0].values())
    plain, total, first = np.zeros(size, np.uint32), np.zeros(size, np.uint32), np.zeros(size, np.uint32)
    weights, clipped = 0, 0
    for me, update in enumerate(updates):
        words, outside = _words(update, fixed)
        clipped += outside
        np.add(plain, words, out=plain)
        wide = [encode_wide(1.0, terms=fixed.terms)]
        keys.mask(words, wide, me)
        if me == 0:
            first[:] = words
        np.add(total, words, out=total)
        weights += wide[0]
    left = [weights % 2**WIDE_BITS]
    add_masks(total, left, plus=[], minus=keys.own)
    if decode_wide(left[0]) != len(updates) or not np.array_equal(total, plain):
        raise InternalError(f"the masks of {len(updates)} parties do not cancel in their sum")
    mean = np.empty(size, np.float32)
    fixed.decode(total, mean, divisor=float(len(updates)))
    return SumRound(_read(first, fixed, updates[0]), _arrays(mean, updates[0]), clipped)


def mask_alone(update: Arrays, fixed: FixedPoint) -> dict[str, Array]:
    """The term of the first of `fixed.terms` parties as the coordinator reads it."""
    words, _ = _words(update, fixed)
    _Keys(fixed.terms).mask(words, [encode_wide(1.0, terms=fixed.terms)], 0)
    return _read(words, fixed, update)


def noised(update: Arrays, max_norm: float, multiplier: float, seed: int) -> dict[str, Array]:
    """Clipped to an L2 norm, with Gaussian noise of `multiplier` times that norm on every value.

    What a record-level mechanism would send of one batch; for comparison only: noise of a seed protects nothing.
    """
    norm = math.sqrt(sum(float(np.square(array, dtype=np.float64).sum()) for array in update.values()))
    factor = min(1.0, max_norm / norm) if norm > 0 else 1.0
    draws = np.random.Generator(np.random.Philox(seed))
    return {
        name: np.asarray(array * factor + multiplier * max_norm * draws.standard_normal(array.shape), dtype=np.float32)
        for name, array in update.items()
    }


def random_update(like: Arrays, fixed: FixedPoint, draws: np.random.Generator) -> dict[str, Array]:
    """Numbers that have nothing to do with any data, of the layout and range of a masked term."""
    size = sum(array.size for array in like.values())
    return _read(draws.integers(0, 2**32, size, dtype=np.uint32), fixed, like)


def _words(update: Arrays, fixed: FixedPoint) -> tuple[Array, int]:
    """The update in steps, before it is masked, and how many values were clipped."""
    values = np.concatenate([np.ravel(array) for array in update.values()]).astype(np.float32, copy=False)
    words = np.empty(values.size, np.uint32)
    return words, fixed.encode(values, words, factor=1.0, rounding=Rounding(random_bytes(32)))


def _read(words: Array, fixed: FixedPoint, like: Arrays) -> dict[str, Array]:
    """What words say to somebody without a key: signed steps, times the step."""
    return _arrays((words.view(np.int32) * fixed.step).astype(np.float32), like)


def _arrays(values: Array, like: Arrays) -> dict[str, Array]:
    found, start = {}, 0
    for name, array in like.items():
        found[name] = values[start : start + array.size].reshape(array.shape)
        start += array.size
    return found
