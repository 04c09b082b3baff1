"""What others see of a party's events while sums hide its terms."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fate_llm.runtime.aggregates import only_aggregates, watching_aggregates
from fate_llm.runtime.events import Event

HIDING = frozenset({"tune"})
PRIVATE = 90_210_077


@pytest.mark.parametrize(
    ("event", "task", "fields", "shown"),
    [
        ("task_started", "tune", {"component": "trainer"}, {"component": "trainer"}),
        ("task_finished", "tune", {"outputs": ["model"]}, {"outputs": ["model"]}),
        ("party_finished", "", {}, {}),
        ("party_failed", "tune", {"code": "protection", "message": "the weight 7"}, {"code": "protection"}),
        ("data", "reader", {"rows": 20, "kept": 19, "faults": 1}, None),
        ("encoded", "tune", {"port": "train", "rows": 9, "tokens": 80}, None),
        ("step", "tune", {"round": 1, "rounds": 4, "step": 1, "steps": 9, "loss": 1.5}, None),
        ("round", "tune", {"round": 1, "loss": 2.0, "local_loss": 1.0, "tokens": 9}, {"round": 1, "loss": 2.0}),
        ("round", "alone", {"round": 1, "loss": 2.0, "tokens": 9}, {"round": 1}),
        (
            "round_state",
            "tune",
            {"round": 1, "contributors": ["a"], "sent_bytes": 9},
            {"round": 1, "contributors": ["a"]},
        ),
        ("scores", "tune", {"rows": [{"loss": 2.0}]}, {"rows": [{"loss": 2.0}]}),
        ("scores", "evaluate", {"rows": [{"loss": 2.0}]}, None),
        ("scored", "tune", {"model": "base", "records": 5}, None),
    ],
)
def test_totals_are_shown_and_own_numbers_are_not(
    event: str, task: str, fields: dict[str, Any], shown: dict[str, Any] | None
) -> None:
    assert only_aggregates(event, task, fields, HIDING) == shown
    assert only_aggregates(event, task, fields, ()) == fields, "nothing is hidden where no sum hides"


@given(
    event=st.sampled_from(["data", "encoded", "round", "step", "scored", "scores", "anything"]),
    names=st.lists(st.text("abcdefgh_", min_size=1, max_size=12), max_size=6),
    known=st.lists(st.sampled_from(["tokens", "weight", "local_loss", "records", "text", "message", "why"])),
)
def test_a_field_that_is_not_known_to_be_harmless_is_not_shown(event: str, names: list[str], known: list[str]) -> None:
    fields = dict.fromkeys((*names, *known), PRIVATE)
    shown = only_aggregates(event, "other", fields, HIDING)
    assert str(PRIVATE) not in str(shown)


def told(events: list[Event]) -> list[tuple[str, dict[str, Any]]]:
    return [(event.kind, dict(event.fields)) for event in events]


def test_who_watches_a_job_on_one_machine_sees_totals_and_troubles() -> None:
    heard: list[Event] = []
    observe = watching_aggregates(heard.append, HIDING)
    for kind, fields in (
        ("data", {"rows": PRIVATE}),
        ("step", {"step": 1, "steps": 4, "round": 1, "rounds": 2, "loss": float(PRIVATE)}),
        ("round", {"round": 1, "loss": 2.5, "local_loss": float(PRIVATE), "tokens": PRIVATE}),
        ("note", {"text": "converting the model"}),
        ("party_failed", {"code": "data_invalid", "message": "row 3"}),
        ("party_finished", {}),
    ):
        observe(Event(kind, "a", "tune", 1.0, fields))
    assert told(heard) == [
        ("step", {"round": 1, "rounds": 2}),
        ("round", {"round": 1, "loss": 2.5}),
        ("note", {"text": "converting the model"}),
        ("party_failed", {"code": "data_invalid", "message": "row 3"}),
        ("party_finished", {}),
    ]
    assert all((event.party, event.task, event.seconds) == ("a", "tune", 1.0) for event in heard)


def test_who_watches_a_job_that_hides_nothing_sees_everything() -> None:
    heard: list[Event] = []
    observe = heard.append
    assert watching_aggregates(observe, ()) == observe
