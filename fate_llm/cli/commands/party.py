"""`fate_llm party`: one organisation's own home, keys and service."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..output import home_option, json_option, print_json, reports_errors
from ..serving import approvals, health, serve

if TYPE_CHECKING:
    from fate_llm.runtime.federation import Topology

__all__ = ["COMMAND"]

_PATH = click.Path(path_type=Path)
_FILE = click.Path(path_type=Path, dir_okay=False)


@click.group()
def party() -> None:
    """One party of a federation: make its home, show its card, run its service."""


COMMAND = party

# --- init ----------------------------------------------------------------------------------------------------------


@party.command("init")
@click.argument("home", type=_PATH)
@click.option("--party", "name", required=True, metavar="ID", help="This party's id, such as bank-a.")
@click.option("--federation", default="federation", show_default=True, help="Its name, the same at all parties.")
@click.option("--broker", required=True, metavar="HOST[:PORT]", help="Where the broker is reached; port 5671.")
@click.option(
    "--topology",
    type=click.Choice(["shared", "per-party"]),
    default="shared",
    show_default=True,
    help="One broker (or cluster) for all, or one of each party's own.",
)
@click.option(
    "--nodes", type=click.IntRange(1, 99), default=1, show_default=True, help="Nodes of the broker's cluster."
)
@click.option("--no-tls", is_flag=True, help="The broker is on this machine and without TLS: for development.")
@click.option("--password-file", type=_FILE, help="Our password at the broker.  [default: a new one]")
@click.option(
    "--ca", type=_FILE, help="Who signed the broker's certificate (PEM).  [default: the system's authorities]"
)
@click.option("--certificate", type=_FILE, help="Shown to a broker that asks for one (PEM).")
@click.option("--key", type=_FILE, help="The key of --certificate (PEM).")
@json_option
@reports_errors
def init(home: Path, name: str, federation: str, broker: str, as_json: bool, **options: Any) -> None:
    """Make a party's HOME: keys, settings, a policy that refuses everything, an empty catalogue, a token.

    HOME is a new or empty folder; nothing is ever overwritten. Then exchange cards: `fate_llm party card` here, and
    `fate_llm federation add CARD` at the others.
    """
    from fate_llm.runtime.federation import read_password
    from fate_llm.runtime.federation_setup import write_files
    from fate_llm.runtime.trust.cards import fingerprint_of
    from fate_llm.runtime.trust.home import broker_place, new_home, open_home

    password = options["password_file"]
    topology: Topology = options["topology"]
    files = new_home(
        party=name,
        federation=federation,
        broker=broker_place(broker, tls=not options["no_tls"]),
        topology=topology,
        quorum=options["nodes"] > 1,
        password=None if password is None else read_password(password),
        **{what: _content(options[what]) for what in ("ca", "certificate", "key")},
    )
    write_files(home, files)
    made = open_home(home)
    fingerprint = fingerprint_of(name, made.federation.member(name), made.federation)
    if as_json:
        print_json({"home": str(home), "party": name, "fingerprint": fingerprint, "files": sorted(files)})
        return
    click.echo(f"{home}: the home of {name}, {len(files)} files, for their owner only")
    click.echo(f"fingerprint  {fingerprint}")
    click.echo("next:")
    click.echo(f"  fate_llm party card --home {home}        give it to all partners, and compare fingerprints by phone")
    click.echo(f"  fate_llm federation add CARD --home {home}   for the card of each partner")
    if password is None:
        click.echo(f"  the broker's operator gives {name} its place: fate_llm federation grant --party {name}")
        click.echo(f"    --federation {home}/federation.yaml --password-file {home}/broker.password")
    click.echo(
        f"  {home}/policy.yaml refuses every job until you write what you allow; {home}/catalog.yaml names your data"
    )


def _content(path: Path | None) -> bytes | None:
    from fate_llm.core.errors import ConfigurationError

    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be read: {error.strerror}", hint="Name a file that is there."
        ) from None


# --- card ----------------------------------------------------------------------------------------------------------


@party.command("card")
@home_option
@json_option
@reports_errors
def card(home: Path, as_json: bool) -> None:
    """Print this party's public card: id, keys, broker and fingerprint. It holds no secret."""
    from fate_llm import __version__
    from fate_llm.pipelines.dialect import parse
    from fate_llm.runtime.trust.cards import card_of
    from fate_llm.runtime.trust.home import open_home

    found = open_home(home)
    text = card_of(found.party, found.federation, found.identity(), program=__version__)
    if as_json:
        print_json(parse(text, None).data)
        return
    click.echo(text, nl=False)


# --- serve, health, approvals -------------------------------------------------------------------------------------

for _command in (serve, health, approvals):
    party.add_command(_command)
