"""What an attacker tries on a sum under CKKS, and how each attempt ends: in a named error, with nothing opened."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fate_llm.core.canonical import canonical_json
from fate_llm.core.errors import (
    BadSignature,
    ConfigurationError,
    FateError,
    InconsistentView,
    InternalError,
    PeerViolation,
    PolicyError,
    ProtectionError,
    QuorumLost,
    UnsafeRequest,
)
from fate_llm.core.interfaces import SumContribute, SumExpired, SumReceived, SumSend
from fate_llm.core.values import Cohort, Payload, SumFloor
from fate_llm.protocols.homomorphic.agreed import UPLOAD, context_statement, upload_statement
from fate_llm.protocols.homomorphic.messages import Form, ciphertexts_digest, message, pack
from fate_llm.protocols.sums.ckks import CkksSum
from fate_llm.security.ckks import PublicContext, SecretContext
from tests.protocols.homomorphic_sums import (
    COORDINATOR,
    HOLDER,
    NAMES,
    Sum,
    changed,
    flipped,
    quicken,
    require_within_bound,
    scene_of,
    seed,
    signer,
    update,
)

pytest.importorskip("tenseal")

TERMS = {p: update(0.1 * k, weight=float(k), n=2.0 * k) for k, p in enumerate(NAMES, 1)}


@pytest.fixture(autouse=True)
def quick_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)


def terms(count: int = 3) -> dict[str, Any]:
    return {p: TERMS[p] for p in NAMES[:count]}


def until(run: Sum, stage: str, count: int = 1) -> None:
    """Let messages go on until so many of this stage have been sent."""
    if not run.sent:
        for party in run.parties:
            run.contribute(party, TERMS[party])
    while len(run.said(stage)) < count:
        run.step()


def first(run: Sum, stage: str, sender: str | None = None) -> Payload:
    return run.said(stage, sender)[0][2]


# --- changed on the way ------------------------------------------------------------------------------------------


def on(stage: str, party: str, change: Callable[[Payload], Payload]) -> Callable[..., Payload]:
    def touch(sender: str, receiver: str, body: Payload) -> Payload:
        return change(body) if body.fields["stage"] == stage and party in (sender, receiver) else body

    return touch


UPLOADS: dict[str, Callable[[Payload], Payload]] = {
    "a bit of the first ciphertext": lambda body: flipped(body, "ciphertexts", 500),
    "a bit of its end": lambda body: flipped(body, "ciphertexts", -1),
    "a byte less": lambda body: Payload(body.fields, {"ciphertexts": body.tensors["ciphertexts"][:-1]}),
    "no byte": lambda body: Payload(body.fields, {"ciphertexts": body.tensors["ciphertexts"][:0]}),
    "another type": lambda body: Payload(body.fields, {"ciphertexts": body.tensors["ciphertexts"].view(np.int8)}),
    "two dimensions": lambda body: Payload(body.fields, {"ciphertexts": body.tensors["ciphertexts"].reshape(1, -1)}),
    "another tensor": lambda body: Payload(body.fields, {"words": np.zeros(1, np.int32)}),
    "a tensor more": lambda body: Payload(body.fields, {**body.tensors, "more": np.zeros(1)}),
    "no tensor": lambda body: Payload(body.fields),
    "a bit of the signature": lambda body: changed(body, signature=_other_digit(body.fields["signature"])),
    "no signature": lambda body: changed(body, signature=""),
    "a signature in capitals": lambda body: changed(body, signature="A" * 128),
    "a signature that is no text": lambda body: changed(body, signature=7),
    "another chunk": lambda body: changed(body, chunk=1),
    "chunk -1": lambda body: changed(body, chunk=-1),
    "chunk true": lambda body: changed(body, chunk=False),
    "other sizes": lambda body: changed(body, sizes=[1]),
    "a negative size": lambda body: changed(body, sizes=[-5]),
    "sizes as text": lambda body: changed(body, sizes=["131217"]),
    "no sizes": lambda body: changed(body, sizes=[]),
    "a field more": lambda body: changed(body, more=1),
    "a field less": lambda body: Payload({"stage": "upload", "chunk": 0}, body.tensors),
    "another stage": lambda body: changed(body, stage="next"),
    "no stage": lambda body: Payload({}, body.tensors),
}


def _other_digit(text: str) -> str:
    return ("1" if text[0] == "0" else "0") + text[1:]


@pytest.mark.parametrize("which", sorted(UPLOADS))
def test_an_upload_that_was_changed_is_refused_and_the_real_one_is_still_taken(which: str) -> None:
    run = Sum()
    until(run, "upload", 3)
    sender, _, body, _ = run.said("upload")[0]
    with pytest.raises(PeerViolation):
        run.server.handle(SumReceived(sender, UPLOADS[which](body)))
    run.run()
    assert run.total is not None
    assert run.total.contributors == ("a", "b", "c")


READY: dict[str, dict[str, Any]] = {
    "another job": {"binding": "0" * 64},
    "another layout": {"layout": "0" * 64},
    "another model": {"state": "0" * 64},
    "names out of order": {"names": ["n", "a"]},
    "a name twice": {"names": ["n", "n"]},
    "a name that is none": {"names": [1]},
    "too many names": {"names": [f"{k:04d}" for k in range(1001)]},
    "a floor that is no number": {"floor": 3.0},
    "a floor that is true": {"floor": True},
    "a field more": {"more": 1},
}


@pytest.mark.parametrize("which", sorted(READY))
def test_a_party_that_speaks_of_another_sum_is_left_out(which: str) -> None:
    run = Sum(4, quorum=3)
    run.touch = on("ready", "b", lambda body: changed(body, **READY[which]))
    run.contribute("b", TERMS["b"])
    sender, _, body, _ = run.waiting.popleft()
    with pytest.raises(PeerViolation):
        run.server.handle(SumReceived(sender, body))
    assert "b" in run.server.awaiting
    assert run.of({p: TERMS[p] for p in "acd"}).missing == ("b",)


def test_a_party_with_another_model_is_named_with_the_reason() -> None:
    run = Sum(4, scenes={"b": {"state": {"w": np.ones(3, np.float32)}}})
    run.contribute("b", TERMS["b"])
    with pytest.raises(PeerViolation, match="b takes part in another sum: another global state"):
        run.run()


@pytest.mark.parametrize("stage", ["ready", "upload"])
def test_a_message_twice_is_refused_and_counts_once(stage: str) -> None:
    run = Sum()
    until(run, stage, 3)
    sender, receiver, body, holder = next(m for m in run.waiting if m[2].fields["stage"] == stage)
    run.waiting.remove((sender, receiver, body, holder))
    run.deliver(sender, receiver, body, holder)
    with pytest.raises(PeerViolation):
        run.deliver(sender, receiver, body, holder)
    run.run()
    assert run.total is not None
    assert run.total.weight == 6.0


def test_strangers_are_not_heard() -> None:
    run = Sum()
    until(run, "upload", 3)
    upload = first(run, "upload", "a")
    for sender in ("h", HOLDER, COORDINATOR, "stranger"):
        with pytest.raises(PeerViolation, match="not a contributor"):
            run.server.handle(SumReceived(sender, upload))
    with pytest.raises(PeerViolation, match="not the key holder"):
        run.server.handle(SumReceived("a", first(run, "keys"), from_holder=True))
    with pytest.raises(PeerViolation, match="not the coordinator"):
        run.parties["a"].handle(SumReceived("b", first(run, "context")))
    with pytest.raises(PeerViolation, match="only the coordinator"):
        run.holder.handle(SumReceived("a", first(run, "ask")))


def test_one_partys_upload_is_not_anothers() -> None:
    run = Sum()
    until(run, "upload", 3)
    with pytest.raises(BadSignature):
        run.server.handle(SumReceived("b", first(run, "upload", "a")))


# --- keys --------------------------------------------------------------------------------------------------------


def given_context(run: Sum, body: Payload, party: str = "a") -> Any:
    return run.parties[party].handle(SumReceived(COORDINATOR, body))


def test_a_coordinator_that_gives_out_keys_of_its_own() -> None:
    run = Sum()
    until(run, "context", 3)
    own = SecretContext.generate().public
    said = context_statement(run.server._binding, own.digest)
    forged = changed(
        Payload(first(run, "context").fields, {"context": np.frombuffer(own.to_bytes(), np.uint8)}),
        signature=signer(COORDINATOR).sign(said, purpose="ckks context").hex(),
    )
    with pytest.raises(BadSignature):
        given_context(run, forged)
    assert run.said("upload") == []
    run.run()
    assert run.total is not None


def test_keys_with_a_bit_changed() -> None:
    run = Sum()
    until(run, "context", 3)
    for place in (10, 1000, 200_000, -1):
        with pytest.raises(BadSignature):
            given_context(run, flipped(first(run, "context"), "context", place))
    with pytest.raises(PeerViolation, match="no signature"):
        given_context(run, changed(first(run, "context"), signature="0"))


def test_a_signature_for_another_purpose_is_none() -> None:
    run = Sum()
    until(run, "context", 3)
    body = first(run, "context")
    public = PublicContext(body.tensors["context"].tobytes())
    said = context_statement(run.server._binding, public.digest)
    with pytest.raises(BadSignature):
        given_context(run, changed(body, signature=signer(HOLDER).sign(said, purpose=UPLOAD).hex()))


@pytest.mark.parametrize("change", [{"round": 2}, {"attempt": 2}, {"job": "job-2"}, {"conversation": "tune/x/1"}])
def test_keys_of_another_sum_are_not_used(change: dict[str, Any]) -> None:
    # Given keys that the key holder signed, but for another round, attempt, job or conversation
    other = Sum(scenes={"": change}) if "round" not in change else Sum(round=2)
    until(other, "context", 3)
    run = Sum()
    until(run, "context", 3)
    # When the coordinator brings them
    with pytest.raises(InconsistentView, match="keys for another sum"):
        given_context(run, first(other, "context"))
    # And when it says that they were for this one
    with pytest.raises(BadSignature):
        given_context(run, changed(first(other, "context"), binding=run.server._binding))


@pytest.mark.parametrize("change", [{"cohort": Cohort(("a", "b", "c", "d"), COORDINATOR, 3)}, {"job": "job-2"}])
def test_a_key_holder_that_was_told_of_another_sum_makes_no_keys(change: dict[str, Any]) -> None:
    run = Sum(scenes={HOLDER: change})
    with pytest.raises(InconsistentView, match="keys of another sum"):
        until(run, "keys")


def test_parties_with_other_parameters_do_not_sum() -> None:
    run = Sum(scenes={})
    run.parties["b"] = CkksSum(CkksSum.Params(clip=0.5)).party(run.scene("b"))
    run.contribute("b", TERMS["b"])
    with pytest.raises(PeerViolation, match="other parties, parameters, job or round"):
        run.run()


def test_the_coordinator_checks_keys_before_it_hands_them_out() -> None:
    run = Sum()
    until(run, "keys")
    good = first(run, "keys")
    own = SecretContext.generate()
    bad = [
        flipped(good, "context", 1000),
        changed(good, binding="0" * 64),
        changed(good, signature="00" * 64),
        Payload(good.fields, {"context": np.frombuffer(own.public.to_bytes(), np.uint8)}),
        Payload(good.fields, {"context": np.zeros(300_000, np.uint8)}),
    ]
    for body in bad:
        with pytest.raises(PeerViolation):
            run.server.handle(SumReceived(HOLDER, body, from_holder=True))
    run.server.handle(SumReceived(HOLDER, good, from_holder=True))
    with pytest.raises(PeerViolation, match="second time"):
        run.server.handle(SumReceived(HOLDER, good, from_holder=True))


def test_a_key_holder_that_sends_its_secret_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even signed: what is private is not handed on, and nobody encrypts under it."""
    run = Sum()
    until(run, "keys")
    raw = run.holder._keys.secret.to_bytes()
    monkeypatch.setattr("fate_llm.protocols.homomorphic.messages.CONTEXT_BYTES", 10**6)
    monkeypatch.setattr("fate_llm.security.ckks.CONTEXT_BYTES", 10**6)
    said = context_statement(run.server._binding, hashlib.sha256(raw).hexdigest())
    body = message(
        "keys",
        {"context": np.frombuffer(raw, np.uint8)},
        binding=run.server._binding,
        signature=signer(HOLDER).sign(said, purpose="ckks context").hex(),
    )
    with pytest.raises(PeerViolation, match="secret key"):
        run.server.handle(SumReceived(HOLDER, body, from_holder=True))


def test_no_message_holds_a_byte_of_the_secret_key() -> None:
    run = Sum()
    run.of(terms())
    secret = run.holder._keys.secret
    whole, public = secret.to_bytes(), secret.public.to_bytes()
    pieces = [whole[start : start + 48] for start in range(0, len(whole) - 48, 4096)]
    pieces = [piece for piece in pieces if piece not in public]
    assert len(pieces) > 20
    for _, _, body, _ in run.sent:
        raw = canonical_json(dict(body.fields)) + b"".join(t.tobytes() for t in body.tensors.values())
        assert not any(piece in raw for piece in pieces)
        for tensor in body.tensors.values():
            assert whole not in tensor.tobytes()


def test_keys_are_new_for_every_round_attempt_job_and_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    run = Sum()
    run.of(terms())
    seen = {first(run, "keys").tensors["context"].tobytes()}
    for change in ({"attempt": 2}, {"job": "job-2"}, {"conversation": "tune/final/1"}):
        other = Sum(scenes={"": change})
        other.of(terms())
        seen.add(first(other, "keys").tensors["context"].tobytes())
    following = Sum(round=2, holder=run.holder)
    following.of(terms())
    seen.add(first(following, "keys").tensors["context"].tobytes())
    assert len(seen) == 5


def test_old_keys_are_gone_when_new_ones_are_made() -> None:
    run = Sum()
    run.of(terms())
    following = Sum(round=2, holder=run.holder)
    following.of(terms())
    assert set(following.kept[HOLDER]) == {"keys", "answered.2"}, "the new keys replace the old ones"
    with pytest.raises(PeerViolation, match="no keys"):
        run.holder.handle(SumReceived(COORDINATOR, first(run, "open")))
    with pytest.raises(PeerViolation, match="round 2 has begun"):
        run.holder.handle(SumReceived(COORDINATOR, first(run, "ask")))


# --- what a key holder opens -------------------------------------------------------------------------------------


def asked(count: int = 3, **settings: Any) -> tuple[Sum, Payload]:
    """A sum whose opening has been asked for and not been answered."""
    run = Sum(count, **settings)
    until(run, "open")
    return run, first(run, "open")


def refuse(run: Sum, body: Payload, error: type[FateError], match: str) -> None:
    before = dict(run.holder._answered)
    with pytest.raises(error, match=match):
        run.holder.handle(SumReceived(COORDINATOR, body))
    assert run.holder._answered == before
    assert run.said("opened") == []


def with_total(body: Payload, **fields: Any) -> Payload:
    return changed(body, total={**body.fields["total"], **fields})


@pytest.mark.parametrize("parties", [["a"], ["a", "b"], []])
def test_a_sum_of_too_few_is_not_opened(parties: list[str]) -> None:
    run, body = asked()
    floors = [[party, 3] for party in parties]
    lie = changed(
        with_total(body, floors=floors), uploads={p: u for p, u in body.fields["uploads"].items() if p in parties}
    )
    refuse(run, lie, UnsafeRequest, f"a sum of {len(parties)} parties is to be opened; at least 3")
    run.run()
    assert run.total is not None


def test_a_sum_below_the_key_holders_own_floor_is_not_opened() -> None:
    run = Sum(4, quorum=3, scenes={HOLDER: {"floor": SumFloor(contributors=4)}})
    with pytest.raises(UnsafeRequest, match="at least 4"):
        run.of({p: TERMS[p] for p in "abc"})


def test_a_sum_below_the_floor_of_one_in_it_is_not_opened() -> None:
    """Nobody's floor can be lowered: it is in what the party signs."""
    scenes = {"b": {"floor": SumFloor(contributors=4)}}
    run = Sum(4, quorum=3, scenes=scenes)
    with pytest.raises(QuorumLost, match="the protection needs 4"):
        run.of({p: TERMS[p] for p in "abc"})
    # a coordinator that asks nevertheless
    run, body = asked(4, scenes=scenes)
    assert ["b", 4] in body.fields["total"]["floors"]
    rest = {p: u for p, u in body.fields["uploads"].items() if p in "abc"}
    lie = changed(with_total(body, floors=[["a", 3], ["b", 4], ["c", 3]]), uploads=rest)
    refuse(run, lie, UnsafeRequest, "at least 4")
    refuse(run, changed(with_total(lie, floors=[["a", 3], ["b", 3], ["c", 3]])), BadSignature, "signature")


TOTALS: dict[str, tuple[dict[str, Any], type[FateError], str]] = {
    "a stranger in it": ({"floors": [["a", 3], ["b", 3], ["h", 3]]}, UnsafeRequest, "do not contribute"),
    "another order": ({"floors": [["b", 3], ["a", 3], ["c", 3]]}, UnsafeRequest, "do not contribute"),
    "one twice": ({"floors": [["a", 3], ["a", 3], ["b", 3]]}, PeerViolation, "twice"),
    "no floors": ({"floors": ["a", "b", "c"]}, PeerViolation, "no contributors"),
    "a floor that is true": ({"floors": [["a", True], ["b", 3], ["c", 3]]}, PeerViolation, "no contributors"),
    "other keys": ({"context": "0" * 64}, PeerViolation, "other keys"),
}


@pytest.mark.parametrize("which", sorted(TOTALS))
def test_a_total_that_is_not_the_rounds(which: str) -> None:
    fields, error, match = TOTALS[which]
    run, body = asked()
    refuse(run, with_total(body, **fields), error, match)
    run.run()
    assert run.total is not None


FORMS: dict[str, dict[str, Any]] = {
    "more values": {"values": 8},
    "fewer values": {"values": 6},
    "negative values": {"values": -1},
    "values that are true": {"values": True},
    "values without end": {"values": 2**60},
    "other names": {"names": ["m"]},
    "no names": {"names": []},
    "names out of order": {"names": ["n", "m"]},
    "another layout": {"layout": "0" * 64},
    "a field more": {"more": 0},
}


@pytest.mark.parametrize("which", sorted(FORMS))
def test_a_form_that_its_contributors_did_not_sign(which: str) -> None:
    run, body = asked()
    refuse(run, with_total(body, form={**body.fields["total"]["form"], **FORMS[which]}), PeerViolation, ".")
    run.run()
    assert run.total is not None


def test_uploads_that_are_not_shown_or_not_signed() -> None:
    run, body = asked()
    shown = body.fields["uploads"]
    refuse(run, changed(body, uploads={p: shown[p] for p in "ab"}), UnsafeRequest, "does not show")
    refuse(run, changed(body, uploads={**shown, "h": shown["a"]}), UnsafeRequest, "does not show")
    refuse(run, changed(body, uploads={**shown, "b": shown["a"]}), BadSignature, "signature")
    refuse(run, changed(body, uploads={**shown, "b": ["0" * 64, shown["b"][1]]}), BadSignature, "signature")
    refuse(run, changed(body, uploads={**shown, "b": shown["b"][0]}), PeerViolation, "shows no upload of b")
    refuse(run, changed(body, uploads={**shown, "b": [shown["b"][0], "x"]}), PeerViolation, "no signature")


def test_uploads_of_an_earlier_round_are_none_of_this_one() -> None:
    # Given a round that was summed, and the next one, in which `c` has not uploaded
    run = Sum()
    run.of(terms())
    following, body = asked(round=2, holder=run.holder)
    lie = {**body.fields["uploads"], "c": first(run, "open").fields["uploads"]["c"]}
    refuse(following, changed(body, uploads=lie), BadSignature, "signature")


def test_an_upload_of_an_earlier_round_is_not_taken_again() -> None:
    run = Sum()
    run.of(terms())
    following = Sum(round=2, holder=run.holder)
    until(following, "upload", 3)
    with pytest.raises(BadSignature):
        following.server.handle(SumReceived("a", first(run, "upload", "a")))


def test_a_second_opening_of_other_parties_is_refused() -> None:
    """The difference of the two would be a single party's term."""
    # Given a sum of four that was opened
    run, body = asked(4, quorum=3)
    run.run()
    assert run.total is not None
    # When the coordinator asks for that of three of them
    rest = {p: u for p, u in body.fields["uploads"].items() if p != "d"}
    floors = [entry for entry in body.fields["total"]["floors"] if entry[0] != "d"]
    lie = changed(with_total(body, floors=floors), uploads=rest)
    with pytest.raises(UnsafeRequest, match="another sum of it is not"):
        run.holder.handle(SumReceived(COORDINATOR, lie))


def test_a_second_opening_of_another_ciphertext_is_refused() -> None:
    run, body = asked()
    run.run()
    context = run.server._context
    assert context is not None
    sizes, tensor = pack(context.encrypt(np.ones(20, np.int64)))
    lie = Payload({**body.fields, "sizes": sizes}, {"ciphertexts": tensor})
    with pytest.raises(UnsafeRequest, match="another sum of it is not"):
        run.holder.handle(SumReceived(COORDINATOR, lie))


def test_the_same_request_gets_the_same_bytes() -> None:
    run, body = asked()
    run.run()
    again = run.holder.handle(SumReceived(COORDINATOR, body))
    assert [type(action) for action in again] == [SumSend], "it is written down already"
    answer, before = again[0].body, first(run, "opened")
    assert answer.fields == before.fields
    assert answer.tensors["words"].tobytes() == before.tensors["words"].tobytes()


def test_a_round_that_was_opened_is_not_opened_in_a_later_attempt() -> None:
    run = Sum(4)
    run.of(terms(4))
    lasting = {name: keep.body for name, keep in run.kept[HOLDER].items() if keep.lasting}
    assert set(lasting) == {"answered.1"}
    later = Sum(4, quorum=3, scenes={"": {"attempt": 2}})
    later.holder = CkksSum().holder(later.holder_scene(), seed(HOLDER), lasting)
    with pytest.raises(UnsafeRequest, match="was opened in attempt 1"):
        later.of({p: TERMS[p] for p in "abc"})
    # the rounds after it are open to it
    following = Sum(4, round=2, holder=later.holder, scenes={"": {"attempt": 2}})
    assert following.of(terms(4)).contributors == tuple("abcd")


def test_chunks_are_opened_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fate_llm.protocols.homomorphic.messages.CHUNK", 1)
    layout = {"w": (9000,)}
    run = Sum(scenes={"": {"layout": layout, "state": {}}})
    for party in "abc":
        run.contribute(party, replace(update(), arrays={"w": np.zeros(9000, np.float32)}))
    until(run, "open", 2)
    refuse(run, run.said("open")[1][2], PeerViolation, "before chunk 0")
    refuse(run, changed(first(run, "open"), chunk=3), PeerViolation, "chunk 3 of 3")
    refuse(run, changed(first(run, "open"), chunk=-1), PeerViolation, "chunk -1 of 3")
    run.run()
    assert run.total is not None


@pytest.mark.parametrize("number", [0, -1, 2**40])
def test_rounds_that_are_none(number: int) -> None:
    run, body = asked()
    refuse(run, changed(body, round=number), PeerViolation, "round")
    refuse(run, changed(first(run, "ask"), round=number), PeerViolation, "round")
    refuse(run, changed(body, round=7), PeerViolation, "no keys")


def test_what_is_opened_is_signed_and_what_is_not_is_not_believed() -> None:
    run = Sum()
    until(run, "opened")
    good = first(run, "opened")
    bad = [
        flipped(good, "words", 1),
        changed(good, signature="00" * 64),
        changed(good, numbers=["0" * 32, "0" * 32]),
        changed(good, numbers=good.fields["numbers"][:1]),
        changed(good, numbers=[1, 2]),
        changed(good, numbers=["A" * 32, "0" * 32]),
        changed(good, chunk=1),
        Payload(good.fields, {"words": good.tensors["words"][:-1]}),
        Payload(good.fields, {"words": good.tensors["words"].astype(np.int64)}),
    ]
    for body in bad:
        with pytest.raises(PeerViolation):
            run.server.handle(SumReceived(HOLDER, body, from_holder=True))
    with pytest.raises(PeerViolation):
        run.server.handle(SumReceived(HOLDER, good))  # not as the key holder
    run.run()
    assert run.total is not None


def test_nothing_is_opened_before_it_is_asked_for() -> None:
    other, run = Sum(), Sum()
    other.of(terms())
    until(run, "upload")
    with pytest.raises(PeerViolation, match="was not asked for"):
        run.server.handle(SumReceived(HOLDER, first(other, "opened"), from_holder=True))


# --- contributors that do not keep to it -------------------------------------------------------------------------


def forged_upload(run: Sum, party: str, ciphertexts: list[bytes]) -> Payload:
    """An upload of `party`, rightly signed, of whatever it likes."""
    context, form = run.server._context, run.server._form
    assert context is not None
    assert isinstance(form, Form)
    said = upload_statement(run.server._binding, context.digest, form.digest, 3, 0, ciphertexts_digest(ciphertexts))
    sizes, tensor = pack(ciphertexts)
    return message(
        "upload",
        {"ciphertexts": tensor},
        chunk=0,
        sizes=sizes,
        signature=signer(party).sign(said, purpose=UPLOAD).hex(),
    )


def numbers(run: Sum, values: list[int], limbs: list[int] | None = None, rest: list[int] | None = None) -> np.ndarray:
    """Whole numbers of a term: limbs of the weight and one number, seven values, then slots that are to be empty."""
    head = [*(limbs or [0] * 16)]
    return np.array([*head, *values, *(rest or [])], np.int64)


def run_with_a_liar(change: Callable[[Sum, PublicContext], list[bytes]]) -> Sum:
    run = Sum()
    until(run, "upload", 3)
    context = run.server._context
    assert context is not None
    lie = forged_upload(run, "b", change(run, context))
    run.waiting = type(run.waiting)((s, r, lie if s == "b" else body, h) for s, r, body, h in run.waiting)
    return run


LIARS: dict[str, tuple[Callable[[Sum, PublicContext], list[bytes]], str]] = {
    "a limb out of range": (
        lambda run, context: context.encrypt(numbers(run, [0] * 7, [2**20, *[0] * 15])),
        "weights or additive numbers",
    ),
    "a negative limb": (
        lambda run, context: context.encrypt(numbers(run, [0] * 7, [0, -(2**17), *[0] * 14])),
        "weights or additive numbers",
    ),
    "numbers in empty slots": (
        lambda run, context: context.encrypt(numbers(run, [0] * 7, rest=[0, 0, 1])),
        "slots where no term has any",
    ),
    "other keys": (
        lambda run, context: SecretContext.generate().public.encrypt(numbers(run, [0] * 7)),
        "above|not whole",
    ),
    "half steps": (
        lambda run, context: [_halves(context)],
        "not whole",
    ),
}


def _halves(context: PublicContext) -> bytes:
    import tenseal

    return bytes(tenseal.ckks_vector(context._context, tenseal.plain_tensor(np.full(4096, 0.5))).serialize())


@pytest.mark.parametrize("which", sorted(LIARS))
def test_a_sum_with_a_liars_numbers_is_not_released(which: str) -> None:
    change, match = LIARS[which]
    run = run_with_a_liar(change)
    with pytest.raises(ProtectionError, match=match):
        run.run()
    assert run.said("opened") == []
    # and there is no second look
    with pytest.raises(PeerViolation, match="no keys"):
        run.holder.handle(SumReceived(COORDINATOR, first(run, "open")))


def test_a_value_beyond_the_clip_is_seen_where_the_sum_of_all_shows_it() -> None:
    """Of a cohort of eight only three are there: their sum is at most three times the clip."""
    run = Sum(8, quorum=3)
    for party in "abc":
        run.contribute(party, TERMS[party])
    run.run()
    run.act(COORDINATOR, run.server.handle(SumExpired()))
    until(run, "upload", 3)
    assert run.server._context is not None
    most = 3 * (2**31 // 8)
    lie = forged_upload(run, "b", run.server._context.encrypt(numbers(run, [most + 10**6] * 7)))
    run.waiting = type(run.waiting)((s, r, lie if s == "b" else body, h) for s, r, body, h in run.waiting)
    with pytest.raises(ProtectionError, match="with each value within the clip it is at most"):
        run.run()
    assert run.said("opened") == []


def test_ciphertexts_that_are_none_are_refused_although_they_are_signed() -> None:
    run = Sum(4, quorum=3)
    until(run, "upload", 4)
    with pytest.raises(PeerViolation, match="CKKS ciphertext of 0 numbers"):
        run.server.handle(SumReceived("b", forged_upload(run, "b", [b"x" * 1000])))
    with pytest.raises(PeerViolation, match="1 are due"):
        run.server.handle(SumReceived("b", forged_upload(run, "b", [b"x", b"x"])))


# --- a coordinator that does not keep to it ----------------------------------------------------------------------


def test_a_coordinator_that_asks_out_of_turn_or_names_no_sums() -> None:
    run = Sum()
    until(run, "context", 3)
    with pytest.raises(PeerViolation, match="where 'context' is due"):
        given_context(run, message("next", have=1))
    for names in (["n", "a"], ["n", "n"], [f"{k:04d}" for k in range(1001)]):
        with pytest.raises(PeerViolation, match="sums of z"):
            given_context(run, changed(first(run, "context"), names=names))
    assert run.said("upload") == []


def test_a_coordinator_that_takes_what_was_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fate_llm.protocols.homomorphic.messages.CHUNK", 1)
    layout = {"w": (20_000,)}
    run = Sum(scenes={"": {"layout": layout, "state": {}}})
    for party in "abc":
        run.contribute(party, replace(update(), arrays={"w": np.zeros(20_000, np.float32)}))
    until(run, "upload", 1)
    for have in (0, -1, 3, 2**40, True):
        with pytest.raises(PeerViolation):
            run.parties["a"].handle(SumReceived(COORDINATOR, message("next", have=have)))
    run.run()
    assert run.total is not None


def test_a_party_says_nothing_more_when_its_term_is_out() -> None:
    run = Sum()
    run.of(terms())
    for body in (first(run, "context"), message("next", have=1)):
        with pytest.raises(PeerViolation, match="term is sent"):
            given_context(run, body)
    with pytest.raises(PeerViolation, match="term is new"):
        given_context(Sum(), first(run, "context"))


def test_a_coordinator_that_lies_about_what_it_added_is_not_found_out() -> None:
    """What this protection does not do, and the manual says so: it would have `a` opened by itself."""
    run, body = asked()
    sizes, tensor = pack([bytes(first(run, "upload", "a").tensors["ciphertexts"])])
    lie = Payload({**body.fields, "sizes": sizes}, {"ciphertexts": tensor})
    answer = run.holder.handle(SumReceived(COORDINATOR, lie))[-1]
    weight = int(answer.body.fields["numbers"][0], 16) / 2**40
    assert weight == TERMS["a"].weight


# --- roles and policies ------------------------------------------------------------------------------------------


def sides(**changes: Any) -> list[Callable[[], Any]]:
    """Making each of the machines."""
    params = changes.pop("params", CkksSum.Params())
    protection = CkksSum(params)
    count = changes.pop("count", 3)
    return [
        lambda: protection.party(scene_of("a", count, **changes)),
        lambda: protection.server(scene_of(COORDINATOR, count, **changes)),
        lambda: protection.holder(scene_of(changes.get("key_holder") or HOLDER, count, **changes), seed("x")),
    ]


@pytest.mark.parametrize("side", [0, 1, 2])
def test_roles_with_which_nothing_is_hidden(side: int) -> None:
    with pytest.raises(ConfigurationError, match="needs a party in the role key_holder"):
        sides(key_holder=None)[side]()
    with pytest.raises(ProtectionError, match="could open every one"):
        sides(key_holder=COORDINATOR)[side]()
    with pytest.raises(ProtectionError, match="a contributes and would hold the key"):
        sides(key_holder="a", count=4)[side]()
    with pytest.raises(ProtectionError, match="could open every one"):
        sides(key_holder=COORDINATOR, params=CkksSum.Params(shared_key=True))[side]()
    with pytest.raises(InternalError, match="no signer"):
        sides(signer=None)[side]()
    with pytest.raises(ProtectionError, match="2 parties contribute to a sum under ckks, 3 are needed"):
        sides(count=2)[side]()
    with pytest.raises(ConfigurationError, match="clip"):
        sides(params=CkksSum.Params(clip=1e30))[side]()


@pytest.mark.parametrize("side", [0, 1, 2])
def test_a_partys_policy_is_a_floor(side: int) -> None:
    with pytest.raises(PolicyError, match="3 parties contribute to a sum under ckks, 5 are needed"):
        sides(floor=SumFloor(contributors=5))[side]()
    with pytest.raises(PolicyError, match=r"clip is 1; the policy of \w allows 0.5"):
        sides(floor=SumFloor(clip=0.5))[side]()
    sides(floor=SumFloor(contributors=3, clip=1.0))[side]()
    # no policy makes two parties safe
    with pytest.raises(ProtectionError, match="3 are needed"):
        sides(floor=SumFloor(contributors=2), count=2)[side]()


def test_a_key_holder_that_contributes_does_not_count() -> None:
    shared = CkksSum.Params(shared_key=True)
    with pytest.raises(ProtectionError, match="3 parties contribute to a sum under ckks, 4 are needed"):
        sides(key_holder="a", params=shared)[0]()
    with pytest.raises(InternalError, match="not the key holder"):
        CkksSum(shared).holder(scene_of("b", 4, key_holder="a"), seed("b"))


def test_a_shared_key_sums_as_well() -> None:
    """The key holder hears and says two kinds of things: as contributor, and as key holder."""
    run = Sum(4, params=CkksSum.Params(shared_key=True), key_holder="a")
    assert run.server.least == 4
    total = run.of(terms(4))
    require_within_bound(total, terms(4).values())
    assert total.contributors == tuple("abcd")
    with pytest.raises(QuorumLost, match="the protection needs 4"):
        Sum(4, quorum=3, params=CkksSum.Params(shared_key=True), key_holder="a").of(terms(3))


def test_a_coordinator_that_contributes_does_not_count() -> None:
    cohort = Cohort(("a", "b", "c"), "a", 3)
    with pytest.raises(ProtectionError, match="3 parties contribute to a sum under ckks, 4 are needed"):
        CkksSum().party(scene_of("b", cohort=cohort))
    four = Cohort(("a", "b", "c", "d"), "a", 3)
    server = CkksSum().server(scene_of("a", cohort=four))
    assert server.least == 4


def test_events_that_are_for_nobody() -> None:
    run = Sum()
    odd: Any = object()
    for machine in (run.server, run.parties["a"], run.holder):
        with pytest.raises(PeerViolation):
            machine.handle(odd)
    with pytest.raises(PeerViolation):
        run.parties["a"].handle(SumExpired())
    with pytest.raises(PeerViolation):
        run.server.handle(SumContribute(TERMS["a"], seed("a")))
    with pytest.raises(InternalError, match="not a contributor"):
        CkksSum().party(scene_of("h"))
    with pytest.raises(InternalError, match="31 bytes"):
        CkksSum().holder(scene_of(HOLDER), bytes(31))
