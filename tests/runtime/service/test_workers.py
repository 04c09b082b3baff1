"""Workers as processes: what they say arrives, and none is left whatever happens."""

from __future__ import annotations

import os
import queue
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fate_llm.runtime.events import Event
from fate_llm.runtime.service.workers import Over, Said, Workers

PATIENCE = 20.0
TALKER = """
import json, sys, time
order = json.loads(sys.stdin.readline())
say = lambda message: print(json.dumps(message), flush=True)
say({"event": ["task_started", "a", "train", 1.5, {"component": order.get("what")}]})
for line in sys.stdin:
    message = json.loads(line)
    if "cancel" in message:
        say({"end": {"error": {"code": "cancelled", "message": message["cancel"], "hint": ""}}})
        sys.exit(0)
    if "garbage" in message:
        print("no json", flush=True)
        print("[1, 2]", flush=True)
    if "end" in message:
        say({"end": {"error": None}})
        sys.exit(0)
    if "die" in message:
        sys.exit(3)
"""
DEAF = "import sys, time\nsys.stdin.readline()\nprint('{}', flush=True)\ntime.sleep(600)\n"
FAMILY = (
    "import subprocess, sys\nsys.stdin.readline()\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "import json\nprint(json.dumps({'event': ['child', 'a', '', 1.0, {'pid': child.pid}]}), flush=True)\n"
    "sys.stdin.readline()\n"
)

Start = Callable[..., Workers]


@pytest.fixture
def told() -> queue.Queue[Said | Over]:
    return queue.Queue()


@pytest.fixture
def start(told: queue.Queue[Said | Over], tmp_path: Path) -> Iterator[Start]:
    made: list[Workers] = []

    def begin(code: str = TALKER, **order: Any) -> Workers:
        workers = made[0] if made else Workers(told.put)
        made[:] = [workers]
        command = [sys.executable, "-c", code]
        workers.start({"job": "j", "attempt": 1, **order}, errors=tmp_path / "stderr.txt", command=command)
        return workers

    yield begin
    for workers in made:
        workers.close()
        assert workers.running() == {}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except OSError:
        return False


def test_what_a_worker_says_arrives_in_order(start: Start, told: queue.Queue[Said | Over]) -> None:
    workers = start(what="toy")
    assert told.get(timeout=PATIENCE) == Said("j", 1, Event("task_started", "a", "train", 1.5, {"component": "toy"}))
    workers.tell("j", {"garbage": 1})
    workers.tell("j", {"end": 1})
    over = told.get(timeout=PATIENCE)
    assert isinstance(over, Over)
    assert (over.job, over.attempt, over.end) == ("j", 1, {"error": None})
    assert workers.running() == {}


def test_a_worker_that_is_stopped_says_its_last_word(start: Start, told: queue.Queue[Said | Over]) -> None:
    workers = start()
    told.get(timeout=PATIENCE)
    workers.stop("j", "enough")
    over = told.get(timeout=PATIENCE)
    assert isinstance(over, Over)
    assert over.end is not None
    assert over.end["error"]["message"] == "enough"


def test_one_that_dies_without_a_word_is_told_as_that(start: Start, told: queue.Queue[Said | Over]) -> None:
    workers = start()
    told.get(timeout=PATIENCE)
    os.kill(workers.running()["j"], 9)
    assert told.get(timeout=PATIENCE) == Over("j", 1, None, "killed by signal 9")


def test_an_exit_without_an_end_is_a_death(start: Start, told: queue.Queue[Said | Over]) -> None:
    workers = start()
    told.get(timeout=PATIENCE)
    workers.tell("j", {"die": 1})
    over = told.get(timeout=PATIENCE)
    assert isinstance(over, Over)
    assert over.end is None


def test_one_that_does_not_stop_is_killed(
    start: Start, told: queue.Queue[Said | Over], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fate_llm.runtime.service.workers._GRACE", 0.1)
    workers = start(DEAF)
    workers.stop("j", "enough")
    assert told.get(timeout=PATIENCE) == Over("j", 1, None, "killed by signal 9")


def test_a_job_has_one_worker_and_the_first_says_nothing_more(start: Start, told: queue.Queue[Said | Over]) -> None:
    workers = start()
    told.get(timeout=PATIENCE)
    first = workers.running()["j"]
    start(attempt=2)
    found = told.get(timeout=PATIENCE)
    assert isinstance(found, Said)
    assert found.attempt == 2
    assert not alive(first)
    assert told.empty()


def test_its_children_end_with_it(start: Start, told: queue.Queue[Said | Over]) -> None:
    """As the ranks of torchrun do, whatever way their parent goes."""
    workers = start(FAMILY)
    said = told.get(timeout=PATIENCE)
    assert isinstance(said, Said)
    child = said.event.fields["pid"]
    assert alive(child)
    os.kill(workers.running()["j"], 9)
    # The child holds the pipe that its parent was heard through; the death is told all the same.
    assert told.get(timeout=PATIENCE) == Over("j", 1, None, "killed by signal 9")
    end = time.monotonic() + PATIENCE
    while alive(child) and time.monotonic() < end:
        time.sleep(0.01)
    assert not alive(child)


def test_closing_kills_all_and_tells_nothing(start: Start, told: queue.Queue[Said | Over]) -> None:
    workers = start()
    told.get(timeout=PATIENCE)
    pid = workers.running()["j"]
    workers.close()
    assert not alive(pid)
    assert told.empty()
    workers.tell("j", {"end": 1})
    workers.stop("j", "nobody is there")
    workers.close()


def test_stderr_of_all_starts_is_kept(start: Start, told: queue.Queue[Said | Over], tmp_path: Path) -> None:
    noisy = "import sys\nsys.stdin.readline()\nprint('trouble', file=sys.stderr)\n"
    for _ in range(2):
        start(noisy)
        assert isinstance(told.get(timeout=PATIENCE), Over)
    assert (tmp_path / "stderr.txt").read_text() == "trouble\n" * 2


def test_the_order_is_on_no_command_line(start: Start, told: queue.Queue[Said | Over]) -> None:
    workers = start(identity="5ec12e7" * 8)
    told.get(timeout=PATIENCE)
    pid = workers.running()["j"]
    for name in ("cmdline", "environ"):
        assert b"5ec12e7" not in Path(f"/proc/{pid}/{name}").read_bytes()
