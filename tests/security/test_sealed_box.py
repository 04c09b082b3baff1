"""Sealed boxes: what opens, what does not, and that they are X-Wing and RFC 9180 and nothing else."""

from __future__ import annotations

import base64
import hashlib
import hmac
import struct

import pytest
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from fate_llm.core.errors import BadSeal, ConfigurationError, InternalError
from fate_llm.security import sealed_box
from fate_llm.security.sealed_box import (
    LARGEST_CONTENT,
    OVERHEAD,
    PUBLIC_BYTES,
    SECRET_BYTES,
    SealingKey,
    SealingPublic,
)

KEY = SealingKey(bytes(range(32)))
OTHER = SealingKey(bytes(32))
LOW_ORDER = [
    bytes(32),
    bytes([1, *bytes(31)]),
    (2**255 - 19).to_bytes(32, "little"),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
]


# --- RFC 9180 and X-Wing by hand: the cross-check -------------------------------------------------------------------


def extract(salt: bytes, secret: bytes) -> bytes:
    return hmac.digest(salt or bytes(32), secret, "sha256")


def expand(key: bytes, info: bytes, size: int) -> bytes:
    found, block, number = b"", b"", 1
    while len(found) < size:
        block = hmac.digest(key, block + info + bytes([number]), "sha256")
        found, number = found + block, number + 1
    return found[:size]


SUITE = b"HPKE" + struct.pack(">HHH", 0x647A, 0x0001, 0x0002)  # X-Wing, HKDF-SHA256, AES-256-GCM


def schedule(shared: bytes, info: bytes) -> tuple[bytes, bytes]:
    """RFC 9180 section 5.1, mode_base: key and nonce of the first message."""

    def labeled_extract(salt: bytes, label: bytes, secret: bytes) -> bytes:
        return extract(salt, b"HPKE-v1" + SUITE + label + secret)

    def labeled_expand(key: bytes, label: bytes, context: bytes, size: int) -> bytes:
        return expand(key, struct.pack(">H", size) + b"HPKE-v1" + SUITE + label + context, size)

    context = b"\0" + labeled_extract(b"", b"psk_id_hash", b"") + labeled_extract(b"", b"info_hash", info)
    secret = labeled_extract(shared, b"secret", b"")
    return labeled_expand(secret, b"key", context, 32), labeled_expand(secret, b"base_nonce", context, 12)


def combine(of_kem: bytes, of_x25519: bytes, ciphertext: bytes, public: bytes) -> bytes:
    """X-Wing's combiner."""
    return hashlib.sha3_256(of_kem + of_x25519 + ciphertext + public + b"\\.//^\\").digest()


def halves(secret: bytes) -> tuple[MLKEM768PrivateKey, X25519PrivateKey]:
    wide = hashlib.shake_256(secret).digest(96)
    return MLKEM768PrivateKey.from_seed_bytes(wide[:64]), X25519PrivateKey.from_private_bytes(wide[64:])


def test_a_box_opens_by_hand() -> None:
    # Given a box, When X-Wing and RFC 9180 are computed from their parts
    sealed = KEY.public.seal(b"content", label=b"label")
    kem, x25519 = halves(KEY.to_bytes())
    point = X25519PublicKey.from_public_bytes(sealed[1088:1120])
    shared = combine(kem.decapsulate(sealed[:1088]), x25519.exchange(point), sealed[1088:1120], KEY.public.raw[1184:])
    key, nonce = schedule(shared, b"fate_llm/1 sealed box\0label")
    # Then it is what was sealed
    assert AESGCM(key).decrypt(nonce, sealed[1120:], b"") == b"content"


def test_a_box_made_by_hand_opens() -> None:
    of_kem, ciphertext = MLKEM768PublicKey.from_public_bytes(KEY.public.raw[:1184]).encapsulate()
    ephemeral = X25519PrivateKey.generate()
    point = ephemeral.public_key().public_bytes_raw()
    theirs = KEY.public.raw[1184:]
    shared = combine(of_kem, ephemeral.exchange(X25519PublicKey.from_public_bytes(theirs)), point, theirs)
    key, nonce = schedule(shared, b"fate_llm/1 sealed box\0label")
    box = ciphertext + point + AESGCM(key).encrypt(nonce, b"content", b"")
    assert KEY.open(box, label=b"label") == b"content"


def test_the_public_key_of_the_first_vector_of_x_wing() -> None:
    """draft-connolly-cfrg-xwing-kem, appendix C: the seed, what it expands to, and how its public key begins."""
    seed = bytes.fromhex("7f9c2ba4e88f827d616045507605853ed73b8093f6efbc88eb1a6eacfa66ef26")
    wide = "c44829d2b269887f6150dfaee5a25a704cbc607e57d18a2ffc8734633333cff0"
    assert hashlib.shake_256(seed).hexdigest(96).startswith(wide)
    starts = bytes.fromhex("e2236b35a8c24b39b10aa1323a96a919a2ced88400633a7b07131713fc14b2b5b19cfc3da5fa1a92c49f25")
    assert SealingKey.from_bytes(seed).public.raw.startswith(starts)


# --- boxes ----------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=3000), st.binary(max_size=300))
def test_what_was_sealed_opens_under_its_label(content: bytes, label: bytes) -> None:
    sealed = KEY.public.seal(content, label=label)
    assert len(sealed) == len(content) + OVERHEAD
    assert KEY.open(memoryview(sealed), label=label) == content
    for wrong in (label + b"\0", b"\0" + label, label[:-1] if label else b"x"):
        with pytest.raises(BadSeal):
            KEY.open(sealed, label=wrong)


def test_two_boxes_of_the_same_are_different() -> None:
    assert KEY.public.seal(b"x", label=b"") != KEY.public.seal(b"x", label=b"")


def test_no_byte_of_a_box_can_be_changed() -> None:
    sealed = bytearray(KEY.public.seal(b"content", label=b"label"))
    for at in range(len(sealed)):
        sealed[at] ^= 1 << (at % 8)
        with pytest.raises(BadSeal):
            KEY.open(bytes(sealed), label=b"label")
        sealed[at] ^= 1 << (at % 8)
    assert KEY.open(bytes(sealed), label=b"label") == b"content"


@pytest.mark.parametrize("size", [0, 1, 1088, OVERHEAD - 1, OVERHEAD, OVERHEAD + 6])
def test_a_box_that_was_cut_does_not_open(size: int) -> None:
    with pytest.raises(BadSeal):
        KEY.open(KEY.public.seal(b"content", label=b"")[:size], label=b"")


def test_nobody_else_opens_it() -> None:
    with pytest.raises(BadSeal, match="another key"):
        OTHER.open(KEY.public.seal(b"content", label=b""), label=b"")


@pytest.mark.parametrize("point", LOW_ORDER)
def test_an_ephemeral_point_of_low_order_is_a_bad_seal(point: bytes) -> None:
    sealed = KEY.public.seal(b"content", label=b"")
    with pytest.raises(BadSeal):
        KEY.open(sealed[:1088] + point + sealed[1120:], label=b"")


def test_a_box_has_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LARGEST_CONTENT >= 16 * 1024 * 1024 + 5, "words fit"
    sealed = KEY.public.seal(b"123456", label=b"")
    monkeypatch.setattr(sealed_box, "LARGEST_CONTENT", 5)
    assert KEY.open(KEY.public.seal(b"12345", label=b""), label=b"") == b"12345"
    with pytest.raises(InternalError, match="6 bytes to seal"):
        KEY.public.seal(b"123456", label=b"")
    with pytest.raises(BadSeal, match=f"{OVERHEAD + 6} bytes"):
        KEY.open(sealed, label=b"")


# --- keys -----------------------------------------------------------------------------------------------------------


def test_a_key_comes_back_from_its_bytes() -> None:
    key = SealingKey.generate()
    again = SealingKey.from_bytes(key.to_bytes())
    assert again.public == key.public and len(key.to_bytes()) == SECRET_BYTES
    assert again.open(key.public.seal(b"x", label=b"l"), label=b"l") == b"x"
    assert SealingKey.generate().to_bytes() != key.to_bytes()


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_a_secret_of_another_length_is_refused(size: int) -> None:
    with pytest.raises(ConfigurationError, match=f"has {size} bytes; it needs 32"):
        SealingKey(bytes(size))


def test_a_public_key_comes_back_from_its_text() -> None:
    text = KEY.public.to_text()
    assert text.startswith("mlkem768x25519:") and len(text) == len("mlkem768x25519:") + 1622
    found = SealingPublic.from_text(text)
    assert found == KEY.public and hash(found) == hash(KEY.public) and found != OTHER.public
    assert len(found.raw) == PUBLIC_BYTES
    assert KEY.open(found.seal(b"x", label=b""), label=b"") == b"x"


def respelled(text: str) -> str:
    """The same bytes, in the spelling with other unused bits at the end."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    return text[:-1] + letters[letters.index(text[-1]) ^ 1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.removeprefix("mlkem768"), "starts with"),
        (lambda text: text.upper(), "starts with"),
        (lambda text: text[:-1], "1622 characters"),
        (lambda text: text + "=", "1622 characters"),
        (lambda text: " " + text[1:], "starts with"),
        (lambda text: text[:100] + "+" + text[101:], "one valid spelling"),
        (lambda text: text[:100] + "!" + text[101:], "letters, digits"),
        (lambda text: text[:100] + "\n" + text[101:], "letters, digits"),
        (lambda text: text[:100] + "é" + text[101:], "letters, digits"),
        (respelled, "one valid spelling"),
    ],
)
def test_a_text_with_a_fault_is_refused_and_not_repeated(change: object, said: str) -> None:
    text = change(KEY.public.to_text())
    with pytest.raises(ConfigurationError, match=said) as caught:
        SealingPublic.from_text(text)
    assert text[20:60] not in str(caught.value) and "card" in caught.value.hint


@pytest.mark.parametrize("raw", [b"", bytes(1215), bytes(1217), b"\xff" * 1216, KEY.public.raw[:1184] + bytes(31)])
def test_bytes_that_are_no_public_key_are_refused(raw: bytes) -> None:
    with pytest.raises(ConfigurationError):
        SealingPublic(raw)


@pytest.mark.parametrize("point", LOW_ORDER)
def test_a_public_key_with_a_point_of_low_order_is_refused(point: bytes) -> None:
    """With it, the X25519 half of every box would be known to everybody."""
    with pytest.raises(ConfigurationError, match="belongs to no secret"):
        SealingPublic(KEY.public.raw[:1184] + point)


def test_no_text_shows_a_secret() -> None:
    shown = f"{KEY!r} {KEY} {KEY.public!r} {KEY.public}"
    secret = KEY.to_bytes()
    for spelling in (secret.hex(), base64.b64encode(secret).decode()[:40], repr(secret)[2:-1]):
        assert spelling not in shown
    assert len(shown) < 400, "a public key is too long for a log line"
