from __future__ import annotations

import json
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

import fate_llm.pipelines.data as data
from fate_llm.pipelines.data.make_demo_data import (
    BANKS,
    MOST_SIMILAR,
    ROWS_PER_TOPIC,
    main,
    make,
    similarity,
)
from tests.components.real_model import real_model_folder

FOLDER = Path(next(iter(data.__path__)))


def rows_of(bank: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (FOLDER / f"{bank}.jsonl").read_text(encoding="utf-8").splitlines()]


ALL = {bank: rows_of(bank) for bank in BANKS}


@pytest.mark.parametrize("bank", BANKS)
def test_the_files_are_what_the_script_makes(bank: str) -> None:
    assert (FOLDER / f"{bank}.jsonl").read_bytes() == make(bank).encode("utf-8")


def test_the_script_writes_every_bank(tmp_path: Path) -> None:
    main(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{bank}.jsonl" for bank in BANKS]


@pytest.mark.parametrize("bank", BANKS)
def test_every_category_has_its_rows_and_one_answer(bank: str) -> None:
    rows = ALL[bank]
    assert all(row.keys() == {"question", "answer", "category"} for row in rows)
    assert Counter(row["category"] for row in rows) == dict.fromkeys(BANKS[bank], ROWS_PER_TOPIC)
    for category, topic in BANKS[bank].items():
        assert {row["answer"] for row in rows if row["category"] == category} == {topic.answer}


def test_no_bank_knows_what_another_knows() -> None:
    for one, two in combinations(BANKS, 2):
        assert not BANKS[one].keys() & BANKS[two].keys()
        assert not {t.answer for t in BANKS[one].values()} & {t.answer for t in BANKS[two].values()}


def test_the_question_does_not_give_the_answer_away() -> None:
    for rows in ALL.values():
        for row in rows:
            assert row["answer"].split(".")[0].removeprefix("Desk: ").lower() not in row["question"].lower()


def test_no_question_comes_twice_nor_nearly_so() -> None:
    questions = [row["question"] for rows in ALL.values() for row in rows]
    assert len(set(questions)) == len(questions) == 450
    for rows in ALL.values():
        for category in {row["category"] for row in rows}:
            same = [row["question"] for row in rows if row["category"] == category]
            assert max(similarity(one, two) for one, two in combinations(same, 2)) < MOST_SIMILAR


def test_questions_are_sentences_without_open_places() -> None:
    for rows in ALL.values():
        for row in rows:
            text = row["question"]
            assert "{" not in text and "  " not in text and text[0].isupper()
            assert text[-1] in ".?"
            assert len(text.split()) <= 30


def test_similarity() -> None:
    assert similarity("a b c", "A, b c.") == 1.0
    assert similarity("a b", "c d") == 0.0
    assert similarity("a b", "b c") == pytest.approx(1 / 3)


@pytest.mark.slow
def test_examples_are_short_in_the_demo_models_tokens() -> None:
    from transformers import AutoTokenizer

    from fate_llm.components.llm.records import Record
    from fate_llm.components.llm.templates import Formatter

    tokenizer = AutoTokenizer.from_pretrained(real_model_folder())
    formatter = Formatter(tokenizer)
    for rows in ALL.values():
        records = [Record.from_instruction("1", row["question"], row["answer"]) for row in rows]
        assert max(formatter.length(record) for record in records) <= 55
