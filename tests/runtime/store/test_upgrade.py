"""A database of the first version keeps all it holds; one of a newer program, or of nobody we know, is left alone."""

from __future__ import annotations

import sqlite3
import stat
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text

from fate_llm.core.errors import ConfigurationError
from fate_llm.runtime.service.words import Line
from fate_llm.runtime.store.engine import Database, sqlite_url
from fate_llm.runtime.store.rows import ApprovalRow, JobRow, ModelRow, TaskRow
from fate_llm.runtime.store.schema import HEAD, METADATA, VERSION_TABLE
from fate_llm.runtime.store.store import Store
from fate_llm.runtime.store.upgrade import MIGRATIONS, upgrade
from tests.runtime.store.conftest import Clock, job_row

# What the program of the first version had written. Never changed: it is what parties have on their disks.
FIRST_VERSION = """
CREATE TABLE schema_version (version_num VARCHAR(32) NOT NULL, CONSTRAINT schema_version_pkc PRIMARY KEY (version_num));
CREATE TABLE jobs (job TEXT NOT NULL, lead BOOLEAN NOT NULL, digest TEXT NOT NULL, name TEXT NOT NULL,
  initiator TEXT NOT NULL, state TEXT NOT NULL, attempt BIGINT NOT NULL, priority BIGINT NOT NULL,
  created DOUBLE NOT NULL, updated DOUBLE NOT NULL, ended DOUBLE, specification TEXT NOT NULL, machine TEXT NOT NULL,
  trouble TEXT, CONSTRAINT pk_jobs PRIMARY KEY (job, lead));
CREATE INDEX ix_jobs_created ON jobs (created);
CREATE TABLE tasks (job TEXT NOT NULL, task TEXT NOT NULL, attempt BIGINT NOT NULL, state TEXT NOT NULL, started DOUBLE,
  ended DOUBLE, outputs TEXT NOT NULL, fingerprint TEXT NOT NULL, CONSTRAINT pk_tasks PRIMARY KEY (job, task));
CREATE INDEX ix_tasks_fingerprint ON tasks (fingerprint);
CREATE TABLE approvals (job TEXT NOT NULL, digest TEXT NOT NULL, asked DOUBLE NOT NULL, findings TEXT NOT NULL,
  summary TEXT NOT NULL, decided DOUBLE, decision TEXT, decided_by TEXT NOT NULL, reason TEXT NOT NULL,
  CONSTRAINT pk_approvals PRIMARY KEY (job, digest));
CREATE TABLE lines (id INTEGER NOT NULL CONSTRAINT pk_lines PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL,
  party TEXT NOT NULL, number BIGINT NOT NULL, content TEXT NOT NULL,
  CONSTRAINT uq_lines_job_party_number UNIQUE (job, party, number));
CREATE INDEX ix_lines_job_id ON lines (job, id);
CREATE TABLE line_floors (job TEXT NOT NULL, party TEXT NOT NULL, number BIGINT NOT NULL,
  CONSTRAINT pk_line_floors PRIMARY KEY (job, party));
CREATE TABLE senders (sender TEXT NOT NULL, position TEXT NOT NULL, CONSTRAINT pk_senders PRIMARY KEY (sender));
CREATE TABLE epochs (name TEXT NOT NULL, value BIGINT NOT NULL, CONSTRAINT pk_epochs PRIMARY KEY (name));
CREATE TABLE leases (name TEXT NOT NULL, holder TEXT NOT NULL, until DOUBLE NOT NULL,
  CONSTRAINT pk_leases PRIMARY KEY (name));
CREATE TABLE models (name TEXT NOT NULL, version BIGINT NOT NULL, digest TEXT NOT NULL, job TEXT NOT NULL,
  task TEXT NOT NULL, created DOUBLE NOT NULL, content TEXT NOT NULL, CONSTRAINT pk_models PRIMARY KEY (name, version),
  CONSTRAINT uq_models_name_job_task_digest UNIQUE (name, job, task, digest));
CREATE INDEX ix_models_digest ON models (digest);
INSERT INTO schema_version VALUES ('0001');
INSERT INTO jobs VALUES ('loans-1', 0, 'd1', 'loans', 'bank-a', 'running', 2, 7, 100.5, 101.25, NULL,
  '{"pipeline":{"name":"loans"}}', '{"state":"running"}', NULL);
INSERT INTO jobs VALUES ('loans-1', 1, 'd1', 'loans', 'bank-a', 'running', 2, 7, 100.5, 101.25, NULL, '{}', '{}', NULL);
INSERT INTO jobs VALUES ('old', 0, 'd2', 'old', 'bank-b', 'failed', 1, 5, 50.0, 60.0, 60.0, '{}', '{}',
  '{"code":"timeout","message":"\\u00e9"}');
INSERT INTO tasks VALUES ('loans-1', 'train', 2, 'success', 1.0, 2.0, '{"model":"aa"}', 'ff');
INSERT INTO approvals VALUES ('loans-1', 'd1', 10.0, '[{"rule":"any"}]', '{"minutes":3}', 11.0, 'approve', 'eva', 'ok');
INSERT INTO approvals VALUES ('next', 'd3', 12.0, '[]', '{}', NULL, NULL, '', '');
INSERT INTO lines VALUES (7, 'loans-1', 'bank-b', 3,
  '{"number":3,"seconds":1.5,"event":"step","task":"train","fields":{"loss":0.5}}');
INSERT INTO line_floors VALUES ('loans-1', 'bank-b', 2);
INSERT INTO senders VALUES ('bank-b', '0000000000000000000500000000000000000009');
INSERT INTO epochs VALUES ('control', 1700000000000000000);
INSERT INTO leases VALUES ('scheduler', 'me', 1005.0);
INSERT INTO models VALUES ('loans', 1, 'aa', 'loans-1', 'train', 2.0, '{"kind":"adapter"}');
"""


@pytest.fixture
def first_version(tmp_path: Path) -> Path:
    path = tmp_path / "first.db"
    connection = sqlite3.connect(path)
    connection.executescript(FIRST_VERSION)
    connection.close()
    return path


def holds_what_the_first_version_wrote(store: Store) -> None:
    old = JobRow("old", "d2", "old", "bank-b", False, "failed", 1, 5, 50.0, 60.0, 60.0, {}, {}, None)
    assert store.job("old") == JobRow(**{**old.__dict__, "trouble": {"code": "timeout", "message": "é"}})
    assert [(row.job, row.lead, row.attempt) for row in store.unfinished_jobs()] == [
        ("loans-1", False, 2),
        ("loans-1", True, 2),
    ]
    found = store.job("loans-1")
    assert found is not None
    assert (found.specification, found.machine) == ({"pipeline": {"name": "loans"}}, {"state": "running"})
    assert (found.created, found.updated, found.priority) == (100.5, 101.25, 7)
    assert store.tasks("loans-1") == [TaskRow("loans-1", "train", 2, "success", 1.0, 2.0, {"model": "aa"}, "ff")]
    approved = ApprovalRow("loans-1", "d1", 10.0, [{"rule": "any"}], {"minutes": 3}, 11.0, "approve", "eva", "ok")
    assert store.approvals(waiting=False) == [approved, ApprovalRow("next", "d3", 12.0, [], {})]
    step = Line(number=3, seconds=1.5, event="step", task="train", fields={"loss": 0.5})
    assert store.lines("loans-1") == [(7, "bank-b", step)]
    assert store.append_lines("loans-1", "bank-b", [Line(number=2, seconds=0, event="old")]) == 0
    assert not store.heard("bank-b", 5, 9)
    assert store.heard("bank-b", 5, 10)
    assert store.next_epoch() == 1700000000000000001
    assert not store.take_lease("scheduler", "you", 1)
    assert store.models() == [ModelRow("loans", 1, "aa", "loans-1", "train", 2.0, {"kind": "adapter"})]


def test_a_database_of_the_first_version_loses_nothing(first_version: Path, clock: Clock) -> None:
    with Store.open(sqlite_url(first_version), now=clock) as store:
        holds_what_the_first_version_wrote(store)
        store.save_job(job_row("new"))
        assert store.append_lines("loans-1", "bank-b", [Line(number=4, seconds=0, event="x")]) == 1
        assert store.lines("loans-1")[-1][0] == 8


def schema_of(path: Path) -> list[tuple[Any, ...]]:
    """Columns and indexes of every table, as SQLite tells them."""
    connection = sqlite3.connect(path)
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    found = [(t, *row[1:]) for t in sorted(tables) for row in connection.execute(f"PRAGMA table_info({t})")]
    found += [(t, *row[1:]) for t in sorted(tables) for row in sorted(connection.execute(f"PRAGMA index_list({t})"))]
    connection.close()
    return sorted(found, key=str)


def test_the_first_version_is_still_what_its_migration_makes(first_version: Path, tmp_path: Path) -> None:
    made = Database(sqlite_url(tmp_path / "made.db"))
    upgrade(made, head="0001")
    made.close()
    assert schema_of(tmp_path / "made.db") == schema_of(first_version)


# --- the migrations, and the tables of the program ---------------------------------------------------------------


def test_the_migrations_lead_to_the_tables_of_the_program(store: Store) -> None:
    with store._database.begin(write=False) as connection:
        options = {"version_table": VERSION_TABLE, "compare_server_default": True}
        assert compare_metadata(MigrationContext.configure(connection, opts=options), METADATA) == []


def test_the_comparison_sees_a_difference(store: Store) -> None:
    with store._database.begin(write=True) as connection:
        connection.execute(text("ALTER TABLE tasks ADD COLUMN extra TEXT"))
        connection.execute(text("DROP INDEX ix_models_digest"))
        found = compare_metadata(
            MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}), METADATA
        )
    assert {one[0] for one in found} == {"remove_column", "add_index"}


def test_there_is_one_line_of_migrations_and_it_ends_at_the_head() -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("path_separator", "os")
    scripts = ScriptDirectory.from_config(config)
    assert scripts.get_heads() == [HEAD]
    assert scripts.get_bases() == ["0001"]
    files = sorted(path.name for path in (MIGRATIONS / "versions").glob("v*.py"))
    assert [f"v{script.revision}" for script in reversed(list(scripts.walk_revisions()))] == [n[:5] for n in files]


# --- upgrades to come --------------------------------------------------------------------------------------------

NEXT = '''"""A later version: jobs have a colour."""
import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("colour", sa.Text, nullable=False, server_default="grey"))
    op.execute("UPDATE jobs SET colour = 'red' WHERE ended IS NULL")
    {more}
'''


@pytest.fixture
def later(tmp_path: Path) -> Path:
    """The migrations of a program to come."""
    folder = tmp_path / "100% later"
    (folder / "versions").mkdir(parents=True)
    for path in [MIGRATIONS / "env.py", *(MIGRATIONS / "versions").glob("v*.py")]:
        (folder / path.relative_to(MIGRATIONS)).write_text(path.read_text())
    (folder / "versions" / "v0002_colour.py").write_text(NEXT.format(more=""))
    return folder


def colours(database: Database) -> dict[str, str]:
    with database.begin(write=False) as connection:
        return {row[0]: row[1] for row in connection.execute(text("SELECT job, colour FROM jobs WHERE lead = '0'"))}


def test_an_upgrade_keeps_all_jobs_and_the_old_program_says_no(first_version: Path, later: Path, clock: Clock) -> None:
    database = Database(sqlite_url(first_version))
    upgrade(database, migrations=later, head="0002")
    upgrade(database, migrations=later, head="0002")  # nothing more to do
    assert colours(database) == {"loans-1": "red", "old": "grey"}
    database.close()
    before = first_version.read_bytes()
    with pytest.raises(ConfigurationError, match=f"schema version 0002; this program knows up to {HEAD}") as error:
        Store.open(sqlite_url(first_version), now=clock)
    assert "newer fate_llm" in error.value.hint
    assert first_version.read_bytes() == before


def test_an_upgrade_that_fails_half_way_has_not_begun(first_version: Path, later: Path, clock: Clock) -> None:
    (later / "versions" / "v0002_colour.py").write_text(NEXT.format(more="raise RuntimeError('power cut')"))
    database = Database(sqlite_url(first_version))
    with pytest.raises(RuntimeError, match="power cut"):
        upgrade(database, migrations=later, head="0002")
    database.close()
    with Store.open(sqlite_url(first_version), now=clock) as store:
        holds_what_the_first_version_wrote(store)


@pytest.mark.slow
def test_an_upgrade_on_a_server(database: str, later: Path, clock: Clock, together: Any) -> None:
    with Store.open(database, now=clock) as store:
        store.save_job(job_row("loans-1"))
    (later / "versions" / "v0003_fails.py").write_text(
        NEXT.format(more="raise RuntimeError").replace("0002", "0003").replace("0001", "0002").replace("colour", "size")
    )
    server = Database(database)
    with pytest.raises(RuntimeError):
        upgrade(server, migrations=later, head="0003")
    upgrade(server, migrations=MIGRATIONS, head="0001")  # as it was
    ends = together({f"t{at}": lambda: upgrade(server, migrations=later, head="0002") for at in range(3)})
    assert ends == {"t0": None, "t1": None, "t2": None}
    with server.begin(write=False) as connection:
        assert connection.execute(text("SELECT job, colour FROM jobs")).all() == [("loans-1", "red")]
    with pytest.raises(ConfigurationError, match="has schema version 0002"):
        Store.open(database, now=clock)
    server.close()


def test_many_open_an_empty_database_at_once(url: str, clock: Clock, together: Any) -> None:
    def open_and_write(who: int) -> str:
        with Store.open(url, now=clock) as store:
            store.save_job(job_row(f"job-{who}"))
        return "fine"

    assert set(together({f"t{at}": lambda at=at: open_and_write(at) for at in range(4)}).values()) == {"fine"}
    with Store.open(url, now=clock) as store:
        assert len(store.jobs()) == 4


# --- what is no database of ours ---------------------------------------------------------------------------------


def test_tables_that_somebody_else_made_are_left_alone(url: str, clock: Clock) -> None:
    database = Database(url)
    with database.begin(write=True) as connection:
        connection.execute(text("CREATE TABLE jobs (mine TEXT)"))
        connection.execute(text("INSERT INTO jobs VALUES ('precious')"))
    with pytest.raises(ConfigurationError, match="tables jobs that this program did not make"):
        Store.open(url, now=clock)
    with database.begin(write=False) as connection:
        assert connection.execute(text("SELECT mine FROM jobs")).all() == [("precious",)]
    database.close()


def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "fate.db"
    path.write_text("notes of mine, which are longer than the header of a database " * 20)
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match=r"fate\.db is not an SQLite database"):
        Store.open(sqlite_url(path), now=clock)
    assert path.read_bytes() == before


def test_a_new_file_is_for_its_owner_only(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "odd name % ?#&é.db"
    with Store.open(sqlite_url(path), now=clock) as store:
        store.save_job(job_row())
        modes = {stat.S_IMODE(one.stat().st_mode) for one in tmp_path.iterdir()}
        assert modes == {0o600}
    assert path.is_file()
