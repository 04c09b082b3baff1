"""What of a model is trained, and how it is read, written and saved, by name.

Names on the wire and on disk are peft's: `base_model.model.<module>.lora_A.weight`, without the adapter's own name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from fate_llm.core.errors import ConfigurationError, ModelError
from fate_llm.core.interfaces import Frozen
from fate_llm.core.values import Array, Arrays, require_same_layout

from .modelref import ModelRef, ModelShapes, default_targets
from .zero import load_zero, read_zero, whole_size

if TYPE_CHECKING:
    import torch
    from torch.nn import Module
    from transformers import PreTrainedModel

__all__ = [
    "ABOUT",
    "PeftSettings",
    "Trainable",
    "attach",
    "open_model",
    "planned_layout",
    "read_about",
    "save_model",
    "trainable_report",
    "write_about",
]

ABOUT = "fate_model.json"


class PeftSettings(Frozen):
    """What of the model is trained."""

    method: Literal["lora", "full"] = Field("lora", description="lora: low-rank adapters; full: all weights.")
    r: int = Field(8, ge=1, le=1024, description="Rank of the adapters.")
    alpha: float = Field(16, gt=0, description="Scale of the adapters: alpha / r multiplies B·A.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout in front of the adapters.")
    target_modules: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="Last part of the adapted layers' names; default: the fused, or query and value, projections.",
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(r) (Kalajdzievski 2023).")


def attach(model: PreTrainedModel, settings: PeftSettings) -> PreTrainedModel:
    """The model with what is trained made trainable, in float32; everything else is frozen.

    Raises:
        ModelError: the model has none of the target modules.
    """
    if settings.method == "full":
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return model
    from peft import LoraConfig, get_peft_model

    targets = _targets(model, settings)
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=sorted(targets),
        use_rslora=settings.use_rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    except ValueError as error:
        raise ModelError(f"no adapter fits this model: {error}") from error
    return adapted  # type: ignore[return-value]


def _targets(model: PreTrainedModel, settings: PeftSettings) -> frozenset[str]:
    shapes = ModelShapes({name: tuple(p.shape) for name, p in model.named_parameters()})
    if settings.target_modules is not None:
        known = {n.removesuffix(".weight").rpartition(".")[2] for n, s in shapes.weights.items() if len(s) == 2}
        unknown = sorted(set(settings.target_modules) - known)
        if unknown:
            raise ModelError(f"the model has no layers called {unknown}", hint=f"valid: {', '.join(sorted(known))}")
        return frozenset(settings.target_modules)
    targets = default_targets(shapes)
    if targets is None:
        raise ModelError("no default target modules for this model", hint="Name them in peft.target_modules.")
    return targets


class Trainable:
    """The trainable parameters of a model by wire name, with direct references: reading and loading take about 1 ms.

    engine: the DeepSpeed engine that holds the parameters from the moment it exists, see `zero`.
    """

    def __init__(self, model: Module, engine: Callable[[], Any] = lambda: None) -> None:
        found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        if not found:
            raise ModelError("nothing in this model is trainable")
        self.engine = engine
        self._parameters: dict[str, torch.nn.Parameter] = {_wire_name(name): p for name, p in found.items()}
        self._names = {_wire_name(name): name for name in found}
        self._layout = {name: np.empty(tuple(p.shape), dtype=np.uint8) for name, p in self._parameters.items()}

    def read(self) -> dict[str, Array]:
        """A float32 copy of every trainable parameter."""
        import torch

        values = self._parameters.items()
        if self.engine() is not None:
            return {name: read_zero(p).to("cpu", torch.float32, copy=True).numpy() for name, p in values}
        return {name: p.detach().to("cpu", torch.float32, copy=True).numpy() for name, p in values}

    def difference(self, state: Arrays) -> dict[str, Array]:
        """Parameters minus `state`, float32 by name."""
        return {name: np.subtract(mine, state[name], out=mine) for name, mine in self.read().items()}

    def load(self, state: Arrays) -> None:
        """Write `state` into the parameters, in place.

        Raises:
            ProtectionError: other names or shapes; nothing was written.
        """
        import torch

        require_same_layout(self._layout, state, what="loading a state")
        values = {name: torch.from_numpy(np.array(state[name], dtype=np.float32)) for name in self._parameters}
        if (engine := self.engine()) is not None:
            load_zero(engine, list(self._parameters.values()), list(values.values()))
            return
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(values[name])

    def tensors(self, state: Arrays) -> dict[str, torch.Tensor]:
        """`state` as the model's own `state_dict` would name and type it, without touching the model."""
        import torch

        return {
            self._names[name]: torch.from_numpy(np.array(state[name], dtype=np.float32)).to(parameter.dtype)
            for name, parameter in self._parameters.items()
        }


def _wire_name(name: str) -> str:
    return name.replace(".default.", ".")


def trainable_report(model: Module) -> dict[str, float | int]:
    """Counts: {"trainable", "total", "percent", "bytes_fp32", "bytes_bf16"}; bytes of one exchange of the trainable."""
    counts = [(whole_size(p), p.requires_grad) for p in model.parameters()]
    trainable = sum(size for size, trains in counts if trains)
    total = sum(size for size, _ in counts)
    percent = round(100.0 * trainable / total, 4)
    return {
        "trainable": trainable,
        "total": total,
        "percent": percent,
        "bytes_fp32": 4 * trainable,
        "bytes_bf16": 2 * trainable,
    }


def planned_layout(shapes: ModelShapes, settings: PeftSettings) -> dict[str, tuple[int, ...]] | None:
    """Names and shapes of what will be trained, from the shapes alone; None when no default target fits."""
    if settings.method == "full":
        return dict(shapes.weights)
    targets = frozenset(settings.target_modules) if settings.target_modules else default_targets(shapes)
    if targets is None:
        return None
    layout: dict[str, tuple[int, ...]] = {}
    for module, (rows, columns) in shapes.linear(targets):
        layout[f"base_model.model.{module}.lora_A.weight"] = (settings.r, columns)
        layout[f"base_model.model.{module}.lora_B.weight"] = (rows, settings.r)
    return layout


# --- on disk -----------------------------------------------------------------------------------------------------


def save_model(model: Any, folder: Path, tokenizer: Any, weights: Mapping[str, torch.Tensor] | None = None) -> None:
    """An ordinary PEFT folder, or a Hugging Face model folder with its tokenizer.

    weights: what is trained, by the model's own names (`Trainable.tensors`); what the model holds when left out.
    """
    state = {} if weights is None else {"state_dict": dict(weights)}
    if hasattr(model, "peft_config"):
        model.save_pretrained(str(folder), save_embedding_layers=False, **state)
        (folder / "README.md").unlink(missing_ok=True)  # an empty form that peft leaves behind
        _sort_config(folder / "adapter_config.json")
    else:
        model.save_pretrained(str(folder), **state)
        tokenizer.save_pretrained(str(folder))


def _sort_config(path: Path) -> None:
    """The same settings, the same bytes: peft writes sets in the order of this process's hashes."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("target_modules", "modules_to_save", "exclude_modules"):
        if isinstance(config.get(name), list):
            config[name].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_about(
    folder: Path, *, base: ModelRef, base_path: str, settings: PeftSettings, extra: Mapping[str, Any]
) -> None:
    """Say beside the weights which base model they belong to and how they came about."""
    about = {
        "format": 1,
        "kind": "adapter" if settings.method == "lora" else "full",
        "base": base.model_dump(exclude_none=True),
        "base_path": base_path,
        **extra,
    }
    (folder / ABOUT).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")


def read_about(folder: Path) -> dict[str, Any]:
    """What `write_about` wrote.

    Raises:
        ModelError: the folder was not made by this framework.
    """
    try:
        about = json.loads((folder / ABOUT).read_text())
    except (OSError, ValueError):
        raise ModelError(f"{folder} has no {ABOUT}", hint="Give the folder that a trainer wrote.") from None
    if not isinstance(about, dict) or about.get("format") != 1 or about.get("kind") not in ("adapter", "full"):
        raise ModelError(f"{folder / ABOUT} is of another version")
    return about


def open_model(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The trained model of `folder` on top of a module tree of its own, ready for evaluation.

    base: the tree to put an adapter on (see `models.own_tree`); left alone when the folder holds a full model.
    """
    if read_about(folder)["kind"] == "adapter":
        from peft import PeftModel

        if not (folder / "adapter_config.json").is_file():
            raise ConfigurationError(f"{folder} holds no adapter_config.json")
        model: Any = PeftModel.from_pretrained(base, str(folder))
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=base.dtype).to(base.device)  # type: ignore[arg-type]
    model.eval()
    return model  # type: ignore[no-any-return]
