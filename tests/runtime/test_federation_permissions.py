"""What a party's user may do on a real broker, and above all what it may not: written with pika, past our transport."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import AMQPError, ChannelClosedByBroker, UnroutableError

from fate_llm.protocols.broker_layout import control_inbox, control_key, exchange_of, job_inbox, job_key
from fate_llm.runtime.broker import BrokerNode
from fate_llm.runtime.federation import Federation
from fate_llm.runtime.federation_grant import grant_commands, hash_of, run_commands
from fate_llm.runtime.federation_setup import plan_setup
from tests.brokers import admin, broker, leftovers, vhost  # noqa: F401

pytestmark = pytest.mark.slow
PARTIES = ("bank.a", "bank-b", "bank-c")  # a dot in a name is a word's end in topic keys, and any sign in a pattern
REFUSED = 403
Log = Callable[[str], BlockingChannel]


class Place:
    """A federation's virtual host whose parties were given their places by `grant`."""

    def __init__(self, node: BrokerNode, name: str, folder: Path) -> None:
        self.node, self.vhost, self.folder = node, name, folder
        setup = plan_setup(name="trial", parties=PARTIES, topology="shared")
        data = setup.federation.model_dump(mode="json") | {"vhost": name}
        self.federation = Federation.model_validate(data)
        self.open: list[pika.BlockingConnection] = []

    def grant(self, party: str, *, keep: bool = False) -> None:
        hashed = None if keep else hash_of(self.folder / party)
        run_commands(grant_commands(self.federation, party, hashed=hashed), [str(self.node.folder / "ctl")])

    def log_in(self, party: str) -> BlockingChannel:
        password = (self.folder / party).read_text().strip()
        url = pika.URLParameters(self.node.url(party, password, self.vhost))
        connection = pika.BlockingConnection(url)
        self.open.append(connection)
        return connection.channel()


@pytest.fixture(scope="module")
def place(broker: BrokerNode, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:  # noqa: F811
    """Granted once: rabbitmqctl takes seconds. Every test makes job inboxes of its own."""
    name = "grants"
    ctl = broker.folder / "ctl"
    ctl.write_text(f'#!/bin/sh\nexec {broker.ctl_line()} "$@"\n')
    ctl.chmod(0o755)
    found = Place(broker, name, tmp_path_factory.mktemp("passwords"))
    for party in PARTIES:
        found.grant(party)
    everything = {"configure": ".*", "write": ".*", "read": ".*"}
    admin(broker, "PUT", f"permissions/{name}/guest", everything)
    yield found
    for connection in found.open:
        if connection.is_open:
            connection.close()
    admin(broker, "DELETE", f"vhosts/{name}")
    for party in PARTIES:
        admin(broker, "DELETE", f"users/{party}")


@pytest.fixture
def log_in(place: Place) -> Iterator[Log]:
    yield place.log_in
    for connection in place.open:
        if connection.is_open:
            connection.close()
    place.open.clear()


def refusal(call: Callable[..., Any], *arguments: Any, **options: Any) -> ChannelClosedByBroker:
    """The error of the broker; the channel is closed after it."""
    with pytest.raises(ChannelClosedByBroker) as caught:
        call(*arguments, **options)
    return caught.value


def assert_refused(call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    assert refusal(call, *arguments, **options).reply_code == REFUSED


def publish(channel: BlockingChannel, sender: str, key: str, *, user_id: str | None = None) -> None:
    channel.confirm_delivery()
    properties = pika.BasicProperties(delivery_mode=2, user_id=user_id or sender)
    channel.basic_publish(exchange_of(sender), key, b"text", properties, mandatory=True)


def make_inbox(channel: BlockingChannel, party: str, job: str) -> str:
    """As the transport does it."""
    inbox = job_inbox(party, job)
    channel.queue_declare(inbox, durable=True, arguments={"x-queue-type": "classic", "x-expires": 60_000})
    for member in PARTIES:
        channel.queue_bind(inbox, exchange_of(member), job_key(party, job))
    return inbox


# --- what has to work --------------------------------------------------------------------------------------------


def test_a_message_goes_from_a_to_b_and_nowhere_else(log_in: Log) -> None:
    a, b, c = (log_in(party) for party in PARTIES)
    inboxes = {party: make_inbox(channel, party, "j1") for party, channel in zip(PARTIES, (a, b, c), strict=True)}
    publish(a, "bank.a", job_key("bank-b", "j1"))
    method, properties, body = b.basic_get(inboxes["bank-b"])
    assert (method.exchange, properties.user_id, body) == ("fate.from.bank.a", "bank.a", b"text")
    b.basic_ack(method.delivery_tag)
    assert c.basic_get(inboxes["bank-c"])[0] is None
    assert b.queue_delete(inboxes["bank-b"]).method.message_count == 0


def test_the_standing_inbox_is_there_before_the_party_is(log_in: Log) -> None:
    a, b = log_in("bank.a"), log_in("bank-b")
    publish(b, "bank-b", control_key("bank.a"))
    method, properties, _ = a.basic_get(control_inbox("bank.a"), auto_ack=True)
    assert (method.routing_key, properties.user_id) == ("bank.a/control", "bank-b")
    declared = {"x-queue-type": "classic"}  # what the transport says as well: no conflict
    a.queue_declare(control_inbox("bank.a"), durable=True, arguments=declared)


def test_a_message_to_nobody_comes_back(log_in: Log) -> None:
    with pytest.raises(UnroutableError):
        publish(log_in("bank.a"), "bank.a", job_key("bank-b", "never"))


def test_grants_can_be_repeated_and_keep_what_is_there(place: Place, log_in: Log) -> None:
    publish(log_in("bank-b"), "bank-b", control_key("bank.a"))
    place.grant("bank.a", keep=True)
    assert log_in("bank.a").basic_get(control_inbox("bank.a"), auto_ack=True)[2] == b"text"
    found = leftovers(place.node, place.vhost)
    assert set(found["queues"]) >= {control_inbox(party) for party in PARTIES}
    assert found["exchanges"] == sorted(exchange_of(party) for party in PARTIES)


# --- reading what is another's -----------------------------------------------------------------------------------


@pytest.mark.parametrize("inbox", [control_inbox("bank.a"), job_inbox("bank.a", "read")])
def test_b_cannot_read_the_inboxes_of_a(inbox: str, log_in: Log) -> None:
    make_inbox(log_in("bank.a"), "bank.a", "read")
    assert_refused(log_in("bank-b").basic_get, inbox)
    assert_refused(log_in("bank-b").basic_consume, inbox, lambda *_: None)


@pytest.mark.parametrize(
    "key",
    ["bank.a/control", "bank.a/#", "bank.a/*", "#", "*", "*.#", "*.a/control", "bank.#", "#.a/control", "", "bank.*"],
)
@pytest.mark.parametrize("exchange", [exchange_of(party) for party in PARTIES])
def test_b_cannot_have_a_copy_of_what_goes_to_a(exchange: str, key: str, log_in: Log) -> None:
    b = log_in("bank-b")
    inbox = make_inbox(b, "bank-b", "copy")
    assert_refused(b.queue_bind, inbox, exchange, key)


def test_wildcards_behind_the_own_name_reach_own_keys_only(log_in: Log) -> None:
    a, b = log_in("bank.a"), log_in("bank-b")
    inbox = make_inbox(b, "bank-b", "wild")
    b.queue_bind(inbox, exchange_of("bank.a"), "bank-b/#")
    b.queue_bind(inbox, exchange_of("bank.a"), "bank-b/x.#.control")
    publish(a, "bank.a", control_key("bank-c"))
    publish(a, "bank.a", control_key("bank.a"))
    assert b.basic_get(inbox)[0] is None
    for party in ("bank-c", "bank.a"):
        log_in(party).queue_purge(control_inbox(party))


def test_b_cannot_copy_through_an_exchange_of_its_own(log_in: Log) -> None:
    """The pattern of its inboxes lets it make an exchange of such a name: it gets B's keys there, and nothing else."""
    b = log_in("bank-b")
    b.exchange_declare("fate.to.bank-b/tap", "topic")
    assert_refused(b.exchange_bind, "fate.to.bank-b/tap", exchange_of("bank.a"), "bank-c/#")
    assert_refused(log_in("bank-b").exchange_bind, exchange_of("bank-b"), exchange_of("bank.a"), "#")
    assert_refused(log_in("bank-b").exchange_bind, "fate.to.bank-b/tap", "amq.topic", "#")
    log_in("bank-b").exchange_delete("fate.to.bank-b/tap")


# --- spoiling what is another's ----------------------------------------------------------------------------------


def test_b_cannot_delete_empty_or_change_what_a_has(log_in: Log) -> None:
    inbox = make_inbox(log_in("bank.a"), "bank.a", "keep")
    for queue in (inbox, control_inbox("bank.a")):
        assert_refused(log_in("bank-b").queue_delete, queue)
        assert_refused(log_in("bank-b").queue_purge, queue)
        assert_refused(log_in("bank-b").queue_declare, queue, durable=True, arguments={"x-queue-type": "classic"})
        assert_refused(log_in("bank-b").queue_unbind, queue, exchange_of("bank-c"), "bank.a/control")
    for exchange in map(exchange_of, PARTIES):
        assert_refused(log_in("bank-b").exchange_delete, exchange)
        assert_refused(log_in("bank-b").exchange_declare, exchange, "topic", durable=True)


@pytest.mark.parametrize("name", ["mine", "fate.to.bank-c/control", "fate.to.bankxa/job/1", "fate.to.bank-b", "x"])
def test_b_makes_no_queue_or_exchange_outside_its_own(name: str, log_in: Log) -> None:
    assert_refused(log_in("bank-b").queue_declare, name)
    assert_refused(log_in("bank-b").exchange_declare, name, "fanout")


def test_a_dot_in_a_name_stands_for_itself(log_in: Log) -> None:
    """`bank.a` as a pattern would fit bankxa as well."""
    assert_refused(log_in("bank.a").queue_declare, "fate.to.bankxa/job/1")
    assert_refused(log_in("bank.a").queue_declare, "fateXto.bank.a/job/1")


def test_b_makes_no_queue_that_the_broker_names(log_in: Log) -> None:
    assert_refused(log_in("bank-b").queue_declare, "")


# --- writing into what is another's ------------------------------------------------------------------------------


@pytest.mark.parametrize("exchange", ["", exchange_of("bank.a"), exchange_of("bank-c"), "amq.direct", "amq.topic"])
@pytest.mark.parametrize("key", [control_inbox("bank.a"), control_key("bank.a"), ""])
def test_b_writes_through_its_own_exchange_only(exchange: str, key: str, log_in: Log) -> None:
    b = log_in("bank-b")
    b.confirm_delivery()
    assert_refused(b.basic_publish, exchange, key, b"x", pika.BasicProperties(user_id="bank-b"))


def test_b_cannot_speak_as_c(log_in: Log) -> None:
    found = refusal(publish, log_in("bank-b"), "bank-b", control_key("bank.a"), user_id="bank-c")
    assert found.reply_code == 406 and "user_id" in found.reply_text
    assert log_in("bank.a").basic_get(control_inbox("bank.a"))[0] is None


@pytest.mark.parametrize("exchange", ["", exchange_of("bank.a"), "amq.topic"])
def test_dead_letters_are_no_way_round(exchange: str, log_in: Log) -> None:
    arguments = {"x-dead-letter-exchange": exchange, "x-dead-letter-routing-key": control_inbox("bank.a")}
    assert_refused(log_in("bank-b").queue_declare, job_inbox("bank-b", "dead"), arguments=arguments)


def test_the_exchange_says_who_sent_whatever_user_id_says(log_in: Log) -> None:
    """B may pass on what A wrote to it, in A's name even, but only through B's exchange."""
    a, b, c = (log_in(party) for party in PARTIES)
    inbox, to_c = job_inbox("bank-b", "pass"), make_inbox(c, "bank-c", "pass")
    onward = {"x-dead-letter-exchange": exchange_of("bank-b"), "x-dead-letter-routing-key": job_key("bank-c", "pass")}
    b.queue_declare(inbox, durable=True, arguments={"x-queue-type": "classic", "x-expires": 60_000} | onward)
    b.queue_bind(inbox, exchange_of("bank.a"), job_key("bank-b", "pass"))
    publish(a, "bank.a", job_key("bank-b", "pass"))
    method = b.basic_get(inbox)[0]
    b.basic_reject(method.delivery_tag, requeue=False)
    got = next(c.consume(to_c, auto_ack=True, inactivity_timeout=20))
    assert (got[0].exchange, got[1].user_id, got[2]) == (exchange_of("bank-b"), "bank.a", b"text")
    c.cancel()


def test_alternate_exchanges_are_no_way_round(log_in: Log) -> None:
    arguments = {"alternate-exchange": exchange_of("bank.a")}
    assert_refused(log_in("bank-b").exchange_declare, "fate.to.bank-b/alt", "fanout", arguments=arguments)


# --- around it ---------------------------------------------------------------------------------------------------


def test_a_party_is_shut_out_of_other_virtual_hosts(place: Place, vhost: str) -> None:  # noqa: F811
    password = (place.folder / "bank-b").read_text().strip()
    for other in (vhost, "/"):
        with pytest.raises(AMQPError):
            pika.BlockingConnection(pika.URLParameters(place.node.url("bank-b", password, other)))


def test_a_party_has_no_say_over_the_broker(place: Place) -> None:
    (found,) = [user for user in admin(place.node, "GET", "users") if user["name"] == "bank-b"]
    assert found["tags"] == []


def test_a_party_that_joins_later_is_closed_to_those_not_granted_again(place: Place, log_in: Log) -> None:
    """At an exchange without a topic permission RabbitMQ allows every key: so the exchange itself is refused."""
    admin(place.node, "PUT", f"exchanges/{place.vhost}/fate.from.bank-d", {"type": "topic", "durable": True})
    b = log_in("bank-b")
    inbox = make_inbox(b, "bank-b", "later")
    assert_refused(b.queue_bind, inbox, "fate.from.bank-d", "bank.a/#")
    admin(place.node, "DELETE", f"exchanges/{place.vhost}/fate.from.bank-d")


def test_what_is_printed_holds_no_password(place: Place) -> None:
    password = (place.folder / "bank-b").read_text().strip()
    commands = grant_commands(place.federation, "bank-b", hashed=hash_of(place.folder / "bank-b"))
    text = "\n".join(command.shown(["rabbitmqctl"]) for command in commands)
    assert len(password) >= 32 and password not in text
    assert "bank-b" in text and json.loads(commands[0].text or "")["users"][0]["name"] == "bank-b"
