"""`fate_llm validate`: check a pipeline without running anything."""

from __future__ import annotations

import os
from pathlib import Path

import click

from ..output import json_option, pipeline_argument, print_json, reports_errors, set_option

__all__ = ["COMMAND"]


@click.command()
@pipeline_argument
@set_option
@json_option
@reports_errors
def validate(pipeline: Path, sets: tuple[str, ...], as_json: bool) -> None:
    """Check a pipeline file: all faults at once, each with file, line and what is valid.

    Exit code 0 when it is valid, 2 when it is not.
    """
    from fate_llm.pipelines import load_pipeline

    spec = load_pipeline(pipeline, sets, os.environ)
    if as_json:
        print_json({"ok": True, "errors": []})
    else:
        click.echo(f"{pipeline}: valid; {len(spec.tasks)} tasks, parties {', '.join(spec.members)}")


COMMAND = validate
