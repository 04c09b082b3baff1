"""A pipeline under examination: what could be read of it, and who runs what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fate_llm.core import plugins
from fate_llm.core.errors import FateError
from fate_llm.core.interfaces import Component
from fate_llm.core.names import nearest
from fate_llm.core.values import Role

from .faults import Faults
from .schema import PipelineSpec, load_component

__all__ = ["Draft", "draft_of"]


@dataclass(frozen=True, slots=True)
class Draft:
    """What is known so far. runs: roles by task and party, for parties that take part.

    `spec` holds only tasks whose component is known; the others, which `raw` still has, have a fault already.
    """

    raw: Mapping[str, Any]
    spec: PipelineSpec
    faults: Faults
    components: Mapping[str, Component]
    runs: Mapping[str, Mapping[str, tuple[Role, ...]]]

    def is_written(self, *path: str) -> bool:
        """True when the file has something there, were it misshapen."""
        where: Any = self.raw
        for step in path:
            if not isinstance(where, Mapping) or step not in where:
                return False
            where = where[step]
        return True


def draft_of(raw: Mapping[str, Any], spec: PipelineSpec, faults: Faults) -> Draft:
    """Load every task's component; a task without one has a fault and is left out of the draft."""
    components: dict[str, Component] = {}
    for name, task in spec.tasks.items():
        path = ("tasks", name, "component")
        known = plugins.names("component")
        if task.component not in known:
            faults.add(
                "unknown_component",
                path,
                f"no component is called {task.component!r}",
                nearest(task.component, known),
            )
            continue
        try:
            components[name] = load_component(task.component)
        except FateError as error:
            faults.add("plugin_unavailable", path, error.message, error.hint)
    left = spec.model_copy(update={"tasks": {name: spec.tasks[name] for name in components}})
    runs = {name: {p: roles for p in left.roster if (roles := left.roles_at(p, name))} for name in left.tasks}
    return Draft(raw, left, faults, components, runs)
