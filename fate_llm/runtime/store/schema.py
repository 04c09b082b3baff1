"""The tables of a party's database, and the two types of column that say no before the database does.

The newest schema is here, the way to it in `migrations/`; a test compares the two on both databases. Structured values
are JSON text with every character outside ASCII escaped: the same bytes in SQLite and PostgreSQL, whatever a partner
has put into a string. Times are seconds since the epoch.
"""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Dialect,
    Double,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)

from fate_llm.core.errors import ConfigurationError

__all__ = [
    "HEAD",
    "METADATA",
    "VERSION_TABLE",
    "Json",
    "Words",
    "approvals",
    "epochs",
    "jobs",
    "leases",
    "line_floors",
    "lines",
    "models",
    "senders",
    "tasks",
]

HEAD = "0001"
"""The migration that leads to the tables below."""

VERSION_TABLE = "schema_version"


class Words(TypeDecorator[str]):
    """Text without NUL and without halves of surrogate pairs: PostgreSQL takes neither. of: what it is, for errors."""

    impl = Text
    cache_ok = True

    def __init__(self, of: str) -> None:
        super().__init__()
        self.of = of

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        if value is not None and ("\0" in value or any("\ud800" <= char <= "\udfff" for char in value)):
            shown = value[:80].encode("ascii", "backslashreplace").decode().replace("\0", "\\x00")
            raise ConfigurationError(
                f"{self.of}: {shown!r} holds a character that no text has (NUL, or half of a pair)",
                hint="Write it as plain Unicode text.",
            )
        return value


class Json(TypeDecorator[Any]):
    """A plain value as JSON text; None is NULL. NaN and infinity are refused (ValueError)."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        return None if value is None else json.dumps(value, separators=(",", ":"), allow_nan=False)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        return None if value is None else json.loads(value)


METADATA = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _words(table: str, name: str, *, key: bool = False, optional: bool = False) -> Column[str]:
    return Column(name, Words(f"{table}.{name}"), primary_key=key, nullable=optional)


jobs = Table(
    "jobs",
    METADATA,
    _words("jobs", "job", key=True),
    Column("lead", Boolean, primary_key=True),  # this party's part of a job it leads is a row of its own
    _words("jobs", "digest"),
    _words("jobs", "name"),
    _words("jobs", "initiator"),
    _words("jobs", "state"),
    Column("attempt", BigInteger, nullable=False),
    Column("priority", BigInteger, nullable=False),
    Column("created", Double, nullable=False),
    Column("updated", Double, nullable=False),
    Column("ended", Double),
    Column("specification", Json, nullable=False),
    Column("machine", Json, nullable=False),
    Column("trouble", Json),
    Index(None, "created"),
)

tasks = Table(
    "tasks",
    METADATA,
    _words("tasks", "job", key=True),
    _words("tasks", "task", key=True),
    Column("attempt", BigInteger, nullable=False),
    _words("tasks", "state"),
    Column("started", Double),
    Column("ended", Double),
    Column("outputs", Json, nullable=False),
    _words("tasks", "fingerprint"),
    Index(None, "fingerprint"),
)

approvals = Table(
    "approvals",
    METADATA,
    _words("approvals", "job", key=True),
    _words("approvals", "digest", key=True),
    Column("asked", Double, nullable=False),
    Column("findings", Json, nullable=False),
    Column("summary", Json, nullable=False),
    Column("decided", Double),
    _words("approvals", "decision", optional=True),
    _words("approvals", "decided_by"),
    _words("approvals", "reason"),
)

lines = Table(
    "lines",
    METADATA,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    _words("lines", "job"),
    _words("lines", "party"),
    Column("number", BigInteger, nullable=False),
    Column("content", Json, nullable=False),
    UniqueConstraint("job", "party", "number"),
    Index(None, "job", "id"),
    sqlite_autoincrement=True,  # an id is never given twice, so that `after` leaves nothing out
)

line_floors = Table(  # lines up to this number were removed, and do not come back
    "line_floors",
    METADATA,
    _words("line_floors", "job", key=True),
    _words("line_floors", "party", key=True),
    Column("number", BigInteger, nullable=False),
)

senders = Table(  # position: epoch and counter, 20 digits each, so that their order is that of the text
    "senders",
    METADATA,
    _words("senders", "sender", key=True),
    _words("senders", "position"),
)

epochs = Table(
    "epochs",
    METADATA,
    _words("epochs", "name", key=True),
    Column("value", BigInteger, nullable=False),
)

leases = Table(
    "leases",
    METADATA,
    _words("leases", "name", key=True),
    _words("leases", "holder"),
    Column("until", Double, nullable=False),
)

models = Table(
    "models",
    METADATA,
    _words("models", "name", key=True),
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    _words("models", "digest"),
    _words("models", "job"),
    _words("models", "task"),
    Column("created", Double, nullable=False),
    Column("content", Json, nullable=False),
    UniqueConstraint("name", "job", "task", "digest"),
    Index(None, "digest"),
)
