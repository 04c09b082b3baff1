"""Room on a party's machine (CPU cores, memory, GPUs) and the jobs that wait for it, as a pure machine.

Rules:
1. Jobs stand in the order of priority (the higher first), then of age. Who fits gets room; who does not fit blocks
   nobody: those behind may go first.
2. Nobody starves: once a job has waited for `patience` seconds, room is held for it. Those behind it get only what
   would be left beside it, so it gets its room at the latest when all who hold room at that moment have given it back.
3. What is more than the machine has is refused at once.
4. Everything may be said twice: who holds room and asks again is granted again, who gives back what it does not hold
   changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fate_llm.core.errors import ConfigurationError, InternalError

__all__ = ["Grant", "Refuse", "Room", "SlotAction", "Slots"]

_SLACK = 1e-9  # cores: what adding fractions of cores may be off by


@dataclass(frozen=True, slots=True)
class Room:
    """What a job needs or a machine has. cpus: cores, fractions allowed. memory: bytes. gpus: whole devices.

    Raises:
        ConfigurationError: a number below 0, or not finite.
    """

    cpus: float = 0.0
    memory: int = 0
    gpus: int = 0

    def __post_init__(self) -> None:
        for name, value in (("cpus", self.cpus), ("memory", self.memory), ("gpus", self.gpus)):
            if not math.isfinite(value) or value < 0:
                raise ConfigurationError(f"resources: {name} is {value}", hint="A number from 0 up is valid.")

    def __add__(self, other: Room) -> Room:
        return Room(self.cpus + other.cpus, self.memory + other.memory, self.gpus + other.gpus)

    def less(self, other: Room) -> Room:
        """What is left beside `other`; nothing where there is less than that."""
        cpus, memory, gpus = self.cpus - other.cpus, self.memory - other.memory, self.gpus - other.gpus
        return Room(max(0.0, cpus), max(0, memory), max(0, gpus))

    def lacks(self, need: Room) -> str:
        """What of `need` does not fit in here, for people; empty when all of it does."""
        short = []
        if need.cpus > self.cpus + _SLACK:
            short.append(f"{need.cpus:g} CPU cores of {self.cpus:g}")
        if need.memory > self.memory:
            short.append(f"{_size(need.memory)} of memory of {_size(self.memory)}")
        if need.gpus > self.gpus:
            short.append(f"{need.gpus} GPUs of {self.gpus}")
        return ", ".join(short)


@dataclass(frozen=True, slots=True)
class Grant:
    """The job has its room, until it is released."""

    job: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """The job can never have what it asks for here."""

    job: str
    reason: str


SlotAction = Grant | Refuse


@dataclass(frozen=True, slots=True)
class _Asked:
    need: Room
    priority: int
    since: float


@dataclass(slots=True)
class Slots:
    """The room of one machine. capacity: all of it. patience: seconds a job may be overtaken by those behind it."""

    capacity: Room
    patience: float = 600.0
    held: dict[str, Room] = field(default_factory=dict)
    waiting: dict[str, _Asked] = field(default_factory=dict)

    def request(
        self, job: str, need: Room, priority: int, now: float, *, since: float | None = None
    ) -> list[SlotAction]:
        """Ask for room. since: what the job's age is counted from; `now` for one that comes for the first time.

        Asking again while waiting keeps the place in the queue and takes over need and priority.
        """
        if job in self.held:
            return [Grant(job)]
        if lack := self.capacity.lacks(need):
            return [*self.release(job, now), Refuse(job, f"the job needs {lack} that this party lends to jobs")]
        asked = now if since is None else since
        if (before := self.waiting.get(job)) is not None:
            asked = min(asked, before.since)
        self.waiting[job] = _Asked(need, priority, asked)
        return self._fill(now)

    def release(self, job: str, now: float) -> list[SlotAction]:
        """Give room back, or leave the queue."""
        if self.held.pop(job, None) is None and self.waiting.pop(job, None) is None:
            return []
        return self._fill(now)

    def resize(self, capacity: Room, now: float) -> list[SlotAction]:
        """The party lends more or less than before; who holds room keeps it."""
        self.capacity = capacity
        refused: list[SlotAction] = []
        for job, asked in tuple(self.waiting.items()):
            if lack := capacity.lacks(asked.need):
                del self.waiting[job]
                refused.append(Refuse(job, f"the job needs {lack} that this party lends to jobs now"))
        return [*refused, *self._fill(now)]

    @property
    def free(self) -> Room:
        """What nobody holds."""
        return self.capacity.less(sum(self.held.values(), Room()))

    @property
    def queue(self) -> tuple[str, ...]:
        """Jobs that wait, the first one first."""
        return tuple(sorted(self.waiting, key=self._place))

    def explain(self, job: str) -> str:
        """Why a job waits, for people; empty for one that does not."""
        if job not in self.waiting:
            return ""
        lack = self.free.lacks(self.waiting[job].need) or "room that is held for a job before it"
        return f"number {self.queue.index(job) + 1} in the queue, waits for {lack} free"

    def _place(self, job: str) -> tuple[int, float, str]:
        asked = self.waiting[job]
        return -asked.priority, asked.since, job

    def _fill(self, now: float) -> list[SlotAction]:
        free, granted = self.free, []
        for job in self.queue:
            asked = self.waiting[job]
            if not free.lacks(asked.need):
                del self.waiting[job]
                self.held[job] = asked.need
                granted.append(job)
                free = free.less(asked.need)
            elif now - asked.since >= self.patience:  # held for it: whoever comes behind finds it taken
                free = free.less(asked.need)
        return [Grant(job) for job in granted]

    def to_data(self) -> dict[str, Any]:
        """As JSON values."""
        data: dict[str, Any] = _DATA.dump_python(self, mode="json")
        return data

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Slots:
        """What `to_data` gave.

        Raises:
            InternalError: it is something else.
        """
        try:
            return _DATA.validate_python(dict(data))
        except (ValidationError, ConfigurationError) as error:
            raise InternalError(f"stored slots cannot be read: {error}") from None


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


_DATA: TypeAdapter[Slots] = TypeAdapter(Slots)
