"""What a service throws away: jobs that ended longer ago than its policy keeps them, and outputs nobody speaks of."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import NamedTuple

from fate_llm.core.errors import ConfigurationError, FateError

from .hall import Hall

__all__ = ["Housekeeping"]

_EVERY = 3600.0  # seconds
_DAY = 86400.0
_PAGE = 100  # jobs read at once
_LINES = 20_000  # lines of one job that are kept


class _Ended(NamedTuple):
    job: str
    ended: float


class Housekeeping:
    """`tick` in the engine's thread; the work is done by the clerk."""

    def __init__(self, hall: Hall) -> None:
        self._hall = hall
        self._last: float | None = None

    def tick(self, now: float) -> None:
        """Sweep once an hour; the first time an hour after the start, so that a start is quick."""
        if self._last is None:
            self._last = now
        elif now - self._last >= _EVERY:
            self._last = now
            self._hall.clerk.do(lambda: self.sweep(now))

    def _ended(self) -> Iterator[_Ended]:
        """Jobs that are over, a page at a time."""
        before: float | None = None
        while rows := self._hall.store.jobs(limit=_PAGE, before=before, lead=False):
            before = rows[-1].created
            yield from (_Ended(row.job, row.ended) for row in rows if row.ended is not None)

    def sweep(self, now: float) -> list[str]:
        """Remove what is too old; the jobs that were removed. The audit log and registered models stay."""
        try:
            retention = self._hall.policy().retention
        except ConfigurationError as error:
            self._hall.say(f"nothing is thrown away while the policy cannot be read: {error.message}")
            return []
        removed = []
        for row in self._ended():
            if retention is not None and now - row.ended > retention.days * _DAY:
                self._hall.store.delete_job(row.job)
                shutil.rmtree(self._hall.jobs / row.job, ignore_errors=True)
                removed.append(row.job)
            else:
                self._hall.store.prune_lines(row.job, _LINES)
        if removed:
            self._hall.say(f"removed, as the policy's retention says: {', '.join(removed)}")
        try:
            self._hall.artifacts.gc(self._hall.store.used_digests())
        except FateError as error:
            self._hall.say(f"outputs that nobody speaks of stay for now: {error.message}")
        return removed
