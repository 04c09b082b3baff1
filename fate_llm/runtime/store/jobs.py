"""Jobs and their tasks."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from sqlalchemy import Row, Select, delete, false, func, select

from fate_llm.core.errors import UnknownJob, WrongState

from . import schema
from .access import Access, replace, values_of
from .rows import JobRow, TaskRow

__all__ = ["Jobs"]

_DIGEST = re.compile(r"[0-9a-f]{64}")


class Jobs(Access):
    """The jobs of this party: those it leads and its own parts."""

    def save_job(self, row: JobRow) -> None:
        """Insert a job, or replace the row of the same job and `lead`."""
        with self._begin(write=True) as connection:
            replace(connection, schema.jobs, values_of(row))

    def job(self, job: str, *, lead: bool = False) -> JobRow | None:
        """This party's part of a job, or the machine that leads it; None when there is none."""
        table = schema.jobs
        with self._begin(write=False) as connection:
            found = connection.execute(select(table).where(table.c.job == job, table.c.lead == lead)).first()
        return None if found is None else _job(found)

    def jobs(
        self,
        *,
        states: Collection[str] | None = None,
        limit: int = 100,
        before: float | None = None,
        lead: bool | None = None,
        initiator: str | None = None,
        offset: int = 0,
    ) -> list[JobRow]:
        """Newest first by `created`. before: only those created before it. lead: None is both kinds of rows.

        initiator: only jobs of this party. offset: so many of them are left out.
        """
        table = schema.jobs
        query = select(table).order_by(table.c.created.desc(), table.c.job.desc(), table.c.lead.desc())
        if states is not None:
            query = query.where(table.c.state.in_(sorted(states)))
        if before is not None:
            query = query.where(table.c.created < before)
        if lead is not None:
            query = query.where(table.c.lead == lead)
        if initiator is not None:
            query = query.where(table.c.initiator == initiator)
        return self._all_jobs(query.limit(limit).offset(offset))

    def led_job(self, unique: str) -> str | None:
        """The newest job that this party leads and whose id ends with `-unique`."""
        table = schema.jobs
        query = select(table.c.job).where(table.c.lead, table.c.job.endswith(f"-{unique}", autoescape=True))
        with self._begin(write=False) as connection:
            found: str | None = connection.scalar(query.order_by(table.c.created.desc()).limit(1))
        return found

    def initiators(self) -> list[str]:
        """Whose jobs there are, in the order of their names."""
        column = schema.jobs.c.initiator
        with self._begin(write=False) as connection:
            return list(connection.scalars(select(column).distinct().order_by(column)))

    def unfinished_jobs(self) -> list[JobRow]:
        """All that have not ended, oldest first: what a service goes on with when it starts."""
        table = schema.jobs
        query = select(table).where(table.c.ended.is_(None))
        return self._all_jobs(query.order_by(table.c.created, table.c.job, table.c.lead))

    def _all_jobs(self, query: Select[Any]) -> list[JobRow]:
        with self._begin(write=False) as connection:
            return [_job(found) for found in connection.execute(query)]

    def delete_job(self, job: str) -> None:
        """Forget an ended job: its rows, tasks, approvals and lines. Its models stay.

        Raises:
            UnknownJob: there is none. WrongState: it has not ended.
        """
        table = schema.jobs
        with self._begin(write=True) as connection:
            ends = connection.execute(select(table.c.state, table.c.ended).where(table.c.job == job)).all()
            if not ends:
                raise UnknownJob(f"no job {job!r} at this party")
            if running := [state for state, ended in ends if ended is None]:
                raise WrongState(f"job {job} is {running[0]}: only what has ended is forgotten")
            for one in (schema.jobs, schema.tasks, schema.approvals, schema.lines, schema.line_floors):
                connection.execute(delete(one).where(one.c.job == job))

    def save_task(self, row: TaskRow) -> None:
        """Insert a task, or replace what is known of it from an earlier attempt."""
        with self._begin(write=True) as connection:
            replace(connection, schema.tasks, values_of(row))

    def tasks(self, job: str) -> list[TaskRow]:
        """The tasks of a job at this party, in the order they were started; those not started last."""
        table = schema.tasks
        query = select(table).where(table.c.job == job)
        with self._begin(write=False) as connection:
            found = connection.execute(query.order_by(table.c.started.is_(None), table.c.started, table.c.task))
            return [TaskRow(**row._mapping) for row in found]

    def finished_task(self, fingerprint: str) -> TaskRow | None:
        """The latest task that ended in success with this fingerprint; its outputs can be taken over."""
        table = schema.tasks
        query = select(table).where(table.c.fingerprint == fingerprint, table.c.state == "success")
        if not fingerprint:
            query = query.where(false())
        with self._begin(write=False) as connection:
            found = connection.execute(query.order_by(table.c.ended.desc(), table.c.job.desc())).first()
        return None if found is None else TaskRow(**found._mapping)

    def used_digests(self) -> set[str]:
        """Digests of all artifacts that a task or a registered model speaks of: what `gc` must keep."""
        with self._begin(write=False) as connection:
            used = set(connection.scalars(select(schema.models.c.digest)))
            for outputs in connection.scalars(select(schema.tasks.c.outputs)):
                used |= {value for value in outputs.values() if _DIGEST.fullmatch(value)}
        return used

    def count_jobs(self) -> dict[str, int]:
        """How many of this party's parts are in each state."""
        table = schema.jobs
        query = select(table.c.state, func.count()).where(table.c.lead.is_(False)).group_by(table.c.state)
        with self._begin(write=False) as connection:
            return {row[0]: row[1] for row in connection.execute(query)}


def _job(row: Row[Any]) -> JobRow:
    return JobRow(**row._mapping)
