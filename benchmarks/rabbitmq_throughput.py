"""One 256 MiB tensor from party to party over RabbitMQ on loopback: our link over a plain pika program.

The plain program publishes the same bytes persistent and confirmed one by one in chunks of 4 MiB, and journals each
chunk before it acknowledges it; ours seals every chunk, keeps it until it is reported, and journals as well. The time
is that from the first publish to the last chunk journalled. Memory: peak above what a process had when its tensor was
made (sender), or above that and the tensor received (receiver). The same with a broker for each party is reported.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from _brokers import Way, broker, broker_each, together
from _measure import FOLDER, Ratio, finish, make_parser, median

SPEED_LIMIT, MEMORY_LIMIT_MIB = 1.0, 64.0
MEMBERS = ("sender", "receiver")
EACH = "ours, a broker each"
MIB = 2**20


def main() -> int:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--repeats", type=int, default=7, help="how often each side runs; medians count")
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--sync", choices=["none", "end", "chunk"], default="chunk", help="of the plain journal")
    parser.add_argument("--tls", action="store_true", help="TLS to the broker on both sides")
    options = parser.parse_args()
    if options.quick:
        options.repeats, options.mib = 1, 9
    with broker(MEMBERS) as node, tempfile.TemporaryDirectory() as scratch:
        runs = _alternate(options, node, Path(scratch))
    with tempfile.TemporaryDirectory() as scratch:
        runs[EACH] = _over_two_nodes(options, Path(scratch))
    middles = {side: {key: median([run[key] for run in found]) for key in found[0]} for side, found in runs.items()}
    for side, values in middles.items():
        print(f"{side}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()))
    ratios = _ratios(middles)
    details = {
        "mib": options.mib,
        "tls": options.tls,
        "plain_sync": options.sync,
        "medians": middles,
        "runs": runs,
        "pika": version("pika"),
        "cryptography": version("cryptography"),
    }
    return finish(options, "rabbitmq_throughput", ratios, details)


def _alternate(options: argparse.Namespace, node: Way, scratch: Path) -> dict[str, list[dict[str, float]]]:
    """Runs of all sides, taking turns; who goes first changes."""
    sides = {"ours": "", "plain": options.sync, "plain, journal not synced": "none"}
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(options.repeats):
        for side in sorted(sides, reverse=bool(number % 2)):
            folder = scratch / f"{side}-{number}"
            runs[side].append(_run(options, node, folder, sync=sides[side], tls=options.tls))
            print(f"{side}: {runs[side][-1]['seconds']:.3f} s", flush=True)
    return runs


def _over_two_nodes(options: argparse.Namespace, scratch: Path) -> list[dict[str, float]]:
    """Our side where each party has a broker of its own; the brokers are linked over TLS."""
    with broker_each(MEMBERS) as nodes:
        found = [_run(options, nodes, scratch / f"each-{n}", sync="", tls=True) for n in range(options.repeats)]
    print(f"{EACH}: {median([run['seconds'] for run in found]):.3f} s", flush=True)
    return found


def _run(options: argparse.Namespace, node: Way, folder: Path, *, sync: str, tls: bool) -> dict[str, float]:
    folder.mkdir()
    commands = _commands(options, node, folder, sync=sync, tls=tls)
    answers = {name: child.answer for name, child in together(commands, timeout=300).items()}
    return _figures(answers, options.mib)


def _commands(options: argparse.Namespace, node: Way, folder: Path, *, sync: str, tls: bool) -> dict[str, list[Any]]:
    """sync: of the plain program's journal; empty for our side."""
    common = ["--folder", folder, "--size", options.mib * MIB]
    if sync:
        common += ["--sync", sync, *node.words("guest", tls=tls)]
        script, own = "_amqp_plain.py", dict[str, list[Any]]()
    else:
        from _fate_link import write_identities

        write_identities(folder, MEMBERS)
        common += ["--identities", folder, "--members", *MEMBERS, "--job", folder.name]
        own = {party: ["--party", party, *node.words(party, tls=tls)] for party in MEMBERS}
        script = "_fate_link.py"
    roles = dict(zip(MEMBERS, ("throughput-send", "throughput-receive"), strict=True))
    return {p: [sys.executable, FOLDER / script, role, *common, *own.get(p, [])] for p, role in roles.items()}


def _figures(answers: dict[str, dict[str, Any]], mib: int) -> dict[str, float]:
    sent, came = answers["sender"], answers["receiver"]
    if sent["digest"] != came["digest"]:
        raise SystemExit("what was received is not what was sent")
    seconds = came["ended"] - sent["started"]
    return {
        "seconds": seconds,
        "mib_per_second": mib / seconds,
        "sent_seconds": sent["confirmed"] - sent["started"],  # plain: confirmed; ours: sealed, kept and on its way
        "sender_cpu_seconds": sent["cpu"],  # CPU time, which a busy machine disturbs less
        "receiver_cpu_seconds": came["cpu"],
        "sender_extra_mib": sent["extra_mib"],
        "receiver_extra_mib": came["extra_mib"],
    }


def _ratios(middles: dict[str, dict[str, float]]) -> list[Ratio]:
    ours, plain = middles["ours"], middles["plain"]
    speed = plain["seconds"] / ours["seconds"]
    return [
        Ratio("speed of ours over the plain program's", speed, SPEED_LIMIT, least=True),
        *(Ratio(f"peak extra memory of the {p}, MiB", ours[f"{p}_extra_mib"], MEMORY_LIMIT_MIB) for p in MEMBERS),
    ]


if __name__ == "__main__":
    sys.exit(main())
