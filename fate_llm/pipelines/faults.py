"""Faults with a place: their stable codes, and the translation of what pydantic reports."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fate_llm.core.errors import Fault
from fate_llm.core.names import nearest

from .dialect import Mark, Marks, Path, dotted, has_step

__all__ = ["CODES", "Faults", "Found", "field_names", "found_by_pydantic", "leaves"]

CODES: dict[str, str] = {
    "aggregator_needs_plaintext": "The aggregator needs every party's update, and the protection hides them.",
    "cycle": "Tasks wait for each other in a circle.",
    "duplicate_key": "A key is given twice in one mapping.",
    "duplicate_party": "A party is listed twice in one place, or as guest and host at once.",
    "env_not_listed": "`${NAME}` names a variable that is not in the file's `env` list.",
    "env_syntax": "`${` is not closed.",
    "env_unset": "A variable of the `env` list is used but not set.",
    "file_too_large": "The file has more bytes, values or levels than a pipeline may have.",
    "file_unreadable": "The file, or one that it includes, cannot be read.",
    "hook_changes_hidden_terms": "A hook would write terms anew on the wire, and the protection hides them.",
    "hooks_conflict": "Two hooks decide the same thing about how updates travel.",
    "hooks_differ": "Updates would travel one way at one party and another way at another.",
    "include_cycle": "A file includes itself, directly or through others, or too many are included.",
    "input_missing": "A task lacks a required input at some party.",
    "input_not_produced": "An input comes from a task that does not run at a party that needs it.",
    "input_single": "A list is given for an input that takes one source.",
    "input_unexpected": "A task is given an input that its component does not have.",
    "invalid_name": "An id is not lower case letters, digits, `_`, `-`, `.`, at most 64 characters.",
    "invalid_value": "A value has a wrong type, or is outside what is valid.",
    "key_holder_missing": "A protection needs a party that holds its key, and none takes part.",
    "key_holder_unfit": "The party that holds a protection's key adds up, or contributes without a word about it.",
    "kind_mismatch": "An input is connected to an output of another kind.",
    "missing_key": "A required key is not there.",
    "needs_experiment": "A party's data is shown to others, and the pipeline lacks `experiment: true`.",
    "no_output": "A trained task has no output on disk that the prediction pipeline needs.",
    "not_a_pipeline": "The file holds something else than a mapping of keys to values.",
    "nothing_to_predict": "No task of the pipeline remains in a prediction pipeline.",
    "override_unused": "An override is for a party that does not run the task.",
    "plugin_unavailable": "A plug-in exists but cannot be loaded here.",
    "protection_differs": "Sums would be protected one way at one party and another way at another.",
    "quorum_too_large": "The quorum is larger than the number of contributors.",
    "role_not_supported": "A task names a role that its component does not have.",
    "set_invalid": "A `--set` is not key=value, or its key leads nowhere.",
    "task_runs_nowhere": "No party takes part in a task.",
    "threshold_too_large": "A protection's threshold is larger than the number of contributors that count.",
    "too_few_contributors": "A protection hides a party among others, and there are too few of them.",
    "unknown_component": "No component has this name.",
    "unknown_key": "A key that the language or the component does not have.",
    "unknown_output": "A task's component has no such output.",
    "unknown_party": "No party of the pipeline has this id.",
    "unknown_plugin": "No aggregator, protection or hook has this name.",
    "unknown_task": "No task of the pipeline has this name.",
    "yaml_key": "A key is not text, or is a merge key.",
    "yaml_number": "A number is not finite, too large, or not what its tag says.",
    "yaml_syntax": "The file is not YAML.",
    "yaml_tag": "The file has a tag; values are plain.",
}
"""Every code a pipeline's fault can have; codes are never renamed nor reused."""

NAME_HINT = "lower case letters, digits, `_`, `-`, `.`; starts and ends with a letter or digit; at most 64 characters"


@dataclass(slots=True)
class Faults:
    """Collects faults; one for each code, place and message."""

    marks: Marks
    found: dict[Fault, None] = field(default_factory=dict)

    def add(self, code: str, path: Path, message: str, hint: str = "") -> None:
        mark = self.mark(path)
        self.found.setdefault(Fault(code, mark.file, mark.line, dotted(path), message, hint))

    def mark(self, path: Path) -> Mark:
        """Where the value is, or the nearest thing around it that is written somewhere."""
        for size in range(len(path), -1, -1):
            if path[:size] in self.marks:
                return self.marks[path[:size]]
        return Mark(None, None)

    def merge(self, others: Iterable[Fault]) -> tuple[Fault, ...]:
        """All faults, by file and line; those of the command line and without a line come last."""
        unique = dict.fromkeys((*others, *self.found))
        return tuple(sorted(unique, key=lambda f: (f.file is None, f.file or "", f.line is None, f.line or 0)))


@dataclass(frozen=True, slots=True)
class Found:
    """One thing pydantic did not like, at a path of the raw data. key: it is a mapping's key itself."""

    code: str
    path: Path
    message: str
    hint: str
    kind: str
    key: bool = False


def found_by_pydantic(error: ValidationError, data: Any, model: type[BaseModel]) -> list[Found]:
    """Translate pydantic's errors; the branches of a union that all failed become one fault."""
    groups: dict[tuple[Path, bool], list[tuple[Path, ErrorDetails, str]]] = {}
    for detail in error.errors(include_url=False):
        path, union, branch = _place(detail, data)
        at = path if union is None else union
        groups.setdefault((at, union is not None), []).append((path, detail, branch))
    found: list[Found] = []
    for (at, in_union), members in groups.items():
        if in_union and len({branch for _, _, branch in members}) > 1:
            found.append(_one_of_union(at, members))
        else:
            found += [_translate(detail, path, model) for path, detail, _ in members]
    found = [one for one in found if not _is_misspelt(one, found)]
    return list({(one.code, one.path): one for one in found}.values())


def _is_misspelt(missing: Found, found: Sequence[Found]) -> bool:
    """A required key that is there under a name so near to it that the unknown key's fault says it all."""
    if missing.code != "missing_key":
        return False
    beside = [o.path[-1] for o in found if o.code == "unknown_key" and o.path[:-1] == missing.path[:-1]]
    meant = [nearest(str(key), [str(missing.path[-1])]) for key in beside]
    return any(hint.startswith("did you mean") for hint in meant)


def _place(detail: ErrorDetails, data: Any) -> tuple[Path, Path | None, str]:
    """The path in the data, the place of a union that it went through, and which of its branches."""
    path: list[str | int] = []
    union: Path | None = None
    branch = ""
    where, steps = data, list(detail["loc"])
    for index, step in enumerate(steps):
        last = index == len(steps) - 1
        if step == "[key]" and last:
            break
        if has_step(where, step):
            where = where[step]
        elif not (last and detail["type"] in {"missing", "extra_forbidden"}):
            if union is None:
                union, branch = tuple(path), str(step)
            continue  # the name of a union's branch, or of a validator: no place in the data
        path.append(step)
    return tuple(path), union, branch


def _one_of_union(path: Path, members: Sequence[tuple[Path, ErrorDetails, str]]) -> Found:
    texts = list(dict.fromkeys(_sentence(detail) for _, detail, _ in members))
    return Found("invalid_value", path, _shown(members[0][1]["input"]), "; or ".join(texts), "union")


def _translate(detail: ErrorDetails, path: Path, model: type[BaseModel]) -> Found:
    kind, last = detail["type"], path[-1] if path else ""
    key = detail["loc"][-1:] == ("[key]",)
    if kind == "extra_forbidden":
        known = field_names(model, path[:-1])
        return Found("unknown_key", path, f"unknown key {last!r}", nearest(str(last), known) or "no keys here", kind)
    if kind == "missing":
        return Found("missing_key", path, f"{last!r} is required and not there", f"add `{last}: ...`", kind)
    pattern = str(detail.get("ctx", {}).get("pattern", ""))
    if kind == "string_pattern_mismatch" and pattern.startswith("^[a-z0-9](?:"):
        return Found("invalid_name", path, f"{detail['input']!r} is not a valid id", NAME_HINT, kind, key)
    if kind == "string_pattern_mismatch" and r"\." in pattern:
        hint = "an input is `task.output`, or {path: folder}"
        return Found("invalid_value", path, f"{detail['input']!r} names no output of a task", hint, kind)
    if kind in {"literal_error", "enum"} and isinstance(detail["input"], str):
        hint = _choices(detail)
        return Found("invalid_value", path, f"{detail['input']!r} is not valid", hint, kind, key)
    if kind == "value_error" and isinstance(detail["input"], (dict, BaseModel)):
        return Found("invalid_value", path, _sentence(detail), "", kind, key)
    return Found("invalid_value", path, _shown(detail["input"]), _sentence(detail), kind, key)


def _choices(detail: ErrorDetails) -> str:
    """The nearest of the valid words, which pydantic gives as one text: 'a', 'b' or 'c'."""
    words = str(detail.get("ctx", {}).get("expected", "")).replace(" or ", ", ").split(", ")
    return nearest(str(detail["input"]), [word.strip("'") for word in words])


_FORMS = dict.fromkeys(("model_type", "dict_type", "model_attributes_type"), "should be a mapping")
_FORMS |= dict.fromkeys(("tuple_type", "list_type", "set_type"), "should be a list")
_FORMS |= {"string_type": "should be text"}


def _sentence(detail: ErrorDetails) -> str:
    """Pydantic's message as this manual would say it."""
    if detail["type"] in _FORMS:
        return _FORMS[detail["type"]]
    text = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return text[:1].lower() + text[1:]


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    text = "null" if value is None else repr(value)
    return f"found {text if len(text) <= 60 else text[:57] + '...'}"


def field_names(model: Any, path: Path) -> set[str]:
    """Keys that are valid at `path` of data for `model`, through mappings, lists and unions."""
    kinds = [model]
    for step in path:
        kinds = [inner for kind in kinds for inner in _inside(kind, step)]
    names: set[str] = set()
    for kind in kinds:
        for leaf in leaves(kind):
            if isinstance(leaf, type) and issubclass(leaf, BaseModel):
                names |= {info.alias or name for name, info in leaf.model_fields.items()}
    return names


def _inside(kind: Any, step: str | int) -> list[Any]:
    found: list[Any] = []
    for leaf in leaves(kind):
        arguments = typing.get_args(leaf)
        if isinstance(leaf, type) and issubclass(leaf, BaseModel):
            found += [info.annotation for name, info in leaf.model_fields.items() if step in {name, info.alias}]
        elif isinstance(step, int):
            found += arguments[:1]
        else:
            found += arguments[1:2]
    return found


def leaves(kind: Any) -> list[Any]:
    """The classes behind Annotated, Optional and unions."""
    origin = typing.get_origin(kind)
    if origin is typing.Annotated:
        return leaves(typing.get_args(kind)[0])
    if origin is typing.Union or isinstance(kind, types.UnionType):
        return [leaf for argument in typing.get_args(kind) for leaf in leaves(argument)]
    return [kind]
