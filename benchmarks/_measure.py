"""What the benchmarks share: child processes, their times and memory, facts of the machine, ratios and results.

Nothing here imports torch or our package: the process that measures stays small and still.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = [
    "FOLDER",
    "Child",
    "Ratio",
    "TreeMemory",
    "environment",
    "finish",
    "make_parser",
    "median",
    "own_peak_mib",
    "run_child",
]

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
_PACKAGES = (
    "fate_llm",
    "numpy",
    "pydantic",
    "click",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "pika",
    "cryptography",
    "tenseal",
    "flwr",
    "ray",
)
_SUBREAPER = 36  # prctl: whoever loses its parent becomes our child, so that no process leaves the tree

median = statistics.median


# --- the command line and the result -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ratio:
    """One figure with its limit, which it must not exceed (or, with `least`, not fall below)."""

    name: str
    value: float
    limit: float
    least: bool = False

    @property
    def holds(self) -> bool:
        return self.value >= self.limit if self.least else self.value <= self.limit

    def line(self) -> str:
        word = "at least" if self.least else "at most"
        return f"{self.name}: {self.value:.4g} ({word} {self.limit:g}) {'ok' if self.holds else 'MISSED'}"


def make_parser(description: str) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs; judges no limit")
    parser.add_argument("--date", default=None, help="date of the result; default: now, in UTC")
    parser.add_argument("--results", type=Path, default=FOLDER / "results", help="folder of the result files")
    return parser


def finish(options: argparse.Namespace, name: str, ratios: Sequence[Ratio], details: Mapping[str, Any]) -> int:
    """Print the ratios, write the result file (not with --quick); the exit status: 1 when a limit is missed."""
    for ratio in ratios:
        print(ratio.line(), flush=True)
    if options.quick:
        print("quick: these sizes say nothing about the limits, and nothing is written")
        return 0
    result = {
        "benchmark": name,
        "date": options.date or datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "machine": _machine(),
        "versions": _versions(),
        "ratios": [
            {"name": r.name, "value": r.value, "limit": r.limit, "least": r.least, "holds": r.holds} for r in ratios
        ],
        "details": dict(details),
    }
    options.results.mkdir(parents=True, exist_ok=True)
    target = options.results / f"{name}.json"
    target.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written: {os.path.relpath(target)}")
    return 0 if all(ratio.holds for ratio in ratios) else 1


def _command() -> str:
    """The command as another machine would give it: no absolute paths."""
    words = ["python", f"benchmarks/{Path(sys.argv[0]).name}"]
    words += [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    return " ".join(words)


def _machine() -> dict[str, Any]:
    cpu = _value_of(Path("/proc/cpuinfo"), "model name") or platform.processor() or "unknown"
    memory = _value_of(Path("/proc/meminfo"), "MemTotal")
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory.split()[0]) / 2**20, 1) if memory else None,
        "system": f"{platform.system()} {platform.machine()}",
        "load_at_end": round(os.getloadavg()[0], 2),
    }


def _value_of(path: Path, key: str) -> str | None:
    """What stands behind `key:` in a file of /proc."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    found = (line.partition(":")[2].strip() for line in lines if line.startswith(key))
    return next(found, None)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if "fate_llm" not in found:
        found["fate_llm"] = _version_of_checkout()
    return found


def _version_of_checkout() -> str:
    text = (ROOT / "fate_llm" / "__init__.py").read_text(encoding="utf-8")
    lines = (line for line in text.splitlines() if line.startswith("__version__"))
    return next(lines, "=unknown").partition("=")[2].strip().strip('"')


# --- children ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Child:
    """A process that ended well. started: on the monotonic clock, which all processes share. answer: its last line."""

    started: float
    seconds: float
    answer: dict[str, Any]
    errors: str


def environment(*folders: Path, **variables: str) -> dict[str, str]:
    """Our environment with the checkout, this folder and `folders` importable. No telemetry, no hub."""
    path = [str(ROOT), str(FOLDER), *map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])]
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    still = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(path)}
    return {**os.environ, **quiet, **still, **variables}


def run_child(
    command: Sequence[str | Path],
    *,
    timeout: float,
    env: Mapping[str, str] | None = None,
    answers: bool = True,
) -> Child:
    """Run a command to its end. answers: its last line on stdout is a JSON object.

    Raises:
        SystemExit: it failed or took longer than `timeout` seconds; with the end of what it said.
    """
    started = time.monotonic()
    with subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(env) if env is not None else environment(),
    ) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise SystemExit(f"{Path(str(command[1])).name} took longer than {timeout:g} s") from None
    seconds = time.monotonic() - started
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\nended with {process.returncode}:\n{errors[-3000:]}")
    lines = output.strip().splitlines() if answers else []
    return Child(started, seconds, json.loads(lines[-1]) if lines else {}, errors)


# --- memory ------------------------------------------------------------------------------------------------------


def own_peak_mib() -> float:
    """Peak resident memory of this process."""
    text = _value_of(Path("/proc/self/status"), "VmHWM")
    return int(text.split()[0]) / 1024 if text else 0.0


@dataclass
class TreeMemory:
    """Samples the memory of everything below this process while the `with` block lasts; peaks in MiB.

    pss: proportional set size, so that pages which processes share count once: the fair sum over a tree.
    rss: sum of resident sizes, which counts shared pages many times. processes: the most seen at once.
    """

    every: float = 0.5
    pss: float = 0.0
    rss: float = 0.0
    processes: int = 0
    _over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> TreeMemory:
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        assert self._thread is not None
        self._thread.join()

    def running(self) -> bool:
        """Whether any process below this one still runs; those that have ended are cleared away."""
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True

    def _watch(self) -> None:
        while not self._over.wait(self.every):
            self._sample()

    def _sample(self) -> None:
        found = [memory for pid in _descendants(os.getpid()) if (memory := _memory(pid)) is not None]
        self.pss = max(self.pss, sum(pss for pss, _ in found))
        self.rss = max(self.rss, sum(rss for _, rss in found))
        self.processes = max(self.processes, len(found))


def _descendants(root: int) -> list[int]:
    """All processes below `root`, without it."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            children.setdefault(_parent(entry.name), []).append(int(entry.name))
    found: list[int] = []
    waiting = [root]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def _parent(pid: str) -> int:
    try:
        text = Path("/proc", pid, "stat").read_text()
    except OSError:  # it has ended
        return -1
    return int(text.rpartition(")")[2].split()[1])


def _memory(pid: int) -> tuple[float, float] | None:
    """Proportional and resident size in MiB, or None when the process has ended."""
    try:
        lines = Path("/proc", str(pid), "smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    sizes = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines[1:] if ":" in line}
    return (sizes["Pss"], sizes["Rss"]) if "Pss" in sizes else None
