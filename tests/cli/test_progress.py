"""What is shown while a job runs."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from fate_llm.cli.progress import Progress, size_text
from fate_llm.runtime.events import Event

ROUND = {"round": 2, "rounds": 4, "loss": 1.25, "local_loss": 1.5, "tokens": 640, "contributors": ["a", "b"]}


def said(*events: Event, quiet: bool = False) -> list[str]:
    stream = io.StringIO()
    with Progress(stream=stream, quiet=quiet) as progress:
        for event in events:
            progress.observe(event)
    return [line.partition(" s  ")[2] for line in stream.getvalue().splitlines()]


def event(kind: str, /, **fields: Any) -> Event:
    return Event(kind, "a", "tune", 0.0, fields)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (1_864_000, "1.86 MB"), (5e9, "5.00 GB"), (5e12, "5000.00 GB")],
)
def test_sizes_are_for_people(count: float, text: str) -> None:
    assert size_text(count) == text


def test_a_round_says_losses_tokens_and_bytes() -> None:
    lines = said(event("round_state", round=2, rounds=4, sent_bytes=2_000_000), event("round", **ROUND))
    assert len(lines) == 1
    assert lines[0].split()[:2] == ["a", "tune"]
    assert "round 2/4, local loss 1.500, all parties' loss 1.250, 640 tokens trained, 2.00 MB sent so far" in lines[0]


def test_a_round_in_which_a_party_trained_on_nothing_has_no_loss() -> None:
    lines = said(event("round", **{**ROUND, "local_loss": None, "loss": None}))
    assert "local loss -, all parties' loss -" in lines[0]


def test_steps_closed_rounds_notes_and_failures() -> None:
    lines = said(
        event("step", step=3, steps=24, round=1, rounds=4, loss=2.0),
        event("round_closed", round=1, rounds=4, contributors=["a"], missing=["b", "c"]),
        event("note", text="converting [x] once"),
        event("party_failed", code="data_invalid", message="row 3"),
        event("task_started", component="reader"),
    )
    assert [" ".join(line.split()[2:]) for line in lines] == [
        "round 1/4 step 3/24 loss 2.000",
        "round 1/4 summed over 1 parties, missing b, c",
        "converting [x] once",
        "failed [data_invalid]: row 3",
        "task started: component reader",
    ]


def test_a_step_of_which_nothing_is_shown_is_no_line() -> None:
    assert said(event("step", round=1, rounds=4)) == []


def test_what_a_policy_hides_leaves_no_hole() -> None:
    # Given lines of a partner that shows rounds and losses, and neither steps nor bytes
    lines = said(
        event("round", round=1, local_loss=2.0, loss=2.5),
        event("step", round=1, loss=2.25),
        event("task_finished"),
    )
    # Then nothing stands for what is not known, least of all a number
    assert [line.split("tune")[1].split(maxsplit=0)[0].strip() for line in lines] == [
        "round 1, local loss 2.000, all parties' loss 2.500",
        "round 1 loss 2.250",
        "task finished",
    ]


def test_what_is_not_worth_a_line_has_none() -> None:
    assert said(event("encoded", rows=3), event("something_new", x=1), Event("x", "", "", 0.0)) == []


def test_quiet_is_quiet() -> None:
    assert said(event("round", **ROUND), event("note", text="x"), quiet=True) == []


def test_on_a_terminal_there_is_a_table_and_only_what_is_urgent_is_a_line() -> None:
    progress = Progress(stream=io.StringIO())
    progress.observe(event("step", step=3, steps=24, round=1, rounds=4, loss=2.0))
    progress.observe(event("round_state", round=1, rounds=4, sent_bytes=1500))
    progress.observe(Event("task_started", "b", "data", 0.0, {"component": "reader"}))
    progress.observe(Event("retry", "", "", 0.0, {"attempt": 2}))
    out = io.StringIO()
    Console(file=out, width=100).print(progress._table())
    text = out.getvalue()
    assert [word for word in ("party", "task", "doing", "round", "step", "loss", "sent") if word not in text] == []
    rows = [line.split("│")[1:-1] for line in text.splitlines() if "│" in line]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert ["a", "tune", "new state", "1/4", "3/24", "2.000", "1.50 kB"] in cells
    assert ["b", "data", "starting", "-", "-", "-", "-"] in cells


def test_the_live_display_starts_and_stops_with_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Console, "is_terminal", True)
    stream = io.StringIO()
    with Progress(stream=stream) as progress:
        progress.observe(event("step", step=1, steps=24, round=1, rounds=4, loss=2.0))
        progress.observe(event("note", text="a line that stays"))
    text = stream.getvalue()
    assert "a line that stays" in text
    assert "1/24" in text
    assert "round 1/4 step" not in text
