"""Shape faults, and what is left of a pipeline without the pieces that have them.

Whatever is misshapen is reported and taken out, so that the other checks still see the rest of the file.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from .dialect import has_step
from .faults import Faults, Found, found_by_pydantic
from .schema import PipelineSpec

__all__ = ["shaped"]

_ROUNDS = 12
_STAND_INS: dict[str, Any] = {"version": 1, "name": "pipeline", "parties": {"guest": "guest"}}


def shaped(raw: Mapping[str, Any], faults: Faults) -> PipelineSpec | None:
    """The pipeline with its misshapen pieces taken out, or None when nothing can be made of it."""
    data = copy.deepcopy(dict(raw))
    for attempt in range(_ROUNDS):
        try:
            return PipelineSpec.model_validate(data)
        except ValidationError as error:
            found = found_by_pydantic(error, data, PipelineSpec)
        for one in found:
            if attempt == 0:
                faults.add(one.code, one.path, one.message, one.hint)
        # Later positions of a list first, so that taking one out does not move the others.
        for one in sorted(found, key=lambda one: [str(step).zfill(6) for step in one.path], reverse=True):
            _mend(data, one)
        for key, value in _STAND_INS.items():
            data.setdefault(key, copy.deepcopy(value))
        if isinstance(data["parties"], dict):
            data["parties"].setdefault("guest", "guest")
    return None


def _mend(data: dict[str, Any], one: Found) -> None:
    """Rename a bad id, or take the piece out; a mapping that lacks a required key goes as a whole."""
    path = one.path
    if one.kind == "missing":
        path = path[:-1]
        if len(path) == 0 or path == ("parties",):
            return
    holder = _at(data, path[:-1])
    step = path[-1] if path else ""
    if isinstance(holder, list) and isinstance(step, int) and step < len(holder):
        slug = _slug(holder[step]) if one.code == "invalid_name" else ""
        holder[step : step + 1] = [slug] if slug else []
        around = _at(data, path[:-2])
        if not holder and isinstance(around, dict):  # an empty list would say "nobody"
            del around[path[-2]]
    elif isinstance(holder, dict) and step in holder:
        value = holder[step]
        if one.kind == "tuple_type" and isinstance(value, str):
            holder[step] = [value]
            return
        del holder[step]
        slug = _slug(step if one.key else value) if one.code == "invalid_name" else ""
        if slug and one.key:
            holder.setdefault(slug, value)
        elif slug:
            holder[step] = slug


def _at(data: Any, path: Sequence[str | int]) -> Any:
    for step in path:
        if not has_step(data, step):
            return None
        data = data[step]
    return data


def _slug(text: Any) -> str:
    """The valid id that was probably meant, so that references to it still meet; empty when there is none."""
    plain = re.sub(r"[^a-z0-9_.-]+", "-", str(text).lower())
    return plain.strip("_.-")[:64].strip("_.-")
