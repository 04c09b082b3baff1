"""What a contributor's Trainer is at the end of a round, so that a party which was killed goes on bit for bit.

Rules:
1. The Trainer writes its own checkpoint (trained weights, optimizer, schedule, every library's random state, position
   in the data). It does so after the callbacks of the step or epoch that ended the round, so it holds the aggregate.
2. Beside it lies what the Trainer does not keep: torch's random state at the beginning of the epoch, from which a
   sampler draws its order again, and the optimizer steps of rounds that ended without us.
3. Nothing in it came from another party but the aggregate, and nothing of it leaves this machine.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from fate_llm.core.errors import InternalError

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "EpochStart"]

_TRAINER = "trainer"
_PROGRESS = "progress.json"
_EPOCH = "epoch_start.safetensors"


class Checkpoint:
    """Satisfies `core.interfaces.Kept`. skipped: optimizer steps of rounds that ended without this party so far."""

    def __init__(self) -> None:
        self.skipped = 0
        self._written: Path | None = None
        self._restored: Path | None = None

    def wrote(self, folder: Path) -> None:
        """The Trainer has written its checkpoint into `folder`, which becomes the journal's with the next `save`."""
        self._written = folder

    def resume_from(self, round_number: int) -> Path | None:
        """The Trainer's folder to go on from after `round_number` rounds; None at the beginning.

        Raises:
            InternalError: rounds have been finished, and there is no checkpoint of them.
        """
        if round_number == 0:
            return None
        if self._restored is None:
            raise InternalError(f"{round_number} rounds are finished, and the journal holds no checkpoint of a Trainer")
        return self._restored

    def save(self, folder: Path) -> None:
        if self._written is not None:
            shutil.move(self._written, folder / _TRAINER)
            self._written = None
        (folder / _PROGRESS).write_text(json.dumps({"skipped": self.skipped}) + "\n", encoding="utf-8")

    def restore(self, folder: Path) -> None:
        self.skipped = int(json.loads((folder / _PROGRESS).read_text(encoding="utf-8"))["skipped"])
        trainer = folder / _TRAINER
        self._restored = trainer if trainer.is_dir() else None


class EpochStart:
    """Torch's random state at the beginning of the running epoch: some samplers draw the epoch's order from it.

    resumed: the Trainer's folder that this run goes on from; its epoch begins as it began then.
    """

    def __init__(self, resumed: Path | None) -> None:
        self._resumed = resumed
        self._state: torch.Tensor | None = None

    def begin(self) -> None:
        """An epoch begins; its data loader has not drawn yet."""
        import torch

        if self._resumed is not None:
            from safetensors.torch import load_file

            torch.set_rng_state(load_file(self._resumed / _EPOCH)["cpu"])
            self._resumed = None
        self._state = torch.get_rng_state()

    def save(self, folder: Path, *, over: bool) -> None:
        """Write it into the Trainer's folder. over: the epoch's last step is done, so the next one begins here."""
        import torch
        from safetensors.torch import save_file

        state = torch.get_rng_state() if over else self._state
        if state is None:
            raise InternalError("a checkpoint is written before the first epoch has begun")
        save_file({"cpu": state}, folder / _EPOCH)
