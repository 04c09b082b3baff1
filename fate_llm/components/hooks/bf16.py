"""bf16: a term travels in bfloat16, half the bytes, each value rounded to the nearest (to even in the middle)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from fate_llm.core.errors import ConfigurationError, PeerViolation, ProtectionError
from fate_llm.core.interfaces import Form, Frozen, HookStage, WireHook
from fate_llm.core.values import Array, Payload

__all__ = ["PLUGIN", "Bf16"]

_BF16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
_FLOAT32: np.dtype[Any] = np.dtype(np.float32)


class Bf16(WireHook):
    """Sends updates in bfloat16: half the bytes, a relative error of at most 2^-8 for each value.

    Signs, zeros and the range of float32 stay; no seed, no memory from round to round.
    """

    stage: ClassVar[HookStage] = HookStage.ENCODE

    class Params(Frozen):
        pass

    def __init__(self, params: Params | None = None) -> None:
        self._params = params or self.Params()

    def form(self, form: Form) -> Form:
        for name, (dtype, _) in form.items():
            if dtype != _FLOAT32:
                raise ConfigurationError(f"bf16 writes float32 anew, and {name} is {dtype}")
        return {name: (_BF16, shape) for name, (_, shape) in form.items()}

    def encode(self, payload: Payload, round_number: int) -> Payload:
        return replace(payload, tensors={name: _rounded(name, array) for name, array in payload.tensors.items()})

    def decode(self, payload: Payload, form: Form) -> Payload:
        wanted = self.form(form)
        if payload.tensors.keys() != wanted.keys():
            wrong = [name[:80] for name in sorted(payload.tensors.keys() ^ wanted.keys())[:3]]
            raise PeerViolation(f"bf16: parameter names differ, first {wrong}")
        for name, (dtype, shape) in wanted.items():
            found = payload.tensors[name]
            if found.dtype != dtype or found.shape != shape:
                text = f"{found.dtype} {list(found.shape)}, expected {dtype} {list(shape)}"
                raise PeerViolation(f"bf16: {name[:80]} travels as {text}")
        return replace(payload, tensors={name: payload.tensors[name].astype(_FLOAT32) for name in form})


def _rounded(name: str, array: Array) -> Array:
    if array.dtype != _FLOAT32:
        raise ConfigurationError(f"bf16 writes float32 anew, and {name} is {array.dtype}")
    with np.errstate(over="ignore"):
        written = np.asarray(array.astype(_BF16))
    if not np.isfinite(written).all():
        bad = int(array.size - np.isfinite(written).sum())
        raise ProtectionError(f"bf16: {name} has {bad} of {array.size} values that bfloat16 cannot hold")
    return written


PLUGIN = Bf16
