"""Events go to the party's files and to whoever watches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fate_llm.runtime.events import Event, EventLog
from fate_llm.runtime.jobfolder import PartyFolder


def test_an_event_is_written_and_shown(tmp_path: Path) -> None:
    seen: list[Event] = []
    folder = PartyFolder(tmp_path / "a")
    log = EventLog(now=lambda: 1_700_000_000.25, observers=(seen.append,))
    log.emit(folder, "bank-a", "tune", "round", {"number": 1, "loss": 0.5})
    (line,) = (folder.path / "events.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "event": "round",
        "party": "bank-a",
        "task": "tune",
        "time": 1_700_000_000.25,
        "number": 1,
        "loss": 0.5,
    }
    assert (folder.path / "log.txt").read_text() == "2023-11-14T22:13:20.250Z tune round number=1 loss=0.5\n"
    assert seen == [Event("round", "bank-a", "tune", 1_700_000_000.25, {"number": 1, "loss": 0.5})]


def test_steps_are_too_many_for_the_log(tmp_path: Path) -> None:
    folder = PartyFolder(tmp_path / "a")
    EventLog(now=lambda: 0.0).emit(folder, "a", "tune", "step", {"loss": 1.0})
    assert (folder.path / "events.jsonl").exists()
    assert not (folder.path / "log.txt").exists()


def test_events_of_the_job_as_a_whole_need_no_folder() -> None:
    seen: list[Event] = []
    EventLog(now=lambda: 0.0, observers=(seen.append,)).emit(None, "", "", "job_started", {})
    assert seen[0].as_dict() == {"event": "job_started", "party": "", "task": "", "time": 0.0}


def test_observers_are_told_one_at_a_time(together: Any) -> None:
    inside, overlaps, told = [0], [], []

    def observer(event: Event) -> None:
        inside[0] += 1
        overlaps.append(inside[0])
        told.append(event.fields["n"])
        inside[0] -= 1

    log = EventLog(now=lambda: 0.0, observers=(observer,))

    def emit(base: int) -> None:
        for n in range(200):
            log.emit(None, "a", "t", "x", {"n": base + n})

    together({str(base): (lambda base=base: emit(base)) for base in (0, 1000, 2000)})
    assert set(overlaps) == {1}
    assert len(told) == 600


def test_later_changes_of_the_fields_do_not_change_the_event() -> None:
    seen: list[Event] = []
    fields = {"n": 1}
    EventLog(now=lambda: 0.0, observers=(seen.append,)).emit(None, "a", "t", "x", fields)
    fields["n"] = 2
    assert seen[0].fields == {"n": 1}
