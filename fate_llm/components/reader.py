"""Component `reader`: a party's own data file becomes records of one form."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from fate_llm.core.errors import DataError
from fate_llm.core.interfaces import Context, Estimate, Frozen, Keep, PlanView, Port, PredictRule
from fate_llm.core.values import ArtifactKind

from .llm.costs import PLAIN_PROCESS
from .llm.fields import FieldNames, Mapper, find_columns
from .llm.records import DatasetWriter, Record, Span, read_manifest
from .llm.sources import RowFault, format_of, optional_import, read_rows
from .llm.templates import Formatter

__all__ = ["PLUGIN", "Reader", "ReaderParams"]

SHOWN_FAULTS = 5
_CATALOG = "catalog:"
PROGRESS_EVERY = 10_000


class ReaderParams(Frozen):
    """Where the data lies and how to read it."""

    path: str = Field(
        min_length=1,
        description="File or folder, relative to the pipeline; `catalog:NAME` for a data set of the party's catalogue;"
        " the name of a data set for format `hub`.",
        json_schema_extra={"resource": "data"},
    )
    format: Literal["auto", "jsonl", "json", "csv", "parquet", "dataset", "hub"] = Field(
        default="auto",
        description="How the file is written; `auto` goes by its suffix, a folder is a data set folder.",
    )
    fields: FieldNames = Field(
        default_factory=FieldNames,
        description="Our field names and the file's, as {instruction: question}.",
    )
    template: Literal["auto", "chat", "alpaca", "plain"] = Field(
        default="auto",
        description="How records are shown to the model; `auto` is the model's chat template if it has one.",
    )
    split: str = Field(default="train", min_length=1, description="Which split of a data set folder or hub data set.")
    answers: Literal["required", "optional"] = Field(
        default="required",
        description="`optional`: rows may lack the answer, as they do where answers are to be generated.",
    )
    limit: int | None = Field(default=None, ge=1, description="Read at most this many good rows.")
    on_fault: Literal["refuse", "skip"] = Field(
        default="refuse",
        description="`refuse` ends the task at bad rows and lists them; `skip` leaves them out and reports.",
    )
    max_faults: int = Field(
        default=100, ge=1, le=100_000, description="With `skip`: more bad rows than this are refused."
    )
    tokenizer: str | None = Field(
        default=None,
        description="Folder of a tokenizer, or `catalog:NAME`, to count tokens with; None counts characters only.",
        json_schema_extra={"resource": "model"},
    )


@dataclass(slots=True)
class _Report:
    """What was read, for `report.json`."""

    rows: int = 0
    kept: int = 0
    faults: list[RowFault] = field(default_factory=list)
    answer_tokens: Span = field(default_factory=Span)
    prompt_tokens: Span = field(default_factory=Span)

    def as_dict(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "kept": self.kept,
            "faults": [fault.as_dict() for fault in self.faults],
            "fields": manifest["fields"],
            "template": manifest["template"],
            "categories": manifest["categories"],
            "statistics": manifest["statistics"],
        }


class Reader:
    """Reads a party's own records from a file and keeps them, in one form, inside the party.

    Formats: JSON Lines, a JSON array, CSV (and .tsv), Parquet, a folder written by Hugging Face `datasets`,
    and, where there is a network, the name of a data set on the hub. All of them are read as a stream, so a
    file may be larger than memory.

    `fields` maps our names to the file's: question and answer (`instruction`/`output`, `prompt`/`response`,
    `question`/`answer`, with an optional `input`), chat `messages` (also `conversations` of `from`/`value`),
    or plain `text`; besides, a `category` to stratify by and a `key` to partition by. Without it the mapping
    is looked for in the first record, and refused when more than one fits.

    A bad row (no such field, a wrong type, empty text, no JSON, no UTF-8) is named by file, row and field,
    never by its contents. Nothing leaves the party.
    """

    Params: ClassVar[type[Frozen]] = ReaderParams
    inputs: ClassVar[Mapping[str, Port]] = {}
    outputs: ClassVar[Mapping[str, Port]] = {
        "dataset": Port(ArtifactKind.DATASET, "The records."),
        "report": Port(ArtifactKind.REPORT, "Rows, faults, lengths in characters and, if asked for, tokens."),
    }
    predict_rule: ClassVar[PredictRule] = Keep(params={"answers": "optional"})

    def needs_experiment(self, params: Any) -> str | None:
        return None

    def estimate(self, view: PlanView) -> Estimate:
        return Estimate(
            memory_bytes=PLAIN_PROCESS, notes=("reads as a stream: about 8 bytes of memory a row; sends nothing",)
        )

    def guest(self, ctx: Context) -> None:
        _read(ctx)

    def host(self, ctx: Context) -> None:
        _read(ctx)


def _read(ctx: Context) -> None:
    """Read the file; where it is named by the party's catalogue, what others may hear of an error has that name."""
    params: ReaderParams = ctx.params
    path = Path(params.path) if params.format == "hub" else ctx.resolve(params.path)
    if not params.path.startswith(_CATALOG):
        _read_from(ctx, path, path.name)
        return
    try:
        _read_from(ctx, path, params.path)
    except DataError as error:
        file = re.compile(rf"{re.escape(str(path))}|(?<![\w./-]){re.escape(path.name)}(?![\w/-])")
        message, hint = (file.sub(params.path, text) for text in (error.message, error.hint))
        raise DataError(message, hint=hint) from error


def _read_from(ctx: Context, path: Path, source: str) -> None:
    params: ReaderParams = ctx.params
    target, report = ctx.output("dataset"), _Report()
    tokens = _token_counter(ctx, params, report)
    with DatasetWriter(target, template=params.template, source=source) as writer:
        for record in _records(ctx, path, report, writer):
            writer.add(record)
            tokens(record)
        if report.kept == 0:
            raise DataError(f"{path}: no usable record among {report.rows} rows", hint=_listed(report.faults))
        if params.tokenizer is not None:
            spans = {"prompt": report.prompt_tokens.as_dict(), "answer": report.answer_tokens.as_dict()}
            writer.statistics["tokens"] = spans
    _write_report(ctx.output("report"), report.as_dict(read_manifest(target)), source)
    ctx.emit("data", rows=report.rows, kept=report.kept, faults=len(report.faults))


def _records(ctx: Context, path: Path, report: _Report, writer: DatasetWriter) -> Iterator[Record]:
    """The good records, at most `limit`; counts rows and collects faults on the way."""
    params: ReaderParams = ctx.params
    mapper: Mapper | None = None
    for number, row in read_rows(path, format_of(path, params.format), split=params.split, name=params.path):
        report.rows += 1
        if report.rows % PROGRESS_EVERY == 0:
            ctx.check_cancelled()
            ctx.emit("data", rows=report.rows, kept=report.kept, faults=len(report.faults))
        if mapper is None and not isinstance(row, RowFault):
            optional = params.answers == "optional"
            columns = find_columns(params.fields, list(row), file=path.name, answers_optional=optional)
            mapper = Mapper(columns, file=path.name, answers_optional=optional)
            writer.describe_fields(mapper.columns.as_dict())
        found = row if mapper is None or isinstance(row, RowFault) else mapper.record(number, row)
        if isinstance(found, Record):
            report.kept += 1
            yield found
            if report.kept == params.limit:
                break
        elif isinstance(found, RowFault):
            _note(report, found, params, path)
    if report.faults and params.on_fault == "refuse":
        raise _refused(report, path)
    if mapper is not None and mapper.unseen:
        missing = ", ".join(mapper.unseen)
        raise DataError(f"{path}: no row has the field {missing}", hint="Mend the reader's `fields`.")


def _note(report: _Report, fault: RowFault, params: ReaderParams, path: Path) -> None:
    """Collect a fault; stop when there are enough of them to show, or more than are allowed."""
    report.faults.append(fault)
    if params.on_fault == "refuse" and len(report.faults) == SHOWN_FAULTS:
        raise _refused(report, path)
    if params.on_fault == "skip" and len(report.faults) > params.max_faults:
        raise DataError(
            f"{path}: more than max_faults = {params.max_faults} bad rows among the first {report.rows}; "
            f"{_listed(report.faults)}"
        )


def _refused(report: _Report, path: Path) -> DataError:
    return DataError(
        f"{path}: bad rows among the first {report.rows}\n{_listed(report.faults)}",
        hint="Mend the rows, name the right fields, or leave bad rows out with on_fault: skip.",
    )


def _listed(faults: list[RowFault]) -> str:
    return "\n".join(str(fault) for fault in faults[:SHOWN_FAULTS])


def _token_counter(ctx: Context, params: ReaderParams, report: _Report) -> Callable[[Record], None]:
    """What counts a record's tokens; does nothing when no tokenizer is named."""
    if params.tokenizer is None:
        return lambda record: None
    folder = ctx.resolve(params.tokenizer)
    shown = params.tokenizer if params.tokenizer.startswith(_CATALOG) else folder
    if not folder.is_dir():
        raise DataError(f"tokenizer: {shown} is no folder", hint="Name a folder with tokenizer.json in it.")
    transformers = optional_import("transformers", "counting tokens")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(f"tokenizer: {shown} holds none that can be read") from error
    formatter = Formatter(tokenizer, params.template)

    def count(record: Record) -> None:
        prompt = len(formatter.encode_prompt(record))
        report.prompt_tokens.add(prompt)
        report.answer_tokens.add(formatter.length(record) - prompt)

    return count


def _write_report(folder: Path, report: dict[str, Any], source: str) -> None:
    folder.mkdir()
    text = json.dumps(report, ensure_ascii=False, indent=2)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    (folder / "report.md").write_text(_markdown(report, source), encoding="utf-8")


def _markdown(report: dict[str, Any], source: str) -> str:
    lines = [f"# Data read from {source}", "", f"{report['rows']} rows, {report['kept']} kept.", ""]
    lines += ["| length of | unit | min | mean | max | sum |", "|---|---|---|---|---|---|"]
    for unit, parts in report["statistics"].items():
        for part, span in parts.items():
            lines.append(f"| {part} | {unit} | {span['min']} | {span['mean']} | {span['max']} | {span['sum']} |")
    if report["categories"]:
        lines += ["", "| category | rows |", "|---|---|"]
        lines += [f"| {name} | {count} |" for name, count in report["categories"].items()]
    if report["faults"]:
        lines += ["", "| row | field | found | valid |", "|---|---|---|---|"]
        lines += [f"| {f['row']} | {f['field']} | {f['found']} | {f['valid']} |" for f in report["faults"]]
    return "\n".join(lines) + "\n"


PLUGIN = Reader
