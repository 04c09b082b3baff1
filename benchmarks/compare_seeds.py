"""What training together buys: `pipelines/compare.yaml` over several seeds, the union of held-out records.

The ratio of a seed is the perplexity of the federated adapter over that of the best local-only adapter; the limit is 1.
Give the documents of finished runs with --documents (what `submit --json` printed) to summarise them again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _measure import FOLDER, ROOT, Ratio, finish, make_parser

PIPELINE = ROOT / "fate_llm" / "pipelines" / "compare.yaml"
LIMIT = 1.0


def main() -> int:
    options = _options()
    if options.documents:
        documents = [json.loads(path.read_text()) for path in options.documents]
    else:
        with tempfile.TemporaryDirectory() as workdir:
            documents = [_submit(seed, workdir, quick=options.quick) for seed in options.seeds]
    ratios, tables = [], {}
    for seed, document in zip(options.seeds, documents, strict=True):
        rows = document["metrics"]["evaluate"]["models"]
        tables[f"seed {seed}"] = rows
        _show(seed, rows)
        ratios.append(Ratio(f"seed {seed}: federated over best local-only perplexity", _ratio(rows), LIMIT))
    return finish(options, "compare_seeds", ratios, {"tables": tables})


def _options() -> argparse.Namespace:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 8, 9])
    parser.add_argument("--documents", type=Path, nargs="+", help="results of finished runs, in the order of --seeds")
    return parser.parse_args()


def _submit(seed: int, workdir: str, *, quick: bool) -> dict[str, Any]:
    """Run the comparison with this seed in a process of its own."""
    command = [sys.executable, "-m", "fate_llm", "submit", str(PIPELINE), "--json", "--workdir", workdir]
    command += ["--set", f"job.seed={seed}"]
    if quick:
        tasks = ("federated", "alone_a", "alone_b", "alone_c", "pooled")
        command += [word for task in tasks for word in ("--set", f"tasks.{task}.params.rounds=1")]
        command += [word for task in tasks for word in ("--set", f"tasks.{task}.params.local_steps=1")]
        command += ["--set", "tasks.evaluate.params.limit=4"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=FOLDER.parent)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def _ratio(rows: Sequence[Mapping[str, Any]]) -> float:
    by_name = {row["model"]: row["perplexity"] for row in rows}
    best = min(value for name, value in by_name.items() if name.startswith("alone_"))
    return float(by_name["federated"] / best)


def _show(seed: int, rows: Sequence[Mapping[str, Any]]) -> None:
    print(f"seed {seed}")
    for row in rows:
        print(f"  {row['label']:<14} perplexity {row['perplexity']:9.3f}  exact match {row['exact_match']:.3f}")


if __name__ == "__main__":
    sys.exit(main())
