"""The post: over a wire of this process, where everything can go wrong on demand."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fate_llm.core.errors import (
    BrokerLost,
    BrokerRefused,
    ConfigurationError,
    FateError,
    InternalError,
    TransportClosed,
)
from fate_llm.core.interfaces import Delivery
from fate_llm.protocols.broker_layout import control_key, job_key
from fate_llm.protocols.control import pack
from fate_llm.protocols.transports.rabbitmq import BrokerAddress
from fate_llm.runtime.doctor_ping import PingFrame, session_name, verify_frame
from fate_llm.runtime.federation import Federation, PartySettings, make_federation
from fate_llm.runtime.service import post as module
from fate_llm.runtime.service.outbox import ASKED, STATES
from fate_llm.runtime.service.post import LARGEST_SKEW, Post
from fate_llm.runtime.service.wording import write_word
from fate_llm.runtime.service.words import JobState, Lines, News, PartState, Question, Report, Word
from fate_llm.runtime.store.engine import StoreLost
from fate_llm.security.identity import Identity
from fate_llm.security.sealed_box import SealingKey

DIGEST = "0" * 64
PARTIES = ("a", "b", "c")
IDENTITIES = {party: Identity(party.encode() * 32) for party in "abcd"}
SEALINGS = {party: SealingKey(party.encode() * 32) for party in "abcd"}
SOON = 30.0  # seconds for what should come; a test that passes does not wait for it
NOTHING = 0.1  # seconds in which nothing comes
NOW = 1_700_000_000_000_000_000


def news(serial: int = 1, job: str = "j", reason: str = "") -> News:
    ended = {"bank": {"state": "running", "reason": reason}} if reason else {}
    return News.model_validate(
        {"job": job, "digest": DIGEST, "serial": serial, "state": JobState.RUNNING, "parts": ended}
    )


def report(serial: int = 1, job: str = "j") -> Report:
    return Report(job=job, digest=DIGEST, serial=serial, state=PartState.RUNNING)


def roster(parties: Sequence[str] = PARTIES, *, unsealed: Sequence[str] = ()) -> Federation:
    place = {"host": "127.0.0.1", "port": 5672, "tls": False}
    entries = {}
    for party in parties:
        entries[party] = {"identity": IDENTITIES[party].public.to_text(), "broker": place}
        if party not in unsealed:
            entries[party]["sealing"] = SEALINGS[party].public.to_text()
    return make_federation({"version": 1, "name": "trial", "vhost": "v", "topology": "shared", "parties": entries})


def settings_of(party: str) -> PartySettings:
    return PartySettings(
        version=1,
        party=party,
        federation=Path("/nowhere/federation.yaml"),
        identity=Path("/nowhere/identity.key"),
        broker="amqp://guest@127.0.0.1:5672/v?plaintext=loopback",
    )


class Guard:
    """What the store does."""

    def __init__(self) -> None:
        self.highest: dict[str, tuple[int, int]] = {}

    def heard(self, sender: str, epoch: int, counter: int) -> bool:
        if (epoch, counter) <= self.highest.get(sender, (-1, -1)):
            return False
        self.highest[sender] = (epoch, counter)
        return True


def until(holds: Callable[[], object], seconds: float = SOON) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


# --- a wire in this process -----------------------------------------------------------------------------------------


@dataclass
class Wire:
    """Inboxes by key, and the ends that are connected. refusal: what connecting raises now."""

    inboxes: dict[str, deque[tuple[str, bytes]]] = field(default_factory=lambda: defaultdict(deque))
    published: list[tuple[str, str, bytes, float]] = field(default_factory=list)
    ends: list[WireEnd] = field(default_factory=list)
    refusal: FateError | None = None
    writable: bool = True
    changed: threading.Condition = field(default_factory=threading.Condition)

    def put(self, sender: str, key: str, body: bytes) -> None:
        with self.changed:
            self.inboxes[key].append((sender, body))
            self.changed.notify_all()

    def cut(self, error: FateError) -> None:
        """All who are connected lose it, for good."""
        with self.changed:
            self.refusal = error
            for end in self.ends:
                end.error = end.error or error
            self.changed.notify_all()

    def heal(self) -> None:
        self.refusal = None


class WireEnd:
    """Behaves as `RabbitTransport` does to a post."""

    def __init__(self, wire: Wire, party: str, observer: Any, members: Sequence[str]) -> None:
        if wire.refusal is not None:
            raise wire.refusal
        self.wire, self.party, self.observer, self.members = wire, party, observer, members
        self.error: FateError | None = None
        self.silent: Mapping[str, str] = {}
        self.acked: list[bytes] = []
        self.out: list[tuple[str, bytes]] = []
        wire.ends.append(self)

    @property
    def connected(self) -> bool:
        return self.error is None

    def writable(self) -> bool:
        if self.error is not None:
            raise self.error
        return self.wire.writable

    def publish_once(self, key: str, body: bytes, *, expires: float) -> bool:
        if not self.writable():
            return False
        self.wire.published.append((self.party, key, body, expires))
        self.wire.put(self.party, key, body)
        return True

    def receive(self, timeout: float) -> Delivery | None:
        box = self.wire.inboxes[control_key(self.party)]
        with self.wire.changed:
            self.wire.changed.wait_for(lambda: box or self.error is not None, timeout)
            if self.error is not None:
                raise self.error
            if not box:
                return None
            sender, body = box.popleft()
            return Delivery(sender, memoryview(body), body)

    def ack(self, delivery: Delivery) -> None:
        self.acked.append(bytes(delivery.body))

    def listen_again(self) -> None:
        self.silent = {}

    def close(self) -> None:
        with self.wire.changed:
            self.error = self.error or TransportClosed("closed")
            self.wire.changed.notify_all()


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    found = Wire()

    def connect(_address: BrokerAddress, **named: Any) -> WireEnd:
        assert named["job"] is None
        return WireEnd(found, named["party"], named["observer"], named["members"])

    monkeypatch.setattr(module, "RabbitTransport", connect)
    monkeypatch.setattr(module, "_FIRST_PAUSE", 0.01)
    return found


Told = list[tuple[str, dict[str, Any]]]
Open = Callable[..., Post]


@pytest.fixture
def told() -> Told:
    return []


@pytest.fixture
def open_post(told: Told) -> Iterator[Open]:
    """Opens the post of a party of the roster; all are closed at the end, and no thread is left."""
    opened: list[Post] = []

    def make(party: str, **changes: Any) -> Post:
        named: dict[str, Any] = {
            "settings": settings_of(party),
            "federation": roster(),
            "identity": IDENTITIES[party],
            "sealing": SEALINGS[party],
            "guard": Guard(),
            "epoch": 1,
            "clock": lambda: NOW,
            "observer": lambda event, fields: told.append((event, dict(fields))),
            **changes,
        }
        opened.append(Post(**named))
        return opened[-1]

    yield make
    for post in opened:
        post.close()
        assert not post._thread.is_alive()


def frame(sender: str = "a", receiver: str = "b", word: Word | bytes | None = None, **changes: Any) -> bytes:
    body = word if isinstance(word, bytes) else write_word(word or news())
    named = {"epoch": 1, "counter": 1, "sent": NOW, "identity": IDENTITIES[sender], **changes}
    return pack(
        sealing_public=named.pop("sealing_public", SEALINGS[receiver].public),
        sender=sender,
        receiver=receiver,
        body=body,
        **named,
    )


def reasons(told: Told, event: str) -> list[tuple[str, str]]:
    return [(fields["party"], fields["why"]) for name, fields in told if name == event]


# --- words go and come ----------------------------------------------------------------------------------------------


def test_words_go_and_come(wire: Wire, open_post: Open) -> None:
    a, b = open_post("a"), open_post("b")
    words: list[Word] = [
        news(),
        report(),
        Question(question="q", specification={"x": 1}),
        Lines(job="j", digest=DIGEST, lines=()),
    ]
    for word in words:
        a.send("b", word)
    assert [b.receive(SOON) for _ in words] == [("a", word) for word in words]
    assert (a.counts["sent"], b.counts["received"], b.receive(0.0), a.waiting) == (4, 4, None, 0)
    assert [expires for *_, expires in wire.published] == [STATES, STATES, ASKED, STATES]
    assert a.connected and a.away == ""


def test_nothing_of_a_word_is_in_the_clear(wire: Wire, open_post: Open) -> None:
    open_post("a").send("b", news(reason="canary"))
    until(lambda: wire.published)
    assert b"canary" not in wire.published[0][2] and b"news" not in wire.published[0][2]


def test_it_starts_without_a_broker_and_the_latest_state_leaves_when_there_is_one(wire: Wire, open_post: Open) -> None:
    # Given no broker, When states change meanwhile
    wire.cut(BrokerLost("the broker is away"))
    a, b = open_post("a"), open_post("b")
    for serial in range(1, 50):
        a.send("b", news(serial))
    assert (a.waiting, a.connected, b.receive(0.0)) == (1, False, None)
    until(lambda: a.away == "the broker is away")
    # Then the last of each comes when it is back
    wire.heal()
    assert b.receive(SOON) == ("a", news(49))
    assert b.receive(NOTHING) is None
    assert a.away == ""


def test_a_broker_that_goes_away_is_come_back_to(wire: Wire, open_post: Open, told: Told) -> None:
    a, b = open_post("a"), open_post("b")
    for serial in range(1, 4):
        a.send("b", news(serial))
        assert b.receive(SOON) == ("a", news(serial))
        wire.cut(BrokerRefused(f"number {serial}", hint="do this"))
        until(lambda: not a.connected)
        a.send("b", report(serial))
        wire.heal()
        assert b.receive(SOON) == ("a", report(serial))
    assert ("b", "number 1") in reasons(told, "post_away")
    assert next(fields["hint"] for name, fields in told if name == "post_away") == "do this"


def test_a_broker_that_takes_nothing_is_waited_for(wire: Wire, open_post: Open) -> None:
    a, b = open_post("a"), open_post("b")
    wire.writable = False
    for serial in (1, 2, 3):
        a.send("b", news(serial))
    assert b.receive(NOTHING) is None and a.waiting == 1
    wire.writable = True
    assert b.receive(SOON) == ("a", news(3))


def test_a_word_that_the_transport_drops_at_the_last_moment_stays(
    wire: Wire, open_post: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a transport that ends between the look whether it takes something and the taking
    taken, real = [], WireEnd.publish_once

    def broken(self: WireEnd, key: str, body: bytes, *, expires: float) -> bool:
        taken.append(body)
        if len(taken) == 1:
            return False
        if len(taken) == 2:
            self.error = BrokerLost("just now")
        return real(self, key, body, expires=expires)

    monkeypatch.setattr(WireEnd, "publish_once", broken)
    a, b = open_post("a"), open_post("b")
    a.send("b", Question(question="q", specification={}))
    assert b.receive(SOON) == ("a", Question(question="q", specification={}))
    assert (len(taken), a.counts["sent"]) == (3, 1)


def test_every_frame_has_a_number_of_its_own(wire: Wire, open_post: Open) -> None:
    a, b, c = open_post("a", epoch=5), open_post("b"), open_post("c")
    for serial in range(1, 4):
        for receiver, post in (("b", b), ("c", c)):
            a.send(receiver, news(serial))
            assert post.receive(SOON) == ("a", news(serial))
    numbers = [int.from_bytes(body[17:25], "big") for *_, body, _ in wire.published]
    assert numbers == [1, 2, 3, 4, 5, 6]


# --- what is not sent -----------------------------------------------------------------------------------------------


def test_words_to_nobody_are_dropped_and_told(wire: Wire, open_post: Open, told: Told) -> None:
    a = open_post("a", federation=roster(unsealed=["c"]))
    for receiver in ("x", "a", "c", "c"):
        a.send(receiver, news())
    assert a.waiting == 0 and a.counts == {"dropped": 4}
    assert [who for who, _ in reasons(told, "word_dropped")] == ["?", "a", "c"]
    assert "sealing key of c" in a.unreachable("c") and "federation add" in a.unreachable("c")
    assert "'x'" in a.unreachable("x") and a.unreachable("b") == ""


def test_a_word_that_is_too_large_holds_up_nobody(
    wire: Wire, open_post: Open, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fate_llm.protocols.control.LARGEST_BODY", 400)
    a, b = open_post("a"), open_post("b")
    a.send("b", news(reason="x" * 500))
    a.send("b", report())
    assert b.receive(SOON) == ("a", report())
    assert a.counts == {"dropped": 1, "sent": 1}
    assert "at most 400" in reasons(told, "word_dropped")[0][1]


def test_a_word_nested_too_deep_is_dropped(wire: Wire, open_post: Open, told: Told) -> None:
    value: Any = 1
    for _ in range(100):
        value = [value]
    open_post("a").send("b", Question(question="q", specification={"x": value}))
    assert "deeper than" in reasons(told, "word_dropped")[0][1]


def test_too_many_words_are_dropped_and_told(wire: Wire, open_post: Open, told: Told) -> None:
    wire.writable = False
    a = open_post("a")
    for _ in range(205):
        a.send("b", Lines(job="j", digest=DIGEST, lines=()))
    assert (a.waiting, a.counts["dropped"]) == (200, 5)
    assert reasons(told, "word_dropped") == [("b", "too many words wait")]


def test_a_returned_word_is_dropped_and_told(wire: Wire, open_post: Open, told: Told) -> None:
    a = open_post("a")
    until(lambda: wire.ends)
    for _ in range(3):
        wire.ends[0].observer("no_inbox", {"key": "b/control"})
    wire.ends[0].observer("broker_away", {"seconds": 1.0})
    assert a.counts["no inbox takes it"] == 3
    assert told == [("word_dropped", {"party": "b", "why": "no inbox takes it"}), ("broker_away", {"seconds": 1.0})]


# --- what is not heard ----------------------------------------------------------------------------------------------

BAD: dict[str, tuple[str, bytes, str]] = {
    "somebody else": ("d", frame("d"), "from nobody of the roster"),
    "no exchange of ours": ("", frame(), "from nobody of the roster"),
    "itself": ("b", frame(), "from nobody of the roster"),
    "nothing": ("a", b"", "not a word of a service"),
    "noise": ("a", b"\0" * 5000, "not a word of a service"),
    "start only": ("a", b"FATC", "not a word of this version to us"),
    "later version": ("a", b"FATC\x02" + frame()[5:], "not a word of this version to us"),
    "another sender": ("c", frame("a"), "not a word of this version to us"),
    "another receiver": ("a", frame(receiver="c"), "not a word of this version to us"),
    "changed": ("a", bytes([*(whole := frame())[:-1], whole[-1] ^ 1]), "not signed by the key that the roster pins"),
    "another key": ("a", frame(identity=IDENTITIES["c"]), "not signed by the key that the roster pins"),
    "another seal": ("a", frame(sealing_public=SEALINGS["c"].public), "not sealed for our key"),
    "no word": ("a", frame(word=b"{}"), "a word that this version does not know"),
    "no JSON": ("a", frame(word=b"\xff"), "a word that this version does not know"),
    "old state": ("a", frame(sent=NOW - int((STATES + LARGEST_SKEW + 1) * 1e9)), "too old, or a clock is wrong"),
    "old question": (
        "a",
        frame(word=Question(question="q", specification={}), sent=NOW - int((ASKED + LARGEST_SKEW + 1) * 1e9)),
        "too old, or a clock is wrong",
    ),
    "future": ("a", frame(sent=NOW + int((LARGEST_SKEW + 1) * 1e9)), "out of the future: a clock is wrong"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_is_counted_told_and_changes_nothing(
    name: str, wire: Wire, open_post: Open, told: Told
) -> None:
    sender, body, why = BAD[name]
    guard = Guard()
    b = open_post("b", guard=guard)
    # Given something that is no word for us, twice, and a good one after it
    for _ in range(2):
        wire.put(sender, control_key("b"), body)
    assert b.receive(NOTHING) is None and guard.highest == {}
    wire.put("a", control_key("b"), frame())
    # Then only that is heard, all are acknowledged, and it was told once
    assert b.receive(SOON) == ("a", news())
    assert b.counts == {why: 2, "received": 1} and len(wire.ends[0].acked) == 3
    assert reasons(told, "word_refused") == [(sender if sender in PARTIES else "?", why)]


def test_what_was_waited_for_at_the_broker_is_heard(wire: Wire, open_post: Open) -> None:
    """A state for a minute, a question for an hour; and clocks are never quite the same."""
    b = open_post("b")
    question, skew = Question(question="q", specification={}), int((LARGEST_SKEW - 1) * 1e9)
    for counter, word, sent in (
        (1, question, NOW - int(ASKED * 1e9) - skew),
        (2, news(), NOW - int(STATES * 1e9) - skew),
        (3, news(), NOW + skew),
    ):
        wire.put("a", control_key("b"), frame(word=word, counter=counter, sent=sent))
        assert b.receive(SOON) == ("a", word)


def test_a_word_counts_once(wire: Wire, open_post: Open, told: Told) -> None:
    guard = Guard()
    b = open_post("b", guard=guard)
    first, second = frame(), frame(word=news(2), counter=2)
    for body in (second, second, first, frame(word=news(3), epoch=2), second):
        wire.put("a", control_key("b"), body)
    assert [b.receive(SOON), b.receive(SOON), b.receive(0.0)] == [("a", news(2)), ("a", news(3)), None]
    assert b.counts == {"received": 2, "heard before": 3} and guard.highest == {"a": (2, 1)}
    assert reasons(told, "word_refused") == [("a", "heard before")]
    assert len(wire.ends[0].acked) == 5


def test_one_who_says_too_much_is_not_heard_and_others_are(
    wire: Wire, open_post: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_WORDS_KEPT", 3.0)
    now = [0.0]
    b = open_post("b", ticks=lambda: now[0])
    for counter in range(1, 6):
        wire.put("a", control_key("b"), frame(counter=counter))
    wire.put("c", control_key("b"), frame("c"))
    until(lambda: b.connected)
    assert [b.receive(SOON)[0] for _ in range(4)] == ["a", "a", "a", "c"]  # type: ignore[index]
    assert b.counts["too many"] == 2
    now[0] += 1.0
    wire.put("a", control_key("b"), frame(counter=9))
    assert b.receive(SOON) == ("a", news())


def test_too_many_bytes_are_too_much(wire: Wire, open_post: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BYTES_KEPT", len(frame()) + 10.0)
    b = open_post("b", ticks=lambda: 0.0)
    for counter in (1, 2):
        wire.put("a", control_key("b"), frame(counter=counter))
    until(lambda: b.connected)
    assert [b.receive(SOON), b.receive(0.0)] == [("a", news()), None]
    assert b.counts["too many"] == 1


def test_what_a_word_unpacks_to_is_counted_as_well(
    wire: Wire, open_post: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few bytes on the wire would else be worth megabytes of work, a hundred times in a second."""
    now = [0.0]
    monkeypatch.setattr(module, "_BYTES_KEPT", 1e6)
    monkeypatch.setattr(module, "_BYTES_A_SECOND", 1e5)
    b = open_post("b", ticks=lambda: now[0])
    until(lambda: b.connected)
    large = Question(question="q", specification={"x": "x" * 2_000_000})
    wire.put("a", control_key("b"), frame(word=large))
    wire.put("a", control_key("b"), frame(counter=2))
    assert [b.receive(0.0), b.receive(0.0)] == [("a", large), None]
    # The debt of a megabyte is paid in ten seconds
    for seconds, heard in ((9.0, None), (11.0, ("a", news()))):
        now[0] = seconds
        wire.put("a", control_key("b"), frame(counter=3))
        assert b.receive(0.0) == heard
    assert b.counts == {"received": 2, "too many": 2}


def test_the_same_refusal_is_told_again_after_a_minute(wire: Wire, open_post: Open, told: Told) -> None:
    now = [0.0]
    b = open_post("b", ticks=lambda: now[0])
    until(lambda: b.connected)
    for seconds in (0.0, 59.0, 61.0):
        now[0] = seconds
        wire.put("a", control_key("b"), b"noise")
        assert b.receive(0.0) is None
    assert len(reasons(told, "word_refused")) == 2 and b.counts["not a word of a service"] == 3


def test_a_store_that_fails_is_not_hidden_and_the_word_not_acknowledged(wire: Wire, open_post: Open) -> None:
    class Broken(Guard):
        def heard(self, sender: str, epoch: int, counter: int) -> bool:
            raise OSError("disk full")

    b = open_post("b", guard=Broken())
    wire.put("a", control_key("b"), frame())
    with pytest.raises(OSError, match="disk full"):
        b.receive(SOON)
    assert wire.ends[0].acked == []


def test_a_database_that_is_away_costs_the_word_and_nothing_else(wire: Wire, open_post: Open, told: Told) -> None:
    class Away(Guard):
        away = True

        def heard(self, sender: str, epoch: int, counter: int) -> bool:
            if self.away:
                raise StoreLost("the server is away")
            return super().heard(sender, epoch, counter)

    guard = Away()
    b = open_post("b", guard=guard)
    wire.put("a", control_key("b"), frame())
    assert b.receive(0.0) is None
    assert len(wire.ends[0].acked) == 1, "a state comes again with its sender's next word"
    guard.away = False
    wire.put("a", control_key("b"), frame(counter=2))
    assert b.receive(SOON) == ("a", news())
    assert b.counts == {"the database is away": 1, "received": 1}
    assert reasons(told, "word_refused") == [("a", "the database is away")]


# --- doctors ----------------------------------------------------------------------------------------------------------


def ping(asker: str, answerer: str, nonce: bytes = bytes(16)) -> bytes:
    found = PingFrame("ping", b"s" * 16, nonce, roster().digest(), NOW, "1.0", want=2, payload=b"abc")
    return found.seal(IDENTITIES[asker], asker=asker, answerer=answerer)


def test_pings_are_answered_in_between(wire: Wire, open_post: Open) -> None:
    b = open_post("b")
    for sender, body in (("a", ping("a", "b")), ("a", ping("a", "c", bytes([1] * 16))), ("a", frame())):
        wire.put(sender, control_key("b"), body)
    assert b.receive(SOON) == ("a", news())
    assert b.counts == {"pings": 1, "received": 1}
    ((sender, key, body, expires),) = wire.published
    assert (sender, key, expires) == ("b", job_key("a", session_name(b"s" * 16)), 600.0)
    verify_frame(body, "answer", IDENTITIES["b"].public, asker="a", answerer="b")
    assert PingFrame.parse(body).payload == b"ab"


def test_a_ping_that_cannot_be_answered_is_no_error(
    wire: Wire, open_post: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(self: WireEnd, key: str, body: bytes, *, expires: float) -> bool:
        raise TransportClosed("just now")

    b = open_post("b")
    monkeypatch.setattr(WireEnd, "publish_once", gone)
    wire.put("a", control_key("b"), ping("a", "b"))
    wire.put("a", control_key("b"), frame())
    assert b.receive(SOON) == ("a", news())


# --- the roster changes, and the end ----------------------------------------------------------------------------------


def test_a_partner_who_was_added_is_spoken_to_and_heard(wire: Wire, open_post: Open) -> None:
    b = open_post("b", federation=roster(("a", "b")))
    wire.put("c", control_key("b"), frame("c"))
    assert b.receive(NOTHING) is None and b.unreachable("c")
    b.reload(roster())
    c = open_post("c")
    c.send("b", news(2))
    b.send("c", report())
    assert b.receive(SOON) == ("c", news(2))
    assert c.receive(SOON) == ("b", report())
    assert [end.members for end in wire.ends if end.party == "b"] == [("a", "b"), PARTIES]


def test_a_partner_who_left_is_not(wire: Wire, open_post: Open) -> None:
    wire.writable = False
    b = open_post("b")
    for receiver in ("a", "c"):
        b.send(receiver, news())
    b.reload(roster(("a", "b")))
    assert b.waiting == 1
    wire.put("c", control_key("b"), frame("c"))
    until(lambda: b.connected)
    assert b.receive(NOTHING) is None and b.counts["from nobody of the roster"] == 1


def test_a_new_key_needs_no_new_connection(wire: Wire, open_post: Open) -> None:
    b = open_post("b", federation=roster(unsealed=["a"]))
    until(lambda: b.connected)
    b.reload(roster())
    b.send("a", news())
    assert open_post("a").receive(SOON) == ("b", news())
    assert [end.party for end in wire.ends] == ["b", "a"]


def test_a_partner_without_a_place_is_listened_to_again(
    wire: Wire, open_post: Open, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LISTEN_AGAIN", 0.0)
    real = WireEnd.__init__

    def start(self: WireEnd, *arguments: Any) -> None:
        real(self, *arguments)
        self.silent = {"c": "no exchange"}

    monkeypatch.setattr(WireEnd, "__init__", start)
    open_post("b")
    until(lambda: reasons(told, "partner_heard"))
    assert reasons(told, "partner_silent") == [("c", "no exchange")]
    assert wire.ends[0].silent == {}


def test_after_the_end_nobody_waits(wire: Wire, open_post: Open, together: Any) -> None:
    b = open_post("b")
    until(lambda: b.connected)

    def end() -> None:
        time.sleep(0.05)
        b.close()

    ends = together({"receive": lambda: b.receive(1e6), "close": end})
    assert isinstance(ends["receive"], TransportClosed)
    with pytest.raises(TransportClosed, match="the post of b is closed"):
        b.receive(0.0)
    b.close()
    assert not b.connected and b.away


def test_the_end_comes_while_there_is_no_broker(wire: Wire, open_post: Open, together: Any) -> None:
    wire.cut(BrokerLost("away"))
    b = open_post("b")
    ends = together({"receive": lambda: b.receive(1e6), "close": b.close})
    assert isinstance(ends["receive"], TransportClosed)


def test_a_defect_of_ours_ends_it_loudly(wire: Wire, open_post: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> bytes:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(module, "pack", broken)
    a = open_post("a")
    a.send("b", news())
    until(lambda: a._failed)
    with pytest.raises(InternalError, match="ZeroDivisionError: a defect"):
        a.send("b", news())
    with pytest.raises(InternalError, match="a defect"):
        a.receive(SOON)


def test_a_broker_that_has_no_address_is_said_at_once(told: Told) -> None:
    bad = settings_of("a").model_copy(update={"password": Path("/nowhere/password")})
    with pytest.raises(ConfigurationError, match="/nowhere/password"):
        Post(bad, roster(), IDENTITIES["a"], SEALINGS["a"], Guard(), 1, lambda: NOW)


def test_a_post_shows_no_secret(wire: Wire, open_post: Open) -> None:
    assert repr(open_post("a", epoch=9)) in {"Post(a, epoch 9, away)", "Post(a, epoch 9, connected)"}
