"""A prediction pipeline from a trained one: by the components' own rules, never by their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fate_llm.core.errors import Fault, PipelineInvalid
from fate_llm.core.interfaces import Component, Drop, Keep, PassThrough, PredictRule, Replace
from fate_llm.core.values import Role

from .builder import Pipeline
from .graph import order
from .schema import Folder, PipelineSpec, Reference, load_component, roles_of_component, sources_of

__all__ = ["Prediction", "derive_prediction"]

Outputs = Mapping[str, Mapping[str, Mapping[str, str]]]
Sources = tuple[Reference | Folder, ...]


@dataclass(frozen=True, slots=True)
class Prediction:
    """The derived pipeline, and what became of the trained one's tasks. dropped: why, by task."""

    pipeline: Pipeline
    kept: tuple[str, ...]
    replaced: tuple[str, ...]
    dropped: Mapping[str, str]


def derive_prediction(
    spec: PipelineSpec, outputs: Outputs, *, name: str | None = None, folder: Path | None = None
) -> Prediction:
    """Derive the prediction pipeline of a trained job.

    outputs: {party: {task: {output: path}}} as `submit` prints. name: `<name>-predict` if None.
    folder: where relative paths of the pipeline start.

    Raises:
        PipelineInvalid: an output on disk is lacking, no task remains, or what remains is no valid pipeline.
    """
    derivation = _Derivation(spec, outputs)
    for task in order(spec):
        derivation.add(task)
    if derivation.faults:
        raise PipelineInvalid(derivation.faults)
    if not derivation.tasks:
        hint = "a `stage: predict` keeps a task whatever its component says"
        raise PipelineInvalid([_fault("nothing_to_predict", "tasks", "every task belongs to training only", hint)])
    data = spec.to_data()
    data["name"] = name or f"{spec.name[:56].rstrip('_.-')}-predict"
    data["tasks"] = {task: derivation.tasks[task] for task in spec.tasks if task in derivation.tasks}
    data["overrides"] = {party: tasks for party, tasks in derivation.overrides.items() if tasks}
    if not data["overrides"]:
        del data["overrides"]
    pipeline = Pipeline.from_spec(PipelineSpec.model_validate(data), folder=folder).validate()
    replaced = tuple(task for task in data["tasks"] if task in derivation.replaced)
    kept = tuple(task for task in data["tasks"] if task not in derivation.replaced)
    return Prediction(pipeline, kept, replaced, derivation.dropped)


def _fault(code: str, path: str, message: str, hint: str) -> Fault:
    return Fault(code, None, None, path, message, hint)


class _Derivation:
    """Takes tasks in the order of running; what a task reads from has been decided before it."""

    def __init__(self, spec: PipelineSpec, outputs: Outputs) -> None:
        self.spec, self.outputs = spec, outputs
        self.tasks: dict[str, dict[str, Any]] = {}
        self.overrides: dict[str, dict[str, dict[str, Any]]] = {party: {} for party in spec.members}
        self.replaced: dict[str, Replace] = {}
        self.passed: dict[str, str] = {}
        self.dropped: dict[str, str] = {}
        self.faults: list[Fault] = []

    def add(self, task: str) -> None:
        """Decide what becomes of the task."""
        rule = self._rule(task)
        if isinstance(rule, PassThrough):
            self.passed[task] = rule.source
        elif isinstance(rule, Drop):
            stage = self.spec.tasks[task].stage
            self.dropped[task] = "stage: train" if stage == "train" else f"{self._component_name(task)} is for training"
        elif isinstance(rule, Replace):
            self._replace(task, rule)
        else:
            given = self.spec.tasks[task]
            self._put(task, given.component, {port: port for port in self.spec.component(task).inputs}, None)

    def _rule(self, task: str) -> PredictRule:
        stage = self.spec.tasks[task].stage
        if stage is None:
            return self.spec.component(task).predict_rule
        return Drop() if stage == "train" else Keep()

    def _component_name(self, task: str) -> str:
        return self.spec.tasks[task].component

    def _replace(self, task: str, rule: Replace) -> None:
        self._put(task, rule.component, rule.inputs, rule)

    def _put(self, task: str, component_name: str, ports: Mapping[str, str], rule: Replace | None) -> None:
        """Write the new task, or drop it when an input that it requires has no source any more."""
        component = load_component(component_name)
        inputs: dict[str, dict[str, Sources]] = {}
        for new, old in ports.items():
            inputs[new] = {p: self._resolved(p, task, old) for p in self._reading(component, task, new)}
        lost = [
            ports[new] for new, found in inputs.items() if component.inputs[new].required and not all(found.values())
        ]
        if lost:
            self.dropped[task] = f"its input {lost[0]!r} comes from training only"
            return
        given = self.spec.tasks[task]
        made: dict[str, Any] = {"component": component_name}
        self.tasks[task] = made
        if rule is not None:
            self.replaced[task] = rule
            inputs = {rule.artifact: self._trained(component, task, rule.artifact), **inputs}
        for port, found in inputs.items():
            self._write_input(task, port, found, many=component.inputs[port].many)
        self._write_params(task, rule)
        if given.roles is not None:
            has = roles_of_component(component)
            made["roles"] = [role.value for role in given.roles if role in has]
        if given.parties is not None:
            made["parties"] = list(given.parties)
        if given.stage is not None and rule is None:
            made["stage"] = given.stage

    def _reading(self, component: Component, task: str, port: str) -> list[str]:
        """Parties that will read the port in the new task."""
        given = self.spec.tasks[task]
        allowed = roles_of_component(component) & component.inputs[port].roles
        allowed = allowed if given.roles is None else allowed & frozenset(given.roles)
        members = self.spec.members if given.parties is None else given.parties
        return [party for party in self.spec.members if party in members and self._roles(party) & allowed]

    def _roles(self, party: str) -> frozenset[Role]:
        return self.spec.roster.roles_of(party)

    def _resolved(self, party: str, task: str, port: str) -> Sources:
        """Where the party's input comes from in the prediction pipeline; empty when from nowhere any more."""
        found: list[Reference | Folder] = []
        for source in sources_of(self.spec.inputs_for(party, task).get(port, ())):
            if isinstance(source, Folder):
                found.append(source)
            elif source.task in self.passed:
                found += self._resolved(party, source.task, self.passed[source.task])
            elif source.task in self.replaced:
                found += self._of_replaced(party, source)
            elif source.task in self.tasks:
                found.append(source)
        return tuple(dict.fromkeys(found))

    def _of_replaced(self, party: str, source: Reference) -> Sources:
        """The new component's output of that name, else the trained artifact itself."""
        rule = self.replaced[source.task]
        if source.output in load_component(rule.component).outputs:
            return (source,)
        path = self.outputs.get(party, {}).get(source.task, {}).get(source.output)
        return (Folder(path=path),) if source.output == rule.artifact and path else ()

    def _trained(self, component: Component, task: str, artifact: str) -> dict[str, Sources]:
        """The trained output's folder at each party that will read it."""
        found: dict[str, Sources] = {}
        for party in self._reading(component, task, artifact):
            path = self.outputs.get(party, {}).get(task, {}).get(artifact)
            if path:
                found[party] = (Folder(path=path),)
                continue
            hint = "take the outputs that `submit` printed when the job ended with success"
            message = f"{party} has no output {task}.{artifact}"
            self.faults.append(_fault("no_output", f"tasks.{task}", message, hint))
        return found

    def _write_input(self, task: str, port: str, found: Mapping[str, Sources], *, many: bool) -> None:
        """Once for all parties that read the same; folders and what differs by party."""
        written = {party: _written(sources, many=many) for party, sources in found.items() if sources}
        if not written:
            return
        values = list(written.values())
        on_disk = any(isinstance(source, Folder) for sources in found.values() for source in sources)
        if not on_disk and len(written) == len(found) and all(value == values[0] for value in values):
            self.tasks[task].setdefault("inputs", {})[port] = values[0]
            return
        for party, value in written.items():
            self.overrides[party].setdefault(task, {}).setdefault("inputs", {})[port] = value

    def _write_params(self, task: str, rule: Replace | None) -> None:
        params = _carried(self.spec.tasks[task].params, rule)
        kept = self._rule(task)
        if isinstance(kept, Keep):
            params |= kept.params
        if params:
            self.tasks[task]["params"] = params
        for party, tasks in self.spec.overrides.items():
            over = _carried(tasks[task].params, rule) if task in tasks else {}
            if over:
                self.overrides[party].setdefault(task, {})["params"] = over


def _carried(params: Mapping[str, Any], rule: Replace | None) -> dict[str, Any]:
    """The settings that a task keeps: all, or those that its replacement takes over by name."""
    return {key: value for key, value in params.items() if rule is None or key in rule.params}


def _written(sources: Sequence[Reference | Folder], *, many: bool) -> Any:
    values = [{"path": s.path} if isinstance(s, Folder) else str(s) for s in sources]
    return values if many and len(values) > 1 else values[0]
