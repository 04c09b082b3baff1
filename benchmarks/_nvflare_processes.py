"""A child process: echo rounds on NVFlare's POC, whose server, sites and their jobs are processes.

Run by the peer's interpreter. Its own defaults, mutual TLS included. The model travels as numpy arrays: torch is not
needed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

__all__ = ["main"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder")
    parser.add_argument("--parties", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--size", type=int, required=True, help="bytes each way per party")
    parser.add_argument("--tensors", type=int, required=True)
    parser.add_argument("--timeout", type=float, required=True)
    options = parser.parse_args()
    answer = options.folder / "answer.json"
    os.environ["HOME"] = str(options.folder)  # it keeps its settings there
    os.environ["NVFLARE_POC_WORKSPACE"] = str(options.folder / "poc")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    said = os.dup(1)
    os.dup2(2, 1)  # it prints a lot
    _run(options, answer)
    with os.fdopen(said, "w") as out:
        print(json.dumps({**json.loads(answer.read_text()), "version": version("nvflare")}), file=out)
    return 0


def _run(options: argparse.Namespace, answer: Path) -> None:
    import _nvflare_processes_app as app
    from nvflare.job_config.api import FedJob
    from nvflare.job_config.script_runner import FrameworkType, ScriptRunner
    from nvflare.recipe import PocEnv

    os.chdir(Path(__file__).parent)  # the script is named as it lies here
    job = FedJob(name="echo", min_clients=options.parties)
    fields = {key: getattr(options, key) for key in ("parties", "rounds", "size", "tensors")}
    job.to_server(app.EchoRounds(answer=str(answer), **fields))
    job.to_clients(ScriptRunner(script="_nvflare_processes_client.py", framework=FrameworkType.NUMPY))
    place = PocEnv(num_clients=options.parties)
    try:
        place.deploy(job)
        end = time.monotonic() + options.timeout
        while not answer.exists():
            if time.monotonic() > end:
                raise SystemExit("NVFlare did not finish its rounds")
            time.sleep(0.5)
        time.sleep(0.5)  # it is written in one piece, but not in one step
    finally:
        place.stop(clean_up=True)


if __name__ == "__main__":
    sys.exit(main())
