"""Every benchmark runs. What it measures is judged where the machine is quiet, never here."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import fate_llm.core

ROOT = Path(fate_llm.core.__file__).parents[2]
FOLDER = ROOT / "benchmarks"
SCRIPTS = ("memory", "round_overhead", "simulation", "smaller_messages", "startup", "wire")


def run(script: str, *words: str) -> str:
    """What a benchmark prints; it must end well."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    ended = subprocess.run(
        [sys.executable, str(FOLDER / f"{script}.py"), *words],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_measure", FOLDER / "_measure.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "_measure", module)
    spec.loader.exec_module(module)
    return module


def test_every_script_is_in_the_readme() -> None:
    text = (FOLDER / "README.md").read_text()
    scripts = {path.stem for path in FOLDER.glob("[a-z]*.py")}
    assert scripts >= set(SCRIPTS)
    assert all(f"{name}.py" in text for name in scripts)


@pytest.mark.parametrize("script", SCRIPTS)
def test_says_what_it_measures(script: str) -> None:
    assert "--quick" in run(script, "--help")


def test_wire_runs(tmp_path: Path) -> None:
    output = run("wire", "--quick", "--results", str(tmp_path))
    assert "bytes on the wire over bytes of tensors" in output
    assert not list(tmp_path.iterdir()), "quick figures are not kept"


def test_bytes_of_a_round_stay_below_the_limit() -> None:
    """The one figure that no machine disturbs."""
    line = next(line for line in run("wire", "--quick").splitlines() if line.startswith("bytes on the wire"))
    assert line.endswith(" ok"), line


def test_what_the_encodings_save_stays_within_its_limits() -> None:
    lines = [line for line in run("smaller_messages", "--quick").splitlines() if line.startswith("bytes of noise")]
    assert len(lines) == 3
    assert all(line.endswith(" ok") for line in lines), lines


def test_startup_runs_and_imports_nothing_heavy() -> None:
    output = run("startup", "--quick")
    assert "heavy libraries imported by --help: none" in output


@pytest.mark.slow
@pytest.mark.parametrize("script", ["round_overhead", "memory", "simulation"])
def test_runs_with_a_tiny_model(script: str) -> None:
    pytest.importorskip("peft")
    assert "quick: these sizes say nothing" in run(script, "--quick")


def test_a_missed_limit_is_an_exit_status_and_is_written_down(measure: ModuleType, tmp_path: Path) -> None:
    options = measure.make_parser("test").parse_args(["--results", str(tmp_path), "--date", "2026-01-02"])
    ratios = [measure.Ratio("fine", 1.0, 1.05), measure.Ratio("slow", 0.4, 0.5, least=True)]
    assert measure.finish(options, "some", ratios, {"runs": [1, 2]}) == 1
    assert measure.finish(options, "some", ratios[:1], {}) == 0
    written = json.loads((tmp_path / "some.json").read_text())
    assert written["date"] == "2026-01-02"
    assert {"command", "machine", "versions", "ratios", "details"} <= written.keys()
    assert {"cpu", "cores", "memory_gib"} <= written["machine"].keys()


def test_a_child_that_fails_ends_the_benchmark(measure: ModuleType) -> None:
    with pytest.raises(SystemExit, match="no such thing"):
        measure.run_child([sys.executable, "-c", "raise ValueError('no such thing')"], timeout=30)


def test_memory_of_a_tree_counts_grandchildren(measure: ModuleType) -> None:
    grandchild = "import time; kept = bytearray(48 * 2**20); time.sleep(1)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    with measure.TreeMemory(every=0.05) as memory:
        measure.run_child([sys.executable, "-c", code], timeout=30, answers=False)
    assert memory.processes >= 2
    assert memory.pss > 48


@pytest.mark.parametrize("name", SCRIPTS)
def test_kept_results_name_their_machine_and_no_folder_of_it(name: str) -> None:
    file = FOLDER / "results" / f"{name}.json"
    if not file.exists():
        pytest.skip("not measured yet")
    text = file.read_text()
    result = json.loads(text)
    assert result["benchmark"] == name
    assert all(ratio["holds"] for ratio in result["ratios"])
    assert not re.search(r"""["'= ]/\w+/""", text), "a result names no path of the machine it was measured on"
