"""`fate_llm jobs`: the jobs of this party's service: list, show, logs, cancel, resume, rerun."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import Any

import click

from ..output import home_option, json_option, print_json, reports_errors

__all__ = ["COMMAND"]

_COLORS = {"success": "green", "failed": "red", "timed_out": "red", "cancelled": "yellow", "running": "cyan"}


@click.group()
def jobs() -> None:
    """The jobs that this party takes part in, as its service knows them.

    Every party may look at its own jobs, cancel them, and ask for one that has ended without success to be resumed; the
    guest, who leads a job, may also run it again.
    """


@jobs.command("list")
@click.option("--state", "states", multiple=True, metavar="STATE", help="Only jobs in this state; may be repeated.")
@click.option("--limit", type=click.IntRange(1, 1000), default=30, show_default=True, help="At most so many.")
@home_option
@json_option
@reports_errors
def list_jobs(states: tuple[str, ...], limit: int, home: Path, as_json: bool) -> None:
    """The newest jobs."""
    from ..services import client_of, moment, plain

    found = client_of(home).jobs(states=states, limit=limit)
    if as_json:
        print_json({"jobs": found})
        return
    if not found:
        click.echo("no jobs")
    for row in found:
        state = click.style(f"{row['state']:<10}", fg=_COLORS.get(row["state"]))
        role = "leads" if row["lead"] else f"of {row['initiator']}"
        click.echo(f"{state} {row['job']:<44} {role:<16} {moment(row['created'])}  {plain(row['note'])}".rstrip())


@jobs.command("show")
@click.argument("job")
@home_option
@json_option
@reports_errors
def show(job: str, home: Path, as_json: bool) -> None:
    """One job: how far it is, party by party, and what this party's policy found."""
    from ..services import client_of, show_job

    found = client_of(home).job(job)
    if as_json:
        print_json(found)
    else:
        show_job(found)


@jobs.command("logs")
@click.argument("job")
@click.option("-f", "--follow", is_flag=True, help="Go on until the job has ended.")
@click.option("--party", metavar="ID", help="Only lines of this party.")
@home_option
@json_option
@reports_errors
def logs(job: str, follow: bool, party: str | None, home: Path, as_json: bool) -> None:
    """What happened, of every party, as far as its policy shows it to us. With --json a JSON document per line."""
    from ..services import client_of, print_line

    client = client_of(home)
    after = 0
    while True:
        found = client.lines(job, after=after, wait=20.0 if follow else 0.0)
        after = found["next"]
        for line in found["lines"]:
            if party in (None, line["party"]):
                print_line(line, as_json=as_json)
        if not found["lines"] and (found["ended"] or not follow):
            return


@jobs.command("cancel")
@click.argument("job")
@click.option("--reason", default="", metavar="TEXT", help="Told to all parties.")
@home_option
@json_option
@reports_errors
def cancel(job: str, reason: str, home: Path, as_json: bool) -> None:
    """Stop a job at all parties. This party's part stops at once, whoever leads the job."""
    from ..services import client_of

    _told(client_of(home).cancel(job, reason=reason, by=getpass.getuser()), as_json)


@jobs.command("resume")
@click.argument("job")
@click.option("--reason", default="", metavar="TEXT", help="Told to all parties.")
@home_option
@json_option
@reports_errors
def resume(job: str, reason: str, home: Path, as_json: bool) -> None:
    """Go on with a job that failed, timed out or was cancelled, from the last round that all parties have."""
    from ..services import client_of

    _told(client_of(home).resume(job, reason=reason, by=getpass.getuser()), as_json)


@jobs.command("rerun")
@click.argument("job")
@click.option("--from", "from_task", required=True, metavar="TASK", help="This task and what reads from it run again.")
@home_option
@json_option
@reports_errors
def rerun(job: str, from_task: str, home: Path, as_json: bool) -> None:
    """A new job like this one, that uses the outputs of all tasks before TASK as they are."""
    from ..services import client_of

    _told(client_of(home).rerun(job, from_task=from_task, by=getpass.getuser()), as_json)


@jobs.command("dossier")
@click.argument("job")
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@home_option
@reports_errors
def dossier(job: str, out: Path, home: Path) -> None:
    """Write the signed record of a job that has ended; `fate_llm audit dossier verify` checks it anywhere."""
    import json

    from fate_llm.core.errors import ConfigurationError

    from ..services import client_of

    found = client_of(home).dossier(job)
    try:
        with out.open("x", encoding="utf-8") as stream:
            stream.write(json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ConfigurationError(f"{out} cannot be written: {error.strerror}", hint="Name another place.") from None
    click.echo(f"{out}: signed by {', '.join(sorted(found.get('statements', {})))}")


def _told(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(found)
    else:
        click.echo(f"{found['job']}: {found['state']}")


COMMAND = jobs
