"""What `submit` prints at the end."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fate_llm.cli.results import print_result
from fate_llm.core.errors import DataError, FateError
from fate_llm.runtime.job import JobResult

ROWS = [
    {"model": "base", "label": "base model", "records": 15, "loss": 4.5, "perplexity": 90.1234, "exact_match": 0.0},
    {"model": "tune", "label": "ours [v2]", "records": 15, "loss": 1.5, "perplexity": None, "exact_match": 0.625},
]


def shown(result: JobResult) -> str:
    stream = io.StringIO()
    print_result(result, guest="a", console=Console(file=stream, width=100, highlight=False))
    return stream.getvalue()


@pytest.fixture
def result(tmp_path: Path) -> JobResult:
    report = tmp_path / "report"
    report.mkdir()
    sample = {"question": "Who? [bold]", "reference": "Me.", "answers": {"base": "You.", "tune": "Me."}}
    (report / "report.json").write_text(json.dumps({"samples": [sample]}))
    outputs = {"a": {"tune": {"model": "/jobs/j/a/tune/model"}, "evaluate": {"report": str(report)}}, "b": {}}
    metrics: dict[str, Any] = {"tune": {"rounds": []}, "evaluate": {"models": ROWS}}
    return JobResult("job-1", "success", tmp_path / "jobs[1]" / "job-1", outputs, metrics)


def test_the_table_has_a_row_for_each_model(result: JobResult) -> None:
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown(result).splitlines() if "│" in line]
    assert lines[0] == ["base model", "4.500", "90.123", "0.0 %", "15"]
    assert lines[1] == ["ours [v2]", "1.500", "-", "62.5 %", "15"]


def test_sample_answers_are_shown_before_and_after(result: JobResult) -> None:
    text = shown(result)
    assert "question:  Who? [bold]" in text
    assert "base:      You." in text
    assert "tune:      Me." in text
    assert "expected:  Me." in text


def test_it_says_where_model_and_job_lie(result: JobResult) -> None:
    text = shown(result)
    assert "model of tune: /jobs/j/a/tune/model\n" in text
    assert f"success: {result.folder}\n" in text


def failed(tmp_path: Path, error: FateError) -> JobResult:
    return JobResult("job-1", "failed", tmp_path, {"a": {}}, {}, error)


def test_a_failure_has_code_message_and_hint(tmp_path: Path) -> None:
    text = shown(failed(tmp_path, DataError("row [3] is wrong", hint="mend it")))
    assert f"failed: {tmp_path}\n[data_invalid] row [3] is wrong\nhint: mend it\n" in text


def test_no_hint_no_line(tmp_path: Path) -> None:
    assert "hint:" not in shown(failed(tmp_path, DataError("wrong", hint="")))


def test_a_report_without_samples_is_nothing_to_show(result: JobResult, tmp_path: Path) -> None:
    (tmp_path / "report" / "report.json").write_text("{}")
    assert "question" not in shown(result)
    (tmp_path / "report" / "report.json").unlink()
    assert "question" not in shown(result)
