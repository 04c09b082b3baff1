"""The memory of a party's service: everything it has to know after a crash is here, and nowhere else.

    store = Store.open("sqlite:////var/lib/fate_llm/state/fate.db", now=time.time)
    with store.transaction() as tx:        # all of it, or nothing
        tx.save_job(row)
        tx.append_lines(job, party, lines)

Every method works alone as well, in a transaction of its own. What returned is on disk.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType

from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError

from fate_llm.core.errors import InternalError

from .approvals import Approvals
from .engine import Database
from .jobs import Jobs
from .leases import Leases
from .lines import Lines
from .models import Models
from .rows import ApprovalRow, JobRow, ModelRow, TaskRow
from .upgrade import upgrade

__all__ = ["ApprovalRow", "JobRow", "ModelRow", "Store", "TaskRow", "Transaction"]


class _Everything(Jobs, Approvals, Lines, Leases, Models):
    """All subjects of the store."""


class Transaction(_Everything):
    """Several steps as one. An error of the database inside it ends it, also when somebody catches the error."""

    def __init__(self, database: Database, connection: Connection, now: Callable[[], float]) -> None:
        self._database = database
        self._connection: Connection | None = connection
        self._clock = now
        self._broken = False

    @contextlib.contextmanager
    def _begin(self, *, write: bool) -> Iterator[Connection]:
        if self._connection is None or self._broken:
            state = "has ended" if self._connection is None else "failed at an earlier step"
            raise InternalError(f"this transaction {state}: nothing can be done in it")
        try:
            yield self._connection
        except SQLAlchemyError as error:
            self._broken = True
            raise self._database.explained(error) from None

    def _now(self) -> float:
        return self._clock()

    def end(self) -> bool:
        """Nothing can be done in it from now on. True: all its steps went well."""
        self._connection = None
        return not self._broken


class Store(_Everything):
    """One database for all threads of a service. Open it with `Store.open`, close it at the end."""

    def __init__(self, database: Database, *, now: Callable[[], float]) -> None:
        self._database = database
        self._clock = now
        self._here = threading.local()

    @classmethod
    def open(cls, url: str, *, now: Callable[[], float], create: bool = True) -> Store:
        """Connect, and bring the database to this program's schema.

        url: sqlite:////FOLDER/fate.db, sqlite:// (in memory), postgresql+psycopg://USER@HOST/DATABASE. now: the clock,
        seconds since the epoch. create: make an SQLite file that is not there.

        Raises:
            ConfigurationError: the URL is wrong, the file cannot be made, or the database is not ours or of a newer
                program. MissingExtra: no driver for PostgreSQL. StoreLost: it cannot be reached.
        """
        database = Database(url, create=create)
        try:
            upgrade(database)
        # The boundary of opening: whatever goes wrong, no connection is left behind.
        except BaseException:
            database.close()
            raise
        return cls(database, now=now)

    @property
    def shown(self) -> str:
        """The URL without its password."""
        return self._database.shown

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Steps on what this yields, or on the store in the same thread, are kept together or not at all.

        Raises:
            InternalError: one is open in this thread.
        """
        if self._open() is not None:
            raise InternalError("a transaction is open in this thread: a second one inside it has no meaning")
        with self._database.begin(write=True) as connection:
            self._here.open = made = Transaction(self._database, connection, self._clock)
            try:
                yield made
            finally:
                self._here.open = None
                whole = made.end()
            if not whole:
                raise InternalError("a step of a transaction failed, its error was caught: nothing of it is stored")

    def _begin(self, *, write: bool) -> AbstractContextManager[Connection]:
        if (larger := self._open()) is not None:
            return larger._begin(write=write)
        return self._database.begin(write=write)

    def _open(self) -> Transaction | None:
        return getattr(self._here, "open", None)

    def _now(self) -> float:
        return self._clock()

    def check(self) -> None:
        """Does the database answer?

        Raises:
            StoreLost: it does not.
        """
        with self._begin(write=False) as connection:
            connection.execute(text("SELECT 1"))

    def close(self) -> None:
        """Close all connections. Closing twice is fine; what is asked of the store afterwards is StoreLost."""
        self._database.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
