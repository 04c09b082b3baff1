"""What goes wrong in a job: every party hears of it, nothing hangs, and the exit code says whose fault it is."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from fate_llm.cli.main import main
from fate_llm.components.llm.adapters import Trainable
from fate_llm.core.errors import ConfigurationError, JobCancelled, PolicyError
from fate_llm.core.values import Array, Arrays
from fate_llm.pipelines.check import load_pipeline
from fate_llm.runtime.events import Event
from fate_llm.runtime.job import Submission
from fate_llm.runtime.submit import prepare

pytestmark = pytest.mark.slow
Write = Callable[[dict[str, Any]], Path]


class Elsewhere:
    """A runtime that is not the local one."""

    name = "processes"

    def attempt(self, order: Any) -> Any:
        raise AssertionError("nothing may start")


def run_cli(*arguments: str) -> tuple[int, dict[str, Any]]:
    done = CliRunner().invoke(main, [*arguments, "--json"])
    return done.exit_code, json.loads(done.stdout)


def party_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("party-", "channel-"))]


def test_a_record_that_is_wrong_ends_the_job_at_all_parties(
    pipeline: dict[str, Any], write_pipeline: Write, tmp_path: Path
) -> None:
    (tmp_path / "b.jsonl").write_text('{"question": "q"}\n')

    code, done = run_cli("submit", str(write_pipeline(pipeline)), "--workdir", str(tmp_path / "jobs"))

    assert code == 2
    assert done["status"] == "failed"
    assert done["error"]["code"] == "data_invalid"
    assert "b.jsonl" in done["error"]["message"]
    manifest = json.loads((tmp_path / "jobs" / done["job_id"] / "manifest.json").read_text())
    assert manifest["status"] == "failed"
    assert manifest["errors"]["bank-b"]["code"] == "data_invalid"
    assert manifest["errors"]["consortium"]["code"] == "quorum_lost"
    assert "bank-b" in manifest["errors"]["consortium"]["message"]
    assert manifest["errors"]["bank-a"]["code"] == "peer_failed"
    assert not party_threads()


def test_with_a_quorum_the_others_go_on_without_a_party(
    pipeline: dict[str, Any], write_pipeline: Write, tmp_path: Path
) -> None:
    (tmp_path / "b.jsonl").write_text("no json\n")
    pipeline["job"]["quorum"] = 2

    code, done = run_cli("submit", str(write_pipeline(pipeline)), "--workdir", str(tmp_path / "jobs"))

    # The job failed at bank-b, and the others still have their adapter, of the two that contributed.
    assert code == 2
    assert done["outputs"]["bank-a"]["tune"]["model"]
    about = json.loads(Path(done["outputs"]["bank-a"]["tune"]["metrics"]).read_text())
    assert about["rounds"][-1]["contributors"] == ["bank-a", "bank-c"]


def test_models_that_differ_are_found_before_the_first_round(
    pipeline: dict[str, Any], write_pipeline: Write, tmp_path: Path
) -> None:
    pipeline["overrides"]["bank-c"]["tune"] = {"params": {"peft": {"r": 4}}}
    code, done = run_cli("submit", str(write_pipeline(pipeline)), "--workdir", str(tmp_path / "jobs"))
    assert code == 4
    assert "bank-c" in done["error"]["message"]
    assert "same peft settings" in done["error"]["hint"]


def test_a_missing_model_is_a_clear_error(pipeline: dict[str, Any], write_pipeline: Write, tmp_path: Path) -> None:
    pipeline["tasks"]["tune"]["params"]["model"] = {"path": "no/such/model"}
    code, done = run_cli("submit", str(write_pipeline(pipeline)), "--workdir", str(tmp_path / "jobs"))
    assert code == 2
    assert done["error"]["code"] == "model_invalid"
    assert "no/such/model" in done["error"]["message"]


def test_layers_that_do_not_exist_are_named(pipeline: dict[str, Any], write_pipeline: Write, tmp_path: Path) -> None:
    pipeline["tasks"]["tune"]["params"]["peft"] = {"target_modules": ["q_proi"]}
    code, done = run_cli("submit", str(write_pipeline(pipeline)), "--workdir", str(tmp_path / "jobs"))
    assert code == 2
    assert "q_proi" in done["error"]["message"]
    assert "q_proj" in done["error"]["hint"]


def test_an_update_that_is_not_finite_is_not_sent(
    pipeline: dict[str, Any], write_pipeline: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exploded(self: Trainable, state: Arrays) -> dict[str, Array]:
        return {name: np.full_like(value, np.nan) for name, value in state.items()}

    monkeypatch.setattr(Trainable, "difference", exploded)
    code, done = run_cli("submit", str(write_pipeline(pipeline)), "--workdir", str(tmp_path / "jobs"))
    assert code == 5
    assert done["error"]["code"] == "protection_refused"
    assert "not finite" in done["error"]["message"]


class TestCancel:
    def test_cancelling_while_training_stops_all_parties(
        self, pipeline: dict[str, Any], write_pipeline: Write, tmp_path: Path
    ) -> None:
        pipeline["tasks"]["tune"]["params"]["rounds"] = 1000
        job: Submission
        stopped = threading.Event()

        def watch(event: Event) -> None:
            if event.kind == "round" and not stopped.is_set():
                stopped.set()
                job.cancel("enough")

        spec = load_pipeline(write_pipeline(pipeline))
        job = prepare(spec, base=tmp_path, workdir=tmp_path / "jobs", observers=(watch,))
        result = job.run()

        assert result.status == "cancelled"
        assert isinstance(result.error, JobCancelled)
        assert result.error.exit_code == 130
        assert json.loads((job.folder.path / "manifest.json").read_text())["status"] == "cancelled"
        assert set(result.outputs["bank-a"]) == {"data", "split"}, "what was finished stays"
        assert not party_threads()


class TestRetries:
    def test_only_what_was_not_finished_is_run_again(
        self, pipeline: dict[str, Any], write_pipeline: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from fate_llm.components.llm import training
        from fate_llm.core.errors import RoundTimeout

        calls: list[str] = []
        original = training.make_trainer

        def once(*args: Any, **kwargs: Any) -> Any:
            calls.append("made")
            if len(calls) == 1:
                raise RoundTimeout("the line was bad")
            return original(*args, **kwargs)

        monkeypatch.setattr("fate_llm.components.homo_llm_trainer.make_trainer", once)
        pipeline["job"]["retries"] = 1
        started: list[str] = []

        def watch(event: Event) -> None:
            if event.kind == "task_started" and event.party == "bank-a":
                started.append(event.task)

        spec = load_pipeline(write_pipeline(pipeline))
        result = prepare(spec, base=tmp_path, workdir=tmp_path / "jobs", observers=(watch,)).run()

        assert result.status == "success"
        assert started == ["data", "split", "tune", "tune", "evaluate"]

    def test_a_wrong_file_is_not_tried_again(
        self, pipeline: dict[str, Any], write_pipeline: Write, tmp_path: Path
    ) -> None:
        (tmp_path / "a.jsonl").unlink()
        pipeline["job"]["retries"] = 3
        kinds: list[str] = []
        spec = load_pipeline(write_pipeline(pipeline))
        job = prepare(spec, base=tmp_path, workdir=tmp_path / "jobs", observers=(lambda e: kinds.append(e.kind),))
        assert isinstance(job.run().error, ConfigurationError)
        assert "retry" not in kinds


def test_an_experiment_is_refused_outside_the_local_runtime(
    pipeline: dict[str, Any], write_pipeline: Write, tmp_path: Path
) -> None:
    pipeline["experiment"] = True
    spec = load_pipeline(write_pipeline(pipeline))
    with pytest.raises(PolicyError, match="experiment"):
        Submission(spec, job_id="j", base=tmp_path, workdir=tmp_path / "jobs", now=lambda: 0.0, runtime=Elsewhere())
    assert not (tmp_path / "jobs").exists()


def test_sharing_models_needs_an_experiment(pipeline: dict[str, Any], write_pipeline: Write) -> None:
    pipeline["tasks"]["evaluate"]["params"]["share_models"] = True
    code, found = run_cli("validate", str(write_pipeline(pipeline)))
    assert code == 2
    assert [fault["path"] for fault in found["errors"]] == ["tasks.evaluate.params"] or found["errors"]
    assert "experiment" in json.dumps(found)
