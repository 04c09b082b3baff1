"""The sums of a task as its params name them: which protection, with which params, among how many.

A component names a protection in a field marked `json_schema_extra={"plugin": "sum"}`; the protection's own params are
in the field beside it whose name ends in `_params`: `protection` and `protection_params`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from fate_llm.core import plugins
from fate_llm.core.errors import FateError
from fate_llm.core.values import Cohort, SumFloor

from .dialect import Path, has_step
from .faults import Found, field_names, found_by_pydantic
from .plugin_fields import PluginField, plugin_fields

if TYPE_CHECKING:
    from .schema import PipelineSpec

__all__ = ["SumUse", "counted", "hiding_tasks", "least_contributors", "sums_of", "usual_threshold"]

_LEAST = SumFloor().contributors


@dataclass(frozen=True)
class SumUse:
    """One sum of a task at one party. path: of the setting that names it. raw: its params as they are written.

    params_path: where they are written, None where the component takes none.
    """

    name: str
    path: Path
    params_path: Path | None = None
    raw: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def plugin(self) -> Any:
        """The protection, None where it is not known or cannot be loaded."""
        try:
            return plugins.load("sum", self.name) if self.name in plugins.names("sum") else None
        except FateError:
            return None

    @property
    def hides_terms(self) -> bool:
        return bool(getattr(self.plugin, "hides_terms", False))

    @property
    def needs_key_holder(self) -> bool:
        return bool(getattr(self.plugin, "needs_key_holder", False))

    @cached_property
    def params(self) -> Any:
        """The validated params, None where they are not valid or the protection is not known."""
        try:
            return None if self.plugin is None else self._model.model_validate(dict(self.raw))
        except ValidationError:
            return None

    def faults(self) -> list[Found]:
        """What is wrong with the params, at paths of the task's params."""
        if self.plugin is None or self.params_path is None:
            return []
        try:
            self._model.model_validate(dict(self.raw))
        except ValidationError as error:
            return [
                Found(one.code, (*self.params_path, *one.path), one.message, one.hint, one.kind, one.key)
                for one in found_by_pydantic(error, dict(self.raw), self._model)
            ]
        return []

    @property
    def _model(self) -> type[BaseModel]:
        model: type[BaseModel] = self.plugin.Params
        return model

    def threshold(self, cohort: Cohort) -> int | None:
        """How many parties must stay to the end, the coordinator not counted; None where there is no such number."""
        if self.params is None or not hasattr(self.params, "threshold"):
            return None
        given: int | None = self.params.threshold
        return usual_threshold(counted(cohort)) if given is None else given

    @property
    def clip(self) -> float | None:
        """The largest size of a value, None where there is no bound."""
        return getattr(self.params, "clip", None)

    @property
    def shared_key(self) -> bool:
        """Whether the key holder may be one of the contributors."""
        return bool(getattr(self.params, "shared_key", False))


def sums_of(model: type[BaseModel], raw: Mapping[str, Any]) -> tuple[SumUse, ...]:
    """Every sum that raw params name. model: the component's Params."""
    return tuple(_use(model, raw, found) for found in plugin_fields(model, raw) if found.kind == "sum")


def _use(model: type[BaseModel], raw: Mapping[str, Any], found: PluginField) -> SumUse:
    key = f"{found.path[-1]}_params"
    if found.path[:-1] != found.holder or key not in field_names(model, found.holder):
        return SumUse(found.name, found.path)
    place = (*found.holder, key)
    value = _at(raw, place)
    return SumUse(found.name, found.path, place, value if isinstance(value, Mapping) else {})


def hiding_tasks(spec: PipelineSpec) -> frozenset[str]:
    """The tasks of a checked pipeline with a sum that hides its terms."""
    return frozenset(
        task
        for task in spec.tasks
        if any(use.hides_terms for use in sums_of(spec.component(task).Params, spec.tasks[task].params))
    )


def _at(value: Any, path: Path) -> Any:
    for step in path:
        if not has_step(value, step):
            return None
        value = value[step]
    return value


def counted(cohort: Cohort) -> int:
    """Contributors but the coordinator: it could take its own term out of a sum, and does not count."""
    return sum(party != cohort.coordinator for party in cohort.contributors)


def least_contributors(cohort: Cohort) -> int:
    """Contributors from which on a sum hides a term from the others."""
    return _LEAST + cohort.coordinator_contributes


def usual_threshold(parties: int) -> int:
    """floor(2n/3) + 1 of n: what secure aggregation takes where nothing else is said."""
    return 2 * parties // 3 + 1
