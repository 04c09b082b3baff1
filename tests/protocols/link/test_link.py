"""The link between parties whose network loses, repeats, delays, changes and invents frames, and who die and return."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fate_llm.core.errors import (
    BadSeal,
    ConfigurationError,
    FateError,
    FederationError,
    InternalError,
    PeerFailed,
    TransportClosed,
)
from fate_llm.core.interfaces import Buffer, Progress
from fate_llm.protocols.link import SecureLink, Timing
from fate_llm.protocols.link.frames import HEADER, Header, Kind, ReportKind
from fate_llm.protocols.link.journal import SegmentLog
from fate_llm.protocols.transports.memory import Fault, FaultKind, MemoryTransport
from tests.protocols.link.worlds import CHUNK, IDENTITIES, QUICK, SOON, Clock, World, crash, eventually, run_aside, take

MakeWorld = Callable[..., World]
AGREE, DATA, CONTROL = Kind.AGREE, Kind.DATA, Kind.CONTROL


def quiet(link: SecureLink, seconds: float = 0.03) -> None:
    assert link.receive(seconds) is None


def reports(world: World, sender: str, receiver: str) -> int:
    return len(world.network.frames(sender, receiver, CONTROL))


# --- what goes in comes out -------------------------------------------------------------------------------------


def test_messages_of_all_sizes_arrive_once_in_order_both_ways(world: World) -> None:
    a, b = world.pair()
    sizes = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK, 5 * CHUNK + 3]
    for sender, receiver, name in ((a, b, "b"), (b, a, "a")):
        bodies = [os.urandom(size) for size in sizes]
        for body in bodies:
            assert sender.send(name, [body[:3], memoryview(body)[3:]]) == len(body)
        for body in bodies:
            delivery = take(receiver)
            assert (bytes(delivery.body), delivery.sender, delivery.redelivered) == (body, sender.party, False)
        counters = receiver.counters[sender.party]
        assert (counters.messages_received, counters.bytes_received) == (len(sizes), sum(sizes))
        assert (counters.refused, counters.duplicates, counters.early) == (0, 0, 0)
    # and when both are done nothing is left, on disk or on the way
    ends = [run_aside(lambda link=link: link.close(finished=True)) for link in (a, b)]
    assert [end() for end in ends] == [None, None]
    assert world.files() == []


def test_nothing_readable_is_on_the_way_or_on_disk_and_files_are_the_owners(world: World) -> None:
    a, b = world.pair()
    marker = b"MARKER-OF-A-SECRET-TENSOR"
    a.send("b", [marker * 20])
    take(b, ack=False)
    assert all(marker[:10] not in body for _, _, body in world.network.seen)
    files = [path for path in world.folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"session", "00000001.log"}
    for path in files:
        assert marker[:10] not in path.read_bytes()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_is_sent_may_be_written_to_afterwards(world: World) -> None:
    a, b = world.pair()
    mine = bytearray(b"x" * 200)
    a.send("b", [mine])
    mine[:] = bytes(200)
    assert bytes(take(b).body) == b"x" * 200


def test_the_disk_does_not_grow(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fate_llm.protocols.link.peer.SegmentLog", lambda path: SegmentLog(path, segment=4000))
    a, b = world.pair()
    for number in range(400):
        a.send("b", [b"%d" % number * 20])
        assert bytes(take(b).body) == b"%d" % number * 20
    assert a.flush()
    assert sum(path.stat().st_size for path in world.folder.rglob("*.log")) < 40_000


def test_send_waits_when_too_much_is_unreported_and_goes_on(world: World) -> None:
    # Given a network that lets no report through
    a, b = world.pair(unreported=4 * CHUNK)
    world.network.rule = lambda s, r, f: [] if s == "b" else [(s, r, f)]
    sent = run_aside(lambda: a.send("b", [bytes(20 * CHUNK)]))
    eventually(lambda: len(world.network.frames("a", "b", DATA)) >= 2)
    time.sleep(0.05)
    assert len(world.network.frames("a", "b", DATA)) <= 4, "memory of the network is bounded"
    # When reports come again, Then it goes on by itself
    world.network.rule = None
    assert sent() == 20 * CHUNK
    assert bytes(take(b).body) == bytes(20 * CHUNK)


def test_progress_is_told_in_bytes(world: World) -> None:
    a, b = world.pair()
    assert (b.progress("a"), b.progress("nobody")) == (None, None)
    held: list[tuple[str, str, bytes]] = []
    world.network.rule = lambda s, r, f: (
        held.append((s, r, f)) or [] if f[4] == DATA and len(held) < 1 and f[31] == 3 else [(s, r, f)]
    )  # type: ignore[func-returns-value]
    slow = Timing(meet=60, silence=60, probe=30, report=0.005)
    a._timing = slow
    for peer in a._peers.values():
        peer.outflow._shortest = peer.outflow._interval = 30.0
    a.send("b", [bytes(3 * CHUNK)])
    eventually(lambda: b.progress("a") == Progress(2 * CHUNK, 3 * CHUNK))
    world.network.inject(*held[0])
    take(b)
    assert b.progress("a") is None


# --- a network with faults --------------------------------------------------------------------------------------

FAULT = st.builds(
    Fault,
    st.sampled_from(FaultKind),
    st.just("a"),
    st.just("b"),
    st.integers(1, 30),
    st.one_of(st.none(), st.integers(1, 6)),
)
EVENT = st.one_of(
    st.tuples(st.just("send"), st.sampled_from("ab"), st.integers(0, 4 * CHUNK)),
    st.tuples(st.sampled_from(["restart", "crash", "read"]), st.sampled_from("ab"), st.just(0)),
    st.tuples(st.just("die in a send"), st.sampled_from("ab"), st.integers(1, 4)),
)


def turned(fault: Fault) -> Fault:
    return Fault(fault.kind, fault.receiver, fault.sender, fault.nth, fault.by)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(FAULT, max_size=12), st.lists(FAULT.map(turned), max_size=12), st.lists(EVENT, max_size=9))
def test_everything_comes_once_in_order_whatever_happens(
    tmp_path_factory: pytest.TempPathFactory,
    faults: list[Fault],
    back: list[Fault],
    events: list[tuple[str, str, int]],
) -> None:
    world = World(tmp_path_factory.mktemp("world"), faults=(*faults, *back))
    links = {name: world.link(name) for name in "ab"}
    other = {"a": "b", "b": "a"}
    sent: dict[str, list[bytes]] = {"a": [], "b": []}
    read: dict[str, list[bytes]] = {"a": [], "b": []}

    def restart(name: str, end: Callable[[SecureLink], None]) -> None:
        end(links[name])
        links[name] = world.link(name)

    try:
        for number, (what, name, size) in enumerate(events):
            if what == "send":
                body = bytes([number]) * size
                links[name].send(other[name], [body])
                sent[name].append(body)
            elif what == "restart":
                restart(name, SecureLink.close)
            elif what == "crash":
                restart(name, crash)
            elif what == "die in a send":
                world.meet(links[name])
                links[name]._transport = Dying(links[name]._transport, frames=size)
                with pytest.raises(Dead):
                    links[name].send(other[name], [b"lost" * 4 * CHUNK])
                restart(name, crash)
            elif len(read[name]) < len(sent[other[name]]):
                read[name].append(bytes(take(links[name]).body))
        for name in "ab":
            while len(read[name]) < len(sent[other[name]]):
                read[name].append(bytes(take(links[name]).body))
        assert read == {"a": sent["b"], "b": sent["a"]}
        for name in "ab":
            quiet(links[name], 0.005)
        ends = [run_aside(lambda link=link: link.close(finished=True)) for link in links.values()]
        for end in ends:
            end()
        assert world.files() == []
        assert world.refused == []
    finally:
        world.close()


class Dead(BaseException):
    """Stands for the death of the process."""


class Dying:
    """A transport whose process dies after so many data frames were handed to it."""

    def __init__(self, transport: Any, *, frames: int) -> None:
        self._transport, self._left = transport, frames

    def send(self, receiver: str, parts: Sequence[Buffer]) -> int:
        if b"".join(parts)[4] == DATA:
            if not self._left:
                raise Dead
            self._left -= 1
        return int(self._transport.send(receiver, parts))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


@pytest.mark.parametrize("lost", range(1, 5))
def test_the_agreement_survives_each_of_its_frames_being_lost(make_world: MakeWorld, lost: int) -> None:
    world = make_world(faults=[Fault(FaultKind.LOSE, *pair, nth) for pair in ("ab", "ba") for nth in range(1, lost)])
    a, b = world.link("a"), world.link("b")
    a.send("b", [b"there"])
    b.send("a", [b"and back"])
    assert (bytes(take(b).body), bytes(take(a).body)) == (b"there", b"and back")


def test_what_was_lost_goes_again_as_the_same_bytes_and_nothing_else(make_world: MakeWorld) -> None:
    world = make_world()
    a, b = world.pair()
    lost: list[bytes] = []

    def rule(s: str, r: str, f: bytes) -> list[tuple[str, str, bytes]]:
        if f[4] == DATA and f[31] == 9 and not lost:
            lost.append(f)
            return []
        return [(s, r, f)]

    world.network.rule = rule
    a.send("b", [os.urandom(10 * CHUNK)])
    take(b)
    a.flush()
    frames = world.network.frames("a", "b", DATA)
    assert len(set(frames)) == 10
    assert frames.count(lost[0]) == 2
    assert 1 <= a.counters["b"].chunks_sent_again == len(frames) - 10 <= 2


def test_a_full_way_to_one_party_holds_up_nobody_else(make_world: MakeWorld) -> None:
    # Given a party to which chunks must go again, while there is no room on the way to it
    world = make_world("abc")
    room = threading.Event()

    class Narrow(MemoryTransport):
        def send(self, receiver: str, parts: Sequence[Buffer]) -> int:
            if receiver == "b" and threading.current_thread().name == "link-again-a":
                assert room.wait(SOON)
            return super().send(receiver, parts)

    a = world.link("a", transport=Narrow(world.network, "a"))
    b, c = world.link("b"), world.link("c")
    world.meet(a, b, c)
    world.network.rule = lambda s, r, f: [] if (s, r, f[4]) == ("a", "b", DATA) else [(s, r, f)]
    a.send("b", [bytes(5 * CHUNK)])
    eventually(lambda: a._peers["b"].resending)
    world.network.rule = None
    # When others talk meanwhile, Then they are heard, and answered
    a.send("c", [b"are you there"])
    assert bytes(take(c).body) == b"are you there"
    c.send("a", [b"still there"])
    assert bytes(take(a).body) == b"still there"
    a._tell(a._peers["b"], ReportKind.PROBE)
    eventually(lambda: a._peers["b"].outflow.round_trip is not None)
    # And when there is room, it all arrives
    room.set()
    assert len(take(b).body) == 5 * CHUNK
    eventually(lambda: not a._peers["b"].resending)


def test_what_was_reported_before_its_turn_to_go_again_does_not(world: World) -> None:
    a, b = world.pair()
    a.send("b", [bytes(3 * CHUNK)])
    take(b)
    assert a.flush()
    positions = [(1, 0), (1, 200)]
    with a._changed:
        a._peers["b"].resending += 2
    a._again.put((a._peers["b"], positions))
    a._again.put(None)
    a._run_again()
    assert a.counters["b"].chunks_sent_again == 0
    assert a._peers["b"].resending == 0


def test_only_what_is_on_disk_is_reported(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a receiver whose disk does not take anything yet
    a, b = world.pair()
    held = threading.Event()
    original = SegmentLog.sync

    def slow(self: SegmentLog) -> None:
        assert held.wait(SOON)
        original(self)

    monkeypatch.setattr(SegmentLog, "sync", slow)
    a.send("b", [b"precious"])
    eventually(lambda: b._peers["a"].inflow.received == 1)
    # Then nothing it says meanwhile claims that it has the message
    b.send("a", [b"other news"])
    take(a, ack=False)
    assert a._peers["b"].outflow.waiting_bytes > 0
    held.set()
    eventually(lambda: a._peers["b"].outflow.waiting_bytes == 0)


def test_a_message_is_kept_until_its_reader_acknowledges_in_any_order(world: World) -> None:
    a, b = world.pair()
    for body in (b"1", b"2", b"3"):
        a.send("b", [body])
    first, second, third = (take(b, ack=False) for _ in range(3))
    b.ack(third)
    b.ack(first)
    crash(b)
    b = world.link("b")
    again = take(b)
    assert (bytes(again.body), again.redelivered) == (b"2", True)
    b.ack(second)  # of the process before: means nothing
    a.send("b", [b"4"])
    rest = [bytes(take(b).body) for _ in range(2)]
    assert rest == [b"3", b"4"], "3 may come again, for 2 was not done; it is not lost, and stays in order"
    b.close()
    quiet(world.link("b"))


def test_a_chunk_is_on_disk_before_the_transport_may_forget_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given every write, sync and acknowledgement of the receiver, in order
    a, b = world.pair()
    steps: list[str] = []
    real_append, real_sync, real_ack = SegmentLog.append, SegmentLog.sync, b._transport.ack
    inbox = b._peers["a"]._inbox

    def append(log: SegmentLog, parts: Sequence[Buffer]) -> Any:
        found = real_append(log, parts)
        if log is inbox:
            steps.append("kept")
        return found

    def sync(log: SegmentLog) -> None:
        real_sync(log)
        if log is inbox:
            steps.append("synced")

    def ack(delivery: Any) -> None:
        steps.append("acked" if delivery.body[4] == DATA else "other")
        real_ack(delivery)

    monkeypatch.setattr(SegmentLog, "append", append)
    monkeypatch.setattr(SegmentLog, "sync", sync)
    monkeypatch.setattr(b._transport, "ack", ack)
    a.send("b", [bytes(9 * CHUNK)])
    take(b, ack=False)
    eventually(lambda: steps.count("acked") == 9)
    # Then never more is acknowledged than was synced by then
    kept = synced = acked = 0
    for step in steps:
        kept += step == "kept"
        synced = kept if step == "synced" else synced
        acked += step == "acked"
        assert acked <= synced


def test_a_chunk_is_in_the_outbox_before_it_is_sent(world: World) -> None:
    a, b = world.pair()
    found: list[bool] = []

    def rule(s: str, r: str, f: bytes) -> list[tuple[str, str, bytes]]:
        if f[4] == DATA:
            files = (world.folder / "a" / "b" / "outbox").glob("*.log")
            found.append(any(f in path.read_bytes() for path in files))
        return [(s, r, f)]

    world.network.rule = rule
    a.send("b", [bytes(3 * CHUNK)])
    take(b)
    assert found[:3] == [True] * 3


def test_keys_are_on_disk_before_they_are_promised(world: World) -> None:
    """a, whose name comes first, draws a secret; it must survive a crash right after the reply left."""
    copies: list[bytes] = []

    def rule(s: str, r: str, f: bytes) -> list[tuple[str, str, bytes]]:
        if s == "a" and f.startswith(b"FLNK\x01\x02", HEADER):
            copies.append((world.folder / "a" / "session").read_bytes())
        return [(s, r, f)]

    world.network.rule = rule
    a, b = world.pair()
    crash(a)
    (world.folder / "a" / "session").write_bytes(copies[0])
    a = world.link("a")
    assert a._peers["b"].ready
    goes_on(a, b)
    assert world.gone == []


def test_an_epoch_is_never_used_twice(world: World) -> None:
    a, b = world.pair()
    for _ in range(4):
        a.send("b", [b"x"])
        take(b)
        eventually(lambda: reports(world, "a", "b") or True)
        crash(a)
        a = world.link("a")
    a.send("b", [b"x"])
    take(b)
    seen: dict[tuple[bytes, bytes], bytes] = {}
    for s, _, frame in world.network.seen:
        if frame[4] != AGREE:
            key = (s.encode() + frame[4:5], frame[16:32])  # sender and kind; epoch and number
            assert seen.setdefault(key, frame) == frame, "one nonce, two contents"
    assert {key[1][:8] for key in seen if key[0][:1] == b"a" and key[0][1] == DATA} == {
        epoch.to_bytes(8, "big") for epoch in range(1, 6)
    }


def test_two_processes_on_one_folder_are_refused(world: World) -> None:
    a, b = world.pair()
    with pytest.raises(ConfigurationError, match="another process"):
        world.link("a")
    a.send("b", [b"unharmed"])
    assert bytes(take(b).body) == b"unharmed"
    a.close()
    world.link("a").send("b", [b"next"])
    assert bytes(take(b).body) == b"next"


# --- attacks ----------------------------------------------------------------------------------------------------


def refusal(world: World, party: str, code: str, attack: Callable[[], None]) -> None:
    """The attack ends in a refusal of this code, told to the observer and counted."""
    before = len(world.refused)
    attack()
    eventually(lambda: len(world.refused) > before, f"a refusal ({code})")
    who, fields = world.refused[-1]
    assert (who, fields["event"], fields["code"]) == (party, "refused", code), fields
    assert fields["message"]


def goes_on(a: SecureLink, b: SecureLink) -> None:
    for sender, receiver, name in ((a, b, "b"), (b, a, "a")):
        sender.send(name, [b"goes on" * 30])
        assert bytes(take(receiver).body) == b"goes on" * 30


def captured(world: World, a: SecureLink, b: SecureLink, body: bytes = b"0123456789") -> bytes:
    """A data frame of a to b that did not arrive; it stays lost until a sends it again."""
    world.network.rule = lambda s, r, f: [] if (s, f[4]) == ("a", DATA) or f[4] == CONTROL else [(s, r, f)]
    before = len(world.network.frames("a", "b", DATA))
    a.send("b", [body])
    return world.network.frames("a", "b", DATA)[before]


@pytest.mark.parametrize("at", [8, 16, 23, 31, 39, 47, 55, 62, 63, 64, 70, 80, -1])
def test_a_changed_frame_is_refused_and_the_right_one_still_comes(world: World, at: int) -> None:
    a, b = world.pair()
    frame = bytearray(captured(world, a, b))
    frame[at] ^= 1
    if at == 31:  # the number: now it is early, and is opened when its turn comes
        frame[at] ^= 3
    before = b.counters["a"].refused
    world.network.inject("a", "b", bytes(frame))
    if at != 31:
        eventually(lambda: b.counters["a"].refused > before)
        assert world.codes() <= {"bad_seal", "bad_envelope", "peer_violation"}
    world.network.rule = None
    assert bytes(take(b).body) == b"0123456789"
    goes_on(a, b)
    assert b.counters["a"].refused > before
    assert world.gone == [], "what others do to its frames is not the party's fault"


@pytest.mark.parametrize("change", ["cut", "extended", "only a header", "empty", "noise"])
def test_truncated_and_extended_frames_are_refused(world: World, change: str) -> None:
    a, b = world.pair()
    frame = captured(world, a, b)
    bad = {
        "cut": frame[:-1],
        "extended": frame + b"\0",
        "only a header": frame[:HEADER],
        "empty": b"",
        "noise": os.urandom(90),
    }[change]
    code = "bad_seal" if change == "cut" else "bad_envelope"
    refusal(world, "b", code, lambda: world.network.inject("a", "b", bad))
    world.network.rule = None
    assert bytes(take(b).body) == b"0123456789"
    goes_on(a, b)


def test_a_replay_within_the_session_is_counted_and_not_delivered(world: World) -> None:
    a, b = world.pair()
    goes_on(a, b)
    a.flush()
    b.flush()
    before = b.counters["a"].duplicates
    for frame in world.network.frames("a", "b", DATA) + world.network.frames("a", "b", CONTROL):
        world.network.inject("a", "b", frame)
    eventually(lambda: b.counters["a"].duplicates - before >= 5)
    quiet(b)
    assert world.refused == []
    goes_on(a, b)


def test_a_replay_into_another_attempt_is_refused(make_world: MakeWorld) -> None:
    first, second = make_world(attempt=1), make_world(attempt=2)
    a, b = first.pair()
    goes_on(a, b)
    c, d = second.pair()
    for frame in first.network.frames("a", "b", DATA) + first.network.frames("a", "b", CONTROL):
        refusal(second, "b", "peer_violation", lambda frame=frame: second.network.inject("a", "b", frame))
    hello = first.network.frames("a", "b", AGREE)[0]
    refusal(second, "b", "bad_signature", lambda: second.network.inject("a", "b", hello))
    goes_on(c, d)
    assert second.gone == []


def test_frames_redirected_relabelled_and_reflected_are_refused(make_world: MakeWorld) -> None:
    world = make_world("abc")
    a, b, c = (world.link(name) for name in "abc")
    world.meet(a, b, c)
    frame = captured(world, a, b)
    refusal(world, "c", "peer_violation", lambda: world.network.inject("a", "c", frame))  # to another party
    refusal(world, "b", "peer_violation", lambda: world.network.inject("c", "b", frame))  # in another's name
    refusal(world, "a", "bad_seal", lambda: world.network.inject("b", "a", frame))  # back to its sender
    hello = world.network.frames("a", "b", AGREE)[0]
    refusal(world, "c", "peer_violation", lambda: world.network.inject("a", "c", hello))
    refusal(world, "b", "peer_violation", lambda: world.network.inject("c", "b", hello))
    refusal(world, "a", "peer_violation", lambda: world.network.inject("b", "a", hello))
    assert c.counters["a"].refused == 2
    world.network.rule = None
    assert bytes(take(b).body) == b"0123456789"
    goes_on(a, b)
    c.send("a", [b"c too"])
    assert bytes(take(a).body) == b"c too"
    assert world.gone == []


def test_a_reflected_report_is_refused(world: World) -> None:
    a, b = world.pair()
    world.network.rule = lambda s, r, f: [] if f[4] == CONTROL else [(s, r, f)]
    a._tell(a._peers["b"], ReportKind.PROBE)
    frame = world.network.frames("a", "b", CONTROL)[-1]
    refusal(world, "a", "bad_seal", lambda: world.network.inject("b", "a", frame))
    world.network.rule = None
    goes_on(a, b)


def test_a_stranger_is_refused_and_its_name_is_cut(world: World) -> None:
    a, b = world.pair()
    refusal(world, "b", "peer_violation", lambda: world.network.inject("x" * 500, "b", b"hello"))
    assert len(world.refused[-1][1]["party"]) == 80
    goes_on(a, b)


def test_data_before_the_agreement_does_no_harm(make_world: MakeWorld) -> None:
    world = make_world()
    b = world.link("b")
    header = Header(DATA, bytes(8), 1, 1, 1, 5).to_bytes()
    for _ in range(3):
        world.network.inject("a", "b", header + bytes(21))
    a = world.link("a")
    goes_on(a, b)
    assert world.gone == []


def test_a_wrong_identity_in_the_roster_keeps_out(make_world: MakeWorld) -> None:
    world = make_world()
    clock = Clock()
    b = world.link("b", clock=clock)
    world.roster = {"a": IDENTITIES["d"].public, "b": IDENTITIES["b"].public}
    world.folder = world.folder / "wrong"
    world.link("a", identity=IDENTITIES["d"])
    eventually(lambda: "bad_signature" in world.codes())
    waiting = run_aside(lambda: b.send("a", [b"x"]))
    clock.now += QUICK.meet + 1
    assert isinstance(waiting(), PeerFailed)
    assert ("b", "a", "silent", "has not come within 60 s") in world.gone


@pytest.mark.parametrize("kind", [ReportKind.ASK, ReportKind.PROBE, ReportKind.BYE])
def test_replayed_reports_have_no_effect(world: World, kind: ReportKind) -> None:
    a, b = world.pair()
    world.network.rule = lambda s, r, f: [] if f[4] == CONTROL else [(s, r, f)]
    b._tell(b._peers["a"], kind)
    old = world.network.frames("b", "a", CONTROL)[-1]
    world.network.rule = None
    b._tell(b._peers["a"], ReportKind.RECEIPT)
    eventually(lambda: a._peers["b"]._reports_seen == b._peers["a"]._reports)
    goes_on(a, b)
    before, sent = a.counters["b"].duplicates, reports(world, "a", "b")
    for _ in range(50):
        world.network.inject("b", "a", old)
    eventually(lambda: a.counters["b"].duplicates >= before + 50)
    assert reports(world, "a", "b") <= sent + 1
    assert a.counters["b"].chunks_sent_again == 0
    goes_on(a, b)


def test_asking_again_and_again_moves_nothing(world: World) -> None:
    # Given a party with much under way, and a receiver that asks for it all the time
    clock = Clock()
    a, b = world.link("a", clock=clock), world.link("b", clock=clock)
    world.meet(a, b)
    world.network.rule = lambda s, r, f: [] if (s, f[4]) == ("a", DATA) else [(s, r, f)]
    a.send("b", [bytes(10 * CHUNK)])
    a._tell(a._peers["b"], ReportKind.PROBE)
    eventually(lambda: a.counters["b"].chunks_sent_again == 10)
    # When it asks a hundred times without having been asked, Then nothing more goes
    sender = b._peers["a"]
    heard = a._peers["b"]._reports_seen
    for _ in range(100):
        b._transport.send("a", [sender.report(ReportKind.ASK, 10)])
    eventually(lambda: a._peers["b"]._reports_seen >= heard + 100)
    assert a.counters["b"].chunks_sent_again == 10
    clock.now += 1
    world.network.rule = None
    assert len(take(b).body) == 10 * CHUNK


def test_a_report_of_what_was_never_sent_ends_the_trust(world: World) -> None:
    a, b = world.pair()
    b._peers["a"].inflow.received = 5
    refusal(world, "a", "peer_violation", lambda: b._tell(b._peers["a"], ReportKind.RECEIPT))
    eventually(lambda: world.gone)
    assert world.gone[0][:3] == ("a", "b", "peer_violation")
    with pytest.raises(PeerFailed, match="chunk 5"):
        a.send("b", [b"x"])


@pytest.mark.parametrize("size", [2**62, 2**40, 2**35])
def test_a_huge_size_costs_nothing(world: World, size: int) -> None:
    a, b = world.pair()
    frame = bytearray(captured(world, a, b))
    frame[40:48] = size.to_bytes(8, "big")
    code = "bad_seal" if size == 2**35 else "bad_envelope"
    refusal(world, "b", code, lambda: world.network.inject("a", "b", bytes(frame)))
    world.network.rule = None
    assert bytes(take(b).body) == b"0123456789"
    goes_on(a, b)


def test_a_party_that_seals_nonsense_is_given_up(world: World) -> None:
    a, b = world.pair()
    peer = a._peers["b"]
    number, position, frame = peer.seal(b"x" * 10, 1, 30, 0)
    peer.outflow.add(number, position, len(frame), 0.0)
    a._transport.send("b", [frame])
    number, position, frame = peer.seal(b"x" * 10, 1, 31, 10)  # another size midway
    peer.outflow.add(number, position, len(frame), 0.0)
    refusal(world, "b", "peer_violation", lambda: a._transport.send("b", [frame]) and None)
    eventually(lambda: ("b", "a", "peer_violation") in [told[:3] for told in world.gone])
    with pytest.raises(PeerFailed):
        b.send("a", [b"x"])


def test_one_number_with_two_contents_ends_the_trust_only_when_the_party_did_it(world: World) -> None:
    a, b = world.pair()
    a.send("b", [b"first"])
    take(b)
    frame = world.network.frames("a", "b", DATA)[0]
    forged = frame[:-1] + bytes([frame[-1] ^ 1])
    refusal(world, "b", "conflicting_duplicate", lambda: world.network.inject("a", "b", forged))
    goes_on(a, b)
    assert world.gone == []
    # a loses its outbox, as by a power cut, and numbers again what was received
    crash(a)
    for path in (world.folder / "a" / "b" / "outbox").glob("*.log"):
        path.unlink()
    world.network.rule = lambda s, r, f: [] if s == "b" else [(s, r, f)]
    a = world.link("a")
    refusal(world, "b", "conflicting_duplicate", lambda: a.send("b", [b"other"]) and None)
    eventually(lambda: ("b", "a", "conflicting_duplicate") in [told[:3] for told in world.gone])


def test_a_second_hello_after_the_keys_is_a_party_without_its_journal(world: World) -> None:
    a, b = world.pair(epoch=lambda: 5)
    goes_on(a, b)
    crash(a)
    for path in sorted((world.folder / "a").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    waiting = run_aside(lambda: b.receive(None))
    world.link("a", epoch=lambda: 6)
    eventually(lambda: world.gone)
    assert world.gone[0][:3] == ("b", "a", "peer_restarted")
    assert "peer_restarted" in world.codes()
    with pytest.raises(PeerFailed):
        b.send("a", [b"x"])
    b.close()
    assert isinstance(waiting(), TransportClosed)


def test_a_forged_early_frame_does_not_keep_the_right_one_out(world: World) -> None:
    a, b = world.pair()
    frame = bytearray(captured(world, a, b, bytes(3 * CHUNK)))
    for number in (2, 3, 4, 5, 2, 3):
        frame[24:32] = number.to_bytes(8, "big")
        world.network.inject("a", "b", bytes(frame))
    eventually(lambda: b.counters["a"].early)
    world.network.rule = None
    assert bytes(take(b).body) == bytes(3 * CHUNK)
    goes_on(a, b)


def test_a_goodbye_before_the_end_is_told(world: World) -> None:
    a, b = world.pair()
    captured(world, a, b, bytes(3 * CHUNK))
    world.network.rule = lambda s, r, f: [] if (s, f[4]) == ("a", DATA) else [(s, r, f)]
    a._tell(a._peers["b"], ReportKind.BYE)
    eventually(lambda: world.gone)
    assert world.gone == [("b", "a", "peer_failed", "left before its last 3 chunks came")]


def test_a_receiver_that_lost_its_inbox_is_told_of(world: World) -> None:
    """Chunks that were reported exist nowhere any more: that must end, not be asked for in a circle."""
    a, b = world.pair()
    a.send("b", [b"reported"])
    take(b, ack=False)
    a.flush()
    crash(b)
    for path in (world.folder / "b" / "a" / "inbox").glob("*.log"):
        path.unlink()
    b = world.link("b")
    a.send("b", [b"next"])
    eventually(lambda: world.gone)
    assert world.gone[0][:3] == ("a", "b", "message_lost")
    quiet(b)


# --- life and death ---------------------------------------------------------------------------------------------


def test_silence_is_told_in_time_and_not_before(world: World) -> None:
    clock = Clock()
    timing = Timing(meet=300, silence=120, keepalive=30, probe=0.5, report=0.005)
    a, b = world.link("a", clock=clock, timing=timing), world.link("b", clock=clock, timing=timing)
    world.meet(a, b)
    crash(b)
    clock.now += 119
    time.sleep(0.03)
    assert world.gone == []
    waiting = run_aside(lambda: a.receive(None))
    clock.now += 2
    eventually(lambda: world.gone)
    assert world.gone == [("a", "b", "silent", "has given no sign of life for 121 s")]
    with pytest.raises(PeerFailed, match="cannot be sent to"):
        a.send("b", [b"x"])
    a.close()
    assert isinstance(waiting(), TransportClosed)


def test_a_send_that_waits_is_told_that_its_receiver_is_gone(world: World) -> None:
    clock = Clock()
    a, b = world.link("a", clock=clock, unreported=2 * CHUNK), world.link("b", clock=clock)
    world.meet(a, b)
    crash(b)
    waiting = run_aside(lambda: a.send("b", [bytes(50 * CHUNK)]))
    eventually(lambda: world.network.frames("a", "b", DATA))
    for _ in range(4):
        clock.now += 20
        time.sleep(0.02)
    assert isinstance(waiting(), PeerFailed)
    assert a._broken is None, "the others can still be talked to"


def test_without_a_connection_nobodys_silence_counts(world: World) -> None:
    clock = Clock()
    a, b = world.link("a", clock=clock), world.link("b", clock=clock)
    world.meet(a, b)
    crash(b)
    below = a._transport
    a._transport = Away(below)
    assert not a.connected
    time.sleep(0.05)  # the pump looks at the new one
    for _ in range(10):
        clock.now += 50
        time.sleep(0.02)
    assert world.gone == []
    # When the connection is there again, Then silence counts from then on
    a._transport = below
    time.sleep(0.05)
    clock.now += QUICK.silence + 1
    eventually(lambda: world.gone)
    assert world.gone[0][:3] == ("a", "b", "silent")


class Away:
    """A transport without a connection."""

    connected = False

    def __init__(self, transport: Any) -> None:
        self._transport = transport

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def test_two_idle_parties_hardly_speak_and_stay_alive(world: World) -> None:
    clock = Clock()
    timing = Timing(meet=300, silence=120, keepalive=30, probe=0.5, report=0.005)
    a, b = world.link("a", clock=clock, timing=timing), world.link("b", clock=clock, timing=timing)
    world.meet(a, b)
    goes_on(a, b)
    a.flush()
    b.flush()
    clock.now += 1
    time.sleep(0.05)
    before = reports(world, "a", "b") + reports(world, "b", "a")
    for _ in range(29):
        clock.now += 1
        time.sleep(0.002)
    assert reports(world, "a", "b") + reports(world, "b", "a") - before <= 2, "no storm"
    for _ in range(20):  # twenty times half a minute
        clock.now += 31
        heard = clock.now
        eventually(lambda heard=heard: all(p.heard >= heard for link in (a, b) for p in link._peers.values()))
    spoken = reports(world, "a", "b") + reports(world, "b", "a") - before
    assert 20 <= spoken <= 100, spoken
    assert world.gone == []


@pytest.mark.parametrize("dead", ["never came", "crashed"])
def test_closing_does_not_wait_for_the_dead_for_long(make_world: MakeWorld, dead: str) -> None:
    world = make_world()
    timing = Timing(meet=60, silence=60, keepalive=30, probe=0.03, report=0.005, linger=0.1)
    a = world.link("a", timing=timing)
    if dead == "crashed":
        b = world.link("b")
        world.meet(a, b)
        crash(b)
        a.send("b", [b"never reported"])
    closing = run_aside(lambda: a.close(finished=True))
    closing()
    assert [name for name in world.files() if name.startswith("a/")] == []
    with pytest.raises(TransportClosed):
        a.send("b", [b"x"])


def test_several_threads_may_close_at_once(world: World) -> None:
    for finished in (False, True):
        a, b = world.pair()
        goes_on(a, b)
        ends = [
            run_aside(lambda link=link, finished=finished: link.close(finished=finished))
            for link in (a, b)
            for _ in range(4)
        ]
        assert [end() for end in ends] == [None] * 8
    assert world.files() == []


def test_closing_wakes_who_waits(make_world: MakeWorld) -> None:
    world = make_world()
    a = world.link("a")
    waiting = [run_aside(lambda: a.receive(None)), run_aside(lambda: a.send("b", [b"x"]))]
    time.sleep(0.02)
    a.close()
    assert all(isinstance(end(), TransportClosed) for end in waiting)


def test_a_link_can_be_closed_when_its_transport_has_failed(world: World) -> None:
    a, _ = world.pair()
    a._transport.close()
    eventually(lambda: a._broken is not None)
    with pytest.raises(TransportClosed):
        a.receive(1.0)
    assert run_aside(lambda: a.close(finished=True))() is None
    world.link("a")  # the folder is free


def test_flush_says_what_is_and_forget_frees_it(world: World) -> None:
    a, b = world.pair()
    assert a.flush(0.0)
    crash(b)
    a.send("b", [b"x"])
    assert not a.flush(0.03)
    a.forget("b")
    assert a.flush(0.03)
    assert a.send("b", [b"said to nobody"]) == 14


def test_a_party_that_left_is_not_sent_to_and_not_called_silent(world: World) -> None:
    clock = Clock()
    a, b = world.link("a", clock=clock), world.link("b")
    world.meet(a, b)
    b.close(finished=True)
    eventually(lambda: a._peers["b"].left)
    clock.now += 1000
    time.sleep(0.03)
    assert world.gone == []
    before = len(world.network.seen)
    assert a.send("b", [bytes(1000)]) == 1000
    assert len(world.network.seen) == before


@pytest.mark.parametrize("callback", ["observer", "on_gone"])
def test_a_callback_that_fails_ends_the_link_by_name_and_nobody_hangs(make_world: MakeWorld, callback: str) -> None:
    def fails(*_: Any) -> None:
        raise KeyError("caller's mistake")

    world = make_world()
    clock = Clock()
    a, b = world.link("a", clock=clock, **{callback: fails}), world.link("b")
    world.meet(a, b)
    waiting = run_aside(lambda: a.receive(None))
    if callback == "observer":
        world.network.inject("b", "a", b"noise")
    else:
        crash(b)
        clock.now += 100
    end = waiting()
    assert isinstance(end, InternalError)
    assert "KeyError" in end.message


def test_a_link_may_be_closed_in_a_callback(make_world: MakeWorld) -> None:
    world = make_world()
    clock = Clock()
    links: list[SecureLink] = []
    links.append(world.link("a", clock=clock, on_gone=lambda *_: links[0].close()))
    b = world.link("b")
    world.meet(links[0], b)
    waiting = run_aside(lambda: links[0].receive(None))
    crash(b)
    clock.now += 100
    assert isinstance(waiting(), TransportClosed)


def test_a_send_to_nobody_and_one_too_large_are_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = world.pair()
    with pytest.raises(FederationError, match="not a party"):
        a.send("x", [b"x"])
    with pytest.raises(FederationError, match="not a party"):
        a.send("a", [b"x"])
    monkeypatch.setattr("fate_llm.protocols.link.link.LARGEST", 100)
    with pytest.raises(FederationError, match="at most 100"):
        a.send("b", [bytes(101)])
    a.send("b", [bytes(100)])
    assert len(take(b).body) == 100


# --- the disk ---------------------------------------------------------------------------------------------------


def full_disk(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    real = os.writev

    def writev(file: int, views: Sequence[memoryview]) -> int:
        if folder in Path(os.readlink(f"/proc/self/fd/{file}")).parents:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, views)

    monkeypatch.setattr(os, "writev", writev)


def test_a_receiver_with_a_full_disk_ends_by_name_and_acknowledges_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = world.pair()
    acked: list[bytes] = []
    real = b._transport.ack
    monkeypatch.setattr(b._transport, "ack", lambda d: (acked.append(bytes(d.body[4:5])), real(d)))
    waiting = run_aside(lambda: b.receive(None))
    with monkeypatch.context() as patch:
        full_disk(patch, world.folder / "b")
        a.send("b", [b"x" * 1000])
        end = waiting()
    assert isinstance(end, FederationError)
    assert "No space left" in end.message
    assert str(world.folder / "b") in end.message
    assert bytes([DATA]) not in acked
    # room was made: the next process has it all
    b.close()
    assert bytes(take(world.link("b")).body) == b"x" * 1000


def test_a_sender_with_a_full_disk_ends_by_name_and_goes_on_when_there_is_room(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = world.pair()
    a.send("b", [b"before"])
    with monkeypatch.context() as patch:
        full_disk(patch, world.folder / "a")
        with pytest.raises(FederationError, match="No space left"):
            a.send("b", [b"x" * 1000])
    with pytest.raises(FederationError):
        a.send("b", [b"nothing may follow half a message"])
    a.close()
    world.link("a").send("b", [b"after"])
    assert [bytes(take(b).body) for _ in range(2)] == [b"before", b"after"]


def test_a_session_that_cannot_be_saved_is_not_answered(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world()
    a = world.link("a")
    with monkeypatch.context() as patch:
        full_disk(patch, world.folder / "a")
        waiting = run_aside(lambda: a.receive(None))
        b = world.link("b")
        assert isinstance(waiting(), FederationError)
    assert not any(b"FLNK\x01\x02" in frame for frame in world.network.frames("a", "b", AGREE)), "no reply left"
    a.close()
    goes_on(world.link("a"), b)


def test_a_journal_that_does_not_open_is_refused_at_the_start_and_the_folder_let_go(world: World) -> None:
    a, b = world.pair()
    a.send("b", [b"x" * 50])
    take(b, ack=False)
    crash(b)
    (file,) = (world.folder / "b" / "a" / "inbox").glob("*.log")
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    for _ in range(2):  # the second time it is not the lock that is in the way
        with pytest.raises(BadSeal):
            world.link("b")


def test_senders_in_many_threads_and_reports_do_not_trip_over_each_other(world: World) -> None:
    a, b = world.pair()
    world.network.rule = None
    errors: list[FateError] = []

    def send(letter: int) -> None:
        try:
            for number in range(40):
                a.send("b", [bytes([letter, number]) * (number * 5)])
        except FateError as error:
            errors.append(error)

    threads = [threading.Thread(target=send, args=(letter,)) for letter in range(4)]
    stop = threading.Event()

    def ask() -> None:
        while not stop.wait(0.002):
            with contextlib.suppress(FateError):
                a._tell(a._peers["b"], ReportKind.PROBE)
                b._tell(b._peers["a"], ReportKind.ASK)

    threads.append(threading.Thread(target=ask))
    for thread in threads:
        thread.start()
    found = [bytes(take(b).body) for _ in range(160)]
    stop.set()
    for thread in threads:
        thread.join(10)
    assert errors == []
    for letter in range(4):
        mine = [body for body in found if body[:1] == bytes([letter])]
        assert mine == [bytes([letter, number]) * (number * 5) for number in range(1, 40)]


def test_the_transport_below_is_closed_with_the_link(world: World) -> None:
    a, _ = world.pair()
    assert isinstance(a._transport, MemoryTransport)
    a.close()
    assert a._transport._closed
