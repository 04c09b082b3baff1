"""Data that a pipeline names by the party's catalogue: read as always, and its place is told to nobody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fate_llm.components.llm.modelref import ModelRef, locate
from fate_llm.components.reader import Reader, ReaderParams
from fate_llm.core.errors import DataError, ModelError
from fate_llm.core.values import Roster
from tests.components.fake_context import FakeContext, make_contexts

PLACE = "vault/customers-of-2025.jsonl"


class Catalogued(FakeContext):
    """Its catalogue has one name."""

    def resolve(self, path: str) -> Path:
        return self.folder / (PLACE if path == "catalog:loans" else path)


def read(folder: Path, **params: Any) -> Path:
    """Run the reader; where its outputs are."""
    context = make_contexts(folder, Roster("bank-a"), params=ReaderParams(path="catalog:loans", **params), task="data")
    context["bank-a"].__class__ = Catalogued
    Reader().guest(context["bank-a"])
    return folder / "outputs/bank-a/data"


def write(folder: Path, *lines: str) -> None:
    (folder / "vault").mkdir()
    (folder / PLACE).write_text("".join(f"{line}\n" for line in lines))


ROW = json.dumps({"question": "q", "answer": "a"})


def test_a_name_of_the_catalogue_is_read(tmp_path: Path) -> None:
    write(tmp_path, ROW, ROW)
    outputs = read(tmp_path)
    assert json.loads((outputs / "report/report.json").read_text())["kept"] == 2
    for path in outputs.rglob("*"):
        assert not path.is_file() or "customers" not in path.read_text()
    assert "catalog:loans" in (outputs / "report/report.md").read_text()


@pytest.mark.parametrize(
    ("lines", "params", "said"),
    [
        (None, {}, "catalog:loans does not exist"),
        ((), {}, "catalog:loans is empty"),
        (("{",), {}, "row 1"),
        ((ROW,), {"tokenizer": "catalog:loans"}, "tokenizer: catalog:loans is no folder"),
        ((ROW, '"text"'), {}, "catalog:loans, row 2"),
        ((ROW,), {"format": "dataset"}, "catalog:loans is a file"),
        ((ROW,), {"fields": {"instruction": "nothing", "output": "answer"}}, "nothing"),
        (("{", "{", "{"), {"on_fault": "skip", "max_faults": 1}, "max_faults"),
    ],
)
def test_errors_have_the_name_and_not_the_place(
    lines: tuple[str, ...] | None, params: dict[str, Any], said: str, tmp_path: Path
) -> None:
    if lines is not None:
        write(tmp_path, *lines)
    with pytest.raises(DataError) as caught:
        read(tmp_path, **params)
    text = caught.value.message + caught.value.hint
    assert said in text
    assert "customers" not in text and "vault" not in text and str(tmp_path) not in text


def test_a_model_of_the_catalogue_is_found_and_a_missing_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    ref = ModelRef(path="catalog:base")
    assert locate(ref, lambda path: tmp_path).folder == tmp_path
    with pytest.raises(ModelError) as caught:
        locate(ref, lambda path: tmp_path / "vault")
    assert "model catalog:base does not exist" in caught.value.message and "vault" not in caught.value.message
