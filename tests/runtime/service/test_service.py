"""The engine's threads and the bringing up of a service, in this process: no broker is needed to be refused."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fate_llm.core.errors import ConfigurationError, InternalError, ServiceLost, UnknownJob
from fate_llm.runtime.service import engine as engines
from fate_llm.runtime.service import serve as serving
from fate_llm.runtime.service.client import ServiceClient
from fate_llm.runtime.service.engine import Engine
from fate_llm.runtime.service.hall import News
from fate_llm.runtime.service.serve import Service
from fate_llm.runtime.trust.home import open_home

from .offices import make_homes

PATIENCE = 30.0


class Desk:
    """Notes what the engine has it do."""

    def __init__(self, hall: Any) -> None:
        self.hall = hall
        self.ticks = 0
        self.heard_of: list[Any] = []
        self.later: list[Callable[[], None]] = []
        self.gate = threading.Event()
        self.gate.set()

    def load(self) -> None: ...

    def next(self) -> Callable[[], None] | None:
        return self.later.pop(0) if self.later else None

    def tick(self) -> None:
        self.gate.wait(PATIENCE)
        self.ticks += 1

    def heard(self, sender: str, word: Any) -> None:
        self.heard_of.append(word)

    def look(self) -> None: ...

    def job(self, job: str) -> dict[str, Any]:
        if job == "bug":
            raise ZeroDivisionError("a defect")
        if job == "unknown":
            raise UnknownJob("no such job")
        return {"job": job}

    def lines(self, job: str, *, after: int, limit: int) -> dict[str, Any]:
        self.hall.read += 1
        return {"lines": [1] if self.hall.read > 1 else [], "ended": False}


class Post:
    """Words as fast as anybody takes them."""

    def __init__(self) -> None:
        self.connected, self.given, self.closed, self.away = True, 0, False, "it is away"
        self.words = 0
        self.error: Exception | None = None

    def receive(self, timeout: float) -> Any:
        if self.error is not None:
            raise self.error
        if self.given >= self.words:
            time.sleep(0.01)
            return None
        self.given += 1
        return "b", self.given

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    files: dict[str, Any] = {"policy": lambda: None, "catalog": lambda: None}
    hall = SimpleNamespace(post=Post(), news=News(), read=0, me="a", close=lambda: None, **files)
    monkeypatch.setattr(engines, "open_hall", lambda home, **_: hall)
    monkeypatch.setattr(engines, "Desk", Desk)
    said: list[str] = []
    made = Engine(None, now=time.time, say=said.append)  # type: ignore[arg-type]
    yield SimpleNamespace(it=made, desk=made._desk, hall=hall, said=said)
    made._desk.gate.set()  # type: ignore[attr-defined]
    made.close()


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_an_engine_that_is_behind_piles_up_neither_ticks_nor_words(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "_TICK", 0.001)
    engine.hall.post.words = 100_000
    engine.desk.gate.clear()  # a disk that does not answer
    engine.it.start()
    until(lambda: engine.it._queue.qsize() > engines._BACKLOG)
    time.sleep(0.05)  # fifty ticks later
    waiting = engine.hall.post.given - len(engine.desk.heard_of)
    assert waiting <= engines._BACKLOG + 3, "the rest waits at the broker"
    assert engine.it._queue.qsize() <= waiting + 2, "of fifty ticks one waits"
    engine.desk.gate.set()
    until(lambda: len(engine.desk.heard_of) > 2 * engines._BACKLOG)
    assert engine.desk.heard_of[:400] == list(range(1, 401))


def test_one_entry_s_error_is_told_and_the_others_go_on(engine: Any) -> None:
    engine.it.start()
    done = threading.Event()

    def bug() -> None:
        raise ZeroDivisionError("a defect")

    engine.desk.later += [bug, bug, done.set]
    assert done.wait(PATIENCE)
    assert sum("ZeroDivisionError: a defect" in text for text in engine.said) == 2
    assert engine.it.job("x") == {"job": "x"}
    with pytest.raises(UnknownJob):
        engine.it.job("unknown")
    with pytest.raises(InternalError, match="ZeroDivisionError"):
        engine.it.job("bug")


def test_who_waits_for_lines_is_woken(engine: Any) -> None:
    engine.it.start()
    found: list[Any] = []
    waiting = threading.Thread(target=lambda: found.append(engine.it.lines("j", after=0, limit=5, wait=PATIENCE)))
    waiting.start()
    until(lambda: engine.hall.read == 1)
    while waiting.is_alive():
        engine.hall.news.tell()
        waiting.join(0.01)
    assert found[0]["lines"] == [1]


def test_a_post_that_has_failed_is_seen(engine: Any) -> None:
    engine.it.start()
    assert engine.it.health()["status"] == "ok"
    engine.hall.post.connected = False
    assert engine.it.health()["status"] == "failed"
    assert len(engine.it.health()["reasons"]) == 1
    engine.hall.post.error = InternalError("the post has ended")
    until(lambda: engine.it.failed is not None)
    assert "the engine has stopped" in engine.it.health()["reasons"]


def test_a_busy_engine_is_said_to_be_busy(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_ANSWER", 0.05)
    engine.desk.gate.clear()
    engine.it.start()
    until(lambda: engine.it._ticking.is_set() is False and engine.it._queue.qsize() >= 0)
    with pytest.raises(ServiceLost, match="busy"):
        while True:
            engine.it.job("x")


# --- a whole service in this process, whose broker is not there -------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = make_homes(tmp_path) / "parties/a"
    with socket.create_server(("127.0.0.1", 0)) as taken:  # nobody listens there afterwards
        port = taken.getsockname()[1]
    for name in ("party.yaml", "federation.yaml"):
        path = folder / name
        path.write_text(path.read_text().replace("5671", str(port)))
    return folder


@pytest.mark.slow
def test_a_service_without_its_broker_answers_and_says_so(home: Path) -> None:
    said: list[str] = []
    service = Service(open_home(home), say=said.append)
    try:
        client = ServiceClient.of_home(home)
        found = client.health()
        assert found["status"] == "failed"
        assert "broker" in found["reasons"][0]
        assert client.jobs() == []
        note = json.loads((home / "state/service.json").read_text())
        assert note == {"pid": os.getpid(), "host": "127.0.0.1", "port": service.port}
        # Only one service may have a home
        with pytest.raises(ConfigurationError, match="another service works in"):
            Service(open_home(home), say=said.append)
        assert client.jobs() == [], "and the first has not noticed"
        client.close()
    finally:
        service.close()
    service.close()
    assert not (home / "state/service.json").exists()
    with pytest.raises(ServiceLost):
        ServiceClient.of_home(home)
    # And it can be had again
    Service(open_home(home), say=said.append).close()


@pytest.mark.slow
def test_a_port_that_is_taken_leaves_nothing_open(home: Path) -> None:
    before = threading.active_count()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        path = home / "party.yaml"
        port = f"port: {taken.getsockname()[1]}"
        text = path.read_text()
        assert "port: 0" in text
        path.write_text(text.replace("port: 0", port, 1))
        with pytest.raises(ConfigurationError, match=r"cannot listen on 127\.0\.0\.1"):
            Service(open_home(home), say=lambda _: None)
    path.write_text(text)
    Service(open_home(home), say=lambda _: None).close()
    until(lambda: threading.active_count() <= before)


def test_the_exit_code_says_how_it_ended(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        host, port, failed = "127.0.0.1", 1, InternalError("the engine has a defect")

        def __init__(self, *_: Any, **__: Any) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setattr(serving, "Service", Failing)
    said: list[str] = []
    assert serving.serve(home, say=said.append) == 70
    assert "the engine has a defect" in said[-1]
    monkeypatch.setattr(Failing, "failed", None)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), 15))
    timer.start()
    assert serving.serve(home, say=said.append) == 0
    assert "go on when the service is started again" in said[-1]
