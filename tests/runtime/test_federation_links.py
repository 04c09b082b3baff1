"""A broker for each party, as `federation init` configures them: what travels between them, over TLS, and what not."""

from __future__ import annotations

import contextlib
import json
import ssl
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from urllib.parse import unquote, urlsplit

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import AMQPError, ChannelClosedByBroker, UnroutableError

from fate_llm.protocols.broker_layout import control_inbox, control_key, exchange_of, job_inbox, job_key, link_user
from fate_llm.security.certificates import Authority, KeyPair, make_authority
from tests.brokers import START, LiveFederation, leftovers, live_federation

pytestmark = pytest.mark.slow
A, B, C = "bank.a", "bank-b", "bank-c"
PATIENCE = 60.0  # seconds until something that has to happen is called missing
Log = Callable[..., BlockingChannel]


@pytest.fixture(scope="module")
def brokers() -> Iterator[LiveFederation]:
    with live_federation(A, B, C) as found:
        for owner in (A, B, C):
            wait_for_links(found, owner)
        yield found


@pytest.fixture
def log_in(brokers: LiveFederation) -> Iterator[Log]:
    """log_in(user, at=party): a channel at the broker of `at`, by default the user's own."""
    opened: list[pika.BlockingConnection] = []

    def connect(user: str, *, at: str | None = None, password: str | None = None) -> BlockingChannel:
        settings = brokers.party(at or user)
        secret = password or brokers.party(user).load_password()
        assert secret is not None and settings.ca is not None
        parameters = pika.ConnectionParameters(
            "localhost",
            brokers.node(at or user).tls_port,
            brokers.federation.vhost,
            pika.PlainCredentials(user, secret),
            ssl_options=pika.SSLOptions(ssl.create_default_context(cafile=str(settings.ca)), "localhost"),
            connection_attempts=1,
        )
        opened.append(pika.BlockingConnection(parameters))
        return opened[-1].channel()

    yield connect
    for connection in opened:
        with contextlib.suppress(AMQPError):  # a test may have killed the broker
            connection.close()


def until(holds: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, f"{what}: not within {PATIENCE:.0f} s"
        time.sleep(0.1)


def link_password(brokers: LiveFederation, party: str, owner: str) -> str:
    """What the broker of `party` logs in with at the one of `owner`: out of the definitions that were written."""
    text = (brokers.folder / "brokers" / party / "definitions.json").read_text()
    (uri,) = [one["value"]["uri"] for one in json.loads(text)["parameters"] if one["name"] == owner]
    parts = urlsplit(uri)
    assert unquote(parts.username or "") == link_user(party)
    return unquote(parts.password or "")


def wait_for_links(brokers: LiveFederation, owner: str) -> None:
    """Until every link that feeds the broker of `owner` runs."""
    others = len(brokers.federation.members) - 1
    node = brokers.node(owner)
    until(lambda: node.ctl("federation_status").count("status => running") == others, f"links of {owner}")


def publish(channel: BlockingChannel, sender: str, key: str, body: bytes = b"text") -> None:
    channel.confirm_delivery()
    properties = pika.BasicProperties(delivery_mode=2, user_id=sender)
    channel.basic_publish(exchange_of(sender), key, body, properties, mandatory=True)


def receive(channel: BlockingChannel, inbox: str, count: int) -> list[tuple[str, str | None, bytes]]:
    """(exchange, user_id, body) of exactly `count` messages, acknowledged."""
    found: list[tuple[str, str | None, bytes]] = []

    def one() -> bool:
        while (got := channel.basic_get(inbox, auto_ack=True))[0] is not None:
            found.append((got[0].exchange, got[1].user_id, got[2]))
        return len(found) >= count

    until(one, f"{count} messages in {inbox}")
    assert len(found) == count
    return found


def waiting(brokers: LiveFederation, owner: str) -> dict[str, int]:
    """Messages that wait at the broker of `owner` for the links of the others, by party."""
    said = brokers.node(owner).ctl(
        "list_queues", "-p", brokers.federation.vhost, "messages", "name", "--no-table-headers"
    )
    rows = [line.split(maxsplit=1) for line in said.splitlines() if "federation: " in line]
    return {name.rsplit(" -> ")[1].strip(): int(count) for count, name in rows}


def test_a_message_crosses_over_to_the_receiver_s_broker(log_in: Log) -> None:
    publish(log_in(A), A, control_key(B))
    assert receive(log_in(B), control_inbox(B), 1) == [(exchange_of(A), A, b"text")]


def test_every_pair_is_linked_in_both_directions(log_in: Log) -> None:
    pairs = [(s, r) for s in (A, B, C) for r in (A, B, C) if s != r]
    for sender, receiver in pairs:
        publish(log_in(sender), sender, control_key(receiver), f"{sender} to {receiver}".encode())
    for receiver in (A, B, C):
        found = receive(log_in(receiver), control_inbox(receiver), 2)
        assert {body.decode() for _, _, body in found} == {f"{s} to {receiver}" for s, r in pairs if r == receiver}
        assert all(exchange == exchange_of(user or "") for exchange, user, _ in found)


def test_an_inbox_made_at_b_is_reachable_from_a_and_gone_with_it(log_in: Log) -> None:
    a, b = log_in(A), log_in(B)
    inbox, key = job_inbox(B, "j1"), job_key(B, "j1")
    with pytest.raises(UnroutableError):  # nothing is taken that nobody would get
        publish(a, A, key)
    b.queue_declare(inbox, durable=True)
    b.queue_bind(inbox, exchange_of(A), key)

    def taken() -> bool:
        try:
            publish(a, A, key)
        except UnroutableError:
            return False
        return True

    until(taken, "the binding at A's broker")
    assert receive(b, inbox, 1) == [(exchange_of(A), A, b"text")]
    b.queue_delete(inbox)
    until(lambda: not taken(), "the end of the binding at A's broker")


def test_only_what_is_addressed_to_a_broker_s_party_waits_for_it(brokers: LiveFederation, log_in: Log) -> None:
    """And nothing is lost while the receivers' brokers, and then the sender's, are down."""
    for party in (B, C):
        brokers.node(party).kill()
    a = log_in(A)
    for at in range(3):
        publish(a, A, control_key(B), f"b{at}".encode())
    for at in range(5):
        publish(a, A, control_key(C), f"c{at}".encode())
    assert waiting(brokers, A) == {B: 3, C: 5}
    brokers.node(A).kill()
    for party in (A, B, C):
        brokers.node(party).start(START)
    assert [body for _, _, body in receive(log_in(B), control_inbox(B), 3)] == [b"b0", b"b1", b"b2"]
    assert [body for _, _, body in receive(log_in(C), control_inbox(C), 5)] == [b"c0", b"c1", b"c2", b"c3", b"c4"]
    for party in (A, B, C):
        wait_for_links(brokers, party)


def test_the_links_bind_their_own_party_s_keys_only(brokers: LiveFederation) -> None:
    said = brokers.node(A).ctl("list_bindings", "-p", brokers.federation.vhost, "destination_name", "routing_key")
    keys = {tuple(line.split("\t")) for line in said.splitlines() if line.startswith("federation: ")}
    into = {(name.split(" -> ")[1].split()[0], key) for name, key in keys if not name.endswith((B, C)) and key}
    assert into == {(B, control_key(B)), (C, control_key(C))}


def test_nobody_s_clients_get_into_another_s_broker(brokers: LiveFederation, log_in: Log) -> None:
    for user, at in ((A, B), (B, A), (C, A)):
        with pytest.raises(AMQPError):
            log_in(user, at=at)
    log_in(A)  # the password is right where it belongs


@pytest.fixture
def link(brokers: LiveFederation, log_in: Log) -> Callable[[], BlockingChannel]:
    """As somebody at B who has found out how B's broker logs in at A's."""
    return lambda: log_in(link_user(B), at=A, password=link_password(brokers, B, A))


def refused(call: Callable[..., object], *arguments: object, **options: object) -> bool:
    with pytest.raises(ChannelClosedByBroker) as caught:
        call(*arguments, **options)
    return bool(caught.value.reply_code == 403)


def test_the_link_s_user_can_keep_its_own_queue_and_nothing_else(link: Callable[[], BlockingChannel]) -> None:
    own = f"federation: {exchange_of(A)} -> {B}"
    assert link().queue_declare(own, passive=True).method.queue == own
    for queue in (control_inbox(A), f"federation: {exchange_of(A)} -> {C}"):
        assert refused(link().basic_get, queue)
        assert refused(link().queue_purge, queue)
        assert refused(link().queue_delete, queue)
    assert refused(link().queue_declare, job_inbox(B, "x"))
    for exchange in (exchange_of(A), exchange_of(B), "", "amq.topic"):
        channel = link()
        channel.confirm_delivery()
        assert refused(channel.basic_publish, exchange, control_key(A), b"x")


@pytest.mark.parametrize("key", [control_key(C), control_key(A), "#", "*", "bank-c/#", "*.#"])
def test_the_link_s_user_binds_no_other_party_s_keys(key: str, link: Callable[[], BlockingChannel]) -> None:
    own = f"federation: {exchange_of(A)} -> {B}"
    assert refused(link().queue_bind, own, exchange_of(A), key)
    assert refused(link().exchange_bind, f"{own} A", exchange_of(A), key)
    assert refused(link().queue_bind, own, exchange_of(C), control_key(B))


def test_no_listener_is_without_tls(brokers: LiveFederation) -> None:
    said = brokers.node(A).ctl("eval", "[element(3, L) || L <- rabbit_networking:node_listeners(node())].")
    assert said.strip() == "['amqp/ssl',clustering]" or said.strip() == "[clustering,'amqp/ssl']"


def test_nothing_of_ours_is_left_over(brokers: LiveFederation) -> None:
    found = leftovers(brokers.node(B), brokers.federation.vhost)
    assert [queue for queue in found["queues"] if queue.startswith("fate.to")] == [control_inbox(B)]
    assert {one["user"] for one in found["connections"]} <= {link_user(A), link_user(C)}


@pytest.mark.parametrize(("hosts", "why"), [(["localhost"], "unknown_ca"), (["bank-c.example"], "hostname_check")])
def test_a_link_refuses_a_broker_that_somebody_else_answers_for(
    hosts: list[str], why: str, brokers: LiveFederation, log_in: Log
) -> None:
    """Last, for they break B's broker: a stranger is there under its address, then another member of the federation."""
    now, folder = datetime.now(UTC), brokers.folder / "authority"
    ours = Authority.from_pair(KeyPair((folder / "ca.pem").read_bytes(), (folder / "ca.key").read_bytes()))
    authority = make_authority("somebody", now=now, days=1) if why == "unknown_ca" else ours
    pair = authority.issue_server(hosts[0], hosts, now=now, days=1)
    configured = brokers.node(B).folder.parent / B
    (configured / "server.pem").write_bytes(pair.certificate)
    (configured / "server.key").write_bytes(pair.key)
    brokers.node(B).kill()
    brokers.node(B).start(START)
    node = brokers.node(A)
    until(lambda: why in node.ctl("federation_status"), "the refusal by A's broker")
    assert node.ctl("federation_status").count("status => running") == 1  # from C's
    with pytest.raises(ssl.SSLCertVerificationError):
        log_in(B)
