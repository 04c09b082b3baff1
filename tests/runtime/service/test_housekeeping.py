"""What a service throws away, and what it never does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fate_llm.core.errors import ConfigurationError, StoreLost
from fate_llm.core.values import ArtifactKind
from fate_llm.runtime.artifacts.store import ArtifactStore
from fate_llm.runtime.service.housekeeping import Housekeeping
from fate_llm.runtime.service.words import Line
from fate_llm.runtime.store.rows import JobRow, TaskRow
from fate_llm.runtime.store.store import Store
from fate_llm.runtime.trust.policy_schema import Policy, make_policy

DAY = 86400.0
NOW = 1000 * DAY


class World:
    """A store, artifacts and job folders of one party."""

    def __init__(self, folder: Path, policy: Policy | None) -> None:
        self.store = Store.open("sqlite://", now=lambda: NOW)
        self.artifacts = ArtifactStore(folder / "artifacts")
        self.folder, self.said, self.done = folder, [], []
        (folder / "jobs").mkdir()

        def read() -> Policy:
            if policy is None:
                raise ConfigurationError("it is broken")
            return policy

        self.hall: Any = SimpleNamespace(
            store=self.store,
            artifacts=self.artifacts,
            jobs=folder / "jobs",
            policy=read,
            say=self.said.append,
            clerk=SimpleNamespace(do=lambda work: self.done.append(work())),
        )
        self.keeping = Housekeeping(self.hall)

    def job(self, name: str, ended: float | None, *, output: str = "") -> None:
        row = JobRow(name, "0" * 64, "n", "a", False, "success", 1, 5, NOW - 900 * DAY, NOW, ended, {}, {}, None)
        self.store.save_job(row)
        (self.folder / "jobs" / name).mkdir()
        if output:
            path = self.folder / f"{name}.txt"
            path.write_text(output)
            digest = self.artifacts.put(path, kind=ArtifactKind.DATASET).digest
            self.store.save_task(TaskRow(name, "t", 1, "success", 1.0, 2.0, {"out": digest}, ""))

    def jobs(self) -> set[str]:
        found = {row.job for row in self.store.jobs(limit=1000)}
        assert found == {path.name for path in (self.folder / "jobs").iterdir()}
        return found


KEEP_10 = make_policy({"version": 1, "retention": {"days": 10}})


def test_what_is_older_than_the_policy_keeps_goes_with_its_outputs(tmp_path: Path) -> None:
    world = World(tmp_path, KEEP_10)
    world.job("old", NOW - 11 * DAY, output="old")
    world.job("young", NOW - 9 * DAY, output="young")
    world.job("running", None)
    assert world.keeping.sweep(NOW) == ["old"]
    assert world.jobs() == {"young", "running"}
    assert len(world.artifacts.digests()) == 1
    assert "old" in world.said[0]


def test_without_retention_jobs_stay_for_ever(tmp_path: Path) -> None:
    world = World(tmp_path, make_policy({"version": 1}))
    world.job("old", NOW - 800 * DAY, output="x")
    assert world.keeping.sweep(NOW) == []
    assert world.jobs() == {"old"}
    assert len(world.artifacts.digests()) == 1


def test_a_policy_that_cannot_be_read_removes_nothing(tmp_path: Path) -> None:
    world = World(tmp_path, None)
    world.job("old", NOW - 800 * DAY)
    assert world.keeping.sweep(NOW) == []
    assert world.jobs() == {"old"}


def test_many_jobs_are_read_in_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fate_llm.runtime.service.housekeeping._PAGE", 3)
    world = World(tmp_path, KEEP_10)
    for index in range(10):
        row = JobRow(f"j{index}", "0" * 64, "n", "a", False, "success", 1, 5, float(index), NOW, 20.0, {}, {}, None)
        world.store.save_job(row)
    assert len(world.keeping.sweep(NOW)) == 10
    assert world.store.jobs() == []


def test_lines_of_a_long_job_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fate_llm.runtime.service.housekeeping._LINES", 5)
    world = World(tmp_path, KEEP_10)
    world.job("young", NOW)
    world.store.append_lines("young", "a", [Line(number=n, seconds=1.0, event="x") for n in range(1, 20)])
    world.keeping.sweep(NOW)
    assert [line.number for _, _, line in world.store.lines("young")] == [15, 16, 17, 18, 19]


def test_a_place_of_artifacts_that_is_away_is_said_and_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, KEEP_10)
    world.job("old", NOW - 11 * DAY)

    def away(keep: set[str]) -> None:
        raise StoreLost("it is away")

    monkeypatch.setattr(world.artifacts, "gc", away)
    assert world.keeping.sweep(NOW) == ["old"]
    assert any("away" in text for text in world.said)


def test_it_is_done_once_an_hour_and_not_at_the_start(tmp_path: Path) -> None:
    world = World(tmp_path, KEEP_10)
    for seconds in (0.0, 10.0, 3599.0, 3601.0, 3700.0, 7300.0):
        world.keeping.tick(NOW + seconds)
    assert len(world.done) == 2
