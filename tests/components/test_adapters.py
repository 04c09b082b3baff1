"""What is trained, counted, moved and saved: on tiny models and on the meta device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fate_llm.components.llm.adapters import (
    PeftSettings,
    Trainable,
    attach,
    open_model,
    planned_layout,
    read_about,
    save_model,
    trainable_report,
    write_about,
)
from fate_llm.components.llm.modelref import ModelRef, ModelShapes
from fate_llm.components.llm.models import own_tree
from fate_llm.core.errors import ModelError, ProtectionError
from fate_llm.protocols.rounds.machine import layout_of
from tests.components.tiny_model import tiny_config

torch = pytest.importorskip("torch")


def tiny(**changes: Any) -> Any:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(64, **changes))


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "wanted"),
    [(32, 2560, 32, 2_621_440), (32, 4096, 32, 4_194_304), (36, 5120, 40, 5_898_240)],
    ids=["pythia-2.8b", "pythia-6.9b", "pythia-12b"],
)
def test_the_report_reproduces_the_published_counts(layers: int, hidden: int, heads: int, wanted: int) -> None:
    """LoRA r=8 on the fused query, key and value projection of Pythia: 8 x 4 x hidden x layers."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        vocab_size=50688,
    )
    with torch.device("meta"):
        model = attach(GPTNeoXForCausalLM(config), PeftSettings(r=8))
    report = trainable_report(model)
    assert report["trainable"] == wanted
    assert report["bytes_fp32"] == 4 * wanted
    shapes = ModelShapes({n: tuple(p.shape) for n, p in model.get_base_model().named_parameters() if "lora" not in n})
    named = {name.replace(".base_layer", ""): shape for name, shape in shapes.weights.items()}
    assert ModelShapes(named).lora_parameters({"query_key_value"}, 8) == wanted


class TestTrainable:
    def test_read_difference_and_load_by_name(self) -> None:
        model = attach(tiny(), PeftSettings(r=2))
        trainable = Trainable(model)
        state = trainable.read()
        assert all(value.dtype == np.float32 for value in state.values())
        assert all(name.startswith("base_model.model.") and ".default" not in name for name in state)
        trainable.load({name: value + 1 for name, value in state.items()})
        assert all(np.allclose(d, 1.0) for d in trainable.difference(state).values())

    def test_what_is_read_is_a_copy(self) -> None:
        trainable = Trainable(attach(tiny(), PeftSettings(r=2)))
        first = trainable.read()
        next(iter(first.values()))[:] = 9.0
        assert not np.array_equal(next(iter(first.values())), next(iter(trainable.read().values())))

    def test_loading_something_else_is_refused_and_changes_nothing(self) -> None:
        trainable = Trainable(attach(tiny(), PeftSettings(r=2)))
        before = trainable.read()
        with pytest.raises(ProtectionError, match="names differ"):
            trainable.load({"x": np.zeros(2, np.float32)})
        with pytest.raises(ProtectionError, match="has shape"):
            trainable.load({name: value[..., :1] for name, value in before.items()})
        assert all(np.array_equal(before[name], value) for name, value in trainable.read().items())

    def test_a_bfloat16_model_keeps_float32_adapters(self) -> None:
        model = attach(tiny().to(torch.bfloat16), PeftSettings(r=2))
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert all(value.dtype == np.float32 for value in Trainable(model).read().values())

    def test_nothing_trainable_is_an_error(self) -> None:
        model = tiny()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        with pytest.raises(ModelError, match="trainable"):
            Trainable(model)


class TestAttach:
    def test_the_base_stays_frozen_and_shared(self) -> None:
        base = tiny()
        first, second = attach(own_tree(base), PeftSettings(r=2)), attach(own_tree(base), PeftSettings(r=2))
        pointers = {p.data_ptr() for p in base.parameters()}
        for model in (first, second):
            frozen = [p for p in model.parameters() if not p.requires_grad]
            assert {p.data_ptr() for p in frozen} == pointers
        Trainable(first).load({name: value + 1 for name, value in Trainable(first).read().items()})
        assert any(not np.allclose(v, Trainable(second).read()[n]) for n, v in Trainable(first).read().items())

    def test_unknown_layers_are_named(self) -> None:
        with pytest.raises(ModelError, match="q_proi") as caught:
            attach(tiny(), PeftSettings(target_modules=("q_proi",)))
        assert "q_proj" in caught.value.hint

    def test_full_tuning_trains_all(self) -> None:
        report = trainable_report(attach(tiny(), PeftSettings(method="full")))
        assert report["trainable"] == report["total"]


@pytest.mark.parametrize("settings", [PeftSettings(r=3), PeftSettings(r=2, target_modules=("o_proj", "up_proj"))])
def test_the_planned_layout_is_the_real_one(settings: PeftSettings) -> None:
    shapes = ModelShapes({name: tuple(p.shape) for name, p in tiny().named_parameters()})
    assert planned_layout(shapes, settings) == layout_of(Trainable(attach(tiny(), settings)).read())


def test_saved_and_opened_again(tmp_path: Path) -> None:
    model = attach(tiny(), PeftSettings(r=2))
    trainable = Trainable(model)
    trainable.load({name: value + 0.5 for name, value in trainable.read().items()})
    save_model(model, tmp_path / "adapter", tokenizer=None)
    write_about(
        tmp_path / "adapter", base=ModelRef(path="x"), base_path="/x", settings=PeftSettings(r=2), extra={"round": 3}
    )
    assert read_about(tmp_path / "adapter")["round"] == 3
    opened = open_model(own_tree(tiny()), tmp_path / "adapter")
    assert not opened.training
    ids = torch.arange(6)[None]
    model.eval()
    assert torch.equal(opened(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_folder_of_another_origin_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"fate_model\.json"):
        read_about(tmp_path)
    (tmp_path / "fate_model.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ModelError, match="another version"):
        read_about(tmp_path)
