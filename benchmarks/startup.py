"""Wall time of `fate_llm --help` over that of `python -c "import click, pydantic, yaml"`, run in alternation."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

from _measure import Ratio, environment, finish, make_parser, median, run_child

LIMIT = 1.5
HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "pyarrow")


def main() -> int:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--repeats", type=int, default=21, help="how often each command runs; its median counts")
    options = parser.parse_args()
    repeats = 2 if options.quick else options.repeats
    commands = {
        "imports": [sys.executable, "-c", "import click, pydantic, yaml"],
        "module": [sys.executable, "-m", "fate_llm", "--help"],
    }
    script = Path(sysconfig.get_path("scripts"), "fate_llm")
    if script.exists():
        commands["script"] = [str(script), "--help"]
    times = _alternate(commands, repeats)
    middles = {name: median(found) for name, found in times.items()}
    print(", ".join(f"{name} {1000 * value:.0f} ms" for name, value in middles.items()))
    heavy = heavy_imports()
    print(f"heavy libraries imported by --help: {', '.join(heavy) or 'none'}")
    ratios = [
        Ratio(f"fate_llm --help ({name}) over the imports", middles[name] / middles["imports"], LIMIT)
        for name in commands
        if name != "imports"
    ]
    ratios.append(Ratio("heavy libraries imported", len(heavy), 0))
    details = {"median_seconds": middles, "repeats": repeats, "heavy_imports": heavy}
    return finish(options, "startup", ratios, details)


def _alternate(commands: dict[str, list[str]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each command; a first run of each, which fills the caches, does not count."""
    times: dict[str, list[float]] = {name: [] for name in commands}
    env = environment()
    for number in range(repeats + 1):
        for name, command in commands.items():
            seconds = run_child(command, timeout=60, env=env, answers=False).seconds
            if number:
                times[name].append(seconds)
    return times


def heavy_imports() -> list[str]:
    """Which of the heavy libraries `--help` imports."""
    command = [sys.executable, "-X", "importtime", "-m", "fate_llm", "--help"]
    lines = run_child(command, timeout=60, answers=False).errors.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    return [name for name in HEAVY if name in imported]


if __name__ == "__main__":
    sys.exit(main())
