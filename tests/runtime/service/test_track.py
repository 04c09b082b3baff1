"""How far tasks are, from the events of a worker."""

from __future__ import annotations

from typing import Any

import pytest

from fate_llm.runtime.events import Event
from fate_llm.runtime.service.track import Track
from fate_llm.runtime.service.words import TaskView


def event(kind: str, task: str = "train", **fields: Any) -> Event:
    return Event(kind, "a", task, 1.0, fields)


def test_a_task_goes_from_waiting_to_success() -> None:
    track = Track(["read", "train"])
    assert {view.state for view in track.views.values()} == {"waiting"}
    assert track.note(event("task_started"))
    assert track.views["train"].state == "running"
    assert track.note(event("round_state", round=2, rounds=5))
    assert track.views["train"] == TaskView(state="running", round=2, rounds=5)
    assert track.note(event("task_finished", outputs=[]))
    assert track.views["train"].state == "success"
    assert track.views["read"].state == "waiting"


@pytest.mark.parametrize(
    "told",
    [
        event("step", step=1),
        event("round_state", task="nobody", round=1, rounds=2),
        event("round_state", round="1", rounds=2),
        event("round_state", round=True, rounds=2),
        event("round_state", round=-1, rounds=2),
        event("round_state"),
    ],
)
def test_what_says_nothing_of_a_task_changes_nothing(told: Event) -> None:
    track = Track(["train"])
    assert not track.note(told)
    assert track.views == {"train": TaskView(state="waiting")}


def test_the_same_told_twice_is_no_news() -> None:
    track = Track(["train"])
    assert track.note(event("round_closed", round=1, rounds=2))
    assert not track.note(event("round_closed", round=1, rounds=2))


def test_a_new_attempt_begins_where_the_finished_tasks_end() -> None:
    track = Track(["read", "train"])
    track.note(event("round_state", round=3, rounds=5))
    track.begin(["read"])
    assert track.views == {"read": TaskView(state="success"), "train": TaskView(state="waiting", round=3, rounds=5)}


def test_what_runs_when_the_part_ends_ends_with_it() -> None:
    track = Track(["read", "train"])
    track.note(event("task_started"))
    track.end("failed")
    assert {task: view.state for task, view in track.views.items()} == {"read": "waiting", "train": "failed"}


def test_a_service_that_was_started_again_knows_what_was_known() -> None:
    before = {"train": TaskView(state="running", round=4, rounds=9), "gone": TaskView(state="running")}
    assert Track(["train"], before).views == {"train": before["train"]}
