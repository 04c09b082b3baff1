"""Content nobody on the way can read or change: AES-256-GCM per chunk, under keys of one direction.

Rules:
 1. A key belongs to one pair secret, one direction (sender -> receiver), one epoch of the sender's process and one
    stream ("data" for chunks, "control" for small frames). All of it enters the derivation (HKDF-SHA256, RFC 5869),
    so that bytes of one never open in another, nor in another job, attempt or pair.
 2. The nonce is the number of the chunk. `SendKeys` seals rising numbers only and takes a number before it uses
    it, so no nonce meets a key twice, whatever fails in between. What must be sent again is the stored ciphertext.
 3. A process that starts again counts from the beginning and therefore takes a new, higher epoch: the caller writes
    the epoch down before it seals. Two processes with one epoch would repeat nonces; nothing here can see that.
 4. The header travels beside the chunk in clear and is authenticated with it.
 5. Nothing of a chunk that does not open is released: what stands in a buffer of the caller's is set to zero.

Not here: the order of chunks and duplicates. A chunk opens as often as it is heard, one of an older epoch too; the
channel above counts.
Objects are for one thread at a time.
"""

from __future__ import annotations

import struct
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fate_llm.core.errors import BadSeal, InternalError
from fate_llm.core.interfaces import Buffer

from .agreement import PairSecret
from .randomness import random_bytes

__all__ = ["LARGEST", "STREAMS", "TAG_BYTES", "ReceiveKeys", "SendKeys", "open_at_rest", "seal_at_rest"]

TAG_BYTES: Final = 16  # a sealed chunk is this much longer than its content
LARGEST: Final = 1 << 30  # bytes of one chunk
STREAMS: Final = ("data", "control")
_KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12
_NUMBERS: Final = 1 << 64  # numbers and epochs are below this: headers hold them in 8 bytes
_KEPT: Final = 4  # epochs of one sender whose keys are kept ready
_LABEL: Final = b"fate_llm/1 chunk key\0"
_REST: Final = b"FLS\x01"  # what starts a file sealed at rest


class SendKeys:
    """Seals what `sender` sends to `receiver` in one epoch of its process."""

    def __init__(self, secret: PairSecret, *, sender: str, receiver: str, epoch: int, stream: str = "data") -> None:
        """epoch: this process's own, never used before with this secret; 0 to 2^64 - 1.

        Raises:
            InternalError: names, epoch or stream that cannot be.
        """
        if not 0 <= epoch < _NUMBERS:
            raise InternalError(f"the epoch {epoch}: 0 to 2^64 - 1")
        self._link = _link(sender, receiver, stream)
        self._cipher = AESGCM(_chunk_key(secret, self._link, epoch))
        self._epoch = epoch
        self._last = -1

    def seal(
        self, number: int, header: Buffer, plaintext: Buffer, out: bytearray | memoryview | None = None
    ) -> bytes | memoryview:
        """Ciphertext and tag: TAG_BYTES more than `plaintext`.

        number: higher than every number sealed before. out: where to write, of at least the length needed, apart
        from `plaintext`; what comes back is then a view of its part that was filled, and nothing is copied.

        Raises:
            InternalError: a number used or passed over before, a chunk above LARGEST, a buffer that is too short,
                read-only or with gaps.
        """
        if not self._last < number < _NUMBERS:
            raise InternalError(
                f"chunk {number} after chunk {self._last} of epoch {self._epoch}: numbers only rise, up to 2^64 - 1; "
                "what is sent again is the stored ciphertext"
            )
        content = _bytes_of(plaintext)
        size = len(content)
        if size > LARGEST:
            raise InternalError(f"a chunk of {size} bytes; at most {LARGEST}")
        target = None if out is None else _writable(out)
        if target is not None and len(target) < size + TAG_BYTES:
            raise InternalError(f"{len(target)} bytes to seal into; {size + TAG_BYTES} needed")
        self._last = number
        if target is None:
            return self._cipher.encrypt(_nonce(number), content, header)
        target = target[: size + TAG_BYTES]
        self._cipher.encrypt_into(_nonce(number), content, header, target)
        return target

    def __repr__(self) -> str:
        return f"SendKeys({_shown(self._link)}, epoch {self._epoch}, last {self._last})"


class ReceiveKeys:
    """Opens what `sender` sent to `receiver`, in whatever epoch of its process."""

    def __init__(self, secret: PairSecret, *, sender: str, receiver: str, stream: str = "data") -> None:
        """The same names as the other side gave to `SendKeys`.

        Raises:
            InternalError: names or stream that cannot be.
        """
        self._secret = secret
        self._link = _link(sender, receiver, stream)
        self._ciphers: dict[int, AESGCM] = {}  # the latest used last

    def open(
        self, epoch: int, number: int, header: Buffer, sealed: Buffer, out: memoryview | None = None
    ) -> bytes | memoryview:
        """The content of one chunk.

        epoch, number: as the message claims them; they are proved by the opening. out: where to write, of at least
        the content's length, apart from `sealed`; what comes back is then a view of its part that was filled.

        Raises:
            BadSeal: the chunk does not open, or does not fit; all of `out` is then zero.
            InternalError: a buffer with gaps, or one to write into that is read-only.
        """
        target = None if out is None else _writable(out)
        chunk = _bytes_of(sealed)
        size = len(chunk) - TAG_BYTES
        fits = target is None or size <= len(target)
        if not (0 <= epoch < _NUMBERS and 0 <= number < _NUMBERS and 0 <= size <= LARGEST and fits):
            raise self._refused(epoch, number, size, target)
        cipher = self._ciphers.get(epoch) or AESGCM(_chunk_key(self._secret, self._link, epoch))
        plaintext: bytes | memoryview
        try:
            if target is None:
                plaintext = cipher.decrypt(_nonce(number), chunk, header)
            else:
                plaintext = target[:size]
                cipher.decrypt_into(_nonce(number), chunk, header, plaintext)
        except InvalidTag:
            raise self._refused(epoch, number, size, target) from None
        self._keep(epoch, cipher)
        return plaintext

    def _keep(self, epoch: int, cipher: AESGCM) -> None:
        """Only the key of a chunk that opened is kept: epochs that somebody makes up push none out."""
        self._ciphers.pop(epoch, None)
        self._ciphers[epoch] = cipher
        if len(self._ciphers) > _KEPT:
            del self._ciphers[next(iter(self._ciphers))]

    def _refused(self, epoch: int, number: int, size: int, target: memoryview | None) -> BadSeal:
        if target is not None:
            target[:] = bytes(len(target))
        return BadSeal(
            f"chunk {number} ({size} bytes) of epoch {epoch} on {_shown(self._link)} does not open: it or its header "
            "was changed, cut, or belongs elsewhere"
        )

    def __repr__(self) -> str:
        return f"ReceiveKeys({_shown(self._link)})"


def seal_at_rest(key: bytes, plaintext: Buffer, *, label: bytes) -> bytes:
    """Content for a file of this party: AES-256-GCM under a random nonce; at most 2^32 times with one key.

    key: 32 bytes, `Identity.storage_key`. label: what the file is and which job it belongs to; not written, but
    needed again to open, so that no file can stand in for another.

    Raises:
        InternalError: a key of another length.
    """
    nonce = random_bytes(_NONCE_BYTES)
    return _REST + nonce + _rest_cipher(key).encrypt(nonce, plaintext, _REST + label)


def open_at_rest(key: bytes, sealed: Buffer, *, label: bytes) -> bytes:
    """What `seal_at_rest` was given under the same key and label.

    Raises:
        BadSeal: anything else.
        InternalError: a key of another length.
    """
    cipher = _rest_cipher(key)
    view = _bytes_of(sealed)
    start, end = len(_REST), len(_REST) + _NONCE_BYTES
    hint = "Restore the file from a backup, or the identity it was sealed under; without it start a new attempt."
    if len(view) < end + TAG_BYTES or bytes(view[:start]) != _REST:
        raise BadSeal(f"{len(view)} bytes that were not sealed by this version of fate_llm", hint=hint)
    try:
        return cipher.decrypt(view[start:end], view[end:], _REST + label)
    except InvalidTag:
        raise BadSeal(
            "a file does not open: it was changed, or sealed as another file or by another identity", hint=hint
        ) from None


def _link(sender: str, receiver: str, stream: str) -> tuple[str, str, str]:
    if not sender or not receiver or sender == receiver:
        raise InternalError(f"keys from {sender!r} to {receiver!r}: two parties with different names")
    if stream not in STREAMS:
        raise InternalError(f"the stream {stream!r}; valid: {', '.join(STREAMS)}")
    return sender, receiver, stream


def _shown(link: tuple[str, str, str]) -> str:
    return f"{link[0]} -> {link[1]} ({link[2]})"


def _chunk_key(secret: PairSecret, link: tuple[str, str, str], epoch: int) -> bytes:
    """HKDF-SHA256(ikm = pair key, no salt, info = label, the link's texts each after its length, epoch)."""
    texts = (text.encode("utf-8") for text in link)
    info = _LABEL + b"".join(struct.pack(">I", len(text)) + text for text in texts) + struct.pack(">Q", epoch)
    return HKDF(algorithm=SHA256(), length=_KEY_BYTES, salt=None, info=info).derive(secret.key)


def _nonce(number: int) -> bytes:
    return number.to_bytes(_NONCE_BYTES, "big")


def _bytes_of(buffer: Buffer) -> memoryview:
    """A view of the single bytes, whatever the buffer holds: the cipher takes nothing else."""
    view = memoryview(buffer)
    if not view.c_contiguous:
        raise InternalError("a buffer with gaps: give one that lies in one piece")
    return view.cast("B") if view.nbytes else memoryview(bytearray())


def _writable(out: bytearray | memoryview) -> memoryview:
    view = _bytes_of(out)
    if view.readonly:
        raise InternalError("a buffer to write into that is read-only")
    return view


def _rest_cipher(key: bytes) -> AESGCM:
    if len(key) != _KEY_BYTES:
        raise InternalError(f"a key for files of {len(key)} bytes; {_KEY_BYTES} needed")
    return AESGCM(key)
