"""The context of one party in one role of one task: all that a component sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fate_llm.core import plugins
from fate_llm.core.errors import InternalError
from fate_llm.core.interfaces import SecureSum, UpdateHook
from fate_llm.core.seeds import derive_seed
from fate_llm.core.values import Artifact, Cohort, Role, Roster
from fate_llm.protocols.channel import JobChannel
from fate_llm.protocols.conversation import TaskChannel
from fate_llm.protocols.rounds.driver import ContributorDriver, CoordinatorDriver, Setting

from .events import EventLog
from .jobfolder import PartyFolder
from .sharing import Sharing

__all__ = ["JobSetting", "TaskContext", "load_sum"]

T = TypeVar("T")


def load_sum(name: str) -> SecureSum:
    """The protection of this name, ready to be used."""
    found: SecureSum = plugins.load("sum", name)()
    return found


@dataclass(frozen=True, slots=True)
class JobSetting:
    """What all tasks of one party in one job have in common.

    base: folder that relative paths of the pipeline start from. patience: seconds of a round's deadline.
    """

    job: str
    party: str
    roster: Roster
    seed: int
    patience: float
    base: Path
    folder: PartyFolder
    channel: JobChannel
    events: EventLog
    sharing: Sharing


class TaskContext:
    """Satisfies `core.interfaces.Context`."""

    def __init__(
        self,
        setting: JobSetting,
        *,
        task: str,
        role: Role,
        cohort: Cohort,
        params: Any,
        inputs: Mapping[str, Artifact | tuple[Artifact, ...]],
        outputs: Sequence[str],
    ) -> None:
        self.party = setting.party
        self.role = role
        self.task = task
        self.roster = setting.roster
        self.cohort = cohort
        self.params = params
        self.inputs = inputs
        self._outputs = frozenset(outputs)
        self._sessions = 0
        self._setting = setting
        self.channel = TaskChannel(setting.channel, task, cohort, setting.patience, load_sum, self.emit)

    def output(self, name: str) -> Path:
        if name not in self._outputs:
            raise InternalError(f"task {self.task} has no output {name!r}; declared: {sorted(self._outputs)}")
        return self._setting.folder.output(self.task, name)

    def scratch(self) -> Path:
        return self._setting.folder.scratch(self.task)

    def resolve(self, path: str) -> Path:
        return (self._setting.base / Path(path).expanduser()).absolute()

    def seed(self, *labels: str) -> int:
        return derive_seed(self._setting.seed, *labels)

    def contributor_rounds(self, count: int, *, protection: str, hooks: Sequence[UpdateHook] = ()) -> ContributorDriver:
        return ContributorDriver(self._rounds(count, protection, hooks), self.party)

    def coordinator_rounds(
        self, count: int, *, protection: str, hooks: Sequence[UpdateHook] = (), keep_terms: bool = False
    ) -> CoordinatorDriver:
        return CoordinatorDriver(self._rounds(count, protection, hooks), keep_terms=keep_terms)

    def _rounds(self, count: int, protection: str, hooks: Sequence[UpdateHook]) -> Setting:
        # Every use is a conversation of its own: a late message of one never counts in the next.
        self._sessions += 1
        return Setting(
            channel=self._setting.channel,
            task=self.task if self._sessions == 1 else f"{self.task}#{self._sessions}",
            cohort=self.cohort,
            rounds=count,
            patience=self._setting.patience,
            secure_sum=load_sum(protection),
            emit=self.emit,
            hooks=hooks,
        )

    def turn(self) -> AbstractContextManager[None]:
        return self._setting.sharing.turn()

    def pause_turn(self) -> AbstractContextManager[None]:
        return self._setting.sharing.pause()

    def shared(self, key: str, factory: Callable[[], T]) -> T:
        return self._setting.sharing.shared(key, factory)

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        self._setting.folder.append("metrics.jsonl", {"task": self.task, "step": step, **metrics})

    def emit(self, event: str, **fields: Any) -> None:
        self._setting.events.emit(self._setting.folder, self.party, self.task, event, fields)

    def check_cancelled(self) -> None:
        self._setting.channel.check_cancelled()
