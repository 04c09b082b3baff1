"""Boxes that only one party can open: HPKE (RFC 9180, base mode, one message a box) under that party's standing key.

The suite is one and the same for all: the hybrid KEM of ML-KEM-768 and X25519 that is known as X-Wing (id 0x647a),
HKDF-SHA256, AES-256-GCM. A box recorded today stays closed if either half holds. A key in words: 32 secret bytes, which
SHAKE256 expands to the seed of the ML-KEM key (64) and the X25519 key (32), as in draft-connolly-cfrg-xwing-kem; the
public key is ML-KEM's (1184 bytes) and X25519's (32), one after the other.

    box = X-Wing ciphertext (1088 of ML-KEM, 32 of X25519), content under AES-256-GCM, tag (16)

What a box does not say: who made it. Anybody with the public key can, so the caller signs (`protocols.control`). Nor
is there forward secrecy: whoever gets the secret bytes opens every box ever made for them; what trains a model is
under the ephemeral keys of its job (`security.agreement`), and never in one of these.

`label` is what the box is and belongs to: it is not in the box, and needed again to open it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass, field
from typing import Final

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)

from fate_llm.core.errors import BadSeal, ConfigurationError, InternalError, MissingExtra

from .randomness import random_bytes

__all__ = ["LARGEST_CONTENT", "OVERHEAD", "PUBLIC_BYTES", "SECRET_BYTES", "SealingKey", "SealingPublic"]

SECRET_BYTES: Final = 32
PUBLIC_BYTES: Final = 1216
OVERHEAD: Final = 1088 + 32 + 16  # bytes that a box is longer than its content
LARGEST_CONTENT: Final = 64 * 1024 * 1024  # bytes in one box
_KEM: Final = 1184
_SEED: Final = 64
_TEXT: Final = "mlkem768x25519:"
_LETTERS: Final = 1622  # of base64url, for 1216 bytes
_DOMAIN: Final = b"fate_llm/1 sealed box\0"


class SealingKey:
    """The secret half. Its `repr` shows nothing of it."""

    def __init__(self, secret: bytes) -> None:
        """secret: 32 bytes.

        Raises:
            ConfigurationError: another length.
            MissingExtra: the installed `cryptography` has no ML-KEM.
        """
        if len(secret) != SECRET_BYTES:
            raise ConfigurationError(
                f"the secret of a sealing key has {len(secret)} bytes; it needs {SECRET_BYTES}",
                hint="Restore the file from its backup, or make a new one and give the card to all partners again.",
            )
        self._secret = bytes(secret)
        wide = hashlib.shake_256(self._secret).digest(_SEED + 32)
        try:
            kem = MLKEM768PrivateKey.from_seed_bytes(wide[:_SEED])
        except UnsupportedAlgorithm:
            raise _no_kem() from None
        x25519 = X25519PrivateKey.from_private_bytes(wide[_SEED:])
        self._key = MLKEM768X25519PrivateKey(kem, x25519)
        raw = kem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()
        self._public = SealingPublic(raw)

    @classmethod
    def generate(cls) -> SealingKey:
        """A new key out of the operating system's randomness."""
        return cls(random_bytes(SECRET_BYTES))

    @classmethod
    def from_bytes(cls, secret: bytes) -> SealingKey:
        """What `to_bytes` gave.

        Raises:
            ConfigurationError: not 32 bytes.
        """
        return cls(secret)

    def to_bytes(self) -> bytes:
        """The 32 secret bytes: whoever has them reads what others sealed for this party."""
        return self._secret

    @property
    def public(self) -> SealingPublic:
        """The half that goes into everybody's roster."""
        return self._public

    def open(self, sealed: bytes | memoryview, *, label: bytes) -> bytes:
        """What was sealed for this key under the same label.

        Raises:
            BadSeal: anything else; nothing of it is released.
        """
        size = len(sealed) - OVERHEAD
        if not 0 <= size <= LARGEST_CONTENT:
            raise BadSeal(f"{len(sealed)} bytes are no sealed box: {OVERHEAD} to {OVERHEAD + LARGEST_CONTENT}")
        try:
            return _SUITE.decrypt(sealed, self._key, info=_DOMAIN + label)
        except (InvalidTag, ValueError):  # ValueError: should the library ever say more of a bad point
            raise BadSeal(
                f"a sealed box of {len(sealed)} bytes does not open: it was changed, or made for another key or use"
            ) from None

    def __repr__(self) -> str:
        return f"SealingKey(for {self._public!r})"


@dataclass(frozen=True, repr=False)
class SealingPublic:
    """The public half. raw: 1216 bytes.

    Raises:
        ConfigurationError: another length, or bytes that no secret can belong to.
    """

    raw: bytes
    _key: MLKEM768X25519PublicKey = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.raw) != PUBLIC_BYTES:
            raise ConfigurationError(
                f"a public sealing key of {len(self.raw)} bytes; it has {PUBLIC_BYTES}", hint=_COPY_AGAIN
            )
        try:
            kem = MLKEM768PublicKey.from_public_bytes(self.raw[:_KEM])
            x25519 = X25519PublicKey.from_public_bytes(self.raw[_KEM:])
            # Scalars are multiples of 8: a point of low order gives zeros with this one as with any other, and then
            # the library raises.
            X25519PrivateKey.from_private_bytes(bytes(32)).exchange(x25519)
        except UnsupportedAlgorithm:
            raise _no_kem() from None
        except ValueError:
            raise ConfigurationError(
                "a public sealing key that belongs to no secret: it was damaged, or made up", hint=_COPY_AGAIN
            ) from None
        object.__setattr__(self, "_key", MLKEM768X25519PublicKey(kem, x25519))

    @classmethod
    def from_text(cls, text: str) -> SealingPublic:
        """The key out of `mlkem768x25519:` and 1622 characters of base64url, in its one valid spelling.

        Raises:
            ConfigurationError: anything else; the text is not repeated, it may be a secret pasted by mistake.
        """
        if not text.startswith(_TEXT):
            raise ConfigurationError(
                f"a public sealing key starts with {_TEXT!r}; this text does not", hint=_COPY_AGAIN
            )
        letters = text.removeprefix(_TEXT)
        if len(letters) != _LETTERS:
            found = f"{_LETTERS} characters after {_TEXT!r}, not {len(letters)}"
            raise ConfigurationError(f"a public sealing key has {found}", hint=_COPY_AGAIN)
        try:
            raw = base64.b64decode(letters + "==", altchars=b"-_", validate=True)
        except (ValueError, binascii.Error):
            raise ConfigurationError(
                "a public sealing key has letters, digits, `-` and `_` only", hint=_COPY_AGAIN
            ) from None
        found_key = cls(raw)
        if found_key.to_text() != text:
            raise ConfigurationError(
                "a public sealing key not in its one valid spelling: its end was changed", hint=_COPY_AGAIN
            )
        return found_key

    def to_text(self) -> str:
        """`mlkem768x25519:` and 1622 characters of base64url: what stands in a roster."""
        return _TEXT + base64.urlsafe_b64encode(self.raw).decode("ascii").rstrip("=")

    def seal(self, plaintext: bytes | memoryview, *, label: bytes) -> bytes:
        """A new box with `plaintext`, OVERHEAD bytes longer; other bytes each time.

        Raises:
            InternalError: more than LARGEST_CONTENT bytes.
        """
        if len(plaintext) > LARGEST_CONTENT:
            raise InternalError(f"{len(plaintext)} bytes to seal in one box; at most {LARGEST_CONTENT}")
        return _SUITE.encrypt(plaintext, self._key, info=_DOMAIN + label)

    def __repr__(self) -> str:
        return f"SealingPublic({hashlib.sha256(self.raw).hexdigest()[:16]}...)"


_COPY_AGAIN: Final = "Ask that party for its card again: `fate_llm party card`."
_SUITE: Final = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


def _no_kem() -> MissingExtra:
    return MissingExtra(
        "the installed `cryptography` has no ML-KEM-768",
        hint="Install the wheel of `cryptography` that fate_llm asks for, not one of the distribution.",
    )
