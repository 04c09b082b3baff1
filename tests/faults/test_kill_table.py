"""The published kill matrix is the one that is run, and its gates stop what they say. No process is started here."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults import gates, test_kill_matrix, test_kill_matrix_workers, test_kill_models
from tests.faults.matrix import CELLS, STAGES, VICTIMS, Cell, Doors, Hold, table, until

PAGE = Path(__file__).resolve().parents[2] / "docs/explanation/kill-matrix.md"


def cells_of_test(test: Any) -> list[Cell]:
    (mark,) = [mark for mark in test.pytestmark if mark.name == "parametrize"]
    return [one.values[0] for one in mark.args[1]]


def test_the_page_shows_the_cells_that_are_run() -> None:
    assert table() in PAGE.read_text(encoding="utf-8"), "run python -m tests.faults.matrix to write the table anew"


def test_every_cell_is_run_once() -> None:
    run = cells_of_test(test_kill_matrix.test_a_service_is_killed)
    run += cells_of_test(test_kill_matrix_workers.test_a_worker_or_the_broker_is_killed)
    assert sorted(map(str, run)) == sorted(map(str, CELLS))
    assert len(CELLS) == len(VICTIMS) * len(STAGES) == 56


def test_six_cells_have_a_real_trainer_and_the_page_names_them() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert len(test_kill_models.TINY) == 6
    for name, cell in test_kill_models.TINY.items():
        assert f"| {name} | {cell.hold.what} |" in page


def test_every_gate_stands_before_something_that_exists() -> None:
    for spots in (gates.WORKER, gates.SERVICE):
        for module, owner, name, _ in spots.values():
            assert inspect.isfunction(getattr(getattr(importlib.import_module(module), owner), name))
    spots_of = {"worker": gates.WORKER, "service": gates.SERVICE}
    for cell in CELLS:
        assert cell.hold.spot in spots_of[cell.hold.kind], cell


class Called:
    """Something that a process does. done: what it has done."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def collect(self, number: int) -> None:
        self.done.append(f"collected {number}")

    @contextlib.contextmanager
    def begin(self, *, write: bool) -> Iterator[str]:
        yield "connection"
        self.done.append("committed")


@pytest.fixture
def doors(tmp_path: Path) -> Iterator[Doors]:
    (tmp_path / "gates").mkdir()
    found = Doors(tmp_path)
    yield found
    found.open_all()


def stopped(doors: Doors, hold: Hold, call: Any) -> threading.Thread:
    """A thread that stands at a gate."""
    doors.shut(hold)
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    doors.reached(hold)
    return thread


@pytest.mark.parametrize(("when", "done"), [("before", ["collected 1"]), ("after", ["collected 1", "collected 2"])])
def test_a_gate_stops_one_call_on_one_side(doors: Doors, tmp_path: Path, when: str, done: list[str]) -> None:
    thing, hold = Called(), Hold("z", "worker", "collect", "", "2", when)
    call = gates._wrap(Called.collect, "collect", gates._number, tmp_path / "gates/z.worker")
    thread = stopped(doors, hold, lambda: [call(thing, number) for number in (1, 2, 3)])
    assert thing.done == done
    doors.open(hold)
    thread.join(10)
    assert thing.done == ["collected 1", "collected 2", "collected 3"]


def test_a_transaction_stops_before_its_end_and_only_one_that_writes(doors: Doors, tmp_path: Path) -> None:
    thing, hold = Called(), Hold("a", "service", "write", "")
    begin = gates._wrap_writing(Called.begin, "write", None, tmp_path / "gates/a.service")

    def work() -> None:
        for write in (False, True):
            with begin(thing, write=write):
                pass

    thread = stopped(doors, hold, work)
    assert thing.done == ["committed"], "the reading one"
    doors.open(hold)
    thread.join(10)
    assert thing.done == ["committed", "committed"]


def test_a_gate_of_another_spot_stops_nobody(doors: Doors, tmp_path: Path) -> None:
    thing = Called()
    doors.shut(Hold("z", "worker", "commit", ""))
    gates._wrap(Called.collect, "collect", gates._number, tmp_path / "gates/z.worker")(thing, 1)
    assert thing.done == ["collected 1"]


def test_the_chunks_of_one_message_are_counted(doors: Doors, tmp_path: Path) -> None:
    gate = tmp_path / "gates/b.worker"
    seen: list[str] = []
    seal = gates._wrap(lambda: seen.append("sealed"), "seal", gates._chunk, gate)

    def send(*, kind: str, round: int) -> None:
        for _ in range(2):
            seal()

    wrapped = gates._wrap(send, "send", gates._message, gate)
    hold = Hold("b", "worker", "seal", "", "round.term/2/2")

    def work() -> None:
        for number in (1, 2):
            wrapped(kind="round.term", round=number)

    thread = stopped(doors, hold, work)
    assert len(seen) == 3, "all of round 1, and half of round 2"
    doors.open(hold)
    thread.join(10)


def test_only_a_party_s_processes_are_armed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.orig_argv", ["python", "-m", "pytest"])
    before = [getattr(importlib.import_module(m), owner).__dict__[name] for m, owner, name, _ in gates.WORKER.values()]
    gates.arm(str(tmp_path))
    after = [getattr(importlib.import_module(m), owner).__dict__[name] for m, owner, name, _ in gates.WORKER.values()]
    assert after == before


def test_what_is_installed_arms_a_process(tmp_path: Path) -> None:
    gates.install(tmp_path)
    assert (tmp_path / "gates").is_dir()
    code = (tmp_path / "sitecustomize.py").read_text()
    assert json.dumps(str(tmp_path / "gates"))[1:-1] in code
    compile(code, "sitecustomize.py", "exec")


def test_waiting_says_what_did_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.faults.matrix.PATIENCE", 0.0)
    with pytest.raises(AssertionError, match="the moon"):
        until(lambda: False, "the moon")
