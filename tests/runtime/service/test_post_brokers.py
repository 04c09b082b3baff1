"""The post over real brokers: least permissions, both topologies, brokers and parties that go away and come back."""

# ruff: noqa: F811 (fixtures that are imported are named again as arguments)

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from fate_llm import __version__
from fate_llm.protocols.broker_layout import control_inbox, exchange_of
from fate_llm.protocols.transports.rabbitmq import BrokerAddress
from fate_llm.runtime.broker import BrokerNode
from fate_llm.runtime.doctor import Patient, examine
from fate_llm.runtime.federation import Federation, PartySettings, make_federation
from fate_llm.runtime.service import outbox, post
from fate_llm.runtime.service.post import Post
from fate_llm.runtime.service.words import JobState, News, PartState, Question, Report
from fate_llm.security.identity import Identity
from fate_llm.security.sealed_box import SealingKey
from tests.brokers import LiveFederation, admin, broker, fresh_broker, live_federation  # noqa: F401
from tests.runtime.granted import Granted, granted, prefixed

DIGEST = "0" * 64
SOON = 60.0  # seconds for what should come; a test that passes does not wait for it
NOTHING = 0.5  # seconds in which nothing comes
A, B, C = prefixed()


def news(serial: int = 1, job: str = "j", **fields: Any) -> News:
    return News(job=job, digest=DIGEST, serial=serial, state=JobState.RUNNING, **fields)


def report(serial: int = 1) -> Report:
    return Report(job="j", digest=DIGEST, serial=serial, state=PartState.RUNNING)


def question(name: str = "q") -> Question:
    return Question(question=name, specification={})


def until(holds: Callable[[], object], seconds: float = SOON) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


class Guard:
    """What the store does."""

    def __init__(self) -> None:
        self.highest: dict[str, tuple[int, int]] = {}

    def heard(self, sender: str, epoch: int, counter: int) -> bool:
        if (epoch, counter) <= self.highest.get(sender, (-1, -1)):
            return False
        self.highest[sender] = (epoch, counter)
        return True


@dataclass
class Office:
    """Opens posts of a federation's parties and closes them. told: what their observers heard."""

    federation: Federation
    identities: dict[str, Identity]
    sealings: dict[str, SealingKey]
    settings: Callable[[str], PartySettings]
    address: Callable[[str], BrokerAddress | None] = lambda _party: None
    told: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    opened: list[Post] = field(default_factory=list)
    guards: dict[str, Guard] = field(default_factory=dict)

    def open(self, party: str, *, wait: bool = True, federation: Federation | None = None) -> Post:
        found = Post(
            self.settings(party),
            federation or self.federation,
            self.identities[party],
            self.sealings[party],
            self.guards.setdefault(party, Guard()),
            time.time_ns(),
            time.time_ns,
            lambda event, fields: self.told.append((party, event, dict(fields))),
            self.address(party),
        )
        self.opened.append(found)
        if wait:
            until(lambda: found.connected)
        return found

    def heard(self, event: str) -> list[dict[str, Any]]:
        return [fields for _, name, fields in self.told if name == event]

    def close(self) -> None:
        for one in self.opened:
            one.close()
            assert not one._thread.is_alive()


def settings_of(party: str) -> PartySettings:
    broker = "amqp://guest@127.0.0.1/v?plaintext=loopback"
    return PartySettings(version=1, party=party, federation=Path("f"), identity=Path("i"), broker=broker)


def exchange(posts: Sequence[Post], serial: int) -> None:
    """Everybody tells everybody a state, and hears all others."""
    for one in posts:
        for other in posts:
            if other is not one:
                one.send(other.party, news(serial, one.party))
    for one in posts:
        found = dict(_received(one) for _ in range(len(posts) - 1))
        assert found == {other.party: news(serial, other.party) for other in posts if other is not one}


def _received(one: Post) -> tuple[str, Any]:
    found = one.receive(SOON)
    assert found is not None, f"{one} heard nothing; {one.counts}"
    return found


# --- least permissions, as `federation grant` gives them ------------------------------------------------------------


@pytest.fixture
def place(broker: BrokerNode, tmp_path: Path) -> Iterator[Granted]:
    with granted(broker, tmp_path, (A, B, C)) as found:
        yield found


@pytest.fixture
def office(place: Granted) -> Iterator[Office]:
    setup = place.setup
    found = Office(place.federation, dict(setup.identities), dict(setup.sealing), settings_of, place.address)
    try:
        yield found
    finally:
        found.close()


def queue(place: Granted, party: str) -> Any:
    return admin(place.node, "GET", f"queues/{place.vhost}/{quote(control_inbox(party), safe='')}")


def waiting_in(place: Granted, party: str) -> int:
    """Messages in the standing inbox, asked of the queue itself: the API's figures are of some seconds ago."""
    found = place.node.ctl("list_queues", "-p", place.vhost, "name", "messages", "--silent").splitlines()
    lines = dict(line.split("\t") for line in found if "\t" in line)
    return int(lines[control_inbox(party)])


def test_three_services_talk_with_the_least_permissions(place: Granted, office: Office) -> None:
    posts = [office.open(party) for party in (A, B, C)]
    for serial in (1, 2, 3):
        exchange(posts, serial)
    until(lambda: sum(waiting_in(place, party) for party in (A, B, C)) == 0)
    assert office.told == []
    assert all(one.counts == {"sent": 6, "received": 6} for one in posts)


def test_a_large_word_comes_through(office: Office) -> None:
    a, b = office.open(A), office.open(B)
    large = Question(question="q", specification={"text": os.urandom(6_000_000).hex()})
    for _ in range(3):
        a.send(B, large)
        a.send(B, news())
        assert {found[1].kind: found[1] for found in (_received(b), _received(b))} == {
            "question": large,
            "news": news(),
        }


def test_who_is_away_finds_the_last_words_that_have_not_expired(
    place: Granted, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given B away, while A says states that expire soon, and asks
    monkeypatch.setattr(outbox, "STATES", 0.2)
    a, b = office.open(A), office.open(B)
    exchange([a, b], 1)
    b.close()
    for serial in range(2, 30):
        a.send(B, news(serial))
        until(lambda: a.waiting == 0)
    a.send(B, question())
    until(lambda: a.counts["sent"] == 30)
    time.sleep(1.0)
    # When it comes back, Then it hears the question, and the states said from then on
    again = office.open(B)
    assert _received(again) == (A, question())
    a.send(B, news(99))
    assert _received(again) == (A, news(99))
    assert again.counts == {"received": 2}


def test_what_waits_says_how_long(place: Granted, office: Office) -> None:
    a = office.open(A)
    a.send(B, news())
    a.send(B, question())
    until(lambda: a.counts["sent"] == 2 and waiting_in(place, B) == 2)
    body = {"count": 2, "ackmode": "ack_requeue_true", "encoding": "base64"}
    path = f"queues/{place.vhost}/{quote(control_inbox(B), safe='')}/get"
    found = [one["properties"] for one in admin(place.node, "POST", path, body)]
    assert [(one["expiration"], one["user_id"], one["delivery_mode"]) for one in found] == [
        ("60000", A, 2),
        ("3600000", A, 2),
    ]


def test_what_was_not_received_comes_again_and_what_was_heard_is_not_heard_twice(
    place: Granted, office: Office
) -> None:
    a, b = office.open(A), office.open(B)
    for name in "pqr":
        a.send(B, question(name))
    assert _received(b) == (A, question("p"))
    b.close()
    again = office.open(B)
    assert [_received(again)[1], _received(again)[1]] == [question("q"), question("r")]
    assert again.receive(NOTHING) is None
    assert waiting_in(place, B) == 0


def test_a_party_that_never_was_there_costs_nothing(place: Granted, office: Office) -> None:
    admin(place.node, "DELETE", f"queues/{place.vhost}/{quote(control_inbox(C), safe='')}")
    a, b = office.open(A), office.open(B)
    for serial in range(1, 4):
        a.send(C, news(serial))
        a.send(B, news(serial))
        assert _received(b) == (A, news(serial))
    until(lambda: a.counts["no inbox takes it"] == 3)
    assert a.waiting == 0 and office.heard("word_dropped") == [{"party": C, "why": "no inbox takes it"}]


def test_an_inbox_that_an_operator_deletes_is_made_anew(place: Granted, office: Office) -> None:
    a, b = office.open(A), office.open(B)
    exchange([a, b], 1)
    admin(place.node, "DELETE", f"queues/{place.vhost}/{quote(control_inbox(B), safe='')}")
    until(lambda: office.heard("inbox_deleted"))

    def comes() -> bool:
        a.send(B, news(2))
        return b.receive(NOTHING) == (A, news(2))

    until(comes)


def test_a_partner_without_a_place_holds_up_nobody(
    place: Granted, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given an exchange of C's that is missing, and may not be made by others
    monkeypatch.setattr(post, "_LISTEN_AGAIN", 0.3)
    admin(place.node, "DELETE", f"exchanges/{place.vhost}/{quote(exchange_of(C), safe='')}")
    a, b = office.open(A), office.open(B)
    exchange([a, b], 1)
    assert {fields["party"] for fields in office.heard("partner_silent")} == {C}
    # When an operator gives C its place, Then all talk, and nobody has started again
    place.grant(C)
    until(lambda: len(office.heard("partner_heard")) == 2)
    exchange([a, b, office.open(C)], 2)
    assert a._transport is not None and a._transport.counters.reconnects == 0


def test_a_permission_that_is_missing_is_waited_for(place: Granted, office: Office) -> None:
    place.permit(B, read="^$")
    a, b = office.open(A), office.open(B, wait=False)
    until(lambda: office.heard("post_away"))
    assert "access" in b.away and not b.connected
    place.grant(B)
    until(lambda: b.connected)
    exchange([a, b], 1)


def test_the_doctor_of_another_party_is_answered(place: Granted, office: Office) -> None:
    # Given the service of B, and none of C, When A's doctor looks at them
    b = office.open(B)
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        serving = pool.submit(lambda: [b.receive(0.1) for _ in iter(stop.is_set, True)])
        checks = {check.name: check for check in examine(Patient(place.address(A), A, me=place.me(A))).checks}
        stop.set()
        assert set(serving.result()) == {None}
    # Then B answers, both ways of its throughput as well
    assert checks[f"{B}: throughput"].status == "ok" and "there and back" in checks[f"{B}: throughput"].found
    assert (checks[f"{B}: answers"].status, checks[f"{C}: answers"].status) == ("warning", "warning")
    assert __version__ in checks[f"{B}: answers"].found and b.counts["pings"] >= 19


# --- brokers that die, and brokers that are linked --------------------------------------------------------------------


def test_the_broker_dies_and_comes_back(fresh_broker: BrokerNode) -> None:
    sealings = {party: SealingKey.generate() for party in "ab"}
    identities = {party: Identity.generate() for party in "ab"}
    place = {"host": "127.0.0.1", "port": fresh_broker.port, "tls": False}
    parties = {
        party: {
            "identity": identities[party].public.to_text(),
            "sealing": sealings[party].public.to_text(),
            "broker": place,
        }
        for party in "ab"
    }
    roster = {"version": 1, "name": "trial", "vhost": "v", "topology": "shared", "parties": parties}
    address = BrokerAddress.from_url(f"{fresh_broker.url()}?plaintext=loopback")
    office = Office(make_federation(roster), identities, sealings, settings_of, lambda _party: address)
    try:
        # Given two that talk, When the broker dies, and their states change meanwhile
        a, b = office.open("a"), office.open("b")
        exchange([a, b], 1)
        fresh_broker.kill()
        until(lambda: not a.connected and not b.connected)
        for serial in range(2, 20):
            a.send("b", news(serial, "a"))
            b.send("a", news(serial, "b"))
        assert (a.waiting, b.waiting) == (1, 1) and a.away
        fresh_broker.start(120.0)
        # Then the last of each comes, once, and nobody has been started again
        assert [_received(a), _received(b)] == [("b", news(19, "b")), ("a", news(19, "a"))]
        exchange([a, b], 20)
        assert a.receive(NOTHING) is None and b.receive(NOTHING) is None
    finally:
        office.close()


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["shared", "per-party"])
def test_services_talk_in_a_federation_as_it_is_set_up(topology: Any) -> None:
    with live_federation("left", "right", topology=topology) as live:
        homes = {party: live.party(party) for party in ("left", "right")}
        identities = {party: home.load_identity() for party, home in homes.items()}
        sealings = {party: home.load_sealing() or SealingKey.generate() for party, home in homes.items()}
        office = Office(live.federation, identities, sealings, lambda party: homes[party])
        try:
            _talk_over(live, office)
        finally:
            office.close()


def _talk_over(live: LiveFederation, office: Office) -> None:
    # Given both, over TLS, with the permissions that were written for them
    left, right = office.open("left"), office.open("right")

    def first() -> bool:
        """A link between brokers needs a moment to learn what is bound behind it."""
        left.send("right", news(1, "left"))
        return right.receive(NOTHING) is not None

    until(first)
    while right.receive(NOTHING):
        pass
    right.send("left", report())
    until(lambda: right.counts["sent"] == 1)
    if left.receive(5.0) is None:  # the same the other way round
        until(lambda: right.send("left", report()) is None and left.receive(NOTHING) is not None)
    while left.receive(NOTHING):
        pass
    exchange([left, right], 2)
    # When the broker of one dies and comes back
    node = live.node("right")
    node.kill()
    until(lambda: not right.connected)
    right.send("left", news(3, "right"))
    node.start(120.0)
    # Then what is said from then on comes again, both ways
    until(
        lambda: left.receive(NOTHING) == ("right", news(3, "right")) or right.send("left", news(3, "right")) is not None
    )
    until(lambda: left.send("right", report(4)) is None and right.receive(NOTHING) == ("left", report(4)))
