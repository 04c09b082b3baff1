"""Values: who is who, and that nothing private shows in a log."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from fate_llm.core.errors import ProtectionError
from fate_llm.core.interfaces import Frozen, HookStage
from fate_llm.core.values import (
    Cohort,
    Payload,
    Role,
    Roster,
    RoundResult,
    Total,
    Update,
    require_finite,
    require_same_layout,
)

ARRAYS = {f"layer.{i}": np.full((2, 3), 123.456, np.float32) for i in range(5)}


@pytest.mark.parametrize(
    "value",
    [
        Update(ARRAYS, 987.5, {"loss": 55.5}),
        Total(ARRAYS, 987.5, {"loss": 55.5}, ("a", "b"), terms={"a": Update(ARRAYS, 987.5)}),
        RoundResult(ARRAYS, 3, {"loss": 55.5}, ("a", "b")),
        Payload({"weight": 987.5, "sums": {"loss": 55.5}}, ARRAYS),
    ],
    ids=lambda v: type(v).__name__,
)
def test_repr_shows_shapes_and_no_values(value: object) -> None:
    text = repr(value)
    assert "5 arrays, 30 values" in text
    assert "layer.0: float32[2, 3]" in text
    assert "..." in text
    assert not [private for private in ("123", "987", "55.5") if private in text]


def test_values_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Update({}, 1.0).weight = 2.0  # type: ignore[misc]


def test_a_roster_names_each_party_once_guest_first() -> None:
    roster = Roster("g", ("h1", "h2"), arbiter="g", key_holder="k")
    assert list(roster) == ["g", "h1", "h2", "k"]
    assert roster.data_owners == ("g", "h1", "h2")
    assert roster.roles_of("g") == {Role.GUEST, Role.ARBITER}
    assert roster.roles_of("h2") == {Role.HOST}
    assert roster.roles_of("stranger") == frozenset()


def test_a_cohort_knows_whether_its_coordinator_contributes() -> None:
    assert Cohort(("a", "b"), "z", 2).members == ("a", "b", "z")
    assert not Cohort(("a", "b"), "z", 2).coordinator_contributes
    assert Cohort(("a", "b"), "a", 2).members == ("a", "b")
    assert Cohort(("a", "b"), "a", 2).coordinator_contributes


def test_layouts_are_compared_by_name_and_shape() -> None:
    one = {"a": np.zeros(2), "b": np.zeros((1, 2))}
    require_same_layout(one, dict(reversed(one.items())), what="x")
    with pytest.raises(ProtectionError, match=r"missing \['b'\], not known here \['c'\]"):
        require_same_layout(one, {"a": np.zeros(2), "c": np.zeros(2)}, what="x")
    with pytest.raises(ProtectionError, match=r"b has shape \[2, 1\], expected \[1, 2\]"):
        require_same_layout(one, {"a": np.zeros(2), "b": np.zeros((2, 1))}, what="x")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16, np.complex64])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_found_in_every_dtype(dtype: type, bad: float) -> None:
    require_finite({"w": np.ones(4, dtype)}, what="x")
    array = np.ones(4, dtype)
    array[2] = bad
    with pytest.raises(ProtectionError, match="x: w has 1 of 4 values that are not finite"):
        require_finite({"v": np.ones(1, dtype), "w": array}, what="x")


def test_whole_numbers_and_nothing_are_finite() -> None:
    require_finite({"i": np.arange(3), "b": np.array([True]), "e": np.zeros(0, np.float32)}, what="x")


def test_frozen_refuses_unknown_fields_changes_and_infinity() -> None:
    class Params(Frozen):
        rate: float = 1.0

    with pytest.raises(ValueError, match="rat"):
        Params(rat=1.0)  # type: ignore[call-arg]
    with pytest.raises(ValueError):
        Params(rate=float("inf"))
    with pytest.raises(ValueError):
        Params().rate = 2.0  # type: ignore[misc]


def test_hooks_run_in_the_order_of_the_architecture() -> None:
    assert sorted(HookStage) == [
        HookStage.COMPRESS,
        HookStage.CLIP,
        HookStage.WEIGHT,
        HookStage.NOISE,
        HookStage.CHECK,
        HookStage.ENCODE,
        HookStage.PACK,
    ]
    assert [stage for stage in HookStage if stage.on_the_wire] == [HookStage.ENCODE, HookStage.PACK]
