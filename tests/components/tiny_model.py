"""A random Llama of a few thousand weights with its tokenizer, and records to train it on: no download, no wait."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.components.tiny_tokenizer import CHATML, byte_tokenizer

__all__ = ["make_tiny_model", "tiny_config", "write_records"]


def tiny_config(vocabulary: int, **changes: Any) -> Any:
    from transformers import LlamaConfig

    settings = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
    return LlamaConfig(**{**settings, **changes})


def make_tiny_model(folder: Path, **changes: Any) -> Path:
    """Save a tiny random model and tokenizer into `folder`, the same every time."""
    import torch
    from transformers import LlamaForCausalLM

    tokenizer = byte_tokenizer(CHATML)
    before = torch.get_rng_state()
    torch.manual_seed(0)
    config = tiny_config(len(tokenizer), **changes)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = LlamaForCausalLM(config)
    torch.set_rng_state(before)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def write_records(path: Path, count: int, *, word: str, categories: int = 2) -> Path:
    """`count` question and answer records; the answer depends on the category."""
    lines = [
        json.dumps({"question": f"{word} {i}?", "answer": f"{word}-{i % categories}", "category": f"c{i % categories}"})
        for i in range(count)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path
