"""The command itself: it starts quickly, knows its commands, and says what is near."""

from __future__ import annotations

import shutil
from pathlib import Path

import click
import pytest

import fate_llm.pipelines
from fate_llm import __version__
from fate_llm.cli import commands
from fate_llm.cli.main import main
from tests.cli.conftest import Run, only_error, python

COMMANDS = [
    "audit",
    "components",
    "doctor",
    "federation",
    "jobs",
    "models",
    "party",
    "plan",
    "predict",
    "schema",
    "submit",
    "validate",
]


def test_its_commands_are_the_files_of_the_folder() -> None:
    assert isinstance(main, click.Group)
    assert main.list_commands(click.Context(main, **main.context_settings)) == COMMANDS
    assert commands.__path__


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["submit", "--help"], ["components", "-h"]])
def test_help_names_what_there_is(arguments: list[str], run: Run) -> None:
    text = run(*arguments).stdout
    assert text.startswith("Usage: ")
    if len(arguments) == 1:
        assert all(name in text for name in COMMANDS)


def test_the_version_is_the_package_s(run: Run) -> None:
    assert run("--version").stdout == f"fate_llm, version {__version__}\n"


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from fate_llm.cli.main import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'rich', 'fate_llm.runtime'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {sorted(heavy)}' if heavy else 0)\n"
    )
    done = python("-c", script)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["validate", "p.yaml"], ["plan", "p.yaml"], ["components", "list"], ["schema"]],
    ids=lambda arguments: arguments[0],
)
def test_commands_that_do_not_train_load_no_torch(arguments: list[str], run: Run) -> None:
    folder = Path(fate_llm.pipelines.__file__).parent
    shutil.copy(folder / "quickstart.yaml", "p.yaml")
    shutil.copytree(folder / "data", "data")
    script = (
        "import sys\n"
        "from fate_llm.cli.main import main\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
        "sys.exit('loaded' if {'torch', 'transformers', 'peft'} & set(sys.modules) else 0)\n"
    )
    done = python("-c", script, *arguments)
    assert done.returncode == 0, done.stderr


def test_an_unknown_command_has_the_nearest_one(run: Run) -> None:
    done = run("sumbit", "x.yaml", exit_code=2)
    assert "no command 'sumbit'; did you mean 'submit'?" in done.stderr
    assert done.stdout == ""


def test_a_command_line_that_cannot_be_read_is_usage(run: Run) -> None:
    assert "No such option" in run("validate", "x.yaml", "--josn", exit_code=2).stderr
    assert "Missing argument" in run("validate", exit_code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sumbit", "x.yaml", "--json"], "did you mean 'submit'?"),
        (["validate", "--json"], "Missing argument"),
        (["validate", "x.yaml", "--nonsense", "--json"], "No such option"),
        (["predict", "no-such-job", "--json"], "does not exist"),
        (["components", "lsit", "--json"], "No such command"),
    ],
    ids=["command", "argument", "option", "job", "subcommand"],
)
def test_with_json_such_an_error_is_a_document_too(arguments: list[str], said: str, run: Run) -> None:
    error = only_error(run(*arguments, exit_code=2))
    assert error["code"] == "configuration"
    assert said in error["message"]
    assert "--help" in error["hint"]
    assert (error["file"], error["line"], error["path"]) == (None, None, "")


def test_the_module_is_the_command() -> None:
    assert __version__ in python("-m", "fate_llm", "--version").stdout
