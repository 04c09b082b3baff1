"""A merged model is a plain folder: transformers alone loads it, and it answers as base and adapter together did."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fate_llm.components.llm.adapters import ABOUT, PeftSettings, Trainable, attach, save_model, write_about
from fate_llm.components.llm.merging import main, merge
from fate_llm.components.llm.modelref import ModelRef
from fate_llm.core.errors import ConfigurationError, ModelError
from tests.components.tiny_model import make_tiny_model

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "base")


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto").eval()


def trained(base_folder: Path, folder: Path, settings: PeftSettings) -> Any:
    """A model whose trained part is not zero, saved as the trainer saves it."""
    from transformers import AutoTokenizer

    model = attach(load(base_folder), settings)
    trainable = Trainable(model)
    trainable.load({name: value + 0.05 for name, value in trainable.read().items()})
    save_model(model, folder, AutoTokenizer.from_pretrained(str(base_folder)))
    ref = ModelRef(path=str(base_folder))
    write_about(folder, base=ref, base_path=str(base_folder), settings=settings, extra={"round": 3})
    return model.eval()


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 25)[None]).logits


def test_merged_it_answers_the_same(base_folder: Path, tmp_path: Path) -> None:
    adapted = trained(base_folder, tmp_path / "adapter", PeftSettings(r=4, use_rslora=True))

    merge(tmp_path / "adapter", tmp_path / "merged")

    merged = load(tmp_path / "merged")
    assert torch.allclose(logits(merged), logits(adapted), atol=1e-5)
    assert not torch.allclose(logits(merged), logits(load(base_folder)), atol=1e-2), "the adapter does nothing"
    assert not any("lora" in name for name in merged.state_dict())
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_the_tokenizer_and_the_story_come_along(base_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    trained(base_folder, tmp_path / "adapter", PeftSettings(r=2))
    merge(tmp_path / "adapter", tmp_path / "merged")
    ours, theirs = (AutoTokenizer.from_pretrained(str(f)) for f in (tmp_path / "merged", base_folder))
    assert ours("a text")["input_ids"] == theirs("a text")["input_ids"]
    assert ours.chat_template == theirs.chat_template
    about = json.loads((tmp_path / "merged" / ABOUT).read_text())
    assert (about["kind"], about["merged"], about["round"]) == ("full", True, 3)


def test_the_base_models_type_is_kept(base_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    half = tmp_path / "half"
    load(base_folder).to(torch.bfloat16).save_pretrained(str(half))
    AutoTokenizer.from_pretrained(str(base_folder)).save_pretrained(str(half))
    adapted = trained(half, tmp_path / "adapter", PeftSettings(r=2))
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert torch.allclose(logits(merged).float(), logits(adapted).float(), atol=3e-2)


def test_a_whole_model_is_copied(base_folder: Path, tmp_path: Path) -> None:
    model = trained(base_folder, tmp_path / "full", PeftSettings(method="full"))
    merge(tmp_path / "full", tmp_path / "copy")
    assert torch.equal(logits(load(tmp_path / "copy")), logits(model))
    assert json.loads((tmp_path / "copy" / ABOUT).read_text())["merged"] is False


class TestRefused:
    def test_a_folder_that_exists_stays_as_it_is(self, base_folder: Path, tmp_path: Path) -> None:
        trained(base_folder, tmp_path / "adapter", PeftSettings(r=2))
        (tmp_path / "merged").mkdir()
        with pytest.raises(ConfigurationError, match="exists"):
            merge(tmp_path / "adapter", tmp_path / "merged")
        assert not list((tmp_path / "merged").iterdir())

    def test_a_folder_of_another_origin(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=ABOUT):
            merge(tmp_path, tmp_path / "merged")

    @pytest.mark.parametrize(
        ("base", "text"), [({"path": "no/such"}, "does not exist"), ({}, "exactly one"), ({"url": "x"}, "base.url")]
    )
    def test_a_base_that_is_not_there(self, tmp_path: Path, base: Any, text: str) -> None:
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / ABOUT).write_text(json.dumps({"format": 1, "kind": "adapter", "base": base}))
        with pytest.raises(ModelError, match=text):
            merge(tmp_path / "adapter", tmp_path / "merged")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"], "something is left behind"

    def test_weights_that_are_not_finite(self, base_folder: Path, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        trained(base_folder, tmp_path / "adapter", PeftSettings(r=2))
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        save_file({name: value * torch.nan for name, value in load_file(file).items()}, file, {"format": "pt"})
        with pytest.raises(ModelError, match="finite"):
            merge(tmp_path / "adapter", tmp_path / "merged")
        assert not (tmp_path / "merged").exists()

    def test_the_command_says_what_is_wrong(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["only-one"]) == 2
        assert "1 arguments" in capsys.readouterr().err
        assert main([str(tmp_path), str(tmp_path / "out")]) == 2
        assert ABOUT in capsys.readouterr().err


@pytest.mark.slow
def test_as_a_process(base_folder: Path, tmp_path: Path) -> None:
    trained(base_folder, tmp_path / "adapter", PeftSettings(r=2))
    command = [
        sys.executable,
        "-m",
        "fate_llm.components.llm.merging",
        str(tmp_path / "adapter"),
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert (tmp_path / "out" / "config.json").is_file()
