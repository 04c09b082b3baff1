"""A trained adapter merged into its base model: one plain folder that transformers and serving engines load.

    python -m fate_llm.components.llm.merging ADAPTER OUT

Rules:
1. The sums are taken in float32; the merged weights have the type that the base model has on its disk.
2. The folder appears under its name when it is complete, and no folder is written over.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fate_llm.core.errors import ConfigurationError, FateError, ModelError

from .adapters import ABOUT, open_model, read_about
from .modelref import ModelRef
from .models import model_folder, require_training_extra

__all__ = ["main", "merge"]


def merge(adapter_folder: Path, out: Path) -> None:
    """Write the model of `adapter_folder`, merged with its base, into the new folder `out`, tokenizer included.

    A folder that holds a whole model already is copied.

    Raises:
        ConfigurationError: `out` exists. ModelError: no folder of a trainer, or its base cannot be loaded.
        MissingExtra: torch is not installed.
    """
    about = read_about(adapter_folder)
    if out.exists():
        raise ConfigurationError(f"{out} exists", hint="Name a folder that does not exist yet.")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        if about["kind"] == "full":
            shutil.copytree(adapter_folder, partial)
        else:
            partial.mkdir(parents=True)
            _merge(adapter_folder, _base_folder(about, adapter_folder), partial)
        _note(partial, about)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _base_folder(about: dict[str, Any], adapter_folder: Path) -> str:
    """Folder or hub name of the base model."""
    try:
        return model_folder(ModelRef.model_validate(about.get("base")), Path)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(["base", *map(str, fault["loc"])])
        raise ModelError(f"{adapter_folder / ABOUT}: {place}: {fault['msg']}") from None


def _merge(adapter_folder: Path, base_folder: str, out: Path) -> None:
    require_training_extra()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        stored = AutoConfig.from_pretrained(base_folder).dtype or torch.float32
        base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(base_folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"the base model {base_folder} cannot be loaded: {error}") from error
    adapted: Any = open_model(base, adapter_folder)
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(f"{adapter_folder}: its weights are not finite: {error}") from error
    merged.to(stored)
    merged.save_pretrained(str(out))
    tokenizer.save_pretrained(str(out))


def _note(folder: Path, about: dict[str, Any]) -> None:
    """What it came from, for our own tools; others do not look at this file."""
    note = {**about, "kind": "full", "merged": about["kind"] == "adapter"}
    (folder / ABOUT).write_text(json.dumps(note, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    """Merge ARGUMENTS[0] into ARGUMENTS[1]; the exit code of the command line."""
    try:
        if len(arguments) != 2:
            raise ConfigurationError(f"{len(arguments)} arguments; valid: the adapter's folder and the new folder")
        merge(Path(arguments[0]), Path(arguments[1]))
    except FateError as error:
        sys.stderr.write(f"{error.message}\n{error.hint}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
