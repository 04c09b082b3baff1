"""The folder is the registry: a plug-in's name is the name of its file.

Rules:
1. Listing names imports nothing but the folder's package.
2. Only names in our folders, or of an installed entry point, resolve. A dotted path is never imported.
3. An unknown name is an error that names the nearest valid one.
4. A plug-in module exposes exactly one object, `PLUGIN`.
5. An entry point cannot take the name of a plug-in of ours.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib import metadata
from typing import Any

from .errors import InternalError, UnknownPlugin
from .names import nearest

__all__ = ["KINDS", "load", "names"]

KINDS: dict[str, str] = {
    "component": "fate_llm.components",
    "aggregator": "fate_llm.components.aggregators",
    "hook": "fate_llm.components.hooks",
    "sum": "fate_llm.protocols.sums",
    "transport": "fate_llm.protocols.transports",
}


@cache
def _in_folder(kind: str) -> tuple[str, ...]:
    package = importlib.import_module(KINDS[kind])
    found = pkgutil.iter_modules(package.__path__)
    return tuple(sorted(m.name for m in found if not m.ispkg and not m.name.startswith("_")))


@cache
def _installed(kind: str) -> dict[str, metadata.EntryPoint]:
    points = metadata.entry_points(group=f"fate_llm.{kind}s")
    return {point.name: point for point in points if point.name not in _in_folder(kind)}


def names(kind: str) -> list[str]:
    """Names of all plug-ins of a kind (a key of KINDS), sorted; imports none of them."""
    if kind not in KINDS:
        raise InternalError(f"no kind of plug-in called {kind!r}")
    return sorted({*_in_folder(kind), *_installed(kind)})


def load(kind: str, name: str) -> Any:
    """The `PLUGIN` object of the plug-in called `name`.

    Raises:
        UnknownPlugin: no file of that name in the folder and no entry point; the hint has the nearest name.
    """
    known = names(kind)
    if name not in known:
        raise UnknownPlugin(f"no {kind} is called {name!r}", hint=nearest(name, known))
    if name in _in_folder(kind):
        return importlib.import_module(f"{KINDS[kind]}.{name}").PLUGIN
    return _installed(kind)[name].load()
