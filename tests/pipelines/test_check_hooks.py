"""Hooks that change how updates travel: what they go together with, and that all parties have the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fate_llm.core.errors import Fault, PipelineInvalid
from fate_llm.pipelines.check import load_pipeline

pytestmark = pytest.mark.usefixtures("registry")
