"""A broker of three nodes with quorum queues: any one node may die."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fate_llm.protocols.broker_layout import job_inbox
from fate_llm.protocols.transports.rabbitmq import BrokerAddress
from fate_llm.runtime.broker import BrokerNode

from .links import MIB, Pair, content, digest, nothing_on, start, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def address(nodes: list[BrokerNode], first: int) -> str:
    """All nodes, `first` first."""
    turn = [*nodes[first:], *nodes[:first]]
    hosts = ",".join(f"127.0.0.1:{node.port}" for node in turn)
    return f"amqp://guest:guest@{hosts}/?plaintext=loopback&queues=quorum"


def test_the_node_of_a_party_dies_in_a_transfer_and_the_next_one_takes_over(
    cluster: list[BrokerNode], pairs: Callable[..., Pair]
) -> None:
    # Given a and b at different nodes, and inboxes on all three
    pair = pairs(address(cluster, 1), address(cluster, 2), outage=60.0)
    listed = cluster[0].ctl("list_queues", "name", "type", "members")
    line = next(one for one in listed.splitlines() if job_inbox("b", pair.job) in one)
    assert "quorum" in line and all(node.name in line for node in cluster)
    body = content(11, 48 * MIB)
    sending = start(pair.links["a"].send, "b", [body])
    until(lambda: (p := pair.links["b"].progress("a")) and p.received > 4 * MIB, 60, pair.story)
    # When the node that a is connected to dies
    cluster[1].kill()
    # Then a goes on at another node, and b has the message once
    assert digest(pair.take("b", 90).body) == digest(body)
    sending.result(30)
    assert pair.transports["a"].counters.reconnects >= 1
    assert pair.links["b"].counters["a"].messages_received == 1
    assert not pair.gone
    pair.echo(timeout=30)
    cluster[1].start(120)
    pair.finish()
    nothing_on(cluster[0])


def test_without_a_majority_nothing_is_confirmed_and_with_it_all_goes_on(
    cluster: list[BrokerNode], pairs: Callable[..., Pair]
) -> None:
    pair = pairs(address(cluster, 0), outage=90.0)
    pair.echo()
    cluster[1].kill()
    cluster[2].kill()
    sending = start(pair.links["a"].send, "b", [content(12, 4 * MIB)])
    with pytest.raises(AssertionError, match="nothing for b"):
        pair.take("b", 4.0)
    cluster[1].start(120)
    assert digest(pair.take("b", 90).body) == digest(content(12, 4 * MIB))
    sending.result(30)
    assert not pair.gone
    cluster[2].start(120)
    pair.finish()
    nothing_on(cluster[0])


def test_the_address_names_all_nodes(cluster: list[BrokerNode]) -> None:
    found = BrokerAddress.from_url(address(cluster, 1))
    assert [port for _, port in found.nodes] == [cluster[at].port for at in (1, 2, 0)]
    assert found.parameters(0).port == found.parameters(3).port == cluster[1].port
