"""All parties of a job on one machine: a thread each, the in-memory transport, one frozen base model.

Every party runs the same code as in a process of its own; only the transport and the sharing differ.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from fate_llm.core.errors import FateError, FederationError, JobCancelled, PeerFailed
from fate_llm.core.interfaces import Transport
from fate_llm.core.values import Roster
from fate_llm.protocols.channel import JobChannel
from fate_llm.protocols.transports.memory import MemoryNetwork

from .context import JobSetting
from .events import EventLog
from .jobfolder import JobFolder
from .party import Assignment, PartyRun
from .sharing import Sharing

__all__ = ["LocalJob", "Outcome", "one_malloc_arena"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended. status: success, failed or cancelled. outputs: {party: {task: {output: path}}}.

    errors: by party. error: the one that started it, or None. traffic: {party: {peer: counters of frames}}.
    """

    status: str
    outputs: dict[str, dict[str, dict[str, str]]]
    errors: dict[str, FateError] = field(default_factory=dict)
    error: FateError | None = None
    traffic: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)


class LocalJob:
    """One job. `run` in one thread, `cancel` from any other."""

    def __init__(
        self,
        *,
        job_id: str,
        roster: Roster,
        assignments: Mapping[str, Sequence[Assignment]],
        seed: int,
        patience: float,
        base: Path,
        folder: JobFolder,
        events: EventLog,
        finished: Mapping[str, Mapping[str, Mapping[str, str]]] | None = None,
        network: MemoryNetwork | None = None,
    ) -> None:
        one_malloc_arena()
        network = network or MemoryNetwork()
        sharing = Sharing()
        self._cancelled = False
        self._channels: dict[str, JobChannel] = {}
        self._runs: dict[str, PartyRun] = {}
        for party in roster:
            party_folder = folder.party(party)
            transport: Transport = network.connect(party)
            channel = JobChannel(
                transport,
                job=job_id,
                party=party,
                members=tuple(roster),
                observer=partial(events.emit, party_folder, party, ""),
            )
            setting = JobSetting(job_id, party, roster, seed, patience, base, party_folder, channel, events, sharing)
            self._channels[party] = channel
            self._runs[party] = PartyRun(setting, assignments.get(party, ()), (finished or {}).get(party, {}))

    def run(self) -> Outcome:
        """Run all parties to their end. Nothing is left running when this returns."""
        threads = [
            threading.Thread(target=run.run, name=f"party-{party}", daemon=True) for party, run in self._runs.items()
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():  # a plain join would not see Ctrl-C
                    thread.join(0.2)
        except KeyboardInterrupt:
            self.cancel("stopped by Ctrl-C")
            for thread in threads:
                if thread.ident is not None:  # it had been started
                    thread.join()
        finally:
            for channel in self._channels.values():
                channel.close()
        return self._outcome()

    def cancel(self, reason: str) -> None:
        """Stop all parties: waits end at once, training ends after the step that is running."""
        self._cancelled = True
        for channel in self._channels.values():
            channel.cancel(reason)

    def _outcome(self) -> Outcome:
        errors = {party: run.error for party, run in self._runs.items() if run.error is not None}
        outputs = {
            party: {task: {name: str(a.path) for name, a in found.items()} for task, found in run.outputs.items()}
            for party, run in self._runs.items()
        }
        traffic = {
            party: {peer: asdict(counters) for peer, counters in channel.counters.items()}
            for party, channel in self._channels.items()
        }
        if not errors:
            return Outcome("success", outputs, traffic=traffic)
        cause = min(errors.values(), key=self._distance)
        status = "cancelled" if isinstance(cause, JobCancelled) else "failed"
        return Outcome(status, outputs, errors, cause, traffic)

    def _distance(self, error: FateError) -> int:
        """How far an error is from what started the end: a party's own fault, what parties miss, who failed."""
        if isinstance(error, JobCancelled):
            return 0 if self._cancelled else 2
        if isinstance(error, FederationError):
            return 4 if isinstance(error, PeerFailed) else 3
        return 1


def one_malloc_arena() -> None:
    """Keep glibc from giving each thread an arena of its own: with eight parties that triples the memory.

    Has to happen before torch is imported; elsewhere than on glibc it does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        ctypes.CDLL(None).mallopt(ctypes.c_int(-8), ctypes.c_int(1))  # M_ARENA_MAX
    except AttributeError:
        return
