"""When jobs may start at a party: days and hours in a time zone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime, time, timedelta
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo

from pydantic import BeforeValidator, Field, StringConstraints, field_validator

from fate_llm.pipelines.schema import Listed

from .documents import Strict

__all__ = ["Schedule"]

Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
_DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_HOURS = r"^(?:[01][0-9]|2[0-3]):[0-5][0-9]-(?:(?:[01][0-9]|2[0-3]):[0-5][0-9]|24:00)$"
_AHEAD = 9  # days that are looked at: a week, and both ends of it


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Schedule(Strict):
    """Jobs start on these days within these hours; one that has started runs on. A window that goes past midnight
    belongs to the day on which it opens."""

    days: Listed[Day] = Field(_DAYS, min_length=1, description="Days of the week.")
    hours: Annotated[
        Listed[Annotated[str, StringConstraints(pattern=_HOURS)]], BeforeValidator(_one_or_many), Field(min_length=1)
    ] = Field(("00:00-24:00",), description="Windows such as 20:00-06:00, one or a list of them.")
    timezone: str = Field("UTC", description="A name such as Europe/Berlin.")

    @field_validator("timezone")
    @classmethod
    def _is_known(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (OSError, ValueError, LookupError):
            raise ValueError("no time zone has this name; UTC and names such as Europe/Berlin are valid") from None
        return name

    def next_start(self, now: float) -> float:
        """The first moment from `now` on (seconds since 1970) at which a job may start; `now` itself inside a window.

        Days without any window ahead cannot be: there is at least one window a week.
        """
        opened = [(begin, end) for begin, end in self._windows(now) if end > now]
        return max(now, min(begin for begin, _ in opened))

    def _windows(self, now: float) -> Iterator[tuple[float, float]]:
        zone = ZoneInfo(self.timezone)
        today = datetime.fromtimestamp(now, zone).date()
        for ahead in range(-2, _AHEAD):
            day = today + timedelta(days=ahead)
            if _DAYS[day.weekday()] in self.days:
                for text in self.hours:
                    first, _, last = text.partition("-")
                    until = day + timedelta(days=1) if last <= first or last == "24:00" else day
                    begin, end = (datetime.combine(d, _time(t), zone) for d, t in ((day, first), (until, last)))
                    if end.timestamp() > begin.timestamp():  # not swallowed by a change of the clock
                        yield begin.timestamp(), end.timestamp()

    def __str__(self) -> str:
        days = "every day" if len(set(self.days)) == len(_DAYS) else ", ".join(self.days)
        return f"{days} {', '.join(self.hours)} {self.timezone}"


def _time(text: str) -> time:
    hour, minute = map(int, re.split(":", text))
    return time(hour % 24, minute)
