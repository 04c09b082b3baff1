"""What a party's policy says of a job, rule by rule. Pure: the same job, policy, catalogue and time, the same answer.

Rules:
1. Every rule that speaks of the job is reported, not only the first that refuses; one refusal refuses the job.
2. What the policy does not mention is refused, and the finding names the line to add.
3. Params are judged as each party will see them, overrides merged in: also those of the others in tasks that run here,
   for they decide what this party computes and sends.
4. Cohort and protection come from the signed specification and from the policy; nothing a job says lowers them.
5. Findings are shown to the guest: they name what it asked for, never other partners, data sets or paths of ours.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from fate_llm.pipelines.check import check
from fate_llm.pipelines.schema import PipelineSpec
from fate_llm.pipelines.sums import hiding_tasks
from fate_llm.runtime.service.words import Estimates, Finding

from .catalog import Catalog
from .jobspec import JobSpecification, SignedSpecification
from .policy_schema import ManualRule, Policy
from .policy_tasks import Part, judge_tasks

__all__ = ["MOST_FINDINGS", "Evaluation", "evaluate"]

MOST_FINDINGS = 200
"""As many as a report may carry; what is beyond passes first out of it."""

_TEXT = 1900  # characters of one text of a finding
_DAY = 86400.0


@dataclass(frozen=True, slots=True)
class Evaluation:
    """findings: of every rule. opens: names of the catalogue that the job may open here, and no others.

    not_before: when it may start (seconds since 1970); None when the job is refused.
    """

    findings: tuple[Finding, ...]
    verdict: Literal["accept", "manual", "refuse"]
    opens: tuple[str, ...] = ()
    not_before: float | None = None

    @property
    def refusals(self) -> tuple[Finding, ...]:
        """The findings that refuse."""
        return tuple(one for one in self.findings if one.outcome == "refuse")


def evaluate(
    policy: Policy,
    signed_spec: SignedSpecification,
    me: str,
    catalog: Catalog,
    now: float,
    estimates: Estimates | None = None,
    *,
    known: Collection[str] = (),
    pipeline: PipelineSpec | None = None,
) -> Evaluation:
    """Judge a specification that `jobspec.verify` has let through.

    me: this party. now: seconds since 1970. estimates: what the job would cost here, where that could be told. known:
    initiators of whom a job was accepted here before. pipeline: what `verify` returned, to check it only once.

    Raises:
        PipelineInvalid: the pipeline has faults, which `verify` would have found.
    """
    job = signed_spec.specification
    spec = check(job.pipeline) if pipeline is None else pipeline
    part = Part(policy, spec, me, catalog, job.initiator)
    findings = list(_initiator(policy, job))
    if me not in spec.members:
        findings.append(_refuse("parties", f"{me} takes no part in it", "jobs that name this party"))
    tasks, opens = judge_tasks(part)
    findings += tasks
    findings += _privacy(policy)
    findings += _schedule(policy, job, now)
    findings += _resources(policy, spec, me, estimates)
    findings += _manual(policy, part, job, known, opens)
    verdict: Literal["accept", "manual", "refuse"] = "accept"
    if any(one.outcome == "manual" for one in findings):
        verdict = "manual"
    if any(one.outcome == "refuse" for one in findings):
        verdict = "refuse"
    start = None if verdict == "refuse" else policy.next_start(now)
    return Evaluation(_bounded(findings), verdict, () if verdict == "refuse" else opens, start)


def _initiator(policy: Policy, job: JobSpecification) -> Iterator[Finding]:
    if job.initiator in policy.initiators:
        yield Finding(rule="initiators", outcome="pass", found=job.initiator)
    else:
        yield _refuse("initiators", job.initiator, f"not this one; the policy needs `initiators: [{job.initiator}]`")


def _privacy(policy: Policy) -> Iterator[Finding]:
    found = "no differential privacy"
    if policy.privacy is None:
        yield _refuse("privacy", found, "nothing is said; the policy needs `privacy: {require: none}`")
    elif policy.privacy.require == "none":
        yield Finding(rule="privacy", outcome="pass", found=found, allowed="jobs without it")
    else:
        yield _refuse("privacy", found, "only jobs with differential privacy")


def _schedule(policy: Policy, job: JobSpecification, now: float) -> Iterator[Finding]:
    start = policy.next_start(now)
    if start is None:
        yield _refuse("schedule", "a job", "no time; the policy needs `schedule: always`, or days and hours")
        return
    allowed = str(policy.schedule)
    if start > max(job.expires, now):
        yield _refuse("schedule", f"it expires {(start - job.expires) / 3600:.1f} h before it may start", allowed)
    else:
        wait = f"it starts in {(start - now) / 3600:.1f} h at the earliest" if start > now else "it may start at once"
        yield Finding(rule="schedule", outcome="pass", found=wait, allowed=allowed)


def _resources(policy: Policy, spec: PipelineSpec, me: str, estimates: Estimates | None) -> Iterator[Finding]:
    need, limits = spec.job.need_of(me), policy.resources
    if limits is None:
        text = "nothing; the policy needs `resources: {cpus: 4, memory: 16GiB, gpus: 0, hours: 12}`"
        yield _refuse("resources", f"{need.cpus:g} cpus, {need.gpus} gpus", text)
        return
    hides = bool(hiding_tasks(spec))  # then nobody is told a number that speaks of this party's records
    yield _at_most("resources.cpus", need.cpus, limits.cpus, "cpus")
    yield _at_most("resources.gpus", need.gpus, limits.gpus, "gpus")
    estimated = None if estimates is None else estimates.memory_bytes
    claims = [("the job asks for", need.memory, False), ("it is estimated to take", estimated, hides)]
    for what, size, quiet in claims:
        if size is not None:
            yield _at_most("resources.memory", size, limits.memory, "bytes", what, quiet=quiet)
    if all(size is None for _, size, _ in claims):
        yield Finding(rule="resources.memory", outcome="pass", found="not known", allowed=f"{limits.memory} bytes")
    minutes = None if estimates is None else estimates.minutes
    if minutes is None:
        allowed = f"{limits.hours:g} hours, and it is stopped then"
        yield Finding(rule="resources.hours", outcome="pass", found="not known", allowed=allowed)
    else:
        yield _at_most("resources.hours", minutes / 60, limits.hours, "hours", "it is estimated to take", quiet=hides)


def _at_most(rule: str, found: float, most: float, unit: str, what: str = "", *, quiet: bool = False) -> Finding:
    """quiet: the number itself is not told."""
    fits = found <= most
    shown = f"{what} {found:.12g} {unit}".strip()
    if quiet:
        shown = f"{what} {'no more' if fits else 'more'}"
    return Finding(rule=rule, outcome="pass" if fits else "refuse", found=shown, allowed=f"at most {most:.12g} {unit}")


def _manual(
    policy: Policy, part: Part, job: JobSpecification, known: Collection[str], opens: tuple[str, ...]
) -> Iterator[Finding]:
    """What a person decides."""
    text = "a person at this party decides"
    for rule in policy.manual:
        if rule == "any":
            yield Finding(rule="manual.any", outcome="manual", found=f"a job of {job.initiator}", allowed=text)
        elif rule == "new_initiator":
            new = job.initiator not in known
            found = f"{job.initiator} {'has had no job' if new else 'has had jobs'} accepted here before"
            outcome: Literal["manual", "pass"] = "manual" if new else "pass"
            yield Finding(rule="manual.new_initiator", outcome=outcome, found=found, allowed=text if new else "")
        elif isinstance(rule, ManualRule):
            components = {part.spec.tasks[task].component for task in part.tasks}
            models = {one.text for one in part.named if one.kind == "model"}
            for what, patterns, names in (
                ("initiators", rule.initiators, {job.initiator}),
                ("components", rule.components, components),
                ("data", rule.data, set(opens)),
                ("models", rule.models, models),
            ):
                hit = sorted(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))
                if hit:
                    yield Finding(rule=f"manual.{what}", outcome="manual", found=", ".join(hit)[:_TEXT], allowed=text)


def _refuse(rule: str, found: str, allowed: str) -> Finding:
    return Finding(rule=rule[:_TEXT], outcome="refuse", found=found[:_TEXT], allowed=allowed[:_TEXT])


def _bounded(findings: list[Finding]) -> tuple[Finding, ...]:
    """All, or what weighs most of them, in their order, and how many are left out."""
    if len(findings) <= MOST_FINDINGS:
        return tuple(findings)
    weight = {"refuse": 0, "manual": 1, "pass": 2}
    ranked = sorted(range(len(findings)), key=lambda index: (weight[findings[index].outcome], index))
    kept = sorted(ranked[: MOST_FINDINGS - 1])
    left = [findings[index] for index in ranked[MOST_FINDINGS - 1 :]]
    worst = min((one.outcome for one in left), key=lambda outcome: weight[outcome])
    note = Finding(rule="more", outcome=worst, found=f"{len(left)} more findings are not shown")
    return (*(findings[index] for index in kept), note)
