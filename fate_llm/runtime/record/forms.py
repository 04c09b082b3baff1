"""What the record may know of a message's tensors: names, dtypes and shapes, never values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Final

from fate_llm.core.canonical import canonical_json, digest

__all__ = ["summary_of"]

_MOST_TENSORS: Final = 64  # that are listed one by one
_MOST_BYTES: Final = 16 * 1024  # of such a list


def summary_of(form: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """A form ({tensor: [dtype, shape]}) as the log keeps it: bounded, with a digest where it is not all there.

    {"count", "values", "dtypes": {dtype: tensors}, "form"}, or "form_digest" in place of "form" above 64 tensors.
    """
    shapes: dict[str, list[int]] = {name: [int(size) for size in shape] for name, (_, shape) in form.items()}
    dtypes = {name: str(dtype) for name, (dtype, _) in form.items()}
    found: dict[str, Any] = {
        "count": len(shapes),
        "values": sum(prod(shape) for shape in shapes.values()),
        "dtypes": dict(Counter(dtypes.values())),
    }
    plain = {name: [dtypes[name], shape] for name, shape in shapes.items()}
    if len(plain) <= _MOST_TENSORS and len(canonical_json(plain)) <= _MOST_BYTES:
        return {**found, "form": plain}
    return {**found, "form_digest": digest(plain)}
