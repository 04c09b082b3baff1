"""What carries words between the services of a federation: sealed, signed, over the standing inboxes of the broker.

Rules:
 1. Nothing here waits for anybody. A word is put into the outbox (`outbox`) and leaves as soon as there is a broker
    that takes it. One that is lost on its way is not sent again: the service says its states again anyway, as long as
    they matter. A party that is away finds at most the words of its last minute, and questions of the last hour: they
    expire at the broker.
 2. A word counts once. Each is signed with its sender's epoch and a counter, and `ReplayGuard.heard` says whether it
    is newer than all before; it is asked last, so that a word that was refused changes nothing.
 3. A word is acknowledged to the broker as soon as `receive` has taken it. A service that is killed before it has
    acted on it hears the same state with the sender's next heartbeat, and an asker asks again: whoever would keep the
    message until the end of the work would be handed a refused copy (rule 2), and no news.
 4. Nothing that comes in raises: not for us, too much, changed, of another version, too old. It is counted by reason
    and told, at most once a minute for each sender and reason.
 5. No broker, or one that refuses us, is told and tried again for ever, with the files of the party read anew.
    A partner who has no place at the broker yet holds up nobody.

Pings of other parties' doctors are answered in between.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from fate_llm import __version__
from fate_llm.core.errors import (
    BadEnvelope,
    BadSeal,
    BadSignature,
    ConfigurationError,
    FateError,
    FederationError,
    InternalError,
    PeerViolation,
    StoreLost,
    TransportClosed,
)
from fate_llm.core.interfaces import Delivery
from fate_llm.protocols.broker_layout import control_key, job_key
from fate_llm.protocols.control import Opened, is_control_frame, pack, unpack
from fate_llm.protocols.transports.rabbitmq import BrokerAddress, RabbitTransport
from fate_llm.security.identity import Identity
from fate_llm.security.sealed_box import SealingKey, SealingPublic

from ..allowance import Allowance
from ..doctor_ping import Responder, is_ping_frame, session_name
from ..federation import Federation, PartySettings
from .outbox import ASKED, STATES, Letter, Outbox
from .wording import read_word, write_word
from .words import Answer, Question, Word

__all__ = ["LARGEST_SKEW", "Observer", "Post", "ReplayGuard"]

Observer = Callable[[str, Mapping[str, Any]], None]

LARGEST_SKEW: Final = 600.0
"""Seconds by which a sender's clock may differ from ours, besides the time that its word may have waited."""
_MEET: Final = 5.0  # seconds for one try to reach the broker
_FIRST_PAUSE, _LAST_PAUSE = 0.2, 15.0  # seconds between tries
_LISTEN_AGAIN: Final = 30.0  # seconds between tries to hear a partner who has no place at the broker yet
_TELL_AGAIN: Final = 60.0  # seconds in which the same is told once
_TOLD: Final = 1000  # of what was told, so many are remembered before the old ones are forgotten
_POLL: Final = 0.1  # seconds between looks whether a broker that took nothing takes again
_REPLIES: Final = 600.0  # seconds that an answer to a ping may wait
_LEAVE: Final = 20.0  # seconds for the thread to end
_WORDS_KEPT, _WORDS_A_SECOND = 500.0, 100.0  # of one sender
_BYTES_KEPT, _BYTES_A_SECOND = 64.0 * 1024 * 1024, 2.0 * 1024 * 1024  # on the wire and unpacked, together
_REASONS: Final[tuple[tuple[type[PeerViolation], str], ...]] = (
    (BadEnvelope, "not a word of this version to us"),
    (BadSignature, "not signed by the key that the roster pins"),
    (BadSeal, "not sealed for our key"),
)
_UNKNOWN: Final = "a word that this version does not know"
_FORGETFUL: Final = "the database is away"


class ReplayGuard(Protocol):
    """What remembers which words were heard, over restarts: the store."""

    def heard(self, sender: str, epoch: int, counter: int) -> bool:
        """True, once, for an (epoch, counter) above all that were heard of this sender."""
        ...


class Post:
    """One party's words to and from all others of the roster.

    address: of the broker, instead of the one in `settings`. epoch: above that of every earlier `Post` of this party
    (`Store.next_epoch`). clock: nanoseconds since 1970; ticks: seconds that only grow. observer: hears what an operator
    should know, on whatever thread it happens. `send` is for any thread, `receive` for one.

    counts: words by what became of them: "sent", "received", "pings", "dropped" here before they left, "no inbox takes
    it", or why one that came was refused.

    Raises:
        ConfigurationError: the broker's address or password cannot be read. That it does not answer is no error here.
    """

    def __init__(
        self,
        settings: PartySettings,
        federation: Federation,
        identity: Identity,
        sealing: SealingKey,
        guard: ReplayGuard,
        epoch: int,
        clock: Callable[[], int],
        observer: Observer | None = None,
        address: BrokerAddress | None = None,
        *,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        self.party = settings.party
        self.counts: Counter[str] = Counter()
        self._settings, self._address = settings, address
        self._identity, self._sealing = identity, sealing
        self._guard, self._epoch, self._clock, self._ticks = guard, epoch, clock, ticks
        self._observer = observer
        self._find_address()
        self._changed = threading.Condition()
        self._outbox = Outbox()
        self._counter = 0
        self._allowed: dict[str, Allowance] = {}
        self._told: dict[tuple[str, str, str], float] = {}
        self._transport: RabbitTransport | None = None
        self._away = "no connection to the broker yet"
        self._closing = False
        self._failed: InternalError | None = None
        self._join(federation)
        self._thread = threading.Thread(target=self._serve, name=f"post-{self.party}", daemon=True)
        self._thread.start()

    # --- for the service ------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Whether the broker is there and takes words."""
        transport = self._transport
        return transport is not None and transport.connected

    @property
    def away(self) -> str:
        """Why there is no connection, in words; empty while there is one."""
        return "" if self.connected else self._away or "the broker is away, or takes nothing"

    @property
    def waiting(self) -> int:
        """Words that have not left."""
        return len(self._outbox)

    def unreachable(self, receiver: str) -> str:
        """Why words can never reach a party as the roster stands; empty when they can."""
        if receiver == self.party:
            return "a party's words to itself do not travel"
        if receiver not in self._federation.parties:
            return f"nobody in the roster is called {receiver!r}"
        if receiver not in self._seals:
            return f"the roster has no sealing key of {receiver}: add its card again, `fate_llm federation add`"
        return ""

    def send(self, receiver: str, word: Word) -> None:
        """Say a word; it leaves when it can. One to somebody `unreachable` is dropped and told.

        Raises:
            InternalError: this post has ended by a defect.
        """
        try:
            body = write_word(word)
        except ConfigurationError as error:
            return self._drop(receiver, error.message)
        with self._changed:
            if self._failed is not None:
                raise self._failed
            reason = self.unreachable(receiver)
            if not reason:
                before = self._outbox.dropped.total()
                self._outbox.put(receiver, word, body, self._ticks())
                reason = "too many words wait" if self._outbox.dropped.total() > before else ""
                self._changed.notify_all()
        return self._drop(receiver, reason) if reason else None

    def receive(self, timeout: float) -> tuple[str, Word] | None:
        """The next word and who said it, or None after `timeout` seconds.

        Raises:
            TransportClosed: after `close`. InternalError: this post has ended by a defect.
        """
        until = self._ticks() + timeout
        while (transport := self._wait_for_transport(until)) is not None:
            try:
                delivery = transport.receive(max(until - self._ticks(), 0.0))
            except FederationError as error:
                self._lose(transport, error)
                continue
            if delivery is None:
                break
            found = self._take(transport, delivery)
            transport.ack(delivery)
            if found is not None:
                return found
        return None

    def reload(self, federation: Federation) -> None:
        """Go on with another roster: a partner was added, left, or has new keys."""
        with self._changed:
            gone = set(self._federation.parties) - set(federation.parties)
            joined = federation.members != self._federation.members
            self._join(federation)
            for receiver in gone:
                self._outbox.forget(receiver)
            transport = self._transport if joined else None
            self._changed.notify_all()
        if transport is not None:
            self._lose(transport, TransportClosed("the roster has changed"))

    def close(self) -> None:
        """End. What has not left is dropped; what was heard and not received comes again."""
        with self._changed:
            self._closing = True
            transport = self._transport
            self._changed.notify_all()
        if transport is not None:
            transport.close()
        if threading.current_thread() is not self._thread:
            self._thread.join(_LEAVE)

    def __repr__(self) -> str:
        return f"Post({self.party}, epoch {self._epoch}, {'connected' if self.connected else 'away'})"

    # --- the roster -----------------------------------------------------------------------------------------

    def _join(self, federation: Federation) -> None:
        self._federation = federation
        self._pins = federation.identities()
        keys = {party: member.sealing_key for party, member in federation.parties.items()}
        self._seals = {party: key for party, key in keys.items() if key is not None}
        self._responder = Responder(
            self._identity,
            party=self.party,
            pins=self._pins,
            roster=federation.digest(),
            version=__version__,
            clock=self._clock,
            ticks=self._ticks,
        )

    def _find_address(self) -> BrokerAddress:
        """Read anew each time: an operator may have changed the password."""
        if self._address is not None:
            return self._address
        settings = self._settings
        return BrokerAddress.from_url(settings.broker_url(), password=settings.load_password())

    # --- telling --------------------------------------------------------------------------------------------

    def _tell(self, event: str, who: str, why: str, **fields: Any) -> None:
        """Tell the observer, the same at most once a minute. Who and why are of few words, or the roster's."""
        now = self._ticks()
        key = (event, who, why)
        with self._changed:
            last = self._told.get(key)
            if last is not None and now - last < _TELL_AGAIN:
                return
            if len(self._told) >= _TOLD:
                self._told = {old: at for old, at in self._told.items() if now - at < _TELL_AGAIN}
            self._told[key] = now
        if self._observer is not None:
            self._observer(event, {"party": who, "why": why, **fields})

    def _heard_of_broker(self, event: str, fields: Mapping[str, Any]) -> None:
        if event == "no_inbox":
            self._count("no inbox takes it")
            self._tell("word_dropped", str(fields["key"]).partition("/")[0], "no inbox takes it")
        elif self._observer is not None:
            self._observer(event, fields)

    def _count(self, what: str) -> None:
        with self._changed:
            self.counts[what] += 1

    def _drop(self, receiver: str, why: str) -> None:
        self._count("dropped")
        self._tell("word_dropped", receiver if receiver in self._pins else "?", why)

    # --- coming in (the service's thread) -------------------------------------------------------------------

    def _wait_for_transport(self, until: float) -> RabbitTransport | None:
        with self._changed:
            while self._transport is None and (left := until - self._ticks()) > 0 and not self._over():
                self._changed.wait(left)
            if self._failed is not None:
                raise self._failed
            if self._closing:
                raise TransportClosed(f"the post of {self.party} is closed")
            return self._transport

    def _over(self) -> bool:
        return self._closing or self._failed is not None

    def _take(self, transport: RabbitTransport, delivery: Delivery) -> tuple[str, Word] | None:
        """The word in a delivery; None when it is a ping, or refused."""
        sender, body = delivery.sender, delivery.body
        if is_ping_frame(body):
            reply = self._responder.answer(sender, body)
            if reply is not None:
                self._count("pings")
                key = job_key(reply.receiver, session_name(reply.session))
                with contextlib.suppress(FederationError):  # the transport has ended; its doctor asks again
                    transport.publish_once(key, reply.frame, expires=_REPLIES)
            return None
        found = self._read(sender, body)
        if isinstance(found, str):
            self._count(found)
            self._tell("word_refused", sender if sender in self._pins else "?", found)
            return None
        self._count("received")
        return sender, found

    def _read(self, sender: str, body: memoryview) -> Word | str:
        """A word, or why it is refused."""
        if sender not in self._pins or sender == self.party:
            return "from nobody of the roster"
        if not is_control_frame(body):
            return "not a word of a service"
        now = self._ticks()
        if sender not in self._allowed:
            self._allowed[sender] = Allowance(_WORDS_KEPT, _BYTES_KEPT, (_WORDS_A_SECOND, _BYTES_A_SECOND), now)
        if not self._allowed[sender].take(len(body), now):
            return "too many"
        try:
            opened = unpack(body, sender=sender, receiver=self.party, pinned=self._pins[sender], sealing=self._sealing)
            self._allowed[sender].charge(len(opened.body))
            word = read_word(opened.body)
        except PeerViolation as error:
            return next((reason for kind, reason in _REASONS if isinstance(error, kind)), _UNKNOWN)
        return self._fault(opened, word) or word

    def _fault(self, opened: Opened, word: Word) -> str:
        """Why a word that its sender has said is not to be heard now; empty when it is."""
        age = (self._clock() - opened.sent) / 1e9
        patience = ASKED if isinstance(word, Question | Answer) else STATES
        if age > patience + LARGEST_SKEW:
            return "too old, or a clock is wrong"
        if age < -LARGEST_SKEW:
            return "out of the future: a clock is wrong"
        try:
            new = self._guard.heard(opened.sender, opened.epoch, opened.counter)
        except StoreLost:  # a state comes again with its sender's next sign of life
            return _FORGETFUL
        return "" if new else "heard before"

    # --- going out (the thread of the post) -----------------------------------------------------------------

    def _serve(self) -> None:
        try:
            self._keep_posting()
        # The boundary of the thread: nobody may wait for one that has ended.
        except Exception as error:
            with self._changed:
                self._failed = InternalError(f"the post stopped: {type(error).__name__}: {error}")
                self._changed.notify_all()
        finally:
            transport = self._transport
            if transport is not None:
                transport.close()

    def _keep_posting(self) -> None:
        pause, listen_at = _FIRST_PAUSE, 0.0
        while not self._closing:
            transport = self._transport
            if transport is None:
                if self._connect():
                    pause, listen_at = _FIRST_PAUSE, self._ticks() + _LISTEN_AGAIN
                else:
                    self._pause(pause)
                    pause = min(2 * pause, _LAST_PAUSE)
                continue
            try:
                if transport.silent and self._ticks() >= listen_at:
                    listen_at = self._ticks() + _LISTEN_AGAIN
                    self._listen_again(transport)
                self._send_next(transport)
            except FederationError as error:
                self._lose(transport, error)

    def _pause(self, seconds: float) -> None:
        with self._changed:
            if not self._closing:
                self._changed.wait(seconds)

    def _connect(self) -> bool:
        """One try. A transport that is there looks after itself, for as long as the broker is merely away."""
        try:
            transport = RabbitTransport(
                self._find_address(),
                party=self.party,
                members=self._federation.members,
                job=None,
                meet=_MEET,
                outage=float("inf"),
                observer=self._heard_of_broker,
            )
        except FateError as error:
            self._away = error.message
            self._tell("post_away", self.party, error.message, hint=error.hint)
            return False
        with self._changed:
            self._transport, self._away = transport, ""
            self._told = {key: at for key, at in self._told.items() if key[0] != "post_away"}
            self._changed.notify_all()
        for member, why in transport.silent.items():
            self._tell("partner_silent", member, why)
        return True

    def _lose(self, transport: RabbitTransport, error: FederationError) -> None:
        """A transport that has ended, or whose members are others now, is given up."""
        with self._changed:
            if self._transport is not transport:
                return
            self._transport, self._away = None, error.message
            self._changed.notify_all()
        transport.close()
        if not self._closing and not isinstance(error, TransportClosed):
            self._tell("post_away", self.party, error.message, hint=error.hint)

    def _listen_again(self, transport: RabbitTransport) -> None:
        before = set(transport.silent)
        try:
            transport.listen_again()
        except FederationError:
            return  # the transport itself finds out what is wrong
        for member in before - set(transport.silent):
            self._tell("partner_heard", member, "it has its place at the broker now")

    def _send_next(self, transport: RabbitTransport) -> None:
        """Send one letter, or wait for one."""
        with self._changed:
            letter = self._outbox.take(self._ticks()) if transport.writable() else None
            if letter is None:
                if not self._closing:
                    self._changed.wait(_POLL if len(self._outbox) else _LISTEN_AGAIN)
                return
            seal = self._seals.get(letter.receiver)
        if seal is None:
            return  # it has left the roster
        if self._publish(transport, letter, seal):
            self._count("sent")

    def _publish(self, transport: RabbitTransport, letter: Letter, seal: SealingPublic) -> bool:
        self._counter += 1
        try:
            frame = pack(
                self._identity,
                seal,
                self.party,
                letter.receiver,
                self._epoch,
                self._counter,
                self._clock(),
                letter.body,
            )
        except FederationError as error:
            self._drop(letter.receiver, error.message)
            return False
        taken = False
        try:
            taken = transport.publish_once(control_key(letter.receiver), frame, expires=letter.expires)
        finally:
            if not taken:
                with self._changed:
                    self._outbox.put_back(letter)
        return taken
