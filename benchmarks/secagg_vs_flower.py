"""Secure aggregation against Flower's SecAgg+ from its package: what a client computes, and its bytes.

Both sides run one round in a process of their own, all parties in sequence and without a network: ours the machines of
the protocol, Flower's its workflow and its mod. A client's seconds are CPU seconds of one thread from its float32
update to the last message, all stages together, without training; ours sign, check signatures and bind everything to
the global model, Flower's do not. Bytes are those of what a client sends and receives in the protocol, without the
envelopes and the global model. Then one party falls silent in each stage.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from _measure import FOLDER, Ratio, environment, finish, make_parser, median, run_child

SPEED_LIMIT, BYTES_LIMIT = 5.0, 0.5
CASES = ((4, 1_000_000), (4, 10_000_000), (10, 1_000_000), (10, 10_000_000))
QUICK = ((4, 10_000),)
OUR_STAGES = ("keys", "shares", "masked", "consent", "unmask")
THEIR_STAGES = ("setup", "share_keys", "collect_masked_vectors", "unmask")
LARGEST_WEIGHT = 2000.0
_WITH_A_SUM = "with a sum"
_LIMIT_OF_A_RUN = 500.0  # seconds


def main() -> int:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side, in turn; medians count")
    parser.add_argument("--flower-python", type=Path, help="interpreter of an environment with flwr==1.41.0")
    options = parser.parse_args()
    if options.quick:
        options.repeats = 1
    if options.flower_python is None:
        print("Flower is left out: give --flower-python (benchmarks/README.md says how)", flush=True)
    ratios: list[Ratio] = []
    details: dict[str, Any] = {}
    for parties, parameters in QUICK if options.quick else CASES:
        name = f"{parties} parties, {parameters:,} parameters"
        runs = _runs(options, parties, parameters)
        ratios += _compared(name, runs, parameters)
        details[name] = runs
    lost = _lost(options, 10_000 if options.quick else 100_000)
    survived = sum(ended == _WITH_A_SUM for ended in lost["ours"].values())
    ratios.append(Ratio("stages in which a party may be lost, ours", survived, len(OUR_STAGES), least=True))
    return finish(options, "secagg_vs_flower", ratios, {**details, "one of 4 lost in a stage": lost})


def threshold_of(parties: int) -> int:
    """Ours, which Flower is given too."""
    return 2 * parties // 3 + 1


def _runs(options: argparse.Namespace, parties: int, parameters: int) -> dict[str, list[dict[str, Any]]]:
    runs: dict[str, list[dict[str, Any]]] = {"ours": []}
    for _ in range(options.repeats):
        runs["ours"].append(_ours(parties, parameters))
        if options.flower_python is not None:
            runs.setdefault("flower", []).append(_flower(options.flower_python, parties, parameters))
    for side, found in runs.items():
        for run in found:
            if run["ended"] != _WITH_A_SUM:
                raise SystemExit(f"a round of {side} ended {run['ended']}")
    return runs


def _ours(parties: int, parameters: int, *words: str) -> dict[str, Any]:
    script = [sys.executable, FOLDER / "_secagg_round.py"]
    return _answer([*script, "--parties", parties, "--parameters", parameters, *words], environment())


def _flower(python: Path, parties: int, parameters: int, *words: str) -> dict[str, Any]:
    script = [python.absolute(), FOLDER / "_flower_secagg.py", "--threshold", threshold_of(parties)]
    script += ["--largest-weight", LARGEST_WEIGHT]
    env = {**environment(), "PYTHONPATH": str(FOLDER)}  # the peer's environment, and nothing of ours
    return _answer([*script, "--parties", parties, "--parameters", parameters, *words], env)


def _answer(words: list[Any], env: dict[str, str]) -> dict[str, Any]:
    single = {**env, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return run_child([str(word) for word in words], timeout=_LIMIT_OF_A_RUN, env=single).answer


def client_seconds(run: dict[str, Any]) -> float:
    """Of the median client: the first one also pays for what a process does once."""
    return median(run["client_seconds"].values())


def _compared(name: str, runs: dict[str, list[dict[str, Any]]], parameters: int) -> list[Ratio]:
    seconds = {side: median([client_seconds(run) for run in found]) for side, found in runs.items()}
    content = {side: max(found[0]["content"].values()) for side, found in runs.items()}
    for side in runs:
        server = median([run["server_seconds"] for run in runs[side]])
        print(
            f"{name}, {side}: {parameters / seconds[side] / 1e6:.1f} million parameters a second and client, "
            f"{content[side] / parameters:.3f} bytes a parameter, server {server:.3f} s",
            flush=True,
        )
    if "flower" not in runs:
        return []
    return [
        Ratio(f"client throughput over Flower's, {name}", seconds["flower"] / seconds["ours"], SPEED_LIMIT, least=True),
        Ratio(f"bytes of a client over Flower's, {name}", content["ours"] / content["flower"], BYTES_LIMIT),
    ]


def _lost(options: argparse.Namespace, parameters: int) -> dict[str, dict[str, str]]:
    """How a round of four ends when one of them is lost in a stage, by side and stage."""
    lost = {"ours": {stage: _ours(4, parameters, "--silent", stage)["ended"] for stage in OUR_STAGES}}
    if options.flower_python is not None:
        python = options.flower_python
        lost["flower"] = {s: _flower(python, 4, parameters, "--silent", s)["ended"] for s in THEIR_STAGES}
    for side, ends in lost.items():
        print(f"one of 4 lost, {side}: " + "; ".join(f"{stage}: {ended}" for stage, ended in ends.items()), flush=True)
    return lost


if __name__ == "__main__":
    sys.exit(main())
