"""From a pipeline file to raw values with the place of each: includes, environment variables, `--set`.

Rules:
1. Only a variable in a file's `env` may be named as `${NAME}` there, only a file in its `include` is read.
2. Nothing here raises for what a file says: every fault is collected, so that the checks can add theirs.
3. The environment is passed in; relative includes start at the folder of the file that names them.
4. `${NAME}` gives text, never a number or a mapping: a value of the environment cannot add keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

from fate_llm.core.errors import Fault
from fate_llm.core.names import nearest

from .dialect import MAX_BYTES, Mark, Path, Source, dotted, has_step, parse

__all__ = ["COMMAND_LINE", "MAX_INCLUDES", "apply_sets", "load_file", "load_text"]

COMMAND_LINE = "--set"
MAX_INCLUDES = 32

_VARIABLE = re.compile(r"\$\$\{|\$\{([^}]*)\}|\$\{")


def load_file(path: FilePath, sets: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> Source:
    """Read a file and its includes, put in the environment's values, then apply `key=value` overrides."""
    source = _Files(environ or {}).read(path, mentioned=None)
    return apply_sets(source, sets)


def load_text(
    text: str,
    sets: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    *,
    folder: FilePath | None = None,
) -> Source:
    """The same for text without a file; includes start at `folder`, and are refused without one."""
    source = _Files(environ or {}).finish(parse(text, None), folder)
    return apply_sets(source, sets)


class _Files:
    """One reading of a file and of all that it includes."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ
        self.open: list[FilePath] = []
        self.count = 0

    def read(self, path: FilePath, *, mentioned: tuple[Mark, Path] | None) -> Source:
        """One file. mentioned: where an include names it; None for the pipeline itself."""
        self.count += 1
        real = path.resolve()
        mark, place = mentioned or (Mark(str(path), None), ())
        if real in self.open or self.count > MAX_INCLUDES:
            what = "includes itself" if real in self.open else f"more than {MAX_INCLUDES} included files"
            return _only("include_cycle", mark, place, f"{path} {what}", "includes form a tree")
        try:
            text = _read_text(path)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            return _only("file_unreadable", mark, place, f"{path}: {reason}", "a YAML or JSON file in UTF-8")
        self.open.append(real)
        source = self.finish(parse(text, str(path)), path.parent)
        self.open.pop()
        return source

    def finish(self, source: Source, folder: FilePath | None) -> Source:
        """Environment and includes of one parsed file."""
        if not isinstance(source.data, dict):
            if not source.faults:
                what = "nothing" if source.data is None else "no mapping of keys to values"
                mark = source.marks.get((), Mark(None, None))
                hint = "a pipeline starts with `version: 1` and `name: ...`"
                source.faults.append(Fault("not_a_pipeline", mark.file, mark.line, "", f"the file holds {what}", hint))
            source.data = {}
            return source
        allowed = source.data.get("env")
        names = [name for name in allowed if isinstance(name, str)] if isinstance(allowed, list) else []
        source.data = _Environment(source, names, self.environ).resolve(source.data, ())
        return self._with_includes(source, folder)

    def _with_includes(self, source: Source, folder: FilePath | None) -> Source:
        """The included files, each merged over the one before, and the file's own keys over them all."""
        listed = source.data.get("include")
        if not isinstance(listed, list):  # absent, or of a wrong type, which the checks report
            return source
        result = Source({}, {(): source.marks.get((), Mark(None, None))})
        good: list[Any] = []
        for index, name in enumerate(listed):
            place: Path = ("include", index)
            mark = source.marks.get(place, Mark(None, None))
            if not isinstance(name, str) or not name:
                good.append(name)
            elif folder is None:
                hint = "save the pipeline as a file"
                part = _only("file_unreadable", mark, place, "text without a file cannot include", hint)
                result.faults += part.faults
            else:
                _merge(result, self.read(folder / name, mentioned=(mark, place)))
        # What is merged needs no include any more; what is no file name stays for the checks to report.
        source.data = (
            {**source.data, "include": good} if good else {k: source.data[k] for k in source.data if k != "include"}
        )
        _merge(result, source)
        return result


def _only(code: str, mark: Mark, place: Path, message: str, hint: str) -> Source:
    return Source({}, {(): mark}, [Fault(code, mark.file, mark.line, dotted(place), message, hint)])


def _read_text(path: FilePath) -> str:
    """The file's text. Reads no more than the bound allows, whatever the file is."""
    with path.open("rb") as stream:
        data = stream.read(MAX_BYTES + 1)
    return data.decode("utf-8-sig")


def _merge(under: Source, over: Source) -> None:
    """Lay `over` on `under`, marks and faults included."""
    under.data = _merge_values(under, over, under.data, over.data, ())
    under.faults += over.faults


def _merge_values(under: Source, over: Source, low: Any, high: Any, path: Path) -> Any:
    if not (isinstance(low, dict) and isinstance(high, dict)):
        _take_marks(under, over, path)
        return high
    result = dict(low)
    for key, value in high.items():
        here = (*path, key)
        if key in low:
            result[key] = _merge_values(under, over, low[key], value, here)
            if here in over.marks:
                under.marks[here] = over.marks[here]
        else:
            _take_marks(under, over, here)
            result[key] = value
    return result


def _take_marks(under: Source, over: Source, path: Path) -> None:
    """The marks of `over` at and below `path` replace those of `under`."""
    size = len(path)
    for old in [mark for mark in under.marks if mark[:size] == path]:
        del under.marks[old]
    under.marks.update({mark: place for mark, place in over.marks.items() if mark[:size] == path})


class _Environment:
    """Puts values of allowed variables into the texts of one file."""

    def __init__(self, source: Source, allowed: Sequence[str], environ: Mapping[str, str]) -> None:
        self.source, self.allowed, self.environ = source, allowed, environ

    def resolve(self, value: Any, path: Path) -> Any:
        if isinstance(value, dict):
            return {key: self.resolve(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [self.resolve(item, (*path, index)) for index, item in enumerate(value)]
        if isinstance(value, str) and "${" in value:
            return _VARIABLE.sub(lambda found: self._replace(found, path), value)
        return value

    def _replace(self, found: re.Match[str], path: Path) -> str:
        if found[0] == "$${":
            return "${"
        name = found[1]
        if name is None:
            self._note("env_syntax", path, "`${` without `}`", "write `$${` for the two characters themselves")
        elif name not in self.allowed:
            hint = nearest(name, self.allowed) or "list it under `env`; write `$${` for the characters themselves"
            self._note("env_not_listed", path, f"${{{name}}} is not in the file's `env` list", hint)
        elif name not in self.environ:
            self._note("env_unset", path, f"the environment has no {name}", f"export {name}=...")
        else:
            return self.environ[name]
        return found[0]

    def _note(self, code: str, path: Path, message: str, hint: str) -> None:
        mark = self.source.marks.get(path, Mark(None, None))
        self.source.faults.append(Fault(code, mark.file, mark.line, dotted(path), message, hint))


def apply_sets(source: Source, sets: Sequence[str]) -> Source:
    """Apply `key=value` overrides in order. A value is YAML; the last key may be new."""
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            _refuse(source, key.strip(), f"{text!r} is not key=value", "for example: tasks.tune.params.rounds=2")
            continue
        read = parse(value, COMMAND_LINE)
        for fault in read.faults:
            _refuse(
                source,
                key,
                f"the value {value!r}: {fault.message}",
                "a YAML value; quote text with special signs",
            )
        if not read.faults:
            _set(source, key.strip(), read.data)
    return source


def _refuse(source: Source, key: str, message: str, hint: str) -> None:
    source.faults.append(Fault("set_invalid", COMMAND_LINE, None, key, message, hint))


_OPEN: tuple[Path, ...] = (("job",), ("overrides",))
"""Mappings of the language that a file may leave out."""


def _set(source: Source, key: str, value: Any) -> None:
    """Walk down to where `key` points, opening the mappings that the language lets a file leave out."""
    path: Path = ()
    where, rest = source.data, key.split(".")
    while True:
        step, rest = _next_step(where, rest)
        here: Path = (*path, step)
        if not rest:
            break
        below = where[step] if has_step(where, step) else None
        if below is None and isinstance(where, dict) and _may_open(here):
            below = where[step] = {}
            source.marks[here] = Mark(COMMAND_LINE, None)
        if not isinstance(below, (dict, list)):
            what = f"there is no {dotted(here)!r}" if below is None else f"{dotted(here)!r} is a single value"
            _refuse(source, key, what, nearest(str(step), map(str, where)) if isinstance(where, dict) else "")
            return
        where, path = below, here
    if isinstance(where, list) and not has_step(where, step):
        _refuse(source, key, f"{dotted(path)!r} has {len(where)} items, none is {step!r}", "positions start at 0")
    elif path == ("tasks",) and step not in where:
        _refuse(source, key, f"there is no task {step!r}", nearest(str(step), where))
    else:
        where[step] = value
        for old in [mark for mark in source.marks if mark[: len(here)] == here]:
            del source.marks[old]
        source.marks[here] = Mark(COMMAND_LINE, None)


def _next_step(where: Any, rest: list[str]) -> tuple[str | int, list[str]]:
    """The next key and what follows. Names may hold dots: the longest name that exists wins."""
    if isinstance(where, list):
        digits = rest[0].isascii() and rest[0].isdigit()
        return (int(rest[0]) if digits else rest[0]), rest[1:]
    for size in range(len(rest), 1, -1):
        if ".".join(rest[:size]) in where:
            return ".".join(rest[:size]), rest[size:]
    return rest[0], rest[1:]


def _may_open(path: Path) -> bool:
    """`job`, `overrides` and what lies in them, and params or inputs of a task that is there."""
    return path[:1] in _OPEN or (len(path) >= 3 and path[0] == "tasks")
