"""What a worker is told on its first line, and what a job would cost this party."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fate_llm.core.canonical import digest
from fate_llm.core.errors import FateError
from fate_llm.core.values import SumFloor
from fate_llm.pipelines import check, make_plan
from fate_llm.pipelines.schema import PipelineSpec
from fate_llm.security.identity import Identity

from ..trust.jobspec import SignedSpecification
from .words import Estimates

__all__ = ["estimate", "fingerprint", "localised", "worker_order"]

_CATALOG = "catalog:"
_SILENCE = 900.0  # seconds without a sign of life on a link, at least


def worker_order(
    signed: SignedSpecification,
    *,
    party: str,
    identity: Identity,
    attempt: int,
    folder: Path,
    broker: str,
    finished: Mapping[str, Mapping[str, str]],
    catalog: Mapping[str, str],
    lost_after: float,
    floor: str,
    sum_floor: SumFloor,
    audit: Mapping[str, str],
) -> dict[str, Any]:
    """The order of a durable worker. It holds this party's secret key and its password: it goes through a pipe only.

    folder: the job's. lost_after: seconds without a sign of life after which a party is given up. finished: outputs,
    by task, of what is not run again. floor: the weakest protection that a sum may have. sum_floor: what the policy
    asks of sums that hide terms.
    """
    members = signed.specification.members
    silence = max(_SILENCE, 2 * lost_after)  # the services notice sooner, and say so
    return {
        "job": signed.specification.job,
        "attempt": attempt,
        "party": party,
        "pipeline": signed.specification.pipeline,
        "base": str(folder),
        "folder": str(folder),
        "slot": str(folder / "machine.lock"),
        "broker": broker,
        "identity": identity.to_bytes().hex(),
        "roster": {name: member.identity for name, member in members.items()},
        "finished": {task: dict(outputs) for task, outputs in finished.items()},
        "timing": {"meet": silence, "silence": silence},
        "outage": silence,
        "durable": True,
        "orphan": "exit",
        "catalog": dict(catalog),
        "floor": floor,
        "sum_floor": asdict(sum_floor),
        "audit": dict(audit),
    }


def fingerprint(spec: PipelineSpec, party: str, task: str) -> str:
    """What a task's duration goes by: its component and its params at this party."""
    return digest({"component": spec.tasks[task].component, "params": spec.params_for(party, task)})


def localised(spec: PipelineSpec, catalog: Mapping[str, str]) -> PipelineSpec:
    """The pipeline with this party's paths in the place of the names in its catalogue; others' names stay."""
    return check(_replaced(spec.to_data(), catalog))


def _replaced(value: Any, catalog: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(item, catalog) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, catalog) for item in value]
    if isinstance(value, str) and value.startswith(_CATALOG):
        return catalog.get(value.removeprefix(_CATALOG), value)
    return value


def estimate(
    spec: PipelineSpec, party: str, catalog: Mapping[str, str], seconds: Callable[[str], float | None], base: Path
) -> Estimates:
    """What the job would cost this party. seconds: how long a task of a fingerprint took here the last time."""
    try:
        plan = make_plan(localised(spec, catalog), base=base)
    except FateError:  # a model that is not here yet: what the job costs cannot be told, which is no reason to refuse
        return Estimates()
    totals = next(found for found in plan.parties if found.party == party)
    took = [seconds(fingerprint(spec, party, task)) for task in totals.tasks]
    known = [one for one in took if one is not None]
    return Estimates(
        sent_bytes=totals.bytes_sent,
        received_bytes=totals.bytes_received,
        memory_bytes=totals.memory_bytes,
        minutes=round(sum(known) / 60, 2) if len(known) == len(took) and took else None,
    )
