"""`fate_llm doctor`: is the broker there, does it do what a job needs, and do the other parties answer?"""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..output import json_option, print_json, reports_errors

if TYPE_CHECKING:
    from fate_llm.runtime.doctor import Patient
    from fate_llm.runtime.doctor_report import Report

__all__ = ["COMMAND"]

_COLORS = {"ok": "green", "warning": "yellow", "failed": "red", "not checked": "bright_black"}
_FAILED = 4


@click.command()
@click.option("--broker", "url", metavar="URL", help="A broker, as amqps://user:password@host:5671/vhost.")
@click.option("--party", metavar="ID", help="Whose place on the broker is looked at.  [default: the user of the URL]")
@click.option(
    "--as",
    "party_file",
    type=click.Path(path_type=Path),
    metavar="PARTY.YAML",
    help="Look from this party's place: its broker, and every other party of its federation.",
)
@click.option(
    "--home",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="The same as --as FOLDER/party.yaml.",
)
@click.option("--answer", is_flag=True, help="Answer the doctors of the other parties until Ctrl-C. With --as.")
@click.option(
    "--management",
    metavar="URL",
    help="The broker's management API, as https://user:password@host:15671: plug-ins, alarms, clock.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(1, 600),
    default=5.0,
    show_default=True,
    help="How long one answer is waited for.",
)
@json_option
@reports_errors
def doctor(
    url: str | None,
    party: str | None,
    party_file: Path | None,
    home: Path | None,
    answer: bool,
    management: str | None,
    seconds: float,
    as_json: bool,
) -> None:
    """Check a broker, and with --as a whole federation, and say what to mend.

    Reachability, TLS, login, permissions (what a party needs is allowed, and nothing else), the largest message,
    heartbeats, plug-ins, alarms, clocks, round trip and throughput; then every other party, if it runs
    `fate_llm doctor --as party.yaml --answer` or its service. Exit code 0 when nothing failed, else 4. Nothing is left
    on the broker.
    """
    from fate_llm.runtime.doctor import examine

    if home is not None:
        party_file = _of_home(home, party_file)
    _check_options(url, party, party_file, management, answer=answer)
    patient = _patient(url, party, party_file, management, seconds)
    if answer:
        _answer(patient, as_json=as_json)
        return
    report = examine(patient)
    if as_json:
        print_json(report.as_dict())
    else:
        _show(report)
    if report.status == "failed":
        raise SystemExit(_FAILED)


def _of_home(home: Path, party_file: Path | None) -> Path:
    from fate_llm.core.errors import ConfigurationError

    if party_file is not None:
        raise ConfigurationError("--home and --as say the same", hint="Give one of them.")
    return home / "party.yaml"


def _check_options(
    url: str | None, party: str | None, party_file: Path | None, management: str | None, *, answer: bool
) -> None:
    from fate_llm.core.errors import ConfigurationError

    fault = ""
    if (url is None) == (party_file is None):
        fault = "where to look is said by --broker URL or by --as PARTY.YAML, by one of them"
    elif url is None and party is not None:
        fault = "--party goes with --broker; with --as it is in the file"
    elif answer and (party_file is None or management is not None):
        fault = "--answer goes with --as, and without --management"
    if fault:
        raise ConfigurationError(fault, hint="`fate_llm doctor --help` has them all.")


def _patient(
    url: str | None, party: str | None, party_file: Path | None, management: str | None, seconds: float
) -> Patient:
    from fate_llm import __version__
    from fate_llm.core.errors import ConfigurationError
    from fate_llm.core.names import is_name
    from fate_llm.protocols.transports.rabbitmq import BrokerAddress
    from fate_llm.runtime.doctor import Patient
    from fate_llm.runtime.doctor_network import ManagementApi
    from fate_llm.runtime.doctor_parties import Membership
    from fate_llm.runtime.federation import load_party

    me, linked = None, False
    if party_file is not None:
        settings, roster = load_party(party_file)
        address = BrokerAddress.from_url(settings.broker_url(), password=settings.load_password())
        party, linked = settings.party, roster.topology == "per-party"
        me = Membership(party, settings.load_identity(), roster.identities(), roster.digest(), __version__)
    else:
        address = BrokerAddress.from_url(url or "")
        party = party or address.user
        if not is_name(party):
            raise ConfigurationError(
                f"the user {party!r} is no party's id", hint="Say which party it is: --party ID, of small letters."
            )
    api = None if management is None else ManagementApi.from_url(management, address)
    return Patient(address, party, me, linked, api, seconds)


def _answer(patient: Patient, *, as_json: bool) -> None:
    from fate_llm.runtime.doctor_parties import answer_pings
    from fate_llm.runtime.doctor_ping import Responder

    me, ended = patient.me, threading.Event()
    assert me is not None  # there is a --as
    responder = Responder(
        me.identity,
        party=me.party,
        pins=me.pins,
        roster=me.roster,
        version=me.version,
        clock=patient.clocks.wall,
        ticks=patient.clocks.ticks,
    )
    before = {number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGINT, signal.SIGTERM)}

    def ready() -> None:
        if not as_json:
            click.echo(f"{me.party} answers the doctors of {len(me.pins) - 1} other parties; Ctrl-C ends it", err=True)

    try:
        answer_pings(
            patient.address,
            responder,
            party=me.party,
            seconds=patient.seconds,
            going=lambda: not ended.is_set(),
            ready=ready,
        )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if as_json:
        print_json({"party": me.party, "counts": dict(responder.counts)})
        return
    for what, count in responder.counts.most_common():
        click.echo(f"{count:6d}  {what}")


def _show(report: Report) -> None:
    """A line for each check, what to do below it, and the worst in one sentence at the end."""
    width = max(len(check.name) for check in report.checks)
    for check in report.checks:
        status = click.style(f"{check.status:<11}", fg=_COLORS[check.status])
        click.echo(f"{status}  {check.name:<{width}}  {check.found}")
        if check.do:
            click.echo(f"{'':13}{'':{width}}  -> {check.do}")
    counts = ", ".join(f"{count} {status}" for status, count in report.counts().items())
    worst = report.worst()
    if worst is None:
        click.secho(f"\nnothing is wrong: {counts}", fg="green")
    else:
        click.secho(f"\n{counts}. First: {worst.name}: {worst.found}. {worst.do}", fg=_COLORS[worst.status])


COMMAND = doctor
