"""Sets a federation up: every file of every broker and party, in one new folder.

    <folder>/
      federation.yaml           the roster
      authority/                ca.pem, ca.key: whoever has the key can make a broker that the others trust
      brokers/<party or "shared">/
          rabbitmq.conf, enabled_plugins, definitions.json, ca.pem, server.pem, server.key
      parties/<party>/
          party.yaml, federation.yaml, identity.key, sealing.key, broker.password, ca.pem, client.pem, client.key,
          policy.yaml, catalog.yaml, api.token: a home, as `trust.home` describes it

One folder of `parties` and, with a broker per party, one of `brokers` goes to each party; all files are for their owner
only (0600). A party that gave its public keys keeps the secret ones: it puts `identity.key` and `sealing.key` beside
`party.yaml` itself.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from fate_llm.core.errors import ConfigurationError
from fate_llm.protocols import broker_layout as layout
from fate_llm.security.certificates import Authority, make_authority
from fate_llm.security.identity import Identity
from fate_llm.security.randomness import random_bytes, random_id
from fate_llm.security.sealed_box import SealingKey

from .federation import BrokerPlace, Federation, Topology, dump_model, make_federation, write_new
from .federation_broker import CONFIG_FOLDER, DISK_FREE, BrokerLimits, broker_definitions, broker_plugins, rabbitmq_conf
from .trust.home import home_files

__all__ = ["SHARED", "Setup", "plan_setup", "set_up", "write_files"]

SHARED = "shared"
"""Name of the one broker's folder; with a broker per party the folders are called like the parties."""

_PASSWORD = 24  # bytes of randomness


@dataclass(frozen=True, slots=True)
class Setup:
    """What is to be set up. quorum: the shared broker has several nodes. valid_days: of all certificates.

    identities, sealing: the keys that are made here.
    """

    federation: Federation
    identities: Mapping[str, Identity] = field(default_factory=dict)
    sealing: Mapping[str, SealingKey] = field(default_factory=dict)
    limits: BrokerLimits = field(default_factory=BrokerLimits)
    quorum: bool = False
    valid_days: int = 825


def plan_setup(
    *,
    name: str,
    parties: Sequence[str],
    topology: Topology,
    brokers: Sequence[str] = (),
    nodes: int = 1,
    valid_days: int = 825,
    client_certificates: bool = False,
    config_folder: str = CONFIG_FOLDER,
    disk_free: str = DISK_FREE,
) -> Setup:
    """From what an operator types: parties `ID` or `ID=ed25519:...[,mlkem768x25519:...]`, and brokers.

    brokers: `[PARTY=]HOST[:PORT]`; without any, a shared broker is on this machine. Parties without keys get new ones;
    one that gave an identity alone can run no service.

    Raises:
        ConfigurationError: a name, identity or address is wrong, given twice or missing.
    """
    pins = dict.fromkeys(party.partition("=")[0] for party in parties)
    if len(pins) < len(parties):
        raise ConfigurationError("a party is named twice", hint="Give each party once.")
    if len(pins) < 2:
        raise ConfigurationError("a federation has at least 2 parties", hint="Alone: fate_llm party init")
    made = {party: Identity.generate() for party in parties if "=" not in party}
    sealing = {party: SealingKey.generate() for party in made}
    keys = {p: {"identity": made[p].public.to_text(), "sealing": sealing[p].public.to_text()} for p in made}
    for party, _, text in (party.partition("=") for party in parties if "=" in party):
        identity, comma, box = text.partition(",")
        keys[party] = {"identity": identity, "sealing": box} if comma else {"identity": identity}
    places = _places(tuple(pins), topology, brokers)
    roster = {
        "version": 1,
        "name": name,
        "vhost": f"fate.{name}",
        "topology": topology,
        "parties": {p: {"broker": places[p], **keys[p]} for p in pins},
    }
    if not re.fullmatch(r"/[\w./-]*", config_folder) or not re.fullmatch(r"[0-9]+[kMGT]i?B?", disk_free):
        raise ConfigurationError(
            f"a configuration folder {config_folder!r}, and {disk_free!r} of free disk: one of them is no such thing",
            hint="A folder is an absolute path without spaces; a size is a number with a unit, such as 2GB.",
        )
    limits = BrokerLimits(folder=config_folder, client_certificates=client_certificates, disk_free=disk_free)
    return Setup(make_federation(roster), made, sealing, limits, quorum=nodes > 1, valid_days=valid_days)


def _places(parties: tuple[str, ...], topology: Topology, brokers: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The address of every party's broker, from `[PARTY=]HOST[:PORT]`."""
    hint = "shared: --broker HOST[:PORT] once. per-party: --broker PARTY=HOST[:PORT] for every party."
    named: dict[str, dict[str, Any]] = {}
    for text in brokers or (["localhost"] if topology == "shared" else []):
        party, separator, address = text.rpartition("=")
        match = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:\[\]]+)(?::([0-9]{1,5}))?", address)
        if match is None or party in named or bool(separator) == (topology == "shared"):
            raise ConfigurationError(f"--broker {text!r} does not fit a {topology} federation", hint=hint)
        named[party] = {"host": match[1].strip("[]"), "port": int(match[2] or 5671), "tls": True}
    if topology == "shared":
        return dict.fromkeys(parties, named[""])
    if wrong := sorted(set(parties) ^ set(named)):
        raise ConfigurationError(f"parties and brokers do not agree: {', '.join(wrong)}", hint=hint)
    return named


def set_up(setup: Setup, *, now: datetime) -> dict[str, bytes]:
    """Every file, by its path in the folder. Keys and passwords are new; `setup.identities` are those made here.

    Raises:
        ConfigurationError: a time of validity that is none.
    """
    if not 1 <= setup.valid_days <= 36_500:
        raise ConfigurationError(f"certificates valid for {setup.valid_days} days; 1 to 36500 is possible")
    federation = setup.federation
    authority = make_authority(f"fate.{federation.name} authority", now=now, days=setup.valid_days)
    passwords = {party: random_id(_PASSWORD) for party in federation.members}
    roster = dump_model(federation).encode("utf-8")
    files = {
        "federation.yaml": roster,
        "authority/ca.pem": authority.pair.certificate,
        "authority/ca.key": authority.pair.key,
    }
    for party in federation.members:
        inside = _party(setup, party, passwords[party], authority, now)
        files |= {f"parties/{party}/{name}": content for name, content in inside.items()}
    for owner, inside in _brokers(setup, passwords, authority, now).items():
        files |= {f"brokers/{owner}/{name}": content for name, content in inside.items()}
    return files


def _party(setup: Setup, party: str, password: str, authority: Authority, now: datetime) -> dict[str, bytes]:
    client = authority.issue_client(party, now=now, days=setup.valid_days)
    place = setup.federation.member(party).broker
    settings = {
        "version": 1,
        "party": party,
        "federation": "federation.yaml",
        "identity": "identity.key",
        "broker": place.url(party, setup.federation.vhost) + ("?queues=quorum" if setup.quorum else ""),
        "password": "broker.password",
        "ca": "ca.pem",
        "certificate": "client.pem",
        "key": "client.key",
    }
    home = home_files(
        settings, setup.federation, identity=setup.identities.get(party), sealing=setup.sealing.get(party)
    )
    return home | {
        "broker.password": f"{password}\n".encode(),
        "ca.pem": authority.pair.certificate,
        "client.pem": client.certificate,
        "client.key": client.key,
    }


def _brokers(
    setup: Setup, passwords: Mapping[str, str], authority: Authority, now: datetime
) -> dict[str, dict[str, bytes]]:
    federation = setup.federation
    members = federation.members
    if federation.topology == "shared":
        place = federation.member(members[0]).broker
        text = broker_definitions(federation, None, passwords, setup.limits, quorum=setup.quorum, salt=random_bytes)
        return {SHARED: _broker(setup, None, place, text, authority, now)}
    # links[a][b]: the password of a's broker at b's
    links = {a: {b: random_id(_PASSWORD) for b in members if b != a} for a in members}
    found = {}
    for owner in members:
        users = {owner: passwords[owner]} | {layout.link_user(p): links[p][owner] for p in members if p != owner}
        text = broker_definitions(
            federation, owner, users, setup.limits, quorum=setup.quorum, salt=random_bytes, links=links[owner]
        )
        found[owner] = _broker(setup, owner, federation.member(owner).broker, text, authority, now)
    return found


def _broker(
    setup: Setup, owner: str | None, place: BrokerPlace, definitions: str, authority: Authority, now: datetime
) -> dict[str, bytes]:
    server = authority.issue_server(place.host, [place.host], now=now, days=setup.valid_days)
    plugins = ",".join(broker_plugins(setup.federation))
    return {
        "rabbitmq.conf": rabbitmq_conf(setup.federation, owner, setup.limits, port=place.port).encode("utf-8"),
        "enabled_plugins": f"[{plugins}].\n".encode(),
        "definitions.json": definitions.encode("utf-8"),
        "ca.pem": authority.pair.certificate,
        "server.pem": server.certificate,
        "server.key": server.key,
    }


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a tree of files (0600, folders 0700) to `folder`, which is new or empty: all of them or none.

    Raises:
        ConfigurationError: something is there already, or it cannot be written.
    """
    target = folder.absolute()
    partial = target.with_name(f".{target.name}.{random_id(4)}.partial")
    try:
        if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
            raise ConfigurationError(
                f"{folder} is not empty: keys and passwords are never overwritten", hint="Name a folder that is new."
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(mode=0o700)
        for name, content in files.items():
            path = partial / name
            for parent in reversed(path.relative_to(partial).parents):
                (partial / parent).mkdir(mode=0o700, exist_ok=True)
            write_new(path, content)
        os.rename(partial, target)  # onto nothing or an empty folder; anything else there by now is an error
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be written: {error.strerror}", hint="Name another place.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
