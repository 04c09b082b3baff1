"""How much of one party's messages is looked at: a token bucket for their number and one for their bytes."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Allowance"]


@dataclass(slots=True)
class Allowance:
    """What one sender may still have taken, full at first.

    messages, size: how many, and how many bytes, at once; a_second: what comes back of each in a second. at: seconds
    that only grow, when the account began.
    """

    messages: float
    size: float
    a_second: tuple[float, float]
    at: float
    _left: tuple[float, float] = field(init=False)

    def __post_init__(self) -> None:
        self._left = (self.messages, self.size)

    def take(self, size: int, now: float) -> bool:
        """Whether a message of `size` bytes is looked at now; if so, it is taken off."""
        passed, self.at = max(now - self.at, 0.0), max(now, self.at)
        messages = min(self.messages, self._left[0] + passed * self.a_second[0])
        room = min(self.size, self._left[1] + passed * self.a_second[1])
        enough = messages >= 1 and room >= size
        self._left = (messages - 1, room - size) if enough else (messages, room)
        return enough

    def charge(self, size: int) -> None:
        """Take `size` bytes more off for a message that turned out to be larger, even if nothing is left."""
        self._left = (self._left[0], self._left[1] - size)
