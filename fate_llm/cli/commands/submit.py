"""`fate_llm submit`: run a pipeline."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from ..output import json_option, pipeline_argument, print_json, reports_errors, set_option

__all__ = ["COMMAND"]


@click.command()
@pipeline_argument
@set_option
@click.option(
    "--workdir",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("jobs"),
    show_default=True,
    help="Where the job's folder is made.",
)
@click.option("--quiet", is_flag=True, help="No progress, only the result.")
@json_option
@reports_errors
def submit(pipeline: Path, sets: tuple[str, ...], workdir: Path, quiet: bool, as_json: bool) -> None:
    """Run a pipeline with all its parties on this machine, and show progress and result.

    Ctrl-C stops all parties; what was finished stays in the job's folder.
    """
    from fate_llm.pipelines import load_pipeline
    from fate_llm.runtime.submit import prepare

    from ..progress import Progress
    from ..results import print_result

    spec = load_pipeline(pipeline, sets, os.environ)
    progress = Progress(stream=sys.stderr if as_json else sys.stdout, quiet=quiet)
    job = prepare(spec, base=pipeline.absolute().parent, workdir=workdir, observers=(progress.observe,))
    with progress:
        progress.say(f"job {job.job_id} in {job.folder.path}")
        result = job.run()
    if as_json:
        print_json(result.as_dict())
    else:
        print_result(result, guest=spec.parties.guest)
    if result.error is not None:
        sys.exit(result.error.exit_code)


COMMAND = submit
