"""Of whom jobs were let in before: looked up in a history that may be long, without reading all of it."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fate_llm.runtime.service import keeping
from fate_llm.runtime.service.keeping import known_initiators
from fate_llm.runtime.store.engine import sqlite_url
from fate_llm.runtime.store.store import JobRow, Store

LET_IN, BY_A_PERSON = {"verdict": "accept"}, {"verdict": "manual", "approved": True}
ASKED, DENIED, REFUSED = {"verdict": None}, {"verdict": "manual", "approved": False}, {"verdict": "refuse"}


class Counting:
    """A store that counts the rows it gives."""

    def __init__(self, store: Store) -> None:
        self._store, self.given = store, 0
        self.initiators = store.initiators

    def jobs(self, **more: Any) -> list[JobRow]:
        found = self._store.jobs(**more)
        self.given += len(found)
        return found


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with Store.open(sqlite_url(tmp_path / "fate.db"), now=time.time) as opened:
        yield opened


def add(store: Store, initiator: str, *machines: dict[str, Any], lead: bool = False) -> None:
    """Jobs of a party, the oldest first."""
    for machine in machines:
        count = len(store.jobs(limit=10_000))
        row = JobRow(
            f"j{count}", "d" * 64, "n", initiator, lead, "running", 1, 5, float(count), 1.0, None, {}, machine, None
        )
        store.save_job(row)


def known(store: Any) -> set[str]:
    hall: Any = SimpleNamespace(store=store)
    return known_initiators(hall)


def test_the_policys_yes_and_a_persons_yes_count_and_nothing_else(store: Store) -> None:
    add(store, "a", LET_IN)
    add(store, "b", BY_A_PERSON)
    add(store, "c", ASKED, REFUSED)
    add(store, "d", DENIED)
    assert known(store) == {"a", "b"}


def test_what_this_party_leads_is_not_what_it_let_in(store: Store) -> None:
    add(store, "a", {"verdict": "accept"}, lead=True)
    assert known(store) == set()


def test_a_yes_of_long_ago_counts(store: Store) -> None:
    add(store, "a", LET_IN, *[REFUSED] * (3 * keeping._FEW))
    add(store, "b", *[REFUSED] * keeping._FEW, LET_IN, *[ASKED] * keeping._FEW)
    assert known(store) == {"a", "b"}


def test_a_long_history_is_not_read_with_every_decision(store: Store) -> None:
    add(store, "a", *[LET_IN] * 30, ASKED)
    counting = Counting(store)
    assert known(counting) == {"a"}
    assert counting.given == keeping._FEW


def test_jobs_of_one_initiator_come_newest_first_and_by_pages(store: Store) -> None:
    add(store, "a", LET_IN, LET_IN)
    add(store, "b", LET_IN)
    add(store, "a", LET_IN)
    assert store.initiators() == ["a", "b"]
    assert [row.job for row in store.jobs(initiator="a")] == ["j3", "j1", "j0"]
    assert [row.job for row in store.jobs(initiator="a", offset=1, limit=1)] == ["j1"]
    assert store.jobs(initiator="nobody") == []


def test_a_job_that_this_party_leads_is_found_by_the_end_of_its_id(store: Store) -> None:
    add(store, "a", LET_IN, LET_IN, lead=True)
    add(store, "a", LET_IN)
    for job, lead in (("n-2026-ab_1", True), ("n-2026-abx1", True), ("n-2026-cd", False)):
        store.save_job(JobRow(job, "d" * 64, "n", "a", lead, "running", 1, 5, 9.0, 1.0, None, {}, {}, None))
    assert store.led_job("ab_1") == "n-2026-ab_1"
    assert store.led_job("b_1") is None, "the whole of its last part"
    assert store.led_job("cd") is None, "a part of somebody else's job"
    assert store.led_job("%") is None, "no pattern"


def test_a_saved_job_is_the_one_that_was_given_also_when_it_replaces_another(store: Store) -> None:
    """Each column is written once; a row that takes another's place leaves nothing of it."""
    first = JobRow("j", "1" * 64, "n", "a", True, "running", 1, 5, 1.0, 2.0, None, {"x": [1]}, {"y": {}}, {"code": "c"})
    later = JobRow("j", "2" * 64, "m", "b", True, "failed", 2, 6, 3.0, 4.0, 5.0, {}, {"z": None}, None)
    own = JobRow("j", "3" * 64, "m", "b", False, "failed", 2, 6, 3.0, 4.0, 5.0, {}, {"z": None}, None)
    for row in (first, own, later):
        store.save_job(row)
    assert store.job("j", lead=True) == later
    assert store.job("j") == own
