"""A tiny random Llama with LoRA, importable by name: our side and the peer's build exactly the same one.

Importable, because a framework that sends code to its workers sends this module's name and not the model.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["adapted", "base", "save", "shared_model"]

_SHAPE = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def base() -> Any:
    """The model, with the same random weights in every process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**_SHAPE))  # type: ignore[arg-type]


def adapted(model: Any) -> Any:
    """The model with rank-8 adapters on its four attention projections: 16,384 trainable values."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=8, target_modules=_TARGETS, task_type="CAUSAL_LM"))


@cache
def shared_model() -> Any:
    """One adapted model per process, made once however many parties the process plays."""
    return adapted(base())


def save(folder: Path) -> Path:
    """A Hugging Face folder of the model with a byte-level tokenizer, for runs that need files."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(BPE({piece: at for at, piece in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    names = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=core, **names)  # type: ignore[no-untyped-call]
    tokenizer.chat_template = _TEMPLATE
    base().save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder
