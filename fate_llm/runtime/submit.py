"""The one door into the local runtime, for the command line and for the Python builder.

Time and ids enter here: the system's clock, and an unpredictable suffix for the job's name.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from fate_llm.pipelines.builder import Pipeline
from fate_llm.pipelines.schema import PipelineSpec
from fate_llm.security.randomness import random_id

from .events import Observer
from .job import JobResult, Submission, job_name

__all__ = ["DEFAULT_WORKDIR", "prepare", "submit_pipeline"]

DEFAULT_WORKDIR = Path("jobs")


def prepare(
    spec: PipelineSpec, *, base: Path, workdir: Path = DEFAULT_WORKDIR, observers: Sequence[Observer] = ()
) -> Submission:
    """A job that is ready to run, in a new folder below `workdir`. base: where relative paths of data start."""
    job_id = job_name(spec.name, now=time.time(), unique=random_id(2))
    return Submission(
        spec,
        job_id=job_id,
        base=base.absolute(),
        workdir=workdir.absolute(),
        now=time.time,
        observers=observers,
    )


def submit_pipeline(
    pipeline: Pipeline, *, workdir: str | Path = DEFAULT_WORKDIR, observers: Sequence[Observer] = ()
) -> JobResult:
    """Run a pipeline of the builder with all its parties in this process.

    Returns when the job has ended, whatever way: `JobResult.raise_for_status` raises what it ended with.
    """
    return prepare(pipeline.spec(), base=pipeline.folder, workdir=Path(workdir), observers=observers).run()
