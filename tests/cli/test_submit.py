"""`submit`: progress while it runs, one document at the end, and a clean stop."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.conftest import Run, Write, document, environment, only_error
from tests.runtime.toys import toy_pipeline

SIGNALS_AS_USUAL = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"


def breaking(error: str = "DataError", **job: Any) -> dict[str, Any]:
    data = toy_pipeline(bad={"component": "breaker", "params": {"at": "b", "error": error}})
    data["job"] |= job
    return data


@pytest.mark.usefixtures("with_toys")
class TestRun:
    def test_people_see_progress_and_result(self, run: Run, write: Write, tmp_path: Path) -> None:
        text = run("submit", write(toy_pipeline())).stdout
        first, *lines = text.splitlines()
        assert first.startswith("job toys-")
        assert str(tmp_path / "jobs" / "toys-") in first
        assert any("task started: component adder" in line and " z " in line for line in lines)
        assert any("task finished" in line for line in lines)
        assert "add: held-out records of all parties" in text
        assert "model of add: " in text
        assert lines[-1].startswith("success: ")

    def test_quiet_shows_the_result_only(self, run: Run, write: Write) -> None:
        text = run("submit", write(toy_pipeline()), "--quiet").stdout
        assert "task started" not in text
        assert "success: " in text

    def test_with_json_stdout_is_one_document_and_progress_is_on_stderr(self, run: Run, write: Write) -> None:
        done = run("submit", write(toy_pipeline()), "--json")
        found = document(done)
        assert list(found) == ["job_id", "status", "outputs", "metrics"]
        assert found["status"] == "success"
        assert Path(found["outputs"]["b"]["words"]["dataset"]).read_text() == "ab ab"
        assert found["metrics"]["add"]["sum"] == 9.0
        assert "task started" in done.stderr
        assert run("submit", write(toy_pipeline()), "--json", "--quiet").stderr == ""

    def test_values_of_the_command_line_count(self, run: Run, write: Write) -> None:
        arguments = ["--set", "tasks.words.params.word=abc", "--set", "overrides.b.words.params.times=1"]
        found = document(run("submit", write(toy_pipeline()), "--json", "--quiet", *arguments))
        assert found["metrics"]["add"]["sum"] == 9.0

    def test_the_folder_can_be_named(self, run: Run, write: Write, tmp_path: Path) -> None:
        found = document(run("submit", write(toy_pipeline()), "--json", "--workdir", "here/there"))
        folder = tmp_path / "here" / "there" / found["job_id"]
        assert json.loads((folder / "manifest.json").read_text())["status"] == "success"

    def test_paths_start_at_the_pipeline_s_folder(self, run: Run, tmp_path: Path) -> None:
        folder = tmp_path / "elsewhere"
        folder.mkdir()
        (folder / "word.txt").write_text("xyz")
        data = toy_pipeline()
        data["tasks"]["words"]["params"]["path"] = "word.txt"
        (folder / "p.yaml").write_text(yaml.safe_dump(data))
        assert document(run("submit", folder / "p.yaml", "--json"))["metrics"]["add"]["sum"] == 13.0


@pytest.mark.usefixtures("with_toys")
class TestFailure:
    @pytest.mark.parametrize(
        ("error", "code", "exit_code"),
        [
            ("DataError", "data_invalid", 2),
            ("PolicyError", "policy_refused", 3),
            ("PeerViolation", "peer_violation", 4),
            ("ProtectionError", "protection_refused", 5),
            ("ValueError", "internal", 70),
            ("JobCancelled", "cancelled", 130),
        ],
    )
    def test_the_exit_code_says_whose_fault_it_was(
        self, error: str, code: str, exit_code: int, run: Run, write: Write
    ) -> None:
        found = document(run("submit", write(breaking(error)), "--json", "--quiet", exit_code=exit_code))
        assert found["status"] == ("cancelled" if error == "JobCancelled" else "failed")
        assert found["error"]["code"] == code

    def test_people_see_who_failed_and_what_to_do(self, run: Run, write: Write) -> None:
        text = run("submit", write(breaking()), exit_code=2).stdout
        assert "failed [data_invalid]: broken at b" in text
        assert "[data_invalid] broken at b" in text.splitlines()
        assert "hint: " in text

    def test_a_wrong_pipeline_makes_no_folder(self, run: Run, write: Write, tmp_path: Path) -> None:
        found = document(run("submit", write("version: 1\n"), "--json", exit_code=2))
        assert found["ok"] is False
        assert not (tmp_path / "jobs").exists()

    def test_a_folder_that_cannot_be_made_is_an_error(self, run: Run, write: Write, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        arguments = ["--json", "--workdir", str(tmp_path / "file" / "jobs")]
        assert "cannot be made" in only_error(run("submit", write(toy_pipeline()), *arguments, exit_code=2))["message"]

    def test_what_is_tried_again_is_said(self, run: Run, write: Write) -> None:
        text = run("submit", write(breaking("RoundTimeout", retries=1)), exit_code=4).stdout
        assert "retry: attempt 2" in text


class TestCtrlC:
    """In a process of its own, with the toys as an installed package."""

    @pytest.fixture
    def package(self, tmp_path: Path) -> Path:
        folder = tmp_path / "site"
        info = folder / "toy_components-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-components\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(
            "[fate_llm.components]\nwords = tests.runtime.toys:Words\nwaiter = tests.runtime.toys:Waiter\n"
        )
        return folder

    @pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
    def test_it_stops_all_parties(self, as_json: bool, package: Path, write: Write, tmp_path: Path) -> None:
        path = write(toy_pipeline(words={"component": "words"}, wait={"component": "waiter"}))
        script = SIGNALS_AS_USUAL + "from fate_llm.cli.main import main\nmain(sys.argv[1:])\n"
        arguments = ["submit", str(path), "--workdir", str(tmp_path / "jobs"), *(["--json"] if as_json else [])]
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", script, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(package),
        )
        # Given a job in which every data owner waits for what never comes
        progress = process.stderr if as_json else process.stdout
        assert progress is not None
        waiting = list(itertools.islice((line for line in progress if line.rstrip().endswith("waiting")), 3))
        assert len(waiting) == 3, process.communicate()
        # When somebody presses Ctrl-C
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        # Then the job ends as cancelled, with nothing left and no traceback
        assert process.returncode == 130, (out, err)
        assert "Traceback" not in out + err
        (folder,) = (tmp_path / "jobs").iterdir()
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["status"] == "cancelled"
        assert "Ctrl-C" in manifest["error"]["message"]
        assert {party: sorted(tasks) for party, tasks in manifest["outputs"].items()} == {
            "a": ["words"],
            "b": ["words"],
            "c": ["words"],
            "z": [],
        }
        if as_json:
            assert json.loads(out)["status"] == "cancelled"
        else:
            assert "cancelled: " in out
