"""What the tests of all folders share: cohorts, networks of parties, threads that bring their errors home."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from fate_llm.core.values import Cohort
from fate_llm.protocols.channel import JobChannel
from fate_llm.protocols.transports.memory import Fault, MemoryNetwork

BROKERS = {"broker", "fresh_broker", "cluster", "tls_broker"}  # fixtures that start nodes
PATIENCE = 20.0  # seconds until a test that hangs is called so; no test waits for it when all is well


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """What needs a real broker is not part of the fast tier; nor is what a parameter of that name stands for."""
    for item in items:
        names = set(getattr(item, "fixturenames", ()))
        over_a_broker = "rabbitmq" in item.name.partition("[")[2]
        if names & BROKERS or over_a_broker:
            item.add_marker(pytest.mark.slow)
        slow = item.get_closest_marker("slow") is not None
        of_brokers = any(getattr(value, "__module__", "") == "tests.brokers" for value in vars(item.module).values())
        if slow and (names & BROKERS or over_a_broker or of_brokers or item.path.parent.name == "faults"):
            item.add_marker(pytest.mark.broker)


@pytest.fixture
def make_cohort() -> Callable[..., Cohort]:
    """A cohort of `count` contributors a, b, c, ... with the arbiter `z`."""

    def make(count: int = 3, *, quorum: int | None = None, coordinator: str = "z") -> Cohort:
        return Cohort(tuple("abcdefgh"[:count]), coordinator, count if quorum is None else quorum)

    return make


@pytest.fixture
def make_channels() -> Iterator[Callable[..., dict[str, JobChannel]]]:
    """Channels of one job for the parties named; all are closed at the end, and no reader may be left."""
    opened: list[JobChannel] = []

    def make(
        parties: str | tuple[str, ...],
        *,
        faults: tuple[Fault, ...] = (),
        linger: float | None = 0.05,
        **settings: Any,
    ) -> dict[str, JobChannel]:
        network = MemoryNetwork(faults, linger=linger)
        channels = {
            party: JobChannel(network.connect(party), job="job", party=party, members=tuple(parties), **settings)
            for party in parties
        }
        opened.extend(channels.values())
        return channels

    yield make
    for channel in opened:
        channel.close()
        assert not channel._reader.is_alive()


@pytest.fixture
def together() -> Callable[[Mapping[str, Callable[[], Any]]], dict[str, Any]]:
    """Run functions at once, a thread each; what each returned or raised, by name. None may hang."""

    def run(calls: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
        ends: dict[str, Any] = {}

        def guarded(name: str, call: Callable[[], Any]) -> None:
            try:
                ends[name] = call()
            # The boundary of a test's thread: the error is what the test looks at.
            except Exception as error:
                ends[name] = error

        threads = [threading.Thread(target=guarded, args=item, daemon=True) for item in calls.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        hanging = sorted(set(calls) - set(ends))
        assert not hanging, f"these did not end: {hanging}"
        return ends

    return run
