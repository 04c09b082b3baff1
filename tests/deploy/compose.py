"""Reads compose files as `docker compose` does: variables put in, merge keys followed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .program import documents

__all__ = ["Unset", "env_example", "interpolated", "load", "variables"]

_VARIABLE = re.compile(r"\$(?:(\$)|(\w+)|\{(\w+)(?:(:?[-?])([^}]*))?\})")


class Unset(Exception):
    """A variable without a value that has to have one."""


def interpolated(text: str, values: Mapping[str, str]) -> str:
    """`$X`, `${X}`, `${X:-default}`, `${X-default}`, `${X:?why}`, `${X?why}` and `$$`."""

    def put(match: re.Match[str]) -> str:
        dollar, plain, name, sign, word = match.groups()
        if dollar:
            return "$"
        value = values.get(plain or name)
        empty = value is None or (value == "" and (sign or "").startswith(":"))
        if empty and sign and sign.endswith("?"):
            raise Unset(f"{name}: {word}")
        return word if empty and sign else value or ""

    return _VARIABLE.sub(put, text)


def without_comments(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))


def variables(text: str) -> dict[str, set[str | None]]:
    """Every variable of a file with the defaults it is given; None where it has none."""
    found: dict[str, set[str | None]] = {}
    for dollar, plain, name, sign, word in _VARIABLE.findall(without_comments(text)):
        if not dollar:
            found.setdefault(plain or name, set()).add(word if sign.endswith("-") else None)
    return found


def env_example(path: Path) -> dict[str, tuple[str, bool]]:
    """Variables of an example: (value, whether it is commented out). Each has words of explanation above it."""
    found: dict[str, tuple[str, bool]] = {}
    explained = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        match = re.fullmatch(r"(#?)([A-Z][A-Z0-9_]*)=(.*)", line)
        if match:
            assert explained, f"{path.name}:{number}: nothing says what {match[2]} is"
            assert match[2] not in found, f"{path.name}:{number}: {match[2]} is there twice"
            found[match[2]] = (match[3], bool(match[1]))
        else:
            assert not line or line.startswith("#"), f"{path.name}:{number}: {line!r}"
            explained = line.startswith("# ") or (explained and bool(line))
    return found


def load(path: Path, values: Mapping[str, str]) -> dict[str, Any]:
    """A compose file as plain values. Numbers and texts are as YAML reads them after the variables are put in."""
    (found,) = documents(interpolated(without_comments(path.read_text(encoding="utf-8")), values))
    assert isinstance(found, dict), path
    return found
