"""What a protection asks of a pipeline: the same at all parties, enough of them, and somebody who holds its key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fate_llm.core.values import Cohort, Role

from .dialect import Path
from .draft import Draft
from .schema import roles_of_component
from .sums import SumUse, counted, least_contributors

__all__ = ["ProtectionFault", "protection_faults"]

ProtectionFault = tuple[str, Path, str, str, list[str]]
"""Code, path of the task's params, message, hint, and the parties that have it."""


def protection_faults(draft: Draft, task: str, sums: Mapping[str, tuple[SumUse, ...]]) -> Iterator[ProtectionFault]:
    """What is wrong with the sums of a task. sums: by party; the first one's is the usual one."""
    parties = list(sums)
    usual = parties[0]
    for party in parties[1:]:
        yield from _differing(party, sums[party], usual, sums[usual])
    cohort = draft.spec.cohort(task)
    for use in sums[usual]:
        if use.hides_terms:
            yield from _crowd(use, cohort, parties)
            yield from _threshold(use, cohort, parties)
        if use.needs_key_holder:
            yield from _key_holder(draft, task, use, cohort, parties)


def _differing(
    party: str, mine: tuple[SumUse, ...], usual: str, usuals: tuple[SumUse, ...]
) -> Iterator[ProtectionFault]:
    """An override that lets one party protect in another way than the rest: its terms would fit in no sum."""
    others = {use.path: use for use in usuals}
    for use in mine:
        other = others.get(use.path)
        if other is None:
            continue
        if use.name != other.name:
            message = f"{use.name!r} at {party!r}, and {other.name!r} at {usual!r}"
            yield "protection_differs", use.path, message, "the same at every party", [party]
        elif use.params is not None and other.params is not None and use.params != other.params:
            shown = [name for name in type(use.params).model_fields if _value(use, name) != _value(other, name)]
            for name in shown:
                message = f"{name}: {_value(use, name)} at {party!r}, and {_value(other, name)} at {usual!r}"
                place = (*(use.params_path or use.path), name)
                yield "protection_differs", place, message, "the same at every party", [party]


def _value(use: SumUse, name: str) -> object:
    value: object = getattr(use.params, name)
    return value


def _crowd(use: SumUse, cohort: Cohort, parties: list[str]) -> Iterator[ProtectionFault]:
    there, least = len(cohort.contributors), least_contributors(cohort)
    if there < least:
        message = f"{use.name!r} hides a party among others, and there are {there} contributors"
        hint = f"at least {least} contributors"
        if cohort.coordinator_contributes:
            hint += (
                f": {cohort.coordinator}, who adds up, does not count itself; with an arbiter {least - 1} are enough"
            )
        yield "too_few_contributors", use.path, message, hint, parties


def _threshold(use: SumUse, cohort: Cohort, parties: list[str]) -> Iterator[ProtectionFault]:
    threshold = use.threshold(cohort)
    there = counted(cohort)
    if threshold is not None and threshold > there and use.params_path is not None:
        message = f"found {threshold}, but there are {there} contributors that count"
        place = (*use.params_path, "threshold")
        yield "threshold_too_large", place, message, f"at most {there}", parties


def _key_holder(draft: Draft, task: str, use: SumUse, cohort: Cohort, parties: list[str]) -> Iterator[ProtectionFault]:
    holder = draft.spec.parties.key_holder
    if Role.KEY_HOLDER not in roles_of_component(draft.components[task]):
        message = f"{use.name!r} needs a key holder, and {draft.spec.tasks[task].component!r} has no side for one"
        yield "key_holder_missing", use.path, message, "another protection, or another component", parties
    elif holder is None or Role.KEY_HOLDER not in draft.runs[task].get(holder, ()):
        message = f"{use.name!r} needs a party that holds the key, and none takes part"
        hint = "add `key_holder: ...` to `parties`" if holder is None else f"let {holder!r} take part as key_holder"
        yield "key_holder_missing", use.path, message, hint, parties
    elif holder == cohort.coordinator:
        message = f"{holder!r} holds the key and adds up: it could open every party's term"
        yield "key_holder_unfit", use.path, message, "two different parties", parties
    elif holder in cohort.contributors and not use.shared_key:
        message = f"{holder!r} holds the key and contributes: it could open the others' terms on their way"
        hint = "a party without data, or `protection_params: {shared_key: true}` if every party agrees"
        yield "key_holder_unfit", use.path, message, hint, parties
