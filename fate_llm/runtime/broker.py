"""Runs one RabbitMQ node of its own on this machine: for development, tests and benchmarks.

A node has a folder, and everything of it lies there: data, log, configuration, Erlang cookie. It listens on free
ports of one address, clear of RabbitMQ's default ports and of any broker that the machine runs already. It never
outlives the process that started it: a keeper process starts the node, watches both, and kills the node when its
starter is gone, however that ended. Production brokers are run by an operator (`runtime.federation_files`).

The programs are those of Debian's `rabbitmq-server`, without its wrapper: that changes to the user `rabbitmq`
through `su`, behind which no signal and no exit status is visible. When root starts a node we change user ourselves.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pwd
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple
from urllib.parse import quote

from fate_llm.core.errors import ConfigurationError
from fate_llm.security.randomness import random_bytes, random_id

__all__ = ["DEVELOPER", "USER", "BrokerNode", "TlsFiles", "development_broker", "find_server", "free_port", "run_ctl"]

DEVELOPER = "fate"
"""The one user of a development broker."""

USER = "rabbitmq"
"""Debian's user for the broker; root never runs Erlang itself."""

_PORTS = range(
    20_000, 32_000
)  # below what Linux gives to outgoing connections (32768 and up), so a stop keeps its port
_SCRIPTS = Path("/usr/lib/rabbitmq/bin")
_AMQP_GREETING = b"AMQP\x00\x00\x09\x01"
_CTL_SECONDS = 120.0
_CTL_HINT = "Is the node running, and named right?"
_QUIET = "+sbwt none +sbwtdcpu none +sbwtdio none"  # schedulers sleep instead of spinning: other work gets the cores

# Starts the node in a session of its own, says its pid, and waits for the end of the node or of our parent.
_KEEPER = """
import json, os, select, signal, subprocess, sys
order = json.loads(sys.argv[1])
starter = os.pidfd_open(order["starter"])
if os.getppid() != order["starter"]:
    sys.exit("the starter has gone")
with open(order["console"], "ab") as console:
    node = subprocess.Popen(order["command"], stdin=subprocess.DEVNULL, stdout=console, stderr=console,
                            cwd=order["folder"], env=order["env"], start_new_session=True, **order["user"])
print(node.pid, flush=True)
select.select([starter, os.pidfd_open(node.pid)], [], [])
if node.poll() is None:
    os.killpg(node.pid, signal.SIGKILL)
sys.exit(0 if node.wait() == 0 else 1)
"""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of a node: who signs its clients, its certificate, its key; copied into the node's folder.

    client_certificates: refuse clients that show none.
    """

    ca: Path
    certificate: Path
    key: Path
    client_certificates: bool = False


def find_server() -> Path:
    """The folder with `rabbitmq-server` and `rabbitmqctl`.

    Raises:
        ConfigurationError: RabbitMQ is not installed.
    """
    if (_SCRIPTS / "rabbitmq-server").exists():
        return _SCRIPTS
    found = shutil.which("rabbitmq-server")
    if found is None:
        raise ConfigurationError(
            "RabbitMQ's server is not installed: no rabbitmq-server in the PATH",
            hint="Debian, Ubuntu: apt-get install rabbitmq-server; or give the URL of a broker that runs elsewhere.",
        )
    return Path(found).resolve().parent


def free_port(host: str = "127.0.0.1", *, taken: frozenset[int] = frozenset()) -> int:
    """A port that nobody listens on at `host`, outside the range of outgoing connections.

    Raises:
        ConfigurationError: none was found.
    """
    for _ in range(200):
        port = _PORTS[int.from_bytes(random_bytes(4), "big") % len(_PORTS)]
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
        if port not in taken:
            return port
    raise ConfigurationError(f"no free port at {host}", hint="Name an address of this machine, or end what listens.")


def run_ctl(
    command: Sequence[str], words: Sequence[str], *, text: str | None = None, env: Mapping[str, str] | None = None
) -> str:
    """Run a rabbitmqctl (`command` may hold sudo, docker exec, ... before it); what it printed.

    text: its standard input. env: of a node of ours, whose user it then runs as.

    Raises:
        ConfigurationError: it cannot be run, failed, or did not answer within two minutes.
    """
    user = _User() if env is None else _broker_user()
    # The first word only: what follows may be a password.
    shown = f"{' '.join(command)} {words[0] if words else ''}".strip()
    try:
        done = subprocess.run(
            [*command, *words],
            capture_output=True,
            text=True,
            timeout=_CTL_SECONDS,
            check=False,
            input=text or "",
            env=None if env is None else dict(env),
            cwd="/",
            user=user.uid,
            group=user.gid,
            extra_groups=user.groups,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        what = error.strerror if isinstance(error, OSError) else f"no answer within {_CTL_SECONDS:.0f} s"
        raise ConfigurationError(f"`{shown}` could not be run: {what}", hint=_CTL_HINT) from None
    if done.returncode != 0:
        said = "; ".join(line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip())
        raise ConfigurationError(f"`{shown}` failed: {said[:600]}", hint=_CTL_HINT)
    return done.stdout


class _User(NamedTuple):
    """Who a broker's processes run as; None: as we do."""

    uid: int | None = None
    gid: int | None = None
    groups: list[int] | None = None


def _broker_user() -> _User:
    """Debian's user when we are root, else ourselves.

    Raises:
        ConfigurationError: root, and the machine has no user `rabbitmq`.
    """
    if os.geteuid() != 0:
        return _User()
    try:
        found = pwd.getpwnam(USER)
    except KeyError:
        raise ConfigurationError(
            f"root does not run a broker, and there is no user {USER!r} to change to",
            hint="Start it as another user, or install Debian's rabbitmq-server, which makes that user.",
        ) from None
    return _User(found.pw_uid, found.pw_gid, [])


class BrokerNode:
    """One node. `start`, use `url()`, `stop`; or a `with` statement. Not for use by several threads at once.

    folder: made when missing; a node started on the folder of an earlier one goes on with its data.
    name: the first part of the Erlang node's name, which is unique for each folder.
    plugins: names of plug-ins to enable; `rabbitmq_management` gives `management_url()`.
    config: further lines of rabbitmq.conf, which win over ours; `listeners.tcp = none` leaves TLS only.
    definitions: JSON that is loaded at every start.
    port: of plain AMQP; chosen when None.

    Raises:
        ConfigurationError: no RabbitMQ here, or the folder cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        host: str = "127.0.0.1",
        plugins: Sequence[str] = (),
        tls: TlsFiles | None = None,
        config: Mapping[str, str] | None = None,
        definitions: Path | None = None,
        port: int | None = None,
    ) -> None:
        self._scripts = find_server()
        self.folder, self.host, self.plugins = folder.absolute(), host, tuple(plugins)
        self.name = f"{name}-{hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]}@localhost"
        self._tls, self._definitions = tls, definitions
        self._config = dict(config or {})
        self._wish = port
        self._keeper: subprocess.Popen[str] | None = None
        self._pid = self._seen = 0
        self._prepare()
        self._choose_ports()

    # --- life ----------------------------------------------------------------------------------------------------

    def start(self, timeout: float = 60.0) -> BrokerNode:
        """Start the node, and return when it takes connections; on the data of its last run, if it had one.

        Raises:
            ConfigurationError: it ended, or was not there within `timeout` seconds; the message has its last words.
        """
        if self.alive:
            return self
        self.kill()  # what a node that ended by itself has left
        ready = False
        try:
            self._write_files()
            self._launch()
            deadline = time.monotonic() + timeout
            while not (ready := self._listening()):
                if not self.alive or time.monotonic() > deadline:
                    what = f"was not ready within {timeout:.0f} s" if self.alive else "ended while it started"
                    text = f"the broker {self.name} {what}\n{self._first_errors()}"
                    raise ConfigurationError(text, hint=f"Its log is in {self._log}.")
                time.sleep(0.05)
        finally:
            if not ready:  # also when Ctrl-C came in between
                self.kill()
        return self

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the node ends, by itself or by an operator; True when it has."""
        if self._keeper is None:
            return True
        try:
            self._keeper.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self, timeout: float = 30.0) -> None:
        """End the node in order (SIGTERM), with force after `timeout` seconds; its data stay."""
        if self._keeper is None:
            return
        if self.alive:
            self._signal(os.kill, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._keeper.wait(timeout)
        self.kill()

    def kill(self) -> None:
        """End the node at once, as a power cut would (SIGKILL to the Erlang machine)."""
        if self._keeper is None:
            return
        if self.alive:
            self._signal(os.killpg, signal.SIGKILL)
        self._keeper.wait()
        if self._keeper.stdout is not None:
            self._keeper.stdout.close()
        self._keeper = None

    @property
    def alive(self) -> bool:
        """True while the node's process runs."""
        return self._keeper is not None and self._keeper.poll() is None

    @property
    def pid(self) -> int:
        """Process id of the Erlang machine; 0 before the first start."""
        return self._pid

    def __enter__(self) -> BrokerNode:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # --- use -----------------------------------------------------------------------------------------------------

    def url(self, user: str = "guest", password: str = "guest", vhost: str = "/") -> str:
        """`amqp://USER:PASSWORD@HOST:PORT/VHOST`, percent-encoded."""
        return f"amqp://{_quoted(user)}:{_quoted(password)}@{self.host}:{self.port}/{_quoted(vhost)}"

    def tls_url(self, user: str = "guest", password: str = "guest", vhost: str = "/") -> str:
        """`amqps://...` of a node that was given TLS files. The host is `localhost` where that is what we listen on."""
        host = "localhost" if self.host == "127.0.0.1" else self.host
        return f"amqps://{_quoted(user)}:{_quoted(password)}@{host}:{self.tls_port}/{_quoted(vhost)}"

    def management_url(self) -> str:
        """Base of the management API, `http://HOST:PORT/api`."""
        return f"http://{self.host}:{self.management_port}/api"

    def ctl(self, *words: str) -> str:
        """rabbitmqctl against this node (a second or so each); what it printed.

        Raises:
            ConfigurationError: it failed; the message has its words.
        """
        return run_ctl([str(self._scripts / "rabbitmqctl"), "--quiet"], words, env=self._environment())

    def ctl_line(self) -> str:
        """How a person calls rabbitmqctl for this node, in a shell and as a user who may read its cookie."""
        wanted = ("HOME", "PATH", "LC_ALL", "RABBITMQ_NODENAME", "RABBITMQ_CONF_ENV_FILE", "ERL_EPMD_ADDRESS")
        words = [f"{name}={value}" for name, value in self._environment().items() if name in wanted]
        return shlex.join(["env", *words, str(self._scripts / "rabbitmqctl")])

    def join(self, other: BrokerNode) -> None:
        """Become a member of `other`'s cluster, which runs: at once, or at the first start of a node that is not alive.

        What a node that runs held is dropped; one that has data of its own must run.

        Raises:
            ConfigurationError: the broker refused.
        """
        if not self.alive:
            self._write_cookie(other._cookie())
            peers = {
                f"cluster_formation.classic_config.nodes.{at}": name
                for at, name in enumerate((other.name, self.name), 1)
            }
            self._config |= {"cluster_formation.peer_discovery_backend": "classic_config", **peers}
            return
        if self._cookie() != other._cookie():
            self.ctl("eval", f"erlang:set_cookie(node(), '{other._cookie()}').")
            self._write_cookie(other._cookie())
        self.ctl("stop_app")
        self.ctl("reset")
        self.ctl("join_cluster", other.name)
        self.ctl("start_app")

    def log_tail(self, lines: int = 40) -> str:
        """The end of the node's log and of what it wrote to its console."""
        found = [
            path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
            for path in (self._log, self._console)
            if path.exists()
        ]
        return "\n".join(line for part in found for line in part)

    def _first_errors(self, lines: int = 16) -> str:
        """Where this start went wrong: what Erlang says after its first error is a long echo of it."""
        text = self._console.read_bytes() if self._console.exists() else b""
        said = text[self._seen :].decode("utf-8", "replace").splitlines() or self.log_tail(lines).splitlines()
        at = next((number for number, line in enumerate(said) if "error" in line.lower()), max(0, len(said) - lines))
        return "\n".join(line[:200] for line in said[at : at + lines])

    # --- files and processes -------------------------------------------------------------------------------------

    @property
    def _log(self) -> Path:
        return self.folder / "log" / "node.log"

    @property
    def _console(self) -> Path:
        return self.folder / "log" / "console.log"

    def _prepare(self) -> None:
        try:
            for folder in (self.folder, self.folder / "log", self.folder / "data"):
                folder.mkdir(mode=0o755 if folder == self.folder else 0o700, parents=True, exist_ok=True)
                self._give(folder)
        except OSError as error:
            raise ConfigurationError(f"the broker's folder {self.folder} cannot be made: {error.strerror}") from None
        closed = [path for path in self.folder.parents if not path.stat().st_mode & 0o001]
        if closed and _broker_user().uid is not None:
            raise ConfigurationError(
                f"the user {USER} cannot reach {self.folder}: {closed[0]} is closed to others",
                hint=f"Name a folder elsewhere, or: chmod o+x {closed[0]}",
            )
        if not self._cookie_file.exists():
            self._write_cookie(random_id(20))

    def _give(self, path: Path) -> None:
        """To the user that the node runs as."""
        user = _broker_user()
        if user.uid is not None and user.gid is not None:
            os.chown(path, user.uid, user.gid)

    @property
    def _cookie_file(self) -> Path:
        return self.folder / ".erlang.cookie"

    def _cookie(self) -> str:
        return self._cookie_file.read_text(encoding="ascii")

    def _write_cookie(self, cookie: str) -> None:
        self._cookie_file.unlink(missing_ok=True)
        self.write_file(".erlang.cookie", cookie.encode("ascii"))
        self._cookie_file.chmod(0o400)

    def configure(self, lines: Mapping[str, str]) -> None:
        """Further lines of rabbitmq.conf, from the next start on."""
        self._config.update(lines)

    def write_file(self, name: str, content: bytes) -> Path:
        """A file in the node's folder that only its user can read (mode 0600)."""
        path = self.folder / name
        path.unlink(missing_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
            stream.write(content)
        self._give(path)
        return path

    def _choose_ports(self) -> None:
        taken: set[int] = set()

        def choose() -> int:
            taken.add(port := free_port(self.host, taken=frozenset(taken)))
            return port

        self.port = self._wish or choose()
        self.tls_port, self.dist_port, self.management_port = choose(), choose(), choose()

    def _write_files(self) -> None:
        lines: dict[str, str] = {}
        if self._config.get("listeners.tcp") != "none":
            lines["listeners.tcp.1"] = f"{self.host}:{self.port}"
        if "rabbitmq_management" in self.plugins:
            lines |= {"management.tcp.ip": self.host, "management.tcp.port": str(self.management_port)}
        if self._tls is not None:
            lines["listeners.ssl.1"] = f"{self.host}:{self.tls_port}"
            for key, path in (("ca", self._tls.ca), ("cert", self._tls.certificate), ("key", self._tls.key)):
                lines[f"ssl_options.{key}file"] = str(self.write_file(f"{key}.pem", path.read_bytes()))
            lines |= {"ssl_options.versions.1": "tlsv1.3", "ssl_options.versions.2": "tlsv1.2"}
            lines["ssl_options.verify"] = "verify_peer"
            lines["ssl_options.fail_if_no_peer_cert"] = str(self._tls.client_certificates).lower()
        if self._definitions is not None:
            copy = self.write_file("definitions.json", self._definitions.read_bytes())
            lines["load_definitions"] = str(copy)
        lines = {key.replace("cafile", "cacertfile"): value for key, value in lines.items()} | self._config
        text = "".join(f"{key} = {value}\n" for key, value in lines.items())
        self.write_file("rabbitmq.conf", text.encode())
        self.write_file("enabled_plugins", f"[{','.join(self.plugins)}].\n".encode())
        self.write_file("rabbitmq-env.conf", b"")

    def _environment(self) -> dict[str, str]:
        """What the node and its rabbitmqctl run with: nothing of ours, nothing of the machine's own broker."""
        folder = str(self.folder)
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": folder,
            "LANG": "C.UTF-8",
            "LC_ALL": "C.UTF-8",
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_CONF_ENV_FILE": f"{folder}/rabbitmq-env.conf",
            "RABBITMQ_CONFIG_FILE": f"{folder}/rabbitmq.conf",
            "RABBITMQ_ADVANCED_CONFIG_FILE": f"{folder}/advanced.config",
            "RABBITMQ_GENERATED_CONFIG_DIR": f"{folder}/data/config",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/enabled_plugins",
            "RABBITMQ_PLUGINS_EXPAND_DIR": f"{folder}/data/plugins",
            "RABBITMQ_MNESIA_BASE": f"{folder}/data",
            "RABBITMQ_PID_FILE": f"{folder}/data/pid",
            "RABBITMQ_LOG_BASE": f"{folder}/log",
            "RABBITMQ_LOGS": str(self._log),
            "RABBITMQ_NODENAME": self.name,
            "RABBITMQ_DIST_PORT": str(self.dist_port),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"{_QUIET} -kernel inet_dist_use_interface {{127,0,0,1}}",
            "RABBITMQ_CTL_ERL_ARGS": _QUIET,
            "RUNNING_UNDER_SYSTEMD": "true",  # the script becomes the Erlang machine: one process, one pid
        }

    def _launch(self) -> None:
        self._seen = self._console.stat().st_size if self._console.exists() else 0
        user = _broker_user()
        order = {
            "starter": os.getpid(),
            "command": [str(self._scripts / "rabbitmq-server")],
            "console": str(self._console),
            "folder": str(self.folder),
            "env": self._environment(),
            "user": {"user": user.uid, "group": user.gid, "extra_groups": user.groups},
        }
        self._keeper = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _KEEPER, json.dumps(order)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._keeper.stdout is not None
        said = self._keeper.stdout.readline()
        self._pid = int(said) if said.strip() else 0

    def _signal(self, send: Callable[[int, int], None], number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself a moment ago
            send(self._pid, number)

    def _listening(self) -> bool:
        """The listeners are opened last, when definitions are loaded and plug-ins run."""
        plain = self._config.get("listeners.tcp") != "none"
        try:
            with socket.create_connection((self.host, self.port if plain else self.tls_port), timeout=2) as probe:
                if plain:
                    probe.sendall(_AMQP_GREETING)
                    return bool(probe.recv(1))
                return True
        except OSError:
            return False


@contextlib.contextmanager
def development_broker(folder: Path | None = None, *, port: int | None = None) -> Iterator[tuple[BrokerNode, str]]:
    """A broker on loopback with one user that may do everything; the node, and the URL for our transport.

    folder: where it lies and stays, with its data and password; None: a temporary one, which is gone afterwards.

    Raises:
        ConfigurationError: no RabbitMQ here, a folder that does not do, or the broker does not start.
    """
    with contextlib.ExitStack() as stack:
        if folder is None:
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fate-broker-")))
            home.chmod(0o755)
            folder = home / "node"
        node = BrokerNode(folder, name="dev", port=port)
        known = folder / "password"
        if not known.exists():
            node.write_file(known.name, random_id(16).encode("ascii"))
        password = known.read_text(encoding="ascii").strip()
        node.configure({"default_user": DEVELOPER, "default_pass": password})
        stack.callback(node.stop)
        node.start()
        yield node, node.url(DEVELOPER, password) + "?plaintext=loopback"


def _quoted(text: str) -> str:
    return quote(text, safe="")
