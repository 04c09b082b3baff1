"""This machine's room for jobs, in the units of the settings."""

from __future__ import annotations

import os

from fate_llm.pipelines.schema import Need

from ..federation import ResourceSettings
from .slots import Grant, Room, SlotAction, Slots

__all__ = ["Rooms"]


class Rooms:
    """Slots of one machine. Answers are by job: empty for room, else why there will never be any."""

    def __init__(self, settings: ResourceSettings) -> None:
        self._slots = Slots(
            Room(
                settings.cpus if settings.cpus is not None else float(os.cpu_count() or 1),
                settings.memory if settings.memory is not None else _memory(),
                settings.gpus,
            )
        )

    def request(self, job: str, need: Need, priority: int, now: float, *, since: float) -> dict[str, str]:
        """Ask for room; others may get theirs by it, too."""
        room = Room(need.cpus, need.memory or 0, need.gpus)
        return _answers(self._slots.request(job, room, priority, now, since=since))

    def release(self, job: str, now: float) -> dict[str, str]:
        """Give room back, or leave the queue."""
        return _answers(self._slots.release(job, now))


def _answers(actions: list[SlotAction]) -> dict[str, str]:
    return {action.job: "" if isinstance(action, Grant) else action.reason for action in actions}


def _memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
