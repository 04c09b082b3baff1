"""Numbers that only grow, and locks that end by themselves."""

from __future__ import annotations

from sqlalchemy import delete, or_, select

from . import schema
from .access import Access, insert

__all__ = ["Leases"]

_U64 = 2**64


class Leases(Access):
    """Replay protection, the service's epoch, and leases. Each call is one atomic step, also between processes."""

    def heard(self, sender: str, epoch: int, counter: int) -> bool:
        """True once for each (epoch, counter) of a sender, and only when it is above all heard before.

        epoch, counter: unsigned, 64 bits; others are never new.
        """
        if not (0 <= epoch < _U64 and 0 <= counter < _U64):
            return False
        table, position = schema.senders, f"{epoch:020d}{counter:020d}"
        with self._begin(write=True) as connection:
            statement = insert(connection, table).values(sender=sender, position=position)
            higher = statement.on_conflict_do_update(
                index_elements=["sender"], set_={"position": position}, where=table.c.position < position
            )
            return connection.execute(higher.returning(table.c.sender)).first() is not None

    def next_epoch(self, time_ns: int = 0) -> int:
        """A number above all that this has returned before, and not below `time_ns` nor the clock in nanoseconds."""
        table, least = schema.epochs, max(int(self._now() * 1e9), time_ns)
        with self._begin(write=True) as connection:
            statement = insert(connection, table).values(name="control", value=0)
            connection.execute(statement.on_conflict_do_nothing())
            last = connection.scalar(select(table.c.value).where(table.c.name == "control").with_for_update())
            value = max(least, (last or 0) + 1)
            connection.execute(table.update().where(table.c.name == "control").values(value=value))
            return value

    def take_lease(self, name: str, holder: str, seconds: float) -> bool:
        """Hold a lock for `seconds`, or hold it longer; False while somebody else does."""
        table, now = schema.leases, self._now()
        values = {"holder": holder, "until": now + seconds}
        with self._begin(write=True) as connection:
            statement = insert(connection, table).values(name=name, **values)
            free = or_(table.c.until <= now, table.c.holder == holder)
            taken = statement.on_conflict_do_update(index_elements=["name"], set_=values, where=free)
            return connection.execute(taken.returning(table.c.name)).first() is not None

    def release_lease(self, name: str, holder: str) -> None:
        """Give a lock back; nothing when it is not held, or by somebody else."""
        table = schema.leases
        with self._begin(write=True) as connection:
            connection.execute(delete(table).where(table.c.name == name, table.c.holder == holder))

    def lease_holder(self, name: str) -> str | None:
        """Who holds a lock now."""
        table = schema.leases
        query = select(table.c.holder).where(table.c.name == name, table.c.until > self._now())
        with self._begin(write=False) as connection:
            found: str | None = connection.scalar(query)
        return found
