"""What a party may do on its broker and how well it goes: tried out with an inbox of our own, which is gone afterwards.

Nothing that is another's is touched. What must be refused is tried with names that nobody has: RabbitMQ looks at the
permission before it looks whether the thing is there, so its answer is 403 (not allowed) or something else.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from fate_llm.core.errors import BrokerLost
from fate_llm.protocols import broker_layout as layout
from fate_llm.protocols.transports.rabbitmq import BrokerAddress, BrokerFacts, BrokerProbe, RabbitTransport, Refusal
from fate_llm.security.randomness import random_bytes

from .doctor_ping import session_name
from .doctor_report import Check, failed, ok, skipped, warning

__all__ = [
    "LARGEST_MESSAGE",
    "Place",
    "check_alarms",
    "check_facts",
    "check_largest",
    "check_permissions",
    "check_refusals",
    "check_speed",
    "find_exchange",
    "percentiles",
]

LARGEST_MESSAGE = 2 * 1024 * 1024 + 4096
"""Bytes of the largest message that a job publishes: a chunk with its headers."""

_CHUNKS = 16
_ROUNDS = 50
_IDLE = 600.0  # seconds after which the broker itself removes what a doctor that was killed has left
_GRANT = "An operator gives this party its place: fate_llm federation grant --party {party}"
_NOT_ALLOWED = 403
_NEEDED = "publisher_confirms", "basic.nack", "connection.blocked", "consumer_cancel_notify"
_OLDEST = (3, 10)


@dataclass(frozen=True, slots=True)
class Place:
    """Who looks, and where. others: the other parties of the roster, () without one. session: 16 random bytes.

    seconds: for which an answer is waited. node: which of the address's. borrowed: a party's name that we made up,
    because the exchange of `party` is not there yet; what has this name goes with us.
    """

    address: BrokerAddress = field(repr=False)
    party: str
    others: tuple[str, ...]
    session: bytes
    seconds: float
    ticks: Callable[[], float] = field(repr=False)
    node: int = 0
    borrowed: str = ""

    @property
    def acting(self) -> str:
        return self.borrowed or self.party

    @property
    def exchange(self) -> str:
        return layout.exchange_of(self.acting)

    @property
    def job(self) -> str:
        return session_name(self.session)

    @property
    def inbox(self) -> str:
        return layout.job_inbox(self.acting, self.job)

    @property
    def key(self) -> str:
        return layout.job_key(self.acting, self.job)

    @property
    def grant(self) -> str:
        return _GRANT.format(party=self.party)

    def probe(self) -> BrokerProbe:
        """A connection of its own.

        Raises:
            BrokerLost, BrokerRefused: there is none.
        """
        return BrokerProbe(self.address, limit=self.seconds, alarm_limit=self.seconds, attempt=self.node)

    def clean(self) -> None:
        """Remove what the checks have made.

        Raises:
            BrokerLost, BrokerRefused: the broker is away, and does it itself after ten minutes.
        """
        probe = self.probe()
        try:
            probe.delete_inbox(self.inbox)
            if self.borrowed:
                probe.delete_exchange(self.exchange)
        finally:
            probe.close()


def check_facts(facts: BrokerFacts) -> list[Check]:
    """Login, and what was agreed about heartbeats and frames."""
    found = f"{facts.product} {facts.version}, cluster {facts.cluster}"
    missing = sorted(set(_NEEDED) - set(facts.capabilities))
    numbers = tuple(int(part) for part in re.findall(r"\d+", facts.version)[:2])
    login = ok("login", found)
    if missing:
        login = failed("login", f"{found}; it cannot do {', '.join(missing)}", "Use RabbitMQ 3.10 or newer.")
    elif numbers < _OLDEST:
        login = warning("login", found, "Use RabbitMQ 3.10 or newer: older ones are not tested.")
    beat = ok("heartbeat", f"every {facts.heartbeat} s")
    if not facts.heartbeat:
        beat = warning("heartbeat", "off", "Set `heartbeat = 30` in rabbitmq.conf: a cut line is not noticed without.")
    elif facts.heartbeat > 60:
        do = "Set heartbeat=30 in the broker's address, or in rabbitmq.conf: a cut line is noticed after two of them."
        beat = warning("heartbeat", f"every {facts.heartbeat} s", do)
    frame = ok("frame_max", f"{facts.frame_max} bytes")
    if 0 < facts.frame_max < 65536:
        frame = warning("frame_max", f"{facts.frame_max} bytes", "Set `frame_max = 131072` in rabbitmq.conf.")
    return [login, beat, frame]


def find_exchange(probe: BrokerProbe, place: Place) -> tuple[Check, Place | None]:
    """The check, and the place to try the rest from: None where there is no exchange and none may be made."""
    refused = probe.exchange_is_there(place.exchange)
    if refused is None:
        return ok("exchange", f"{place.exchange} is there"), place
    if refused.code != 404:
        return failed("exchange", f"{place.exchange}: {refused.text}", place.grant), None
    other = replace(place, borrowed=f"doctor-{place.session.hex()}")
    if probe.make_exchange(other.exchange) is not None:
        return failed("exchange", f"{place.exchange} is missing, and may not be made", place.grant), None
    found = f"{place.exchange} is not there yet; a job makes it, as this user may. Tried with one of our own instead."
    return warning("exchange", found, f"For a development broker that is fine. Else: {place.grant}"), other


def check_alarms(place: Place, told: Sequence[str]) -> Check:
    """Publish one message to nobody: a broker that is short of something says so then. told: by the management API."""
    probe = place.probe()
    do = "Free memory or disk at the broker (or raise its limits); it goes on by itself then."
    try:
        refused = probe.publish(place.exchange, f"{place.key}/nobody", b"", expires=1.0)
    except BrokerLost:
        if not probe.blocked:
            raise
        return failed("alarms", f"the broker has stopped publishers: {probe.blocked}", do)
    finally:
        probe.close()
    if told:
        return failed("alarms", "; ".join(told), do)
    if refused is not None and refused.code == _NOT_ALLOWED:
        return skipped("alarms", "publishing is refused: see permissions")
    return ok("alarms", "publishers are not stopped")


def check_permissions(probe: BrokerProbe, place: Place) -> Check:
    """Everything that a job does: make, bind, read and delete an inbox of our own; publish to our exchange."""
    steps: list[tuple[str, Callable[[], Refusal | None]]] = [
        ("make an inbox", lambda: probe.make_inbox(place.inbox, expires=_IDLE)),
        ("bind it to our exchange", lambda: probe.bind(place.inbox, place.exchange, place.key)),
        ("publish to our exchange", lambda: probe.publish(place.exchange, place.key, b"", expires=_IDLE)),
        ("read our inbox", lambda: probe.look_into(place.inbox)),
        ("delete our inbox", lambda: probe.delete_inbox(place.inbox)),
    ]
    for what, call in steps:
        refused = call()
        if refused is not None:
            probe.delete_inbox(place.inbox)
            return failed("permissions", f"may not {what}: {refused.text}", place.grant)
    return ok("permissions", "may make, bind, read and delete an inbox of its own, and publish to its own exchange")


def check_refusals(probe: BrokerProbe, place: Place) -> Check:
    """Everything that nobody's user needs: each has to be refused."""
    other = place.others[0] if place.others and not place.borrowed else f"nobody-{place.session.hex()}"
    theirs, foreign = layout.exchange_of(other), layout.job_inbox(other, place.job)
    key, own = layout.job_key(other, place.job), place.inbox
    tries: dict[str, Callable[[], Refusal | None]] = {
        "publish to the default exchange": lambda: probe.publish("", place.key, b""),
        "publish to another party's exchange": lambda: probe.publish(theirs, place.key, b""),
        "publish in another's name": lambda: probe.publish(place.exchange, place.key, b"", user=f"{other}/nobody"),
        "bind with another party's key": lambda: probe.bind(own, place.exchange, key),
        "bind with the key #": lambda: probe.bind(own, place.exchange, "#"),
        "read another party's inbox": lambda: probe.look_into(foreign),
        "make an inbox for another party": lambda: probe.make_inbox(foreign, expires=_IDLE),
    }
    probe.make_inbox(own, expires=_IDLE)
    try:
        allowed = [what for what, call in tries.items() if not _is_refused(call())]
        allowed += [
            f"bind with its key at the exchange of {party}"
            for party in place.others
            if not _is_refused(probe.bind(own, layout.exchange_of(party), layout.job_key(party, place.job)))
        ]
    finally:
        probe.delete_inbox(own)
        probe.delete_inbox(foreign)
    if allowed:
        found = f"this user may do more than it needs: {', '.join(allowed)}"
        return warning("refusals", found, f"For a development broker that is fine. Else: {place.grant}")
    return ok("refusals", f"{len(tries) + len(place.others)} things that no party needs are refused")


def _is_refused(answer: Refusal | None) -> bool:
    """A message in another's name is refused as not so (406), the rest as not allowed."""
    return answer is not None and answer.code in (_NOT_ALLOWED, 406)


def check_largest(probe: BrokerProbe, place: Place) -> Check:
    """One message of the largest size, to an inbox of our own."""
    probe.make_inbox(place.inbox, expires=_IDLE)
    try:
        probe.bind(place.inbox, place.exchange, place.key)
        refused = probe.publish(place.exchange, place.key, bytes(LARGEST_MESSAGE), expires=_IDLE)
    finally:
        probe.delete_inbox(place.inbox)
    if refused is None:
        return ok("largest_message", f"{LARGEST_MESSAGE} bytes pass, the largest that a job publishes")
    limit = re.search(r"max size (\d+)", refused.text)
    found = f"{LARGEST_MESSAGE} bytes do not pass: " + (f"the limit is {limit[1]} bytes" if limit else refused.text)
    return failed("largest_message", found, "Set `max_message_size = 16777216` in rabbitmq.conf.")


def check_speed(place: Place) -> list[Check]:
    """Small messages one by one, then chunks as fast as they are confirmed: from us through the broker to us."""
    transport = RabbitTransport(
        place.address,
        party=place.acting,
        members=(place.acting,),
        job=place.job,
        expires=_IDLE,
        window=(_CHUNKS + 1) * LARGEST_MESSAGE,  # `send` waits for no time that we could bound
        meet=place.seconds,
        outage=place.seconds,
    )
    try:
        took: list[float] = []
        for number in range(_ROUNDS):
            began = place.ticks()
            transport.send(place.acting, [number.to_bytes(8, "big")])
            delivery = transport.receive(place.seconds)
            if delivery is None:
                do = "Look at the broker's load and at the line to it."
                return [failed("round_trip", f"message {number + 1} did not come back in {place.seconds:g} s", do)]
            took.append(place.ticks() - began)
            transport.ack(delivery)
        return [ok("round_trip", f"{percentiles(took)}, {_ROUNDS} messages"), _throughput(transport, place)]
    finally:
        transport.close(finished=True)


def percentiles(seconds: Sequence[float]) -> str:
    """Median and 99th percentile in ms."""
    ordered = sorted(seconds)
    last = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    return f"median {1000 * statistics.median(ordered):.2f} ms, 99th percentile {1000 * last:.2f} ms"


def _throughput(transport: RabbitTransport, place: Place) -> Check:
    """The chunks that are confirmed within three times the time for an answer."""
    chunk, before = random_bytes(LARGEST_MESSAGE), transport.counters.confirmed
    began = place.ticks()
    for _ in range(_CHUNKS):
        transport.send(place.acting, [chunk])
    done = transport.flush(3 * place.seconds)
    took = max(place.ticks() - began, 1e-6)
    count = transport.counters.confirmed - before
    rate = count * LARGEST_MESSAGE / took / 1e6
    found = f"{rate:.3g} MB/s, {count} of {_CHUNKS} chunks of {LARGEST_MESSAGE} bytes confirmed in {took:.2f} s"
    if not done:
        return warning("throughput", found, "The line or the broker's disk is slow: large models take long.")
    return ok("throughput", found)
