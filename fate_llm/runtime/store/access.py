"""What the store's subjects share: a connection in a transaction, a clock, and rows that replace each other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from sqlalchemy import Connection, Table
from sqlalchemy.dialects import postgresql, sqlite

__all__ = ["Access", "insert", "replace"]


class Access(ABC):
    """Where the methods of the store get their connection from: a transaction of their own, or a larger one."""

    @abstractmethod
    def _begin(self, *, write: bool) -> AbstractContextManager[Connection]:
        """A connection inside a transaction that is committed at the end."""

    @abstractmethod
    def _now(self) -> float:
        """Seconds since the epoch."""


def insert(connection: Connection, table: Table) -> sqlite.Insert | postgresql.Insert:
    """An INSERT that can say what to do when the row is there: `ON CONFLICT` is the same in both databases."""
    if connection.dialect.name == "postgresql":
        return postgresql.insert(table)
    return sqlite.insert(table)


def replace(connection: Connection, table: Table, values: Mapping[str, Any]) -> None:
    """Insert a row, or replace all columns of the one with the same primary key."""
    keys = [column.name for column in table.primary_key]
    statement = insert(connection, table).values(**values)
    rest = {name: value for name, value in values.items() if name not in keys}
    connection.execute(statement.on_conflict_do_update(index_elements=keys, set_=rest))
