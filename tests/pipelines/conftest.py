"""A small registry of fake plug-ins, so that the language is tested without any real component."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from pydantic import Field, model_validator

from fate_llm.core import plugins
from fate_llm.core.errors import Fault, MissingExtra, PipelineInvalid, UnknownPlugin
from fate_llm.core.interfaces import (
    Drop,
    Estimate,
    Frozen,
    HookStage,
    Keep,
    PassThrough,
    PlanView,
    Port,
    Replace,
    Traffic,
)
from fate_llm.core.names import nearest
from fate_llm.core.values import ArtifactKind, Role
from fate_llm.pipelines import dialect
from fate_llm.pipelines.check import check
from fate_llm.pipelines.loader import load_text


class Quiet:
    """What the fakes have in common: no experiment, no estimate, and a guest's and a host's side."""

    def needs_experiment(self, params: Any) -> str | None:
        return None

    def estimate(self, view: PlanView) -> Estimate:
        return Estimate(memory_bytes=10, coordinator_memory_bytes=5)

    def guest(self, ctx: Any) -> None: ...

    def host(self, ctx: Any) -> None: ...


class Source(Quiet):
    class Fields(Frozen):
        question: str = "q"
        answer: str = "a"

    class Params(Frozen):
        path: str = Field(min_length=1)
        limit: int | None = Field(None, ge=1)
        fields: Source.Fields = Field(default_factory=lambda: Source.Fields())

    inputs: ClassVar[dict[str, Port]] = {}
    outputs: ClassVar[dict[str, Port]] = {
        "dataset": Port(ArtifactKind.DATASET, "Records."),
        "report": Port(ArtifactKind.REPORT, "Counts."),
    }
    predict_rule = Keep()


Source.Params.model_rebuild(_types_namespace={"Source": Source})


class Divider(Quiet):
    class Params(Frozen):
        test: float = Field(0.2, ge=0, lt=1)
        by: Literal["category", "key"] | None = None

    inputs: ClassVar[dict[str, Port]] = {"data": Port(ArtifactKind.DATASET, "Records.")}
    outputs: ClassVar[dict[str, Port]] = {
        "train": Port(ArtifactKind.DATASET, "Training rows."),
        "test": Port(ArtifactKind.DATASET, "Test rows."),
        "manifest": Port(ArtifactKind.REPORT, "Counts."),
    }
    predict_rule = PassThrough("data")


class HookRef(Frozen):
    name: str = Field(json_schema_extra={"plugin": "hook"})
    params: dict[str, Any] = Field(default_factory=dict)


class ByPath(Frozen):
    path: str


class ByName(Frozen):
    package: str


class Trainer(Quiet):
    """Sends one kilobyte each way and round."""

    class Params(Frozen):
        rounds: int = Field(ge=1)
        model: ByPath | ByName = ByName(package="tiny")
        template: str = "plain"
        steps: int | None = None
        epochs: int | None = None
        aggregator: str = Field("mean", json_schema_extra={"plugin": "aggregator"})
        protection: str = Field("open", json_schema_extra={"plugin": "sum"})
        protection_params: dict[str, Any] = Field(default_factory=dict)
        hooks: tuple[HookRef, ...] = ()

        @model_validator(mode="after")
        def _one_length(self) -> Trainer.Params:
            if self.steps is not None and self.epochs is not None:
                raise ValueError("give steps or epochs, not both")
            return self

    inputs: ClassVar[dict[str, Port]] = {
        "train": Port(ArtifactKind.DATASET, "Rows to train on."),
        "test": Port(ArtifactKind.DATASET, "Held-out rows.", required=False),
    }
    outputs: ClassVar[dict[str, Port]] = {
        "model": Port(ArtifactKind.MODEL, "The adapter."),
        "metrics": Port(ArtifactKind.METRICS, "Losses."),
    }
    predict_rule = Replace("answerer", "model", {"data": "test"}, ("template",))
    views: ClassVar[list[PlanView]] = []

    def estimate(self, view: PlanView) -> Estimate:
        Trainer.views.append(view)
        traffic = []
        for party in view.cohort.contributors:
            if party != view.cohort.coordinator:
                rounds = view.params[party].rounds
                traffic.append(Traffic(party, view.cohort.coordinator, "update", rounds, 1024))
                traffic.append(Traffic(view.cohort.coordinator, party, "state", rounds, 1024))
        return Estimate(tuple(traffic), 5 * 2**20, 2**20, notes=("tiny",))

    def arbiter(self, ctx: Any) -> None: ...


class Scorer(Quiet):
    class Params(Frozen):
        share: bool = False
        protections: tuple[str, ...] = Field(("open",), json_schema_extra={"plugin": "sum"})

    inputs: ClassVar[dict[str, Port]] = {
        "model": Port(ArtifactKind.MODEL, "Models.", many=True),
        "data": Port(ArtifactKind.DATASET, "Held-out rows."),
        "history": Port(ArtifactKind.METRICS, "Losses.", required=False, many=True),
    }
    outputs: ClassVar[dict[str, Port]] = {"report": Port(ArtifactKind.REPORT, "Scores.")}
    predict_rule = Drop()

    def needs_experiment(self, params: Any) -> str | None:
        return "share shows models" if params.share else None

    def estimate(self, view: PlanView) -> Estimate:
        guest = view.roster.guest
        return Estimate(tuple(Traffic(p, guest, "models", 1, None) for p in view.roster.hosts))

    def arbiter(self, ctx: Any) -> None: ...


class Answerer(Quiet):
    class Params(Frozen):
        template: str = "plain"

    inputs: ClassVar[dict[str, Port]] = {
        "model": Port(ArtifactKind.MODEL, "The trained model."),
        "data": Port(ArtifactKind.DATASET, "Rows to answer."),
    }
    outputs: ClassVar[dict[str, Port]] = {"answers": Port(ArtifactKind.REPORT, "Answers.")}
    predict_rule = Keep()


class Pool(Quiet):
    """Only the guest has the output."""

    class Params(Frozen):
        pass

    inputs: ClassVar[dict[str, Port]] = {"data": Port(ArtifactKind.DATASET, "Rows.")}
    outputs: ClassVar[dict[str, Port]] = {
        "dataset": Port(ArtifactKind.DATASET, "All rows.", roles=frozenset({Role.GUEST}))
    }
    predict_rule = Drop()

    def needs_experiment(self, params: Any) -> str | None:
        return "pool shows rows"


class Mean:
    needs_plaintext = False
    Params = Frozen


class Median:
    needs_plaintext = True
    Params = Frozen


class Open:
    Params = Frozen
    hides_terms = False
    needs_key_holder = False
    summary = "the coordinator sees every term"
    learns: ClassVar[dict[str, str]] = {"coordinator": "every term"}


class Sealed:
    class Params(Frozen):
        clip: float = Field(1.0, gt=0)
        threshold: int | None = Field(None, ge=1)

    hides_terms = True
    needs_key_holder = False
    summary = "the coordinator sees the sum"
    learns: ClassVar[dict[str, str]] = {"coordinator": "the sum; no term", "contributors": "the sum"}


class Clip:
    stage = HookStage.CLIP
    Params = Frozen


class Half:
    stage = HookStage.ENCODE
    Params = Frozen


class Byte:
    stage = HookStage.ENCODE
    Params = Frozen


class Press:
    stage = HookStage.PACK
    Params = Frozen


FAKES: dict[str, dict[str, Any]] = {
    "component": {
        "source": Source,
        "divider": Divider,
        "trainer": Trainer,
        "scorer": Scorer,
        "answerer": Answerer,
        "pool": Pool,
        "shut": None,
    },
    "aggregator": {"mean": Mean, "median": Median},
    "sum": {"open": Open, "sealed": Sealed, "locked": None},
    "hook": {"clip": Clip, "half": Half, "byte": Byte, "press": Press, "stuck": None},
    "transport": {},
}


def _load(kind: str, name: str) -> Any:
    known = FAKES[kind]
    if name not in known:
        raise UnknownPlugin(f"no {kind} is called {name!r}", hint=nearest(name, known))
    if known[name] is None:
        raise MissingExtra(f"{name} needs a library", hint="pip install fate_llm[he]")
    return known[name]


@pytest.fixture(scope="module")
def registry() -> Iterator[dict[str, dict[str, Any]]]:
    """The fakes in place of the real registry; module-wide, so that hypothesis may use it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugins, "load", _load)
        patch.setattr(plugins, "names", lambda kind: sorted(FAKES[kind]))
        Trainer.views.clear()
        yield FAKES


VALID = """\
version: 1
name: demo
parties: {guest: bank-a, hosts: [bank-b, bank-c], arbiter: consortium}
tasks:
  data: {component: source, params: {path: a.jsonl}}
  split: {component: divider, inputs: {data: data.dataset}, params: {test: 0.2}}
  tune:
    component: trainer
    inputs: {train: split.train, test: split.test}
    params: {rounds: 4, aggregator: mean, protection: open}
  score: {component: scorer, inputs: {model: tune.model, data: split.test}}
overrides:
  bank-b: {data: {params: {path: b.jsonl}}}
  bank-c: {data: {params: {path: c.jsonl}}}
job: {seed: 7, round_deadline: 10m, quorum: 3}
"""


@pytest.fixture(scope="session")
def valid_text() -> str:
    """A pipeline of the fakes without a fault; tests put faults in with `str.replace`."""
    return VALID


@pytest.fixture(scope="session")
def valid() -> Callable[[], dict[str, Any]]:
    """A fresh copy of the same as plain values."""
    data = load_text(VALID).data
    return lambda: copy.deepcopy(data)


@pytest.fixture(scope="session")
def faults_of() -> Callable[..., list[Fault]]:
    """Every fault of a text or of plain values, in the order in which they are reported."""

    known: dict[str, list[Fault]] = {}  # reading YAML is most of these tests' time

    def find(given: str | dict[str, Any]) -> list[Fault]:
        if isinstance(given, str) and given in known:
            return known[given]
        source = load_text(given) if isinstance(given, str) else dialect.Source(given)
        try:
            check(source.data, source.marks, earlier=source.faults)
        except PipelineInvalid as error:
            faults = list(error.faults)
        else:
            faults = []
        return known.setdefault(given, faults) if isinstance(given, str) else faults

    return find


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    """Write a file in this test's folder."""

    def put(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return put
