"""What params name that lies outside a job: data sets, models, files. For policies, which have to know all of it.

A component marks the fields that do so with `json_schema_extra={"resource": "data"}` or `{"resource": "model"}`;
`"names"` says what kind of name the field holds (`package`, `hub`; a path when it is not given). A text in a field
without a mark is found as well when it could be a path: a component of somebody else's is no way around the marks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from os import PathLike, fspath
from typing import Any, Literal

from pydantic import BaseModel

from .dialect import Path

__all__ = ["CATALOG", "Resource", "looks_like_path", "resources_of"]

CATALOG = "catalog:"
"""Prefix of a name in a party's catalogue."""

_PATH_START = re.compile(r"^\s*(?:[/~\\]|\.{1,2}[/\\]|[A-Za-z]:[/\\]|file:)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Resource:
    """Something outside the job. kind: "data", "model", or "" where no mark says it.

    text: `catalog:NAME`, `package:NAME`, `hub:NAME[@REVISION]` or `path:...`. path: of the param.
    """

    kind: Literal["data", "model", ""]
    text: str
    path: Path

    @property
    def name(self) -> str | None:
        """The name in the catalogue, None for anything else."""
        return self.text.removeprefix(CATALOG) if self.text.startswith(CATALOG) else None

    @property
    def is_path(self) -> bool:
        return self.text.startswith("path:")


def looks_like_path(text: str) -> bool:
    """True for a text that a component could open as a file: absolute, `..`, or words without spaces between slashes.

    A bare file name is none: it starts at the job's own folder, where nothing of the party lies.
    """
    parts = re.split(r"[/\\]", text)
    return bool(_PATH_START.match(text)) or ".." in parts or (len(parts) > 1 and not re.search(r"\s", text))


def resources_of(params: Any) -> Iterator[Resource]:
    """Every resource that validated params (a `Params` instance) name, in their order."""
    yield from _walk(params, (), {})


def _walk(value: Any, path: Path, mark: Mapping[str, Any]) -> Iterator[Resource]:
    if isinstance(value, BaseModel):
        yield from _of_model(value, path)
    elif is_dataclass(value) and not isinstance(value, type):
        for one in fields(value):
            yield from _walk(getattr(value, one.name), (*path, one.name), {})
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(key, path, {})
            yield from _walk(item, (*path, str(key)), mark)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for index, item in enumerate(value):
            yield from _walk(item, (*path, index), mark)
    elif isinstance(value, PathLike):
        yield _resource(str(fspath(value)), path, mark or {"resource": ""})
    elif isinstance(value, (str, bytes)):
        text = value if isinstance(value, str) else value.decode("latin-1")
        if text and (mark or text.strip().startswith(CATALOG) or looks_like_path(text)):
            yield _resource(text, path, mark)


def _of_model(model: BaseModel, path: Path) -> Iterator[Resource]:
    for name, info in type(model).model_fields.items():
        extra = info.json_schema_extra
        mark: dict[str, Any] = extra if isinstance(extra, dict) and "resource" in extra else {}
        if mark.get("names") == "hub" and (revision := getattr(model, "revision", None)):
            mark = {**mark, "revision": revision}
        yield from _walk(getattr(model, name), (*path, info.alias or name), mark)
    for name, value in (model.model_extra or {}).items():
        yield from _walk(value, (*path, name), {})


def _resource(text: str, path: Path, mark: Mapping[str, Any]) -> Resource:
    kind = mark.get("resource", "")
    if text.strip().startswith(CATALOG):
        return Resource(kind, text.strip(), path)
    revision = f"@{mark['revision']}" if "revision" in mark else ""
    return Resource(kind, f"{mark.get('names', 'path')}:{text}{revision}", path)
