"""Encryption of a model under CKKS: ours beside NVFlare's `HEModelEncryptor`, from its package.

Ours: a party's machine from its term to its last signed message: clipped, quantised, encrypted under the key holder's
public key; keys read, digests and signatures included. NVFlare's: its filter's encryption and its own serialisation, in
the context that its provisioning makes, where every client holds the one secret key and encrypts with it; and, to tell
that from the rest, in one of the same parameters with a public key alone. Each side runs in its own environment with
one thread; CPU seconds, medians.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _measure import FOLDER, Ratio, environment, finish, make_parser, median, run_child

from fate_llm.core.interfaces import SumContribute, SumEvent, SumParty, SumReceived, SumScene, SumSend
from fate_llm.core.values import Array, Cohort, Update
from fate_llm.protocols.sums.ckks import CkksSum
from fate_llm.security.identity import Identity
from fate_llm.security.signer import RosterSigner

LIMITS = {"public": 1.0, "secret": 0.5}  # values a second over NVFlare's, by the key it encrypts with
BYTES_LIMIT = 0.7
PARTIES = ("bank-a", "bank-b", "bank-c")
COORDINATOR, HOLDER = "consortium", "notary"
TENSORS = 4
_LIMIT_OF_A_RUN = 600.0  # seconds


def main() -> int:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--values", type=int, default=1_000_000, help="parameters of the model")
    parser.add_argument("--repeats", type=int, default=5, help="how often each side encrypts; medians count")
    parser.add_argument("--nvflare-python", type=Path, help="interpreter with nvflare==2.9.0 and tenseal")
    options = parser.parse_args()
    if options.quick:
        options.values, options.repeats = 20_000, 1
    ours = [encrypt(options.values, number) for number in range(options.repeats + 1)][1:]
    rate, size = options.values / median([run["seconds"] for run in ours]), ours[0]["bytes"] / options.values
    print(f"ours: {rate / 1e6:.2f} million values a second, {size:.2f} bytes a value", flush=True)
    details: dict[str, Any] = {"values": options.values, "ours": ours}
    ratios = [Ratio("bytes a value", size, 33.0)]
    if options.nvflare_python is None:
        print("NVFlare is left out: --nvflare-python names no interpreter")
        return finish(options, "ckks_vs_nvflare", ratios, details)
    theirs = _nvflare(options.nvflare_python, options.values, options.repeats)
    their_size = theirs["secret"]["bytes"] / options.values
    for mode, limit in LIMITS.items():
        their_rate = options.values / median(theirs[mode]["seconds"])
        print(f"NVFlare, {mode} key: {their_rate / 1e6:.2f} million values a second, {their_size:.2f} bytes a value")
        ratios.append(
            Ratio(f"values a second, over NVFlare's with the {mode} key", rate / their_rate, limit, least=True)
        )
    ratios.append(Ratio("bytes a value, over NVFlare's", size / their_size, BYTES_LIMIT))
    return finish(options, "ckks_vs_nvflare", ratios, {**details, "nvflare": theirs})


def _nvflare(python: Path, values: int, repeats: int) -> dict[str, Any]:
    words = [python.absolute(), FOLDER / "_nvflare_he.py", "--values", values, "--tensors", TENSORS]
    env = {**environment(), "PYTHONPATH": str(FOLDER), "OMP_NUM_THREADS": "1"}  # the peer's, and nothing of ours
    child = run_child([str(w) for w in [*words, "--repeats", repeats]], timeout=_LIMIT_OF_A_RUN, env=env)
    return child.answer


def model(values: int) -> dict[str, Array]:
    draw = np.random.default_rng(7)
    parts = np.array_split(draw.uniform(-1, 1, values).astype(np.float32), TENSORS)
    return {f"layer{place}": np.ascontiguousarray(part) for place, part in enumerate(parts)}


def encrypt(values: int, number: int) -> dict[str, float]:
    """CPU seconds of a party from its term to its last message, keys read and checked, and bytes of the tensors."""
    everybody = (*PARTIES, COORDINATOR, HOLDER)
    identities = {name: Identity.generate() for name in everybody}
    roster = {name: identity.public for name, identity in identities.items()}
    term = model(values)
    layout = {name: array.shape for name, array in term.items()}

    def scene(name: str) -> SumScene:
        cohort, signer = Cohort(PARTIES, COORDINATOR, len(PARTIES)), RosterSigner(identities[name], roster)
        return SumScene(cohort, name, layout, term, "benchmark", round=number + 1, signer=signer, key_holder=HOLDER)

    protection = CkksSum()
    first, *others = (Timed(protection.party(scene(name)), name) for name in PARTIES)
    server, holder = protection.server(scene(COORDINATOR)), protection.holder(scene(HOLDER), bytes(32))
    update = Update(term, 1000.0, {"loss": 1.0})
    asks: list[SumSend] = []
    for party in (first, *others):
        (ready,) = party.handle(SumContribute(update, bytes(range(32))))
        asks += _sends(server.handle(SumReceived(party.name, ready.body)))
    (keys,) = _sends(holder.handle(SumReceived(COORDINATOR, asks[0].body)))
    waiting = _sends(server.handle(SumReceived(HOLDER, keys.body, from_holder=True)))
    sent = 0
    while waiting:
        answer = waiting.pop(0)
        if answer.receiver != first.name:
            continue
        for upload in first.handle(SumReceived(COORDINATOR, answer.body)):
            sent += upload.body.tensors["ciphertexts"].nbytes
            waiting += _sends(server.handle(SumReceived(first.name, upload.body)))
    return {"seconds": first.seconds, "bytes": float(sent)}


@dataclass
class Timed:
    """A party's machine; seconds: of the CPU, in all that it was told."""

    machine: SumParty
    name: str
    seconds: float = 0.0

    def handle(self, event: SumEvent) -> list[SumSend]:
        started = time.process_time()
        actions = self.machine.handle(event)
        self.seconds += time.process_time() - started
        return _sends(actions)


def _sends(actions: list[Any]) -> list[SumSend]:
    return [action for action in actions if isinstance(action, SumSend)]


if __name__ == "__main__":
    sys.exit(main())
