"""What the commands that talk to a party's service have in common: finding it, following a job, showing one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fate_llm.core.errors import FateError, error_from
from fate_llm.runtime.events import Event

if TYPE_CHECKING:
    from fate_llm.runtime.service.client import ServiceClient

__all__ = [
    "client_of",
    "follow_job",
    "moment",
    "plain",
    "print_line",
    "show_findings",
    "show_job",
    "show_plan",
    "trouble_of",
]

_STATES = {"success": "green", "failed": "red", "refused": "red", "lost": "red", "cancelled": "yellow"}
_OUTCOMES = {"pass": "green", "manual": "yellow", "refuse": "red"}


def client_of(home: Path) -> ServiceClient:
    """The service of a home.

    Raises:
        ConfigurationError, ServiceLost: there is none.
    """
    from fate_llm.runtime.service.client import ServiceClient

    return ServiceClient.of_home(home)


def moment(seconds: float | None) -> str:
    """A time for people, in UTC."""
    return "-" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def plain(text: Any) -> str:
    """Text of a partner on one line: it cannot move the cursor, change a color, nor make lines of its own."""
    return "".join(sign if sign.isprintable() else " " for sign in str(text))


def trouble_of(found: Mapping[str, Any]) -> FateError | None:
    """What a job ended with, as one of our errors."""
    trouble = found.get("trouble")
    if not trouble:
        return None
    where = f"{trouble['party']}: " if trouble.get("party") else ""
    return error_from(trouble["code"], where + trouble["message"], trouble.get("hint", ""))


def follow_job(client: ServiceClient, job: str, observe: Callable[[Event], None]) -> dict[str, Any]:
    """Hand every line of a job to an observer until it has ended; the job then."""
    for _, lines in client.follow(job):
        for line in lines:
            observe(Event(line["event"], line["party"], line["task"], line["seconds"], line["fields"]))
    return client.job(job)


def print_line(line: Mapping[str, Any], *, as_json: bool) -> None:
    """One line of a log."""
    if as_json:
        click.echo(json.dumps(line, ensure_ascii=False))
        return
    details = " ".join(f"{key}={value}" for key, value in line["fields"].items())
    text = f"{line['party']:<12} {line['task'] or '-':<10} {line['event']} {details}"
    click.echo(f"{moment(line['seconds'])} {plain(text)}".rstrip())


def show_job(found: Mapping[str, Any]) -> None:
    """A job, party by party."""
    click.echo(f"{found['job']}  {click.style(found['state'], fg=_STATES.get(found['state']))}")
    click.echo(f"  led by {found['initiator']}, attempt {found['attempt']}, priority {found['priority']}")
    ended = f", ended {moment(found['ended'])}" if found["ended"] else ""
    click.echo(f"  submitted {moment(found['created'])}{ended}")
    if found.get("trouble"):
        trouble = found["trouble"]
        click.secho(plain(f"  [{trouble['code']}] {trouble['message']}"), fg="red")
        if trouble.get("hint"):
            click.echo(plain(f"  hint: {trouble['hint']}"))
    for party, part in found["parts"].items():
        state = click.style(f"{part['state']:<10}", fg=_STATES.get(part["state"]))
        click.echo(f"  {party:<14} {state} {_tasks(part['tasks'])} {plain(part.get('reason') or '')}".rstrip())
    findings = found.get("findings", [])
    show_findings([finding for finding in findings if finding["outcome"] != "pass"])
    if passed := sum(finding["outcome"] == "pass" for finding in findings):
        click.echo(f"    {passed} rule{'s' * (passed > 1)} of our policy pass{'es' * (passed == 1)}")
    if found["state"] == "success" and found.get("over"):
        click.echo(f"  next: fate_llm models list; fate_llm jobs dossier {found['job']} OUT")


def _tasks(tasks: Mapping[str, Any]) -> str:
    shown = []
    for name, task in tasks.items():
        rounds = f" {task['round']}/{task['rounds']}" if task.get("rounds") and task["state"] == "running" else ""
        shown.append(f"{plain(name)}: {task['state']}{rounds}")
    return ", ".join(shown)


def show_findings(findings: Sequence[Mapping[str, Any]]) -> None:
    """What the rules of a policy say, a line each."""
    for finding in findings:
        outcome = click.style(f"{finding['outcome']:<7}", fg=_OUTCOMES.get(finding["outcome"]))
        allowed = f"; allowed: {finding['allowed']}" if finding.get("allowed") else ""
        click.echo(f"    {outcome} {plain(finding['rule'] + ': ' + finding['found'] + allowed)}")


def show_plan(found: Mapping[str, Any]) -> None:
    """One page: what every party says to a pipeline before it is a job."""
    from .progress import size_text

    click.echo(f"{found['name']}  (specification {found['digest'][:16]})")
    for party, answer in found["parties"].items():
        verdict = answer["verdict"]
        click.echo(f"\n{party}: {click.style(verdict, fg={'accept': 'green', 'manual': 'yellow'}.get(verdict, 'red'))}")
        if costs := answer.get("estimates"):
            sizes = [costs.get(key) for key in ("sent_bytes", "received_bytes", "memory_bytes")]
            sent, received, memory = ("unknown" if size is None else size_text(size) for size in sizes)
            minutes = "not measured here yet" if costs.get("minutes") is None else f"{costs['minutes']:.1f} min"
            click.echo(f"  sends {sent}, receives {received}, peak memory {memory}, time {minutes}")
            click.echo(plain(f"  privacy spent: {costs['privacy']}"))
        if answer.get("trouble"):
            click.secho(plain(f"  [{answer['trouble']['code']}] {answer['trouble']['message']}"), fg="red")
        show_findings([finding for finding in answer["findings"] if finding["outcome"] != "pass"])
        passed = sum(finding["outcome"] == "pass" for finding in answer["findings"])
        if passed:
            click.echo(f"    {passed} rules pass")
    sys.stdout.flush()
