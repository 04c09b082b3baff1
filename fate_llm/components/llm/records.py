"""Records of text in one form, whatever file they came from, and the folder they lie in between tasks.

Rules:
1. A dataset is a folder: `records.jsonl` (one record a line) and `dataset.json` (what lies there, digest).
2. The folder appears whole or not at all: it is written under another name and renamed.
3. Reading needs about 8 bytes of memory a row (the offset of its line), never the file.
4. `repr` of a record shows its id and counts, never its text: records end up in logs and tracebacks.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, cast

from fate_llm.core.errors import DataError

__all__ = [
    "ROLES",
    "SCHEMA",
    "Dataset",
    "DatasetWriter",
    "Record",
    "Span",
    "Turn",
    "TurnRole",
    "prompt_and_answer",
    "read_manifest",
    "write_dataset",
]

SCHEMA = "fate_llm.dataset/1"
RECORDS = "records.jsonl"
MANIFEST = "dataset.json"
ROLES = ("system", "user", "assistant")
INPUT_GAP = "\n\n"

TurnRole = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True, repr=False)
class Turn:
    """One message. `content` is all its text; `input_at` is where an Alpaca input starts in it, or None."""

    role: TurnRole
    content: str
    input_at: int | None = None

    @property
    def instruction(self) -> str:
        """The content without the input (and without the empty line between them)."""
        return self.content if self.input_at is None else self.content[: self.input_at - len(INPUT_GAP)]

    @property
    def input(self) -> str | None:
        """The Alpaca-style input, or None when there is none; never the empty text."""
        return None if self.input_at is None else self.content[self.input_at :]

    def __repr__(self) -> str:
        return f"Turn({self.role}, {len(self.content)} characters)"


@dataclass(frozen=True, slots=True, repr=False)
class Record:
    """One example: a conversation that ends with the assistant (`turns`), or plain text (`text`).

    id: the row in the source. category: what splits stratify by. key: what a partition by key groups.
    """

    id: str
    turns: tuple[Turn, ...] = ()
    text: str | None = None
    category: str | None = None
    key: str | None = None

    @classmethod
    def from_instruction(
        cls,
        id: str,
        instruction: str,
        output: str,
        *,
        input: str | None = None,
        category: str | None = None,
        key: str | None = None,
    ) -> Record:
        """A question with its answer. An input that is None, empty or only white space counts as no input."""
        if input is None or not input.strip():
            user = Turn("user", instruction)
        else:
            user = Turn("user", instruction + INPUT_GAP + input, len(instruction) + len(INPUT_GAP))
        return cls(id, turns=(user, Turn("assistant", output)), category=category, key=key)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns as chat templates want them: [{"role", "content"}, ...]."""
        return [{"role": turn.role, "content": turn.content} for turn in self.turns]

    @property
    def characters(self) -> int:
        return len(self.text or "") + sum(len(turn.content) for turn in self.turns)

    def as_dict(self) -> dict[str, Any]:
        """The line of `records.jsonl`; what is None is left out, except the category."""
        line: dict[str, Any] = {"id": self.id}
        if self.text is not None:
            line["text"] = self.text
        else:
            line["messages"] = [_turn_dict(turn) for turn in self.turns]
        line["category"] = self.category
        if self.key is not None:
            line["key"] = self.key
        return line

    @classmethod
    def from_dict(cls, line: Any) -> Record:
        """The record of a line of `records.jsonl`.

        Raises:
            DataError: a field is missing, unknown or of a wrong type; the message shows no text.
        """
        if not isinstance(line, Mapping) or not line.keys() <= {"id", "messages", "text", "category", "key"}:
            raise DataError("a record is an object with id, messages or text, category, key and nothing else")
        texts = {name: line.get(name) for name in ("category", "key", "text")}
        if not isinstance(line.get("id"), str) or any(not isinstance(v, str | None) for v in texts.values()):
            raise DataError("id, text, category and key of a record are text")
        if ("messages" in line) == (texts["text"] is not None):
            raise DataError("a record has either messages or text")
        messages = line.get("messages", [])
        if not isinstance(messages, list):
            raise DataError("messages of a record are a list")
        turns = tuple(_turn(message) for message in messages)
        return cls(line["id"], turns=turns, **texts)

    def __repr__(self) -> str:
        return f"Record({self.id!r}, {len(self.turns)} turns, {self.characters} characters)"


def _turn_dict(turn: Turn) -> dict[str, Any]:
    plain: dict[str, Any] = {"role": turn.role, "content": turn.content}
    return plain if turn.input_at is None else {**plain, "input_at": turn.input_at}


def _turn(message: Any) -> Turn:
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        raise DataError(f"a message has a role, one of {', '.join(ROLES)}")
    content, input_at = message.get("content"), message.get("input_at")
    if not isinstance(content, str):
        raise DataError("the content of a message is text")
    if input_at is not None and not (type(input_at) is int and len(INPUT_GAP) <= input_at < len(content)):
        raise DataError("input_at of a message is a position inside its content")
    return Turn(cast(TurnRole, message["role"]), content, input_at)


def prompt_and_answer(record: Record) -> tuple[tuple[Turn, ...], str]:
    """The last assistant turn's text and all turns before it. Plain text has no prompt: ((), text).

    Raises:
        DataError: the conversation does not end with the assistant.
    """
    if record.text is not None:
        return (), record.text
    if not record.turns or record.turns[-1].role != "assistant":
        raise DataError(f"record {record.id!r} does not end with an assistant's turn")
    return record.turns[:-1], record.turns[-1].content


@dataclass(slots=True)
class Span:
    """Smallest, largest and sum of a count over rows."""

    least: int = 0
    most: int = 0
    total: int = 0
    rows: int = 0

    def add(self, count: int) -> None:
        self.least = count if self.rows == 0 else min(self.least, count)
        self.most = max(self.most, count)
        self.total += count
        self.rows += 1

    def as_dict(self) -> dict[str, float]:
        """{"min", "max", "sum", "mean"}; all 0 without rows."""
        mean = self.total / self.rows if self.rows else 0.0
        return {"min": self.least, "max": self.most, "sum": self.total, "mean": round(mean, 3)}


@dataclass(slots=True)
class _Counts:
    rows: int = 0
    turns: int = 0
    prompt: Span = field(default_factory=Span)
    answer: Span = field(default_factory=Span)
    categories: Counter[str] = field(default_factory=Counter)

    def add(self, record: Record) -> None:
        before, answer = prompt_and_answer(record)
        self.rows += 1
        self.turns += len(record.turns)
        self.prompt.add(sum(len(turn.content) for turn in before))
        self.answer.add(len(answer))
        if record.category is not None:
            self.categories[record.category] += 1


class DatasetWriter:
    """Streams records into a dataset folder that appears under its name only when all of it is written.

    Use as a context manager: leaving it finishes the folder, an error removes what was begun.
    path: a folder that does not exist yet, in a folder that does. fields: the mapping of names that was used.
    template: how the records are meant to be shown to a model (`auto`, `chat`, `alpaca` or `plain`).
    statistics: may be filled until the end, and goes into `dataset.json`.
    """

    def __init__(
        self,
        path: Path,
        *,
        template: str = "auto",
        fields: Mapping[str, str] | None = None,
        source: str = "",
    ) -> None:
        self.path = path
        self.statistics: dict[str, Any] = {}
        self._about = {"template": template, "fields": dict(fields or {}), "source": source}
        self._partial = path.with_name(path.name + ".partial")
        self._counts = _Counts()
        self._digest = hashlib.sha256()
        self._stream: IO[bytes] | None = None

    def __enter__(self) -> DatasetWriter:
        if self.path.exists():
            raise DataError(f"{self.path} is already there", hint="A dataset is never written over.")
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir()
        self._stream = (self._partial / RECORDS).open("wb")
        return self

    @property
    def rows(self) -> int:
        return self._counts.rows

    def describe_fields(self, fields: Mapping[str, str]) -> None:
        """Put the mapping of field names into `dataset.json`, when it is known only after the first row."""
        self._about["fields"] = dict(fields)

    def add(self, record: Record) -> None:
        """Append one record.

        Raises:
            DataError: the record does not end with an assistant's turn.
        """
        if self._stream is None:
            raise DataError("a dataset writer is used inside `with`")
        self._counts.add(record)
        line = json.dumps(record.as_dict(), ensure_ascii=False, separators=(",", ":")).encode("utf-8") + b"\n"
        self._digest.update(line)
        self._stream.write(line)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.close()
        if kind is not None:
            shutil.rmtree(self._partial, ignore_errors=True)
            return
        text = json.dumps(self._manifest(), ensure_ascii=False, indent=2, sort_keys=True)
        (self._partial / MANIFEST).write_text(text + "\n", encoding="utf-8")
        self._partial.rename(self.path)

    def _manifest(self) -> dict[str, Any]:
        counts = self._counts
        characters = {"prompt": counts.prompt.as_dict(), "answer": counts.answer.as_dict()}
        return {
            "schema": SCHEMA,
            "rows": counts.rows,
            "turns": counts.turns,
            "categories": dict(sorted(counts.categories.items())),
            "sha256": self._digest.hexdigest(),
            "statistics": {"characters": characters, **self.statistics},
            **self._about,
        }


def write_dataset(
    path: Path,
    records: Iterable[Record],
    *,
    template: str = "auto",
    fields: Mapping[str, str] | None = None,
    source: str = "",
) -> Dataset:
    """Write all records to a new dataset folder and open it."""
    with DatasetWriter(path, template=template, fields=fields, source=source) as writer:
        for record in records:
            writer.add(record)
    return Dataset(path)


class Dataset:
    """A dataset folder, opened for reading: `len`, `dataset[i]`, iteration.

    Opening reads the file once, to find the lines and to check the digest; memory is 8 bytes a row. Rows are
    read when asked for, with a handle of their own, so that threads and forked workers may share an object.

    Raises:
        DataError: not a dataset folder, another schema version, or contents without the stated digest.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        self._offsets = _index(path / RECORDS, str(self.manifest["sha256"]))
        if len(self._offsets) != self.manifest["rows"]:
            raise DataError(f"{path}: {len(self._offsets)} rows lie there, {MANIFEST} says {self.manifest['rows']}")

    @property
    def template(self) -> str:
        """How the records are meant to be shown to a model: `auto`, `chat`, `alpaca` or `plain`."""
        return str(self.manifest["template"])

    @property
    def sha256(self) -> str:
        """Digest of `records.jsonl`, 64 hex digits."""
        return str(self.manifest["sha256"])

    def categories(self) -> dict[str, int]:
        """Rows per category, names sorted; rows without a category are not counted."""
        return {str(name): int(count) for name, count in self.manifest["categories"].items()}

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, row: int) -> Record:
        """The record of a row (negative counts from the end). Raises IndexError beyond the last."""
        with (self.path / RECORDS).open("rb") as stream:
            stream.seek(self._offsets[row])
            return Record.from_dict(json.loads(stream.readline()))

    def __iter__(self) -> Iterator[Record]:
        with (self.path / RECORDS).open("rb") as stream:
            for line in stream:
                yield Record.from_dict(json.loads(line))

    def __repr__(self) -> str:
        return f"Dataset({str(self.path)!r}, {len(self)} rows, {len(self.categories())} categories)"


def read_manifest(path: Path) -> dict[str, Any]:
    """`dataset.json` of a dataset folder: schema, rows, turns, categories, statistics, fields, template,
    sha256.

    Raises:
        DataError: not a dataset folder, or another schema version.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is not a dataset folder: {MANIFEST} cannot be read",
            hint="A dataset folder is what the component `reader` writes.",
        ) from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise DataError(f"{path / MANIFEST}: the schema is not {SCHEMA}")
    return manifest


def _index(path: Path, sha256: str) -> array[int]:
    offsets, digest, position = array("Q"), hashlib.sha256(), 0
    try:
        with path.open("rb") as stream:
            for line in stream:
                offsets.append(position)
                digest.update(line)
                position += len(line)
    except OSError as error:
        raise DataError(f"{path} cannot be read") from error
    if digest.hexdigest() != sha256:
        raise DataError(f"{path} is not what {MANIFEST} describes: the digest differs")
    return offsets
