"""The benchmarks of the party services: what they compute and refuse, and that each runs. What they measure is judged
where the machine is quiet, never here."""

from __future__ import annotations

import importlib
import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import fate_llm.core
from tests.brokers import require_rabbitmq

pytest.importorskip("pika")

ROOT = Path(fate_llm.core.__file__).parents[2]
FOLDER = ROOT / "benchmarks"
SCRIPTS = ("services_jobs", "services_recovery")
PARTIES = ("a", "b", "z")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Modules of the benchmarks by name, as a script there imports them; none stays imported."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = {path.stem for path in FOLDER.glob("*.py")}
    before = {name: sys.modules.pop(name) for name in names & sys.modules.keys()}
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(before)


def run(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(FOLDER / f"{script}.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, env={**os.environ, "PYTHONPATH": path})


# --- the scripts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_says_what_it_measures_and_is_in_the_readme(script: str) -> None:
    assert "--quick" in run(script, "--help").stdout
    assert f"`{script}.py`" in (FOLDER / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "line"),
    [
        ("services_jobs", "seconds that services add to a job"),
        ("services_recovery", "host service killed, seconds to the end of the next round"),
    ],
)
def test_runs_with_small_sizes_and_keeps_nothing(script: str, line: str, tmp_path: Path) -> None:
    require_rabbitmq()
    ended = run(script, "--quick", "--results", str(tmp_path))
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert line in ended.stdout
    assert "quick: these sizes say nothing" in ended.stdout
    assert not list(tmp_path.iterdir())
    if script == "services_jobs":
        assert "processes, queues and unexpected kinds of files left: 0 " in ended.stdout, "on any machine"


@pytest.mark.parametrize("name", SCRIPTS)
def test_kept_results_name_their_machine_and_no_folder_of_it(name: str) -> None:
    file = FOLDER / "results" / f"{name}.json"
    if not file.exists():
        pytest.skip("not measured yet")
    text = file.read_text()
    result = json.loads(text)
    assert result["benchmark"] == name
    assert {"cpu", "cores", "memory_gib"} <= result["machine"].keys()
    assert not re.search(r"""["'= ]/\w+/""", text), "a result names no path of the machine it was measured on"


# --- jobs --------------------------------------------------------------------------------------------------------


def lines_of(party: str, **seconds: float) -> list[dict[str, Any]]:
    return [{"party": party, "event": event, "seconds": at} for event, at in seconds.items()]


def test_phases_are_those_of_the_guest(load: Callable[[str], ModuleType]) -> None:
    """Other parties' lines, whose clocks may be others, have no part in it."""
    own = lines_of("a", worker_started=11.0, task_started=13.0, task_finished=14.0, worker_ended=14.5, job_ended=15.0)
    others = lines_of("b", worker_started=99.0, task_started=98.0, job_ended=97.0)
    found = load("services_jobs").phases([*own, *others], 10.0, 15.25)
    expected = {"agreeing": 1, "starting": 2, "working": 1, "leaving": 0.5, "ending": 0.5, "telling": 0.25}
    assert found == pytest.approx(expected)
    assert sum(found.values()) == pytest.approx(5.25), "no second is lost or counted twice"


def test_a_job_without_all_its_lines_is_no_figure(load: Callable[[str], ModuleType]) -> None:
    with pytest.raises(SystemExit, match="lack task_started, task_finished"):
        load("services_jobs").phases(lines_of("a", worker_started=1, worker_ended=2, job_ended=3), 0.0, 4.0)


def test_percentiles_are_nearest_ranks(load: Callable[[str], ModuleType]) -> None:
    percentile = load("services_jobs").percentile
    values = [float(n) for n in range(100, 0, -1)]
    assert (percentile(values, 50), percentile(values, 95)) == (50.0, 95.0)
    assert percentile([3.0], 95) == 3.0


def test_what_is_added_is_the_difference_of_medians(load: Callable[[str], ModuleType]) -> None:
    found = load("services_jobs").summary([3.0, 2.5, 9.0], [2.0, 2.0, 8.0])
    assert found["added"] == pytest.approx(1.0)
    assert found["over_alone"] == pytest.approx(1.5)
    assert (found["served_p95"], found["alone_p95"]) == (9.0, 8.0)


def sample(jobs: int, rss: int, *, descriptors: int = 18, threads: int = 9) -> dict[str, Any]:
    one = {"rss_kib": rss, "descriptors": descriptors, "threads": threads, "children": 0, "cpu_seconds": jobs / 4}
    return {"jobs": jobs, "a": one}


def test_growth_is_that_of_the_later_half(load: Callable[[str], ModuleType]) -> None:
    """What is loaded with the first jobs is no leak; 50 KiB with each of the last ones is."""
    first = [sample(n, 1000 + 900 * n) for n in range(1, 11)]
    last = [sample(n, 50_000 + 50 * n) for n in range(11, 21)]
    growth = load("services_jobs").growth
    assert growth([*first, *last], "a")["rss_kib_a_job"] == pytest.approx(50.0)
    assert growth([*first, *last], "a")["cpu_seconds_a_job"] == pytest.approx(0.25)
    still = [sample(n, 50_000) for n in range(11, 21)]
    assert growth([*first, *still], "a")["rss_kib_a_job"] == pytest.approx(0.0)


def test_growth_counts_handles_from_the_first_to_the_last(load: Callable[[str], ModuleType]) -> None:
    growth = load("services_jobs").growth
    found = growth([sample(1, 10), sample(2, 10, descriptors=90), sample(3, 10, descriptors=20, threads=12)], "a")
    assert (found["descriptors"], found["threads"]) == (2, 3)
    assert growth([sample(1, 10)], "a")["rss_kib_a_job"] == 0.0


@pytest.mark.parametrize(
    ("party", "name", "fine"),
    [
        ("a", "service.lock", True),
        ("a", "audit/audit-000007.jsonl", True),
        ("a", "fate.db-wal", True),
        ("a", "jobs/JOB/dossier.json", True),
        ("b", "jobs/JOB/parties/b/steps/model", True),
        ("z", "jobs/JOB/parties/z/finished.json", True),
        ("z", "jobs/JOB/parties/z/steps/model", False),
        ("a", "jobs/JOB/parties/b/log.txt", False),
        ("a", "jobs/JOB/parties/a/link/1/session", False),
        ("a", "jobs/JOB/parties/a/journal/steps/2/values", False),
        ("a", "jobs/toys-20260101-000000-0000/accepted.json", False),
        ("a", "core.1234", False),
    ],
)
def test_files_that_nobody_expects_are_named(
    load: Callable[[str], ModuleType], party: str, name: str, fine: bool
) -> None:
    assert load("services_jobs").unexpected({name: 1}, party) == ([] if fine else [name])


def details(**changes: Any) -> dict[str, Any]:
    grown = {"rss_kib_a_job": 1.0, "descriptors": 0, "threads": 0}
    found: dict[str, Any] = {
        "one_by_one": {"added": 0.5},
        "growth": {"a": grown, "b": grown},
        "children_at_the_end": {"a": 0, "b": 0},
        "files_of_a_job": {"a": {"unexpected": []}, "b": {"unexpected": []}},
        "queues_of_jobs": [],
    }
    return {**found, **changes}


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, ""),
        ({"one_by_one": {"added": 1.01}}, "seconds"),
        ({"growth": {"a": {"rss_kib_a_job": 101.0, "descriptors": 0, "threads": 0}}}, "KiB"),
        ({"growth": {"a": {"rss_kib_a_job": 0.0, "descriptors": 9, "threads": 0}}}, "descriptors"),
        ({"growth": {"a": {"rss_kib_a_job": 0.0, "descriptors": 0, "threads": 9}}}, "threads"),
        ({"children_at_the_end": {"a": 0, "b": 1}}, "processes"),
        ({"files_of_a_job": {"b": {"unexpected": ["core"]}}}, "processes"),
        ({"queues_of_jobs": ["fate.a.job"]}, "processes"),
    ],
)
def test_each_leak_is_judged(load: Callable[[str], ModuleType], changes: dict[str, Any], missed: str) -> None:
    found = load("services_jobs").ratios(details(**changes))
    assert [ratio.name.split()[0].rstrip(",") for ratio in found if not ratio.holds] == ([missed] if missed else [])


def test_so_many_run_at_once(load: Callable[[str], ModuleType]) -> None:
    """Each waits for as many as there are slots: with fewer it would never end."""
    import threading

    meeting = threading.Barrier(3, timeout=30)
    found, seconds = load("services_jobs")._at_once(6, 3, meeting.wait)
    assert sorted(found) == [0, 0, 1, 1, 2, 2]
    assert seconds > 0


# --- what a service holds ----------------------------------------------------------------------------------------


def test_vitals_of_a_process_count_what_it_opens_and_starts(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    services = load("_services")
    before = services.vitals(os.getpid())
    with (tmp_path / "file").open("w"), subprocess.Popen(["sleep", "60"]) as child:
        during = services.vitals(os.getpid())
        child.kill()
    assert during.descriptors == before.descriptors + 1
    assert during.children == before.children + 1
    assert during.rss_kib > 1000
    assert during.cpu_seconds >= before.cpu_seconds > 0
    with pytest.raises(SystemExit, match=f"{child.pid} has ended"):
        services.vitals(child.pid)


def test_files_are_counted_by_kind(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    for name in ("jobs/one/log.txt", "jobs/two/log.txt", "jobs/two/more", "artifacts/ab/cd", "artifacts/ef/gh", "x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = load("_services").kinds_of_files(tmp_path, {"one": "JOB", "two": "JOB"})
    assert found == {"jobs/JOB/log.txt": 2, "jobs/JOB/more": 1, "artifacts/...": 2, "x": 1}


def test_rows_are_counted_by_table(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "fate.db") as database:
        database.execute("CREATE TABLE jobs (job TEXT)")
        database.execute("CREATE TABLE lines (id INTEGER PRIMARY KEY AUTOINCREMENT)")
        database.executemany("INSERT INTO jobs VALUES (?)", [("a",), ("b",)])
    database.close()
    assert load("_services").rows(tmp_path) == {"jobs": 2, "lines": 0}


def test_the_job_is_one_that_the_pipelines_know(
    load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fate_llm.core import plugins
    from fate_llm.pipelines import check
    from tests.runtime import toys

    monkeypatch.setattr(plugins, "_installed", toys.installed)
    services = load("_services")
    spec = check(services.stepper(7, pause=0.25))
    assert spec.members == services.PARTIES == PARTIES
    assert spec.tasks["steps"].params["rounds"] == 7


# --- recovery ----------------------------------------------------------------------------------------------------


def states(**ends: float) -> list[dict[str, Any]]:
    return [{"event": "round_state", "round": int(key[1:]), "time": at} for key, at in ends.items()]


def test_a_round_ends_with_its_last_party_and_counts_once(load: Callable[[str], ModuleType]) -> None:
    """A worker that was started again says again what it had: the first time counts."""
    guest = [*states(r1=1.0, r2=2.0), {"event": "step", "time": 2.5}, *states(r2=7.0, r3=8.0)]
    host = states(r1=1.25, r2=1.5)
    assert load("services_recovery").common_ends([guest, host]) == {1: 1.25, 2: 2.0}


def test_rounds_around_a_kill_are_no_measure(load: Callable[[str], ModuleType]) -> None:
    recovery = load("services_recovery")
    kills = [recovery.Kill(3.2, 3.4, 9.0, 4)]
    assert kills[0].seconds == pytest.approx(5.8)
    ends = {1: 1.0, 2: 2.0, 3: 3.0, 4: 9.0, 5: 9.5, 6: 10.6}
    assert recovery.undisturbed(ends, kills) == pytest.approx([1.0, 1.0, 1.1])
    with pytest.raises(SystemExit, match="no round was left in peace"):
        recovery.undisturbed({4: 9.0, 5: 9.5}, kills)


def test_every_victim_has_a_limit_and_a_way_to_die(load: Callable[[str], ModuleType]) -> None:
    recovery = load("services_recovery")
    assert list(recovery.LIMITS) == list(recovery._VICTIMS)


@pytest.mark.parametrize("pids", [[], [1, 2]])
def test_a_kill_that_hits_another_number_of_workers_is_no_figure(
    load: Callable[[str], ModuleType], pids: list[int]
) -> None:
    recovery = load("services_recovery")
    site = SimpleNamespace(services={"b": SimpleNamespace(kill_worker=lambda: pids)})
    with pytest.raises(SystemExit, match="b had not one worker"):
        recovery._VICTIMS["host worker"](site)


def test_recoveries_are_judged_by_victim(load: Callable[[str], ModuleType]) -> None:
    recovery = load("services_recovery")
    found = {victim: {"seconds": limit} for victim, limit in recovery.LIMITS.items()}
    assert all(ratio.holds for ratio in recovery.ratios(found))
    found["broker"] = {"seconds": recovery.LIMITS["broker"] + 0.1}
    assert [ratio.name.split()[0] for ratio in recovery.ratios(found) if not ratio.holds] == ["broker"]


def test_a_round_that_does_not_come_is_said(load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    recovery = load("services_recovery")
    monkeypatch.setattr(recovery, "PATIENCE", 0.05)
    party = SimpleNamespace(events=lambda job: states(r1=1.0, r2=2.0))
    site = SimpleNamespace(services={"a": party, "b": party})
    assert recovery._wait_for(site, "job", 2) == 2.0
    with pytest.raises(SystemExit, match=r"job: round 3 did not end .*\[1, 2\]"):
        recovery._wait_for(site, "job", 3)
