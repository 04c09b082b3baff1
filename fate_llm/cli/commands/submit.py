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
@click.option(
    "--broker",
    "brokers",
    multiple=True,
    envvar="FATE_LLM_BROKER",
    metavar="[PARTY=]URL|PARTY=FILE",
    help="A process per party, talking over RabbitMQ: one address for all, or one for each party, or a party's "
    "party.yaml. Also read from FATE_LLM_BROKER, so that no password is in the list of processes.",
)
@click.option("--quiet", is_flag=True, help="No progress, only the result.")
@json_option
@reports_errors
def submit(
    pipeline: Path, sets: tuple[str, ...], workdir: Path, brokers: tuple[str, ...], quiet: bool, as_json: bool
) -> None:
    """Run a pipeline with all its parties on this machine, and show progress and result.

    Without --broker all parties share this process. With it each is a process of its own, and every message between
    them is sealed and goes through the broker, as it would between machines.

    Ctrl-C stops all parties; what was finished stays in the job's folder.
    """
    from fate_llm.pipelines import load_pipeline
    from fate_llm.runtime.submit import over_broker, prepare

    from ..progress import Progress
    from ..results import print_result

    spec = load_pipeline(pipeline, sets, os.environ)
    progress = Progress(stream=sys.stderr if as_json else sys.stdout, quiet=quiet)
    runtime = over_broker(spec, brokers) if brokers else None
    base = pipeline.absolute().parent
    job = prepare(spec, base=base, workdir=workdir, observers=(progress.observe,), runtime=runtime)
    with progress:
        if any("plaintext=loopback" in url for url in brokers):
            progress.say("WARNING: no TLS to the broker (plaintext=loopback): on this machine only")
        progress.say(f"job {job.job_id} in {job.folder.path}")
        result = job.run()
    if as_json:
        print_json(result.as_dict())
    else:
        print_result(result, guest=spec.parties.guest)
    if result.error is not None:
        sys.exit(result.error.exit_code)


COMMAND = submit
