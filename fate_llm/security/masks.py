"""Masks of a sum: what makes words that are sent look random, and what takes it off the total again.

A mask is the keystream of AES-256 in counter mode (NIST SP 800-38A) under a key of its own, counter from 0:

    bytes [0, 4 n)              n words of 32 bits, little endian
    (bytes up to a multiple of 16 are left out)
    then 16 bytes each          the wide numbers of 128 bits, little endian

Every word is added or subtracted in its ring, so that the masks of a pair, one with plus and one with minus, cancel
to the bit. A key is for one mask: two masks under one key would show the difference of what they hide. Who makes the
keys sees to that (fresh ones per round and attempt); here a key that is given twice is refused.

All streams are applied to a chunk of the words while it is in the cache: the vector moves through memory once for 64
keys instead of once for each. Speed is that of AES; nothing of the vector's size is allocated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from fate_llm.core.errors import InternalError
from fate_llm.core.values import Array

__all__ = ["KEY_BYTES", "add_masks"]

KEY_BYTES: Final = 32
_CHUNK: Final = 1 << 18  # bytes of the vector that meet all streams at once
_AT_ONCE: Final = 64  # streams whose states are held: some KiB each
_BLOCK: Final = 16  # bytes of AES, and of a wide number
_WIDE: Final = 1 << 128
_WORD: Final = np.dtype("<u4")


def add_masks(words: Array, wide: list[int], *, plus: Sequence[bytes], minus: Sequence[bytes]) -> None:
    """Add the masks of the keys `plus` to `words` and `wide` and subtract those of `minus`, in place.

    words: uint32, 1-D, in one piece; modulo 2^32. wide: numbers modulo 2^128. Needs less than 1 MiB beside them,
    however many keys there are.

    Raises:
        InternalError: words of another kind or not writable, numbers outside of their ring, a key of another length
            or given twice; nothing was changed.
    """
    _check(words, wide, [*plus, *minus])
    signed = [(key, True) for key in plus] + [(key, False) for key in minus]
    room = min(_CHUNK, _padded(words.nbytes)) + _BLOCK * len(wide)
    zeros, stream = bytes(room), bytearray(room + _BLOCK)  # the library wants room for a block more
    for start in range(0, len(signed), _AT_ONCE):
        ciphers = [(_cipher(key), positive) for key, positive in signed[start : start + _AT_ONCE]]
        _add(words, wide, ciphers, memoryview(zeros), stream)


def _add(
    words: Array, wide: list[int], ciphers: list[tuple[CipherContext, bool]], zeros: memoryview, stream: bytearray
) -> None:
    """One pass over the words with some streams, from their beginning."""
    masks = np.frombuffer(stream, _WORD, len(zeros) // 4)
    for start in range(0, words.size, _CHUNK // 4):
        chunk = words[start : start + _CHUNK // 4]
        mask, nothing = masks[: chunk.size], zeros[: _padded(chunk.nbytes)]
        for cipher, positive in ciphers:
            cipher.update_into(nothing, stream)
            (np.add if positive else np.subtract)(chunk, mask, out=chunk)
    if not wide:
        return
    for cipher, positive in ciphers:
        cipher.update_into(zeros[: _BLOCK * len(wide)], stream)
        for index, value in enumerate(wide):
            mask_of_it = int.from_bytes(stream[_BLOCK * index : _BLOCK * (index + 1)], "little")
            wide[index] = (value + mask_of_it if positive else value - mask_of_it) % _WIDE


def _padded(count: int) -> int:
    """Up to the next whole block."""
    return -(-count // _BLOCK) * _BLOCK


def _cipher(key: bytes) -> CipherContext:
    return Cipher(AES(key), CTR(bytes(_BLOCK))).encryptor()


def _check(words: Array, wide: list[int], keys: list[bytes]) -> None:
    if words.dtype != _WORD or words.ndim != 1 or not words.flags.c_contiguous or not words.flags.writeable:
        raise InternalError(
            f"words to mask are {words.dtype.str} of shape {words.shape}; "
            f"{_WORD.str}, one dimension, one piece and writable needed"
        )
    if not all(0 <= number < _WIDE for number in wide):
        raise InternalError("a wide number outside of Z_2^128")
    if not all(len(key) == KEY_BYTES for key in keys):
        raise InternalError(f"a mask's key has {KEY_BYTES} bytes; got {sorted({len(key) for key in keys})}")
    if len(set(keys)) != len(keys):
        raise InternalError("a mask's key given twice: it is for one mask only")
