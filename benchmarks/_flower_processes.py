"""A child process: echo rounds on Flower's SuperLink with SuperNodes as processes; run by the peer's interpreter.

Its own defaults (its state is in memory), but without TLS: kinder than our side has it. All it starts ends with it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

__all__ = ["main"]

_PROJECT = """\
[project]
name = "echo"
version = "1.0.0"
description = "echo rounds"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "benchmark"

[tool.flwr.app.components]
serverapp = "echo_app:server_app"
clientapp = "echo_app:client_app"

[tool.flwr.app.config]
answer = {answer}
parties = {parties}
rounds = {rounds}
size = {size}
tensors = {tensors}
"""
_CONNECTION = '[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder")
    parser.add_argument("--parties", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--size", type=int, required=True, help="bytes each way per party")
    parser.add_argument("--tensors", type=int, required=True)
    parser.add_argument("--timeout", type=float, required=True)
    options = parser.parse_args()
    answer = options.folder / "answer.json"
    app = _write_app(options, answer)
    ports = _free_ports(1 + options.parties)
    (options.folder / "config.toml").write_text(_CONNECTION.format(port=ports[0]))
    os.environ["FLWR_HOME"] = str(options.folder)
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # it calls its own
    running = []
    try:
        running = _start(options, ports)
        subprocess.run([_tool("flwr"), "run", app], check=True, stdout=sys.stderr, timeout=options.timeout)
        _wait(answer, running, options)
        print(json.dumps({**json.loads(answer.read_text()), "version": version("flwr")}))
    finally:
        for process in running:  # each leads a group with the processes it starts for every message
            os.killpg(process.pid, signal.SIGTERM)
        for process in running:
            process.wait(timeout=60)
    return 0


def _write_app(options: argparse.Namespace, answer: Path) -> Path:
    app: Path = options.folder / "app"
    app.mkdir()
    shutil.copy(Path(__file__).with_name("_flower_processes_app.py"), app / "echo_app.py")
    fields = {key: getattr(options, key) for key in ("parties", "rounds", "size", "tensors")}
    (app / "pyproject.toml").write_text(_PROJECT.format(answer=json.dumps(str(answer)), **fields))
    return app


def _start(options: argparse.Namespace, ports: list[int]) -> list[subprocess.Popen[bytes]]:
    link = ["--insecure", "--host", "127.0.0.1", "--port", str(ports[0]), "--disable-runtime-dependency-installation"]
    commands: list[list[str | Path]] = [[_tool("flower-superlink"), *link]]
    for port in ports[1:]:
        superlink = ["--insecure", "--superlink", f"127.0.0.1:{ports[0]}", "--port", str(port)]
        commands.append([_tool("flower-supernode"), *superlink])
    running = []
    for number, command in enumerate(commands):
        with (options.folder / f"log-{number}.txt").open("wb") as log:
            running.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
        if number == 0:
            _wait_for_port(ports[0], 60.0)
    return running


def _wait(answer: Path, running: list[subprocess.Popen[bytes]], options: argparse.Namespace) -> None:
    end = time.monotonic() + options.timeout
    while not answer.exists():
        if time.monotonic() > end or any(process.poll() is not None for process in running):
            tail = (options.folder / "log-0.txt").read_text()[-3000:]
            raise SystemExit(f"Flower did not finish its rounds:\n{tail}")
        time.sleep(0.5)
    time.sleep(0.5)  # it is written in one piece, but not in one step


def _tool(name: str) -> Path:
    return Path(sys.executable).with_name(name)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


def _wait_for_port(port: int, timeout: float) -> None:
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise SystemExit("Flower's SuperLink does not listen") from None
            time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
