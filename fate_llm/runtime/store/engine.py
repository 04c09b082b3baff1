"""The connection to a database: SQLite in a file by default, PostgreSQL by URL; errors in the party's own words.

SQLite: write-ahead log, foreign keys, a commit survives a power cut (synchronous=FULL), and a writer takes its turn
before it reads, so that no transaction has to be given up half way. PostgreSQL: connections are tried before use, so
that a server may be restarted.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, StaticPool, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    InterfaceError,
    OperationalError,
    SQLAlchemyError,
    StatementError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout

from fate_llm.core.errors import ConfigurationError, FateError, InternalError, MissingExtra, StoreLost

__all__ = ["Database", "sqlite_url"]

_BUSY = 30.0  # seconds that a writer waits for its turn
_CONNECT = 10  # seconds for a server to answer
_VALID = "valid: sqlite:////var/lib/fate_llm/state/fate.db, postgresql+psycopg://USER@HOST:PORT/DATABASE"


class Database:
    """One database, for all threads of a process.

    create: make an SQLite file that is not there.

    Raises:
        ConfigurationError: no such kind of database, or an SQLite file that is not there or cannot be made.
        MissingExtra: the driver for PostgreSQL is not installed.
    """

    def __init__(self, url: str, *, create: bool = True) -> None:
        self._url = _read_url(url)
        self.shown = self._url.render_as_string(hide_password=True)
        self._lock = threading.RLock()  # SQLite has one writer; threads wait here in order, not in its busy loop
        self._closed = False
        self.dialect = self._url.get_backend_name()
        self._shared = self.dialect == "sqlite" and self._url.database in (None, "", ":memory:")
        if self.dialect == "sqlite" and not self._shared:
            _prepare_file(Path(str(self._url.database)), create=create)
        self._engine = self._make_engine()

    def _make_engine(self) -> Engine:
        if self.dialect == "postgresql":
            arguments = {"connect_timeout": _CONNECT, "application_name": "fate_llm"}
            given = {name: value for name, value in arguments.items() if name not in self._url.query}
            try:
                return create_engine(self._url, pool_pre_ping=True, connect_args=given)
            except ImportError:
                raise MissingExtra(
                    "PostgreSQL needs the driver psycopg, which is not installed",
                    hint="pip install 'fate_llm[postgres]'",
                ) from None
        options: dict[str, Any] = {"poolclass": StaticPool} if self._shared else {}
        engine = create_engine(self._url, connect_args={"timeout": _BUSY, "check_same_thread": False}, **options)
        event.listen(engine, "connect", _prepare_connection)
        event.listen(engine, "begin", _begin)
        return engine

    @contextlib.contextmanager
    def begin(self, *, write: bool) -> Iterator[Connection]:
        """A transaction: committed at the end, nothing of it there after an exception.

        Raises:
            StoreLost: the database cannot be used now; nothing was stored. InternalError: it does not take the
                statement.
        """
        if self._closed:
            raise StoreLost(f"the database {self.shown} was closed", hint="The program is about to end.")
        try:
            with self._turn(write), self._engine.connect() as connection:
                connection.execution_options(fate_write=write)
                with connection.begin():
                    yield connection
        except SQLAlchemyError as error:
            raise self.explained(error) from None

    def _turn(self, write: bool) -> AbstractContextManager[Any]:
        mine = self.dialect == "sqlite" and (write or self._shared)
        return self._lock if mine else contextlib.nullcontext()

    def explained(self, error: SQLAlchemyError) -> FateError:
        """An error of SQLAlchemy or of a driver as one of ours."""
        cause = error.orig if isinstance(error, StatementError) else None
        if isinstance(cause, FateError):
            return cause  # of our own column types
        text = " ".join(str(cause or error).split())
        if "file is not a database" in text:
            return ConfigurationError(f"{self.shown} is not an SQLite database", hint="Name another file.")
        if isinstance(error, OperationalError | InterfaceError | PoolTimeout):
            return StoreLost(f"the database {self.shown} cannot be used: {text}")
        if isinstance(error, DBAPIError) and error.connection_invalidated:
            return StoreLost(f"the connection to the database {self.shown} broke: {text}")
        return InternalError(f"the database {self.shown} refused what it was given: {text}")

    def close(self) -> None:
        """Close all connections. Closing twice is fine."""
        with self._lock:
            self._closed = True
            self._engine.dispose()


def sqlite_url(path: Path) -> str:
    """The URL of a database in a file, whatever characters its path has."""
    return URL.create("sqlite", database=str(path.absolute())).render_as_string()


def _read_url(text: str) -> URL:
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise ConfigurationError("the URL of the store cannot be read as one", hint=_VALID) from None
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    if url.drivername not in ("sqlite", "sqlite+pysqlite", "postgresql+psycopg"):
        raise ConfigurationError(f"the store cannot be a database of kind {url.drivername!r}", hint=_VALID)
    return url


def _prepare_file(path: Path, *, create: bool) -> None:
    """The file exists afterwards, and only its owner may read what we make."""
    if path.exists():
        return
    if not create:
        raise ConfigurationError(
            f"there is no database {path}", hint="The party's service makes it at its first start: fate_llm party serve"
        )
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise ConfigurationError(
            f"the database {path} cannot be made: {error.strerror}", hint="Make its folder, or name another."
        ) from None


def _prepare_connection(connection: sqlite3.Connection, _: Any) -> None:
    connection.isolation_level = None  # pysqlite begins nothing by itself: `_begin` does
    for pragma in (
        f"busy_timeout = {int(1000 * _BUSY)}",
        "journal_mode = WAL",
        "synchronous = FULL",
        "foreign_keys = ON",
    ):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin(connection: Connection) -> None:
    write = connection.get_execution_options().get("fate_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
