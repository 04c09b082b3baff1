"""Each attack on a masked sum, made by hand: it ends in a named refusal, nothing is opened, and the honest move after
it still works."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fate_llm.core.errors import (
    BadSeal,
    BadSignature,
    FateError,
    InconsistentView,
    PeerViolation,
    PolicyError,
    ProtectionError,
    QuorumLost,
    UnsafeRequest,
)
from fate_llm.core.interfaces import SumContribute, SumExpired, SumReceived
from fate_llm.core.values import Array, Payload, SumFloor
from fate_llm.protocols.secagg.messages import PublicKeys, keys_text, survivors_text, transcript_of, unmask_text
from fate_llm.protocols.secagg.party import MaskingParty, Phase
from fate_llm.protocols.secagg.server import MaskingServer
from fate_llm.protocols.sums.secagg import SecAgg
from fate_llm.security.pairwise import MaskKey
from fate_llm.security.shamir import SHARE_BYTES, combine, split
from tests.masking import Masking, Message, TestSigner, body_bytes, identity_of, make_update, names_of, same_total
from tests.protocols.secagg.checks import (
    answers_of,
    check_exact,
    check_half_is_no_threshold,
    check_lying_share_found,
    check_other_survivors_after_a_crash,
    check_second_set_refused,
    check_two_survivor_sets_refused,
    dies,
    machine_secrets,
    nothing_opened,
    said_once,
)

Names = list[str]
LISTS = ("keys", "shares", "survivors", "consents")  # what a coordinator says
FIELD = 2**255 - 19
LOW_ORDER = [
    bytes(32),
    (1).to_bytes(32, "little"),
    (FIELD - 1).to_bytes(32, "little"),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    (FIELD + 1).to_bytes(32, "little"),  # a second name of 1
    (FIELD + 9).to_bytes(32, "little"),  # a second name of the base point
]


# --- tools ------------------------------------------------------------------------------------------------------


def changed(message: Message, fields: Mapping[str, Any] | None = None, **tensors: Array) -> Message:
    body = message.body
    return replace(message, body=Payload({**body.fields, **(fields or {})}, {**body.tensors, **tensors}))


def chosen(message: Message, parties: Names) -> Message:
    """The list of a coordinator for other parties: rows of those who were there, some of the first one otherwise."""
    before = message.body.fields["parties"]
    tensors = {}
    for name, array in message.body.tensors.items():
        own_row = len(array) != len(before)  # sealed shares: one for each of the others
        there = [one for one in before if not own_row or one != message.receiver]
        wanted = [one for one in parties if not own_row or one != message.receiver]
        at = [there.index(one) if one in there else 0 for one in wanted]
        tensors[name] = array[at] if at else array[:0]
    fields: dict[str, Any] = {"parties": parties}
    if "sums" in message.body.fields:
        fields["sums"] = [message.body.fields["sums"][before.index(p) if p in before else 0] for p in parties]
    return changed(message, fields, **tensors)


def refused(masking: Masking, message: Message, error: type[FateError], text: str = ".") -> None:
    """The machine refuses the message with exactly this error, says nothing, and is as it was."""
    machine = masking.server if message.to_server else masking.parties[message.receiver]
    sent, before = len(masking.sent), _outside(machine)
    with pytest.raises(FateError, match=text) as caught:
        machine.handle(SumReceived(message.sender, message.body))
    assert caught.type is error, caught.value
    assert len(masking.sent) == sent and _outside(machine) == before
    assert caught.value.message and "Traceback" not in caught.value.message


def _outside(machine: object) -> list[object]:
    """What a refused message must not change."""
    if isinstance(machine, MaskingParty):
        return [machine.phase, dict(machine._seen), machine._survivors, machine._sharing, machine._transcript]
    assert isinstance(machine, MaskingServer)
    words = None if machine._total is None else (machine._total.words.tobytes(), list(machine._total.wide))
    return [machine.stage, machine.awaiting, dict(machine._keys), words, dict(machine._opened), dict(machine._digests)]


def goes_on(masking: Masking, message: Message) -> None:
    """The right message, after the wrong one, leads to the exact sum."""
    masking.queue.appendleft(message)
    masking.finish()
    check_exact(masking)
    assert not masking.refused
    said_once(masking)


def stopped_at(stage: str, receiver: str = "p001", **settings_: Any) -> tuple[Masking, Message]:
    masking = Masking(**{"count": 4, **settings_})
    masking.contribute()
    return masking, masking.until(stage, receiver)


# --- lists of parties -------------------------------------------------------------------------------------------

ALL = list(names_of(4))
WRONG_LISTS: dict[str, tuple[Any, str]] = {
    "duplicate": ([*ALL, "p003"], "named twice"),
    "duplicate for the threshold": (["p000", "p001", "p001"], "named twice"),
    "own id dropped": (["p000", "p002", "p003"], "we are not among them"),
    "unknown id": ([*ALL, "p004"], "'p004' is not among"),
    "the coordinator's id": ([*ALL, "z"], "'z' is not among"),
    "below the threshold": (["p000", "p001"], "2 parties, of a threshold of 3"),
    "we alone": (["p001"], "1 parties"),
    "nobody": ([], "not among them"),
    "another order": (["p001", "p000", "p002", "p003"], "order of the roster"),
    "no list": ("p000p001p002", "not a list"),
    "an object": ({"p000": 1, "p001": 1, "p002": 1}, "not a list"),
    "no text": (["p000", "p001", 3], "not a list of parties"),
    "nested": ([["p000"], ["p001"], ["p002"]], "not a list of parties"),
    "nothing": (None, "not a list"),
}


@pytest.mark.parametrize("stage", LISTS[:3])
@pytest.mark.parametrize("case", WRONG_LISTS)
def test_lists_that_no_honest_coordinator_sends(stage: str, case: str) -> None:
    parties, text = WRONG_LISTS[case]
    masking, message = stopped_at(stage)
    known = isinstance(parties, list) and all(isinstance(one, str) for one in parties)
    wrong = chosen(message, parties) if known else changed(message, {"parties": parties})
    refused(masking, wrong, UnsafeRequest, text)
    nothing_opened(masking)
    goes_on(masking, message)


def test_a_party_cannot_be_in_two_lists_at_once() -> None:
    """There is one list, of survivors: whoever is in it is not dropped. A second list is no part of the message."""
    masking, message = stopped_at("survivors")
    refused(masking, changed(message, {"dropped": ["p002"]}), PeerViolation, "not what belongs there")
    refused(masking, changed(message, {"parties": [*ALL, "p002"]}), UnsafeRequest, "twice")
    goes_on(masking, message)


def test_a_party_that_is_lost_does_not_come_back_in_a_later_list() -> None:
    """Whoever gave no shares cannot have masked; whoever has no keys cannot have given shares."""
    for stage, first in (("shares", "keys"), ("survivors", "shares")):
        masking = Masking(4, change=dies(["p003"], first))
        masking.contribute()
        masking.pump()
        masking.server.handle  # the coordinator is ours
        masking._act("z", SumExpired(), masking._handle("z", SumExpired()))
        message = masking.until(stage, "p001")
        refused(masking, chosen(message, ALL), UnsafeRequest, "'p003' is not among")
        masking.queue.appendleft(message)
        masking.finish()
        check_exact(masking, names_of(3))


@pytest.mark.parametrize("stage", LISTS)
def test_the_same_again_is_ignored_and_another_in_its_place_is_refused(stage: str) -> None:
    masking, message = stopped_at(stage, count=5)
    machine = masking.parties["p001"]
    masking.deliver(message)
    assert machine.handle(SumReceived("z", message.body)) == []
    parties = message.body.fields["parties"][:-1]
    refused(masking, chosen(message, parties), UnsafeRequest, "second, different")
    assert machine.handle(SumReceived("z", message.body)) == []
    masking.finish()
    check_exact(masking)
    refused(masking, chosen(message, parties), UnsafeRequest, "second, different")  # nor after the answer
    assert len(answers_of(masking, "p001")) == 1


@pytest.mark.parametrize("stage", LISTS)
def test_only_the_coordinator_speaks_for_the_coordinator(stage: str) -> None:
    masking, message = stopped_at(stage)
    refused(masking, replace(message, sender="p000"), PeerViolation, "not the coordinator")
    refused(masking, replace(message, sender="p001"), PeerViolation, "not the coordinator")
    goes_on(masking, message)


@pytest.mark.parametrize("stage", LISTS)
def test_messages_out_of_their_order_are_refused(stage: str) -> None:
    done = Masking(4)
    done.run()
    masking, message = stopped_at(stage)
    for other in done.sent:
        if not other.to_server and other.receiver == "p001" and LISTS.index(other.stage) > LISTS.index(stage):
            refused(masking, other, PeerViolation, "not expected")
    goes_on(masking, message)


# --- two sets ---------------------------------------------------------------------------------------------------


def test_other_survivors_for_half_of_the_parties() -> None:
    """The consistency round: no set has enough signatures, so nobody answers for any."""
    for count in (4, 5, 6, 8):
        check_two_survivor_sets_refused(count)


def test_a_second_set_in_one_life_is_refused() -> None:
    check_second_set_refused()


def test_a_crash_gives_no_second_answer() -> None:
    check_other_survivors_after_a_crash()


def test_an_answer_for_other_survivors_in_a_later_life() -> None:
    """After the answer the coordinator wants it again, for a set without p003: the sums would differ by p003's term."""
    masking = Masking(5)
    masking.run()
    smaller = ["p000", "p001", "p002", "p003"]
    for name in smaller[:3]:
        machine = _again(masking, name)
        told = [m for m in masking.sent if not m.to_server and m.receiver == name]
        for message in told[:2]:
            machine.handle(SumReceived("z", message.body))
        with pytest.raises(UnsafeRequest, match="other survivors than those that we have signed"):
            machine.handle(SumReceived("z", Payload({"stage": "survivors", "parties": smaller})))
        # Even where only the answer is left of what was kept (it outlives the round), it is not given twice.
        kept = {key: value for key, value in masking.kept[name].items() if key != "consent"}
        machine = _again(masking, name, kept)
        for message in told[:2]:
            machine.handle(SumReceived("z", message.body))
        machine.handle(SumReceived("z", Payload({"stage": "survivors", "parties": smaller})))
        transcript = machine._masking
        signatures = [
            identity_of(one).sign(survivors_text(transcript, smaller), purpose="secagg survivors") for one in smaller
        ]
        body = Payload(
            {"stage": "consents", "parties": smaller},
            {"signatures": np.frombuffer(b"".join(signatures), np.uint8).reshape(4, 64)},
        )
        with pytest.raises(UnsafeRequest, match="answered for other survivors"):
            machine.handle(SumReceived("z", body))
        assert len(answers_of(masking, name)) == 1


def _again(masking: Masking, name: str, kept: Mapping[str, Payload] | None = None) -> MaskingParty:
    """A later life of a party."""
    machine = masking.secure_sum.party(masking.scene(name))
    assert isinstance(machine, MaskingParty)
    entries = dict(masking.kept[name] if kept is None else kept)
    machine.handle(SumContribute(make_update(99, weight=1.0), hashlib.sha256(b"new").digest(), entries))
    return machine


def test_a_round_that_is_closed_has_no_secrets_left_to_answer_with() -> None:
    masking = Masking(4)
    masking.run()
    masking.parties["p000"] = machine = _again(masking, "p000", {"answered": masking.kept["p000"]["answered"]})
    assert machine.phase is Phase.ANSWERED and machine._secrets is None
    for message in masking.sent:
        if not message.to_server and message.receiver == "p000":
            refused(masking, message, PeerViolation, "not expected while answered")


def test_both_shares_of_a_party_are_never_opened() -> None:
    """Of a victim some parties are asked for the self-mask, others for the mask key, of one and the same sum: each
    gives one, once; and what they give for the set that was signed opens one of the two secrets only."""
    masking = Masking(5, change=dies(["p004"], "masked"))
    masking.run()
    opened: dict[str, list[bytes]] = {}
    for message in masking.messages("unmask", to_server=True):
        shares = message.body.tensors["shares"]
        assert shares.shape == (5, SHARE_BYTES)  # one for each, no room for two
        opened[message.sender] = [row.tobytes() for row in shares]
    for at, party in enumerate(masking.names):
        points = {masking.names.index(name) + 1: rows[at] for name, rows in opened.items()}
        machine = masking.parties[party]
        assert isinstance(machine, MaskingParty)
        secrets = machine_secrets(masking, party)
        found = combine(points, threshold=4)
        assert found == (secrets.mask.secret if party == "p004" else secrets.self_seed)
        assert found != (secrets.self_seed if party == "p004" else secrets.mask.secret)


@pytest.mark.parametrize("count", [6, 8])
def test_half_of_the_parties_never_make_a_threshold(count: int) -> None:
    """With a threshold of n/2 two halves could sign two sets, and open both secrets of one party between them: no
    policy allows it, on either side."""
    check_half_is_no_threshold()
    lenient, half = SumFloor(contributors=3, threshold=1), SecAgg(SecAgg.Params(threshold=count // 2))
    with pytest.raises(PolicyError, match=f"less than {count // 2 + 1}"):
        Masking(count, secure_sum=half, floor=lenient)
    masking = Masking(count)
    machine = half.party(replace(masking.scene("p000"), floor=lenient))
    with pytest.raises(PolicyError, match=f"less than {count // 2 + 1}"):
        machine.handle(SumContribute(masking.updates["p000"], bytes(32)))
    Masking(count, secure_sum=SecAgg(SecAgg.Params(threshold=count // 2 + 1)), floor=lenient).run()


# --- consent ----------------------------------------------------------------------------------------------------


def consents_of(masking: Masking) -> dict[str, bytes]:
    return {m.sender: m.body.tensors["signature"].tobytes() for m in masking.messages("consent", to_server=True)}


def with_consents(message: Message, signatures: Mapping[str, bytes]) -> Message:
    packed = np.frombuffer(b"".join(signatures.values()), np.uint8).reshape(len(signatures), 64)
    return replace(message, body=Payload({"stage": "consents", "parties": list(signatures)}, {"signatures": packed}))


def test_signatures_under_the_survivors_must_be_enough_distinct_and_true() -> None:
    masking, message = stopped_at("consents")
    found = dict(zip(message.body.fields["parties"], message.body.tensors["signatures"], strict=True))
    signatures = {name: row.tobytes() for name, row in found.items()}
    assert len(signatures) == 3
    two = dict(list(signatures.items())[:2])
    refused(masking, with_consents(message, two), InconsistentView, "2 survivors have signed")
    refused(masking, with_consents(message, {}), InconsistentView, "0 survivors")
    twice = Payload(
        {"stage": "consents", "parties": [*two, next(iter(two))]},
        {"signatures": message.body.tensors["signatures"][[0, 1, 0]]},
    )
    refused(masking, replace(message, body=twice), UnsafeRequest, "each once")
    stranger = {**two, "z": identity_of("z").sign(b"", purpose="secagg survivors")}
    refused(masking, with_consents(message, stranger), UnsafeRequest, "not of survivors")
    swapped = {**signatures, next(iter(signatures)): signatures[ALL[1]]}
    refused(masking, with_consents(message, swapped), InconsistentView, "has not signed")
    for parties in (None, 3, {"p000": 1}, [["p000"]], [3, 4, 5]):
        refused(masking, changed(message, {"parties": parties}), UnsafeRequest, "not of survivors")
    nothing_opened(masking, "p001")
    goes_on(masking, message)


def test_a_signature_for_one_purpose_is_none_for_another() -> None:
    """What a party signed of its keys, its vector or its answer is no consent to a set."""
    masking, message = stopped_at("consents")
    machine = masking.parties["p001"]
    assert isinstance(machine, MaskingParty)
    text = survivors_text(machine._masking, machine._survivors)
    for purpose in ("secagg keys", "secagg masked", "secagg unmask", "envelope"):
        forged = {name: identity_of(name).sign(text, purpose=purpose) for name in ALL}
        refused(masking, with_consents(message, forged), InconsistentView)
    goes_on(masking, message)


# --- keys -------------------------------------------------------------------------------------------------------


def corrupt_keys(
    masking: Masking, name: str, *, channel: bytes | None = None, mask: bytes | None = None, by: str | None = None
) -> Message:
    """The keys of a corrupt party: any two public keys, properly signed by it (or by somebody else)."""
    original = next(m for m in masking.messages("keys", to_server=True) if m.sender == name)
    row = original.body.tensors["keys"].tobytes()
    new = (channel or row[:32]) + (mask or row[32:64]) + row[64:]
    text = keys_text(masking.agreement(name), name, new, original.body.fields["sums"])
    signature = identity_of(by or name).sign(text, purpose="secagg keys")
    return changed(
        original,
        keys=np.frombuffer(new, np.uint8).reshape(1, -1),
        signature=np.frombuffer(signature, np.uint8).reshape(1, -1),
    )


def list_with(message: Message, keys: Message) -> Message:
    """The coordinator's list with other keys for one party."""
    at = message.body.fields["parties"].index(keys.sender)
    table, signatures = message.body.tensors["keys"].copy(), message.body.tensors["signatures"].copy()
    table[at], signatures[at] = keys.body.tensors["keys"][0], keys.body.tensors["signature"][0]
    return changed(message, keys=table, signatures=signatures)


def test_keys_that_the_coordinator_made_are_refused() -> None:
    """It would know the masks, and read the shares, of whoever believes it."""
    masking, message = stopped_at("keys")
    mine = MaskKey(hashlib.sha256(b"the coordinator's").digest()).public
    for settings_ in ({"channel": mine}, {"mask": mine}, {"channel": mine, "mask": MaskKey(bytes(range(32))).public}):
        for by in ("z", "p000", "p001"):
            forged = corrupt_keys(masking, "p002", **settings_, by=by)
            refused(masking, list_with(message, forged), InconsistentView, "keys shown for p002 are not signed")
    refused(
        masking, list_with(message, corrupt_keys(masking, "p001", mask=mine)), InconsistentView, "other keys for us"
    )
    refused(masking, list_with(message, corrupt_keys(masking, "p001", channel=mine)), InconsistentView, "for us")
    nothing_opened(masking)
    goes_on(masking, message)


def test_keys_under_another_name_are_refused() -> None:
    masking, message = stopped_at("keys")
    table, signatures = (message.body.tensors[name][[0, 1, 3, 2]] for name in ("keys", "signatures"))
    refused(masking, changed(message, keys=table, signatures=signatures), InconsistentView, "p002")
    goes_on(masking, message)


def test_two_parties_with_one_key_are_refused() -> None:
    """A corrupt party takes the key of another for its own (it signs it): its pair masks would be the other's."""
    masking, message = stopped_at("keys")
    rows = dict(zip(message.body.fields["parties"], message.body.tensors["keys"], strict=True))
    for settings_ in (
        {"mask": rows["p000"][32:64].tobytes()},
        {"channel": rows["p000"][:32].tobytes()},
        {"mask": rows["p000"][:32].tobytes()},
        {"mask": rows["p003"][:32].tobytes()},
        {"mask": rows["p001"][32:64].tobytes()},  # the victim's own
    ):
        copied = corrupt_keys(masking, "p003", **settings_)
        refused(masking, list_with(message, copied), UnsafeRequest, "are the same")
    goes_on(masking, message)


@pytest.mark.parametrize("key", LOW_ORDER, ids=lambda key: key.hex()[:6])
@pytest.mark.parametrize("which", ["channel", "mask"])
def test_points_of_low_order_are_refused_although_signed(which: str, key: bytes) -> None:
    """Everybody has the same secret with such a key. The coordinator and the corrupt party work together here."""
    masking, message = stopped_at("keys", "p000")
    corrupt = list_with(message, corrupt_keys(masking, "p003", **{which: key}))
    if which == "channel":
        refused(masking, corrupt, PeerViolation, "low order|second name")
        goes_on(masking, message)
        return
    for name in ALL[:3]:
        masking.parties[name].handle(SumReceived("z", replace(corrupt, receiver=name).body))
    machine = masking.parties["p001"]
    assert isinstance(machine, MaskingParty) and machine.phase is Phase.SHARED
    shares = _shares_for(masking, "p001", corrupt, ALL)
    refused(masking, shares, PeerViolation, "low order|second name")
    nothing_opened(masking)
    assert not list(masking.messages("masked", to_server=True))


def _shares_for(masking: Masking, name: str, told: Message, parties: Names) -> Message:
    """The shares of all parties for one of them, each as its own machine (the same seed) sealed it for that list."""
    sealed = []
    for other in parties:
        if other == name:
            continue
        machine = masking.secure_sum.party(masking.scene(other))
        assert isinstance(machine, MaskingParty)
        machine.handle(SumContribute(masking.updates[other], masking.seed(other)))
        assert machine._agreement is not None and machine._secrets is not None
        table = {
            party: PublicKeys.read(row.tobytes(), sums, b"")
            for party, row, sums in zip(
                told.body.fields["parties"], told.body.tensors["keys"], told.body.fields["sums"], strict=True
            )
        }

        transcript = transcript_of(machine._agreement, table)
        channels = {
            party: machine._secrets.channel.agree(one.channel) for party, one in table.items() if party != other
        }
        rows = machine._seal_shares(channels, transcript, machine._agreement, machine._secrets)
        order = [party for party in parties if party != other]
        sealed.append(rows[order.index(name)])
    packed = np.frombuffer(b"".join(sealed), np.uint8).reshape(len(sealed), -1)
    return Message("z", name, Payload({"stage": "shares", "parties": parties}, {"sealed": packed}), False)


@pytest.mark.parametrize("which", ["channel", "mask"])
def test_an_honest_coordinator_leaves_such_a_party_out(which: str) -> None:
    """One corrupt party stops nobody else: its keys are refused where they arrive."""
    for key in (*LOW_ORDER, None):
        masking = Masking(4)
        masking.contribute(*ALL[:3])
        masking.contribute("p003")
        good = masking.queue.pop()
        other = masking.queue[0].body.tensors["keys"].tobytes()
        bad = corrupt_keys(masking, "p003", **{which: key or other[32:64]})
        masking.pump()
        refused(masking, bad, PeerViolation, "low order|second name|there already")
        masking.expire()
        check_exact(masking, ALL[:3])
        assert good.sender == "p003"


# --- views that differ ------------------------------------------------------------------------------------------

VIEWS: dict[str, dict[str, Any]] = {
    "model": {"state": {"a.weight": np.full((3, 5), 0.5, np.float32), "b": np.full(7, 0.5000001, np.float32)}},
    "round": {"round": 2},
    "attempt": {"attempt": 2},
    "job": {"job": "job-2"},
    "conversation": {"conversation": "evaluate"},
    "roster": {"signer": TestSigner("p001", (*names_of(4), "y", "z"))},
}


@pytest.mark.parametrize("case", VIEWS)
def test_a_party_that_was_told_otherwise_ends_the_sum(case: str) -> None:
    """Its masks would not cancel, so that a coordinator could take its term apart: nobody gets as far."""
    masking = Masking(4, scene_of={"p001": VIEWS[case]})
    masking.contribute()
    masking.pump()
    who, stage, error = masking.refused[0]  # an honest coordinator notices at once
    assert (who, stage, type(error)) == ("z", "keys", BadSignature)
    # One that is not passes it on: every party refuses on its own.
    honest = Masking(4, scene_of={"p001": VIEWS[case]})
    honest.contribute()
    sent = {message.sender: message for message in honest.queue}
    body = Payload(
        {"stage": "keys", "parties": ALL, "sums": [sent[name].body.fields["sums"] for name in ALL]},
        {
            "keys": np.concatenate([sent[name].body.tensors["keys"] for name in ALL]),
            "signatures": np.concatenate([sent[name].body.tensors["signature"] for name in ALL]),
        },
    )
    for name in ALL:
        refused(honest, Message("z", name, body, False), InconsistentView, "another model, roster or parameters")
    nothing_opened(honest)


@pytest.mark.parametrize(
    "params", [{"clip": 0.5}, {"largest_weight": 2.0**19}, {"threshold": 4}], ids=lambda value: next(iter(value))
)
def test_other_parameters_end_the_sum(params: dict[str, Any]) -> None:
    masking = Masking(4)
    masking.parties["p001"] = SecAgg(SecAgg.Params(**params)).party(masking.scene("p001"))
    masking.contribute()
    masking.pump()
    assert [(who, stage, type(error)) for who, stage, error in masking.refused] == [("z", "keys", BadSignature)]
    nothing_opened(masking)


def test_a_state_in_another_order_is_the_same_state() -> None:
    state = {name: np.full(shape, 0.5, np.float32) for name, shape in reversed(list(Masking().layout.items()))}
    assert list(state) != list(Masking().layout)
    check_exact(Masking(4, scene_of={"p001": {"state": state}}))


def test_a_state_that_is_trained_on_in_place_is_still_the_one_of_the_round() -> None:
    masking = Masking(4)
    for name in masking.names:
        machine = masking.parties[name]
        assert isinstance(machine, MaskingParty)
        for array in machine.scene.state.values():
            array[...] = np.random.Generator(np.random.PCG64(len(name))).normal(size=array.shape)
    check_exact(masking)


# --- replays ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other", [{"round": 2}, {"attempt": 2}, {"job": "job-2"}, {"conversation": "evaluate"}], ids=lambda v: next(iter(v))
)
def test_messages_of_another_sum_are_refused_at_every_stage(other: dict[str, Any]) -> None:
    """Everything said in round r is replayed in r + 1 (attempt, job, conversation): to parties and to coordinator."""
    before = Masking(4)
    before.run()
    scenes = dict.fromkeys((*ALL, "z"), other)
    for stage in LISTS:
        masking = Masking(4, scene_of=scenes)
        masking.contribute()
        message = masking.until(stage, "p001")
        old = next(m for m in before.sent if not m.to_server and m.stage == stage and m.receiver == "p001")
        if stage == "survivors":  # the same list is the same question; consents to it are what differs
            assert body_bytes(old.body) == body_bytes(message.body)
        else:
            refused(masking, old, BadSeal if stage == "shares" else InconsistentView)
        nothing_opened(masking, "p001")
        goes_on_later(masking, message)
    for stage in ("keys", "masked", "consent", "unmask"):
        masking = Masking(4, scene_of=scenes)
        masking.contribute()
        message = masking.until(stage, "z")
        old = next(m for m in before.sent if m.to_server and m.stage == stage and m.sender == message.sender)
        refused(masking, old, BadSignature)
        goes_on_later(masking, message)


def goes_on_later(masking: Masking, message: Message) -> None:
    masking.queue.appendleft(message)
    masking.finish()
    assert not masking.refused
    assert masking.total is not None and same_total(masking.total, masking.exact(masking.names))


def test_shares_for_one_are_not_for_another() -> None:
    """Sealed shares are bound to who made them, for whom and under which list of keys."""
    masking, message = stopped_at("shares")
    sealed = message.body.tensors["sealed"]
    refused(masking, changed(message, sealed=sealed[[1, 0, 2]]), BadSeal, "p000")
    other = next(m for m in masking.messages("shares", to_server=False) if m.receiver == "p002")
    refused(masking, changed(message, sealed=other.body.tensors["sealed"]), BadSeal)
    mine = next(m for m in masking.messages("shares", to_server=True) if m.sender == "p001")
    refused(masking, changed(message, sealed=mine.body.tensors["sealed"]), BadSeal)  # our own, sent back
    smaller = chosen(message, ["p000", "p001", "p002"])
    machine = masking.parties["p001"]
    assert isinstance(machine, MaskingParty)
    nothing_opened(masking)
    assert machine.handle(SumReceived("z", smaller.body))  # another U2 is another transcript: see the test below
    assert machine._masking != _masking_of(masking, "p000", message)


def _masking_of(masking: Masking, name: str, message: Message) -> bytes:
    right = next(m for m in masking.messages("shares", to_server=False) if m.receiver == name)
    masking.parties[name].handle(SumReceived("z", right.body))
    machine = masking.parties[name]
    assert isinstance(machine, MaskingParty)
    return machine._masking


def test_other_sets_of_sharing_parties_end_in_nothing() -> None:
    """Who was told of another U2 has other masks, and its consent is to another transcript: none of both sides gets
    enough of them."""
    masking = Masking(4)
    masking.contribute()
    told: list[Message] = []

    def change(message: Message) -> list[Message]:
        if not message.to_server and message.stage == "shares" and message.receiver in ("p000", "p001"):
            told.append(chosen(message, ["p000", "p001", "p002"]))
            return told[-1:]
        return [message]

    masking.change = change
    masking.pump()
    assert {type(error) for _, _, error in masking.refused} == {BadSignature}  # of vectors, at an honest coordinator
    with pytest.raises(QuorumLost):
        masking.expire()
    nothing_opened(masking)
    # A coordinator that goes on all the same:
    consents = {}
    for name in ALL:
        machine = masking.parties[name]
        survivors = ["p000", "p001", "p002"] if name in ("p000", "p001") else ["p000", "p001", "p002", "p003"]
        sent = machine.handle(SumReceived("z", Payload({"stage": "survivors", "parties": survivors})))
        consents[name] = sent[-1].body.tensors["signature"].tobytes()
    for name in ALL:
        machine = masking.parties[name]
        assert isinstance(machine, MaskingParty)
        signatures = {one: consents[one] for one in machine._survivors}
        message = with_consents(Message("z", name, Payload(), False), signatures)
        refused(masking, message, InconsistentView, "has not signed")
    nothing_opened(masking)


# --- attempts ---------------------------------------------------------------------------------------------------


def test_who_has_answered_in_one_attempt_declines_in_the_next() -> None:
    first = Masking(4)
    first.run()
    lasting = {name: {"answered": first.kept[name]["answered"]} for name in ALL}
    second = Masking(4, attempt=2, kept=lasting)
    second.contribute()
    second.pump()
    assert [type(error) for _, _, error in second.refused] == [PeerViolation] * len(second.refused)
    assert len(second.refused) >= 3 and "attempt 1" in str(second.refused[0][2])
    assert {one.stage for one in second.sent if one.sender in ALL[:3]} == {"declined"}
    with pytest.raises(QuorumLost):
        second.expire()
    nothing_opened(second)
    for message in first.sent:  # whatever it is told: it says nothing more
        if not message.to_server:
            assert second.parties[message.receiver].handle(SumReceived("z", message.body)) == []


def test_a_declined_party_is_left_out_when_too_few_had_answered() -> None:
    first = Masking(5, change=dies(names_of(5)[1:], "unmask"))
    first.contribute()
    with pytest.raises(QuorumLost):
        first.finish()
    answered = [name for name in first.names if "answered" in first.kept[name] and answers_of(first, name)]
    lasting = {"p000": {"answered": first.kept["p000"]["answered"]}}
    assert "p000" in answered
    second = Masking(5, attempt=2, kept=lasting)
    total = second.run()
    assert total.missing == ("p000",)
    check_exact(second, second.names[1:])


# --- bits -------------------------------------------------------------------------------------------------------


def flipped(message: Message, tensor: str, bit: int) -> Message:
    array = message.body.tensors[tensor]
    raw = bytearray(array.tobytes())
    raw[bit // 8 % len(raw)] ^= 1 << (bit % 8)
    return changed(message, **{tensor: np.frombuffer(bytes(raw), array.dtype).reshape(array.shape)})


TO_SERVER = [
    ("keys", "keys"),
    ("keys", "signature"),
    ("masked", "words"),
    ("masked", "wide"),
    ("masked", "signature"),
    ("consent", "signature"),
    ("unmask", "shares"),
    ("unmask", "signature"),
]
FROM_SERVER = {
    ("keys", "keys"): (InconsistentView, UnsafeRequest, PeerViolation),
    ("keys", "signatures"): (InconsistentView,),
    ("shares", "sealed"): (BadSeal,),
    ("consents", "signatures"): (InconsistentView,),
}


def bits_of(message: Message, tensor: str) -> list[int]:
    """Some of every row: the first and last bits, and one of every fourth byte in between."""
    size = 8 * message.body.tensors[tensor].nbytes
    return sorted({0, 7, size - 1, size - 8, *range(3, size, 8 * 4 + 1)})


@pytest.mark.parametrize(("stage", "tensor"), TO_SERVER)
def test_one_flipped_bit_on_the_way_to_the_coordinator(stage: str, tensor: str) -> None:
    masking, message = stopped_at(stage, "z")
    for bit in bits_of(message, tensor):
        refused(masking, flipped(message, tensor, bit), BadSignature)
    refused(masking, replace(message, sender="p002" if message.sender != "p002" else "p003"), BadSignature)
    goes_on(masking, message)


@pytest.mark.parametrize(("stage", "tensor"), list(FROM_SERVER))
def test_one_flipped_bit_on_the_way_from_the_coordinator(stage: str, tensor: str) -> None:
    masking, message = stopped_at(stage)
    expected = FROM_SERVER[stage, tensor]
    machine = masking.parties["p001"]
    for bit in bits_of(message, tensor):
        with pytest.raises(expected):
            machine.handle(SumReceived("z", flipped(message, tensor, bit).body))
    nothing_opened(masking, "p001")
    goes_on(masking, message)


def test_a_flipped_bit_in_sealed_shares_is_found_by_their_receiver() -> None:
    """The coordinator cannot read them; the party they are for is lost to the round, and to nothing else."""
    masking = Masking(4)
    masking.contribute()
    message = masking.until("shares", "z")
    masking.queue.appendleft(flipped(message, "sealed", 5))
    masking.pump()
    assert [(who, type(error)) for who, _, error in masking.refused] == [("p001", BadSeal)]
    masking.finish()
    check_exact(masking, [name for name in ALL if name != "p001"])


def test_fields_that_were_changed() -> None:
    masking, message = stopped_at("keys", "z")
    refused(masking, changed(message, {"sums": ["other"]}), BadSignature)
    refused(masking, changed(message, {"sums": ["b", "a"]}), PeerViolation, "sorted list")
    refused(masking, changed(message, {"sums": ["a"] * 2}), PeerViolation, "sorted list")
    refused(masking, changed(message, {"sums": [f"{n:03d}" for n in range(65)]}), PeerViolation, "at most 64")
    refused(masking, changed(message, {"sums": ["x" * 201]}), PeerViolation, "sorted list")
    refused(masking, changed(message, {"sums": [""]}), PeerViolation, "sorted list")
    refused(masking, changed(message, {"weight": 3.0}), PeerViolation, "not what belongs there")
    goes_on(masking, message)
    masking, message = stopped_at("keys")
    sums = message.body.fields["sums"]
    refused(masking, changed(message, {"sums": [["other"], *sums[1:]]}), InconsistentView)
    refused(masking, changed(message, {"sums": sums[1:]}), PeerViolation, "one list for each")
    goes_on(masking, message)


# --- lies about shares ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["other secret", "noise", "too large", "of the key", "moved"])
def test_a_wrong_share_is_found_out_and_never_added(how: str) -> None:
    """A corrupt party signs what it likes; the secrets were settled before, by public keys and commitments."""
    masking, message = stopped_at("unmask", "z", count=4)
    name = message.sender
    machine = masking.parties[name]
    assert isinstance(machine, MaskingParty)
    rows = [row.tobytes() for row in message.body.tensors["shares"]]
    point = ALL.index(name) + 1
    wrong = {
        "other secret": split(bytes(32), threshold=3, points=[1, 2, 3, 4], random=bytes(32))[point - 1],
        "noise": b"\0" + hashlib.shake_256(b"noise").digest(65),
        "too large": b"\xff" * 66,
        "of the key": hashlib.shake_256(b"key").digest(66),
        "moved": ((int.from_bytes(rows[2], "big") + 1) % (2**521 - 1)).to_bytes(66, "big"),
    }[how]
    rows[2] = wrong
    text = unmask_text(machine._masking, name, machine._survivors, rows)
    signature = identity_of(name).sign(text, purpose="secagg unmask")
    lie = changed(
        message,
        shares=np.frombuffer(b"".join(rows), np.uint8).reshape(4, 66),
        signature=np.frombuffer(signature, np.uint8).reshape(1, 64),
    )
    masking.queue.appendleft(lie)
    with pytest.raises(ProtectionError, match="p002"):
        masking.finish()
    assert masking.total is None


def test_a_share_that_moves_a_secret_by_one_is_found_out() -> None:
    """All shares lie on a polynomial, and what they hide is 32 bytes: only the commitment, or the public key, tells."""
    check_lying_share_found()
    check_lying_share_found("p003")


# --- nonsense ---------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([*ALL, "z", "p004", ""]) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
SHAPES = [(), (0,), (1,), (22,), (1, 64), (1, 96), (4, 64), (4, 96), (3, 148), (4, 66), (4, 16), (1 << 16,)]
NAMES = ["keys", "signature", "signatures", "sealed", "words", "wide", "shares", "x"]
DTYPES = ["<u4", "u1", "<i4", "<f4", "<f8", "<u8", "bool"]
TENSORS = st.builds(
    lambda dtype, shape: np.zeros(shape, dtype),
    st.sampled_from(DTYPES),
    st.sampled_from(
        [(), (0,), (1,), (22,), (1, 64), (1, 96), (4, 64), (4, 96), (3, 148), (4, 66), (4, 16), (1 << 16,)]
    ),
)
STAGE_NAMES = ["keys", "shares", "masked", "consent", "unmask", "declined", "survivors", "consents"]
BODIES = st.builds(
    lambda stage, fields, tensors: Payload({**fields, "stage": stage}, tensors),
    st.sampled_from(STAGE_NAMES) | JSON,
    st.dictionaries(st.sampled_from(["parties", "sums", "attempt", "x"]), JSON, max_size=3),
    st.dictionaries(
        st.sampled_from(["keys", "signature", "signatures", "sealed", "words", "wide", "shares", "x"]),
        TENSORS,
        max_size=4,
    ),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    bodies=st.lists(BODIES, min_size=1, max_size=6),
    at=st.integers(0, 30),
    stage=st.sampled_from(["", "fields", "tensors"]),
    tensor=TENSORS,
    value=JSON,
)
def test_nonsense_is_refused_and_changes_nothing(
    bodies: list[Payload], at: int, stage: str, tensor: Array, value: Any
) -> None:
    """Whatever comes at whatever moment: an error of the tree, and the sum goes on to its exact end. Half of it is
    made of the right message, with one part of it exchanged."""
    masking = Masking(4)
    masking.contribute()
    for _ in range(min(at, 24)):
        if masking.queue:
            masking.deliver(masking.queue.popleft())
    if stage and masking.queue:
        right = masking.queue[0]
        if stage == "fields":
            bodies = [Payload({**right.body.fields, key: value}, right.body.tensors) for key in right.body.fields]
        else:
            bodies = [Payload(right.body.fields, {**right.body.tensors, key: tensor}) for key in right.body.tensors]
    heard = {body_bytes(m.body) for m in masking.sent}
    for body in bodies:
        if body_bytes(body) in heard:
            continue
        for machine in (masking.server, *masking.parties.values()):
            sender = "p000" if machine is masking.server else "z"
            before = _outside(machine)
            try:
                actions = machine.handle(SumReceived(sender, body))
            except FateError:
                pass
            else:
                assert actions == []
            assert _outside(machine) == before
    if masking.total is None:
        masking.finish()
    check_exact(masking)


def _nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("depth", [300, 5000])
@pytest.mark.parametrize("name", ["stage", "parties", "sums", "attempt", "x"])
def test_what_is_nested_without_end_is_an_error_of_the_tree(name: str, depth: int) -> None:
    """A peer's JSON may be nested as deeply as the reader's stack was when it was read, which is not this one."""
    for stage in STAGE_NAMES:
        masking, _ = stopped_at("keys")
        body = Payload({"stage": stage, "parties": ALL, "sums": [[]], name: _nested(depth)})
        for machine, sender in ((masking.server, "p000"), (masking.parties["p001"], "z")):
            with pytest.raises(FateError):
                machine.handle(SumReceived(sender, body))


def test_large_lists_are_refused_without_much_work() -> None:
    masking, message = stopped_at("survivors")
    refused(masking, changed(message, {"parties": [f"p{n}" for n in range(50_000)]}), UnsafeRequest)
    refused(masking, changed(message, {"parties": ["p001"] * 50_000}), UnsafeRequest, "twice")
    refused(masking, changed(message, {"parties": ["x" * 100_000]}), UnsafeRequest)
    goes_on(masking, message)


@pytest.mark.parametrize("stage", ["keys", "shares", "masked", "unmask"])
def test_a_second_different_message_of_a_party_is_refused(stage: str) -> None:
    masking, message = stopped_at(stage, "z")
    masking.deliver(message)
    assert masking.server.handle(SumReceived(message.sender, message.body)) == []
    other = flipped(message, "sealed" if stage == "shares" else "signature", 100)
    refused(masking, other, PeerViolation, "second, different")
    refused(masking, replace(message, sender="z"), PeerViolation, "not a contributor")
    masking.finish()
    check_exact(masking)


def test_stages_of_the_other_side_are_refused() -> None:
    masking, message = stopped_at("survivors")
    for stage in ("masked", "consent", "unmask", "declined"):
        refused(masking, replace(message, body=Payload({"stage": stage})), PeerViolation, "not for a contributor")
    for stage in ("survivors", "consents"):
        body = Payload({"stage": stage})
        refused(masking, Message("p001", "z", body, True), PeerViolation, "not for a coordinator")
    goes_on(masking, message)
