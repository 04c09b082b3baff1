"""A child process: one job of homo_llm_trainer on the local runtime; prints its times and its peak memory.

Prepared: every party has loaded the model and encoded its records. Finished: every party has written its adapter.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path

from _local import Diary, Task, run_job
from _measure import own_peak_mib
from _records import write_records

from fate_llm.runtime.local import one_malloc_arena
from fate_llm.runtime.party import InputRef


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("parties", "rounds", "steps", "batch"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--model", type=json.loads, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder")
    options = parser.parse_args()
    _import_libraries()
    diary = _run(options)
    prepared, trained = max(diary.times("encoded")), max(diary.times("round", round=options.rounds))
    tokens = [event.fields["tokens"] for _, event in diary.pages if event.kind == "encoded"]
    answer = {
        "seconds": max(diary.times("task_finished")) - prepared,
        "cpu_seconds": diary.work["task_finished"] - diary.work["encoded"],
        "until_trained": trained - prepared,
        "rounds": _round_times(diary, prepared, options.rounds),
        "tokens_per_party": tokens,
        "peak_mib": own_peak_mib(),
    }
    print(json.dumps(answer))


def _import_libraries() -> None:
    """What training will import, before anything is timed; after the setting that has to come before torch."""
    one_malloc_arena()
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

    assert all((LoraConfig, get_peft_model, AutoModelForCausalLM, AutoTokenizer))
    assert all((Trainer, TrainerCallback, TrainingArguments))


def _run(options: argparse.Namespace) -> Diary:
    parties = [f"bank-{number}" for number in range(1, options.parties + 1)]
    rows = options.rounds * options.steps * options.batch
    own = {}
    for number, party in enumerate(parties):
        file = write_records(options.folder / f"{party}.jsonl", rows, seed=number)
        own[party] = {"data": {"path": str(file)}}
    training = {
        "model": options.model,
        "peft": {"method": "lora", "r": 8},
        "rounds": options.rounds,
        "local_steps": options.steps,
        "batch_size": options.batch,
        "learning_rate": 1e-3,
        "evaluate_every": 0,
    }
    tasks = [
        Task("data", "reader", {"path": "", "fields": {"instruction": "instruction", "output": "output"}}),
        Task("tune", "homo_llm_trainer", training, {"train": InputRef("data", "dataset")}, arbiter=True),
    ]
    return run_job(parties, tasks, own=own, folder=options.folder)


def _round_times(diary: Diary, start: float, rounds: int) -> list[float]:
    """Seconds of each round, until the coordinator has its sum."""
    ends = [start, *(max(diary.times("round_closed", round=number)) for number in range(1, rounds + 1))]
    return [after - before for before, after in pairwise(ends)]


if __name__ == "__main__":
    main()
