"""Who a party is: an Ed25519 key (RFC 8032) whose public half every other party pins in its roster.

A signature always names its purpose, so that one made for a hello is never one for a job specification. Keys for
files at rest come out of the same seed by HKDF-SHA256 (RFC 5869) under labels of their own; the seed itself
leaves an `Identity` only through `to_bytes`, for the one file the operator keeps safe.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fate_llm.core.errors import BadSignature, ConfigurationError, InternalError

from .randomness import random_bytes

__all__ = ["KEY_BYTES", "SIGNATURE_BYTES", "Identity", "PublicIdentity"]

KEY_BYTES: Final = 32  # a seed, a public key, a key for files
SIGNATURE_BYTES: Final = 64
_DOMAIN: Final = b"fate_llm/1 "
_TEXT: Final = "ed25519:"
_FIELD: Final = 2**255 - 19
# y of the points whose order divides 8, and the two encodings of y = 0 and y = 1 that are not reduced: under such
# a key one signature fits many messages, so that anybody could speak for the party that has it.
_LOW_ORDER: Final = frozenset(
    {
        0,
        1,
        2707385501144840649318225287225658788936804267575313519463743609750303402022,
        55188659117513257062467267217118295137698188065244968500265048394206261417927,
        _FIELD - 1,
        _FIELD,
        _FIELD + 1,
    }
)


class Identity:
    """The secret half. Its `repr` shows the public half only."""

    def __init__(self, secret: bytes) -> None:
        """secret: the 32 bytes of the Ed25519 seed.

        Raises:
            ConfigurationError: another length.
        """
        if len(secret) != KEY_BYTES:
            raise ConfigurationError(
                f"the secret of an identity has {len(secret)} bytes; it needs {KEY_BYTES}",
                hint="Restore the identity file from its backup, or make a new one and give its public key to all.",
            )
        self._secret = bytes(secret)
        self._key = Ed25519PrivateKey.from_private_bytes(self._secret)
        self._public = PublicIdentity(self._key.public_key().public_bytes_raw())

    @classmethod
    def generate(cls) -> Identity:
        """A new identity out of the operating system's randomness."""
        return cls(random_bytes(KEY_BYTES))

    @classmethod
    def from_bytes(cls, secret: bytes) -> Identity:
        """What `to_bytes` gave.

        Raises:
            ConfigurationError: not 32 bytes.
        """
        return cls(secret)

    def to_bytes(self) -> bytes:
        """The 32 secret bytes: whoever has them is this party."""
        return self._secret

    @property
    def public(self) -> PublicIdentity:
        """The half that goes into everybody's roster."""
        return self._public

    def sign(self, message: bytes, *, purpose: str) -> bytes:
        """The signature (64 bytes) over `message` for one purpose; the same input gives the same bytes."""
        return self._key.sign(_domain(purpose) + message)

    def storage_key(self, purpose: str) -> bytes:
        """A key (32 bytes) for sealing this party's files of one purpose; the same each time."""
        info = _domain("storage") + _domain(purpose)
        return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(self._secret)

    def __repr__(self) -> str:
        return f"Identity({self._public.to_text()})"


@dataclass(frozen=True)
class PublicIdentity:
    """The public half. raw: the 32 bytes of RFC 8032.

    Raises:
        ConfigurationError: another length, or one of the points of low order, which prove nothing.
    """

    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) != KEY_BYTES:
            raise ConfigurationError(
                f"a public key of {len(self.raw)} bytes; Ed25519 has {KEY_BYTES}", hint="Copy the whole key again."
            )
        if int.from_bytes(self.raw, "little") % 2**255 in _LOW_ORDER:
            raise ConfigurationError(
                "a public key of low order: anybody could sign for it",
                hint="Ask that party for the key that `fate_llm` made; this one was made up.",
            )

    @classmethod
    def from_text(cls, text: str) -> PublicIdentity:
        """The key out of `ed25519:` and 43 characters of base64url without padding, in its one valid spelling.

        Raises:
            ConfigurationError: anything else; the text is not repeated, it may be a secret pasted by mistake.
        """
        hint = "Copy the party's line again, from `ed25519:` to its end."
        if not text.startswith(_TEXT):
            raise ConfigurationError(f"a public key starts with {_TEXT!r}; this text does not", hint=hint)
        letters = text.removeprefix(_TEXT)
        if len(letters) != 43:
            raise ConfigurationError(f"a public key has 43 characters after {_TEXT!r}, not {len(letters)}", hint=hint)
        try:
            raw = base64.b64decode(letters + "=", altchars=b"-_", validate=True)
        except (ValueError, binascii.Error):
            raise ConfigurationError("a public key has letters, digits, `-` and `_` only", hint=hint) from None
        found = cls(raw)
        if found.to_text() != text:
            raise ConfigurationError("a public key not in its one valid spelling: its end was changed", hint=hint)
        return found

    def to_text(self) -> str:
        """`ed25519:` and 43 characters of base64url: what stands in a roster."""
        return _TEXT + base64.urlsafe_b64encode(self.raw).decode("ascii").rstrip("=")

    @property
    def fingerprint(self) -> str:
        """Eight groups of five digits (132 bits of SHA-256) to be read out over the phone and compared."""
        number = int.from_bytes(hashlib.sha256(_domain("fingerprint") + self.raw).digest(), "big") % 10**40
        digits = f"{number:040d}"
        return " ".join(digits[start : start + 5] for start in range(0, 40, 5))

    def verify(self, signature: bytes, message: bytes, *, purpose: str) -> None:
        """Return when this party's secret signed `message` for `purpose`.

        Raises:
            BadSignature: it did not.
        """
        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, _domain(purpose) + message)
        except (InvalidSignature, ValueError):  # ValueError: libraries that look at the point when they load it
            raise BadSignature(
                f"the signature does not fit the key {self.to_text()}, which the roster pins, for {purpose!r}"
            ) from None

    def __repr__(self) -> str:
        return f"PublicIdentity({self.to_text()})"


def _domain(purpose: str) -> bytes:
    """The prefix that keeps signatures and keys of different purposes apart; it ends with its only zero byte."""
    if not purpose or not purpose.isascii() or not purpose.isprintable():
        raise InternalError(f"the purpose {purpose!r}: one or more printable ASCII characters")
    return _DOMAIN + purpose.encode("ascii") + b"\0"
