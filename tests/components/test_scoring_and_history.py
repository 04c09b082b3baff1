"""Sums of losses, greedy answers, the record of rounds, early stopping, and what a plan reckons with."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fate_llm.components.llm.history import EarlyStopping, History
from fate_llm.components.llm.scoring import generate, loss_sums, perplexity
from fate_llm.components.llm.templates import Encoded
from fate_llm.components.llm.training import Meter, RoundLog
from tests.components.tiny_model import tiny_config
from tests.components.tiny_tokenizer import CHATML, byte_tokenizer


@pytest.fixture(scope="module")
def tiny() -> Any:
    torch = pytest.importorskip("torch")
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(len(byte_tokenizer(CHATML)))).eval()


def row(ids: list[int], masked: int) -> Encoded:
    return {"input_ids": ids, "labels": [-100] * masked + ids[masked:]}


class TestLossSums:
    def test_it_is_the_token_sum_whatever_the_batches(self, tiny: Any) -> None:
        import torch

        rows = [row([5, 6, 7, 8, 9], 2), row([5, 9], 1), row([1, 2, 3, 4, 5, 6, 7, 8], 5)]
        wanted, count = 0.0, 0
        for one in rows:  # one record at a time, without padding
            logits = tiny(input_ids=torch.tensor([one["input_ids"]])).logits[0, :-1].detach()
            labels = torch.tensor(one["labels"])[1:]
            wanted += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
            count += int((labels != -100).sum())
        for size in (1, 2, 3):
            loss_sum, tokens = loss_sums(tiny, rows, batch_size=size, pad_id=0)
            assert tokens == count == 7
            assert loss_sum == pytest.approx(wanted, rel=1e-5)

    def test_the_mode_of_the_model_comes_back(self, tiny: Any) -> None:
        tiny.train()
        loss_sums(tiny, [row([1, 2], 1)], batch_size=1, pad_id=0)
        assert tiny.training
        tiny.eval()

    def test_it_can_be_stopped(self, tiny: Any) -> None:
        def stop() -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            loss_sums(tiny, [row([1, 2], 1)], batch_size=1, pad_id=0, check=stop)

    def test_perplexity(self) -> None:
        assert perplexity(math.log(8.0) * 3, 3) == pytest.approx(8.0)
        assert math.isnan(perplexity(0.0, 0))
        assert perplexity(1e9, 1) == math.inf


def test_answers_do_not_depend_on_the_batch(tiny: Any) -> None:
    tokenizer = byte_tokenizer(CHATML)
    prompts = [tokenizer(text)["input_ids"] for text in ("one", "a longer one", "x")]
    together = generate(tiny, tokenizer, prompts, max_new_tokens=5, batch_size=3)
    alone = [generate(tiny, tokenizer, [prompt], max_new_tokens=5, batch_size=1)[0] for prompt in prompts]
    assert together == alone
    assert len(together) == 3


def log(number: int, *, test: float | None = None, tokens: int = 10) -> RoundLog:
    sums = {"train_loss_sum": 30.0, "train_tokens": 20.0}
    if test is not None:
        sums |= {"test_loss_sum": test * 4, "test_tokens": 4.0}
    return RoundLog(number, Meter(15.0, tokens, 3), sums, ("a", "b"))


class TestHistory:
    def test_losses_are_token_means_and_tests_belong_to_the_state_before(self) -> None:
        history = History()
        first, second = {"w": np.zeros(1)}, {"w": np.ones(1)}
        history.evaluate(0, first, lambda: (8.0, 4))
        assert history.to_send(Meter(1.0, 2, 3))["test_tokens"] == 4.0
        made = history.finish_round(log(1, test=2.5))
        assert made == {"round": 1, "loss": 1.5, "local_loss": 1.5, "tokens": 10, "contributors": ["a", "b"]}
        assert history.rows[0] == {"round": 0, "test_loss": 2.5}
        history.evaluate(1, second, lambda: (4.0, 4))
        history.settle({"test_loss_sum": 4.0, "test_tokens": 4.0})
        assert history.rows[1]["test_loss"] == 1.0
        assert (history.best_loss, history.best_round) == (1.0, 1)
        assert history.best_state is second

    def test_a_worse_state_does_not_replace_the_best(self) -> None:
        history = History()
        history.evaluate(0, {"w": np.zeros(1)}, lambda: (1.0, 1))
        history.finish_round(log(1, test=1.0))
        history.evaluate(1, {"w": np.ones(1)}, lambda: (1.0, 1))
        history.finish_round(log(2, test=3.0))
        assert history.best_round == 0

    def test_without_test_records_there_is_no_test_loss(self) -> None:
        history = History()
        history.finish_round(log(1))
        assert "test_loss_sum" not in history.to_send(Meter())
        assert history.best_state is None

    def test_a_round_without_tokens_has_no_mean(self) -> None:
        made = History().finish_round(RoundLog(1, Meter(), {}, ()))
        assert made["loss"] is None
        assert made["local_loss"] is None


class TestEarlyStopping:
    @staticmethod
    def sums(loss: float) -> dict[str, float]:
        return {"test_loss_sum": loss * 10, "test_tokens": 10.0}

    def test_it_stops_after_patience_evaluations_without_a_fall(self) -> None:
        stopping = EarlyStopping(patience=2, least=0.1)
        losses = [3.0, 2.0, 1.95, 1.5, 1.49, 1.48]
        assert [stopping.should_stop(self.sums(loss)) for loss in losses] == [False] * 5 + [True]

    def test_off_or_without_evaluation_it_never_stops(self) -> None:
        assert not any(EarlyStopping(0, 0.0).should_stop(self.sums(9.0)) for _ in range(5))
        assert not any(EarlyStopping(1, 0.0).should_stop({}) for _ in range(5))


def test_the_meter_takes_and_starts_anew() -> None:
    meter = Meter()
    meter.add(6.0, 3, 2)
    meter.add(2.0, 1, 1)
    assert meter.last_loss == 2.0
    taken = meter.take()
    assert (taken.loss_sum, taken.tokens, taken.records) == (8.0, 4, 3)
    assert (meter.loss_sum, meter.tokens, meter.records) == (0.0, 0, 0)
