"""The context of one party in one role of one task: all that a component sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from pydantic import ValidationError

from fate_llm.core import plugins
from fate_llm.core.errors import ConfigurationError, DataError, InternalError, PolicyError
from fate_llm.core.interfaces import Kept, SecureSum, Signer, SumScene, UpdateHook
from fate_llm.core.names import nearest
from fate_llm.core.seeds import derive_seed
from fate_llm.core.values import Artifact, Cohort, Role, Roster, SumFloor
from fate_llm.protocols.channel import JobChannel
from fate_llm.protocols.conversation import TaskChannel
from fate_llm.protocols.rounds.driver import ContributorDriver, CoordinatorDriver, HolderDriver, Setting
from fate_llm.security.randomness import random_bytes

from .events import EventLog
from .jobfolder import PartyFolder
from .journal import RoundFolder, journal_folder
from .sharing import Sharing
from .sum_journal import SumFolder, sum_folder
from .trust.policy_schema import PROTECTIONS

__all__ = ["JobSetting", "TaskContext", "load_sum"]

T = TypeVar("T")
_CATALOG = "catalog:"
_NOTHING: Mapping[str, Kept] = MappingProxyType({})
_UNSET: Mapping[str, Any] = MappingProxyType({})
_KEY_BYTES = 32


def load_sum(name: str, params: Mapping[str, Any] = _UNSET) -> SecureSum:
    """The protection of this name with its params, ready to be used.

    Raises:
        ConfigurationError: params that it does not have, or that are not valid; all of them, by name.
    """
    plugin = plugins.load("sum", name)
    try:
        checked = plugin.Params(**params)
    except ValidationError as error:
        faults = [(".".join(("protection_params", *map(str, one["loc"]))), one["msg"]) for one in error.errors()]
        known = ", ".join(plugin.Params.model_fields) or "none"
        raise ConfigurationError(
            f"{name}: " + "; ".join(f"{where}: {what}" for where, what in faults), hint=f"params of {name}: {known}"
        ) from None
    found: SecureSum = plugin(checked)
    return found


@dataclass(frozen=True, slots=True)
class JobSetting:
    """What all tasks of one party in one job have in common.

    base: folder that relative paths of the pipeline start from. patience: seconds of a round's deadline. durable: the
    party goes on where it was when its process is killed; the channel is durable, too. catalog: this party's data sets
    by name. floor: the weakest protection that a sum may have here. sum_floor: what this party's policy asks of sums
    that hide terms. signer: signs for this party under the roster's identities. sum_key: 32 bytes of this party's, for
    what a sum keeps on disk.
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
    attempt: int = 1
    durable: bool = False
    catalog: Mapping[str, str] = field(default_factory=dict)
    floor: str = PROTECTIONS[0]
    sum_floor: SumFloor = field(default_factory=SumFloor)
    signer: Signer | None = None
    sum_key: bytes = field(default_factory=partial(random_bytes, _KEY_BYTES), repr=False)

    def secure_sum(self, name: str, params: Mapping[str, Any] = _UNSET) -> SecureSum:
        """The protection of this name with its params, unless it is weaker than this party's policy asks for.

        Raises:
            PolicyError: it is weaker; nothing has left the party.
            ConfigurationError: params that are not valid.
        """
        strength = PROTECTIONS.index(name) if name in PROTECTIONS else 0
        if strength < PROTECTIONS.index(self.floor):
            raise PolicyError(
                f"a sum under {name!r}; the policy of {self.party} asks for {self.floor!r} at least",
                hint="What a pipeline's params do not show is refused when it is used: the component sums by itself.",
            )
        return load_sum(name, params)

    def resolve(self, path: str) -> Path:
        """See `core.interfaces.Context.resolve`; `catalog:NAME` is the data set of that name in this party's catalog.

        Raises:
            DataError: nothing of that name.
        """
        if not path.startswith(_CATALOG):
            return (self.base / Path(path).expanduser()).absolute()
        name = path.removeprefix(_CATALOG)
        if name not in self.catalog:
            hint = nearest(name, self.catalog) or "Its catalog is empty: add the data set there."
            raise DataError(f"the catalog of {self.party} has no data set {name!r}", hint=hint)
        return Path(self.catalog[name])

    def journal(self, side: str, conversation: str) -> RoundFolder | None:
        """Where one side of a conversation writes down its rounds; None where nothing survives the process."""
        if not self.durable:
            return None
        return RoundFolder(journal_folder(self.folder.path, conversation, side), attempt=self.attempt)

    def sum_journal(self, side: str, conversation: str) -> SumFolder:
        """What one side of a conversation must not draw or say twice in its sums; what lasts is on disk in any case."""
        return SumFolder(
            sum_folder(self.folder.path, conversation, side),
            job=self.job,
            conversation=conversation,
            side=side,
            attempt=self.attempt,
            key=self.sum_key,
            durable=self.durable,
        )

    def scene(self, conversation: str, cohort: Cohort) -> SumScene:
        """What the sums of a conversation are bound to, but for round, layout and state."""
        return SumScene(
            cohort,
            self.party,
            {},
            job=self.job,
            attempt=self.attempt,
            conversation=conversation,
            signer=self.signer,
            floor=self.sum_floor,
            key_holder=self.roster.key_holder,
        )


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
        self._account = setting.channel.account(task)
        self.channel = TaskChannel(
            setting.channel,
            task,
            cohort,
            setting.patience,
            setting.secure_sum,
            self.emit,
            self._account,
            partial(setting.journal, "coordinator"),
            setting.scene(task, cohort),
            setting.sum_journal,
        )

    def output(self, name: str) -> Path:
        if name not in self._outputs:
            raise InternalError(f"task {self.task} has no output {name!r}; declared: {sorted(self._outputs)}")
        return self._setting.folder.output(self.task, name)

    def scratch(self) -> Path:
        return self._setting.folder.scratch(self.task)

    def resolve(self, path: str) -> Path:
        return self._setting.resolve(path)

    def seed(self, *labels: str) -> int:
        return derive_seed(self._setting.seed, *labels)

    def contributor_rounds(
        self,
        count: int,
        *,
        protection: str,
        protection_params: Mapping[str, Any] = _UNSET,
        hooks: Sequence[UpdateHook] = (),
        keep: Mapping[str, Kept] = _NOTHING,
    ) -> ContributorDriver:
        secure_sum = self._setting.secure_sum(protection, protection_params)
        setting = self._rounds("contributor", count, secure_sum)
        return ContributorDriver(replace(setting, hooks=hooks, keep=keep), self.party)

    def coordinator_rounds(
        self,
        count: int,
        *,
        protection: str,
        protection_params: Mapping[str, Any] = _UNSET,
        hooks: Sequence[UpdateHook] = (),
        keep_terms: bool = False,
        keep: Mapping[str, Kept] = _NOTHING,
    ) -> CoordinatorDriver:
        secure_sum = self._setting.secure_sum(protection, protection_params)
        setting = self._rounds("coordinator", count, secure_sum)
        return CoordinatorDriver(replace(setting, hooks=hooks, keep=keep), keep_terms=keep_terms)

    def holder_rounds(self, *, protection: str, protection_params: Mapping[str, Any] = _UNSET) -> None:
        secure_sum = self._setting.secure_sum(protection, protection_params)
        HolderDriver(self._rounds("holder", 1, secure_sum)).run()

    def _rounds(self, side: str, count: int, secure_sum: SecureSum) -> Setting:
        # Every use is a conversation of its own: a late message of one never counts in the next.
        self._sessions += 1
        conversation = self.task if self._sessions == 1 else f"{self.task}#{self._sessions}"
        return Setting(
            channel=self._setting.channel,
            task=conversation,
            cohort=self.cohort,
            rounds=count,
            patience=self._setting.patience,
            secure_sum=secure_sum,
            emit=self.emit,
            protection=secure_sum.label,
            account=self._account,
            journal=self._setting.journal(side, conversation),
            scene=self._setting.scene(conversation, self.cohort),
            sum_journal=self._setting.sum_journal(side, conversation),
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
