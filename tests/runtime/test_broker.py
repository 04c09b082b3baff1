"""Nodes that we start: they come up, keep their data, end when told, and never outlive who started them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pika
import pytest
from pika.exceptions import AMQPError

from fate_llm.core.errors import ConfigurationError
from fate_llm.runtime import broker as module
from fate_llm.runtime.broker import BrokerNode, development_broker, find_server, free_port, run_ctl
from fate_llm.security.certificates import make_authority
from tests import brokers
from tests.brokers import (  # noqa: F401
    START,
    CutProxy,
    TlsBroker,
    broker,
    cluster,
    fresh_broker,
    leftovers,
    node_folder,
    tls_broker,
    vhost,
)
from tests.cli.conftest import environment

PATIENCE = 30.0


def until(holds: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, f"{what}: not within {PATIENCE:.0f} s"
        time.sleep(0.05)


def runs(pid: int) -> bool:
    """False also for a process that has ended and waits for its parent."""
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


# --- without a broker --------------------------------------------------------------------------------------------


def test_a_missing_server_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_SCRIPTS", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigurationError) as caught:
        BrokerNode(tmp_path / "node", name="x")
    assert "apt-get install rabbitmq-server" in caught.value.hint
    assert not (tmp_path / "node").exists()


@pytest.mark.parametrize(("ci", "outcome"), [("true", "Failed"), ("", "Skipped"), ("false", "Skipped")])
def test_a_missing_server_fails_in_ci_only(
    ci: str, outcome: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "_SCRIPTS", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CI", ci)
    with pytest.raises(BaseException) as caught:
        brokers.require_rabbitmq()
    assert type(caught.value).__name__ == outcome


def test_a_server_elsewhere_is_found_in_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_SCRIPTS", tmp_path / "none")
    (tmp_path / "sbin").mkdir()
    (tmp_path / "sbin" / "rabbitmq-server").touch(mode=0o755)
    (tmp_path / "rabbitmq-server").symlink_to(tmp_path / "sbin" / "rabbitmq-server")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_server() == tmp_path / "sbin"


def test_free_ports_are_free_and_away_from_rabbitmq_s_and_from_outgoing_ones() -> None:
    found = {free_port() for _ in range(50)}
    assert len(found) > 40
    assert all(20_000 <= port < 32_000 for port in found)
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        module_range = range(taken.getsockname()[1], taken.getsockname()[1] + 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_PORTS", module_range)
            with pytest.raises(ConfigurationError, match="no free port"):
                free_port()


def test_a_port_that_is_spoken_for_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    first = free_port()
    monkeypatch.setattr(module, "_PORTS", range(first, first + 2))
    assert free_port(taken=frozenset({first})) == first + 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root starts a broker as somebody else")
def test_a_folder_the_broker_cannot_reach_is_refused(tmp_path: Path) -> None:
    brokers.require_rabbitmq()
    (tmp_path / "closed").mkdir(mode=0o700)
    with pytest.raises(ConfigurationError, match="cannot reach") as caught:
        BrokerNode(tmp_path / "closed" / "node", name="x")
    assert "chmod o+x" in caught.value.hint


def test_what_cannot_be_run_or_fails_is_an_error_without_the_words() -> None:
    with pytest.raises(ConfigurationError, match="could not be run") as caught:
        run_ctl(["no-such-program"], ["change_password", "bank-a", "secret"])
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="failed: broken"):
        run_ctl(["sh", "-c", "echo broken >&2; exit 3"], [])
    assert run_ctl(["cat"], [], text="through\n") == "through\n"


# --- the proxy ---------------------------------------------------------------------------------------------------


@pytest.fixture
def echo() -> Iterator[int]:
    """A server that says what it hears; its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve(client: socket.socket) -> None:
            with client, contextlib.suppress(OSError):
                while block := client.recv(65536):
                    client.sendall(block)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def proxy(echo: int) -> Iterator[CutProxy]:
    with CutProxy(echo) as found:
        yield found


@pytest.fixture
def client(proxy: CutProxy) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=PATIENCE) as found:
        yield found


def said_back(client: socket.socket, text: bytes) -> bytes:
    client.sendall(text)
    found = b""
    while len(found) < len(text):
        found += client.recv(65536)
    return found


def test_the_proxy_forwards_everything_in_order(proxy: CutProxy, client: socket.socket) -> None:
    text = os.urandom(100_000)
    assert said_back(client, text) == text
    assert proxy.forwarded == {"up": len(text), "down": len(text)}
    assert proxy.connections == 1


def test_the_end_of_one_side_reaches_the_other(proxy: CutProxy, client: socket.socket) -> None:
    assert said_back(client, b"x") == b"x"
    client.shutdown(socket.SHUT_WR)
    assert client.recv(10) == b""
    until(lambda: proxy.connections == 0, "the connection's end")


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_cut_is_silent_and_can_be_one_way(direction: str, proxy: CutProxy, client: socket.socket) -> None:
    assert said_back(client, b"before") == b"before"
    proxy.cut(up=direction == "up", down=direction == "down")
    client.sendall(b"lost")
    until(lambda: proxy.dropped[direction] == 4, "the loss")
    client.settimeout(0.2)
    with pytest.raises(TimeoutError):  # neither data nor an end
        client.recv(10)
    proxy.heal()
    client.settimeout(PATIENCE)
    assert said_back(client, b"after") == b"after"
    assert proxy.dropped == {"up": 0, "down": 0} | {direction: 4}


def test_a_cut_hides_that_a_side_has_gone(proxy: CutProxy, client: socket.socket) -> None:
    assert said_back(client, b"x") == b"x"
    proxy.cut()
    client.shutdown(socket.SHUT_WR)
    client.settimeout(0.3)
    with pytest.raises(TimeoutError):
        client.recv(1)


def test_new_connections_hang_while_it_is_cut(proxy: CutProxy) -> None:
    proxy.cut()
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=0.3) as late:
        late.sendall(b"x")
        with pytest.raises(TimeoutError):
            late.recv(1)


def test_dropped_connections_are_reset_and_new_ones_work(proxy: CutProxy, client: socket.socket) -> None:
    assert said_back(client, b"x") == b"x"
    proxy.drop_connections()
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=PATIENCE) as again:
        assert said_back(again, b"y") == b"y"


def test_delay_and_bandwidth_hold_back_and_lose_nothing(proxy: CutProxy, client: socket.socket) -> None:
    proxy.delay, proxy.bandwidth = 0.2, 1_000_000.0
    client.sendall(text := os.urandom(200_000))
    client.settimeout(0.1)
    with pytest.raises(TimeoutError):  # at least 0.4 s away
        client.recv(1)
    proxy.delay, proxy.bandwidth = 0.0, None
    client.settimeout(PATIENCE)
    found = b""
    while len(found) < len(text):
        found += client.recv(65536)
    assert found == text


def test_a_target_that_is_down_looks_closed() -> None:
    with CutProxy(free_port()) as proxy, socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as client:
        assert client.recv(1) == b""


# --- a real node -------------------------------------------------------------------------------------------------


def publish(node: BrokerNode, queue: str, body: bytes) -> None:
    with pika.BlockingConnection(pika.URLParameters(node.url())) as connection:
        channel = connection.channel()
        channel.queue_declare(queue, durable=True)
        channel.confirm_delivery()
        channel.basic_publish("", queue, body, pika.BasicProperties(delivery_mode=2))


def take(node: BrokerNode, queue: str) -> bytes | None:
    with pika.BlockingConnection(pika.URLParameters(node.url())) as connection:
        body: bytes | None = connection.channel().basic_get(queue, auto_ack=True)[2]
        return body


@pytest.mark.slow
def test_a_killed_node_comes_back_with_its_data_on_its_port(fresh_broker: BrokerNode) -> None:  # noqa: F811
    publish(fresh_broker, "kept", b"text")
    fresh_broker.ctl("eval", "mnesia:sync_log().")  # a declaration lies in a cache for up to two seconds
    port, pid = fresh_broker.port, fresh_broker.pid
    fresh_broker.kill()
    assert not fresh_broker.alive and not runs(pid)
    with pytest.raises(AMQPError):
        pika.BlockingConnection(pika.URLParameters(fresh_broker.url()))
    fresh_broker.start(START)
    assert (fresh_broker.port, fresh_broker.alive) == (port, True)
    assert fresh_broker.pid != pid
    assert take(fresh_broker, "kept") == b"text"
    again = BrokerNode(fresh_broker.folder, name="fresh")
    assert again.name == fresh_broker.name
    fresh_broker.stop()
    with again:
        assert "kept" in leftovers(again)["queues"]
    assert not runs(again.pid)


@pytest.mark.slow
def test_a_node_runs_as_the_broker_s_user_and_on_loopback_only(broker: BrokerNode) -> None:  # noqa: F811
    status = Path(f"/proc/{broker.pid}/status").read_text()
    uid = int(next(line.split()[1] for line in status.splitlines() if line.startswith("Uid:")))
    assert uid != 0
    said = broker.ctl("eval", "[inet:ntoa(element(6, L)) || L <- rabbit_networking:node_listeners(node())].")
    assert "0.0.0.0" not in said
    addresses = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        local, state = line.split()[1], line.split()[3]
        if state == "0A" and int(local[9:], 16) in {broker.port, broker.dist_port, broker.management_port}:
            addresses.add(local[:8])
    assert addresses == {"0100007F"}


@pytest.mark.slow
def test_leftovers_are_what_is_there(broker: BrokerNode, vhost: str) -> None:  # noqa: F811
    empty: dict[str, list[object]] = {"queues": [], "exchanges": [], "connections": []}
    assert leftovers(broker, vhost) == empty
    connection = pika.BlockingConnection(pika.URLParameters(broker.url(vhost=vhost)))
    connection.channel().queue_declare("q")
    connection.channel().exchange_declare("e")
    found = leftovers(broker, vhost)
    assert found["queues"] == ["q"] and found["exchanges"] == ["e"]
    assert [one["user"] for one in found["connections"]] == ["guest"]
    connection.channel().queue_delete("q")
    connection.channel().exchange_delete("e")
    connection.close()
    assert leftovers(broker, vhost) == empty


@pytest.mark.slow
def test_tls_is_verified_on_both_sides(tls_broker: TlsBroker, tmp_path: Path) -> None:  # noqa: F811
    parameters = pika.URLParameters(tls_broker.node.tls_url())
    context = tls_broker.context()
    context.load_cert_chain(tls_broker.certificate, tls_broker.key)
    parameters.ssl_options = pika.SSLOptions(context, "localhost")
    with pika.BlockingConnection(parameters) as connection:
        assert connection.is_open
    stranger = make_authority("stranger", now=datetime.now(UTC), days=1)
    (tmp_path / "ca.pem").write_bytes(stranger.pair.certificate)
    parameters.ssl_options = pika.SSLOptions(tls_broker.context(ca=tmp_path / "ca.pem"), "localhost")
    with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
        pika.BlockingConnection(parameters)


@pytest.mark.slow
def test_a_node_that_does_not_start_shows_its_last_words() -> None:
    brokers.require_rabbitmq()
    with node_folder() as folder:
        node = BrokerNode(folder / "node", name="wrong", config={"no.such.setting": "1"})
        with pytest.raises(ConfigurationError, match="ended while it started") as caught:
            node.start(START)
        assert "no.such.setting" in caught.value.message
        assert not node.alive and not runs(node.pid)


_STARTER = """
import sys, time
from pathlib import Path
from fate_llm.runtime.broker import BrokerNode
node = BrokerNode(Path(sys.argv[1]), name="orphan")
node._write_files()
node._launch()
print(node.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_a_node_does_not_outlive_a_starter_that_is_killed() -> None:
    brokers.require_rabbitmq()
    with node_folder() as folder:
        command = [sys.executable, "-c", _STARTER, str(folder / "node")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as starter:
            assert starter.stdout is not None
            pid = int(starter.stdout.readline())
            assert runs(pid)
            starter.send_signal(signal.SIGKILL)
            starter.wait()
        until(lambda: not runs(pid), "the end of the node")


@pytest.mark.slow
def test_a_development_broker_leaves_nothing() -> None:
    brokers.require_rabbitmq()
    with development_broker() as (node, url):
        folder, pid = node.folder, node.pid
        address = url.removesuffix("?plaintext=loopback")
        assert address != url and "127.0.0.1" in url and "guest" not in url
        with pika.BlockingConnection(pika.URLParameters(address)) as connection:
            connection.channel().queue_declare("q", durable=True)
        with pytest.raises(AMQPError):
            pika.BlockingConnection(pika.URLParameters(node.url("guest", "guest")))
        modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir() if path.is_file()}
        assert modes["rabbitmq.conf"] == modes["password"] == 0o600 and modes[".erlang.cookie"] == 0o400
    assert not folder.parent.exists() and not runs(pid)


@pytest.mark.slow
def test_a_cluster_keeps_its_queues_when_a_node_is_lost(cluster: list[BrokerNode]) -> None:  # noqa: F811
    first, second, third = cluster
    with pika.BlockingConnection(pika.URLParameters(first.url())) as connection:
        channel = connection.channel()
        channel.queue_declare("q", durable=True, arguments={"x-queue-type": "quorum"})
        channel.confirm_delivery()
        channel.basic_publish("", "q", b"text", pika.BasicProperties(delivery_mode=2))
    first.kill()
    got = None
    end = time.monotonic() + PATIENCE
    while got is None and time.monotonic() < end:  # until a new leader is elected, the broker may say that it has none
        with (
            contextlib.suppress(pika.exceptions.AMQPError),
            pika.BlockingConnection(pika.URLParameters(second.url())) as connection,
        ):
            got = connection.channel().basic_get("q", auto_ack=True)[2]
    assert got == b"text"
    with pika.BlockingConnection(pika.URLParameters(second.url())) as connection:
        connection.channel().queue_delete("q")  # the nodes are the whole session's
    first.start(START)
    until(lambda: third.ctl("eval", "length(rabbit_nodes:all_running()).").strip() == "3", "all three nodes")
