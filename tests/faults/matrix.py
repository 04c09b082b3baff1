"""The kill matrix: every process of a federation, killed by SIGKILL at every stage of a job, and started again.

A cell is a victim and a stage. Some process is stopped exactly at the stage (`tests.faults.gates`), the victim is
killed and started again, and the job must end as if nothing had been. `docs/explanation/kill-matrix.md` publishes the
table; it is written by `table()`, and a test compares them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fate_llm.core import plugins
from fate_llm.core.errors import FateError
from fate_llm.runtime.record import dossier
from fate_llm.runtime.record.reading import LogReader
from tests.brokers import SHARED, LiveFederation, leftovers, live_federation
from tests.runtime import toys
from tests.runtime.durable_world import DurableWorld
from tests.services import LiveServices, live_services, workers_of

from . import gates

__all__ = ["CELLS", "STAGES", "VICTIMS", "Cell", "Hold", "Matrix", "cells_of", "open_matrix", "table", "toy_job"]

PATIENCE = 120.0  # seconds until a test that waits is called hanging
SIZE = 600_000  # values of the toy's state: a term has two chunks, so that there is a middle of an upload


@dataclass(frozen=True, slots=True)
class Hold:
    """Where a process is stopped: see `gates`. what: in words, for the table."""

    party: str
    kind: str
    spot: str
    what: str
    label: str = ""
    when: str = "before"


STAGES: dict[str, Hold] = {
    "invite": Hold("b", "service", "judge", "the host's service has the invitation, its policy is being asked"),
    "key exchange": Hold("b", "worker", "agree", "the host's worker has heard one party's keys", "1", "after"),
    "local training": Hold("b", "worker", "work", "the host's worker trains round 2", "2"),
    "upload": Hold("b", "worker", "seal", "half of the host's update of round 2 has left", "round.term/2/2"),
    "aggregation": Hold(
        "z", "worker", "collect", "the arbiter's worker has summed round 2, nothing is kept", "2", "after"
    ),
    "publication": Hold(
        "z", "worker", "send", "the guest has been told round 2, the host has not", "round.state/2", "after"
    ),
    "finishing": Hold("b", "worker", "done", "the host's worker has its outputs, and has told nobody"),
}
"""Where the job stands when the victim is killed, unless `OWN` says something else for it."""

OWN: dict[tuple[str, str], Hold] = {
    ("guest service", "invite"): Hold("a", "service", "lead", "it has stored the job, and said nothing yet", "Say"),
    ("guest service", "finishing"): Hold("a", "service", "close", "it has stored the end, and tidied nothing"),
    ("host service", "finishing"): Hold("b", "service", "close", "it has stored the end, and tidied nothing"),
    ("arbiter service", "invite"): Hold("z", "service", "judge", "it has the invitation, its policy is being asked"),
    ("arbiter service", "finishing"): Hold("z", "service", "sign", "its part has ended, its statement is not signed"),
    ("guest worker", "key exchange"): Hold("a", "worker", "agree", "it has heard one party's keys", "1", "after"),
    ("guest worker", "local training"): Hold("a", "worker", "work", "it trains round 2", "2"),
    ("guest worker", "upload"): Hold("a", "worker", "seal", "half of its update of round 2 has left", "round.term/2/2"),
    ("guest worker", "publication"): Hold(
        "a", "worker", "commit", "it has the state of round 2, and has not kept it", "2"
    ),
    ("guest worker", "finishing"): Hold("a", "worker", "done", "it has its outputs, and has told nobody"),
    ("host worker", "publication"): Hold(
        "b", "worker", "commit", "it has the state of round 2, and has not kept it", "2"
    ),
    ("arbiter worker", "key exchange"): Hold("z", "worker", "agree", "it has heard one party's keys", "1", "after"),
    ("arbiter worker", "finishing"): Hold("z", "worker", "close", "it has noted its end, and said it to nobody"),
}
"""Where the victim itself is in that stage, when that is another place than the stage's usual one."""

VICTIMS: dict[str, tuple[str, str]] = {
    "guest service": ("a", "service"),
    "host service": ("b", "service"),
    "arbiter service": ("z", "service"),
    "guest worker": ("a", "worker"),
    "host worker": ("b", "worker"),
    "arbiter worker": ("z", "worker"),
    "broker": ("", "broker"),
    "database": ("a", "database"),
}
"""Whose process it is. The database is a file: who dies is the guest's service, in the middle of a transaction."""


@dataclass(frozen=True, slots=True)
class Cell:
    """at: where a process is stopped, instead of the place of the toy's cell."""

    victim: str
    stage: str
    at: Hold | None = None

    @property
    def hold(self) -> Hold:
        return self.at or OWN.get((self.victim, self.stage), STAGES[self.stage])

    @property
    def restarts(self) -> dict[str, int]:
        """How many workers are started again, by party: that of the victim, when there is one at that stage."""
        party, kind = VICTIMS[self.victim]
        over = kind == "service" and self.stage == "finishing"  # its own worker has ended by then
        counts = dict.fromkeys(("a", "b", "z"), 0)
        if kind != "broker" and self.stage != "invite" and not over:
            counts[party] = 1
        return counts

    def __str__(self) -> str:
        return f"{self.victim}, {self.stage}"


CELLS = tuple(Cell(victim, stage) for victim in VICTIMS for stage in STAGES)


def cells_of(*victims: str) -> list[Any]:
    """The cells of some victims, as parameters of a test."""
    return [pytest.param(cell, id=f"{cell.victim}-{cell.stage}") for cell in CELLS if cell.victim in victims]


def table() -> str:
    """The matrix as the manual shows it."""
    lines = ["| killed | stage | where the job stands at that moment | workers started again |", "|---|---|---|---|"]
    names = {"a": "guest", "b": "host", "z": "arbiter"}
    for cell in CELLS:
        again = ", ".join(names[party] for party, count in cell.restarts.items() if count) or "none"
        lines.append(f"| {cell.victim} | {cell.stage} | {cell.hold.what} | {again} |")
    return "\n".join(lines)


def toy_job(**params: Any) -> dict[str, Any]:
    """Guest a, host b, arbiter z: three rounds with a momentum that only the journal brings back, then a sum."""
    data = toys.toy_pipeline(steps={"component": "stepper", "params": {"rounds": 3, "size": SIZE, **params}})
    data["parties"]["hosts"] = ["b"]
    data["job"]["round_deadline"] = "100s"
    return data


class Doors:
    """The gates of all processes of a federation. folder: where `gates.install` has put them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "gates"

    def shut(self, hold: Hold) -> None:
        """Stop that process there, the next time it comes by."""
        path = self._path(hold)
        path.with_name(f"{path.name}.reached").unlink(missing_ok=True)
        content = {"spot": hold.spot, "label": hold.label, "when": hold.when}
        path.with_name(f"{path.name}.new").write_text(json.dumps(content))
        os.replace(path.with_name(f"{path.name}.new"), path)

    def reached(self, hold: Hold) -> int:
        """Wait until the process stands there; its id."""
        mark = self._path(hold).with_name(f"{self._path(hold).name}.reached")
        until(lambda: mark.exists() and mark.read_text(), f"{hold.party}'s {hold.kind} at {hold.spot}")
        return int(mark.read_text())

    def open(self, hold: Hold) -> None:
        """Let it go on."""
        self._path(hold).unlink(missing_ok=True)

    def open_all(self) -> None:
        for path in self._folder.iterdir():
            path.unlink()

    def _path(self, hold: Hold) -> Path:
        return self._folder / f"{hold.party}.{hold.kind}"


def until(condition: Callable[[], Any], what: str, told: Callable[[], str] = str) -> Any:
    """Wait for a condition; its value."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"{what}: did not come true. {told()}")


@dataclass(slots=True)
class Matrix:
    """A federation of services that stays up from cell to cell."""

    live: LiveFederation
    services: LiveServices
    doors: Doors
    wanted: Callable[[Mapping[str, Any]], bytes]
    jobs: list[str] = field(default_factory=list)

    # --- one cell ---

    def run(self, cell: Cell, pipeline: Mapping[str, Any] | None = None, **end: Any) -> dict[str, dict[str, Any]]:
        """A job in which the victim dies at the stage; the views of all parties at the end, which have been checked.

        pipeline: instead of the toy's. end: for `succeeded`.
        """
        pipeline = pipeline or toy_job()
        self.doors.shut(cell.hold)
        job = self.submit(pipeline, wait=cell.hold.spot != "lead")
        self.doors.reached(cell.hold)
        self.kill(cell)
        self.doors.open(cell.hold)
        if not job:
            job = self._found(pipeline)
        views = self.succeeded(job, pipeline, **end)
        assert {party: view["restarts"] for party, view in views.items()} == cell.restarts, "workers started again"
        return views

    def submit(self, pipeline: Mapping[str, Any], *, wait: bool = True) -> str:
        """A new job of the guest; its id, unless its service is stopped before it can answer."""
        if wait:
            job = self.services.submit(pipeline)
            self.jobs.append(job)
            return job
        key, client = f"unanswered-{len(self.jobs)}", self.services["a"].client

        def ask() -> None:
            with contextlib.suppress(FateError):  # it is killed before it answers
                client.submit(pipeline, key=key)

        threading.Thread(target=ask, daemon=True).start()
        return ""

    def _found(self, pipeline: Mapping[str, Any]) -> str:
        """The job whose id nobody could be told: asked for again with the same key, as a client does."""
        (before,) = [found["job"] for found in self.services["a"].client.jobs() if found["job"] not in self.jobs]
        job = self.services.submit(pipeline, key=f"unanswered-{len(self.jobs)}")
        assert job == before, "what was stored before the kill"
        self.jobs.append(job)
        return job

    # --- kills ---

    def kill(self, cell: Cell) -> None:
        """Kill the victim and start it again. Whoever is stopped stays so until the victim is back."""
        party, kind = VICTIMS[cell.victim]
        mine = (cell.hold.party, cell.hold.kind) == (party, kind)
        if kind == "broker":
            node = self.live.node("a")
            node.kill()
            node.start(PATIENCE)
        elif kind == "worker":
            self._kill_worker(cell, party, mine=mine)
        elif kind == "database":
            self._kill_writing(party)
        else:
            self.kill_service(party, cell.hold if mine or cell.hold.party == party else None)

    def _kill_worker(self, cell: Cell, party: str, *, mine: bool) -> None:
        before = self.services[party].kill_worker()
        if cell.stage == "invite":
            assert before == [], "there are no workers before the parties have agreed"
            return
        assert len(before) == 1, "one worker"
        if mine:
            self.doors.open(cell.hold)
        until(lambda: set(workers_of(self.services[party].home)) - set(before), f"a new worker of {party}")

    def _kill_writing(self, party: str) -> None:
        """SIGKILL to a service whose transaction has its rows written, and is not committed."""
        writing = Hold(party, "service", "write", "")
        self.doors.shut(writing)
        assert self.doors.reached(writing) == self.services[party].process.pid  # type: ignore[union-attr]
        self.services[party].kill()
        self.doors.open(writing)
        self.services[party].start().ready()

    def kill_service(self, party: str, held: Hold | None = None) -> None:
        """SIGKILL, gates of its processes opened, and up again. Its worker dies with it."""
        live = self.services[party]
        live.kill()
        if held is not None:
            self.doors.open(held)
        live.start().ready()

    # --- the end ---

    def succeeded(
        self,
        job: str,
        pipeline: Mapping[str, Any],
        *,
        model: tuple[str, str] = ("steps", "model"),
        want: bytes | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Wait for the end, and check all that must be true of it, but for the number of restarts.

        model: task and file of the model that both contributors have. want: its bytes; what the toy makes by default.
        """
        views = self.services.ended_everywhere(job)
        for party, view in views.items():
            assert (view["state"], view["attempt"]) == ("success", 1), (party, view)
            shown = {name: part["state"] for name, part in view["parts"].items()}
            assert shown[party] == "success" and (party != "a" or shown == dict.fromkeys(views, "success")), shown
        want = self.wanted(pipeline) if want is None else want
        same = {party: self.services.output(job, party, *model) == want for party in ("a", "b")}
        assert same == {"a": True, "b": True}, "the bits of an undisturbed run"
        for party in views:
            self.check_dossier(job, party)
            self.check_nothing_left(job, party)
        return views

    def check_dossier(self, job: str, party: str) -> None:
        found = self.services[party].client.dossier(job)
        report = dossier.verify(found, self.live.federation.identities())
        assert [str(fault) for fault in report.faults] == [], party
        assert found["attempts"] == 1

    def check_nothing_left(self, job: str, party: str) -> None:
        """No process, no message in an inbox or outbox, no lock that is held."""
        live = self.services[party]
        own = live.job_folder(job) / "parties" / party
        until(lambda: not workers_of(live.home), f"{party} has no worker")
        until(lambda: not (own / "link").exists() and not (own / "journal").exists(), f"{party} has tidied up {own}")
        for lock in (*own.rglob("*.lock"), live.job_folder(job) / "machine.lock"):
            if lock.exists():
                with lock.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def check_records(self) -> None:
        """The audit chains of all parties, over all cells; and what is left at the broker."""
        identities = self.live.federation.identities()
        for party, live in self.services.parties.items():
            reader = LogReader(live.home / "state/audit", identities[party])
            assert [str(fault) for fault in reader.check()] == [], party
            assert reader.count > len(self.jobs), party

        def queues() -> list[str]:
            return [name for name in leftovers(self.live.node("a"))["queues"] if any(job in name for job in self.jobs)]

        end = time.monotonic() + 30
        while queues() and time.monotonic() < end:
            time.sleep(0.5)
        assert queues() == []

    def quiet(self) -> None:
        """Nothing of the last cell is left for the next: gates are open, all services are up, no client is open."""
        self.doors.open_all()
        for live in self.services.parties.values():
            if live.process is None or live.process.poll() is not None:
                live.start().ready()
        self.hang_up()

    def hang_up(self) -> None:
        """Close the connections of this process to the services."""
        for live in self.services.parties.values():
            live.hang_up()


@contextlib.contextmanager
def open_matrix(folder: Path, *parties: str, more: Mapping[str, str] | None = None, **options: Any) -> Iterator[Matrix]:
    """A federation of real services with one broker, whose processes stop at gates.

    more: lines of party.yaml, by party. options: of `live_services`.
    """
    site = folder / "site"
    where = toys.install(site)
    gates.install(site)
    patches = pytest.MonkeyPatch()
    patches.setattr(plugins, "_installed", toys.installed)
    known: dict[str, bytes] = {}

    def wanted(pipeline: Mapping[str, Any]) -> bytes:
        """The model of an undisturbed run, made without a broker or a process."""
        key = json.dumps(pipeline, sort_keys=True)
        if key not in known:
            place = folder / f"quiet{len(known)}"
            place.mkdir()
            (known[key],) = set(DurableWorld(place, dict(pipeline), patches).run().outputs().values())
        return known[key]

    try:
        with live_federation(*parties, topology=SHARED) as live:
            for party, lines in (more or {}).items():
                with (live.folder / "parties" / party / "party.yaml").open("a") as file:
                    file.write(lines)
            with live_services(live, toys=where, **options) as services:
                matrix = Matrix(live, services, Doors(site), wanted)
                matrix.hang_up()
                yield matrix
    finally:
        patches.undo()


if __name__ == "__main__":
    print(table())
