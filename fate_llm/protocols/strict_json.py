"""JSON from a peer, read strictly: one meaning or an error.

Refused besides what is not JSON: other encodings than UTF-8, a key twice in one object, NaN and infinity (as
a word or as a number too large), half a surrogate pair, and nesting deeper than the interpreter can read.
"""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = ["read_json"]


def read_json(raw: bytes | memoryview) -> Any:
    """The value of a JSON text. Memory taken is bounded by about 25 times the length: bound that first.

    Raises:
        ValueError: any fault; nothing of the text should be used.
    """
    text = str(raw, "utf-8")
    try:
        value = json.loads(
            text, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_object_of_distinct_keys
        )
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError("a number is too large")
    return value


def _object_of_distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice in one object")
    return found
