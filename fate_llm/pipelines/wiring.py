"""Checks of what is connected to what: inputs, kinds, parties that produce and parties that need, circles."""

from __future__ import annotations

from collections.abc import Iterable

from fate_llm.core.interfaces import Port
from fate_llm.core.names import nearest

from .dialect import Path
from .draft import Draft
from .graph import circles, waits_for
from .schema import InputValue, Reference, sources_of

__all__ = ["check_wiring"]


def check_wiring(draft: Draft) -> None:
    """Add a fault for every input that is unknown, of another kind, or lacking where it is needed."""
    for task in draft.spec.tasks:
        for path, inputs in _written_inputs(draft, task):
            for name, value in inputs.items():
                _check_value(draft, task, (*path, name), name, value)
        for name, port in draft.components[task].inputs.items():
            _check_port(draft, task, name, port)
    for ring in circles(waits_for(draft.spec)):
        shown = " -> ".join((*ring, ring[0]))
        draft.faults.add("cycle", ("tasks", ring[0], "inputs"), f"tasks wait for each other: {shown}", "cut one input")


def _written_inputs(draft: Draft, task: str) -> Iterable[tuple[Path, dict[str, InputValue]]]:
    """Every place where inputs of the task are written, with its path."""
    yield ("tasks", task, "inputs"), draft.spec.tasks[task].inputs
    for party, tasks in draft.spec.overrides.items():
        if task in tasks:
            yield ("overrides", party, task, "inputs"), tasks[task].inputs


def _check_value(draft: Draft, task: str, path: Path, name: str, value: InputValue) -> None:
    """What can be said of one written input without knowing the party."""
    ports = draft.components[task].inputs
    if name not in ports:
        what = f"{draft.spec.tasks[task].component} has no input {name!r}"
        draft.faults.add("input_unexpected", path, what, nearest(name, ports) or "it takes no inputs")
        return
    if isinstance(value, tuple) and not ports[name].many:
        draft.faults.add("input_single", path, f"a list, but {name!r} takes one source", "give one `task.output`")
    for index, source in enumerate(sources_of(value)):
        here = (*path, index) if isinstance(value, tuple) else path
        if isinstance(source, Reference):
            _check_reference(draft, here, ports[name], source)


def _check_reference(draft: Draft, path: Path, port: Port, source: Reference) -> None:
    """Task and output exist, and the kind fits."""
    faults, written = draft.faults, draft.raw.get("tasks")
    if source.task not in draft.spec.tasks:
        if not isinstance(written, dict) or source.task not in written:
            known = list(written) if isinstance(written, dict) else []
            faults.add("unknown_task", path, f"no task is called {source.task!r}", nearest(source.task, known))
        return
    outputs = draft.components[source.task].outputs
    if source.output not in outputs:
        hint = nearest(source.output, outputs) or "it has no outputs"
        faults.add("unknown_output", path, f"task {source.task!r} has no output {source.output!r}", hint)
    elif outputs[source.output].kind != port.kind:
        fitting = [f"{source.task}.{name}" for name, output in outputs.items() if output.kind == port.kind]
        what = f"{source} is {outputs[source.output].kind.value}, the input takes {port.kind.value}"
        faults.add(
            "kind_mismatch",
            path,
            what,
            f"valid: {', '.join(fitting)}" if fitting else "another task's output",
        )


def _check_port(draft: Draft, task: str, name: str, port: Port) -> None:
    """Every party that needs the input is given it, by something that runs at that party."""
    needing = [party for party, roles in draft.runs[task].items() if port.roles.intersection(roles)]
    lacking: list[str] = []
    unproduced: dict[tuple[Path, str], list[str]] = {}
    for party in needing:
        value = draft.spec.inputs_for(party, task).get(name)
        if value is None or value == ():
            if port.required and not _is_misshapen(draft, party, task, name, value):
                lacking.append(party)
            continue
        path = _place(draft, party, task, name)
        absent = [str(s) for s in sources_of(value) if isinstance(s, Reference) and not _runs_at(draft, s, party)]
        # Of many sources, a party uses those that it has.
        if absent and (not port.many or len(absent) == len(sources_of(value))):
            unproduced.setdefault((path, ", ".join(absent)), []).append(party)
    if lacking:
        where = _at(lacking, needing)
        hint = f"{port.kind.value}: {port.doc} Write `{name}: task.output`."
        draft.faults.add("input_missing", ("tasks", task, "inputs"), f"the input {name!r} is required{where}", hint)
    for (path, what), parties in unproduced.items():
        hint = "restrict this task's `parties` or `roles`, or give the input per party in `overrides`"
        draft.faults.add("input_not_produced", path, f"{what} is not produced at {', '.join(parties)}", hint)
    if port.many:
        _check_every_source(draft, task, name, needing)


def _check_every_source(draft: Draft, task: str, name: str, needing: list[str]) -> None:
    """Of a list, every source has to exist at some party, else naming it is a mistake."""
    for path, inputs in _written_inputs(draft, task):
        value = inputs.get(name, ())
        for index, source in enumerate(sources_of(value)):
            here = (*path, name, index) if isinstance(value, tuple) else (*path, name)
            readers = needing if path[0] == "tasks" else [party for party in needing if party == path[1]]
            if readers and isinstance(source, Reference) and not any(_runs_at(draft, source, p) for p in readers):
                hint = "no party of this task runs the task that makes it"
                draft.faults.add("input_not_produced", here, f"{source} is not produced at any party here", hint)


def _place(draft: Draft, party: str, task: str, name: str) -> Path:
    override = draft.spec.overrides.get(party, {}).get(task)
    if override is not None and name in override.inputs:
        return ("overrides", party, task, "inputs", name)
    return ("tasks", task, "inputs", name)


def _is_misshapen(draft: Draft, party: str, task: str, name: str, value: InputValue | None) -> bool:
    """The input is written but was taken out for a fault of its own."""
    if value == ():
        return False
    return any(
        draft.is_written(*start, "inputs", name) or _inputs_misshapen(draft, start)
        for start in (("tasks", task), ("overrides", party, task))
    )


def _inputs_misshapen(draft: Draft, start: tuple[str, ...]) -> bool:
    """`inputs` itself is written as something else than a mapping."""
    where: object = draft.raw
    for step in (*start, "inputs"):
        if not isinstance(where, dict) or step not in where:
            return False
        where = where[step]
    return not isinstance(where, dict)


def _runs_at(draft: Draft, source: Reference, party: str) -> bool:
    """The party runs the producer in a role that makes the output; unknown ones have a fault already."""
    if source.task not in draft.spec.tasks:
        return True
    output = draft.components[source.task].outputs.get(source.output)
    return output is None or bool(output.roles.intersection(draft.runs[source.task].get(party, ())))


def _at(some: list[str], all_of_them: list[str]) -> str:
    return "" if len(some) == len(all_of_them) else f" at {', '.join(some)}"
