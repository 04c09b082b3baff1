"""Echo rounds between a coordinator and two parties as processes: ours, a plain pika program, Flower and NVFlare.

In a round the coordinator sends the same float32 tensors to each party and has as many back from each; nobody trains.
Ours and the plain program go through one RabbitMQ node with TLS, ours sealed end to end and journalled besides; the
plain program publishes persistent and confirmed one by one in chunks of 4 MiB and journals nothing. Flower runs without
TLS, NVFlare's POC with its own. A round's time is that of the coordinator, from having the tensors to having all
replies; the first round does not count, and medians do. Ours also sends as many values as bf16, and goes through three
linked nodes, one for each party.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from _brokers import Way, broker, broker_each, together
from _measure import FOLDER, Ratio, environment, finish, make_parser, median, run_child

SMALL_LIMIT, PLAIN_LIMIT, PEER_LIMIT, BF16_LIMIT = 0.3, 1.3, 1.0, 1.02
SMALL = 1  # MB: judged in seconds; larger ones against the plain program
MB = 10**6
TENSORS = 8
PARTIES = ("party-1", "party-2")
MEMBERS = ("coordinator", *PARTIES)
OURS, BF16, EACH, FLOWER, NVFLARE = "ours", "ours, bf16", "ours, a broker each", "Flower", "NVFlare"
PLAIN, JOURNALLED = "plain", "plain, journalled"
_LIMIT_OF_A_RUN = 400.0  # seconds


def main() -> int:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[1, 100, 400], help="each way per party")
    parser.add_argument("--rounds", type=int, default=5, help="that count in a run; one more comes before them")
    parser.add_argument("--repeats", type=int, default=3, help="runs of ours and of the plain program, in turn")
    parser.add_argument("--flower-python", type=Path, help="interpreter of an environment with flwr==1.41.0")
    parser.add_argument("--nvflare-python", type=Path, help="interpreter of an environment with nvflare==2.9.0")
    options = parser.parse_args()
    if options.quick:
        options.megabytes, options.rounds, options.repeats = [1], 2, 1
    details: dict[str, Any] = {"rounds": options.rounds, "tensors": TENSORS, "versions": _versions()}
    ratios: list[Ratio] = []
    for megabytes in options.megabytes:
        runs = _all_sides(options, megabytes)
        middles = {side: median([s for run in found for s in run["seconds"]]) for side, found in runs.items()}
        for side, seconds in middles.items():
            print(f"{megabytes} MB, {side}: {seconds:.3f} s a round", flush=True)
        ratios += _ratios(megabytes, middles, runs)
        details[f"{megabytes} MB"] = {"medians": middles, "runs": runs}
    return finish(options, "rounds_over_processes", ratios, details)


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("pika", "cryptography")}


def _all_sides(options: argparse.Namespace, megabytes: int) -> dict[str, list[dict[str, Any]]]:
    """Runs of every side, taking turns; the peers and linked nodes, which start slowly, run in the first turn only."""
    own = [OURS, BF16, PLAIN, JOURNALLED]
    peers = {FLOWER: options.flower_python, NVFLARE: options.nvflare_python}
    runs: dict[str, list[dict[str, Any]]] = {}
    for number in range(options.repeats):
        # One node for all runs of a turn, a fresh one for the next: what an earlier run left behind disturbs nobody.
        with broker(MEMBERS) as node:
            for side in own if number % 2 == 0 else own[::-1]:
                runs.setdefault(side, []).append(_own_run(options, node, side, megabytes, number))
        if number == 0:
            with broker_each(MEMBERS) as nodes:
                runs[EACH] = [_own_run(options, nodes, EACH, megabytes, number)]
        for peer, python in peers.items() if number == 0 else ():
            if python is None:
                print(f"{peer} is left out: give --{peer.lower()}-python (benchmarks/README.md says how)", flush=True)
            else:
                runs[peer] = [_peer_run(options, peer, python, megabytes)]
    return runs


def _own_run(options: argparse.Namespace, node: Way, side: str, megabytes: int, number: int) -> dict[str, Any]:
    """Coordinator and parties, ours or plain, as processes of their own."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        common = ["--folder", folder, "--size", megabytes * MB, "--rounds", options.rounds + 1]
        if side in (OURS, BF16, EACH):
            from _fate_link import write_identities

            write_identities(folder, MEMBERS)
            job = f"{'bf16' if side == BF16 else 'f32'}-{megabytes}-{number}"
            common += ["--identities", folder, "--members", *MEMBERS, "--job", job]
            common += ["--dtype", "bf16" if side == BF16 else "f32"]
            own = {member: ["--party", member, *node.words(member, tls=True)] for member in MEMBERS}
            script = FOLDER / "_fate_link.py"
        else:
            common += ["--sync", "chunk" if side == JOURNALLED else "off", *node.words("guest", tls=True)]
            own = {party: ["--party", party] for party in PARTIES}
            own["coordinator"] = ["--parties", *PARTIES]
            script = FOLDER / "_amqp_plain.py"
        roles = {member: "coordinate" if member == "coordinator" else "echo" for member in MEMBERS}
        commands = {m: [sys.executable, script, role, *common, *own[m]] for m, role in roles.items()}
        answer = together({m: [str(w) for w in words] for m, words in commands.items()}, timeout=_LIMIT_OF_A_RUN)
    return _without_first(answer["coordinator"].answer)


def _peer_run(options: argparse.Namespace, peer: str, python: Path, megabytes: int) -> dict[str, Any]:
    script = FOLDER / f"_{peer.lower()}_processes.py"
    sizes = ["--parties", len(PARTIES), "--rounds", options.rounds + 1, "--size", megabytes * MB, "--tensors", TENSORS]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "run")
        folder.mkdir()
        words = [python.absolute(), script, "--folder", folder, "--timeout", _LIMIT_OF_A_RUN, *sizes]
        env = {**environment(), "PYTHONPATH": str(FOLDER)}  # the peer's environment, and nothing of ours
        child = run_child([str(word) for word in words], timeout=_LIMIT_OF_A_RUN + 120, env=env)
    return _without_first(child.answer)


def _without_first(answer: dict[str, Any]) -> dict[str, Any]:
    first, *counted = answer["seconds"]
    return {**answer, "first_round_seconds": first, "seconds": counted}


def _ratios(megabytes: int, middles: dict[str, float], runs: dict[str, list[dict[str, Any]]]) -> list[Ratio]:
    """The limits for one size: seconds for the small one, the plain program for others, peers for all."""
    ours, name = middles[OURS], f"{megabytes} MB each way, "
    if megabytes <= SMALL:
        ratios = [Ratio(f"{name}seconds of a round", ours, SMALL_LIMIT)]
    else:
        ratios = [Ratio(f"{name}over the plain program", ours / middles[PLAIN], PLAIN_LIMIT)]
    ratios += [
        Ratio(f"{name}over {peer}", ours / middles[peer], PEER_LIMIT) for peer in (FLOWER, NVFLARE) if peer in middles
    ]
    bf16 = runs[BF16][0]
    if bf16["dtypes"] != ["bfloat16"]:
        raise SystemExit(f"bf16 tensors came back as {bf16['dtypes']}")
    wire = bf16["sent_bytes"] / bf16["tensor_bytes"]
    return [*ratios, Ratio(f"{name}bf16: bytes of frames over 2 bytes a value", wire, BF16_LIMIT)]


if __name__ == "__main__":
    sys.exit(main())
