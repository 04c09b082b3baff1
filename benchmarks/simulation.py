"""Rounds without local steps, side by side with Flower's simulation engine: 4 and 16 parties on one machine.

The same tiny Llama with LoRA, the same exchange: every party gets the mean adapter, loads it and sends its own back.
Steady is the time from the end of one round to the end of the next (median, without the first round); first is the
time from the command to the end of the first round; memory is the peak of the whole process tree, shared pages once.
A round of ours has ended when every party has loaded the mean, a round of the peer when its server has the mean.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from _measure import FOLDER, Ratio, TreeMemory, environment, finish, make_parser, median, run_child

STEADY_LIMIT, FIRST_LIMIT, MEMORY_LIMIT = 0.5, 1 / 3, 1.0
_FLOWER = "import _flower_apps; _flower_apps.main()"


def main() -> int:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--parties", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=2, help="how often each side runs; medians count")
    parser.add_argument("--flower-python", default=sys.executable, help="an interpreter that has flwr[simulation]")
    parser.add_argument("--without-peer", action="store_true", help="our side alone: judges no limit")
    options = parser.parse_args()
    if options.quick:
        options.parties, options.rounds, options.repeats, options.without_peer = [2], 3, 1, True
    ratios: list[Ratio] = []
    details: dict[str, Any] = {"rounds": options.rounds, "cores": len(os.sched_getaffinity(0))}
    for parties in options.parties:
        runs = _alternate(options, parties)
        middles = {side: _middles(found) for side, found in runs.items()}
        for side, values in middles.items():
            print(f"{parties} parties, {side}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()))
        ratios += _ratios(parties, middles) if "flower" in middles else []
        details["peer_versions"] = peer_versions(options.flower_python) if "flower" in runs else {}
        details[f"{parties} parties"] = {"medians": middles, "runs": runs}
    if options.without_peer and not options.quick:
        return 0
    return finish(options, "simulation", ratios, details)


def peer_versions(python: str) -> dict[str, str]:
    """What the peer ran with; it may live in another environment."""
    names = ["flwr", "ray", "torch", "transformers", "peft", "numpy"]
    code = f"import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    return run_child([python, "-c", code], timeout=60).answer


def _alternate(options: argparse.Namespace, parties: int) -> dict[str, list[dict[str, Any]]]:
    """Runs of both sides, taking turns."""
    sides = ["ours"] if options.without_peer else ["ours", "flower"]
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(options.repeats):
        for side in sides:
            runs[side].append(_run(options, side, parties))
    return runs


def _run(options: argparse.Namespace, side: str, parties: int) -> dict[str, Any]:
    """One run of one side in a process (and what it starts) of its own."""
    sizes = ["--parties", str(parties), "--rounds", str(options.rounds)]
    with tempfile.TemporaryDirectory() as scratch, TreeMemory() as memory:
        folder = Path(scratch)
        if side == "ours":
            command: list[str | Path] = [sys.executable, FOLDER / "_ours.py", *sizes, "--folder", folder]
            env = environment(_entry_point(folder / "installed"))
        else:
            cores = str(len(os.sched_getaffinity(0)))
            command = [options.flower_python, "-c", _FLOWER, *sizes, "--cores", cores]
            env = environment()
        child = run_child(command, timeout=240, env=env)
        _wait_for_the_last(memory)
    ends = child.answer["round_ends"]
    return {
        "first_s": ends[0] - child.started,
        "steady_s": median([after - before for before, after in pairwise(ends)]),
        "whole_s": child.seconds,
        "peak_mib": memory.pss,
        "peak_rss_mib": memory.rss,
        "processes": memory.processes,
    }


def _entry_point(folder: Path) -> Path:
    """A package that is installed as far as Python can tell, and brings the component `benchmark_exchange`."""
    about = folder / "fate_llm_benchmark-0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: fate_llm_benchmark\nVersion: 0\n")
    (about / "entry_points.txt").write_text("[fate_llm.components]\nbenchmark_exchange = _exchange:PLUGIN\n")
    return folder


def _wait_for_the_last(memory: TreeMemory) -> None:
    """Let what the child started end as well, so that the next run has the machine to itself."""
    patience = time.monotonic() + 20
    while memory.running() and time.monotonic() < patience:
        time.sleep(0.2)


def _middles(runs: list[dict[str, Any]]) -> dict[str, float]:
    return {key: median([run[key] for run in runs]) for key in runs[0]}


def _ratios(parties: int, middles: dict[str, dict[str, float]]) -> list[Ratio]:
    limits = {"steady_s": STEADY_LIMIT, "first_s": FIRST_LIMIT, "peak_mib": MEMORY_LIMIT}
    ours, flower = middles["ours"], middles["flower"]
    return [
        Ratio(f"{parties} parties, {key} over Flower's", ours[key] / flower[key], limit)
        for key, limit in limits.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
