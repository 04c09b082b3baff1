"""From a checked pipeline to what each party runs."""

from __future__ import annotations

from fate_llm.core.values import Role
from fate_llm.pipelines.graph import order
from fate_llm.pipelines.schema import InputValue, PipelineSpec, Reference, sources_of

from .party import Assignment, InputRef

__all__ = ["assignments"]

_DATA_ROLES = frozenset({Role.GUEST, Role.HOST})


def assignments(spec: PipelineSpec) -> dict[str, list[Assignment]]:
    """Every party's tasks in the order they run."""
    found: dict[str, list[Assignment]] = {party: [] for party in spec.members}
    for task in order(spec):
        for party in spec.parties_of(task):
            found[party].append(_assignment(spec, party, task))
    return found


def _assignment(spec: PipelineSpec, party: str, task: str) -> Assignment:
    component = spec.component(task)
    roles = spec.roles_at(party, task)
    inputs: dict[str, InputRef | tuple[InputRef, ...]] = {}
    for port, value in spec.inputs_for(party, task).items():
        declared = component.inputs[port]
        if not declared.roles & set(roles):
            continue  # an arbiter without data has no inputs
        refs = _refs(value)
        if declared.many:
            inputs[port] = refs
        elif refs and (declared.required or _made_here(spec, party, value)):
            inputs[port] = refs[0]
    params = component.Params.model_validate(spec.params_for(party, task))
    return Assignment(task, spec.tasks[task].component, roles, spec.cohort(task), params, inputs)


def _refs(value: InputValue) -> tuple[InputRef, ...]:
    return tuple(
        InputRef(task=source.task, output=source.output)
        if isinstance(source, Reference)
        else InputRef(path=source.path)
        for source in sources_of(value)
    )


def _made_here(spec: PipelineSpec, party: str, value: InputValue) -> bool:
    """An optional input counts only where its producer runs."""
    return all(
        not isinstance(source, Reference) or bool(_DATA_ROLES & set(spec.roles_at(party, source.task)))
        for source in sources_of(value)
    )
