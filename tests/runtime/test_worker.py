"""A party's worker process, as far as it needs no broker: how it listens, ends, and takes over from a dead one."""

from __future__ import annotations

import fcntl
import io
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from fate_llm.core.errors import FateError, JobCancelled, QuorumLost
from fate_llm.runtime import worker
from fate_llm.runtime.jobfolder import PartyFolder
from fate_llm.runtime.journal import replace_json


class Channel:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def cancel(self, reason: str) -> None:
        self.told.append(("cancel", reason))

    def lost(self, *what: str) -> None:
        self.told.append(("lost", *what))

    def announce_done(self) -> None:
        self.told.append("done")

    def announce_failure(self, error: FateError, *, task: str) -> None:
        self.told.append((type(error), error.message, task))


class Link:
    """Notes whom it forgets."""

    def __init__(self, waiting: dict[str, int] | None = None) -> None:
        self.forgotten: list[str] = []
        self.waiting = waiting or {}
        self.flushed: list[float] = []

    def forget(self, party: str) -> None:
        self.forgotten.append(party)

    def flush(self, timeout: float) -> bool:
        self.flushed.append(timeout)
        return not any(self.waiting.values())

    def unreported(self) -> dict[str, int]:
        return self.waiting


def listen(*messages: dict[str, Any], orphan: str = "cancel") -> tuple[Channel, Link]:
    channel, link = Channel(), Link()
    lines = "".join(json.dumps(message) + "\n" for message in messages)
    worker._listen(io.StringIO(lines), channel, link, orphan)  # type: ignore[arg-type]
    return channel, link


def test_it_is_told_of_an_end_of_others_and_of_its_own() -> None:
    channel, link = listen({"lost": ["b", "silent", "is gone"]}, {"cancel": "enough"}, {"unknown": 1})
    assert channel.told == [
        ("lost", "b", "silent", "is gone"),
        ("cancel", "enough"),
        ("cancel", "whoever started this party is gone"),
    ]
    assert link.forgotten == ["b"]


def test_who_has_left_is_not_waited_for_and_its_last_words_are(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[float, Any, Any]] = []

    class Timer:
        daemon = False

        def __init__(self, seconds: float, call: Any, words: Any) -> None:
            self.what = (seconds, call, words)

        def start(self) -> None:
            assert self.daemon, "the process does not wait for it"
            started.append(self.what)

    monkeypatch.setattr(threading, "Timer", Timer)
    channel, link = listen({"left": "b"})
    assert link.forgotten == ["b"]
    ((seconds, call, words),) = started
    assert seconds > 0 and ("lost", "b", "done", "has finished its part") not in channel.told
    call(*words)
    assert channel.told[-1] == ("lost", "b", "done", "has finished its part")


def test_an_orphan_of_a_service_exits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Exited(BaseException):
        pass

    def leave(status: int) -> None:
        raise Exited(status)

    monkeypatch.setattr(worker.os, "_exit", leave)
    with pytest.raises(Exited):
        listen(orphan="exit")


def test_a_process_that_had_said_all_to_the_others_only_repeats_its_end(tmp_path: Path) -> None:
    # Given a party of this attempt that ended, and whose link is gone; no broker is asked for anything
    folder = PartyFolder(tmp_path / "parties" / "a")
    end = {"error": None, "failed_task": "", "outputs": {"t": {"model": "x"}}}
    replace_json(folder.path / "ended.json", {"attempt": 2, "end": end})
    (folder.path / "link" / "2").mkdir(parents=True)
    from tests.runtime.toys import toy_pipeline

    order = {
        "pipeline": toy_pipeline(words={"component": "words"}),
        "folder": str(tmp_path),
        "party": "a",
        "attempt": 2,
        "durable": True,
    }
    assert worker.work(order, io.StringIO(), lambda message: None) == end
    assert not (folder.path / "link").exists()


def test_the_end_of_another_attempt_is_not_this_one_s(tmp_path: Path) -> None:
    folder = PartyFolder(tmp_path)
    assert worker._ended(folder, 1) is None
    replace_json(tmp_path / "ended.json", {"attempt": 1, "end": {"error": None}})
    assert worker._ended(folder, 1) == {"error": None}
    assert worker._ended(folder, 2) is None


@pytest.mark.parametrize("error", [None, QuorumLost("too few"), JobCancelled("enough")])
def test_an_end_is_told_again_as_it_was(error: FateError | None) -> None:
    channel = Channel()
    end = {"error": None if error is None else error.as_dict(), "failed_task": "tune"}
    worker._say_again(channel, end)  # type: ignore[arg-type]
    assert channel.told == (["done"] if error is None else [(type(error), error.message, "tune")])


def test_after_an_error_nobody_holds_it_up() -> None:
    link = Link({"b": 0, "c": 7})
    worker._let_go(link)  # type: ignore[arg-type]
    assert link.flushed == [worker._LAST_WORDS]
    assert link.forgotten == ["c"]


def test_it_waits_until_its_predecessor_lets_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "session.lock"
    worker._wait_for_predecessor(lock)  # nobody was here before
    file = lock.open("wb")
    fcntl.flock(file, fcntl.LOCK_EX)
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            file.close()

    monkeypatch.setattr(worker.time, "sleep", nap)
    worker._wait_for_predecessor(lock)
    assert len(naps) == 3
    with lock.open("wb") as again:
        fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)  # and it does not keep it


def test_it_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "session.lock"
    now = [0.0]
    monkeypatch.setattr(worker.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr(worker.time, "monotonic", lambda: now[0])
    with lock.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        worker._wait_for_predecessor(lock)
    assert now[0] >= worker._PREDECESSOR
