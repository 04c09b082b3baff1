"""Answers of a trained model to a party's own prompts."""

from __future__ import annotations

import json
from typing import ClassVar, Literal

from pydantic import Field

from fate_llm.core.interfaces import Context, Estimate, Frozen, Keep, PlanView, Port, PredictRule
from fate_llm.core.values import Artifact, ArtifactKind

from .llm.adapters import open_model, read_about
from .llm.modelref import ModelRef
from .llm.models import Loading, load_base, load_tokenizer, own_tree, require_training_extra
from .llm.records import Dataset
from .llm.scoring import generate
from .llm.templates import Formatter
from .llm.turns import Turns

__all__ = ["PLUGIN", "Generator"]


class Generator:
    """Generates an answer for every record of the input, greedily, and writes them as JSON Lines.

    This is what a trainer becomes in a prediction pipeline. Nothing leaves the party. Each line of `answers` has the
    record's `id` and the `answer`; records need a question, and a known answer is ignored.
    """

    class Params(Frozen):
        max_new_tokens: int = Field(64, ge=1, le=4096, description="Longest generated answer, in tokens.")
        batch_size: int = Field(16, ge=1, description="Records of one forward pass.")
        max_length: int = Field(512, ge=8, description="Longest prompt with its answer, in tokens; cut from the left.")
        template: Literal["auto", "chat", "alpaca", "plain"] = Field(
            "auto", description="How a record becomes text; auto: what the reader noted, as in training."
        )
        loading: Loading = Field(Loading(), description="How the base model is brought into memory.")

    inputs: ClassVar[dict[str, Port]] = {
        "model": Port(ArtifactKind.MODEL, "The trained model."),
        "data": Port(ArtifactKind.DATASET, "Records to answer."),
    }
    outputs: ClassVar[dict[str, Port]] = {
        "answers": Port(ArtifactKind.REPORT, "answers.jsonl: one line per record, `id` and `answer`."),
    }
    predict_rule: ClassVar[PredictRule] = Keep()

    def needs_experiment(self, params: Params) -> str | None:
        return None

    def estimate(self, view: PlanView) -> Estimate:
        return Estimate()

    def guest(self, ctx: Context) -> None:
        require_training_extra()
        params: Generator.Params = ctx.params
        model, data = ctx.inputs["model"], ctx.inputs["data"]
        assert isinstance(model, Artifact)
        assert isinstance(data, Artifact)
        ref = ModelRef(**read_about(model.path)["base"])
        with Turns(ctx, ctx.seed(ctx.task, ctx.party)).take():
            tokenizer = load_tokenizer(ctx, ref)
            trained = open_model(own_tree(load_base(ctx, ref, params.loading)), model.path)
            records = Dataset(data.path)
            template = records.template if params.template == "auto" else params.template
            formatter = Formatter(tokenizer, template)
            room = max(1, params.max_length - params.max_new_tokens)
            answers = generate(
                trained,
                tokenizer,
                [formatter.encode_prompt(record, room) for record in records],
                max_new_tokens=params.max_new_tokens,
                batch_size=params.batch_size,
                check=ctx.check_cancelled,
            )
        folder = ctx.output("answers")
        folder.mkdir()
        lines = [
            json.dumps({"id": r.id, "answer": a}, ensure_ascii=False) for r, a in zip(records, answers, strict=True)
        ]
        (folder / "answers.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        ctx.emit("answered", records=len(lines))

    host = guest


PLUGIN = Generator
