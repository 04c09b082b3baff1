"""Whole numbers that are added while encrypted: CKKS (Cheon, Kim, Kim, Song 2017) by TenSEAL, which is SEAL 4.1.

CKKS is a scheme for approximate numbers, and a decryption tells of its key by its error: what is released must not
hold that error (Li, Micciancio 2021). Here all that is encrypted are whole numbers, at a scale where the error of a sum
is far below a half. Opening rounds to the nearest whole number, and that is the exact sum whatever the key is.

Parameters: ring degree n = 8192, one data prime and the special prime of 60 bits each, ternary secret: 120 bits of
modulus where the homomorphic encryption standard allows 152 for 192-bit security. Only additions are needed, so that
nothing is rescaled and no evaluation key is made.

Room: numbers are below 2^31 in size and so is their sum (`LARGEST`), the scale is 2^27, and the data prime q is close
to 2^60. A coefficient of the encoding is at most the largest number times the scale, below 2^58 < q/2: no sum wraps
around. Error: fresh encryption is done under both primes and then divided by the special one, which leaves rounding
errors of at most 1/2 in either half: (1 + s)/2 in a coefficient, of standard deviation sqrt((1 + 2n/3) / 12) = 21 for
a ternary s, and times sqrt(n) in a number. A sum of m ciphertexts is off by sqrt(m) * 21 * 90.5 / 2^27 =
1.5e-5 * sqrt(m) on average (measured: 1.0e-5 * sqrt(m)). For m = 1000 a half is more than 1000 standard deviations.

TenSEAL draws keys and encryption randomness by itself, from the operating system (`std::random_device` seeds its
Blake2xb generator). There is no way to give it a seed: the same numbers encrypted twice are other bytes.

The only module that imports tenseal, and only when it is used: it is in the extra `fate_llm[he]`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Any, Final

import numpy as np

from fate_llm.core.errors import InternalError, MissingExtra, PeerViolation, ProtectionError
from fate_llm.core.values import Array

from .fixed_point import MOST_TERMS

__all__ = [
    "CIPHERTEXT_BYTES",
    "CONTEXT_BYTES",
    "LARGEST",
    "RING",
    "SCALE",
    "SLOTS",
    "CipherTotal",
    "PublicContext",
    "SecretContext",
]

RING: Final = 8192
SLOTS: Final = RING // 2  # numbers in a ciphertext
SCALE: Final = 2.0**27
LARGEST: Final = 2**31 - 1  # size of a number, and of a sum
CIPHERTEXT_BYTES: Final = 132_000  # at most, as TenSEAL writes it: 131,217 (32.04 a number)
CONTEXT_BYTES: Final = 264_000  # at most, of a public context: 262,363
_BITS: Final = (60, 60)
_PRIMES: Final = (1152921504606748673, 1152921504606830593)  # of these bits, as SEAL picks them for the ring
_OFF_GRID: Final = 1 / 8  # no honest sum is further from a whole number
_HEAD: Final = 133  # bytes of a ciphertext before its numbers
_TAIL: Final = 9
_RAW_BLOCK: Final = bytes.fromhex("28b52ffda061000200000010")  # zstd: 131,169 bytes, first block stored as they are
_THREADS: Final = 1  # TenSEAL keeps the interpreter's lock anyway


class PublicContext:
    """Encrypts and adds; opens nothing. Its `repr` shows a digest."""

    def __init__(self, raw: bytes) -> None:
        """raw: what `SecretContext.public` gave. Check who says so first: a parser in C++ reads these bytes.

        Raises:
            PeerViolation: no such context, one of other parameters, or one that holds more than a public key.
            MissingExtra: tenseal is not installed.
        """
        if len(raw) > CONTEXT_BYTES:
            raise PeerViolation(f"a CKKS context of {len(raw)} bytes; a public one has at most {CONTEXT_BYTES}")
        self._context = _load_context(raw)
        if self._context.is_private():
            raise PeerViolation("a CKKS context came with its secret key; only public ones may travel")
        if _public_bytes(self._context) != raw:
            raise PeerViolation("a CKKS context holds more than its parameters and a public key")
        self._raw = bytes(raw)
        self._forms = _Forms()

    @property
    def digest(self) -> str:
        """SHA-256 (64 hex digits) over its bytes."""
        return hashlib.sha256(self._raw).hexdigest()

    def to_bytes(self) -> bytes:
        return self._raw

    def encrypt(self, numbers: Array) -> list[bytes]:
        """Whole numbers (1-D, integer, at most LARGEST in size) as ciphertexts of SLOTS each, zeros at the end.

        Raises:
            ProtectionError: a number that is too large. InternalError: an array of another kind.
        """
        if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
            raise InternalError(f"whole numbers in one dimension are encrypted, not {numbers.dtype} {numbers.shape}")
        if numbers.size and (int(numbers.min()) < -LARGEST or int(numbers.max()) > LARGEST):
            raise ProtectionError(f"a number of more than {LARGEST} in size cannot be encrypted")
        tenseal = _tenseal()
        done: list[bytes] = []
        for start in range(0, numbers.size, SLOTS):
            block = np.zeros(SLOTS, np.float64)
            part = numbers[start : start + SLOTS]
            block[: part.size] = part
            done.append(bytes(tenseal.ckks_vector(self._context, tenseal.plain_tensor(block)).serialize()))
        return done

    def load(self, ciphertext: bytes) -> Any:
        """A ciphertext as TenSEAL's object. Check who says so first: a parser in C++ reads these bytes.

        That it was made under this key cannot be told.

        Raises:
            PeerViolation: no ciphertext of this form.
        """
        return _load_vector(self._context, ciphertext, self._forms)

    def __repr__(self) -> str:
        return f"PublicContext({self.digest[:16]}...)"


class CipherTotal:
    """A running sum in ciphertext: as many ciphertexts as a term has, however many terms were added."""

    def __init__(self) -> None:
        self._vectors: list[Any] = []
        self._terms = 0

    @property
    def terms(self) -> int:
        return self._terms

    def add(self, term: Sequence[Any]) -> None:
        """Add one term: what `PublicContext.load` gave, which belongs to the sum from now on.

        Raises:
            InternalError: another number of ciphertexts than before, or too many terms.
        """
        if self._terms and len(term) != len(self._vectors):
            raise InternalError(f"a term of {len(term)} ciphertexts in a sum of {len(self._vectors)}")
        if self._terms >= MOST_TERMS:
            raise InternalError(f"more than {MOST_TERMS} terms in one sum")
        if not self._terms:
            self._vectors = list(term)
        else:
            for total, vector in zip(self._vectors, term, strict=True):
                total.add_(vector)
        self._terms += 1

    def take(self, start: int, stop: int) -> list[bytes]:
        """Ciphertexts `start` to `stop` of the sum; the same bytes in whatever order the terms were added."""
        return [bytes(vector.serialize()) for vector in self._vectors[start:stop]]


class SecretContext:
    """Opens what was encrypted under its public half. Its `repr` shows a digest of that half only."""

    def __init__(self, raw: bytes) -> None:
        """raw: what `to_bytes` gave, from this party's own disk.

        Raises:
            ProtectionError: no context with a secret key. MissingExtra: tenseal is not installed.
        """
        try:
            self._context = _load_context(raw)
        except PeerViolation as error:
            raise ProtectionError(f"a key for CKKS that was kept is damaged: {error.message}") from None
        if not self._context.is_private():
            raise ProtectionError("a key for CKKS that was kept is damaged: it has no secret part")
        self._public = PublicContext(_public_bytes(self._context))
        self._forms = _Forms()

    @classmethod
    def generate(cls) -> SecretContext:
        """New keys, out of the operating system's randomness."""
        tenseal = _tenseal()
        scheme = tenseal.SCHEME_TYPE.CKKS
        context = tenseal.context(scheme, RING, coeff_mod_bit_sizes=list(_BITS), n_threads=_THREADS)
        context.global_scale = SCALE
        return cls(_secret_bytes(context))

    @property
    def public(self) -> PublicContext:
        """The half that everybody may have."""
        return self._public

    def to_bytes(self) -> bytes:
        """Secret: whoever has it opens every ciphertext made for it."""
        return _secret_bytes(self._context)

    def open(self, ciphertexts: Sequence[bytes]) -> Array:
        """The numbers inside (int64, one row of SLOTS a ciphertext).

        Raises:
            PeerViolation: not ciphertexts of this form.
            ProtectionError: what comes out are no whole numbers, or too large ones: made under another key, changed,
                or never whole. Nothing is released.
        """
        found = np.empty((len(ciphertexts), SLOTS), np.int64)
        for row, ciphertext in zip(found, ciphertexts, strict=True):
            self._open(ciphertext, row)
        return found

    def _open(self, ciphertext: bytes, row: Array) -> None:
        vector = _load_vector(self._context, ciphertext, self._forms)
        numbers = np.array(vector.decrypt(), np.float64)
        whole = np.rint(numbers)
        if not (whole.min() >= -LARGEST and whole.max() <= LARGEST):  # false for NaN
            raise ProtectionError(
                f"a ciphertext opens to numbers above {LARGEST} in size: it was changed, or made under other keys"
            )
        numbers -= whole
        if max(numbers.max(), -numbers.min()) > _OFF_GRID:
            raise ProtectionError(
                "a ciphertext opens to numbers that are not whole: it was changed, or its maker left the agreed grid"
            )
        row[:] = whole

    def __repr__(self) -> str:
        return f"SecretContext(for {self._public!r})"


class _Forms:
    """How a ciphertext that was looked into begins and ends: another one that does so has the same form.

    Looking into one copies it. Its first bytes hold the number of slots, the length, SEAL's header, and then, in a
    first block that zstd did not compress, the parameters, the number of polynomials and the scale; its last ones hold
    the scale again.
    """

    def __init__(self) -> None:
        self._length, self._head, self._tail = 0, b"", b""

    def known(self, ciphertext: bytes) -> bool:
        return (
            len(ciphertext) == self._length
            and ciphertext.startswith(self._head)
            and ciphertext.endswith(self._tail)
            and self._length > 0
        )

    def learn(self, ciphertext: bytes) -> None:
        """This one is as agreed."""
        head = ciphertext[:_HEAD]
        if _RAW_BLOCK in head:
            self._length, self._head, self._tail = len(ciphertext), head, ciphertext[-_TAIL:]


@cache
def _tenseal() -> Any:
    try:
        import tenseal  # type: ignore[import-not-found, import-untyped, unused-ignore]
        import tenseal.sealapi  # type: ignore[import-not-found, import-untyped, unused-ignore] # its types
    except ImportError:
        raise MissingExtra(
            "homomorphic encryption needs TenSEAL, which is not installed", hint="pip install 'fate_llm[he]'"
        ) from None
    return tenseal


def _public_bytes(context: Any) -> bytes:
    """The context without its secret key; every argument named, so that no default of the library decides."""
    return bytes(
        context.serialize(save_public_key=True, save_secret_key=False, save_galois_keys=False, save_relin_keys=False)
    )


def _secret_bytes(context: Any) -> bytes:
    return bytes(
        context.serialize(save_public_key=True, save_secret_key=True, save_galois_keys=False, save_relin_keys=False)
    )


def _load_context(raw: bytes) -> Any:
    tenseal = _tenseal()
    try:
        context = tenseal.context_from(bytes(raw), _THREADS)
        parameters = context.seal_context().data.key_context_data().parms()
        found = (parameters.poly_modulus_degree(), *(int(prime.value()) for prime in parameters.coeff_modulus()))
        scale, scheme, public = context.global_scale, parameters.scheme().name, context.has_public_key()
    except (ValueError, RuntimeError, TypeError, IndexError, MemoryError) as error:
        raise PeerViolation(f"{len(raw)} bytes are no CKKS context: {str(error)[:100]}") from None
    if (*found, scale, scheme, public) != (RING, *_PRIMES, SCALE, "CKKS", True):
        raise PeerViolation(
            f"a CKKS context of other parameters: ring {found[0]}, primes {list(found[1:])}, scale {scale:g}; "
            f"ring {RING}, primes {list(_PRIMES)}, scale {SCALE:g} and a public key are agreed"
        )
    return context


def _load_vector(context: Any, ciphertext: bytes, forms: _Forms) -> Any:
    if len(ciphertext) > CIPHERTEXT_BYTES:
        raise PeerViolation(f"a CKKS ciphertext of {len(ciphertext)} bytes; it has at most {CIPHERTEXT_BYTES}")
    tenseal = _tenseal()
    try:
        vector = tenseal.ckks_vector_from(context, bytes(ciphertext))
        if forms.known(ciphertext):
            return vector
        parts = vector.ciphertext()
        form = (vector.size(), len(parts), *((part.size(), part.scale) for part in parts))
    except (ValueError, RuntimeError, TypeError, IndexError, MemoryError) as error:
        raise PeerViolation(f"{len(ciphertext)} bytes are no CKKS ciphertext: {str(error)[:100]}") from None
    if form != (SLOTS, 1, (2, SCALE)):
        raise PeerViolation(
            f"a CKKS ciphertext of {form[0]} numbers in {form[1]} parts; {SLOTS} numbers in one part of two "
            f"polynomials at the scale {SCALE:g} are agreed"
        )
    forms.learn(ciphertext)
    return vector
