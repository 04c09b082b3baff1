"""`fate_llm schema`: the pipeline language as JSON Schema."""

from __future__ import annotations

import click

from ..output import json_option, print_json, reports_errors

__all__ = ["COMMAND"]


@click.command()
@json_option
@reports_errors
def schema(as_json: bool) -> None:
    """Print the JSON Schema of pipeline files, for editors and other tools (always JSON)."""
    from fate_llm.pipelines import json_schema

    print_json(json_schema())


COMMAND = schema
