"""The parts of the audit: which layers, spans, chance, sums; on matrices whose answer is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fate_llm.components.llm.adapters import PeftSettings, Trainable, attach
from fate_llm.components.llm.audit_report import View, distance_plot, judge, leaks, row_of, write_report
from fate_llm.components.llm.audit_spans import (
    Findings,
    FirstLayers,
    Guess,
    Span,
    distances,
    find_first_layers,
    findings,
    make_lens,
    row_basis,
    second_moment,
    span,
)
from fate_llm.components.llm.audit_updates import gradient, mask_alone, noised, random_update, sum_round
from fate_llm.core.errors import InternalError, ModelError, ProtectionError
from fate_llm.security.fixed_point import FixedPoint
from fate_llm.security.masks import add_masks
from tests.components.tiny_model import tiny_config

torch = pytest.importorskip("torch")

WIDTH, TOKENS = 48, 300
NAME = "base_model.model.q"
MASKS = "fate_llm.components.llm.audit_updates.add_masks"


def made_layers(positions: int = 1) -> tuple[FirstLayers, Any]:
    """Inputs that all point in about one direction, as those of real models do."""
    draws = np.random.default_rng(1)
    table = (draws.standard_normal((TOKENS, WIDTH)) + 3.0).astype(np.float32)
    shifts = draws.standard_normal((positions, WIDTH)).astype(np.float32)
    shifts[0] = 0.0
    return FirstLayers((NAME,), TOKENS, lambda ids, at: table[ids] + shifts[at], range(positions)), table


def mixed(inputs: Any, rows: int, seed: int = 2) -> dict[str, Any]:
    """An update whose gradient of A mixes these inputs."""
    mix = np.random.default_rng(seed).standard_normal((rows, len(inputs)))
    return {f"{NAME}.lora_A.weight": (mix @ inputs).astype(np.float32)}


def look(update: Any, layers: FirstLayers, true: Any, tolerance: float = 0.01) -> Findings:
    lens = make_lens(layers, second_moment(layers, lambda: None), {}, "A")
    (found,) = distances([span(update, lens)], layers, lambda: None)
    return findings(found, np.array(true), tolerance)


def nothing() -> None:
    pass


class TestSpan:
    def test_inputs_of_the_span_are_found_and_no_other(self) -> None:
        layers, table = made_layers()
        true = [3, 40, 41, 200, 299]
        found = look(mixed(table[true], rows=8), layers, true)
        assert (found.inside.hits, found.inside.named) == (5, 5)
        assert (found.recall, found.precision, found.auc) == (1.0, 1.0, 1.0)

    def test_more_tokens_than_rows_are_still_nearer(self) -> None:
        layers, table = made_layers()
        true = list(range(0, 60, 3))
        found = look(mixed(table[true], rows=12), layers, true)
        assert found.recall < 0.2
        assert found.auc > 0.9

    def test_whitening_tells_inputs_apart_that_look_alike(self) -> None:
        """A few strong directions that all inputs share, as real models have them, drown the rest."""
        draws = np.random.default_rng(7)
        strengths = np.where(np.arange(WIDTH) < 4, 30.0, 1.0)
        table = (draws.standard_normal((TOKENS, WIDTH)) * strengths).astype(np.float32)
        layers = FirstLayers((NAME,), TOKENS, lambda ids, at: table[ids], range(1))
        true = np.arange(0, 60, 3)
        update, moment = mixed(table[true], rows=12), second_moment(layers, nothing)
        assert np.allclose(moment, table.T.astype(np.float64) @ table / TOKENS, rtol=1e-4, atol=1e-3)
        aucs = []
        for used in (np.eye(WIDTH), moment):
            (found,) = distances([span(update, make_lens(layers, used, {}, "A"))], layers, nothing)
            aucs.append(findings(found, true, 0.01).auc)
        assert aucs[1] > 0.9 > aucs[0] + 0.05

    def test_values_that_have_nothing_to_do_with_them(self) -> None:
        layers, _ = made_layers()
        true = [3, 40, 41, 200, 299]
        found = look(mixed(np.random.default_rng(5).standard_normal((5, WIDTH)), rows=8), layers, true)
        assert found.inside.named == 0
        assert found.precision is None

    def test_rows_that_span_everything_name_nothing(self) -> None:
        layers, table = made_layers()
        found = look(mixed(table[:WIDTH], rows=WIDTH), layers, [1, 2, 3])
        assert found.inside.named == 0
        assert found.nearest.named == TOKENS
        assert found.auc == 0.5

    def test_an_update_of_zeros_names_nothing(self) -> None:
        layers, _ = made_layers()
        found = look({f"{NAME}.lora_A.weight": np.zeros((4, WIDTH), np.float32)}, layers, [1, 2, 3])
        assert (found.inside.named, found.auc) == (0, 0.5)

    def test_the_other_side_shows_inputs_through_a(self) -> None:
        """The gradient of B mixes A·x; with four tokens in eight dimensions that tells them apart."""
        layers, table = made_layers()
        down = np.random.default_rng(4).standard_normal((8, WIDTH)).astype(np.float32)
        true = np.array([7, 70, 170, 270])
        mix = np.random.default_rng(5).standard_normal((WIDTH, 4))
        update = {f"{NAME}.lora_B.weight": (mix @ (table[true] @ down.T)).astype(np.float32)}
        lens = make_lens(layers, second_moment(layers, nothing), {f"{NAME}.lora_A.weight": down}, "B")
        (found,) = distances([span(update, lens)], layers, nothing)
        assert np.flatnonzero(found <= 1e-3).tolist() == true.tolist()

    def test_tokens_are_found_at_their_position(self) -> None:
        layers, _ = made_layers(positions=3)
        inputs = np.stack([layers.inputs(np.array([9]), 2)[0], layers.inputs(np.array([30]), 1)[0]])
        found = look(mixed(inputs, rows=4), layers, [9, 30])
        assert (found.inside.hits, found.inside.named) == (2, 2)

    def test_strength_of_a_layer_does_not_matter(self) -> None:
        """One layer's gradient is a million times the other's: both count."""
        draws = np.random.default_rng(0)
        strong, weak = draws.standard_normal((2, 10)) * 1e6, draws.standard_normal((3, 10))
        assert len(row_basis([strong, weak])) == 5
        assert len(row_basis([np.concatenate([weak, weak])])) == 3
        assert row_basis([np.zeros((3, 10))]).shape == (0, 10)

    def test_distances_are_between_zero_and_one(self) -> None:
        layers, table = made_layers()
        one = Span(((np.eye(WIDTH, dtype=np.float32), row_basis([table[:20].astype(np.float64)])),))
        (found,) = distances([one], layers, nothing)
        assert found[:20].max() < 1e-3
        assert ((found >= 0) & (found <= 1)).all()


class TestFirstLayers:
    @staticmethod
    def batch(length: int = 5) -> dict[str, Any]:
        ids = torch.arange(2 * length).reshape(2, length)
        mask = torch.ones_like(ids)
        mask[1, 3:] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": ids}

    def test_all_projections_of_one_input_are_found(self) -> None:
        from transformers import LlamaForCausalLM

        settings = PeftSettings(r=2, target_modules=("k_proj", "v_proj", "down_proj"))
        model = attach(LlamaForCausalLM(tiny_config(64)), settings)
        layers = find_first_layers(model, self.batch())
        assert [name.rpartition("layers.")[2] for name in layers.modules] == [
            "0.self_attn.k_proj",
            "0.self_attn.v_proj",
        ]
        assert {f"{name}.lora_A.weight" for name in layers.modules} <= set(Trainable(model).read())
        assert (layers.vocabulary, layers.positions) == (64, range(1))
        # An input is the normalised embedding of its token
        table: Any = model.get_input_embeddings().weight
        embedded = table[[7]].detach().numpy()
        norm = np.sqrt((embedded**2).mean() + 1e-6)
        assert np.allclose(layers.inputs(np.array([7]), 0), embedded / norm, atol=1e-4)

    @pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
    def test_learned_positions_are_tried_one_by_one(self) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=4)
        model = attach(GPT2LMHeadModel(config), PeftSettings(r=2, target_modules=("c_attn",)))
        assert find_first_layers(model, self.batch()).positions == range(5)

    def test_layers_that_mix_tokens_are_refused_by_name(self) -> None:
        from transformers import LlamaForCausalLM

        model = attach(LlamaForCausalLM(tiny_config(64)), PeftSettings(r=2, target_modules=("o_proj",)))
        with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.o_proj, sees mixtures"):
            find_first_layers(model, self.batch())

    def test_the_model_is_left_as_it_was(self) -> None:
        from transformers import LlamaForCausalLM

        model = attach(LlamaForCausalLM(tiny_config(64)), PeftSettings(r=2))
        model.train()
        find_first_layers(model, self.batch())
        assert model.training
        assert not [module for module in model.modules() if module._forward_pre_hooks]


class TestFindings:
    def test_counts_and_order(self) -> None:
        found = np.array([0.0, 0.5, 0.005, 0.9, 0.3, 0.008])
        one = findings(found, np.array([0, 4]), 0.01)
        assert one.inside == Guess(named=3, hits=1, blind=1.0)
        assert one.nearest == Guess(named=2, hits=1, blind=2 * 2 / 6)
        assert (one.recall, one.precision) == (0.5, 1 / 3)
        assert one.auc == pytest.approx((4 + 2) / 8)

    def test_equal_distances_tell_nothing(self) -> None:
        one = findings(np.ones(10), np.array([1, 2]), 0.01)
        assert one.nearest == Guess(10, 2, 2.0)
        assert one.auc == 0.5


def view(
    name: str = "masked", *, inside: int = 0, nearest: int = 0, auc: float = 0.5, named: int | None = None
) -> View:
    """A view of 20 tokens of 1000, with 8 random trials that found next to nothing."""
    trials = tuple(
        Findings(20, Guess(0, 0, 0.0), Guess(20, hits, 0.4), 0.5 + hits / 50) for hits in (0, 1, 0, 0, 2, 0, 1, 0)
    )
    count = inside if named is None else named
    mine = Findings(20, Guess(count, inside, count / 50), Guess(20, nearest, 0.4), auc)
    return View("gradient", name, 16, mine, trials)


class TestJudgement:
    @pytest.mark.parametrize(
        "shown",
        [{"inside": 5}, {"nearest": 14}, {"auc": 0.9}, {"inside": 20, "named": 100}],
        ids=["exactly", "nearest", "by their order", "among wrong ones"],
    )
    def test_what_chance_cannot_do_is_a_leak(self, shown: dict[str, Any]) -> None:
        assert leaks(view(**shown))
        outcome, verdict = judge([view("plain", inside=20), view(**shown)])
        assert (outcome, "must not be sent" in verdict) == ("leak", True)

    @pytest.mark.parametrize(
        "shown",
        [{}, {"inside": 1}, {"nearest": 4}, {"auc": 0.6}, {"inside": 20, "named": 1000}],
        ids=["nothing", "one", "some near", "about in order", "everything named"],
    )
    def test_what_chance_may_do_is_none(self, shown: dict[str, Any]) -> None:
        assert not leaks(view(**shown))
        assert judge([view("plain", inside=20), view(**shown)])[0] == "hidden"

    def test_silence_of_a_weak_test_is_no_proof(self) -> None:
        assert judge([view("plain"), view("masked")])[0] == "inconclusive"

    def test_the_sum_is_spoken_of(self) -> None:
        _, verdict = judge([view("plain", inside=20), view(), view("sum", nearest=15, auc=0.9)])
        assert "The sum of all parties still shows 15 of 20 tokens among the 20 nearest (auc 0.90)" in verdict
        _, verdict = judge([view("plain", inside=20), view(), view("sum")])
        assert "The sum of all parties shows no more than chance might" in verdict

    def test_a_report_is_written_as_measured(self, tmp_path: Path) -> None:
        rows = [row_of(view("plain", inside=18, named=20)), row_of(view())]
        write_report(tmp_path, {"outcome": "hidden", "verdict": "As it is."}, rows, plotted=False)
        text = (tmp_path / "report.md").read_text()
        assert "| gradient | plain | 16 | 20 | 20 | 18 | 0.9 | 0.9 | 0.0 | 0.5 |" in text
        assert "distances.png" not in text
        assert not distance_plot({}, {}, tmp_path / "distances.png")


class TestGradient:
    def test_it_is_the_model_s_own_with_its_norm_clipped(self) -> None:
        from transformers import LlamaForCausalLM

        torch.manual_seed(0)
        model = attach(LlamaForCausalLM(tiny_config(64)), PeftSettings(r=2))
        batch, names = TestFirstLayers.batch(), list(Trainable(model).read())
        free, clipped = (gradient(model, names, batch, most) for most in (1e9, 1e-3))
        norm = np.sqrt(sum(float((array**2).sum()) for array in free.values()))
        assert norm > 1e-3
        for name in names:  # B = 0: nothing reaches A
            assert free[name].any() == name.endswith("lora_B.weight")
            assert np.allclose(clipped[name] * norm / 1e-3, free[name], rtol=1e-2, atol=1e-9)
        # The gradient is along its parameter, which is where the loss falls
        loss = float(model(**batch).loss.detach())
        trainable = Trainable(model)
        state = trainable.read()
        trainable.load({name: state[name] - 1e-2 * free[name] for name in names})
        assert float(model(**batch).loss.detach()) < loss
        assert all(parameter.grad is None for parameter in model.parameters())


class TestSums:
    @staticmethod
    def updates(count: int) -> list[dict[str, Any]]:
        draws = np.random.default_rng(0)
        return [
            {"a": draws.uniform(-0.1, 0.1, (3, 5)).astype(np.float32), "b": draws.uniform(-2, 2, 4).astype(np.float32)}
            for _ in range(count)
        ]

    def test_the_sum_is_the_mean_of_the_clipped_updates(self) -> None:
        updates, fixed = self.updates(5), FixedPoint(5, 1.0)
        done = sum_round(updates, fixed)
        for name in ("a", "b"):
            exact = np.mean([np.clip(one[name].astype(np.float64), -1, 1) for one in updates], axis=0)
            assert np.abs(done.mean[name] - exact).max() <= fixed.error_bound(5, 5.0)
        assert done.clipped == sum(int((np.abs(one["b"]) > 1).sum()) for one in updates) > 0

    def test_masked_terms_are_new_every_time_and_keep_their_layout(self) -> None:
        updates, fixed = self.updates(3), FixedPoint(3, 1.0)
        masked = [sum_round(updates, fixed).masked, mask_alone(updates[0], fixed), mask_alone(updates[0], fixed)]
        assert all({name: array.shape for name, array in one.items()} == {"a": (3, 5), "b": (4,)} for one in masked)
        assert not any(np.array_equal(one["a"], other["a"]) for one in masked for other in masked if one is not other)
        # As wide as the ring: some thousand times the update
        assert max(np.abs(one["a"]).max() for one in masked) > 1.0

    def test_without_masks_a_term_is_the_update(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What the coordinator would read from a term is read rightly here."""
        monkeypatch.setattr(MASKS, lambda *args, **kwargs: None)
        (update, *_), fixed = self.updates(3), FixedPoint(3, 4.0)
        for name, array in mask_alone(update, fixed).items():
            assert np.abs(array - update[name]).max() <= 2 * fixed.step

    def test_a_mask_left_on_the_sum_is_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[int] = []

        def forgets(words: Any, wide: Any, *, plus: Any, minus: Any) -> None:
            calls.append(len(minus))
            add_masks(words, wide, plus=plus, minus=minus if len(calls) <= 3 else minus[1:])

        monkeypatch.setattr(MASKS, forgets)
        with pytest.raises(InternalError, match="3 parties do not cancel"):
            sum_round(self.updates(3), FixedPoint(3, 1.0))

    def test_values_that_are_none_are_refused(self) -> None:
        update = {"a": np.array([1.0, np.nan], np.float32)}
        with pytest.raises(ProtectionError, match="not finite"):
            mask_alone(update, FixedPoint(3, 1.0))

    def test_noise_is_clipped_first_and_repeatable(self) -> None:
        update = {"a": np.full(10_000, 0.1, np.float32)}  # norm 10
        one, two = (noised(update, 1.0, 0.5, seed=3)["a"] for _ in range(2))
        assert np.array_equal(one, two)
        assert one.mean() == pytest.approx(0.01, abs=0.03)
        assert one.std() == pytest.approx(0.5, rel=0.05)
        assert np.abs(noised({"a": np.zeros(3, np.float32)}, 1.0, 1e-9, seed=1)["a"]).max() < 1e-6

    def test_random_updates_fill_the_ring(self) -> None:
        fixed = FixedPoint(3, 1.0)
        values = random_update({"a": np.zeros(20_000, np.float32)}, fixed, np.random.default_rng(0))["a"] * fixed.scale
        assert abs(values.mean()) < 2**31 * 0.02
        assert values.std() == pytest.approx(2**32 / np.sqrt(12), rel=0.02)
