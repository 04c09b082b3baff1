"""Two ranks of one party train what one rank trains, and go on bit for bit after a kill."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fate_llm.components.homo_llm_trainer import HomoLlmTrainer
from fate_llm.components.llm.ranks import DEEPSPEED
from fate_llm.core.values import Artifact, ArtifactKind
from fate_llm.runtime.launch import LaunchSettings
from tests.components.journaled_rounds import Federation, run_party
from tests.components.test_trainer_resume import end_of
from tests.components.tiny_model import make_tiny_model
from tests.components.trainer_data import dataset

pytest.importorskip("torch")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SETTINGS = {"rounds": 3, "local_steps": 4, "batch_size": 4, "learning_rate": 0.01, "peft": {"r": 2}, "select": "best"}
ZERO: dict[str, dict[str, Any]] = {
    "zero 2": {"zero_optimization": {"stage": 2}},
    "zero 3": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    dataset(folder / "train", 24)
    dataset(folder / "test", 5)
    return folder


def run(
    folder: Path, ranks: int, params: dict[str, Any], data: Path, *place: str, zero: dict[str, Any] | None = None
) -> subprocess.CompletedProcess[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--max-restarts=0"]
    program = str(Path(__file__).with_name("ranked_party.py"))
    start = [sys.executable, *torchrun, f"--nproc-per-node={ranks}", program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if zero is not None:
        environment[DEEPSPEED] = json.dumps(LaunchSettings(nproc=ranks, deepspeed=zero).order()["deepspeed"])
    command = [*start, str(folder), json.dumps(params), str(data), *place]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)


def finished(*arguments: Any, **options: Any) -> None:
    done = run(*arguments, **options)
    assert done.returncode == 0, done.stderr[-3000:]


def alone(folder: Path, params: dict[str, Any], data: Path) -> None:
    """The same party as one rank, in this process."""
    inputs = {name: Artifact(ArtifactKind.DATASET, data / name, name, "bank-a") for name in ("train", "test")}
    run_party(folder, Federation(), HomoLlmTrainer.Params.model_validate(params), inputs, journal=False)


def adapter(folder: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return load_file(folder / "outputs" / "model" / "adapter_model.safetensors")


def metrics(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "outputs" / "metrics").read_text())
    return found


def assert_close(one: Path, two: Path, tolerance: float) -> None:
    first, second = adapter(one), adapter(two)
    assert first.keys() == second.keys()
    assert any(np.abs(value).max() > 1e-2 for name, value in first.items() if "lora_B" in name), "nothing was learnt"
    for name, value in first.items():
        np.testing.assert_allclose(second[name], value, atol=tolerance, err_msg=name)
    for row, other in zip(metrics(one)["rounds"], metrics(two)["rounds"], strict=True):
        assert (row["round"], row.get("tokens")) == (other["round"], other.get("tokens"))
        for name in ("loss", "local_loss", "test_loss"):
            assert row.get(name) == pytest.approx(other.get(name), abs=1e-4)


def test_two_ranks_train_what_one_trains(tmp_path: Path, model: Path, data: Path) -> None:
    params = {**SETTINGS, "model": {"path": str(model)}, "group_by_length": True}
    alone(tmp_path / "one", params, data)
    finished(tmp_path / "two", 2, params, data)
    assert_close(tmp_path / "one", tmp_path / "two", 1e-5)


def test_killed_they_go_on_bit_for_bit(tmp_path: Path, model: Path, data: Path) -> None:
    params = {**SETTINGS, "model": {"path": str(model)}, "peft": {"r": 2, "dropout": 0.2}, "group_by_length": True}
    finished(tmp_path / "whole", 2, params, data)
    killed = run(tmp_path / "cut", 2, params, data, "step", "10")
    assert killed.returncode != 0
    assert not (tmp_path / "cut" / "outputs").exists()
    finished(tmp_path / "cut", 2, params, data)
    assert end_of(tmp_path / "cut") == end_of(tmp_path / "whole")
    assert len(list((tmp_path / "cut" / "journal" / "3" / "keep" / "trainer" / "trainer").glob("rng_state_*.pth"))) == 2


@pytest.mark.parametrize("stage", ZERO)
def test_zero_trains_the_same(tmp_path: Path, model: Path, data: Path, stage: str) -> None:
    """The trap: ZeRO steps on a copy of its own, and an aggregate loaded beside it would be lost."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    params = {**SETTINGS, "model": {"path": str(model)}}
    alone(tmp_path / "one", params, data)
    finished(tmp_path / "zero", 2, params, data, zero=ZERO[stage])
    assert_close(tmp_path / "one", tmp_path / "zero", 1e-4)
    killed = run(tmp_path / "cut", 2, params, data, "step", "10", zero=ZERO[stage])
    assert killed.returncode != 0
    finished(tmp_path / "cut", 2, params, data, zero=ZERO[stage])
    assert all(
        np.array_equal(value, adapter(tmp_path / "cut")[name]) for name, value in adapter(tmp_path / "zero").items()
    )
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "zero")
