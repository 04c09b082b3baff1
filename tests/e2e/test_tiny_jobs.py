"""Whole jobs through the command line, with a tiny random model: three parties, an arbiter, all components."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from fate_llm.cli.main import main

pytestmark = pytest.mark.slow
Write = Callable[[dict[str, Any]], Path]
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def submit(tmp_path: Path, write_pipeline: Write) -> Run:
    """Submit a pipeline with --json; the document it printed."""

    def run(data: dict[str, Any], *more: str, exit_code: int = 0, workdir: str = "jobs") -> dict[str, Any]:
        path = write_pipeline(data)
        arguments = ["submit", str(path), "--json", "--quiet", "--workdir", str(tmp_path / workdir), *more]
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == exit_code, done.output
        document: dict[str, Any] = json.loads(done.stdout)
        return document

    return run


def adapter(document: dict[str, Any], party: str = "bank-a", task: str = "tune") -> dict[str, np.ndarray]:
    return load_file(Path(document["outputs"][party][task]["model"]) / "adapter_model.safetensors")


def rounds(document: dict[str, Any], task: str = "tune") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = document["metrics"][task]["rounds"]
    return found


def test_a_job_trains_one_adapter_for_all(pipeline: dict[str, Any], submit: Run) -> None:
    done = submit(pipeline)

    assert done["status"] == "success"
    first, *others = [adapter(done, party) for party in ("bank-a", "bank-b", "bank-c")]
    for other in others:
        assert all(np.array_equal(first[name], other[name]) for name in first)
    assert any(np.abs(value).max() > 0 for name, value in first.items() if "lora_B" in name)
    assert "tune" not in done["outputs"]["consortium"], "the arbiter keeps no model"
    found = rounds(done)
    assert [row["round"] for row in found] == [0, 1, 2]
    assert found[2]["test_loss"] < found[0]["test_loss"]
    table = done["metrics"]["evaluate"]["models"]
    assert [row["model"] for row in table] == ["base", "tune"]
    assert table[0]["records"] == 6 + 5 + 4, "the union of all held-out records"
    assert table[1]["loss"] == pytest.approx(found[2]["test_loss"], abs=1e-4)
    assert table[0]["loss"] == pytest.approx(found[0]["test_loss"], abs=1e-4)


def test_the_adapter_loads_with_peft(pipeline: dict[str, Any], submit: Run, tiny_model: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    done = submit(pipeline)
    base = AutoModelForCausalLM.from_pretrained(str(tiny_model))
    model = PeftModel.from_pretrained(base, done["outputs"]["bank-b"]["tune"]["model"])
    wanted = adapter(done)
    found = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert len(found) == len(wanted)
    for name, parameter in found.items():
        assert torch.equal(parameter, torch.from_numpy(wanted[name.replace(".default.", ".")]))


def test_the_same_pipeline_and_seed_give_the_same_bits(pipeline: dict[str, Any], submit: Run) -> None:
    one, two = submit(pipeline, workdir="one"), submit(pipeline, workdir="two")
    other = submit(pipeline, "--set", "job.seed=8", workdir="three")

    first, second, third = adapter(one), adapter(two), adapter(other)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert any(not np.array_equal(first[name], third[name]) for name in first)


def test_parties_in_threads_train_as_in_processes_of_their_own(pipeline: dict[str, Any], submit: Run) -> None:
    """Each party alone gives the same adapter as the same party beside others that train at the same time."""
    for party in ("bank-a", "bank-b", "bank-c"):
        task = json.loads(json.dumps(pipeline["tasks"]["tune"]))
        del task["inputs"]["test"]
        pipeline["tasks"][f"alone_{party[-1]}"] = {**task, "parties": [party]}
    del pipeline["tasks"]["tune"], pipeline["tasks"]["evaluate"]
    together = submit(pipeline, workdir="together")
    for party in ("bank-a", "bank-b", "bank-c"):
        name = f"alone_{party[-1]}"
        single = json.loads(json.dumps(pipeline))
        single["tasks"] = {key: value for key, value in pipeline["tasks"].items() if key in ("data", "split", name)}
        alone = submit(single, workdir=f"only-{name}")
        wanted, found = adapter(alone, party, name), adapter(together, party, name)
        assert all(np.array_equal(wanted[key], found[key]) for key in wanted), party


def test_federated_averaging_is_the_weighted_mean(pipeline: dict[str, Any], submit: Run) -> None:
    """One round equals the token-weighted mean of what each party trains alone from the same first state."""
    tune = pipeline["tasks"]["tune"]
    tune["params"] |= {"rounds": 1, "evaluate_every": 0, "gradient_accumulation": 2}
    del tune["inputs"]["test"], pipeline["tasks"]["evaluate"]
    # A task's name is part of its seeds, so the lonely parties run under the same name in jobs of their own.
    together = submit(pipeline, workdir="together")
    weights, parts = [], []
    for party in ("bank-a", "bank-b", "bank-c"):
        tune["parties"] = [party]
        alone = submit(pipeline, workdir=f"only-{party}")
        path = alone["outputs"][party]["tune"]["metrics"]
        weights.append(json.loads(Path(path).read_text())["rounds"][1]["tokens"])
        parts.append(adapter(alone, party))
    mean = {name: sum(w * p[name] for w, p in zip(weights, parts, strict=True)) / sum(weights) for name in parts[0]}
    found = adapter(together)
    for name, value in mean.items():
        assert np.allclose(found[name], value, atol=1e-6), name


def test_without_an_arbiter_the_guest_aggregates(pipeline: dict[str, Any], submit: Run) -> None:
    with_arbiter = adapter(submit(pipeline, workdir="with"))
    del pipeline["parties"]["arbiter"]
    without = adapter(submit(pipeline, workdir="without"))
    assert all(np.array_equal(with_arbiter[name], without[name]) for name in with_arbiter)


def test_the_arbiter_may_be_one_of_the_contributors(pipeline: dict[str, Any], submit: Run) -> None:
    pipeline["parties"]["arbiter"] = "bank-b"
    assert submit(pipeline)["status"] == "success"


def test_epochs_full_tuning_checkpointing_and_a_robust_rule(pipeline: dict[str, Any], submit: Run) -> None:
    params = pipeline["tasks"]["tune"]["params"]
    del params["local_steps"]
    params |= {
        "local_epochs": 1,
        "peft": {"method": "full"},
        "gradient_checkpointing": True,
        "aggregator": "median",
        "learning_rate": 0.001,
        "hooks": [{"name": "clip", "params": {"norm": 0.5}}],
    }
    done = submit(pipeline)
    folder = Path(done["outputs"]["bank-a"]["tune"]["model"])
    assert (folder / "model.safetensors").is_file()
    assert json.loads((folder / "fate_model.json").read_text())["kind"] == "full"
    assert len(rounds(done)) == 3


def test_the_best_state_is_kept_and_rounds_stop_early(pipeline: dict[str, Any], submit: Run) -> None:
    params = pipeline["tasks"]["tune"]["params"]
    # min_improvement that nothing reaches: the second evaluation without a fall ends the rounds.
    params |= {"rounds": 8, "patience": 2, "min_improvement": 50.0, "select": "best", "save_every": 1}
    done = submit(pipeline)
    found = rounds(done)
    assert len(found) < 9
    metrics = done["metrics"]["tune"]
    losses = {row["round"]: row["test_loss"] for row in found if "test_loss" in row}
    assert metrics["best_round"] == min(losses, key=lambda number: losses[number])
    assert metrics["chosen_round"] == metrics["best_round"]
    scratch = Path(done["outputs"]["bank-a"]["tune"]["model"]).parents[1] / "scratch" / "tune" / "models"
    assert {path.name for path in scratch.iterdir()} >= {"round-00001", "round-00002"}


@pytest.mark.parametrize(
    "settings",
    [
        {"weighting": "samples"},
        {"weighting": "uniform", "gradient_checkpointing": True, "lr_scheduler": "cosine", "warmup_steps": 1},
        {"loading": {"dtype": "bfloat16", "device": "cpu", "attention": "eager"}, "template": "alpaca"},
    ],
    ids=["samples", "checkpointing", "bfloat16"],
)
def test_other_settings(pipeline: dict[str, Any], submit: Run, settings: dict[str, Any]) -> None:
    pipeline["tasks"]["tune"]["params"] |= {**settings, "rounds": 1}
    assert submit(pipeline)["status"] == "success"


def test_the_job_folder_tells_everything(pipeline: dict[str, Any], submit: Run, tmp_path: Path) -> None:
    done = submit(pipeline)
    folder = tmp_path / "jobs" / done["job_id"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "success"
    assert manifest["seed"] == 7
    assert "torch" in manifest["versions"]
    assert "bank-a/tune/model" in manifest["digests"]
    assert (folder / "pipeline.yaml").is_file()
    for party in ("bank-a", "bank-b", "bank-c", "consortium"):
        assert (folder / "parties" / party / "log.txt").read_text()
    lines = (folder / "parties" / "bank-a" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_nothing_private_is_logged(pipeline: dict[str, Any], submit: Run, tmp_path: Path) -> None:
    canary = "zebra-4711"
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    lines.append(json.dumps({"question": f"{canary}?", "answer": f"{canary}!", "category": "c0"}))
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    done = submit(pipeline)
    folder = tmp_path / "jobs" / done["job_id"]
    own = folder / "parties" / "bank-a"
    for path in folder.rglob("*"):
        log = path.suffix in (".txt", ".jsonl") and path.parent.parent == folder / "parties"
        foreign = path.is_file() and own not in path.parents
        if log or foreign:
            assert canary not in path.read_bytes().decode("utf-8", errors="ignore"), path
