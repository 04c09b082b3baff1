"""The worker processes of a party: one per job, started with an order on stdin, watched until they end.

A worker belongs to its service: it dies when its stdin ends, and a service that comes up again starts it anew. What it
says arrives as `Said`, its end as `Over`, both through one function and from a thread of the worker's own.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..events import Event

__all__ = ["Over", "Said", "Workers"]

_LONGEST_LINE = 16 * 1024 * 1024  # characters of one line of a worker; more is no worker of ours
_GRACE = 20.0  # seconds from being told to stop until it is killed


@dataclass(frozen=True, slots=True)
class Said:
    """An event of a worker."""

    job: str
    attempt: int
    event: Event


@dataclass(frozen=True, slots=True)
class Over:
    """A worker is no more. end: what it said at last, None when it died without a word. how: for people."""

    job: str
    attempt: int
    end: Mapping[str, Any] | None
    how: str


class Workers:
    """At most one worker per job. tell: called from threads with `Said` and `Over`, in the order of each worker."""

    def __init__(self, tell: Callable[[Said | Over], None], *, command: Sequence[str] | None = None) -> None:
        self._tell = tell
        self._command = tuple(command or (sys.executable, "-m", "fate_llm.runtime.worker"))
        self._running: dict[str, _Worker] = {}
        self._lock = threading.Lock()

    def start(
        self,
        order: Mapping[str, Any],
        *,
        errors: Path,
        command: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> int:
        """Start a worker; its process id. One that still runs for the job is killed first.

        errors: file that its stderr is appended to. command: instead of the usual one (several ranks).
        """
        job, attempt = str(order["job"]), int(order["attempt"])
        self.kill(job)
        with errors.open("ab") as stderr:
            process = subprocess.Popen(
                list(command or self._command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
                env={**os.environ, **(environment or {})},
            )
        worker = _Worker(job, attempt, process, self._tell, self._forget)
        with self._lock:
            self._running[job] = worker
        worker.say(order)
        worker.watch()
        return process.pid

    def tell(self, job: str, message: Mapping[str, Any]) -> None:
        """A line on the worker's stdin; nothing when there is none."""
        if (worker := self._running.get(job)) is not None:
            worker.say(message)

    def stop(self, job: str, reason: str) -> None:
        """Ask it to end; what does not within some seconds is killed."""
        if (worker := self._running.get(job)) is not None:
            worker.say({"cancel": reason})
            worker.kill_later(_GRACE)

    def kill(self, job: str) -> None:
        """End it now, and wait until it is gone; what it would have said last is lost."""
        with self._lock:
            worker = self._running.pop(job, None)
        if worker is not None:
            worker.end_quietly()

    def running(self) -> dict[str, int]:
        """Process ids by job."""
        with self._lock:
            return {job: worker.process.pid for job, worker in self._running.items()}

    def close(self) -> None:
        """Kill all: they go on from their journals when they are started again."""
        for job in tuple(self._running):
            self.kill(job)

    def _forget(self, worker: _Worker) -> None:
        with self._lock:
            if self._running.get(worker.job) is worker:
                del self._running[worker.job]


class _Worker:
    """One process and the thread that listens to it."""

    def __init__(
        self,
        job: str,
        attempt: int,
        process: subprocess.Popen[str],
        tell: Callable[[Said | Over], None],
        forget: Callable[[_Worker], None],
    ) -> None:
        self.job, self.attempt, self.process = job, attempt, process
        self._tell, self._forget = tell, forget
        self._writing = threading.Lock()
        self._quiet = False
        self._reaped = threading.Event()  # its process id may be somebody else's from here on
        self._ending = threading.Lock()
        self._timer: threading.Timer | None = None
        self._thread = threading.Thread(target=self._listen, name=f"worker-{job}", daemon=True)

    def watch(self) -> None:
        self._thread.start()
        threading.Thread(target=self._mind, name=f"minds-{self.job}", daemon=True).start()

    def _mind(self) -> None:
        """When it is dead, so are its children, which may hold its stdout open."""
        with contextlib.suppress(ChildProcessError):  # the listener was quicker
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        self._kill()

    def say(self, message: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        with self._writing, contextlib.suppress(BrokenPipeError, ValueError):  # it has ended
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def kill_later(self, seconds: float) -> None:
        if self._timer is None:
            self._timer = threading.Timer(seconds, self._kill)
            self._timer.daemon = True
            self._timer.start()

    def end_quietly(self) -> None:
        self._quiet = True
        self._kill()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _kill(self) -> None:
        """End the process and its group: the ranks of torchrun are its children."""
        with self._ending, contextlib.suppress(ProcessLookupError):
            if not self._reaped.is_set():
                os.killpg(self.process.pid, signal.SIGKILL)

    def _listen(self) -> None:
        assert self.process.stdout is not None
        end: Mapping[str, Any] | None = None
        while line := self.process.stdout.readline(_LONGEST_LINE):
            message = _parsed(line)
            if "event" in message and not self._quiet:
                kind, party, task, seconds, fields = message["event"]
                self._tell(Said(self.job, self.attempt, Event(kind, party, task, seconds, fields)))
            elif "end" in message:
                end = message["end"]
        self._kill()  # it has closed its stdout: all of it is over, or about to be
        with self._ending:
            self.process.wait()
            self._reaped.set()
        if self._timer is not None:
            self._timer.cancel()
        for pipe in (self.process.stdin, self.process.stdout):
            with self._writing, contextlib.suppress(BrokenPipeError):
                assert pipe is not None
                pipe.close()
        self._forget(self)
        if not self._quiet:
            self._tell(Over(self.job, self.attempt, end, _how(self.process.returncode)))


def _parsed(line: str) -> dict[str, Any]:
    """A worker's line; one cut by its death says nothing."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _how(status: int) -> str:
    return f"killed by signal {-status}" if status < 0 else f"exit status {status}"
