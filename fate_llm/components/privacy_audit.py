"""Component `privacy_audit`: what a coordinator could read from one update of mine, tried on this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from fate_llm.core.errors import DataError, ProtectionError
from fate_llm.core.interfaces import Context, Drop, Estimate, Frozen, PlanView, Port, PredictRule
from fate_llm.core.values import Array, Arrays, Artifact, ArtifactKind
from fate_llm.security.fixed_point import FixedPoint

from .llm.adapters import PeftSettings, Trainable, attach
from .llm.audit_report import View, distance_plot, judge, row_of, write_report
from .llm.audit_spans import Lens, Side, Span, distances, find_first_layers, findings, make_lens, second_moment, span
from .llm.audit_updates import gradient, mask_alone, noised, random_update, sum_round, train
from .llm.modelref import ModelRef
from .llm.models import Loading, device_of, load_base, load_tokenizer, own_tree, require_training_extra
from .llm.records import Dataset
from .llm.templates import Encoded, collate, encode_dataset
from .llm.turns import Turns

__all__ = ["PLUGIN", "PrivacyAudit"]

FIRST, GRADIENT, TRAINED = "first gradient", "gradient", "trained"


class PrivacyAudit:
    """Reconstructs tokens from LoRA updates of this party's own records, plain and masked (span test).

    Nothing leaves the party and no other takes part: other parties of a sum are played with its own records. Three
    updates are tested: the gradient of one batch on the first adapter (B = 0), the same on an adapter that has trained
    for `warmup_steps`, and the difference that the trainer's AdamW makes in `local_steps` (with the settings that the
    trainer has under the same names). Each is tested as it is and as `secagg` would send it; of the gradient also the
    sum of `parties` updates and, for comparison, the clipped gradient with noise. The test compares with random
    numbers of the same shapes. The report holds numbers only, unless `show_tokens` is set. The task fails when a
    masked update shows more than random numbers do.
    """

    class Params(Frozen):
        model: ModelRef = Field(description="The base model.")
        peft: PeftSettings = Field(PeftSettings(), description="What of the model is trained; method lora.")
        loading: Loading = Field(Loading(), description="How the base model is brought into memory.")
        batch_size: int = Field(1, ge=1, le=1024, description="Records of one update's step.")
        parties: int = Field(4, ge=3, le=100, description="Parties of the sum; each is played with a batch of its own.")
        warmup_steps: int = Field(
            4, ge=1, le=10_000, description="Optimizer steps on other records that make the adapter of a later round."
        )
        local_steps: int = Field(4, ge=1, le=10_000, description="Optimizer steps of the update that is trained.")
        learning_rate: float = Field(2e-4, gt=0, le=1, description="Learning rate of those steps, constant.")
        weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay of AdamW.")
        max_grad_norm: float = Field(1.0, gt=0, description="Clip the gradient's norm of every optimizer step.")
        max_length: int = Field(512, ge=8, description="Longest record in tokens; the prompt is cut from the left.")
        template: Literal["auto", "chat", "alpaca", "plain"] = Field(
            "auto", description="How a record becomes text; auto: what the reader noted, as in training."
        )
        train_on: Literal["all", "last"] = Field("all", description="Which assistant turns carry loss.")
        clip: float = Field(1.0, gt=0, description="Largest absolute value of an update in a masked sum.")
        tolerance: float = Field(
            0.01, gt=0, lt=1, description="Distance to the span, over an input's length, up to which a token is named."
        )
        noise: tuple[float, ...] = Field(
            (0.01, 1.0), max_length=8, description="Noise of the comparison, in times max_grad_norm, on every value."
        )
        chance_trials: int = Field(16, ge=8, le=1000, description="Random updates that say what chance finds.")
        fail_on_leak: bool = Field(True, description="Fail when a masked update shows more than chance finds.")
        show_tokens: bool = Field(
            False, description="Write the tokens that were found into this party's report: they are of its records."
        )

        @model_validator(mode="after")
        def _possible(self) -> PrivacyAudit.Params:
            if self.peft.method != "lora":
                raise ValueError("peft.method: the span test is for lora; a full update shows its tokens anyway")
            if any(multiplier <= 0 for multiplier in self.noise):
                raise ValueError("noise: every entry is above 0")
            return self

    inputs: ClassVar[dict[str, Port]] = {
        "train": Port(ArtifactKind.DATASET, "Records, those that a trainer would get.")
    }
    outputs: ClassVar[dict[str, Port]] = {
        "report": Port(ArtifactKind.REPORT, "report.json, report.md and distances.png."),
    }
    predict_rule: ClassVar[PredictRule] = Drop()

    def needs_experiment(self, params: Params) -> str | None:
        return None

    def estimate(self, view: PlanView) -> Estimate:
        return Estimate(notes=("nothing is sent; other parties are played with this party's own records",))

    def guest(self, ctx: Context) -> None:
        _Audit(ctx).run()

    host = guest


class _Audit:
    """One party's page: make updates, look at each as the coordinator would, compare with chance, write."""

    def __init__(self, ctx: Context) -> None:
        require_training_extra()
        self.ctx = ctx
        self.params: PrivacyAudit.Params = ctx.params
        self.fixed = FixedPoint(self.params.parties, self.params.clip)
        self.spans: dict[tuple[str, str], Span] = {}
        self.true: dict[tuple[str, str], Array] = {}
        self.sides: dict[str, Side] = {}
        self.clipped = 0

    def run(self) -> None:
        ctx = self.ctx
        with Turns(ctx, ctx.seed(ctx.task, ctx.party)).take():
            self._prepare()
            self._first_gradient()
            self._later_updates()
            found = distances(list(self.spans.values()), self.layers, ctx.check_cancelled)
        self.found = dict(zip(self.spans, found, strict=True))
        views = [self._view(key) for key in self.true]
        outcome, verdict = judge(views)
        self._report(views, outcome, verdict)
        for view in views:
            ctx.emit("audited", **row_of(view))
        ctx.emit("verdict", outcome=outcome)
        if outcome == "leak" and self.params.fail_on_leak:
            raise ProtectionError(
                f"{ctx.task}: {verdict}",
                hint="The report of this task has the numbers. This is a fault of the protection: report it.",
            )

    # --- what is tested ------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """The model with its first adapter, and the batches: one for each party of the sum, mine first."""
        import torch

        ctx, params = self.ctx, self.params
        self.tokenizer = load_tokenizer(ctx, params.model)
        self.rows = self._encode()
        tree = own_tree(load_base(ctx, params.model, params.loading))
        torch.manual_seed(ctx.seed(ctx.task, "first state"))
        self.model = attach(tree, params.peft)
        self.trainable = Trainable(self.model)
        size = params.batch_size
        self.batches = [self.rows[at * size : (at + 1) * size] for at in range(params.parties)]
        self.layers = find_first_layers(self.model, self._tensors(self.batches[0]))
        self.moment = second_moment(self.layers, ctx.check_cancelled)
        ctx.emit("prepared", rows=len(self.rows), layers=len(self.layers.modules), vocabulary=self.layers.vocabulary)

    def _encode(self) -> list[Encoded]:
        artifact, params = self.ctx.inputs["train"], self.params
        assert isinstance(artifact, Artifact)
        data = Dataset(artifact.path)
        template = data.template if params.template == "auto" else params.template
        rows = encode_dataset(data, self.tokenizer, template, params.max_length, train_on=params.train_on).rows
        needed = params.parties * params.batch_size
        if len(rows) < needed:
            raise DataError(
                f"{self.ctx.party}: {len(rows)} of {len(data)} records can be trained on; the audit needs {needed} "
                f"(parties {params.parties} times batch_size {params.batch_size})",
                hint="Give more records, or lower parties or batch_size.",
            )
        return rows

    def _first_gradient(self) -> None:
        """In the first round B = 0: the gradient of A is zero, and that of B shows the inputs through A."""
        state = self.trainable.read()
        update = self._gradient(state, self.batches[0])
        masked = mask_alone(update, self.fixed)
        self._look(FIRST, update, masked, self._lens(state, "B"), "B", _tokens(self.batches[0]))

    def _later_updates(self) -> None:
        params = self.params
        used = max(params.parties, params.local_steps) * params.batch_size
        self._train(self.rows[used:] or self.rows, params.warmup_steps, "warmup")
        state = self.trainable.read()
        lens = self._lens(state, "A")
        updates = [self._gradient(state, batch) for batch in self.batches]
        mine = _tokens(self.batches[0])
        summed = sum_round(updates, self.fixed)
        self.clipped = summed.clipped
        self._look(GRADIENT, updates[0], summed.masked, lens, "A", mine)
        self._add(GRADIENT, "sum", span(summed.mean, lens), self._all())
        for multiplier in params.noise:
            seed = self.ctx.seed(self.ctx.task, self.ctx.party, "noise", str(multiplier))
            noisy = noised(updates[0], params.max_grad_norm, multiplier, seed)
            self._add(GRADIENT, f"noised {multiplier:g}", span(noisy, lens), mine)
        own = self.rows[: params.local_steps * params.batch_size]
        self.trainable.load(state)
        self._train(own, params.local_steps, "local")
        update = self.trainable.difference(state)
        self._look(TRAINED, update, mask_alone(update, self.fixed), lens, "A", _tokens(own))

    def _lens(self, state: Arrays, side: Side) -> Lens:
        """How this side of updates is looked at, and random numbers of its shapes seen like that."""
        lens = make_lens(self.layers, self.moment, state, side)
        draws = np.random.default_rng(self.ctx.seed(self.ctx.task, self.ctx.party, "chance", side))
        tested = {name: state[name] for names, _, _ in lens.parts for name in names}
        for trial in range(self.params.chance_trials):
            self.spans[_random(side, trial)] = span(random_update(tested, self.fixed, draws), lens)
        return lens

    def _look(self, name: str, update: Arrays, masked: Arrays, lens: Lens, side: Side, true: Array) -> None:
        self.sides[name] = side
        self._add(name, "plain", span(update, lens), true)
        self._add(name, "masked", span(masked, lens), true)

    def _add(self, update: str, view: str, one: Span, true: Array) -> None:
        self.spans[update, view] = one
        self.true[update, view] = true

    def _view(self, key: tuple[str, str]) -> View:
        update, name = key
        true, tolerance = self.true[key], self.params.tolerance
        side = self.sides[update]
        random = [self.found[_random(side, trial)] for trial in range(self.params.chance_trials)]
        return View(
            update,
            name,
            self.spans[key].dimension,
            findings(self.found[key], true, tolerance),
            tuple(findings(one, true, tolerance) for one in random),
        )

    # --- training ------------------------------------------------------------------------------------------------

    def _gradient(self, state: Arrays, batch: Sequence[Encoded]) -> dict[str, Array]:
        self.ctx.check_cancelled()
        return gradient(self.model, list(state), self._tensors(batch), self.params.max_grad_norm)

    def _tensors(self, batch: Sequence[Encoded]) -> Mapping[str, Any]:
        return {name: tensor.to(self.model.device) for name, tensor in collate(batch, self._pad_id).items()}

    def _train(self, rows: Sequence[Encoded], steps: int, purpose: str) -> None:
        params, ctx = self.params, self.ctx
        folder = ctx.scratch() / purpose
        arguments = {
            "max_steps": steps,
            "per_device_train_batch_size": params.batch_size,
            "learning_rate": params.learning_rate,
            "weight_decay": params.weight_decay,
            "max_grad_norm": params.max_grad_norm,
            "seed": ctx.seed(ctx.task, ctx.party, purpose),
            "use_cpu": device_of(params.loading) == "cpu",
        }
        train(self.model, rows, arguments, folder=folder, pad_id=self._pad_id, check=ctx.check_cancelled)
        shutil.rmtree(folder, ignore_errors=True)

    @property
    def _pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)  # type: ignore[arg-type]

    def _all(self) -> Array:
        return _tokens([row for batch in self.batches for row in batch])

    # --- report --------------------------------------------------------------------------------------------------

    def _report(self, views: Sequence[View], outcome: str, verdict: str) -> None:
        params, folder = self.params, self.ctx.output("report")
        folder.mkdir()
        rows = [row_of(view) for view in views]
        main = {row["view"]: row for row in rows if row["update"] == GRADIENT}
        tested = ("batch_size", "parties", "warmup_steps", "local_steps", "learning_rate", "tolerance", "chance_trials")
        summary = {
            "outcome": outcome,
            "verdict": verdict,
            **{name: {key: main[name][key] for key in ("recall", "precision", "nearest", "auc")} for name in main},
            "layers": list(self.layers.modules),
            "rank": params.peft.r,
            **{name: getattr(params, name) for name in tested},
            "clipped_values": self.clipped,
            "error_bound": self.fixed.error_bound(params.parties, float(params.parties)),
        }
        curves = {f"{update}, {view}": (update, view) for update, view in self.true if view in ("plain", "masked")}
        curves["sum"] = (GRADIENT, "sum")
        plotted = distance_plot(
            {name: self.found[key] for name, key in curves.items()},
            {name: self.true[key] for name, key in curves.items()},
            folder / "distances.png",
        )
        write_report(folder, summary, rows, plotted)
        if params.show_tokens:
            self._write_tokens(folder / "tokens.json")

    def _write_tokens(self, path: Any) -> None:
        """What was named, and what was there, as text: content of this party's records."""
        shown = {}
        for (update, view), true in self.true.items():
            named = np.flatnonzero(self.found[update, view] <= self.params.tolerance)
            shown[f"{update}, {view}"] = {
                "found": self._texts(np.intersect1d(named, true)),
                "wrong": self._texts(np.setdiff1d(named, true)[:100]),
                "missed": self._texts(np.setdiff1d(true, named)),
            }
        path.write_text(json.dumps(shown, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _texts(self, tokens: Array) -> list[str]:
        return [str(self.tokenizer.decode([int(token)])) for token in tokens]


def _random(side: Side, trial: int) -> tuple[str, str]:
    return f"random {side}", str(trial)


def _tokens(rows: Sequence[Encoded]) -> Array:
    """Distinct token ids of the rows."""
    return np.unique(np.concatenate([row["input_ids"] for row in rows]))


PLUGIN = PrivacyAudit
