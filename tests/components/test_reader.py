from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fate_llm.components.llm import sources
from fate_llm.components.llm.fields import FieldNames, find_columns
from fate_llm.components.llm.records import Dataset
from fate_llm.components.llm.sources import RowFault, optional_import, read_rows
from fate_llm.components.reader import Reader, ReaderParams
from fate_llm.core.errors import DataError, JobCancelled, MissingExtra
from fate_llm.core.interfaces import Keep
from fate_llm.core.values import Roster
from tests.components.fake_context import FakeContext, make_contexts

ROWS = [
    {"question": "Où est-il?", "answer": "là", "category": "a"},
    {"question": "二", "answer": 'three, "four"\nfive', "category": "b"},
    {"question": "x", "answer": "y", "category": "a"},
]


def read(folder: Path, path: str, **params: Any) -> tuple[Dataset, dict[str, Any], FakeContext]:
    """Run the reader as the guest; the data set, the report and the context it had."""
    given = ReaderParams(path=path, **params)
    context = make_contexts(folder, Roster("bank-a"), params=given, task="data")["bank-a"]
    Reader().guest(context)
    outputs = folder / "outputs/bank-a/data"
    report = json.loads((outputs / "report/report.json").read_text(encoding="utf-8"))
    return Dataset(outputs / "dataset"), report, context


def pairs(dataset: Dataset) -> list[tuple[str, str, str | None]]:
    return [(r.turns[0].content, r.turns[1].content, r.category) for r in dataset]


def write_jsonl(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """The same rows in the format of the suffix."""
    if path.suffix == ".jsonl":
        write_jsonl(path, rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
        parquet.write_table(arrow.Table.from_pylist(rows), path)


# --- Formats ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_records(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"data.{suffix}", ROWS)
    dataset, report, context = read(tmp_path, f"data.{suffix}")
    assert pairs(dataset) == [(row["question"], row["answer"], row["category"]) for row in ROWS]
    assert (report["rows"], report["kept"], report["faults"]) == (3, 3, [])
    assert context.events[-1] == ("data", {"rows": 3, "kept": 3, "faults": 0})


def test_hosts_read_too(tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", ROWS)
    contexts = make_contexts(tmp_path, Roster("a", ("b",)), params=ReaderParams(path="data.jsonl"))
    Reader().host(contexts["b"])
    assert len(Dataset(tmp_path / "outputs/b/task/dataset")) == 3


def test_the_row_in_the_file_is_the_records_id(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "response": "b"}\n\n{"prompt": "c", "response": "d"}\n')
    dataset, _, _ = read(tmp_path, "data.jsonl")
    assert [record.id for record in dataset] == ["1", "3"]


def test_a_byte_order_mark_is_no_part_of_the_first_field(tmp_path: Path) -> None:
    for name, text in {"a.jsonl": '{"question":"a","answer":"b"}', "b.csv": "question,answer\na,b\n"}.items():
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        folder = tmp_path / name[0]
        folder.mkdir()
        (tmp_path / name).rename(folder / name)
        assert pairs(read(folder, name)[0]) == [("a", "b", None)]


def test_a_data_set_of_ours_can_be_read_again(tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", ROWS)
    first, _, _ = read(tmp_path, "data.jsonl")
    (tmp_path / "again").mkdir()
    second, _, _ = read(tmp_path / "again", str(first.path))
    assert pairs(second) == pairs(first)


@pytest.mark.slow
def test_a_hugging_face_folder_is_read_by_split(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    found = datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)})
    found.save_to_disk(str(tmp_path / "hf"))
    dataset, _, _ = read(tmp_path, "hf", split="test")
    assert len(dataset) == 3
    with pytest.raises(DataError, match="no split 'train'"):
        list(read_rows(tmp_path / "hf", "dataset"))
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="no data set folder"):
        list(read_rows(tmp_path / "other", "dataset"))


def test_the_hub_is_asked_for_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        @staticmethod
        def load_dataset(name: str, *, split: str, streaming: bool) -> list[dict[str, str]]:
            assert streaming
            if name == "nobody/none":
                raise ConnectionError("no route")
            assert (name, split) == ("someone/faq", "train")
            return ROWS

    monkeypatch.setattr(sources, "optional_import", lambda name, needed_for: Hub)
    assert len(read(tmp_path, "someone/faq", format="hub")[0]) == 3
    with pytest.raises(DataError, match="hub, split 'train': ConnectionError"):
        list(read_rows(Path("nobody/none"), "hub", name="nobody/none"))


def test_a_missing_package_names_the_extra() -> None:
    with pytest.raises(MissingExtra, match="no_such_package") as caught:
        optional_import("no_such_package.part", "format: strange")
    assert "fate_llm[train]" in caught.value.hint


# --- Fields -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "fields", "expected"),
    [
        ({"question": "q", "answer": "a"}, {"instruction": "question", "output": "answer"}, "q"),
        ({"frage": "q", "antwort": "a"}, {"question": "frage", "answer": "antwort"}, "q"),
        ({"instruction": "q", "input": "i", "output": "a"}, {}, "q\n\ni"),
        ({"instruction": "q", "context": "i", "response": "a"}, {}, "q\n\ni"),
        ({"instruction": "q", "more": "i", "output": "a"}, {"input": "more"}, "q\n\ni"),
        ({"instruction": "q", "input": "", "output": "a"}, {}, "q"),
        ({"instruction": "q", "input": None, "output": "a"}, {}, "q"),
        ({"prompt": "q", "completion": "a"}, {}, "q"),
        ({"q": "q", "answer": "a", "text": "t"}, {"prompt": "q"}, "q"),
        ({"prompt": "q", "response": "a", "text": "t"}, {"response": "response"}, "q"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, {}, "q"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, {}, "q"),
    ],
)
def test_the_mapping_is_found_or_given(tmp_path: Path, row: Any, fields: dict[str, str], expected: str) -> None:
    write_jsonl(tmp_path / "data.jsonl", [row])
    dataset, _, _ = read(tmp_path, "data.jsonl", fields=fields)
    assert pairs(dataset) == [(expected, "a", None)]


def test_plain_text(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "data.jsonl", [{"text": "once"}, {"text": "upon"}])
    dataset, report, _ = read(tmp_path, "data.jsonl")
    assert [record.text for record in dataset] == ["once", "upon"]
    assert report["fields"] == {"text": "text", "category": "category"}


def test_category_and_key_are_taken_along(tmp_path: Path) -> None:
    rows = [
        {"question": "q", "answer": "a", "kind": 7, "customer": "c1"},
        {"question": "q", "answer": "a", "kind": None},
    ]
    write_jsonl(tmp_path / "data.jsonl", rows)
    dataset, _, _ = read(tmp_path, "data.jsonl", fields={"category": "kind", "key": "customer"})
    assert [(record.category, record.key) for record in dataset] == [("7", "c1"), (None, None)]


@pytest.mark.parametrize(
    ("found", "fields", "message", "hint"),
    [
        (["question", "answer", "text"], {}, "more than one reading fits", "Say which"),
        (
            ["instruction", "output", "response"],
            {},
            "instruction and output; instruction and response",
            "Say",
        ),
        (["a", "b"], {}, "among the fields a, b", "Say which"),
        (["questions", "answer"], {"question": "question"}, "no field is called 'question'", "'questions'"),
        (["question"], {"question": "question"}, "no question and answer", "Say which"),
        (["q", "output", "answer"], {"question": "q"}, "more than one reading", "Say which"),
    ],
)
def test_an_unclear_mapping_is_refused(found: list[str], fields: dict[str, str], message: str, hint: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        find_columns(FieldNames(**fields), found, file="data.csv")
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    "fields",
    [
        {"instruction": "a", "question": "b"},
        {"output": "a", "response": "b"},
        {"instruction": "a", "text": "b"},
        {"messages": "a", "text": "b"},
        {"input": "a", "text": "b"},
        {"instruktion": "a"},
    ],
)
def test_contradicting_fields_are_refused_at_once(fields: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        ReaderParams(path="x", fields=fields)  # type: ignore[arg-type]


def test_a_named_field_that_no_row_has_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", ROWS)
    with pytest.raises(DataError, match="no row has the field kategory"):
        read(tmp_path, "data.jsonl", fields={"category": "kategory"})


# --- Faults -------------------------------------------------------------------------------------------------


def faults_of(folder: Path, text: bytes, name: str = "data.jsonl", **params: Any) -> list[dict[str, Any]]:
    (folder / name).write_bytes(text)
    _, report, _ = read(folder, name, on_fault="skip", **params)
    faults: list[dict[str, Any]] = report["faults"]
    return faults


GOOD = b'{"question": "q", "answer": "a"}\n'


@pytest.mark.parametrize(
    ("line", "field", "found"),
    [
        (b'{"question": "secret"}', "answer", "no such field"),
        (b'{"question": "secret", "answer": 4}', "answer", "a number"),
        (b'{"question": "secret", "answer": null}', "answer", "null"),
        (b'{"question": "secret", "answer": ["secret"]}', "answer", "a list"),
        (b'{"question": "secret", "answer": true}', "answer", "a truth value"),
        (b'{"question": " ", "answer": "secret"}', "question", "empty text"),
        (b'{"question": "q", "answer": "\\ud800secret"}', "answer", "half of a surrogate pair"),
        (b'{"question": "secret", "answer": "b", "category": [1]}', "category", "a list"),
        (b'{"question": "secret", "answer": "b", "input": 5}', "input", "a number"),
        (b'{"question": secret}', "", "no JSON (Expecting value at column 14)"),
        (b'["secret"]', "", "a list"),
        (b'"secret"', "", "text"),
        (b'{"question": "secret\xff"}', "", "a byte that is not UTF-8 at position 20"),
        (b"[" * 100_000, "", "JSON nested too deeply"),
    ],
)
def test_a_bad_row_is_named_without_its_contents(tmp_path: Path, line: bytes, field: str, found: str) -> None:
    faults = faults_of(tmp_path, GOOD + line + b"\n" + GOOD)
    assert [(f["file"], f["row"], f["field"], f["found"]) for f in faults] == [("data.jsonl", 2, field, found)]
    assert faults[0]["valid"]
    written = (tmp_path / "outputs/bank-a/data/report/report.md").read_text(encoding="utf-8")
    assert "secret" not in json.dumps(faults) + written
    # When it is refused, the message says the same
    (tmp_path / "again").mkdir()
    (tmp_path / "again/data.jsonl").write_bytes(GOOD + line)
    with pytest.raises(DataError) as caught:
        read(tmp_path / "again", "data.jsonl")
    assert "data.jsonl, row 2: " in caught.value.message and found in caught.value.message
    assert "secret" not in caught.value.message
    assert not (tmp_path / "again/outputs/bank-a/data/dataset").exists()


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ("text", "messages"),
        ([{"role": "user", "content": "q"}], "messages"),
        ([{"role": "assistant", "content": "a"}], "messages"),
        ([{"role": "system", "content": "s"}], "messages"),
        ([{"role": "user", "content": "q"}] * 2, "messages"),
        ([{"role": "user", "content": "q"}, 5], "messages[1]"),
        ([{"role": "user", "content": "q"}, {"role": "tool", "content": "a"}], "messages[1].role"),
        ([{"role": "user", "content": "q"}, {"content": "a"}], "messages[1].role"),
        ([{"role": "user", "content": 3}, {"role": "assistant", "content": "a"}], "messages[0].content"),
        ([{"role": "user"}, {"role": "assistant", "content": "a"}], "messages[0].content"),
    ],
)
def test_wrong_conversations_are_faults(tmp_path: Path, messages: Any, field: str) -> None:
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    write_jsonl(tmp_path / "data.jsonl", [good, {"messages": messages}])
    _, report, _ = read(tmp_path, "data.jsonl", on_fault="skip")
    assert [fault["field"] for fault in report["faults"]] == [field]


def test_csv_faults(tmp_path: Path) -> None:
    text = b"question,answer\nq,a\nonly one\nq\xff,a\n\n,a\n"
    faults = faults_of(tmp_path, text, "data.csv")
    assert [(f["row"], f["field"], f["found"]) for f in faults] == [
        (2, "", "1 fields"),
        (3, "question", "bytes that are not UTF-8"),
        (5, "question", "empty text"),
    ]


def test_several_bad_rows_are_shown_at_once_and_reading_stops(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(GOOD + b'{"question": "q"}\n' * 9)
    with pytest.raises(DataError) as caught:
        read(tmp_path, "data.jsonl")
    assert caught.value.message.count("field 'answer'") == 5
    assert "first 6" in caught.value.message


def test_more_bad_rows_than_allowed_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(GOOD + b"{}\n" * 4)
    with pytest.raises(DataError, match="max_faults = 3"):
        read(tmp_path, "data.jsonl", on_fault="skip", max_faults=3)
    (tmp_path / "data.jsonl").write_bytes(GOOD + b"{}\n" * 3)
    assert read(tmp_path, "data.jsonl", on_fault="skip", max_faults=3)[1]["kept"] == 1


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(b"no\n[]\n")
    with pytest.raises(DataError, match="no usable record among 2 rows"):
        read(tmp_path, "data.jsonl", on_fault="skip")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "does not exist"),
        ("empty.jsonl", b"", "is empty"),
        ("blank.jsonl", b"\n\n", "no usable record among 0 rows"),
        ("none.xyz", b"abc", "suffix does not tell"),
        ("a.json", b'{"question": "q"}', "expected an array of objects"),
        ("b.json", b'[{"question": "q", "answer": "a"} {"question"', "expected a comma"),
        ("c.json", b'[{"question": "q", "answer": "a"}, {"question"', "row 2: no JSON"),
        ("d.json", b'[{"question": "q", "answer": "a"}] 5', "something follows"),
        ("e.json", b'[{"question": "\xff"}]', "not UTF-8"),
        ("f.json", b"[" * 100_000, "nested too deeply"),
        ("g.json", b"[]", "no usable record"),
        ("a.csv", b"\n", "no question and answer|no usable"),
        ("b.csv", b"question,question\nq,a\n", "names a field twice"),
        ("c.csv", b'question,answer\n"q,a\n', "row 1: no CSV"),
        ("a.parquet", b"this is no parquet file", "no Parquet"),
    ],
)
def test_a_file_that_is_wrong_as_a_whole(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path, name)
    assert not (tmp_path / "outputs/bank-a/data/dataset").exists()


def test_a_folder_is_no_file_and_a_format_must_exist(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder"):
        list(read_rows(tmp_path, "jsonl"))
    with pytest.raises(DataError, match="no format is called 'jsnl'"):
        read_rows(tmp_path, "jsnl")
    assert str(RowFault("f", 3, "x", "a list", "text")) == "f, row 3: field 'x': found a list; valid: text"


# --- Size ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64])
def test_json_arrays_are_read_through_a_small_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(sources, "BLOCK", block)
    values: list[Any] = [{"a": "x" * 50, "b": [1, {"c": "]}"}]}, {}, {"é": "中"}]
    (tmp_path / "d.json").write_text(" \n" + json.dumps(values, ensure_ascii=False) + " \n", encoding="utf-8")
    assert [row for _, row in read_rows(tmp_path / "d.json", "json")] == values
    (tmp_path / "e.json").write_text("[123456, 78, true]")
    found = [row for _, row in read_rows(tmp_path / "e.json", "json")]
    assert [fault.found for fault in found if isinstance(fault, RowFault)] == [
        "a number",
        "a number",
        "a truth value",
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import tracemalloc

    monkeypatch.setattr(sources, "BLOCK", 50_000)
    path = tmp_path / f"data.{suffix}"
    write(path, [{"question": f"{at}" + "x" * 2000, "answer": "y"} for at in range(1500)])
    assert path.stat().st_size > 3_000_000
    tracemalloc.start()
    assert sum(1 for _ in read_rows(path, suffix)) == 1500
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_endless_lines_and_values_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LINE_LIMIT", 1000)
    monkeypatch.setattr(sources, "BLOCK", 100)
    (tmp_path / "a.jsonl").write_text("x" * 2000)
    with pytest.raises(DataError, match="row 1: the line is longer"):
        list(read_rows(tmp_path / "a.jsonl", "jsonl"))
    (tmp_path / "a.json").write_text('[{"a": "' + "x" * 100_000)
    with pytest.raises(DataError, match="row 1: no JSON"):
        list(read_rows(tmp_path / "a.json", "json"))


def test_limit_stops_reading(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(GOOD * 2 + b"never looked at\n")
    dataset, report, _ = read(tmp_path, "data.jsonl", limit=2)
    assert len(dataset) == 2 and report["rows"] == 2


def test_reading_can_be_cancelled_and_shows_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fate_llm.components.reader.PROGRESS_EVERY", 2)
    (tmp_path / "data.jsonl").write_bytes(GOOD * 5)
    _, _, context = read(tmp_path, "data.jsonl")
    assert [fields["rows"] for _, fields in context.events] == [2, 4, 5]
    params = ReaderParams(path="data.jsonl")
    context = make_contexts(tmp_path, Roster("b"), params=params)["b"]
    context.cancelled = JobCancelled("stopped")
    with pytest.raises(JobCancelled):
        Reader().guest(context)
    assert not (tmp_path / "outputs/b/task/dataset").exists()


# --- The component ------------------------------------------------------------------------------------------


def test_tokens_are_counted_when_a_tokenizer_is_named(tmp_path: Path) -> None:
    from tests.components.tiny_tokenizer import CHATML, byte_tokenizer

    byte_tokenizer(CHATML).save_pretrained(tmp_path / "tok")
    write_jsonl(tmp_path / "data.jsonl", [{"question": "q", "answer": "ab"}, {"question": "qqq", "answer": "b"}])
    _, report, _ = read(tmp_path, "data.jsonl", tokenizer="tok")
    tokens = report["statistics"]["tokens"]
    assert tokens["answer"] == {"min": 2, "max": 3, "sum": 5, "mean": 2.5}
    assert tokens["prompt"]["max"] - tokens["prompt"]["min"] == 2
    (tmp_path / "again").mkdir()
    for wrong in ("nowhere", "../outputs"):
        with pytest.raises(DataError, match="tokenizer: "):
            (tmp_path / "again/data.jsonl").write_bytes(GOOD)
            read(tmp_path / "again", "data.jsonl", tokenizer=wrong)


def test_the_report_can_be_read_by_people(tmp_path: Path) -> None:
    write(tmp_path / "data.csv", ROWS)
    dataset, report, _ = read(tmp_path, "data.csv", template="alpaca")
    text = (tmp_path / "outputs/bank-a/data/report/report.md").read_text(encoding="utf-8")
    assert "3 rows, 3 kept" in text and "| a | 2 |" in text and "| answer | characters |" in text
    assert report["template"] == dataset.template == "alpaca"
    assert "là" not in text


def test_the_contract() -> None:
    reader = Reader()
    assert isinstance(reader.predict_rule, Keep)
    assert reader.needs_experiment(ReaderParams(path="x")) is None
    assert all(field.description for field in ReaderParams.model_fields.values())
    assert all(field.description for field in FieldNames.model_fields.values())
    with pytest.raises(ValidationError):
        ReaderParams(path="x", colour="red")  # type: ignore[call-arg]
