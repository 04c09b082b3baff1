"""The protocol with one protection taken out: a named check must fail. There is no such switch in the product."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from fate_llm.core.interfaces import SumContribute, SumReceived
from fate_llm.core.values import Array, Payload, SumFloor
from fate_llm.protocols.secagg import agreement as agreement_module
from fate_llm.protocols.secagg import party as party_module
from fate_llm.protocols.secagg import server as server_module
from fate_llm.protocols.secagg.agreement import Agreement
from fate_llm.protocols.secagg.party import MaskingParty
from fate_llm.protocols.sums.secagg import SecAgg
from fate_llm.security import masks as masks_module
from fate_llm.security.masks import add_masks
from fate_llm.security.pairwise import MaskKey, expand
from fate_llm.security.shamir import combine
from tests.masking import Masking, TestSigner
from tests.protocols.secagg.checks import (
    check_both_masks_needed,
    check_exact,
    check_fresh_keys,
    check_half_is_no_threshold,
    check_lying_share_found,
    check_masks_bound_to_transcript,
    check_masks_of_rounds_differ,
    check_nothing_redrawn,
    check_other_survivors_after_a_crash,
    check_second_set_refused,
    check_two_survivor_sets_refused,
    check_uniform,
    check_whole_key_counts,
    machine_secrets,
)
from tests.protocols.secagg.test_replay import Adversary

RED = (AssertionError, pytest.fail.Exception)
Patch = pytest.MonkeyPatch
_Secrets = party_module._Secrets


def both(patch: Patch, name: str, value: object) -> None:
    """The same change on both sides, so that sums still come out right: only the protection is gone."""
    patch.setattr(party_module, name, value)
    patch.setattr(server_module, name, value)


NO_MASK = hashlib.sha256(b"a key that stands for no mask").digest()


def drop_the_self_mask(patch: Patch) -> None:
    def without(words: Array, wide: list[int], *, plus: Sequence[bytes], minus: Sequence[bytes]) -> None:
        add_masks(words, wide, plus=[k for k in plus if k != NO_MASK], minus=[k for k in minus if k != NO_MASK])

    both(patch, "self_mask", lambda seed, transcript: NO_MASK)
    both(patch, "add_masks", without)


def drop_the_pair_masks(patch: Patch) -> None:
    def without(words: Array, wide: list[int], *, plus: Sequence[bytes], minus: Sequence[bytes]) -> None:
        add_masks(words, wide, plus=[k for k in plus if k != NO_MASK], minus=[k for k in minus if k != NO_MASK])

    both(patch, "pair_mask", lambda mine, theirs, transcript, pair: NO_MASK)
    both(patch, "add_masks", without)


def reuse_keys_of_other_rounds(patch: Patch) -> None:
    """The randomness alone makes the keys: the same bytes by mistake, the same keys in every round."""

    def of(seed: bytes, agreement: Agreement) -> Any:
        return original(seed, replace(agreement, digest=bytes(32)))

    original = _Secrets.of
    patch.setattr(_Secrets, "of", staticmethod(of))


def forget_the_randomness(patch: Patch) -> None:
    """What all know alone makes the keys."""

    def of(seed: bytes, agreement: Agreement) -> Any:
        return original(bytes(32), agreement)

    original = _Secrets.of
    patch.setattr(_Secrets, "of", staticmethod(of))


def one_key_for_the_job(patch: Patch) -> None:
    """Neither the round nor the randomness: the masks of all rounds are the same."""

    def of(seed: bytes, agreement: Agreement) -> Any:
        return original(bytes(32), replace(agreement, digest=bytes(32)))

    original = _Secrets.of
    patch.setattr(_Secrets, "of", staticmethod(of))
    both(patch, "self_mask", lambda seed, transcript: expand(seed, "secagg self mask"))
    pair_mask = party_module.pair_mask
    both(patch, "pair_mask", lambda mine, theirs, transcript, pair: pair_mask(mine, theirs, b"no salt", pair))


def masks_without_the_transcript(patch: Patch) -> None:
    both(patch, "self_mask", lambda seed, transcript: expand(seed, "secagg self mask"))


def fold_the_seed_to_32_bits(patch: Patch) -> None:
    def cipher(key: bytes) -> CipherContext:
        folded = np.bitwise_xor.reduce(np.frombuffer(key, "<u4")).tobytes()
        return Cipher(AES(folded * 8), CTR(bytes(16))).encryptor()

    patch.setattr(masks_module, "_cipher", cipher)


def bounded_masks(patch: Patch) -> None:
    """Masks that are numbers with a size: they do not wrap around, and average away."""

    def bounded(words: Array, wide: list[int], *, plus: Sequence[bytes], minus: Sequence[bytes]) -> None:
        for keys, sign in ((plus, 1), (minus, -1)):
            for key in keys:
                mask, broad = np.zeros_like(words), [0] * len(wide)
                add_masks(mask, broad, plus=[key], minus=[])
                small = (mask >> np.uint32(4)).astype(np.int64) * sign
                words += small.astype(np.uint32)
                wide[:] = [(a + sign * b) % (1 << 128) for a, b in zip(wide, broad, strict=True)]

    both(patch, "add_masks", bounded)


def float_masks(patch: Patch) -> None:
    """Masks out of a normal distribution, as real numbers in steps."""

    def real(words: Array, wide: list[int], *, plus: Sequence[bytes], minus: Sequence[bytes]) -> None:
        add_masks(np.zeros(1, np.uint32), wide, plus=plus, minus=minus)
        for keys, sign in ((plus, 1), (minus, -1)):
            for key in keys:
                draw = np.random.Generator(np.random.PCG64(int.from_bytes(key, "little")))
                noise = draw.normal(0.0, 1.0, words.size) * 2.0**26
                words += (np.rint(noise).astype(np.int64) * sign).astype(np.uint32)

    both(patch, "add_masks", real)


def skip_the_consistency_check(patch: Patch) -> None:
    patch.setattr(MaskingParty, "_check_consents", lambda self, body, agreement: None)


def believe_every_signature(patch: Patch) -> None:
    patch.setattr(TestSigner, "verify", lambda self, party, signature, message, *, purpose: None)


def redraw_after_a_crash(patch: Patch) -> None:
    original = MaskingParty._contribute

    def contribute(self: MaskingParty, event: SumContribute) -> Any:
        return original(self, SumContribute(event.update, event.seed))

    patch.setattr(MaskingParty, "_contribute", contribute)


def mask_anew_after_a_crash(patch: Patch) -> None:
    """The keys are kept, and the vector is not: two vectors under the same masks."""
    original = MaskingParty._contribute

    def contribute(self: MaskingParty, event: SumContribute) -> Any:
        kept = {name: body for name, body in event.kept.items() if name != "masked"}
        return original(self, SumContribute(event.update, event.seed, kept))

    patch.setattr(MaskingParty, "_contribute", contribute)


def answer_for_any_set(patch: Patch) -> None:
    original = MaskingParty._contribute

    def contribute(self: MaskingParty, event: SumContribute) -> Any:
        kept = {name: body for name, body in event.kept.items() if name not in ("consent", "answered", "masked")}
        return original(self, SumContribute(event.update, event.seed, kept))

    patch.setattr(MaskingParty, "_contribute", contribute)


def no_commitments(patch: Patch) -> None:
    both(patch, "commitment", lambda agreement, party, seed: bytes(32))


def no_floor(patch: Patch) -> None:
    patch.setattr(agreement_module, "_check_floor", lambda scene, parties, threshold, clip: None)


def second_lists(patch: Patch) -> None:
    """What was seen is forgotten, and every phase lets every message in."""
    steps = {name: step for name, (_, step) in party_module._STEPS.items()}

    def received(self: MaskingParty, event: SumReceived) -> Any:
        assert self._agreement is not None and self._secrets is not None
        return steps[event.body.fields["stage"]](self, event.body, self._agreement, self._secrets)

    patch.setattr(MaskingParty, "_received", received)


MUTANTS: dict[str, tuple[Callable[[Patch], None], Callable[[], object]]] = {
    # the change, and the check that must fail; the sums of all of them come out right, so that nothing else would tell
    "drop the self mask": (drop_the_self_mask, check_both_masks_needed),
    "drop the pair masks": (drop_the_pair_masks, check_both_masks_needed),
    "keys of other rounds": (reuse_keys_of_other_rounds, check_fresh_keys),
    "keys without randomness": (forget_the_randomness, check_fresh_keys),
    "one key for the job": (one_key_for_the_job, check_masks_of_rounds_differ),
    "masks without the transcript": (masks_without_the_transcript, check_masks_bound_to_transcript),
    "fold the seed": (fold_the_seed_to_32_bits, check_whole_key_counts),
    "bounded masks": (bounded_masks, check_uniform),
    "float masks": (float_masks, check_uniform),
    "skip the consistency check": (skip_the_consistency_check, check_two_survivor_sets_refused),
    "believe every signature": (believe_every_signature, check_two_survivor_sets_refused),
    "redraw after a crash": (redraw_after_a_crash, check_nothing_redrawn),
    "mask anew after a crash": (mask_anew_after_a_crash, check_nothing_redrawn),
    "answer for any set": (answer_for_any_set, check_other_survivors_after_a_crash),
    "no commitments": (no_commitments, check_lying_share_found),
    "two lists": (second_lists, check_second_set_refused),
    "no floor": (no_floor, check_half_is_no_threshold),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_check_fails_without_the_protection(name: str, monkeypatch: Patch) -> None:
    mutate, check = MUTANTS[name]
    check()  # the product passes it
    mutate(monkeypatch)
    check_exact(Masking(4))
    with pytest.raises(RED):
        check()


def test_what_half_of_the_parties_as_a_threshold_would_open(monkeypatch: Patch) -> None:
    """Why no policy allows it. Six honest parties, threshold three, and a coordinator that tells one half that p000 is
    there and the other that it is not: three signatures and three answers for each. It has both secrets of p000."""
    no_floor(monkeypatch)
    masking = Masking(6, secure_sum=SecAgg(SecAgg.Params(threshold=3)), floor=SumFloor(contributors=3, threshold=1))
    masking.contribute()
    while not list(masking.messages("survivors", to_server=False)):
        masking.deliver(masking.queue.popleft())
    names = list(masking.names)
    halves = {("p000", "p001", "p002"): names, ("p003", "p004", "p005"): [n for n in names if n != "p000"]}
    opened: dict[str, dict[int, bytes]] = {}
    for half, survivors in halves.items():
        consents: dict[str, Array] = {}
        for name in half:
            body = Payload({"stage": "survivors", "parties": survivors})
            sent = masking.parties[name].handle(SumReceived("z", body))
            consents[name] = sent[-1].body.tensors["signature"]  # type: ignore[union-attr]
        for name in half:
            body = Payload(
                {"stage": "consents", "parties": list(half)}, {"signatures": np.concatenate(list(consents.values()))}
            )
            answer = masking.parties[name].handle(SumReceived("z", body))[-1]
            share = answer.body.tensors["shares"][0].tobytes()  # type: ignore[union-attr]
            opened.setdefault("".join(half), {})[names.index(name) + 1] = share
    secrets = [combine(shares, threshold=3) for shares in opened.values()]
    own = machine_secrets(masking, "p000")
    assert secrets == [own.self_seed, own.mask.secret]  # and with them p000's vector is open
    assert MaskKey(secrets[1]).public == own.mask.public


def test_anything_in_any_order_finds_what_is_missing(monkeypatch: Patch) -> None:
    """The machine of `test_replay.py` is no formality: without the consistency check its invariants break."""
    every = settings(
        max_examples=400,
        stateful_step_count=25,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
    )
    skip_the_consistency_check(monkeypatch)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Adversary, settings=every)
