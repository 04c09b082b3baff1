"""Party services without processes: real homes, databases, audit logs and artifacts; words, workers and time by hand.

An `Office` is the desk of one party's service. A `World` passes words between offices, lets the clerk work, and moves
the clock. Workers are notes: a test says what they do. An office may be killed between any two steps, or by an error in
the middle of one, and opened again on what its disk has.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections import Counter, deque
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fate_llm.core.errors import FateError, InternalError, UnknownJob
from fate_llm.runtime.artifacts.models import ModelRegistry
from fate_llm.runtime.artifacts.store import ArtifactStore
from fate_llm.runtime.events import Event
from fate_llm.runtime.federation_setup import plan_setup, set_up, write_files
from fate_llm.runtime.record.audit import AuditLog
from fate_llm.runtime.service.cases import Case
from fate_llm.runtime.service.desk import Desk
from fate_llm.runtime.service.hall import Fresh, Hall, News, Roster
from fate_llm.runtime.service.wording import read_word, write_word
from fate_llm.runtime.service.words import Word
from fate_llm.runtime.service.workers import Over, Said
from fate_llm.runtime.store import engine
from fate_llm.runtime.store.store import Store
from fate_llm.runtime.trust.catalog import FingerprintCache
from fate_llm.runtime.trust.home import open_home
from tests.runtime.toys import toy_pipeline
from tests.services import OPEN_POLICY

MEMBERS = ("a", "b", "z")
POLICY = (OPEN_POLICY % {"members": ", ".join(MEMBERS)}).replace(", recorder: {}", "")
START = 1_790_000_000.0  # seconds since 1970


def pipeline(**tasks: Any) -> dict[str, Any]:
    """The toys' pipeline with one host."""
    data = toy_pipeline(**tasks)
    data["parties"] = {"guest": "a", "hosts": ["b"], "arbiter": "z"}
    return data


class Workers:
    """What would run: by job, the order."""

    def __init__(self) -> None:
        self.orders: dict[str, Mapping[str, Any]] = {}
        self.started: list[Mapping[str, Any]] = []
        self.stopped: list[tuple[str, str]] = []
        self.told: list[tuple[str, Mapping[str, Any]]] = []
        self.fault: Exception | None = None

    def start(self, order: Mapping[str, Any], *, errors: Path, command: Any = None) -> int:
        if self.fault is not None:
            raise self.fault
        self.orders[order["job"]] = order
        self.started.append(order)
        return 1

    def stop(self, job: str, reason: str) -> None:
        self.stopped.append((job, reason))

    def tell(self, job: str, message: Mapping[str, Any]) -> None:
        self.told.append((job, message))

    def running(self) -> dict[str, int]:
        return dict.fromkeys(self.orders, 1)


class Clerk:
    """Work that waits until the world lets it be done."""

    def __init__(self, artifacts: ArtifactStore, office: Office) -> None:
        self.waiting: deque[Callable[[], None]] = deque()
        self.tidied: list[list[str]] = []
        self.emptied: list[list[str]] = []  # names of the folders that went with them
        self._artifacts, self._office = artifacts, office

    def do(self, work: Any, then: Any = None, failed: Any = None) -> None:
        def entry() -> None:
            try:
                result = work()
            except FateError as error:
                self._office.log.append(f"{error.code}: {error.message}")
                if failed is not None:
                    self._office.queue.append(partial(failed, error))
                return
            if then is not None:
                self._office.queue.append(lambda: then(result))

        self.waiting.append(entry)

    def keep(self, outputs: Mapping[str, str], kinds: Mapping[str, Any], then: Any) -> None:
        self.do(lambda: {n: self._artifacts.put(Path(p), kind=kinds[n]).digest for n, p in outputs.items()}, then)

    def tidy(self, address: Any, party: str, inboxes: list[str], folders: list[Path]) -> None:
        self.emptied.append([path.name for path in folders])
        self.do(lambda: self.tidied.append(inboxes))


class Office:
    """One party's desk. `log`: what it told its operator. `sent`: words, by receiver, as far as the world took them."""

    def __init__(self, world: World, name: str, folder: Path) -> None:
        self.world, self.name, self.folder = world, name, folder
        self.log: list[str] = []
        self.queue: deque[Callable[[], None]] = deque()
        self.sent: list[tuple[str, Word]] = []
        self.errors: list[Exception] = []
        self.up = False
        (folder / "policy.yaml").write_text(POLICY)

    def open(self) -> Office:
        home = open_home(self.folder)
        state = home.make_state()
        (state / "jobs").mkdir(exist_ok=True)
        self._undo = contextlib.ExitStack()
        self.store = Store.open(home.store_url, now=self.world.now)
        self.audit = AuditLog.open(state / "audit", home.identity(), self.name, self.world.now)
        self.artifacts = ArtifactStore(home.artifacts_url)
        self.workers, self.clerk = Workers(), Clerk(self.artifacts, self)
        self.news = News()
        for close in (self.store.close, self.audit.close):
            self._undo.callback(close)
        post: Any = SimpleNamespace(
            send=lambda to, word: self.world.post(self.name, to, word),
            unreachable=lambda party: "",
            reload=lambda roster: None,
            counts=Counter(),
            connected=True,
        )
        hall: Any = Hall(
            home,
            self.name,
            home.identity(),
            Roster(home.settings.federation, home.federation),
            self.store,
            post,
            self.workers,  # type: ignore[arg-type]
            self.audit,
            self.artifacts,
            ModelRegistry(self.store, self.artifacts),
            self.clerk,  # type: ignore[arg-type]
            FingerprintCache(state / "fingerprints.json"),
            self.world.now,
            self.log.append,
            self.news,
            Fresh(home.settings.policy, home.policy),
            Fresh(home.settings.catalog, home.catalog),
            self._undo,
        )
        self.hall: Hall = hall
        self.desk = Desk(hall)
        self.queue.clear()
        self.up = True
        self.do(self.desk.load)
        return self

    def kill(self) -> None:
        """The process is gone: what it had not stored is, too."""
        self.up = False
        self._undo.close()
        self.queue.clear()

    def again(self) -> Office:
        """Killed and started again."""
        self.kill()
        return self.open()

    def do(self, entry: Callable[[], None] | None) -> None:
        """One entry as the engine deals with it: an error is noted, and the next goes on."""
        while entry is not None:
            try:
                entry()
            except Exception as error:
                self.errors.append(error)
            entry = self.desk.next()

    def case(self, job: str) -> Case:
        found = self.desk._case(job)
        assert found is not None
        return found

    def part(self, job: str) -> str:
        """The state of its part, empty while it has not heard of the job."""
        found = self.desk._case(job)
        return "" if found is None else found.part.state.value

    def view(self, job: str) -> dict[str, Any]:
        """What its API shows; nothing while it has not heard of the job."""
        with contextlib.suppress(UnknownJob):
            return self.desk.job(job)
        return {"state": "", "over": False}

    # --- what its worker does ---

    def event(self, job: str, kind: str, task: str, **fields: Any) -> None:
        attempt = self.workers.orders[job]["attempt"]
        said = Said(job, attempt, Event(kind, self.name, task, self.world.now(), fields))
        self.do(lambda: self.desk.said(said))

    def over(self, job: str, error: FateError | None = None) -> None:
        order = self.workers.orders.pop(job)
        end = {"error": None if error is None else error.as_dict()}
        self.do(lambda: self.desk.said(Over(job, order["attempt"], end, "exit status 0")))

    def work(self, job: str, error: FateError | None = None) -> None:
        """Run all of this party's tasks that are not finished, and end."""
        case, order = self.case(job), self.workers.orders[job]
        for task in case.tasks:
            if task not in order["finished"]:
                self.event(job, "task_started", task)
                for name in case.spec.component(task).outputs:
                    case.own.output(task, name).write_text(f"{name} of {task} at {self.name}")
                self.event(job, "task_finished", task)
        self.over(job, error)


def make_homes(folder: Path) -> Path:
    """Homes of all parties, with databases that are ready: made once, copied for each test."""
    setup = plan_setup(
        name="trial",
        parties=MEMBERS,
        topology="shared",
        brokers=["localhost:5671"],
        config_folder=f"{folder}/OWNER",
        disk_free="50MB",
    )
    write_files(folder / "written", set_up(setup, now=datetime(2026, 1, 1, tzinfo=UTC)))
    for name in MEMBERS:
        home = open_home(folder / "written/parties" / name)
        home.make_state()
        Store.open(home.store_url, now=lambda: START).close()
    return folder / "written"


def without_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for the disk: a process that is killed, as here, loses nothing that it has written."""
    usual = engine._prepare_connection

    def prepare(connection: sqlite3.Connection, record: Any) -> None:
        usual(connection, record)
        connection.execute("PRAGMA synchronous = OFF").close()

    monkeypatch.setattr(engine, "_prepare_connection", prepare)
    monkeypatch.setattr(os, "fsync", lambda file: None)


class World:
    """Offices of a federation, and the time. template: what `make_homes` made."""

    def __init__(self, folder: Path, template: Path) -> None:
        self.time = START
        self.mail: deque[tuple[str, str, bytes]] = deque()
        shutil.copytree(template, folder / "written")
        self.offices = {name: Office(self, name, folder / "written/parties" / name) for name in MEMBERS}
        for office in self.offices.values():
            office.open()

    def __getitem__(self, name: str) -> Office:
        return self.offices[name]

    def now(self) -> float:
        return self.time

    def post(self, sender: str, receiver: str, word: Word) -> None:
        if sender in self.offices:
            self.offices[sender].sent.append((receiver, word))
        self.mail.append((sender, receiver, write_word(word)))

    def step(self, seconds: float = 1.0) -> None:
        """Words arrive, clerks do what waits, time passes."""
        self.time += seconds
        for _ in range(len(self.mail)):
            sender, receiver, body = self.mail.popleft()
            if self.offices[receiver].up:
                office = self.offices[receiver]
                office.do(partial(office.desk.heard, sender, read_word(body)))
        for office in self.offices.values():
            if office.up:
                office.do(office.desk.tick)
                while office.clerk.waiting or office.queue:
                    while office.clerk.waiting:
                        office.clerk.waiting.popleft()()
                    while office.queue:
                        office.do(office.queue.popleft())

    def until(self, condition: Callable[[], Any], *, steps: int = 200) -> None:
        for _ in range(steps):
            if condition():
                return
            self.step()
        logs = {name: office.log[-12:] for name, office in self.offices.items()}
        raise AssertionError(f"it did not come true: {logs}, errors: {[o.errors for o in self.offices.values()]}")

    def submit(self, data: Mapping[str, Any] | None = None, **more: Any) -> str:
        found = self["a"].desk.submit(dict(data or pipeline()), **{"priority": None, "labels": {}, "key": None, **more})
        job: str = found["job"]
        return job

    def all_run(self, job: str) -> None:
        self.until(lambda: all(job in office.workers.orders for office in self.offices.values()))

    def run(self, job: str) -> None:
        """All parts to their ends, in success."""
        self.all_run(job)
        for office in self.offices.values():
            office.work(job)
        self.ended(job)

    def ended(self, job: str) -> None:
        self.until(lambda: all(office.view(job)["over"] for office in self.offices.values()))

    def close(self) -> None:
        for office in self.offices.values():
            office.kill() if office.up else None

    def no_errors(self) -> None:
        assert {name: office.errors for name, office in self.offices.items() if office.errors} == {}


def bug(*_: Any, **__: Any) -> Any:
    raise InternalError("a defect")


__all__ = ["MEMBERS", "POLICY", "Office", "World", "bug", "make_homes", "pipeline", "without_disk"]
