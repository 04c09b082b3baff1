"""Words as bytes: JSON that has one meaning, or an error.

What is refused besides what `protocols.strict_json` and the words' own schema refuse: more than DEEPEST levels or
MOST_VALUES values, which no word has, and the character NUL, which databases do not keep. A word of another version
has fields or a kind that are not known here, and is refused as a whole.

Values are counted before anything is read, as commas and brackets, those in texts too. So reading the largest word
takes at most MEMORY bytes, and seconds of a processor; without, 16 MiB of brackets took a gigabyte, and half a minute.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from fate_llm.core.errors import ConfigurationError, PeerViolation
from fate_llm.protocols.strict_json import read_json

from .words import Word

__all__ = ["DEEPEST", "MEMORY", "MOST_VALUES", "read_word", "write_word"]

DEEPEST: Final = 64
MOST_VALUES: Final = 400_000
MEMORY: Final = 200 * 1024 * 1024
_WORD: Final[TypeAdapter[Word]] = TypeAdapter(Word)
_UNSAYABLE: Final = re.compile("[\0\ud800-\udfff]")
_SHOWN: Final = 3  # faults that an error names


def write_word(word: Word) -> bytes:
    """UTF-8 JSON of a word, as `read_word` takes it.

    Error messages and the like have anything in them: NUL and half surrogate pairs become U+FFFD, numbers that are none
    become null.

    Raises:
        ConfigurationError: nested deeper than DEEPEST levels, or of more than MOST_VALUES values.
    """
    value = _sayable(_WORD.dump_python(word, mode="json"))
    body = json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
    if (count := _values(body)) > MOST_VALUES:
        raise ConfigurationError(
            f"a word of about {count} values; at most {MOST_VALUES}",
            hint="A job with fewer rounds, tasks or parties has a smaller record.",
        )
    return body


def _values(body: bytes) -> int:
    """No fewer than a JSON text has."""
    return body.count(b",") + body.count(b"[") + body.count(b"{")


def _sayable(value: Any, level: int = 1) -> Any:
    if level > DEEPEST:
        raise ConfigurationError(
            f"a word nested deeper than {DEEPEST} levels", hint="Are a pipeline's parameters nested that deep?"
        )
    if isinstance(value, dict):
        return {_sayable(key): _sayable(below, level + 1) for key, below in value.items()}
    if isinstance(value, list):
        return [_sayable(below, level + 1) for below in value]
    if isinstance(value, str):
        return _UNSAYABLE.sub("\ufffd", value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_word(body: bytes) -> Word:
    """The word in bytes from another party.

    Raises:
        PeerViolation: they are no word of this version; nothing of them was used.
    """
    if (count := _values(body)) > MOST_VALUES:
        raise PeerViolation(f"a word of about {count} values; at most {MOST_VALUES}")
    try:
        value = read_json(body)
    except ValueError as error:  # its words may repeat the text
        kind = "UTF-8" if isinstance(error, UnicodeDecodeError) else "JSON with one meaning"
        raise PeerViolation(f"a word of {len(body)} bytes that is not {kind}") from None
    fault = _fault(value)
    del value  # the schema reads the text itself: in JSON it knows what is strict
    if fault:
        raise PeerViolation(f"a word that {fault}")
    try:
        return _WORD.validate_json(body, strict=True)
    except ValidationError as error:
        raise PeerViolation(f"a word that this version does not know: {_shown(error)}") from None


def _fault(value: Any) -> str:
    """Why a JSON value is no word's, whatever its fields; empty when nothing is wrong. Level by level."""
    level = [value]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.keys()
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str) and "\0" in item:
                return "has the character NUL in a text"
        if not below:
            return ""
        level = below
    return f"is nested deeper than {DEEPEST} levels"


def _shown(error: ValidationError) -> str:
    """The first faults, without what was found: that may be long, or private."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    told = [f"{'.'.join(map(str, fault['loc']))[:80] or 'it'}: {fault['msg'][:120]}" for fault in faults[:_SHOWN]]
    return "; ".join(told) + (f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else "")
