"""Who a rank is, what it takes of a batch and of the held-out rows, and what a finished round leaves of the history."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fate_llm.components.homo_llm_trainer import HomoLlmTrainer
from fate_llm.components.llm import ranks
from fate_llm.components.llm.history import EarlyStopping, History
from fate_llm.components.llm.ranks import RankedRounds, Ranks, World, deepspeed_settings, split_batch, world
from fate_llm.components.llm.training import Meter, RoundLog
from fate_llm.core.errors import ConfigurationError
from fate_llm.core.interfaces import Frozen, Kept
from fate_llm.core.values import Roster
from tests.components.fake_context import make_contexts


class TestWorld:
    def test_without_torchrun_it_is_a_world_of_one(self) -> None:
        assert world({}) == World(0, 1, 0)

    def test_torchrun_says_who_we_are(self) -> None:
        assert world({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}) == World(3, 4, 1)

    @pytest.mark.parametrize(
        "said", [{"RANK": "4", "WORLD_SIZE": "4"}, {"RANK": "-1"}, {"WORLD_SIZE": "two"}, {"RANK": "1"}]
    )
    def test_what_cannot_be_is_refused(self, said: dict[str, str]) -> None:
        with pytest.raises(ConfigurationError, match="RANK="):
            world(said)

    def test_deepspeed_is_off_unless_the_party_says_so(self) -> None:
        assert deepspeed_settings({}) is deepspeed_settings({ranks.DEEPSPEED: ""}) is None
        assert deepspeed_settings({ranks.DEEPSPEED: '{"a": 1}'}) == {"a": 1}


class TestBatch:
    @pytest.mark.parametrize(
        ("batch", "accumulation", "count", "wanted"),
        [(8, 1, 1, (8, 1)), (8, 3, 4, (8, 3)), (1, 8, 4, (4, 2)), (3, 4, 2, (6, 2))],
    )
    def test_a_step_sees_the_same_records(self, batch: int, accumulation: int, count: int, wanted: Any) -> None:
        found = split_batch(batch, accumulation, count)
        assert found == wanted
        assert found[0] * found[1] == batch * accumulation
        assert found[0] % count == 0

    def test_what_cannot_be_divided_is_named(self) -> None:
        with pytest.raises(ConfigurationError, match=r"batch_size 3 nor gradient_accumulation 5 .* 2 ranks"):
            split_batch(3, 5, 2)


class TestPortion:
    @pytest.mark.parametrize("count", [1, 2, 5, 8])
    @pytest.mark.parametrize("size", [1, 2, 3])
    def test_every_row_counts_once_and_all_ranks_have_as_many(self, count: int, size: int) -> None:
        rows: Any = [{"input_ids": [i, 9], "labels": [-100, 9]} for i in range(count)]
        parts = [Ranks(World(rank, size, rank)).portion(rows) for rank in range(size)]
        assert len({len(part) for part in parts}) == 1
        counted = [row["input_ids"][0] for part in parts for row in part if set(row["labels"]) != {-100}]
        assert sorted(counted) == list(range(count))


class TestOneRank:
    def test_nothing_is_wrapped(self) -> None:
        alone = Ranks(World())
        real = object()

        class Ctx:
            def contributor_rounds(self, *args: Any, **kwargs: Any) -> Any:
                return real

        ctx: Any = Ctx()
        found = alone.contributor_rounds(ctx, 3, protection="plain", protection_params={}, hooks=(), keep={})
        assert found is real and not isinstance(found, RankedRounds)
        assert alone.share(lambda: ({"a": 1}, {})) == ({"a": 1}, {})
        assert alone.total([1.5, 2.0]) == [1.5, 2.0]
        assert alone.first and alone.trainer_arguments(None) == {}

    def test_several_cut_a_batch(self) -> None:
        found = Ranks(World(0, 2, 0)).trainer_arguments({"zero_optimization": {"stage": 2}})
        assert found["accelerator_config"] == {"split_batches": True}
        assert found["deepspeed"] == {"zero_optimization": {"stage": 2}}
        assert found["ddp_timeout"] > 7 * 24 * 3600


class TestTogether:
    @pytest.mark.parametrize(("size", "waits"), [(1, []), (2, [ranks._NEWS])])
    def test_what_breaks_between_ranks_waits_for_the_news(
        self, monkeypatch: pytest.MonkeyPatch, size: int, waits: list[float]
    ) -> None:
        waited: list[float] = []
        monkeypatch.setattr(ranks.time, "sleep", waited.append)
        with pytest.raises(RuntimeError, match="closed by peer"), Ranks(World(0, size, 0)).together():
            raise RuntimeError("connection closed by peer")
        assert waited == waits

    def test_an_error_of_ours_does_not_wait(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ranks.time, "sleep", lambda seconds: pytest.fail("it waits"))
        with pytest.raises(ConfigurationError), Ranks(World(0, 2, 0)).together():
            raise ConfigurationError("wrong")


class TestKept:
    def history(self) -> History:
        made = History()
        made.evaluate(0, {"w": np.arange(3, dtype=np.float32)}, lambda: (1.1, 3))
        sums = {"train_loss_sum": 1 / 3, "train_tokens": 7.0, "test_loss_sum": 0.1, "test_tokens": 3.0}
        made.finish_round(RoundLog(1, Meter(0.7, 3, 2), sums, ("a", "b")))
        made.evaluate(1, {"w": np.full(3, 0.1, np.float32)}, lambda: (1 / 7, 3))
        return made

    def test_the_history_comes_back_bit_for_bit(self, tmp_path: Path) -> None:
        first, second = self.history(), History()
        first.save(tmp_path)
        second.restore(tmp_path)
        assert second.rows == first.rows
        assert (second.best_loss, second.best_round) == (first.best_loss, 0)
        assert second.best_state is not None and first.best_state is not None
        assert second.best_state["w"].tobytes() == first.best_state["w"].tobytes()
        assert second.to_send(Meter()) == first.to_send(Meter())
        for each in (first, second):  # they go on alike
            each.settle({"test_loss_sum": 0.01, "test_tokens": 3.0})
        assert second.rows == first.rows and second.best_round == first.best_round == 1

    def test_a_history_without_evaluation_has_none_afterwards(self, tmp_path: Path) -> None:
        first, second = History(), self.history()
        first.save(tmp_path)
        second.restore(tmp_path)
        assert (second.rows, second.best_state, second.best_loss) == ([{"round": 0}], None, math.inf)
        assert "test_tokens" not in second.to_send(Meter())
        assert json.loads((tmp_path / "history.json").read_text())["best_loss"] == "inf"

    def test_early_stopping_goes_on_counting(self, tmp_path: Path) -> None:
        losses = [3.0, 2.9, 3.1, 2.95]
        whole, cut = EarlyStopping(2, 0.0), EarlyStopping(2, 0.0)
        sums = [{"test_loss_sum": loss * 4, "test_tokens": 4.0} for loss in losses]
        wanted = [whole.should_stop(each) for each in sums]
        found = [cut.should_stop(each) for each in sums[:3]]
        cut.save(tmp_path)
        after = EarlyStopping(2, 0.0)
        after.restore(tmp_path)
        assert [*found, after.should_stop(sums[3])] == wanted == [False, False, False, True]
        assert (after.best, after.waited) == (whole.best, whole.waited)


class Remembering:
    """An aggregator with a state of its own."""

    needs_plaintext = False

    class Params(Frozen):
        pass

    def __init__(self, params: Any) -> None: ...

    def step(self, state: Any, total: Any) -> Any:
        return state

    def save(self, folder: Path) -> None: ...

    def restore(self, folder: Path) -> None: ...


@pytest.mark.parametrize("remembers", [True, False])
def test_the_coordinator_keeps_stopping_and_an_aggregator_that_remembers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remembers: bool
) -> None:
    params = HomoLlmTrainer.Params.model_validate({"model": {"path": "m"}, "local_steps": 1, "patience": 2})
    ctx = make_contexts(tmp_path, Roster("a", ("b",), "z"), params=params)["z"]
    seen: dict[str, Any] = {}

    class Rounds:
        def start(self) -> dict[str, Any]:
            return {}

        def __iter__(self) -> Any:
            return iter(())

    monkeypatch.setattr(ctx, "coordinator_rounds", lambda count, **options: seen.update(options) or Rounds())
    monkeypatch.setattr(ctx.channel, "aggregate", lambda *args, **kwargs: {})
    if remembers:
        monkeypatch.setattr("fate_llm.components.homo_llm_trainer.plugins.load", lambda kind, name: Remembering)
    HomoLlmTrainer().arbiter(ctx)  # type: ignore[arg-type]
    assert set(seen["keep"]) == ({"stopping", "aggregator"} if remembers else {"stopping"})
    assert all(isinstance(kept, Kept) for kept in seen["keep"].values())
