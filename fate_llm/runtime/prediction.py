"""From a finished job's folder to the pipeline that uses what it trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fate_llm.core.errors import ConfigurationError
from fate_llm.pipelines.check import load_pipeline
from fate_llm.pipelines.dialect import dump
from fate_llm.pipelines.predict import derive_prediction

__all__ = ["prediction_pipeline"]


def prediction_pipeline(job: Path) -> tuple[str, tuple[str, ...]]:
    """(YAML of the prediction pipeline, names of tasks left out) of a job folder.

    Raises:
        ConfigurationError: no job folder, or a job that did not end with success.
    """
    try:
        manifest = json.loads((job / "manifest.json").read_text())
        status, outputs, base = manifest["status"], manifest["outputs"], Path(manifest["base"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigurationError(f"{job} is not the folder of a finished job") from None
    if status != "success":
        raise ConfigurationError(f"job {manifest['job_id']} ended with {status}; only a finished one can be used")
    derived = derive_prediction(load_pipeline(job / "pipeline.yaml"), outputs)
    return dump(_absolute(derived.pipeline.to_dict(), base)), tuple(derived.dropped)


def _absolute(value: Any, base: Path) -> Any:
    """Relative paths that exist below `base` made absolute: the new file may lie anywhere."""
    if isinstance(value, list):
        return [_absolute(item, base) for item in value]
    if not isinstance(value, dict):
        return value
    found = {key: _absolute(item, base) for key, item in value.items()}
    path = found.get("path")
    if isinstance(path, str) and (base / path).exists():
        found["path"] = str((base / path).absolute())
    return found
