"""Checks of the tasks' params as each party will see them, its overrides merged in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from fate_llm.core import plugins
from fate_llm.core.errors import FateError
from fate_llm.core.interfaces import HookStage
from fate_llm.core.names import nearest

from .dialect import Path, has_step
from .draft import Draft
from .faults import Found, found_by_pydantic
from .plugin_fields import PluginField, plugin_fields
from .protections import protection_faults
from .sums import SumUse, sums_of

__all__ = ["check_parameters"]


def check_parameters(draft: Draft) -> None:
    """Add a fault for every param that is wrong at some party, where it is written."""
    for task in draft.spec.tasks:
        _Task(draft, task).check()


@dataclass(frozen=True, slots=True)
class _View:
    """The params of one task at one party. instance is None when they are not valid."""

    party: str
    raw: dict[str, Any]
    instance: Any
    found: list[Found]
    plugins: tuple[PluginField, ...]
    sums: tuple[SumUse, ...]


class _Task:
    """Checks the params of one task at all parties that run it."""

    def __init__(self, draft: Draft, task: str) -> None:
        self.draft, self.task = draft, task
        self.component = draft.components[task]
        self.views = self._views()

    def _views(self) -> list[_View]:
        """One for each party; parties without overrides share the work."""
        views: list[_View] = []
        plain: _View | None = None
        for party in self.draft.runs[self.task] or [self.draft.spec.parties.guest]:
            if self._override(party):
                views.append(self._view(party))
            else:
                plain = plain or self._view(party)
                views.append(replace(plain, party=party))
        return views

    def _view(self, party: str) -> _View:
        raw = self.draft.spec.params_for(party, self.task)
        model = self.component.Params
        named, sums = tuple(plugin_fields(model, raw)), sums_of(model, raw)
        found = [fault for use in sums for fault in use.faults()]
        try:
            return _View(party, raw, model.model_validate(raw), found, named, sums)
        except ValidationError as error:
            return _View(party, raw, None, [*found_by_pydantic(error, raw, model), *found], named, sums)

    def check(self) -> None:
        unknown = {(view.party, field.path) for view in self.views for field in self._check_plugins(view)}
        wrong: dict[tuple[str, Path, str, str], list[str]] = {}
        for view in self.views:
            for one in view.found:
                if (view.party, one.path) not in unknown and not self._is_misshapen(view.party):
                    wrong.setdefault((one.code, one.path, one.message, one.hint), []).append(view.party)
        for (code, path, message, hint), parties in wrong.items():
            self._place_fault(code, path, message, hint, parties)
        self._check_same_wire()
        sums = {view.party: view.sums for view in (self._usual(), *self.views)}
        for code, path, message, hint, parties in protection_faults(self.draft, self.task, sums):
            self._place_fault(code, path, message, hint, parties)
        for view in self.views:
            self._check_experiment(view)

    def _override(self, party: str) -> dict[str, Any]:
        override = self.draft.spec.overrides.get(party, {}).get(self.task)
        return override.params if override else {}

    def _is_misshapen(self, party: str) -> bool:
        """The params were taken out as a whole, which has a fault already."""
        written = (self._raw("tasks", self.task), self._raw("overrides", party, self.task))
        return any(isinstance(w, Mapping) and not isinstance(w.get("params", {}), Mapping) for w in written)

    def _raw(self, *path: str) -> Any:
        where: Any = self.draft.raw
        for step in path:
            where = where.get(step) if isinstance(where, Mapping) else None
        return where

    def _place_fault(self, code: str, path: Path, message: str, hint: str, parties: list[str]) -> None:
        """One fault where the value is written: in the task, or in the override of each party that has it."""
        base = self.draft.spec.tasks[self.task].params
        in_task: list[str] = []
        for party in parties:
            override = self._override(party)
            partly = not path and override and len(parties) < len(self.views)
            if partly or (path and _depth(override, path) >= max(1, _depth(base, path))):
                where: Path = ("overrides", party, self.task, "params", *path)
                self.draft.faults.add(code, where, message, hint)
            else:
                in_task.append(party)
        if in_task:
            some = code == "missing_key" and len(parties) < len(self.views)
            where = ("tasks", self.task, "params", *path)
            self.draft.faults.add(code, where, message + (f" at {', '.join(in_task)}" if some else ""), hint)

    def _check_plugins(self, view: _View) -> list[PluginField]:
        """Unknown names, which are returned, and plug-ins that do not go together."""
        unknown = [field for field in view.plugins if field.name not in plugins.names(field.kind)]
        for field in unknown:
            hint = nearest(field.name, plugins.names(field.kind))
            self._place_fault(
                "unknown_plugin", field.path, f"no {field.kind} is called {field.name!r}", hint, [view.party]
            )
        known = [field for field in view.plugins if field not in unknown]
        for protection in known:
            if protection.kind == "sum":
                for rule in known:
                    self._check_pair(rule, protection, view)
        self._check_stages(view)
        return unknown

    def _check_pair(self, rule: PluginField, protection: PluginField, view: _View) -> None:
        """What needs to see a term, or writes it anew on its way, and a protection that hides it."""
        needs = rule.kind == "aggregator" and rule.holder == protection.holder
        writes = rule.kind == "hook" and rule.holder[: len(protection.holder)] == protection.holder
        if needs and self._load(rule, view).needs_plaintext and self._load(protection, view).hides_terms:
            message = f"{rule.name!r} needs every party's update, and {protection.name!r} hides them"
            hint = "another aggregator, or a protection that shows updates if every party agrees"
            self._place_fault("aggregator_needs_plaintext", rule.path, message, hint, [view.party])
        if writes and self._load(rule, view).stage.on_the_wire and self._load(protection, view).hides_terms:
            message = f"{rule.name!r} writes every update anew, and {protection.name!r} hides them"
            hint = "leave the hook out, or take a protection that shows updates if every party agrees"
            self._place_fault("hook_changes_hidden_terms", rule.path, message, hint, [view.party])

    def _wire_hooks(self, view: _View) -> Iterator[tuple[PluginField, HookStage]]:
        """The hooks of this view that change how an update travels, with their stages."""
        for field in view.plugins:
            if field.kind == "hook" and field.name in plugins.names("hook"):
                stage = self._load(field, view).stage
                if stage.on_the_wire:
                    yield field, stage

    def _check_stages(self, view: _View) -> None:
        """At most one hook for each stage of the wire."""
        first: dict[tuple[Path, HookStage], PluginField] = {}
        for field, stage in self._wire_hooks(view):
            other = first.setdefault((field.holder[:-1], stage), field)
            if other is not field:
                message = f"{field.name!r} and {other.name!r} both say how updates travel"
                hint = f"one hook of the stage {stage.name.lower()!r}"
                self._place_fault("hooks_conflict", field.path, message, hint, [view.party])

    def _check_same_wire(self) -> None:
        """Parties whose overrides let updates travel in another way than the task's own params."""
        usual = self._usual()
        names = self._wire_names(usual)
        for view in self.views:
            if (other := self._wire_names(view)) != names:
                shown, wanted = (", ".join(sorted(n for _, n in found)) or "no hook" for found in (other, names))
                message = f"updates travel with {shown} at {view.party!r}, and with {wanted} at {usual.party!r}"
                holder = sorted(other ^ names)[0][0]
                self._place_fault("hooks_differ", holder, message, "the same at every party", [view.party])

    def _usual(self) -> _View:
        """A party whose params are the task's own, if there is one."""
        return next((view for view in self.views if not self._override(view.party)), self.views[0])

    def _wire_names(self, view: _View) -> set[tuple[Path, str]]:
        return {(field.holder[:-1], field.name) for field, _ in self._wire_hooks(view)}

    def _load(self, field: PluginField, view: _View) -> Any:
        """The plug-in; one that fits with everything when it cannot be loaded, which is its own fault."""
        try:
            return plugins.load(field.kind, field.name)
        except FateError as error:
            self._place_fault("plugin_unavailable", field.path, error.message, error.hint, [view.party])
            return _Unavailable

    def _check_experiment(self, view: _View) -> None:
        if view.instance is None or self.draft.spec.experiment:
            return
        reason = self.component.needs_experiment(view.instance)
        if reason is not None:
            hint = "add `experiment: true`; such a pipeline runs in the local runtime only"
            self.draft.faults.add("needs_experiment", ("tasks", self.task), reason, hint)


class _Unavailable:
    needs_plaintext = False
    hides_terms = False
    stage = HookStage.CHECK


def _depth(values: Any, path: Path) -> int:
    """How many steps of the path the values have."""
    for index, step in enumerate(path):
        if not has_step(values, step):
            return index
        values = values[step]
    return len(path)
