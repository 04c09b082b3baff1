"""`fate_llm plan`: what a pipeline will do, before anything runs."""

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
def plan(pipeline: Path, sets: tuple[str, ...], as_json: bool) -> None:
    """Show the graph, each party's view, what is sent to whom, bytes and memory, before anything runs."""
    from fate_llm.pipelines import load_pipeline, make_plan

    spec = load_pipeline(pipeline, sets, os.environ)
    found = make_plan(spec, base=pipeline.absolute().parent)
    if as_json:
        print_json(found.as_dict())
    else:
        click.echo(str(found))


COMMAND = plan
