"""Transport over RabbitMQ: the one file that knows pika.

One connection per party, served by one thread of its own: training never runs on it, so heartbeats are answered
whatever the rest of the process does. Other threads hand their calls over with `add_callback_threadsafe`.

Rules:
 1. Names and bindings are those of `protocols.broker_layout`. Publishing is persistent, mandatory and confirmed;
    confirms are not waited for one by one. `user_id` is set, so that the broker vouches for the sender.
 2. What is not confirmed when a connection ends is published again, in order, on the next one. The receiver may see
    it twice.
 3. Each receiver has a lane. A lane whose receiver has no inbox yet keeps its frames and tries again, one frame at a
    time; the others are not held up. After every (re)connection a lane begins with one frame, too, so that order is
    kept when the first comes back. A frame that a full queue refuses (nack) may be overtaken by those that were on
    their way with it: the link puts them in order.
 4. An acknowledgement belongs to the connection that delivered; after a reconnect it is dropped, and the frame comes
    again.
 5. A broker that blocks publishers (memory or disk alarm) is waited for. A queue that an operator deletes is made
    anew; what was in it is for the layer above to ask for again.
 6. Only what can pass is tried again: a refused password, a missing virtual host, a certificate that does not verify
    end the transport at once with an error that says what to do.
 7. Without TLS only on loopback, and only when the address says `plaintext=loopback`.
 8. Words of services (`publish_once`) have no lane: they are published when that can be done now, may expire on their
    way, and are never sent again; what is returned or not confirmed is gone. At a standing inbox a member whose
    exchange is missing, or may not be bound yet, is left out (`silent`): one partner's setting up holds up nobody.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import itertools
import logging
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import pika
import pika.exceptions
from pika.adapters.select_connection import SelectConnection
from pika.adapters.utils.connection_workflow import AMQPConnectorException

from fate_llm.core.errors import (
    BrokerLost,
    BrokerRefused,
    ConfigurationError,
    FateError,
    InternalError,
    TransportClosed,
)
from fate_llm.core.interfaces import Buffer, Delivery, Progress
from fate_llm.core.names import nearest

from ..broker_layout import control_inbox, control_key, exchange_of, inbox_arguments, job_inbox, job_key

__all__ = [
    "PLUGIN",
    "BrokerAddress",
    "BrokerFacts",
    "BrokerProbe",
    "RabbitTransport",
    "Refusal",
    "TransportCounters",
    "delete_inboxes",
    "log_in",
]

_RECEIVE_BYTES = 256 * 1024  # pika reads 4096 bytes at a time, which makes large messages slow
_TIDYING = 5.0  # seconds that a broker may take to answer when inboxes of the dead are removed
_SMALL = 4096  # bytes of a frame that never waits: reports must not, or one full lane would hold up all others
_FAREWELL = 3.0  # seconds for the broker to answer at the end
_SETUP = 20.0  # seconds for the broker to make our inbox
_STEADY = 2.0  # seconds after which a connection was not merely a spark
_FAILURES = (pika.exceptions.AMQPError, AMQPConnectorException, OSError)  # a handshake's ssl.SSLError comes as it is
_DELETED = "Has an operator deleted the queue or taken a permission? `fate_llm federation grant` gives them back."
_EXCHANGE_PREFIX = exchange_of("")
_OPTIONS = ("plaintext", "cacertfile", "certfile", "keyfile", "server_name", "heartbeat", "queues")
logging.getLogger("pika").setLevel(logging.CRITICAL)  # what matters is raised or reported here


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """Where a party's broker is, and as whom it logs in. password is never shown.

    ca_file, cert_file, key_file: PEM; without ca_file the system's authorities count. server_name: the name in the
    broker's certificate, when it is not the host. queues: `classic`, or `quorum` for a broker of several nodes.
    heartbeat: seconds. others: host and port of further nodes of the same broker, tried in turn.
    """

    host: str
    port: int
    vhost: str
    user: str
    password: str = field(repr=False)
    tls: bool = True
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    server_name: str | None = None
    heartbeat: int = 30
    queues: str = "classic"
    others: tuple[tuple[str, int], ...] = ()

    @classmethod
    def from_url(cls, url: str, *, password: str | None = None, ca_file: str | None = None) -> BrokerAddress:
        """`amqps://user:password@host:5671/vhost?cacertfile=...&certfile=...&keyfile=...&heartbeat=30&queues=quorum`.

        A broker of several nodes: `amqps://user:password@one:5671,two:5671,three:5671/vhost`.
        Without TLS, on this machine only: `amqp://...@127.0.0.1:5672/vhost?plaintext=loopback`.

        Raises:
            ConfigurationError: another form, an unknown option, or no TLS where it has to be. The password is not
                repeated.
        """
        scheme, login, nodes, vhost, query = _parts(url)
        shown = f"{scheme}://...@{','.join(host for host, _ in nodes)}"
        options = dict(parse_qsl(query, keep_blank_values=True))
        for name in options:
            if name not in _OPTIONS:
                raise ConfigurationError(
                    f"the broker's address has an unknown option {name!r}", hint=nearest(name, _OPTIONS)
                )
        tls = scheme == "amqps"
        if not tls:
            for host, _ in nodes:
                _require_loopback(host, options.get("plaintext"))
        queues, heartbeat = options.get("queues", "classic"), options.get("heartbeat", "30")
        if queues not in ("classic", "quorum") or not heartbeat.isdecimal() or not 0 < int(heartbeat) <= 3600:
            raise ConfigurationError(f"{shown}: queues is classic or quorum, heartbeat 1 to 3600 seconds")
        user, _, written = login.partition(":")
        return cls(
            *nodes[0],
            vhost,
            unquote(user) or "guest",
            password if password is not None else unquote(written) or "guest",
            tls,
            ca_file or options.get("cacertfile"),
            options.get("certfile"),
            options.get("keyfile"),
            options.get("server_name"),
            int(heartbeat),
            queues,
            tuple(nodes[1:]),
        )

    def __str__(self) -> str:
        nodes = ",".join(f"{host}:{port}" for host, port in self.nodes)
        return f"{'amqps' if self.tls else 'amqp'}://{self.user}@{nodes}/{quote(self.vhost, safe='')}"

    @property
    def nodes(self) -> tuple[tuple[str, int], ...]:
        """Host and port of every node that is known."""
        return ((self.host, self.port), *self.others)

    def parameters(self, attempt: int = 0, *, limit: float = 15.0) -> pika.ConnectionParameters:
        """For pika; certificates are read now. attempt: counts through the nodes. limit: seconds until it is open.

        Raises:
            ConfigurationError: a certificate file that cannot be read.
        """
        host, port = self.nodes[attempt % len(self.nodes)]
        return pika.ConnectionParameters(
            host=host,
            port=port,
            virtual_host=self.vhost,
            credentials=pika.PlainCredentials(self.user, self.password, erase_on_connect=False),
            heartbeat=self.heartbeat,
            ssl_options=self._ssl_options(host) if self.tls else None,
            blocked_connection_timeout=None,
            connection_attempts=1,
            socket_timeout=min(10.0, limit),
            stack_timeout=min(15.0, limit),
            client_properties={"product": "fate_llm"},
        )

    def _ssl_options(self, host: str) -> pika.SSLOptions:
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            if self.cert_file:
                context.load_cert_chain(self.cert_file, self.key_file)
        except (OSError, ssl.SSLError) as error:
            files = ", ".join(filter(None, (self.ca_file, self.cert_file, self.key_file)))
            raise ConfigurationError(f"the certificates for {self} cannot be read ({files}): {error}") from None
        return pika.SSLOptions(context, self.server_name or host)


def _parts(url: str) -> tuple[str, str, list[tuple[str, int]], str, str]:
    """Scheme, login, nodes, virtual host and options of a broker's address. Nothing of a bad one is repeated.

    Raises:
        ConfigurationError: another form.
    """
    hint = "valid: amqps://user:password@host:5671/vhost, with %-codes for special characters in the password"
    fault = ConfigurationError("this is no broker's address", hint=hint)
    try:
        parts = urlsplit(url)
        login, at, hosts = parts.netloc.rpartition("@")
        behind = f"{parts.path}{parts.query}{parts.fragment}"
        if parts.scheme not in ("amqp", "amqps") or (not at and "@" in behind) or parts.fragment:
            raise fault
        usual = 5671 if parts.scheme == "amqps" else 5672
        found = [urlsplit(f"//{item}") for item in hosts.split(",")]
        nodes = [(one.hostname or "", one.port or usual) for one in found]
    except ValueError:  # its words repeat the address
        raise fault from None
    if not all(host for host, _ in nodes):
        raise fault
    return parts.scheme, login, nodes, unquote(parts.path[1:]) or "/", parts.query


def _require_loopback(host: str, plaintext: str | None) -> None:
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ConfigurationError(
            f"amqp:// to {host} would send passwords in clear",
            hint="Use amqps://; without TLS only a broker on this machine is spoken to.",
        )
    if plaintext != "loopback":
        raise ConfigurationError(
            "amqp:// has no TLS",
            hint="Use amqps://, or say that you mean it, for a broker on this machine: ?plaintext=loopback",
        )


class _Lane:
    """Frames to one receiver: waiting, and published but not confirmed (by delivery tag, in order)."""

    def __init__(self) -> None:
        self.waiting: deque[bytes] = deque()
        self.flying: dict[int, bytes] = {}
        self.bytes = 0
        self.proven = False  # a frame has been taken by an inbox on this connection
        self.returned: dict[int, bytes] = {}  # by delivery tag; not taken, to be tried again after a pause
        self.pause = 0.0
        self.retry_planned = False
        self.forgotten = False  # the receiver has left

    def take_back(self, *, flying: bool) -> None:
        """What was returned (and with `flying` what was not confirmed) waits again, in the order it was sent."""
        again = self.returned | (self.flying if flying else {})
        self.waiting.extendleft(again[tag] for tag in sorted(again, reverse=True))
        self.returned.clear()
        if flying:
            self.flying.clear()
        self.proven = self.retry_planned = False


@dataclass(slots=True)
class TransportCounters:
    """What one party's connection has done."""

    published: int = 0
    confirmed: int = 0
    returned: int = 0
    delivered: int = 0
    redelivered: int = 0
    reconnects: int = 0
    blocked: int = 0


class RabbitTransport:
    """Satisfies `core.interfaces.Transport`: one party's end of one job (or of the control inboxes: job None).

    members: every party of the job. expires: seconds after which an inbox that nobody reads is deleted. prefetch:
    frames delivered before one is acknowledged. window: bytes under way to one receiver beyond which `send` waits.
    meet: seconds until the first connection; outage: seconds without a broker after which the job gives up.
    silent: members that a standing inbox cannot hear, and the broker's words why; of a job there are none.
    """

    def __init__(
        self,
        address: BrokerAddress,
        *,
        party: str,
        members: Sequence[str],
        job: str | None,
        expires: float = 24 * 3600.0,
        prefetch: int = 8,
        window: int = 8 * 1024 * 1024,
        meet: float = 30.0,
        outage: float = 300.0,
        observer: Callable[[str, Mapping[str, Any]], None] | None = None,
    ) -> None:
        self.party = party
        self.counters = TransportCounters()
        self._address = address
        self._members = tuple(members)
        self._job = job
        self._inbox = job_inbox(party, job) if job is not None else control_inbox(party)
        self._expires, self._prefetch, self._window = expires, prefetch, window
        self._meet, self._outage = meet, outage
        self._observer = observer
        self._changed = threading.Condition()
        self._lanes = {member: _Lane() for member in members}
        self.silent: Mapping[str, str] = {}
        self._loose: dict[int, int] = {}  # bytes of what `publish_once` has under way, by delivery tag
        self._loose_bytes = 0  # with what the connection's thread has still to publish
        self._incoming: deque[Delivery] = deque()
        self._generation = 0
        self._attempt = 0
        self._connected = False
        self._blocked = False
        self._closing = False
        self._remove = False
        self._error: FateError | None = None
        self._reason: BaseException | None = None
        self._connection: Any = None
        self._channel: Any = None
        self._prepare()
        self._thread = threading.Thread(target=self._serve, name=f"rabbitmq-{party}", daemon=True)
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._connected or self._error is not None)
        if self._error is not None:
            self._thread.join()
            raise self._error

    # --- the seam -------------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        return self._connected and not self._blocked

    def send(self, receiver: str, parts: Sequence[Buffer]) -> int:
        lane = self._lanes.get(receiver)
        if lane is None:
            raise ConfigurationError(f"{receiver} is not a party of job {self._job}")
        single = parts[0] if len(parts) == 1 else None
        body = single if isinstance(single, bytes) else b"".join(parts)  # pika takes nothing else
        size = len(body)
        with self._changed:
            self._changed.wait_for(lambda: lane.bytes < self._window or size <= _SMALL or self._over())
            self._raise_if_over()
            if lane.forgotten:
                return size
            lane.bytes += size
            lane.waiting.append(body)
        self._call(functools.partial(self._publish_lane, receiver))
        return size

    def writable(self) -> bool:
        """Whether `publish_once` would take something now.

        Raises:
            FederationError: what has ended the transport.
        """
        self._raise_if_over()
        return self.connected and self._loose_bytes < self._window

    def publish_once(self, key: str, body: bytes, *, expires: float) -> bool:
        """Publish one message on our own exchange, at most once; False when that cannot be done now.

        key: of an inbox, by `broker_layout`. expires: seconds that it may wait in a queue. When no inbox is bound
        with the key it is dropped, and the observer hears `no_inbox`.
        """
        with self._changed:
            if not self.writable():
                return False
            self._loose_bytes += len(body)
            generation = self._generation
        self._call(functools.partial(self._publish_loose, generation, key, body, expires))
        return True

    def listen_again(self) -> None:
        """Try once more to bind the standing inbox to the exchanges of `silent` members.

        Raises:
            BrokerLost, BrokerRefused: the broker is away, or does not let us in.
        """
        _with_login(self._address, _TIDYING, self._bind_standing_inbox)

    def flush(self, timeout: float | None = None) -> bool:
        with self._changed:
            return (
                self._changed.wait_for(
                    lambda: self._over() or not any(lane.bytes for lane in self._lanes.values()), timeout
                )
                and not self._over()
            )

    def receive(self, timeout: float | None) -> Delivery | None:
        with self._changed:
            self._changed.wait_for(lambda: self._incoming or self._over(), timeout)
            if self._incoming:
                return self._incoming.popleft()
            self._raise_if_over()
            return None

    def ack(self, delivery: Delivery) -> None:
        tag = delivery.tag
        if isinstance(tag, _Tag) and tag.transport is self:
            self._call(functools.partial(self._ack, tag))

    def forget(self, receiver: str) -> None:
        with self._changed:
            lane = self._lanes[receiver]
            lane.forgotten, lane.bytes = True, 0
            lane.waiting.clear()
            lane.returned.clear()
            lane.flying.clear()
            self._changed.notify_all()

    def progress(self, sender: str) -> Progress | None:
        return None  # frames come whole

    def close(self, *, finished: bool = False) -> None:
        """Stop. finished: the job's inbox goes as well; a control inbox stays."""
        with self._changed:
            if self._closing:
                return
            self._closing, self._remove = True, finished and self._job is not None
            self._changed.notify_all()
        self._call(self._leave)
        if threading.current_thread() is not self._thread:
            self._thread.join(4 * _FAREWELL)

    def _over(self) -> bool:
        return self._closing or self._error is not None

    def _raise_if_over(self) -> None:
        if self._error is not None:
            raise self._error
        if self._closing:
            raise TransportClosed(f"the transport of {self.party} is closed")

    def _tell(self, event: str, **fields: Any) -> None:
        if self._observer is not None:
            self._observer(event, fields)

    # --- before the first connection ------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Log in once, plainly, so that what is wrong is said at once; make exchanges where that is allowed."""
        self._attempt = _with_login(self._address, self._meet, self._check_layout)

    def _check_layout(self, connection: pika.BlockingConnection) -> None:
        for member in self._members:
            name = exchange_of(member)
            try:
                connection.channel().exchange_declare(name, passive=True)
            except pika.exceptions.ChannelClosedByBroker as error:
                if error.reply_code != 404:
                    raise
                try:
                    _make_exchange(connection, name, member)
                except BrokerRefused:
                    if self._job is not None or member == self.party:
                        raise
        if self._job is None:
            self._bind_standing_inbox(connection)

    def _bind_standing_inbox(self, connection: pika.BlockingConnection) -> None:
        """Make it, and bind it to the exchange of every member that is there and lets us."""
        found: dict[str, str] = {}
        arguments = inbox_arguments(quorum=self._address.queues == "quorum")
        connection.channel().queue_declare(self._inbox, durable=True, arguments=arguments)
        for member in self._members:
            channel = connection.channel()
            try:
                channel.queue_bind(self._inbox, exchange_of(member), routing_key=control_key(self.party))
                channel.close()
            except pika.exceptions.ChannelClosedByBroker as error:
                if error.reply_code not in (403, 404):
                    raise
                found[member] = error.reply_text
        self.silent = found

    # --- the thread of the connection -----------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            self._keep_connected()
        # The boundary of the thread: nobody may wait for one that has ended.
        except Exception as error:
            self._disconnected()
            self._fail(InternalError(f"the transport stopped: {type(error).__name__}: {error}"))

    def _keep_connected(self) -> None:
        """Keep a connection until the transport is closed or gives up."""
        began = lost_at = time.monotonic()
        pause = 0.05
        while not self._over():
            before = self._generation
            patience = self._outage if before else self._meet
            try:
                self._run_connection(lost_at + patience - time.monotonic())
            # The boundary to pika, which fails in many ways on what a broken line delivers: a connection has ended.
            except Exception as error:
                self._reason = self._reason or error
            was_up = self._generation > before
            self._disconnected()
            if self._over():
                break
            now = time.monotonic()
            if was_up:
                lost_at = now
                pause = 0.05 if now - began > _STEADY else pause
            refused = _refusal(self._reason, self._address, was_up=was_up)
            if refused is not None:
                self._fail(refused)
            elif now - lost_at >= patience:
                why = _words(self._reason)
                self._fail(BrokerLost(f"the broker {self._address} has been away for {patience:g} s: {why}"))
            else:
                self._tell("broker_away", seconds=round(now - lost_at, 1), why=_words(self._reason))
                with self._changed:
                    self._changed.wait_for(self._over, min(pause, lost_at + patience - now))
                pause = min(2 * pause, 2.0)
                self._attempt += 1
                began = time.monotonic()

    def _run_connection(self, limit: float) -> None:
        """One connection from its beginning to its end. limit: seconds until it has to be open."""
        self._reason = None
        connection = SelectConnection(
            self._address.parameters(self._attempt, limit=max(limit, 1.0)),
            on_open_callback=self._opened,
            on_open_error_callback=self._ended,
            on_close_callback=self._ended,
        )
        connection.add_on_connection_blocked_callback(lambda *_: self._set_blocked(True))
        connection.add_on_connection_unblocked_callback(lambda *_: self._set_blocked(False))
        try:
            with self._changed:
                if self._over():
                    return
                self._connection = connection
            connection.ioloop.start()
        finally:
            with self._changed:
                self._connection = None
            _dispose(connection)

    def _opened(self, connection: Any) -> None:
        _read_in_large_pieces(connection)
        connection.ioloop.call_later(_SETUP, functools.partial(self._check_setup, connection, self._generation))
        connection.channel(on_open_callback=self._channel_opened)

    def _check_setup(self, connection: Any, generation: int) -> None:
        """A broker that lives, but cannot make or read our inbox (a cluster without its majority), is tried anew."""
        if generation == self._generation:
            self._reason = self._reason or TimeoutError(f"no inbox within {_SETUP:g} s")
            connection.ioloop.stop()

    def _channel_opened(self, channel: Any) -> None:
        self._channel = channel
        channel.add_on_close_callback(self._channel_closed)
        channel.add_on_return_callback(self._returned)
        channel.add_on_cancel_callback(self._queue_vanished)
        channel.confirm_delivery(self._confirmed)
        channel.basic_qos(prefetch_count=self._prefetch)
        self._declare_inbox()

    def _declare_inbox(self) -> None:
        """Make the inbox, bind it to everybody's exchange, read it. Done again when an operator has deleted it."""
        channel = self._channel
        arguments: dict[str, Any] = {"x-queue-type": self._address.queues}
        if self._job is not None:
            arguments["x-expires"] = int(self._expires * 1000)
        channel.queue_declare(self._inbox, durable=True, arguments=arguments, callback=lambda _: None)
        key = job_key(self.party, self._job) if self._job is not None else control_key(self.party)
        for member in self._members:
            if member not in self.silent:
                channel.queue_bind(self._inbox, exchange_of(member), routing_key=key, callback=lambda _: None)
        channel.basic_consume(self._inbox, self._delivered, callback=self._consuming)

    def _consuming(self, _frame: Any) -> None:
        """The inbox is there and read: from here on the connection counts as up."""
        with self._changed:
            if self._connected:
                return  # only the inbox was made anew
            self._generation += 1
            self.counters.reconnects = self._generation - 1
            self._connected = True
            self._changed.notify_all()
        if self._generation > 1:
            self._tell("broker_back", reconnects=self._generation - 1)
        for receiver in self._lanes:
            self._publish_lane(receiver)

    def _queue_vanished(self, _frame: Any) -> None:
        self._tell("inbox_deleted", inbox=self._inbox)
        self._declare_inbox()

    def _channel_closed(self, _channel: Any, reason: BaseException) -> None:
        self._reason = self._reason or reason
        if self._connection is not None and self._connection.is_open:
            self._connection.close()

    def _ended(self, connection: Any, reason: Any) -> None:
        if self._reason is None:
            self._reason = reason if isinstance(reason, BaseException) else ConnectionError(str(reason))
        connection.ioloop.stop()

    def _disconnected(self) -> None:
        """Everything published and not confirmed goes back to the front of its lane."""
        with self._changed:
            self._connected = self._blocked = False
            self._channel = None
            self._incoming.clear()  # not acknowledged: it comes again
            self._loose.clear()
            self._loose_bytes = 0
            for lane in self._lanes.values():
                lane.take_back(flying=True)
                lane.pause = 0.0
            self._changed.notify_all()

    def _fail(self, error: FateError) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def _set_blocked(self, blocked: bool) -> None:
        with self._changed:
            self._blocked = blocked
            self.counters.blocked += blocked
            self._changed.notify_all()
        self._tell("broker_blocks" if blocked else "broker_unblocks")
        if not blocked:
            for receiver in self._lanes:
                self._publish_lane(receiver)

    def _call(self, function: Callable[[], None]) -> None:
        """Run something on the connection's thread, if there is a connection; otherwise it is not needed."""
        with self._changed:
            if self._connection is not None:
                self._connection.ioloop.add_callback_threadsafe(function)

    # --- publishing (connection's thread) -------------------------------------------------------------------

    def _publish_lane(self, receiver: str) -> None:
        lane = self._lanes[receiver]
        while True:
            with self._changed:
                ready = self._connected and not self._blocked and not lane.retry_planned and not lane.returned
                if not ready or not lane.waiting or (lane.flying and not lane.proven):
                    return
                frame = lane.waiting.popleft()
                self.counters.published += 1
                tag = self._next_tag()
                lane.flying[tag] = frame
            key = job_key(receiver, self._job) if self._job is not None else control_key(receiver)
            properties = pika.BasicProperties(
                delivery_mode=2, user_id=self._address.user, message_id=str(tag), correlation_id=receiver
            )
            self._channel.basic_publish(exchange_of(self.party), key, frame, properties, mandatory=True)

    def _publish_loose(self, generation: int, key: str, body: bytes, expires: float) -> None:
        with self._changed:
            if generation != self._generation or not self._connected or not self._channel.is_open:
                return
            self.counters.published += 1
            tag = self._next_tag()
            self._loose[tag] = len(body)
        properties = pika.BasicProperties(
            delivery_mode=2, user_id=self._address.user, message_id=str(tag), expiration=str(int(expires * 1000))
        )
        self._channel.basic_publish(exchange_of(self.party), key, body, properties, mandatory=True)

    def _end_loose(self, tags: Iterable[int], *, taken: bool) -> None:
        """The broker has these, or they are lost. The caller holds the lock."""
        for tag in tags:
            self._loose_bytes -= self._loose.pop(tag)
            self.counters.confirmed += taken

    def _next_tag(self) -> int:
        self._tag = 1 if self._tag_generation != self._generation else self._tag + 1
        self._tag_generation = self._generation
        return self._tag

    _tag = 0
    _tag_generation = 0

    def _returned(self, _channel: Any, method: Any, properties: Any, _body: bytes) -> None:
        """Nobody has bound the receiver's inbox. The confirm that follows must not count."""
        tag = int(properties.message_id)
        with self._changed:
            self.counters.returned += 1
            loose = tag in self._loose
            if loose:
                self._end_loose([tag], taken=False)
            else:
                self._not_taken(properties.correlation_id, tag)
        if loose:
            self._tell("no_inbox", key=str(method.routing_key))

    def _not_taken(self, receiver: str, tag: int) -> None:
        """A frame is tried again after a pause. The caller holds the lock."""
        lane = self._lanes[receiver]
        frame = lane.flying.pop(tag, None)
        if frame is None:
            return
        lane.returned[tag] = frame
        if not lane.retry_planned:
            lane.retry_planned = True
            lane.pause = min(max(2 * lane.pause, 0.05), 2.0)
            self._connection.ioloop.call_later(lane.pause, functools.partial(self._retry, receiver, self._generation))

    def _retry(self, receiver: str, generation: int) -> None:
        with self._changed:
            if generation != self._generation or not self._connected:
                return
            self._lanes[receiver].take_back(flying=False)
        self._publish_lane(receiver)

    def _confirmed(self, frame: Any) -> None:
        """The broker has taken frames over, or (nack) could not keep them."""
        method = frame.method
        taken = isinstance(method, pika.spec.Basic.Ack)
        touched = []
        last = method.delivery_tag
        with self._changed:
            loose = [tag for tag in self._loose if tag == last or (method.multiple and tag < last)]
            self._end_loose(loose, taken=taken)
            for receiver, lane in self._lanes.items():
                tags = [tag for tag in lane.flying if tag <= last] if method.multiple else [last]
                for tag in tags:
                    if tag not in lane.flying:
                        continue
                    touched.append(receiver)
                    if taken:
                        lane.bytes -= len(lane.flying.pop(tag))
                        lane.proven, lane.pause = True, 0.0
                        self.counters.confirmed += 1
                    else:
                        self._not_taken(receiver, tag)
            self._changed.notify_all()
        for receiver in dict.fromkeys(touched):
            self._publish_lane(receiver)

    # --- consuming (connection's thread) --------------------------------------------------------------------

    def _delivered(self, _channel: Any, method: Any, _properties: Any, body: bytes) -> None:
        exchange = str(method.exchange)
        sender = exchange.removeprefix(_EXCHANGE_PREFIX) if exchange.startswith(_EXCHANGE_PREFIX) else ""
        tag = _Tag(self, self._generation, method.delivery_tag)
        delivery = Delivery(sender, memoryview(body), tag, bool(method.redelivered))
        with self._changed:
            self.counters.delivered += 1
            self.counters.redelivered += bool(method.redelivered)
            self._incoming.append(delivery)
            self._changed.notify_all()

    def _ack(self, tag: _Tag) -> None:
        if tag.generation == self._generation and self._connected and self._channel.is_open:
            self._channel.basic_ack(tag.number)

    def _leave(self) -> None:
        """End the connection; with `remove` the inbox goes first. A broker that does not answer is not waited for."""
        connection, channel = self._connection, self._channel
        if connection.is_closing or connection.is_closed:
            return
        connection.ioloop.call_later(_FAREWELL, connection.ioloop.stop)
        if self._remove and channel is not None and channel.is_open:
            channel.queue_delete(self._inbox, callback=lambda _: connection.close())
        else:
            connection.close()


@dataclass(frozen=True, slots=True, eq=False)
class _Tag:
    transport: RabbitTransport
    generation: int
    number: int


def log_in(address: BrokerAddress, *, patience: float) -> None:
    """Log in and out again: is the broker there, and does it let us in?

    patience: seconds in which a broker that does not answer is tried again.

    Raises:
        BrokerLost, BrokerRefused: it is not, or does not.
    """
    _with_login(address, patience, lambda _connection: None)


def delete_inboxes(address: BrokerAddress, parties: Sequence[str], job: str) -> None:
    """Remove the inboxes of a job whose parties are gone; none is no error.

    Raises:
        BrokerLost, BrokerRefused: the broker is away, or does not allow it.
    """

    def delete(connection: pika.BlockingConnection) -> None:
        for party in parties:
            connection.channel().queue_delete(job_inbox(party, job))

    _with_login(address, _TIDYING, delete)


def _with_login(address: BrokerAddress, patience: float, work: Callable[[pika.BlockingConnection], None]) -> int:
    """Do some work on a connection of its own; how often it had to be begun again.

    patience: seconds in which a broker that does not answer, or breaks off, is tried again, node by node.

    Raises:
        BrokerLost, BrokerRefused: it stays away, or says no.
    """
    until = time.monotonic() + patience
    pause = 0.1
    for attempt in itertools.count():
        try:
            connection = pika.BlockingConnection(address.parameters(attempt, limit=max(until - time.monotonic(), 1.0)))
            try:
                work(connection)
            finally:
                if connection.is_open:
                    connection.close()
            return attempt
        except _FAILURES as error:
            refused = _refusal(error, address)
            if refused is not None:
                raise refused from None
            if time.monotonic() >= until:
                raise BrokerLost(f"the broker {address} cannot be reached: {_words(error)}") from None
        time.sleep(pause)
        pause = min(2 * pause, 2.0)
    raise AssertionError("unreachable")


# --- pika's corners ---------------------------------------------------------------------------------------------


def _make_exchange(connection: Any, name: str, member: str) -> None:
    """Raises BrokerRefused: it may not be made."""
    try:
        connection.channel().exchange_declare(name, exchange_type="topic", durable=True)
    except pika.exceptions.ChannelClosedByBroker as error:
        raise BrokerRefused(
            f"the exchange {name} is missing, and may not be made here: {error.reply_text}",
            hint=f"An operator gives {member} its place on the broker: fate_llm federation grant --party {member}",
        ) from None


def _read_in_large_pieces(connection: Any) -> None:
    """pika's transport has its block size as a class attribute; this one connection gets a larger one.

    TLS hands over at most one record (16 KiB) at a time, whatever is asked for.
    """
    transport = getattr(connection, "_transport", None)
    for name, value in (("_MAX_RECV_BYTES", _RECEIVE_BYTES), ("_MAX_CONSUME_BYTES", 4 * _RECEIVE_BYTES)):
        if hasattr(transport, name):
            setattr(transport, name, value)


def _dispose(connection: Any) -> None:
    """Close what pika leaves open: its loop, and the socket of a connection that did not end in order."""
    socket = getattr(getattr(connection, "_transport", None), "_sock", None)
    if socket is not None:
        socket.close()
    connection.ioloop.close()


def _causes(error: BaseException | None) -> list[BaseException]:
    """An error with everything that pika wraps in it."""
    found: list[BaseException] = []
    pending = [error]
    while pending:
        current = pending.pop(0)
        if not isinstance(current, BaseException) or current in found:
            continue
        found.append(current)
        pending += [*getattr(current, "exceptions", ()), current.__cause__, current.__context__]
        pending += [value for value in (*current.args, getattr(current, "exception", None)) if value is not current]
    return found


def _refusal(error: BaseException | None, address: BrokerAddress, *, was_up: bool = False) -> FateError | None:
    """The error to end with when trying again is no use, or None. was_up: the connection had worked before."""
    for cause in _causes(error):
        if isinstance(cause, FateError):
            return cause
        if isinstance(cause, ssl.SSLError):
            found = None if was_up else _tls_refusal(cause, address)
        elif isinstance(cause, pika.exceptions.ConnectionClosedByBroker | pika.exceptions.AMQPConnectionError):
            found = _login_refusal(cause, address)
        elif isinstance(cause, pika.exceptions.ChannelClosedByBroker):
            found = _channel_refusal(cause, address)
        else:
            found = None
        if found is not None:
            return found
    return None


def _tls_refusal(error: ssl.SSLError, address: BrokerAddress) -> BrokerRefused | None:
    if isinstance(error, ssl.SSLCertVerificationError):
        text = f"the certificate of {address} does not verify: {error.verify_message}"
        hint = (
            "Name the authority that signed it (ca_file, or ?cacertfile= in the address), or the host it was made for."
        )
        return BrokerRefused(text, hint=hint)
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError | ssl.SSLSyscallError):
        return None  # cut off
    text = f"no TLS connection to {address}: {error.reason or error}"
    return BrokerRefused(text, hint="Is this the broker's TLS port, and our certificate one it accepts?")


def _login_refusal(error: Exception, address: BrokerAddress) -> BrokerRefused | None:
    """pika guesses from the moment of the end; an end without the broker's own words is not a refusal."""
    said = str(error)
    if "ALERT" in said and (
        "CERTIFICATE" in said or "UNKNOWN_CA" in said
    ):  # under TLS 1.3 it comes after the handshake
        hint = "This broker wants a client's certificate that it knows: ?certfile= and ?keyfile= in the address."
        return BrokerRefused(f"the broker {address} refuses our certificate, or the lack of one", hint=hint)
    if isinstance(error, pika.exceptions.ProbableAuthenticationError | pika.exceptions.AuthenticationError):
        if "StreamLost" in said:
            return None
        return BrokerRefused(
            f"the broker {address} refuses user {address.user!r} or its password",
            hint="Mend the address, or let an operator run `fate_llm federation grant`.",
        )
    if isinstance(error, pika.exceptions.ProbableAccessDeniedError):
        if "StreamLost" in said or "is down" in said:
            return None
        return BrokerRefused(
            f"the broker {address} has no virtual host {address.vhost!r}, or {address.user!r} may not use it",
            hint="An operator makes it: fate_llm federation grant",
        )
    if isinstance(error, pika.exceptions.ConnectionClosedByBroker) and error.reply_code in (403, 530):
        return BrokerRefused(f"the broker {address} ends the connection: {error.reply_text}")
    return None


def _channel_refusal(error: pika.exceptions.ChannelClosedByBroker, address: BrokerAddress) -> BrokerRefused | None:
    hints = {
        403: "The user lacks a permission; an operator gives it: fate_llm federation grant",
        404: "An operator makes what is missing: fate_llm federation grant",
        406: "It was made with other settings: an operator deletes it, or the address says what it is (?queues=).",
    }
    passing = "home node" in error.reply_text or "inaccessible" in error.reply_text  # a node of a cluster is away
    if error.reply_code not in hints or passing:
        return None
    return BrokerRefused(f"the broker {address} refuses: {error.reply_text}", hint=hints[error.reply_code])


def _words(error: BaseException | None) -> str:
    """The most telling words in what pika raised."""
    texts = [f"{type(cause).__name__}: {cause}" for cause in _causes(error) if str(cause)]
    return min(texts, key=len)[:300] if texts else type(error).__name__


# --- looking at a broker, for `fate_llm doctor` -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BrokerFacts:
    """What a broker said when it let us in. heartbeat: seconds; frame_max: bytes; both as agreed with us."""

    product: str
    version: str
    cluster: str
    heartbeat: int
    frame_max: int
    capabilities: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    """The broker's no to one call. code: of AMQP 0-9-1 (403 not allowed, 404 missing, 406 not so, 312 to nobody)."""

    code: int
    text: str


class BrokerProbe:
    """One connection to look at a broker with, for one thread: nothing is tried again, and a no is an answer.

    limit: seconds until it is open. alarm_limit: seconds that a broker which has stopped publishers is waited for;
    None: until it goes on.

    Raises:
        BrokerLost, BrokerRefused: from every call, when the connection cannot be made or is lost.
    """

    def __init__(
        self, address: BrokerAddress, *, limit: float = 10.0, alarm_limit: float | None = 10.0, attempt: int = 0
    ) -> None:
        self._address, self._incoming = address, deque[Delivery]()
        self._consumer: Any = None
        self._blocked, self._deleted = "", False
        parameters = address.parameters(attempt, limit=limit)
        parameters.blocked_connection_timeout = alarm_limit
        with self._named_errors():
            self._connection = cast(Any, pika.BlockingConnection(parameters))
        # The blocking connection itself would keep the news until it is idle, which it is not while it is stopped.
        self._connection._impl.add_on_connection_blocked_callback(self._stopped)

    @property
    def facts(self) -> BrokerFacts:
        agreed = self._connection._impl
        said = agreed.server_properties
        able = tuple(sorted(name for name, value in said.get("capabilities", {}).items() if value))
        product, version, cluster = (str(said.get(name, "?")) for name in ("product", "version", "cluster_name"))
        return BrokerFacts(product, version, cluster, int(agreed.params.heartbeat), int(agreed.params.frame_max), able)

    @property
    def blocked(self) -> str:
        """Why the broker has stopped publishers, in its words; empty while it has not."""
        return self._blocked

    def exchange_is_there(self, name: str) -> Refusal | None:
        return self._ask(lambda channel: channel.exchange_declare(name, passive=True))

    def make_exchange(self, name: str) -> Refusal | None:
        """A durable topic exchange, as a job makes it where that is allowed."""
        return self._ask(lambda channel: channel.exchange_declare(name, exchange_type="topic", durable=True))

    def delete_exchange(self, name: str) -> Refusal | None:
        return self._ask(lambda channel: channel.exchange_delete(name))

    def make_inbox(self, name: str, *, expires: float) -> Refusal | None:
        """A durable queue of the kind that the address says, gone `expires` seconds after its last use."""
        arguments = {"x-queue-type": self._address.queues, "x-expires": int(expires * 1000)}
        return self._ask(lambda channel: channel.queue_declare(name, durable=True, arguments=arguments))

    def delete_inbox(self, name: str) -> Refusal | None:
        """One that is not there is no error."""
        return self._ask(lambda channel: channel.queue_delete(name))

    def consumers(self, name: str) -> int | Refusal:
        """How many read a queue."""
        found: list[int] = []
        refused = self._ask(
            lambda channel: found.append(channel.queue_declare(name, passive=True).method.consumer_count)
        )
        return refused if refused is not None else found[0]

    def bind(self, queue: str, exchange: str, key: str) -> Refusal | None:
        return self._ask(lambda channel: channel.queue_bind(queue, exchange, key))

    def unbind(self, queue: str, exchange: str, key: str) -> Refusal | None:
        return self._ask(lambda channel: channel.queue_unbind(queue, exchange, key))

    def look_into(self, queue: str) -> Refusal | None:
        """Try to read one message; it goes back at once."""
        return self._ask(lambda channel: channel.basic_get(queue))

    def publish(
        self, exchange: str, key: str, body: bytes, *, expires: float | None = None, user: str | None = None
    ) -> Refusal | None:
        """One message, persistent, mandatory and confirmed. expires: seconds that it may wait in a queue."""

        def call(channel: Any) -> None:
            channel.confirm_delivery()
            channel.basic_publish(exchange, key, body, self._properties(expires, user), mandatory=True)

        return self._ask(call)

    def send(self, exchange: str, key: str, body: bytes, *, expires: float | None = None) -> None:
        """The same without waiting for a confirm; on the channel that reads, so `consume` comes first."""
        with self._named_errors():
            self._consumer.basic_publish(exchange, key, body, self._properties(expires, None))

    def consume(self, queue: str, *, prefetch: int = 32) -> Refusal | None:
        """Read a queue from now on, with `receive`; what is not acknowledged goes back at the end."""
        _read_in_large_pieces(self._connection._impl)
        with self._named_errors():
            channel = self._connection.channel()
            try:
                channel.basic_qos(prefetch_count=prefetch)
                channel.add_on_cancel_callback(self._cancelled)
                channel.basic_consume(queue, self._delivered)
            except pika.exceptions.ChannelClosedByBroker as error:
                return Refusal(error.reply_code, error.reply_text)
            self._consumer = channel
        return None

    def receive(self, timeout: float) -> Delivery | None:
        """The next message, or None after `timeout` seconds."""
        until = time.monotonic() + timeout
        with self._named_errors():
            while not self._incoming and (left := until - time.monotonic()) > 0:
                self._connection.process_data_events(left)
                if self._deleted or not self._consumer.is_open:
                    raise BrokerLost(f"the broker {self._address} lets us read no more", hint=_DELETED)
        return self._incoming.popleft() if self._incoming else None

    def ack(self, delivery: Delivery) -> None:
        with self._named_errors():
            self._consumer.basic_ack(delivery.tag)

    def close(self) -> None:
        if self._connection.is_open:
            with contextlib.suppress(*_FAILURES):
                self._connection.close()

    def _ask(self, call: Callable[[Any], Any]) -> Refusal | None:
        """One call on a channel of its own, which a refusal closes."""
        with self._named_errors():
            channel = self._connection.channel()
            try:
                call(channel)
            except pika.exceptions.ChannelClosedByBroker as error:
                return Refusal(error.reply_code, error.reply_text)
            except pika.exceptions.UnroutableError:
                return Refusal(312, "no inbox takes it")
            except pika.exceptions.NackError:
                return Refusal(541, "the broker could not keep it")
            finally:
                if channel.is_open:
                    channel.close()
        return None

    def _properties(self, expires: float | None, user: str | None) -> pika.BasicProperties:
        wait = None if expires is None else str(int(expires * 1000))
        return pika.BasicProperties(delivery_mode=2, user_id=user or self._address.user, expiration=wait)

    def _delivered(self, _channel: Any, method: Any, _properties: Any, body: bytes) -> None:
        exchange = str(method.exchange)
        sender = exchange.removeprefix(_EXCHANGE_PREFIX) if exchange.startswith(_EXCHANGE_PREFIX) else ""
        self._incoming.append(Delivery(sender, memoryview(body), method.delivery_tag, bool(method.redelivered)))

    def _cancelled(self, _frame: Any) -> None:
        self._deleted = True

    def _stopped(self, _connection: Any, frame: Any) -> None:
        self._blocked = str(frame.method.reason) or "without a reason"

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except _FAILURES as error:
            lost = BrokerLost(f"the broker {self._address} cannot be reached: {_words(error)}")
            raise _refusal(error, self._address) or lost from None


PLUGIN = RabbitTransport
