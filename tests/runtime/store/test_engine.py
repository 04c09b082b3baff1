"""URLs, settings of the connection, and what is said when a database is away, full or killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from fate_llm.core.errors import ConfigurationError, FateError, InternalError, MissingExtra, StoreLost
from fate_llm.runtime.store import engine
from fate_llm.runtime.store.engine import Database, sqlite_url
from fate_llm.runtime.store.store import Store
from tests.cli.conftest import environment
from tests.databases import PostgresServer
from tests.runtime.store.conftest import Clock, job_row

# --- URLs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("fate.db", "cannot be read as one"),
        ("", "cannot be read as one"),
        ("mysql://u:secret@h/d", "kind 'mysql'"),
        ("postgresql+psycopg2://u:secret@h/d", "kind 'postgresql\\+psycopg2'"),
        ("postgresql+psycopg://u:secret@h:port/d", "cannot be read as one"),
        ("sqlite+aiosqlite:///x", "kind 'sqlite\\+aiosqlite'"),
    ],
)
def test_a_url_that_means_no_database_of_ours(url: str, said: str, clock: Clock) -> None:
    with pytest.raises(ConfigurationError, match=said) as error:
        Store.open(url, now=clock)
    assert "valid: sqlite:////" in error.value.hint
    assert "secret" not in error.value.message + error.value.hint


def test_a_password_is_never_shown() -> None:
    database = Database("postgresql://fate:secret@127.0.0.1:1/fate")
    assert database.shown == "postgresql+psycopg://fate:***@127.0.0.1:1/fate"
    with pytest.raises(StoreLost) as error, database.begin(write=False):
        pass
    assert "secret" not in error.value.message + error.value.hint


def test_postgresql_without_its_driver(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    def without(*_: Any, **__: Any) -> Any:
        raise ImportError("no module named psycopg")

    monkeypatch.setattr(engine, "create_engine", without)
    with pytest.raises(MissingExtra, match="psycopg") as error:
        Store.open("postgresql+psycopg://h/d", now=clock)
    assert "fate_llm[postgres]" in error.value.hint


def test_a_file_is_made_only_when_that_is_wanted(tmp_path: Path, clock: Clock) -> None:
    url = sqlite_url(tmp_path / "fate.db")
    with pytest.raises(ConfigurationError, match="there is no database"):
        Store.open(url, now=clock, create=False)
    assert list(tmp_path.iterdir()) == []
    Store.open(url, now=clock).close()
    Store.open(url, now=clock, create=False).close()


def test_a_folder_that_is_not_there(tmp_path: Path, clock: Clock) -> None:
    with pytest.raises(ConfigurationError, match="cannot be made: No such file or directory"):
        Store.open(sqlite_url(tmp_path / "no" / "fate.db"), now=clock)
    (tmp_path / "folder.db").mkdir()
    with pytest.raises(StoreLost, match="unable to open"):
        Store.open(sqlite_url(tmp_path / "folder.db"), now=clock)


def test_a_database_in_memory_is_one_for_all_threads(clock: Clock, together: Any) -> None:
    with Store.open("sqlite://", now=clock) as store:
        together({f"t{at}": lambda at=at: store.save_job(job_row(f"job-{at}")) for at in range(4)})
        assert len(store.jobs()) == 4
    with Store.open("sqlite://", now=clock) as store:
        assert store.jobs() == []


# --- SQLite ------------------------------------------------------------------------------------------------------


def test_every_connection_has_the_settings(tmp_path: Path) -> None:
    database = Database(sqlite_url(tmp_path / "fate.db"))
    wanted = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}
    with database.begin(write=False) as first, database.begin(write=False) as second:
        for connection in (first, second):
            assert {name: connection.scalar(text(f"PRAGMA {name}")) for name in wanted} == wanted
    database.close()


def test_a_reader_that_writes_is_our_own_bug(tmp_path: Path) -> None:
    # Writers say so before they begin: then none has to be given up half way.
    database = Database(sqlite_url(tmp_path / "fate.db"))
    with database.begin(write=True) as connection:
        connection.execute(text("CREATE TABLE t (x)"))
        other = Database(sqlite_url(tmp_path / "fate.db"))
        with other.begin(write=False) as reader:  # not stopped
            assert reader.scalar(text("SELECT count(*) FROM sqlite_master")) == 0
        other.close()
    database.close()


def test_a_full_disk_loses_what_was_asked_last_and_nothing_else(tmp_path: Path, clock: Clock) -> None:
    url = sqlite_url(tmp_path / "fate.db")
    with Store.open(url, now=clock) as store:
        store.save_job(job_row("kept"))
        with store._database.begin(write=False) as connection:
            pages = connection.scalar(text("PRAGMA page_count"))
            connection.execute(text(f"PRAGMA max_page_count = {pages}"))  # of this pooled connection
        with pytest.raises(StoreLost, match="full"), store.transaction() as tx:
            tx.save_job(job_row("first"))
            tx.save_job(job_row("large", machine={"text": "x" * 1_000_000}))
        assert [row.job for row in store.jobs()] == ["kept"]
    with Store.open(url, now=clock) as store:
        store.save_job(job_row("large", machine={"text": "x" * 1_000_000}))
        assert len(store.jobs()) == 2


KILLED = """
import os, signal, sys
from fate_llm.runtime.store.store import Store
from tests.runtime.store.conftest import job_row
store = Store.open(sys.argv[1], now=lambda: 1.0)
store.save_job(job_row("committed"))
with store.transaction() as tx:
    tx.save_job(job_row("half"))
    assert tx.next_epoch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_process_that_was_killed_in_a_transaction_leaves_the_one_before(url: str, clock: Clock) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, url], env=environment(), timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    with Store.open(url, now=clock) as store:
        assert [row.job for row in store.jobs()] == ["committed"]
        store.save_job(job_row("next"))  # and no lock of the dead one is left


# --- PostgreSQL --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_server_that_was_killed_loses_no_promise_and_is_used_again(
    database: str, postgres: PostgresServer, clock: Clock
) -> None:
    store = Store.open(database, now=clock)
    store.save_job(job_row("before"))
    with pytest.raises(StoreLost) as error, store.transaction() as tx:
        tx.save_job(job_row("during"))
        postgres.kill()
        tx.save_job(job_row("after"))
    assert error.value.code == "store_lost"
    for _ in range(2):
        with pytest.raises(StoreLost, match="cannot be used"):
            store.check()
    with pytest.raises(StoreLost):
        Store.open(database, now=clock)
    postgres.start()
    store.check()
    assert [row.job for row in store.jobs()] == ["before"]
    store.save_job(job_row("again"))
    store.close()


@pytest.mark.slow
def test_connections_that_an_operator_cut_are_replaced(database: str, postgres: PostgresServer, clock: Clock) -> None:
    with Store.open(database, now=clock) as store:
        store.save_job(job_row("a"))
        postgres.stop()
        postgres.start()
        assert store.job("a") == job_row("a")  # at the first try
        assert store.heard("p", 1, 1)


def test_errors_are_ours() -> None:
    assert issubclass(StoreLost, FateError) and not issubclass(StoreLost, InternalError)
    assert StoreLost("x").as_dict()["code"] == "store_lost"
