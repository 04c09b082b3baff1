"""The heart of a party's service: one thread that owns all jobs, and everything else hands its news to.

Words of other services, what workers say, the clock, and calls of the API become entries of one queue and are dealt
with one after the other, so that a job's machines are never in two hands. What takes long (copying outputs, asking all
parties for a plan) is done elsewhere, and its result comes back through the queue.
"""

from __future__ import annotations

import queue
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from typing import Any, TypeVar

from fate_llm.core.errors import ConfigurationError, FateError, InternalError, ServiceLost, StoreLost

from ..trust.home import Home
from .desk import Desk
from .hall import Hall, open_hall
from .workers import Over, Said

__all__ = ["Engine"]

T = TypeVar("T")
Say = Callable[[str], None]

_TICK = 0.25  # seconds between looks at the clock
_ANSWER = 60.0  # seconds that a call of the API waits for the engine
_PLAN = 20.0  # seconds that the other parties have to answer to a plan
_RECEIVE = 0.5
_TELL_AGAIN = 30.0  # seconds in which it is said once that the database is away
_BACKLOG = 200  # entries of the queue above which words of others wait at the broker


class Engine:
    """Satisfies `api.Calls`. `start` once, `close` once; in between calls come from any thread."""

    def __init__(self, home: Home, *, now: Callable[[], float], say: Say) -> None:
        self.failed: BaseException | None = None
        self._say = say
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._hall: Hall = open_hall(home, now=now, put=self._queue.put, said=self._said, say=say)
        self._desk = Desk(self._hall)
        self._told_away = 0.0
        self._closing = threading.Event()
        self._ticking = threading.Event()  # a tick waits in the queue: one is enough
        self._threads = [
            threading.Thread(target=self._run, name="engine", daemon=True),
            threading.Thread(target=self._hear, name="hearing", daemon=True),
            threading.Thread(target=self._tick, name="clock", daemon=True),
        ]

    def start(self) -> None:
        """Take up all jobs that had not ended, and begin to listen."""
        for warning in self._warnings():
            self._say(warning)
        self._queue.put(self._desk.load)
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop; workers die, and go on from their journals the next time."""
        self._closing.set()
        self._queue.put(None)
        self._hall.post.close()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(10.0)
        self._hall.close()

    def _said(self, news: Said | Over) -> None:
        self._queue.put(lambda: self._desk.said(news))

    # --- the threads ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        entry: Callable[[], None] | None
        while (entry := self._queue.get()) is not None and not self._closing.is_set():
            while entry is not None:
                try:
                    entry()
                except StoreLost as error:  # everything comes again when it is back
                    if self._hall.now() - self._told_away >= _TELL_AGAIN:
                        self._told_away = self._hall.now()
                        self._say(f"the database is away: {error.message}")
                # The boundary of one entry: what is wrong with one job must not stop the others.
                except Exception as error:
                    self._say(f"internal error: {type(error).__name__}: {error}\n{traceback.format_exc()}")
                entry = self._desk.next()

    def _hear(self) -> None:
        try:
            while not self._closing.is_set():
                if self._queue.qsize() > _BACKLOG:
                    self._closing.wait(_TICK)
                    continue
                heard = self._hall.post.receive(_RECEIVE)
                if heard is not None:
                    sender, word = heard
                    self._queue.put(lambda sender=sender, word=word: self._desk.heard(sender, word))  # type: ignore[misc]
        # The boundary of a thread: without it the service would look alive and hear nobody.
        except Exception as error:
            if not self._closing.is_set():
                self.failed = error

    def _tick(self) -> None:
        def tick() -> None:
            self._ticking.clear()
            self._desk.tick()

        while not self._closing.wait(_TICK):
            if not self._ticking.is_set():
                self._ticking.set()
                self._queue.put(tick)

    def _ask(self, call: Callable[[], T]) -> T:
        """Run something in the engine's thread, and wait for its result."""
        answer: Future[T] = Future()

        def run() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                answer.set_result(call())
            except FateError as error:
                answer.set_exception(error)
            # The boundary between two threads: whoever asked gets the error, not silence.
            except Exception as error:
                self._say(f"internal error: {type(error).__name__}: {error}\n{traceback.format_exc()}")
                answer.set_exception(InternalError(f"{type(error).__name__}: {error}"))

        self._queue.put(run)
        try:
            return answer.result(_ANSWER)
        except Late:
            answer.cancel()
            raise ServiceLost("the service is busy and did not answer in time", hint="Try again.") from None

    # --- api.Calls ------------------------------------------------------------------------------------------

    def submit(
        self, pipeline: dict[str, Any], *, priority: int | None, labels: dict[str, str], key: str | None
    ) -> dict[str, Any]:
        return self._ask(lambda: self._desk.submit(pipeline, priority=priority, labels=labels, key=key))

    def plan(self, pipeline: dict[str, Any]) -> dict[str, Any]:
        asked = self._ask(lambda: self._desk.ask_all(pipeline))
        asked.done.wait(_PLAN)
        return self._ask(lambda: self._desk.plan_of(asked))

    def jobs(self, *, states: tuple[str, ...], limit: int) -> list[dict[str, Any]]:
        return self._ask(lambda: self._desk.jobs(states=states, limit=limit))

    def job(self, job: str) -> dict[str, Any]:
        return self._ask(lambda: self._desk.job(job))

    def lines(self, job: str, *, after: int, limit: int, wait: float) -> dict[str, Any]:
        news = self._hall.news
        version = news.version
        found = self._ask(lambda: self._desk.lines(job, after=after, limit=limit))
        if wait and not found["lines"] and not found["ended"]:
            news.wait(version, wait)
            found = self._ask(lambda: self._desk.lines(job, after=after, limit=limit))
        return found

    def dossier(self, job: str) -> dict[str, Any]:
        return self._ask(lambda: self._desk.dossier(job))

    def cancel(self, job: str, *, reason: str, by: str) -> dict[str, Any]:
        return self._ask(lambda: self._desk.cancel(job, reason=reason, by=by))

    def resume(self, job: str, *, reason: str, by: str) -> dict[str, Any]:
        return self._ask(lambda: self._desk.resume(job, reason=reason, by=by))

    def rerun(self, job: str, *, from_task: str, by: str) -> dict[str, Any]:
        return self._ask(lambda: self._desk.rerun(job, from_task=from_task, by=by))

    def approvals(self) -> list[dict[str, Any]]:
        return self._ask(self._desk.approvals)

    def decide(self, job: str, *, decision: str, digest: str, by: str, reason: str) -> dict[str, Any]:
        return self._ask(lambda: self._desk.decide(job, decision=decision, digest=digest, by=by, reason=reason))

    def health(self) -> dict[str, Any]:
        """Whether the engine turns, the database answers and the broker is there."""
        reasons = []
        if self.failed is not None or not self._threads[0].is_alive():
            reasons.append("the engine has stopped")
        if not self._hall.post.connected:
            reasons.append(self._hall.post.away)
        try:
            self._ask(self._desk.look)
        except FateError as error:
            reasons.append(f"the database: {error.message}")
        status = "failed" if reasons else "ok"
        return {"status": status, "party": self._hall.me, "reasons": reasons, "warnings": self._warnings()}

    def _warnings(self) -> list[str]:
        """What does not stop the service, and makes it refuse every job."""
        found = []
        for name, read in (("policy", self._hall.policy), ("catalogue", self._hall.catalog)):
            try:
                read()
            except ConfigurationError as error:
                found.append(f"every job is refused: its {name} is not whole: {error.message}")
        return found

    def metrics(self) -> str:
        return self._ask(self._desk.metrics)
