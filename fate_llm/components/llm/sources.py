"""Rows of data files as they lie there: JSON Lines, JSON, CSV, Parquet, Hugging Face data sets.

Rules:
1. Every source streams: memory is one batch or one record, never the file.
2. What is wrong with one row is a `RowFault` in its place; what is wrong with the whole file is a DataError.
3. A fault says what was found by type, length or position, never by content: faults are logged.
"""

from __future__ import annotations

import codecs
import csv
import importlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fate_llm.core.errors import DataError, MissingExtra
from fate_llm.core.names import nearest

__all__ = ["FORMATS", "Row", "RowFault", "format_of", "kind_of", "optional_import", "read_rows"]

LINE_LIMIT = 64 * 2**20
BLOCK = 2**20
PARQUET_BATCH = 1024

_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}


@dataclass(frozen=True, slots=True)
class RowFault:
    """One thing wrong with one row. row: 1-based; for JSON Lines the line, for CSV the record after the
    header.

    field: the name in the file, empty when the whole row is meant. found, valid: without any of the contents.
    """

    file: str
    row: int
    field: str
    found: str
    valid: str

    def as_dict(self) -> dict[str, str | int]:
        return asdict(self)

    def __str__(self) -> str:
        place = f"field {self.field!r}: " if self.field else ""
        return f"{self.file}, row {self.row}: {place}found {self.found}; valid: {self.valid}"


Row = tuple[int, "Mapping[str, Any] | RowFault"]


def optional_import(name: str, needed_for: str) -> Any:
    """A module of the `train` layer, imported when it is first needed.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise MissingExtra(
            f"{needed_for} needs the package {package}, which is not installed",
            hint="pip install 'fate_llm[train]'",
        ) from error


def format_of(path: Path, format: str = "auto") -> str:
    """The format of a file or folder by its name, when `auto` is asked for.

    Raises:
        DataError: there is nothing at `path`, or its name does not tell.
    """
    if format != "auto":
        return format
    if not path.exists():
        raise DataError(
            f"{path} does not exist",
            hint="A relative path starts at the pipeline's folder; a data set of the hub needs format: hub.",
        )
    if path.is_dir():
        return "dataset"
    if path.suffix.lower() not in _SUFFIXES:
        raise DataError(f"{path}: the suffix does not tell the format", hint=f"Name one: {', '.join(FORMATS)}.")
    return _SUFFIXES[path.suffix.lower()]


def read_rows(path: Path, format: str, *, split: str = "train", name: str = "") -> Iterator[Row]:
    """Rows of a source, one after the other, each with its number.

    path: a file, or a folder for `dataset`. name: the hub's name for `hub`, where `path` is not used.

    Raises:
        DataError: nothing there, not readable, empty, or not of this format as a whole.
        MissingExtra: the format needs a package that is not installed.
    """
    if format not in FORMATS:
        raise DataError(f"no format is called {format!r}", hint=nearest(format, FORMATS))
    if format == "hub":
        return _hub(name, split)
    if not path.exists():
        raise DataError(f"{path} does not exist", hint="A relative path starts at the pipeline's folder.")
    if (format == "dataset") != path.is_dir():
        found = "a folder" if path.is_dir() else "a file"
        raise DataError(f"{path} is {found}, which format {format!r} does not read")
    if path.is_file() and path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    return _dataset_folder(path, split) if format == "dataset" else _FILES[format](path)


# --- JSON ---------------------------------------------------------------------------------------------------


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as stream:
        number = 0
        while line := stream.readline(LINE_LIMIT + 1):
            number += 1
            if len(line) > LINE_LIMIT:
                raise DataError(f"{path}, row {number}: the line is longer than {LINE_LIMIT >> 20} MiB")
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield number, _json_row(path, number, line)


def _json_row(path: Path, number: int, line: bytes) -> Mapping[str, Any] | RowFault:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RowFault(path.name, number, "", f"a byte that is not UTF-8 at position {error.start}", "UTF-8")
    except ValueError as error:
        return RowFault(path.name, number, "", f"no JSON ({_why(error)})", "one JSON object on the line")
    except RecursionError:
        return RowFault(path.name, number, "", "JSON nested too deeply", "one JSON object on the line")
    return _object(path, number, value)


def _why(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return type(error).__name__


def _object(path: Path, number: int, value: Any) -> Mapping[str, Any] | RowFault:
    if isinstance(value, dict):
        return value
    return RowFault(path.name, number, "", kind_of(value), "an object with the record's fields")


def kind_of(value: Any) -> str:
    """What a value is, in words that show nothing of it."""
    kinds = {bool: "a truth value", str: "text", list: "a list", dict: "an object", type(None): "null"}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "a number"
    return kinds.get(type(value), type(value).__name__)


def _json(path: Path) -> Iterator[Row]:
    """Elements of a JSON array, decoded one by one from a window on the file."""
    decoder = json.JSONDecoder()
    with path.open("rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as stream:
        window = _Window(path, stream)
        window.expect("[", "an array of objects")
        number = 0
        while window.peek() != "]":
            number += 1
            if number > 1:
                window.expect(",", "a comma between the elements")
            yield number, _object(path, number, window.decode(decoder, number))
        window.expect("]", "the end of the array")
        if window.peek():
            raise DataError(f"{path}: something follows the JSON array", hint="Use .jsonl for one record a line.")


class _Window:
    """The part of a text file that is not consumed yet."""

    def __init__(self, path: Path, stream: io.TextIOWrapper) -> None:
        self._path, self._stream = path, stream
        self._text, self._at = "", 0

    def _more(self, size: int) -> bool:
        try:
            block = self._stream.read(size)
        except UnicodeDecodeError as error:
            raise DataError(f"{self._path}: not UTF-8", hint="Save the file as UTF-8.") from error
        self._text, self._at = self._text[self._at :] + block, 0
        return bool(block)

    def peek(self) -> str:
        """The next character that is not white space, or the empty text at the end."""
        while True:
            while self._at < len(self._text):
                if not self._text[self._at].isspace():
                    return self._text[self._at]
                self._at += 1
            if not self._more(BLOCK):
                return ""

    def expect(self, sign: str, meaning: str) -> None:
        if self.peek() != sign:
            raise DataError(
                f"{self._path}: expected {meaning} (`{sign}`)",
                hint="A .json file is one array of objects; for one object a line use format: jsonl.",
            )
        self._at += 1

    def decode(self, decoder: json.JSONDecoder, number: int) -> Any:
        """The next value. Incomplete cannot be told from wrong, so the window grows, up to a limit."""
        self.peek()
        size = BLOCK
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._at)
            except ValueError as error:
                if len(self._text) - self._at > LINE_LIMIT or not self._more(size):
                    raise DataError(f"{self._path}, row {number}: no JSON ({_why(error)})") from error
                size *= 2
                continue
            except RecursionError as error:
                raise DataError(f"{self._path}, row {number}: JSON nested too deeply") from error
            # a number may go on in the next block; anything else is simply decoded again
            if end == len(self._text) and self._more(size):
                continue
            self._at = end
            return value


# --- CSV ----------------------------------------------------------------------------------------------------


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(max(csv.field_size_limit(), LINE_LIMIT))
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    # bytes that are not UTF-8 survive as surrogates, so that the fault can be named by row and field
    with path.open("r", encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        header = _csv_header(path, reader)
        number = 0
        while True:
            number += 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise DataError(f"{path}, row {number}: no CSV ({error})") from error
            if cells:
                yield number, _csv_row(path, number, header, cells)


def _csv_header(path: Path, reader: Iterator[list[str]]) -> list[str]:
    try:
        header = next(reader)
    except (StopIteration, csv.Error) as error:
        raise DataError(f"{path}: no header line", hint="The first line of a CSV names its fields.") from error
    if len(set(header)) != len(header):
        raise DataError(f"{path}: the header names a field twice")
    return header


def _csv_row(path: Path, number: int, header: list[str], cells: list[str]) -> Mapping[str, Any] | RowFault:
    if len(cells) != len(header):
        return RowFault(path.name, number, "", f"{len(cells)} fields", f"the header's {len(header)} fields")
    for name, cell in zip(header, cells, strict=True):
        if any("\udc80" <= sign <= "\udcff" for sign in cell):
            return RowFault(path.name, number, name, "bytes that are not UTF-8", "UTF-8")
    return dict(zip(header, cells, strict=True))


# --- Parquet, data set folders, the hub ---------------------------------------------------------------------


def _parquet(path: Path) -> Iterator[Row]:
    parquet = optional_import("pyarrow.parquet", "format: parquet")
    arrow = optional_import("pyarrow", "format: parquet")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=PARQUET_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path}, after row {number}: no Parquet ({type(error).__name__})") from error


def _dataset_folder(path: Path, split: str) -> Iterator[Row]:
    if (path / "records.jsonl").is_file():
        yield from _jsonl(path / "records.jsonl")
        return
    datasets = optional_import("datasets", "format: dataset")
    try:
        found = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as error:
        raise DataError(f"{path} is no data set folder", hint="It is what `Dataset.save_to_disk` writes.") from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise DataError(f"{path} has no split {split!r}", hint=nearest(split, list(found)))
        found = found[split]
    yield from enumerate(found, start=1)


def _hub(name: str, split: str) -> Iterator[Row]:
    datasets = optional_import("datasets", "format: hub")
    try:
        found = datasets.load_dataset(name, split=split, streaming=True)
        yield from enumerate(found, start=1)
    except (OSError, ValueError) as error:
        raise DataError(
            f"data set {name!r} of the hub, split {split!r}: {type(error).__name__}",
            hint="The hub needs a network; a copy made with `save_to_disk` does not.",
        ) from error


_FILES: dict[str, Callable[[Path], Iterator[Row]]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "parquet": _parquet,
}
FORMATS = (*_FILES, "dataset", "hub")
