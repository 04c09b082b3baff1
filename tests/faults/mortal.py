"""A party's worker that dies by SIGKILL at a moment of its first life: a process forked from one that has imported all.

A death is `<spot>/<before or after>/<number>`: which call of which function is the last thing that the process does.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from functools import wraps
from multiprocessing.connection import Connection
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


def live(order: Connection, answers: Connection, errors: str, site: str, death: str, marker: Path) -> None:
    """The process itself. site: folder of the installed toys. errors: file of its stderr."""
    os.dup2(order.fileno(), 0)
    os.dup2(answers.fileno(), 1)
    file = os.open(errors, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(file, 2)
    for end in (order, answers):
        end.close()
    os.close(file)
    sys.stdin, sys.stderr = open(0, encoding="utf-8"), open(2, "w", encoding="utf-8")  # noqa: SIM115 - until its end
    sys.path.insert(0, site)
    if death:
        spot, when, number = death.split("/")
        arm(spot, when, int(number), marker)
    status = worker.main()
    sys.stderr.flush()
    os._exit(status)


class Mortal:
    """A worker, as who started it sees it."""

    def __init__(self, errors: Path, site: Path, death: str, marker: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", __name__, "tests.runtime.toys", "fate_llm.protocols.sums.plain"])
        order, ours = context.Pipe(duplex=False)
        theirs, answers = context.Pipe(duplex=False)
        self.process = context.Process(target=live, args=(order, answers, str(errors), str(site), death, marker))
        self.process.start()
        self.stdin = os.fdopen(os.dup(ours.fileno()), "w", encoding="utf-8")
        self.stdout = os.fdopen(os.dup(theirs.fileno()), encoding="utf-8")
        for end in (order, ours, theirs, answers):
            end.close()

    def close(self) -> None:
        """It has ended, or ends now."""
        self.process.kill()
        self.process.join()
        self.process.close()
        with contextlib.suppress(BrokenPipeError):
            self.stdin.close()
        self.stdout.close()
