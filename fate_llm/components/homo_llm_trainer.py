"""Federated fine-tuning of one language model by parties that hold the same kind of records (FedAvg and its kin)."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, ValidationError, model_validator

from fate_llm.core import plugins
from fate_llm.core.errors import DataError
from fate_llm.core.interfaces import (
    Context,
    ContributorRounds,
    Estimate,
    Frozen,
    Kept,
    PlanView,
    Port,
    PredictRule,
    Replace,
    UpdateHook,
)
from fate_llm.core.values import Arrays, Artifact, ArtifactKind, Role

from .llm.adapters import PeftSettings, Trainable, attach, save_model, trainable_report, write_about
from .llm.checkpoint import Checkpoint, EpochStart
from .llm.costs import training_cost
from .llm.history import EarlyStopping, History
from .llm.modelref import ModelRef
from .llm.models import Loading, device_of, load_base, load_tokenizer, own_tree, require_training_extra
from .llm.ranks import Ranks, deepspeed_settings, split_batch, world
from .llm.records import Dataset
from .llm.scoring import loss_sums
from .llm.templates import Encoded, encode_dataset
from .llm.training import Meter, RoundLog, Schedule, Synchroniser, make_callback, make_trainer
from .llm.turns import Turns

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["PLUGIN", "HomoLlmTrainer", "HookRef"]


_FINAL = "final"  # the closing sum: the evaluation of the last round's state


class HookRef(Frozen):
    """An update hook with its params."""

    name: str = Field(description="Name of the hook.", json_schema_extra={"plugin": "hook"})
    params: dict[str, Any] = Field(default_factory=dict, description="The hook's own parameters.")

    @model_validator(mode="after")
    def _valid(self) -> HookRef:
        if self.name in plugins.names("hook"):
            _plugin_params("hook", self.name, self.params)
        return self


def _plugin_params(kind: str, name: str, params: dict[str, Any]) -> Any:
    """The validated params of a plug-in; faults become those of the field that holds them."""
    try:
        return plugins.load(kind, name).Params(**params)
    except ValidationError as error:
        texts = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'params'}: {e['msg']}" for e in error.errors())
        raise ValueError(f"{kind} {name}: {texts}") from None


class HomoLlmTrainer:
    """Fine-tunes one language model across the parties' private records.

    Guest and hosts train locally with the Hugging Face Trainer; after every `local_steps` optimizer steps (or
    `local_epochs` passes) their differences are averaged by the coordinator, and training goes on from the mean.
    Only trainable parameters travel, by name. The base model stays frozen with LoRA, and is shared by all parties of
    one process. `task_type` says what is trained for; the arbiter needs no model and no data, nor does the key holder
    that some protections need.
    """

    class Params(Frozen):
        model: ModelRef = Field(description="The base model; the same at every party.")
        task_type: Literal["causal_lm"] = Field("causal_lm", description="What the model is trained for.")
        peft: PeftSettings = Field(PeftSettings(), description="What of the model is trained.")
        loading: Loading = Field(Loading(), description="How the base model is brought into memory.")
        rounds: int = Field(4, ge=1, le=100_000, description="How often the parties' updates are averaged.")
        local_steps: int | None = Field(None, ge=1, description="Optimizer steps of each party in a round.")
        local_epochs: int | None = Field(None, ge=1, description="Passes over the party's records in a round.")
        batch_size: int = Field(8, ge=1, description="Records of one forward pass.")
        gradient_accumulation: int = Field(1, ge=1, description="Forward passes of one optimizer step.")
        gradient_checkpointing: bool = Field(False, description="Trade time for memory in the backward pass.")
        learning_rate: float = Field(2e-4, gt=0, le=1, description="Peak learning rate of the whole job.")
        lr_scheduler: Literal["linear", "cosine", "constant"] = Field(
            "linear", description="Learning-rate schedule over all rounds together."
        )
        warmup_steps: int = Field(0, ge=0, description="Optimizer steps of linear warm-up at the start of the job.")
        weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay of AdamW.")
        max_grad_norm: float = Field(1.0, gt=0, description="Clip the gradient's norm of every optimizer step.")
        group_by_length: bool = Field(
            False, description="Draw batches of records of about the same length: less padding, a little less chance."
        )
        max_length: int = Field(512, ge=8, description="Longest record in tokens; the prompt is cut from the left.")
        template: Literal["auto", "chat", "alpaca", "plain"] = Field(
            "auto",
            description="How a record becomes text; auto: what the reader noted, or the tokenizer's chat template.",
        )
        train_on: Literal["all", "last"] = Field("all", description="Which assistant turns carry loss.")
        weighting: Literal["tokens", "samples", "uniform"] = Field(
            "tokens", description="What a party's update counts by: loss tokens or records trained on, or all alike."
        )
        aggregator: str = Field(
            "fedavg", description="How updates become one.", json_schema_extra={"plugin": "aggregator"}
        )
        aggregator_params: dict[str, Any] = Field(default_factory=dict, description="The aggregator's parameters.")
        protection: str = Field("plain", description="How updates are summed.", json_schema_extra={"plugin": "sum"})
        protection_params: dict[str, Any] = Field(
            default_factory=dict, description="The protection's parameters; the same at every party."
        )
        hooks: tuple[HookRef, ...] = Field((), description="Update hooks; they run by their stage.")
        evaluate_every: int = Field(1, ge=0, description="Rounds between evaluations on `test`; 0: never.")
        select: Literal["last", "best"] = Field(
            "last", description="Which global state becomes `model`: of the last round, or of the lowest test loss."
        )
        save_every: int = Field(0, ge=0, description="Rounds between adapters kept in the job folder; 0: none.")
        patience: int = Field(0, ge=0, description="Stop after so many evaluations without improvement; 0: never.")
        min_improvement: float = Field(0.0, ge=0, description="Least fall of the test loss (nats) that counts.")

        @model_validator(mode="after")
        def _consistent(self) -> HomoLlmTrainer.Params:
            if (self.local_steps is None) == (self.local_epochs is None):
                raise ValueError("give exactly one of local_steps and local_epochs")
            if self.aggregator in plugins.names("aggregator"):
                _plugin_params("aggregator", self.aggregator, self.aggregator_params)
            if self.evaluate_every == 0 and (self.patience or self.select == "best"):
                raise ValueError("patience and select: best need evaluate_every of at least 1")
            return self

    inputs: ClassVar[dict[str, Port]] = {
        "train": Port(ArtifactKind.DATASET, "Records to train on."),
        "test": Port(ArtifactKind.DATASET, "Held-out records, evaluated every round.", required=False),
    }
    outputs: ClassVar[dict[str, Port]] = {
        "model": Port(ArtifactKind.MODEL, "The trained adapter (PEFT folder) or model (Hugging Face folder)."),
        "metrics": Port(ArtifactKind.METRICS, "Losses and sizes per round."),
    }
    ranked: ClassVar[frozenset[Role]] = frozenset({Role.GUEST, Role.HOST})  # where a party has several ranks
    predict_rule: ClassVar[PredictRule] = Replace(
        component="generator", artifact="model", inputs={"data": "test"}, params=("template", "max_length", "loading")
    )

    def needs_experiment(self, params: Params) -> str | None:
        return None

    def estimate(self, view: PlanView) -> Estimate:
        return training_cost(view)

    def guest(self, ctx: Context) -> None:
        _Contributor(ctx).run()

    host = guest

    def arbiter(self, ctx: Context) -> None:
        params: HomoLlmTrainer.Params = ctx.params
        rule = plugins.load("aggregator", params.aggregator)
        aggregator = rule(rule.Params(**params.aggregator_params))
        stopping = EarlyStopping(params.patience, params.min_improvement)
        keep: dict[str, Kept] = {"stopping": stopping}
        if isinstance(aggregator, Kept):
            keep["aggregator"] = aggregator
        rounds = ctx.coordinator_rounds(
            params.rounds,
            protection=params.protection,
            protection_params=params.protection_params,
            hooks=_hooks(ctx),
            keep_terms=rule.needs_plaintext,
            keep=keep,
        )
        state = rounds.start()
        for round in rounds:
            total = round.collect()
            state = aggregator.step(state, total)
            round.publish(state, stop=stopping.should_stop(total.sums))
        ctx.channel.aggregate(_FINAL, None, protection=params.protection, protection_params=params.protection_params)

    def key_holder(self, ctx: Context) -> None:
        params: HomoLlmTrainer.Params = ctx.params
        ctx.holder_rounds(protection=params.protection, protection_params=params.protection_params)
        ctx.channel.hold(_FINAL, protection=params.protection, protection_params=params.protection_params)


class _Contributor:
    """A contributor's page: prepare, train with the callback that contributes, choose, save."""

    def __init__(self, ctx: Context) -> None:
        require_training_extra()
        self.ctx = ctx
        self.params: HomoLlmTrainer.Params = ctx.params
        self.ranks = Ranks(world())
        self.batch = split_batch(self.params.batch_size, self.params.gradient_accumulation, self.ranks.world.size)
        self.history = History()
        self.checkpoint = Checkpoint()
        self.turns = Turns(ctx, ctx.seed(ctx.task, ctx.party))

    def run(self) -> None:
        ctx, params, turns = self.ctx, self.params, self.turns
        with turns.take(), self.ranks.together():
            self.ranks.join(device_of(params.loading))
            self.tokenizer = load_tokenizer(ctx, params.model)
            self.base = load_base(ctx, params.model, params.loading)
            self.model = self._trainable_model()
            self.trainable = Trainable(self.model)
            rows, self.test = self._encode("train"), self._encode("test") if "test" in ctx.inputs else []
            keep: dict[str, Kept] = {"trainer": self.checkpoint, "history": self.history}
            rounds = self.ranks.contributor_rounds(
                ctx,
                params.rounds,
                protection=params.protection,
                protection_params=params.protection_params,
                hooks=_hooks(ctx),
                keep=keep,
            )
            with turns.pause():
                state = rounds.start(self.trainable.read())
            self.trainable.load(state)
            if not rounds.resumed:
                self._evaluate(0, state)
            state = self._train(rounds, rows, state)
            with turns.pause():
                sums, _ = self.ranks.share(lambda: (self._final_sums(), {}))
            self.history.settle(sums)
            if self.ranks.first:
                self._save(state)

    def _final_sums(self) -> dict[str, float]:
        """The sums of the last evaluation: they missed the last round."""
        mine, params = self.history.to_send(Meter()), self.params
        return self.ctx.channel.aggregate(
            _FINAL, mine, protection=params.protection, protection_params=params.protection_params
        )

    def _train(self, rounds: ContributorRounds, rows: Sequence[Encoded], state: Arrays) -> Arrays:
        """All rounds that are left; the last global state."""
        folder = self.ctx.scratch() / "trainer"
        if self.ranks.first:  # a checkpoint that was being written when this party was killed
            shutil.rmtree(folder, ignore_errors=True)
        schedule = Schedule(self.params.rounds, self.params.local_steps, self.params.local_epochs)
        synchroniser = Synchroniser(
            rounds=iter(rounds),
            trainable=self.trainable,
            state=state,
            meter=Meter(),
            turns=self.turns,
            ranks=self.ranks,
            weigh=self._weigh,
            sums=self.history.to_send,
            after=self._after_round,
            journals=rounds.journals,
        )
        if synchroniser.current is None:  # killed after the last round
            return state
        resumed = self.checkpoint.resume_from(rounds.resumed)
        trainer = make_trainer(
            self.model,
            rows,
            arguments={
                **_arguments(self.params, self.ranks, self.batch),
                **schedule.length(),
                "seed": self._seed("trainer"),
            },
            folder=folder,
            pad_id=self._pad_id,
            meter=synchroniser.meter,
            callbacks=[make_callback(self.ctx, synchroniser, schedule, self.checkpoint, EpochStart(resumed))],
        )
        self.trainable.engine = lambda: getattr(trainer, "deepspeed", None)
        trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        return synchroniser.state

    @property
    def _pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)  # type: ignore[arg-type]

    def _seed(self, purpose: str) -> int:
        return self.ctx.seed(self.ctx.task, self.ctx.party, purpose)

    def _trainable_model(self) -> PreTrainedModel:
        """Every party draws the same first adapter: whoever's is sent, it is the one that all would have drawn."""
        import torch

        tree = own_tree(self.base) if self.params.peft.method == "lora" else copy.deepcopy(self.base)
        before = torch.get_rng_state()
        torch.manual_seed(self.ctx.seed(self.ctx.task, "first state"))
        model = attach(tree, self.params.peft)
        torch.set_rng_state(before)
        if self.params.gradient_checkpointing:
            model.enable_input_require_grads()
        self.ctx.emit("trainable", **trainable_report(model))
        return model

    def _encode(self, port: str) -> Sequence[Encoded]:
        artifact, params = self.ctx.inputs[port], self.params
        assert isinstance(artifact, Artifact)
        data = Dataset(artifact.path)
        template = data.template if params.template == "auto" else params.template
        encoded = encode_dataset(data, self.tokenizer, template, params.max_length, train_on=params.train_on)
        if not encoded.rows and port == "train":
            raise DataError(
                f"{self.ctx.party}: none of {len(data)} records can be trained on (max_length {params.max_length})"
            )
        self.ctx.emit(
            "encoded",
            port=port,
            rows=len(encoded.rows),
            skipped=len(encoded.skipped),
            cut=encoded.cut,
            tokens=encoded.tokens,
            loss_tokens=encoded.loss_tokens,
        )
        return encoded.rows

    def _weigh(self, local: Meter) -> float:
        by = {"tokens": float(local.tokens), "samples": float(local.records), "uniform": 1.0}
        return by[self.params.weighting]

    def _evaluate(self, number: int, state: Arrays) -> None:
        every = self.params.evaluate_every
        if self.test and every and (number % every == 0 or number == self.params.rounds):
            self.history.evaluate(number, state, self._score)

    def _score(self) -> tuple[float, int]:
        """Loss and tokens of the held-out records; every rank takes a part."""
        rows, size = self.ranks.portion(self.test), self.params.batch_size
        check = self.ctx.check_cancelled
        loss_sum, tokens = self.ranks.total(
            loss_sums(self.model, rows, batch_size=size, pad_id=self._pad_id, check=check)
        )
        return loss_sum, int(tokens)

    def _after_round(self, log: RoundLog, state: Arrays) -> None:
        row = self.history.finish_round(log)
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
        self.ctx.log_metrics(numbers, step=log.number)
        self.ctx.emit("round", rounds=self.params.rounds, **row)
        self._evaluate(log.number, state)
        if self.params.save_every and log.number % self.params.save_every == 0 and self.ranks.first:
            self._write(self.ctx.scratch() / "models" / f"round-{log.number:05d}", state, log.number)

    def _save(self, last: Arrays) -> None:
        """The chosen state is the output; last and best both stay in the job folder when they differ."""
        history, ctx = self.history, self.ctx
        rounds = int(history.rows[-1]["round"])
        best = history.best_state if history.best_state is not None else last
        best_round = history.best_round if history.best_round is not None else rounds
        if best_round != rounds:
            self._write(ctx.scratch() / "models" / "best", best, best_round)
            self._write(ctx.scratch() / "models" / "last", last, rounds)
        chosen = (last, rounds) if self.params.select == "last" else (best, best_round)
        self._write(ctx.output("model"), *chosen)
        metrics = {
            "rounds": history.rows,
            "best_round": history.best_round,
            "chosen_round": chosen[1],
            "trainable": trainable_report(self.model),
        }
        metrics_file = ctx.output("metrics")
        partial_file = metrics_file.with_name(metrics_file.name + ".partial")
        partial_file.write_text(json.dumps(metrics, indent=2) + "\n")
        partial_file.replace(metrics_file)

    def _base_ref(self) -> ModelRef:
        """The base model as others find it from anywhere on this machine."""
        ref = self.params.model
        return ref if ref.path is None else ModelRef(path=str(self.ctx.resolve(ref.path)))

    def _write(self, folder: Path, state: Arrays, number: int) -> None:
        """A PEFT folder (or a whole model's folder) that appears under its name only when it is complete.

        One of an earlier life, which was killed before its round was finished, is replaced.
        """
        partial_folder = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial_folder, ignore_errors=True)
        save_model(self.model, partial_folder, self.tokenizer, self.trainable.tensors(state))
        write_about(
            partial_folder,
            base=self._base_ref(),
            base_path=str(self.base.name_or_path),
            settings=self.params.peft,
            extra={"task": self.ctx.task, "round": number, "contributors": list(self.ctx.cohort.contributors)},
        )
        shutil.rmtree(folder, ignore_errors=True)
        partial_folder.rename(folder)


def _arguments(params: HomoLlmTrainer.Params, ranks: Ranks, batch: tuple[int, int]) -> dict[str, Any]:
    """The Trainer's arguments that are settings of ours. batch: records of a forward pass, passes of a step."""
    return {
        "per_device_train_batch_size": batch[0],
        "gradient_accumulation_steps": batch[1],
        **({"gradient_checkpointing": True} if params.gradient_checkpointing else {}),
        "learning_rate": params.learning_rate,
        "lr_scheduler_type": params.lr_scheduler,
        "warmup_steps": params.warmup_steps,
        "weight_decay": params.weight_decay,
        "max_grad_norm": params.max_grad_norm,
        "optim": "adamw_torch",
        **({"train_sampling_strategy": "group_by_length"} if params.group_by_length else {}),
        "use_cpu": device_of(params.loading) == "cpu",
        **ranks.trainer_arguments(deepspeed_settings()),
    }


def _hooks(ctx: Context) -> list[UpdateHook]:
    """The hooks of this party and task; those that round at random get a seed of their own."""
    made: list[UpdateHook] = []
    for ref in ctx.params.hooks:
        hook = plugins.load("hook", ref.name)
        seed = {"seed": ctx.seed(ctx.task, ctx.party, "hook", ref.name)} if getattr(hook, "draws", False) else {}
        made.append(hook(hook.Params(**ref.params), **seed))
    return made


PLUGIN = HomoLlmTrainer
