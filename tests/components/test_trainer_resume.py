"""A contributor that is killed goes on from its last finished round, and no bit of the end is another one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fate_llm.components.homo_llm_trainer import HomoLlmTrainer
from fate_llm.components.llm.checkpoint import Checkpoint
from fate_llm.core.canonical import digest_folder
from fate_llm.core.errors import InternalError
from fate_llm.core.values import Artifact, ArtifactKind
from tests.components.journaled_rounds import Federation, Killed, run_party
from tests.components.real_model import real_model_folder
from tests.components.tiny_model import make_tiny_model
from tests.components.trainer_data import dataset

torch = pytest.importorskip("torch")
Inputs = dict[str, Artifact]
Kill = Callable[[str, int], None]
MODES: dict[str, dict[str, Any]] = {
    "steps": {"local_steps": 3, "peft": {"dropout": 0.2, "r": 2}, "save_every": 1},
    "epochs": {"local_epochs": 1, "gradient_accumulation": 2, "lr_scheduler": "cosine", "select": "best"},
    "by length": {"local_steps": 4, "group_by_length": True, "peft": {"dropout": 0.1, "r": 2}, "evaluate_every": 2},
    "accumulated": {"local_steps": 2, "gradient_accumulation": 3, "weight_decay": 0.1, "warmup_steps": 2},
    "whole model": {"local_steps": 2, "peft": {"method": "full"}, "gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("data")
    return {
        name: Artifact(ArtifactKind.DATASET, dataset(folder / name, count), name, "bank-a")
        for name, count in (("train", 22), ("test", 5))
    }


def params_of(model: Path, mode: str, **changes: Any) -> HomoLlmTrainer.Params:
    settings = {"model": {"path": str(model)}, "rounds": 3, "batch_size": 4, "learning_rate": 0.01}
    return HomoLlmTrainer.Params.model_validate({**settings, **MODES[mode], **changes})


def once(place: str, number: int) -> Kill:
    """Kill the party the first time it is there."""
    done: list[bool] = []

    def kill(where: str, at: int) -> None:
        if (where, at) == (place, number) and not done:
            done.append(True)
            raise Killed(f"{where} {at}")

    return kill


def end_of(folder: Path) -> dict[str, Any]:
    """All that a run ends with, exactly: outputs, and what the Trainer kept of the last round."""
    rounds = folder / "journal"
    trainer = rounds / str(max(int(path.name) for path in rounds.iterdir())) / "keep" / "trainer" / "trainer"
    found: dict[str, Any] = {"model": digest_folder(folder / "outputs" / "model")}
    found["metrics"] = json.loads((folder / "outputs" / "metrics").read_text())
    for name in ("optimizer.pt", "scheduler.pt"):
        found[name] = exact(torch.load(trainer / name, weights_only=True))
    found["random"] = {path.name: path.read_bytes() for path in trainer.glob("rng_state*.pth")}
    assert found["random"]
    found["state"] = json.loads((trainer / "trainer_state.json").read_text())
    return found


def exact(value: Any) -> Any:
    """Tensors as bytes, so that `==` means the same bits."""
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: exact(item) for key, item in value.items()}
    return [exact(item) for item in value] if isinstance(value, list | tuple) else value


def lives(folder: Path, federation: Federation, params: HomoLlmTrainer.Params, inputs: Inputs) -> int:
    """Start the party until it gets through; how often it was started."""
    for started in range(1, 10):
        try:
            run_party(folder, federation, params, inputs, journal=True)
        except Killed:
            continue
        return started
    raise AssertionError("it does not end")


class TestUndisturbed:
    def test_a_journal_changes_nothing(self, tmp_path: Path, model: Path, inputs: Inputs) -> None:
        params = params_of(model, "steps")
        run_party(tmp_path / "with", Federation(), params, inputs, journal=True)
        run_party(tmp_path / "without", Federation(), params, inputs, journal=False)
        for name in ("model", "metrics"):
            assert digest_folder(tmp_path / "with" / "outputs" / name) == digest_folder(
                tmp_path / "without" / "outputs" / name
            )

    def test_without_a_journal_nothing_is_written_for_one(self, tmp_path: Path, model: Path, inputs: Inputs) -> None:
        run_party(tmp_path, Federation(), params_of(model, "epochs"), inputs, journal=False)
        assert not list(tmp_path.rglob("optimizer.pt"))
        assert not list(tmp_path.rglob("trainer_state.json"))


PLACES = {
    "steps": [("step", 2), ("contribute", 1), ("commit", 1), ("rename", 2), ("step", 8), ("contributed", 3)],
    "epochs": [("contributed", 1), ("step", 5), ("committed", 2), ("commit", 3)],
    "by length": [("step", 7), ("round", 2), ("step", 11)],
    "accumulated": [("committed", 1), ("step", 3), ("rename", 3)],
    "whole model": [("step", 3), ("round", 2)],
}


QUICK = {"steps", "by length"}
EACH = [pytest.param(mode, marks=() if mode in QUICK else pytest.mark.slow) for mode in MODES]


@pytest.mark.parametrize("mode", EACH)
def test_killed_anywhere_it_ends_the_same(tmp_path: Path, model: Path, inputs: Inputs, mode: str) -> None:
    params = params_of(model, mode)
    run_party(tmp_path / "whole", Federation(), params, inputs, journal=True)
    wanted = end_of(tmp_path / "whole")
    for place, number in PLACES[mode]:
        folder = tmp_path / f"{place}-{number}"
        assert lives(folder, Federation(kill=once(place, number)), params, inputs) == 2, "it was not killed there"
        assert end_of(folder) == wanted, (place, number)


def test_killed_again_and_again(tmp_path: Path, model: Path, inputs: Inputs) -> None:
    """A second life is killed as well: what it keeps is as good as what the first one kept."""
    params = params_of(model, "by length", rounds=5)
    run_party(tmp_path / "whole", Federation(), params, inputs, journal=True)
    # Round 3 ends with an epoch, and round 4 within one that a second life has begun.
    kills = [once("step", 6), once("commit", 3), once("step", 14), once("step", 18), once("final", 0)]

    def kill(place: str, number: int) -> None:
        for each in kills:
            each(place, number)

    assert lives(tmp_path / "cut", Federation(kill=kill), params, inputs) == 6
    assert end_of(tmp_path / "cut") == end_of(tmp_path / "whole")


@pytest.mark.parametrize("place", ["final", "output"])
def test_after_the_last_round_nothing_is_trained_again(tmp_path: Path, model: Path, inputs: Inputs, place: str) -> None:
    params = params_of(model, "epochs")
    run_party(tmp_path / "whole", Federation(), params, inputs, journal=True)
    federation = Federation(kill=once(place, 0))
    with pytest.raises(Killed):
        run_party(tmp_path / "cut", federation, params, inputs, journal=True)
    context = run_party(tmp_path / "cut", federation, params, inputs, journal=True)
    assert not [kind for kind, _ in context.events if kind in ("step", "round")]
    assert end_of(tmp_path / "cut") == end_of(tmp_path / "whole")


@pytest.mark.parametrize("mode", ["steps", pytest.param("epochs", marks=pytest.mark.slow)])
def test_rounds_that_ended_without_us_stay_counted(tmp_path: Path, model: Path, inputs: Inputs, mode: str) -> None:
    params, missed = params_of(model, mode, rounds=5), frozenset({2})
    run_party(tmp_path / "whole", Federation(missed), params, inputs, journal=True)
    rows = json.loads((tmp_path / "whole" / "outputs" / "metrics").read_text())["rounds"]
    assert [row["round"] for row in rows] == [0, 1, 3, 4, 5]
    for place, number in (("commit", 3), ("committed", 3), ("contribute", 5)):
        folder = tmp_path / f"{place}-{number}"
        assert lives(folder, Federation(missed, kill=once(place, number)), params, inputs) == 2
        assert end_of(folder) == end_of(tmp_path / "whole")
    if mode == "steps":  # the schedule ends with the job, as if we had trained in round 2 as well
        assert end_of(tmp_path / "whole")["scheduler.pt"]["last_epoch"] == 5 * 3


def test_rounds_that_stop_early_stay_stopped(tmp_path: Path, model: Path, inputs: Inputs) -> None:
    params = params_of(model, "steps", patience=1)
    run_party(tmp_path / "whole", Federation(stop_after=2), params, inputs, journal=True)
    assert lives(tmp_path / "cut", Federation(stop_after=2, kill=once("committed", 2)), params, inputs) == 2
    assert end_of(tmp_path / "cut") == end_of(tmp_path / "whole")
    assert end_of(tmp_path / "cut")["metrics"]["rounds"][-1]["round"] == 2


def test_the_first_state_is_evaluated_once(tmp_path: Path, model: Path, inputs: Inputs) -> None:
    federation = Federation(kill=once("committed", 1))
    with pytest.raises(Killed):
        run_party(tmp_path, federation, params_of(model, "steps"), inputs, journal=True)
    run_party(tmp_path, federation, params_of(model, "steps"), inputs, journal=True)
    rows = json.loads((tmp_path / "outputs" / "metrics").read_text())["rounds"]
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    assert "test_loss" in rows[0]


@pytest.mark.slow
def test_the_real_model_goes_on_bit_for_bit(tmp_path: Path, inputs: Inputs) -> None:
    real = Path(real_model_folder())
    params = params_of(real, "steps", rounds=2, local_steps=2, batch_size=2, learning_rate=2e-4, save_every=0)
    run_party(tmp_path / "whole", Federation(), params, inputs, journal=True)
    assert lives(tmp_path / "cut", Federation(kill=once("step", 3)), params, inputs) == 2
    assert end_of(tmp_path / "cut") == end_of(tmp_path / "whole")


def test_finished_rounds_without_a_checkpoint_are_our_own_fault() -> None:
    assert Checkpoint().resume_from(0) is None
    with pytest.raises(InternalError, match="2 rounds are finished"):
        Checkpoint().resume_from(2)
