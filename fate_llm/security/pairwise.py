"""Keys for the masks of one sum: X25519 (RFC 7748) between two contributors, HKDF-SHA256 (RFC 5869) after it.

Rules:
 1. What X25519 gives is never a key: `derive` turns it into one, with the digest of the transcript as salt, so that
    parties who do not agree on everything said before have different keys.
 2. A label and the parts after it each stand after their length: no two lists of them give the same bytes.
 3. Public keys have one spelling. Those of low order, whose secret is 0 with everybody, are refused, and so are
    those not below 2^255 - 19, which are second names of others.

Who a key belongs to is not settled here: the protocol has it signed.
"""

from __future__ import annotations

import struct
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from fate_llm.core.errors import BadSeal, InternalError, PeerViolation

__all__ = ["PUBLIC_BYTES", "SEAL_BYTES", "SECRET_BYTES", "MaskKey", "derive", "expand", "open_once", "seal_once"]

PUBLIC_BYTES: Final = 32
SECRET_BYTES: Final = 32
SEAL_BYTES: Final = 16  # that a seal adds
_NONCE: Final = bytes(12)
_FIELD: Final = 2**255 - 19
_LONGEST: Final = 255 * 32  # bytes that HKDF-SHA256 can give


class MaskKey:
    """One contributor's key pair of one sum; its secret is what others hold shares of."""

    def __init__(self, secret: bytes) -> None:
        """secret: 32 bytes; the same secret is the same key.

        Raises:
            InternalError: another length.
        """
        if len(secret) != SECRET_BYTES:
            raise InternalError(f"a secret key of {len(secret)} bytes; X25519 has {SECRET_BYTES}")
        self._secret = bytes(secret)
        self._key = X25519PrivateKey.from_private_bytes(self._secret)
        self._public = self._key.public_key().public_bytes_raw()

    @property
    def secret(self) -> bytes:
        """The 32 bytes it was made of: whoever has them can make this contributor's pair masks."""
        return self._secret

    @property
    def public(self) -> bytes:
        """The 32 bytes for everybody."""
        return self._public

    def agree(self, public: bytes) -> bytes:
        """The 32 bytes shared with whoever has the secret of `public`; only to be given to `derive`.

        Raises:
            PeerViolation: bytes that are no public key, a second name of one, one of low order, or our own.
        """
        if len(public) != PUBLIC_BYTES:
            raise PeerViolation(f"a public key of {len(public)} bytes; X25519 has {PUBLIC_BYTES}")
        if int.from_bytes(public, "little") >= _FIELD:
            raise PeerViolation("a public key that is not below 2^255 - 19: a second name of another one")
        if public == self._public:
            raise PeerViolation("a public key that is our own: somebody sends it back to us")
        try:
            return self._key.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError:  # the library's word for a shared secret of zeros
            raise PeerViolation("a public key of low order: its secret with everybody is 0") from None

    def __repr__(self) -> str:
        return f"MaskKey({self._public.hex()[:16]}...)"


def derive(shared: bytes, *parts: bytes, salt: bytes, label: str, length: int = 32) -> bytes:
    """A key out of what `agree` gave: HKDF with the digest of the transcript as `salt`, info as in `expand`.

    Raises:
        InternalError: less than 32 bytes, a salt or label that is empty, or a length out of range.
    """
    if len(shared) < SECRET_BYTES:
        raise InternalError(f"a shared secret of {len(shared)} bytes; at least {SECRET_BYTES} needed")
    if not salt:
        raise InternalError(f"no salt for {label!r}: the digest of the transcript is needed")
    return HKDF(SHA256(), _length(length), salt, _info(label, parts)).derive(shared)


def expand(secret: bytes, label: str, *parts: bytes, length: int = 32) -> bytes:
    """`length` bytes out of a secret that is uniform already (HKDF's second half).

    info = the label in UTF-8 and each part, each after its length (4 bytes, big endian).

    Raises:
        InternalError: a secret of less than 32 bytes, an empty label, or a length out of range.
    """
    if len(secret) < SECRET_BYTES:
        raise InternalError(f"a secret of {len(secret)} bytes to expand; at least {SECRET_BYTES} needed")
    return HKDFExpand(SHA256(), _length(length), _info(label, parts)).derive(secret)


def seal_once(key: bytes, text: bytes, context: bytes) -> bytes:
    """AES-256-GCM under a key (32 bytes) that seals this one text and no other; 16 bytes more than the text.

    context: what the text belongs to; not written, but needed again to open.
    """
    return AESGCM(key).encrypt(_NONCE, text, context)


def open_once(key: bytes, sealed: bytes, context: bytes) -> bytes:
    """What `seal_once` was given under the same key and context.

    Raises:
        BadSeal: anything else.
    """
    try:
        return AESGCM(key).decrypt(_NONCE, sealed, context)
    except InvalidTag:
        raise BadSeal(f"{len(sealed)} bytes do not open: they were changed or belong elsewhere") from None


def _info(label: str, parts: tuple[bytes, ...]) -> bytes:
    if not label:
        raise InternalError("a key without a label: keys for different uses would be the same")
    return b"".join(struct.pack(">I", len(part)) + part for part in (label.encode("utf-8"), *parts))


def _length(length: int) -> int:
    if not 1 <= length <= _LONGEST:
        raise InternalError(f"{length} bytes of key; from 1 to {_LONGEST}")
    return length
