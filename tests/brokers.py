"""Real brokers for tests: nodes as fixtures, what is left on one, and a TCP proxy that breaks on request.

A test folder takes what it needs by import in its conftest (ruff: F401): `from tests.brokers import broker, vhost`.
Nodes lie in a folder of their own, since pytest's is closed to the broker's user.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import socket
import struct
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from fate_llm.core.errors import ConfigurationError
from fate_llm.runtime.broker import BrokerNode, find_server

__all__ = [
    "CutProxy",
    "admin",
    "broker",
    "broker_folder",
    "cluster",
    "fresh_broker",
    "leftovers",
    "require_rabbitmq",
    "vhost",
]

START = 120.0  # seconds that a node may take on a busy machine
TICK = 0.05  # seconds between looks of the proxy's threads at what was asked of them
MOST_WAITING = 8 * 1024 * 1024  # bytes that the proxy holds in each direction


def require_rabbitmq() -> None:
    """Skip at home when RabbitMQ is not installed; in CI that is a failure."""
    try:
        find_server()
    except ConfigurationError as error:
        if os.environ.get("CI", "").lower() in {"1", "true"}:
            pytest.fail(f"CI runs the tests with real brokers: {error}")
        pytest.skip(str(error))


@contextlib.contextmanager
def node_folder() -> Iterator[Path]:
    """A folder that the broker's user can reach, gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="fate-broker-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def broker_folder() -> Iterator[Path]:
    """Where the nodes of this session lie."""
    require_rabbitmq()
    with node_folder() as folder:
        yield folder


@pytest.fixture(scope="session")
def broker(broker_folder: Path) -> Iterator[BrokerNode]:
    """One node for all tests of a session, with the management API. Use `vhost`; leave the node as it was."""
    with BrokerNode(broker_folder / "shared", name="shared", plugins=("rabbitmq_management",)) as node:
        yield node


@pytest.fixture
def fresh_broker() -> Iterator[BrokerNode]:
    """A node of the test's own, started, without plug-ins: kill it, start it again, fill it."""
    require_rabbitmq()
    with node_folder() as folder:
        with BrokerNode(folder / "fresh", name="fresh") as node:
            yield node


@pytest.fixture(scope="session")
def cluster(broker_folder: Path) -> Iterator[list[BrokerNode]]:
    """Three nodes in a cluster; a test that ends one starts it again."""
    nodes = [BrokerNode(broker_folder / f"member{at}", name=f"member{at}") for at in range(3)]
    try:
        nodes[0].start(START)
        for node in nodes[1:]:
            node.join(nodes[0])
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda node: node.start(START), nodes[1:]))
        yield nodes
    finally:
        for node in nodes:
            node.kill()


def admin(node: BrokerNode, method: str, path: str, body: Any = None) -> Any:
    """One call of a node's management API as guest, e.g. `admin(node, "PUT", "vhosts/x")`: much quicker than ctl."""
    request = urllib.request.Request(
        f"{node.management_url()}/{path}",
        method=method,
        data=None if method == "GET" else json.dumps(body or {}).encode(),
        headers={
            "content-type": "application/json",
            "authorization": "Basic " + base64.b64encode(b"guest:guest").decode(),
        },
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        text = answer.read()
    return json.loads(text) if text else None


@pytest.fixture
def vhost(broker: BrokerNode, request: pytest.FixtureRequest) -> Iterator[str]:
    """An empty virtual host of the shared broker for this test; guest may do everything in it."""
    name = f"test-{os.urandom(4).hex()}"
    admin(broker, "PUT", f"vhosts/{quote(name, safe='')}")
    yield name
    with contextlib.suppress(urllib.error.URLError):  # the test may have deleted it
        admin(broker, "DELETE", f"vhosts/{quote(name, safe='')}")


_LIST = """
Names = fun(Module, V) -> [element(4, element(2, X)) || X <- Module:list(V)] end,
Own = fun(<<>>) -> false; (<<"amq.", _/binary>>) -> false; (_) -> true end,
Vs = [V || V <- rabbit_vhost:list_names(), WANTED],
Cs = [maps:from_list([{K, iolist_to_binary(io_lib:format("~s", [X]))} || {K, X} <- C])
      || C <- rabbit_networking:connection_info_all([vhost, user, state]),
         lists:member(proplists:get_value(vhost, C), Vs)],
io:format("~s~n", [rabbit_json:encode(#{
  queues => [N || V <- Vs, N <- Names(rabbit_amqqueue, V)],
  exchanges => [N || V <- Vs, N <- Names(rabbit_exchange, V), Own(N)],
  connections => Cs})]).
"""


def leftovers(node: BrokerNode, vhost: str | None = None) -> dict[str, list[Any]]:
    """What is on the broker by its own listing, of one virtual host or of all.

    queues, exchanges: names, RabbitMQ's own left out. connections: vhost, user, state.
    """
    wanted = "true" if vhost is None else f"V =:= <<{json.dumps(vhost)}>>"
    said = node.ctl("eval", _LIST.replace("WANTED", wanted))
    found = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    return {kind: sorted(found[kind], key=str) for kind in ("queues", "exchanges", "connections")}


@dataclass(eq=False)
class _Pair:
    """One proxied connection."""

    client: socket.socket
    server: socket.socket
    ended: set[str] = field(default_factory=set)

    def reset(self) -> None:
        for one in (self.client, self.server):
            with contextlib.suppress(OSError):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            one.close()


class CutProxy:
    """Forwards TCP from `port` on loopback to `target_port`, and misbehaves on request.

    cut(up=, down=): from now on bytes of that direction vanish, and connections stay open, as when a firewall drops
    packets: neither side sees an end. New connections are accepted and hang the same way. heal() forwards again what
    comes from then on; what was dropped stays dropped, so a connection that lost bytes is broken for good, and shows it
    by a protocol error or by missed heartbeats. drop_connections() resets all open ones.
    delay: seconds that every byte is late. bandwidth: bytes/s of each direction of each connection; None is no limit.
    """

    def __init__(self, target_port: int, *, host: str = "127.0.0.1") -> None:
        self.delay = 0.0
        self.bandwidth: float | None = None
        self.forwarded = {"up": 0, "down": 0}
        self.dropped = {"up": 0, "down": 0}
        self._cut = {"up": threading.Event(), "down": threading.Event()}
        self._target = (host, target_port)
        self._lock = threading.Lock()
        self._pairs: list[_Pair] = []
        self._threads: list[threading.Thread] = []
        self._closed = threading.Event()
        self._listener = socket.create_server((host, 0))
        self.port: int = self._listener.getsockname()[1]
        self._run(self._accept)

    def cut(self, *, up: bool = True, down: bool = True) -> None:
        """Drop silently what clients send (up), what the target sends (down)."""
        for name, wanted in (("up", up), ("down", down)):
            if wanted:
                self._cut[name].set()

    def heal(self) -> None:
        """Forward again."""
        for event in self._cut.values():
            event.clear()

    def drop_connections(self) -> None:
        """Reset (RST) every open connection on both sides; new ones work."""
        with self._lock:
            gone, self._pairs = self._pairs, []
        for pair in gone:
            pair.reset()

    @property
    def connections(self) -> int:
        """Connections that are open."""
        with self._lock:
            return len(self._pairs)

    def close(self) -> None:
        """End everything; no thread is left."""
        self._closed.set()
        self._threads[0].join(10)
        self._listener.close()
        self.drop_connections()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def __enter__(self) -> CutProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, work: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closed.is_set():
            if not select.select([self._listener], [], [], TICK)[0]:
                continue
            client, _ = self._listener.accept()
            try:
                server = socket.create_connection(self._target, timeout=10)
            except OSError:
                client.close()  # the target is down: as it would refuse
                continue
            client.setblocking(False)
            server.setblocking(False)
            pair = _Pair(client, server)
            with self._lock:
                self._pairs.append(pair)
            self._run(self._pump, pair, "up")
            self._run(self._pump, pair, "down")

    def _pump(self, pair: _Pair, name: str) -> None:
        source, sink = (pair.client, pair.server) if name == "up" else (pair.server, pair.client)
        waiting: deque[tuple[float, bytes]] = deque()
        free = 0.0  # when the line has room for the next block
        try:
            while not self._closed.is_set():
                room = name not in pair.ended and sum(len(block) for _, block in waiting) < MOST_WAITING
                pause = TICK if not waiting else min(TICK, max(0.0, waiting[0][0] - time.monotonic()))
                if select.select([source] if room else [], [], [], pause)[0]:
                    now, block = time.monotonic(), source.recv(65536)
                    if not block:
                        pair.ended.add(name)
                    free = max(now, free) + (len(block) / self.bandwidth if self.bandwidth else 0.0)
                    waiting.append((free + self.delay, block))
                while waiting and waiting[0][0] <= time.monotonic():
                    if not self._pass_on(name, waiting.popleft()[1], sink):
                        self._end(pair)
                        return
        except (OSError, ValueError):  # reset by a side, or closed by us
            with self._lock:
                self._pairs = [one for one in self._pairs if one is not pair]
            if not self._cut["up"].is_set() and not self._cut["down"].is_set():
                pair.reset()

    def _pass_on(self, name: str, block: bytes, sink: socket.socket) -> bool:
        """False at the end of the stream. A cut hides the end as well."""
        if self._cut[name].is_set():
            self.dropped[name] += len(block)
            return bool(block)
        if not block:
            sink.shutdown(socket.SHUT_WR)
        rest = memoryview(block)
        while rest and not self._closed.is_set():
            if select.select([], [sink], [], TICK)[1]:
                rest = rest[sink.send(rest) :]
        self.forwarded[name] += len(block)
        return bool(block)

    def _end(self, pair: _Pair) -> None:
        """A direction has ended in order; when both have, the connection is closed."""
        if len(pair.ended) == 2 and not self._cut["up"].is_set() and not self._cut["down"].is_set():
            with self._lock:
                self._pairs = [one for one in self._pairs if one is not pair]
            pair.client.close()
            pair.server.close()
