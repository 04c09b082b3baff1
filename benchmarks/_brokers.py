"""RabbitMQ nodes for a benchmark, laid out for a federation, and programs that run side by side against them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tempfile
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from _measure import Child, environment

from fate_llm.protocols.broker_layout import exchange_of, permissions_of, topic_permissions_of
from fate_llm.runtime.broker import BrokerNode, TlsFiles
from fate_llm.runtime.federation_setup import plan_setup, set_up
from fate_llm.security.certificates import make_authority

__all__ = ["Broker", "BrokerEach", "Way", "broker", "broker_each", "together"]

_PASSWORD = "benchmark"  # of users that live as long as the node, on loopback


class Way(Protocol):
    """How a program of a party gets to its broker."""

    def words(self, user: str, *, tls: bool) -> list[str | Path]:
        """As options of a program."""
        ...


@dataclass(frozen=True, slots=True)
class Broker:
    """A running node. `guest` may do everything; each party is a user with the rights of a federation's member."""

    node: BrokerNode
    ca: Path

    def url(self, user: str, *, tls: bool) -> str:
        """Without TLS the URL says that this is meant, as our transport demands."""
        if user == "guest":
            return self.node.tls_url() if tls else self.node.url()
        if tls:
            return self.node.tls_url(user, _PASSWORD)
        return self.node.url(user, _PASSWORD) + "?plaintext=loopback"

    def words(self, user: str, *, tls: bool) -> list[str | Path]:
        """As options of a program."""
        words: list[str | Path] = ["--url", self.url(user, tls=tls)]
        return [*words, "--ca", self.ca] if tls else words


@contextmanager
def broker(members: Sequence[str]) -> Iterator[Broker]:
    """A fresh node on free ports of loopback for these parties, stopped at the end."""
    with tempfile.TemporaryDirectory(prefix="fate-broker-") as scratch:
        folder = Path(scratch)
        folder.chmod(0o755)  # the node may run as a user of its own
        ca, certificate, key = _certificates(folder)
        definitions = folder / "definitions.json"
        definitions.write_text(json.dumps(_definitions(tuple(members))))
        tls = TlsFiles(ca=ca, certificate=certificate, key=key)
        with BrokerNode(folder / "node", name="benchmark", tls=tls, definitions=definitions) as node:
            yield Broker(node, ca)


@dataclass(frozen=True, slots=True)
class BrokerEach:
    """A running node for each party, linked over TLS; urls: of each party's own node, as its user."""

    urls: Mapping[str, str]
    ca: Path

    def words(self, user: str, *, tls: bool) -> list[str | Path]:
        """As options of a program. There is no way without TLS, and no user but the party.

        Raises:
            ValueError: no TLS was asked for.
        """
        if not tls:
            raise ValueError("brokers of their own are linked and used over TLS only")
        return ["--url", self.urls[user], "--ca", self.ca]


@contextmanager
def broker_each(members: Sequence[str]) -> Iterator[BrokerEach]:
    """Fresh nodes as `fate_llm federation init --topology per-party` lays them out, stopped at the end."""
    with tempfile.TemporaryDirectory(prefix="fate-broker-") as scratch, ExitStack() as running:
        folder = Path(scratch)
        folder.chmod(0o755)  # the nodes may run as a user of their own
        ca, certificate, key = (folder / name for name in ("ca.pem", "server.pem", "server.key"))
        nodes = {
            party: BrokerNode(
                folder / party,
                name="benchmark",
                plugins=("rabbitmq_federation",),
                tls=TlsFiles(ca=ca, certificate=certificate, key=key),
                config={"cluster_name": party, "listeners.tcp": "none"},
                definitions=folder / f"{party}.json",
            )
            for party in members
        }
        places = [f"{party}=localhost:{node.tls_port}" for party, node in nodes.items()]
        setup = plan_setup(
            name="benchmark", parties=members, topology="per-party", brokers=places, config_folder=str(folder)
        )
        files = set_up(setup, now=datetime.now(UTC))
        for file in (ca, certificate, key):  # of one party: all nodes are this machine
            file.write_bytes(files[f"brokers/{members[0]}/{file.name}"])
            file.chmod(0o644)
        urls = {}
        for party, node in nodes.items():
            (folder / f"{party}.json").write_bytes(files[f"brokers/{party}/definitions.json"])
            running.enter_context(node)
            password = files[f"parties/{party}/broker.password"].decode().strip()
            urls[party] = node.tls_url(party, password, setup.federation.vhost)
        yield BrokerEach(urls, ca)


def _definitions(members: tuple[str, ...]) -> dict[str, Any]:
    """What an operator grants the parties of a federation, and a user for the plain programs."""
    place = {"vhost": "/"}
    guest = {"user": "guest", "configure": ".*", "write": ".*", "read": ".*", **place}
    exchange = {"type": "topic", "durable": True, "auto_delete": False, "internal": False, "arguments": {}, **place}
    return {
        "vhosts": [{"name": "/"}],
        "users": [_user("guest", "guest"), *(_user(party, _PASSWORD) for party in members)],
        "permissions": [
            guest,
            *({"user": party, **asdict(permissions_of(party, members)), **place} for party in members),
        ],
        "topic_permissions": [
            {"user": party, **asdict(entry), **place}
            for party in members
            for entry in topic_permissions_of(party, members)
        ],
        "exchanges": [{"name": exchange_of(party), **exchange} for party in members],
    }


def _user(name: str, password: str) -> dict[str, Any]:
    salt = os.urandom(4)
    hashed = b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()
    algorithm = "rabbit_password_hashing_sha256"
    return {"name": name, "password_hash": hashed, "hashing_algorithm": algorithm, "tags": ""}


def _certificates(folder: Path) -> tuple[Path, Path, Path]:
    """Files of an authority, and of certificate and key of a server on this machine's loopback."""
    now = datetime.now(UTC)
    authority = make_authority("benchmark", now=now, days=2)
    server = authority.issue_server("localhost", ["localhost", "127.0.0.1"], now=now, days=2)
    files = {"ca.pem": authority.pair.certificate, "server.pem": server.certificate, "server.key": server.key}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    ca, certificate, key = (folder / name for name in files)
    return ca, certificate, key


# --- programs side by side ---------------------------------------------------------------------------------------


def together(
    commands: Mapping[str, Sequence[str | Path]], *, timeout: float, env: Mapping[str, str] | None = None
) -> dict[str, Child]:
    """Run programs at the same time, each to its end; the last line of each is a JSON object.

    Raises:
        SystemExit: one failed, or took longer than `timeout` seconds; none is left running.
    """
    started = time.monotonic()
    own = dict(env) if env is not None else environment()
    with tempfile.TemporaryDirectory() as scratch:
        running: dict[str, subprocess.Popen[bytes]] = {}
        try:
            for name, command in commands.items():
                with Path(scratch, f"{name}.out").open("wb") as out, Path(scratch, f"{name}.err").open("wb") as err:
                    words = [str(word) for word in command]
                    running[name] = subprocess.Popen(words, stdout=out, stderr=err, env=own)
            _wait_for_all(running, started + timeout, Path(scratch))
            return {name: _child(started, name, Path(scratch)) for name in commands}
        finally:
            for process in running.values():
                process.kill()  # does nothing to one that has ended
            for process in running.values():
                process.wait()


def _wait_for_all(running: Mapping[str, subprocess.Popen[bytes]], end: float, scratch: Path) -> None:
    while waiting := [name for name, process in running.items() if process.poll() is None]:
        _check_ended_well(running, scratch)
        if time.monotonic() > end:
            raise SystemExit(f"{', '.join(waiting)} took too long{_words(waiting, scratch)}")
        time.sleep(0.05)
    _check_ended_well(running, scratch)


def _check_ended_well(running: Mapping[str, subprocess.Popen[bytes]], scratch: Path) -> None:
    failed = [name for name, process in running.items() if process.poll()]
    if failed:
        raise SystemExit(f"{failed[0]} ended with {running[failed[0]].poll()}{_words(running, scratch)}")


def _words(names: Sequence[str] | Mapping[str, object], scratch: Path) -> str:
    """The end of what each said on stderr."""
    return "".join(f"\n--- {name}\n{(scratch / f'{name}.err').read_text()[-2000:]}" for name in names)


def _child(started: float, name: str, scratch: Path) -> Child:
    lines = (scratch / f"{name}.out").read_text().strip().splitlines()
    seconds = time.monotonic() - started
    return Child(started, seconds, json.loads(lines[-1]) if lines else {}, (scratch / f"{name}.err").read_text())
