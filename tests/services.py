"""Real party services for tests: processes with homes of their own, killed and started again as a test asks.

`live_services(live, ...)` starts one service per party of a `LiveFederation` (tests.brokers), with a policy that lets
the toys run, and stops them at the end. Nothing here knows the inside of a service: it is a process, its home and its
HTTP API.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fate_llm.core.errors import FateError, ServiceLost, UnknownJob
from fate_llm.runtime.service.client import ServiceClient
from tests.brokers import LiveFederation

__all__ = ["OPEN_POLICY", "LiveParty", "LiveServices", "live_services", "workers_of"]

PATIENCE = 120.0  # seconds until a test that waits is called hanging; nothing waits for it when all is well

OPEN_POLICY = """
version: 1
initiators: [%(members)s]
components: {stepper: {}, words: {}, adder: {}, teller: {}, waiter: {}, meeting: {}, breaker: {}}
data: {"*": {}}
protection: {least: plain, contributors: 2}
privacy: {require: none}
schedule: always
resources: {cpus: 2, memory: 16GiB, gpus: 0, hours: 1}
show: {logs: all, losses: true, progress: true}
manual: []
"""


def workers_of(home: Path) -> list[int]:
    """Process ids of the workers whose job folder lies in a home; also of those whose service is gone."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words, links = path.read_bytes(), list(path.with_name("fd").iterdir())
        except OSError:  # it has ended
            continue
        if b"fate_llm.runtime.worker" in words and any(_target(link).startswith(f"{home}/") for link in links):
            found.append(int(path.parent.name))
    return found


def _target(link: Path) -> str:
    """What a link of /proc leads to; nothing when the file was closed meanwhile."""
    try:
        return os.readlink(link)
    except OSError:
        return ""


@dataclass(slots=True)
class LiveParty:
    """One party's service as a process."""

    name: str
    home: Path
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    _client: ServiceClient | None = None

    @property
    def log(self) -> Path:
        return self.home / "service.log"

    def start(self) -> LiveParty:
        """Start it; returns at once."""
        (self.home / "state/service.json").unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fate_llm", "party", "serve", "--home", str(self.home)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )
        self.starts += 1
        self.hang_up()
        return self

    def ready(self) -> LiveParty:
        """Wait until it listens and has its broker."""

        def well() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, f"{self.name} has ended; its log ends:\n{self.log.read_text()[-3000:]}"
            return bool(self.client.health()["status"] == "ok")

        self.until(well, what="to be well")
        return self

    @property
    def client(self) -> ServiceClient:
        if self._client is None:
            self._client = ServiceClient.of_home(self.home)
        return self._client

    def hang_up(self) -> None:
        """Close this process's connections to it; the next call makes new ones."""
        if self._client is not None:
            self._client.close()
        self._client = None

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def start_over(self, seconds: float) -> None:
        """SIGKILL; start it; let it work for some seconds; and SIGKILL it, and start it, again."""
        self.kill()
        self.start()
        time.sleep(seconds)
        self.kill()
        self.start()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(30)

    def kill_worker(self) -> list[int]:
        """SIGKILL to its workers; the process ids of those that were there."""
        pids = workers_of(self.home)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return pids

    def job_folder(self, job: str) -> Path:
        return self.home / "state/jobs" / job

    def events(self, job: str) -> list[dict[str, Any]]:
        """What this party's worker has written of a job, in order."""
        path = self.job_folder(job) / "parties" / self.name / "events.jsonl"
        try:
            lines = path.read_text().splitlines()
        except FileNotFoundError:
            return []
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):  # cut by a kill
                found.append(json.loads(line))
        return found

    def until(self, condition: Callable[[], Any], *, what: str = "") -> Any:
        """Wait for a condition; its value.

        A service that is not there (any more), and a job whose invitation is still on its way, make it false.
        """
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            with contextlib.suppress(ServiceLost, UnknownJob):
                if found := condition():
                    return found
            time.sleep(0.02)
        tail = self.log.read_text()[-3000:] if self.log.exists() else ""
        raise AssertionError(f"{self.name}: {what or 'a condition'} did not come true; its log ends:\n{tail}")


@dataclass(slots=True)
class LiveServices:
    """All services of a federation."""

    live: LiveFederation
    parties: dict[str, LiveParty] = field(default_factory=dict)

    def __getitem__(self, party: str) -> LiveParty:
        return self.parties[party]

    def submit(self, pipeline: Mapping[str, Any], *, party: str = "a", **more: Any) -> str:
        """A new job; its id."""
        job: str = self.parties[party].client.submit(pipeline, **more)["job"]
        return job

    def state(self, job: str, *, party: str = "a") -> str:
        state: str = self.parties[party].client.job(job)["state"]
        return state

    def ended(self, job: str, *, party: str = "a") -> dict[str, Any]:
        """Wait until a job is over for good at one party; its view there."""
        live = self.parties[party]

        def over() -> dict[str, Any] | None:
            found = live.client.job(job)
            return found if found["over"] else None

        found: dict[str, Any] = live.until(over, what=f"the end of {job}")
        return found

    def ended_everywhere(self, job: str) -> dict[str, dict[str, Any]]:
        """Wait until a job is over at all its parties; its view at each."""
        members = self.ended(job)["parts"]
        return {party: self.ended(job, party=party) for party in members}

    def output(self, job: str, party: str, task: str, name: str) -> bytes:
        return (self.parties[party].job_folder(job) / "parties" / party / task / name).read_bytes()


@contextlib.contextmanager
def live_services(
    live: LiveFederation,
    *,
    toys: str,
    policies: Mapping[str, str] | None = None,
    settings: str = "heartbeat: 0.5\nlost_after: 60\n",
    only: tuple[str, ...] = (),
) -> Iterator[LiveServices]:
    """Services of a federation's parties. toys: PYTHONPATH (`tests.runtime.toys.install`). policies: by party, instead
    of one that lets all toys run. settings: lines added to party.yaml. only: these parties, all by default.
    """
    members = live.federation.members
    services = LiveServices(live)
    usual = OPEN_POLICY % {"members": ", ".join(members)}
    environment = {"PYTHONPATH": toys, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}
    for party in only or members:
        home = live.folder / "parties" / party
        (home / "policy.yaml").write_text((policies or {}).get(party, usual))
        party_file = home / "party.yaml"
        if settings not in party_file.read_text():
            party_file.write_text(party_file.read_text().rstrip() + "\n" + settings)
        services.parties[party] = LiveParty(party, home, environment)
    try:
        for party in services.parties.values():
            party.start()
        for party in services.parties.values():
            party.ready()
        yield services
    finally:
        for party in services.parties.values():
            party.hang_up()
            with contextlib.suppress(FateError):
                party.kill()
        for party in services.parties.values():
            party.kill_worker()
