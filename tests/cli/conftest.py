"""The command line with toy components: run it, and read what it printed where."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

import fate_llm.core
from fate_llm.cli.main import main
from fate_llm.core import plugins
from tests.runtime import toys

Run = Callable[..., Result]
Write = Callable[..., Path]


@pytest.fixture
def with_toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toys are installed, and no attempt has failed yet."""
    monkeypatch.setattr(plugins, "_installed", toys.installed)
    toys.Breaker.attempts.clear()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in an empty folder; stdout and stderr apart, and no exception but an exit."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path, exit_code: int = 0) -> Result:
        done = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
        assert done.exit_code == exit_code, done.output
        return done

    return call


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a pipeline, given as data or as text."""

    def save(content: dict[str, Any] | str, name: str = "toys.yaml") -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
        return path

    return save


def environment(*folders: Path) -> dict[str, str]:
    """For a fresh interpreter that finds the package, installed or not, and what lies in `folders`."""
    root = Path(fate_llm.core.__file__).parents[2]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*folders, root)))}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a fresh interpreter to its end."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment(), check=False)


def document(done: Result) -> Any:
    """The one JSON document on stdout."""
    return json.loads(done.stdout)


def only_error(done: Result) -> dict[str, Any]:
    """The one error of a document that says so in the promised shape."""
    found = document(done)
    assert list(found) == ["ok", "errors"]
    assert found["ok"] is False
    (error,) = found["errors"]
    assert set(error) == {"code", "file", "line", "path", "message", "hint"}
    assert isinstance(error, dict)
    return error
