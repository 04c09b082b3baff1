"""A federation of party services for a benchmark: guest, host and arbiter as processes over one broker with TLS.

The toys and the harness are those of the tests, so the checkout has to be there, and `fate_llm[dev]` installed.
"""

from __future__ import annotations

import os
import sqlite3
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _measure import ROOT

sys.path.insert(0, str(ROOT))  # `tests` is not installed

from tests.brokers import SHARED, LiveFederation, leftovers, live_federation
from tests.runtime import toys
from tests.services import LiveServices, live_services

__all__ = [
    "ARBITER",
    "GUEST",
    "HOST",
    "PARTIES",
    "Site",
    "Vitals",
    "kinds_of_files",
    "open_site",
    "queues",
    "rows",
    "stepper",
    "vitals",
]

GUEST, HOST, ARBITER = PARTIES = ("a", "b", "z")
POLICY = """\
version: 1
initiators: [a]
components: {stepper: {}}
protection: {least: plain, contributors: 2}
privacy: {require: none}
schedule: always
resources: {cpus: 2, memory: 16GiB, gpus: 0, hours: 1}
show: {logs: all, losses: true, progress: true}
manual: []
"""
_LIMITS = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True, slots=True)
class Site:
    """Running services, and the broker below them. folder: for what the benchmark itself writes."""

    live: LiveFederation
    services: LiveServices
    folder: Path

    def brokers(self) -> list[str]:
        """Each party's way to its broker, as `fate_llm submit --broker` takes it."""
        return [f"{party}={self.live.folder / 'parties' / party / 'party.yaml'}" for party in PARTIES]

    def state(self, party: str) -> Path:
        return self.services[party].home / "state"


@contextmanager
def open_site(*, settings: str = "heartbeat: 0.5\nlost_after: 60\n") -> Iterator[Site]:
    """Start everything, and stop it at the end. The toys are known to this process, too.

    settings: lines of each party.yaml. Those that are given here are the tests'; the program's own are `""`.
    """
    with tempfile.TemporaryDirectory(prefix="fate-services-") as scratch, _installed(Path(scratch)) as path:
        os.environ.update(_LIMITS)
        with (
            live_federation(*PARTIES, topology=SHARED) as live,
            live_services(live, toys=path, settings=settings, policies=dict.fromkeys(PARTIES, POLICY)) as services,
        ):
            yield Site(live, services, Path(scratch))


@contextmanager
def _installed(folder: Path) -> Iterator[str]:
    """The toys as an installed package; PYTHONPATH of whatever is to know them."""
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = path = toys.install(folder / "installed")
    sys.path.insert(0, str(folder / "installed"))
    try:
        yield path
    finally:
        sys.path.remove(str(folder / "installed"))
        os.environ["PYTHONPATH"] = before


def stepper(rounds: int, *, size: int = 1000, pause: float = 0.0) -> dict[str, Any]:
    """A job of one task: rounds of an array of `size` float32, `pause` seconds of work in each."""
    params = {"rounds": rounds, "size": size, "pause": pause}
    data = toys.toy_pipeline(steps={"component": "stepper", "params": params})
    data["parties"]["hosts"] = [HOST]
    data["job"]["round_deadline"] = "100s"
    return data


# --- what a process holds ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Vitals:
    """Of one process. rss_kib: resident memory. descriptors: open ones. children: of its threads, zombies included.

    cpu_seconds: that it has used, in user mode and in the kernel, without its children.
    """

    rss_kib: int
    descriptors: int
    threads: int
    children: int
    cpu_seconds: float


def vitals(pid: int) -> Vitals:
    """What the kernel says of a process now.

    Raises:
        SystemExit: it has ended.
    """
    place = Path("/proc", str(pid))
    try:
        status = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines())
        children = [pid for task in (place / "task").iterdir() for pid in (task / "children").read_text().split()]
        descriptors = len(list((place / "fd").iterdir()))
        times = (place / "stat").read_text().rpartition(")")[2].split()[11:13]
    except FileNotFoundError:
        raise SystemExit(f"the service with process id {pid} has ended; its log says why") from None
    cpu = sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
    return Vitals(int(status["VmRSS"].split()[0]), descriptors, int(status["Threads"]), len(children), cpu)


# --- what a party keeps ------------------------------------------------------------------------------------------


def kinds_of_files(state: Path, jobs: Mapping[str, str]) -> Counter[str]:
    """How many files a party's state has, by path; what differs from job to job is written in words.

    jobs: what stands for each id.
    """
    found: Counter[str] = Counter()
    for path in state.rglob("*"):
        if path.is_file():
            name = str(path.relative_to(state))
            for job, word in jobs.items():
                name = name.replace(job, word)
            if name.startswith("artifacts/"):
                name = "artifacts/..."
            found[name] += 1
    return found


def rows(state: Path) -> dict[str, int]:
    """How many rows each table of a party's database has."""
    with closing(sqlite3.connect(f"file:{state / 'fate.db'}?mode=ro", uri=True)) as database:
        names = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        own = [name for name in names if not name.startswith("sqlite_")]
        return {name: database.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0] for name in sorted(own)}


def queues(site: Site) -> list[str]:
    """Names of all queues at the broker."""
    return [str(name) for name in leftovers(site.live.node(GUEST))["queues"]]
