"""A job from a checked pipeline to its result, wherever its parties run."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from fate_llm.core.canonical import digest
from fate_llm.core.errors import ConfigurationError, FateError, JobCancelled, PolicyError
from fate_llm.core.values import ArtifactKind
from fate_llm.pipelines.dialect import dump
from fate_llm.pipelines.schema import PipelineSpec
from fate_llm.pipelines.sums import hiding_tasks

from .aggregates import watching_aggregates
from .assign import assignments
from .attempt import Attempt, Order, Outcome, Runtime
from .events import EventLog, Observer
from .jobfolder import JobFolder, write_json
from .local import LocalRuntime

__all__ = ["JobResult", "Submission", "job_name"]

_VERSIONED = ("fate_llm", "numpy", "pydantic", "torch", "transformers", "peft", "accelerate")


@dataclass(frozen=True, slots=True)
class JobResult:
    """What a job left: where everything lies and what was measured.

    outputs: {party: {task: {output: path}}}. metrics: {task: content of its metrics output}, of the guest.
    """

    job_id: str
    status: str
    folder: Path
    outputs: dict[str, dict[str, dict[str, str]]]
    metrics: dict[str, Any] = field(default_factory=dict)
    error: FateError | None = None

    def as_dict(self) -> dict[str, Any]:
        """The document that `submit --json` prints."""
        result: dict[str, Any] = {
            "job_id": self.job_id,
            "status": self.status,
            "outputs": self.outputs,
            "metrics": self.metrics,
        }
        return result if self.error is None else {**result, "error": self.error.as_dict()}

    def raise_for_status(self) -> JobResult:
        """Raise the job's error, if it ended with one."""
        if self.error is not None:
            raise self.error
        return self

    def table(self, task: str | None = None) -> list[dict[str, Any]]:
        """Rows of the models that an evaluator compared (of `task`, or of the only evaluator)."""
        return self._rows("models", task)

    def rounds(self, task: str | None = None) -> list[dict[str, Any]]:
        """Rows of a trainer's rounds (of `task`, or of the only trainer)."""
        return self._rows("rounds", task)

    def _rows(self, key: str, task: str | None) -> list[dict[str, Any]]:
        found = {name: content[key] for name, content in self.metrics.items() if key in content}
        if task is None and len(found) == 1:
            return list(next(iter(found.values())))
        if task not in found:
            raise ConfigurationError(f"name one of the tasks that have {key}: {sorted(found)}")
        return list(found[task])

    def party_rounds(self, task: str) -> dict[str, list[dict[str, Any]]]:
        """{party: rows of its rounds} of one trainer task, read from the job folder."""
        rows: dict[str, list[dict[str, Any]]] = {}
        for party, tasks in self.outputs.items():
            if path := tasks.get(task, {}).get("metrics"):
                rows[party] = json.loads(Path(path).read_text())["rounds"]
        return rows

    def plot(self, task: str | None = None) -> Any:
        """A matplotlib figure of the loss per round and party; needs the extra `[eval]`."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ConfigurationError("plots need matplotlib", hint="pip install 'fate_llm[eval]'") from None
        names = [task] if task else [name for name, content in self.metrics.items() if "rounds" in content]
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for name in names:
            for party, rows in self.party_rounds(name).items():
                points = [(row["round"], row["local_loss"]) for row in rows if row.get("local_loss") is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), marker="o", label=f"{name}, {party}")
        axes.set_xlabel("round")
        axes.set_ylabel("loss (nats per token)")
        axes.legend()
        return figure

    def _repr_html_(self) -> str:
        from html import escape

        rows = "".join(
            f"<tr><td>{escape(name)}</td><td><pre>{escape(json.dumps(content)[:300])}</pre></td></tr>"
            for name, content in self.metrics.items()
        )
        head = f"<b>{escape(self.job_id)}</b>: {escape(self.status)} in {escape(str(self.folder))}"
        return f"{head}<table>{rows}</table>"


def job_name(pipeline: str, *, now: float, unique: str) -> str:
    """`<pipeline>-<UTC time>-<unique>`: sorts by time, never twice. now: seconds since the epoch."""
    return f"{pipeline}-{datetime.fromtimestamp(now, UTC):%Y%m%d-%H%M%S}-{unique}"


class Submission:
    """One job. `run` once; `cancel` from any thread.

    base: folder that the pipeline's relative paths start from. now: the clock, seconds since the epoch.
    """

    def __init__(
        self,
        spec: PipelineSpec,
        *,
        job_id: str,
        base: Path,
        workdir: Path,
        now: Callable[[], float],
        observers: Sequence[Observer] = (),
        runtime: Runtime | None = None,
    ) -> None:
        self._runtime: Runtime = runtime or LocalRuntime()
        if spec.experiment and self._runtime.name != "local":
            raise PolicyError(
                f"pipeline {spec.name} is an experiment: it shows data or models of one party to another",
                hint="Experiments run in the local runtime only.",
            )
        self._spec, self._base, self._now = spec, base, now
        self._plan = assignments(spec)
        self.job_id = job_id
        self.folder = JobFolder.create(workdir, job_id)
        hiding = hiding_tasks(spec)
        shown = tuple(watching_aggregates(observer, hiding) for observer in observers)
        self._events = EventLog(now=now, observers=shown)
        self._job: Attempt | None = None
        self._cancelled: str | None = None

    def run(self) -> JobResult:
        """Run the job to its end; failed tasks are tried again as often as `job.retries` says."""
        spec = self._spec
        (self.folder.path / "pipeline.yaml").write_text(dump(spec.to_data()), encoding="utf-8")
        self.folder.update_manifest(
            job_id=self.job_id,
            status="running",
            pipeline=digest(spec.to_data()),
            seed=spec.job.seed,
            runtime=self._runtime.name,
            base=str(self._base),
            started=self._now(),
            versions=_versions(),
            python=platform.python_version(),
            machine=platform.machine(),
        )
        try:
            return self._finish(self._attempts())
        except KeyboardInterrupt:  # a second one does not wait for the step that is running
            error = JobCancelled("stopped by Ctrl-C").as_dict()
            self.folder.update_manifest(status="cancelled", ended=self._now(), error=error)
            raise

    def _attempts(self) -> Outcome:
        outcome = self._attempt(1, {})
        for attempt in range(2, self._spec.job.retries + 2):
            if outcome.status != "failed" or isinstance(outcome.error, ConfigurationError) or self._cancelled:
                break
            self._events.emit(None, "", "", "retry", {"attempt": attempt, "error": str(outcome.error)})
            outcome = self._attempt(attempt, _finished_everywhere(self._spec, outcome))
        return outcome

    def _attempt(self, number: int, finished: Mapping[str, Mapping[str, Mapping[str, str]]]) -> Outcome:
        self._job = self._runtime.attempt(
            Order(self.job_id, number, self._spec, self._plan, self._base, self.folder, self._events, finished)
        )
        if self._cancelled is not None:  # before this attempt began
            self._job.cancel(self._cancelled)
        return self._job.run()

    def cancel(self, reason: str) -> None:
        """Stop all parties; `run` returns with status `cancelled`, unless all had finished."""
        self._cancelled = reason
        if self._job is not None:
            self._job.cancel(reason)

    def _finish(self, outcome: Outcome) -> JobResult:
        metrics = self._metrics(outcome)
        outputs = {party: {t: o for t, o in tasks.items() if o} for party, tasks in outcome.outputs.items()}
        write_json(self.folder.path / "metrics.json", metrics)
        error = None if outcome.error is None else outcome.error.as_dict()
        self.folder.update_manifest(
            status=outcome.status,
            ended=self._now(),
            error=error,
            errors={party: found.as_dict() for party, found in outcome.errors.items()},
            outputs=outputs,
            traffic=outcome.traffic,
            digests=self.folder.digests(outputs),
        )
        return JobResult(self.job_id, outcome.status, self.folder.path, outputs, metrics, outcome.error)

    def _metrics(self, outcome: Outcome) -> dict[str, Any]:
        """Metrics outputs of the guest, or of the first party in the roster that has the task's."""
        found: dict[str, Any] = {}
        for task in self._spec.tasks:
            ports = self._spec.component(task).outputs
            names = [name for name, port in ports.items() if port.kind is ArtifactKind.METRICS]
            for party in self._spec.members:
                path = next((p for n in names if (p := outcome.outputs.get(party, {}).get(task, {}).get(n))), None)
                if path is not None:
                    found[task] = json.loads(Path(path).read_text())
                    break
        return found


def _finished_everywhere(spec: PipelineSpec, outcome: Outcome) -> dict[str, dict[str, dict[str, str]]]:
    """Outputs of the tasks that all their parties have finished: these are not run again."""
    done = {
        task for task in spec.tasks if all(task in outcome.outputs.get(party, {}) for party in spec.parties_of(task))
    }
    return {party: {t: o for t, o in tasks.items() if t in done} for party, tasks in outcome.outputs.items()}


def _versions() -> dict[str, str]:
    found = {}
    for name in _VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
