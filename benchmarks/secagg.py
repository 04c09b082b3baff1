"""Secure aggregation in one process: masks over the speed of AES alone, a whole round, its memory and its bytes.

Masks: the time to add a party's masks to its vector (or, at the coordinator, to take off those that are left when 0, 1
or 2 of the parties dropped out after they had shared their keys), over the time that AES-256-CTR takes for as many
bytes, both measured in turn. A whole round: the machines of all parties in sequence and of the coordinator, over the
sum of the floors: AES for all masks of all, and one addition of the vector for each term. Every total is checked
against the exact mean. Seconds are CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
from _measure import Ratio, finish, make_parser, median
from _secagg_round import COORDINATOR, Federation, Round, run_round, seconds_of
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from fate_llm.core.values import Array
from fate_llm.security.fixed_point import FixedPoint, Rounding
from fate_llm.security.masks import add_masks

MASK_LIMIT, UNMASK_LIMIT, MEMORY_LIMIT, WIRE_LIMIT = 1.25, 1.5, 4.0, 1024.0
MIB = 2**20
CASES = ((8, 10_000_000, (0, 1, 2)), (32, 1_000_000, (0, 2)), (100, 1_000_000, (0, 2)))
QUICK = ((8, 100_000, (0, 1, 2)), (12, 10_000, (2,)))
_CHUNK = 1 << 18  # bytes that the floor's AES writes at once: the fastest here


def main() -> int:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--repeats", type=int, default=9, help="how often masks and floors are timed; medians count")
    parser.add_argument("--rounds", type=int, default=3, help="how often a whole round is run; medians count")
    options = parser.parse_args()
    if options.quick:
        options.repeats, options.rounds = 2, 1
    ratios: list[Ratio] = []
    details: dict[str, Any] = {}
    for parties, parameters, dropped in QUICK if options.quick else CASES:
        name = f"{parties} parties, {parameters:,} parameters"
        judged = parties == 8
        masks, found = _masks(parties, parameters, dropped, options.repeats)
        ratios += [ratio for ratio in masks if judged]
        rounds, federation = _rounds(parties, parameters, dropped, options, found)
        watched = _watched(federation)
        ratios += _memory_and_wire(name, parties, parameters, watched, judged)
        details[name] = {**found, **rounds, "memory_mib": {k: v / MIB for k, v in _ends(watched).items()}}
        details[name]["frame_bytes"] = watched.frames[federation.parties[0]]
        details[name]["content_bytes"] = watched.content[federation.parties[0]]
    return finish(options, "secagg", ratios, details)


# --- masks alone -------------------------------------------------------------------------------------------------


def aes_seconds(count: int) -> float:
    """To write `count` bytes of keystream, chunk by chunk into one buffer that stays in the cache."""
    zeros, out = memoryview(bytes(_CHUNK)), bytearray(_CHUNK + 16)
    cipher = Cipher(AES(bytes(32)), CTR(bytes(16))).encryptor()

    def write() -> None:
        for start in range(0, count, _CHUNK):
            cipher.update_into(zeros[: count - start], out)

    return seconds_of(write)


def masks_left(parties: int, dropped: int) -> int:
    """Masks that the coordinator takes off: self-masks of survivors, and theirs with each party that dropped out."""
    survivors = parties - dropped
    return survivors + dropped * survivors


def _masks(parties: int, parameters: int, dropped: tuple[int, ...], repeats: int) -> tuple[list[Ratio], dict[str, Any]]:
    """Ratios to AES of a party's masks and of the coordinator's, and what else the arithmetic takes."""
    words = np.ones(parameters, np.dtype("<u4"))
    jobs = {"a party's masks": parties} | {f"taken off with {d} dropped": masks_left(parties, d) for d in dropped}
    runs: dict[str, list[float]] = {name: [] for name in jobs}
    floors: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, count in jobs.items():
            keys = [number.to_bytes(32, "big") for number in range(count)]
            plus, minus = (keys[: count // 2], keys[count // 2 :])
            floors[name].append(aes_seconds(4 * parameters * count))
            runs[name].append(
                seconds_of(lambda plus=plus, minus=minus: add_masks(words, [1, 2, 3], plus=plus, minus=minus))
            )
    ratios = []
    for name in jobs:
        each = [run / floor for run, floor in zip(runs[name], floors[name], strict=True)]
        limit = MASK_LIMIT if name == "a party's masks" else UNMASK_LIMIT
        ratios.append(Ratio(f"{name} over AES alone, {parties} parties", median(each), limit))
        print(f"{parties} x {parameters:,}, {name}: {1000 * median(runs[name]):.1f} ms, ratio {median(each):.3f}")
    rate = 4 * parameters * parties / median(floors["a party's masks"])
    arithmetic = _arithmetic(parties, parameters, words, repeats)
    print("  " + ", ".join(f"{key} {value:.4g}" for key, value in arithmetic.items()) + f", AES {rate / 1e9:.2f} GB/s")
    return ratios, {"mask_seconds": runs, "floor_seconds": floors, "aes_bytes_a_second": rate, **arithmetic}


def _arithmetic(parties: int, parameters: int, words: Array, repeats: int) -> dict[str, float]:
    """Median seconds to quantise a vector, to read a total, and to add one vector to another."""
    point = FixedPoint(parties, 1.0)
    values = np.random.default_rng(1).normal(0.0, 0.02, parameters).astype(np.float32)
    other = words.copy()
    calls = {
        "quantise_seconds": lambda: point.encode(values, words, factor=0.5, rounding=Rounding(bytes(32))),
        "read_seconds": lambda: point.decode(words, values, divisor=0.5),
        "add_seconds": lambda: np.add(words, other, out=words),
    }
    return {name: median([seconds_of(call) for _ in range(repeats)]) for name, call in calls.items()}


# --- whole rounds ------------------------------------------------------------------------------------------------


def _rounds(
    parties: int, parameters: int, dropped: tuple[int, ...], options: argparse.Namespace, found: dict[str, Any]
) -> tuple[dict[str, Any], Federation]:
    federation = Federation(parties, parameters)
    rounds: dict[str, Any] = {}
    for count in dropped:
        silent = {"masked": count}
        runs = [run_round(federation, silent=silent) for _ in range(options.rounds)]
        for run in runs:
            assert run.total is not None
            federation.check(run.total)
        whole, floor = median([run.all_seconds for run in runs]), _floor(parties, parameters, count, found)
        party = median([run.of(name) for run in runs for name in federation.parties[: -count or None]])
        print(
            f"{parties} x {parameters:,}, {count} dropped: a round {whole:.3f} s, {whole / floor:.2f} times its floor; "
            f"a party {1000 * party:.1f} ms, the coordinator {median([r.of(COORDINATOR) for r in runs]):.3f} s",
            flush=True,
        )
        rounds[f"{count} dropped"] = {
            "round_over_floor": whole / floor,
            "round_seconds": [run.all_seconds for run in runs],
            "floor_seconds": floor,
            "party_seconds": party,
            "party": runs[0].seconds[federation.parties[0]],
            "coordinator": runs[0].seconds[COORDINATOR],
        }
    return {"rounds": rounds}, federation


def _floor(parties: int, parameters: int, dropped: int, found: dict[str, Any]) -> float:
    """Seconds: AES for the masks of each term and for those taken off, an addition of the vector for each term."""
    survivors = parties - dropped
    masks = survivors * parties + masks_left(parties, dropped)
    return float(masks * 4 * parameters / found["aes_bytes_a_second"] + survivors * found["add_seconds"])


def _watched(federation: Federation) -> Round:
    watched = run_round(federation, watch=True)
    assert watched.total is not None
    federation.check(watched.total)
    return watched


def _ends(watched: Round) -> dict[str, int]:
    """Peak bytes of the hungriest party and of the coordinator."""
    party = max(held for name, held in watched.extra.items() if name != COORDINATOR)
    return {"party": party, "coordinator": watched.extra[COORDINATOR]}


def _memory_and_wire(name: str, parties: int, parameters: int, watched: Round, judged: bool) -> list[Ratio]:
    vector = 4 * parameters
    peak = _ends(watched)
    content = max(watched.content.values()) - vector
    ratios = [Ratio(f"bytes of messages beside the vector, for each peer, {name}", content / (parties - 1), WIRE_LIMIT)]
    if judged:
        ratios += [
            Ratio(
                f"MiB that a party needs beside update and one vector, {name}",
                (peak["party"] - vector) / MIB,
                MEMORY_LIMIT,
            ),
            Ratio(
                f"MiB that the coordinator needs beside result and one vector, {name}",
                (peak["coordinator"] - 2 * vector) / MIB,
                MEMORY_LIMIT,
            ),
        ]
    return ratios


if __name__ == "__main__":
    sys.exit(main())
