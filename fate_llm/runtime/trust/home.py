"""A party's home: the folder with its keys, settings, policy, catalogue and, below `state`, all that its service keeps.

<home>/
  party.yaml, federation.yaml         settings, and the roster with every partner's keys
  identity.key, sealing.key           secret halves of the keys (0600)
  policy.yaml, catalog.yaml           what partners may do here, and our names for data
  api.token, broker.password          secrets of the API and of our user at the broker (0600)
  ca.pem, client.pem, client.key      certificates, where there are any
  state/                              fate.db, jobs/, artifacts/, audit/ (0700)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fate_llm.core.errors import ConfigurationError
from fate_llm.core.names import NAME_PATTERN, is_name
from fate_llm.pipelines.dialect import dump
from fate_llm.runtime.federation import (
    BrokerPlace,
    Federation,
    PartySettings,
    Topology,
    dump_model,
    load_party,
    make_federation,
)
from fate_llm.security.identity import Identity
from fate_llm.security.randomness import random_id
from fate_llm.security.sealed_box import SealingKey

from ..store.engine import sqlite_url
from .catalog import EMPTY_CATALOG, Catalog, load_catalog
from .policy_schema import Policy, load_policy, make_policy
from .templates import CATALOG_TEMPLATE, POLICY_TEMPLATE, party_yaml

__all__ = ["Home", "broker_place", "home_files", "new_home", "open_home"]

_SECRET = 24  # bytes of randomness
_PLACE = re.compile(r"(\[[0-9a-fA-F:]+\]|[^:\[\]]+)(?::([0-9]{1,5}))?")


@dataclass(frozen=True, slots=True)
class Home:
    """An opened home. Secrets, policy and catalogue are read when they are asked for, so that a change counts."""

    folder: Path
    settings: PartySettings
    federation: Federation

    @property
    def party(self) -> str:
        return self.settings.party

    @property
    def state(self) -> Path:
        return self.settings.state

    @property
    def store_url(self) -> str:
        """Where the database is; a file of `state` unless party.yaml says otherwise."""
        return self.settings.store or sqlite_url(self.state / "fate.db")

    @property
    def artifacts_url(self) -> str:
        """Where artifacts are; a folder of `state` unless party.yaml says otherwise."""
        place = self.settings.artifacts
        if place is None:
            return str(self.state / "artifacts")
        return place if "://" in place else str(self.folder / Path(place).expanduser())

    def make_state(self) -> Path:
        """The folder `state`, made when it is not there, for its owner only (0700).

        Raises:
            ConfigurationError: it cannot be made.
        """
        try:
            self.state.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.state.chmod(0o700)
        except OSError as error:
            raise ConfigurationError(
                f"the folder {self.state} cannot be made: {error.strerror}", hint="`state` in party.yaml names it."
            ) from None
        return self.state

    def identity(self) -> Identity:
        """The secret identity, which has to be the one that the roster pins for this party.

        Raises:
            ConfigurationError: the file is missing, open to others, no key, or another party's.
        """
        found = self.settings.load_identity()
        if found.public != self.federation.member(self.party).public:
            raise ConfigurationError(
                f"{self.settings.identity} is not the key that {self.settings.federation} pins for {self.party}",
                hint="Restore the right file; with a new key, all partners need the new card.",
            )
        return found

    def sealing(self) -> SealingKey:
        """The secret half of the sealing key, which has to fit the roster.

        Raises:
            ConfigurationError: party.yaml names none, it is missing, open to others, no key, or does not fit.
        """
        found = self.settings.load_sealing()
        if found is None:
            raise ConfigurationError(
                f"{self.folder / 'party.yaml'} names no `sealing`: a service needs its key",
                hint="`fate_llm party init` makes one in a new home.",
            )
        if found.public.to_text() != self.federation.member(self.party).sealing:
            raise ConfigurationError(
                f"{self.settings.sealing} does not fit the sealing key that the roster has for {self.party}",
                hint="Restore the right file; with a new key, all partners need the new card.",
            )
        return found

    def policy(self) -> Policy:
        """What is allowed here; nothing at all where party.yaml names no file.

        Raises:
            ConfigurationError: the file cannot be read, or is wrong.
        """
        return make_policy({"version": 1}) if self.settings.policy is None else load_policy(self.settings.policy)

    def catalog(self) -> Catalog:
        """Our names for data and models; none where party.yaml names no file.

        Raises:
            ConfigurationError: the file cannot be read, or is wrong.
        """
        return EMPTY_CATALOG if self.settings.catalog is None else load_catalog(self.settings.catalog)


def open_home(folder: Path) -> Home:
    """The home in a folder, or beside a `party.yaml` that is named itself.

    Raises:
        ConfigurationError: there is none, or its files are wrong; all faults of a file at once.
    """
    path = folder if folder.is_file() else folder / "party.yaml"
    if not path.is_file():
        raise ConfigurationError(
            f"{folder} is no party's home: there is no party.yaml in it",
            hint="Name it with --home or FATE_LLM_HOME; `fate_llm party init` makes one.",
        )
    settings, federation = load_party(path)
    return Home(path.absolute().parent, settings, federation)


def broker_place(text: str, *, tls: bool = True) -> BrokerPlace:
    """From `HOST[:PORT]`; port 5671, or 5672 without TLS.

    Raises:
        ConfigurationError: it is no address, or without TLS on another machine.
    """
    match = _PLACE.fullmatch(text)
    hint = "A broker is HOST or HOST:PORT, such as mq.example:5671; without TLS only this machine is possible."
    if match is None:
        raise ConfigurationError(f"--broker {text!r} is no address", hint=hint)
    try:
        return BrokerPlace(host=match[1].strip("[]"), port=int(match[2] or (5671 if tls else 5672)), tls=tls)
    except ValueError:
        raise ConfigurationError(f"--broker {text!r} is no address that can be used", hint=hint) from None


def home_files(
    settings: Mapping[str, Any], roster: Federation, *, identity: Identity | None, sealing: SealingKey | None
) -> dict[str, bytes]:
    """The files of a home that are the same however its party came to be. settings: of party.yaml, without a service's.

    Keys that are None are the party's own, and put there by it.
    """
    files = {
        "party.yaml": party_yaml(dump(dict(settings))).encode("utf-8"),
        "federation.yaml": dump_model(roster).encode("utf-8"),
        "policy.yaml": POLICY_TEMPLATE.encode("utf-8"),
        "catalog.yaml": CATALOG_TEMPLATE.encode("utf-8"),
        "api.token": f"{random_id(_SECRET)}\n".encode("ascii"),
    }
    if identity is not None:
        files["identity.key"] = identity.to_bytes()
    if sealing is not None:
        files["sealing.key"] = sealing.to_bytes()
    return files


def new_home(
    *,
    party: str,
    federation: str,
    broker: BrokerPlace,
    topology: Topology = "shared",
    quorum: bool = False,
    password: str | None = None,
    ca: bytes | None = None,
    certificate: bytes | None = None,
    key: bytes | None = None,
) -> dict[str, bytes]:
    """Every file of a new home, whose roster has this party alone. Keys, token and, unless given, password are new.

    quorum: the broker is a cluster. ca, certificate, key: PEM files, for the broker.

    Raises:
        ConfigurationError: a name that is none, or a certificate without its key.
    """
    for what, name in (("--party", party), ("--federation", federation)):
        if not is_name(name):
            raise ConfigurationError(f"{what} {name!r} is not a valid id", hint=f"It has to match {NAME_PATTERN}")
    if (certificate is None) != (key is None):
        raise ConfigurationError("a certificate and its key belong together", hint="Give both or none.")
    identity, sealing = Identity.generate(), SealingKey.generate()
    roster = make_federation(
        {
            "version": 1,
            "name": federation,
            "vhost": f"fate.{federation}"[:100],
            "topology": topology,
            "parties": {
                party: {
                    "identity": identity.public.to_text(),
                    "broker": broker.model_dump(mode="json"),
                    "sealing": sealing.public.to_text(),
                }
            },
        }
    )
    pems = {"ca.pem": ca, "client.pem": certificate, "client.key": key}
    files = {name: content for name, content in pems.items() if content is not None}
    options = [text for text, given in (("plaintext=loopback", not broker.tls), ("queues=quorum", quorum)) if given]
    settings: dict[str, Any] = {
        "version": 1,
        "party": party,
        "federation": "federation.yaml",
        "identity": "identity.key",
        "broker": broker.url(party, roster.vhost) + (f"?{'&'.join(options)}" if options else ""),
        "password": "broker.password",
    }
    names = {"ca": "ca.pem", "certificate": "client.pem", "key": "client.key"}
    settings |= {name: file for name, file in names.items() if file in files}
    files["broker.password"] = f"{password or random_id(_SECRET)}\n".encode()
    return files | home_files(settings, roster, identity=identity, sealing=sealing)
