"""A party's worker that dies by SIGKILL at a moment of its first life: `python -m tests.faults.mortal`.

The environment's MORTAL is `<spot>/<before or after>/<number>` and the path of a file that says that it has happened.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from fate_llm.protocols.channel import JobChannel
from fate_llm.protocols.link import SecureLink
from fate_llm.protocols.link.peer import Peer
from fate_llm.protocols.rounds.driver import ContributorDriver, CoordinatorDriver
from fate_llm.runtime import party, worker
from fate_llm.runtime.context import TaskContext
from fate_llm.runtime.journal import RoundFolder

SPOTS: dict[str, tuple[Any, str]] = {
    "start": (worker, "_connect"),
    "agree": (SecureLink, "_agree"),
    "work": (TaskContext, "turn"),
    "send": (JobChannel, "send"),
    "chunk": (Peer, "seal"),
    "contribute": (ContributorDriver, "_contribute"),
    "collect": (CoordinatorDriver, "_collect"),
    "commit": (RoundFolder, "commit"),
    "acknowledge": (JobChannel, "acknowledge"),
    "note": (party, "replace_json"),
    "done": (JobChannel, "announce_done"),
    "ended": (worker, "replace_json"),
    "goodbye": (SecureLink, "_say_goodbye"),
    "close": (JobChannel, "close"),
}


def arm(spot: str, when: str, number: int, marker: Path) -> None:
    """Make the `number`-th call of the spot the last thing that this process does, unless one before it has."""
    if marker.exists():
        return
    place, name = SPOTS[spot]
    call: Callable[..., Any] = getattr(place, name)
    count = 0

    @wraps(call)
    def counted(*args: Any, **settings: Any) -> Any:
        nonlocal count
        count += 1
        last = count == number
        if last and when == "before":
            die(marker)
        found = call(*args, **settings)
        if last:
            die(marker)
        return found

    setattr(place, name, counted)


def die(marker: Path) -> None:
    marker.touch()
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    plan, _, file = os.environ.get("MORTAL", "").partition(" ")
    if plan:
        where, moment, count = plan.split("/")
        arm(where, moment, int(count), Path(file))
    sys.exit(worker.main())
