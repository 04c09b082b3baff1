"""The contract of every aggregation rule."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fate_llm.core import plugins
from fate_llm.core.errors import ProtectionError
from fate_llm.core.interfaces import Aggregator, Frozen, SumFinished, SumReceived, SumScene
from fate_llm.core.values import Cohort, Payload, Total, Update
from fate_llm.protocols.sums.plain import PlainSum

NAMES = plugins.names("aggregator")
# Rules whose first step is not the mean itself (server optimisers) say so here, with the reason.
NOT_A_MEAN: dict[str, str] = {}


def test_there_is_an_aggregator() -> None:
    assert NAMES, "no aggregator found"


def make(name: str) -> Any:
    rule = plugins.load("aggregator", name)
    return rule(rule.Params())


def vector(*values: float) -> dict[str, np.ndarray]:
    return {"w": np.array(values, np.float32), "s": np.array(sum(values), np.float32)}


def total_of(updates: dict[str, Update]) -> Total:
    cohort = Cohort(tuple(sorted(updates)), "z", len(updates))
    arrays = next(iter(updates.values())).arrays
    server = PlainSum().server(SumScene(cohort, "z", {n: a.shape for n, a in arrays.items()}), keep_terms=True)
    for party, update in updates.items():
        actions = server.handle(SumReceived(party, Payload({"weight": update.weight, "sums": {}}, update.arrays)))
    (finished,) = actions
    assert isinstance(finished, SumFinished)
    return finished.total


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_it_is_what_the_seam_says(name: str) -> None:
    rule = plugins.load("aggregator", name)
    assert isinstance(make(name), Aggregator)
    assert isinstance(rule.needs_plaintext, bool)
    assert issubclass(rule.Params, Frozen)
    assert rule.__doc__
    with pytest.raises(ValueError, match="surely_unknown"):
        rule.Params(surely_unknown=1)


@pytest.mark.parametrize("each", NAMES)
@given(value=hnp.arrays(np.float32, (3,), elements=st.floats(-100, 100, width=32)), count=st.integers(1, 5))
@settings(deadline=None, max_examples=30)
def test_equal_updates_move_the_state_by_themselves(each: str, value: np.ndarray, count: int) -> None:
    if each in NOT_A_MEAN:
        return
    updates = {p: Update({"w": value}, 2.0) for p in "abcde"[:count]}
    state = make(each).step({"w": np.ones(3, np.float32)}, total_of(updates))
    np.testing.assert_allclose(state["w"], 1 + value, rtol=1e-5, atol=1e-5)


def test_the_order_of_parties_does_not_matter(name: str) -> None:
    values = [vector(1, 5), vector(2, -3), vector(9, 0.1)]
    seen = set()
    for order in itertools.permutations(range(3)):
        updates = {party: Update(values[i], 1.0) for party, i in zip("abc", order, strict=True)}
        state = make(name).step(vector(0, 0), total_of(updates))
        seen.add(tuple(np.round(state["w"], 4)))
    assert len(seen) == 1


def test_a_weight_of_zero_is_no_fault(name: str) -> None:
    updates = {"a": Update(vector(1, 1), 0.0), "b": Update(vector(2, 2), 1.0), "c": Update(vector(2, 2), 1.0)}
    state = make(name).step(vector(0, 0), total_of(updates))
    np.testing.assert_allclose(state["w"], [2, 2], rtol=1e-6)


def test_shapes_and_dtypes_stay(name: str) -> None:
    state = make(name).step(vector(0, 0), total_of({p: Update(vector(1, 2), 1.0) for p in "abcd"}))
    for key, array in vector(0, 0).items():
        assert isinstance(state[key], np.ndarray)
        assert (state[key].dtype, state[key].shape) == (array.dtype, array.shape)


def test_neither_argument_is_written_to_nor_shared(name: str) -> None:
    state, total = vector(1, 1), total_of({p: Update(vector(1, 2), 1.0) for p in "abc"})
    arrays = [
        *state.values(),
        *total.mean.values(),
        *(a for u in total.terms.values() for a in u.arrays.values()),
    ]
    for array in arrays:
        array.flags.writeable = False
    before = [array.tobytes() for array in arrays]
    result = make(name).step(state, total)
    assert [array.tobytes() for array in arrays] == before
    assert not any(np.shares_memory(a, b) for a in result.values() for b in arrays)


@pytest.mark.parametrize(
    "bad",
    [
        {"w": np.zeros(3, np.float32), "s": np.zeros((), np.float32)},
        {"w": np.zeros(2, np.float32)},
        {**vector(0, 0), "more": np.zeros(1, np.float32)},
        vector(float("nan"), 0),
        vector(0, float("inf")),
    ],
    ids=["shape", "name missing", "name more", "NaN", "infinity"],
)
def test_what_cannot_be_aggregated_is_refused(name: str, bad: dict[str, np.ndarray]) -> None:
    update = Update(bad, 1.0)
    total = Total(bad, 3.0, {}, ("a", "b", "c"), terms=dict.fromkeys("abc", update))
    with pytest.raises(ProtectionError):
        make(name).step(vector(0, 0), total)


def test_a_rule_that_needs_plaintext_says_so_when_it_has_none(name: str) -> None:
    if not plugins.load("aggregator", name).needs_plaintext:
        assert make(name).step(vector(0, 0), Total(vector(1, 1), 1.0, {}, ("a",)))["w"].shape == (2,)
        return
    with pytest.raises(ProtectionError, match="update"):
        make(name).step(vector(0, 0), Total(vector(1, 1), 1.0, {}, ("a",)))


def test_fedavg_is_the_weighted_mean_times_the_server_learning_rate() -> None:
    rule = plugins.load("aggregator", "fedavg")
    total = total_of({"a": Update(vector(1, 1), 9.0), "b": Update(vector(11, 1), 1.0)})
    np.testing.assert_allclose(rule(rule.Params()).step(vector(5, 5), total)["w"], [7, 6])
    np.testing.assert_allclose(rule(rule.Params(server_learning_rate=0.5)).step(vector(5, 5), total)["w"], [6, 5.5])


def test_the_median_is_not_moved_by_one_liar() -> None:
    honest = {p: Update(vector(1, 2), 1.0) for p in "abc"}
    total = total_of({**honest, "d": Update(vector(1e6, -1e6), 1e6)})
    np.testing.assert_allclose(make("median").step(vector(0, 0), total)["w"], [1, 2])
