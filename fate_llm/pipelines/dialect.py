"""The YAML that pipelines are written in: text to plain values with the line of every key, and back.

Rules:
1. A scalar is what it looks like in YAML 1.2 and JSON: `1e-3` is a number; `no`, `on`, `1:30` are text.
2. Keys are text and occur once. No custom tags, merge keys, infinity or NaN: each is a fault with its line.
3. Size, depth and the number of values, aliases expanded, are bounded before memory is taken.
4. What `dump` writes, the loader reads back as the same value, keys in the same order. Text is quoted where
   an older YAML reader would take it for something else, and `${` is written as `$${`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from fate_llm.core.errors import Fault

__all__ = [
    "MAX_BYTES",
    "MAX_DEPTH",
    "MAX_VALUES",
    "Mark",
    "Marks",
    "Path",
    "Source",
    "dotted",
    "dump",
    "has_step",
    "parse",
]

MAX_BYTES = 512 * 1024
MAX_VALUES = 20_000
MAX_DEPTH = 40

Path = tuple[str | int, ...]
"""Keys and list positions from the root; names may contain dots, so a path is never split at them."""


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a value is written. line is 1-based; None for a value that no file holds."""

    file: str | None
    line: int | None


Marks = Mapping[Path, Mark]


@dataclass(slots=True)
class Source:
    """Values read so far, where each lies, and what was wrong with the reading."""

    data: Any = None
    marks: dict[Path, Mark] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)


def has_step(where: Any, step: object) -> bool:
    """True when `where` is a mapping with this key, or a list with this position."""
    if isinstance(where, (list, tuple)):
        return isinstance(step, int) and 0 <= step < len(where)
    return isinstance(where, Mapping) and step in where


def dotted(path: Path) -> str:
    """A path for people: `tasks.tune.params.rounds`, `parties.hosts[1]`."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else (f".{step}" if text else step)
    return text


class _Loader(yaml.SafeLoader):
    """Composes nodes only; nothing is ever constructed from a tag."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


_TAG = "tag:yaml.org,2002:"
_SCALARS = (
    ("null", r"^(?:~|null|Null|NULL|)$", [*"~nN", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", [*"tTfF"]),
    ("int", r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", [*"-+0123456789"]),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", [*"-+.0123456789"]),
    ("float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", [*"-+."]),
    ("merge", r"^<<$", ["<"]),
)
for _name, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", re.compile(_pattern, re.ASCII), _first)


def parse(text: str, file: str | None) -> Source:
    """Read one YAML (or JSON) document; never raises, whatever the text is."""
    source = Source(marks={(): Mark(file, 1)})
    node = None
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        source.faults.append(_fault("file_too_large", file, None, f"more than {MAX_BYTES} bytes", _SHORTER))
        return source
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = " ".join(part for part in (error.context, error.problem) if part)
        line = mark.line if mark else 0
        hint = _QUOTES if "${" in "".join(text.splitlines()[line : line + 1]) else _SYNTAX
        source.faults.append(_fault("yaml_syntax", file, line + 1, message, hint))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        source.faults.append(_fault("yaml_syntax", file, line, f"a character YAML does not allow: {error.reason}"))
    except (RecursionError, ValueError, IndexError) as error:
        # PyYAML recurses for nesting, and lets int() and chr() speak for odd escapes and directives.
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        source.faults.append(_fault("yaml_syntax", file, None, what, _SYNTAX))
    if node is not None:
        _Reader(source, file).read(node)
    return source


_SYNTAX = "YAML: two spaces for each level, `key: value`"
_QUOTES = "within { } or [ ], text with ${NAME} needs quotes"
_SHORTER = "a pipeline is short; data belongs in a file that a task reads"


def _fault(code: str, file: str | None, line: int | None, message: str, hint: str = "", path: str = "") -> Fault:
    return Fault(code, file, line, path, message, hint)


class _TooMuch(Exception):
    """The bounds are reached; the fault has been noted."""


class _Reader:
    """Turns nodes into values, collecting faults; one per document."""

    def __init__(self, source: Source, file: str | None) -> None:
        self.source, self.file, self.values = source, file, 0

    def read(self, node: yaml.Node) -> None:
        self.source.marks[()] = self._mark(node)
        try:
            self.source.data = self._value(node, ())
        except _TooMuch:
            self.source.data = None

    def _mark(self, node: yaml.Node) -> Mark:
        return Mark(self.file, node.start_mark.line + 1)

    def _note(self, code: str, node: yaml.Node, path: Path, message: str, hint: str) -> None:
        line = node.start_mark.line + 1
        self.source.faults.append(Fault(code, self.file, line, dotted(path), message, hint))

    def _value(self, node: yaml.Node, path: Path) -> Any:
        self.values += 1
        if self.values > MAX_VALUES or len(path) > MAX_DEPTH:
            what = f"more than {MAX_VALUES} values" if self.values > MAX_VALUES else f"deeper than {MAX_DEPTH} levels"
            self._note("file_too_large", node, (), f"{what}, aliases expanded", _SHORTER)
            raise _TooMuch
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return self._sequence(node, path)
        if isinstance(node, yaml.ScalarNode) and kind in {"str", "null", "bool", "int", "float", "merge"}:
            return self._scalar(node, kind, path)
        self._note("yaml_tag", node, path, f"the tag {node.tag!r}", "tags are not allowed; write the plain value")
        return None

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node, path)
            if key is None:
                continue
            here = (*path, key)
            if key in found:
                first = self.source.marks[here].line
                self._note("duplicate_key", key_node, here, f"given again, first in line {first}", "keep one of them")
                continue
            self.source.marks[here] = self._mark(key_node)
            found[key] = self._value(value_node, here)
        return found

    def _key(self, node: yaml.Node, path: Path) -> str | None:
        if isinstance(node, yaml.ScalarNode) and node.tag == f"{_TAG}str":
            return str(node.value)
        if node.tag == f"{_TAG}merge":
            hint = "use `include` or `overrides`; an alias as a value (`params: *common`) is fine"
            self._note("yaml_key", node, path, "a merge key `<<`", hint)
        else:
            shown = repr(node.value) if isinstance(node, yaml.ScalarNode) else "a list or mapping"
            self._note("yaml_key", node, path, f"a key that is not text: {shown}", "put the key in quotes")
        return None

    def _sequence(self, node: yaml.SequenceNode, path: Path) -> list[Any]:
        found = []
        for index, item in enumerate(node.value):
            here = (*path, index)
            self.source.marks[here] = self._mark(item)
            found.append(self._value(item, here))
        return found

    def _scalar(self, node: yaml.ScalarNode, kind: str, path: Path) -> Any:
        text: str = node.value
        try:
            return _plain(kind, text)
        except ValueError as error:
            shown = text if len(text) <= 20 else text[:20] + "..."
            self._note("yaml_number", node, path, f"{shown!r}: {error}", "a finite number of reasonable size")
            return None


def _plain(kind: str, text: str) -> Any:
    """The value of a scalar. ValueError for `!!int abc` and for a number that is too large."""
    if kind == "null":
        return None
    if kind == "bool":
        if text.lower() not in {"true", "false"}:
            raise ValueError("true or false is meant")
        return text.lower() == "true"
    if kind == "int":
        base = {"0x": 16, "0o": 8}.get(text[:2], 10)
        number = int(text, base)
        if number.bit_length() > 64:
            raise ValueError("an integer of more than 64 bits")
        return number
    if kind == "float":
        special = text.lstrip("+-").lower()
        value = float(text.replace(".", "") if special in {".inf", ".nan"} else text)
        if not math.isfinite(value):
            raise ValueError("not a finite number")
        return value
    return text


class _Dumper(yaml.SafeDumper):
    """Blocks for the outline, one line for what fits on it; no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _as_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Quoted wherever this or an older dialect would not read text."""
    ours = any(re.match(pattern, text, re.ASCII) for _, pattern, _ in _SCALARS)
    # Written as escapes: a reader may take them for line breaks, or refuse them.
    awkward = any(ord(char) > 126 and not char.isprintable() for char in text)
    style = '"' if awkward or "\n" in text else "'" if ours else None
    return dumper.represent_scalar(f"{_TAG}str", text, style=style)


def _as_mapping(dumper: _Dumper, value: dict[str, Any]) -> yaml.MappingNode:
    flat = all(not isinstance(item, (dict, list)) for item in value.values())
    return dumper.represent_mapping(f"{_TAG}map", value.items(), flow_style=flat and _short(value))


def _as_list(dumper: _Dumper, value: list[Any]) -> yaml.SequenceNode:
    flat = all(not isinstance(item, (dict, list)) for item in value)
    return dumper.represent_sequence(f"{_TAG}seq", value, flow_style=flat and _short(value))


def _short(value: Any) -> bool:
    return len(str(value)) <= 80


_Dumper.add_representer(str, _as_text)
_Dumper.add_representer(dict, _as_mapping)
_Dumper.add_representer(list, _as_list)


def dump(data: Any) -> str:
    """YAML text of plain values, byte for byte the same for the same values in the same order."""
    return str(yaml.dump(_escaped(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100_000))


def _escaped(data: Any) -> Any:
    """Values as a file has to write them, so that the loader does not take `${` for a variable."""
    if isinstance(data, str):
        return data.replace("${", "$${")
    if isinstance(data, Mapping):
        return {key: _escaped(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_escaped(item) for item in data]
    return data
