"""Scores models on held-out records that stay where they are: only counts and sums are added up."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from fate_llm.core.errors import DataError, ModelError, PeerViolation
from fate_llm.core.interfaces import Context, Drop, Estimate, Frozen, PlanView, Port, PredictRule, Traffic
from fate_llm.core.names import is_name
from fate_llm.core.values import Artifact, ArtifactKind, Payload

from .llm.adapters import open_model, read_about
from .llm.costs import scoring_cost
from .llm.modelref import ModelRef
from .llm.models import Loading, load_base, load_tokenizer, own_tree, require_training_extra
from .llm.plots import loss_plot
from .llm.records import Dataset, Record, prompt_and_answer
from .llm.scoring import generate, loss_sums, perplexity
from .llm.templates import Formatter
from .llm.text_metrics import bleu_counts, bleu_of, exact_match, rouge
from .llm.turns import Turns

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["PLUGIN", "Evaluator"]

BASE = "base"
_SCORES = "scores"  # the sum of all parties' scores


class Evaluator:
    """Compares models on the union of all parties' held-out records, which nobody sees whole.

    Every party scores each model on its own records: token-mean loss and perplexity of the answers, greedy answers
    with exact match, ROUGE and BLEU. Only sums and counts leave a party, through the sum that `protection` names;
    the table is made from the totals. The first models of the table are the base model (`base: true`) and then those
    of the input `model`, by task name. Sample answers are of this party's own records and stay in its report.
    """

    class Params(Frozen):
        base: bool = Field(True, description="Score the base model too.")
        generate: bool = Field(True, description="Generate answers, for exact match, ROUGE, BLEU and samples.")
        max_new_tokens: int = Field(32, ge=1, le=4096, description="Longest generated answer, in tokens.")
        samples: int = Field(3, ge=0, description="Sample answers in this party's report.")
        batch_size: int = Field(16, ge=1, description="Records of one forward pass.")
        max_length: int = Field(512, ge=8, description="Longest record in tokens; the prompt is cut from the left.")
        template: Literal["auto", "chat", "alpaca", "plain"] = Field(
            "auto", description="How a record becomes text; auto: what the reader noted, as in training."
        )
        limit: int | None = Field(None, ge=1, description="Score at most so many of this party's records.")
        loading: Loading = Field(Loading(), description="How the base model is brought into memory.")
        labels: dict[str, str] = Field(
            default_factory=dict, description="Names of the table's rows by task (or `base`), in the table's order."
        )
        share_models: bool = Field(
            False, description="Experiments only: send models to parties that lack them, so that all score all."
        )
        protection: str = Field("plain", description="How sums are added.", json_schema_extra={"plugin": "sum"})
        protection_params: dict[str, Any] = Field(
            default_factory=dict, description="The protection's parameters; the same at every party."
        )

    inputs: ClassVar[dict[str, Port]] = {
        "model": Port(ArtifactKind.MODEL, "Trained models, each with its base model.", many=True),
        "data": Port(ArtifactKind.DATASET, "Held-out records."),
        "history": Port(ArtifactKind.METRICS, "Trainers' metrics, for the loss plot.", required=False, many=True),
    }
    outputs: ClassVar[dict[str, Port]] = {
        "report": Port(ArtifactKind.REPORT, "report.json, report.md and loss.png."),
        "metrics": Port(ArtifactKind.METRICS, "Scores of every model."),
    }
    predict_rule: ClassVar[PredictRule] = Drop()

    def needs_experiment(self, params: Params) -> str | None:
        return "share_models shows one party's model to the others" if params.share_models else None

    def estimate(self, view: PlanView) -> Estimate:
        cost = scoring_cost(view)
        if not any(params.share_models for params in view.params.values()):
            return cost
        pairs = permutations(view.cohort.contributors, 2)
        unknown = [Traffic(one, other, "models that it lacks", 1, None) for one, other in pairs]
        return replace(cost, traffic=(*cost.traffic, *unknown))

    def guest(self, ctx: Context) -> None:
        _Scoring(ctx).run()

    host = guest

    def arbiter(self, ctx: Context) -> None:
        params: Evaluator.Params = ctx.params
        ctx.channel.aggregate(_SCORES, None, protection=params.protection, protection_params=params.protection_params)

    def key_holder(self, ctx: Context) -> None:
        params: Evaluator.Params = ctx.params
        ctx.channel.hold(_SCORES, protection=params.protection, protection_params=params.protection_params)


@dataclass(frozen=True, slots=True)
class _Scored:
    """One model on this party's records: sums to be added up, and the answers (None without generation)."""

    sums: dict[str, float]
    answers: list[str] | None


class _Scoring:
    """One contributor's page: collect the models, score each, add up, write the report."""

    def __init__(self, ctx: Context) -> None:
        require_training_extra()
        self.ctx = ctx
        self.params: Evaluator.Params = ctx.params
        self.turns = Turns(ctx, ctx.seed(ctx.task, ctx.party))

    def run(self) -> None:
        ctx, params = self.ctx, self.params
        models = _own_models(ctx)
        if params.share_models:
            models |= _exchange_models(ctx, models)
        models = dict(sorted(models.items(), key=lambda item: _position(item[0], params.labels)))
        if not models:
            raise ModelError(f"{ctx.party} has none of the models to evaluate")
        with self.turns.take():
            scored = self._score_all(models)
        sums = {f"{name}/{key}": value for name, one in scored.items() for key, value in one.sums.items()}
        totals = ctx.channel.aggregate(
            _SCORES, sums, protection=params.protection, protection_params=params.protection_params
        )
        table = [_row(name, params.labels.get(name, name), totals) for name in scored]
        ctx.emit("scores", rows=table)
        self._report(table, scored)

    def _score_all(self, models: Mapping[str, Path]) -> dict[str, _Scored]:
        ctx, params = self.ctx, self.params
        base_ref = ModelRef(**read_about(next(iter(models.values())))["base"])
        self.tokenizer = load_tokenizer(ctx, base_ref)
        artifact = ctx.inputs["data"]
        assert isinstance(artifact, Artifact)
        data = Dataset(artifact.path)
        template = data.template if params.template == "auto" else params.template
        formatter = Formatter(self.tokenizer, template)
        self.records = [record for record, _ in zip(data, range(params.limit or len(data)), strict=False)]
        if not self.records:
            raise DataError(f"{ctx.party} has no held-out records")
        encoded = [formatter.encode(record, params.max_length) for record in self.records]
        self.rows = [row for row in encoded if row is not None]
        room = max(1, params.max_length - params.max_new_tokens)
        self.prompts = [formatter.encode_prompt(record, room) for record in self.records]
        scored: dict[str, _Scored] = {}
        base = load_base(ctx, base_ref, params.loading)
        if params.base:
            scored[BASE] = self._score(BASE, own_tree(base))
        for name, folder in models.items():
            own_base = load_base(ctx, ModelRef(**read_about(folder)["base"]), params.loading)
            scored[name] = self._score(name, open_model(own_tree(own_base), folder))
        order = sorted(scored, key=lambda name: _position(name, params.labels))
        return {name: scored[name] for name in order}

    def _score(self, name: str, model: PreTrainedModel) -> _Scored:
        ctx, params = self.ctx, self.params
        pad_id = int(self.tokenizer.pad_token_id)  # type: ignore[arg-type]
        loss_sum, tokens = loss_sums(
            model, self.rows, batch_size=params.batch_size, pad_id=pad_id, check=ctx.check_cancelled
        )
        sums = {"loss_sum": loss_sum, "tokens": float(tokens), "records": float(len(self.records))}
        answers: list[str] | None = None
        if params.generate:
            answers = generate(
                model,
                self.tokenizer,
                self.prompts,
                max_new_tokens=params.max_new_tokens,
                batch_size=params.batch_size,
                check=ctx.check_cancelled,
            )
            sums |= _text_sums(answers, [prompt_and_answer(record)[1] for record in self.records])
        ctx.emit("scored", model=name, records=len(self.records))
        return _Scored(sums, answers)

    def _report(self, table: Sequence[Mapping[str, Any]], scored: Mapping[str, _Scored]) -> None:
        ctx = self.ctx
        samples = [
            {
                "question": _question(self.records[index]),
                "reference": prompt_and_answer(self.records[index])[1],
                "answers": {name: one.answers[index] for name, one in scored.items() if one.answers is not None},
            }
            for index in _spread(len(self.records), self.params.samples)
            if self.params.generate
        ]
        folder = ctx.output("report")
        folder.mkdir()
        (folder / "report.json").write_text(json.dumps({"models": table, "samples": samples}, indent=2) + "\n")
        plotted = loss_plot(_histories(ctx), folder / "loss.png")
        (folder / "report.md").write_text(_markdown(table, samples, plotted))
        ctx.output("metrics").write_text(json.dumps({"models": table}, indent=2) + "\n")


def _position(name: str, labels: Mapping[str, str]) -> tuple[int, int]:
    """Rows in the order of `labels`; the base model before and others after those that it names."""
    order = list(labels)
    if name in order:
        return 1, order.index(name)
    return (0, 0) if name == BASE else (2, 0)


def _own_models(ctx: Context) -> dict[str, Path]:
    artifacts = ctx.inputs["model"]
    found = artifacts if isinstance(artifacts, tuple) else (artifacts,)
    return {artifact.name.partition(".")[0]: artifact.path for artifact in found}


def _text_sums(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Sums over records: exact matches, ROUGE F1, and the counts of BLEU."""
    sums: dict[str, float] = {"exact": 0.0}
    for answer, reference in zip(answers, references, strict=True):
        sums["exact"] += exact_match(answer, reference)
        for key, value in rouge(answer, reference).items():
            sums[key] = sums.get(key, 0.0) + value
        for key, count in bleu_counts(answer, reference).items():
            sums[f"bleu_{key}"] = sums.get(f"bleu_{key}", 0.0) + count
    return sums


def _row(name: str, label: str, totals: Mapping[str, float]) -> dict[str, Any]:
    """One row of the table, from the totals of all parties."""
    sums = {key.partition("/")[2]: value for key, value in totals.items() if key.startswith(f"{name}/")}
    records, tokens = sums["records"], sums["tokens"]
    row: dict[str, Any] = {
        "model": name,
        "label": label,
        "records": int(records),
        "tokens": int(tokens),
        "loss": _rounded(sums["loss_sum"] / tokens if tokens else math.nan),
        "perplexity": _rounded(perplexity(sums["loss_sum"], tokens)),
    }
    if "exact" in sums:
        row["exact_match"] = round(sums["exact"] / records, 4)
        row |= {key: round(sums[key] / records, 4) for key in ("rouge1", "rouge2", "rougeL")}
        row["bleu"] = round(bleu_of({k.removeprefix("bleu_"): v for k, v in sums.items() if k.startswith("bleu_")}), 4)
    return row


def _rounded(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def _spread(count: int, wanted: int) -> list[int]:
    """Up to `wanted` rows, evenly spread."""
    wanted = min(count, wanted)
    return [index * count // wanted for index in range(wanted)]


def _question(record: Record) -> str:
    before, _ = prompt_and_answer(record)
    return before[-1].content if before else ""


def _histories(ctx: Context) -> dict[str, list[dict[str, Any]]]:
    artifacts = ctx.inputs.get("history", ())
    found = artifacts if isinstance(artifacts, tuple) else (artifacts,)
    return {a.name.partition(".")[0]: json.loads(a.path.read_text())["rounds"] for a in found}


def _markdown(table: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]], plotted: bool) -> str:
    keys = [key for key in table[0] if key != "model"]
    lines = ["# Evaluation", "", "| " + " | ".join(keys) + " |", "|" + " --- |" * len(keys)]
    lines += ["| " + " | ".join(str(row.get(key)) for key in keys) + " |" for row in table]
    if plotted:
        lines += ["", "![loss per round](loss.png)"]
    for number, sample in enumerate(samples, start=1):
        lines += ["", f"## Sample {number}", "", f"- question: {sample['question']}"]
        lines += [f"- reference: {sample['reference']}"]
        lines += [f"- {name}: {answer}" for name, answer in sample["answers"].items()]
    return "\n".join(lines) + "\n"


# --- experiments: every party scores every model -----------------------------------------------------------------


def _exchange_models(ctx: Context, own: Mapping[str, Path]) -> dict[str, Path]:
    """Models that this party lacks, from the first contributor that has each."""
    mine = Payload({"models": sorted(own)})
    for party in ctx.cohort.contributors:
        if party != ctx.party:
            ctx.channel.send(party, "models", mine)
    have = {party: _names(party, payload) for party, payload in ctx.channel.gather("models").items()}
    have[ctx.party] = sorted(own)
    everything = sorted({name for names in have.values() for name in names})
    received: dict[str, Path] = {}
    for name in everything:
        owner = next(party for party in ctx.cohort.contributors if name in have[party])
        lacking = [party for party in ctx.cohort.contributors if name not in have[party]]
        if owner == ctx.party:
            payload = _pack(own[name])
            for party in lacking:
                ctx.channel.send(party, f"model/{name}", payload)
        elif ctx.party in lacking:
            received[name] = _unpack(ctx.channel.receive(owner, f"model/{name}"), ctx.scratch() / "received" / name)
    return received


def _names(party: str, payload: Payload) -> list[str]:
    names = payload.fields.get("models")
    if not isinstance(names, list) or not all(isinstance(name, str) and is_name(name) for name in names):
        raise PeerViolation(f"{party} sent a list of models that is none")
    return names


def _pack(folder: Path) -> Payload:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return Payload({}, {path.name: np.frombuffer(path.read_bytes(), dtype=np.uint8) for path in files})


_MODEL_FILES = {"adapter_config.json", "adapter_model.safetensors", "fate_model.json", "config.json"}


def _unpack(payload: Payload, folder: Path) -> Path:
    """Write the files of a received model. Only known names of data files: nothing that could be code."""
    unknown = sorted(set(payload.tensors) - _MODEL_FILES - {"model.safetensors", "generation_config.json"})
    unknown = [name for name in unknown if not (name.startswith("tokenizer") and name.endswith(".json"))]
    unknown = [name for name in unknown if name != "chat_template.jinja"]
    if unknown or any("/" in name or "\\" in name for name in payload.tensors):
        raise PeerViolation(f"a received model has files that are none of a model: {unknown[:5]}")
    folder.mkdir(parents=True)
    for name, content in payload.tensors.items():
        (folder / name).write_bytes(content.tobytes())
    return folder


PLUGIN = Evaluator
