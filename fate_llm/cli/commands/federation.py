"""`fate_llm federation`: set one up, add partners, give parties their place on a broker, start one for development."""

from __future__ import annotations

import shlex
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..output import home_option, json_option, print_json, reports_errors

if TYPE_CHECKING:
    from fate_llm.runtime.trust.cards import Card

__all__ = ["COMMAND"]

_PATH = click.Path(path_type=Path)


@click.group()
def federation() -> None:
    """Set a federation up on RabbitMQ: files for every broker and party, permissions, a broker for development."""


@federation.command("init")
@click.option("--name", required=True, help="The federation's name, an id such as loans-2026.")
@click.option(
    "--party",
    "parties",
    multiple=True,
    required=True,
    metavar="ID[=KEYS]",
    help="A party, at least two. With the public keys that `federation identity` printed there, the party keeps its"
    " secret ones; without, keys are made here for it.",
)
@click.option(
    "--topology",
    type=click.Choice(["shared", "per-party"]),
    default="shared",
    show_default=True,
    help="One broker (or cluster) for all, or one of each party's own, linked over TLS.",
)
@click.option(
    "--broker",
    "brokers",
    multiple=True,
    metavar="[PARTY=]HOST[:PORT]",
    help="Where a broker is reached; port 5671 when not given. shared: once. per-party: for every party.",
)
@click.option("--nodes", type=click.IntRange(1, 99), default=1, show_default=True, help="Nodes of a broker's cluster.")
@click.option(
    "--valid-days", type=click.IntRange(1, 36500), default=825, show_default=True, help="Of all certificates."
)
@click.option("--client-certificates", is_flag=True, help="Brokers refuse clients that show no certificate.")
@click.option(
    "--config-folder", default="/etc/rabbitmq", show_default=True, help="Where the files will lie on a broker."
)
@click.option("--disk-free", default="2GB", show_default=True, help="Publishing pauses when a disk has less free.")
@click.option("--out", "folder", type=_PATH, required=True, help="A folder that is new or empty.")
@json_option
@reports_errors
def init(folder: Path, as_json: bool, **options: Any) -> None:
    """Write roster, keys, certificates and broker configuration of a new federation.

    Nothing is overwritten. All files are for their owner only; hand each party its folder over a safe way.
    """
    from fate_llm.runtime.federation_setup import plan_setup, set_up, write_files

    setup = plan_setup(**options)
    files = set_up(setup, now=datetime.now(UTC))
    write_files(folder, files)
    roster = setup.federation
    if as_json:
        print_json({"folder": str(folder), "files": sorted(files), **_roster_facts(roster)})
        return
    _show_roster(roster)
    click.echo(f"\nwritten to {folder}: {len(files)} files")
    click.echo(f"  {folder}/brokers    to each broker, into {setup.limits.folder}, owned by the user rabbitmq")
    click.echo(f"  {folder}/parties    to each party its folder; nobody else may see it")
    click.echo(f"  {folder}/authority  stays with you, or is deleted: its key can make brokers that the others trust")
    click.echo("next: compare the digest above with the other parties, then start the brokers")


@federation.command("identity")
@click.option(
    "--out", "path", type=_PATH, default=Path("identity.key"), show_default=True, help="The key file to make."
)
@click.option("--sealing", type=_PATH, help="The sealing key to make.  [default: sealing.key beside it]")
@json_option
@reports_errors
def identity(path: Path, sealing: Path | None, as_json: bool) -> None:
    """Make this party's keys, and print the public halves for `federation init --party ID=KEYS`."""
    from fate_llm.core.errors import ConfigurationError
    from fate_llm.runtime.federation import write_new
    from fate_llm.security.identity import Identity
    from fate_llm.security.sealed_box import SealingKey

    made, box = Identity.generate(), SealingKey.generate()
    sealing = sealing or path.with_name("sealing.key")
    for file in (path, sealing):
        if file.exists() or path == sealing:  # before anything is written: both or none
            raise ConfigurationError(f"{file} exists, and is not overwritten", hint="Name another place.")
    write_new(path, made.to_bytes())
    write_new(sealing, box.to_bytes())
    public = made.public.to_text(), box.public.to_text()
    if as_json:
        files = {"file": str(path), "sealing_file": str(sealing)}
        print_json({**files, "identity": public[0], "sealing": public[1], "fingerprint": made.public.fingerprint})
        return
    click.echo(f"written to {path} and {sealing}; keep them safe and secret: whoever has them is this party")
    click.echo(f"fingerprint  {made.public.fingerprint}")
    click.echo(",".join(public))


@federation.command("add")
@click.argument("card", type=click.File("r", encoding="utf-8"))
@home_option
@click.option("--yes", metavar="FINGERPRINT", help="Do not ask: this is the fingerprint that its people told us.")
@click.option("--replace", is_flag=True, help="The party is known, and has new keys or another broker.")
@json_option
@reports_errors
def add(card: Any, home: Path, yes: str | None, replace: bool, as_json: bool) -> None:
    """Pin a partner's CARD (a file, or - for stdin) into our roster.

    The fingerprint is compared with what the partner's people read out over the phone: that makes the card theirs.
    """
    from fate_llm.core.errors import ConfigurationError
    from fate_llm.runtime.trust.cards import parse_card, pin, same_fingerprint
    from fate_llm.runtime.trust.home import open_home

    found = open_home(home)
    read = parse_card(_text(card), card.name)
    if yes is None:
        if as_json:
            raise ConfigurationError("--json asks nobody", hint="Give --yes FINGERPRINT, as its people told it to you.")
        _ask(read)
    elif not same_fingerprint(yes, read.fingerprint):
        raise ConfigurationError(
            f"the card of {read.party} has the fingerprint {read.fingerprint}, not {yes}; nothing was changed",
            hint="Ask its people again, by phone: this may be somebody else's card.",
        )
    known = read.party in found.federation.parties
    after = pin(found.settings.federation, read, me=found.party, replace=replace)
    if as_json:
        print_json({"party": read.party, "fingerprint": read.fingerprint, "new": not known, **_roster_facts(after)})
        return
    same = after == found.federation
    click.echo(f"{read.party} {'is pinned already' if same else 'is pinned'} in {found.settings.federation}")
    click.echo(
        f"digest {after.digest()}  of {len(after.members)} parties; the same at every party once all have all cards"
    )
    if not same:
        click.echo("next: its place at the broker (fate_llm federation grant), then fate_llm doctor --as party.yaml")


def _text(card: Any) -> str:
    from fate_llm.core.errors import ConfigurationError

    try:
        return str(card.read(64 * 1024))
    except (OSError, UnicodeDecodeError):
        raise ConfigurationError(f"the card {card.name} cannot be read as text", hint="Name a file of text.") from None


def _ask(card: Card) -> None:
    """Show a card, and go on only if a person says that it is the partner's."""
    from fate_llm.core.errors import JobCancelled

    place = card.member.broker
    click.echo(f"party        {card.party}   (fate_llm {card.program})")
    click.echo(f"broker       {place.host}:{place.port}")
    click.echo(f"fingerprint  {card.fingerprint}")
    try:
        sure = click.confirm("Is that the fingerprint that its people read out to you?")
    except click.Abort:
        sure = False
    if not sure:
        raise JobCancelled("nothing was changed", hint="Ask its people by phone: fate_llm party card shows it there.")


@federation.command("show")
@click.argument("roster", type=_PATH, default=Path("federation.yaml"))
@json_option
@reports_errors
def show(roster: Path, as_json: bool) -> None:
    """Check a roster, and print its digest and the parties' fingerprints, to be compared over the phone."""
    from fate_llm.runtime.federation import load_federation

    found = load_federation(roster)
    if as_json:
        print_json(_roster_facts(found))
    else:
        _show_roster(found)


@federation.command("grant")
@click.option("--party", required=True, help="Who is given a place on the broker.")
@click.option(
    "--federation", "roster", type=_PATH, default=Path("federation.yaml"), show_default=True, help="The roster."
)
@click.option(
    "--password-file",
    type=_PATH,
    help="The party's password: read when the file is there, made and written when not.  [default: PARTY.password]",
)
@click.option("--keep-password", is_flag=True, help="The user is there already; only its place and permissions.")
@click.option(
    "--nodes", type=click.IntRange(1, 99), default=1, show_default=True, help="Nodes of the broker's cluster."
)
@click.option("--apply", "run", is_flag=True, help="Run the commands, too.")
@click.option("--ctl", default="rabbitmqctl", show_default=True, help="How rabbitmqctl is called at the broker.")
@json_option
@reports_errors
def grant(
    party: str,
    roster: Path,
    password_file: Path | None,
    keep_password: bool,
    nodes: int,
    run: bool,
    ctl: str,
    as_json: bool,
) -> None:
    """Print the rabbitmqctl commands that give a party its user and permissions; with --apply, run them.

    They hold a hash of the password only, can be run again, and take nothing from others. When the roster has grown,
    run them for every party.
    """
    from fate_llm.core.errors import ConfigurationError
    from fate_llm.runtime.federation import load_federation
    from fate_llm.runtime.federation_grant import grant_commands, hash_of, run_commands

    found = load_federation(roster)
    found.member(party)
    try:
        words = shlex.split(ctl)
    except ValueError as error:
        raise ConfigurationError(f"--ctl {ctl!r} is no command: {error}") from None
    secret = None if keep_password else (password_file or Path(f"{party}.password"))
    is_new = secret is not None and not secret.exists()
    hashed = None if secret is None else hash_of(secret)
    commands = grant_commands(found, party, hashed=hashed, quorum=nodes > 1)
    if run:
        run_commands(commands, words)
    if as_json:
        shown = [{"words": [*words, *command.words], "stdin": command.text} for command in commands]
        file = None if secret is None else str(secret)
        print_json({"party": party, "password_file": file, "applied": run, "commands": shown})
        return
    for command in commands:
        click.echo(command.shown(words))
    what = "applied" if run else "to run at the broker, or again with --apply"
    click.secho(f"# {len(commands)} commands {what}", fg="green", err=True)
    if is_new:
        click.echo(f"# next: give {party} its password, which is in {secret}", err=True)


@federation.command("dev-broker")
@click.option("--folder", type=_PATH, help="Keep the broker's data here.  [default: a temporary folder]")
@click.option("--port", type=click.IntRange(1024, 65535), help="Of AMQP.  [default: one that is free]")
@json_option
@reports_errors
def dev_broker(folder: Path | None, port: int | None, as_json: bool) -> None:
    """Start a broker on this machine for development, on loopback and without TLS; Ctrl-C stops it."""
    from fate_llm.core.errors import BrokerLost
    from fate_llm.runtime.broker import development_broker

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        if not as_json:
            click.echo("starting RabbitMQ; this takes some seconds")
        with development_broker(folder, port=port) as (node, url):
            following = f"fate_llm submit pipelines/quickstart.yaml --broker '{url}'"
            if as_json:
                facts = {"url": url, "folder": str(node.folder), "pid": node.pid, "next": following}
                print_json({**facts, "ctl": node.ctl_line()})
            else:
                click.echo(f"ready; Ctrl-C stops it. In another terminal: {following}")
                click.echo(f"for `fate_llm federation grant --apply --ctl`: {shlex.quote(node.ctl_line())}")
                click.echo(url)
            node.wait()
            lost = BrokerLost(f"the broker ended by itself\n{node.log_tail(12)}", hint="Its last words are above.")
        if not as_json:
            raise lost
        click.echo(lost.message, err=True)  # stdout has its one document already
        sys.exit(lost.exit_code)
    except KeyboardInterrupt:
        click.echo("stopped", err=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _roster_facts(roster: Any) -> dict[str, Any]:
    from fate_llm.runtime.trust.cards import fingerprint_of

    return {
        "name": roster.name,
        "topology": roster.topology,
        "vhost": roster.vhost,
        "digest": roster.digest(),
        "parties": {
            party: {
                "identity": member.identity,
                "fingerprint": member.public.fingerprint,
                "sealing": member.sealing,
                "card": fingerprint_of(party, member, roster),
                "broker": member.broker.model_dump(),
            }
            for party, member in roster.parties.items()
        },
    }


def _show_roster(roster: Any) -> None:
    from fate_llm.runtime.trust.cards import fingerprint_of

    click.echo(f"federation {roster.name}: {roster.topology}, virtual host {roster.vhost}")
    click.echo(f"digest {roster.digest()}")
    for party, member in roster.parties.items():
        click.echo(f"  {party}  {member.broker.host}:{member.broker.port}")
        click.echo(f"    card  {fingerprint_of(party, member, roster)}")
        click.echo(f"    key   {member.public.fingerprint}")
        if member.sealing is None:
            click.echo("    no sealing key: it runs no service")


COMMAND = federation
