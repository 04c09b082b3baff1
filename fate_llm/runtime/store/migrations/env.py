"""What alembic runs to reach the database: the connection is the one that `store.upgrade` has locked."""

from __future__ import annotations

from alembic import context

from fate_llm.runtime.store.schema import METADATA, VERSION_TABLE

__all__: list[str] = []

context.configure(
    connection=context.config.attributes["connection"], target_metadata=METADATA, version_table=VERSION_TABLE
)
with context.begin_transaction():
    context.run_migrations()
