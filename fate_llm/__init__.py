"""Train and use language models together, without sharing data and, where wanted, without sharing the model.

Importing this package is cheap: names are looked up when they are used, and torch only where something is trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipelines.builder import Pipeline
    from .runtime.job import JobResult

__all__ = ["JobResult", "Pipeline", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "Pipeline":
        from .pipelines import builder
        from .runtime.submit import submit_pipeline

        builder.set_submitter(submit_pipeline)
        return builder.Pipeline
    if name == "JobResult":
        from .runtime.job import JobResult

        return JobResult
    raise AttributeError(f"module 'fate_llm' has no attribute {name!r}")
