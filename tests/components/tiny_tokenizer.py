"""A byte-level tokenizer made in the test, so that no test of templates needs a network or a model."""

from __future__ import annotations

from typing import Any

__all__ = ["CHATML", "SPECIAL", "byte_tokenizer"]

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a default assistant<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<pad>"]


def byte_tokenizer(template: str | None, *, adds_bos: bool = False) -> Any:
    """Byte-level BPE with a few merges over line ends, so that tokens can reach over the edges of turns."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("t", "h"), ("th", "e"), (".", "Ċ"), ("Ġ", "a")]
    vocabulary = [*alphabet, *("".join(merge) for merge in merges)]
    core = Tokenizer(BPE({piece: at for at, piece in enumerate(vocabulary)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    if adds_bos:
        bos = core.token_to_id("<s>")
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    if template == CHATML:
        names["eos_token"] = "<|im_end|>"
    made: Any = PreTrainedTokenizerFast(tokenizer_object=core, **names)  # type: ignore[no-untyped-call]
    made.chat_template = template
    return made
