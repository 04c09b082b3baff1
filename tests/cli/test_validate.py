"""`validate`: all faults at once, each with its place and what is valid."""

from __future__ import annotations

import sys

import pytest

from tests.cli.conftest import Run, Write, document, only_error

FIVE = """\
version: 1
name: five
parties: {guest: a, hosts: [b], arbiter: z}
tasks:
  data:
    component: redaer
    params: {path: a.jsonl}
  split:
    component: splitter
    inputs: {data: dta.dataset}
    params: {test: 2.0}
  tune:
    component: homo_llm_trainer
    inputs: {train: split.tarin}
    params: {model: {package: m}, local_steps: 1, aggregator: fedvag}
"""


def test_five_faults_are_five_messages_with_place_and_hint(run: Run, write: Write) -> None:
    path = write(FIVE)
    found = document(run("validate", path, "--json", exit_code=2))
    assert list(found) == ["ok", "errors"]
    assert found["ok"] is False
    assert all(list(error) == ["code", "file", "line", "path", "message", "hint"] for error in found["errors"])
    assert {error["file"] for error in found["errors"]} == {str(path)}
    shown = [(error["code"], error["line"], error["path"]) for error in found["errors"]]
    assert shown == [
        ("unknown_component", 6, "tasks.data.component"),
        ("unknown_task", 10, "tasks.split.inputs.data"),
        ("invalid_value", 11, "tasks.split.params.test"),
        ("unknown_output", 14, "tasks.tune.inputs.train"),
        ("unknown_plugin", 15, "tasks.tune.params.aggregator"),
    ]
    hints = [error["hint"] for error in found["errors"]]
    assert hints[0] == "did you mean 'reader'?"
    assert hints[1] == "did you mean 'data'?"
    assert hints[3] == "did you mean 'train'?"
    assert hints[4] == "did you mean 'fedavg'?"
    assert "less than 1" in hints[2]


def test_people_get_the_same_as_lines_on_stderr(run: Run, write: Write) -> None:
    path = write(FIVE)
    done = run("validate", path, exit_code=2)
    assert done.stdout == ""
    *lines, last = done.stderr.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith(f"{path}:6: tasks.data.component: ")
    assert "did you mean 'reader'?" in lines[0]
    assert lines[0].endswith("[unknown_component]")
    assert last == "5 faults; nothing was run"


@pytest.mark.usefixtures("with_toys")
def test_a_valid_file_is_said_to_be_so(run: Run, write: Write) -> None:
    from tests.runtime.toys import toy_pipeline

    path = write(toy_pipeline())
    assert document(run("validate", path, "--json")) == {"ok": True, "errors": []}
    assert run("validate", path).stdout == f"{path}: valid; 2 tasks, parties a, b, c, z\n"


def test_a_file_that_is_not_there_is_a_fault(run: Run) -> None:
    error = only_error(run("validate", "nowhere.yaml", "--json", exit_code=2))
    assert error["code"] == "file_unreadable"
    assert error["file"] == "nowhere.yaml"
    assert "nowhere.yaml" in run("validate", "nowhere.yaml", exit_code=2).stderr


@pytest.mark.parametrize("text", ["", "a: [1", "- 1\n- 2\n", "\tx: 1", "version: 1\nversion: 1\n"])
def test_whatever_lies_there_gives_a_document(text: str, run: Run, write: Write) -> None:
    found = document(run("validate", write(text), "--json", exit_code=2))
    assert found["ok"] is False
    assert found["errors"]


@pytest.mark.usefixtures("with_toys")
def test_a_value_of_the_command_line_is_checked_too(run: Run, write: Write) -> None:
    from tests.runtime.toys import toy_pipeline

    path = write(toy_pipeline())
    assert run("validate", path, "--set", "job.seed=9", "--set", "tasks.words.params.times=3")
    error = only_error(run("validate", path, "--set", "tasks.words.params.times=99", "--json", exit_code=2))
    assert (error["code"], error["file"], error["line"]) == ("invalid_value", "--set", None)
    error = only_error(run("validate", path, "--set", "nonsense", "--json", exit_code=2))
    assert error["code"] == "set_invalid"


@pytest.mark.usefixtures("with_toys")
def test_variables_come_from_the_environment_when_listed(
    run: Run, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.runtime.toys import toy_pipeline

    data = toy_pipeline() | {"env": ["SECRET_WORD"]}
    data["tasks"]["words"]["params"]["word"] = "${SECRET_WORD}"
    monkeypatch.delenv("SECRET_WORD", raising=False)
    assert only_error(run("validate", write(data), "--json", exit_code=2))["code"] == "env_unset"
    monkeypatch.setenv("SECRET_WORD", "hush")
    assert document(run("validate", write(data), "--json"))["ok"] is True


def test_a_bug_of_ours_is_a_document_too(run: Run, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a check that falls over, When a document was asked for, Then it comes, and the story is on stderr
    pipelines = sys.modules["fate_llm.pipelines"]

    def broken(*args: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(pipelines, "load_pipeline", broken)
    done = run("validate", write("x: 1"), "--json", exit_code=70)
    assert only_error(done)["code"] == "internal"
    assert "ZeroDivisionError: oops" in only_error(done)["message"]
    assert "Traceback" in done.stderr
