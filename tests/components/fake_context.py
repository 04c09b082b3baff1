"""A `Context` that lives in memory: for tests of components without a runtime.

    contexts = make_contexts(tmp_path, Roster("bank-a", ("bank-b",)), task="split", params=SplitterParams())
    run_parties(Splitter(), contexts)

Contexts of one call share a mailbox, so that components that talk can be run in threads.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fate_llm.core.errors import RoundTimeout
from fate_llm.core.seeds import derive_seed
from fate_llm.core.values import Artifact, Cohort, Payload, Role, Roster

__all__ = ["FakeChannel", "FakeContext", "make_contexts", "run_parties"]

PATIENCE = 20.0


class Mail:
    """Queues by sender, receiver and name. Both sides may be the first to ask for one, from threads of their own."""

    def __init__(self) -> None:
        self._queues: dict[tuple[str, str, str], queue.Queue[Payload]] = {}
        self._lock = threading.Lock()

    def __getitem__(self, key: tuple[str, str, str]) -> queue.Queue[Payload]:
        with self._lock:
            return self._queues.setdefault(key, queue.Queue())


@dataclass
class FakeChannel:
    """Send, receive, broadcast and gather over queues, one for each sender, receiver and name."""

    me: str
    cohort: Cohort
    mail: Mail
    sent: list[tuple[str, str, Payload]] = field(default_factory=list)

    def send(self, receiver: str, name: str, payload: Payload) -> None:
        self.sent.append((receiver, name, payload))
        self.mail[self.me, receiver, name].put(payload)

    def receive(self, sender: str, name: str, *, timeout: float | None = None) -> Payload:
        try:
            return self.mail[sender, self.me, name].get(timeout=PATIENCE if timeout is None else timeout)
        except queue.Empty:
            raise RoundTimeout(f"{self.me} waited for {name} of {sender}") from None

    def broadcast(self, name: str, payload: Payload) -> None:
        for party in self.cohort.members:
            if party != self.me:
                self.send(party, name, payload)

    def gather(self, name: str, *, timeout: float | None = None) -> dict[str, Payload]:
        others = [party for party in self.cohort.contributors if party != self.me]
        return {party: self.receive(party, name, timeout=timeout) for party in others}

    def aggregate(
        self,
        name: str,
        update: Any,
        *,
        protection: str,
        protection_params: Mapping[str, Any] = MappingProxyType({}),
    ) -> Any:
        raise NotImplementedError("the fake channel does not sum")

    def hold(self, name: str, *, protection: str, protection_params: Mapping[str, Any] = MappingProxyType({})) -> None:
        raise NotImplementedError("the fake channel does not sum")


@dataclass
class FakeContext:
    """One party's view. `events` and `metrics` collect what the component says; `cancelled` stops it."""

    party: str
    role: Role
    roster: Roster
    cohort: Cohort
    params: Any
    folder: Path
    channel: Any  # a FakeChannel; tests also read what it `sent`
    task: str = "task"
    job_seed: int = 7
    inputs: Mapping[str, Artifact | tuple[Artifact, ...]] = field(default_factory=dict)
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    metrics: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    cancelled: BaseException | None = None
    _shared: dict[str, Any] = field(default_factory=dict)

    def output(self, name: str) -> Path:
        path = self.folder / "outputs" / self.party / self.task / name
        path.parent.mkdir(parents=True, exist_ok=True)
        assert not path.exists(), f"output {name} is asked for again after it was written"
        return path

    def scratch(self) -> Path:
        path = self.folder / "scratch" / self.party / self.task
        path.mkdir(parents=True, exist_ok=True)
        return path

    def resolve(self, path: str) -> Path:
        return self.folder / path

    def seed(self, *labels: str) -> int:
        return derive_seed(self.job_seed, *labels)

    def contributor_rounds(
        self,
        count: int,
        *,
        protection: str,
        protection_params: Mapping[str, Any] = MappingProxyType({}),
        hooks: Sequence[Any] = (),
        keep: Mapping[str, Any] = MappingProxyType({}),
    ) -> Any:
        raise NotImplementedError("the fake context has no rounds")

    def coordinator_rounds(
        self,
        count: int,
        *,
        protection: str,
        protection_params: Mapping[str, Any] = MappingProxyType({}),
        hooks: Sequence[Any] = (),
        keep_terms: bool = False,
        keep: Mapping[str, Any] = MappingProxyType({}),
    ) -> Any:
        raise NotImplementedError("the fake context has no rounds")

    def holder_rounds(self, *, protection: str, protection_params: Mapping[str, Any] = MappingProxyType({})) -> None:
        raise NotImplementedError("the fake context has no rounds")

    @contextmanager
    def turn(self) -> Iterator[None]:
        yield

    @contextmanager
    def pause_turn(self) -> Iterator[None]:
        yield

    def shared(self, key: str, factory: Callable[[], Any]) -> Any:
        if key not in self._shared:
            self._shared[key] = factory()
        return self._shared[key]

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        self.metrics.append((step, dict(metrics)))

    def emit(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))

    def check_cancelled(self) -> None:
        if self.cancelled is not None:
            raise self.cancelled


def make_contexts(
    folder: Path,
    roster: Roster,
    *,
    params: Any,
    task: str = "task",
    inputs: Mapping[str, Mapping[str, Artifact]] | None = None,
    seed: int = 7,
) -> dict[str, FakeContext]:
    """A context for every guest and host (and arbiter, when there is one). inputs: by party, then by port."""
    owners = roster.data_owners
    cohort = Cohort(owners, roster.arbiter or roster.guest, len(owners))
    mail = Mail()
    shared: dict[str, Any] = {}
    contexts = {}
    for party in roster:
        role = next(role for role in Role if role in roster.roles_of(party))
        contexts[party] = FakeContext(
            party, role, roster, cohort, params, folder, FakeChannel(party, cohort, mail), task, seed
        )
        contexts[party].inputs = (inputs or {}).get(party, {})
        contexts[party]._shared = shared
    return contexts


def run_parties(component: Any, contexts: Mapping[str, FakeContext]) -> None:
    """Run each party's role method in a thread of its own; the first error of any of them is raised here."""
    errors: list[BaseException] = []

    def run(context: FakeContext) -> None:
        try:
            getattr(component, context.role.value)(context)
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=run, args=(context,))
        for context in contexts.values()
        if hasattr(component, context.role.value)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE * 3)
    if errors:
        raise errors[0]
