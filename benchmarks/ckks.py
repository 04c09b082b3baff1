"""Homomorphic aggregation in one process: ours over the same plain TenSEAL calls, and beside secure aggregation.

Plain: numbers to ciphertext bytes, such bytes added to a running sum, such bytes to numbers, with the calls of
TenSEAL's own examples and with our parameters. Ours: first the arithmetic alone, which checks what it reads and writes,
then a whole sum through the machines of three parties, coordinator and key holder: quantising, digests, signatures and
noise included. Both sides in turn, block by block; CPU seconds of one thread; medians of the ratios of pairs. Every sum
is checked.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tenseal
from _measure import Ratio, finish, make_parser, median

from fate_llm.core.interfaces import SumContribute, SumFinished, SumReceived, SumScene, SumSend
from fate_llm.core.values import Array, Cohort, Total, Update
from fate_llm.protocols.sums.ckks import CkksSum
from fate_llm.security.ckks import SCALE, SLOTS, CipherTotal, PublicContext, SecretContext
from fate_llm.security.fixed_point import FixedPoint, Rounding
from fate_llm.security.identity import Identity
from fate_llm.security.masks import add_masks
from fate_llm.security.signer import RosterSigner

LIMIT, BYTES_LIMIT, ERROR_LIMIT = 1.1, 33.0, 1e-7
PARTIES = ("bank-a", "bank-b", "bank-c")
COORDINATOR, HOLDER = "consortium", "notary"
MASKING_PARTIES = 8
LARGEST_WEIGHT = 2.0**20


def main() -> int:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--values", type=int, default=1_000_000, help="of a term in the whole sum")
    parser.add_argument("--blocks", type=int, default=200, help="ciphertexts of the arithmetic alone, timed in pairs")
    parser.add_argument("--sums", type=int, default=3, help="whole sums; the median counts")
    options = parser.parse_args()
    if options.quick:
        options.values, options.blocks, options.sums = 10_000, 5, 1
    pairs = Pairs(SecretContext.generate(), options.blocks)
    alone = {name: pairs.ratio(name) for name in ("encrypt", "add", "decrypt")}
    plain = {name: median(pairs.plain[name]) for name in alone}
    for name, ratio in alone.items():
        print(f"{name}: {1e9 * plain[name] / SLOTS:.0f} ns a value plain, ours {ratio:.3f} times that", flush=True)
    wholes = [run_sum(options.values, number) for number in range(options.sums)]
    found = _whole(wholes, options.values, plain)
    masking = masking_seconds(options.values)
    ratios = [Ratio(f"{name} over plain TenSEAL calls", ratio, LIMIT) for name, ratio in alone.items()]
    ratios += [
        Ratio("bytes of an upload a value", found["bytes_a_value"], BYTES_LIMIT),
        Ratio("largest error of the mean, full weights", found["largest_error"], ERROR_LIMIT),
    ]
    over = found["party_seconds"] / masking["seconds"]
    print(f"a party's term: {found['party_seconds']:.3f} s, {over:.0f} times that of masks among {MASKING_PARTIES}")
    details = {"plain_seconds_a_ciphertext": plain, "whole": found, "masks": masking, "party_over_masking_party": over}
    details["versions"] = {"tenseal": tenseal.__version__}
    return finish(options, "ckks", ratios, details)


def cpu(call: Callable[[], Any]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


# --- the arithmetic alone ----------------------------------------------------------------------------------------


class Pairs:
    """Seconds of ours and of plain calls for the same block, one right after the other."""

    def __init__(self, secret: SecretContext, blocks: int) -> None:
        self.secret, self.public = secret, PublicContext(secret.public.to_bytes())
        self.open_context = tenseal.context_from(self.public.to_bytes(), 1)
        self.secret_context = tenseal.context_from(secret.to_bytes(), 1)
        self.plain: dict[str, list[float]] = {"encrypt": [], "add": [], "decrypt": []}
        self.ours: dict[str, list[float]] = {"encrypt": [], "add": [], "decrypt": []}
        draw = np.random.default_rng(5)
        for number in range(blocks + 1):
            self._block(draw.integers(-(2**28), 2**28, SLOTS), number)
        for runs in (*self.plain.values(), *self.ours.values()):
            del runs[0]  # libraries load what they need in the first

    def ratio(self, name: str) -> float:
        return median([ours / plain for ours, plain in zip(self.ours[name], self.plain[name], strict=True)])

    def _block(self, numbers: Array, number: int) -> None:
        raw: list[bytes] = []
        total, running = CipherTotal(), []
        first = self.public.encrypt(numbers)[0]
        total.add([self.public.load(first)])
        running.append(tenseal.ckks_vector_from(self.open_context, first))
        calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            "encrypt": (
                lambda: raw.append(tenseal.ckks_vector(self.open_context, numbers.astype(np.float64)).serialize()),
                lambda: raw.append(self.public.encrypt(numbers)[0]),
            ),
            "add": (
                lambda: running[0].add_(tenseal.ckks_vector_from(self.open_context, first)),
                lambda: total.add([self.public.load(first)]),
            ),
            "decrypt": (
                lambda: np.array(tenseal.ckks_vector_from(self.secret_context, first).decrypt()),
                lambda: self.secret.open([first]),
            ),
        }
        for name, (plain, ours) in calls.items():
            if number % 2:
                self.ours[name].append(cpu(ours))
                self.plain[name].append(cpu(plain))
            else:
                self.plain[name].append(cpu(plain))
                self.ours[name].append(cpu(ours))
        for made in raw:
            if not (self.secret.open([made])[0] == numbers).all():
                raise SystemExit("what was encrypted opens to something else")


# --- a whole sum -------------------------------------------------------------------------------------------------


@dataclass
class Whole:
    """One sum through the machines: CPU seconds by side, bytes of one upload, and how far the mean is off."""

    seconds: dict[str, float] = field(default_factory=dict)
    upload_bytes: int = 0
    largest_error: float = 0.0
    error_bound: float = 0.0


def run_sum(values: int, number: int) -> Whole:
    everybody = (*PARTIES, COORDINATOR, HOLDER)
    identities = {name: Identity.generate() for name in everybody}
    roster = {name: identity.public for name, identity in identities.items()}
    state = {"w": np.zeros(values, np.float32)}

    def scene(name: str) -> SumScene:
        signer = RosterSigner(identities[name], roster)
        cohort = Cohort(PARTIES, COORDINATOR, len(PARTIES))
        return SumScene(cohort, name, {"w": (values,)}, state, "benchmark", signer=signer, key_holder=HOLDER)

    protection = CkksSum()
    machines: dict[str, Any] = {name: protection.party(scene(name)) for name in PARTIES}
    machines[COORDINATOR] = protection.server(scene(COORDINATOR))
    machines[HOLDER] = protection.holder(scene(HOLDER), bytes([number]) * 32)
    draw = np.random.default_rng(number)
    terms = {name: draw.uniform(-1, 1, values).astype(np.float32) for name in PARTIES}
    found = Whole()
    mail: deque[tuple[str, Any]] = deque()
    for name, term in terms.items():
        seed = name.encode().ljust(32)
        mail.append((name, SumContribute(Update({"w": term}, LARGEST_WEIGHT, {"loss": 1.5}), seed)))
    total = _deliver(machines, mail, found)
    exact = sum(term.astype(np.float64) for term in terms.values()) / len(terms)
    found.largest_error, found.error_bound = float(np.abs(total.mean["w"] - exact).max()), total.error_bound
    if found.largest_error > total.error_bound or total.sums["loss"] != 1.5 * len(PARTIES):
        raise SystemExit("the mean is further off than its bound")
    return found


def _deliver(machines: dict[str, Any], mail: deque[tuple[str, Any]], found: Whole) -> Total:
    total: Total | None = None
    while mail:
        side, event = mail.popleft()
        started = time.process_time()
        actions = machines[side].handle(event)
        found.seconds[side] = found.seconds.get(side, 0.0) + time.process_time() - started
        for action in actions:
            if isinstance(action, SumFinished):
                total = action.total
            elif isinstance(action, SumSend):
                mail.append((action.receiver, SumReceived(side, action.body, side == HOLDER)))
                if side == PARTIES[0]:
                    found.upload_bytes += sum(tensor.nbytes for tensor in action.body.tensors.values())
    if total is None:
        raise SystemExit("the sum did not end")
    return total


def _whole(wholes: list[Whole], values: int, plain: dict[str, float]) -> dict[str, Any]:
    """Medians, and what the same sum costs in plain calls: the terms encrypted, added and the sum opened."""
    ciphertexts = -(-(values + 16) // SLOTS)
    terms = len(PARTIES)
    calls = ciphertexts * (terms * plain["encrypt"] + terms * plain["add"] + plain["decrypt"])
    seconds = median([sum(whole.seconds.values()) for whole in wholes])
    party = median([whole.seconds[name] for whole in wholes for name in PARTIES])
    print(
        f"a whole sum of {values:,} values: {seconds:.2f} s, {seconds / calls:.3f} times its plain calls "
        "(with keys, digests, signatures, quantising and noise; no limit)",
        flush=True,
    )
    return {
        "values": values,
        "seconds": seconds,
        "party_seconds": party,
        "values_a_second_of_a_party": values / party,
        "seconds_by_side": [whole.seconds for whole in wholes],
        "plain_seconds": calls,
        "over_plain": seconds / calls,
        "bytes_a_value": max(whole.upload_bytes for whole in wholes) / values,
        "largest_error": max(whole.largest_error for whole in wholes),
        "error_bound": max(whole.error_bound for whole in wholes),
        "effective_scale": SCALE * FixedPoint(terms, 1.0).scale,
    }


# --- masks, for comparison ---------------------------------------------------------------------------------------


def masking_seconds(values: int) -> dict[str, float]:
    """What a party of secure aggregation does with as many values: quantise, and add a mask for each party."""
    point, words = FixedPoint(MASKING_PARTIES, 1.0), np.empty(values, np.dtype("<u4"))
    term = np.random.default_rng(1).uniform(-1, 1, values).astype(np.float32)
    keys = [bytes([number]) * 32 for number in range(MASKING_PARTIES)]

    def mask() -> None:
        point.encode(term, words, factor=1.0, rounding=Rounding(bytes(32)))
        add_masks(words, [0], plus=keys[:4], minus=keys[4:])

    return {"parties": MASKING_PARTIES, "seconds": median([cpu(mask) for _ in range(5)])}


if __name__ == "__main__":
    sys.exit(main())
