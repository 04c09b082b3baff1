"""What a policy says of the tasks of a job that run at this party: components, bounds, models, data, protection."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from fate_llm.core.interfaces import Component
from fate_llm.core.values import ArtifactKind, Cohort, Role, SumFloor
from fate_llm.pipelines.dialect import Path, dotted
from fate_llm.pipelines.graph import waits_for
from fate_llm.pipelines.resources import CATALOG, Resource, resources_of
from fate_llm.pipelines.schema import Folder, PipelineSpec, sources_of
from fate_llm.pipelines.sums import SumUse, counted, sums_of, usual_threshold
from fate_llm.runtime.service.words import Finding

from .catalog import Catalog
from .policy_schema import PROTECTIONS, Bound, ComponentRule, DataRule, Policy

__all__ = ["Named", "Part", "judge_tasks"]

_TEXT = 1900  # characters of one text of a finding
_OPENERS = {Role.GUEST, Role.HOST}


@dataclass(frozen=True, slots=True)
class Named:
    """A resource that a task names at this party. place: of the param or input, for people."""

    task: str
    place: str
    kind: str
    text: str

    @property
    def name(self) -> str | None:
        """The name in the catalogue, None for anything else."""
        return self.text.removeprefix(CATALOG) if self.text.startswith(CATALOG) else None


@dataclass(frozen=True)
class Part:
    """A party's part of a job, under its policy."""

    policy: Policy
    spec: PipelineSpec
    me: str
    catalog: Catalog
    initiator: str

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that run here, in the pipeline's order."""
        return tuple(task for task in self.spec.tasks if self.spec.roles_at(self.me, task))

    @cached_property
    def components(self) -> Mapping[str, Component]:
        return {task: self.spec.component(task) for task in self.tasks}

    def params(self, party: str, task: str) -> Any:
        """A party's validated params."""
        return self.components[task].Params.model_validate(self.spec.params_for(party, task))

    @cached_property
    def named(self) -> tuple[Named, ...]:
        """Everything outside the job that its tasks name here, each once."""
        return tuple(dict.fromkeys(one for task in self.tasks for one in self._named(task)))

    def _named(self, task: str) -> Iterator[Named]:
        for one in resources_of(self.params(self.me, task)):
            yield Named(task, dotted(("params", *one.path)), self._kind(one), one.text)
        ports = self.components[task].inputs
        for port, value in self.spec.inputs_for(self.me, task).items():
            for source in sources_of(value):
                if isinstance(source, Folder):
                    text = source.path if source.path.startswith(CATALOG) else f"path:{source.path}"
                    is_model = port in ports and ports[port].kind is ArtifactKind.MODEL
                    yield Named(task, f"inputs.{port}", "model" if is_model else "data", text)

    def _kind(self, resource: Resource) -> str:
        """What a mark says; without one, what the catalogue says, and data where it says nothing."""
        if resource.kind:
            return resource.kind
        entry = self.catalog.entries.get(resource.name or "")
        return "model" if entry is not None and entry.kind == "model" else "data"

    def opens_data(self, task: str) -> bool:
        """Whether it runs here as guest or host; an arbiter's or key holder's side opens no data set."""
        return bool(_OPENERS.intersection(self.spec.roles_at(self.me, task)))

    def readers(self, task: str) -> set[str]:
        """Components that get to see what the task reads: its own, and those of all that come after it here."""
        edges, found = waits_for(self.spec), {task}
        grown = True
        while grown:
            more = {name for name in self.tasks if name not in found and found.intersection(edges[name])}
            found |= more
            grown = bool(more)
        return {self.spec.tasks[name].component for name in found}


def judge_tasks(part: Part) -> tuple[list[Finding], tuple[str, ...]]:
    """Findings of all tasks that run here, and the names of the catalogue that may be opened."""
    findings = list(_components(part))
    opens: dict[str, None] = {}
    for one in part.named:
        finding = _resource(part, one)
        findings.append(finding)
        if finding.outcome == "pass" and one.name is not None and part.opens_data(one.task):
            opens[one.name] = None
    findings += _protections(part)
    return findings, tuple(opens)


# --- Components and their params -----------------------------------------------------------------------------------


def _components(part: Part) -> Iterator[Finding]:
    for task in part.tasks:
        name = part.spec.tasks[task].component
        rule = part.policy.components.get(name)
        if rule is None:
            text = f"not this one; the policy needs `components: {{{name}: {{}}}}`"
            yield Finding(rule=f"components.{task}", outcome="refuse", found=name, allowed=text)
            continue
        yield Finding(rule=f"components.{task}", outcome="pass", found=name)
        yield from _bounds(part, task, rule)


def _bounds(part: Part, task: str, rule: ComponentRule) -> Iterator[Finding]:
    """One finding for each bound: the values of all parties that run the task, ours first."""
    parties = sorted(part.spec.parties_of(task), key=lambda party: party != part.me)
    params = {party: part.params(party, task) for party in parties}
    dumped = {party: found.model_dump() for party, found in params.items()}
    foreign = {one.path for found in params.values() for one in resources_of(found)}
    for path, bound in rule.params.items():
        yield _bound(f"params.{task}.{path}", path.split("."), bound, dumped, part.me, foreign)


def _bound(
    rule: str, steps: list[str], bound: Bound, values: Mapping[str, Any], me: str, resources: set[Path]
) -> Finding:
    shown: list[str] = []
    for party, params in values.items():
        for path, value in _values(params, steps, ()):
            if party != me and path in resources:
                continue  # another party's own data or model
            text = f"{_short(value)}" + ("" if party == me else f" at {party}")
            if (fault := bound.fault(value)) is not None:
                found = f"{dotted(path)} = {text}: {fault}"
                return Finding(rule=rule, outcome="refuse", found=found[:_TEXT], allowed=str(bound)[:_TEXT])
            shown.append(_short(value))
    found = ", ".join(dict.fromkeys(shown)) or "none"
    return Finding(rule=rule, outcome="pass", found=found[:_TEXT], allowed=str(bound)[:_TEXT])


def _values(value: Any, steps: list[str], path: Path) -> Iterator[tuple[Path, Any]]:
    """Every value at a dotted path; lists are gone through. What is not there is None."""
    if isinstance(value, (list, tuple, set, frozenset)):
        for index, item in enumerate(value):
            yield from _values(item, steps, (*path, index))
    elif not steps:
        yield path, value
    elif isinstance(value, Mapping):
        yield from _values(value.get(steps[0]), steps[1:], (*path, steps[0]))
    else:
        yield (*path, *steps), None


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 100 else text[:97] + "..."


# --- Models and data -----------------------------------------------------------------------------------------------


def _resource(part: Part, one: Named) -> Finding:
    rule = f"{'models' if one.kind == 'model' else 'data'}.{one.task}.{one.place}"[:_TEXT]
    if one.text.startswith("path:"):
        text = f"no file of this party; name it in the catalogue, and say {CATALOG}NAME"
        return Finding(rule=rule, outcome="refuse", found="a path"[:_TEXT], allowed=text)
    if one.name is not None and not part.opens_data(one.task):
        found = f"{one.text}, which this party's role does not open"[:_TEXT]
        return Finding(rule=rule, outcome="pass", found=found)
    return _model(part, one, rule) if one.kind == "model" else _data(part, one, rule)


def _model(part: Part, one: Named, rule: str) -> Finding:
    allowed = any(fnmatchcase(one.text, pattern) for pattern in part.policy.models)
    if one.name is not None:
        entry = part.catalog.entries.get(one.name)
        allowed = allowed and entry is not None and entry.kind == "model"
    if allowed:
        return Finding(rule=rule, outcome="pass", found=one.text[:_TEXT])
    what = f"not this one; the policy needs `models: [{one.text[:300]!r}]`"
    also = ", and the catalogue the model" if one.name is not None else ""
    return Finding(rule=rule, outcome="refuse", found=one.text[:_TEXT], allowed=what + also)


def _data(part: Part, one: Named, rule: str) -> Finding:
    """A data set of the catalogue. What is not there and what is not allowed look the same to the guest."""
    name = one.name or ""
    entry = part.catalog.entries.get(name)
    users = part.readers(one.task)
    rules = [use for pattern, use in part.policy.data.items() if fnmatchcase(name, pattern)]
    if one.name and entry is not None and entry.kind == "dataset" and any(_may(use, part, users) for use in rules):
        return Finding(rule=rule, outcome="pass", found=one.text[:_TEXT])
    text = (
        f"not open to {', '.join(sorted(users))} of {part.initiator}; "
        f"it needs `data: {{{name[:300]}: {{}}}}` in the policy, and an entry in the catalogue"
    )
    return Finding(rule=rule, outcome="refuse", found=one.text[:_TEXT], allowed=text[:_TEXT])


def _may(use: DataRule, part: Part, users: set[str]) -> bool:
    initiator = use.initiators is None or part.initiator in use.initiators
    return initiator and (use.components is None or users <= set(use.components))


# --- Protection ----------------------------------------------------------------------------------------------------


def _protections(part: Part) -> Iterator[Finding]:
    """Of every sum that this party takes part in with somebody else."""
    for task in part.tasks:
        cohort = part.spec.cohort(task)
        uses = [
            use
            for party in part.spec.parties_of(task)
            for use in sums_of(part.components[task].Params, part.spec.params_for(party, task))
        ]
        sums = {use.name for use in uses}
        if not sums or len(cohort.members) < 2:
            continue
        least = part.policy.protection
        found = f"{', '.join(sorted(sums))}; at least {cohort.quorum} of {len(cohort.contributors)} contributors"
        if least is None:
            text = "nothing; the policy needs `protection: {least: plain, contributors: 2}`"
            yield Finding(rule=f"protection.{task}", outcome="refuse", found=found, allowed=text)
            continue
        strong = min(_rank(name) for name in sums) >= _rank(least.least)
        many = cohort.quorum >= least.contributors
        allowed = f"{least.least} or stronger; at least {least.contributors} contributors"
        outcome = "pass" if strong and many else "refuse"
        yield Finding.model_validate(
            {"rule": f"protection.{task}", "outcome": outcome, "found": found, "allowed": allowed}
        )
        yield from _hidden(task, [use for use in uses if use.hides_terms], cohort, part.policy.sum_floor)


def _hidden(task: str, uses: list[SumUse], cohort: Cohort, floor: SumFloor) -> Iterator[Finding]:
    """Of sums that hide terms: who counts in them, their threshold, their clip; of all parties the worst."""
    if not uses:
        return
    count = counted(cohort)
    text = f"{count} contributors that count" + (", who adds up does not" if cohort.coordinator_contributes else "")
    yield _limit(f"protection.{task}.contributors", count >= floor.contributors, text, f"at least {floor.contributors}")
    thresholds = [threshold for use in uses if (threshold := use.threshold(cohort)) is not None]
    if thresholds:
        least = usual_threshold(count) if floor.threshold is None else floor.threshold
        found = min(thresholds)
        yield _limit(f"protection.{task}.threshold", found >= least, f"{found} of {count}", f"at least {least}")
    clips = [clip for use in uses if (clip := use.clip) is not None]
    if clips and floor.clip is not None:
        yield _limit(f"protection.{task}.clip", max(clips) <= floor.clip, f"{max(clips):g}", f"at most {floor.clip:g}")


def _limit(rule: str, fits: bool, found: str, allowed: str) -> Finding:
    return Finding(rule=rule[:_TEXT], outcome="pass" if fits else "refuse", found=found, allowed=allowed)


def _rank(name: str) -> int:
    return PROTECTIONS.index(name) if name in PROTECTIONS else 0
