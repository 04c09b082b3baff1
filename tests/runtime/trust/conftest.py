"""A federation of three with a signed job, on the toy components and the real reader."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import Field

from fate_llm.core import plugins
from fate_llm.core.interfaces import Estimate, Frozen, HookStage, Keep, PlanView, Port, PredictRule
from fate_llm.core.values import ArtifactKind
from fate_llm.pipelines.check import check
from fate_llm.runtime.federation import Federation, make_federation
from fate_llm.runtime.trust.catalog import Catalog, CatalogEntry
from fate_llm.runtime.trust.jobspec import JobSpecification, SignedSpecification, make_specification
from fate_llm.runtime.trust.policy import Evaluation, evaluate
from fate_llm.runtime.trust.policy_schema import make_policy
from fate_llm.security.identity import Identity
from fate_llm.security.sealed_box import SealingKey

PARTIES = ("bank-a", "bank-b", "hub")
CROWD = (*PARTIES, "bank-c", "bank-d")  # for jobs in which a party hides among others
IDENTITIES = {party: Identity.from_bytes(bytes([at]) * 32) for at, party in enumerate(CROWD, start=1)}
SEALING = {party: SealingKey.from_bytes(bytes([at]) * 32) for at, party in enumerate(CROWD, start=1)}
NOW = 1_750_000_000.0  # a Sunday, 15:06:40 UTC

CATALOG = Catalog(
    Path("/nowhere"),
    {
        "loans": CatalogEntry(path="loans.jsonl", kind="dataset"),
        "secret": CatalogEntry(path="secret.jsonl", kind="dataset"),
        "base": CatalogEntry(path="base", kind="model"),
    },
)

PIPELINE: dict[str, Any] = {
    "version": 1,
    "name": "loans",
    "parties": {"guest": "bank-a", "hosts": ["bank-b"], "arbiter": "hub"},
    "tasks": {
        "data": {"component": "reading", "params": {"path": "catalog:loans"}},
        "tune": {
            "component": "tuning",
            "inputs": {"train": "data.dataset"},
            "params": {"model": {"package": "llm_tiny"}, "rounds": 4},
        },
    },
    "job": {"quorum": 2},
}

POLICY: dict[str, Any] = {
    "version": 1,
    "initiators": ["bank-a"],
    "components": {"reading": {}, "tuning": {"params": {"rounds": {"max": 50}, "rate": {"max": 0.01}}}},
    "models": ["package:llm_*", "catalog:base"],
    "data": {"loans": {}},
    "protection": {"least": "plain", "contributors": 2},
    "privacy": {"require": "none"},
    "schedule": "always",
    "resources": {"cpus": 4, "memory": "16GiB", "gpus": 1, "hours": 12},
    "manual": [],
}


class _Quiet:
    predict_rule: ClassVar[PredictRule] = Keep()

    def needs_experiment(self, params: Any) -> str | None:
        return "it shows rows" if getattr(params, "share", False) else None

    def estimate(self, view: PlanView) -> Estimate:
        return Estimate()

    def guest(self, ctx: Any) -> None: ...

    def host(self, ctx: Any) -> None: ...


class Reading(_Quiet):
    """Marks what it opens, but for `notes` and `extra`, as a careless component would."""

    class Params(Frozen):
        path: str = Field(json_schema_extra={"resource": "data"})
        notes: str = ""
        extra: dict[str, Any] = Field(default_factory=dict)
        limit: int | None = None
        share: bool = False

    inputs: ClassVar[dict[str, Port]] = {}
    outputs: ClassVar[dict[str, Port]] = {"dataset": Port(ArtifactKind.DATASET, "Rows.")}


class Model(Frozen):
    package: str | None = Field(None, json_schema_extra={"resource": "model", "names": "package"})
    path: str | None = Field(None, json_schema_extra={"resource": "model"})
    hub: str | None = Field(None, json_schema_extra={"resource": "model", "names": "hub"})
    revision: str | None = None


class Hook(Frozen):
    name: str = Field(json_schema_extra={"plugin": "hook"})
    params: dict[str, Any] = Field(default_factory=dict)


class Tuning(_Quiet):
    class Params(Frozen):
        model: Model
        rounds: int = 1
        rate: float = 0.001
        peft: dict[str, Any] = Field(default_factory=dict)
        hooks: tuple[Hook, ...] = ()
        protection: str = Field("plain", json_schema_extra={"plugin": "sum"})
        protection_params: dict[str, Any] = Field(default_factory=dict)

    inputs: ClassVar[dict[str, Port]] = {
        "train": Port(ArtifactKind.DATASET, "Rows.", required=False),
        "start": Port(ArtifactKind.MODEL, "Where to start.", required=False),
    }
    outputs: ClassVar[dict[str, Port]] = {"model": Port(ArtifactKind.MODEL, "The model.")}

    def arbiter(self, ctx: Any) -> None: ...


class Shown:
    Params = Frozen
    hides_terms = False
    needs_key_holder = False
    summary = "everything is seen"


class Hidden:
    class Params(Frozen):
        clip: float = 1.0
        threshold: int | None = None

    hides_terms = True
    needs_key_holder = False
    summary = "nothing is seen"


class Clip:
    stage = HookStage.CLIP
    Params = Frozen


FAKES: dict[str, dict[str, Any]] = {
    "component": {"reading": Reading, "tuning": Tuning},
    "sum": {"plain": Shown, "secagg": Hidden, "ckks": Hidden, "homebrew": Hidden},
    "hook": {"clip": Clip},
}


@pytest.fixture(scope="module", autouse=True)
def fakes() -> Any:
    """The fakes besides the real plug-ins; module-wide, so that hypothesis may use it."""
    load, names = plugins.load, plugins.names
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugins, "load", lambda kind, name: FAKES.get(kind, {}).get(name) or load(kind, name))
        patch.setattr(plugins, "names", lambda kind: sorted({*FAKES.get(kind, ()), *names(kind)}))
        yield


def crowded(data: dict[str, Any]) -> None:
    """Four contributors and an arbiter."""
    data["parties"]["hosts"] = ["bank-b", "bank-c", "bank-d"]
    data["job"] = {}


def roster(names: tuple[str, ...] = PARTIES, **changes: Any) -> Federation:
    """All three, or these; changes: {party: {field: value}}, with `_` for `-`."""
    parties = {
        party: {
            "identity": IDENTITIES[party].public.to_text(),
            "sealing": SEALING[party].public.to_text(),
            "broker": {"host": "hub.example"},
        }
        | changes.get(party.replace("-", "_"), {})
        for party in names
    }
    return make_federation(
        {"version": 1, "name": "loans", "vhost": "fate.loans", "topology": "shared", "parties": parties}
    )


def specified(change: Callable[[dict[str, Any]], object] | None = None, **options: Any) -> JobSpecification:
    """The specification of the pipeline, which `change` may change in place."""
    data = copy.deepcopy(PIPELINE)
    if change is not None:
        change(data)
    spec = check(data)
    known = roster(PARTIES if set(spec.members) <= set(PARTIES) else CROWD)
    return make_specification(spec, **({"job": "loans-1", "federation": known, "created": NOW} | options))


def signed(change: Callable[[dict[str, Any]], object] | None = None, **options: Any) -> SignedSpecification:
    return specified(change, **options).sign(IDENTITIES["bank-a"])


def judged(
    policy: dict[str, Any] | None = None,
    change: Callable[[dict[str, Any]], object] | None = None,
    *,
    me: str = "bank-b",
    now: float = NOW,
    catalog: Catalog = CATALOG,
    **options: Any,
) -> Evaluation:
    """What a policy (the one above with these sections; None takes one away) says of the job."""
    rules = {key: value for key, value in (POLICY | (policy or {})).items() if value is not None}
    return evaluate(make_policy(rules), signed(change), me, catalog, now, **options)
