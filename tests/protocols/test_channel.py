"""The channel: order restored, duplicates dropped, loss named, liars refused, every wait ended."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fate_llm.core.errors import (
    FateError,
    FederationError,
    InternalError,
    JobCancelled,
    MessageLost,
    PeerFailed,
    QuorumLost,
    RoundTimeout,
    TransportClosed,
)
from fate_llm.core.interfaces import Delivery, Progress
from fate_llm.core.values import Payload
from fate_llm.protocols import channel as channels_module
from fate_llm.protocols.channel import JobChannel, Left
from fate_llm.protocols.envelope import Envelope, encode
from fate_llm.protocols.transports.memory import Fault, FaultKind, MemoryNetwork, MemoryTransport

Make = Callable[..., dict[str, JobChannel]]


def say(channel: JobChannel, receiver: str, number: int) -> int:
    return channel.send(receiver, task="t", kind="data.x", payload=Payload({"number": number}))


def hear(channel: JobChannel, sender: str, *, seconds: float = 10.0, kind: str = "data.x") -> int:
    deadline = channel.clock() + seconds
    return int(channel.receive(sender, task="t", kind=kind, deadline=deadline).payload.fields["number"])


def raw(sequence: int, number: int = 0, **changes: Any) -> Envelope:
    envelope = Envelope("job", "t", "a", "b", "data.x", sequence, Payload({"number": number}))
    return replace(envelope, **changes)


@pytest.fixture
def liar() -> Any:
    """A transport of party `a` that sends what it likes, and the honest channel of `b` with what it saw."""
    network, seen = MemoryNetwork(), []
    channel = JobChannel(
        network.connect("b"),
        job="job",
        party="b",
        members=("a", "b", "c"),
        window=4,
        observer=lambda event, fields: seen.append(dict(fields)),
    )

    class Liar:
        def __init__(self) -> None:
            self.transport = network.connect("a")
            self.channel = channel
            self.seen = seen

        def says(self, *envelopes: Envelope | bytes) -> None:
            for envelope in envelopes:
                parts = [envelope] if isinstance(envelope, bytes) else encode(envelope)
                self.transport.send("b", parts)

        def is_heard(self) -> None:
            """Everything said so far has been taken by the reader."""
            deadline = time.monotonic() + 10
            while network.left_over() and time.monotonic() < deadline:
                channel_busy.wait(0.001)
            assert not network.left_over()

    channel_busy = threading.Event()
    yield Liar()
    channel.close()


# --- order --------------------------------------------------------------------------------------------------


SCRIPTS = st.lists(
    st.tuples(st.sampled_from([FaultKind.DELAY, FaultKind.DUPLICATE]), st.integers(1, 12), st.integers(1, 6)),
    max_size=8,
    unique_by=lambda entry: entry[1],
)


@given(script=SCRIPTS)
@settings(deadline=None, max_examples=25)
def test_order_is_restored_whatever_the_transport_does(script: list[tuple[FaultKind, int, int]]) -> None:
    # Given a transport that delays and repeats frames as scripted
    network = MemoryNetwork([Fault(kind, "a", "b", nth, by) for kind, nth, by in script], linger=0.01)
    a, b = (JobChannel(network.connect(p), job="job", party=p, members=("a", "b")) for p in "ab")
    # When twelve messages are sent, Then they are heard once each and in order
    for number in range(12):
        say(a, "b", number)
    assert [hear(b, "a") for _ in range(12)] == list(range(12))
    a.close(), b.close()


def test_a_duplicate_is_dropped_and_counted(make_channels: Make) -> None:
    channels = make_channels("ab", faults=(Fault(FaultKind.DUPLICATE, "a", "b", 1),))
    say(channels["a"], "b", 1)
    say(channels["a"], "b", 2)
    assert [hear(channels["b"], "a"), hear(channels["b"], "a")] == [1, 2]
    counters = channels["b"].counters["a"]
    assert (counters.received, counters.duplicates, counters.refused) == (3, 1, 0)


def test_a_reordered_duplicate_inside_the_window_is_no_conflict(liar: Any) -> None:
    liar.says(raw(2, 2), raw(2, 2), raw(1, 1))
    assert [hear(liar.channel, "a"), hear(liar.channel, "a")] == [1, 2]
    assert (liar.channel.counters["a"].duplicates, liar.channel.counters["a"].refused) == (1, 0)


def test_a_duplicate_older_than_the_window_is_dropped_and_opens_no_gap(liar: Any) -> None:
    # Given a window of 4 that has long forgotten message 1, When that comes again
    liar.says(*(raw(number, number) for number in range(1, 9)), raw(1, 1))
    assert [hear(liar.channel, "a") for _ in range(8)] == list(range(1, 9))
    liar.is_heard()
    # Then it is counted as a duplicate, and a wait that runs out is no loss
    assert liar.channel.counters["a"].duplicates == 1
    with pytest.raises(RoundTimeout):
        hear(liar.channel, "a", seconds=0.0)


@pytest.mark.parametrize("first", [1, 2], ids=["already delivered", "still waiting in the window"])
def test_a_conflicting_duplicate_is_refused_and_the_first_stays(liar: Any, first: int) -> None:
    liar.says(raw(first, 10), raw(first, 666))
    liar.says(raw(3 - first, 11))
    heard = [hear(liar.channel, "a"), hear(liar.channel, "a")]
    assert sorted(heard) == [10, 11]
    assert liar.channel.counters["a"].refused == 1
    assert [event["code"] for event in liar.seen] == ["conflicting_duplicate"]


# --- loss ---------------------------------------------------------------------------------------------------


def test_a_lost_message_is_named(make_channels: Make) -> None:
    # Given a transport that loses the first of two frames
    channels = make_channels("ab", faults=(Fault(FaultKind.LOSE, "a", "b", 1),))
    say(channels["a"], "b", 1)
    say(channels["a"], "b", 2)
    # When b waits, Then the error names the number that is missing and the one that has come
    with pytest.raises(MessageLost, match=r"message 1 from a is lost, 2 has come"):
        hear(channels["b"], "a", seconds=0.1)


def test_silence_is_a_timeout_not_a_loss(make_channels: Make) -> None:
    with pytest.raises(RoundTimeout, match=r"data\.x from a did not come in time"):
        hear(make_channels("ab")["b"], "a", seconds=0.0)


def test_a_message_outside_the_window_gives_up_the_sender_at_once(liar: Any) -> None:
    # Given a window of 4 and message 1 missing, When message 5 comes
    liar.says(raw(2), raw(3), raw(4), raw(5))
    # Then the wait ends although it has no deadline, and it names the gap
    with pytest.raises(MessageLost, match="message 5 of a came while 1 is missing"):
        liar.channel.receive("a", task="t", kind="data.x", deadline=None)
    assert liar.channel.counters["a"].refused == 1


def test_the_last_number_inside_the_window_is_kept(liar: Any) -> None:
    liar.says(raw(4, 4), raw(3, 3), raw(2, 2), raw(1, 1))
    assert [hear(liar.channel, "a") for _ in range(4)] == [1, 2, 3, 4]


def test_a_message_that_cannot_be_encoded_uses_up_no_number(make_channels: Make) -> None:
    # Given a payload with NaN, which JSON does not know
    channels = make_channels("ab")
    with pytest.raises(ValueError):
        channels["a"].send("b", task="t", kind="data.x", payload=Payload({"number": float("nan")}))
    # When a then ends with an error, Then b hears of it: there is no gap
    channels["a"].announce_failure(QuorumLost("NaN"), task="t")
    with pytest.raises(PeerFailed, match="NaN"):
        hear(channels["b"], "a")


# --- liars --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lie",
    [
        raw(1, 666, job="another"),
        raw(1, 666, sender="c"),
        raw(1, 666, receiver="c"),
        raw(1, 666, sender="stranger"),
        b"not an envelope",
        b"",
    ],
    ids=["other job", "other sender", "other receiver", "stranger's name", "no envelope", "empty"],
)
def test_what_is_not_for_this_conversation_is_refused_and_stops_nothing(liar: Any, lie: Envelope | bytes) -> None:
    liar.says(lie, raw(1, 42))
    assert hear(liar.channel, "a") == 42
    assert liar.channel.counters["a"].refused == 1
    assert len(liar.seen) == 1


def test_a_stranger_with_a_transport_of_its_own_is_refused(liar: Any) -> None:
    network = liar.transport._network
    network.connect("stranger").send("b", encode(raw(1, 666, sender="stranger")))
    liar.says(raw(1, 42))
    assert hear(liar.channel, "a") == 42
    assert liar.channel.counters["stranger"].refused == 1


def test_an_unknown_control_message_is_refused_and_holds_up_nobody(liar: Any) -> None:
    # Given message 2 waiting in the window, When message 1 turns out to be a control message nobody knows
    liar.says(raw(2, 2), raw(1, kind="control.reboot"))
    # Then message 2 is delivered at once
    assert hear(liar.channel, "a") == 2
    assert liar.seen[0]["code"] == "peer_violation"


def test_text_of_a_peer_is_made_printable_and_cut(liar: Any) -> None:
    fields = {"code": "x", "message": "evil\n2026-01-01 forged \x1b[31m" + "y" * 10_000, "task": "t\n"}
    liar.says(raw(1, kind="control.failed", payload=Payload(fields)))
    with pytest.raises(PeerFailed) as caught:
        hear(liar.channel, "a")
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 1_200


def test_an_observer_that_fails_ends_the_waits_with_an_error(make_channels: Make) -> None:
    def broken(event: str, fields: object) -> None:
        raise OSError("disk full")

    channels = make_channels("ab", observer=broken)
    channels["a"]._transport.send("b", [b"rubbish"])
    with pytest.raises(InternalError, match="disk full"):
        hear(channels["b"], "a")


def test_a_transport_that_breaks_ends_the_waits_with_its_error() -> None:
    class Broken(MemoryTransport):
        def receive(self, timeout: float | None) -> Delivery | None:
            raise FederationError("the broker is gone")

    channel = JobChannel(Broken(MemoryNetwork(), "a"), job="job", party="a", members=("a", "b"))
    with pytest.raises(FederationError, match="the broker is gone"):
        hear(channel, "b")
    channel.close()


# --- the ends of a wait -------------------------------------------------------------------------------------


def waits(channel: JobChannel, together: Any, then: Callable[[], None]) -> Exception:
    """What a wait on `a` without deadline ends with, when `then` happens."""

    def wait() -> None:
        channel.receive("a", task="t", kind="data.x", deadline=None)

    ends = together({"wait": wait, "then": then})
    assert ends["then"] is None
    assert isinstance(ends["wait"], Exception)
    return ends["wait"]


def test_a_wait_ends_when_the_sender_fails(make_channels: Make, together: Any) -> None:
    channels = make_channels("ab")
    error = waits(channels["b"], together, lambda: channels["a"].announce_failure(QuorumLost("too few"), task="tune"))
    assert isinstance(error, PeerFailed)
    assert "failed in task tune: too few [quorum_lost]" in error.message


def test_a_wait_ends_when_the_sender_is_done(make_channels: Make, together: Any) -> None:
    channels = make_channels("ab")
    error = waits(channels["b"], together, lambda: channels["a"].announce_done())
    assert isinstance(error, PeerFailed)
    assert "has finished its part" in error.message


def test_a_wait_ends_when_the_job_is_cancelled_here_or_there(make_channels: Make, together: Any) -> None:
    channels = make_channels("ab")
    error = waits(channels["b"], together, lambda: channels["b"].cancel("Ctrl-C"))
    assert isinstance(error, JobCancelled)
    there = make_channels("ab")
    error = waits(there["b"], together, lambda: there["a"].announce_failure(JobCancelled("Ctrl-C"), task="t"))
    assert isinstance(error, JobCancelled)
    assert "cancelled by a: Ctrl-C" in error.message
    with pytest.raises(JobCancelled):
        there["b"].check_cancelled()


def test_a_wait_ends_when_the_channel_is_closed_and_closing_twice_is_fine(make_channels: Make, together: Any) -> None:
    channel = make_channels("ab")["b"]
    assert isinstance(waits(channel, together, channel.close), TransportClosed)
    channel.close()
    with pytest.raises(TransportClosed):
        say(channel, "a", 1)


def test_another_partys_end_does_not_end_the_wait(make_channels: Make) -> None:
    channels = make_channels("abc")
    channels["c"].announce_failure(InternalError("bug"), task="t")
    say(channels["a"], "b", 7)
    assert hear(channels["b"], "a") == 7


def test_messages_of_a_party_come_before_the_news_that_it_left(make_channels: Make) -> None:
    # Given two messages, the second delayed until after the news that the sender failed
    channels = make_channels("ab", faults=(Fault(FaultKind.DELAY, "a", "b", 2, by=1),), linger=None)
    say(channels["a"], "b", 1)
    say(channels["a"], "b", 2)
    channels["a"].announce_failure(QuorumLost("bug"), task="t")
    # When b asks three times, Then it gets both messages first
    assert [hear(channels["b"], "a"), hear(channels["b"], "a")] == [1, 2]
    with pytest.raises(PeerFailed, match="bug"):
        hear(channels["b"], "a")


def test_the_news_that_a_party_left_comes_once(make_channels: Make) -> None:
    channels = make_channels("abc")
    channels["a"].announce_done()
    ask = {"task": "t", "kinds": ("data.x",), "senders": ("a", "c")}
    assert channels["b"].next(**ask, deadline=None) == Left("a", "done", "has finished its part")
    assert channels["b"].next(**ask, deadline=channels["b"].clock(), known_left={"a"}) is None


def test_one_side_of_a_party_that_fails_wakes_the_other(make_channels: Make, together: Any) -> None:
    channel = make_channels("ab")["a"]
    error = waits(channel, together, lambda: channel.leave(ValueError("bad"), task="t"))
    assert isinstance(error, PeerFailed)
    assert "bad [internal]" in error.message


# --- many at once -------------------------------------------------------------------------------------------


def test_concurrent_waiters_each_get_what_is_theirs(make_channels: Make, together: Any) -> None:
    channels = make_channels("abc")

    def ask(sender: str, kind: str) -> Callable[[], list[int]]:
        return lambda: [hear(channels["c"], sender, kind=kind) for _ in range(50)]

    def tell(sender: str, kind: str, base: int) -> Callable[[], None]:
        def run() -> None:
            for number in range(50):
                channels[sender].send("c", task="t", kind=kind, payload=Payload({"number": base + number}))

        return run

    ends = together(
        {
            "ax": ask("a", "data.x"),
            "ay": ask("a", "data.y"),
            "bx": ask("b", "data.x"),
            "tell ax": tell("a", "data.x", 0),
            "tell ay": tell("a", "data.y", 100),
            "tell bx": tell("b", "data.x", 200),
        }
    )
    assert ends["ax"] == list(range(50))
    assert ends["ay"] == list(range(100, 150))
    assert ends["bx"] == list(range(200, 250))


def test_what_one_sends_to_oneself_is_delivered_without_a_frame(make_channels: Make) -> None:
    channel = make_channels("ab")["a"]
    assert say(channel, "a", 5) == 0
    assert hear(channel, "a") == 5
    assert channel.sent_bytes() == 0


def test_bytes_are_counted_on_both_sides(make_channels: Make) -> None:
    channels = make_channels("abc")
    payload = Payload({}, {"w": np.ones(1000, np.float32)})
    sizes = [channels["a"].send("b", task="t", kind="data.x", payload=payload) for _ in range(2)]
    assert all(4000 < size < 4600 for size in sizes)
    assert channels["a"].sent_bytes() == sum(sizes)
    channels["b"].receive("a", task="t", kind="data.x", deadline=channels["b"].clock() + 10)
    channels["b"].receive("a", task="t", kind="data.x", deadline=channels["b"].clock() + 10)
    assert channels["b"].counters["a"].received_bytes == sum(sizes)
    assert (channels["a"].counters["b"].sent, channels["b"].counters["a"].received) == (2, 2)


def test_nobody_outside_the_job_is_written_to(make_channels: Make) -> None:
    with pytest.raises(FederationError, match="stranger is not a party of job job"):
        say(make_channels("ab")["a"], "stranger", 1)


def test_everything_received_is_acknowledged_in_the_end(liar: Any) -> None:
    liar.says(raw(2), raw(1), raw(1), b"rubbish", raw(3))
    assert [hear(liar.channel, "a") for _ in range(3)] == [0, 0, 0]
    liar.is_heard()


def test_all_errors_of_a_wait_are_our_own(make_channels: Make) -> None:
    channel = make_channels("ab")["a"]
    channel.close()
    with pytest.raises(FateError):
        channel.next(task="t", kinds=("data.x",), senders=("b",), deadline=None)


def test_what_goes_to_many_is_hashed_once_and_not_kept_alive(
    make_channels: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[int] = []
    original = channels_module.body_digest
    monkeypatch.setattr(channels_module, "body_digest", lambda parts: hashed.append(1) or original(parts))
    channels = make_channels("abc")
    payload = Payload({}, {"x": np.arange(5.0)})
    alive = weakref.ref(payload)
    for receiver in "bc":
        channels["a"].send(receiver, task="t", kind="data.x", payload=payload)
    assert hashed == [1]
    say(channels["a"], "b", 1)
    assert len(hashed) == 2, "another payload has a digest of its own"
    for receiver in "bc":
        found = channels[receiver].receive("a", task="t", kind="data.x", deadline=None)
        assert found.payload.tensors["x"].tolist() == [0, 1, 2, 3, 4]
    del payload
    assert alive() is None


# --- late, but coming in ------------------------------------------------------------------------------------


class Slow(MemoryTransport):
    """A transport on which a message of `a` is coming in: its progress is what the test says."""

    script: ClassVar[list[Progress | None]] = []
    looks = 0

    def progress(self, sender: str) -> Progress | None:
        Slow.looks += 1
        return self.script[min(Slow.looks - 1, len(self.script) - 1)]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[JobChannel, Callable[[], None]]]]:
    monkeypatch.setattr(channels_module, "_LOOK", 0.001)
    opened: list[JobChannel] = []

    def make(script: list[Progress | None], **settings: Any) -> tuple[JobChannel, Callable[[], None]]:
        network = MemoryNetwork()
        Slow.script, Slow.looks = script, 0
        opened.append(JobChannel(Slow(network, "b"), job="job", party="b", members=("a", "b"), **settings))
        return opened[0], lambda: network.connect("a").send("b", encode(raw(1, number=7)))  # type: ignore[return-value]

    yield make
    for channel in opened:
        channel.close()


def moving(count: int) -> list[Progress | None]:
    return [Progress(at, 1000) for at in range(count)]


def test_a_message_that_is_coming_in_is_waited_for_beyond_the_deadline(slow: Any) -> None:
    # Given a message of which more has come at every look
    channel, arrive = slow(moving(900))
    threading.Timer(0.2, arrive).start()
    # When it is waited for with a deadline that passes before it is whole, Then it still counts
    assert hear(channel, "a", seconds=0.02) == 7


def test_a_poll_does_not_wait_for_what_is_coming_in(slow: Any) -> None:
    channel, _ = slow(moving(900))
    now = channel.clock()
    assert channel.next(task="t", kinds=("data.x",), senders=("a",), deadline=now, stretch=False) is None
    assert Slow.looks == 0


def test_a_message_that_stands_still_is_not_waited_for(slow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels_module, "_STANDSTILL", 0.05)
    channel, _ = slow([Progress(100, 1000)])
    with pytest.raises(RoundTimeout, match=r"100 of 1000 bytes of a message from a have come"):
        hear(channel, "a", seconds=0.0)
    assert Slow.looks > 2, "it was looked at more than once before it was given up"


def test_a_drip_does_not_hold_a_wait_open_for_ever(slow: Any) -> None:
    channel, _ = slow(moving(10**6), stretch=0.1)
    with pytest.raises(RoundTimeout):
        hear(channel, "a", seconds=0.0)


def test_a_party_that_the_transport_has_lost_ends_waits_for_it(make_channels: Make) -> None:
    channel = make_channels("ab")["b"]
    threading.Timer(0.05, channel.lost, args=("a", "silent", "has given no sign of life for 120 s")).start()
    with pytest.raises(PeerFailed, match="will not come: a has given no sign of life for 120 s"):
        channel.receive("a", task="t", kind="data.x", deadline=None)
