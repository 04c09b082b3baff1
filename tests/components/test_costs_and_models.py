"""What a plan reckons with, how models are found and shared, turns with random state, plots."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fate_llm.components.evaluator import Evaluator
from fate_llm.components.homo_llm_trainer import HomoLlmTrainer
from fate_llm.components.llm.costs import ENVELOPE, HANDSHAKE, PLAIN_PROCESS, hidden_bytes
from fate_llm.components.llm.modelref import ModelRef
from fate_llm.components.llm.models import Loading, cache_folder, device_of, load_base, load_tokenizer, own_tree
from fate_llm.components.llm.plots import loss_plot
from fate_llm.components.llm.turns import Turns
from fate_llm.components.reader import Reader
from fate_llm.core import plugins
from fate_llm.core.errors import MissingExtra, ModelError
from fate_llm.core.interfaces import PlanView
from fate_llm.core.values import Cohort, Roster
from tests.components.fake_context import make_contexts
from tests.components.tiny_model import make_tiny_model, write_records

ROSTER = Roster("bank-a", ("bank-b",), "consortium")
COHORT = Cohort(("bank-a", "bank-b"), "consortium", 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    return make_tiny_model(tmp_path_factory.mktemp("m") / "tiny")


def view(folder: Path, model: str, *, data: bool = True, **params: Any) -> PlanView:
    settings = {"model": {"path": model}, "rounds": 3, "local_steps": 1, **params}
    trained = HomoLlmTrainer.Params.model_validate(settings)
    reader = Reader.Params.model_validate({"path": "a.jsonl"})
    upstream = {"train": {"bank-a": ("splitter", None)}}
    if data:
        write_records(folder / "a.jsonl", 8, word="x")
        upstream["train.data"] = {"bank-a": ("reader", reader)}
    return PlanView("tune", ROSTER, COHORT, dict.fromkeys(COHORT.contributors, trained), upstream, folder)


class TestTrainingCost:
    def test_bytes_and_memory_from_files_alone(self, model: Path, tmp_path: Path) -> None:
        cost = HomoLlmTrainer().estimate(view(tmp_path, str(model)))
        updates = [t for t in cost.traffic if t.what == "update"]
        assert {(t.sender, t.receiver, t.times) for t in updates} == {
            ("bank-a", "consortium", 3),
            ("bank-b", "consortium", 3),
        }
        values = 2 * (8 * (32 + 32) + 8 * (32 + 16)) * 4  # two layers, query and value projections, rank 8, float32
        assert values < (updates[0].bytes_each or 0) < values + 3000
        assert cost.memory_bytes is not None
        assert cost.coordinator_memory_bytes is not None
        assert cost.coordinator_memory_bytes < 2 * PLAIN_PROCESS < cost.memory_bytes

    def test_full_tuning_sends_all_weights_and_needs_more(self, model: Path, tmp_path: Path) -> None:
        lora = HomoLlmTrainer().estimate(view(tmp_path, str(model)))
        full = HomoLlmTrainer().estimate(view(tmp_path, str(model), peft={"method": "full"}))
        assert max(t.bytes_each or 0 for t in full.traffic) > max(t.bytes_each or 0 for t in lora.traffic)
        assert (full.memory_bytes or 0) > (lora.memory_bytes or 0)

    def test_a_masked_update_is_as_large_as_a_plain_one_and_keys_go_besides(self, model: Path, tmp_path: Path) -> None:
        plain = HomoLlmTrainer().estimate(view(tmp_path, str(model)))
        masked = HomoLlmTrainer().estimate(view(tmp_path, str(model), protection="secagg"))
        sizes = [{t.what: t.bytes_each or 0 for t in cost.traffic} for cost in (plain, masked)]
        values = 2 * (8 * (32 + 32) + 8 * (32 + 16))
        assert sizes[1]["update"] == 4 * values + ENVELOPE <= sizes[0]["update"]
        assert sizes[1]["new state"] == sizes[0]["new state"]
        keys = [t for t in masked.traffic if t.what == "keys, shares, signatures"]
        assert {(t.sender, t.receiver, t.times) for t in keys} == {
            (*pair, times)
            for pair in permutations(("bank-a", "consortium"), 2)
            for times in (3, 1)  # of each round, and of the closing sum
        } | {(*pair, times) for pair in permutations(("bank-b", "consortium"), 2) for times in (3, 1)}
        assert all(0 < (t.bytes_each or 0) - HANDSHAKE < 2 * 1024 for t in keys), "at most 1 KiB for each peer"
        assert not any(t.what.startswith("keys") for t in plain.traffic)

    def test_encrypted_updates_come_in_whole_ciphertexts_and_are_opened_elsewhere(
        self, model: Path, tmp_path: Path
    ) -> None:
        given = replace(
            view(tmp_path, str(model), protection="ckks"), roster=Roster("bank-a", ("bank-b",), "consortium", "keys")
        )
        cost = HomoLlmTrainer().estimate(given)
        update = next(t for t in cost.traffic if t.what == "update")
        assert update.bytes_each == 131_217 + ENVELOPE
        opened = [(t.sender, t.receiver, t.times) for t in cost.traffic if "keys" in (t.sender, t.receiver)]
        assert ("consortium", "keys", 3) in opened
        assert ("keys", "consortium", 3) in opened
        sealed = [t for t in cost.traffic if t.what == "encrypted sums"]
        assert [(t.sender, t.times, t.bytes_each) for t in sealed] == [
            ("bank-a", 1, 131_217 + ENVELOPE),
            ("bank-b", 1, 131_217 + ENVELOPE),
        ]

    @pytest.mark.parametrize(("values", "ciphertexts"), [(0, 1), (4032, 1), (4033, 2), (10_000_000, 2442)])
    def test_bytes_of_a_hidden_term(self, values: int, ciphertexts: int) -> None:
        assert hidden_bytes(plugins.load("sum", "secagg"), values) == 4 * values
        assert hidden_bytes(plugins.load("sum", "ckks"), values) == 131_217 * ciphertexts
        assert values < 10**6 or 32 < 131_217 * ciphertexts / values < 33, "bytes for each value"

    def test_an_encoding_makes_updates_smaller_and_states_not(self, model: Path, tmp_path: Path) -> None:
        def bytes_of(*names: str) -> tuple[int, int, tuple[str, ...]]:
            cost = HomoLlmTrainer().estimate(view(tmp_path, str(model), hooks=[{"name": name} for name in names]))
            sizes = {t.what: t.bytes_each or 0 for t in cost.traffic}
            return sizes["update"], sizes["new state"], cost.notes

        update, state, _ = bytes_of()
        half, same_state, _ = bytes_of("bf16")
        quarter, *_ = bytes_of("int8")
        bound, _, notes = bytes_of("zstd", "bf16")
        assert state == same_state
        assert 0.4 * update < half < 0.6 * update
        assert quarter < half
        assert bound == half
        assert any("at most this large: what zstd saves" in note for note in notes)

    def test_unknown_is_said_and_not_guessed(self, model: Path, tmp_path: Path) -> None:
        nowhere = HomoLlmTrainer().estimate(view(tmp_path, "no/such/model"))
        assert nowhere.memory_bytes is None
        assert all(t.bytes_each is None for t in nowhere.traffic if t.what == "update")
        without_data = HomoLlmTrainer().estimate(view(tmp_path, str(model), data=False))
        assert without_data.memory_bytes is None
        assert "not on this machine" in without_data.notes[0]

    def test_checkpointing_needs_less(self, model: Path, tmp_path: Path) -> None:
        plain = HomoLlmTrainer().estimate(view(tmp_path, str(model)))
        saving = HomoLlmTrainer().estimate(view(tmp_path, str(model), gradient_checkpointing=True))
        assert (saving.memory_bytes or 0) <= (plain.memory_bytes or 0)


def test_scoring_cost_follows_the_trainer(model: Path, tmp_path: Path) -> None:
    trained = view(tmp_path, str(model))
    upstream = {
        "model": {"bank-a": ("homo_llm_trainer", trained.params["bank-a"])},
        "data": {"bank-a": ("splitter", None)},
        "data.data": trained.upstream["train.data"],
    }
    params = dict.fromkeys(COHORT.contributors, Evaluator.Params())
    cost = Evaluator().estimate(PlanView("evaluate", ROSTER, COHORT, params, upstream, tmp_path))
    assert cost.memory_bytes is not None
    assert all(t.bytes_each is not None for t in cost.traffic)
    shared = dict.fromkeys(COHORT.contributors, Evaluator.Params(share_models=True))
    shown = Evaluator().estimate(PlanView("evaluate", ROSTER, COHORT, shared, upstream, tmp_path))
    assert [t for t in shown.traffic if t.bytes_each is None], "models of unknown size travel"


class TestModels:
    def test_parties_of_a_process_share_one_base(self, model: Path, tmp_path: Path) -> None:
        one, two = list(make_contexts(tmp_path, ROSTER, params=None).values())[:2]
        ref = ModelRef(path=str(model))
        base = load_base(one, ref, Loading(device="cpu"))
        assert load_base(two, ref, Loading(device="cpu")) is base
        assert not any(parameter.requires_grad for parameter in base.parameters())
        trees = own_tree(base), own_tree(base)
        for name, parameter in base.named_parameters():
            assert all(dict(tree.named_parameters())[name] is parameter for tree in trees)
        trees[0].train()
        assert not trees[1].training

    def test_the_tokenizer_has_a_padding_token(self, model: Path, tmp_path: Path) -> None:
        context = next(iter(make_contexts(tmp_path, ROSTER, params=None).values()))
        assert load_tokenizer(context, ModelRef(path=str(model))).pad_token is not None

    def test_a_broken_folder_is_a_model_error(self, tmp_path: Path) -> None:
        pytest.importorskip("torch")
        (tmp_path / "config.json").write_text('{"model_type": "no-such-family"}')
        context = next(iter(make_contexts(tmp_path, ROSTER, params=None).values()))
        with pytest.raises(ModelError, match="cannot be loaded"):
            load_base(context, ModelRef(path=str(tmp_path)), Loading(device="cpu"))

    def test_cuda_without_a_gpu_is_refused(self) -> None:
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        with pytest.raises(ModelError, match="no GPU"):
            device_of(Loading(device="cuda"))

    def test_the_cache_can_be_elsewhere(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FATE_LLM_CACHE", "/somewhere")
        assert cache_folder() == Path("/somewhere")
        monkeypatch.delenv("FATE_LLM_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
        assert cache_folder() == Path("/caches/fate_llm")

    def test_without_torch_the_missing_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import sys

        from fate_llm.components.llm.models import require_training_extra

        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(MissingExtra) as caught:
            require_training_extra()
        assert "fate_llm[train]" in caught.value.hint


def test_turns_carry_their_own_random_state(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(1))

    contexts = list(make_contexts(tmp_path, ROSTER, params=None).values())
    alone = Turns(contexts[0], 7)
    with alone.take():
        wanted = [draw(), draw(), draw()]
    one, two = Turns(contexts[0], 7), Turns(contexts[1], 8)
    found = []
    with one.take():
        found.append(draw())
        with one.pause(), two.take():
            other = draw()
        found.append(draw())
    with two.take():
        assert draw() != other
    with one.take():
        found.append(draw())
    assert found == wanted


def test_a_plot_needs_something_to_draw(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert not loss_plot({}, tmp_path / "loss.png")
    rows = [{"round": 0, "test_loss": 2.0}, {"round": 1, "loss": 1.5, "test_loss": 1.0}]
    assert loss_plot({"tune": rows}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000
