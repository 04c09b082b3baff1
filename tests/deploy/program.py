"""What the program says of itself, for comparison with the files in `deploy/`: its commands, variables and places."""

from __future__ import annotations

import configparser
import importlib.util
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import yaml

import fate_llm.core
from fate_llm.cli.main import main

__all__ = [
    "HOME",
    "ROOT",
    "command_fault",
    "demo_module",
    "documents",
    "extras",
    "library",
    "needs_service",
    "pinned",
    "program",
    "variables_read",
]

ROOT = Path(fate_llm.core.__file__).parents[2]
HOME = "/var/lib/fate_llm"
"""A party's home in containers, by the contract of the service."""


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() in {"1", "true"}


def absent(what: str) -> None:
    """Skip at home; in CI what `fate_llm[dev]` installs has to be there."""
    if in_ci():
        pytest.fail(f"CI checks the files with {what}: install fate_llm[dev]")
    pytest.skip(f"{what} is not installed")


def library(name: str) -> Any:
    """A module that only these tests use."""
    if importlib.util.find_spec(name) is None:
        absent(name)
    return importlib.import_module(name)


def documents(text: str) -> list[Any]:
    """All documents of a YAML text, by the parser in C where there is one: these tests read much of it."""
    return list(yaml.load_all(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def program(name: str) -> str:
    """Path of a tool that `fate_llm[dev]` installs."""
    beside = Path(sysconfig.get_path("scripts"), name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        absent(name)
    return found or ""


@cache
def demo_module(name: str) -> ModuleType:
    """A script of the demo, as a module."""
    folder = str(ROOT / "deploy" / "demo")
    if folder not in sys.path:
        sys.path.append(folder)  # they import each other as scripts do
    return importlib.import_module(name)


def _walk(words: Sequence[str]) -> tuple[click.Context, click.Command, list[str]]:
    command: click.Command = main
    context, rest = click.Context(main, info_name="fate_llm", **main.context_settings), list(words)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        found = command.get_command(context, rest[0])
        if found is None:
            raise click.UsageError(f"no command {' '.join(words)!r}: {context.command_path} has no {rest[0]!r}")
        context, command = click.Context(found, info_name=rest.pop(0), parent=context), found
    return context, command, rest


def command_fault(words: Sequence[str]) -> str | None:
    """Why `fate_llm WORDS` would be refused before it does anything; None when it would not. Click itself reads it."""
    try:
        context, command, rest = _walk(words)
        if isinstance(command, click.Group):
            return f"`fate_llm {' '.join(words)}` names no command"
        command.make_context(context.info_name, rest, parent=context.parent)
    except click.exceptions.Exit:  # --help
        return None
    except click.UsageError as error:
        return f"`fate_llm {' '.join(words)}`: {error.format_message()}"
    return None


needs_service = pytest.mark.skipif(
    command_fault(["party", "serve"]) is not None, reason="this version has no `fate_llm party serve`"
)


@cache
def variables_read() -> frozenset[str]:
    """Names of the environment that our code reads."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "fate_llm").rglob("*.py")]
    pattern = r"""(?:environ(?:\.get\(|\[)|getenv\(|envvar=)\s*["'](\w+)["']"""
    found = frozenset(name for text in texts for name in re.findall(pattern, text))
    assert "FATE_LLM_CACHE" in found, "no variable found: the test looks at the wrong place"
    return found


@cache
def pinned() -> dict[str, str]:
    """Version of each package in constraints.txt, by name in small letters."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    named = (line.split("==") for line in lines if "==" in line)
    return {name.strip().lower().replace("_", "-"): version.strip() for name, version in named}


@cache
def extras() -> frozenset[str]:
    """What can stand in brackets behind fate_llm."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return frozenset(config["options.extras_require"])
