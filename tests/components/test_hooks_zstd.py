"""zstd on the wire: the same bits for every dtype, and no bomb."""

from __future__ import annotations

import struct
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fate_llm.components.hooks.zstd import Zstd
from fate_llm.core.errors import PeerViolation
from fate_llm.core.values import Payload
from fate_llm.protocols import tensors as codec

FLOAT32, BYTE = np.dtype(np.float32), np.dtype(np.uint8)
DTYPES = sorted(codec._DTYPES.items())


def there_and_back(array: np.ndarray, level: int = 1) -> np.ndarray:
    hook = Zstd(Zstd.Params(level=level))
    sent = hook.encode(Payload({"weight": 1.0}, {"w": array}), 1)
    assert (sent.tensors["w"].dtype, sent.tensors["w"].ndim) == (BYTE, 1)
    return hook.decode(sent, {"w": (array.dtype, array.shape)}).tensors["w"]


@given(
    dtype=st.sampled_from([dtype for _, dtype in DTYPES]),
    shape=st.sampled_from([(), (0,), (0, 3), (1,), (7,), (3, 5), (2, 0, 4), (130,)]),
    raw=st.binary(min_size=1, max_size=64),
    level=st.sampled_from([1, 3, 19]),
)
@settings(deadline=None, max_examples=200)
def test_every_dtype_of_the_codec_comes_back_bit_for_bit(
    dtype: np.dtype[Any], shape: tuple[int, ...], raw: bytes, level: int
) -> None:
    count = int(np.prod(shape)) * dtype.itemsize
    body = (raw * (count // len(raw) + 1))[:count]
    if dtype == np.bool_:
        body = bytes(b & 1 for b in body)
    array = np.frombuffer(body, dtype).reshape(shape)  # any bits: NaN with its payload, -0.0, denormals
    found = there_and_back(array, level)
    assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_all_dtypes_of_the_codec_are_tried() -> None:
    assert len(DTYPES) == 13
    for _, dtype in DTYPES:
        array = np.arange(6).astype(dtype).reshape(2, 3)
        assert there_and_back(array).tobytes() == array.tobytes()


def test_an_array_that_is_not_contiguous_or_of_the_other_byte_order() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert there_and_back(array.T).tobytes() == np.ascontiguousarray(array.T).tobytes()
    sent = Zstd().encode(Payload({}, {"w": array.astype(">f4")}), 1)
    found = Zstd().decode(sent, {"w": (FLOAT32, (3, 4))}).tensors["w"]
    assert found.tobytes() == array.tobytes()


def test_planes_make_an_update_smaller_than_zstd_alone_does() -> None:
    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32) * np.float32(1e-4)
    for array, most in ((values, 0.88), (values.astype(ml_dtypes.bfloat16), 0.75)):
        sent = Zstd().encode(Payload({}, {"w": array}), 1).tensors["w"]
        assert sent.nbytes < most * array.nbytes
        assert sent.nbytes < 0.97 * len(zstandard.ZstdCompressor(level=3).compress(array.tobytes()))


def test_noise_costs_next_to_nothing() -> None:
    noise = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    sent = Zstd().encode(Payload({}, {"w": noise}), 1).tensors["w"]
    assert sent.nbytes < noise.nbytes * 1.001


def packed(*frames: bytes, lengths: list[int] | None = None) -> np.ndarray:
    sizes = [len(frame) for frame in frames] if lengths is None else lengths
    return np.frombuffer(struct.pack(f"<{len(sizes)}Q", *sizes) + b"".join(frames), np.uint8)


def decode(array: np.ndarray, count: int = 4) -> np.ndarray:
    return Zstd().decode(Payload({}, {"w": array}), {"w": (BYTE, (count,))}).tensors["w"]


def frame(data: bytes, **options: Any) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)


def test_the_tool_of_the_next_tests_makes_frames_that_are_accepted() -> None:
    assert decode(packed(frame(b"abcd"))).tobytes() == b"abcd"


@pytest.mark.parametrize("size", [3, 5, 2**30])
def test_a_frame_of_another_size_is_refused_unopened(size: int) -> None:
    # Given a few bytes that unfold to `size`, When four are expected
    with pytest.raises(PeerViolation, match=f"a frame for {size} bytes, expected 4"):
        decode(packed(bomb(size)))


def bomb(size: int) -> bytes:
    """A frame of `size` zeros, made without them: one RLE block of 128 KiB after the other (RFC 8878, 3.1.1.2)."""
    head = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", size)
    blocks = []
    for begin in range(0, size, 2**17):
        length = min(2**17, size - begin)
        last = begin + length == size
        blocks.append(struct.pack("<I", last | 1 << 1 | length << 3)[:3] + b"\0")
    return head + b"".join(blocks)


def test_the_bomb_is_one() -> None:
    assert zstandard.ZstdDecompressor().decompress(bomb(2**20)) == bytes(2**20)
    assert len(bomb(2**30)) < 2**16


@pytest.mark.parametrize("promise", [4, 2**40], ids=["a small promise", "a huge promise"])
def test_a_bomb_takes_no_memory(promise: int) -> None:
    # Given a bomb of 64 MiB whose header says something else
    raw = bytearray(bomb(2**26))
    raw[5:13] = struct.pack("<Q", promise)
    array = packed(bytes(raw))
    # When it is decoded, Then it is refused, and no more was taken than the bomb's own bytes
    tracemalloc.start()
    try:
        with pytest.raises(PeerViolation):
            decode(array)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (packed(frame(b"abcd"), lengths=[99]), "has 21 bytes, its frames 107"),
        (packed(frame(b"abcd"), lengths=[2**64 - 1]), "its frames"),
        (packed(frame(b"abcd") + b"x"), "does not hold the frames"),
        (packed(frame(b"abcd") + frame(b"")), "does not hold the frames"),
        (packed(frame(b"abcd", write_checksum=True)[:-1]), "does not hold the frames"),
        (packed(frame(b"abcd", write_content_size=False)), "a frame for 18446744073709551615 bytes"),
        (packed(struct.pack("<II", 0x184D2A50, 4) + b"abcd"), "does not hold the frames"),
        (packed(b"no frame at all"), "no Zstandard frame"),
        (packed(b""), "no Zstandard frame"),
        (np.zeros(7, np.uint8), r"travels as uint8 \[7\], expected at least 8 bytes"),
        (np.zeros((2, 8), np.uint8), r"travels as uint8 \[2, 8\]"),
        (np.zeros(16, np.int8), "travels as int8"),
    ],
    ids=[
        "length too large",
        "length beyond all",
        "a byte more",
        "a frame more",
        "cut",
        "no size",
        "skippable",
        "no magic",
        "empty frame",
        "too short",
        "a matrix",
        "another dtype",
    ],
)
def test_what_is_not_exactly_one_frame_a_plane_is_refused(array: np.ndarray, text: str) -> None:
    with pytest.raises(PeerViolation, match=text):
        decode(array)


def test_nothing_has_no_bytes() -> None:
    assert decode(np.zeros(0, np.uint8), count=0).shape == (0,)
    for wrong in (packed(frame(b"")), np.zeros(1, np.uint8)):
        with pytest.raises(PeerViolation, match="has"):
            decode(wrong, count=0)


def test_a_dictionary_is_refused() -> None:
    samples = [bytes([i % 7, i % 5, i % 3] * 20) for i in range(400)]
    words = zstandard.train_dictionary(1024, samples)
    with pytest.raises(PeerViolation, match="a frame for 60 bytes"):
        decode(packed(frame(samples[0], dict_data=words)), count=60)


def test_a_truth_value_is_0_or_1() -> None:
    form = {"w": (np.dtype(np.bool_), (4,))}
    with pytest.raises(PeerViolation, match="neither 0 nor 1"):
        Zstd().decode(Payload({}, {"w": packed(frame(b"\0\1\2\1"))}), form)


@pytest.mark.parametrize("level", [0, 20, -1, 1.5])
def test_the_level_is_one_of_zstandard_s(level: float) -> None:
    with pytest.raises(ValueError, match="level"):
        Zstd.Params(level=level)
