"""The shape of a pipeline, language version 1: frozen models, and who does what in each task.

These models check shape only. `check.check` is the door: it also checks references, kinds and parameters.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, StringConstraints, Tag, WithJsonSchema

from fate_llm.core import plugins
from fate_llm.core.interfaces import Component, Frozen
from fate_llm.core.names import NAME_PATTERN
from fate_llm.core.values import Cohort, Role, Roster

from .sums import sums_of

__all__ = [
    "Duration",
    "Folder",
    "InputValue",
    "JobResources",
    "JobSettings",
    "Listed",
    "Name",
    "Need",
    "Parties",
    "PipelineSpec",
    "Reference",
    "Size",
    "Strict",
    "TaskOverride",
    "TaskSpec",
    "Version",
    "load_component",
    "merged",
    "parse_duration",
    "parse_size",
    "roles_of_component",
    "sources_of",
]

_DURATION = re.compile(r"^([0-9]+(?:\.[0-9]+)?)(s|m|h|d)$", re.ASCII)
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_LONGEST = 30 * 86400.0

Items = TypeVar("Items")
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
Listed = Annotated[tuple[Items, ...], Field(strict=False)]
"""A tuple that a YAML or JSON list may fill, although the models are strict."""


def parse_duration(value: Any) -> float:
    """Seconds of `10m`, `30s`, `2h`, `1d` or of a plain number.

    Raises:
        ValueError: anything else, zero, or more than 30 days.
    """
    found = _DURATION.match(value) if isinstance(value, str) else None
    if found:
        seconds = float(found[1]) * _UNITS[found[2]]
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        seconds = float(value)
    else:
        raise ValueError("a duration is a number of seconds, or text such as 30s, 10m, 2h")
    if not 0 < seconds <= _LONGEST:
        raise ValueError("a duration is more than 0 and at most 30 days")
    return seconds


_SIZE = re.compile(r"^([0-9]+(?:\.[0-9]+)?) ?(|[kKMGT]B|[KMGT]iB|B)$", re.ASCII)
_SIZES = {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZES |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_MOST_BYTES = 2**53


def parse_size(value: Any) -> int:
    """Bytes of `16GiB`, `500 MB` or of a plain number.

    Raises:
        ValueError: anything else, less than one byte, or more than 2^53.
    """
    found = _SIZE.match(value) if isinstance(value, str) else None
    if found:
        count = int(float(found[1]) * _SIZES[found[2]])
    elif isinstance(value, int) and not isinstance(value, bool):
        count = value
    else:
        raise ValueError("a size is a number of bytes, or text such as 500MB, 16GiB")
    if not 1 <= count <= _MOST_BYTES:
        raise ValueError("a size is at least one byte and at most 8192 TiB")
    return count


def _whole_number(value: Any) -> Any:
    """Python takes true for 1; a version is a number."""
    if isinstance(value, bool):
        raise ValueError("should be 1")
    return value


Version = Annotated[Literal[1], BeforeValidator(_whole_number)]
"""Of a file's language: 1, and not true."""

Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0},
                {"type": "string", "pattern": _DURATION.pattern},
            ]
        }
    ),
]


Size = Annotated[
    int,
    BeforeValidator(parse_size),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": _SIZE.pattern}]}),
]


class Strict(Frozen):
    """Nothing is converted: 1 is not "1" and "true" is not true."""

    model_config = ConfigDict(strict=True)


class Parties(Strict):
    """Who takes part, by role. One organisation may hold several roles."""

    guest: Name = Field(description="Starts the job and owns data, often the labels.")
    hosts: Listed[Name] = Field((), description="Contribute data; sums are added in this order, after the guest.")
    arbiter: Name | None = Field(None, description="Coordinates and aggregates. Without one the guest does.")
    key_holder: Name | None = Field(None, description="Holds the key of homomorphic aggregation.")

    def roster(self) -> Roster:
        return Roster(self.guest, self.hosts, self.arbiter, self.key_holder)


class Folder(Strict):
    """An artifact that lies on this party's disk."""

    path: str = Field(min_length=1, description="Relative paths start at the pipeline file's folder.")


class Reference(Strict):
    """An output of another task, as `task.output` names it."""

    task: str
    output: str

    def __str__(self) -> str:
        return f"{self.task}.{self.output}"


ReferenceText = Annotated[
    str, StringConstraints(pattern=r"^[^\s]+\.[A-Za-z_][A-Za-z0-9_]*$"), Field(description="task.output")
]


# The tags are no possible keys, so that a fault's path cannot mistake one for a key of the file.
_REFERENCE, _FOLDER, _LIST = "<reference>", "<folder>", "<list>"


def _form_of_one(value: Any) -> str:
    return _FOLDER if isinstance(value, (dict, Folder)) else _REFERENCE


def _form(value: Any) -> str:
    return _LIST if isinstance(value, (list, tuple)) else _form_of_one(value)


_One = Annotated[
    Annotated[ReferenceText, Tag(_REFERENCE)] | Annotated[Folder, Tag(_FOLDER)], Discriminator(_form_of_one)
]
InputValue = Annotated[
    Annotated[ReferenceText, Tag(_REFERENCE)] | Annotated[Folder, Tag(_FOLDER)] | Annotated[Listed[_One], Tag(_LIST)],
    Discriminator(_form),
]
"""`task.output`, `{path: folder}`, or a list of them for a port that takes many."""


class TaskSpec(Strict):
    """One task: an instance of a component."""

    component: str = Field(min_length=1, description="What the task does; `fate_llm components list` has the names.")
    inputs: dict[str, InputValue] = Field(default_factory=dict, description="Where each input comes from.")
    params: dict[str, Any] = Field(default_factory=dict, description="Settings of the component.")
    roles: Listed[Annotated[Role, Field(strict=False)]] | None = Field(
        None, description="Only these roles take part; all that the component has, when not given."
    )
    parties: Listed[Name] | None = Field(None, description="Only these parties take part; all, when not given.")
    stage: Literal["train", "predict"] | None = Field(
        None,
        description="In a prediction pipeline: `train` leaves the task out, `predict` keeps it as it is; "
        "when not given, the component decides. The pipeline itself runs all of its tasks.",
    )


class TaskOverride(Strict):
    """What differs at one party: params are merged deeply, an input replaces the task's."""

    params: dict[str, Any] = Field(default_factory=dict, description="Merged over the task's params.")
    inputs: dict[str, InputValue] = Field(default_factory=dict, description="Replace the task's inputs, by port.")


class Need(Strict):
    """Room that one party keeps free for the job while it runs."""

    cpus: float = Field(1.0, gt=0, le=10_000, description="Processor cores.")
    memory: Size | None = Field(None, description="Bytes, such as 16GiB; no claim when not given.")
    gpus: int = Field(0, ge=0, le=1_000, description="Whole GPUs.")


class JobResources(Need):
    """Room at every party, and what differs at some."""

    at: dict[Name, Need] = Field(default_factory=dict, description="What a party needs instead: {party: {cpus, ...}}.")


class JobSettings(Strict):
    """What holds for the job as a whole."""

    seed: int = Field(0, ge=0, lt=2**63, description="Decides data order and splits; never keys or noise.")
    round_deadline: Duration = Field(600.0, description="How long a round waits: seconds, or 30s, 10m, 2h.")
    quorum: int | None = Field(None, ge=1, description="Least number of contributors in a round; all by default.")
    retries: int = Field(0, ge=0, le=100, description="How often a task that failed is started again.")
    priority: int = Field(5, ge=0, le=9, description="Which job gets room first where several wait: 9 before 0.")
    resources: JobResources = Field(JobResources(), description="Room that each party keeps free for the job.")
    lost_after: Duration = Field(600.0, description="A party that gave no sign of life for so long is lost to the job.")
    approval_deadline: Duration = Field(
        7 * 86400.0, description="How long parties have to accept, people who approve included."
    )

    def need_of(self, party: str) -> Need:
        """The room that the job needs at a party."""
        return self.resources.at.get(party, self.resources)


class PipelineSpec(Strict):
    """A pipeline: parties, tasks and what differs between the parties."""

    version: Version = Field(description="Version of the language.")
    name: Name = Field(description="Name of the pipeline; job ids start with it.")
    description: str = Field("", description="For people.")
    parties: Parties = Field(description="Who takes part.")
    tasks: dict[Name, TaskSpec] = Field(min_length=1, description="What is done, by task name.")
    overrides: dict[Name, dict[Name, TaskOverride]] = Field(
        default_factory=dict, description="What differs at a party: {party: {task: {params, inputs}}}."
    )
    job: JobSettings = Field(
        default=JobSettings(), description="Seed, deadlines, quorum, retries, priority, resources."
    )
    experiment: bool = Field(
        False, description="Data or models may be shown to other parties; such a pipeline runs locally only."
    )
    env: Listed[Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]] = Field(
        (), description="Environment variables that ${NAME} in this file may name."
    )
    include: Listed[str] = Field((), description="YAML files merged beneath this file's own keys.")

    @property
    def roster(self) -> Roster:
        return self.parties.roster()

    @property
    def members(self) -> tuple[str, ...]:
        """Every party once, guest first."""
        return tuple(self.roster)

    def component(self, task: str) -> Component:
        """The task's component, loaded from the registry."""
        return load_component(self.tasks[task].component)

    def cohort(self, task: str) -> Cohort:
        """Contributors in roster order, the coordinator of their sums, the least number of contributors."""
        contributors = tuple(p for p in self.roster.data_owners if self._own_roles(p, task) & _DATA_ROLES)
        arbiter = self.parties.arbiter
        if arbiter is not None and Role.ARBITER in self._own_roles(arbiter, task):
            coordinator = arbiter
        elif self.parties.guest in contributors or not contributors:
            coordinator = self.parties.guest
        else:
            coordinator = contributors[0]
        quorum = len(contributors) if self.job.quorum is None else min(self.job.quorum, len(contributors))
        return Cohort(contributors, coordinator, quorum)

    def roles_at(self, party: str, task: str) -> tuple[Role, ...]:
        """Roles in which the party runs the task; empty when it takes no part.

        Where no arbiter takes part, the coordinator also runs the component's arbiter side.
        """
        held = self._own_roles(party, task)
        cohort = self.cohort(task)
        if party == cohort.coordinator and cohort.contributors:
            held |= {Role.ARBITER} & roles_of_component(self.component(task))
        return tuple(role for role in Role if role in held)

    def parties_of(self, task: str) -> tuple[str, ...]:
        """Parties that run the task, in roster order."""
        return tuple(party for party in self.roster if self.roles_at(party, task))

    def params_for(self, party: str, task: str) -> dict[str, Any]:
        """The task's raw params at this party: the task's, with the party's overrides merged over them."""
        override = self.overrides.get(party, {}).get(task)
        return merged(self.tasks[task].params, override.params if override else {})

    def inputs_for(self, party: str, task: str) -> dict[str, InputValue]:
        """Where this party's inputs come from, by port, as written; `sources_of` takes a value apart."""
        override = self.overrides.get(party, {}).get(task)
        return {**self.tasks[task].inputs, **(override.inputs if override else {})}

    def to_data(self) -> dict[str, Any]:
        """Plain values that validate to this pipeline again; what is at its default is left out."""
        data = self.model_dump(mode="json", exclude_defaults=True)
        return {key: data[key] for key in type(self).model_fields if key in data}

    def _own_roles(self, party: str, task: str) -> set[Role]:
        """Roles of the roster in which the party takes part, before the coordinator's duty is added."""
        spec = self.tasks[task]
        if spec.parties is not None and party not in spec.parties:
            return set()
        held = self.roster.roles_of(party) & roles_of_component(self.component(task))
        if Role.KEY_HOLDER in held and not self._needs_key(task):
            held -= {Role.KEY_HOLDER}
        return set(held if spec.roles is None else held & set(spec.roles))

    def _needs_key(self, task: str) -> bool:
        """Whether a sum of the task needs somebody who holds a key: who does takes part then, and not otherwise."""
        sums = sums_of(self.component(task).Params, self.tasks[task].params)
        return any(use.needs_key_holder for use in sums)


_DATA_ROLES = {Role.GUEST, Role.HOST}


def load_component(name: str) -> Component:
    """An instance of the component called `name`.

    Raises:
        UnknownPlugin: nobody has a component of that name.
    """
    found = plugins.load("component", name)
    component: Component = found() if isinstance(found, type) else found
    return component


def roles_of_component(component: Component) -> frozenset[Role]:
    """Roles that the component has a method for."""
    return frozenset(role for role in Role if callable(getattr(component, role.value, None)))


def sources_of(value: InputValue) -> tuple[Reference | Folder, ...]:
    """The single sources of an input, in order; task names may contain dots, names of outputs cannot."""
    if isinstance(value, Folder):
        return (value,)
    if isinstance(value, str):
        task, _, output = value.rpartition(".")
        return (Reference(task=task, output=output),)
    return tuple(source for item in value for source in sources_of(item))


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A new mapping: mappings are merged key by key, anything else of `over` replaces what `base` has."""
    result = {key: copy.deepcopy(value) for key, value in base.items()}
    for key, value in over.items():
        below = result.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        result[key] = merged(below, value) if both and isinstance(below, Mapping) else copy.deepcopy(value)
    return result
