"""`fate_llm components`: what a pipeline line can name."""

from __future__ import annotations

from typing import Any

import click

from ..output import json_option, print_json, reports_errors

__all__ = ["COMMAND"]


@click.group()
def components() -> None:
    """List and describe the components that pipelines are made of."""


@components.command("list")
@json_option
@reports_errors
def list_components(as_json: bool) -> None:
    """Names of all components with their first line."""
    from fate_llm.core import plugins

    found = {name: _first_line(plugins.load("component", name)) for name in plugins.names("component")}
    if as_json:
        print_json([{"name": name, "summary": summary} for name, summary in found.items()])
        return
    width = max(len(name) for name in found)
    for name, summary in found.items():
        click.echo(f"{name:<{width}}  {summary}")


@components.command("describe")
@click.argument("name")
@json_option
@reports_errors
def describe(name: str, as_json: bool) -> None:
    """Roles, inputs, outputs and every parameter of a component, from the class itself."""
    from fate_llm.runtime.describe import describe_component

    found = describe_component(name)
    if as_json:
        print_json(found)
    else:
        _show(found)


def _first_line(component: Any) -> str:
    return (component.__doc__ or "").strip().splitlines()[0]


def _show(found: dict[str, Any]) -> None:
    click.secho(found["name"], bold=True)
    click.echo(f"\n{found['text']}\n")
    click.echo(f"roles: {', '.join(found['roles'])}")
    for title in ("inputs", "outputs"):
        click.echo(f"\n{title}:")
        for port in found[title]:
            marks = ", ".join(mark for mark in ("required", "many") if port.get(mark))
            click.echo(f"  {port['name']} ({port['kind']}{', ' + marks if marks else ''}): {port['doc']}")
    click.echo("\nparameters:")
    for field in found["params"]:
        default = "required" if field["required"] else f"default {field['default']}"
        bounds = f", {field['bounds']}" if field["bounds"] else ""
        click.echo(f"  {field['name']}: {field['type']}, {default}{bounds}")
        click.echo(f"      {field['meaning']}")


COMMAND = components
