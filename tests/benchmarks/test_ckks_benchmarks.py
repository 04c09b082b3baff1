"""The benchmarks of homomorphic aggregation: what they compute and refuse, and that each runs. What they measure is
judged where the machine is quiet, never here."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

import fate_llm.core

pytest.importorskip("tenseal")

ROOT = Path(fate_llm.core.__file__).parents[2]
FOLDER = ROOT / "benchmarks"
SCRIPTS = ("ckks", "ckks_vs_nvflare")


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
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=env)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "line"),
    [("ckks", "encrypt over plain TenSEAL calls"), ("ckks_vs_nvflare", "--nvflare-python names no interpreter")],
)
def test_runs_with_small_sizes_and_keeps_nothing(script: str, line: str, tmp_path: Path) -> None:
    ended = run(script, "--quick", "--results", str(tmp_path))
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert line in ended.stdout
    assert "quick: these sizes say nothing" in ended.stdout
    assert not list(tmp_path.iterdir())


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


def test_a_whole_sum_is_checked_and_measured(load: Callable[[str], ModuleType]) -> None:
    ckks = load("ckks")
    whole = ckks.run_sum(5000, 1)
    assert set(whole.seconds) == {*ckks.PARTIES, ckks.COORDINATOR, ckks.HOLDER}
    assert all(seconds > 0 for seconds in whole.seconds.values())
    assert 0 < whole.largest_error <= whole.error_bound
    assert whole.upload_bytes >= 2 * 131_000  # 5016 numbers are two ciphertexts


def test_a_mean_that_is_off_is_no_result(load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    ckks = load("ckks")
    deliver = ckks._deliver

    def shifted(*given: object) -> object:
        total = deliver(*given)
        total.mean["w"] += 0.001
        return total

    monkeypatch.setattr(ckks, "_deliver", shifted)
    with pytest.raises(SystemExit, match="further off than its bound"):
        ckks.run_sum(100, 1)


def test_the_arithmetic_is_timed_in_pairs_and_checked(
    load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    ckks = load("ckks")
    pairs = ckks.Pairs(ckks.SecretContext.generate(), 3)
    for name in ("encrypt", "add", "decrypt"):
        assert len(pairs.plain[name]) == len(pairs.ours[name]) == 3
        assert pairs.ratio(name) > 0
    real = ckks.SecretContext.open
    monkeypatch.setattr(ckks.SecretContext, "open", lambda self, raw: real(self, raw) + 1)
    with pytest.raises(SystemExit, match="opens to something else"):
        ckks.Pairs(ckks.SecretContext.generate(), 1)


def test_a_party_uploads_its_whole_model_in_the_comparison(load: Callable[[str], ModuleType]) -> None:
    side = load("ckks_vs_nvflare")
    found = side.encrypt(10_000, 0)
    assert found["seconds"] > 0
    assert 3 * 131_000 < found["bytes"] < 3 * 132_000, "10,016 numbers are three ciphertexts"
    assert sum(array.size for array in side.model(1001).values()) == 1001


def test_the_peer_says_what_it_did(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    """With an interpreter that answers as the peer's does."""
    side = load("ckks_vs_nvflare")
    answer = {"secret": {"seconds": [1.0], "bytes": 9}, "public": {"seconds": [2.0], "bytes": 9}}
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\necho '{json.dumps(answer)}'\n")
    fake.chmod(0o755)
    assert side._nvflare(fake, 10, 1) == answer
    fake.write_text("#!/bin/sh\necho no nvflare here >&2\nexit 3\n")
    with pytest.raises(SystemExit, match="no nvflare here"):
        side._nvflare(fake, 10, 1)
