"""The demo without containers: the same broker and services, as processes of this machine on free ports.

`up` starts one process that stays. It starts the broker, with the files that `federation init` wrote for it, and a
service for every party; it starts again what dies, as the containers' restart policy would, and ends all when it is
told to. `down` tells it. Where things are is in FOLDER/demo.env as long as they run.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import yaml
from prepare import PARTIES, prepare

from fate_llm.core.errors import FateError
from fate_llm.runtime.broker import BrokerNode, free_port

__all__ = ["broker_node", "down", "supervise", "up"]

_HERE = Path(__file__).resolve().parent
_LOOPBACK = "127.0.0.1"
_READY = 180.0  # seconds until everything has to be up
_GRACE = 15.0  # seconds for a service to end, as in compose.yaml
_LOOK = 0.2  # seconds between looks


# --- The process that stays -------------------------------------------------------------------------------------------


def supervise(folder: Path) -> int:
    """Run broker and parties until SIGTERM."""
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: ended.set())
    if not (folder / "federation").exists():
        _prepare(folder)
    node = broker_node(folder)
    services: dict[str, subprocess.Popen[bytes]] = {}
    try:
        node.start(_READY)
        services = {party: _serve(folder, party) for party in PARTIES}
        while not ended.wait(_LOOK) and not _all_well(folder, services):
            pass
        _write_env(folder)
        while not ended.wait(1.0):
            if not node.alive:
                node.start(_READY)
            for party, process in services.items():
                if process.poll() is not None:
                    services[party] = _serve(folder, party)
            _write_note(folder, services)
    finally:
        (folder / "demo.env").unlink(missing_ok=True)
        _end(services)
        node.stop()
        (folder / "demo.json").unlink(missing_ok=True)
    return 0


def _prepare(folder: Path) -> None:
    taken: set[int] = set()
    for _ in range(len(PARTIES) + 1):
        taken.add(free_port(taken=frozenset(taken)))
    port, *others = sorted(taken)
    api = {party: (_LOOPBACK, other) for party, other in zip(PARTIES, others, strict=True)}
    partial = folder / ".federation.partial"
    shutil.rmtree(partial, ignore_errors=True)
    prepare(partial, broker=f"localhost:{port}", api=api, config_folder=str(folder / "broker"), disk_free="50MB")
    partial.rename(folder / "federation")


def broker_node(folder: Path) -> BrokerNode:
    """The broker with its files from `federation init`; what differs is that it listens on loopback only."""
    written = folder / "federation" / "brokers" / "shared"
    lines = (written / "rabbitmq.conf").read_text(encoding="utf-8").splitlines()
    config = dict(line.split(" = ", 1) for line in lines if line and not line.startswith("#"))
    port = int(config["listeners.ssl.default"])
    config["listeners.ssl.default"] = f"{_LOOPBACK}:{port}"
    plugins = re.findall(r"\w+", (written / "enabled_plugins").read_text(encoding="utf-8"))
    node = BrokerNode(folder / "broker", name="demo", plugins=plugins, config=config)
    node.tls_port = port
    for name in ("ca.pem", "server.pem", "server.key", "definitions.json"):
        node.write_file(name, (written / name).read_bytes())
    return node


def _home(folder: Path, party: str) -> Path:
    return folder / "federation" / "parties" / party


def _serve(folder: Path, party: str) -> subprocess.Popen[bytes]:
    with (folder / f"{party}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "fate_llm", "party", "serve", "--home", str(_home(folder, party))],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def _all_well(folder: Path, services: dict[str, subprocess.Popen[bytes]]) -> bool:
    """Whether all answer that they are well.

    Raises:
        RuntimeError: one has ended.
    """
    _write_note(folder, services)
    for party, process in services.items():
        if process.poll() is not None:
            said = (folder / f"{party}.log").read_text(encoding="utf-8", errors="replace")[-2000:]
            raise RuntimeError(f"the service of {party} ended with status {process.returncode}:\n{said}")
    return all(_is_well(_address(folder, party)) for party in PARTIES)


def _is_well(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/v1/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:  # also an answer of 503: not well yet
        return False


def _address(folder: Path, party: str) -> str:
    settings = yaml.safe_load((_home(folder, party) / "party.yaml").read_text(encoding="utf-8"))
    return f"http://{settings['api']['host']}:{settings['api']['port']}"


def _write_note(folder: Path, services: dict[str, subprocess.Popen[bytes]]) -> None:
    note = {"pid": os.getpid(), "services": {party: process.pid for party, process in services.items()}}
    _replace(folder / "demo.json", json.dumps(note))


def _write_env(folder: Path) -> None:
    lines = [f"FATE_LLM_HOME={_home(folder, PARTIES[0])}"]
    for party in PARTIES:
        name = party.upper().replace("-", "_")
        lines += [f"{name}_HOME={_home(folder, party)}", f"{name}_API={_address(folder, party)}"]
    _replace(folder / "demo.env", "".join(f"{line}\n" for line in lines))


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _end(services: dict[str, subprocess.Popen[bytes]]) -> None:
    for process in services.values():
        process.terminate()
    deadline = time.monotonic() + _GRACE
    for process in services.values():
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# --- Commands ---------------------------------------------------------------------------------------------------------


def up(folder: Path, pipeline: Path | None) -> int:
    """Start everything, wait until it is well, and submit the pipeline; the exit status."""
    if _supervisor(folder) is not None:
        print(f"the demo in {folder} runs already; `down` ends it", file=sys.stderr)
        return 2
    folder.mkdir(mode=0o711, parents=True, exist_ok=True)
    for name in ("demo.env", "demo.json"):
        (folder / name).unlink(missing_ok=True)
    print("starting the broker and the services of", ", ".join(PARTIES), flush=True)
    with (folder / "demo.log").open("wb") as log:
        started = subprocess.Popen(
            [sys.executable, str(_HERE / "processes.py"), "supervise", "--folder", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + _READY
    while not (folder / "demo.env").exists():
        if started.poll() is not None or time.monotonic() > deadline:
            started.terminate()
            started.wait()
            print((folder / "demo.log").read_text(encoding="utf-8", errors="replace")[-4000:], file=sys.stderr)
            return 1
        time.sleep(_LOOK)
    print((folder / "demo.env").read_text(encoding="utf-8"), end="", flush=True)
    if pipeline is None:
        return 0
    home = str(_home(folder, PARTIES[0]))
    done = subprocess.run([sys.executable, "-m", "fate_llm", "submit", str(pipeline), "--home", home], check=False)
    return done.returncode


def down(folder: Path, *, delete: bool) -> int:
    """End everything; the exit status."""
    pid = _supervisor(folder)
    if pid is None:
        print(f"no demo runs in {folder}", file=sys.stderr)
    else:
        os.kill(pid, signal.SIGTERM)
        while _supervisor(folder) is not None:
            time.sleep(_LOOK)
    for party, service in _note(folder).get("services", {}).items():  # of a supervisor that was killed
        if str(_home(folder, party)) in _command(service):
            os.kill(service, signal.SIGKILL)
    for name in ("demo.env", "demo.json"):
        (folder / name).unlink(missing_ok=True)
    if delete:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def _note(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _supervisor(folder: Path) -> int | None:
    """Its process id, if it runs; a number that belongs to another process by now does not count."""
    pid = _note(folder).get("pid")
    return pid if isinstance(pid, int) and str(folder) in _command(pid) and "supervise" in _command(pid) else None


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
    except OSError:
        return []


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="demo", description="The demo as processes of this machine.")
    parser.add_argument("command", choices=["up", "down", "supervise"])
    parser.add_argument("--folder", type=Path, default=Path("demo-run"), help="where everything lies  [demo-run]")
    parser.add_argument("--pipeline", type=Path, default=_HERE / "pipeline.yaml", help="what `up` submits")
    parser.add_argument("--no-job", action="store_true", help="`up` submits nothing")
    parser.add_argument("--delete", action="store_true", help="`down` deletes keys, jobs and models")
    options = parser.parse_args()
    folder = options.folder.absolute()
    try:
        if options.command == "supervise":
            return supervise(folder)
        if options.command == "down":
            return down(folder, delete=options.delete)
        return up(folder, None if options.no_job else options.pipeline.absolute())
    except FateError as error:
        print(f"error [{error.code}]: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
