"""Parties that outlive their processes, in one process: a link that keeps messages, and deaths at counted moments.

A life of a party is its channel, its work and its journal on disk. Everything that others or the disk can see of it is
an operation; at a given number of them the life ends: nothing of it can be seen any more, and the next one begins with
what the disk and the link have.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from fate_llm.core.errors import TransportClosed
from fate_llm.core.interfaces import Buffer, Delivery, Progress
from fate_llm.core.values import Roster
from fate_llm.pipelines import check
from fate_llm.protocols.channel import JobChannel, Passed
from fate_llm.runtime import context, party
from fate_llm.runtime.assign import assignments
from fate_llm.runtime.context import JobSetting
from fate_llm.runtime.events import Event, EventLog
from fate_llm.runtime.jobfolder import PartyFolder
from fate_llm.runtime.journal import RoundFolder
from fate_llm.runtime.party import PartyRun
from fate_llm.runtime.sharing import Sharing
from fate_llm.runtime.sum_journal import SumFolder
from tests.masking import TestSigner

NEVER = 10**9
HANGS = 60.0  # seconds after which a world that does not end is called so


class Inboxes:
    """What the links of one attempt keep: each message until its receiver has acknowledged it."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = 0
        self.kept: dict[str, dict[int, tuple[str, bytes]]] = defaultdict(dict)  # receiver: number: sender, body


class Life:
    """One process of a party, as a transport. It dies with its `until`-th operation, before that takes effect."""

    def __init__(self, inboxes: Inboxes, name: str, until: int = NEVER) -> None:
        self.inboxes, self.name, self.until = inboxes, name, until
        self.done = 0
        self.moments: list[str] = []
        self.dead = self._closed = False
        self._given: set[int] = set()

    def act(self, what: str) -> None:
        with self.inboxes.changed:
            if self.dead:
                raise TransportClosed(f"{self.name} is dead")
            self.done += 1
            self.moments.append(what)
            if self.done >= self.until:
                self.dead = True
                self.inboxes.changed.notify_all()
                raise TransportClosed(f"{self.name} dies: {what}")

    @property
    def connected(self) -> bool:
        return True

    def send(self, receiver: str, parts: Sequence[Buffer]) -> int:
        body = b"".join(bytes(part) for part in parts)
        self.act(f"send to {receiver}")
        with self.inboxes.changed:
            self.inboxes.count += 1
            self.inboxes.kept[receiver][self.inboxes.count] = (self.name, body)
            self.inboxes.changed.notify_all()
        return len(body)

    def receive(self, timeout: float | None) -> Delivery | None:
        with self.inboxes.changed:
            while True:
                if self.dead or self._closed:
                    raise TransportClosed(f"{self.name} hears nothing any more")
                for number, (sender, body) in self.inboxes.kept[self.name].items():
                    if number not in self._given:
                        self._given.add(number)
                        return Delivery(sender, memoryview(body), number, verified=True)
                if timeout is not None:
                    return None
                self.inboxes.changed.wait()

    def ack(self, delivery: Delivery) -> None:
        self.act(f"ack to {delivery.sender}")
        with self.inboxes.changed:
            self.inboxes.kept[self.name].pop(int(str(delivery.tag)), None)

    def flush(self, timeout: float | None = None) -> bool:
        return True

    def forget(self, receiver: str) -> None:
        return

    def progress(self, sender: str) -> Progress | None:
        return None

    def close(self, *, finished: bool = False) -> None:
        with self.inboxes.changed:
            self._closed = True
            self.inboxes.changed.notify_all()


class DurableWorld:
    """One attempt at a job of `data`: each party lives as often as its deaths say, and once more.

    deaths: by party, the operation each of its lives ends with. cut: a party and its operation with which all parties
    die for good: the attempt is over. The folder may be that of an earlier attempt.
    """

    def __init__(
        self,
        folder: Path,
        data: Mapping[str, Any],
        monkeypatch: pytest.MonkeyPatch,
        *,
        deaths: Mapping[str, Sequence[int]] | None = None,
        cut: tuple[str, int] | None = None,
        attempt: int = 1,
        finished: Mapping[str, Mapping[str, Mapping[str, str]]] | None = None,
    ) -> None:
        self.folder, self.attempt, self.finished = folder, attempt, finished or {}
        self.spec = check(dict(data))
        self.plan = assignments(self.spec)
        self.inboxes = Inboxes()
        self.deaths = {name: list((deaths or {}).get(name, ())) for name in self.spec.members}
        self.cut = cut
        if cut is not None:
            self.deaths[cut[0]] = [cut[1]]
        self.lives: dict[str, list[Life]] = defaultdict(list)
        self.runs: dict[str, PartyRun] = {}
        self.events: list[Event] = []
        self.passed: dict[str, list[Passed]] = defaultdict(list)
        self.channels: dict[str, JobChannel] = {}
        self._errors: list[BaseException] = []
        self.watch: Callable[[Event], None] = self.events.append
        monkeypatch.setattr(context, "RoundFolder", self._journal)
        monkeypatch.setattr(context, "SumFolder", self._sum_journal)
        monkeypatch.setattr(party, "replace_json", self._note)
        monkeypatch.setattr(os, "fsync", lambda file: None)  # no power is cut here

    def run(self) -> DurableWorld:
        """All parties to their end; nothing may hang."""
        threads = [threading.Thread(target=self._live, args=(name,), daemon=True) for name in self.spec.members]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANGS)
        hanging = [name for name, thread in zip(self.spec.members, threads, strict=True) if thread.is_alive()]
        for channel in self.channels.values():
            channel.close()
        if hanging:
            raise AssertionError(f"these hang: {hanging}; {self.moments()}")
        if self._errors:
            raise self._errors[0]
        return self

    def outputs(self) -> dict[str, bytes]:
        """What every party's stepper wrote; no run may have failed."""
        errors = {name: str(run.error) for name, run in self.runs.items() if run.error is not None}
        assert not errors, (errors, self.moments())
        return {
            f"{name}/{task}": found["model"].path.read_bytes()
            for name, run in self.runs.items()
            for task, found in run.outputs.items()
            if "model" in found
        }

    def moments(self) -> dict[str, list[str]]:
        """The last operation of every life that died."""
        return {name: [life.moments[-1] for life in lives if life.dead] for name, lives in self.lives.items()}

    def operations(self) -> dict[str, int]:
        """How many operations the last life of each party had."""
        return {name: lives[-1].done for name, lives in self.lives.items()}

    def _live(self, name: str) -> None:
        try:
            while True:
                deaths = self.deaths[name]
                life = Life(self.inboxes, name, deaths.pop(0) if deaths else NEVER)
                self.lives[name].append(life)
                if self._one_life(name, life):
                    return
        # The boundary of a test's thread: the error is raised again by the test.
        except BaseException as error:
            self._errors.append(error)

    def _one_life(self, name: str, life: Life) -> bool:
        """Whether it came to its end alive."""
        channel = JobChannel(
            life,
            job="job",
            party=name,
            members=self.spec.members,
            durable=True,
            on_passed=self.passed[name].append,
        )
        self.channels[name] = channel
        folder = PartyFolder(self.folder / "parties" / name)
        roster: Roster = self.spec.roster
        log = EventLog(now=lambda: 0.0, observers=(self.watch,))
        setting = JobSetting(
            "job",
            name,
            roster,
            self.spec.job.seed,
            self.spec.job.round_deadline,
            self.folder,
            folder,
            channel,
            log,
            Sharing(),
            attempt=self.attempt,
            durable=True,
            signer=TestSigner(name, tuple(self.spec.members)),
            sum_key=name.encode().ljust(32, b"."),
        )
        run = PartyRun(setting, self.plan[name], self.finished.get(name, {}))
        run.run()
        if life.dead:
            channel.close()
            if self.cut is not None:
                self._end_all()
            return self.cut is not None
        self.runs[name] = run
        return True

    def _end_all(self) -> None:
        with self.inboxes.changed:
            self.deaths = {name: [0] for name in self.deaths}  # a life that begins now
            for lives in self.lives.values():
                lives[-1].dead = True
            self.inboxes.changed.notify_all()

    # --- what the disk sees -------------------------------------------------------------------------------------

    def _life_of(self, path: Path) -> Life:
        return self.lives[path.relative_to(self.folder / "parties").parts[0]][-1]

    def _journal(self, folder: Path, *, attempt: int) -> RoundFolder:
        world = self

        class Mortal(RoundFolder):
            def commit(self, *args: Any) -> None:
                world._life_of(folder).act(f"commit {folder.name} {args[0]}")
                super().commit(*args)
                world._life_of(folder).act(f"committed {folder.name} {args[0]}")

        return Mortal(folder, attempt=attempt)

    def _sum_journal(self, folder: Path, **settings: Any) -> SumFolder:
        world = self

        class Mortal(SumFolder):
            def keep(self, round: int, action: Any) -> None:
                world._life_of(folder).act(f"keep {action.name} {round}")
                super().keep(round, action)
                world._life_of(folder).act(f"kept {action.name} {round}")

            def close(self, round: int) -> None:
                world._life_of(folder).act(f"close {round}")
                super().close(round)
                world._life_of(folder).act(f"closed {round}")

        return Mortal(folder, **settings)

    def _note(self, path: Path, value: Any) -> None:
        from fate_llm.runtime.journal import replace_json

        self._life_of(path).act("note")
        replace_json(path, value)
        self._life_of(path).act("noted")
