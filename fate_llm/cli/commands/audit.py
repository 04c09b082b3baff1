"""`fate_llm audit`: what this party decided and what left it, and whether a job's dossier is true."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..output import home_option, json_option, print_json, reports_errors

if TYPE_CHECKING:
    from fate_llm.runtime.record.dossier import Report
    from fate_llm.runtime.record.reading import LogFault, LogReader

__all__ = ["COMMAND"]

_FILE = click.Path(path_type=Path, dir_okay=False)
_BROKEN = 5
_job = click.option("--job", default="", metavar="ID", help="Only lines of this job.")
_kind = click.option("--kind", default="", metavar="KIND", help="Only lines of this kind, such as left or decision.")


@click.group()
def audit() -> None:
    """Show, verify and export this party's audit log, and verify the dossiers of jobs.

    The log is a chain: each line is signed and names the one before it. Exit code 5 says that it was changed.
    """


@audit.command("show")
@_job
@_kind
@click.option("--last", type=click.IntRange(min=1), metavar="N", help="Only the last N of these lines.")
@home_option
@json_option
@reports_errors
def show(job: str, kind: str, last: int | None, home: Path, as_json: bool) -> None:
    """One sentence for each line: decisions, approvals, every message that left."""
    from fate_llm.runtime.record.export import Wanted, instant, sentence

    _check_kind(kind)
    reader, wanted = _reader(home), Wanted(job, kind)
    found = deque((entry for entry, _ in reader.entries() if wanted(entry)), maxlen=last)
    faults = reader.check()
    if as_json:
        lines = [{"n": e.n, "time": e.time, "kind": e.kind, "fields": e.fields, "hash": e.hash} for e in found]
        print_json({"ok": not faults, "lines": lines, "faults": [fault.as_dict() for fault in faults]})
    else:
        for entry in found:
            click.echo(f"{entry.n:>7}  {instant(entry.time)}  {_plain(entry.kind):<14}  {sentence(entry)}")
        if not found:
            click.echo("no such lines", err=True)
    _end(faults, as_json=as_json)


@audit.command("verify")
@click.option("--head", metavar="HASH", help="A line that must be in it: the head that was noted earlier, elsewhere.")
@home_option
@json_option
@reports_errors
def verify(head: str | None, home: Path, as_json: bool) -> None:
    """Check every signature and the order of all lines; print the number of lines and the head.

    Lines that are cut off at the end leave a shorter log that is whole. So note the head from time to time, outside
    this machine, and give it with --head later. Dossiers have it, too: each party's statement names its head.
    """
    _check_hash(head)
    reader = _reader(home, head)
    faults = reader.check()
    if as_json:
        print_json(
            {
                "ok": not faults,
                "count": reader.count,
                "head": {"n": reader.head.n, "hash": reader.head.hash},
                "files": reader.files,
                "faults": [fault.as_dict() for fault in faults],
            }
        )
    else:
        click.echo(f"{reader.count} lines in {len(reader.files)} files of {reader.folder}")
        click.echo(f"key   {reader.public.to_text()}")
        click.echo(f"head  line {reader.head.n}, {reader.head.hash}")
        if not faults:
            click.secho("every line is signed by this key, and none is missing between them", fg="green")
    _end(faults, as_json=as_json)


@audit.command("export")
@click.argument("out", type=_FILE)
@_job
@_kind
@home_option
@json_option
@reports_errors
def export(out: Path, job: str, kind: str, home: Path, as_json: bool) -> None:
    """Write the log, or what concerns one job, to OUT: .html to read and print, .csv, or .jsonl with all signatures."""
    from fate_llm.runtime.record.export import Wanted
    from fate_llm.runtime.record.export import export as write

    _check_kind(kind)
    reader = _reader(home)
    count = write(reader, out, Wanted(job, kind), now=time.time())
    faults = reader.check()
    if as_json:
        print_json({"ok": not faults, "file": str(out), "lines": count, "faults": [f.as_dict() for f in faults]})
    else:
        click.echo(f"written to {out}: {count} of {reader.count} lines")
    _end(faults, as_json=as_json)


@audit.group("dossier")
def dossier() -> None:
    """The record of one job that all its parties signed."""


@dossier.command("verify")
@click.argument("file", type=_FILE)
@click.option(
    "--roster",
    type=_FILE,
    default=Path("federation.yaml"),
    show_default=True,
    help="Whose keys count: the roster that this auditor trusts.",
)
@json_option
@reports_errors
def verify_dossier(file: Path, roster: Path, as_json: bool) -> None:
    """Check a dossier with nothing but the roster: who contributed what to which round, under which policy.

    Every signature, and what each party says of the others against what they say themselves. Exit code 5 when
    something does not fit.
    """
    from fate_llm.runtime.federation import load_federation
    from fate_llm.runtime.record import dossier as record

    report = record.verify(record.load(file), load_federation(roster).identities())
    if as_json:
        print_json({"ok": not report.faults, **report.as_dict()})
    else:
        _show(report)
        for fault in report.faults:
            click.secho(_plain(f"FAULT: {fault}"), fg="red")
        if not report.faults:
            click.secho("everything fits: all signatures, all messages, all rounds", fg="green")
    if report.faults:
        raise SystemExit(_BROKEN)


@dossier.command("show")
@click.argument("file", type=_FILE)
@json_option
@reports_errors
def show_dossier(file: Path, as_json: bool) -> None:
    """What a dossier says, by the keys that it names itself. Use `verify` to know whether it is true."""
    from fate_llm.runtime.record import dossier as record

    found = record.load(file)
    report = record.verify(found, record.pins_of(found))
    if as_json:
        print_json(report.as_dict())
        return
    _show(report)
    if report.faults:
        click.secho(f"{len(report.faults)} things in it do not fit", fg="yellow")
    click.echo("shown by the keys that it names itself: `fate_llm audit dossier verify` compares them with the roster")


def _reader(home: Path, head: str | None = None) -> LogReader:
    from fate_llm.runtime.federation import load_party
    from fate_llm.runtime.record.reading import LogReader

    settings, roster = load_party(home / "party.yaml")
    return LogReader(settings.state / "audit", roster.member(settings.party).public, expected_head=head)


def _check_kind(kind: str) -> None:
    from fate_llm.core.errors import ConfigurationError
    from fate_llm.core.names import nearest
    from fate_llm.runtime.record.audit import KINDS

    if kind and kind not in KINDS:
        raise ConfigurationError(f"no line is of kind {kind!r}", hint=nearest(kind, KINDS, most=20))


def _check_hash(head: str | None) -> None:
    from fate_llm.core.errors import ConfigurationError

    if head is not None and (len(head) != 64 or not set(head) <= set("0123456789abcdef")):
        raise ConfigurationError(
            f"--head has {len(head)} characters that are no hash of a line; it is 64 lower case hex digits",
            hint="`fate_llm audit verify` prints the present one; take one that was noted earlier.",
        )


def _end(faults: list[LogFault], *, as_json: bool) -> None:
    """Exit code 5 and what is wrong, when something is."""
    if not faults:
        return
    if not as_json:
        for fault in faults:
            click.secho(_plain(f"FAULT: {fault}"), fg="red", err=True)
    raise SystemExit(_BROKEN)


def _show(report: Report) -> None:
    click.echo(_plain(f"job            {report.job}, started by {report.initiator}, ended: {report.ending}"))
    click.echo(f"specification  {report.specification}")
    for party, ended in report.parties.items():
        click.echo(_plain(f"party          {party}: {ended or 'no statement'}"))
    if report.table:
        click.echo(
            "\ntask            round  party           digest            bytes  protection  policy    counted  stated by"
        )
    for row in report.table:
        counted = {True: "yes", False: "no", None: "?"}[row.counted]
        cells: list[Any] = [f"{row.task:<14}", f"{row.round:>6}", f" {row.party:<14}", f"{row.digest[:12] or '-':<12}"]
        cells += [f"{row.bytes:>10}", f" {row.protection or '-':<10}", f"{row.policy[:8] or '-':<8}", f" {counted:<7}"]
        click.echo(_plain(" ".join([*cells, row.known])))
    for remark in report.remarks:
        click.echo(_plain(f"note: {remark}"))


def _plain(text: str) -> str:
    """Text of others, on one line and without control characters."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)


COMMAND = audit
