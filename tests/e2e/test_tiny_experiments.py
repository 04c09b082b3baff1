"""The comparison of an experiment, predictions with what was trained, the Python builder, and the plan's bytes."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import fate_llm
from fate_llm.cli.main import main
from fate_llm.pipelines import load_pipeline, make_plan

pytestmark = pytest.mark.slow
Write = Callable[..., Path]


def run_cli(*arguments: str, exit_code: int = 0) -> dict[str, Any]:
    done = CliRunner().invoke(main, [*arguments, "--json"])
    assert done.exit_code == exit_code, done.output
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@pytest.fixture
def experiment(pipeline: dict[str, Any]) -> dict[str, Any]:
    """The shape of compare.yaml: federated, one party alone, pooled data."""
    tasks = pipeline["tasks"]
    training = tasks["tune"]["params"] | {"evaluate_every": 0}
    tasks["tune"] = {"component": "homo_llm_trainer", "inputs": {"train": "split.train"}, "params": training}
    tasks["pool"] = {"component": "pool", "inputs": {"data": "split.train"}}
    tasks["pooled"] = copy.deepcopy(tasks["tune"]) | {"inputs": {"train": "pool.dataset"}, "parties": ["bank-a"]}
    tasks["alone_b"] = copy.deepcopy(tasks["tune"]) | {"parties": ["bank-b"]}
    tasks["evaluate"] = {
        "component": "evaluator",
        "inputs": {
            "model": ["tune.model", "alone_b.model", "pooled.model"],
            "data": "split.test",
            "history": ["tune.metrics"],
        },
        "params": {
            "max_new_tokens": 3,
            "share_models": True,
            "labels": {"alone_b": "bank-b alone", "tune": "together"},
        },
    }
    pipeline["experiment"] = True
    return pipeline


def test_an_experiment_scores_every_model_on_the_union(
    experiment: dict[str, Any], write_pipeline: Write, tmp_path: Path
) -> None:
    done = run_cli("submit", str(write_pipeline(experiment)), "--workdir", str(tmp_path / "jobs"))

    rows = done["metrics"]["evaluate"]["models"]
    assert [row["model"] for row in rows] == ["base", "alone_b", "tune", "pooled"], "base, then the labels' order"
    assert [row["label"] for row in rows] == ["base", "bank-b alone", "together", "pooled"]
    assert {row["records"] for row in rows} == {15}
    assert "model" not in done["outputs"]["bank-c"].get("alone_b", {})
    for party in ("bank-a", "bank-b", "bank-c"):
        report = Path(done["outputs"][party]["evaluate"]["report"])
        found = json.loads((report / "report.json").read_text())
        assert found["models"] == rows, "every party has the same table"
        assert all(set(sample["answers"]) == {"base", "alone_b", "tune", "pooled"} for sample in found["samples"])
        assert "| bank-b alone |" in (report / "report.md").read_text()
    assert (Path(done["outputs"]["bank-a"]["evaluate"]["report"]) / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_the_pooled_model_saw_all_records(experiment: dict[str, Any], write_pipeline: Write, tmp_path: Path) -> None:
    del experiment["tasks"]["evaluate"], experiment["tasks"]["tune"], experiment["tasks"]["alone_b"]
    done = run_cli("submit", str(write_pipeline(experiment)), "--workdir", str(tmp_path / "jobs"))
    pooled = json.loads((Path(done["outputs"]["bank-a"]["pool"]["dataset"]) / "dataset.json").read_text())
    own = [
        json.loads((Path(done["outputs"][party]["split"]["train"]) / "dataset.json").read_text())["rows"]
        for party in ("bank-a", "bank-b", "bank-c")
    ]
    assert pooled["rows"] == sum(own) == 45


def test_without_experiment_it_is_refused(experiment: dict[str, Any], write_pipeline: Write) -> None:
    experiment["experiment"] = False
    found = run_cli("validate", str(write_pipeline(experiment)), exit_code=2)
    assert len(found["errors"]) == 2, found
    assert all("experiment" in json.dumps(fault) for fault in found["errors"])


class TestPrediction:
    def test_a_trained_job_becomes_a_prediction_pipeline(
        self, pipeline: dict[str, Any], write_pipeline: Write, tmp_path: Path
    ) -> None:
        given = pipeline["tasks"]["tune"]["params"]["model"]
        given["path"] = os.path.relpath(given["path"], tmp_path)  # to be found from the new pipeline's folder too
        done = run_cli("submit", str(write_pipeline(pipeline)), "--workdir", str(tmp_path / "jobs"))
        target = tmp_path / "elsewhere" / "predict.yaml"
        target.parent.mkdir()
        derived = run_cli("predict", str(tmp_path / "jobs" / done["job_id"]), "--output", str(target))

        assert "evaluate" in derived["left_out"]
        assert "split" not in derived["pipeline"]
        (tmp_path / "new.jsonl").write_text('{"question": "banka 1?", "answer": ""}\n{"question": "x?"}\n')
        sets = ["--set", f"tasks.data.params.path={tmp_path / 'new.jsonl'}"]
        answered = run_cli("submit", str(target), "--workdir", str(tmp_path / "predictions"), *sets)

        answers = Path(answered["outputs"]["bank-a"]["tune"]["answers"]) / "answers.jsonl"
        assert [set(json.loads(line)) for line in answers.read_text().splitlines()] == [{"id", "answer"}] * 2

    def test_a_failed_job_cannot_predict(self, pipeline: dict[str, Any], write_pipeline: Write, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").unlink()
        done = run_cli("submit", str(write_pipeline(pipeline)), "--workdir", str(tmp_path / "jobs"), exit_code=2)
        found = run_cli("predict", str(tmp_path / "jobs" / done["job_id"]), exit_code=2)
        assert "failed" in found["errors"][0]["message"]


def test_the_builder_runs_what_the_file_says(
    pipeline: dict[str, Any], write_pipeline: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = fate_llm.Pipeline.from_yaml(write_pipeline(pipeline))
    result = built.submit(workdir=tmp_path / "jobs").raise_for_status()

    assert result.status == "success"
    assert [row["model"] for row in result.table()] == ["base", "tune"]
    assert [row["round"] for row in result.rounds()] == [0, 1, 2]
    assert set(result.party_rounds("tune")) == {"bank-a", "bank-b", "bank-c"}
    assert len(result.plot().axes[0].lines) == 3, "one line for each party"
    assert result.job_id in result._repr_html_()


def test_the_plan_tells_bytes_and_they_come_true(
    pipeline: dict[str, Any], write_pipeline: Write, tmp_path: Path
) -> None:
    """Within 2 % where updates weigh more than greetings: a rank that makes them some 100 kB."""
    pipeline["tasks"]["tune"]["params"]["peft"] = {"r": 64, "target_modules": ["q_proj", "v_proj", "gate_proj"]}
    path = write_pipeline(pipeline)
    planned = make_plan(load_pipeline(path, (), os.environ), base=tmp_path).as_dict()["parties"]
    done = run_cli("submit", str(path), "--workdir", str(tmp_path / "jobs"))
    manifest = json.loads((tmp_path / "jobs" / done["job_id"] / "manifest.json").read_text())
    for party, peers in manifest["traffic"].items():
        sent = sum(peer["sent_bytes"] for peer in peers.values())
        assert planned[party]["bytes_sent"] == pytest.approx(sent, rel=0.02), party
