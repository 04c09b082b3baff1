"""Writes the reference part of the manual from the code: `python -m fate_llm.cli.manual docs/reference`.

The tests compare what lies there with what this makes, so that the manual cannot fall behind.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import click

from fate_llm.core import plugins
from fate_llm.core.errors import FateError, all_errors
from fate_llm.core.names import NAME_PATTERN
from fate_llm.pipelines.faults import CODES
from fate_llm.pipelines.schema import JobResources, JobSettings, Parties, PipelineSpec, TaskOverride, TaskSpec
from fate_llm.runtime.describe import describe_component, describe_params
from fate_llm.runtime.trust import policy_schema as policy
from fate_llm.runtime.trust.catalog import CatalogEntry
from fate_llm.runtime.trust.schedule import Schedule

from .main import main as command

__all__ = ["pages", "write"]

_NOTE = "\n<!-- made by `make docs`; change the code, not this page -->\n"
_WIDTH = 100


def pages() -> dict[str, str]:
    """File name to content of every page of the reference."""
    return {
        "components.md": _components(),
        "commands.md": _commands(),
        "pipeline.md": _pipeline(),
        "policy.md": _policy(),
        "errors.md": _errors(),
        "plugins.md": _plugins(),
    }


def write(folder: Path) -> None:
    """Write all pages into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")


def _components() -> str:
    parts = ["# Components", _NOTE]
    for name in plugins.names("component"):
        found = describe_component(name)
        parts += [f"## {name}", "", found["text"], "", f"Roles: {', '.join(found['roles'])}.", ""]
        parts += _ports("Inputs", found["inputs"]) + _ports("Outputs", found["outputs"])
        parts += ["**Parameters**", "", *_settings(found["params"]), ""]
    return "\n".join(parts) + "\n"


def _ports(title: str, ports: list[dict[str, Any]]) -> list[str]:
    if not ports:
        return [f"**{title}**: none", ""]
    rows = [f"**{title}**", "", "| name | kind | required | meaning |", "| --- | --- | --- | --- |"]
    for port in ports:
        needed = ("yes" if port["required"] else "no") + (", many" if port["many"] else "")
        rows.append(_row(f"`{port['name']}`", port["kind"], needed, port["doc"]))
    return [*rows, ""]


def _row(*cells: str) -> str:
    """One line of a table; what a cell holds cannot end it."""
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _settings(fields: list[dict[str, Any]]) -> list[str]:
    if not fields:
        return ["No settings."]
    rows = ["| name | type | default | bounds | meaning |", "| --- | --- | --- | --- | --- |"]
    for field in fields:
        default = "required" if field["required"] else f"`{field['default']}`"
        bounds = field["bounds"].replace(NAME_PATTERN, "an id")
        rows.append(_row(f"`{field['name']}`", field["type"], default, bounds, field["meaning"]))
    return rows


def _commands() -> str:
    parts = [
        "# Commands",
        _NOTE,
        "Every command takes `--json` and then prints exactly one JSON document on stdout, also when it fails:",
        '`{"ok": false, "errors": [{"code", "file", "line", "path", "message", "hint"}]}`.',
        "Progress goes to stderr then. Exit codes are those of the [errors](errors.md); 0 is success, 2 also a command",
        "line that cannot be read.",
        "",
    ]
    assert isinstance(command, click.Group)
    context = click.Context(command, info_name="fate_llm", terminal_width=_WIDTH, **command.context_settings)
    for name in command.list_commands(context):
        found = command.get_command(context, name)
        assert found is not None
        parts += _command(found, click.Context(found, info_name=name, parent=context))
    return "\n".join(parts) + "\n"


def _command(found: click.Command, context: click.Context) -> list[str]:
    parts = [f"## {context.command_path}", "", "```text", found.get_help(context), "```", ""]
    if isinstance(found, click.Group):
        for name in found.list_commands(context):
            inner = found.get_command(context, name)
            assert inner is not None
            parts += _command(inner, click.Context(inner, info_name=name, parent=context))
    return parts


def _pipeline() -> str:
    parts = ["# Pipeline language, version 1", _NOTE]
    parts += ["Unknown keys are errors. `fate_llm schema` prints the JSON Schema. An id is lower case letters, digits,"]
    parts += ["`_`, `-` and `.`, starts and ends with a letter or digit, and has at most 64 characters.", ""]
    for title, model in (
        ("Pipeline", PipelineSpec),
        ("parties", Parties),
        ("tasks: each task", TaskSpec),
        ("overrides: what differs in a task at a party", TaskOverride),
        ("job", JobSettings),
        ("job: resources", JobResources),
    ):
        fields = [field for field in describe_params(model) if "." not in field["name"]]
        parts += [f"## {title}", "", *_settings(fields), ""]
    parts += [
        "## Faults",
        "",
        "What `validate` can find, by `code`:",
        "",
        "| code | meaning |",
        "| --- | --- |",
    ]
    parts += [f"| `{code}` | {meaning} |" for code, meaning in CODES.items()]
    return "\n".join(parts) + "\n"


def _policy() -> str:
    parts = ["# Policy and catalogue of a party, version 1", _NOTE]
    parts += [
        "`policy.yaml`: what partners may do here. What is not written is refused. How to write one is",
        "[a page of its own](../how-to/write-a-policy.md).",
        "",
    ]
    for title, model in (
        ("Policy", policy.Policy),
        ("components: each component", policy.ComponentRule),
        ("components: each bound", policy.Bound),
        ("data: each data set", policy.DataRule),
        ("protection", policy.Protection),
        ("privacy", policy.Privacy),
        ("schedule", Schedule),
        ("resources", policy.Limits),
        ("show", policy.Show),
        ("manual: each rule by patterns", policy.ManualRule),
        ("retention", policy.Retention),
        ("catalog.yaml: each entry", CatalogEntry),
    ):
        fields = [field for field in describe_params(model) if "." not in field["name"]]
        parts += [f"## {title}", "", *_settings(fields), ""]
    return "\n".join(parts) + "\n"


def _errors() -> str:
    parts = ["# Errors", _NOTE, "Codes never change. The exit code is what a command ends with.", ""]
    for error in all_errors():
        if error.__module__ != FateError.__module__:
            continue  # of somebody's plug-in
        text = (inspect.getdoc(error) or "").strip()
        parts += [f"## {error.code}", "", text, ""]
        parts += [
            f"- class `{error.__name__}`, exit code {error.exit_code}",
            f"- hint: {error.default_hint}",
            "",
        ]
    return "\n".join(parts) + "\n"


def _plugins() -> str:
    parts = ["# Plug-ins", _NOTE, "A plug-in is one file in its folder; its name is the file's name.", ""]
    for kind, folder in plugins.KINDS.items():
        if kind == "component":
            continue
        parts += [f"## {kind}: `{folder.replace('.', '/')}/`", ""]
        for name in plugins.names(kind):
            found = plugins.load(kind, name)
            parts += [f"### {name}", "", inspect.getdoc(found) or "", ""]
            if hasattr(found, "Params"):
                parts += [*_settings(describe_params(found.Params)), ""]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/reference"))
