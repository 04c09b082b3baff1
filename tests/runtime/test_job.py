"""A job from a checked pipeline to its result."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from fate_llm.core.canonical import digest, digest_file
from fate_llm.core.errors import ConfigurationError, DataError, JobCancelled, PolicyError
from fate_llm.pipelines import check, load_pipeline
from fate_llm.runtime.events import Event
from fate_llm.runtime.job import JobResult, Submission, job_name
from fate_llm.runtime.local import LocalJob
from fate_llm.runtime.submit import prepare, submit_pipeline
from tests.runtime.conftest import MakeJob
from tests.runtime.toys import Breaker, toy_pipeline


class Elsewhere:
    """A runtime that is not the local one."""

    name = "processes"

    def attempt(self, order: Any) -> Any:
        raise AssertionError("nothing may start")


def manifest(result: JobResult) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((result.folder / "manifest.json").read_text())
    return found


def failing(*, error: str = "RoundTimeout", times: int = 1, retries: int = 0) -> dict[str, Any]:
    data = toy_pipeline(
        words={"component": "words"},
        bad={"component": "breaker", "params": {"at": "b", "error": error, "times": times}},
    )
    data["job"]["retries"] = retries
    return data


def test_a_name_sorts_by_time() -> None:
    assert job_name("office", now=0.0, unique="ab12") == "office-19700101-000000-ab12"


class TestFolder:
    def test_it_holds_everything(self, make_job: MakeJob) -> None:
        job = make_job(toy_pipeline())
        result = job.run()
        files = {path.relative_to(result.folder).as_posix() for path in result.folder.rglob("*") if path.is_file()}
        assert files >= {
            "manifest.json",
            "pipeline.yaml",
            "metrics.json",
            "parties/a/log.txt",
            "parties/a/events.jsonl",
            "parties/a/metrics.jsonl",
            "parties/a/words/dataset",
            "parties/z/log.txt",
        }
        assert result.folder == job.folder.path

    def test_the_manifest_says_what_ran_and_what_came_out(self, make_job: MakeJob, tmp_path: Path) -> None:
        spec = check(toy_pipeline())
        result = make_job(toy_pipeline()).run()
        found = manifest(result)
        assert (found["job_id"], found["status"], found["seed"]) == ("job-1", "success", 5)
        assert found["pipeline"] == digest(spec.to_data())
        assert found["base"] == str(tmp_path)
        assert found["started"] < found["ended"]
        assert {"numpy", "pydantic"} <= found["versions"].keys()
        assert found["error"] is None
        assert found["errors"] == {}
        path = Path(found["outputs"]["b"]["words"]["dataset"])
        assert found["digests"]["b/words/dataset"] == digest_file(path)
        assert len(found["digests"]) == sum(len(o) for tasks in found["outputs"].values() for o in tasks.values())
        assert found["traffic"]["a"]["z"]["sent"] > 0

    def test_the_pipeline_in_it_says_the_same(self, make_job: MakeJob) -> None:
        data = toy_pipeline()
        data["tasks"]["words"]["params"]["word"] = "a ${HOME} that is no variable"
        result = make_job(data).run()
        assert load_pipeline(result.folder / "pipeline.yaml") == check(data)

    def test_a_job_never_writes_into_another_one_s_folder(self, make_job: MakeJob) -> None:
        make_job(toy_pipeline())
        with pytest.raises(ConfigurationError, match="cannot be made"):
            make_job(toy_pipeline())

    def test_events_are_logged_by_party_without_steps(self, make_job: MakeJob) -> None:
        result = make_job(toy_pipeline()).run()
        lines = (result.folder / "parties" / "b" / "events.jsonl").read_text().splitlines()
        assert [json.loads(line)["event"] for line in lines][-1] == "party_finished"
        assert {json.loads(line)["party"] for line in lines} == {"b"}


class TestResult:
    def test_metrics_are_the_guest_s(self, make_job: MakeJob) -> None:
        result = make_job(toy_pipeline()).run()
        assert result.metrics["add"]["sum"] == 9.0
        assert json.loads((result.folder / "metrics.json").read_text()) == result.metrics
        assert result.raise_for_status() is result

    def test_a_task_that_the_guest_does_not_run_has_those_of_the_first_party_that_does(self, make_job: MakeJob) -> None:
        data = toy_pipeline()
        data["tasks"]["add"]["parties"] = ["b", "c"]
        result = make_job(data).run()
        assert "add" not in result.outputs["a"]
        assert result.metrics["add"]["sum"] == 7.0

    def test_the_document_is_that_of_submit(self, make_job: MakeJob) -> None:
        document = make_job(toy_pipeline()).run().as_dict()
        assert list(document) == ["job_id", "status", "outputs", "metrics"]
        json.dumps(document)

    def test_a_failure_is_in_the_document_and_can_be_raised(self, make_job: MakeJob) -> None:
        result = make_job(failing(error="DataError")).run()
        assert result.as_dict()["error"]["code"] == "data_invalid"
        assert manifest(result)["errors"]["b"]["code"] == "data_invalid"
        with pytest.raises(DataError):
            result.raise_for_status()

    def test_rows_and_rounds_are_tables(self, make_job: MakeJob) -> None:
        result = make_job(toy_pipeline()).run()
        assert result.table() == result.table("add") == [{"label": "toy", "loss": 9.0}]
        assert [row["round"] for row in result.rounds()] == [1, 2]
        assert set(result.party_rounds("add")) == {"a", "b", "c"}
        with pytest.raises(ConfigurationError, match=r"\['add'\]"):
            result.table("evaluate")

    def test_a_notebook_shows_it(self, make_job: MakeJob) -> None:
        result = make_job(toy_pipeline()).run()
        assert "<b>job-1</b>" in result._repr_html_()
        assert "success" in result._repr_html_()

    def test_losses_are_plotted_by_round_and_party(self, make_job: MakeJob) -> None:
        pytest.importorskip("matplotlib")
        figure = make_job(toy_pipeline()).run().plot()
        assert [line.get_label() for line in figure.axes[0].lines] == ["add, a", "add, b", "add, c"]

    def test_without_matplotlib_the_extra_is_named(self, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
        result = make_job(toy_pipeline()).run()
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ConfigurationError, match="matplotlib") as caught:
            result.plot()
        assert "fate_llm[eval]" in caught.value.hint


class TestRetries:
    def test_what_failed_is_tried_again_and_what_all_finished_is_kept(self, make_job: MakeJob) -> None:
        events: list[Event] = []
        result = make_job(failing(retries=2), events.append).run()
        assert result.status == "success"
        started = [event.task for event in events if event.kind == "task_started" and event.party == "a"]
        assert started == ["words", "bad", "bad"]
        retries = [event.fields for event in events if event.kind == "retry"]
        assert [fields["attempt"] for fields in retries] == [2]

    def test_they_are_counted(self, make_job: MakeJob) -> None:
        result = make_job(failing(times=99, retries=2)).run()
        assert result.status == "failed"
        assert Breaker.attempts == {"bad": 3}

    def test_a_wrong_file_is_not_tried_again(self, make_job: MakeJob) -> None:
        result = make_job(failing(error="DataError", retries=5)).run()
        assert result.status == "failed"
        assert Breaker.attempts == {"bad": 1}

    def test_nor_is_a_job_that_was_stopped(self, make_job: MakeJob) -> None:
        job: Submission

        def watch(event: Event) -> None:
            if event.kind == "party_failed":
                job.cancel("enough of it")

        job = make_job(failing(times=99, retries=5), watch)
        result = job.run()
        assert Breaker.attempts == {"bad": 1}
        assert result.status in ("failed", "cancelled")


class TestCancel:
    def test_before_it_runs(self, make_job: MakeJob) -> None:
        job = make_job(toy_pipeline())
        job.cancel("changed my mind")
        result = job.run()
        assert result.status == "cancelled"
        assert isinstance(result.error, JobCancelled)
        assert manifest(result)["status"] == "cancelled"

    def test_while_it_runs(self, make_job: MakeJob) -> None:
        job: Submission

        def watch(event: Event) -> None:
            if event.kind == "note":
                job.cancel("enough")

        job = make_job(toy_pipeline(words={"component": "words"}, wait={"component": "waiter"}), watch)
        result = job.run()
        assert result.status == "cancelled"
        assert result.error is not None
        assert result.error.exit_code == 130
        assert set(result.outputs["a"]) == {"words"}, "what was finished stays"

    def test_a_second_ctrl_c_waits_for_nobody_and_is_noted(
        self, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(self: LocalJob) -> None:
            original(self)
            raise KeyboardInterrupt

        original = LocalJob.run
        monkeypatch.setattr(LocalJob, "run", interrupted)
        job = make_job(toy_pipeline())
        with pytest.raises(KeyboardInterrupt):
            job.run()
        assert json.loads((job.folder.path / "manifest.json").read_text())["status"] == "cancelled"


def test_an_experiment_runs_here_and_nowhere_else(tmp_path: Path) -> None:
    data = {**toy_pipeline(), "experiment": True}
    with pytest.raises(PolicyError):
        Submission(
            check(data), job_id="j", base=tmp_path, workdir=tmp_path / "jobs", now=lambda: 0.0, runtime=Elsewhere()
        )
    assert not (tmp_path / "jobs").exists()


def test_the_door_gives_every_job_a_name_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = (prepare(check(toy_pipeline()), base=Path()) for _ in range(2))
    assert one.job_id != two.job_id
    assert re.fullmatch(r"toys-\d{8}-\d{6}-[0-9a-f]+", one.job_id)
    assert one.folder.path == tmp_path / "jobs" / one.job_id


def test_the_builder_submits_through_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fate_llm

    monkeypatch.chdir(tmp_path)
    pipeline = fate_llm.Pipeline("toys", guest="a", hosts=["b"], seed=3)
    words = pipeline.task("words", "words", word="abc")
    pipeline.task("add", "adder", inputs={"data": words.dataset})
    result = pipeline.submit()
    assert isinstance(result, fate_llm.JobResult)
    assert result.metrics["add"]["sum"] == 6.0
    assert submit_pipeline(pipeline, workdir=tmp_path / "other").folder.parent == tmp_path / "other"
