"""A rank of a party that is not the first: it runs the same components, and takes from rank 0 what others say.

Nothing that it does is seen outside: no channel, no journal, no events; what it writes as an output is thrown away.
Only the scratch folder is that of rank 0, because a library's checkpoint has a part of every rank.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

from fate_llm.core import plugins
from fate_llm.core.errors import DataError, InternalError
from fate_llm.core.interfaces import Channel, ContributorRounds, CoordinatorRounds, Kept, UpdateHook
from fate_llm.core.seeds import derive_seed
from fate_llm.core.values import Artifact, ArtifactKind, Role
from fate_llm.pipelines.check import check
from fate_llm.pipelines.schema import PipelineSpec

from .assign import assignments
from .jobfolder import JobFolder
from .party import Assignment, InputRef

__all__ = ["Follower", "FollowerContext", "use_deepspeed"]

_DEEPSPEED = "FATE_LLM_DEEPSPEED"  # environment of every rank: DeepSpeed's configuration as JSON; components read it
_CATALOG = "catalog:"
_NOTHING: Mapping[str, Kept] = MappingProxyType({})
_UNSET: Mapping[str, Any] = MappingProxyType({})
T = TypeVar("T")


def use_deepspeed(launch: Mapping[str, Any]) -> None:
    """Let the components of this process see the party's DeepSpeed configuration. launch: that part of the order."""
    if launch.get("deepspeed") is not None:
        os.environ[_DEEPSPEED] = json.dumps(launch["deepspeed"])


class Follower:
    """Runs tasks as rank 0 names them. order: the part of the worker's order that holds no secret."""

    def __init__(self, order: Mapping[str, Any], throwaway: Path) -> None:
        self.order = order
        self.spec: PipelineSpec = check(order["pipeline"])
        self.folder = JobFolder(Path(order["folder"])).party(order["party"])
        self.throwaway = throwaway
        self.shared: dict[str, Any] = {}
        self._plan = {each.task: each for each in assignments(self.spec)[order["party"]]}
        use_deepspeed(order["launch"])

    def run(self, task: str) -> None:
        """Run what of a task runs on all ranks: the roles in its component's `ranked`."""
        assignment = self._plan[task]
        component = plugins.load("component", assignment.component)()
        for role in assignment.roles:
            if role in getattr(component, "ranked", ()):
                getattr(component, role.value)(
                    FollowerContext(self, assignment, role, self._inputs(component, assignment))
                )

    def _inputs(self, component: Any, assignment: Assignment) -> dict[str, Artifact | tuple[Artifact, ...]]:
        """What rank 0 has as well: outputs of this party's earlier tasks, or its files."""
        found: dict[str, Artifact | tuple[Artifact, ...]] = {}
        for port, refs in assignment.inputs.items():
            kind = component.inputs[port].kind
            if isinstance(refs, tuple):
                found[port] = tuple(made for ref in refs if (made := self._artifact(ref, kind)).path.exists())
            else:
                found[port] = self._artifact(refs, kind)
        return found

    def resolve(self, path: str) -> Path:
        if not path.startswith(_CATALOG):
            return (Path(self.order["base"]) / Path(path).expanduser()).absolute()
        found = self.order["catalog"].get(path.removeprefix(_CATALOG))
        if found is None:
            raise DataError(f"the catalog of {self.order['party']} has no data set {path.removeprefix(_CATALOG)!r}")
        return Path(found)

    def _artifact(self, ref: InputRef, kind: ArtifactKind) -> Artifact:
        path = self.folder.output(ref.task, ref.output) if ref.path is None else self.resolve(ref.path)
        return Artifact(kind, path, f"{ref.task}.{ref.output}", self.order["party"])


class FollowerContext:
    """Satisfies `core.interfaces.Context`. What only rank 0 can do raises InternalError."""

    def __init__(
        self,
        follower: Follower,
        assignment: Assignment,
        role: Role,
        inputs: Mapping[str, Artifact | tuple[Artifact, ...]],
    ) -> None:
        self.party: str = follower.order["party"]
        self.role = role
        self.task = assignment.task
        self.roster = follower.spec.roster
        self.cohort = assignment.cohort
        self.params = assignment.params
        self.inputs = inputs
        self._follower = follower

    @property
    def channel(self) -> Channel:
        self._refuse("has a channel")

    def output(self, name: str) -> Path:
        folder = self._follower.throwaway / self.task
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name

    def scratch(self) -> Path:
        return self._follower.folder.scratch(self.task)

    def resolve(self, path: str) -> Path:
        return self._follower.resolve(path)

    def seed(self, *labels: str) -> int:
        return derive_seed(self._follower.spec.job.seed, *labels)

    def contributor_rounds(
        self,
        count: int,
        *,
        protection: str,
        protection_params: Mapping[str, Any] = _UNSET,
        hooks: Sequence[UpdateHook] = (),
        keep: Mapping[str, Kept] = _NOTHING,
    ) -> ContributorRounds:
        return _NoRounds()

    def coordinator_rounds(
        self,
        count: int,
        *,
        protection: str,
        protection_params: Mapping[str, Any] = _UNSET,
        hooks: Sequence[UpdateHook] = (),
        keep_terms: bool = False,
        keep: Mapping[str, Kept] = _NOTHING,
    ) -> CoordinatorRounds:
        self._refuse("coordinates")

    def holder_rounds(self, *, protection: str, protection_params: Mapping[str, Any] = _UNSET) -> None:
        self._refuse("holds a key")

    def turn(self) -> AbstractContextManager[None]:
        return nullcontext()

    def pause_turn(self) -> AbstractContextManager[None]:
        return nullcontext()

    def shared(self, key: str, factory: Callable[[], T]) -> T:
        made: T = self._follower.shared[key] if key in self._follower.shared else factory()
        self._follower.shared[key] = made
        return made

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Rank 0 does."""

    def emit(self, event: str, **fields: Any) -> None:
        """Rank 0 does."""

    def check_cancelled(self) -> None:
        """Rank 0 is cancelled, and with it this process."""

    def _refuse(self, what: str) -> NoReturn:
        raise InternalError(f"task {self.task}: only rank 0 {what}")


class _NoRounds:
    """Rounds that only rank 0 has: the component wraps them, and never asks these."""

    journals = False
    resumed = 0

    def start(self, state: Any) -> NoReturn:
        raise InternalError("only rank 0 has rounds; the others take its answers")

    def __iter__(self) -> NoReturn:
        raise InternalError("only rank 0 has rounds; the others take its answers")
