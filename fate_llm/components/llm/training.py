"""Local training: an ordinary Hugging Face Trainer, and the callback that makes it one of a federation.

Rules:
1. One Trainer lives through all rounds: its optimiser, schedule and data order go on, and one learning-rate schedule
   spans the job.
2. The callback calls `contribute` at the end of every N-th optimizer step (or of every N-th epoch) and loads what
   comes back; nothing else of the Trainer is touched.
3. Losses are sums over loss tokens with their count; tokens are counted in `compute_loss`, where the batch really
   is trained on (a data loader fetches ahead).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fate_llm.core.interfaces import Context, ContributorRound
from fate_llm.core.values import Arrays, RoundResult

from .adapters import Trainable
from .checkpoint import Checkpoint, EpochStart
from .ranks import Ranks
from .templates import Encoded, collate
from .turns import Turns

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer, TrainerCallback

__all__ = ["Meter", "RoundLog", "Schedule", "Synchroniser", "make_callback", "make_trainer"]


@dataclass(slots=True)
class Meter:
    """What was trained on since the last `take`: loss in nats summed over tokens, loss tokens, records."""

    loss_sum: float = 0.0
    tokens: int = 0
    records: int = 0
    last_loss: float = 0.0

    def add(self, loss_sum: float, tokens: int, records: int) -> None:
        self.loss_sum += loss_sum
        self.tokens += tokens
        self.records += records
        self.last_loss = loss_sum / tokens if tokens else 0.0

    def take(self) -> Meter:
        """What has gathered, and start anew."""
        taken = Meter(self.loss_sum, self.tokens, self.records, self.last_loss)
        self.loss_sum, self.tokens, self.records = 0.0, 0, 0
        return taken


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long a round's local work is: `steps` optimizer steps, or `epochs` passes (exactly one is set)."""

    rounds: int
    steps: int | None
    epochs: int | None

    def length(self) -> dict[str, float | int]:
        """The Trainer's arguments for the whole job."""
        if self.steps is not None:
            return {"max_steps": self.rounds * self.steps, "num_train_epochs": 1}
        return {"max_steps": -1, "num_train_epochs": self.rounds * (self.epochs or 1)}


@dataclass(frozen=True, slots=True)
class RoundLog:
    """One finished round as this party saw it. sums: the aggregate of all contributors' additive numbers."""

    number: int
    local: Meter
    sums: Mapping[str, float]
    contributors: tuple[str, ...]


@dataclass(slots=True)
class Synchroniser:
    """Exchanges the trainable parameters at the end of a round's local work.

    weigh: the weight of this party's update, from what it trained on. sums: additive numbers to send along.
    after: told of every finished round, with the new global state loaded. journals: a round is finished in two steps,
    so that what is kept of it is written in between.
    """

    rounds: Iterator[ContributorRound]
    trainable: Trainable
    state: Arrays
    meter: Meter
    turns: Turns
    ranks: Ranks
    weigh: Callable[[Meter], float]
    sums: Callable[[Meter], dict[str, float]]
    after: Callable[[RoundLog, Arrays], None]
    journals: bool = False
    current: ContributorRound | None = field(init=False)
    behind: int = 0

    def __post_init__(self) -> None:
        self.current = next(self.rounds, None)

    def exchange(self) -> None:
        """Contribute to the present round and load what comes back. `behind`: how many rounds ended without us."""
        assert self.current is not None
        number = self.current.number
        local = self._local()
        update = self.trainable.difference(self.state)
        sums = self.sums(local)
        with self.turns.pause():
            result = self._contribute(update, self.weigh(local), sums)
        del update
        self.behind = result.number - number
        self.state = result.state
        self.trainable.load(result.state)
        self.after(RoundLog(result.number, local, result.sums, result.contributors), result.state)

    def advance(self) -> bool:
        """The present round is finished, and what is kept of it is written; True when there is another."""
        self.current = next(self.rounds, None)
        return self.current is not None

    def _local(self) -> Meter:
        """What all ranks of this party have trained on."""
        mine = self.meter.take()
        loss_sum, tokens, records = self.ranks.total([mine.loss_sum, mine.tokens, mine.records])
        return Meter(loss_sum, int(tokens), int(records), mine.last_loss)

    def _contribute(self, update: Arrays, weight: float, sums: dict[str, float]) -> RoundResult:
        assert self.current is not None
        return self.current.contribute(update, weight=weight, sums=sums)


def make_callback(
    ctx: Context, synchroniser: Synchroniser, schedule: Schedule, checkpoint: Checkpoint, epoch: EpochStart
) -> TrainerCallback:
    """The Trainer callback: cancels, reports steps, and synchronises when a round's local work is done.

    With a journal the Trainer writes its checkpoint after the exchange, and only then the round is finished.
    """
    from transformers import TrainerCallback as Base

    class Synchronise(Base):
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            epoch.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ctx.check_cancelled()
            current = synchroniser.current
            ctx.emit(
                "step",
                step=state.global_step + checkpoint.skipped,
                steps=state.max_steps,
                round=current.number if current else schedule.rounds,
                rounds=schedule.rounds,
                loss=round(synchroniser.meter.last_loss, 4),
            )
            if _epoch_is_over(state):
                synchroniser.ranks.same_random_state()
            if schedule.steps is not None and state.global_step % schedule.steps == 0:
                self._end_round(control, kwargs["lr_scheduler"])

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if schedule.epochs is not None and round(state.epoch) % schedule.epochs == 0:
                self._end_round(control, kwargs["lr_scheduler"])

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if synchroniser.ranks.first:
                epoch.save(folder, over=_epoch_is_over(state))
                checkpoint.wrote(folder)
            control.should_training_stop = not synchroniser.advance()

        def _end_round(self, control: Any, lr_scheduler: Any) -> None:
            synchroniser.exchange()
            # Rounds that ended without us: the schedule goes on as if we had trained, so that it ends with the job.
            for _ in range(synchroniser.behind * (schedule.steps or 0)):
                lr_scheduler.step()
                checkpoint.skipped += 1
            if synchroniser.journals:
                control.should_save = True
            elif not synchroniser.advance():
                control.should_training_stop = True

    return Synchronise()


def _epoch_is_over(state: Any) -> bool:
    """Whether the step that has just ended is the last of its epoch."""
    return float(state.epoch).is_integer()


class _Rows:
    """A torch dataset is anything with a length and items."""

    def __init__(self, rows: Sequence[Encoded]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Encoded:
        return self._rows[index]


def make_trainer(
    model: PreTrainedModel,
    rows: Sequence[Encoded],
    *,
    arguments: Mapping[str, Any],
    folder: Path,
    pad_id: int,
    meter: Meter,
    callbacks: Sequence[TrainerCallback],
) -> Trainer:
    """A Trainer on encoded rows that counts what it trains on in `meter`.

    Creating the arguments resets accelerate's process-wide state: call this while holding the turn, whole.
    """
    from transformers import PrinterCallback, ProgressCallback, TrainingArguments
    from transformers import Trainer as Base

    class Counting(Base):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            result = super().compute_loss(model, inputs, *args, **kwargs)
            loss = result[0] if isinstance(result, tuple) else result
            tokens = int((inputs["labels"][:, 1:] != -100).sum())
            window = kwargs.get("num_items_in_batch")  # loss tokens of the whole optimizer step, of all ranks
            per = float(window) / self.accelerator.num_processes if window is not None else tokens
            meter.add(float(loss.detach()) * per, tokens, len(inputs["labels"]))
            return result

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            """Only what is trained, without asking a hub about the rest. DeepSpeed writes its own beside it."""
            if self.is_deepspeed_enabled or not self.args.should_save:
                return
            trained: Any = self.model
            weights = {"save_embedding_layers": False} if hasattr(trained, "peft_config") else {}
            trained.save_pretrained(str(output_dir), **weights)

    options: dict[str, Any] = {
        "output_dir": str(folder),
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "dataloader_num_workers": 0,
        **arguments,
    }
    trainer = Counting(
        model=model,
        args=TrainingArguments(**options),
        train_dataset=_Rows(rows),  # type: ignore[arg-type]
        data_collator=lambda batch: collate(batch, pad_id),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer
