"""`predict`: from a trained job to the pipeline that uses what it trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import Run, Write, document, only_error
from tests.runtime.toys import toy_pipeline

pytestmark = pytest.mark.usefixtures("with_toys")


@pytest.fixture
def job(run: Run, write: Write, tmp_path: Path) -> Path:
    data = toy_pipeline()
    data["tasks"]["warm"] = {"component": "words", "stage": "train"}
    done = document(run("submit", write(data), "--json", "--quiet"))
    return tmp_path / "jobs" / done["job_id"]


def test_the_pipeline_is_printed(run: Run, job: Path) -> None:
    found = yaml.safe_load(run("predict", job).stdout)
    assert found["tasks"]["add"]["component"] == "teller"
    assert "warm" not in found["tasks"]


def test_or_written_to_a_file_that_can_be_submitted(run: Run, job: Path, tmp_path: Path) -> None:
    done = run("predict", job, "--output", tmp_path / "predict.yaml")
    assert done.stdout == f"written to {tmp_path / 'predict.yaml'}; left out: warm\n"
    found = document(
        run("submit", tmp_path / "predict.yaml", "--json", "--quiet", "--set", "tasks.words.params.word=q")
    )
    assert Path(found["outputs"]["c"]["add"]["answers"]).read_text() == "loud: 9.0 q"


def test_with_json_it_is_in_the_document(run: Run, job: Path, tmp_path: Path) -> None:
    found = document(run("predict", job, "--json"))
    assert list(found) == ["pipeline", "left_out", "file"]
    assert (found["left_out"], found["file"]) == (["warm"], None)
    found = document(run("predict", job, "--json", "-o", tmp_path / "p.yaml"))
    assert found["file"] == str(tmp_path / "p.yaml")
    assert (tmp_path / "p.yaml").read_text() == found["pipeline"]


def test_a_folder_that_is_no_job_is_refused(run: Run, tmp_path: Path) -> None:
    assert "not the folder of a finished job" in only_error(run("predict", tmp_path, "--json", exit_code=2))["message"]


def test_a_place_that_cannot_be_written_is_an_error_not_a_traceback(run: Run, job: Path, tmp_path: Path) -> None:
    error = only_error(run("predict", job, "--json", "-o", tmp_path / "no" / "p.yaml", exit_code=2))
    assert "cannot be written" in error["message"]
