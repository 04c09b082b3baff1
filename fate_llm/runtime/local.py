"""All parties of a job on one machine: a thread each, the in-memory transport, one frozen base model.

Every party runs the same code as in a process of its own; only the transport and the sharing differ. The parties'
identities are made for the attempt.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from fate_llm.core.errors import JobCancelled
from fate_llm.core.interfaces import Transport
from fate_llm.core.values import Roster
from fate_llm.protocols.channel import JobChannel
from fate_llm.protocols.transports.memory import MemoryNetwork
from fate_llm.security.identity import Identity
from fate_llm.security.signer import RosterSigner

from .attempt import Order, Outcome, cause_of
from .context import JobSetting
from .events import EventLog
from .jobfolder import JobFolder
from .party import Assignment, PartyRun
from .sharing import Sharing
from .trust.catalog import local_catalog

__all__ = ["LocalJob", "LocalRuntime", "one_malloc_arena"]


class LocalRuntime:
    """Satisfies `runtime.attempt.Runtime`: every party a thread of this process."""

    name = "local"

    def attempt(self, order: Order) -> LocalJob:
        job = order.spec.job
        return LocalJob(
            job_id=order.job_id,
            roster=order.spec.roster,
            assignments=order.plan,
            seed=job.seed,
            patience=job.round_deadline,
            base=order.base,
            folder=order.folder,
            events=order.events,
            finished=order.finished,
            attempt=order.number,
        )


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
        attempt: int = 1,
    ) -> None:
        one_malloc_arena()
        identities = {party: Identity.generate() for party in roster}
        known = {party: identity.public for party, identity in identities.items()}
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
            setting = JobSetting(
                job_id,
                party,
                roster,
                seed,
                patience,
                base,
                party_folder,
                channel,
                events,
                sharing,
                attempt=attempt,
                catalog=local_catalog(base, party).paths(),
                signer=RosterSigner(identities[party], known),
            )
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
        cause = cause_of(errors, cancelled=self._cancelled)
        if cause is None:
            return Outcome("success", outputs, traffic=traffic)
        return Outcome("cancelled" if isinstance(cause, JobCancelled) else "failed", outputs, errors, cause, traffic)


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
