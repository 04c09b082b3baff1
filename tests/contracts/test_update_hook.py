"""The contract of every update hook."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fate_llm.core import plugins
from fate_llm.core.interfaces import Frozen, HookStage, UpdateHook
from fate_llm.core.values import Total, Update

NAMES = plugins.names("hook")
# Params that make each hook do something to the update below; a hook that needs none may be left out.
PARAMS: dict[str, dict[str, Any]] = {"clip": {"norm": 1.0}}


def test_there_is_a_hook() -> None:
    assert NAMES, "no hook found"


@pytest.fixture(params=NAMES)
def hook(request: pytest.FixtureRequest) -> Any:
    made = plugins.load("hook", request.param)
    return made(made.Params(**PARAMS.get(request.param, {})))


def update() -> Update:
    arrays = {
        "w": np.array([3, 4], np.float32),
        "s": np.array(12, np.float32),
        "e": np.zeros((0, 2), np.float32),
    }
    for array in arrays.values():
        array.flags.writeable = False
    return Update(arrays, 2.0, {"loss": 1.0})


def contents(arrays: Any) -> dict[str, tuple[Any, ...]]:
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in arrays.items()}


def test_it_is_what_the_seam_says(hook: Any) -> None:
    assert isinstance(hook, UpdateHook)
    assert isinstance(hook.stage, HookStage)
    assert issubclass(hook.Params, Frozen)
    assert type(hook).__doc__
    with pytest.raises(ValueError, match="surely_unknown"):
        hook.Params(surely_unknown=1)


def test_it_does_not_change_its_input(hook: Any) -> None:
    given = update()
    before = contents(given.arrays)
    sent = hook.before_send(given, 1)
    assert contents(given.arrays) == before
    assert (given.weight, given.sums) == (2.0, {"loss": 1.0})
    total = Total(given.arrays, 2.0, {"loss": 1.0}, ("a",))
    hook.after_sum(total, 1)
    assert contents(total.mean) == before
    assert {n: (a.dtype, a.shape) for n, a in sent.arrays.items()} == {n: v[:2] for n, v in before.items()}
    assert all(isinstance(a, np.ndarray) for a in sent.arrays.values())


def test_an_update_of_zeros_stays_finite(hook: Any) -> None:
    zeros = Update({"w": np.zeros(4, np.float32)}, 1.0)
    assert np.isfinite(hook.before_send(zeros, 1).arrays["w"]).all()


@given(value=hnp.arrays(np.float32, (5,), elements=st.floats(-1e9, 1e9, width=32)), bound=st.floats(1e-6, 1e6))
@settings(deadline=None, max_examples=150)
def test_clip_never_leaves_more_than_its_bound_and_keeps_the_direction(value: np.ndarray, bound: float) -> None:
    clip = plugins.load("hook", "clip")
    given_update = Update({"w": value[:2], "v": value[2:]}, 1.0)
    sent = clip(clip.Params(norm=bound)).before_send(given_update, 1)
    before, after = (
        value.astype(np.float64),
        np.concatenate([sent.arrays["w"], sent.arrays["v"]]).astype(np.float64),
    )
    assert np.linalg.norm(after) <= bound
    if np.linalg.norm(before) <= bound:
        assert sent is given_update
    else:
        wanted = before * bound / np.linalg.norm(before)
        np.testing.assert_allclose(after, wanted, rtol=1e-5, atol=1e-6 * bound)


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan"), float("inf")])
def test_clip_refuses_a_bound_that_bounds_nothing(norm: float) -> None:
    with pytest.raises(ValueError):
        plugins.load("hook", "clip").Params(norm=norm)
