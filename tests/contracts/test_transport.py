"""The contract of every transport. A transport without a factory here fails: nothing goes untested.

The link, which is a transport on top of one, keeps the same contract over each of them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fate_llm.core import plugins
from fate_llm.core.errors import TransportClosed
from fate_llm.core.interfaces import Delivery, Transport
from fate_llm.protocols.link import SecureLink, Timing
from fate_llm.protocols.transports.memory import MemoryNetwork
from fate_llm.protocols.transports.rabbitmq import BrokerAddress, RabbitTransport
from fate_llm.security.identity import Identity
from tests.brokers import broker, vhost  # noqa: F401 -- fixtures

Connect = Callable[[str], Transport]
SOON = 10.0  # seconds for what should come; a test that passes does not wait for it


PARTIES = ("a", "b", "c", "d", "e", "f", "z")
LINK = "link over "
IDENTITIES = {name: Identity(bytes([number]) * 32) for number, name in enumerate(PARTIES, start=1)}


def memory_network(request: pytest.FixtureRequest) -> Connect:
    return MemoryNetwork().connect


def rabbitmq_network(request: pytest.FixtureRequest) -> Connect:
    url = request.getfixturevalue("broker").url(vhost=request.getfixturevalue("vhost"))
    address = BrokerAddress.from_url(url if "plaintext" in url else url + "?plaintext=loopback")
    return lambda party: RabbitTransport(address, party=party, members=PARTIES, job="job")


def link_network(request: pytest.FixtureRequest, below: Connect) -> Connect:
    """Every party has one folder: who connects again is the same party's next process."""
    folder: Path = request.getfixturevalue("tmp_path")

    def connect(party: str) -> Transport:
        return SecureLink(
            below(party),
            job="job",
            attempt=1,
            party=party,
            identity=IDENTITIES[party],
            roster={name: identity.public for name, identity in IDENTITIES.items()},
            folder=folder / party,
            timing=Timing(probe=0.2, report=0.02, linger=2.0),
        )

    return connect


# From a transport's name to a function that makes a fresh network and returns how a party connects to it.
FACTORIES: dict[str, Callable[[pytest.FixtureRequest], Connect]] = {
    "memory": memory_network,
    "rabbitmq": rabbitmq_network,
}
NAMES = plugins.names("transport")


def test_every_transport_found_has_a_factory() -> None:
    assert NAMES, "no transport found"
    lacking = sorted(set(NAMES) - set(FACTORIES))
    assert not lacking, f"add to FACTORIES in {__file__} how a network of {lacking} is made"


@pytest.fixture(params=[*NAMES, *(LINK + name for name in NAMES)])
def connect(request: pytest.FixtureRequest) -> Any:
    name = request.param.removeprefix(LINK)
    if name not in FACTORIES:
        pytest.fail(f"add to FACTORIES in {__file__} how a network of {name!r} is made")
    opened: list[Transport] = []
    make = FACTORIES[name](request)
    if name != request.param:
        make = link_network(request, make)

    def connecting(party: str) -> Transport:
        opened.append(make(party))
        return opened[-1]

    yield connecting
    for transport in opened:
        transport.close()


def take(transport: Transport) -> Delivery:
    delivery = transport.receive(SOON)
    assert delivery is not None
    return delivery


def bodies(transport: Transport, count: int, *, ack: bool = True) -> list[bytes]:
    found = []
    for _ in range(count):
        delivery = take(transport)
        found.append(bytes(delivery.body))
        if ack:
            transport.ack(delivery)
    return found


def test_a_frame_arrives_as_the_parts_joined(connect: Connect) -> None:
    a, b = connect("a"), connect("b")
    size = a.send("b", [b"one", bytearray(b"two"), memoryview(b"xthree")[1:], b""])
    delivery = take(b)
    assert (size, bytes(delivery.body), delivery.sender, delivery.redelivered) == (
        11,
        b"onetwothree",
        "a",
        False,
    )


def test_a_frame_is_not_changed_by_later_writes_of_its_sender(connect: Connect) -> None:
    a, b = connect("a"), connect("b")
    mine = bytearray(b"before")
    a.send("b", [mine])
    mine[:] = b"after!"
    assert bytes(take(b).body) == b"before"


def test_order_is_kept_per_pair(connect: Connect) -> None:
    a, b, c = connect("a"), connect("b"), connect("c")
    for number in range(50):
        a.send("c", [b"a%d" % number])
        b.send("c", [b"b%d" % number])
    found = bodies(c, 100)
    for party in (b"a", b"b"):
        assert [f for f in found if f[:1] == party] == [b"%s%d" % (party, n) for n in range(50)]


def test_frames_wait_for_a_receiver_that_connects_later(connect: Connect, together: Any) -> None:
    a = connect("a")  # `send` may wait for it, too
    ends = together({"a": lambda: a.send("b", [b"early"]), "b": lambda: bodies(connect("b"), 1)})
    assert ends == {"a": 5, "b": [b"early"]}


def test_what_was_acknowledged_does_not_come_again(connect: Connect) -> None:
    a, b = connect("a"), connect("b")
    for number in range(3):
        a.send("b", [b"%d" % number])
    bodies(b, 2)
    b.close()
    assert bodies(connect("b"), 1) == [b"2"]


def test_what_was_not_acknowledged_comes_again_in_order_and_is_marked(connect: Connect) -> None:
    a, b = connect("a"), connect("b")
    for number in range(4):
        a.send("b", [b"%d" % number])
    bodies(b, 3, ack=False)
    b.close()
    again = connect("b")
    found = [take(again) for _ in range(4)]
    assert [bytes(d.body) for d in found] == [b"0", b"1", b"2", b"3"]
    assert all(d.redelivered for d in found[:3])  # the last may have been on its way to b already


def test_order_survives_a_second_reconnect(connect: Connect) -> None:
    a, b = connect("a"), connect("b")
    for number in range(4):
        a.send("b", [b"%d" % number])
    for count in (2, 3):
        bodies(b, count, ack=False)
        b.close()
        b = connect("b")
    assert bodies(b, 4) == [b"0", b"1", b"2", b"3"]


def test_a_tag_dies_with_its_connection(connect: Connect) -> None:
    # Given a delivery of a connection that is closed, and the frame delivered again on the next
    a, b = connect("a"), connect("b")
    a.send("b", [b"x"])
    old = take(b)
    b.close()
    again = connect("b")
    assert bodies(again, 1, ack=False) == [b"x"]
    # When the old tag is acknowledged on either, Then the frame still counts as not acknowledged
    for transport in (b, again):
        with contextlib.suppress(TransportClosed):
            transport.ack(old)
    again.close()
    assert bodies(connect("b"), 1) == [b"x"]


def test_a_frame_sent_twice_is_seen_twice(connect: Connect) -> None:
    a, b = connect("a"), connect("b")
    a.send("b", [b"same"])
    a.send("b", [b"same"])
    assert bodies(b, 2) == [b"same", b"same"]


def test_64_mib_arrive_whole(connect: Connect) -> None:
    a, b = connect("a"), connect("b")
    block = bytes(range(256)) * 4096
    assert a.send("b", [block] * 64) == 64 * 2**20
    delivery = take(b)
    assert len(delivery.body) == 64 * 2**20
    assert delivery.body[-256:] == bytes(range(256))
    assert delivery.body[: 2**20] == block


def test_an_empty_frame_arrives(connect: Connect) -> None:
    a, b = connect("a"), connect("b")
    assert a.send("b", []) == 0
    assert bytes(take(b).body) == b""


@pytest.mark.parametrize("timeout", [0.0, 0.02])
def test_a_receive_that_runs_out_returns_none(connect: Connect, timeout: float) -> None:
    assert connect("a").receive(timeout) is None


def test_closing_twice_is_fine_and_a_closed_transport_says_so(connect: Connect) -> None:
    a = connect("a")
    a.close()
    a.close()
    with pytest.raises(TransportClosed):
        a.send("b", [b"x"])
    with pytest.raises(TransportClosed):
        a.receive(None)


def test_close_wakes_a_receive_that_waits(connect: Connect) -> None:
    a, ended = connect("a"), threading.Event()

    def wait() -> None:
        with contextlib.suppress(TransportClosed):
            a.receive(None)
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    a.close()
    assert ended.wait(SOON)


def test_many_threads_may_send_at_once(connect: Connect, together: Any) -> None:
    receiver = connect("z")
    senders = {name: connect(name) for name in "abcdef"}

    def send(name: str) -> None:
        for number in range(100):
            senders[name].send("z", [f"{name}{number}".encode()])

    ends = together({**{n: (lambda n=n: send(n)) for n in senders}, "z": lambda: bodies(receiver, 600)})
    found = [body.decode() for body in ends["z"]]
    for name in senders:
        assert [body for body in found if body[0] == name] == [f"{name}{n}" for n in range(100)]


def test_a_transport_that_works_is_connected(connect: Connect) -> None:
    assert connect("a").connected is True


def test_flush_returns_when_all_is_safe(connect: Connect) -> None:
    a, b = connect("a"), connect("b")
    assert a.flush(SOON), "nothing is under way"
    for number in range(20):
        a.send("b", [b"%d" % number * 1000])
    assert a.flush(SOON)
    assert bodies(b, 20) == [b"%d" % number * 1000 for number in range(20)]


def test_there_is_no_progress_when_nothing_is_coming(connect: Connect) -> None:
    a, b = connect("a"), connect("b")
    assert b.progress("a") is None
    a.send("b", [b"whole"])
    assert bodies(b, 1) == [b"whole"]
    assert b.progress("a") is None


def test_who_has_left_holds_nobody_up(connect: Connect) -> None:
    a, b, c = connect("a"), connect("b"), connect("c")
    a.send("b", [b"hello"])
    assert bodies(b, 1) == [b"hello"]
    b.close()
    a.send("b", [b"to nobody"])
    a.forget("b")
    assert a.flush(SOON)
    a.send("b", [b"to nobody either"])
    assert a.flush(SOON)
    a.send("c", [b"goes on"])
    assert bodies(c, 1) == [b"goes on"]


def test_parties_that_are_finished_leave_together(connect: Connect, together: Any) -> None:
    parties = {name: connect(name) for name in "ab"}
    parties["a"].send("b", [b"last"])
    assert bodies(parties["b"], 1) == [b"last"]
    ends = together({name: (lambda t=t: t.close(finished=True)) for name, t in parties.items()})
    assert ends == {"a": None, "b": None}
    for name, transport in parties.items():
        transport.close(finished=True)
        with pytest.raises(TransportClosed):
            transport.send("b" if name == "a" else "a", [b"x"])
