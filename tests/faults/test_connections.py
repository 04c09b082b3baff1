"""The connection is cut, silently or by an operator, while frames are on their way."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from fate_llm.core.errors import BrokerLost
from fate_llm.runtime.broker import BrokerNode

from .links import MIB, CutProxy, Pair, content, digest, loopback, nothing_on, start, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]
HEARTBEAT = 1  # seconds; a client looks every 5 s more than that, so that silence is seen after at most twice 6 s
CUTS = {"up": {"down": False}, "down": {"up": False}, "both": {}}


def through(proxy: CutProxy, broker: BrokerNode, vhost: str) -> str:
    return loopback(broker.url(vhost=vhost), port=proxy.port, heartbeat=HEARTBEAT)


def cut_and_heal(pair: Pair, proxy: CutProxy, sides: dict[str, bool]) -> None:
    """a's connection falls silent in the middle of a transfer each way, until a has found out; then it is mended."""
    bodies = {"a": content(3, 24 * MIB), "b": content(4, 8 * MIB)}
    proxy.bandwidth = 8 * MIB
    sendings = [
        start(pair.links["a"].send, "b", [bodies["a"]]),
        start(pair.links["b"].send, "a", [bodies["b"]]),
    ]
    until(lambda: (p := pair.links["b"].progress("a")) and p.received >= 4 * MIB, 30, pair.story)
    proxy.cut(**sides)
    until(lambda: not pair.transports["a"].connected, 20, pair.story)
    time.sleep(2 * HEARTBEAT)  # attempts to connect again fall silent, too
    assert not sendings[0].done()
    proxy.heal()
    proxy.bandwidth = None
    assert digest(pair.take("b", 60).body) == digest(bodies["a"])
    assert digest(pair.take("a", 60).body) == digest(bodies["b"])
    for sending in sendings:
        sending.result(30)


def test_a_silent_cut_of_either_direction_or_both_is_survived(
    broker: BrokerNode, vhost: str, pairs: Callable[..., Pair]
) -> None:
    proxies = {name: CutProxy(broker.port) for name in CUTS}
    try:
        made = {name: pairs(through(proxies[name], broker, vhost), loopback(broker.url(vhost=vhost))) for name in CUTS}
        with ThreadPoolExecutor() as pool:
            work = {name: pool.submit(cut_and_heal, made[name], proxies[name], CUTS[name]) for name in CUTS}
            for name, one in work.items():
                one.result(120)
                assert proxies[name].dropped["up" if name == "both" else name] > 0
        for pair in made.values():
            assert pair.transports["a"].counters.reconnects >= 1
            assert pair.transports["b"].counters.reconnects == 0
            for receiver, sender in ("ab", "ba"):
                assert pair.links[receiver].counters[sender].messages_received == 1
                assert pair.links[receiver].counters[sender].refused == 0
            assert not pair.gone
            pair.echo()
            pair.finish()
    finally:
        for proxy in proxies.values():
            proxy.close()
    nothing_on(broker, vhost)


def test_a_cut_for_good_ends_with_broker_lost_in_time(
    broker: BrokerNode, vhost: str, pairs: Callable[..., Pair]
) -> None:
    outage = 3.0
    with CutProxy(broker.port) as proxy:
        pair = pairs(through(proxy, broker, vhost), loopback(broker.url(vhost=vhost)), outage=outage)
        pair.echo()
        proxy.cut()
        began = time.monotonic()
        with pytest.raises(BrokerLost, match="away for 3 s") as caught:
            pair.links["a"].receive(60)
        seconds = time.monotonic() - began
        assert outage <= seconds < 2 * (HEARTBEAT + 5) + outage + 2, pair.story()
        assert "doctor" in caught.value.hint
        assert pair.transports["b"].connected
        began = time.monotonic()
        pair.abandon()
        assert time.monotonic() - began < 5
    # a's end was not in order: the broker has seen it by its own heartbeats, and its inbox would expire
    for party in "ab":
        broker.ctl("delete_queue", "--vhost", vhost, f"fate.to.{party}/job/{pair.job}")
    nothing_on(broker, vhost)


def test_closing_while_the_connection_is_silent_is_bounded(
    broker: BrokerNode, vhost: str, pairs: Callable[..., Pair]
) -> None:
    with CutProxy(broker.port) as proxy:
        url = loopback(broker.url(vhost=vhost), port=proxy.port, heartbeat=30)
        pair = pairs(url, loopback(broker.url(vhost=vhost)))
        pair.echo()
        proxy.cut()
        began = time.monotonic()
        pair.links["a"].close()
        assert time.monotonic() - began < 10
        pair.links["b"].close()
    for party in "ab":
        broker.ctl("delete_queue", "--vhost", vhost, f"fate.to.{party}/job/{pair.job}")
    nothing_on(broker, vhost)


def test_connections_closed_by_an_operator_lose_nothing_and_nothing_is_applied_twice(
    broker: BrokerNode, vhost: str, pairs: Callable[..., Pair]
) -> None:
    # Given many messages on their way over a slow line, so that some are unconfirmed at any time
    with CutProxy(broker.port) as proxy:
        proxy.bandwidth = 16 * MIB
        pair = pairs(loopback(broker.url(vhost=vhost), port=proxy.port))
        bodies = [content(seed, MIB + seed) for seed in range(48)]

        def send_all() -> None:
            for body in bodies:
                pair.links["a"].send("b", [body])

        sending = start(send_all)
        taken: list[str] = []
        # When every connection is closed three times meanwhile
        for at in range(len(bodies)):
            taken.append(digest(pair.take("b", 60).body))
            if at in (8, 20, 32):
                broker.ctl("close_all_connections", "--vhost", vhost, "a test")
        sending.result(30)
        # Then all came, in order, once each, although frames were published and delivered again
        assert taken == [digest(body) for body in bodies]
        below, above = pair.transports, pair.links
        until(lambda: all(one.counters.reconnects >= 3 and one.connected for one in below.values()), 15, pair.story)
        again = below["a"].counters.published - below["a"].counters.confirmed
        assert 0 < again <= 3 * 12, pair.story()
        assert above["b"].counters["a"].messages_received == len(bodies)
        assert above["b"].counters["a"].refused == 0
        assert not pair.gone
        pair.finish()
    nothing_on(broker, vhost)


def test_a_reset_of_every_connection_repeats_frames_and_none_is_applied_twice(
    broker: BrokerNode, vhost: str, pairs: Callable[..., Pair]
) -> None:
    with CutProxy(broker.port) as proxy:
        pair = pairs(loopback(broker.url(vhost=vhost), port=proxy.port))
        body = content(9, 48 * MIB)
        proxy.delay = 0.2  # confirms are on the line when it breaks: what they were for goes again
        sending = start(pair.links["a"].send, "b", [body])
        for share in (8, 24):
            until(
                lambda share=share: (p := pair.links["b"].progress("a")) and p.received >= share * MIB, 30, pair.story
            )
            proxy.drop_connections()
        assert digest(pair.take("b", 60).body) == digest(body)
        sending.result(30)
        assert pair.transports["a"].counters.reconnects >= 2
        assert pair.links["b"].counters["a"].duplicates > 0, pair.story()
        assert pair.links["b"].counters["a"].messages_received == 1
        assert pair.links["b"].counters["a"].refused == 0
        assert not pair.gone
        pair.echo()
        pair.finish()
    nothing_on(broker, vhost)
