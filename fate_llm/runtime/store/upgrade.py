"""Bring a database to the schema of this program; refuse one that a newer program has made.

The steps lie in `migrations/versions`, one file each, and all that are missing run in one transaction: an upgrade
that is killed has not begun. Two programs that open a database at once do not both upgrade it.
"""

from __future__ import annotations

import threading
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, text

from fate_llm.core.errors import ConfigurationError

from .engine import Database
from .schema import HEAD, METADATA, VERSION_TABLE

__all__ = ["MIGRATIONS", "upgrade", "version_of"]

MIGRATIONS = Path(__file__).parent / "migrations"
_HERE = threading.Lock()  # alembic has one environment for a whole process
_LOCK = 7_042_331_905_117_284_961  # PostgreSQL: the key of the lock that upgrades hold; any number that is ours


def upgrade(database: Database, *, migrations: Path = MIGRATIONS, head: str = HEAD) -> None:
    """Bring the database to version `head`; nothing is done when it is there.

    Raises:
        ConfigurationError: it belongs to a newer program, or is not ours at all; it is left as it was.
    """
    with database.begin(write=False) as connection:
        if version_of(connection, database.shown) == head:
            return
    config = Config()
    config.set_main_option("script_location", str(migrations).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    with _HERE, database.begin(write=True) as connection:
        if database.dialect == "postgresql":
            connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
        found = version_of(connection, database.shown)
        if found is not None and found not in known:
            raise ConfigurationError(
                f"the database {database.shown} has schema version {found}; this program knows up to {head}",
                hint="A newer fate_llm has upgraded it: use that version, or restore a copy from before.",
            )
        if found != head:
            config.attributes["connection"] = connection
            command.upgrade(config, head)


def version_of(connection: Connection, shown: str) -> str | None:
    """The version that a database says it has; None for an empty one.

    Raises:
        ConfigurationError: it has tables of our names and no version.
    """
    tables = set(inspect(connection).get_table_names())
    if VERSION_TABLE in tables:
        found: str | None = connection.scalar(text(f"SELECT version_num FROM {VERSION_TABLE}"))
        return found
    if ours := sorted(tables & METADATA.tables.keys()):
        raise ConfigurationError(
            f"the database {shown} has tables {', '.join(ours)} that this program did not make",
            hint="Give the party a database of its own.",
        )
    return None
