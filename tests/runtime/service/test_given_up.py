"""What a party shows of a job whose lead it has given up, and a word that comes while its database is away."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fate_llm.runtime.service import views
from fate_llm.runtime.service.part import PartMachine
from fate_llm.runtime.service.words import JobState, PartState, PartView, Trouble
from fate_llm.runtime.store.rows import JobRow


def machine(**changes: Any) -> PartMachine:
    """One whose lead was silent for too long."""
    usual = {"wanted": JobState.RUNNING, "wanted_attempt": 1, "attempt": 1, "alone": True, "end": PartState.CANCELLED}
    found = PartMachine("j", "0" * 64, "b", "a")
    return dataclasses.replace(found, **{**usual, **changes})


def row(part: PartMachine) -> JobRow:
    return JobRow("j", "0" * 64, "n", "a", False, "cancelled", 1, 5, 1.0, 2.0, None, {}, part.to_data(), None)


CASES = [
    ({}, "timed_out"),
    ({"alone": False}, "running"),
    ({"end": None}, "running"),
    ({"wanted_attempt": 2}, "running"),
    ({"wanted": JobState.SUCCESS}, "success"),
    ({"wanted": JobState.CANCELLED}, "cancelled"),
]


@pytest.mark.parametrize(("changes", "shown"), CASES)
def test_a_silent_lead_s_job_has_timed_out_here(changes: dict[str, Any], shown: str) -> None:
    part = machine(**changes)
    assert part.standing.value == shown
    assert views.summary(row(part))["state"] == shown, "a list says the same"


def test_a_list_shows_rows_that_no_machine_wrote() -> None:
    assert views.summary(dataclasses.replace(row(machine()), machine={}, state="success"))["state"] == "success"


@pytest.mark.parametrize(("changes", "ended"), [({}, True), ({"alone": False}, False)])
def test_who_follows_such_a_job_is_let_go(changes: dict[str, Any], ended: bool) -> None:
    case = cast(Any, SimpleNamespace(part=machine(**changes), lead=None))
    assert views.lines(case, [], 7) == {
        "lines": [],
        "next": 7,
        "state": "timed_out" if ended else "running",
        "ended": ended,
    }


@pytest.mark.parametrize(
    ("codes", "shown"),
    [
        ({"b": "cancelled", "c": "timeout"}, "timeout"),
        ({"c": "cancelled", "b": "data_invalid"}, "data_invalid"),
        ({"c": "peer_failed", "b": "timeout"}, "timeout"),
        ({"b": "cancelled"}, "cancelled"),
        ({}, None),
    ],
)
def test_the_cause_is_shown_and_not_that_one_was_stopped_for_it(codes: dict[str, str], shown: str | None) -> None:
    parts = {
        party: PartView(
            state=PartState.FAILED,
            trouble=Trouble(code=codes[party], message="m", party=party) if party in codes else None,
        )
        for party in "abc"
    }
    found = views._cause(parts, "b")
    assert (None if found is None else found.code) == shown


def test_the_lead_s_own_state_is_the_job_s() -> None:
    lead = SimpleNamespace(state=JobState.RUNNING, final=False)
    case = cast(Any, SimpleNamespace(part=machine(), lead=lead))
    assert views.lines(case, [], 0)["ended"] is False
    assert views.lines(case, [], 0)["state"] == "running"
