"""Events of jobs: this party's own, and those that partners let it see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, case, delete, func, select, text

from ..service.words import Line
from . import schema
from .access import Access, insert

__all__ = ["Lines"]

_DEEPEST = 20  # levels of a line's fields that are kept
_LOCK = 7_042_331_905_117_284_962  # PostgreSQL: held by who appends, so that ids become visible in their order


class Lines(Access):
    """Lines have ids in the order of their arrival, and each (job, party, number) is there once."""

    def append_lines(self, job: str, party: str, lines: Sequence[Line]) -> int:
        """Store lines; those that are there, or were there and have been pruned, change nothing.

        Returns:
            How many were new.
        """
        if not lines:
            return 0
        table = schema.lines
        with self._begin(write=True) as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
            known = _known(connection, job, party, lines)
            new: dict[int, Line] = {}
            for line in lines:
                if line.number not in known:
                    new.setdefault(line.number, line)
            values = [
                {"job": job, "party": party, "number": number, "content": _content(line)}
                for number, line in new.items()
            ]
            if values:
                connection.execute(insert(connection, table).on_conflict_do_nothing(), values)
        return len(values)

    def lines(
        self, job: str, *, after: int = 0, party: str | None = None, limit: int = 500
    ) -> list[tuple[int, str, Line]]:
        """(id, party, line) with an id above `after`, in the order of arrival. party: only of this one."""
        table = schema.lines
        query = select(table.c.id, table.c.party, table.c.content).where(table.c.job == job, table.c.id > after)
        if party is not None:
            query = query.where(table.c.party == party)
        with self._begin(write=False) as connection:
            found = connection.execute(query.order_by(table.c.id).limit(limit)).all()
        return [(number, who, Line.model_validate(content)) for number, who, content in found]

    def last_line(self, job: str, party: str) -> int:
        """The highest number of a party's lines that was ever stored, 0 before the first."""
        table = schema.lines
        query = select(func.max(table.c.number)).where(table.c.job == job, table.c.party == party)
        with self._begin(write=False) as connection:
            return max(connection.scalar(query) or 0, _floors(connection, job).get(party, 0))

    def prune_lines(self, job: str, keep: int) -> int:
        """Remove all but the newest `keep` lines of a job; a removed line does not come back when it is sent again.

        Returns:
            How many were removed.
        """
        table = schema.lines
        with self._begin(write=True) as connection:
            newest = select(table.c.id).where(table.c.job == job).order_by(table.c.id.desc())
            last_gone = connection.scalar(newest.offset(keep).limit(1))
            if last_gone is None:
                return 0
            gone = (table.c.job == job, table.c.id <= last_gone)
            highest = select(table.c.party, func.max(table.c.number)).where(*gone).group_by(table.c.party)
            for party, number in connection.execute(highest).all():
                _raise_floor(connection, job, party, number)
            return connection.execute(delete(table).where(*gone)).rowcount


def _floors(connection: Connection, job: str) -> dict[str, int]:
    table = schema.line_floors
    query = select(table.c.party, table.c.number).where(table.c.job == job)
    return {row[0]: row[1] for row in connection.execute(query)}


def _known(connection: Connection, job: str, party: str, lines: Sequence[Line]) -> set[int]:
    """Which of the lines' numbers are there, or were there and have been pruned."""
    table, numbers = schema.lines, [line.number for line in lines]
    floor = _floors(connection, job).get(party, -1)
    query = select(table.c.number).where(table.c.job == job, table.c.party == party)
    there = connection.scalars(query.where(table.c.number.between(min(numbers), max(numbers))))
    return {*there, *(number for number in numbers if number <= floor)}


def _raise_floor(connection: Connection, job: str, party: str, number: int) -> None:
    table = schema.line_floors
    statement = insert(connection, table).values(job=job, party=party, number=number)
    higher = case((table.c.number > number, table.c.number), else_=number)
    connection.execute(statement.on_conflict_do_update(index_elements=["job", "party"], set_={"number": higher}))


def _content(line: Line) -> dict[str, Any]:
    """A line as JSON has it: it may come from a partner, and must not be able to stop what stores it."""
    plain: dict[str, Any] = _plain(line.model_dump(), _DEEPEST)
    return plain


def _plain(value: Any, deeper: int) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if deeper == 0:
        return "..."
    if isinstance(value, dict):
        return {str(key): _plain(item, deeper - 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, deeper - 1) for item in value]
    return str(value)
