"""An audit log for people: one sentence for each line, and files that a compliance officer can open.

.jsonl   the lines as they are, each with its signature
.csv     one row for each line; no cell begins a formula
.html    one page that needs nothing else: what was verified, totals by partner, every line
"""

from __future__ import annotations

import csv
import html
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TextIO

from fate_llm.core.canonical import canonical_json
from fate_llm.core.errors import ConfigurationError
from fate_llm.core.names import nearest
from fate_llm.security.audit_chain import Entry

from .reading import LogReader

__all__ = ["FORMATS", "Wanted", "export", "instant", "sentence"]

FORMATS: Final = ("csv", "html", "jsonl")
_COLUMNS: Final = (
    "n",
    "time",
    "kind",
    "job",
    "party",
    "task",
    "message",
    "round",
    "bytes",
    "tensors",
    "values",
    "protection",
    "digest",
    "text",
    "hash",
)
_IN_MEMORY: Final = 16 * 1024 * 1024  # bytes of a page; the rest waits on disk
_LONGEST: Final = 300  # characters of one value in a sentence


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which lines: of one job, of one kind; all when empty."""

    job: str = ""
    kind: str = ""

    def __call__(self, entry: Entry) -> bool:
        return (not self.job or entry.fields.get("job") == self.job) and (not self.kind or entry.kind == self.kind)


def instant(seconds: float) -> str:
    """A time of the log as ISO 8601 in UTC, to the millisecond."""
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    except (ValueError, OverflowError, OSError):
        return f"{seconds:g} s"


def sentence(entry: Entry) -> str:
    """What a line says, in one printable line of text."""
    found = _SENTENCES.get(entry.kind, _any)(entry.fields)
    return "".join(sign if sign.isprintable() else " " for sign in found)


def export(reader: LogReader, out: Path, wanted: Wanted, *, now: float) -> int:
    """Write the lines that are wanted to a new file, in the format that its name ends with; how many there were.

    The log is verified on the way; faults are in the page, and in `reader.check()` afterwards.

    Raises:
        ConfigurationError: an unknown format, or the file exists or cannot be written; nothing is left of it.
    """
    kind = out.suffix.removeprefix(".")
    if kind not in FORMATS:
        raise ConfigurationError(f"{out.name}: no log is exported as {kind!r}", hint=nearest(kind, FORMATS))
    partial = out.with_name(f".{out.name}.partial")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        with open(os.open(partial, flags, 0o600), "w", encoding="utf-8", newline="") as stream:
            count = _WRITERS[kind](stream, reader, wanted, now)
            stream.flush()
            os.fsync(stream.fileno())
        os.link(partial, out)  # fails where something is
    except FileExistsError:
        raise ConfigurationError(f"{out} exists, and is not overwritten", hint="Name another file.") from None
    except OSError as error:
        raise ConfigurationError(f"{out} cannot be written: {error.strerror}", hint="Name another file.") from None
    finally:
        partial.unlink(missing_ok=True)
    return count


# --- sentences ------------------------------------------------------------------------------------------------------


def _value(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name, "")
    text = value if isinstance(value, str) else canonical_json(value).decode("utf-8")
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _tensors(fields: Mapping[str, Any]) -> str:
    tensors = fields.get("tensors")
    if not isinstance(tensors, dict) or not tensors.get("count"):
        return "no tensors"
    dtypes = tensors.get("dtypes")
    kinds = ", ".join(map(str, dtypes)) if isinstance(dtypes, dict) else "?"
    return f"{_value(tensors, 'count')} tensors of {kinds}, {_value(tensors, 'values')} values"


def _passed(verb: str, peer: str) -> Callable[[Mapping[str, Any]], str]:
    def say(fields: Mapping[str, Any]) -> str:
        place = f"task {_value(fields, 'task') or '-'}, round {_value(fields, 'round')}"
        under = _value(fields, "protection") or "none needed"
        return (
            f"{_value(fields, 'message')} {verb} {_value(fields, peer)}: job {_value(fields, 'job')}, {place}; "
            f"{_value(fields, 'bytes')} bytes, {_tensors(fields)}; protection: {under}"
        )

    return say


def _began(fields: Mapping[str, Any]) -> str:
    return f"the log of {_value(fields, 'party')} begins, key {_value(fields, 'identity')}"


def _repaired(fields: Mapping[str, Any]) -> str:
    return f"{_value(fields, 'bytes')} bytes of a half-written line were cut off {_value(fields, 'file')} after a crash"


def _decision(fields: Mapping[str, Any]) -> str:
    findings = fields.get("findings")
    rules = [f for f in findings if isinstance(f, dict)] if isinstance(findings, list | tuple) else []
    against = ", ".join(_value(rule, "rule") for rule in rules if rule.get("outcome") != "pass")
    rest = f"; not passed: {against}" if against else ""
    return f"job {_value(fields, 'job')}: the policy says {_value(fields, 'verdict')}{rest}"


def _any(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_value(fields, name)}" for name in sorted(fields))


_SENTENCES: Final[Mapping[str, Callable[[Mapping[str, Any]], str]]] = {
    "began": _began,
    "repaired": _repaired,
    "decision": _decision,
    "left": _passed("left for", "to"),
    "received": _passed("came from", "from"),
}


# --- formats --------------------------------------------------------------------------------------------------------


def _jsonl(stream: TextIO, reader: LogReader, wanted: Wanted, now: float) -> int:
    count = 0
    for entry, line in reader.entries():
        if wanted(entry):
            stream.write(line.decode("utf-8"))
            count += 1
    return count


def _row(entry: Entry) -> dict[str, str]:
    fields = entry.fields
    tensors = fields.get("tensors")
    tensors = tensors if isinstance(tensors, dict) else {}
    return {
        "n": str(entry.n),
        "time": instant(entry.time),
        "kind": entry.kind,
        "party": _value(fields, "to") or _value(fields, "from") or _value(fields, "party"),
        **{name: _value(fields, name) for name in ("job", "task", "message", "round", "bytes", "protection", "digest")},
        "tensors": _value(tensors, "count"),
        "values": _value(tensors, "values"),
        "text": sentence(entry),
        "hash": entry.hash,
    }


def _csv(stream: TextIO, reader: LogReader, wanted: Wanted, now: float) -> int:
    writer = csv.DictWriter(stream, _COLUMNS)
    writer.writeheader()
    count = 0
    for entry, _ in reader.entries():
        if wanted(entry):
            writer.writerow({name: _cell(text) for name, text in _row(entry).items()})
            count += 1
    return count


def _cell(text: str) -> str:
    """Programs of tables take a cell that begins like this for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


@dataclass(slots=True)
class _Totals:
    """What left, by partner."""

    messages: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def add(self, entry: Entry) -> None:
        size = entry.fields.get("bytes")
        if entry.kind == "left" and isinstance(size, int):
            self.messages[str(entry.fields.get("to"))] += 1
            self.bytes[str(entry.fields.get("to"))] += size


def _html(stream: TextIO, reader: LogReader, wanted: Wanted, now: float) -> int:
    totals = _Totals()
    count = 0
    with tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY, mode="w+", encoding="utf-8") as rows:
        for entry, _ in reader.entries():
            if wanted(entry):
                totals.add(entry)
                row = _row(entry)
                rows.write(_html_row("td", [row[name] for name in ("n", "time", "kind", "text", "digest", "hash")]))
                count += 1
        _page(stream, reader, wanted, totals, count, now)
        rows.seek(0)
        shutil.copyfileobj(rows, stream)
    stream.write("</table>\n</body></html>\n")
    return count


def _page(stream: TextIO, reader: LogReader, wanted: Wanted, totals: _Totals, count: int, now: float) -> None:
    """What comes before the lines: it is known after them."""
    stream.write(_HEAD)
    for line in _summary(reader, wanted, count, now):
        stream.write(f"<p>{html.escape(line)}</p>\n")
    stream.write("<h2>What left, by partner</h2>\n<table>\n" + _html_row("th", ["to", "messages", "bytes"]))
    for party in sorted(totals.messages):
        stream.write(_html_row("td", [party, f"{totals.messages[party]}", f"{totals.bytes[party]}"]))
    stream.write("</table>\n<h2>Lines</h2>\n<table>\n")
    stream.write(
        _html_row("th", ["no.", "time (UTC)", "kind", "what happened", "digest of the message", "hash of the line"])
    )


def _summary(reader: LogReader, wanted: Wanted, count: int, now: float) -> Iterator[str]:
    faults = reader.check()
    chosen = " of ".join(
        filter(None, [f"kind {wanted.kind}" if wanted.kind else "", f"job {wanted.job}" if wanted.job else ""])
    )
    yield f"{count} of {reader.count} lines{f': those of {chosen}' if chosen else ''}; written at {instant(now)}."
    yield f"Key of the party: {reader.public.to_text()}, fingerprint {reader.public.fingerprint}."
    yield f"Head of the log: line {reader.head.n}, {reader.head.hash}."
    if not faults:
        yield "The whole log was verified: every line is signed by this key, and none is missing between them."
    for fault in faults:
        yield f"FAULT: {fault}"


def _html_row(tag: str, cells: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>\n"


_HEAD: Final = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Audit log</title>
<style>
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; color: #222 }
table { border-collapse: collapse; margin-bottom: 2em }
td, th { border: 1px solid #ccc; padding: 4px 8px; text-align: left; vertical-align: top; overflow-wrap: anywhere }
</style></head><body>
<h1>Audit log</h1>
"""

_WRITERS: Final[Mapping[str, Callable[[TextIO, LogReader, Wanted, float], int]]] = {
    "csv": _csv,
    "html": _html,
    "jsonl": _jsonl,
}
