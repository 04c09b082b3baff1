"""A child process: an ordinary Hugging Face Trainer with LoRA, as one would write it by hand, on one data set.

Timed from the encoded records to the written adapter, as `_federated.py` is.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from _measure import own_peak_mib
from _records import write_records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("parties", "steps", "batch"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--model", type=json.loads, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder")
    options = parser.parse_args()
    source = _folder_of(options.model)
    model, tokenizer = _load(source)
    per_party = options.steps * options.batch // options.parties
    rows = [row for n in range(options.parties) for row in _encode(tokenizer, options.folder, per_party, seed=n)]
    start, work = time.monotonic(), time.process_time()
    trainer = _trainer(model, rows, options)
    trainer.train()
    trained = time.monotonic()
    model.save_pretrained(str(options.folder / "adapter"), save_embedding_layers=False)
    answer = {
        "seconds": time.monotonic() - start,
        "cpu_seconds": time.process_time() - work,
        "until_trained": trained - start,
        "tokens": sum(len(row["input_ids"]) for row in rows),
        "lengths": sorted({len(row["input_ids"]) for row in rows}),
        "peak_mib": own_peak_mib(),
    }
    print(json.dumps(answer))


def _folder_of(model: dict[str, str]) -> str:
    """Where the model lies; a GGUF file has been converted by the federated run or is converted here, untimed."""
    from fate_llm.components.llm.modelref import ModelRef
    from fate_llm.components.llm.models import model_folder

    return model_folder(ModelRef(**model), Path)


def _load(source: str) -> tuple[Any, Any]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

    assert Trainer is not None
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    settings = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(base, settings), AutoTokenizer.from_pretrained(source)


def _encode(tokenizer: Any, folder: Path, rows: int, *, seed: int) -> list[dict[str, Any]]:
    """The very rows that the federated run trains on, as tensors."""
    import torch

    from fate_llm.components.llm.records import Record
    from fate_llm.components.llm.templates import encode_dataset

    file = write_records(folder / f"{seed}.jsonl", rows, seed=seed)
    found = [json.loads(line) for line in file.read_text().splitlines()]
    records = [Record.from_instruction(str(n), r["instruction"], r["output"]) for n, r in enumerate(found)]
    encoded = []
    for row in encode_dataset(records, tokenizer, "auto", 512).rows:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        encoded.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return encoded


def _trainer(model: Any, rows: list[dict[str, Any]], options: argparse.Namespace) -> Any:
    from transformers import (  # imported by `_load` already, before the clock started
        Trainer,
        TrainingArguments,
    )

    arguments = TrainingArguments(
        output_dir=str(options.folder / "trainer"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return Trainer(model=model, args=arguments, train_dataset=rows)


if __name__ == "__main__":
    main()
