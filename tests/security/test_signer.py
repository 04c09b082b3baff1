"""Signatures under the identities of a roster."""

from __future__ import annotations

import pytest

from fate_llm.core.canonical import digest
from fate_llm.core.errors import BadSignature, InternalError
from fate_llm.core.interfaces import Signer
from fate_llm.security.identity import Identity, PublicIdentity
from fate_llm.security.signer import RosterSigner

IDENTITIES = {name: Identity(bytes([number] * 32)) for number, name in enumerate("abc", start=1)}
ROSTER = {name: identity.public for name, identity in IDENTITIES.items()}


def signer(name: str, roster: dict[str, PublicIdentity] | None = None) -> RosterSigner:
    return RosterSigner(IDENTITIES[name], ROSTER if roster is None else roster)


def test_what_one_signs_the_others_check() -> None:
    found: Signer = signer("a")
    signature = found.sign(b"keys", purpose="sum keys")
    assert len(signature) == 64
    assert signature == signer("a").sign(b"keys", purpose="sum keys"), "the same bytes each time"
    for name in "abc":
        signer(name).verify("a", signature, b"keys", purpose="sum keys")


@pytest.mark.parametrize(
    ("party", "message", "purpose"),
    [("b", b"keys", "sum keys"), ("a", b"Keys", "sum keys"), ("a", b"keys", "sum survivors")],
)
def test_another_party_message_or_purpose_is_refused(party: str, message: bytes, purpose: str) -> None:
    signature = signer("a").sign(b"keys", purpose="sum keys")
    with pytest.raises(BadSignature):
        signer("c").verify(party, signature, message, purpose=purpose)


@pytest.mark.parametrize("at", range(0, 64, 7))
def test_each_changed_bit_is_refused(at: int) -> None:
    signature = bytearray(signer("a").sign(b"keys", purpose="p"))
    signature[at] ^= 1
    with pytest.raises(BadSignature):
        signer("b").verify("a", bytes(signature), b"keys", purpose="p")


@pytest.mark.parametrize("signature", [b"", b"\0" * 63, b"\0" * 65])
def test_a_signature_of_another_length_is_refused(signature: bytes) -> None:
    with pytest.raises(BadSignature):
        signer("b").verify("a", signature, b"keys", purpose="p")


def test_who_is_not_in_the_roster_cannot_sign_and_is_named() -> None:
    with pytest.raises(BadSignature, match="'stranger', who is in no line"):
        signer("a").verify("stranger", b"\0" * 64, b"keys", purpose="p")
    with pytest.raises(InternalError, match="in no line of the roster"):
        RosterSigner(Identity(bytes([9] * 32)), ROSTER)


def test_the_digest_is_of_every_name_with_its_key_in_whatever_order() -> None:
    # Given the same lines in another order
    turned = signer("b", dict(reversed(ROSTER.items())))
    # Then everybody has one digest, which is that of the canonical lines
    assert turned.roster == signer("a").roster
    assert turned.roster == digest({name: ROSTER[name].to_text() for name in sorted(ROSTER)})
    # And a party more or less, another name or exchanged keys make another
    others = [
        {"a": ROSTER["a"], "b": ROSTER["b"]},
        {**ROSTER, "d": Identity(bytes([4] * 32)).public},
        {"a": ROSTER["a"], "b": ROSTER["b"], "d": ROSTER["c"]},
        {"a": ROSTER["a"], "b": ROSTER["c"], "c": ROSTER["b"]},
    ]
    assert len({turned.roster, *(signer("a", roster).roster for roster in others)}) == 5


def test_what_changes_the_roster_later_changes_nothing_here() -> None:
    mine = dict(ROSTER)
    found = signer("a", mine)
    mine["b"] = ROSTER["c"]
    signature = signer("b").sign(b"x", purpose="p")
    found.verify("b", signature, b"x", purpose="p")


def test_its_repr_shows_no_secret() -> None:
    assert IDENTITIES["a"].to_bytes().hex() not in repr(signer("a"))
    assert "3 parties" in repr(signer("a"))
