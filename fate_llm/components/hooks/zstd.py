"""zstd: a term travels compressed, without loss.

Each tensor is taken apart into byte planes (all first bytes of its values, all second bytes, ...) and every plane is a
Zstandard frame (RFC 8878) of its own: signs and exponents of an update are alike and shrink, mantissas are noise and
cost nothing but a look. On the wire a tensor is `itemsize` lengths (8 bytes each, little-endian), then the frames.

Rules for bytes from a peer:
1. Every size is known beforehand from the task's layout: a frame that promises another is refused unopened, so that a
   few bytes cannot ask for gigabytes.
2. Frames fill the tensor exactly; each has its size in its header and no dictionary. No values, no bytes.
3. A truth value must be 0 or 1, as everywhere on the wire.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import numpy as np
import zstandard
from pydantic import Field

from fate_llm.core.errors import PeerViolation
from fate_llm.core.interfaces import Form, Frozen, HookStage, WireHook
from fate_llm.core.values import Array, Payload

__all__ = ["PLUGIN", "Zstd"]

_BYTE: np.dtype[Any] = np.dtype(np.uint8)
_LENGTH: np.dtype[Any] = np.dtype("<u8")


class Zstd(WireHook):
    """Compresses updates without loss, after any other encoding: the same bits arrive.

    How much it saves depends on the values: little of float32, whose mantissas are noise, more of bf16 and int8.
    """

    stage: ClassVar[HookStage] = HookStage.PACK

    class Params(Frozen):
        level: int = Field(1, ge=1, le=19, description="Effort of Zstandard; more than 1 seldom helps with noise.")

    def __init__(self, params: Params | None = None) -> None:
        level = (params or self.Params()).level
        self._compressor = zstandard.ZstdCompressor(level=level, write_content_size=True, write_checksum=False)
        self._decompressor = zstandard.ZstdDecompressor()

    def form(self, form: Form) -> None:
        return None

    def encode(self, payload: Payload, round_number: int) -> Payload:
        return replace(payload, tensors={name: self._packed(array) for name, array in payload.tensors.items()})

    def decode(self, payload: Payload, form: Form) -> Payload:
        if payload.tensors.keys() != form.keys():
            wrong = [name[:80] for name in sorted(payload.tensors.keys() ^ form.keys())[:3]]
            raise PeerViolation(f"zstd: parameter names differ, first {wrong}")
        tensors = {name: self._unpacked(name, payload.tensors[name], *expected) for name, expected in form.items()}
        return replace(payload, tensors=tensors)

    def _packed(self, array: Array) -> Array:
        if array.size == 0:
            return np.zeros(0, _BYTE)
        little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        planes = little.reshape(-1).view(_BYTE).reshape(array.size, array.dtype.itemsize)
        frames = [self._compressor.compress(np.ascontiguousarray(plane).data) for plane in planes.T]
        lengths = np.array([len(frame) for frame in frames], _LENGTH)
        return np.frombuffer(b"".join([lengths.tobytes(), *frames]), _BYTE)

    def _unpacked(self, name: str, packed: Array, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        count = math.prod(shape)
        frames = _frames(name, packed, dtype.itemsize if count else 0)
        for frame in frames:
            _check_frame(name, frame, count)
        planes = np.empty((count, dtype.itemsize), _BYTE)
        for index, frame in enumerate(frames):
            try:
                plane = self._decompressor.decompress(frame, max_output_size=count, allow_extra_data=False)
            except zstandard.ZstdError:
                raise PeerViolation(f"zstd: {name[:80]} does not hold the frames it should") from None
            planes[:, index] = np.frombuffer(plane, _BYTE)
        if dtype.kind == "b" and planes.max(initial=0) > 1:
            raise PeerViolation(f"zstd: {name[:80]} has truth values that are neither 0 nor 1")
        return planes.reshape(-1).view(dtype).reshape(shape)


def _frames(name: str, packed: Array, count: int) -> list[memoryview]:
    """The `count` frames of a tensor, uncopied."""
    start = count * _LENGTH.itemsize
    if packed.dtype != _BYTE or packed.ndim != 1 or packed.size < start:
        text = f"{packed.dtype} {list(packed.shape)}, expected at least {start} bytes"
        raise PeerViolation(f"zstd: {name[:80]} travels as {text}")
    lengths = [int(n) for n in np.frombuffer(packed[:start].tobytes(), _LENGTH)]
    if start + sum(lengths) != packed.size:
        raise PeerViolation(f"zstd: {name[:80]} has {packed.size} bytes, its frames {start + sum(lengths)}")
    ends = accumulate([start, *lengths])
    return [packed[a:b].data for a, b in pairwise(ends)]


def _check_frame(name: str, frame: memoryview, size: int) -> None:
    """Refuse a frame that says it holds anything but `size` bytes, before it is opened."""
    try:
        head = zstandard.get_frame_parameters(frame)
    except zstandard.ZstdError:
        raise PeerViolation(f"zstd: {name[:80]} has something that is no Zstandard frame") from None
    if head.content_size != size or head.dict_id:
        raise PeerViolation(f"zstd: {name[:80]} has a frame for {head.content_size} bytes, expected {size}")


PLUGIN = Zstd
