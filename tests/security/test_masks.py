"""Masks: bit by bit those of single AES blocks, in place, and nothing changed when something is refused."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB
from hypothesis import given, settings
from hypothesis import strategies as st

from fate_llm.core.errors import InternalError
from fate_llm.core.values import Array
from fate_llm.security.masks import KEY_BYTES, add_masks

CHUNK = 1 << 16  # words of one pass through the cache
RING = 2**128


def key(number: int) -> bytes:
    return number.to_bytes(KEY_BYTES, "big")


def words(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 2**32, count, np.uint32)


def keystream(of: bytes, count: int) -> bytes:
    """Whole blocks: AES of the numbers 0, 1, 2, ... one by one, as NIST SP 800-38A defines the counter mode."""
    encryptor = Cipher(AES(of), ECB()).encryptor()
    return encryptor.update(b"".join(index.to_bytes(16, "big") for index in range(-(-count // 16))))


def reference(
    start: Sequence[int], wide: Sequence[int], plus: Sequence[bytes], minus: Sequence[bytes]
) -> tuple[list[int], list[int]]:
    """One stream after the other, in Python's integers."""
    total, numbers = list(start), list(wide)
    skipped = -(-4 * len(total) // 16) * 16
    for sign, keys in ((1, plus), (-1, minus)):
        for one in keys:
            stream = keystream(one, skipped + 16 * len(numbers))
            mask = np.frombuffer(stream, "<u4", len(total)).tolist()
            total = [(word + sign * by) % 2**32 for word, by in zip(total, mask, strict=True)]
            for index, number in enumerate(numbers):
                piece = stream[skipped + 16 * index : skipped + 16 * index + 16]
                numbers[index] = (number + sign * int.from_bytes(piece, "little")) % RING
    return total, numbers


def test_the_block_cipher_is_that_of_the_standard() -> None:
    """FIPS 197, C.3, for the primitive under the reference; AES-256 of zeros under zeros for the product."""
    plain = bytes.fromhex("00112233445566778899aabbccddeeff")
    assert Cipher(AES(bytes(range(32))), ECB()).encryptor().update(plain).hex() == "8ea2b7ca516745bfeafc49904b496089"
    given_, wide = np.zeros(4, np.uint32), [0]
    add_masks(given_, wide, plus=[bytes(32)], minus=[])
    assert given_.tobytes().hex() == "dc95c078a2408989ad48a21492842087"
    assert wide[0].to_bytes(16, "little").hex() == "530f8afbc74536b9a963b4f1c4cb738b"  # of the number 1


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 7, 8, 1023, CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + 5])
@pytest.mark.parametrize("numbers", [0, 1, 3])
def test_masks_are_bit_by_bit_those_of_the_reference(count: int, numbers: int) -> None:
    given_, wide = words(count), [1, RING - 1, 2**64][:numbers]
    plus, minus = [key(1), key(2)], [key(3)]
    expected = reference(given_.tolist(), wide, plus, minus)
    add_masks(given_, wide, plus=plus, minus=minus)
    assert (given_.tolist(), wide) == expected


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.integers(0, 2**32 - 1), max_size=40),
    wide=st.lists(st.integers(0, RING - 1), max_size=5),
    keys=st.lists(st.binary(min_size=32, max_size=32), unique=True, max_size=7),
    cut=st.integers(0, 7),
)
def test_any_words_and_keys(values: list[int], wide: list[int], keys: list[bytes], cut: int) -> None:
    given_ = np.array(values, np.uint32)
    plus, minus = keys[:cut], keys[cut:]
    expected = reference(values, wide, plus, minus)
    add_masks(given_, wide, plus=plus, minus=minus)
    assert (given_.tolist(), wide) == expected


@pytest.mark.parametrize("count", [63, 64, 65, 130])
def test_more_keys_than_are_held_at_once(count: int) -> None:
    plus, minus = [key(n) for n in range(1, count)], [key(n + 500) for n in range(count // 3)]
    given_, wide = words(37), [5, 6]
    expected = reference(given_.tolist(), wide, plus, minus)
    add_masks(given_, wide, plus=plus, minus=minus)
    assert (given_.tolist(), wide) == expected


def test_masks_of_pairs_cancel_and_self_masks_come_off() -> None:
    # Given: four parties; the pair's first adds, its second subtracts, everybody adds one of its own
    parties, size = range(4), CHUNK + 3
    terms = [words(size, seed) for seed in parties]
    numbers = [[seed * 10**20, RING - 1 - seed] for seed in parties]
    exact = np.sum(terms, axis=0, dtype=np.uint32)
    exact_numbers = [sum(column) % RING for column in zip(*numbers, strict=True)]
    # When
    masked = [term.copy() for term in terms]
    for me in parties:
        plus = [key(10 * me + other) for other in parties if me < other]
        minus = [key(10 * other + me) for other in parties if other < me]
        add_masks(masked[me], numbers[me], plus=[*plus, key(900 + me)], minus=minus)
    total = np.sum(masked, axis=0, dtype=np.uint32)
    total_numbers = [sum(column) % RING for column in zip(*numbers, strict=True)]
    assert not np.array_equal(total, exact)
    add_masks(total, total_numbers, plus=[], minus=[key(900 + me) for me in parties])
    # Then
    assert np.array_equal(total, exact) and total_numbers == exact_numbers


def test_without_keys_nothing_changes() -> None:
    given_, wide = words(9), [3]
    add_masks(given_, wide, plus=[], minus=[])
    assert np.array_equal(given_, words(9)) and wide == [3]


def test_a_part_of_a_larger_array_leaves_its_neighbours_alone() -> None:
    whole = words(100)
    add_masks(whole[33:66], [], plus=[key(1)], minus=[key(2)])
    assert np.array_equal(whole[:33], words(100)[:33]) and np.array_equal(whole[66:], words(100)[66:])
    assert (whole[33:66] != words(100)[33:66]).sum() > 30


def test_what_is_masked_looks_random() -> None:
    """Chi-square of the bytes, correlation with what is hidden, and with the mask of another key."""
    size = 200_000
    hidden = np.full(size, 12_345, np.uint32)
    hidden[::2] = 54_321
    masked = []
    for number in (1, 2):
        one = hidden.copy()
        add_masks(one, [], plus=[key(number)], minus=[])
        masked.append(one)
        counts = np.bincount(one.view(np.uint8), minlength=256)
        chi = float(((counts - 4 * size / 256) ** 2 / (4 * size / 256)).sum())
        assert 150.0 < chi < 380.0  # 255 degrees of freedom, both tails below 1e-6
    limit = 5 / math.sqrt(size)
    for first, second in ((hidden, masked[0]), (hidden, masked[1]), (masked[0], masked[1])):
        assert abs(float(np.corrcoef(first.astype(np.float64), second.astype(np.float64))[0, 1])) < limit


def test_a_bit_of_the_key_changes_half_of_the_mask() -> None:
    """Every bit counts: a seed folded to 32 bits would leave most of them without effect."""
    masks = set()
    plain = np.zeros(64, np.uint32)
    add_masks(plain, [], plus=[key(0)], minus=[])
    for bit in range(256):
        one = np.zeros(64, np.uint32)
        add_masks(one, [], plus=[key(1 << bit)], minus=[])
        changed = int(np.unpackbits((one ^ plain).view(np.uint8)).sum())
        assert 800 < changed < 1250  # of 2048
        masks.add(one.tobytes())
    assert len(masks) == 256


def test_memory_does_not_grow_with_the_vector_or_the_keys() -> None:
    given_, wide = words(1 << 20), [0] * 20
    for count in (1, 64, 300):
        keys = [key(number) for number in range(1, count + 1)]
        tracemalloc.start()
        try:
            add_masks(given_[: CHUNK * 2] if count > 64 else given_, wide, plus=keys, minus=[])
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 2**20


def locked(array: Array) -> Array:
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros(4, np.int32),
        np.zeros(4, np.uint64),
        np.zeros(4, ">u4"),
        np.zeros(4, np.float32),
        np.zeros((2, 2), np.uint32),
        np.zeros(8, np.uint32)[::2],
        np.zeros((), np.uint32),
        locked(np.zeros(4, np.uint32)),
    ],
    ids=["signed", "64 bits", "big endian", "float", "two dimensions", "gaps", "no dimension", "read-only"],
)
def test_words_of_another_kind_are_refused(wrong: Array) -> None:
    before, wide = wrong.copy(), [7]
    with pytest.raises(InternalError, match="writable needed"):
        add_masks(wrong, wide, plus=[key(1)], minus=[])
    assert np.array_equal(wrong, before) and wide == [7]


@pytest.mark.parametrize(
    ("wide", "plus", "minus", "says"),
    [
        ([RING], [1], [], "outside"),
        ([0, -1], [1], [], "outside"),
        ([0], [1, 1], [], "twice"),
        ([0], [1], [1], "twice"),
        ([0], [], [2, 3, 2], "twice"),
    ],
)
def test_numbers_and_keys_that_cannot_be_are_refused(
    wide: list[int], plus: list[int], minus: list[int], says: str
) -> None:
    given_, before = words(5), list(wide)
    with pytest.raises(InternalError, match=says):
        add_masks(given_, wide, plus=[key(n) for n in plus], minus=[key(n) for n in minus])
    assert np.array_equal(given_, words(5)) and wide == before


@pytest.mark.parametrize("length", [0, 16, 24, 31, 33, 64])
def test_a_key_of_another_length_is_refused(length: int) -> None:
    # 16 and 24 bytes are keys of AES as well, but not of these masks.
    given_ = words(5)
    with pytest.raises(InternalError, match="32 bytes"):
        add_masks(given_, [], plus=[key(1)], minus=[bytes(length)])
    assert np.array_equal(given_, words(5))
