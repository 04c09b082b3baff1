"""Stores on both databases, with a clock that a test moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fate_llm.runtime.service.words import Line
from fate_llm.runtime.store.engine import sqlite_url
from fate_llm.runtime.store.store import JobRow, Store
from tests.databases import database, postgres

__all__ = ["Clock", "database", "job_row", "line", "postgres"]

OpenStore = Callable[[], Store]


class Clock:
    """Seconds since the epoch, as the test says."""

    def __init__(self, now: float = 1_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return sqlite_url(tmp_path / "fate.db")
    found: str = request.getfixturevalue("database")
    return found


@pytest.fixture
def open_store(url: str, clock: Clock) -> Iterator[OpenStore]:
    """Open the same database once more."""
    opened: list[Store] = []

    def open_it() -> Store:
        opened.append(Store.open(url, now=clock))
        return opened[-1]

    yield open_it
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: OpenStore) -> Store:
    return open_store()


def job_row(job: str = "job-1", **changes: Any) -> JobRow:
    """A job that runs."""
    row = JobRow(
        job=job,
        digest="d" * 64,
        name="loans",
        initiator="bank-a",
        lead=False,
        state="running",
        attempt=1,
        priority=5,
        created=100.0,
        updated=100.0,
        ended=None,
        specification={"pipeline": {"name": "loans"}},
        machine={"state": "running"},
        trouble=None,
    )
    return replace(row, **changes)


def line(number: int, **changes: Any) -> Line:
    """An event of a party."""
    return Line(**{"number": number, "seconds": float(number), "event": "step", "task": "train", **changes})
