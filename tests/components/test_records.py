from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fate_llm.components.llm.records import (
    Dataset,
    DatasetWriter,
    Record,
    Turn,
    prompt_and_answer,
    read_manifest,
    write_dataset,
)
from fate_llm.core.errors import DataError


def records(count: int) -> list[Record]:
    return [
        Record.from_instruction(str(at), f"question {at} é中", f"answer {at}", category=f"c{at % 3}", key=str(at % 2))
        for at in range(count)
    ]


# --- One record ---------------------------------------------------------------------------------------------


def test_an_instruction_without_input_is_one_user_turn() -> None:
    for empty in (None, "", "  \n"):
        record = Record.from_instruction("1", "Sum up", "Done", input=empty)
        assert record.messages == [
            {"role": "user", "content": "Sum up"},
            {"role": "assistant", "content": "Done"},
        ]
        assert record.turns[0].input is None
        assert record.turns[0].instruction == "Sum up"


def test_an_input_is_part_of_the_content_and_can_be_told_apart() -> None:
    record = Record.from_instruction("1", "Sum up", "Done", input="A long\n\ntext")
    assert record.turns[0].content == "Sum up\n\nA long\n\ntext"
    assert record.turns[0].instruction == "Sum up"
    assert record.turns[0].input == "A long\n\ntext"


@given(st.text(min_size=1), st.text(), st.text(min_size=1), st.none() | st.text(), st.none() | st.text())
def test_a_record_survives_json(question: str, given_input: str, answer: str, category: str, key: str) -> None:
    record = Record.from_instruction("7", question, answer, input=given_input, category=category, key=key)
    line = json.loads(json.dumps(record.as_dict()))
    assert Record.from_dict(line) == record
    if given_input.strip():
        assert record.turns[0].input == given_input
        assert record.turns[0].instruction == question


def test_plain_text_survives_json() -> None:
    record = Record("1", text="once upon a time", category="tale")
    assert record.as_dict() == {"id": "1", "text": "once upon a time", "category": "tale"}
    assert Record.from_dict(record.as_dict()) == record
    assert prompt_and_answer(record) == ((), "once upon a time")


@pytest.mark.parametrize(
    "line",
    [
        [],
        {"messages": []},
        {"id": 1, "text": "a"},
        {"id": "1"},
        {"id": "1", "text": "a", "messages": []},
        {"id": "1", "text": "a", "extra": 1},
        {"id": "1", "messages": "a"},
        {"id": "1", "messages": ["a"]},
        {"id": "1", "messages": [{"role": "robot", "content": "a"}]},
        {"id": "1", "messages": [{"role": "user", "content": 3}]},
        {"id": "1", "messages": [{"role": "user", "content": "abc", "input_at": 9}]},
        {"id": "1", "messages": [{"role": "user", "content": "abc", "input_at": True}]},
        {"id": "1", "text": "a", "category": 4},
    ],
)
def test_a_line_that_is_no_record_is_refused(line: object) -> None:
    with pytest.raises(DataError):
        Record.from_dict(line)


def test_the_prompt_is_everything_before_the_last_answer() -> None:
    turns = (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d"))
    assert prompt_and_answer(Record("1", turns=turns)) == (turns[:3], "d")


def test_a_conversation_must_end_with_the_assistant() -> None:
    with pytest.raises(DataError, match="'9' does not end"):
        prompt_and_answer(Record("9", turns=(Turn("user", "secret"),)))


def test_repr_shows_no_text() -> None:
    record = Record.from_instruction("1", "my secret", "the secret")
    assert "secret" not in repr(record) + repr(record.turns)
    assert repr(record) == "Record('1', 2 turns, 19 characters)"


# --- The folder ---------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    rows = records(10)
    dataset = write_dataset(tmp_path / "d", rows, template="chat", fields={"instruction": "q"}, source="f.csv")
    assert list(dataset) == rows
    assert [dataset[at] for at in range(10)] == rows
    assert dataset[-1] == rows[-1]
    assert len(dataset) == 10
    assert dataset.template == "chat"
    assert dataset.categories() == {"c0": 4, "c1": 3, "c2": 3}
    with pytest.raises(IndexError):
        dataset[10]
    assert repr(dataset).endswith("10 rows, 3 categories)")


def test_the_manifest_says_what_lies_there(tmp_path: Path) -> None:
    rows = [Record.from_instruction("1", "four", "six!!!"), Record.from_instruction("2", "eleven", "no")]
    write_dataset(tmp_path / "d", rows, fields={"instruction": "q"}, source="f.csv")
    manifest = read_manifest(tmp_path / "d")
    assert manifest["rows"] == 2
    assert manifest["turns"] == 4
    assert manifest["fields"] == {"instruction": "q"}
    assert manifest["source"] == "f.csv"
    assert manifest["statistics"]["characters"] == {
        "prompt": {"min": 4, "max": 6, "sum": 10, "mean": 5.0},
        "answer": {"min": 2, "max": 6, "sum": 8, "mean": 4.0},
    }


def test_equal_records_give_equal_digests(tmp_path: Path) -> None:
    first, second = (write_dataset(tmp_path / name, records(5)) for name in "ab")
    assert first.sha256 == second.sha256
    assert (tmp_path / "a/dataset.json").read_bytes() == (tmp_path / "b/dataset.json").read_bytes()


def test_an_empty_dataset_is_possible(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d", [])
    assert len(dataset) == 0
    assert list(dataset) == []
    assert dataset.manifest["statistics"]["characters"]["answer"]["mean"] == 0


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), DatasetWriter(tmp_path / "d") as writer:
        writer.add(records(1)[0])
        assert not (tmp_path / "d").exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_what_a_crash_left_is_swept_away(tmp_path: Path) -> None:
    (tmp_path / "d.partial").mkdir()
    (tmp_path / "d.partial/rubbish").write_text("x")
    write_dataset(tmp_path / "d", records(1))
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["dataset.json", "records.jsonl"]


def test_a_dataset_is_never_written_over(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", records(1))
    with pytest.raises(DataError, match="already there"):
        write_dataset(tmp_path / "d", records(2))
    assert len(Dataset(tmp_path / "d")) == 1


def test_a_writer_works_inside_with_only(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="inside `with`"):
        DatasetWriter(tmp_path / "d").add(records(1)[0])


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", records(3))
    path = tmp_path / "d/records.jsonl"
    path.write_bytes(path.read_bytes().replace(b"answer 1", b"answer 9"))
    with pytest.raises(DataError, match="digest differs"):
        Dataset(tmp_path / "d")


def test_what_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a dataset folder"):
        Dataset(tmp_path)
    (tmp_path / "dataset.json").write_text('{"schema": "other/9"}')
    with pytest.raises(DataError, match="schema"):
        Dataset(tmp_path)
    write_dataset(tmp_path / "d", records(1))
    (tmp_path / "d/records.jsonl").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        Dataset(tmp_path / "d")


def test_rows_and_manifest_must_agree(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", records(2))
    manifest = read_manifest(tmp_path / "d")
    (tmp_path / "d/dataset.json").write_text(json.dumps({**manifest, "rows": 3}))
    with pytest.raises(DataError, match="2 rows lie there"):
        Dataset(tmp_path / "d")


def test_line_separators_inside_a_text_do_not_split_a_row(tmp_path: Path) -> None:
    text = "one\u2028two\x85three\rfour\nfive"
    dataset = write_dataset(tmp_path / "d", [Record("1", text=text), Record("2", text="x")])
    assert [record.text for record in dataset] == [text, "x"]
    assert dataset[1].text == "x"


def test_an_open_dataset_needs_little_memory(tmp_path: Path) -> None:
    import tracemalloc

    count = 2000
    write_dataset(tmp_path / "d", (Record(str(at), text="x" * 1000) for at in range(count)))
    tracemalloc.start()
    dataset = Dataset(tmp_path / "d")
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(dataset) == count
    assert held < 64 * 1024, "two thousand rows of a kilobyte are held as offsets only"
