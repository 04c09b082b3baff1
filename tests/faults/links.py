"""Two parties, a and b, each with a link over its own connection to a broker; and waiting with a bound."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from fate_llm.core.errors import FateError
from fate_llm.core.interfaces import Delivery
from fate_llm.protocols.link import SecureLink, Timing
from fate_llm.protocols.transports.rabbitmq import BrokerAddress, RabbitTransport
from fate_llm.runtime.broker import BrokerNode
from fate_llm.security.identity import Identity, PublicIdentity
from tests.brokers import CutProxy, leftovers

__all__ = [
    "MIB",
    "QUICK",
    "CutProxy",
    "Pair",
    "Timing",
    "connect",
    "content",
    "digest",
    "loopback",
    "nothing_on",
    "start",
    "until",
]

MIB = 1024 * 1024
QUICK = Timing(meet=30.0, silence=60.0, keepalive=2.0, probe=0.5, report=0.05, linger=10.0)


def until(holds: Callable[[], object], seconds: float, why: Callable[[], str] = lambda: "it never came true") -> None:
    """Wait until something holds; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"after {seconds:g} s: {why()}"
        time.sleep(0.01)


def start(work: Callable[..., Any], *arguments: Any, **named: Any) -> Future[Any]:
    """Run in a thread; the future has what it returned or raised."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work(*arguments, **named))
        # The boundary of a test's thread: the error is what the test looks at.
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name=f"test-{work.__name__}").start()
    return future


def content(seed: int, size: int) -> bytes:
    """The same bytes for the same seed, in every process; they do not compress."""
    return np.random.Generator(np.random.PCG64(seed)).bytes(size)


def digest(body: bytes | memoryview) -> str:
    return hashlib.sha256(body).hexdigest()


def loopback(url: str, **options: object) -> str:
    """The address of a test's broker, or the same over a proxy: `port=`."""
    port = options.pop("port", None)
    if port is not None:
        url = f"{url.rpartition(':')[0]}:{port}/{url.rpartition('/')[2]}"
    return f"{url}?" + "&".join(f"{name}={value}" for name, value in {"plaintext": "loopback", **options}.items())


def nothing_on(node: BrokerNode, vhost: str | None = None) -> None:
    """By the broker's own listing no queue and no connection is left."""
    found: dict[str, Any] = {}

    def empty() -> bool:
        found.update(leftovers(node, vhost))
        return not found["queues"] and not found["connections"]

    until(empty, 15, lambda: f"left on the broker: {found}")


def connect(
    party: str,
    url: str,
    *,
    job: str,
    folder: Path,
    identity: Identity,
    roster: Mapping[str, PublicIdentity],
    timing: Timing = QUICK,
    observer: Callable[[str, Mapping[str, Any]], None] | None = None,
    on_gone: Callable[[str, str, str], None] | None = None,
    link: Mapping[str, Any] | None = None,
    **transport: Any,
) -> tuple[RabbitTransport, SecureLink]:
    """A party's transport, and the link above it, which owns it."""
    below = RabbitTransport(
        BrokerAddress.from_url(url), party=party, members=tuple(roster), job=job, observer=observer, **transport
    )
    try:
        above = SecureLink(
            below,
            job=job,
            attempt=1,
            party=party,
            identity=identity,
            roster=roster,
            folder=folder,
            timing=timing,
            observer=observer,
            on_gone=on_gone,
            **(link or {}),
        )
    except BaseException:
        below.close()
        raise
    return below, above


class Pair:
    """Both parties in this process. urls: of a, and of b where it is another. said, gone: what was observed."""

    def __init__(self, folder: Path, *urls: str, job: str, **settings: Any) -> None:
        self.job, self.folder = job, folder
        self.identities = {name: Identity.generate() for name in "ab"}
        self.said: list[tuple[str, str, Mapping[str, Any]]] = []
        self.gone: list[tuple[str, str, str]] = []
        self.transports: dict[str, RabbitTransport] = {}
        self.links: dict[str, SecureLink] = {}
        self._urls = {"a": urls[0], "b": urls[-1]}
        self._settings = settings
        for party in "ab":
            self.open(party)

    def open(self, party: str) -> None:
        """Start the party, or start it again on its folder."""

        def observer(event: str, fields: Mapping[str, Any]) -> None:
            self.said.append((party, event, dict(fields)))

        self.transports[party], self.links[party] = connect(
            party,
            self._urls[party],
            job=self.job,
            folder=self.folder / party,
            identity=self.identities[party],
            roster={name: identity.public for name, identity in self.identities.items()},
            observer=observer,
            on_gone=lambda *said: self.gone.append(said),
            **self._settings,
        )

    def events(self, kind: str, party: str = "ab") -> list[Mapping[str, Any]]:
        """What was observed of one kind."""
        return [fields for who, event, fields in self.said if event == kind and who in party]

    def take(self, party: str, timeout: float) -> Delivery:
        """The next message to a party, acknowledged."""
        delivery = self.links[party].receive(timeout)
        assert delivery is not None, f"nothing for {party} within {timeout:g} s; {self.story()}"
        self.links[party].ack(delivery)
        return delivery

    def echo(self, text: bytes = b"echo", timeout: float = 20.0) -> None:
        """A small message each way: both directions work, and nothing else was under way."""
        for sender, receiver in ("ab", "ba"):
            sending = start(self.links[sender].send, receiver, [text])
            assert bytes(self.take(receiver, timeout).body) == text
            sending.result(timeout)

    def story(self) -> str:
        """For the message of a test that fails."""
        counted = [(name, self.transports[name].counters, link.counters) for name, link in self.links.items()]
        return f"counters {counted}; gone {self.gone}; said {self.said[-20:]}"

    def finish(self, timeout: float = 30.0) -> None:
        """Both end in order, and nothing came in that nobody took."""
        for party, link in self.links.items():
            assert link.receive(0) is None, f"{party} was sent more than it should; {self.story()}"
        ends = [start(link.close, finished=True) for link in self.links.values()]
        for end in ends:
            end.result(timeout)
        left = [str(path) for path in self.folder.rglob("*") if path.is_file() and path.suffix == ".log"]
        assert not left, f"journals left: {left}"

    def abandon(self) -> None:
        """After a test; closing twice is fine."""
        for link in self.links.values():
            with contextlib.suppress(FateError):
                link.close()
