"""Addresses of brokers, and what the transport does on a real one: layout, lanes, bounds, counters."""

# ruff: noqa: F811 (fixtures that are imported are named again as arguments)

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import quote

import pika
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fate_llm.core.errors import ConfigurationError, FateError, InternalError, TransportClosed
from fate_llm.core.interfaces import Delivery, Transport
from fate_llm.protocols.broker_layout import control_inbox, control_key, exchange_of, job_inbox, job_key
from fate_llm.protocols.transports.rabbitmq import BrokerAddress, RabbitTransport
from fate_llm.runtime.broker import BrokerNode
from tests.brokers import admin, broker, vhost  # noqa: F401

SECRET = "correct-horse-battery"
SOON = 15.0  # seconds for what should come; a test that passes does not wait for it


# --- addresses ------------------------------------------------------------------------------------------------------


def test_an_address_with_everything() -> None:
    url = (
        "amqps://al%40ice:p%2Fw%3A%40@broker.example:5999/fed%2Fone"
        "?cacertfile=/ca.pem&certfile=/c.pem&keyfile=/k.pem&server_name=mq&heartbeat=7&queues=quorum"
    )
    address = BrokerAddress.from_url(url)
    assert address == BrokerAddress(
        "broker.example",
        5999,
        "fed/one",
        "al@ice",
        "p/w:@",
        True,
        "/ca.pem",
        "/c.pem",
        "/k.pem",
        "mq",
        7,
        "quorum",
    )
    assert str(address) == "amqps://al@ice@broker.example:5999/fed%2Fone"


def test_what_is_left_out_has_a_usual_value() -> None:
    address = BrokerAddress.from_url("amqps://broker.example")
    assert (address.port, address.vhost, address.user, address.heartbeat) == (5671, "/", "guest", 30)
    assert (address.queues, address.tls, address.others) == ("classic", True, ())
    assert BrokerAddress.from_url("amqp://localhost?plaintext=loopback").port == 5672


def test_password_and_authority_can_be_given_apart_from_the_address() -> None:
    address = BrokerAddress.from_url("amqps://a:old@h/v?cacertfile=/old", password=SECRET, ca_file="/new")
    assert (address.password, address.ca_file) == (SECRET, "/new")


def test_several_nodes_are_tried_in_turn() -> None:
    address = BrokerAddress.from_url("amqps://a:b@one:1,two,[::1]:3/v")
    assert address.nodes == (("one", 1), ("two", 5671), ("::1", 3))
    assert str(address) == "amqps://a@one:1,two:5671,::1:3/v"
    plain = BrokerAddress.from_url("amqp://a:b@127.0.0.1:1,localhost:2/v?plaintext=loopback")
    assert [(p.host, p.port) for p in map(plain.parameters, range(3))] == [
        ("127.0.0.1", 1),
        ("localhost", 2),
        ("127.0.0.1", 1),
    ]


@pytest.mark.parametrize("host", ["broker.example", "10.0.0.1", "localhost.evil.example", "0.0.0.0", "127.0.0.1,far"])
def test_without_tls_only_loopback(host: str) -> None:
    with pytest.raises(ConfigurationError, match="would send passwords in clear") as caught:
        BrokerAddress.from_url(f"amqp://a:{SECRET}@{host}/v?plaintext=loopback")
    assert "amqps://" in caught.value.hint and SECRET not in str(caught.value)


@pytest.mark.parametrize("query", ["", "?plaintext=", "?plaintext=yes", "?plaintext=Loopback"])
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.1", "[::1]"])
def test_without_tls_only_when_the_address_says_so(host: str, query: str) -> None:
    with pytest.raises(ConfigurationError, match="has no TLS") as caught:
        BrokerAddress.from_url(f"amqp://a:{SECRET}@{host}/v{query}")
    assert "plaintext=loopback" in caught.value.hint


@pytest.mark.parametrize(
    ("option", "near"), [("heartbeats=3", "heartbeat"), ("cacertfil=x", "cacertfile"), ("queue=quorum", "queues")]
)
def test_an_unknown_option_is_answered_with_the_nearest(option: str, near: str) -> None:
    with pytest.raises(ConfigurationError, match="unknown option") as caught:
        BrokerAddress.from_url(f"amqps://a:{SECRET}@h/v?{option}")
    assert near in caught.value.hint and option.partition("=")[0] in caught.value.message


@pytest.mark.parametrize("option", ["heartbeat=0", "heartbeat=3601", "heartbeat=x", "heartbeat=-1", "queues=stream"])
def test_values_that_cannot_be(option: str) -> None:
    with pytest.raises(ConfigurationError, match="heartbeat 1 to 3600 seconds"):
        BrokerAddress.from_url(f"amqps://a:b@h/v?{option}")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "broker.example:5671",
        "http://a:{}@h/v",
        "amqps://",
        "amqps://a:{}@/v",
        "amqps://a:{}@h:port/v",
        "amqps://a:{}@h:70000/v",
        "amqps://a:{}@h,/v",
        "amqps://a:{}@[h/v",
        "amqps://a:{}?x@h/v",
        "amqps://a:{}/x@h/v",
        "amqps://a:{}#x@h/v",
        "amqps://a:x#{}@h/v",
        "amqps://a:{}@h/v#fragment",
        "amqps://a:{}\u2100@h/v",
        "amqps://a:{}@\u2100/v",
    ],
)
def test_what_is_no_address_is_not_repeated(url: str) -> None:
    with pytest.raises(ConfigurationError, match="no broker's address") as caught:
        BrokerAddress.from_url(url.format(SECRET))
    assert "amqps://user:password@host:5671/vhost" in caught.value.hint
    told = "".join(traceback.format_exception(caught.value, chain=True))
    assert SECRET not in told.replace(f"{url.format(SECRET)!r}", "")


@given(password=st.text(min_size=1), user=st.text(min_size=1), name=st.text(min_size=1))
def test_any_text_can_be_password_user_and_virtual_host(password: str, user: str, name: str) -> None:
    try:
        url = f"amqps://{quote(user, safe='')}:{quote(password, safe='')}@h/{quote(name, safe='')}"
    except UnicodeEncodeError:  # lone surrogates cannot be in any address
        return
    address = BrokerAddress.from_url(url)
    assert (address.password, address.user, address.vhost) == (password, user, name)


def test_the_password_is_never_shown(tmp_path: Any) -> None:
    address = BrokerAddress.from_url(f"amqps://a:{SECRET}@h/v?cacertfile={tmp_path}/missing.pem")
    assert SECRET not in repr(address) and SECRET not in str(address)
    with pytest.raises(ConfigurationError, match=r"missing\.pem") as caught:
        address.parameters()
    assert SECRET not in str(caught.value)


# --- on a broker ----------------------------------------------------------------------------------------------------

Connect = Callable[..., RabbitTransport]


@pytest.fixture
def url(broker: BrokerNode, vhost: str) -> str:
    return f"{broker.url(vhost=vhost)}?plaintext=loopback"


@pytest.fixture
def connect(url: str) -> Iterator[Connect]:
    """Connects a party of job `j` with the members a, b, c; closed at the end, and no thread is left."""
    opened: list[RabbitTransport] = []

    def make(party: str, **settings: Any) -> RabbitTransport:
        named = {"members": ("a", "b", "c"), "job": "j", **settings}
        opened.append(RabbitTransport(BrokerAddress.from_url(url), party=party, **named))
        return opened[-1]

    yield make
    for transport in opened:
        transport.close(finished=True)
        assert not transport._thread.is_alive()


def look(broker: BrokerNode, vhost: str, what: str, name: str = "") -> Any:
    return admin(broker, "GET", f"{what}/{vhost}" + (f"/{quote(name, safe='')}" if name else ""))


def until(holds: Callable[[], object], seconds: float = SOON) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def take(transport: Transport, count: int = 1, *, ack: bool = True) -> list[Delivery]:
    found = []
    for _ in range(count):
        delivery = transport.receive(SOON)
        assert delivery is not None
        if ack:
            transport.ack(delivery)
        found.append(delivery)
    return found


def test_the_layout_is_that_of_the_names(broker: BrokerNode, vhost: str, connect: Connect) -> None:
    a = connect("a", expires=3600.0)
    queue = look(broker, vhost, "queues", job_inbox("a", "j"))
    assert queue["durable"] and not queue["auto_delete"] and not queue["exclusive"]
    assert queue["arguments"] == {"x-queue-type": "classic", "x-expires": 3_600_000}
    bound = {(b["source"], b["routing_key"]) for b in look(broker, vhost, "bindings") if b["source"]}
    assert bound == {(exchange_of(member), job_key("a", "j")) for member in "abc"}
    exchanges = [e for e in look(broker, vhost, "exchanges") if e["name"].startswith("fate.")]
    assert {(e["name"], e["type"], e["durable"]) for e in exchanges} == {
        (exchange_of(member), "topic", True) for member in "abc"
    }
    a.close(finished=True)
    assert look(broker, vhost, "queues") == []


def test_a_control_inbox_stands(broker: BrokerNode, vhost: str, connect: Connect) -> None:
    a, b = connect("a", job=None), connect("b", job=None)
    a.send("b", [b"hello"])
    assert [(d.sender, bytes(d.body)) for d in take(b)] == [("a", b"hello")]
    assert look(broker, vhost, "queues", control_inbox("b"))["arguments"] == {"x-queue-type": "classic"}
    bound = {b["routing_key"] for b in look(broker, vhost, "bindings") if b["destination"] == control_inbox("b")}
    assert control_key("b") in bound
    b.close(finished=True)  # a job's end is not the end of the party
    assert {queue["name"] for queue in look(broker, vhost, "queues")} >= {control_inbox("b")}


def test_an_inbox_that_nobody_reads_goes_away(broker: BrokerNode, vhost: str, connect: Connect) -> None:
    connect("a", expires=1.0).close()
    assert [queue["name"] for queue in look(broker, vhost, "queues")] == [job_inbox("a", "j")]
    until(lambda: not look(broker, vhost, "queues"))


def test_frames_are_persistent_and_carry_the_user(
    broker: BrokerNode,
    vhost: str,
    connect: Connect,
) -> None:
    connect("b").close()
    connect("a").send("b", [b"kept"])
    with pika.BlockingConnection(pika.URLParameters(broker.url(vhost=vhost))) as connection:
        channel = connection.channel()
        until(lambda: channel.queue_declare(job_inbox("b", "j"), passive=True).method.message_count == 1)
        method, properties, body = channel.basic_get(job_inbox("b", "j"))
        assert (method.exchange, method.routing_key, body) == (exchange_of("a"), job_key("b", "j"), b"kept")
        assert (properties.delivery_mode, properties.user_id) == (2, "guest")


def test_a_lane_without_an_inbox_waits_and_holds_nobody_up(connect: Connect) -> None:
    a, b = connect("a"), connect("b")
    for at in range(20):
        a.send("c", [b"c%d" % at])
        a.send("b", [b"b%d" % at])
    assert [bytes(d.body) for d in take(b, 20)] == [b"b%d" % at for at in range(20)]
    until(lambda: a.counters.returned >= 2)
    assert not a.flush(0.1)
    assert a.counters.returned < 10, "one frame at a time is tried, with pauses"
    c = connect("c")
    assert [bytes(d.body) for d in take(c, 20)] == [b"c%d" % at for at in range(20)], "in order"
    assert a.flush(SOON)
    assert a.counters.confirmed == 40
    assert a.counters.published == 40 + a.counters.returned


def test_nothing_is_kept_for_a_receiver_that_has_left(connect: Connect) -> None:
    a = connect("a")
    a.send("c", [b"x" * 100])
    until(lambda: a.counters.returned)
    assert not a.flush(0.0)
    a.forget("c")
    assert a.flush(SOON)
    assert a.send("c", [b"y"]) == 1 and a.flush(SOON)


def test_order_and_content_of_many_frames(connect: Connect) -> None:
    a, b = connect("a"), connect("b")
    frames = [bytes([at % 251]) * (at * 37 % 5000) for at in range(500)]
    sender = threading.Thread(target=lambda: [a.send("b", [frame]) for frame in frames])
    sender.start()
    assert [bytes(d.body) for d in take(b, 500)] == frames
    sender.join(SOON)
    assert a.flush(SOON)
    assert (a.counters.published, a.counters.confirmed, b.counters.delivered) == (500, 500, 500)
    assert (b.counters.redelivered, a.counters.returned, a.counters.reconnects, a.counters.blocked) == (0, 0, 0, 0)


def test_no_more_is_delivered_than_the_prefetch_until_something_is_acknowledged(connect: Connect) -> None:
    a, b = connect("a"), connect("b", prefetch=3)
    for at in range(10):
        a.send("b", [b"%d" % at])
    assert a.flush(SOON)
    first = take(b, 3, ack=False)
    assert b.receive(0.3) is None and b.counters.delivered == 3
    b.ack(first[0])
    assert [bytes(d.body) for d in take(b, 1, ack=False)] == [b"3"]
    assert b.receive(0.3) is None and b.counters.delivered == 4


def test_send_waits_while_the_window_is_full(connect: Connect) -> None:
    a = connect("a", window=10_000)
    for _ in range(2):
        a.send("c", [b"x" * 6000])  # nobody is there: nothing gets confirmed
    a.send("c", [b"a report"])  # what is small does not wait
    done = threading.Event()
    waiting = threading.Thread(target=lambda: (a.send("c", [b"y" * 6000]), done.set()))
    waiting.start()
    assert not done.wait(0.3)
    take(connect("c"), 4)
    assert done.wait(SOON)
    waiting.join(SOON)


def test_who_waits_to_send_is_woken_when_the_receiver_has_left(connect: Connect) -> None:
    a = connect("a", window=10_000)
    a.send("c", [b"x" * 12_000])
    done = threading.Event()
    waiting = threading.Thread(target=lambda: (a.send("c", [b"y" * 6000]), done.set()))
    waiting.start()
    assert not done.wait(0.2)
    a.forget("c")
    assert done.wait(SOON)
    waiting.join(SOON)


def test_what_is_not_acknowledged_comes_again_marked(connect: Connect) -> None:
    a, b = connect("a"), connect("b")
    for body in (b"one", b"two"):
        a.send("b", [body])
    old = take(b, 2, ack=False)
    b.ack(old[0])
    b.close()
    again = connect("b")
    found = take(again)[0]
    assert (bytes(found.body), found.redelivered, again.counters.redelivered) == (b"two", True, 1)
    again.ack(old[1])  # of another connection: without effect, and without harm
    a.send("b", [b"three"])
    assert bytes(take(again)[0].body) == b"three"


def test_an_acknowledgement_from_before_a_reconnect_acknowledges_nothing_after_it(
    broker: BrokerNode, vhost: str, connect: Connect
) -> None:
    b = connect("b", prefetch=1)
    connect("a").send("b", [b"one"])
    old = take(b, ack=False)[0]
    broker.ctl("close_all_connections", "--vhost", vhost, "a test")
    again = take(b, ack=False)[0]
    assert (bytes(again.body), again.redelivered, b.counters.reconnects) == (b"one", True, 1)
    b.ack(old)  # had the same number on the connection that is gone
    b.close()
    assert [bytes(d.body) for d in take(connect("b"))] == [b"one"]


def test_a_frame_past_the_exchanges_has_no_sender(broker: BrokerNode, vhost: str, connect: Connect) -> None:
    b = connect("b")
    with pika.BlockingConnection(pika.URLParameters(broker.url(vhost=vhost))) as connection:
        channel = connection.channel()
        channel.basic_publish("", job_inbox("b", "j"), b"direct")
        channel.exchange_declare("a", exchange_type="topic")  # named like a party
        channel.queue_bind(job_inbox("b", "j"), "a", job_key("b", "j"))
        channel.basic_publish("a", job_key("b", "j"), b"through another exchange")
        channel.basic_publish(exchange_of("a"), job_key("b", "j"), b"through a's")
        assert [d.sender for d in take(b, 3)] == ["", "", "a"]


def test_what_the_broker_cannot_keep_is_sent_again(broker: BrokerNode, vhost: str, connect: Connect) -> None:
    """A queue that refuses (nack) is asked again, frame by frame, with pauses; every frame comes, and once."""
    admin(
        broker,
        "PUT",
        f"policies/{vhost}/small",
        {"pattern": ".*", "definition": {"max-length": 2, "overflow": "reject-publish"}, "apply-to": "queues"},
    )
    a, b = connect("a"), connect("b", prefetch=1)
    for at in range(12):
        a.send("b", [b"%d" % at])
    until(lambda: a.counters.published >= 8)
    assert not a.flush(0.5)
    tried = a.counters.published
    assert tried < 40, "not in a tight loop"
    assert sorted(int(bytes(d.body)) for d in take(b, 12)) == list(range(12)), "some may have overtaken others"
    assert a.flush(SOON) and a.counters.confirmed == 12


def test_a_blocked_broker_is_neither_connected_nor_lost(broker: BrokerNode, connect: Connect) -> None:
    events: list[tuple[str, Mapping[str, Any]]] = []
    a = connect("a", observer=lambda event, fields: events.append((event, dict(fields))))
    broker.ctl("set_vm_memory_high_watermark", "0.00001")
    try:
        a.send("a", [b"waits"])
        until(lambda: a.counters.blocked == 1)
        assert not a.connected and not a.flush(0.2)
        a.send("a", [b"as well"])
    finally:
        broker.ctl("set_vm_memory_high_watermark", "0.4")
    assert [bytes(d.body) for d in take(a, 2)] == [b"waits", b"as well"]
    assert a.connected and a.counters.reconnects == 0
    assert [event for event, _ in events] == ["broker_blocks", "broker_unblocks"]


def test_a_stranger_cannot_be_sent_to(connect: Connect) -> None:
    with pytest.raises(ConfigurationError, match="z is not a party of job j"):
        connect("a").send("z", [b"x"])


def test_a_bug_of_ours_in_the_thread_ends_in_an_error_and_not_in_silence(
    broker: BrokerNode, vhost: str, connect: Connect
) -> None:
    def observer(event: str, fields: Mapping[str, Any]) -> None:
        raise ValueError(event)

    a = connect("a", observer=observer)
    broker.ctl("close_all_connections", "--vhost", vhost, "a test")
    with pytest.raises(InternalError, match="the transport stopped: ValueError: broker_away"):
        a.receive(SOON)


def test_a_closed_transport_says_so_and_wakes_who_waits(connect: Connect) -> None:
    a = connect("a")
    ends: list[FateError] = []

    def wait() -> None:
        try:
            a.receive(None)
        except FateError as error:
            ends.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    a.close()
    a.close(finished=True)
    waiting.join(SOON)
    assert [type(error) for error in ends] == [TransportClosed]
    with pytest.raises(TransportClosed, match="transport of a is closed"):
        a.send("b", [b"x"])
    assert not a.connected and not a.flush(0.1)
    a.ack(Delivery("b", memoryview(b""), object(), False))  # of nobody's: without effect


def test_the_unit_of_work_is_bytes_like_of_any_kind(connect: Connect) -> None:
    a = connect("a")
    parts = [b"one", bytearray(b"two"), memoryview(b"three")]
    assert a.send("a", parts) == 11
    for part in parts:
        a.send("a", [part])
    assert [bytes(d.body) for d in take(a, 4)] == [b"onetwothree", b"one", b"two", b"three"]
