"""The doctor on real brokers: what is well, what is wrong, and that nothing of it stays."""

from __future__ import annotations

import itertools
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fate_llm.core.errors import BadEnvelope, BadSignature, BrokerLost, ConfigurationError, FederationError
from fate_llm.core.interfaces import Delivery
from fate_llm.protocols.broker_layout import control_inbox, control_key, exchange_of, job_inbox, job_key
from fate_llm.protocols.transports.rabbitmq import BrokerAddress, BrokerFacts, BrokerProbe, Refusal
from fate_llm.runtime.broker import BrokerNode
from fate_llm.runtime.doctor import CHECKS, Patient, examine
from fate_llm.runtime.doctor_broker import LARGEST_MESSAGE, Place, check_facts, percentiles
from fate_llm.runtime.doctor_network import (
    ManagementApi,
    Nodes,
    check_plugins,
    check_reachable,
    check_tls,
    read_nodes,
    skew_check,
)
from fate_llm.runtime.doctor_parties import Asker, Membership, answer_pings
from fate_llm.runtime.doctor_ping import LARGEST_PAYLOAD, PingFrame, Responder, is_ping_frame, verify_frame
from fate_llm.runtime.doctor_report import Check, Report, failed, ok, skipped, warning
from fate_llm.security.certificates import make_authority
from fate_llm.security.identity import Identity
from tests.brokers import (  # noqa: F401
    START,
    CutProxy,
    TlsBroker,
    broker,
    leftovers,
    live_federation,
    node_folder,
    require_rabbitmq,
    tls_broker,
    vhost,
)
from tests.runtime.granted import VERSION, Granted, granted, prefixed

A, B, C = prefixed()
SECONDS = 20.0  # for an answer on a busy machine; nothing that is well takes it
SILENT = 2.0  # for one that does not come
ASKER, ANSWERER = Identity(bytes(range(32))), Identity(bytes(range(1, 33)))
ROSTER = "ab" * 32
PINS = {"a": ASKER.public, "b": ANSWERER.public}


def by_name(report: Report) -> dict[str, Check]:
    found = {check.name: check for check in report.checks}
    assert len(found) == len(report.checks), "a check comes twice"
    return found


def statuses(report: Report) -> dict[str, str]:
    return {check.name: check.status for check in report.checks}


def patient(address: BrokerAddress, party: str, **options: Any) -> Patient:
    return Patient(address, party, **({"seconds": SECONDS} | options))


# --- the frame ---------------------------------------------------------------------------------------------------


def ping(**changes: Any) -> PingFrame:
    frame = PingFrame("ping", b"s" * 16, b"n" * 16, ROSTER, 17, VERSION, payload=b"twelve bytes", want=12)
    return replace(frame, **changes)


def sealed(frame: PingFrame | None = None, identity: Identity = ASKER, asker: str = "a", answerer: str = "b") -> bytes:
    return (frame or ping()).seal(identity, asker=asker, answerer=answerer)


@settings(deadline=None)
@given(
    kind=st.sampled_from(["ping", "answer"]),
    session=st.binary(min_size=16, max_size=16),
    nonce=st.binary(min_size=16, max_size=16),
    roster=st.binary(min_size=32, max_size=32),
    sent=st.integers(0, 2**63),
    payload=st.binary(max_size=300),
    version=st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=64),
)
def test_a_frame_comes_back_as_it_was(kind: Any, roster: bytes, **fields: Any) -> None:
    frame = PingFrame(kind, roster=roster.hex(), **fields)
    assert PingFrame.parse(sealed(frame)) == frame


@settings(deadline=None)
@given(st.binary(max_size=600))
def test_garbage_is_no_frame(noise: bytes) -> None:
    for body in (noise, sealed()[:8] + noise, sealed() + noise[:1] + b"x", sealed()[: len(noise)]):
        with pytest.raises(BadEnvelope):
            PingFrame.parse(body)


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, 200), bit=st.integers(0, 7))
def test_a_changed_bit_is_never_taken_for_what_was_signed(at: int, bit: int) -> None:
    body = bytearray(sealed())
    body[at % len(body)] ^= 1 << bit
    with pytest.raises((BadEnvelope, BadSignature)):
        PingFrame.parse(bytes(body))
        verify_frame(bytes(body), "ping", ASKER.public, asker="a", answerer="b")


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"want": 13}, "more than it brings"),
        ({"received": 1}, "has not"),
        ({"kind": "answer"}, "has not"),
        ({"payload": bytes(LARGEST_PAYLOAD + 1)}, "more than it brings"),
        ({"payload": bytes(LARGEST_PAYLOAD + 100)}, "no frame"),
        ({"version": "1.0\n"}, "printable"),
    ],
)
def test_a_frame_with_a_wrong_field_is_refused(changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(BadEnvelope, match=fault):
        PingFrame.parse(sealed(ping(**changes)))


def test_a_length_beyond_the_limit_is_refused_before_anything_is_taken() -> None:
    body = bytearray(sealed())
    struct.pack_into(">I", body, 93, 2**32 - 1)
    with pytest.raises(BadEnvelope):
        PingFrame.parse(bytes(body))
    assert PingFrame.parse(sealed(ping(payload=bytes(LARGEST_PAYLOAD), want=LARGEST_PAYLOAD))).want == LARGEST_PAYLOAD


@pytest.mark.parametrize(
    ("kind", "identity", "asker", "answerer"),
    [
        ("answer", ASKER, "a", "b"),
        ("ping", ANSWERER, "a", "b"),
        ("ping", ASKER, "b", "a"),
        ("ping", ASKER, "a", "c"),
        ("ping", ASKER, "ab", ""),
    ],
)
def test_a_signature_is_for_one_kind_and_two_parties(kind: str, identity: Identity, asker: str, answerer: str) -> None:
    verify_frame(sealed(), "ping", ASKER.public, asker="a", answerer="b")
    with pytest.raises(BadSignature):
        verify_frame(sealed(), kind, identity.public, asker=asker, answerer=answerer)


def test_only_the_doctor_s_frames_are_the_doctor_s() -> None:
    assert is_ping_frame(sealed())
    assert is_ping_frame(memoryview(sealed()))
    assert not any(is_ping_frame(body) for body in (b"", b"fate-dr", b"{}", sealed()[1:]))


# --- who answers -------------------------------------------------------------------------------------------------


class Hands:
    """Clocks that are set by hand."""

    def __init__(self) -> None:
        self.wall, self.tick = 1_000, 0.0


def responder(hands: Hands | None = None, identity: Identity = ANSWERER) -> Responder:
    held = hands or Hands()
    facts: dict[str, Any] = {"party": "b", "pins": PINS, "roster": ROSTER, "version": VERSION}
    return Responder(identity, clock=lambda: held.wall, ticks=lambda: held.tick, **facts)


def nonce(number: int) -> bytes:
    return number.to_bytes(16, "big")


@pytest.mark.parametrize("want", [0, 5, 12])
def test_an_answer_repeats_what_was_asked_for_and_is_signed(want: int) -> None:
    reply = responder().answer("a", sealed(ping(want=want)))
    assert reply is not None and (reply.receiver, reply.session) == ("a", b"s" * 16)
    verify_frame(reply.frame, "answer", ANSWERER.public, asker="a", answerer="b")
    found = PingFrame.parse(reply.frame)
    assert found == PingFrame(
        "answer", b"s" * 16, b"n" * 16, ROSTER, 1_000, VERSION, received=1_000, payload=b"twelve bytes"[:want]
    )


@pytest.mark.parametrize(
    ("sender", "body", "why"),
    [
        ("nobody", sealed(), "from nobody of the roster"),
        ("", sealed(), "from nobody of the roster"),
        ("b", sealed(identity=ANSWERER, asker="b"), "from nobody of the roster"),
        ("a", sealed(identity=ANSWERER), "not signed by the key that the roster pins"),
        ("a", sealed(answerer="c"), "not signed by the key that the roster pins"),
        ("a", b"fate-dr\x01", "not a ping"),
        ("a", sealed(ping(kind="answer", want=0)), "not a ping"),
        ("a", b"{}", "not a ping"),
    ],
)
def test_nothing_else_is_answered(sender: str, body: bytes, why: str) -> None:
    found = responder()
    assert found.answer(sender, body) is None
    assert found.counts == {why: 1}


def test_a_ping_is_answered_once() -> None:
    found = responder()
    assert found.answer("a", sealed()) is not None
    assert found.answer("a", sealed()) is None
    assert found.answer("a", sealed(ping(nonce=nonce(2)))) is not None
    assert found.counts == {"answered": 2, "seen before": 1}


def test_the_rate_is_bounded_by_number_and_comes_back() -> None:
    hands = Hands()
    found = responder(hands)
    for number in range(150):
        found.answer("a", sealed(ping(nonce=nonce(number))))
    assert found.counts == {"answered": 100, "too many": 50}
    hands.tick = 1.0
    for number in range(200, 250):
        found.answer("a", sealed(ping(nonce=nonce(number))))
    assert found.counts["answered"] == 120
    assert found.answer("a", sealed(ping(nonce=nonce(999)))) is None


def test_the_rate_is_bounded_by_bytes_and_before_anything_is_read() -> None:
    found, noise = responder(), bytes(LARGEST_PAYLOAD - 1000)
    for _ in range(40):
        found.answer("a", noise)
    assert found.counts == {"not a ping": 32, "too many": 8}
    assert found.answer("a", sealed()) is not None  # a small one still has room


# --- what an asker believes --------------------------------------------------------------------------------------


class Line:
    """Stands for the broker: `reply` makes what is delivered, as (sender, body), out of each ping that is published."""

    def __init__(self, reply: Callable[[bytes], list[tuple[str, bytes]]]) -> None:
        self.reply, self.waiting = reply, list[tuple[str, bytes]]()

    def publish(self, _exchange: str, key: str, body: bytes, *, expires: float) -> None:
        assert key == "b/control"
        assert SILENT <= expires <= 4 * SILENT  # a ping waits for nobody longer than its asker does
        self.waiting += self.reply(body)

    send = publish

    def receive(self, _timeout: float) -> Delivery | None:
        if not self.waiting:
            return None
        sender, body = self.waiting.pop(0)
        return Delivery(sender, memoryview(body), 0)

    def well(self, *_: Any, **__: Any) -> None:
        return None

    make_inbox = consume = bind = ack = close = well


def asked(reply: Callable[[bytes], list[tuple[str, bytes]]], monkeypatch: pytest.MonkeyPatch) -> dict[str, Check]:
    """What A finds out about B over such a line; its clock goes on by itself."""
    steps = itertools.count()
    monkeypatch.setattr(Place, "probe", lambda _: Line(reply))
    place = Place(plain(1), "a", ("b",), b"s" * 16, SILENT, ticks=lambda: next(steps) / 100)
    me = Membership("a", ASKER, PINS, ROSTER, VERSION)
    return {check.name: check for check in Asker(place, me, clock=lambda: 1_000).ask_all()}


def answer_to(body: bytes, identity: Identity = ANSWERER, **changes: Any) -> bytes:
    ping_of = PingFrame.parse(body)
    fields = {"nonce": ping_of.nonce, "payload": ping_of.payload[: ping_of.want]} | changes
    return PingFrame(
        "answer", ping_of.session, roster=ROSTER, sent=3_000, version=VERSION, received=2_000, **fields
    ).seal(identity, asker="a", answerer="b")


def test_an_honest_answer_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = asked(lambda body: [("b", answer_to(body))], monkeypatch)
    assert list(found) == [f"b: {what}" for what in ("answers", "round trip", "clock", "throughput")]
    assert {check.status for check in found.values()} == {"ok"}
    assert found["b: clock"].found.startswith("1.5e-06 s ahead")


@pytest.mark.parametrize(
    "reply",
    [
        lambda body: [],
        lambda body: [("b", b"garbage")],
        lambda body: [("b", body)],  # our own ping, sent back
        lambda body: [("c", answer_to(body))],  # signed right, by another party's exchange
        lambda body: [("", answer_to(body))],
        lambda body: [("b", answer_to(body, nonce=bytes(16)))],  # to nothing that was asked
    ],
)
def test_what_is_no_answer_is_silence(
    reply: Callable[[bytes], list[tuple[str, bytes]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = asked(reply, monkeypatch)
    assert list(found) == ["b: answers"] and found["b: answers"].status == "warning"


def test_an_answer_with_another_key_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    found = asked(lambda body: [("b", answer_to(body, identity=ASKER))], monkeypatch)
    assert list(found) == ["b: answers"] and found["b: answers"].status == "failed"
    assert "another key" in found["b: answers"].found


def test_one_answer_is_not_counted_for_two_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []

    def reply(body: bytes) -> list[tuple[str, bytes]]:
        """The first small one is right; after it, always that one again."""
        seen.append(answer_to(body))
        return [("b", seen[0])]

    found = asked(reply, monkeypatch)
    assert found["b: answers"].status == "ok"
    assert found["b: round trip"].status == "warning" and "10 of 10 pings" in found["b: round trip"].found


def test_an_answer_that_comes_late_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for: list[bytes] = []

    def reply(body: bytes) -> list[tuple[str, bytes]]:
        """The answer to the first ping comes together with the one to the third."""
        asked_for.append(body)
        first = [answer_to(asked_for[0])] if len(asked_for) == 3 else []
        return [("b", frame) for frame in (*first, *([] if len(asked_for) == 1 else [answer_to(body)]))]

    found = asked(reply, monkeypatch)
    assert {check.status for check in found.values()} == {"ok"} and len(found) == 4
    assert len(asked_for) == 2 + 10 + 8


def test_chunks_that_come_back_changed_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def reply(body: bytes) -> list[tuple[str, bytes]]:
        spoilt = bytes(PingFrame.parse(body).want)
        return [("b", answer_to(body, payload=spoilt))]

    found = asked(reply, monkeypatch)["b: throughput"]
    assert found.status == "warning" and "0 of 4" in found.found


# --- the report --------------------------------------------------------------------------------------------------


def test_a_report_is_complete_in_order_and_as_bad_as_its_worst() -> None:
    report = Report.complete([warning("b", "x", "y"), ok("extra", "z")], ["a", "b"], "later")
    assert report.checks == (skipped("a", "later"), warning("b", "x", "y"), ok("extra", "z"))
    assert report.status == "warning" and report.worst() == warning("b", "x", "y")
    assert list(report.counts().items()) == [("warning", 1), ("not checked", 1), ("ok", 1)]
    worse = Report((*report.checks, failed("c", "f", "d")))
    assert worse.status == "failed" and worse.worst() == failed("c", "f", "d")
    assert worse.as_dict()["checks"][3] == {"name": "c", "status": "failed", "found": "f", "do": "d"}
    well = Report((ok("a", "b"), skipped("c", "d")))
    assert well.status == "ok" and well.worst() is None


FACTS = BrokerFacts(
    "RabbitMQ",
    "3.12.1",
    "c",
    30,
    131072,
    ("basic.nack", "connection.blocked", "consumer_cancel_notify", "publisher_confirms"),
)


@pytest.mark.parametrize(
    ("changes", "name", "status"),
    [
        ({}, "", "ok"),
        ({"version": "3.10.8"}, "", "ok"),
        ({"version": "4.0.1"}, "", "ok"),
        ({"version": "3.9.27"}, "login", "warning"),
        ({"capabilities": ()}, "login", "failed"),
        ({"heartbeat": 0}, "heartbeat", "warning"),
        ({"heartbeat": 61}, "heartbeat", "warning"),
        ({"heartbeat": 60}, "", "ok"),
        ({"frame_max": 4096}, "frame_max", "warning"),
    ],
)
def test_what_a_broker_says_of_itself_is_judged(changes: dict[str, Any], name: str, status: str) -> None:
    found = {check.name: check for check in check_facts(replace(FACTS, **changes))}
    assert list(found) == ["login", "heartbeat", "frame_max"]
    assert {one for one, check in found.items() if check.status != "ok"} == ({name} if name else set())
    assert not name or (found[name].status == status and found[name].do)


def test_percentiles_are_in_ms() -> None:
    assert percentiles([0.001] * 99 + [0.5]) == "median 1.00 ms, 99th percentile 500.00 ms"
    assert percentiles([0.002]) == "median 2.00 ms, 99th percentile 2.00 ms"


@pytest.mark.parametrize(
    ("skew", "sure", "status"), [(29, 1, "ok"), (-29, 1, "ok"), (32, 1, "warning"), (-32, 1, "warning"), (40, 20, "ok")]
)
def test_clocks_may_differ_by_half_a_minute(skew: float, sure: float, status: str) -> None:
    found = skew_check("clock", skew, sure=sure)
    assert found.status == status and ("behind" in found.found) == (skew < 0) and bool(found.do) == (status != "ok")


@pytest.mark.parametrize(
    ("nodes", "linked", "status"),
    [
        (None, True, "not checked"),
        (Nodes("away"), True, "not checked"),
        (Nodes(plugins=frozenset({"rabbitmq_management"})), False, "ok"),
        (Nodes(plugins=frozenset({"rabbitmq_management"})), True, "failed"),
        (Nodes(plugins=frozenset({"rabbitmq_federation"})), True, "ok"),
    ],
)
def test_plug_ins_are_needed_for_links_only(nodes: Nodes | None, linked: bool, status: str) -> None:
    assert check_plugins(nodes, linked=linked).status == status


# --- TCP, TLS, management ----------------------------------------------------------------------------------------


def plain(port: int, user: str = "guest", password: str = "guest", others: str = "") -> BrokerAddress:
    return BrokerAddress.from_url(f"amqp://{user}:{password}@127.0.0.1:{port}{others}/%2F?plaintext=loopback")


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield int(listener.getsockname()[1])


def test_no_broker_is_said_at_once_and_nothing_else_is_tried(closed_port: int) -> None:
    report = examine(patient(plain(closed_port), "guest"))
    found = by_name(report)
    assert report.status == "failed" and tuple(found) == CHECKS
    assert found["reachable"].status == "failed" and f"127.0.0.1:{closed_port}" in found["reachable"].found
    assert {check.status for name, check in found.items() if name != "reachable"} == {"not checked"}
    assert "reachable" in found["login"].found


def test_one_node_of_several_is_enough_for_a_warning(closed_port: int, silent_port: int) -> None:
    found, node = check_reachable(
        plain(closed_port, others=f",127.0.0.1:{silent_port}"), seconds=SECONDS, ticks=time.monotonic
    )
    assert found.status == "warning" and node == 1


def test_what_listens_and_is_no_broker_is_a_failed_login(silent_port: int) -> None:
    found = by_name(examine(patient(plain(silent_port), "guest", seconds=SILENT)))
    assert found["reachable"].status == "ok" and found["login"].status == "failed"


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("http://monitor:secret@broker.example:15672", "in clear"),
        ("ftp://monitor:secret@127.0.0.1", "not the URL"),
        ("https://monitor:secret@127.0.0.1/other", "not the URL"),
        ("https://monitor:secret@127.0.0.1:port", "no URL"),
    ],
)
def test_a_wrong_management_url_is_refused_without_its_password(url: str, fault: str) -> None:
    with pytest.raises(ConfigurationError, match=fault) as caught:
        ManagementApi.from_url(url, plain(1))
    assert "secret" not in str(caught.value) + caught.value.hint


def test_the_management_api_is_asked_as_who_the_url_says() -> None:
    found = ManagementApi.from_url("https://monitor:p%40ss@broker.example", plain(1))
    assert (found.user, found.password, found.port, found.tls) == ("monitor", "p@ss", 15671, True)
    assert "p@ss" not in repr(found)
    other = ManagementApi.from_url("http://127.0.0.1:1234/api", plain(1, "me", "mine"))
    assert (other.user, other.password, other.port, other.tls) == ("me", "mine", 1234, False)


class Api:
    """A management API that says what a test wants, once for each call; `asked` is what it was asked."""

    def __init__(self, *answers: bytes) -> None:
        self.answers, self.asked = list(answers), list[bytes]()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        for answer in self.answers:
            with self._listener.accept()[0] as line:
                self.asked.append(line.recv(65536))
                line.sendall(answer)

    def close(self) -> None:
        self._thread.join(10)
        self._listener.close()
        assert not self._thread.is_alive()


def http(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", "connection: close", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def nodes_of(answer: bytes, clock: Callable[[], float] = lambda: 0.0) -> tuple[Nodes, list[bytes]]:
    api = Api(answer)
    try:
        asked_as = ManagementApi.from_url(f"http://monitor:geheim@127.0.0.1:{api.port}", plain(1))
        return read_nodes(asked_as, plain(1), seconds=SECONDS, clock=clock), api.asked
    finally:
        api.close()


ONE = b'[{"name": "n1", "running": true, "enabled_plugins": ["rabbitmq_federation", "rabbitmq_shovel"]'


@pytest.mark.parametrize(
    ("rest", "plugins", "alarms"),
    [
        (b"}]", {"rabbitmq_federation", "rabbitmq_shovel"}, ()),
        (b', "mem_alarm": true, "disk_free_alarm": false}]', None, ("memory at n1",)),
        (b'}, {"name": "n2", "enabled_plugins": ["rabbitmq_shovel"]}]', {"rabbitmq_shovel"}, ()),
        (b'}, {"name": "n2"}]', "unknown", ()),
        (b'}, {"name": "n2", "running": false}]', {"rabbitmq_federation", "rabbitmq_shovel"}, ("n2 does not run",)),
    ],
)
def test_what_all_nodes_have_and_any_node_lacks(rest: bytes, plugins: Any, alarms: tuple[str, ...]) -> None:
    found, (request,) = nodes_of(http(ONE + rest, "200 OK", "date: Thu, 01 Jan 1970 00:01:00 GMT"), lambda: 59.0)
    assert not found.fault and found.alarms == alarms and found.skew == 1.5
    if plugins == "unknown":
        assert found.plugins is None
    elif plugins is not None:
        assert found.plugins == plugins
    assert request.startswith(b"GET /api/nodes ") and b"geheim" not in request  # base64 of it


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"", "does not answer"),
        (b"AMQP\x00\x00\x09\x01", "does not answer"),
        (http(b"no JSON"), "does not answer"),
        (http(b"[" * 100_000), "does not answer"),
        (http(b'{"a": 1}'), "lists no node"),
        (http(b"[1, null]"), "lists no node"),
        (http(b"[]", "200 OK", "date: yesterday"), "does not answer"),
        (http(b"", "302 Found", "location: http://127.0.0.1:1/"), "says 302"),
        (http(b"", "500 Oh"), "says 500"),
    ],
)
def test_an_api_that_talks_nonsense_is_a_fault_and_no_crash(answer: bytes, words: str) -> None:
    found, asked_for = nodes_of(answer)
    assert words in found.fault and "geheim" not in found.fault and len(asked_for) == 1
    assert check_plugins(found, linked=True).status == "not checked"


def test_a_roster_s_parties_are_named_when_nothing_can_be_asked(closed_port: int) -> None:
    me = Membership("a", ANSWERER, {**PINS, "c": Identity(bytes(32)).public}, ROSTER, VERSION)
    report = examine(patient(plain(closed_port), "a", me=me))
    assert [check.name for check in report.checks] == ["identity", *CHECKS, "b: answers", "c: answers"]
    found = by_name(report)
    assert found["identity"].status == "failed" and found["b: answers"].status == "not checked"


@pytest.mark.slow
def test_the_management_api_tells_plug_ins_and_clock(broker: BrokerNode) -> None:  # noqa: F811
    address = plain(broker.port)
    api = ManagementApi.from_url(broker.management_url(), address)
    found = read_nodes(api, address, seconds=SECONDS, clock=time.time)
    for _ in range(300):  # its first figures come some seconds after a start
        if found.plugins is not None:
            break
        assert check_plugins(found, linked=True).status == "not checked"
        time.sleep(0.1)
        found = read_nodes(api, address, seconds=SECONDS, clock=time.time)
    assert not found.fault and found.plugins is not None and "rabbitmq_management" in found.plugins and not found.alarms
    assert found.skew is not None and abs(found.skew) < 20
    late = read_nodes(api, address, seconds=SECONDS, clock=lambda: time.time() + 3600)
    assert late.skew is not None and skew_check("clock", late.skew, sure=0.6).status == "warning"
    wrong = read_nodes(replace(api, password="secret"), address, seconds=SECONDS, clock=time.time)
    assert "401" in wrong.fault and "secret" not in wrong.fault
    away = read_nodes(replace(api, port=broker.port), address, seconds=SILENT, clock=time.time)
    assert "does not answer" in away.fault


@pytest.mark.slow
def test_the_right_authority_verifies_and_the_days_are_counted(tls_broker: TlsBroker) -> None:  # noqa: F811
    address = BrokerAddress.from_url(tls_broker.node.tls_url(), ca_file=str(tls_broker.ca))
    soon = by_name(examine(patient(address, "guest")))
    assert soon["tls"].status == "warning" and "TLSv1.3" in soon["tls"].found and "days" in soon["tls"].found
    assert soon["login"].status == "ok"
    before = check_tls(address, 0, seconds=SECONDS, now=time.time() - 60 * 86400)
    assert before.status == "ok" and not before.do


@pytest.mark.slow
def test_the_wrong_authority_or_name_fails_and_nothing_is_said_to_that_broker(
    tls_broker: TlsBroker,  # noqa: F811
    tmp_path: Path,
) -> None:
    stranger = make_authority("test authority", now=datetime.now(UTC), days=2)
    (tmp_path / "ca.pem").write_bytes(stranger.pair.certificate)
    wrong = BrokerAddress.from_url(tls_broker.node.tls_url(), ca_file=str(tmp_path / "ca.pem"))
    right = BrokerAddress.from_url(tls_broker.node.tls_url(), ca_file=str(tls_broker.ca))
    for address in (wrong, replace(right, server_name="elsewhere.example")):
        found = by_name(examine(patient(address, "guest")))
        assert found["tls"].status == "failed" and "does not verify" in found["tls"].found and found["tls"].do
        assert found["login"].status == "not checked"
    plainly = check_tls(replace(right, port=tls_broker.node.port), 0, seconds=SECONDS, now=time.time())
    assert plainly.status == "failed" and "no TLS" in plainly.found


# --- a development broker ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_development_broker_does_and_is_said_to_allow_too_much(broker: BrokerNode, vhost: str) -> None:  # noqa: F811
    address = BrokerAddress.from_url(broker.url(vhost=vhost) + "?plaintext=loopback")
    api = ManagementApi.from_url(broker.management_url(), address)
    report = examine(patient(address, "guest", management=api))
    found = by_name(report)
    assert report.status == "warning" and tuple(found) == CHECKS
    assert {name for name, check in found.items() if check.status != "ok"} - {"plugins"} == {
        *("tls", "exchange", "refusals"),
    }
    for what in ("default exchange", "another party's exchange", "key #", "another party's key", "inbox for another"):
        assert what in found["refusals"].found
    assert "another's name" not in found["refusals"].found
    assert "NO TLS" in found["tls"].found and "--party guest" in found["refusals"].do
    assert str(LARGEST_MESSAGE) in found["largest_message"].found and "16 of 16 chunks" in found["throughput"].found
    assert leftovers(broker, vhost) == {"queues": [], "exchanges": [], "connections": []}


@pytest.mark.slow
def test_a_wrong_password_or_virtual_host_is_a_failed_login(broker: BrokerNode) -> None:  # noqa: F811
    for address in (plain(broker.port, password="secret"), replace(plain(broker.port), vhost="missing")):
        report = examine(patient(address, "guest"))
        found = by_name(report)
        assert found["login"].status == "failed" and found["login"].do and report.status == "failed"
        assert found["permissions"].status == "not checked" and "secret" not in str(report.as_dict())


# --- a broker that is short of something -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tight() -> Iterator[BrokerNode]:
    require_rabbitmq()
    with node_folder() as folder:
        node = BrokerNode(folder / "tight", name="tight", config={"max_message_size": "1048576"})
        try:
            yield node.start(START)
        finally:
            node.kill()


@pytest.mark.slow
def test_a_limit_below_a_chunk_is_told(tight: BrokerNode) -> None:
    found = by_name(examine(patient(plain(tight.port), "guest")))["largest_message"]
    assert found.status == "failed" and "the limit is 1048576 bytes" in found.found and "max_message_size" in found.do
    assert leftovers(tight)["queues"] == leftovers(tight)["exchanges"] == []


@pytest.mark.slow
def test_an_alarm_is_told_and_nothing_is_published_into_it(tight: BrokerNode) -> None:
    tight.ctl("set_vm_memory_high_watermark", "0.0000001")
    try:
        report = examine(patient(plain(tight.port), "guest", seconds=SILENT))
        found = by_name(report)
        assert found["alarms"].status == "failed" and "memory" in found["alarms"].found and report.status == "failed"
        assert {found[name].status for name in ("permissions", "largest_message", "throughput")} == {"not checked"}
    finally:
        tight.ctl("set_vm_memory_high_watermark", "0.4")
    again = by_name(examine(patient(plain(tight.port), "guest")))
    assert again["alarms"].status == "ok" and again["permissions"].status == "ok"
    assert leftovers(tight) == {"queues": [], "exchanges": [], "connections": []}


# --- parties that were granted their places ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(broker: BrokerNode, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Granted]:  # noqa: F811
    with granted(broker, tmp_path_factory.mktemp("granted"), (A, B, C)) as found:
        yield found


@pytest.fixture(autouse=True)
def as_it_was(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test did with a granted place: the standing inboxes stay, empty, and nothing else."""
    yield
    if "place" in request.fixturenames:
        found: Granted = request.getfixturevalue("place")
        for party in (A, B, C):
            found.grant(party)
        there = leftovers(found.node, found.vhost)
        assert there["queues"] == sorted(control_inbox(party) for party in (A, B, C))
        assert there["exchanges"] == sorted(exchange_of(party) for party in (A, B, C))


@pytest.mark.slow
def test_a_granted_party_has_what_it_needs_and_no_more(place: Granted) -> None:
    report = examine(patient(place.address(A), A))
    assert {name for name, status in statuses(report).items() if status == "ok"} >= {
        *("exchange", "permissions", "refusals", "largest_message", "round_trip", "throughput"),
    }
    assert "7 things" in by_name(report)["refusals"].found


ONLY_OWN = r"^fate\.to\.PARTY/.*$"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "name", "words"),
    [
        ({"configure": "^$"}, "permissions", "may not make an inbox"),
        ({"write": "^$"}, "permissions", "may not bind"),
        ({"write": ONLY_OWN}, "permissions", "may not publish"),
        ({"read": "^$"}, "permissions", "may not bind"),
        ({"read": r"^fate\.from\..*$"}, "permissions", "may not read"),
    ],
)
def test_a_permission_that_is_missing_is_named(place: Granted, changes: dict[str, str], name: str, words: str) -> None:
    place.permit(A, **{key: value.replace("PARTY", A) for key, value in changes.items()})
    report = examine(patient(place.address(A), A))
    found = by_name(report)[name]
    assert found.status == "failed" and words in found.found and f"--party {A}" in found.do
    assert statuses(report)["round_trip"] == statuses(report)["throughput"] == "not checked"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"configure": ".*"}, ["make an inbox for another party"]),
        ({"write": ".*"}, ["publish to the default exchange"]),
        ({"read": ".*"}, ["read another party's inbox"]),
    ],
)
def test_a_permission_too_many_is_named(place: Granted, changes: dict[str, str], words: list[str]) -> None:
    place.permit(A, **changes)
    report = examine(patient(place.address(A), A, me=place.me(A), seconds=SILENT))
    found = by_name(report)["refusals"]
    assert found.status == "warning" and all(word in found.found for word in words)
    assert "another's name" not in found.found and statuses(report)["permissions"] == "ok"


@pytest.mark.slow
def test_a_party_without_its_exchange_is_sent_to_its_operator(place: Granted, broker: BrokerNode) -> None:  # noqa: F811
    found = by_name(examine(patient(place.address(A), "bank-z")))
    assert found["exchange"].status == "failed" and "--party bank-z" in found["exchange"].do


# --- the other parties -------------------------------------------------------------------------------------------


def look(place: Granted, **options: Any) -> dict[str, Check]:
    me = options.pop("me", None) or place.me(A)
    return by_name(examine(patient(place.address(A), A, me=me, **options)))


@pytest.mark.slow
def test_one_party_answers_and_one_is_silent(place: Granted) -> None:
    # Given B answers and C does not
    with place.answering(place.me(B), ahead=120) as answerer:
        # When A looks at the federation
        found = look(place, seconds=5.0)
    # Then B's answers are measured, and C is named
    assert found["identity"].status == "ok" and found[f"{B}: answers"].status == "ok"
    assert VERSION in found[f"{B}: answers"].found and "median" in found[f"{B}: round trip"].found
    assert "there and back" in found[f"{B}: throughput"].found and found[f"{B}: throughput"].status == "ok"
    assert found[f"{B}: clock"].status == "warning" and "ahead" in found[f"{B}: clock"].found
    assert found[f"{C}: answers"].status == "warning" and "--answer" in found[f"{C}: answers"].do
    assert [name for name in found if name.startswith(C)] == [f"{C}: answers"]
    assert set(answerer.counts) == {"answered"} and answerer.counts["answered"] >= 19


@pytest.mark.slow
def test_a_party_with_another_key_than_the_roster_pins_has_failed(place: Granted) -> None:
    stranger = place.me(B, identity=Identity.generate())
    with place.answering(stranger):
        found = look(place, seconds=SILENT)
    assert found[f"{B}: answers"].status == "failed"
    assert "answers with another key than the roster pins" in found[f"{B}: answers"].found
    assert f"{B}: throughput" not in found


@pytest.mark.slow
def test_another_roster_or_version_is_told_apart_from_a_wrong_key(place: Granted) -> None:
    with place.answering(place.me(B, roster="cd" * 32)), place.answering(place.me(C, version="9.0")):
        found = look(place)
    assert found[f"{B}: answers"].status == "failed" and "another roster" in found[f"{B}: answers"].found
    assert found[f"{C}: answers"].status == "warning" and "9.0" in found[f"{C}: answers"].found


@pytest.mark.slow
def test_our_own_wrong_key_is_told_and_gets_no_answer(place: Granted) -> None:
    with place.answering(place.me(B)) as answerer:
        found = look(place, me=place.me(A, identity=Identity.generate()), seconds=SILENT)
    assert found["identity"].status == "failed" and found[f"{B}: answers"].status == "warning"
    assert set(answerer.counts) == {"not signed by the key that the roster pins"}


@pytest.mark.slow
def test_a_party_without_an_inbox_cannot_be_reached(place: Granted, broker: BrokerNode) -> None:  # noqa: F811
    probe = BrokerProbe(BrokerAddress.from_url(broker.url(vhost=place.vhost) + "?plaintext=loopback"))
    probe.delete_inbox(control_inbox(C))
    probe.close()
    found = look(place, seconds=SILENT)[f"{C}: answers"]
    assert found.status == "failed" and "no inbox" in found.found and f"--party {C}" in found.do


@pytest.mark.slow
def test_what_waits_for_the_service_is_left_for_it(place: Granted) -> None:
    sender, reader = BrokerProbe(place.address(A)), BrokerProbe(place.address(B))
    for number in range(3):
        assert sender.publish(exchange_of(A), control_key(B), b"%d" % number) is None
    with place.answering(place.me(B)):
        assert look(place, seconds=5.0)[f"{B}: answers"].status == "ok"
        assert reader.consumers(control_inbox(B)) == 1
    assert reader.consume(control_inbox(B)) is None
    bodies: list[bytes] = []
    while len(bodies) < 3 and (delivery := reader.receive(SECONDS)) is not None:
        bodies.append(bytes(delivery.body))
        reader.ack(delivery)
    assert bodies == [b"0", b"1", b"2"]
    sender.close()
    reader.close()


@pytest.mark.slow
def test_there_is_one_that_answers(place: Granted) -> None:
    other = Responder(
        ANSWERER, party=B, pins=PINS, roster=ROSTER, version="1", clock=time.time_ns, ticks=time.monotonic
    )
    options: dict[str, Any] = {"party": B, "seconds": SECONDS, "going": lambda: False, "ready": lambda: None}
    with place.answering(place.me(B)), pytest.raises(ConfigurationError, match="already"):
        answer_pings(place.address(B), other, **options)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        answer_pings(place.address(A), other, **options)


@pytest.mark.slow
def test_an_inbox_that_is_deleted_ends_the_answering(place: Granted) -> None:
    """By an operator: the doctor does not sit there and seem to answer."""
    probe = BrokerProbe(BrokerAddress.from_url(place.node.url(vhost=place.vhost) + "?plaintext=loopback"))
    other = Responder(
        ANSWERER, party=B, pins=PINS, roster=ROSTER, version="1", clock=time.time_ns, ticks=time.monotonic
    )
    with pytest.raises(BrokerLost) as caught:
        answer_pings(
            place.address(B),
            other,
            party=B,
            seconds=SECONDS,
            going=lambda: True,
            ready=lambda: None if probe.delete_inbox(control_inbox(B)) is None else pytest.fail("it stays"),
        )
    probe.close()
    assert "deleted" in caught.value.hint


@pytest.mark.slow
def test_too_much_that_waits_for_the_service_ends_the_answering(place: Granted) -> None:
    sender = BrokerProbe(place.address(A))
    assert sender.consume(control_inbox(A)) is None
    for _ in range(130):
        sender.send(exchange_of(A), control_key(B), b"work", expires=5)
    sender.close()
    other = Responder(
        ANSWERER, party=B, pins=PINS, roster=ROSTER, version="1", clock=time.time_ns, ticks=time.monotonic
    )
    with pytest.raises(FederationError, match="wait for the service"):
        answer_pings(place.address(B), other, party=B, seconds=SECONDS, going=lambda: True, ready=lambda: None)


@pytest.mark.slow
def test_a_broker_lost_on_the_way_is_told(place: Granted) -> None:
    with CutProxy(place.node.port) as proxy:
        address = replace(place.address(A), port=proxy.port)
        ticks: Callable[[], float] = time.monotonic
        count = [0]

        def cutting() -> float:
            count[0] += 1
            if count[0] == 40:  # in the middle of the round trips
                proxy.cut()
                proxy.drop_connections()
            return ticks()

        whole = patient(address, A, seconds=SILENT)
        found = examine(replace(whole, clocks=replace(whole.clocks, ticks=cutting)))
    # Then it is told, and what may be left is named, to be removed by the broker itself
    checks = by_name(found)
    assert found.status == "failed" and any(check.status == "failed" for check in checks.values())
    left = checks["cleaning up"]
    assert left.status == "warning" and "ten minutes" in left.do
    probe = BrokerProbe(place.address(A))
    for queue in leftovers(place.node, place.vhost)["queues"]:
        if "doctor" in queue:
            assert queue in left.found
            probe.delete_inbox(queue)
    probe.close()


# --- the probe ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_no_leaves_the_probe_usable(place: Granted) -> None:
    probe = BrokerProbe(place.address(A), limit=SECONDS)
    refused = probe.exchange_is_there("fate.from.missing")
    assert isinstance(refused, Refusal) and refused.code == 404
    assert probe.exchange_is_there(exchange_of(A)) is None
    assert probe.publish(exchange_of(A), f"{A}/nobody", b"") == Refusal(312, "no inbox takes it")
    assert (probe.facts.product, probe.facts.heartbeat, probe.blocked) == ("RabbitMQ", 30, "")
    probe.close()
    probe.close()


@pytest.mark.slow
def test_looking_into_an_inbox_takes_nothing_out_of_it(place: Granted) -> None:
    sender, reader = BrokerProbe(place.address(A)), BrokerProbe(place.address(B))
    assert sender.publish(exchange_of(A), control_key(B), b"work") is None
    assert reader.look_into(control_inbox(B)) is None
    assert reader.consumers(control_inbox(B)) == 0
    assert reader.consume(control_inbox(B)) is None
    delivery = reader.receive(SECONDS)
    assert delivery is not None and (delivery.sender, bytes(delivery.body)) == (A, b"work")
    reader.ack(delivery)
    assert reader.receive(0.01) is None
    assert isinstance(reader.consumers("missing"), Refusal)
    for probe in (sender, reader):
        probe.close()
        with pytest.raises(BrokerLost):
            probe.exchange_is_there(exchange_of(A))


@pytest.mark.slow
def test_a_message_that_waited_too_long_is_gone(place: Granted) -> None:
    sender, reader = BrokerProbe(place.address(A)), BrokerProbe(place.address(A))
    inbox, key = job_inbox(A, "waits"), job_key(A, "waits")
    assert sender.make_inbox(inbox, expires=SECONDS) is None and sender.bind(inbox, exchange_of(A), key) is None
    assert sender.publish(exchange_of(A), key, b"short", expires=0.2) is None
    assert sender.publish(exchange_of(A), key, b"long", expires=600) is None
    time.sleep(1)
    assert reader.consume(inbox) is None
    delivery = reader.receive(SECONDS)
    reader.close()
    assert sender.delete_inbox(inbox) is None
    sender.close()
    assert delivery is not None and bytes(delivery.body) == b"long"


# --- a broker for each party -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_ping_goes_over_the_link_between_two_brokers() -> None:
    with live_federation("left", "right") as live:
        place = {}
        for party in ("left", "right"):
            settings_of = live.party(party)
            place[party] = BrokerAddress.from_url(settings_of.broker_url(), password=settings_of.load_password())
        roster = live.federation

        def me(party: str) -> Membership:
            identity = live.party(party).load_identity()
            return Membership(party, identity, roster.identities(), roster.digest(), VERSION)

        helper = Granted(live.node("right"), None, live.folder)  # type: ignore[arg-type]
        helper.address = lambda party, password=None: place[party]  # type: ignore[method-assign]
        with helper.answering(me("right")):
            report = examine(patient(place["left"], "left", me=me("left"), linked=True))
        found = by_name(report)
        assert found["right: answers"].status == "ok", found["right: answers"]
        assert found["right: throughput"].status == "ok" and found["tls"].status == "ok"
        assert {check.status for name, check in found.items() if name not in ("plugins", "clock")} == {"ok"}
        for party in ("left", "right"):
            queues = leftovers(live.node(party), roster.vhost)["queues"]
            assert not [name for name in queues if "doctor" in name]
