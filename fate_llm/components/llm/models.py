"""Loading base models: one frozen copy per process, a light module tree per party.

Rules:
1. A GGUF file is converted once into a safetensors folder of the cache, under its digest; the folder appears whole.
2. The tensors of a shared base model are never written to: parties get trees of their own that share its tensors.
3. Weights are matched by name.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from fate_llm.core.canonical import digest_file
from fate_llm.core.errors import MissingExtra, ModelError
from fate_llm.core.interfaces import Context, Frozen

from .modelref import ModelRef, Source, locate

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Loading",
    "cache_folder",
    "device_of",
    "load_base",
    "load_tokenizer",
    "model_folder",
    "own_tree",
    "require_training_extra",
]


class Loading(Frozen):
    """How a base model is brought into memory."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "float32", description="Type of the base model's weights; adapters are always float32."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where to compute; auto: a GPU when there is one."
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        "auto", description="Attention implementation; auto: what the model's library chooses."
    )


def require_training_extra() -> None:
    """Raise MissingExtra, naming the extra, when torch, transformers or peft is not installed."""
    try:
        import peft
        import torch
        import transformers
    except ImportError as error:
        raise MissingExtra(
            f"this task computes with a model, and {error.name} is not installed",
            hint="pip install 'fate_llm[train]'",
        ) from None
    del peft, torch
    # transformers 5 warns of its own use of the names it renames in version 6.
    warnings.filterwarnings("ignore", message=".*is deprecated and will be removed in v6", category=FutureWarning)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def cache_folder() -> Path:
    """Where converted models are kept: FATE_LLM_CACHE, else XDG_CACHE_HOME/fate_llm, else ~/.cache/fate_llm."""
    own = os.environ.get("FATE_LLM_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fate_llm"


def model_folder(ref: ModelRef, resolve: Callable[[str], Path], *, note: Callable[[str], None] | None = None) -> str:
    """A folder (or hub name) that `from_pretrained` loads directly, made from the GGUF file when need be.

    note: told before a conversion starts, which takes half a minute for a small model.
    """
    source = locate(ref, resolve)
    if source.hub:
        return source.hub
    assert source.folder is not None
    if not source.gguf:
        return str(source.folder)
    file = source.folder / source.gguf
    target = cache_folder() / "models" / f"{file.stem}-{digest_file(file)[:16]}"
    if not target.is_dir():
        if note is not None:
            note(f"converting {file.name} once, into {target}")
        _convert(source, target)
    return str(target)


def _convert(source: Source, target: Path) -> None:
    """GGUF to safetensors. A model loaded from GGUF refuses to be saved, so its weights move into a fresh one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        with _quiet():
            loaded = AutoModelForCausalLM.from_pretrained(
                str(source.folder), gguf_file=source.gguf, dtype=torch.float32
            )
            tokenizer = AutoTokenizer.from_pretrained(str(source.folder), gguf_file=source.gguf)
        config = copy.deepcopy(loaded.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        fresh = type(loaded)(config)
        fresh.load_state_dict(loaded.state_dict())
        fresh.generation_config = loaded.generation_config
        fresh.save_pretrained(str(partial))
        tokenizer.save_pretrained(str(partial))
        with contextlib.suppress(OSError):  # another process was faster: its folder has the same content
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The conversion draws a progress bar on stderr that no setting turns off."""
    with open(os.devnull, "w") as sink, contextlib.redirect_stderr(sink):
        yield


def device_of(loading: Loading) -> str:
    """`cpu` or `cuda`, as asked for or as there is."""
    import torch

    if loading.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if loading.device == "cuda" and not torch.cuda.is_available():
        raise ModelError("device: cuda was asked for, and torch sees no GPU", hint="Use device: auto or cpu.")
    return loading.device


def load_base(ctx: Context, ref: ModelRef, loading: Loading) -> PreTrainedModel:
    """The base model of this process, loaded by the first party that asks. Never write into it; see `own_tree`."""
    folder = _folder(ctx, ref)
    key = f"model:{folder}:{loading.dtype}:{loading.attention}:{device_of(loading)}"
    return ctx.shared(key, lambda: _load(folder, ref, loading))


def _folder(ctx: Context, ref: ModelRef) -> str:
    def note(text: str) -> None:
        ctx.emit("note", text=text)

    return ctx.shared(f"folder:{ref}", lambda: model_folder(ref, ctx.resolve, note=note))


def _load(folder: str, ref: ModelRef, loading: Loading) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": loading.dtype if loading.dtype == "auto" else getattr(torch, loading.dtype)}
    if loading.attention != "auto":
        options["attn_implementation"] = loading.attention
    if ref.revision:
        options["revision"] = ref.revision
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"model {ref} cannot be loaded: {error}") from error
    model.to(device_of(loading))  # type: ignore[arg-type]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    # accelerate collects garbage over the whole heap whenever a Trainer starts; with many parties that adds up.
    # What libraries and base model hold lives as long as the process, so it need not be looked at again.
    gc.freeze()
    return model


def load_tokenizer(ctx: Context, ref: ModelRef) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a base model; one per process."""
    folder = _folder(ctx, ref)

    def load() -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, **({"revision": ref.revision} if ref.revision else {}))
        except (OSError, ValueError) as error:
            raise ModelError(f"the tokenizer of {ref} cannot be loaded: {error}") from error
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    return ctx.shared(f"tokenizer:{folder}", load)


def own_tree(base: PreTrainedModel) -> PreTrainedModel:
    """A module tree of one's own whose parameters and buffers are the base model's own tensors.

    Adapters go on top of it, hooks and modes are private, and it costs about 4 MB.
    """
    shared: dict[int, torch.Tensor] = {id(t): t for t in (*base.parameters(), *base.buffers())}
    return copy.deepcopy(base, shared)  # type: ignore[arg-type]


if __name__ == "__main__":  # `python -m fate_llm.components.llm.models PACKAGE`: convert a packaged model beforehand
    require_training_extra()
    model_folder(ModelRef(package=sys.argv[1]), Path)
