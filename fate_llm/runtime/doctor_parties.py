"""The other parties of a federation, asked by one doctor and answered for by another.

A ping goes to the standing control inbox of a party, where it may wait only as long as its answer would be waited for;
the answer comes to the asker's own inbox of this session. Both are signed (`doctor_ping`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from fate_llm.core.errors import BadEnvelope, BadSignature, BrokerRefused, ConfigurationError, FederationError
from fate_llm.core.interfaces import Delivery
from fate_llm.protocols import broker_layout as layout
from fate_llm.protocols.transports.rabbitmq import BrokerAddress, BrokerProbe, Refusal
from fate_llm.security.identity import Identity, PublicIdentity
from fate_llm.security.randomness import random_bytes

from .doctor_broker import Place, percentiles
from .doctor_network import skew_check
from .doctor_ping import LARGEST_PAYLOAD, PingFrame, Responder, is_ping_frame, session_name, verify_frame
from .doctor_report import Check, failed, ok, warning

__all__ = ["Asker", "Membership", "answer_pings"]

_AGAIN = 1.0  # seconds after which a party that has not answered is asked again: a link may only now learn our binding
_SMALL = 10  # pings whose time is taken
_LARGE = 4  # with 2 MiB each
_PATIENCE = 4  # times the seconds for an answer, for chunks to come through
_IDLE = 600.0  # seconds
_NONCE = 16  # bytes
_HELD = 128  # messages in the control inbox that are not ours to read
_SILENT = "Is `fate_llm doctor --as party.yaml --answer` or its service running there, with the same roster as ours?"


@dataclass(frozen=True, slots=True)
class Membership:
    """Who we are in a federation. pins: of every party; roster: its digest; version: of this program."""

    party: str
    identity: Identity = field(repr=False)
    pins: Mapping[str, PublicIdentity]
    roster: str
    version: str


@dataclass(frozen=True, slots=True)
class _Answer:
    """An answer that was signed as it should be. sent, came: our clock; nanoseconds. took: seconds."""

    frame: PingFrame
    sent: int
    came: int
    took: float

    def skew(self) -> float:
        """Their clock less ours, seconds, when both ways take the same time (RFC 5905, section 8)."""
        return ((self.frame.received - self.sent) + (self.frame.sent - self.came)) / 2e9


@dataclass(frozen=True, slots=True)
class _Asked:
    """A ping that is under way. sent: nanoseconds of our clock; at: seconds that only grow."""

    party: str
    sent: int
    at: float


class Asker:
    """Asks the other parties. clock: nanoseconds since 1970. The inbox of `place` is made, and left for its `clean`."""

    def __init__(self, place: Place, me: Membership, *, clock: Callable[[], int]) -> None:
        self._place, self._me, self._clock = place, me, clock
        self._probe = place.probe()
        self._asked: dict[bytes, _Asked] = {}
        self._answers: dict[str, _Answer] = {}
        self._forged: dict[str, str] = {}
        self._lost: dict[str, Refusal] = {}

    def ask_all(self) -> list[Check]:
        """Every other party of the roster.

        Raises:
            BrokerLost, BrokerRefused: the broker is lost on the way.
        """
        try:
            inbox = self._place.inbox
            refused = self._probe.make_inbox(inbox, expires=_IDLE) or self._probe.consume(inbox)
            if refused is not None:
                raise BrokerRefused(f"the inbox {inbox} cannot be made and read: {refused.text}")
            self._wait_for({party for party in self._place.others if self._make_way_back(party)})
            return [check for party in self._place.others for check in self._look_at(party)]
        finally:
            self._probe.close()

    def _make_way_back(self, party: str) -> bool:
        """Whether we may hear what the party says."""
        refused = self._probe.bind(self._place.inbox, layout.exchange_of(party), self._place.key)
        if refused is not None:
            self._lost[party] = refused
        return refused is None

    def _make_ping(self, party: str, payload: bytes = b"", want: int = 0) -> tuple[bytes, bytes]:
        """A new ping's nonce and frame; its time runs from now."""
        place, me, nonce = self._place, self._me, random_bytes(_NONCE)
        sent, at = self._clock(), place.ticks()
        frame = PingFrame("ping", place.session, nonce, me.roster, sent, me.version, want=want, payload=payload)
        self._asked[nonce] = _Asked(party, sent, at)
        return nonce, frame.seal(me.identity, asker=me.party, answerer=party)

    def _ping(self, party: str, payload: bytes = b"", want: int = 0) -> bytes:
        """Send one, and its nonce."""
        nonce, body = self._make_ping(party, payload, want)
        key, place = layout.control_key(party), self._place
        self._probe.send(place.exchange, key, body, expires=_PATIENCE * place.seconds)
        return nonce

    def _ask(self, party: str) -> None:
        """Send one, and keep in mind whether it reached an inbox."""
        _, body = self._make_ping(party)
        place = self._place
        refused = self._probe.publish(place.exchange, layout.control_key(party), body, expires=place.seconds)
        if refused is None:
            self._lost.pop(party, None)
        else:
            self._lost[party] = refused

    def _wait_for(self, missing: set[str]) -> None:
        """Ask, until all have answered or the time for it is over; now and then again."""
        ticks = self._place.ticks
        again, until = ticks(), ticks() + self._place.seconds
        while missing and (now := ticks()) < until:
            if now >= again:
                again = now + _AGAIN
                for party in sorted(missing):
                    self._ask(party)
            answer = self._receive(min(until, again) - ticks())
            missing -= {answer[0]} if answer is not None else set()

    def _receive(self, timeout: float) -> tuple[str, _Answer | None] | None:
        """Who has answered, and the answer if it is signed as it should be; None: nothing that was asked for."""
        delivery = self._probe.receive(max(timeout, 0.001))
        if delivery is None:
            return None
        came, at = self._clock(), self._place.ticks()
        self._probe.ack(delivery)
        try:
            frame = PingFrame.parse(delivery.body)
        except BadEnvelope:
            return None
        asked = self._asked.get(frame.nonce)
        if frame.kind != "answer" or asked is None or asked.party != delivery.sender:
            return None
        me, party = self._me, asked.party
        try:
            verify_frame(delivery.body, "answer", me.pins[party], asker=me.party, answerer=party)
        except BadSignature as error:
            self._forged[party] = error.message
            return party, None
        del self._asked[frame.nonce]
        found = self._answers[party] = _Answer(frame, asked.sent, came, at - asked.at)
        return party, found

    def _look_at(self, party: str) -> Iterator[Check]:
        name = f"{party}: answers"
        if party in self._lost and party not in self._answers:
            do = f"At its broker: fate_llm federation grant --party {party}. With a broker each: is the link up?"
            yield failed(name, f"nothing reaches it: {self._lost[party].text}", do)
            return
        if party in self._forged:
            do = "Compare the fingerprint of its key in both rosters, by phone: fate_llm federation show"
            yield failed(name, f"answers with another key than the roster pins: {self._forged[party]}", do)
            return
        if party not in self._answers:
            yield warning(name, f"does not answer within {self._place.seconds:g} s", _SILENT)
            return
        yield self._facts(name, self._answers[party].frame)
        small = [found for _ in range(_SMALL) if (found := self._exchange(party)) is not None]
        if len(small) < _SMALL:
            late = f"{_SMALL - len(small)} of {_SMALL} pings were not answered in time"
            yield warning(f"{party}: round trip", late, "It stopped answering, or the line between is unsteady.")
            return
        yield ok(f"{party}: round trip", f"{percentiles([one.took for one in small])}, {_SMALL} messages")
        best = min(small, key=lambda one: one.took)
        yield skew_check(f"{party}: clock", best.skew(), sure=best.took / 2)
        yield self._throughput(party)

    def _facts(self, name: str, frame: PingFrame) -> Check:
        if frame.roster != self._me.roster:
            found = f"it has another roster: digest {frame.roster[:16]}..., ours {self._me.roster[:16]}..."
            return failed(name, found, "Compare `fate_llm federation show` on both sides, and hand the right one out.")
        found = f"fate_llm {frame.version}, signed by the key that the roster pins"
        if frame.version != self._me.version:
            do = "Run the same version on both sides, at least where the first number differs."
            return warning(name, f"{found}; ours is {self._me.version}", do)
        return ok(name, found)

    def _exchange(self, party: str) -> _Answer | None:
        wanted = {self._ping(party)}
        return next(self._answers_to(wanted, self._place.ticks() + self._place.seconds), None)

    def _answers_to(self, nonces: set[bytes], until: float) -> Iterator[_Answer]:
        """Answers to these pings as they come; takes their nonces away."""
        while nonces and (left := until - self._place.ticks()) > 0:
            found = self._receive(left)
            if found is not None and found[1] is not None and found[1].frame.nonce in nonces:
                nonces.remove(found[1].frame.nonce)
                yield found[1]

    def _throughput(self, party: str) -> Check:
        """Chunks there, then there and back, a few at once."""
        name, payload = f"{party}: throughput", random_bytes(LARGEST_PAYLOAD)
        told = []
        for what, want in (("there", 0), ("there and back", len(payload))):
            began = self._place.ticks()
            nonces = {self._ping(party, payload, want) for _ in range(_LARGE)}
            answers = self._answers_to(nonces, began + _PATIENCE * self._place.seconds)
            came = sum(answer.frame.payload == payload[:want] for answer in answers)
            took = max(self._place.ticks() - began, 1e-6)
            told.append(f"{what} {came * len(payload) / took / 1e6:.3g} MB/s")
            if came < _LARGE:
                late = f"{', '.join(told)}: {came} of {_LARGE} chunks came right within {took:.1f} s"
                return warning(name, late, "The line between is slow, or it has answered a lot just now.")
        return ok(name, f"{', '.join(told)}, {_LARGE} chunks of {len(payload)} bytes each")


def answer_pings(
    address: BrokerAddress,
    responder: Responder,
    *,
    party: str,
    seconds: float,
    going: Callable[[], bool],
    ready: Callable[[], None],
) -> None:
    """Answer what comes to the standing inbox of `party` while `going()`; `ready` is called when it begins.

    What is not the doctor's stays in the inbox for the party's service. seconds: until the connection is open.

    Raises:
        BrokerLost, BrokerRefused: the broker is lost, or does not let us.
        ConfigurationError: the party's service reads the inbox, and answers.
        FederationError: so much waits for the service that pings do not come through.
    """
    with _opened(address, party, seconds) as probe:
        ready()
        held = 0
        while going():
            delivery = probe.receive(1.0)
            if delivery is None:
                continue
            if is_ping_frame(delivery.body):
                _answer(probe, responder, party, delivery)
                continue
            held += 1
            if held >= _HELD:
                text = f"{held} messages in {layout.control_inbox(party)} wait for the service of {party}"
                raise FederationError(text, hint="Start the service: it answers pings as well.")


@contextmanager
def _opened(address: BrokerAddress, party: str, seconds: float) -> Iterator[BrokerProbe]:
    probe = BrokerProbe(address, limit=seconds, alarm_limit=None)
    try:
        inbox = layout.control_inbox(party)
        readers = probe.consumers(inbox)
        if isinstance(readers, int) and readers:
            raise ConfigurationError(
                f"somebody reads {inbox} already: the service of {party}, or another `doctor --answer`",
                hint="It answers pings; there is nothing to start.",
            )
        refused = readers if isinstance(readers, Refusal) else probe.consume(inbox, prefetch=_HELD + 8)
        if refused is not None:
            hint = f"An operator gives this party its place: fate_llm federation grant --party {party}"
            raise ConfigurationError(f"the inbox {inbox} cannot be read: {refused.text}", hint=hint)
        yield probe
    finally:
        probe.close()


def _answer(probe: BrokerProbe, responder: Responder, party: str, delivery: Delivery) -> None:
    reply = responder.answer(delivery.sender, delivery.body)
    probe.ack(delivery)
    if reply is not None:
        key = layout.job_key(reply.receiver, session_name(reply.session))
        probe.send(layout.exchange_of(party), key, reply.frame, expires=_IDLE)
