"""What a party allows (`policy.yaml`), as its people write it. What is not written is refused.

`policy.evaluate` says what the rules make of a job. A party's policy is a floor: no message and no pipeline lowers it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, StringConstraints, Tag, field_validator, model_validator

from fate_llm.core import plugins
from fate_llm.core.canonical import digest
from fate_llm.core.errors import FateError
from fate_llm.core.names import nearest
from fate_llm.core.values import SumFloor
from fate_llm.pipelines.faults import Faults, field_names, leaves
from fate_llm.pipelines.schema import Listed, Name, Size, Version, load_component
from fate_llm.runtime.aggregates import only_aggregates
from fate_llm.runtime.service.words import Line

from .documents import Strict, checked, make_document, parse_document, refusal
from .schedule import Schedule

__all__ = [
    "PROTECTIONS",
    "Bound",
    "ComponentRule",
    "DataRule",
    "Limits",
    "ManualRule",
    "Policy",
    "Privacy",
    "Protection",
    "Retention",
    "Show",
    "load_policy",
    "make_policy",
]

PROTECTIONS = ("plain", "ckks", "secagg")
"""From the weakest on: under `ckks` a coordinator that lies about what it adds is not found out, and the key holder
with it opens everything. A sum that is not among them counts as plain, whatever it promises.
"""

_HINT = "`fate_llm party init` writes one that refuses everything; docs/how-to/write-a-policy.md shows the rest."
_PROGRESS = {
    "party_failed",
    "party_finished",
    "retry",
    "round",
    "round_closed",
    "round_state",
    "task_finished",
    "task_started",
}
_PROGRESS_FIELDS = {"attempt", "code", "component", "round", "rounds"}

# The tags are no possible keys, so that a fault's path cannot mistake one for a key of the file.
_WORD, _MORE = "<word>", "<more>"


def _form(value: Any) -> str:
    return _WORD if isinstance(value, str) else _MORE


Pattern = Annotated[str, StringConstraints(min_length=1, max_length=300)]
Scalar = str | int | float | bool | None


class Bound(Strict):
    """What one param may be; all that is given has to hold."""

    min: float | None = Field(None, description="Least number.")
    max: float | None = Field(None, description="Largest number.")
    one_of: Listed[Scalar] | None = Field(None, min_length=1, description="These values.")
    pattern: str | None = Field(None, description="A regular expression that the whole text fits.")
    optional: bool = Field(False, description="It may also be left out or null; without this it has to be given.")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, text: str | None) -> str | None:
        try:
            re.compile(text or "")
        except re.error as error:
            raise ValueError(f"no regular expression: {error}") from None
        return text

    @model_validator(mode="after")
    def _says_something(self) -> Bound:
        if self.min is None and self.max is None and self.one_of is None and self.pattern is None:
            raise ValueError("a bound has at least one of min, max, one_of, pattern")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is more than max {self.max:g}: nothing fits")
        return self

    def fault(self, value: Any) -> str | None:
        """Why a value does not fit, None when it does."""
        if value is None:
            return None if self.optional or (self.one_of is not None and None in self.one_of) else "it is not given"
        if self.min is not None or self.max is not None:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                return "it is no number"
            if not (self.min is None or value >= self.min) or not (self.max is None or value <= self.max):
                return "it is outside"
        if self.one_of is not None and not any(_same(value, valid) for valid in self.one_of):
            return "it is none of them"
        if self.pattern is not None and not (isinstance(value, str) and re.fullmatch(self.pattern, value)):
            return "it does not fit"
        return None

    def __str__(self) -> str:
        parts = [f"at least {self.min:g}"] if self.min is not None else []
        parts += [f"at most {self.max:g}"] if self.max is not None else []
        parts += [f"one of {', '.join(map(str, self.one_of))}"] if self.one_of is not None else []
        parts += [f"matching {self.pattern}"] if self.pattern is not None else []
        return ", ".join(parts) + (", or not given" if self.optional else "")


def _same(value: Any, valid: Any) -> bool:
    """Equal, and true is not 1."""
    return isinstance(value, bool) == isinstance(valid, bool) and bool(value == valid)


class ComponentRule(Strict):
    """A component that may run here."""

    params: dict[str, Bound] = Field(
        default_factory=dict, description="Bounds by dotted param: `peft.r`; `hooks.name` is of every hook of the list."
    )


class DataRule(Strict):
    """Who may use a data set."""

    initiators: Listed[Name] | None = Field(None, description="Only jobs of these; of all allowed ones when not given.")
    components: Listed[Name] | None = Field(
        None, description="Only these may read it or what is made of it; all allowed ones when not given."
    )


class Protection(Strict):
    """How updates of this party are hidden, at least."""

    least: Literal["plain", "ckks", "secagg"] = Field(description="The weakest protection that is enough.")
    contributors: int = Field(
        ge=1,
        description="Least number of contributors in every sum; a job's quorum may not be below it. 2 tells the other "
        "one this party's own values, however the sum is protected.",
    )
    threshold: int | None = Field(
        None,
        ge=1,
        description="Least number of parties together with whom the coordinator could open one party's values, of sums "
        "that have such a number; of n contributors more than 2n/3 when not given.",
    )
    clip: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Largest bound on the size of a value, of sums that have such a bound; any when not given.",
    )


class Privacy(Strict):
    """Differential privacy."""

    require: Literal["none", "differential_privacy"] = Field(description="`none`: jobs without it may run.")
    epsilon_budget: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="Most epsilon that jobs may spend, by data set. Today no job spends any."
    )


class Limits(Strict):
    """What one job may take of this party's machine."""

    cpus: float = Field(gt=0, description="Processor cores.")
    memory: Size = Field(description="Bytes, such as 16GiB.")
    gpus: int = Field(0, ge=0, description="GPUs.")
    hours: float = Field(
        gt=0, le=8760, description="Hours that it may take; one that is still running then is stopped."
    )


class Show(Strict):
    """What of this party's events the guest may see. Nothing that is not named here."""

    logs: Annotated[
        Annotated[Literal["all", "none"], Tag(_WORD)] | Annotated[Listed[str], Tag(_MORE)], Discriminator(_form)
    ] = Field("none", description="Kinds of events with all of their fields.")
    losses: bool = Field(
        False, description="Losses of this party's own records; never of a job with a sum that hides them."
    )
    progress: bool = Field(False, description="Which task runs and which round it is in.")

    def visible(self, line: Line, *, hiding: Collection[str] = ()) -> Line | None:
        """What the guest sees of an event, None for nothing.

        hiding: tasks of the job whose sums hide terms; then nothing of this party's own numbers, whatever is said here.
        """
        kept = only_aggregates(line.event, line.task, line.fields, hiding)
        if kept is None:
            return None
        line = line.model_copy(update={"fields": kept})
        losses = {key for key in line.fields if "loss" in key.lower() or "perplexity" in key.lower()}
        if self.logs == "all" or (self.logs != "none" and line.event in self.logs):
            shown = line.fields.keys() - (set() if self.losses else losses)
        elif self.progress and line.event in _PROGRESS:
            shown = (line.fields.keys() & _PROGRESS_FIELDS) | (losses if self.losses else set())
        elif self.losses and losses:
            shown = losses | (line.fields.keys() & {"round"})
        else:
            return None
        return line.model_copy(update={"fields": {key: line.fields[key] for key in line.fields if key in shown}})


class ManualRule(Strict):
    """A person decides on jobs of these initiators, or with these components, data sets or models; patterns."""

    initiators: Listed[Pattern] = Field((), description="Jobs that one of these starts.")
    components: Listed[Pattern] = Field((), description="Jobs that run one of these here.")
    data: Listed[Pattern] = Field((), description="Jobs that open one of these names of the catalogue.")
    models: Listed[Pattern] = Field((), description="Jobs with one of these models, written as under `models`.")

    @model_validator(mode="after")
    def _names_something(self) -> ManualRule:
        if not (self.initiators or self.components or self.data or self.models):
            raise ValueError("a rule has at least one of initiators, components, data, models")
        return self


class Retention(Strict):
    """How long what a job leaves behind is kept."""

    days: int = Field(ge=1, le=36_500, description="Days after a job's end until its folder and events are removed.")


class Policy(Strict):
    """A party's rules; a section that is not there refuses what it speaks of."""

    version: Version = Field(description="Version of this file's language.")
    initiators: Listed[Name] = Field((), description="Who may start jobs here, this party itself included.")
    components: dict[Name, ComponentRule] = Field(
        default_factory=dict, description="What may run, within which bounds."
    )
    models: Listed[Annotated[str, StringConstraints(pattern=r"^(package|hub|catalog):.+$")]] = Field(
        (), description="Patterns such as package:llm_*, hub:org/name@*, catalog:*."
    )
    data: dict[Pattern, DataRule] = Field(
        default_factory=dict, description="Names of the catalogue, or patterns of them, and who may use them."
    )
    protection: Protection | None = Field(None, description="How updates are hidden, at least.")
    privacy: Privacy | None = Field(None, description="Whether jobs need differential privacy.")
    schedule: (
        Annotated[
            Annotated[Literal["always"], Tag(_WORD)] | Annotated[Schedule, Tag(_MORE)],
            Discriminator(_form),
        ]
        | None
    ) = Field(None, description="When jobs may start: `always`, or days and hours.")
    resources: Limits | None = Field(None, description="What one job may take.")
    show: Show = Field(Show(), description="What others see of a job here.")
    manual: Listed[
        Annotated[
            Annotated[Literal["any", "new_initiator"], Tag(_WORD)] | Annotated[ManualRule, Tag(_MORE)],
            Discriminator(_form),
        ]
    ] = Field(("any",), description="What a person decides: `any` job, one of a `new_initiator`, or by patterns.")
    retention: Retention | None = Field(None, description="How long jobs are kept; for ever when not given.")

    @property
    def sum_floor(self) -> SumFloor:
        """What it asks of sums that hide terms."""
        if self.protection is None:
            return SumFloor()
        return SumFloor(self.protection.contributors, self.protection.threshold, self.protection.clip)

    @property
    def digest(self) -> str:
        """SHA-256 (64 hex digits) of what the policy says, however it is written."""
        return digest(self.model_dump(mode="json"))

    def next_start(self, now: float) -> float | None:
        """When a job may start, from `now` on (seconds since 1970); None for never."""
        if isinstance(self.schedule, Schedule):
            return self.schedule.next_start(now)
        return now if self.schedule == "always" else None


def load_policy(path: Path) -> Policy:
    """Read a policy.

    Raises:
        ConfigurationError: it cannot be read, or is wrong; all faults at once, each with file and line.
    """
    source = parse_document(path, "the policy", hint=_HINT)
    policy = checked(source, Policy, f"the policy {path}")
    faults = Faults(source.marks)
    _check_components(policy, faults)
    if faults.found:
        raise refusal(faults.merge(()), f"the policy {path}")
    return policy


def make_policy(data: Mapping[str, Any]) -> Policy:
    """A policy from plain values.

    Raises:
        ConfigurationError: all that is wrong with them.
    """
    policy = make_document(data, Policy, "the policy")
    faults = Faults({})
    _check_components(policy, faults)
    if faults.found:
        raise refusal(faults.merge(()), "the policy")
    return policy


def _check_components(policy: Policy, faults: Faults) -> None:
    """Components exist here and have the params that are bounded: a bound with a slip would bound nothing."""
    known = plugins.names("component")
    for name, rule in policy.components.items():
        where = ("components", name)
        if name not in known:
            faults.add("unknown_component", where, f"no component is called {name!r}", nearest(name, known))
            continue
        try:
            params = load_component(name).Params
        except FateError as error:
            faults.add("plugin_unavailable", where, error.message, error.hint)
            continue
        for dotted in rule.params:
            steps = dotted.split(".")
            for size in range(len(steps)):
                valid = _keys(params, steps[:size])
                if valid is not None and steps[size] not in valid:
                    what = f"{name} has no param {'.'.join(steps[: size + 1])!r}"
                    faults.add("unknown_key", (*where, "params", dotted), what, nearest(steps[size], valid))
                    break


def _keys(model: Any, steps: list[str]) -> set[str] | None:
    """Keys below a path of params, through lists; None where any key may be."""
    kinds = leaves(model)
    for step in steps:
        kinds = [leaf for kind in _items(kinds) for leaf in _below(kind, step)]
        if not kinds:
            return None
    items = _items(kinds)
    if not all(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in items if kind is not type(None)):
        return None if any(kind in (dict, Any) or hasattr(kind, "__args__") for kind in items) else set()
    return {name for kind in items for name in field_names(kind, ())}


def _items(kinds: list[Any]) -> list[Any]:
    """What is in lists stands for them."""
    found: list[Any] = []
    for kind in kinds:
        arguments = [one for one in getattr(kind, "__args__", ()) if one is not Ellipsis]
        is_list = getattr(kind, "__origin__", None) in (list, tuple, set, frozenset)
        found += _items([leaf for one in arguments[:1] for leaf in leaves(one)]) if is_list else [kind]
    return found


def _below(kind: Any, step: str) -> list[Any]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        fields = kind.model_fields.items()
        return [leaf for name, info in fields if step in {name, info.alias} for leaf in leaves(info.annotation)]
    return []
