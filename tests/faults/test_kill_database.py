"""The database of a party's service: killed under it, or the service killed while it writes."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator

import pytest

from fate_llm.core.errors import FateError
from tests.databases import PostgresServer, postgres  # noqa: F401
from tests.faults.matrix import STAGES, Hold, Matrix, open_matrix, toy_job

pytestmark = pytest.mark.slow
NAME = "guest"
KILLS = 6


@pytest.fixture(scope="module")
def on_postgres(tmp_path_factory: pytest.TempPathFactory, postgres: PostgresServer) -> Iterator[Matrix]:  # noqa: F811
    """The guest's service keeps what it knows in PostgreSQL, the others in SQLite."""
    postgres.sql(f"CREATE DATABASE {NAME}")
    store = {"a": f"store: {postgres.url(NAME)}\n"}
    with open_matrix(tmp_path_factory.mktemp("postgres"), "a", "b", "z", more=store) as matrix:
        yield matrix


@pytest.fixture
def matrix(on_postgres: Matrix, postgres: PostgresServer) -> Iterator[Matrix]:  # noqa: F811
    yield on_postgres
    postgres.start()
    on_postgres.quiet()


@pytest.mark.parametrize("stage", ["invite", "upload", "aggregation", "finishing"])
def test_postgresql_is_killed_under_a_service(matrix: Matrix, postgres: PostgresServer, stage: str) -> None:  # noqa: F811
    # Given: a job at a stage
    guest, hold = matrix.services["a"], STAGES[stage]
    matrix.doors.shut(hold)
    job = matrix.submit(toy_job())
    matrix.doors.reached(hold)
    # When: the database dies, and the others go on
    postgres.kill()
    matrix.doors.open(hold)
    # Then: the service says so, and takes nothing that it could not keep
    found = guest.until(lambda: guest.client.health() if guest.client.health()["status"] != "ok" else None)
    assert found["status"] == "failed"
    assert any("database" in reason for reason in found["reasons"]), found
    with pytest.raises(FateError) as refused:
        guest.client.submit(toy_job())
    assert refused.value.code == "store_lost"
    # And when it is back, the same process goes on
    assert guest.process is not None
    pid = guest.process.pid
    postgres.start()
    guest.until(lambda: guest.client.health()["status"] == "ok", what="to be well again")
    matrix.succeeded(job, toy_job())
    assert guest.process.poll() is None
    assert guest.process.pid == pid
    assert [found["job"] for found in guest.client.jobs()].count(job) == 1
    assert len(guest.client.jobs()) == len(matrix.jobs), "what was refused is not there"


def test_a_service_that_is_killed_again_and_again(matrix: Matrix) -> None:
    """The host's service, with SQLite, at moments that nobody chose; its worker goes down with it each time."""
    # Given: a job that the guest's worker holds up
    host, hold, chance = matrix.services["b"], Hold("a", "worker", "work", "", "3"), random.Random(4)
    matrix.doors.shut(hold)
    job = matrix.submit(toy_job())
    # When: killed while it comes up, writes, starts its worker
    for _ in range(KILLS):
        host.start_over(chance.uniform(0.5, 3.0))
        with sqlite3.connect(host.home / "state/fate.db") as database:
            assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        database.close()
    host.ready()
    matrix.doors.reached(hold)
    matrix.doors.open(hold)
    # Then
    matrix.succeeded(job, toy_job())


def test_the_records_of_all_of_it_hold(matrix: Matrix) -> None:
    matrix.check_records()
