"""What RabbitMQ adds to a round, and the round trip of a small message over that of a plain pika program.

Rounds: three parties and an arbiter exchange the quickstart's adapter without training, once as threads with the
in-memory transport and once with `fate_llm submit --broker` as processes over one node; the difference of the medians
from the end of one round to the end of the next is what is added. A round has ended when all parties have its mean.
Small messages: 1 KiB there and 1 KiB back between two processes; the plain program publishes persistent and confirmed
and journals each message before it acknowledges it, as ours does.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from _brokers import Broker, broker, together
from _measure import FOLDER, Ratio, environment, finish, make_parser, median, run_child

ADDED_LIMIT = 0.3  # seconds a round
PARTIES, ARBITER = ("bank-a", "bank-b", "bank-c"), "consortium"
PAIR = ("pinger", "ponger")
WARM = 50  # round trips that do not count
_PIPELINE = """\
version: 1
name: exchange
parties: {{guest: {guest}, hosts: [{hosts}], arbiter: {arbiter}}}
tasks:
  exchange:
    component: benchmark_quickstart_exchange
    params: {{rounds: {rounds}}}
job: {{seed: 7, round_deadline: 10m}}
"""


def main() -> int:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3, help="how often each side runs")
    parser.add_argument("--messages", type=int, default=2000)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.repeats, options.messages = 3, 1, 20
    with broker((*PARTIES, ARBITER, *PAIR)) as node, tempfile.TemporaryDirectory() as scratch:
        trips = _small_messages(options, node, Path(scratch))
        rounds = _rounds(options, node, Path(scratch))
    middles = {side: median([s for run in found for s in run]) for side, found in rounds.items()}
    added = middles["rabbitmq"] - middles["memory"]
    print(", ".join(f"{side}: {seconds:.3f} s a round" for side, seconds in middles.items()))
    details = {
        "round_trips_ms": trips,
        "round_trip_over_plain": {p: trips["ours"][p] / trips["plain"][p] for p in ("p50", "p99")},
        "seconds_of_a_round": middles,
        "runs": rounds,
        "versions": {name: version(name) for name in ("pika", "cryptography")},
    }
    ratio = Ratio("seconds that RabbitMQ adds to a round of the quickstart", added, ADDED_LIMIT)
    return finish(options, "rabbitmq_rounds", [ratio], details)


# --- small messages ----------------------------------------------------------------------------------------------


def _small_messages(options: argparse.Namespace, node: Broker, scratch: Path) -> dict[str, dict[str, float]]:
    """Percentiles in milliseconds by side, over the round trips of all runs."""
    found: dict[str, list[float]] = {"ours": [], "plain": []}
    for number in range(options.repeats):
        for side in sorted(found, reverse=bool(number % 2)):
            folder = scratch / f"{side}-{number}"
            folder.mkdir()
            answers = together(_pair(options, node, side, folder), timeout=300)
            found[side] += answers[PAIR[0]].answer["seconds"][WARM:]
    trips = {side: percentiles(seconds) for side, seconds in found.items()}
    for side, values in trips.items():
        print(f"{side}, 1 KiB there and back: " + ", ".join(f"{k} {v:.2f} ms" for k, v in values.items()), flush=True)
    return trips


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Nearest rank, in milliseconds."""
    ordered = sorted(seconds)
    ranks = {"p50": 50, "p99": 99}
    return {name: 1000 * ordered[-(-rank * len(ordered) // 100) - 1] for name, rank in ranks.items()}


def _pair(options: argparse.Namespace, node: Broker, side: str, folder: Path) -> dict[str, list[Any]]:
    common = ["--folder", folder, "--size", "1024", "--messages", str(WARM + options.messages)]
    if side == "plain":
        common += ["--sync", "chunk", *node.words("guest", tls=False)]
        script, own = FOLDER / "_amqp_plain.py", dict[str, list[Any]]()
    else:
        from _fate_link import write_identities

        write_identities(folder, PAIR)
        common += ["--identities", folder, "--members", *PAIR, "--job", folder.name]
        script = FOLDER / "_fate_link.py"
        own = {party: ["--party", party, *node.words(party, tls=False)] for party in PAIR}
    roles = dict(zip(PAIR, ("ping", "pong"), strict=True))
    return {p: [sys.executable, script, role, *common, *own.get(p, [])] for p, role in roles.items()}


# --- rounds of the quickstart without its training ---------------------------------------------------------------


def _rounds(options: argparse.Namespace, node: Broker, scratch: Path) -> dict[str, list[list[float]]]:
    """Seconds from the end of one round to the end of the next, by side and run."""
    pipeline = _write_pipeline(scratch, rounds=options.rounds)
    env = environment(_entry_point(scratch / "installed"))
    addresses = [f"{party}={node.url(party, tls=False)}" for party in (*PARTIES, ARBITER)]
    sides = {"memory": list[str](), "rabbitmq": [word for one in addresses for word in ("--broker", one)]}
    runs: dict[str, list[list[float]]] = {side: [] for side in sides}
    for number in range(options.repeats):
        for side in sorted(sides, reverse=bool(number % 2)):
            workdir = scratch / f"jobs-{side}-{number}"
            words = ["submit", str(pipeline), "--workdir", str(workdir), "--quiet", *sides[side]]
            run_child([sys.executable, "-m", "fate_llm", *words], timeout=300, env=env, answers=False)
            runs[side].append(seconds_of_rounds(workdir, options.rounds))
    return runs


def _write_pipeline(folder: Path, *, rounds: int) -> Path:
    pipeline = folder / "exchange.yaml"
    hosts = ", ".join(PARTIES[1:])
    pipeline.write_text(_PIPELINE.format(guest=PARTIES[0], hosts=hosts, arbiter=ARBITER, rounds=rounds))
    return pipeline


def _entry_point(folder: Path) -> Path:
    """A package that is installed as far as Python can tell, and brings the component of `_fate_exchange`."""
    about = folder / "fate_llm_benchmark-0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: fate_llm_benchmark\nVersion: 0\n")
    entry = "[fate_llm.components]\nbenchmark_quickstart_exchange = _fate_exchange:PLUGIN\n"
    (about / "entry_points.txt").write_text(entry)
    return folder


def seconds_of_rounds(workdir: Path, rounds: int) -> list[float]:
    """From the parties' events in the one job folder below `workdir`: from the end of a round to that of the next.

    Raises:
        SystemExit: a party's events do not have every round.
    """
    ends: dict[int, list[float]] = {}
    for file in sorted(workdir.glob("*/parties/*/events.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            event = json.loads(line)
            if event["event"] == "loaded":
                ends.setdefault(event["round"], []).append(event["time"])
    counts = {number: len(times) for number, times in ends.items()}
    if counts != dict.fromkeys(range(1, rounds + 1), len(PARTIES)):
        raise SystemExit(f"of {rounds} rounds and {len(PARTIES)} parties these ended: {counts}")
    return [after - before for before, after in pairwise(max(ends[number]) for number in sorted(ends))]


if __name__ == "__main__":
    sys.exit(main())
