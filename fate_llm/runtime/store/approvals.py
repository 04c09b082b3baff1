"""Questions that wait for a human of this party, and what was decided."""

from __future__ import annotations

from typing import Any, Literal

from sqlalchemy import Connection, Row, select, update

from fate_llm.core.errors import WrongState
from fate_llm.core.names import nearest

from . import schema
from .access import Access, replace, values_of
from .rows import ApprovalRow

__all__ = ["Approvals"]


class Approvals(Access):
    """One question for each digest of a job."""

    def ask_approval(self, row: ApprovalRow) -> None:
        """Put a question, or again: one that waits keeps its time and gets the new findings.

        One that was decided stays decided, unless `row.asked` is later than the decision: then it is a new question.
        """
        table = schema.approvals
        with self._begin(write=True) as connection:
            found = _question(connection, row.job, row.digest)
            asked = row.asked
            if found is not None and found.decided is None:
                asked = min(found.asked, row.asked)
            elif found is not None and row.asked <= found.decided:
                return
            values = values_of(row)
            del values["by"]
            open_again = {"asked": asked, "decided": None, "decision": None, "decided_by": "", "reason": ""}
            replace(connection, table, {**values, **open_again})

    def decide(
        self, job: str, decision: Literal["approve", "refuse"], by: str, reason: str, *, digest: str | None = None
    ) -> ApprovalRow:
        """Answer the question about a job. by: who did. digest: of the specification that was shown to them.

        Raises:
            WrongState: nothing waits for this job (or digest), or more than one question does and no digest says which.
        """
        if decision not in ("approve", "refuse"):
            raise WrongState(f"a decision is 'approve' or 'refuse', not {decision!r}")
        table = schema.approvals
        with self._begin(write=True) as connection:
            waiting = [row for row in _waiting(connection) if row.job == job]
            chosen = [row for row in waiting if digest in (None, row.digest)]
            if len(chosen) != 1:
                raise _not_one(connection, job, digest, [row.digest for row in waiting])
            values = {"decided": self._now(), "decision": decision, "decided_by": by, "reason": reason}
            here = (table.c.job == job, table.c.digest == chosen[0].digest)
            connection.execute(update(table).where(*here).values(**values))
            return _approval(connection.execute(select(table).where(*here)).one())

    def approvals(self, waiting: bool = True) -> list[ApprovalRow]:
        """Questions that wait, or all that ever were; oldest first."""
        table = schema.approvals
        with self._begin(write=False) as connection:
            if waiting:
                return [_approval(row) for row in _waiting(connection)]
            return [_approval(row) for row in connection.execute(select(table).order_by(table.c.asked, table.c.job))]

    def approval(self, job: str, digest: str) -> ApprovalRow | None:
        """The question about one digest of a job, decided or not."""
        with self._begin(write=False) as connection:
            found = _question(connection, job, digest)
        return None if found is None else _approval(found)


def _question(connection: Connection, job: str, digest: str) -> Row[Any] | None:
    table = schema.approvals
    return connection.execute(select(table).where(table.c.job == job, table.c.digest == digest)).first()


def _waiting(connection: Connection) -> list[Row[Any]]:
    table = schema.approvals
    query = select(table).where(table.c.decided.is_(None)).order_by(table.c.asked, table.c.job)
    return list(connection.execute(query))


def _not_one(connection: Connection, job: str, digest: str | None, waiting: list[str]) -> WrongState:
    if digest is None and waiting:
        return WrongState(
            f"{len(waiting)} questions about job {job!r} wait", hint=f"Say which digest: {', '.join(sorted(waiting))}"
        )
    if waiting:
        return WrongState(
            f"the question about job {job!r} is not about digest {digest}",
            hint=f"What waits is {', '.join(sorted(waiting))}: read it before you decide.",
        )
    hint = nearest(job, {row.job for row in _waiting(connection)}) or "Nothing waits for a decision here."
    return WrongState(f"no question about job {job!r} waits", hint=hint)


def _approval(row: Row[Any]) -> ApprovalRow:
    values = dict(row._mapping)
    return ApprovalRow(by=values.pop("decided_by"), **values)
