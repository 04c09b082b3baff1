"""The rows of the model registry; what they mean is in `runtime/artifacts/models.py`."""

from __future__ import annotations

from typing import Any

from sqlalchemy import func, select

from . import schema
from .access import Access, insert, values_of
from .rows import ModelRow

__all__ = ["Models"]


class Models(Access):
    """Registered models: versions 1, 2, ... of a name."""

    def add_model(self, *, name: str, digest: str, job: str, task: str, created: float, content: Any) -> ModelRow:
        """The next version of a name; the same output of the same task again is the version that it has."""
        table = schema.models
        same = (table.c.name == name, table.c.job == job, table.c.task == task, table.c.digest == digest)
        with self._begin(write=True) as connection:
            while True:
                if (found := connection.execute(select(table).where(*same)).first()) is not None:
                    return ModelRow(**found._mapping)
                last = connection.scalar(select(func.max(table.c.version)).where(table.c.name == name)) or 0
                row = ModelRow(name, last + 1, digest, job, task, created, content)
                # On a server another process may have taken the version since: then we look again.
                statement = insert(connection, table).values(**values_of(row)).on_conflict_do_nothing()
                if connection.execute(statement.returning(table.c.version)).first() is not None:
                    return row

    def models(self, *, name: str | None = None, digest: str | None = None) -> list[ModelRow]:
        """Newest first. digest: its beginning is enough."""
        table = schema.models
        query = select(table).order_by(table.c.created.desc(), table.c.name, table.c.version.desc())
        if name is not None:
            query = query.where(table.c.name == name)
        if digest is not None:
            query = query.where(table.c.digest.startswith(digest, autoescape=True))
        with self._begin(write=False) as connection:
            return [ModelRow(**row._mapping) for row in connection.execute(query)]

    def remove_model(self, name: str, version: int) -> bool:
        """Forget one version; False when there is none. The artifact goes with the next `gc`."""
        table = schema.models
        with self._begin(write=True) as connection:
            here = (table.c.name == name, table.c.version == version)
            return connection.execute(table.delete().where(*here)).rowcount > 0
