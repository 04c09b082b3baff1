"""Text for people, or exactly one JSON document; errors with code, hint and exit code."""

from __future__ import annotations

import json
import math
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from fate_llm.cli.output import error_document, json_option, print_json, reports_errors
from fate_llm.core.errors import DataError, FateError, Fault, PipelineInvalid, PolicyError, all_errors

FAULTS = (
    Fault("unknown_key", "p.yaml", 3, "tasks.x", "unknown key", "did you mean 'y'?"),
    Fault("cycle", None, None, "tasks", "a circle", ""),
)


def command(error: BaseException | None) -> click.Command:
    @click.command()
    @json_option
    @reports_errors
    def found(as_json: bool) -> None:
        if error is not None:
            raise error
        click.echo("fine")

    return found


def test_an_error_is_explained_on_stderr() -> None:
    done = CliRunner().invoke(command(DataError("row 3 is wrong", hint="mend it")))
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == "error [data_invalid]: row 3 is wrong\nhint: mend it\n"


def test_an_empty_hint_is_not_shown() -> None:
    done = CliRunner().invoke(command(PolicyError("no", hint="")))
    assert (done.exit_code, done.stderr) == (3, "error [policy_refused]: no\n")


def test_every_fault_of_a_pipeline_is_a_line() -> None:
    done = CliRunner().invoke(command(PipelineInvalid(FAULTS)))
    assert done.exit_code == 2
    assert done.stderr.splitlines() == [str(FAULTS[0]), str(FAULTS[1]), "2 faults; nothing was run"]


def test_with_json_it_is_one_document_on_stdout() -> None:
    done = CliRunner().invoke(command(PipelineInvalid(FAULTS)), ["--json"])
    assert done.exit_code == 2
    assert done.stderr == ""
    assert json.loads(done.stdout) == {
        "ok": False,
        "errors": [
            {
                "code": "unknown_key",
                "file": "p.yaml",
                "line": 3,
                "path": "tasks.x",
                "message": "unknown key",
                "hint": "did you mean 'y'?",
            },
            {"code": "cycle", "file": None, "line": None, "path": "tasks", "message": "a circle", "hint": ""},
        ],
    }


@pytest.mark.parametrize("error", [e for e in all_errors() if e is not PipelineInvalid], ids=lambda e: e.__name__)
def test_every_error_ends_with_its_exit_code(error: type[FateError]) -> None:
    done = CliRunner().invoke(command(error("so it is")), ["--json"])
    assert done.exit_code == error.exit_code
    (found,) = json.loads(done.stdout)["errors"]
    assert (found["code"], found["message"]) == (error.code, "so it is")
    assert found == error_document(error("so it is"))["errors"][0]


def test_ctrl_c_is_an_end_like_any_other() -> None:
    done = CliRunner().invoke(command(KeyboardInterrupt()), ["--json"])
    assert done.exit_code == 130
    assert json.loads(done.stdout)["errors"][0]["code"] == "cancelled"
    done = CliRunner().invoke(command(KeyboardInterrupt()))
    assert (done.exit_code, done.stderr) == (130, "error [cancelled]: stopped by Ctrl-C\n")


def test_without_json_a_bug_tells_its_whole_story() -> None:
    done = CliRunner().invoke(command(ValueError("oops")))
    assert isinstance(done.exception, ValueError)


def test_what_is_no_number_in_json_becomes_null(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"loss": [math.nan, (math.inf, 1.5)], "path": Path("/x"), "text": "Zürich", 1: True})
    text = capsys.readouterr().out
    assert json.loads(text) == {"loss": [None, [None, 1.5]], "path": "/x", "text": "Zürich", "1": True}
    assert "Zürich" in text
