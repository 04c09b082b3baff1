"""A federation on the shared broker whose parties were given their places by `federation grant`."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import urllib.error
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from fate_llm.protocols.transports.rabbitmq import BrokerAddress
from fate_llm.runtime.broker import BrokerNode
from fate_llm.runtime.doctor_parties import Membership, answer_pings
from fate_llm.runtime.doctor_ping import Responder
from fate_llm.runtime.federation import Federation, dump_model, read_password, write_new
from fate_llm.runtime.federation_grant import grant_commands, hash_of
from fate_llm.runtime.federation_setup import Setup, plan_setup
from fate_llm.security.identity import Identity
from tests.brokers import admin

__all__ = ["VERSION", "Granted", "granted", "prefixed"]

VERSION = "1.2.3"


def prefixed(count: int = 3) -> tuple[str, ...]:
    """Names of parties that no other test's broker users have."""
    mark = os.urandom(3).hex()
    return tuple(f"bank-{letter}-{mark}" for letter in "abcdefgh"[:count])


@dataclass
class Granted:
    """The place. parties: in the roster's order."""

    node: BrokerNode
    setup: Setup
    folder: Path

    @property
    def federation(self) -> Federation:
        return self.setup.federation

    @property
    def vhost(self) -> str:
        return self.federation.vhost

    def grant(self, party: str) -> None:
        """What the commands of `grant` do, by the API: rabbitmqctl takes seconds for each."""
        for command in grant_commands(self.federation, party, hashed=hash_of(self.folder / party)):
            words = command.words
            if words[0] == "import_definitions":
                admin(self.node, "POST", "definitions", json.loads(command.text or ""))
                continue
            *_, configure, write, read = words
            where = f"{quote(self.vhost, safe='')}/{party}"
            if words[0] == "set_topic_permissions":
                body = {"exchange": words[-3], "write": write, "read": read}
                admin(self.node, "PUT", f"topic-permissions/{where}", body)
            else:
                assert words[0] == "set_permissions"
                admin(self.node, "PUT", f"permissions/{where}", {"configure": configure, "write": write, "read": read})

    def permit(self, party: str, **changes: str) -> None:
        """Other permissions than granted."""
        where = f"permissions/{quote(self.vhost, safe='')}/{party}"
        now = admin(self.node, "GET", where)
        admin(self.node, "PUT", where, {key: now[key] for key in ("configure", "write", "read")} | changes)

    def address(self, party: str, password: str | None = None) -> BrokerAddress:
        secret = read_password(self.folder / party) if password is None else password
        return BrokerAddress.from_url(self.node.url(party, secret, self.vhost) + "?plaintext=loopback")

    def me(self, party: str, *, identity: Identity | None = None, **changes: str) -> Membership:
        roster = self.federation
        facts = {"roster": roster.digest(), "version": VERSION} | changes
        return Membership(party, identity or self.setup.identities[party], roster.identities(), **facts)

    def party_file(self, party: str) -> Path:
        """party.yaml with everything beside it."""
        home = self.folder / f"home-{party}"
        home.mkdir()
        write_new(home / "identity.key", self.setup.identities[party].to_bytes())
        write_new(home / "broker.password", (self.folder / party).read_bytes())
        (home / "federation.yaml").write_text(dump_model(self.federation))
        url = self.node.url(party, "x", self.vhost).replace(":x@", "@")
        lines = {
            "version": "1",
            "party": party,
            "federation": "federation.yaml",
            "identity": "identity.key",
            "broker": f"{url}?plaintext=loopback",
            "password": "broker.password",
        }
        (home / "party.yaml").write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
        return home / "party.yaml"

    @contextlib.contextmanager
    def answering(self, me: Membership, *, ahead: float = 0.0) -> Iterator[Responder]:
        """A party that answers, in a thread. ahead: seconds by which its clock is wrong."""
        going, ready = threading.Event(), threading.Event()
        going.set()
        responder = Responder(
            me.identity,
            party=me.party,
            pins=me.pins,
            roster=me.roster,
            version=me.version,
            clock=lambda: time.time_ns() + int(ahead * 1e9),
            ticks=time.monotonic,
        )
        options = {"party": me.party, "seconds": 20.0, "going": going.is_set, "ready": ready.set}
        thread = threading.Thread(
            target=answer_pings, args=(self.address(me.party), responder), kwargs=options, daemon=True
        )
        thread.start()
        assert ready.wait(30)
        try:
            yield responder
        finally:
            going.clear()
            thread.join(30)
            assert not thread.is_alive()


@contextlib.contextmanager
def granted(node: BrokerNode, folder: Path, parties: Sequence[str]) -> Iterator[Granted]:
    """Gone afterwards, users and all."""
    setup = plan_setup(name=f"trial-{os.urandom(3).hex()}", parties=parties, topology="shared")
    found = Granted(node, setup, folder)
    try:
        for party in parties:
            found.grant(party)
        admin(node, "PUT", f"permissions/{found.vhost}/guest", {"configure": ".*", "write": ".*", "read": ".*"})
        yield found
    finally:
        for path in (f"vhosts/{found.vhost}", *(f"users/{party}" for party in parties)):
            with contextlib.suppress(urllib.error.HTTPError):
                admin(node, "DELETE", path)
