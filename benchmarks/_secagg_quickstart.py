"""One run of the quickstart under secure aggregation, watched from inside: a process of its own.

Prints JSON: for each round the wall seconds of the round, those from the moment when the last party offers its term
until the coordinator has the total, and the CPU seconds of all machines of the sum together.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="JSON: what the trainer is given as `model`")
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    options = parser.parse_args()
    watch = Watch()
    watch.install()
    with tempfile.TemporaryDirectory() as scratch:
        _submit(options, Path(scratch), watch)
    json.dump({"rounds": watch.rounds()}, sys.stdout)
    return 0


class Watch:
    """Times of the machines' steps in the trainer's own conversation, by round."""

    def __init__(self) -> None:
        self.offered: dict[int, list[float]] = defaultdict(list)
        self.totals: dict[int, float] = {}
        self.cpu: dict[int, float] = defaultdict(float)
        self.ends: dict[int, float] = {}
        self.start = 0.0

    def install(self) -> None:
        from fate_llm.core.interfaces import SumContribute, SumFinished
        from fate_llm.protocols.secagg.party import MaskingParty
        from fate_llm.protocols.secagg.server import MaskingServer
        from fate_llm.protocols.sums.secagg import SecAgg

        for owner, name in ((MaskingParty, "handle"), (MaskingServer, "handle"), (SecAgg, "party"), (SecAgg, "server")):
            setattr(owner, name, self._timed(getattr(owner, name), SumContribute, SumFinished))

    def _timed(self, call: Any, contribute: type, finished: type) -> Any:
        def timed(machine: Any, first: Any, *rest: Any, **named: Any) -> Any:
            scene = first if hasattr(first, "conversation") else machine.scene
            now, cpu = time.perf_counter(), time.thread_time()
            found = call(machine, first, *rest, **named)
            if scene.conversation == "tune":
                self.start = self.start or now  # the first round's sums are made when it begins
                self.cpu[scene.round] += time.thread_time() - cpu
                if isinstance(first, contribute):
                    self.offered[scene.round].append(now)
                elif isinstance(found, list) and any(isinstance(action, finished) for action in found):
                    self.totals[scene.round] = time.perf_counter()
            return found

        return timed

    def observe(self, event: Any) -> None:
        if event.kind == "round_state" and event.fields.get("conversation") == "tune":
            self.ends[int(event.fields["round"])] = time.perf_counter()

    def rounds(self) -> list[dict[str, float]]:
        rows = []
        for number in sorted(self.totals):
            before = self.ends.get(number - 1, self.start)
            rows.append(
                {
                    "round": self.ends[number] - before,
                    "protocol": self.totals[number] - max(self.offered[number]),
                    "cpu": self.cpu[number],
                }
            )
        return rows


def _submit(options: argparse.Namespace, scratch: Path, watch: Watch) -> None:
    import fate_llm.pipelines
    from fate_llm.pipelines import check
    from fate_llm.runtime.job import Submission

    base = Path(fate_llm.pipelines.__file__).parent
    data = yaml.safe_load((base / "quickstart.yaml").read_text())
    del data["tasks"]["evaluate"]
    params = data["tasks"]["tune"]["params"]
    params |= {
        "model": json.loads(options.model),
        "rounds": options.rounds,
        "local_steps": options.steps,
        "protection": "secagg",
        "protection_params": {"largest_weight": 65536},
    }
    spec = check(data)
    job = Submission(spec, job_id="watched", base=base, workdir=scratch, now=time.time, observers=[watch.observe])
    result = job.run()
    if result.status != "success":
        raise SystemExit(f"the job ended with {result.status}: {result.error}")


if __name__ == "__main__":
    sys.exit(main())
