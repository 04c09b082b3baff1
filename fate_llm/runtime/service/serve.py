"""Brings a party's service up, and down: one process per home, everything it knows in the home's `state`."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn

from fate_llm.core.errors import ConfigurationError, ServiceLost

from ..jobfolder import write_json
from ..trust.home import Home, open_home
from .api import create_app
from .engine import Engine

__all__ = ["Service", "serve"]

_STARTING = 30.0  # seconds for the API to listen


class Service:
    """A running service. `close` ends it as a crash would: what was running goes on when it is started again."""

    def __init__(self, home: Home, *, say: Callable[[str], None]) -> None:
        self._say = say
        self._server: uvicorn.Server | None = None
        with contextlib.ExitStack() as undo:
            undo.enter_context(_alone(home.state))
            self._engine = Engine(home, now=time.time, say=say)
            undo.callback(self._engine.close)
            self._engine.start()
            self.host, self.port = self._listen(home, undo)
            write_json(home.state / "service.json", {"pid": os.getpid(), "host": self.host, "port": self.port})
            undo.callback((home.state / "service.json").unlink, missing_ok=True)
            self._undo = undo.pop_all()

    def _listen(self, home: Home, undo: contextlib.ExitStack) -> tuple[str, int]:
        """Start the API in a thread of its own; where it listens."""
        host, port = home.settings.api.host, home.settings.api.port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        undo.callback(listening.close)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except OSError as error:
            raise ConfigurationError(
                f"the API cannot listen on {host}:{port}: {error.strerror}",
                hint="Name another address under `api` in party.yaml; port 0 takes any that is free.",
            ) from None
        token = home.settings.load_token() or ""
        config = uvicorn.Config(
            create_app(self._engine, token),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=35,
            limit_concurrency=200,
        )
        self._server = server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="api", daemon=True)
        thread.start()
        undo.callback(thread.join, 5.0)
        undo.callback(setattr, server, "should_exit", True)
        until = time.monotonic() + _STARTING
        while not server.started:
            if not thread.is_alive() or time.monotonic() > until:
                raise ServiceLost("the API did not start; stderr says why")
            time.sleep(0.02)
        return host, listening.getsockname()[1]

    @property
    def failed(self) -> BaseException | None:
        """Why the engine has stopped by itself; None as long as it has not."""
        return self._engine.failed

    def close(self) -> None:
        """Stop listening, end the workers, give everything back. Closing twice is fine."""
        self._undo.close()


def serve(folder: Path, *, say: Callable[[str], None]) -> int:
    """Run the service of a home until SIGTERM or SIGINT; the exit code. say: what happens, for the operator's log.

    Raises:
        ConfigurationError: the home is not whole, or another service has it.
    """
    home = open_home(folder)
    ended = threading.Event()
    before = {number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        service = Service(home, say=say)
        try:
            say(f"{home.settings.party} serves on http://{service.host}:{service.port}; Ctrl-C ends it")
            while not ended.wait(0.5):
                if service.failed is not None:
                    say(f"the service has failed: {service.failed}")
                    return 70
            say("ending; jobs go on when the service is started again")
        finally:
            service.close()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


@contextlib.contextmanager
def _alone(state: Path) -> Iterator[None]:
    """Hold the state folder; the lock ends with the process, however it ends.

    Raises:
        ConfigurationError: another service has it.
    """
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = os.open(state / "service.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(
                f"another service works in {state}", hint=f"It is the process in {state / 'service.json'}."
            ) from None
        yield
    finally:
        os.close(file)
