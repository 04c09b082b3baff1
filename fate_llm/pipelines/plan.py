"""What a pipeline will do, told before anything runs: order, each party's part, bytes, memory, who learns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fate_llm.core import plugins
from fate_llm.core.interfaces import Component, Estimate, PassThrough, PlanView, Traffic
from fate_llm.core.values import Cohort, Role

from .graph import order
from .plan_protection import ProtectionPlan, protections_of
from .plugin_fields import plugin_fields
from .schema import Folder, PipelineSpec, Reference, sources_of

__all__ = ["PartyTotals", "Plan", "TaskPlan", "make_plan"]

Upstream = dict[str, dict[str, tuple[str, Any]]]


@dataclass(frozen=True, slots=True)
class TaskPlan:
    """One task. inputs: by party and port, as `task.output` or a path. learns: what the coordinator sees. protections:
    of its sums that hide terms.
    """

    name: str
    component: str
    roles: Mapping[str, tuple[Role, ...]]
    cohort: Cohort
    inputs: Mapping[str, Mapping[str, tuple[str, ...]]]
    estimate: Estimate
    learns: tuple[str, ...]
    protections: tuple[ProtectionPlan, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "component": self.component,
            "roles": {party: [role.value for role in roles] for party, roles in self.roles.items()},
            "contributors": list(self.cohort.contributors),
            "coordinator": self.cohort.coordinator,
            "quorum": self.cohort.quorum,
            "inputs": {party: {p: list(s) for p, s in ports.items()} for party, ports in self.inputs.items()},
            "traffic": [_traffic_dict(t) for t in self.estimate.traffic],
            "memory_bytes": self.estimate.memory_bytes,
            "coordinator_memory_bytes": self.estimate.coordinator_memory_bytes,
            "notes": list(self.estimate.notes),
            "coordinator_learns": list(self.learns),
            "protections": [protection.as_dict() for protection in self.protections],
        }


def _traffic_dict(traffic: Traffic) -> dict[str, Any]:
    total = None if traffic.bytes_each is None else traffic.times * traffic.bytes_each
    return {
        "sender": traffic.sender,
        "receiver": traffic.receiver,
        "what": traffic.what,
        "times": traffic.times,
        "bytes_each": traffic.bytes_each,
        "bytes": total,
    }


@dataclass(frozen=True, slots=True)
class PartyTotals:
    """One party's whole job. None is unknown.

    memory_bytes: peak of the party's process: the largest of its tasks, None when one of them is unknown.
    *_known: the part that is known.
    """

    party: str
    roles: tuple[Role, ...]
    tasks: tuple[str, ...]
    bytes_sent: int | None
    bytes_received: int | None
    memory_bytes: int | None
    bytes_sent_known: int
    bytes_received_known: int
    memory_bytes_known: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "roles": [role.value for role in self.roles],
            "tasks": list(self.tasks),
            "bytes_sent": self.bytes_sent,
            "bytes_received": self.bytes_received,
            "memory_bytes": self.memory_bytes,
            "bytes_sent_known": self.bytes_sent_known,
            "bytes_received_known": self.bytes_received_known,
            "memory_bytes_known": self.memory_bytes_known,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """What will happen, task by task in the order of running, and party by party. `str` is for people."""

    name: str
    experiment: bool
    tasks: tuple[TaskPlan, ...]
    parties: tuple[PartyTotals, ...]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: plain values only."""
        return {
            "name": self.name,
            "experiment": self.experiment,
            "order": [task.name for task in self.tasks],
            "tasks": [task.as_dict() for task in self.tasks],
            "parties": {party.party: party.as_dict() for party in self.parties},
        }

    def __str__(self) -> str:
        return "\n".join(_render(self))


def make_plan(spec: PipelineSpec, *, base: Path = Path()) -> Plan:
    """The plan of a checked pipeline. base: the folder that its relative paths start from."""
    maker = _Maker(spec, base)
    tasks = tuple(maker.task(name) for name in order(spec))
    return Plan(spec.name, spec.experiment, tasks, tuple(_totals(spec, party, tasks) for party in spec.members))


class _Maker:
    """Makes the tasks' plans; keeps components and params so that each is made once."""

    def __init__(self, spec: PipelineSpec, base: Path) -> None:
        self.spec, self.base = spec, base
        self.components: dict[str, Component] = {name: spec.component(name) for name in spec.tasks}
        self.runs = {name: spec.parties_of(name) for name in spec.tasks}
        self.params = {
            (party, name): self.components[name].Params.model_validate(spec.params_for(party, name))
            for name in spec.tasks
            for party in self.runs[name]
        }

    def task(self, name: str) -> TaskPlan:
        spec, component = self.spec, self.components[name]
        params = {party: self.params[party, name] for party in self.runs[name]}
        upstream: Upstream = {}
        for party in self.runs[name]:
            for port in self._inputs(party, name):
                for key, maker in self._makers(party, name, port, port):
                    upstream.setdefault(key, {})[party] = maker
        cohort = spec.cohort(name)
        estimate = component.estimate(PlanView(name, spec.roster, cohort, params, upstream, self.base))
        return TaskPlan(
            name,
            spec.tasks[name].component,
            {party: spec.roles_at(party, name) for party in self.runs[name]},
            cohort,
            {party: self._inputs(party, name) for party in self.runs[name]},
            estimate,
            tuple(dict.fromkeys(_lessons(spec, name, component, cohort))),
            protections_of(spec, name, component, cohort),
        )

    def _inputs(self, party: str, task: str) -> dict[str, tuple[str, ...]]:
        ports, roles = self.components[task].inputs, self.spec.roles_at(party, task)
        given = {port: v for port, v in self.spec.inputs_for(party, task).items() if ports[port].roles & set(roles)}
        return {port: tuple(_shown(source) for source in sources_of(value)) for port, value in given.items()}

    def _makers(self, party: str, task: str, port: str, key: str) -> Iterator[tuple[str, tuple[str, Any]]]:
        """What makes an input (`train`) and, behind tasks that only pass data on, that (`train.data`)."""
        for index, source in enumerate(sources_of(self.spec.inputs_for(party, task).get(port, ()))):
            if isinstance(source, Folder) or (party, source.task) not in self.params:
                continue
            here = key if index == 0 else f"{key}[{index}]"
            yield here, (self.spec.tasks[source.task].component, self.params[party, source.task])
            rule = self.components[source.task].predict_rule
            if isinstance(rule, PassThrough):
                yield from self._makers(party, source.task, rule.source, f"{here}.{rule.source}")


def _shown(source: Reference | Folder) -> str:
    return source.path if isinstance(source, Folder) else str(source)


def _lessons(spec: PipelineSpec, task: str, component: Component, cohort: Cohort) -> Iterator[str]:
    """One sentence for each protection that the task's params name; alone, there is nothing to learn."""
    for party in cohort.contributors if len(cohort.members) > 1 else ():
        for field in plugin_fields(component.Params, spec.params_for(party, task)):
            if field.kind == "sum":
                protection = plugins.load("sum", field.name)
                what = "totals only" if protection.hides_terms else "every party's own terms"
                yield f"{cohort.coordinator} learns {what} ({field.name}: {protection.summary})"


def _totals(spec: PipelineSpec, party: str, tasks: Iterable[TaskPlan]) -> PartyTotals:
    mine = [task for task in tasks if party in task.roles]
    every = [traffic for task in tasks for traffic in task.estimate.traffic]
    sent = [t for t in every if t.sender == party]
    received = [t for t in every if t.receiver == party]
    memory = [_memory(task, party) for task in mine]
    held = spec.roster.roles_of(party)
    return PartyTotals(
        party,
        tuple(role for role in Role if role in held),
        tuple(task.name for task in mine),
        _bytes(sent) if all(t.bytes_each is not None for t in sent) else None,
        _bytes(received) if all(t.bytes_each is not None for t in received) else None,
        None if None in memory else max((m for m in memory if m is not None), default=0),
        _bytes(sent),
        _bytes(received),
        max((m for m in memory if m is not None), default=0),
    )


def _memory(task: TaskPlan, party: str) -> int | None:
    """What the task needs at this party: as a contributor, or as a coordinator that does not contribute."""
    estimate = task.estimate
    return estimate.memory_bytes if party in task.cohort.contributors else estimate.coordinator_memory_bytes


def _bytes(traffic: Iterable[Traffic]) -> int:
    return sum(t.times * t.bytes_each for t in traffic if t.bytes_each is not None)


# --- Text -----------------------------------------------------------------------------------------


def _render(plan: Plan) -> Iterator[str]:
    yield f"{plan.name}{' (experiment: local runtime only)' if plan.experiment else ''}"
    for number, task in enumerate(plan.tasks, start=1):
        yield ""
        yield f"{number}. {task.name}  [{task.component}]"
        yield from _render_task(task)
    yield ""
    yield "Parties"
    header = ("party", "roles", "tasks", "sends", "receives", "memory")
    yield from _table([header, *(_row(totals) for totals in plan.parties)])


def _render_task(task: TaskPlan) -> Iterator[str]:
    for party, roles in task.roles.items():
        inputs = "; ".join(f"{port} <- {', '.join(sources)}" for port, sources in task.inputs[party].items())
        yield f"   {party} as {', '.join(roles)}{': ' + inputs if inputs else ''}"
    if task.estimate.traffic:
        rows: list[tuple[str, ...]] = [
            (f"{t.sender} -> {t.receiver}", t.what, f"{t.times} x {_size(t.bytes_each)}") for t in task.estimate.traffic
        ]
        yield from ("   " + line for line in _table(rows))
    else:
        yield "   nothing is sent"
    if task.estimate.memory_bytes is not None:
        yield f"   memory of a contributor: {_size(task.estimate.memory_bytes)}"
    yield from (f"   {lesson}" for lesson in task.learns)
    yield from (f"     {line}" for protection in task.protections for line in protection.lines())
    yield from (f"   note: {note}" for note in task.estimate.notes)


def _row(totals: PartyTotals) -> tuple[str, ...]:
    return (
        totals.party,
        ", ".join(totals.roles),
        ", ".join(totals.tasks) or "-",
        _size(totals.bytes_sent, totals.bytes_sent_known),
        _size(totals.bytes_received, totals.bytes_received_known),
        _size(totals.memory_bytes, totals.memory_bytes_known),
    )


def _size(count: int | None, known: int = 0) -> str:
    """Bytes for people, in powers of 1024."""
    if count is None:
        return f"unknown, at least {_size(known)}" if known else "unknown"
    if count < 1024:
        return f"{count} B"
    size = float(count)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        size /= 1024
        if size < 1024 or unit == "TiB":
            break
    return f"{size:.1f} {unit}"


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
