"""All parties of a job on this machine, a process each, talking over a message broker.

The same parties, links and messages as between machines; only the starting differs. The parties' identities are made
for the job, and given to each process through a pipe.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

from fate_llm.core.errors import FateError, InternalError, JobCancelled, PeerFailed, error_from
from fate_llm.protocols.transports.rabbitmq import BrokerAddress, delete_inboxes, log_in
from fate_llm.security.identity import Identity

from .attempt import Order, Outcome, cause_of
from .events import Event
from .trust.catalog import local_catalog

__all__ = ["ProcessJob", "ProcessRuntime"]

_BROKER = 10.0  # seconds that a broker may take to answer before anything is started
_LAST_WORDS = 60.0  # seconds a cancelled party may take to end its step before it is killed


class ProcessRuntime:
    """Satisfies `runtime.attempt.Runtime`. brokers: each party's address (a URL).

    Raises:
        ConfigurationError: an address that cannot be.
    """

    name = "processes"

    def __init__(self, brokers: Mapping[str, str], *, timing: Mapping[str, float] | None = None) -> None:
        self._brokers = dict(brokers)
        self._timing = dict(timing or {})
        for url in self._brokers.values():
            BrokerAddress.from_url(url)

    def attempt(self, order: Order) -> ProcessJob:
        return ProcessJob(order, self._brokers, self._timing)


class _Party:
    """One party's process, as seen from outside."""

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        self.name = name
        self.process = process
        self.end: dict[str, Any] | None = None
        self._lock = threading.Lock()

    def tell(self, message: Mapping[str, Any]) -> None:
        """A line on its stdin; nothing when it has ended."""
        assert self.process.stdin is not None
        try:
            with self._lock:
                self.process.stdin.write(json.dumps(message) + "\n")
                self.process.stdin.flush()
        except (BrokenPipeError, ValueError):
            return

    def close(self) -> None:
        """Wait for the process, and give its pipes back."""
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with self._lock, contextlib.suppress(BrokenPipeError):
                assert pipe is not None
                pipe.close()

    def error(self) -> FateError | None:
        """What it ended with."""
        if self.end is not None:
            found = self.end.get("error")
            return None if found is None else error_from(found["code"], found["message"], found["hint"])
        return PeerFailed(f"the process of {self.name} ended without a word ({_how(self.process.returncode)})")


class ProcessJob:
    """Satisfies `runtime.attempt.Attempt`."""

    def __init__(self, order: Order, brokers: Mapping[str, str], timing: Mapping[str, float]) -> None:
        self._order = order
        self._brokers = brokers
        self._timing = timing
        self._parties: dict[str, _Party] = {}
        self._cancelled: str | None = None
        self._lock = threading.Lock()

    def run(self) -> Outcome:
        """Run the attempt; a broker that cannot be used ends it before it starts."""
        try:
            for url in sorted(set(self._brokers.values())):
                log_in(BrokerAddress.from_url(url), patience=_BROKER)
        except FateError as error:
            return Outcome("failed", {}, {}, error)
        return self._run()

    def _run(self) -> Outcome:
        """Start all parties, pass on what they say, and wait for their end. No process is left when this returns."""
        members = tuple(self._order.spec.members)
        identities = {party: Identity.generate() for party in members}
        roster = {party: identity.public.to_text() for party, identity in identities.items()}
        try:
            with self._lock:
                for party in members:
                    self._parties[party] = self._start(party, identities[party], roster)
            if self._cancelled is not None:
                self.cancel(self._cancelled)
            readers = [
                threading.Thread(target=self._read, args=(party,), name=f"process-{party.name}", daemon=True)
                for party in self._parties.values()
            ]
            for reader in readers:
                reader.start()
            self._wait(readers)
        finally:
            for started in self._parties.values():
                if started.process.poll() is None:
                    started.process.kill()
                started.close()
            self._tidy()
        return self._outcome()

    def cancel(self, reason: str) -> None:
        """Stop all parties: waits end at once, training ends after the step that is running."""
        self._cancelled = self._cancelled or reason
        with self._lock:
            for party in self._parties.values():
                party.tell({"cancel": reason})

    def _start(self, party: str, identity: Identity, roster: Mapping[str, str]) -> _Party:
        order = self._order
        folder = order.folder.party(party)
        with (folder.path / "stderr.txt").open("ab") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "fate_llm.runtime.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C reaches us, and we tell them
            )
        started = _Party(party, process)
        started.tell(
            {
                "job": order.job_id,
                "attempt": order.number,
                "party": party,
                "pipeline": order.spec.to_data(),
                "base": str(order.base),
                "folder": str(order.folder.path),
                "slot": str(order.folder.path / "machine.lock"),
                "broker": self._brokers[party],
                "identity": identity.to_bytes().hex(),
                "roster": dict(roster),
                "finished": order.finished.get(party, {}),
                "timing": self._timing,
                "catalog": local_catalog(order.base, party).paths(),
            }
        )
        return started

    def _wait(self, readers: list[threading.Thread]) -> None:
        try:
            for reader in readers:
                while reader.is_alive():  # a plain join would not see Ctrl-C
                    reader.join(0.2)
        except KeyboardInterrupt:
            self.cancel("stopped by Ctrl-C")
            for reader in readers:
                reader.join(_LAST_WORDS)

    def _read(self, party: _Party) -> None:
        """Everything one party says, until it ends. The others are told at once when it ends without a word."""
        assert party.process.stdout is not None
        for line in party.process.stdout:
            try:
                message = json.loads(line)
            except ValueError:  # cut by the end of the process
                continue
            if "event" in message:
                kind, name, task, seconds, fields = message["event"]
                self._order.events.pass_on(Event(kind, name, task, seconds, fields))
            elif "end" in message:
                party.end = message["end"]
        party.process.wait()
        error = party.error()
        if error is not None:  # it may not have been able to say so itself
            for other in self._parties.values():
                if other is not party:
                    other.tell({"lost": [party.name, error.code, f"has ended: {error.message}"]})

    def _tidy(self) -> None:
        """Inboxes of parties that could not delete their own."""
        job = f"{self._order.job_id}/{self._order.number}"
        for party in self._parties.values():
            if party.end is None:
                try:
                    delete_inboxes(BrokerAddress.from_url(self._brokers[party.name]), [party.name], job)
                except FateError as error:
                    self._order.events.emit(None, party.name, "", "note", {"text": f"its inbox stays: {error}"})

    def _outcome(self) -> Outcome:
        ends = {name: party.end or {} for name, party in self._parties.items()}
        errors = {name: error for name, party in self._parties.items() if (error := party.error()) is not None}
        outputs = {name: end.get("outputs", {}) for name, end in ends.items()}
        traffic = {name: end.get("traffic", {}) for name, end in ends.items()}
        silent = [error for name, error in errors.items() if self._parties[name].end is None]
        cause = silent[0] if silent and not self._cancelled else cause_of(errors, cancelled=bool(self._cancelled))
        if cause is None:
            return Outcome("success", outputs, traffic=traffic)
        if self._cancelled and not isinstance(cause, JobCancelled):
            cause = JobCancelled(self._cancelled)
        return Outcome("cancelled" if isinstance(cause, JobCancelled) else "failed", outputs, errors, cause, traffic)


def _how(status: int | None) -> str:
    if status is None:
        raise InternalError("a process is asked how it ended before it has")
    return f"killed by signal {-status}" if status < 0 else f"exit status {status}"
