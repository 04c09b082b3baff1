"""The fault injector does what its script says, and the same every time."""

from __future__ import annotations

import pytest

from fate_llm.core.errors import ConfigurationError
from fate_llm.protocols.transports.memory import Fault, FaultKind, MemoryNetwork


def story(*faults: Fault, frames: int = 5, linger: float | None = None) -> list[int]:
    network = MemoryNetwork(faults, linger=linger)
    a, b = network.connect("a"), network.connect("b")
    for number in range(1, frames + 1):
        a.send("b", [bytes([number])])
    heard = []
    while (delivery := b.receive(0.0)) is not None:
        heard.append(delivery.body[0])
        b.ack(delivery)
    return heard


def test_a_delay_counts_later_frames_of_the_pair_and_nothing_else() -> None:
    assert story(Fault(FaultKind.DELAY, "a", "b", 1, by=2)) == [2, 3, 1, 4, 5]
    assert story(Fault(FaultKind.DELAY, "a", "b", 2, by=1), Fault(FaultKind.DELAY, "a", "b", 4, by=1)) == [
        1,
        3,
        2,
        5,
        4,
    ]
    assert story(Fault(FaultKind.DELAY, "b", "a", 1, by=2)) == [1, 2, 3, 4, 5]


def test_a_delayed_frame_is_not_let_go_because_its_receiver_looks() -> None:
    network = MemoryNetwork([Fault(FaultKind.DELAY, "a", "b", 1, by=1)], linger=None)
    a, b = network.connect("a"), network.connect("b")
    a.send("b", [b"1"])
    assert b.receive(0.0) is None
    assert network.left_over() == {"b": 1}
    a.send("b", [b"2"])
    assert [bytes(b.receive(0.0).body) for _ in range(2)] == [b"2", b"1"]  # type: ignore[union-attr]


def test_a_delayed_frame_arrives_in_the_end_also_without_later_ones() -> None:
    network = MemoryNetwork([Fault(FaultKind.DELAY, "a", "b", 1, by=None)], linger=0.01)
    a, b = network.connect("a"), network.connect("b")
    a.send("b", [b"1"])
    delivery = b.receive(None)
    assert delivery is not None
    assert bytes(delivery.body) == b"1"


def test_loss_and_duplication() -> None:
    assert story(Fault(FaultKind.LOSE, "a", "b", 3)) == [1, 2, 4, 5]
    assert story(Fault(FaultKind.DUPLICATE, "a", "b", 3)) == [1, 2, 3, 3, 4, 5]


def test_a_party_needs_a_name() -> None:
    with pytest.raises(ConfigurationError):
        MemoryNetwork().connect("")
