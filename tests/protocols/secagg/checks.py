"""What must hold of masked sums, as functions: tests call them on the product, and on mutants that must fail them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest

from fate_llm.core.errors import InconsistentView, PolicyError, ProtectionError, UnsafeRequest
from fate_llm.core.interfaces import SumContribute, SumExpired, SumReceived
from fate_llm.core.values import Array, Payload, SumFloor, Total, Update
from fate_llm.protocols.secagg import party as party_module
from fate_llm.protocols.secagg.messages import unmask_text
from fate_llm.protocols.secagg.party import MaskingParty
from fate_llm.protocols.sums.secagg import SecAgg
from fate_llm.security.pairwise import MaskKey
from fate_llm.security.shamir import PRIME
from tests.masking import Change, Masking, Message, body_bytes, identity_of, make_update, same_total

STAGES = ("keys", "shares", "masked", "consent", "unmask")
WIDTH = 1 << 16
LONG = {"w": (256, WIDTH // 256)}  # enough words for statistics


# --- tools ------------------------------------------------------------------------------------------------------


def dies(names: Sequence[str], stage: str) -> Change:
    """A change: these parties say nothing from a stage on."""
    first = STAGES.index(stage)

    def change(message: Message) -> list[Message]:
        gone = message.to_server and message.sender in names and STAGES.index(message.stage) >= first
        return [] if gone else [message]

    return change


def present_in(masking: Masking) -> list[str]:
    """U1, as the coordinator told it."""
    return list(next(masking.messages("keys", to_server=False)).body.fields["parties"])


def nothing_opened(masking: Masking, *names: str) -> None:
    """No share has left these parties (any, if none is named) in clear, and there is no total."""
    assert not [one for one in masking.messages("unmask", to_server=True) if not names or one.sender in names]
    assert masking.total is None


def answers_of(masking: Masking, name: str) -> set[bytes]:
    """Every different answer of a party."""
    return {body_bytes(one.body) for one in masking.messages("unmask", to_server=True) if one.sender == name}


def said_once(masking: Masking) -> None:
    """Whoever says something a second time says the same, byte for byte."""
    said: dict[tuple[str, str, bool, str], bytes] = {}
    for one in masking.sent:
        key = (one.sender, one.receiver, one.to_server, one.stage)
        assert said.setdefault(key, body_bytes(one.body)) == body_bytes(one.body), key


def exact_mean(updates: Sequence[Update], clip: float) -> dict[str, list[Fraction]]:
    """The weighted mean of the clipped values, without any rounding."""
    weight = sum(Fraction(update.weight) for update in updates)
    bound = Fraction(clip)
    return {
        name: [
            sum(
                (Fraction(update.weight) * min(max(Fraction(float(x)), -bound), bound))
                for update in updates
                for x in [update.arrays[name].reshape(-1)[at]]
            )
            / weight
            for at in range(updates[0].arrays[name].size)
        ]
        for name in updates[0].arrays
    }


def within_bound(total: Total, updates: Sequence[Update], clip: float = 1.0) -> None:
    for name, mean in exact_mean(updates, clip).items():
        for found, true in zip(total.mean[name].reshape(-1), mean, strict=True):
            assert abs(Fraction(float(found)) - true) <= Fraction(total.error_bound)


def words_of(masking: Masking, name: str) -> Array:
    """A party's masked vector, as it was sent."""
    return next(one for one in masking.messages("masked", to_server=True) if one.sender == name).body.tensors["words"]


def constant(value: float = 0.25) -> Update:
    return Update({"w": np.full(LONG["w"], value, np.float32)}, 128.0, {"tokens": 3.0})


def masked_round(round_number: int = 1, *, update: Update | None = None, count: int = 3) -> Masking:
    """A finished round of parties of which the first offers `update`."""
    updates = {} if update is None else {"p000": update}
    masking = Masking(count, layout=LONG, updates=updates, round=round_number)
    masking.run()
    return masking


def chi_square(data: Array) -> float:
    """How many standard deviations the counts of byte values are from what uniform ones give."""
    counts = np.bincount(np.ascontiguousarray(data).reshape(-1).view(np.uint8), minlength=256)
    expected = counts.sum() / 256
    return float((((counts - expected) ** 2 / expected).sum() - 255) / np.sqrt(2 * 255))


def correlation(one: Array, other: Array) -> float:
    """In units of 1/sqrt(D): how far two vectors are from having nothing in common."""
    first, second = (np.ascontiguousarray(a).reshape(-1).astype(np.float64) for a in (one, other))
    first, second = first - first.mean(), second - second.mean()
    norm = float(np.linalg.norm(first) * np.linalg.norm(second))
    return 0.0 if norm == 0.0 else float(first @ second) / norm * np.sqrt(first.size)


def signed(words: Array) -> Array:
    return words.view(np.int32)


# --- checks -----------------------------------------------------------------------------------------------------


def check_exact(masking: Masking, survivors: Sequence[str] | None = None) -> Total:
    """Run to the end: the total is that of Python's integers, to the bit."""
    total = masking.total or (masking.finish() if masking.sent else masking.run())
    by = masking.names if survivors is None else survivors
    assert same_total(total, masking.exact(by, present_in(masking)))
    return total


def check_uniform() -> None:
    """Masked words have uniform bytes, and nothing in common with what they hide."""
    for update in (constant(), make_update(0, layout=LONG)):
        masking = masked_round(update=update)
        words = words_of(masking, "p000")
        assert abs(chi_square(words)) < 5.0
        assert abs(correlation(signed(words), update.arrays["w"])) < 5.0
        for bit in range(32):  # every bit is a coin of its own
            share = float(((words >> np.uint32(bit)) & 1).mean())
            assert abs(share - 0.5) * 2 * np.sqrt(words.size) < 5.0


def without_pair_masks(masking: Masking, name: str) -> Array:
    """What a coordinator has of a party's vector when the party's mask key was opened to it: the self-mask is left."""
    secrets = machine_secrets(masking, name)
    words, wide = words_of(masking, name).copy(), list[int]()
    masking_id = transcript(masking, name)
    order = masking.names.index
    for other in masking.names:
        if other == name:
            continue
        first = order(name) < order(other)
        pair = (name, other) if first else (other, name)
        theirs = machine_secrets(masking, other).mask.public
        key = party_module.pair_mask(secrets.mask, theirs, masking_id, pair)
        party_module.add_masks(words, wide, plus=[] if first else [key], minus=[key] if first else [])
    return words


def without_self_mask(masking: Masking, name: str) -> Array:
    """The same with its self-mask's seed opened: the pair masks are left."""
    words = words_of(masking, name).copy()
    key = party_module.self_mask(machine_secrets(masking, name).self_seed, transcript(masking, name))
    party_module.add_masks(words, [], plus=[], minus=[key])
    return words


def machine_secrets(masking: Masking, name: str) -> party_module._Secrets:
    """What a party draws out of its seed."""
    return party_module._Secrets.of(masking.seed(name), masking.agreement(name))


def transcript(masking: Masking, name: str) -> bytes:
    machine = masking.parties[name]
    assert isinstance(machine, MaskingParty)
    return machine._masking


def check_both_masks_needed() -> None:
    """Either secret of a party alone leaves its vector uniform, and the two together open it."""
    masking = masked_round(update=constant())
    for opened in (without_pair_masks(masking, "p000"), without_self_mask(masking, "p000")):
        assert abs(chi_square(opened)) < 5.0
        assert np.abs(signed(opened).astype(np.float64)).mean() > 2**29  # a constant would be far below


def check_fresh_keys() -> None:
    """No key, commitment or mask of a round comes again in another round, attempt, job or conversation."""
    seen: set[bytes] = set()
    seed = hashlib.sha256(b"the same randomness, by mistake").digest()
    scenes: list[dict[str, object]] = [
        {},
        {"round": 2},
        {"attempt": 2},
        {"job": "job-2"},
        {"conversation": "evaluate"},
    ]
    for changes in scenes:
        for seeds in ({}, {"seed": seed}):
            masking = Masking(3, scene_of=dict.fromkeys(("p000", "p001", "p002", "z"), changes))
            for name in masking.names:
                given = hashlib.sha256(str([changes, name]).encode()).digest() if not seeds else seed
                event = SumContribute(masking.updates[name], given)
                masking._act(name, event, masking.parties[name].handle(event))
            masking.finish()
            for one in masking.messages("keys", to_server=True):
                row = one.body.tensors["keys"].tobytes()
                for part in (row[:32], row[32:64], row[64:]):
                    assert part not in seen
                    seen.add(part)


def check_masks_of_rounds_differ() -> None:
    """The same input in two rounds gives vectors that have nothing in common; their difference is as random."""
    first, second = (words_of(masked_round(number, update=constant()), "p000") for number in (1, 2))
    assert abs(chi_square(first - second)) < 5.0
    assert abs(correlation(signed(first), signed(second))) < 5.0


def check_whole_key_counts() -> None:
    """Keys that are the same once folded to 32 bits by XOR give different masks (a peer's masks do not)."""
    key = hashlib.sha256(b"a key").digest()
    words = np.frombuffer(key, "<u4").copy()
    words[0] ^= 0xDEADBEEF
    words[5] ^= 0xDEADBEEF
    masks = []
    for one in (key, words.tobytes(), key[::-1][:16] + key[16:]):
        mask = np.zeros(64, np.uint32)
        party_module.add_masks(mask, [], plus=[one], minus=[])
        masks.append(mask.tobytes())
    assert len(set(masks)) == 3
    for bit in range(256):  # and no bit of the key is without effect
        changed = (int.from_bytes(key, "little") ^ (1 << bit)).to_bytes(32, "little")
        mask = np.zeros(64, np.uint32)
        party_module.add_masks(mask, [], plus=[changed], minus=[])
        assert mask.tobytes() != masks[0]


def check_two_survivor_sets_refused(count: int = 4) -> None:
    """A coordinator tells one half of the parties that the last one has dropped, the other half that it has not."""
    masking = Masking(count)
    masking.contribute()
    victim, told = masking.names[-1], masking.names[: count // 2]
    while masking.queue:
        message = masking.queue.popleft()
        if not message.to_server and message.stage == "survivors":
            break
        masking.deliver(message)
    consents = {}
    for name in masking.names[:-1]:
        parties = [one for one in masking.names if one != victim or name not in told]
        sent = masking.parties[name].handle(SumReceived("z", Payload({"stage": "survivors", "parties": parties})))
        consents[name] = sent[-1].body.tensors["signature"]
    for name in masking.names[:-1]:
        body = Payload(
            {"stage": "consents", "parties": list(consents)}, {"signatures": np.concatenate(list(consents.values()))}
        )
        with pytest.raises(InconsistentView):
            masking.parties[name].handle(SumReceived("z", body))
    nothing_opened(masking)


def check_nothing_redrawn() -> None:
    """Killed after its vector is on disk, a party that has trained anew sends the old one, in every later life."""
    plain = Masking(4)
    plain.run()
    for kill_at in range(4):
        name = "p001"
        other = make_update(77, weight=5.0)
        later = {name: Update(other.arrays, 5.0, dict.fromkeys(plain.updates[name].sums, 1.5))}
        masking = Masking(4, later=later)
        kept = next(
            number
            for number, (_, actions) in enumerate((e, a) for who, e, a in plain.log if who == name)
            if any(getattr(action, "name", "") == "masked" for action in actions)
        )
        masking.kill = (name, kept + kill_at // 2, 1 + kill_at % 2)
        try:
            masking.run()
        except ProtectionError as error:
            raise AssertionError("a party that came back could not go on") from error
        assert masking.lives[name] == 1
        said_once(masking)
        assert plain.total is not None and masking.total is not None
        assert same_total(plain.total, masking.total)


def check_other_survivors_after_a_crash() -> None:
    """A party that had signed or answered, and was killed, does neither for another set."""
    for stage, expected in (("survivors", UnsafeRequest), ("shares", UnsafeRequest)):
        masking = Masking(4)
        masking.run()
        name = "p000"
        lists = {m.stage: m for m in masking.sent if not m.to_server and m.receiver == name}
        masking.parties[name] = masking.secure_sum.party(masking.scene(name))
        machine = masking.parties[name]
        machine.handle(SumContribute(masking.updates[name], masking.seed(name), masking.kept[name]))
        for one in ("keys", "shares", "survivors"):
            body = lists[one].body
            if one == stage:
                parties = body.fields["parties"][:-1]
                tensors = {key: value[:-1] for key, value in body.tensors.items()}
                other = Payload({**body.fields, "parties": parties}, tensors)
                with pytest.raises(expected):
                    machine.handle(SumReceived("z", other))
                break
            machine.handle(SumReceived("z", body))
        assert len(answers_of(masking, name)) == 1


def check_masks_bound_to_transcript() -> None:
    """Who was told of other parties, keys, model or parameters has other masks, with everybody."""
    one, other = (MaskKey(hashlib.sha256(name).digest()) for name in (b"one", b"other"))
    pair = ("p000", "p001")
    keys = []
    for transcript_ in (hashlib.sha256(b"1").digest(), hashlib.sha256(b"2").digest()):
        keys.append(party_module.self_mask(bytes(32), transcript_))
        keys.append(party_module.pair_mask(one, other.public, transcript_, pair))
        assert keys[-1] == party_module.pair_mask(other, one.public, transcript_, pair)
        keys.append(party_module.pair_mask(one, other.public, transcript_, ("p000", "p002")))
    assert len(set(keys)) == 6


def check_lying_share_found(lost: str = "") -> None:
    """A corrupt party moves a secret by 1: it knows who else answers, and changes its share to fit.

    lost: the party whose mask key it is; without one the seed of p002.
    """
    masking = Masking(4)
    masking.contribute()
    if lost:
        masking.change = dies([lost], "masked")
        masking.pump()
        masking._act("z", SumExpired(), masking._handle("z", SumExpired()))
    message = masking.until("unmask", "z")
    name, target = message.sender, masking.names.index(lost or "p002")
    machine = masking.parties[name]
    assert isinstance(machine, MaskingParty)
    x, factor = masking.names.index(name) + 1, 1
    for other in (1, 2, 3):
        if other != x:
            factor = factor * other * pow(other - x, -1, PRIME) % PRIME
    rows = [row.tobytes() for row in message.body.tensors["shares"]]
    rows[target] = ((int.from_bytes(rows[target], "big") + pow(factor, -1, PRIME)) % PRIME).to_bytes(66, "big")
    text = unmask_text(machine._masking, name, machine._survivors, rows)
    signature = identity_of(name).sign(text, purpose="secagg unmask")
    tensors = {
        "shares": np.frombuffer(b"".join(rows), np.uint8).reshape(4, 66),
        "signature": np.frombuffer(signature, np.uint8).reshape(1, 64),
    }
    masking.queue.appendleft(Message(name, "z", Payload({"stage": "unmask"}, tensors), True))
    with pytest.raises(ProtectionError, match=f"{lost or 'p002'} do not fit what it had signed"):
        masking.finish()
    assert masking.total is None


def check_half_is_no_threshold() -> None:
    """Three of six: two groups sign two sets, and a coordinator alone opens both secrets of one party."""
    half, floor = SecAgg(SecAgg.Params(threshold=3)), SumFloor(contributors=3, threshold=1)
    with pytest.raises(PolicyError, match="no policy allows"):
        Masking(6, secure_sum=half, floor=floor)


def check_second_set_refused() -> None:
    """In one life: who has signed one set of survivors signs no other one, and answers for none."""
    masking = Masking(5)
    masking.contribute()
    message = masking.until("consents", "p000")
    smaller = list(masking.names[:4])
    with pytest.raises(UnsafeRequest):
        masking.parties["p000"].handle(SumReceived("z", Payload({"stage": "survivors", "parties": smaller})))
    masking.queue.appendleft(message)
    check_exact(masking)
