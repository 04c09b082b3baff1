"""Links of one job over a network that its operator controls. The fixtures are taken by import in conftest."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from fate_llm.core.errors import FateError
from fate_llm.core.interfaces import Delivery
from fate_llm.protocols.link import SecureLink, Timing
from fate_llm.protocols.transports.memory import Fault, MemoryNetwork
from fate_llm.security.identity import Identity

SOON = 10.0  # seconds for what should come; no test waits for it when all is well
QUICK = Timing(meet=60, silence=60, keepalive=30, probe=0.03, report=0.005, linger=5)
CHUNK = 64
IDENTITIES = {name: Identity(bytes([number]) * 32) for number, name in enumerate("abcd", start=1)}

Rule = Callable[[str, str, bytes], list[tuple[str, str, bytes]]]


class HostileNetwork(MemoryNetwork):
    """The broker as an adversary: sees every frame, and decides what arrives, where, and in whose name.

    rule: from (sender, receiver, frame) to what is delivered instead; None passes everything on.
    """

    def __init__(self, faults: tuple[Fault, ...] = (), *, linger: float | None = 0.01) -> None:
        super().__init__(faults, linger=linger)
        self.seen: list[tuple[str, str, bytes]] = []
        self.rule: Rule | None = None

    def _put(self, sender: str, receiver: str, body: bytes) -> None:
        self.seen.append((sender, receiver, body))
        rule = self.rule
        for one in [(sender, receiver, body)] if rule is None else rule(sender, receiver, body):
            super()._put(*one)

    def inject(self, sender: str, receiver: str, body: bytes) -> None:
        super()._put(sender, receiver, body)

    def frames(self, sender: str, receiver: str, kind: int) -> list[bytes]:
        """What was sent so far of one kind (`frames.Kind`)."""
        return [body for s, r, body in list(self.seen) if (s, r) == (sender, receiver) and body[4] == kind]


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class World:
    """The parties of one job attempt. `refused` and `gone` hold what each link told."""

    def __init__(self, folder: Path, parties: str = "ab", faults: tuple[Fault, ...] = (), attempt: int = 1) -> None:
        self.network = HostileNetwork(faults)
        self.folder = folder
        self.attempt = attempt
        self.roster = {name: IDENTITIES[name].public for name in parties}
        self.refused: list[tuple[str, Mapping[str, Any]]] = []
        self.gone: list[tuple[str, str, str, str]] = []
        self.links: list[SecureLink] = []

    def link(self, party: str, **settings: Any) -> SecureLink:
        transport = settings.pop("transport", None) or self.network.connect(party)
        known: dict[str, Any] = {
            "job": "job",
            "attempt": self.attempt,
            "identity": IDENTITIES[party],
            "roster": self.roster,
            "folder": self.folder / party,
            "timing": QUICK,
            "chunk": CHUNK,
            "observer": lambda event, fields: self.refused.append((party, {"event": event, **fields})),
            "on_gone": lambda *told: self.gone.append((party, *told)),
        }
        link = SecureLink(transport, party=party, **{**known, **settings})
        self.links.append(link)
        return link

    def pair(self, **settings: Any) -> tuple[SecureLink, SecureLink]:
        """a and b, who have agreed."""
        a, b = self.link("a", **settings), self.link("b", **settings)
        self.meet(a, b)
        return a, b

    def meet(self, *links: SecureLink) -> None:
        eventually(lambda: all(peer.ready for link in links for peer in link._peers.values()))

    def codes(self) -> set[str]:
        return {str(fields["code"]) for _, fields in self.refused}

    def files(self) -> list[str]:
        return sorted(str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file())

    def close(self) -> None:
        for link in self.links:
            link.close()
            assert not link._pump.is_alive()


@pytest.fixture
def make_world(tmp_path: Path) -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def make(*args: Any, **settings: Any) -> World:
        made.append(World(tmp_path / f"world{len(made)}", *args, **settings))
        return made[-1]

    yield make
    for world in made:
        world.close()


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    return make_world()


def eventually(condition: Callable[[], Any], what: str = "it") -> None:
    """Wait until it holds; that it never does is a failure, not a hang."""
    until = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < until, f"{what} did not come"
        time.sleep(0.002)


def take(link: SecureLink, *, ack: bool = True) -> Delivery:
    delivery = link.receive(SOON)
    assert delivery is not None, "nothing came"
    if ack:
        link.ack(delivery)
    return delivery


def crash(link: SecureLink) -> None:
    """What a SIGKILL leaves: no goodbye, no flush; only what the operating system closes is closed."""
    link._transport.close()
    link._pump.join()
    for peer in link._peers.values():
        for log in (peer._outbox, peer._inbox):
            log.close()
    link._session.close()
    link._closing = True


def run_aside(call: Callable[[], Any]) -> Callable[[], Any]:
    """Start a call in a thread; what is returned waits for its end and gives what it returned or raised."""
    ends: list[Any] = []

    def guarded() -> None:
        try:
            ends.append(call())
        # The boundary of a test's thread: the error is what the test looks at.
        except FateError as error:
            ends.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()

    def join(seconds: float = SOON) -> Any:
        thread.join(seconds)
        assert ends, "the call did not end"
        return ends[0]

    return join
