"""Identities: published vectors, one purpose per signature, keys that prove nothing refused, secrets not shown."""

from __future__ import annotations

import base64
import hashlib
import hmac

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from fate_llm.core.errors import BadSignature, ConfigurationError, InternalError
from fate_llm.security.identity import Identity, PublicIdentity

# RFC 8032, section 7.1, tests 1 to 3: secret, public, message, signature
RFC8032 = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
        "d25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c"
        "387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc659"
        "4a7c15e9716ed28dc027beceea1ec40a",
    ),
]

# --- Ed25519 as RFC 8032 section 5.1 writes it, apart from any library -------------------------------------------
P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P
Point = tuple[int, int]
NEUTRAL: Point = (0, 1)


def add(a: Point, b: Point) -> Point:
    k = D * a[0] * b[0] * a[1] * b[1] % P
    return (a[0] * b[1] + b[0] * a[1]) * pow(1 + k, -1, P) % P, (a[1] * b[1] + a[0] * b[0]) * pow(1 - k, -1, P) % P


def times(scalar: int, point: Point) -> Point:
    result = NEUTRAL
    while scalar:
        if scalar & 1:
            result = add(result, point)
        point, scalar = add(point, point), scalar >> 1
    return result


def with_y(y: int, sign: int) -> Point | None:
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    if x * x % P != square:
        x = x * pow(2, (P - 1) // 4, P) % P
    if x * x % P != square:
        return None
    return (P - x if x % 2 != sign and x else x), y


def point_of(raw: bytes) -> Point:
    number = int.from_bytes(raw, "little")
    point = with_y(number % 2**255, number >> 255)
    assert point is not None
    return point


def raw_of(point: Point) -> bytes:
    return (point[1] + ((point[0] & 1) << 255)).to_bytes(32, "little")


BASE = with_y(4 * pow(5, -1, P) % P, 0)
assert BASE is not None


def fits(public: bytes, signature: bytes, message: bytes) -> bool:
    challenge = int.from_bytes(hashlib.sha512(signature[:32] + public + message).digest(), "little") % L
    left = times(int.from_bytes(signature[32:], "little"), BASE)
    return left == add(point_of(signature[:32]), times(challenge, point_of(public)))


def small_order_points() -> set[Point]:
    """All eight points whose order divides 8: multiples of L times a point of full order."""
    for y in range(2, 100):
        point = with_y(y, 0)
        torsion = times(L, point) if point else NEUTRAL
        found = {times(k, torsion) for k in range(8)}
        if len(found) == 8:
            return found
    raise AssertionError("no point of full order")


# --- the tests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("secret", "public", "message", "signature"), RFC8032)
def test_the_check_above_and_the_public_keys_are_those_of_rfc_8032(
    secret: str, public: str, message: str, signature: str
) -> None:
    assert fits(bytes.fromhex(public), bytes.fromhex(signature), bytes.fromhex(message))
    assert not fits(bytes.fromhex(public), bytes.fromhex(signature), bytes.fromhex(message) + b"\0")
    assert Identity.from_bytes(bytes.fromhex(secret)).public.raw.hex() == public


def test_a_signature_is_one_over_the_domain_the_purpose_and_the_message() -> None:
    identity = Identity.from_bytes(bytes.fromhex(RFC8032[0][0]))
    signature = identity.sign(b"message", purpose="link hello")
    assert fits(identity.public.raw, signature, b"fate_llm/1 link hello\0message")
    assert not fits(identity.public.raw, signature, b"message")
    assert signature == identity.sign(b"message", purpose="link hello"), "signing is deterministic"
    identity.public.verify(signature, b"message", purpose="link hello")


def test_every_changed_bit_of_a_signature_is_refused() -> None:
    identity = Identity.generate()
    signature = identity.sign(b"m", purpose="p")
    for bit in range(8 * len(signature)):
        changed = bytearray(signature)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BadSignature):
            identity.public.verify(bytes(changed), b"m", purpose="p")


def test_a_signature_plus_the_group_order_is_refused() -> None:
    """The second form of the same signature, which a lax verifier takes (RFC 8032, 5.1.7)."""
    identity = Identity.generate()
    signature = identity.sign(b"m", purpose="p")
    other = signature[:32] + (int.from_bytes(signature[32:], "little") + L).to_bytes(32, "little")
    assert fits(identity.public.raw, other, b"fate_llm/1 p\0m"), "the equation holds; only the range check refuses"
    with pytest.raises(BadSignature):
        identity.public.verify(other, b"m", purpose="p")


@pytest.mark.parametrize("length", [0, 1, 63, 65, 128])
def test_a_signature_of_another_length_is_refused(length: int) -> None:
    identity = Identity.generate()
    signature = (identity.sign(b"m", purpose="p") * 2)[:length]
    with pytest.raises(BadSignature):
        identity.public.verify(signature, b"m", purpose="p")


def test_a_signature_for_another_purpose_message_or_party_is_refused() -> None:
    identity, other = Identity.generate(), Identity.generate()
    signature = identity.sign(b"m", purpose="p")
    for who, message, purpose in [
        (identity, b"m", "q"),
        (identity, b"m", "p "),
        (identity, b"mm", "p"),
        (identity, b"", "p"),
        (other, b"m", "p"),
    ]:
        with pytest.raises(BadSignature) as caught:
            who.public.verify(signature, message, purpose=purpose)
        assert who.public.to_text() in caught.value.message
        assert "fingerprints" in caught.value.hint


@given(st.text("abc ", min_size=1, max_size=4), st.binary(max_size=4), st.text("abc ", min_size=1, max_size=4))
def test_no_purpose_runs_into_the_message(purpose: str, message: bytes, other: str) -> None:
    """Given one signature, when purpose and message are cut elsewhere, then it does not fit."""
    identity = Identity.from_bytes(bytes(32))
    signature = identity.sign(message, purpose=purpose)
    if other == purpose:
        identity.public.verify(signature, message, purpose=other)
        return
    for moved in (message, purpose.encode() + b"\0" + message, b"\0" + message):
        with pytest.raises(BadSignature):
            identity.public.verify(signature, moved, purpose=other)


@pytest.mark.parametrize("purpose", ["", "a\0b", "ä", "a\n"])
def test_a_purpose_that_could_be_two_is_our_own_bug(purpose: str) -> None:
    identity = Identity.generate()
    with pytest.raises(InternalError, match="purpose"):
        identity.sign(b"", purpose=purpose)
    with pytest.raises(InternalError, match="purpose"):
        identity.public.verify(bytes(64), b"", purpose=purpose)
    with pytest.raises(InternalError, match="purpose"):
        identity.storage_key(purpose)


def test_bytes_that_are_no_point_never_verify() -> None:
    y = next(y for y in range(2, 100) if with_y(y, 0) is None)
    public = PublicIdentity(y.to_bytes(32, "little"))
    with pytest.raises(BadSignature):
        public.verify(bytes(64), b"", purpose="p")


def test_all_keys_of_low_order_are_refused_in_every_encoding() -> None:
    # Given: the eight points computed from the curve, both signs, and the encodings that are not reduced
    ys = {point[1] for point in small_order_points()}
    assert len(ys) == 5
    encoded = {y + (sign << 255) for y in ys | {y + P for y in ys if y + P < 2**255} for sign in (0, 1)}
    assert len(encoded) == 14
    # Then: none of them can be pinned
    for number in encoded:
        with pytest.raises(ConfigurationError, match="low order"):
            PublicIdentity(number.to_bytes(32, "little"))


def test_why_keys_of_low_order_are_refused() -> None:
    """Under the neutral point one made-up signature fits every message."""
    public, forged = raw_of(NEUTRAL), raw_of(times(5, BASE)) + (5).to_bytes(32, "little")
    assert fits(public, forged, b"pay") and fits(public, forged, b"anything")


def test_text_goes_there_and_back() -> None:
    for secret, public, _, _ in RFC8032:
        text = Identity.from_bytes(bytes.fromhex(secret)).public.to_text()
        letters = base64.urlsafe_b64encode(bytes.fromhex(public)).decode().rstrip("=")
        assert text == f"ed25519:{letters}"
        assert PublicIdentity.from_text(text).raw.hex() == public


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text.removeprefix("ed25519:"), "starts with"),
        (lambda text: text.replace("ed25519", "ED25519"), "starts with"),
        (lambda text: text[:-1], "not 42"),
        (lambda text: text + "=", "not 44"),
        (lambda text: text[:-1] + "\n", "letters, digits"),
        (lambda text: text[:20] + "+" + text[21:], "letters, digits|spelling"),
        (lambda text: text[:20] + "é" + text[21:], "letters, digits"),
        (lambda text: text[:-1] + chr(ord(text[-1]) + 1), "spelling"),
        (lambda text: " " + text, "starts with"),
        (lambda text: "", "starts with"),
        (lambda text: "ed25519:" + "A" * 43, "low order"),
    ],
)
def test_a_wrong_text_is_refused_and_not_repeated(change, says: str) -> None:
    text = Identity.from_bytes(bytes.fromhex(RFC8032[0][0])).public.to_text()
    wrong = change(text)
    assert wrong != text
    with pytest.raises(ConfigurationError, match=says) as caught:
        PublicIdentity.from_text(wrong)
    assert text[8:24] not in caught.value.message + caught.value.hint
    assert caught.value.hint


@given(st.binary(min_size=32, max_size=32))
def test_every_key_has_exactly_one_text(raw: bytes) -> None:
    try:
        public = PublicIdentity(raw)
    except ConfigurationError:
        return
    text = public.to_text()
    assert len(text) == 51
    assert PublicIdentity.from_text(text) == public
    for last in "AQgw048cZz_-":
        if last != text[-1]:
            try:
                other = PublicIdentity.from_text(text[:-1] + last)
            except ConfigurationError:
                continue
            assert other != public


@pytest.mark.parametrize("length", [0, 31, 33, 64])
def test_keys_of_another_length_are_refused(length: int) -> None:
    with pytest.raises(ConfigurationError, match=f"{length} bytes"):
        PublicIdentity(b"\x05" * length)
    with pytest.raises(ConfigurationError, match=f"{length} bytes"):
        Identity.from_bytes(b"\x05" * length)


def test_a_fingerprint_is_forty_digits_of_the_key_and_differs_between_keys() -> None:
    identity = Identity.generate()
    groups = identity.public.fingerprint.split(" ")
    assert len(groups) == 8 and all(len(group) == 5 and group.isdigit() for group in groups)
    whole = hashlib.sha256(b"fate_llm/1 fingerprint\0" + identity.public.raw).hexdigest()
    assert int("".join(groups)) == int(whole, 16) % 10**40
    assert len({Identity.generate().public.fingerprint for _ in range(20)}) == 20


def test_the_key_derivation_is_that_of_rfc_5869() -> None:
    """RFC 5869, A.1, through the primitive that is used."""
    okm = "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    salt, info = bytes(range(13)), bytes(range(0xF0, 0xFA))
    assert HKDF(algorithm=SHA256(), length=42, salt=salt, info=info).derive(b"\x0b" * 22).hex() == okm


def test_keys_for_files_are_derived_one_per_purpose_and_identity() -> None:
    seed = bytes(range(32))
    identity = Identity.from_bytes(seed)
    prk = hmac.digest(bytes(32), seed, "sha256")
    expected = hmac.digest(prk, b"fate_llm/1 storage\0fate_llm/1 journal\0\x01", "sha256")
    assert identity.storage_key("journal") == expected
    keys = {who.storage_key(purpose) for who in (identity, Identity.generate()) for purpose in ("journal", "journals")}
    assert len(keys) == 4 and seed not in keys


def test_an_identity_comes_back_from_its_bytes_and_each_new_one_differs() -> None:
    identity = Identity.generate()
    again = Identity.from_bytes(identity.to_bytes())
    assert again.public == identity.public
    again.public.verify(identity.sign(b"m", purpose="p"), b"m", purpose="p")
    assert len({Identity.generate().to_bytes() for _ in range(10)}) == 10


def test_nothing_that_is_printed_shows_the_secret() -> None:
    seed = bytes(range(100, 132))
    identity = Identity.from_bytes(seed)
    shown = f"{identity} {identity!r} {identity.public} {identity.public!r} {[identity]} {vars(identity.public)}"
    assert identity.public.to_text() in repr(identity)
    for secret in (seed.hex(), repr(seed)[2:-1], base64.urlsafe_b64encode(seed).decode()[:20]):
        assert secret not in shown
