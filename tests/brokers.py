"""Real brokers for tests: nodes as fixtures, what is left on one, and a TCP proxy that breaks on request.

A test module, or a folder's conftest, imports the fixtures it uses: `from tests.brokers import broker, vhost`. However
many do, a session has one of each shared node, started at its first use. Nodes lie in a folder of their own, since
pytest's is closed to the broker's user.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import select
import shutil
import socket
import ssl
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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from fate_llm.core.errors import ConfigurationError
from fate_llm.runtime.broker import USER, BrokerNode, TlsFiles, find_server, free_port
from fate_llm.runtime.federation import Federation, PartySettings, Topology, load_party
from fate_llm.runtime.federation_setup import SHARED, plan_setup, set_up, write_files
from fate_llm.security.certificates import Authority, make_authority

__all__ = [
    "CutProxy",
    "LiveFederation",
    "TlsBroker",
    "admin",
    "broker",
    "cluster",
    "fresh_broker",
    "leftovers",
    "live_federation",
    "node_folder",
    "require_rabbitmq",
    "tls_broker",
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


_NODES = pytest.StashKey[dict[str, Any]]()


def once(config: pytest.Config, name: str, make: Callable[[contextlib.ExitStack, Path], Any]) -> Any:
    """What `make` made at the first call of a session; undone at its end, whichever modules import the fixtures."""
    require_rabbitmq()
    made = config.stash.setdefault(_NODES, {})
    if name not in made:
        with contextlib.ExitStack() as stack:
            made[name] = make(stack, stack.enter_context(node_folder()))
            config.add_cleanup(stack.pop_all().close)
    return made[name]


@pytest.fixture(scope="session")
def broker(pytestconfig: pytest.Config) -> BrokerNode:
    """One node for all tests of a session, with the management API. Use `vhost`; leave the node as it was."""

    def make(stack: contextlib.ExitStack, folder: Path) -> BrokerNode:
        node = BrokerNode(folder / "shared", name="shared", plugins=("rabbitmq_management",))
        stack.callback(node.kill)
        return node.start(START)

    found: BrokerNode = once(pytestconfig, "shared", make)
    return found.start(START)  # a test may have ended it


@pytest.fixture
def fresh_broker() -> Iterator[BrokerNode]:
    """A node of the test's own, started, without plug-ins: kill it, start it again, fill it."""
    require_rabbitmq()
    with node_folder() as folder:
        node = BrokerNode(folder / "fresh", name="fresh")
        try:
            yield node.start(START)
        finally:
            node.kill()


@pytest.fixture
def cluster(pytestconfig: pytest.Config) -> list[BrokerNode]:
    """Three nodes in a cluster, the same for a session; those that a test has ended are started again."""

    def make(stack: contextlib.ExitStack, folder: Path) -> list[BrokerNode]:
        nodes = [BrokerNode(folder / f"member{at}", name=f"member{at}") for at in range(3)]
        for node in nodes:
            stack.callback(node.kill)
        nodes[0].start(START)
        for node in nodes[1:]:
            node.join(nodes[0])
        return nodes

    found: list[BrokerNode] = once(pytestconfig, "cluster", make)
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda node: node.start(START), found))


@dataclass(frozen=True)
class TlsBroker:
    """A node with TLS, who signed its certificate, and a client's certificate of the same authority."""

    node: BrokerNode
    ca: Path
    certificate: Path
    key: Path
    authority: Authority

    def context(self, *, ca: Path | None = None) -> ssl.SSLContext:
        """For a client that verifies."""
        return ssl.create_default_context(cafile=str(ca or self.ca))


@pytest.fixture(scope="session")
def tls_broker(pytestconfig: pytest.Config) -> TlsBroker:
    """A node that listens with TLS besides, for `localhost` and 127.0.0.1; one for the session."""

    def make(stack: contextlib.ExitStack, folder: Path) -> TlsBroker:
        now = datetime.now(UTC)
        authority = make_authority("test authority", now=now, days=2)
        server = authority.issue_server("localhost", ["localhost", "127.0.0.1"], now=now, days=2)
        client = authority.issue_client("client", now=now, days=2)
        content = {
            "ca.pem": authority.pair.certificate,
            "server.pem": server.certificate,
            "server.key": server.key,
            "client.pem": client.certificate,
            "client.key": client.key,
        }
        for name, text in content.items():
            (folder / name).write_bytes(text)
        tls = TlsFiles(folder / "ca.pem", folder / "server.pem", folder / "server.key")
        node = BrokerNode(folder / "tls", name="tls", tls=tls)
        stack.callback(node.kill)
        return TlsBroker(node.start(START), folder / "ca.pem", folder / "client.pem", folder / "client.key", authority)

    found: TlsBroker = once(pytestconfig, "tls", make)
    found.node.start(START)
    return found


@dataclass(frozen=True)
class LiveFederation:
    """A federation as `federation init` writes it, with its brokers running. folder: what was written."""

    federation: Federation
    folder: Path
    nodes: dict[str, BrokerNode]

    def party(self, party: str) -> PartySettings:
        return load_party(self.folder / "parties" / party / "party.yaml")[0]

    def node(self, party: str) -> BrokerNode:
        return self.nodes.get(party) or self.nodes[SHARED]


@contextlib.contextmanager
def live_federation(*parties: str, topology: Topology = "per-party", **options: Any) -> Iterator[LiveFederation]:
    """Set a federation up and start its brokers on loopback with the configuration that was written for them.

    What differs from a real one: the address and port of the listeners, and less free disk is enough.
    """
    require_rabbitmq()
    with node_folder() as home, contextlib.ExitStack() as stack:
        owners = parties if topology == "per-party" else (SHARED,)
        ports: dict[str, int] = {}
        for owner in owners:
            ports[owner] = free_port(taken=frozenset(ports.values()))
        places = [f"localhost:{ports[o]}" if o == SHARED else f"{o}=localhost:{ports[o]}" for o in owners]
        setup = plan_setup(
            name="trial",
            parties=parties,
            topology=topology,
            brokers=places,
            config_folder=f"{home}/OWNER",
            disk_free="50MB",
            **options,
        )
        write_files(home / "written", set_up(setup, now=datetime.now(UTC)))
        nodes = {}
        for owner in owners:
            nodes[owner] = installed(home / "written" / "brokers" / owner, home, owner, ports[owner])
            stack.callback(nodes[owner].kill)
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda node: node.start(START), nodes.values()))
        yield LiveFederation(setup.federation, home / "written", nodes)


def installed(written: Path, home: Path, owner: str, port: int) -> BrokerNode:
    """A node with what an operator would copy into its configuration folder."""
    target = home / owner
    target.mkdir()
    for path in written.iterdir():
        copy = target / path.name
        copy.write_bytes(path.read_bytes().replace(b"/OWNER/", f"/{owner}/".encode()))
        copy.chmod(0o600)
        if os.geteuid() == 0:
            shutil.chown(copy, USER, USER)
    lines = (target / "rabbitmq.conf").read_text().splitlines()
    config = dict(line.split(" = ", 1) for line in lines if line and not line.startswith("#"))
    config["listeners.ssl.default"] = f"127.0.0.1:{port}"
    plugins = re.findall(r"\w+", (target / "enabled_plugins").read_text())
    node = BrokerNode(home / f"node-{owner}", name=owner.replace(".", "_"), plugins=plugins, config=config)
    node.tls_port = port
    return node


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
def vhost(broker: BrokerNode) -> Iterator[str]:
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
        self._seen: list[_Pair] = []
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
        for pair in self._seen:  # also what a cut has hidden from us
            pair.client.close()
            pair.server.close()

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
                self._seen.append(pair)
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
        self.forwarded[name] += len(block)
        while rest and not self._closed.is_set():
            if select.select([], [sink], [], TICK)[1]:
                rest = rest[sink.send(rest) :]
        return bool(block)

    def _end(self, pair: _Pair) -> None:
        """A direction has ended in order; when both have, the connection is closed."""
        if len(pair.ended) == 2 and not self._cut["up"].is_set() and not self._cut["down"].is_set():
            with self._lock:
                self._pairs = [one for one in self._pairs if one is not pair]
            pair.client.close()
            pair.server.close()
