"""Settings of a component that name plug-ins, found in raw params."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from .dialect import Path
from .faults import leaves

__all__ = ["PluginField", "plugin_fields"]


@dataclass(frozen=True, slots=True)
class PluginField:
    """A setting that names a plug-in. holder: path of the params that the field belongs to."""

    kind: str
    name: str
    path: Path
    holder: Path


def plugin_fields(model: Any, raw: Any, path: Path = ()) -> Iterator[PluginField]:
    """Names of plug-ins in raw params: fields marked `json_schema_extra={"plugin": kind}`, at any depth."""
    for leaf in leaves(model):
        inner = [kind for kind in typing.get_args(leaf) if kind is not Ellipsis]
        if isinstance(leaf, type) and issubclass(leaf, BaseModel) and isinstance(raw, Mapping):
            yield from _of_model(leaf, raw, path)
        elif isinstance(raw, Mapping) and len(inner) == 2:
            for key, value in raw.items():
                yield from plugin_fields(inner[1], value, (*path, key))
        elif isinstance(raw, (list, tuple)) and inner:
            for index, value in enumerate(raw):
                yield from plugin_fields(inner[0], value, (*path, index))


def _of_model(model: type[BaseModel], raw: Mapping[str, Any], path: Path) -> Iterator[PluginField]:
    for name, info in model.model_fields.items():
        key = info.alias or name
        value = raw[key] if key in raw else info.get_default(call_default_factory=False)
        extra = info.json_schema_extra
        if isinstance(extra, dict) and "plugin" in extra:
            yield from _names(str(extra["plugin"]), value, (*path, key), path)
        elif value is not PydanticUndefined:
            below = value.model_dump() if isinstance(value, BaseModel) else value
            yield from plugin_fields(info.annotation, below, (*path, key))


def _names(kind: str, value: Any, path: Path, holder: Path) -> Iterator[PluginField]:
    """One name, a list of names, or a mapping from names to their settings."""
    if isinstance(value, str):
        yield PluginField(kind, value, path, holder)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _names(kind, item, (*path, index), holder)
    elif isinstance(value, Mapping):
        for key in value:
            yield from _names(kind, key, (*path, key), holder)
