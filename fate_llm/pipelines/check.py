"""Every fault of a pipeline at once, and the pipeline when it has none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

from fate_llm.core.errors import Fault, PipelineInvalid
from fate_llm.core.names import nearest

from .dialect import Marks, Path
from .draft import Draft, draft_of
from .faults import CODES, Faults
from .loader import load_file
from .parameters import check_parameters
from .schema import PipelineSpec, roles_of_component
from .shape import shaped
from .wiring import check_wiring

__all__ = ["CODES", "check", "load_pipeline"]


def check(raw: Any, marks: Marks | None = None, *, earlier: Iterable[Fault] = ()) -> PipelineSpec:
    """The pipeline in `raw`, checked. marks: where each value is written. earlier: faults of the reading.

    Raises:
        PipelineInvalid: with every fault that can be told without running anything.
    """
    faults = Faults(marks or {})
    earlier = tuple(earlier)
    spec: PipelineSpec | None = None
    if not isinstance(raw, Mapping):
        faults.add("not_a_pipeline", (), "the pipeline is no mapping of keys to values", "start with `version: 1`")
    elif raw or not earlier:
        spec = _examine(raw, faults)
    if faults.found or earlier or spec is None:
        raise PipelineInvalid(faults.merge(earlier))
    return spec


def load_pipeline(
    path: str | FilePath, sets: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> PipelineSpec:
    """Read and check a pipeline file. sets: `key=value` overrides. environ: for variables that `env` lists.

    Raises:
        PipelineInvalid: with every fault, each with file and line.
    """
    source = load_file(FilePath(path), sets, environ)
    return check(source.data, source.marks, earlier=source.faults)


def _examine(raw: Mapping[str, Any], faults: Faults) -> PipelineSpec | None:
    spec = shaped(raw, faults)
    if spec is None:
        return None
    _check_parties(spec, faults)
    draft = draft_of(raw, spec, faults)
    _check_participants(draft)
    _check_overrides(draft)
    check_wiring(draft)
    check_parameters(draft)
    return spec


def _check_parties(spec: PipelineSpec, faults: Faults) -> None:
    """Nobody contributes twice, the quorum can be met, and room is asked for at parties that are there."""
    seen = {spec.parties.guest: "the guest"}
    for index, host in enumerate(spec.parties.hosts):
        if host in seen:
            message = f"{host!r} is listed twice, it is also {seen[host]}"
            faults.add("duplicate_party", ("parties", "hosts", index), message, "a party contributes once")
        seen.setdefault(host, "a host")
    owners, quorum = len(spec.roster.data_owners), spec.job.quorum
    if quorum is not None and quorum > owners:
        message = f"found {quorum}, but there are {owners} contributors"
        faults.add("quorum_too_large", ("job", "quorum"), message, f"at most {owners}")
    for party in spec.job.resources.at:
        if party not in spec.members:
            hint = nearest(party, spec.members)
            faults.add("unknown_party", ("job", "resources", "at", party), f"no party is called {party!r}", hint)


def _check_participants(draft: Draft) -> None:
    """Roles and parties that tasks name exist, and somebody takes part."""
    members = draft.spec.members
    for name, task in draft.spec.tasks.items():
        here: Path = ("tasks", name)
        faulty = False
        has = roles_of_component(draft.components[name])
        for index, role in enumerate(task.roles or ()):
            if role not in has:
                faulty = True
                hint = f"it has {', '.join(sorted(r.value for r in has))}"
                message = f"{task.component} has no side for {role.value!r}"
                draft.faults.add("role_not_supported", (*here, "roles", index), message, hint)
        listed = task.parties or ()
        for index, party in enumerate(listed):
            if party not in members:
                faulty = True
                _unknown_party(draft, (*here, "parties", index), party)
            elif party in listed[:index]:
                place = (*here, "parties", index)
                draft.faults.add("duplicate_party", place, f"{party!r} is listed twice", "once is enough")
        if not draft.runs[name] and not faulty:
            hint = "look at the task's `roles` and `parties`, and at the roles the component has"
            draft.faults.add("task_runs_nowhere", here, "no party takes part", hint)


def _unknown_party(draft: Draft, path: Path, party: str) -> None:
    draft.faults.add("unknown_party", path, f"no party is called {party!r}", nearest(party, draft.spec.members))


def _check_overrides(draft: Draft) -> None:
    """Overrides are for parties and tasks that exist, and for parties that run the task."""
    written = draft.raw.get("tasks")
    tasks = list(written) if isinstance(written, Mapping) else []
    for party, overrides in draft.spec.overrides.items():
        if party not in draft.spec.members:
            _unknown_party(draft, ("overrides", party), party)
        for name in overrides:
            path = ("overrides", party, name)
            if name not in draft.spec.tasks:
                if name not in tasks:
                    message = f"no task is called {name!r}"
                    draft.faults.add("unknown_task", path, message, nearest(name, tasks))
            elif party in draft.spec.members and party not in draft.runs[name]:
                hint = f"it runs at {', '.join(draft.runs[name]) or 'no party'}"
                draft.faults.add("override_unused", path, f"{party!r} does not run {name!r}", hint)
