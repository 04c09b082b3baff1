"""Brokers for the faults, and the rule of this folder: a test leaves no thread and no open file behind."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fate_llm.runtime.broker import BrokerNode
from tests.brokers import broker, cluster, node_folder, require_rabbitmq, vhost  # noqa: F401

from .links import Pair, until


def open_files() -> list[str]:
    """What this process has open, pipes and devices apart."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.append(os.readlink(entry))
        except OSError:  # the listing's own
            continue
    return sorted(name.split(":")[0] for name in found if not name.startswith(("pipe:", "/dev/", "/proc/")))


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Threads and open files are those of before; the brokers and their keepers start earlier."""
    for name in ("broker", "node", "cluster"):
        if name in request.fixturenames:
            request.getfixturevalue(name)
    gc.collect()
    threads, files = set(threading.enumerate()), open_files()
    yield
    gc.collect()
    until(lambda: set(threading.enumerate()) <= threads, 10, lambda: f"threads left: {threading.enumerate()}")
    until(lambda: open_files() == files, 10, lambda: f"files left: {open_files()}, before: {files}")


@pytest.fixture(scope="module")
def node() -> Iterator[BrokerNode]:
    """A node that the tests of one module may kill and start again; each leaves it running, empty and unblocked."""
    require_rabbitmq()
    with node_folder() as folder, BrokerNode(folder / "hurt", name="hurt") as one:
        yield one


@pytest.fixture
def pairs(tmp_path: Path) -> Iterator[Callable[..., Pair]]:
    """Makes pairs of linked parties; what a failed test left open is closed."""
    made: list[Pair] = []

    def make(*urls: str, **settings: Any) -> Pair:
        made.append(Pair(tmp_path / f"pair{len(made)}", *urls, job=f"job-{len(made)}", **settings))
        return made[-1]

    yield make
    for pair in made:
        pair.abandon()
