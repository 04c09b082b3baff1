"""Scores of a model on records: sums of losses and counts of tokens, and greedy answers.

Everything here returns sums and counts, never means: sums of several parties can be added up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .templates import Encoded, collate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["generate", "loss_sums", "perplexity"]


def perplexity(loss_sum: float, tokens: float) -> float:
    """exp of the token mean of the negative log-likelihood (nats); infinity when it overflows, NaN without tokens."""
    if tokens <= 0:
        return math.nan
    try:
        return math.exp(loss_sum / tokens)
    except OverflowError:
        return math.inf


def loss_sums(
    model: PreTrainedModel,
    rows: Sequence[Encoded],
    *,
    batch_size: int,
    pad_id: int,
    check: Callable[[], None] = lambda: None,
) -> tuple[float, int]:
    """(sum of the negative log-likelihoods in nats, number of tokens predicted) over all tokens with a label.

    Rows are taken longest first, so that a batch has little padding; check: called before every batch.
    """
    import torch

    loss_sum, tokens = 0.0, 0
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]), reverse=True)
    with _evaluating(model), torch.no_grad():
        for start in range(0, len(ordered), batch_size):
            check()
            batch = collate(ordered[start : start + batch_size], pad_id)
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch, use_cache=False).logits[:, :-1]
            counted = labels != -100
            loss = torch.nn.functional.cross_entropy(logits[counted].float(), labels[counted], reduction="sum")
            loss_sum += float(loss)
            tokens += int(counted.sum())
    return loss_sum, tokens


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    check: Callable[[], None] = lambda: None,
) -> list[str]:
    """Greedy answers to encoded prompts, in their order, without special tokens."""
    answers: dict[int, str] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    with _evaluating(model):
        for start in range(0, len(order), batch_size):
            check()
            chosen = order[start : start + batch_size]
            for index, text in zip(
                chosen, _generate(model, tokenizer, [prompts[i] for i in chosen], max_new_tokens), strict=True
            ):
                answers[index] = text
    return [answers[i] for i in range(len(prompts))]


def _generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], max_new_tokens: int
) -> list[str]:
    import torch

    width = max(len(prompt) for prompt in prompts)
    pad: int = tokenizer.pad_token_id  # type: ignore[assignment]
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "num_beams": 1,
        "pad_token_id": pad,
        "eos_token_id": tokenizer.eos_token_id,
        "use_cache": True,
    }
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=mask, **options)  # type: ignore[operator]
    texts: list[str] = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return [text.strip() for text in texts]


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)
