"""The benchmarks of secure aggregation: what they compute and refuse, and that each runs. What they measure is judged
where the machine is quiet, never here."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

import fate_llm.core
from fate_llm.core.errors import QuorumLost

ROOT = Path(fate_llm.core.__file__).parents[2]
FOLDER = ROOT / "benchmarks"
SCRIPTS = ("secagg", "secagg_round_overhead", "secagg_vs_flower")


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
    env = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)


# --- the scripts -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_says_what_it_measures(script: str) -> None:
    assert "--quick" in run(script, "--help").stdout


@pytest.mark.slow
def test_the_share_of_a_round_is_measured_and_nothing_is_kept(tmp_path: Path) -> None:
    ended = run("secagg_round_overhead", "--quick", "--results", str(tmp_path))
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = ended.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["round 1", "round 2"], lines
    assert any(line.startswith("seconds in the protocol over seconds of the round: 0.") for line in lines), lines
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_figures_that_no_machine_disturbs_hold_and_nothing_is_kept(tmp_path: Path) -> None:
    ended = run("secagg", "--quick", "--results", str(tmp_path))
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = [line for line in ended.stdout.splitlines() if line.startswith(("bytes of messages", "MiB that"))]
    assert len(lines) == 4 and all(line.endswith(" ok") for line in lines), lines
    assert "a party's masks over AES alone" in ended.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_without_flower_ours_runs_alone_and_says_so(tmp_path: Path) -> None:
    ended = run("secagg_vs_flower", "--quick", "--results", str(tmp_path))
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "Flower is left out: give --flower-python" in ended.stdout
    assert "stages in which a party may be lost, ours: 5 (at least 5) ok" in ended.stdout
    assert not list(tmp_path.iterdir())


# --- one round ---------------------------------------------------------------------------------------------------


def test_a_round_is_checked_and_every_byte_of_it_counted(load: Callable[[str], ModuleType]) -> None:
    module = load("_secagg_round")
    federation = module.Federation(4, 20_000)
    found = module.run_round(federation)
    federation.check(found.total)
    assert found.total.contributors == federation.parties and not found.total.missing
    assert found.total.weight == sum(range(1000, 1004))
    assert set(found.seconds) == {*federation.parties, module.COORDINATOR}
    for party in federation.parties:
        assert 80_000 < found.sent[party] < found.content[party] < found.frames[party] < 90_000
    assert found.all_seconds == pytest.approx(sum(map(found.of, found.seconds)))
    assert not found.extra


def test_a_wrong_sum_ends_the_benchmark(load: Callable[[str], ModuleType]) -> None:
    module = load("_secagg_round")
    federation = module.Federation(4, 20_000)
    total = module.run_round(federation).total
    name = next(iter(total.mean))
    wrong = dict(total.mean)
    wrong[name] = wrong[name].copy()
    wrong[name][0, 0] += 4 * total.error_bound
    for one in (replace(total, mean=wrong), replace(total, weight=1.0), replace(total, contributors=("party-001",))):
        with pytest.raises(SystemExit, match="the sum is wrong"):
            federation.check(one)


@pytest.mark.parametrize("stage", ["keys", "shares", "masked", "consent", "unmask"])
def test_a_party_lost_in_a_stage_is_missing_from_then_on(load: Callable[[str], ModuleType], stage: str) -> None:
    module = load("_secagg_round")
    federation = module.Federation(4, 10_000)
    found = module.run_round(federation, silent={stage: 1})
    federation.check(found.total)
    lost = federation.parties[-1]
    counted = stage in ("consent", "unmask")  # its term had come before
    assert (lost in found.total.contributors) == counted and (lost in found.total.missing) == (not counted)
    assert (found.sent[lost] > 40_000) == counted
    after = module.STAGES[module.STAGES.index(stage) :]
    assert all(found.seconds[lost][later] == 0.0 for later in after)


def test_too_many_lost_end_the_round(load: Callable[[str], ModuleType]) -> None:
    module = load("_secagg_round")
    with pytest.raises(QuorumLost):
        module.run_round(module.Federation(4, 10_000), silent={"masked": 2})


def test_memory_is_counted_by_whose_it_is(load: Callable[[str], ModuleType]) -> None:
    module = load("_secagg_round")
    federation = module.Federation(3, 100_000)
    found = module.run_round(federation, watch=True)
    vector = 400_000
    assert all(vector <= found.extra[party] < vector + 4 * 2**20 for party in federation.parties)
    assert found.extra[module.COORDINATOR] >= vector


def test_sizes_that_do_not_fit_the_layout_are_refused(load: Callable[[str], ModuleType]) -> None:
    module = load("_secagg_round")
    for parameters in (0, 1, 10_001, 9_999):
        with pytest.raises(SystemExit, match="a multiple of 10000"):
            module.Federation(3, parameters)


# --- what is compared --------------------------------------------------------------------------------------------


def test_masks_left_to_take_off(load: Callable[[str], ModuleType]) -> None:
    module = load("secagg")
    assert [module.masks_left(8, dropped) for dropped in (0, 1, 2)] == [8, 14, 18]


def test_the_floor_of_a_round(load: Callable[[str], ModuleType]) -> None:
    # 7 terms of 8 masks and 14 to take off, 40 bytes each, at 10 bytes a second; 7 additions of 2 seconds
    found = {"aes_bytes_a_second": 10.0, "add_seconds": 2.0}
    assert load("secagg")._floor(8, 10, 1, found) == pytest.approx((7 * 8 + 14) * 4.0 + 7 * 2.0)


def test_the_clock_of_the_floor_writes_what_it_says(load: Callable[[str], ModuleType]) -> None:
    module = load("secagg")
    assert module.aes_seconds(1 << 22) > 0.0


def test_what_counts_against_flower(load: Callable[[str], ModuleType]) -> None:
    module = load("secagg_vs_flower")
    runs = {
        "ours": [
            {"client_seconds": {"a": 9.0, "b": 1.0, "c": 1.0}, "server_seconds": 1.0, "content": {"a": 40, "b": 41}}
        ],
        "flower": [{"client_seconds": {"1": 7.0, "2": 7.0, "3": 8.0}, "server_seconds": 1.0, "content": {"1": 82}}],
    }
    speed, size = module._compared("some", runs, 10)
    assert (speed.value, speed.limit, speed.least, speed.holds) == (7.0, 5.0, True, True)
    assert (size.value, size.limit, size.least, size.holds) == (0.5, 0.5, False, True)
    assert module._compared("some", {"ours": runs["ours"]}, 10) == []


def test_both_sides_have_the_same_threshold(load: Callable[[str], ModuleType]) -> None:
    from fate_llm.protocols.secagg.agreement import usual_threshold

    module = load("secagg_vs_flower")
    assert [module.threshold_of(n) for n in range(3, 101)] == [usual_threshold(n) for n in range(3, 101)]
    assert load("_secagg_round").LARGEST_WEIGHT == module.LARGEST_WEIGHT


@pytest.mark.parametrize("name", SCRIPTS)
def test_kept_results_name_their_machine_and_no_folder_of_it(name: str) -> None:
    file = FOLDER / "results" / f"{name}.json"
    if not file.exists():
        pytest.skip("not measured yet")
    text = file.read_text()
    result = json.loads(text)
    assert result["benchmark"] == name
    assert not re.search(r"""["'= ]/\w+/""", text), "a result names no path of the machine it was measured on"
