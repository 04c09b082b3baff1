"""Names: what a name may look like, and the nearest valid one when it is wrong."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

__all__ = ["NAME_PATTERN", "is_name", "nearest"]

NAME_PATTERN = r"^[a-z0-9](?:[a-z0-9_.-]{0,62}[a-z0-9])?$"
_NAME = re.compile(NAME_PATTERN)


def is_name(text: str) -> bool:
    """True for a valid id of a party or task: small letters, digits, `_`, `-`, `.`; 1 to 64 characters."""
    return _NAME.fullmatch(text) is not None


def nearest(name: str, known: Iterable[str], *, most: int = 8) -> str:
    """A hint for a wrong name: "did you mean 'median'?", or the list of what is valid.

    Returns an empty string when nothing is known.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    if not names:
        return ""
    shown = ", ".join(names[:most]) + (", ..." if len(names) > most else "")
    return f"valid: {shown}"
