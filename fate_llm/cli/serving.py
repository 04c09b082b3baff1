"""The subcommands of `fate_llm party` that are about its service: serve, health, approvals."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path
from typing import Any

import click

from .output import home_option, json_option, print_json, reports_errors

__all__ = ["approvals", "health", "serve"]


@click.command("serve")
@home_option
@reports_errors
def serve(home: Path) -> None:
    """Run this party's service until Ctrl-C or SIGTERM.

    It answers other parties' services over the broker, runs this party's part of their jobs as its policy allows, and
    listens on a local HTTP API. One that is killed goes on where it was when it is started again.
    """
    import time

    from fate_llm.runtime.service.serve import serve as run

    def say(text: str) -> None:
        text = "\n  ".join("".join(s if s.isprintable() else " " for s in line) for line in text.splitlines())
        click.echo(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {text}", err=True)

    sys.exit(run(home, say=say))


@click.command("health")
@home_option
@json_option
@reports_errors
def health(home: Path, as_json: bool) -> None:
    """Exit code 0 when this party's service runs and has its database and its broker, else 1."""
    from fate_llm.core.errors import ServiceLost

    from .services import client_of

    try:
        found = client_of(home).health()
    except ServiceLost as error:
        found = {"status": "failed", "reasons": [error.message]}
    if as_json:
        print_json(found)
    else:
        notes = [*found.get("reasons", []), *found.get("warnings", [])]
        click.echo(f"{found['status']}" + "".join(f"\n  {note}" for note in notes))
    sys.exit(0 if found["status"] == "ok" else 1)


class _ListFirst(click.Group):
    """Without a subcommand it is `list`, with the options that stand there."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        asks_help = bool(args) and args[0] in self.get_help_option_names(ctx)
        if not asks_help and (not args or args[0].startswith("-")):
            args = ["list", *args]
        return super().parse_args(ctx, args)


@click.group("approvals", cls=_ListFirst)
def approvals() -> None:
    """Jobs of partners that wait for a person of this party: list (without a subcommand too), show, approve, refuse."""


@approvals.command("list")
@home_option
@json_option
@reports_errors
def list_approvals(home: Path, as_json: bool) -> None:
    """What waits."""
    from .services import client_of, moment

    found = client_of(home).approvals()
    if as_json:
        print_json({"approvals": found})
        return
    if not found:
        click.echo("nothing waits for a decision")
    for row in found:
        click.echo(f"{row['job']:<44} of {row['summary'].get('initiator', '?'):<12} since {moment(row['asked'])}")


@approvals.command("show")
@click.argument("job")
@home_option
@json_option
@reports_errors
def show(job: str, home: Path, as_json: bool) -> None:
    """What the job asks for, what the policy found, and its digest."""
    from .services import client_of, show_findings

    row = _waiting(client_of(home).approvals(), job)
    if as_json:
        print_json(row)
        return
    summary = row["summary"]
    click.echo(f"{job}\n  digest {row['digest']}")
    click.echo(f"  {summary.get('pipeline')}, led by {summary.get('initiator')}")
    click.echo(f"  parties: {', '.join(summary.get('members', []))}")
    click.echo(f"  our tasks: {', '.join(summary.get('tasks', []))}")
    show_findings(row["findings"])


@approvals.command("approve")
@click.argument("job")
@click.option("--reason", default="", metavar="TEXT", help="Goes into the audit log.")
@click.option("--digest", default="", metavar="HEX", help="Only if its digest begins like this: what `show` printed.")
@home_option
@json_option
@reports_errors
def approve(job: str, reason: str, digest: str, home: Path, as_json: bool) -> None:
    """Let the job run here, exactly as it was signed."""
    _decide(home, job, "approve", reason, as_json, digest)


@approvals.command("refuse")
@click.argument("job")
@click.option("--reason", default="", metavar="TEXT", help="Told to the guest, and goes into the audit log.")
@home_option
@json_option
@reports_errors
def refuse(job: str, reason: str, home: Path, as_json: bool) -> None:
    """Refuse the job; it ends at all parties."""
    _decide(home, job, "refuse", reason, as_json)


def _decide(home: Path, job: str, decision: str, reason: str, as_json: bool, digest: str = "") -> None:
    from fate_llm.core.errors import WrongState

    from .services import client_of

    client = client_of(home)
    row = _waiting(client.approvals(), job)
    if not row["digest"].startswith(digest.lower()):
        raise WrongState(
            f"what waits is {row['digest']}, not {digest}", hint=f"fate_llm party approvals show {job}: read it again."
        )
    found = client.decide(job, decision=decision, digest=row["digest"], by=getpass.getuser(), reason=reason)
    if as_json:
        print_json(found)
    else:
        click.echo(f"{job}: {'approved' if decision == 'approve' else 'refused'}")


def _waiting(rows: list[dict[str, Any]], job: str) -> dict[str, Any]:
    from fate_llm.core.errors import WrongState
    from fate_llm.core.names import nearest

    for row in rows:
        if row["job"] == job:
            return row
    names = [row["job"] for row in rows]
    raise WrongState(f"job {job!r} does not wait for a decision here", hint=nearest(job, names) or "Nothing does.")
