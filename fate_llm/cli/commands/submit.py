"""`fate_llm submit`: run a pipeline."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fate_llm.security.randomness import random_id

from ..output import json_option, pipeline_argument, print_json, reports_errors, set_option

if TYPE_CHECKING:
    from fate_llm.pipelines.schema import PipelineSpec

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
@click.option(
    "--home",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="FATE_LLM_HOME",
    metavar="FOLDER",
    help="Give the pipeline to the service of this party, the guest: every party runs its part on its own machine. "
    "Also read from FATE_LLM_HOME.",
)
@click.option("--plan", "only_plan", is_flag=True, help="With --home: ask every party what it would cost, run nothing.")
@click.option("--detach", is_flag=True, help="With --home: print the job's id and do not wait for its end.")
@click.option("--quiet", is_flag=True, help="No progress, only the result.")
@json_option
@reports_errors
def submit(
    pipeline: Path,
    sets: tuple[str, ...],
    workdir: Path,
    brokers: tuple[str, ...],
    home: Path | None,
    only_plan: bool,
    detach: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Run a pipeline, and show progress and result.

    Without --home all parties run on this machine: in this process, or with --broker each in a process of its own, and
    every message between them is sealed and goes through the broker, as it would between machines. Ctrl-C stops them.

    With --home the pipeline becomes a job of the party's service: signed, checked by every party against its own
    policy, and run by all of them. Ctrl-C stops the watching, not the job (`fate_llm jobs cancel`).
    """
    from fate_llm.core.errors import ConfigurationError
    from fate_llm.pipelines import load_pipeline

    if home is None and (only_plan or detach):
        raise ConfigurationError("--plan and --detach go with --home", hint="`fate_llm plan` needs no service.")
    if home is not None and brokers:
        raise ConfigurationError("--home and --broker exclude each other", hint="A service knows its own broker.")
    spec = load_pipeline(pipeline, sets, os.environ)
    if home is not None:
        _give_to_service(spec, home, only_plan=only_plan, detach=detach, quiet=quiet, as_json=as_json)
    else:
        _run_here(spec, pipeline, workdir, brokers, quiet=quiet, as_json=as_json)


def _run_here(
    spec: PipelineSpec, pipeline: Path, workdir: Path, brokers: tuple[str, ...], *, quiet: bool, as_json: bool
) -> None:
    from fate_llm.runtime.submit import over_broker, prepare

    from ..progress import Progress
    from ..results import print_result

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


def _give_to_service(
    spec: PipelineSpec, home: Path, *, only_plan: bool, detach: bool, quiet: bool, as_json: bool
) -> None:
    from fate_llm.core.errors import JobCancelled

    from ..progress import Progress
    from ..services import client_of, follow_job, show_job, show_plan, trouble_of

    client = client_of(home)
    if only_plan:
        plan = client.plan(spec.to_data())
        print_json(plan) if as_json else show_plan(plan)
        sys.exit(0 if all(answer["verdict"] != "refuse" for answer in plan["parties"].values()) else 3)
    # the same key again is the same job: a request that is sent twice does not run twice
    job = client.submit(spec.to_data(), key=random_id(16))
    progress = Progress(stream=sys.stderr if as_json else sys.stdout, quiet=quiet)
    if detach:
        print_json(job) if as_json else click.echo(job["job"])
        return
    try:
        with progress:
            progress.say(f"job {job['job']}: fate_llm jobs show {job['job']}")
            job = follow_job(client, job["job"], progress.observe)
    except KeyboardInterrupt:
        hint = f"fate_llm jobs show {job['job']}; to stop it: fate_llm jobs cancel {job['job']}"
        raise JobCancelled("Ctrl-C has ended the watching; the job goes on", hint=hint) from None
    print_json(job) if as_json else show_job(job)
    if (error := trouble_of(job)) is not None:
        sys.exit(error.exit_code)


COMMAND = submit
