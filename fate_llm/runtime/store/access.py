"""What the store's subjects share: a connection in a transaction, a clock, and rows that replace each other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import fields
from functools import cache
from typing import Any

from sqlalchemy import Connection, Table
from sqlalchemy.dialects import postgresql, sqlite

from .rows import ApprovalRow, JobRow, ModelRow, TaskRow

__all__ = ["Access", "insert", "replace", "values_of"]


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
    return _insert(connection.dialect.name, table)


def _insert(dialect: str, table: Table) -> sqlite.Insert | postgresql.Insert:
    return postgresql.insert(table) if dialect == "postgresql" else sqlite.insert(table)


def values_of(row: JobRow | TaskRow | ApprovalRow | ModelRow) -> dict[str, Any]:
    """A row's values by column. They are written at once, so that nothing is copied, as `dataclasses.asdict` would."""
    return {field.name: getattr(row, field.name) for field in fields(row)}


def replace(connection: Connection, table: Table, values: Mapping[str, Any]) -> None:
    """Insert a row, or replace all columns of the one with the same primary key."""
    connection.execute(_replacing(connection.dialect.name, table, tuple(values)), dict(values))


@cache
def _replacing(dialect: str, table: Table, names: tuple[str, ...]) -> sqlite.Insert | postgresql.Insert:
    """The statement for rows with these columns: made once, it is executed with every change of every job."""
    keys = [column.name for column in table.primary_key]
    statement = _insert(dialect, table)
    rest = {name: statement.excluded[name] for name in names if name not in keys}
    return statement.on_conflict_do_update(index_elements=keys, set_=rest)
