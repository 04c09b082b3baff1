"""Named tensors as one safetensors container, without copying what is in memory.

The layout is that of the safetensors format: 8 bytes little-endian length of the header, the header as JSON
({name: {"dtype", "shape", "data_offsets"}}), then the values, row-major, little-endian. `write` gives the
parts so that a transport can gather them; `read` gives read-only views on the bytes received.

Rules for bytes from a peer:
1. Every length is checked against the bytes that are there before anything is allocated or viewed.
2. Offsets must tile the body exactly, in order: no gap, no overlap, no alias.
3. Only dtypes of the table are known; nothing is ever resolved by name.
4. A shape must be one that numpy can hold, and a truth value must be 0 or 1.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from fate_llm.core.errors import BadEnvelope
from fate_llm.core.interfaces import Form
from fate_llm.core.values import Array, Arrays

from .strict_json import read_json

__all__ = ["MAX_HEADER", "container_bytes", "container_overhead", "read_tensors", "tensor_bytes", "write_tensors"]

MAX_HEADER = 8 * 1024 * 1024  # bytes; about 60,000 tensors. Reading takes up to 25 times as much memory
_METADATA = "__metadata__"  # a name that the format keeps for itself
_LENGTH = struct.Struct("<Q")

_DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def write_tensors(tensors: Arrays) -> list[bytes | memoryview]:
    """The container as parts: header first, then one view per tensor (copied only when not contiguous).

    Tensors of larger items come first so that every view is aligned; names keep their order otherwise.

    Raises:
        ValueError: a dtype that has no name in the format, or a name that the format keeps for itself.
    """
    if _METADATA in tensors:
        raise ValueError(f"no tensor can be called {_METADATA!r}")
    parts: list[bytes | memoryview] = []
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
        dtype = tensor.dtype.newbyteorder("<") if tensor.dtype.byteorder == ">" else tensor.dtype
        if dtype not in _NAMES:
            raise ValueError(f"tensor {name!r} has dtype {tensor.dtype}; valid: {', '.join(_DTYPES)}")
        array = np.ascontiguousarray(tensor, dtype=dtype)
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
        if array.nbytes:
            parts.append(array.reshape(-1).view(np.uint8).data)
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return [_LENGTH.pack(len(text)) + text, *parts]


def container_overhead(form: Form) -> int:
    """Bytes of a container beyond the values, from {name: (dtype, shape)} alone."""
    offset, header = 0, {}
    for name, (dtype, shape) in sorted(form.items(), key=lambda item: -item[1][0].itemsize):
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(header, separators=(",", ":")).encode("utf-8"))
    return _LENGTH.size + length + (-length % 8)


def container_bytes(form: Form) -> int:
    """Bytes of a container of tensors of these dtypes and shapes."""
    return container_overhead(form) + sum(dtype.itemsize * math.prod(shape) for dtype, shape in form.values())


def tensor_bytes(tensors: Arrays) -> int:
    """Bytes of the values alone."""
    return sum(array.nbytes for array in tensors.values())


def read_tensors(body: memoryview) -> dict[str, Array]:
    """Read-only views into `body`, by name.

    Raises:
        BadEnvelope: not a container, or one whose header does not describe exactly these bytes.
    """
    if len(body) < _LENGTH.size:
        raise BadEnvelope(f"tensors: {len(body)} bytes, fewer than the 8 of the length")
    (length,) = _LENGTH.unpack(body[: _LENGTH.size])
    if length > min(MAX_HEADER, len(body) - _LENGTH.size):
        raise BadEnvelope(f"tensors: header of {length} bytes in a body of {len(body)}")
    start = _LENGTH.size + length
    try:
        header = read_json(body[_LENGTH.size : start])
    except ValueError as error:
        raise BadEnvelope(f"tensors: the header is not JSON ({type(error).__name__})") from None
    if not isinstance(header, dict):
        raise BadEnvelope("tensors: the header is not an object")
    header.pop(_METADATA, None)
    values = body[start:].toreadonly()
    tensors: dict[str, Array] = {}
    end = 0
    for name, entry in header.items():
        dtype, shape, end = _entry(name, entry, expected_start=end, available=len(values))
        begin = end - math.prod(shape) * dtype.itemsize
        if dtype == np.bool_ and np.frombuffer(values[begin:end], dtype=np.uint8).max(initial=0) > 1:
            raise BadEnvelope(f"tensors: {name[:80]!r} has truth values that are neither 0 nor 1")
        tensors[name] = np.frombuffer(values[begin:end], dtype=dtype).reshape(shape)
    if end != len(values):
        raise BadEnvelope(f"tensors: {len(values) - end} bytes after the last tensor")
    return tensors


def _entry(
    name: str, entry: object, *, expected_start: int, available: int
) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    shown = name[:80]  # a peer's text is cut before it reaches a log
    if not isinstance(entry, Mapping) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise BadEnvelope(f"tensors: entry of {shown!r} must have dtype, shape and data_offsets only")
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise BadEnvelope(
            f"tensors: {shown!r} has unknown dtype {str(entry['dtype'])[:20]!r}; valid: {', '.join(_DTYPES)}"
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _naturals(shape) or len(shape) > 32 or math.prod(filter(None, shape)) >= 2**59:
        raise BadEnvelope(f"tensors: {shown!r} has a bad shape")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] != expected_start:
        raise BadEnvelope(f"tensors: {shown!r} does not start at byte {expected_start}")
    if offsets[1] > available or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise BadEnvelope(f"tensors: {shown!r} of shape {shape} does not fit its {offsets} of {available} bytes")
    return dtype, tuple(shape), offsets[1]


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)
