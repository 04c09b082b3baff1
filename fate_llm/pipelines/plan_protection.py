"""What a protection that hides terms means for the parties of one task, told before anything runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fate_llm.core.interfaces import Component
from fate_llm.core.values import Cohort

from .schema import PipelineSpec
from .sums import SumUse, counted, sums_of

__all__ = ["ProtectionPlan", "protections_of"]


@dataclass(frozen=True, slots=True)
class ProtectionPlan:
    """One sum of a task that hides its terms.

    learns: by role, what it sees and what it does not. counted: contributors, but for one that adds up. threshold: how
    many of them must stay to the end, None where the protection has no such number. clip: the largest size of a value.
    shared_key: the key holder contributes. retries: of the job.
    """

    name: str
    learns: Mapping[str, str]
    cohort: Cohort
    counted: int
    threshold: int | None
    clip: float | None
    key_holder: str | None
    shared_key: bool
    retries: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "protection": self.name,
            "learns": dict(self.learns),
            "counted": self.counted,
            "threshold": self.threshold,
            "clip": self.clip,
            "key_holder": self.key_holder,
            "shared_key": self.shared_key,
            "notes": list(self.notes()),
        }

    def lines(self) -> Iterator[str]:
        """For people."""
        who = {
            "coordinator": self.cohort.coordinator,
            "key_holder": self.key_holder or "",
            "contributors": ", ".join(self.cohort.contributors),
        }
        for role, text in self.learns.items():
            shown = f"{role.replace('_', ' ')} {who[role]}" if who.get(role) else role.replace("_", " ")
            yield f"{shown}: {text}"
        yield from self.notes()

    def notes(self) -> Iterator[str]:
        """What limits it, a sentence each."""
        if self.threshold is not None:
            beside = ", the one that adds up not counted" if self.cohort.coordinator_contributes else ""
            yield (
                f"threshold: {self.threshold} of {self.counted} contributors must stay to the end of a round{beside}; "
                "with fewer the round is refused and nothing is opened"
            )
        if self.clip is not None:
            yield f"values of an update are cut to {self.clip:g} in size; the result comes with a bound on its error"
        if self.shared_key and self.key_holder in self.cohort.contributors:
            yield (
                f"SHARED KEY: {self.key_holder} holds the key and contributes; whatever it sees of the others' uploads "
                "it can open"
            )
        if self.retries:
            yield (
                "a round that was answered is not repeated by a retry: where one party had answered and the job is "
                "tried again, the task fails for good"
            )


def protections_of(spec: PipelineSpec, task: str, component: Component, cohort: Cohort) -> tuple[ProtectionPlan, ...]:
    """The sums of a task that hide their terms; none where a party is alone."""
    if len(cohort.members) < 2:
        return ()
    uses = sums_of(component.Params, spec.params_for(cohort.coordinator, task))
    return tuple(_plan(spec, use, cohort) for use in uses if use.hides_terms)


def _plan(spec: PipelineSpec, use: SumUse, cohort: Cohort) -> ProtectionPlan:
    return ProtectionPlan(
        use.name,
        use.plugin.learns,
        cohort,
        counted(cohort),
        use.threshold(cohort),
        use.clip,
        spec.parties.key_holder if use.needs_key_holder else None,
        use.shared_key,
        spec.job.retries,
    )
