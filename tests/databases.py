"""A real PostgreSQL for tests: a server of our own in a temporary folder, and an empty database for each test.

A test module, or a folder's conftest, imports the fixtures it uses: `from tests.databases import database, postgres`.
The server listens on a Unix socket in its folder only, runs as an unprivileged user, and is gone at the end. It can be
killed and started again. Tests that use it are marked `slow` where they are written.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

__all__ = ["PostgresServer", "database", "find_postgres", "postgres", "require_postgres"]

START = 120.0  # seconds that a server may take on a busy machine
PORT = 5432  # names the socket's file only: nothing listens on the network
USER = "postgres"  # Debian's, for root; everybody else runs the server as themselves


def find_postgres() -> Path | None:
    """The folder with `initdb` and `postgres`, the newest that Debian's packages installed; None without."""
    found = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/postgres")]
    if found:
        return max(found, key=lambda folder: float(folder.parent.name))
    there = shutil.which("postgres")
    return None if there is None else Path(there).resolve().parent


def require_postgres() -> Path:
    """Skip at home when there is no server, no driver or no user to run it; in CI that is a failure."""
    found, why = find_postgres(), "PostgreSQL's server is not installed (Debian: apt-get install postgresql)"
    try:
        import psycopg  # noqa: F401

        if os.geteuid() == 0:
            pwd.getpwnam(USER)
    except ImportError:
        found, why = None, "psycopg is not installed: pip install 'fate_llm[postgres]'"
    except KeyError:
        found, why = None, f"PostgreSQL does not run as root, and there is no user {USER}"
    if found is None:
        if os.environ.get("CI", "").lower() in {"1", "true"}:
            pytest.fail(f"CI runs the tests with a real database: {why}")
        pytest.skip(why)
    return found


class PostgresServer:
    """One server in one folder. start, stop (as an operator does), kill (as a crash does), and start again."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder, self._programs = folder, programs
        self._process: subprocess.Popen[bytes] | None = None
        self._log = folder / "log.txt"
        self.data = folder / "data"
        self._run("initdb", "-D", str(self.data), "-U", "fate", "-A", "trust", "-E", "UTF8", "--no-sync")

    def _command(self, program: str, *arguments: str) -> list[str]:
        as_user = ["setpriv", f"--reuid={USER}", "--regid=" + USER, "--clear-groups"] if os.geteuid() == 0 else []
        return [*as_user, str(self._programs / program), *arguments]

    def _run(self, program: str, *arguments: str) -> str:
        environment = {**os.environ, "LC_ALL": "C.UTF-8", "TZ": "UTC"}
        command = self._command(program, *arguments)
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=START, cwd=self.folder, env=environment, check=False
        )
        assert done.returncode == 0, f"{program}: {done.stdout}{done.stderr}"
        return done.stdout

    def start(self) -> PostgresServer:
        """Start the server on the data that is there, and return when it takes connections."""
        if self._process is not None and self._process.poll() is None:
            return self
        self.kill()
        options = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.folder),
            "port": str(PORT),
            "shared_buffers": "16MB",
            "max_connections": "40",
        }
        settings = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command("postgres", "-D", str(self.data), *settings),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
            )
        self._wait()
        return self

    def _wait(self) -> None:
        import psycopg

        until = time.monotonic() + START
        while True:
            try:
                psycopg.connect(self._conninfo("postgres"), connect_timeout=5).close()
                return
            except psycopg.OperationalError:
                ended = self._process is None or self._process.poll() is not None
                assert not ended and time.monotonic() < until, self._log.read_text(errors="replace")[-2000:]
                time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL to the server and all its processes: what it has not written is lost, what it promised is not."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(START)
        self._quiet_children()
        (self.data / "postmaster.pid").unlink(missing_ok=True)
        self._process = None

    def _quiet_children(self) -> None:
        """Backends are sessions of their own, and would live until they see that their postmaster does not."""
        ours = str(self.data).encode()
        until = time.monotonic() + START
        while time.monotonic() < until:
            alive = [path for path in Path("/proc").glob("[0-9]*/cwd") if _leads_to(path, ours)]
            if not alive:
                return
            for path in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(path.parent.name), signal.SIGKILL)
            time.sleep(0.02)

    def stop(self) -> None:
        """End the server as an operator does; connections are cut."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(START)
            self._process = None

    def _conninfo(self, name: str) -> str:
        return f"host={self.folder} port={PORT} user=fate dbname={name}"

    def url(self, name: str) -> str:
        """The URL of a database, for `Store.open`."""
        return f"postgresql+psycopg://fate@/{name}?host={quote(str(self.folder), safe='')}&port={PORT}"

    def sql(self, statement: str, *, name: str = "postgres") -> list[tuple[Any, ...]]:
        """Run one statement on a connection of its own; the rows, if there are any."""
        import psycopg

        with psycopg.connect(self._conninfo(name), autocommit=True) as connection:
            done = connection.execute(statement.encode())
            return list(done.fetchall()) if done.description else []


def _leads_to(link: Path, folder: bytes) -> bool:
    try:
        return os.readlink(bytes(link)) == folder
    except OSError:
        return False


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One server for all tests of a session. Use `database`; start it again if you end it."""
    programs = require_postgres()
    folder = Path(tempfile.mkdtemp(prefix="fate-postgres-"))
    try:
        if os.geteuid() == 0:
            shutil.chown(folder, USER, USER)
        server = PostgresServer(folder, programs)
        try:
            yield server.start()
        finally:
            server.kill()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def database(postgres: PostgresServer) -> Iterator[str]:
    """The URL of an empty database on the shared server, gone afterwards."""
    postgres.start()
    name = f"test_{os.urandom(6).hex()}"
    postgres.sql(f"CREATE DATABASE {name}")
    yield postgres.url(name)
    postgres.start()
    postgres.sql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
