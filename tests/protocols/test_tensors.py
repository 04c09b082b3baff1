"""The container of tensors: exact, small, readable by safetensors, closed to malformed bytes."""

from __future__ import annotations

import json
import struct
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from fate_llm.core.errors import BadEnvelope
from fate_llm.protocols import tensors as codec
from fate_llm.protocols.tensors import container_bytes, container_overhead, read_tensors, tensor_bytes, write_tensors

DTYPES = ["?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", ml_dtypes.bfloat16]


def written(tensors: dict[str, np.ndarray]) -> bytes:
    return b"".join(write_tensors(tensors))


def container(header: object, body: bytes = b"", *, length: int | None = None) -> memoryview:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return memoryview(struct.pack("<Q", len(text) if length is None else length) + text + body)


def entry(shape: Any, start: Any, end: Any, dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end], **more}


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert other[name].dtype == array.dtype.newbyteorder("<"), name
        assert other[name].shape == array.shape, name
        assert np.ascontiguousarray(array, other[name].dtype).tobytes() == other[name].tobytes(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (5,), (2, 3, 4)], ids=str)
def test_every_dtype_and_shape_comes_back(dtype: Any, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    assert_same({"x": array}, read_tensors(memoryview(written({"x": array}))))


def test_other_memory_layouts_come_back() -> None:
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    given = {
        "T": base.T,
        "step": base[::2, ::3],
        "fortran": np.asfortranarray(base),
        "big": base.astype(">f4"),
    }
    assert_same(given, read_tensors(memoryview(written(given))))


def test_what_is_read_is_a_read_only_view_and_aligned() -> None:
    given = {"a": np.ones(3, np.uint8), "b": np.ones(3, np.float64), "c": np.ones(3, np.float32)}
    body = memoryview(written(given))
    for array in read_tensors(body).values():
        assert not array.flags.writeable
        assert array.flags.aligned
        assert np.shares_memory(array, np.frombuffer(body, np.uint8))


def test_what_is_written_is_not_copied() -> None:
    array = np.zeros(1000, np.float32)
    _, part = write_tensors({"x": array})
    assert np.shares_memory(np.frombuffer(part, np.uint8), array)


def test_nothing_at_all_is_a_container() -> None:
    assert read_tensors(memoryview(written({}))) == {}


def test_the_safetensors_package_reads_what_we_write_and_we_read_what_it_writes() -> None:
    given = {
        "f": np.linspace(0, 1, 7, dtype=np.float32).reshape(7, 1),
        "h": np.arange(4, dtype=np.float16),
        "b": np.arange(4).astype(ml_dtypes.bfloat16),
        "i": np.arange(3, dtype=np.int64),
        "u": np.array([[1, 2]], np.uint8),
        "t": np.array([True, False]),
        "s": np.array(2.5, np.float64),
        "e": np.zeros((2, 0), np.float32),
        "名": np.ones(1, np.float32),
    }
    theirs = {name: (about["shape"], bytes(about["data"])) for name, about in safetensors.deserialize(written(given))}
    assert theirs == {name: (list(array.shape), array.tobytes()) for name, array in given.items()}
    given.pop("b")  # safetensors.numpy itself knows no bfloat16
    assert_same(given, safetensors.numpy.load(written(given)))
    assert_same(given, read_tensors(memoryview(safetensors.numpy.save(given, metadata={"format": "pt"}))))


def smollm2_lora() -> dict[str, np.ndarray]:
    """r=8 on q_proj and v_proj of 30 layers: 120 tensors, 460,800 values."""
    made = {}
    for layer in range(30):
        for module, width in (("q_proj", 576), ("v_proj", 192)):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            made[f"{prefix}.lora_A.weight"] = np.zeros((8, 576), np.float32)
            made[f"{prefix}.lora_B.weight"] = np.zeros((width, 8), np.float32)
    return made


def test_the_container_of_an_adapter_is_small() -> None:
    adapter = smollm2_lora()
    assert (len(adapter), sum(a.size for a in adapter.values())) == (120, 460_800)
    assert tensor_bytes(adapter) == 4 * 460_800
    assert len(written(adapter)) <= 1.02 * tensor_bytes(adapter)


@given(
    st.dictionaries(
        st.text(max_size=8),
        st.tuples(st.sampled_from(["F32", "BF16", "U8", "I64"]), st.lists(st.integers(0, 3), max_size=3)),
        max_size=5,
    )
)
@settings(deadline=None, max_examples=60)
def test_the_overhead_is_known_before_there_are_values(layout: dict[str, tuple[str, list[int]]]) -> None:
    layout.pop("__metadata__", None)
    made = {name: np.zeros(shape, codec._DTYPES[dtype]) for name, (dtype, shape) in layout.items()}
    form = {name: (array.dtype, array.shape) for name, array in made.items()}
    assert container_overhead(form) == len(written(made)) - tensor_bytes(made)
    assert container_bytes(form) == len(written(made))


def test_what_the_format_cannot_hold_is_refused_when_written() -> None:
    with pytest.raises(ValueError, match="complex64"):
        write_tensors({"x": np.zeros(1, np.complex64)})
    with pytest.raises(ValueError, match="object"):
        write_tensors({"x": np.array([None])})
    with pytest.raises(ValueError, match="__metadata__"):
        write_tensors({"__metadata__": np.zeros(1, np.float32)})


FOUR = b"\0" * 4
MALFORMED: dict[str, memoryview] = {
    "empty": memoryview(b""),
    "shorter than the length": memoryview(b"\0" * 7),
    "header longer than the body": container({}, length=10**6),
    "header of 2**64 - 1 bytes": container({}, length=2**64 - 1),
    "not JSON": container(b"{"),
    "UTF-16": container('{"x": 1}'.encode("utf-16")),
    "a list": container([]),
    "NaN": container(b'{"x": NaN}'),
    "deep nesting": container(b"[" * 100_000),
    "deep nesting of objects": container(b'{"a":' * 100_000),
    "a name twice": container(
        b'{"x": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}, '
        b'"x": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        FOUR,
    ),
    "entry is a list": container({"x": [1]}),
    "entry lacks the shape": container({"x": {"dtype": "F32", "data_offsets": [0, 4]}}, FOUR),
    "entry has a key more": container({"x": entry([1], 0, 4, more=1)}, FOUR),
    "unknown dtype": container({"x": entry([1], 0, 4, dtype="F4")}, FOUR),
    "dtype of numpy": container({"x": entry([1], 0, 4, dtype="object")}, FOUR),
    "dtype is a number": container({"x": entry([1], 0, 4, dtype=4)}, FOUR),
    "dtype is a list": container({"x": entry([1], 0, 4, dtype=["F32"])}, FOUR),
    "negative shape": container({"x": entry([-1], 0, 4)}, FOUR),
    "two negative shapes": container({"x": entry([-1, -1], 0, 4)}, FOUR),
    "shape is a float": container({"x": entry([1.0], 0, 4)}, FOUR),
    "shape is true": container({"x": entry([True], 0, 4)}, FOUR),
    "shape is a number": container({"x": entry(1, 0, 4)}, FOUR),
    "33 dimensions": container({"x": entry([1] * 33, 0, 4)}, FOUR),
    "a product that overflows": container({"x": entry([2**31, 2**31, 4], 0, 0)}),
    "a product that overflows to the right size": container({"x": entry([2**32, 2**32, 2], 0, 0)}),
    "empty and too large for numpy": container({"x": entry([0, 2**62, 2**62], 0, 0)}),
    "a number of 5000 digits": container(
        b'{"x": {"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', FOUR
    ),
    "end before start": container({"x": entry([1], 4, 0)}, FOUR),
    "three offsets": container({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, FOUR),
    "does not start at 0": container({"x": entry([1], 4, 8)}, FOUR * 2),
    "a gap": container({"x": entry([1], 0, 4), "y": entry([1], 8, 12)}, FOUR * 3),
    "an overlap": container({"x": entry([2], 0, 8), "y": entry([1], 4, 8)}, FOUR * 2),
    "an alias": container({"x": entry([1], 0, 4), "y": entry([1], 0, 4)}, FOUR),
    "longer than the body": container({"x": entry([2], 0, 8)}, FOUR),
    "bytes after the last": container({"x": entry([1], 0, 4)}, FOUR * 2),
    "shape does not fit": container({"x": entry([2], 0, 4)}, FOUR),
    "a truth value of 2": container({"x": entry([1], 0, 1, dtype="BOOL")}, b"\2"),
    "a lone surrogate": container(b'{"\\ud800": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', FOUR),
}


@pytest.mark.parametrize("which", sorted(MALFORMED))
def test_malformed_bytes_are_refused_by_name(which: str) -> None:
    with pytest.raises(BadEnvelope) as caught:
        read_tensors(MALFORMED[which])
    assert len(caught.value.message) < 400


def test_refusing_takes_no_memory_that_the_bytes_do_not_have() -> None:
    # Given headers that promise terabytes
    claims = [container({"x": entry([2**40], 0, 2**42)}, FOUR), container({}, length=2**50)]
    tracemalloc.start()
    for claim in claims:
        with pytest.raises(BadEnvelope):
            read_tensors(claim)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def test_a_header_beyond_the_limit_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    good = written({"x": np.zeros(1, np.float32)})
    monkeypatch.setattr(codec, "MAX_HEADER", 32)
    with pytest.raises(BadEnvelope, match="header of"):
        read_tensors(memoryview(good))


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=100)
def test_arbitrary_bytes_are_refused_or_read(raw: bytes) -> None:
    try:
        found = read_tensors(memoryview(raw))
    except BadEnvelope:
        return
    assert found == {}  # hypothesis does not find a tensor by chance


@given(position=st.integers(0, 10**6), value=st.integers(0, 255), cut=st.integers(0, 3))
@settings(deadline=None, max_examples=200)
def test_changed_bytes_are_refused_or_read_as_a_whole(position: int, value: int, cut: int) -> None:
    good = bytearray(
        written({"x": np.arange(4, dtype=np.float32), "t": np.array([True]), "b": np.zeros((2, 1), np.int8)})
    )
    good[position % len(good)] = value
    try:
        found = read_tensors(memoryview(bytes(good[: len(good) - cut])))
    except BadEnvelope:
        return
    assert cut == 0
    assert sum(a.nbytes for a in found.values()) == 16 + 1 + 2
