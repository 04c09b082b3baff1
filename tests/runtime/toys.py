"""Components without a model: they write words, add numbers, fail and wait, as tests ask them to."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from fate_llm.components.hooks.int8 import Int8
from fate_llm.core import errors
from fate_llm.core.interfaces import Context, Estimate, Frozen, Keep, PlanView, Port, PredictRule, Replace, UpdateHook
from fate_llm.core.values import Artifact, ArtifactKind, Payload, Role

DATASET, METRICS, REPORT, MODEL = ArtifactKind.DATASET, ArtifactKind.METRICS, ArtifactKind.REPORT, ArtifactKind.MODEL


class _Toy:
    """What all toys have in common."""

    class Params(Frozen):
        pass

    inputs: ClassVar[Mapping[str, Port]] = {}
    outputs: ClassVar[Mapping[str, Port]] = {}
    predict_rule: ClassVar[PredictRule] = Keep()

    def needs_experiment(self, params: Any) -> str | None:
        return None

    def estimate(self, view: PlanView) -> Estimate:
        return Estimate()


class Inner(Frozen):
    """A setting in a setting."""

    depth: int = Field(1, ge=0, lt=10, description="How deep.")
    kind: Literal["a", "b"] = Field("a", description="Which kind.")


class Words(_Toy):
    """Writes words into a file.

    A second paragraph, for the manual.
    """

    class Params(Frozen):
        word: str = Field("hello", min_length=1, description="What is written.")
        times: int = Field(1, ge=1, le=10, description="How often.")
        path: str | None = Field(None, description="A file to read the word from.")
        inner: Inner = Field(Inner(), description="More settings.")
        many: tuple[Inner, ...] = Field((), description="A list of them.")
        notes: dict[str, str] = Field(default_factory=dict, description="Free notes.")
        size: int | str = Field(3, description="A number or a word.")

    outputs: ClassVar[Mapping[str, Port]] = {"dataset": Port(DATASET, "The words.")}

    def guest(self, ctx: Context) -> None:
        params: Words.Params = ctx.params
        word = params.word if params.path is None else ctx.resolve(params.path).read_text().strip()
        ctx.output("dataset").write_text(" ".join([word] * params.times))
        ctx.emit("data", words=params.times)

    host = guest


class Adder(_Toy):
    """Adds up the lengths of all parties' words; the arbiter coordinates."""

    class Params(Frozen):
        tone: str = Field("plain", description="Carried over into predictions.")
        only_training: int = Field(0, description="Left behind.")

    inputs: ClassVar[Mapping[str, Port]] = {
        "data": Port(DATASET, "Words."),
        "more": Port(DATASET, "Further words.", required=False, many=True),
        "extra": Port(DATASET, "A file that may be there.", required=False),
    }
    outputs: ClassVar[Mapping[str, Port]] = {
        "model": Port(MODEL, "The sum, as if it were a model."),
        "metrics": Port(METRICS, "The sum."),
    }
    predict_rule: ClassVar[PredictRule] = Replace("teller", "model", {"data": "data"}, ("tone",))

    def guest(self, ctx: Context) -> None:
        data = ctx.inputs["data"]
        assert isinstance(data, Artifact)
        sums = ctx.channel.aggregate("lengths", {"length": len(data.path.read_text())}, protection="plain")
        ctx.output("model").write_text(str(sums["length"]))
        rows = [{"round": number, "local_loss": 2.0 - number, "loss": 2.0 - number} for number in (1, 2)]
        found = {"sum": sums["length"], "models": [{"label": "toy", "loss": sums["length"]}], "rounds": rows}
        ctx.output("metrics").write_text(json.dumps(found))
        ctx.log_metrics(sums, step=1)

    host = guest

    def arbiter(self, ctx: Context) -> None:
        ctx.channel.aggregate("lengths", None, protection="plain")


class Teller(_Toy):
    """Tells what an adder found."""

    class Params(Frozen):
        tone: str = Field("plain", description="How it is told.")

    inputs: ClassVar[Mapping[str, Port]] = {"model": Port(MODEL, "The sum."), "data": Port(DATASET, "Words.")}
    outputs: ClassVar[Mapping[str, Port]] = {"answers": Port(REPORT, "What is told.")}

    def guest(self, ctx: Context) -> None:
        model, data = ctx.inputs["model"], ctx.inputs["data"]
        assert isinstance(model, Artifact)
        assert isinstance(data, Artifact)
        ctx.output("answers").write_text(f"{ctx.params.tone}: {model.path.read_text()} {data.path.read_text()}")

    host = guest


class Breaker(_Toy):
    """Fails at one party while the others wait for it; `times` attempts fail, then it works."""

    class Params(Frozen):
        at: str = Field("", description="Who fails; nobody when empty.")
        error: str = Field("DataError", description="A class of core.errors, or of Python.")
        times: int = Field(1000, description="How many attempts fail.")

    attempts: ClassVar[dict[str, int]] = {}
    outputs: ClassVar[Mapping[str, Port]] = {"dataset": Port(DATASET, "Nothing much.")}

    def guest(self, ctx: Context) -> None:
        self._maybe_fail(ctx)
        ctx.channel.aggregate("meeting", {"here": 1.0}, protection="plain")
        ctx.output("dataset").write_text("met")

    host = guest

    def arbiter(self, ctx: Context) -> None:
        self._maybe_fail(ctx)
        ctx.channel.aggregate("meeting", None, protection="plain")

    def _maybe_fail(self, ctx: Context) -> None:
        params: Breaker.Params = ctx.params
        if params.at != ctx.party:
            return
        count = self.attempts[ctx.task] = self.attempts.get(ctx.task, 0) + 1
        if count <= params.times:
            kind = getattr(errors, params.error, None) or {"ValueError": ValueError}[params.error]
            raise kind(f"broken at {ctx.party}")


class Waiter(_Toy):
    """Waits for a message that never comes."""

    def guest(self, ctx: Context) -> None:
        ctx.emit("note", text="waiting")
        other = next(party for party in ctx.cohort.members if party != ctx.party)
        ctx.channel.receive(other, "godot", timeout=600)

    host = guest


class Meeting(_Toy):
    """Says in which roles it ran."""

    outputs: ClassVar[Mapping[str, Port]] = {
        "dataset": Port(DATASET, "Roles of a data owner."),
        "report": Port(REPORT, "Of the arbiter.", roles=frozenset({Role.ARBITER})),
    }

    def guest(self, ctx: Context) -> None:
        ctx.channel.send(ctx.cohort.coordinator, "role", Payload({"role": ctx.role.value}))
        ctx.output("dataset").write_text(ctx.role.value)

    host = guest

    def arbiter(self, ctx: Context) -> None:
        said = [ctx.channel.receive(party, "role").fields["role"] for party in ctx.cohort.contributors]
        ctx.output("report").write_text(json.dumps(said))


class Memory:
    """What a stepper needs again when it was killed: a running sum, and how often it was moved on."""

    def __init__(self, size: int) -> None:
        self.values = np.zeros(size, dtype=np.float32)

    def move(self, step: np.ndarray) -> np.ndarray:
        self.values = self.values * np.float32(0.5) + step
        return self.values

    def save(self, folder: Path) -> None:
        (folder / "values").write_bytes(self.values.tobytes())

    def restore(self, folder: Path) -> None:
        self.values = np.frombuffer((folder / "values").read_bytes(), dtype=np.float32)


class Stepper(_Toy):
    """Federated rounds on one array, as a trainer without a model: `die` kills the process of a party in a round.

    Both sides have a momentum, which only the journal brings back; at the end the parties add up a number.
    """

    class Params(Frozen):
        rounds: int = Field(3, description="How many.")
        size: int = Field(4, description="Values of the state.")
        die: str = Field("", description="party/round of the death, in the first attempt only.")
        pause: float = Field(0.0, description="Seconds of work in each round.")
        encode: bool = Field(False, description="Send terms as int8, whose rounding is kept.")
        talk: bool = Field(False, description="Say more: a word before the rounds, a word and a sum in each.")
        planted: int = Field(0, description="A number that this party counts in all of its own events.")
        protection: str = Field("plain", description="Of all sums.", json_schema_extra={"plugin": "sum"})
        protection_params: dict[str, Any] = Field(default_factory=dict, description="Of the protection.")

        @property
        def how(self) -> dict[str, Any]:
            """How everything is summed."""
            return {"protection": self.protection, "protection_params": self.protection_params}

    outputs: ClassVar[Mapping[str, Port]] = {"model": Port(MODEL, "The last state.")}

    def guest(self, ctx: Context) -> None:
        params: Stepper.Params = ctx.params
        seed, memory = ctx.seed(ctx.task, ctx.party), Memory(params.size)
        if params.talk:
            memory.values += np.float32(ctx.channel.receive(ctx.cohort.coordinator, "word").fields["n"])
        rounds = ctx.contributor_rounds(params.rounds, **params.how, hooks=self._hooks(ctx), keep={"memory": memory})
        state = rounds.start({"x": np.zeros(params.size, dtype=np.float32)})
        for current in rounds:
            with ctx.turn():
                time.sleep(params.pause)
                self._maybe_die(ctx, current.number)
                self._plant(ctx, current.number)
                step = np.random.default_rng([seed, current.number]).normal(size=params.size).astype(np.float32)
            if params.talk:
                ctx.channel.send(ctx.cohort.coordinator, "word", Payload({"n": float(step[0])}))
                sums = ctx.channel.aggregate("count", {"n": float(current.number)}, **params.how)
                step = step + np.float32(sums["n"])
            state = current.contribute({"x": memory.move(step)}, weight=1.0, sums={"count": 1.0}).state
        sums = ctx.channel.aggregate("final", {"sum": float(memory.values.sum())}, **params.how)
        ctx.output("model").write_bytes(state["x"].tobytes() + json.dumps(sums).encode())

    host = guest

    def arbiter(self, ctx: Context) -> None:
        memory, talk = Memory(ctx.params.size), ctx.params.talk
        if talk:
            for party in ctx.cohort.contributors:
                ctx.channel.send(party, "word", Payload({"n": 0.5}))
        rounds = ctx.coordinator_rounds(
            ctx.params.rounds, **ctx.params.how, hooks=self._hooks(ctx), keep={"memory": memory}
        )
        state = rounds.start()
        for current in rounds:
            if talk:
                words = [ctx.channel.receive(party, "word").fields["n"] for party in ctx.cohort.contributors]
                memory.values = memory.values + np.float32(sum(words) * current.number)
                ctx.channel.aggregate("count", None, **ctx.params.how)
            total = current.collect()
            state = {"x": state["x"] + memory.move(total.mean["x"])}
            current.publish(state)
        ctx.channel.aggregate("final", None, **ctx.params.how)

    def key_holder(self, ctx: Context) -> None:
        ctx.holder_rounds(**ctx.params.how)
        ctx.channel.hold("final", **ctx.params.how)

    def _hooks(self, ctx: Context) -> list[UpdateHook]:
        return [Int8(seed=ctx.seed(ctx.task, ctx.party, "int8"))] if ctx.params.encode else []

    def _plant(self, ctx: Context, number: int) -> None:
        if mine := ctx.params.planted:
            ctx.emit("encoded", port="train", rows=mine, tokens=mine, text=f"{mine} tokens")
            ctx.emit("step", round=number, step=number, steps=mine, loss=float(mine))
            ctx.emit("round", round=number, loss=2.5, local_loss=float(mine), tokens=mine)

    def _maybe_die(self, ctx: Context, number: int) -> None:
        marker = ctx.resolve(f"died-{ctx.party}")
        if ctx.params.die == f"{ctx.party}/{number}" and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


TOYS: dict[str, type] = {
    "words": Words,
    "adder": Adder,
    "teller": Teller,
    "breaker": Breaker,
    "waiter": Waiter,
    "meeting": Meeting,
    "stepper": Stepper,
}


@dataclass(frozen=True)
class Installed:
    """Stands in for an entry point of an installed package."""

    component: type

    def load(self) -> type:
        return self.component


def installed(kind: str) -> dict[str, Installed]:
    """What `core.plugins._installed` gives when a package with the toys is installed."""
    return {name: Installed(toy) for name, toy in TOYS.items()} if kind == "component" else {}


def install(folder: Path) -> str:
    """Install the toys for other processes, as a package with entry points; what PYTHONPATH has to say there."""
    about = folder / "fate_llm_toys-1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: fate_llm_toys\nVersion: 1\n")
    lines = [f"{name} = tests.runtime.toys:{toy.__name__}" for name, toy in TOYS.items()]
    (about / "entry_points.txt").write_text("[fate_llm.components]\n" + "\n".join(lines) + "\n")
    root = Path(__file__).resolve().parents[2]
    return os.pathsep.join([str(folder), str(root), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)


def toy_pipeline(**tasks: Any) -> dict[str, Any]:
    """Three parties and an arbiter; words are added up unless other tasks are given."""
    usual = {
        "words": {"component": "words", "params": {"word": "ab"}},
        "add": {"component": "adder", "inputs": {"data": "words.dataset"}, "params": {"tone": "loud"}},
    }
    return {
        "version": 1,
        "name": "toys",
        "parties": {"guest": "a", "hosts": ["b", "c"], "arbiter": "z"},
        "tasks": tasks or usual,
        "overrides": {} if tasks else {"b": {"words": {"params": {"times": 2}}}},
        "job": {"seed": 5, "round_deadline": "20s"},
    }
