"""From a finished job's folder to a pipeline that uses what it trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fate_llm.core.errors import ConfigurationError
from fate_llm.pipelines import check
from fate_llm.runtime.job import JobResult
from fate_llm.runtime.prediction import prediction_pipeline
from tests.runtime.conftest import MakeJob
from tests.runtime.toys import toy_pipeline


def trained(make_job: MakeJob, data: dict[str, Any]) -> JobResult:
    result = make_job(data).run()
    assert result.status == "success"
    return result


def derived(result: JobResult) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(prediction_pipeline(result.folder)[0])
    return found


def test_a_trainer_becomes_what_its_component_names_with_each_party_s_own_model(make_job: MakeJob) -> None:
    result = trained(make_job, toy_pipeline())
    found = derived(result)
    assert found["name"] == "toys-predict"
    assert found["tasks"]["add"] == {
        "component": "teller",
        "inputs": {"data": "words.dataset"},
        "params": {"tone": "loud"},
    }
    for party in ("a", "b", "c"):
        path = found["overrides"][party]["add"]["inputs"]["model"]["path"]
        assert path == result.outputs[party]["add"]["model"]
    check(found)


def test_it_runs_and_uses_the_model(make_job: MakeJob) -> None:
    found = derived(trained(make_job, toy_pipeline()))
    result = make_job(found, job_id="job-2").run()
    assert result.status == "success"
    assert Path(result.outputs["b"]["add"]["answers"]).read_text() == "loud: 9.0 ab ab"


def test_paths_are_made_absolute_because_the_new_file_may_lie_anywhere(make_job: MakeJob, tmp_path: Path) -> None:
    (tmp_path / "word.txt").write_text("xyz")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "b.txt").write_text("b")
    data = toy_pipeline()
    data["tasks"]["words"]["params"]["path"] = "word.txt"
    data["overrides"]["b"] = {"words": {"params": {"path": "data/b.txt"}}}
    found = derived(trained(make_job, data))
    assert found["tasks"]["words"]["params"]["path"] == str(tmp_path / "word.txt")
    assert found["overrides"]["b"]["words"]["params"]["path"] == str(tmp_path / "data" / "b.txt")
    assert found["tasks"]["words"]["params"]["word"] == "ab", "only what names a path is changed"


def test_what_looks_like_a_variable_stays_text(make_job: MakeJob) -> None:
    data = toy_pipeline()
    data["tasks"]["words"]["params"]["word"] = "${HOME}"
    text, _ = prediction_pipeline(trained(make_job, data).folder)
    assert "$${HOME}" in text


def test_tasks_for_training_only_are_named(make_job: MakeJob) -> None:
    data = toy_pipeline()
    data["tasks"]["warm"] = {"component": "words", "stage": "train"}
    _, left_out = prediction_pipeline(trained(make_job, data).folder)
    assert left_out == ("warm",)


@pytest.mark.parametrize("content", [None, "no json", "[]", "{}", '{"status": "success"}'])
def test_another_folder_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ConfigurationError, match="not the folder of a finished job"):
        prediction_pipeline(tmp_path)


def test_so_is_a_job_that_did_not_succeed(make_job: MakeJob) -> None:
    data = toy_pipeline(bad={"component": "breaker", "params": {"at": "a"}})
    result = make_job(data).run()
    with pytest.raises(ConfigurationError, match="ended with failed"):
        prediction_pipeline(result.folder)


def test_so_is_one_that_is_still_running(make_job: MakeJob) -> None:
    result = trained(make_job, toy_pipeline())
    manifest = json.loads((result.folder / "manifest.json").read_text())
    manifest = {key: manifest[key] for key in ("job_id", "base")} | {"status": "running"}
    (result.folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigurationError, match="not the folder of a finished job"):
        prediction_pipeline(result.folder)
