"""The benchmarks of the federation layer: what they compute and refuse, the plain programs on a real broker, and that
each runs. What they measure is judged where the machine is quiet, never here."""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fate_llm.core
from fate_llm.components.llm.adapters import PeftSettings, planned_layout
from fate_llm.components.llm.modelref import ModelShapes
from fate_llm.pipelines import load_pipeline
from tests.brokers import require_rabbitmq

pytest.importorskip("pika")

ROOT = Path(fate_llm.core.__file__).parents[2]
FOLDER = ROOT / "benchmarks"
SCRIPTS = ("rabbitmq_rounds", "rabbitmq_throughput", "rounds_over_processes")


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


def run(script: str, *words: str, timeout: float = 500) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(FOLDER / f"{script}.py"), *words]
    env = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)


# --- the scripts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_says_what_it_measures_and_is_in_the_readme(script: str) -> None:
    help_text = run(script, "--help").stdout
    assert "--quick" in help_text
    assert f"`{script}.py`" in (FOLDER / "README.md").read_text()


def test_the_readme_says_how_to_get_the_peers() -> None:
    text = (FOLDER / "README.md").read_text()
    assert re.search(r"pip install .*flwr==1\.41\.0", text)
    assert re.search(r"pip install .*nvflare==2\.9\.0", text)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "line"),
    [
        ("rabbitmq_throughput", "speed of ours over the plain program's"),
        ("rabbitmq_rounds", "seconds that RabbitMQ adds to a round"),
        ("rounds_over_processes", "1 MB each way, seconds of a round"),
    ],
)
def test_runs_with_small_sizes_and_keeps_nothing(script: str, line: str, tmp_path: Path) -> None:
    require_rabbitmq()
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


# --- programs side by side ---------------------------------------------------------------------------------------


def test_programs_run_at_the_same_time_and_answer(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    """Each waits for the file of the other: one after the other they would never end."""
    code = (
        "import sys, time, json, pathlib\n"
        "mine, other = map(pathlib.Path, sys.argv[1:])\n"
        "mine.touch()\n"
        "while not other.exists(): time.sleep(0.01)\n"
        "print('noise'); print(json.dumps({'seen': other.name}))\n"
    )
    files = [str(tmp_path / "one"), str(tmp_path / "two")]
    commands = {"one": [sys.executable, "-c", code, *files], "two": [sys.executable, "-c", code, *files[::-1]]}
    found = load("_brokers").together(commands, timeout=60)
    assert {name: child.answer for name, child in found.items()} == {"one": {"seen": "two"}, "two": {"seen": "one"}}


def test_one_that_fails_ends_all_and_is_named(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    waits = f"import os, pathlib, time; pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
    fails = (
        f"import pathlib, time\nwhile not pathlib.Path({str(tmp_path / 'pid')!r}).exists(): time.sleep(0.01)\n"
        "raise ValueError('no such thing')"
    )
    commands = {
        "waits": [sys.executable, "-c", waits + "time.sleep(300)"],
        "fails": [sys.executable, "-c", fails],
    }
    with pytest.raises(SystemExit, match=r"(?s)fails ended with 1.*no such thing"):
        load("_brokers").together(commands, timeout=60)
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_one_that_hangs_is_named_and_ended(load: Callable[[str], ModuleType]) -> None:
    commands = {"ends": [sys.executable, "-c", "pass"], "hangs": [sys.executable, "-c", "import time; time.sleep(300)"]}
    with pytest.raises(SystemExit, match="hangs took too long"):
        load("_brokers").together(commands, timeout=3)


# --- what is measured --------------------------------------------------------------------------------------------


def test_extra_memory_leaves_out_what_was_there_and_what_was_freed(load: Callable[[str], ModuleType]) -> None:
    extra_memory = load("_amqp_plain").ExtraMemory
    kept, freed = bytearray(os.urandom(2**20) * 32), bytearray(os.urandom(2**20) * 64)
    del freed
    memory = extra_memory()
    assert memory.mib() < 16
    more = bytearray(os.urandom(2**20) * 48)
    del more
    assert 40 < memory.mib() < 100
    assert len(kept) == 32 * 2**20


@pytest.mark.parametrize(("sync", "synced"), [("off", 0), ("none", 0), ("end", 1), ("chunk", 3)])
def test_a_journal_is_synced_as_often_as_it_says(
    load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sync: str, synced: int
) -> None:
    plain = load("_amqp_plain")
    calls: list[int] = []
    monkeypatch.setattr(plain.os, "fdatasync", calls.append)
    journal = plain.Journal(tmp_path / "journal", sync)
    for chunk in (b"one", b"two", b"three"):
        journal.append(chunk)
    journal.close()
    assert len(calls) == synced
    kept = (tmp_path / "journal").read_bytes() if (tmp_path / "journal").exists() else b""
    assert kept == (b"" if sync == "off" else b"onetwothree")


def test_percentiles_are_nearest_ranks(load: Callable[[str], ModuleType]) -> None:
    percentiles = load("rabbitmq_rounds").percentiles
    assert percentiles([n / 1000 for n in range(200, 0, -1)]) == pytest.approx({"p50": 100.0, "p99": 198.0})
    assert percentiles([0.004]) == pytest.approx({"p50": 4.0, "p99": 4.0})


def write_events(workdir: Path, ends: dict[str, list[float]]) -> None:
    for party, times in ends.items():
        folder = workdir / "job-1" / "parties" / party
        folder.mkdir(parents=True)
        events = [{"event": "task_started", "party": party, "time": 0.0}]
        events += [{"event": "loaded", "round": n, "time": at} for n, at in enumerate(times, 1)]
        (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def test_a_round_ends_with_its_last_party(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    write_events(tmp_path, {"bank-a": [1.0, 2.0, 3.5], "bank-b": [1.25, 1.75, 3.0], "bank-c": [1.0, 2.5, 3.25]})
    assert load("rabbitmq_rounds").seconds_of_rounds(tmp_path, 3) == [1.25, 1.0]


def test_a_party_that_missed_a_round_spoils_the_figures(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    write_events(tmp_path, {"bank-a": [1.0, 2.0], "bank-b": [1.0], "bank-c": [1.0, 2.0]})
    with pytest.raises(SystemExit, match=r"\{1: 3, 2: 2\}"):
        load("rabbitmq_rounds").seconds_of_rounds(tmp_path, 2)


def test_other_bytes_than_were_sent_are_no_result(load: Callable[[str], ModuleType]) -> None:
    figures = load("rabbitmq_throughput")._figures
    sent = {"digest": "a", "started": 10.0, "confirmed": 13.0, "cpu": 1.5, "extra_mib": 9.0}
    came = {"digest": "a", "ended": 14.0, "cpu": 0.5, "extra_mib": 17.0}
    found = figures({"sender": sent, "receiver": came}, 256)
    assert found["seconds"] == 4.0
    assert found["mib_per_second"] == 64.0
    assert (found["sender_cpu_seconds"], found["receiver_cpu_seconds"]) == (1.5, 0.5)
    with pytest.raises(SystemExit, match="not what was sent"):
        figures({"sender": sent, "receiver": {**came, "digest": "b"}}, 256)


@pytest.mark.parametrize(("ours", "sender", "holds"), [(2.0, 63.0, True), (2.1, 63.0, False), (2.0, 65.0, False)])
def test_throughput_is_judged_by_speed_and_memory(
    load: Callable[[str], ModuleType], ours: float, sender: float, holds: bool
) -> None:
    middles = {
        "ours": {"seconds": ours, "sender_extra_mib": sender, "receiver_extra_mib": 10.0},
        "plain": {"seconds": 2.0, "sender_extra_mib": 0.0, "receiver_extra_mib": 0.0},
    }
    ratios = load("rabbitmq_throughput")._ratios(middles)
    assert all(ratio.holds for ratio in ratios) is holds


BF16_RUN = {"dtypes": ["bfloat16"], "sent_bytes": 101.0, "tensor_bytes": 100.0}


@pytest.mark.parametrize(
    ("megabytes", "middles", "missed"),
    [
        (1, {"ours": 0.29, "plain": 0.01}, set()),
        (1, {"ours": 0.31, "plain": 9.0}, {"seconds of a round"}),
        (100, {"ours": 2.6, "plain": 2.0}, set()),
        (100, {"ours": 2.7, "plain": 2.0, "Flower": 9.0}, {"over the plain program"}),
        (400, {"ours": 9.0, "plain": 9.0, "Flower": 25.0, "NVFlare": 8.0}, {"over NVFlare"}),
    ],
)
def test_rounds_are_judged_by_size_and_against_the_peers_that_ran(
    load: Callable[[str], ModuleType], megabytes: int, middles: dict[str, float], missed: set[str]
) -> None:
    ratios = load("rounds_over_processes")._ratios(megabytes, middles, {"ours, bf16": [BF16_RUN]})
    assert {ratio.name.rpartition("way, ")[2] for ratio in ratios if not ratio.holds} == missed
    assert sum(" over " in f" {ratio.name} " and "Fl" in ratio.name for ratio in ratios) == len(middles) - 2


def test_bf16_that_travels_wider_is_refused(load: Callable[[str], ModuleType]) -> None:
    judge = load("rounds_over_processes")._ratios
    middles = {"ours": 0.1, "plain": 0.1}
    wide = {**BF16_RUN, "sent_bytes": 200.0}
    assert not all(ratio.holds for ratio in judge(1, middles, {"ours, bf16": [wide]}))
    with pytest.raises(SystemExit, match="float32"):
        judge(1, middles, {"ours, bf16": [{**BF16_RUN, "dtypes": ["float32"]}]})


def test_the_first_round_does_not_count(load: Callable[[str], ModuleType]) -> None:
    found = load("rounds_over_processes")._without_first({"seconds": [9.0, 1.0, 2.0], "version": "1"})
    assert found == {"seconds": [1.0, 2.0], "first_round_seconds": 9.0, "version": "1"}


# --- what is exchanged, and with whom ----------------------------------------------------------------------------


def test_the_exchanged_adapter_is_the_one_of_the_quickstart(load: Callable[[str], ModuleType]) -> None:
    spec = load_pipeline(ROOT / "pipelines" / "quickstart.yaml", (), {})
    exchange = load("_fate_exchange")
    weights = {
        f"model.layers.{layer}.{name}.weight": (outputs, inputs)
        for layer in range(30)
        for name, (inputs, outputs) in exchange._SHAPES.items()
    }
    settings = PeftSettings.model_validate(spec.tasks["tune"].params["peft"])
    layout = planned_layout(ModelShapes(weights), settings)
    assert layout is not None
    found = {name: tensor.shape for name, tensor in exchange.adapter().items()}
    assert sorted(found.values()) == sorted(layout.values())
    assert len(found) == 420


def test_the_rounds_without_training_run_in_memory(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    """The side that needs no broker: the pipeline, the plug-in that brings its component, and the events of a job."""
    rounds = load("rabbitmq_rounds")
    pipeline = rounds._write_pipeline(tmp_path, rounds=3)
    command = [
        sys.executable,
        "-m",
        "fate_llm",
        "submit",
        str(pipeline),
        "--workdir",
        str(tmp_path / "jobs"),
        "--quiet",
    ]
    env = rounds.environment(rounds._entry_point(tmp_path / "installed"))
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, env=env)
    assert ended.returncode == 0, ended.stderr[-3000:]
    seconds = rounds.seconds_of_rounds(tmp_path / "jobs", 3)
    assert len(seconds) == 2
    assert all(second > 0 for second in seconds)


def test_the_node_knows_every_party_and_no_password_in_clear(load: Callable[[str], ModuleType]) -> None:
    definitions = load("_brokers")._definitions(("a", "b"))
    assert "benchmark" not in json.dumps(definitions["users"])
    hashed = base64.b64decode(definitions["users"][1]["password_hash"])
    assert hashed[4:] == hashlib.sha256(hashed[:4] + b"benchmark").digest()
    assert {exchange["name"] for exchange in definitions["exchanges"]} == {"fate.from.a", "fate.from.b"}
    rights = {entry["user"]: entry for entry in definitions["permissions"]}
    assert rights["a"]["configure"] != ".*"
    assert {(entry["user"], entry["exchange"]) for entry in definitions["topic_permissions"]} == {
        (party, f"fate.from.{member}") for party in ("a", "b") for member in ("a", "b")
    }


def test_a_url_without_tls_says_that_it_is_meant(load: Callable[[str], ModuleType]) -> None:
    class Node:
        def url(self, user: str = "guest", password: str = "guest") -> str:
            return f"amqp://{user}@here"

        def tls_url(self, user: str = "guest", password: str = "guest") -> str:
            return f"amqps://{user}@here"

    node = load("_brokers").Broker(Node(), Path("ca.pem"))
    assert node.words("a", tls=False) == ["--url", "amqp://a@here?plaintext=loopback"]
    assert node.words("a", tls=True) == ["--url", "amqps://a@here", "--ca", Path("ca.pem")]
    assert node.url("guest", tls=False) == "amqp://guest@here"


def test_brokers_of_their_own_are_reached_over_tls_only(load: Callable[[str], ModuleType]) -> None:
    nodes = load("_brokers").BrokerEach({"a": "amqps://a@here"}, Path("ca.pem"))
    assert nodes.words("a", tls=True) == ["--url", "amqps://a@here", "--ca", Path("ca.pem")]
    with pytest.raises(ValueError, match="TLS only"):
        nodes.words("a", tls=False)


def test_flowers_app_is_packed_with_its_settings(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    options = argparse.Namespace(folder=tmp_path, parties=2, rounds=6, size=1000, tensors=8)
    app = load("_flower_processes")._write_app(options, tmp_path / "answer.json")
    project = tomllib.loads((app / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    expected = {"answer": str(tmp_path / "answer.json"), "parties": 2, "rounds": 6, "size": 1000, "tensors": 8}
    assert project["config"] == expected
    module, _, name = project["components"]["serverapp"].partition(":")
    assert f"{name} = ServerApp()" in (app / f"{module}.py").read_text()


def test_a_peer_that_is_not_there_is_left_out_with_a_sentence(
    load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rounds = load("rounds_over_processes")
    taken: list[tuple[str, int]] = []

    class Nothing:
        def __enter__(self) -> None:
            return

        def __exit__(self, *_: object) -> None:
            return

    def own_run(options: Any, node: Any, side: str, megabytes: int, number: int) -> dict[str, Any]:
        taken.append((side, number))
        return {"seconds": [1.0]}

    monkeypatch.setattr(rounds, "broker", lambda members: Nothing())
    monkeypatch.setattr(rounds, "broker_each", lambda members: Nothing())
    monkeypatch.setattr(rounds, "_own_run", own_run)
    monkeypatch.setattr(rounds, "_peer_run", lambda *_: {"seconds": [5.0]})
    options = argparse.Namespace(repeats=2, flower_python=None, nvflare_python=Path("python"))
    runs = rounds._all_sides(options, 1)
    assert "Flower is left out: give --flower-python" in capsys.readouterr().out
    assert runs["NVFlare"] == [{"seconds": [5.0]}]
    assert "Flower" not in runs
    sides = ["ours", "ours, bf16", "plain", "plain, journalled"]
    assert [side for side, number in taken if number == 0] == [*sides, "ours, a broker each"]
    assert [side for side, number in taken if number == 1] == sides[::-1]


# --- the plain programs on a real broker -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address() -> Iterator[list[str | Path]]:
    """Options that lead to a node with TLS."""
    require_rabbitmq()
    sys.path.insert(0, str(FOLDER))
    try:
        brokers = importlib.import_module("_brokers")
        with brokers.broker(("a", "b")) as node:
            yield node.words("guest", tls=True)
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("_brokers", "_measure"):
            sys.modules.pop(name, None)


def plain(role: str, *words: object) -> list[str]:
    return [sys.executable, str(FOLDER / "_amqp_plain.py"), role, *map(str, words)]


@pytest.mark.slow
def test_the_plain_sender_and_receiver_move_all_bytes(
    load: Callable[[str], ModuleType], address: list[str | Path], tmp_path: Path
) -> None:
    size = 9 * 2**20 + 4  # two whole chunks and a rest
    common = ["--folder", tmp_path, "--size", size, "--sync", "end", *address]
    commands = {"to": plain("throughput-receive", *common), "from": plain("throughput-send", *common)}
    found = load("_brokers").together(commands, timeout=120)
    sent, came = found["from"].answer, found["to"].answer
    assert sent["digest"] == came["digest"]
    assert came["ended"] > sent["started"]
    assert (tmp_path / "plain.journal").stat().st_size == size


@pytest.mark.slow
def test_the_plain_rounds_bring_everything_back(
    load: Callable[[str], ModuleType], address: list[str | Path], tmp_path: Path
) -> None:
    common = ["--folder", tmp_path, "--size", 5 * 2**20, "--rounds", 3, "--sync", "off", *address]
    commands = {party: plain("echo", *common, "--party", party) for party in ("p1", "p2")}
    commands["coordinator"] = plain("coordinate", *common, "--parties", "p1", "p2")
    found = load("_brokers").together(commands, timeout=120)
    assert len(found["coordinator"].answer["seconds"]) == 3
    assert not list(tmp_path.iterdir()), "nothing is journalled unless it is asked for"


@pytest.mark.slow
def test_the_plain_ping_is_answered_as_often_as_it_is_sent(
    load: Callable[[str], ModuleType], address: list[str | Path], tmp_path: Path
) -> None:
    common = ["--folder", tmp_path, "--size", 1024, "--messages", 20, "--sync", "chunk", *address]
    found = load("_brokers").together({"ping": plain("ping", *common), "pong": plain("pong", *common)}, timeout=120)
    assert len(found["ping"].answer["seconds"]) == 20
    assert all(seconds > 0 for seconds in found["ping"].answer["seconds"])
    assert (tmp_path / "pong.journal").stat().st_size == 20 * 1024
