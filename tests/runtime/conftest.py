"""A runtime with toy components, and jobs of them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fate_llm.core import plugins
from fate_llm.pipelines import check
from fate_llm.runtime.events import Event
from fate_llm.runtime.job import Submission
from tests.runtime import toys

MakeJob = Callable[..., Submission]


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The toys are installed, no attempt has failed yet, and no party is left running at the end."""
    monkeypatch.setattr(plugins, "_installed", toys.installed)
    toys.Breaker.attempts.clear()
    yield
    assert not [t.name for t in threading.enumerate() if t.name.startswith(("party-", "channel-"))]


@pytest.fixture
def make_job(tmp_path: Path) -> MakeJob:
    """A submission of raw pipeline data that is ready to run; the clock ticks once a look."""

    def make(data: dict[str, Any], *observers: Callable[[Event], None], job_id: str = "job-1") -> Submission:
        clock = itertools.count(1000)
        return Submission(
            check(data),
            job_id=job_id,
            base=tmp_path,
            workdir=tmp_path / "jobs",
            now=lambda: float(next(clock)),
            observers=observers,
        )

    return make
