"""Keys of a pair: against the RFCs, an independent derivation, and public keys made to harm."""

from __future__ import annotations

import hmac
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fate_llm.core.errors import BadSeal, InternalError, PeerViolation
from fate_llm.security.pairwise import (
    PUBLIC_BYTES,
    SEAL_BYTES,
    SECRET_BYTES,
    MaskKey,
    derive,
    expand,
    open_once,
    seal_once,
)

FIELD = 2**255 - 19
LOW_ORDER = {
    "0": bytes(32),
    "1": (1).to_bytes(32, "little"),
    "-1": (FIELD - 1).to_bytes(32, "little"),
    "order 8": bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    "the other of order 8": bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
}
SALT = bytes(range(32))
SECRETS = st.binary(min_size=32, max_size=32)


def hkdf(key: bytes, salt: bytes | None, info: bytes, length: int = 32) -> bytes:
    """RFC 5869; without a salt the second half alone."""
    pseudorandom = hmac.digest(salt, key, "sha256") if salt is not None else key
    found, block = b"", b""
    for counter in range(1, -(-length // 32) + 1):
        block = hmac.digest(pseudorandom, block + info + bytes([counter]), "sha256")
        found += block
    return found[:length]


def framed(*parts: bytes) -> bytes:
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


# --- X25519 --------------------------------------------------------------------------------------------------------


def test_agreeing_is_that_of_rfc_7748() -> None:
    """Section 5.2: the first vector, and the iteration from 9 on."""
    key = MaskKey(bytes.fromhex("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4"))
    shared = key.agree(bytes.fromhex("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c"))
    assert shared.hex() == "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"
    k = u = (9).to_bytes(32, "little")
    assert MaskKey(k).public.hex() == "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"
    for _ in range(1000):
        k, u = MaskKey(k).agree(u) if u[0] != 9 or any(u[1:]) else MaskKey(k).public, k
    assert k.hex() == "684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51"


@settings(max_examples=30, deadline=None)
@given(first=SECRETS, second=SECRETS)
def test_both_come_to_the_same_secret(first: bytes, second: bytes) -> None:
    one, other = MaskKey(first), MaskKey(second)
    if one.public == other.public:
        return
    assert one.agree(other.public) == other.agree(one.public)
    assert len(one.public) == PUBLIC_BYTES and one.secret == first and len(first) == SECRET_BYTES


def test_every_pair_has_a_secret_of_its_own() -> None:
    keys = [MaskKey(bytes([number]) * 32) for number in range(6)]
    secrets = {one.agree(other.public) for one, other in itertools.combinations(keys, 2)}
    assert len(secrets) == 15 and not secrets & {key.public for key in keys} | secrets & {key.secret for key in keys}


@pytest.mark.parametrize("point", LOW_ORDER.values(), ids=LOW_ORDER)
def test_a_key_of_low_order_is_refused(point: bytes) -> None:
    with pytest.raises(PeerViolation, match="low order"):
        MaskKey(SALT).agree(point)


@pytest.mark.parametrize("number", [*range(FIELD, 2**255), 2**255, 2**255 + 9, 2**256 - 1])
def test_a_second_name_of_a_key_is_refused(number: int) -> None:
    # The library would take them: 2^255 is 0 for it, and FIELD + 9 is 9.
    with pytest.raises(PeerViolation, match="second name"):
        MaskKey(SALT).agree(number.to_bytes(32, "little"))


def test_a_second_name_of_an_honest_key_is_refused() -> None:
    public = bytearray(MaskKey(bytes(32)).public)
    assert MaskKey(SALT).agree(bytes(public))
    public[31] |= 0x80
    with pytest.raises(PeerViolation, match="second name"):
        MaskKey(SALT).agree(bytes(public))


def test_our_own_key_sent_back_is_refused() -> None:
    key = MaskKey(SALT)
    with pytest.raises(PeerViolation, match="our own"):
        key.agree(MaskKey(SALT).public)


@pytest.mark.parametrize("length", [0, 1, 31, 33, 64])
def test_keys_of_another_length_are_refused(length: int) -> None:
    with pytest.raises(PeerViolation, match=f"{length} bytes; X25519 has 32"):
        MaskKey(SALT).agree(b"\x09" * length)
    with pytest.raises(InternalError, match=f"{length} bytes; X25519 has 32"):
        MaskKey(bytes(length))


def test_a_key_does_not_show_its_secret() -> None:
    key = MaskKey(SALT)
    for text in (repr(key), str(key), f"{key}", f"{[key]}"):
        assert SALT.hex() not in text and repr(SALT) not in text and key.public.hex()[:16] in text


def test_a_secret_given_in_a_buffer_is_copied() -> None:
    buffer = bytearray(SALT)
    key = MaskKey(buffer)
    buffer[:] = bytes(32)
    assert key.secret == SALT and key.public == MaskKey(SALT).public


# --- HKDF ----------------------------------------------------------------------------------------------------------


def test_the_reference_is_that_of_rfc_5869() -> None:
    """Appendix A.1, for the derivation the others are compared with."""
    info = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9")
    found = hkdf(b"\x0b" * 22, bytes(range(13)), info, 42)
    assert found.hex() == ("3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865")


@settings(max_examples=50, deadline=None)
@given(
    secret=st.binary(min_size=32, max_size=80),
    salt=st.binary(min_size=1, max_size=80),
    label=st.text(min_size=1, max_size=12),
    parts=st.lists(st.binary(max_size=20), max_size=4),
    length=st.integers(1, 200),
)
def test_keys_are_those_of_an_independent_derivation(
    secret: bytes, salt: bytes, label: str, parts: list[bytes], length: int
) -> None:
    info = framed(label.encode("utf-8"), *parts)
    assert expand(secret, label, *parts, length=length) == hkdf(secret, None, info, length)
    assert derive(secret, *parts, salt=salt, label=label, length=length) == hkdf(secret, salt, info, length)


def test_whatever_differs_gives_another_key() -> None:
    secret = bytes(32)
    keys = [
        expand(secret, "a"),
        expand(secret, "b"),
        expand(secret, "a", b""),
        expand(secret, "a", b"", b""),
        expand(secret, "a", b"xy"),
        expand(secret, "a", b"x", b"y"),
        expand(secret, "a", b"", b"xy"),
        expand(secret, "ax", b"y"),
        expand(secret, "axy"),
        expand(secret, "a", b"\0\0\0\1x"),
        expand(SALT, "a"),
        derive(secret, salt=SALT, label="a"),
        derive(secret, salt=SALT, label="b"),
        derive(secret, salt=bytes(32), label="a"),
        derive(secret, b"x", salt=SALT, label="a"),
        derive(SALT, salt=SALT, label="a"),
    ]
    assert len(set(keys)) == len(keys) and {len(key) for key in keys} == {32}


@pytest.mark.parametrize("length", [0, -1, 255 * 32 + 1])
def test_lengths_that_cannot_be(length: int) -> None:
    assert len(expand(SALT, "a", length=255 * 32)) == 255 * 32
    with pytest.raises(InternalError, match="from 1 to 8160"):
        expand(SALT, "a", length=length)
    with pytest.raises(InternalError, match="from 1 to 8160"):
        derive(SALT, salt=SALT, label="a", length=length)


def test_what_would_weaken_a_key_is_refused() -> None:
    with pytest.raises(InternalError, match="31 bytes to expand"):
        expand(SALT[1:], "a")
    with pytest.raises(InternalError, match="31 bytes"):
        derive(SALT[1:], salt=SALT, label="a")
    with pytest.raises(InternalError, match="digest of the transcript"):
        derive(SALT, salt=b"", label="a")
    for call in (lambda: expand(SALT, ""), lambda: derive(SALT, salt=SALT, label="")):
        with pytest.raises(InternalError, match="without a label"):
            call()


def test_what_is_sealed_once_opens_with_its_key_and_context_only() -> None:
    key, text, context = b"k" * 32, b"two shares", b"transcript"
    sealed = seal_once(key, text, context)
    assert len(sealed) == len(text) + SEAL_BYTES and text not in sealed
    assert open_once(key, sealed, context) == text
    wrong = [
        (b"l" * 32, sealed, context),
        (key, sealed, b"another"),
        (key, sealed[:-1], context),
        (key, bytes([sealed[0] ^ 1]) + sealed[1:], context),
        (key, b"", context),
    ]
    for other, body, about in wrong:
        with pytest.raises(BadSeal):
            open_once(other, body, about)
