"""A child process: rounds without local steps on our local runtime; prints when each round ended for all parties."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from _local import Task, run_job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parties", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder")
    options = parser.parse_args()
    parties = [f"party-{number}" for number in range(1, options.parties + 1)]
    tasks = [Task("exchange", "benchmark_exchange", {"rounds": options.rounds}, arbiter=True)]
    diary = run_job(parties, tasks, own={}, folder=options.folder)
    ends = [max(diary.times("loaded", round=number)) for number in range(1, options.rounds + 1)]
    print(json.dumps({"round_ends": ends}))


if __name__ == "__main__":
    main()
