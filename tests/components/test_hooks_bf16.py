"""bf16 on the wire: bounds of the rounding, and what it keeps."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fate_llm.components.hooks.bf16 import Bf16
from fate_llm.core.errors import PeerViolation, ProtectionError
from fate_llm.core.values import Payload

FLOAT32 = np.dtype(np.float32)
LARGEST = float(np.finfo(np.float32).max)
BF16_LARGEST = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)


def there_and_back(values: np.ndarray) -> np.ndarray:
    hook = Bf16()
    sent = hook.encode(Payload({}, {"w": values}), 1)
    assert sent.tensors["w"].dtype == ml_dtypes.bfloat16
    return hook.decode(sent, {"w": (FLOAT32, values.shape)}).tensors["w"]


@given(hnp.arrays(np.float32, (7,), elements=st.floats(-(2.0**127), 2.0**127, width=32)))
@example(np.array([1e-45, -1e-45, 1.1754944e-38, 5.9e-39, -0.0, 3.3e38, 1 + 2**-8], np.float32))
@settings(deadline=None, max_examples=200)
def test_the_error_is_at_most_a_256th_of_a_value_or_half_of_the_smallest_step(values: np.ndarray) -> None:
    found = there_and_back(values).astype(np.float64)
    exact = values.astype(np.float64)
    assert (np.abs(found - exact) <= np.maximum(np.abs(exact) * 2.0**-8, 2.0**-134)).all()


def test_the_middle_goes_to_the_even_neighbour() -> None:
    # bfloat16 has 7 bits behind the point: 1 + 2^-8 lies in the middle, and so does 1 + 3 * 2^-8
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 1 + 2**-8 + 2**-20], np.float32)
    assert there_and_back(values).tolist() == [1.0, 1 + 2**-6, -1.0, 1 + 2**-7]


def test_the_sign_of_zero_and_values_of_bfloat16_stay_bit_for_bit() -> None:
    values = np.array([-0.0, 0.0, 1.5, -(2.0**-133), 2.0**127, BF16_LARGEST], np.float32)
    assert there_and_back(values).tobytes() == values.tobytes()


def test_a_value_that_would_become_infinite_does_not_leave() -> None:
    # Given a float32 that rounds up beyond the largest bfloat16, When encoded, Then it is refused and named
    with pytest.raises(ProtectionError, match="w has 1 of 2 values that bfloat16 cannot hold"):
        Bf16().encode(Payload({}, {"w": np.array([LARGEST, 1.0], np.float32)}), 1)


def test_half_the_bytes() -> None:
    values = np.ones(1000, np.float32)
    assert Bf16().encode(Payload({}, {"w": values}), 1).tensors["w"].nbytes == 2000


def test_float32_from_a_peer_without_the_hook_is_refused_with_what_it_is() -> None:
    with pytest.raises(PeerViolation, match=r"w travels as float32 \[3\], expected bfloat16 \[3\]"):
        Bf16().decode(Payload({}, {"w": np.zeros(3, np.float32)}), {"w": (FLOAT32, (3,))})
