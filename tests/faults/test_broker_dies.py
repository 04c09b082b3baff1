"""The broker ends without a word, is restarted, or takes nothing for a while."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from fate_llm.core.errors import BrokerLost
from fate_llm.runtime.broker import BrokerNode
from tests.brokers import leftovers

from .links import MIB, CutProxy, Pair, Timing, content, digest, loopback, nothing_on, start, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]
CHUNK = 2 * MIB


def test_killed_in_the_middle_of_256_mib_and_started_again(node: BrokerNode, pairs: Callable[..., Pair]) -> None:
    # Given a transfer of which a quarter has come
    pair = pairs(loopback(node.url()))
    body = content(1, 256 * MIB)
    sending = start(pair.links["a"].send, "b", [body])
    until(lambda: (p := pair.links["b"].progress("a")) and p.received > 64 * MIB, 60, pair.story)
    # When the broker dies as in a power cut, and comes back on its data
    node.kill()
    until(lambda: not pair.transports["a"].connected and not pair.transports["b"].connected, 10, pair.story)
    assert not sending.done()
    node.start(120)
    # Then the message comes whole, once
    received = pair.take("b", 90)
    assert digest(received.body) == digest(body)
    sending.result(30)
    counters = pair.transports["a"].counters, pair.links["a"].counters["b"]
    assert counters[0].reconnects >= 1 and pair.transports["b"].counters.reconnects >= 1
    # What went again is what was not confirmed: the transport's window, and what the link asked for
    assert counters[0].published - counters[0].confirmed - counters[0].returned <= 8
    assert counters[1].chunks_sent_again * CHUNK <= 32 * CHUNK
    assert pair.links["b"].counters["a"].messages_received == 1
    assert pair.links["b"].counters["a"].bytes_received == len(body)
    assert pair.links["b"].counters["a"].refused == 0
    assert not pair.gone
    pair.echo()
    pair.finish()
    nothing_on(node)


def test_restarted_between_messages(node: BrokerNode, pairs: Callable[..., Pair]) -> None:
    pair = pairs(loopback(node.url()))
    pair.echo(b"before")
    node.stop()
    until(lambda: not pair.transports["a"].connected and not pair.transports["b"].connected, 10, pair.story)
    sending = start(pair.links["a"].send, "b", [b"while it is away"])
    node.start(120)
    assert bytes(pair.take("b", 30).body) == b"while it is away"
    sending.result(10)
    pair.echo(b"after")
    assert pair.events("broker_away", "a") and pair.events("broker_back", "a")
    assert not pair.gone
    pair.finish()
    nothing_on(node)


def test_a_broker_that_stays_away_ends_everybody_in_time(node: BrokerNode, pairs: Callable[..., Pair]) -> None:
    pair, patient = pairs(loopback(node.url()), outage=2.0), pairs(loopback(node.url()))
    pair.echo()
    try:
        node.kill()
        began = time.monotonic()
        for party in "ab":
            with pytest.raises(BrokerLost, match=r"away for 2 s.*") as caught:
                pair.links[party].receive(30)
            assert "guest:guest" not in str(caught.value) and caught.value.hint
            with pytest.raises(BrokerLost):
                pair.links[party].send("b" if party == "a" else "a", [b"x"])
        assert 1.5 < time.monotonic() - began < 10
        began = time.monotonic()
        for link in [*pair.links.values(), *patient.links.values()]:
            link.close()
        assert time.monotonic() - began < 5, "those that still try to connect end at once, too"
    finally:
        node.start(120)
    for queue in leftovers(node)["queues"]:
        node.ctl("delete_queue", queue)
    nothing_on(node)


@pytest.fixture
def alarm(node: BrokerNode) -> Iterator[Callable[[str, bool], None]]:
    """Raise or end an alarm of the node: of its memory, or of its disk."""

    def switch(kind: str, on: bool) -> None:
        if kind == "memory":
            node.ctl("set_vm_memory_high_watermark", "0.00001" if on else "0.4")
        else:
            node.ctl("set_disk_free_limit", "9000000GB" if on else "50MB")

    yield switch
    for kind in ("memory", "disk"):
        switch(kind, False)


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_an_alarm_blocks_and_passes(
    node: BrokerNode, pairs: Callable[..., Pair], alarm: Callable[[str, bool], None], kind: str
) -> None:
    # Given parties that call a silent peer gone after three seconds
    with CutProxy(node.port) as proxy:
        timing = Timing(meet=30.0, silence=3.0, keepalive=1.0, probe=0.5, report=0.05, linger=10.0)
        pair = pairs(loopback(node.url(), port=proxy.port, heartbeat=1), loopback(node.url()), timing=timing)
        body = content(2, 64 * MIB)
        pair.echo()
        # When the broker takes nothing for longer than that, in the middle of a transfer
        proxy.bandwidth = 8 * MIB
        sending = start(pair.links["a"].send, "b", [body])
        until(lambda: pair.links["b"].progress("a"), 30, pair.story)
        alarm(kind, True)
        until(lambda: pair.transports["a"].counters.blocked, 20, pair.story)
        assert not pair.transports["a"].connected
        before = pair.transports["a"].counters.confirmed
        time.sleep(6.0)
        assert not sending.done()
        assert pair.transports["a"].counters.confirmed - before <= 8  # what was on its way
        proxy.bandwidth = None
        alarm(kind, False)
        # Then it goes on, and nobody was given up meanwhile
        assert digest(pair.take("b", 60).body) == digest(body)
        sending.result(30)
        assert not pair.gone
        assert pair.events("broker_blocks", "a") and pair.events("broker_unblocks", "a")
        assert pair.transports["a"].counters.reconnects == 0, pair.story()
        assert pair.links["b"].counters["a"].messages_received == 2
        pair.echo()
        pair.finish()
    nothing_on(node)


def test_closing_does_not_wait_for_a_broker_that_takes_nothing(
    node: BrokerNode, pairs: Callable[..., Pair], alarm: Callable[[str, bool], None]
) -> None:
    timing = Timing(meet=30.0, silence=60.0, keepalive=1.0, probe=0.5, report=0.05, linger=1.0)
    pair = pairs(loopback(node.url()), timing=timing)
    pair.echo()
    alarm("memory", True)
    sending = start(pair.links["a"].send, "b", [b"stuck"])
    until(lambda: pair.transports["a"].counters.blocked, 20, pair.story)
    sending.result(10)
    began = time.monotonic()
    ends = [start(link.close, finished=True) for link in pair.links.values()]
    for end in ends:
        end.result(30)
    assert time.monotonic() - began < 15
    alarm("memory", False)
    for queue in leftovers(node)["queues"]:
        node.ctl("delete_queue", queue)
    nothing_on(node)
