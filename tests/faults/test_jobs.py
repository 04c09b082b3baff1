"""Whole jobs, a process per party, with a tiny model: in spite of a fault the same bits, or a clear end in time."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from fate_llm.core.errors import PeerFailed
from fate_llm.pipelines import check
from fate_llm.runtime.broker import BrokerNode
from fate_llm.runtime.events import Event
from fate_llm.runtime.job import JobResult, Submission
from fate_llm.runtime.processes import ProcessRuntime
from tests.e2e.conftest import pipeline, tiny_model  # noqa: F401

from .links import digest, loopback, nothing_on, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
Run = Callable[..., JobResult]


@pytest.fixture
def run(tmp_path: Path, pipeline: dict[str, Any], node: BrokerNode) -> Run:  # noqa: F811
    """Run the pipeline: in this process, or with a process per party. at: what to do once, after a round."""
    del pipeline["tasks"]["evaluate"]
    pipeline["tasks"]["tune"]["params"]["rounds"] = 2
    pipeline["job"]["round_deadline"] = "150s"

    def go(name: str, at: Callable[[Submission], None] | None = None, *, after: int = 1, retries: int = 0) -> JobResult:
        pipeline["job"]["retries"] = retries
        spec = check(pipeline)
        runtime = ProcessRuntime({party: loopback(node.url()) for party in spec.members}, timing={"linger": 3.0})
        jobs: list[Submission] = []
        done: list[Future[None]] = []

        def watch(event: Event) -> None:
            wanted = event.kind == "round" and event.party == "bank-a" and event.fields.get("round") == after
            if at is not None and wanted and not done:
                done.append(start(at, jobs[0]))

        jobs.append(
            Submission(
                spec,
                job_id=name,
                base=tmp_path,
                workdir=tmp_path / "jobs",
                now=time.time,
                observers=(watch,),
                runtime=None if name == "alone" else runtime,
            )
        )
        result = jobs[0].run()
        assert at is None or done, "the fault did not happen"
        for one in done:
            one.result(60)
        assert not workers(), "a party's process is left"
        return result

    return go


def workers() -> list[int]:
    """Our parties' processes, by the machine's own listing."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            words = (path.parent / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has ended meanwhile
            continue
        if parent == os.getpid() and b"fate_llm.runtime.worker" in words:
            found.append(int(path.parent.name))
    return found


def adapters(result: JobResult) -> dict[str, str]:
    """Digests of all parties' weights."""
    assert result.status == "success", result.error
    outputs = json.loads((result.folder / "manifest.json").read_text())["outputs"]
    models = {party: Path(found["tune"]["model"]) for party, found in outputs.items() if "tune" in found}
    assert len(models) == 3
    return {party: digest((folder / "adapter_model.safetensors").read_bytes()) for party, folder in models.items()}


def kill(party: str) -> Callable[[Submission], None]:
    """End a party's process at once."""

    def killing(job: Submission) -> None:
        os.kill(job._job._parties[party].process.pid, signal.SIGKILL)  # type: ignore[union-attr]

    return killing


@pytest.fixture
def undisturbed(run: Run) -> dict[str, str]:
    """Digests of the models after a run in memory."""
    return adapters(run("alone"))


def test_the_broker_killed_between_rounds_and_a_party_killed_with_a_retry(
    run: Run, undisturbed: dict[str, str], node: BrokerNode
) -> None:
    def power_cut(_: Submission) -> None:
        node.kill()
        time.sleep(1.0)
        node.start(120)

    result = run("power-cut", power_cut)
    assert adapters(result) == undisturbed
    for party in ("bank-a", "bank-b", "bank-c", "consortium"):
        text = (result.folder / f"parties/{party}/federation.prom").read_text()
        assert f'fate_llm_broker_reconnects_total{{party="{party}"}} 1' in text
    nothing_on(node)

    result = run("retried", kill("bank-b"), retries=1)
    assert adapters(result) == undisturbed
    nothing_on(node)


def test_a_party_killed_without_a_retry_ends_the_job_in_time(run: Run, node: BrokerNode) -> None:
    victim = "bank-c"
    killed: list[float] = []

    def killing(job: Submission) -> None:
        killed.append(time.monotonic())
        kill(victim)(job)

    result = run("ended", killing)
    assert time.monotonic() - killed[0] < 30, "the stated time"
    assert result.status == "failed" and isinstance(result.error, PeerFailed)
    assert f"the process of {victim} ended without a word (killed by signal 9)" in result.error.message
    nothing_on(node)
