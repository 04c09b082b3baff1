"""int8: a term travels in one byte a value, with one scale for every 4,096 values.

A block's scale is its largest magnitude over 127, and a value becomes one of the two whole steps around it, the nearer
the likelier, so that the mean over all draws is the value itself. What was rounded away is kept and added to the
party's next term (error feedback: Seide et al. 2014, Karimireddy et al. 2019), so that over the rounds nothing but the
last round's rounding is missing.

Rules:
1. The scale is rounded up, never down: no value is more than 127 steps, and none is clipped.
2. What a party keeps belongs to terms that counted. A round that went on without its term is as if it had not been:
   what was kept before it stays, and what this term's rounding took is forgotten with the term.
3. What is kept is added after all other hooks: with `clip`, a term's norm can pass the bound by the rounding.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from fate_llm.core.errors import ConfigurationError, PeerViolation, ProtectionError
from fate_llm.core.interfaces import Form, Frozen, HookStage, WireHook
from fate_llm.core.seeds import derive_seed
from fate_llm.core.values import Array, Payload
from fate_llm.protocols.tensors import read_tensors, write_tensors

__all__ = ["BLOCK", "PLUGIN", "Int8", "scales_name"]

BLOCK = 4096  # values that share a scale: 4 bytes in 4,096
_STEPS = 127
_FILE = "residual.safetensors"
_AT_ONCE = 256 * BLOCK  # values rounded at a time, so that what is in between stays in the cache
_FLOAT32: np.dtype[Any] = np.dtype(np.float32)
_INT8: np.dtype[Any] = np.dtype(np.int8)


class Int8(WireHook):
    """Sends updates as one byte a value: a quarter of the bytes, rounded at random by at most one step.

    A step is the largest magnitude among 4,096 neighbours over 127. What is rounded away is added to the next round's
    update, which costs a party 8 bytes a value of memory.
    """

    stage: ClassVar[HookStage] = HookStage.ENCODE
    draws: ClassVar[bool] = True

    class Params(Frozen):
        error_feedback: bool = Field(True, description="Add what was rounded away to the next round's update.")

    def __init__(self, params: Params | None = None, *, seed: int) -> None:
        self._params = params or self.Params()
        self._seed = seed
        self._kept: dict[str, Array] = {}
        self._pending: dict[str, Array] = {}

    def form(self, form: Form) -> Form:
        for name, (dtype, _) in form.items():
            _require_float32(name, dtype)
        scales = {scales_name(form): (_FLOAT32, (sum(_blocks(shape) for _, shape in form.values()),))}
        return {**{name: (_INT8, shape) for name, (_, shape) in form.items()}, **scales}

    def encode(self, payload: Payload, round_number: int) -> Payload:
        written: dict[str, Array] = {}
        scales: list[Array] = []
        pending: dict[str, Array] = {}
        for name, array in sorted(payload.tensors.items()):
            _require_float32(name, array.dtype)
            values = array + self._kept[name] if name in self._kept else array
            flat = np.ascontiguousarray(values).reshape(-1)
            random = np.random.default_rng(derive_seed(self._seed, str(round_number), name))
            steps, scale, rest = _rounded(name, flat, random)
            written[name] = steps.reshape(array.shape)
            scales.append(scale)
            if self._params.error_feedback:
                pending[name] = rest.reshape(array.shape)
        written[scales_name(payload.tensors)] = np.concatenate(scales) if scales else np.zeros(0, _FLOAT32)
        self._pending = pending
        return replace(payload, tensors=written)

    def settle(self, *, counted: bool) -> None:
        if counted and self._pending:
            self._kept = self._pending
        self._pending = {}

    def save(self, folder: Path) -> None:
        """Write down what was rounded away so far (see `core.interfaces.Kept`); the layout is that of float32 terms."""
        (folder / _FILE).write_bytes(b"".join(write_tensors(self._kept)))

    def restore(self, folder: Path) -> None:
        self._kept = read_tensors(memoryview((folder / _FILE).read_bytes()))
        self._pending = {}

    def decode(self, payload: Payload, form: Form) -> Payload:
        wanted = self.form(form)
        if payload.tensors.keys() != wanted.keys():
            wrong = [name[:80] for name in sorted(payload.tensors.keys() ^ wanted.keys())[:3]]
            raise PeerViolation(f"int8: parameter names differ, first {wrong}")
        for name, (dtype, shape) in wanted.items():
            found = payload.tensors[name]
            if found.dtype != dtype or found.shape != shape:
                text = f"{found.dtype} {list(found.shape)}, expected {dtype} {list(shape)}"
                raise PeerViolation(f"int8: {name[:80]} travels as {text}")
            if dtype == _INT8 and found.min(initial=0) < -_STEPS:
                raise PeerViolation(f"int8: {name[:80]} has a value below -{_STEPS} steps")
        scales = payload.tensors[scales_name(form)]
        if not (np.isfinite(scales) & (scales >= 0) & (scales <= np.finfo(np.float32).max / _STEPS)).all():
            raise PeerViolation("int8: a scale is negative, not finite or too large")
        values: dict[str, Array] = {}
        first = 0
        for name in sorted(form):
            last = first + _blocks(form[name][1])
            values[name] = _values(payload.tensors[name].reshape(-1), scales[first:last]).reshape(form[name][1])
            first = last
        return replace(payload, tensors={name: values[name] for name in form})


def scales_name(names: Form | dict[str, Array] | Any) -> str:
    """The name of the tensor of all scales (blocks in order, parameters by name): one that no parameter has."""
    name = "int8.scales"
    while name in names:
        name += "'"
    return name


def _blocks(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return -(-size // BLOCK)


def _require_float32(name: str, dtype: np.dtype[Any]) -> None:
    if dtype != _FLOAT32:
        raise ConfigurationError(f"int8 writes float32 anew, and {name} is {dtype}")


def _rounded(name: str, flat: Array, random: np.random.Generator) -> tuple[Array, Array, Array]:
    """Whole steps (int8), a scale for each block, and what the steps leave of the values."""
    steps, rest = np.empty(flat.size, _INT8), np.empty(flat.size, _FLOAT32)
    scales: list[Array] = [np.zeros(0, _FLOAT32)]
    for begin in range(0, flat.size, _AT_ONCE):
        part = flat[begin : begin + _AT_ONCE]
        scales.append(_scales(name, part))
        step = np.repeat(scales[-1], BLOCK)[: part.size]
        quotient = part / np.where(step > 0, step, np.float32(1))
        down = np.floor(quotient)
        down += random.random(part.size, dtype=np.float32) < quotient - down  # exact, so that 127 stays 127
        steps[begin : begin + part.size] = down
        rest[begin : begin + part.size] = part - down * step
    return steps, np.concatenate(scales), rest


def _scales(name: str, part: Array) -> Array:
    """The smallest float32 of each block that reaches its largest magnitude within 127 steps."""
    largest = np.maximum.reduceat(np.abs(part), np.arange(0, part.size, BLOCK)).astype(np.float64)
    if not (largest <= np.finfo(np.float32).max * (1 - 2**-20)).all():
        raise ProtectionError(f"int8: {name} has values that are not finite, or too large to be written in steps")
    scale = (largest / _STEPS).astype(_FLOAT32)
    return np.where(scale.astype(np.float64) * _STEPS < largest, np.nextafter(scale, np.float32(np.inf)), scale)


def _values(steps: Array, scales: Array) -> Array:
    values = np.empty(steps.size, _FLOAT32)
    for begin in range(0, steps.size, _AT_ONCE):
        part = steps[begin : begin + _AT_ONCE]
        scale = np.repeat(scales[begin // BLOCK : (begin + _AT_ONCE) // BLOCK], BLOCK)[: part.size]
        np.multiply(part, scale, out=values[begin : begin + part.size])
    return values


PLUGIN = Int8
