"""Words of services on a real broker: published once or not at all; and standing inboxes that cannot hear everybody."""

# ruff: noqa: F811 (fixtures that are imported are named again as arguments)

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import pytest

from fate_llm.core.errors import BrokerRefused, TransportClosed
from fate_llm.protocols.broker_layout import control_inbox, control_key, exchange_of, job_key
from fate_llm.protocols.transports.rabbitmq import BrokerAddress, RabbitTransport
from fate_llm.runtime.broker import BrokerNode
from tests.brokers import CutProxy, admin, broker, vhost  # noqa: F401

SOON = 15.0  # seconds for what should come; a test that passes does not wait for it
Connect = Callable[..., RabbitTransport]
Told = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def told() -> Told:
    return []


@pytest.fixture
def connect(broker: BrokerNode, vhost: str, told: Told) -> Iterator[Connect]:
    opened: list[RabbitTransport] = []

    def make(party: str, *, port: int | None = None, user: str = "guest", **settings: Any) -> RabbitTransport:
        url = broker.url(user, "guest", vhost=vhost)
        url = url if port is None else url.replace(f":{broker.port}/", f":{port}/")
        named = {
            "members": ("a", "b"),
            "job": None,
            "observer": lambda event, fields: told.append((event, dict(fields))),
            **settings,
        }
        opened.append(RabbitTransport(BrokerAddress.from_url(f"{url}?plaintext=loopback"), party=party, **named))
        return opened[-1]

    yield make
    for transport in opened:
        transport.close()


def until(holds: Callable[[], object], seconds: float = SOON) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def settled(transport: RabbitTransport) -> bool:
    """Nothing is under way, by its own account."""
    return transport._loose == {} and transport._loose_bytes == 0


def test_what_is_published_once_comes_in_order(connect: Connect) -> None:
    a, b = connect("a"), connect("b")
    for at in range(50):
        assert a.publish_once(control_key("b"), b"%d" % at, expires=60.0)
    found = []
    for _ in range(50):
        delivery = b.receive(SOON)
        assert delivery is not None and delivery.sender == "a"
        b.ack(delivery)
        found.append(bytes(delivery.body))
    assert found == [b"%d" % at for at in range(50)]
    until(lambda: settled(a))
    assert (a.counters.published, a.counters.confirmed, a.counters.returned) == (50, 50, 0)


def test_what_no_inbox_takes_is_dropped_and_told(connect: Connect, told: Told) -> None:
    a = connect("a")
    for key in (control_key("b"), job_key("b", "doctor-1")):
        assert a.publish_once(key, b"x" * 1000, expires=60.0)
    until(lambda: len(told) == 2 and settled(a))
    assert told == [("no_inbox", {"key": "b/control"}), ("no_inbox", {"key": "b/job/doctor-1"})]
    assert (a.counters.returned, a.counters.confirmed) == (2, 0)
    # and it does not come later
    b = connect("b")
    assert b.receive(0.3) is None


def test_lanes_and_words_do_not_mix(connect: Connect) -> None:
    """The same transport may have both under way: a lane waits for its inbox, a word does not."""
    a = connect("a")
    a.send("b", [b"lane"])
    for _ in range(5):
        a.publish_once(control_key("b"), b"word", expires=60.0)
    until(lambda: a.counters.returned >= 6)
    b = connect("b")
    delivery = b.receive(SOON)
    assert delivery is not None and bytes(delivery.body) == b"lane"
    assert a.flush(SOON) and settled(a)
    assert b.receive(0.3) is None


def test_it_expires(connect: Connect) -> None:
    connect("b").close()
    a = connect("a")
    assert a.publish_once(control_key("b"), b"soon gone", expires=0.05)
    until(lambda: settled(a))
    time.sleep(0.2)
    b = connect("b")
    a.publish_once(control_key("b"), b"new", expires=60.0)
    delivery = b.receive(SOON)
    assert delivery is not None and bytes(delivery.body) == b"new"


def test_beyond_the_window_nothing_is_taken(connect: Connect, broker: BrokerNode) -> None:
    connect("b").close()
    with CutProxy(broker.port) as proxy:
        a = connect("a", port=proxy.port, window=1000)
        # Given a broker that does not confirm
        proxy.cut(up=False)
        assert a.publish_once(control_key("b"), bytes(600), expires=60.0)
        assert a.publish_once(control_key("b"), bytes(5000), expires=60.0), "one more, however large"
        assert not a.writable() and not a.publish_once(control_key("b"), b"x", expires=60.0)
        # When the connection is lost, Then what was under way is forgotten, and there is room again
        proxy.heal()
        proxy.drop_connections()
        until(lambda: a.counters.reconnects == 1 and a.connected)
        assert a.writable() and settled(a)
        assert a.publish_once(control_key("b"), b"x", expires=60.0)
        until(lambda: settled(a))


def test_after_the_end_it_says_so(connect: Connect) -> None:
    a = connect("a")
    a.close()
    for call in (a.writable, lambda: a.publish_once(control_key("b"), b"x", expires=1.0)):
        with pytest.raises(TransportClosed):
            call()


@pytest.fixture
def poor(broker: BrokerNode, vhost: str) -> Iterator[str]:
    """A user who may use the place of `a` in this virtual host, and make no exchange."""
    name = f"poor-{vhost}"
    admin(broker, "PUT", f"users/{name}", {"password": "guest", "tags": ""})
    for party in "ab":
        where = f"exchanges/{vhost}/{quote(exchange_of(party), safe='')}"
        admin(broker, "PUT", where, {"type": "topic", "durable": True})
    allowed = {"configure": r"^fate\.to\.a/.*$", "write": r"^(fate\.from\.a|fate\.to\.a/.*)$", "read": ".*"}
    admin(broker, "PUT", f"permissions/{vhost}/{name}", allowed)
    yield name
    admin(broker, "DELETE", f"users/{name}")


def test_a_member_without_an_exchange_is_silent_until_it_has_one(
    broker: BrokerNode, vhost: str, poor: str, connect: Connect
) -> None:
    where = f"exchanges/{vhost}/{quote(exchange_of('b'), safe='')}"
    admin(broker, "DELETE", where)
    a = connect("a", user=poor)
    assert list(a.silent) == ["b"] and "no exchange" in a.silent["b"]
    a.listen_again()
    assert list(a.silent) == ["b"]
    # When it has its place, Then it is heard, on the same connection
    admin(broker, "PUT", where, {"type": "topic", "durable": True})
    a.listen_again()
    assert a.silent == {}
    b = connect("b")
    b.publish_once(control_key("a"), b"hello", expires=60.0)
    delivery = a.receive(SOON)
    assert delivery is not None and (delivery.sender, bytes(delivery.body)) == ("b", b"hello")
    assert a.counters.reconnects == 0


def test_a_member_whom_we_may_not_hear_yet_is_silent(
    broker: BrokerNode, vhost: str, poor: str, connect: Connect
) -> None:
    only = {
        "configure": r"^fate\.to\.a/.*$",
        "write": r"^(fate\.from\.a|fate\.to\.a/.*)$",
        "read": r"^fate\.(to\.a/.*|from\.a)$",
    }
    admin(broker, "PUT", f"permissions/{vhost}/{poor}", only)
    a = connect("a", user=poor)
    assert list(a.silent) == ["b"] and "access" in a.silent["b"]


def test_the_place_of_its_own_has_to_be_there(broker: BrokerNode, vhost: str, poor: str, connect: Connect) -> None:
    admin(broker, "DELETE", f"exchanges/{vhost}/{quote(exchange_of('a'), safe='')}")
    with pytest.raises(BrokerRefused, match=r"fate\.from\.a is missing"):
        connect("a", user=poor)


def test_of_a_job_no_member_may_be_silent(broker: BrokerNode, vhost: str, poor: str, connect: Connect) -> None:
    admin(broker, "DELETE", f"exchanges/{vhost}/{quote(exchange_of('b'), safe='')}")
    with pytest.raises(BrokerRefused, match=r"fate\.from\.b is missing"):
        connect("a", user=poor, job="j")


def test_the_standing_inbox_is_declared_as_its_layout_says(broker: BrokerNode, vhost: str, connect: Connect) -> None:
    connect("a")
    found = admin(broker, "GET", f"queues/{vhost}/{quote(control_inbox('a'), safe='')}")
    assert found["arguments"] == {"x-queue-type": "classic"} and found["durable"]
