"""Pipelines built in Python, reading like the YAML they turn into."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from fate_llm.core.errors import ConfigurationError, MissingExtra, PipelineInvalid
from fate_llm.core.names import NAME_PATTERN, is_name, nearest
from fate_llm.core.values import Role

from .check import check
from .dialect import Marks, dump
from .loader import load_file, load_text
from .plan import Plan, make_plan
from .schema import PipelineSpec, load_component

__all__ = ["Output", "Pipeline", "Task", "set_submitter"]

_submitter: Callable[..., Any] | None = None


def set_submitter(submitter: Callable[..., Any] | None) -> None:
    """Name what `Pipeline.submit` calls: `submitter(pipeline, **options)`. None takes it away again."""
    global _submitter
    _submitter = submitter


class Output(str):
    """An output of a task, to be passed as an input: the text `task.output`."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<output {self}>"


class Task:
    """A task of a pipeline under construction; its outputs are attributes and items: `data.dataset`."""

    __slots__ = ("_component", "_name", "_outputs")

    def __init__(self, name: str, component: str) -> None:
        self._name = name
        self._component = component
        self._outputs = tuple(load_component(component).outputs)

    def __getattr__(self, output: str) -> Output:
        if output.startswith("_") or output not in self._outputs:
            raise AttributeError(self._unknown(output))
        return Output(f"{self._name}.{output}")

    def __getitem__(self, output: str) -> Output:
        """The same for names that cannot be written as attributes."""
        if output not in self._outputs:
            raise KeyError(self._unknown(output))
        return Output(f"{self._name}.{output}")

    def __dir__(self) -> list[str]:
        return sorted(self._outputs)

    def __repr__(self) -> str:
        return f"<task {self._name} [{self._component}] -> {', '.join(self._outputs) or 'nothing'}>"

    def _unknown(self, output: str) -> str:
        hint = nearest(output, self._outputs) or "it has none"
        return f"task {self._name!r} ({self._component}) has no output {output!r}: {hint}"


class Pipeline:
    """A pipeline: built task by task, or read from YAML. Two are equal when they say the same."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(
        self,
        name: str,
        *,
        guest: str,
        hosts: Sequence[str] = (),
        arbiter: str | None = None,
        key_holder: str | None = None,
        description: str = "",
        experiment: bool = False,
        job: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        """job, or its settings as arguments of their own: seed, round_deadline, quorum, retries."""
        parties = {"guest": guest, "hosts": list(hosts), "arbiter": arbiter, "key_holder": key_holder}
        both = sorted(settings.keys() & (job or {}).keys())
        if both:
            raise ConfigurationError(f"given twice, in job and as an argument: {', '.join(both)}")
        data = {
            "version": 1,
            "name": name,
            "description": description,
            "parties": {role: party for role, party in parties.items() if party},
            "tasks": {},
            "overrides": {},
            "job": {**(job or {}), **settings},
            "experiment": experiment,
        }
        optional = ("description", "overrides", "job", "experiment")
        self._adopt({key: value for key, value in data.items() if value or key not in optional})

    def _adopt(self, data: dict[str, Any], marks: Marks | None = None, folder: Path | None = None) -> None:
        self._data: dict[str, Any] = _plain(data, "")
        self._marks: Marks = marks or {}
        self._folder = folder

    @property
    def name(self) -> str:
        return str(self._data.get("name", ""))

    @property
    def folder(self) -> Path:
        """Where relative paths start: the file's folder, or the working directory."""
        return self._folder if self._folder is not None else Path()

    # --- Building ---------------------------------------------------------------------------------

    def task(
        self,
        name: str,
        component: str,
        *,
        inputs: Mapping[str, Any] | None = None,
        roles: Sequence[str | Role] | None = None,
        parties: Sequence[str] | None = None,
        stage: str | None = None,
        params: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Task:
        """Add a task; `params` and further arguments are the component's settings.

        Raises:
            ConfigurationError: the name is no valid id or taken, or a setting is given twice.
            UnknownPlugin: nobody has a component of that name.
        """
        tasks = self._mapping("tasks")
        if not is_name(name):
            raise ConfigurationError(f"{name!r} is not a valid id", hint=f"It has to match {NAME_PATTERN}")
        if name in tasks:
            raise ConfigurationError(f"there is a task {name!r} already", hint="Every task has a name of its own.")
        twice = sorted(more.keys() & (params or {}).keys())
        if twice:
            raise ConfigurationError(f"{name}: given twice, in params and as an argument: {', '.join(twice)}")
        made = Task(name, component)
        settings: dict[str, Any] = {**(params or {}), **more}
        parts = {
            "inputs": inputs,
            "params": settings or None,
            "roles": roles,
            "parties": parties,
            "stage": stage,
        }
        task = {"component": component, **{key: value for key, value in parts.items() if value is not None}}
        tasks[name] = _plain(task, f"tasks.{name}")
        return made

    def for_party(
        self,
        party: str,
        params: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        inputs: Mapping[str, Mapping[str, Any]] | None = None,
        **more: Mapping[str, Any],
    ) -> Pipeline:
        """Let a party's params or inputs differ: `for_party("bank-b", data={"path": "b.jsonl"})`.

        params: by task, for tasks whose name is no Python word; `more` is the same. Calls add up.
        """
        given = [("params", params or {}), ("params", more), ("inputs", inputs or {})]
        # All values first: a wrong one must leave the pipeline as it was.
        plain = [
            (part, task, _plain(values, f"overrides.{party}.{task}.{part}"))
            for part, tasks in given
            for task, values in tasks.items()
        ]
        overrides = self._mapping("overrides").setdefault(party, {})
        for part, task, values in plain:
            overrides.setdefault(task, {}).setdefault(part, {}).update(values)
        return self

    def _mapping(self, key: str) -> dict[str, Any]:
        """`tasks` or `overrides`, there from now on."""
        if not isinstance(self._data.setdefault(key, {}), dict):
            raise ConfigurationError(f"{key} of this pipeline is no mapping", hint="`validate()` lists all faults.")
        found: dict[str, Any] = self._data[key]
        return found

    # --- Using ------------------------------------------------------------------------------------

    def spec(self) -> PipelineSpec:
        """The checked, frozen pipeline.

        Raises:
            PipelineInvalid: with every fault; with lines when the pipeline was read from YAML.
        """
        return check(self.to_dict(), self._marks)

    def validate(self) -> Pipeline:
        """This pipeline, when it has no fault; raises PipelineInvalid with all of them otherwise."""
        self.spec()
        return self

    def plan(self) -> Plan:
        """What will happen, party by party, before anything runs. Raises PipelineInvalid."""
        return make_plan(self.spec(), base=self.folder)

    def submit(self, **options: Any) -> Any:
        """Check and run this pipeline; what comes back is what the runtime gives for a job.

        Raises:
            PipelineInvalid: before anything runs.
            MissingExtra: no runtime is there to take it.
        """
        if _submitter is None:
            raise MissingExtra(
                "nothing is here that could run a pipeline",
                hint="`import fate_llm` connects the local runtime; or call pipelines.set_submitter.",
            )
        return _submitter(self.validate(), **options)

    # --- Text -------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The values of the YAML file, as a copy."""
        copied: dict[str, Any] = _plain(self._data, "")
        return copied

    def to_yaml(self) -> str:
        """YAML text; the same pipeline gives the same bytes, keys in the order in which they were given."""
        return dump(self._data)

    @classmethod
    def from_yaml(
        cls,
        source: str | PathLike[str],
        *,
        sets: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
    ) -> Pipeline:
        """Read YAML: a text of several lines, or the path of a file. Only reading faults are raised here.

        Raises:
            PipelineInvalid: the text cannot be read. `validate()` checks what it says.
        """
        if isinstance(source, str) and "\n" in source:
            read, folder = load_text(source, sets, environ), None
        else:
            path = Path(fspath(source))
            read, folder = load_file(path, sets, environ), path.parent
        if read.faults:
            raise PipelineInvalid(read.faults)
        return cls._of(read.data, read.marks, folder)

    @classmethod
    def from_spec(cls, spec: PipelineSpec, *, folder: Path | None = None) -> Pipeline:
        """The builder of a checked pipeline."""
        return cls._of(spec.to_data(), None, folder)

    @classmethod
    def _of(cls, data: dict[str, Any], marks: Marks | None, folder: Path | None) -> Pipeline:
        pipeline = cls.__new__(cls)
        pipeline._adopt(data, marks, folder)
        return pipeline

    def __eq__(self, other: object) -> bool:
        return self._data == other._data if isinstance(other, Pipeline) else NotImplemented

    def __repr__(self) -> str:
        tasks = ", ".join(f"{name} [{component}]" for name, component, _, _ in self._rows())
        parties = self._data.get("parties")
        who = ", ".join(f"{role}={party!r}" for role, party in parties.items()) if isinstance(parties, dict) else ""
        return f"Pipeline({self.name!r}, {who}; tasks: {tasks or 'none yet'})"

    def _repr_html_(self) -> str:
        """A table of the tasks, for notebooks."""
        head = "".join(f"<th>{title}</th>" for title in ("task", "component", "inputs", "params"))
        rows = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in self._rows())
        body = "".join(f"<tr>{cells}</tr>" for cells in rows)
        return f"<p><b>{html.escape(self.name)}</b></p><table><tr>{head}</tr>{body}</table>"

    def _rows(self) -> Iterable[tuple[str, str, str, str]]:
        """Name, component, inputs and params of each task, however odd what was read is."""
        tasks = self._data.get("tasks")
        for name, task in tasks.items() if isinstance(tasks, dict) else ():
            parts = task if isinstance(task, dict) else {}
            inputs, params = parts.get("inputs") or {}, parts.get("params") or {}
            yield str(name), str(parts.get("component", "?")), _line(inputs), _line(params)


def _line(values: Any) -> str:
    if not isinstance(values, dict):
        return str(values)
    return ", ".join(f"{key}: {value}" for key, value in values.items())


def _plain(value: Any, place: str) -> Any:
    """A copy in the values that YAML has: paths become text, tuples lists.

    Raises:
        ConfigurationError: something else, such as an array or a model, was given as a setting.
    """
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (str, PathLike)):
        return str(fspath(value))
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ConfigurationError(f"{place or 'pipeline'}: the key {key!r} is not text", hint="Keys are text.")
        return {str(key): _plain(item, f"{place}.{key}" if place else str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{place}[{index}]") for index, item in enumerate(value)]
    raise ConfigurationError(
        f"{place or 'pipeline'}: a {type(value).__name__} cannot be a setting",
        hint="Settings are text, numbers, true/false, lists and mappings; inputs are outputs of tasks.",
    )
