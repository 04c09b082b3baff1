"""Parties that are killed at any operation and started again: the result is that of an undisturbed run."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.runtime.durable_world import DurableWorld
from tests.runtime.toys import toy_pipeline

Deaths = Mapping[str, Sequence[int]]
ARBITER = pytest.mark.parametrize("arbiter", [True, False], ids=["an arbiter", "the guest coordinates"])
OFTEN = settings(
    deadline=None,
    max_examples=int(os.environ.get("FATE_DEATHS", "12")),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
NUMBERS = itertools.count()


def pipeline(*, arbiter: bool = True, rounds: int = 3, **params: Any) -> dict[str, Any]:
    data = toy_pipeline(steps={"component": "stepper", "params": {"rounds": rounds, "encode": True, **params}})
    data["parties"]["hosts"] = ["b"]
    if not arbiter:
        del data["parties"]["arbiter"]
    return data


def undisturbed(folder: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> DurableWorld:
    world = DurableWorld(folder, data, monkeypatch).run()
    wanted = world.outputs()
    assert len(wanted) == 2
    assert len(set(wanted.values())) == 1, "all parties have the same model"
    return world


@pytest.mark.slow
@ARBITER
def test_a_death_at_every_single_operation_changes_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arbiter: bool
) -> None:
    # Given an undisturbed run, and how many operations each party has in it
    data = pipeline(arbiter=arbiter, talk=arbiter, rounds=2 if arbiter else 3)
    quiet = undisturbed(tmp_path / "quiet", data, monkeypatch)
    seen = set()
    for name, count in quiet.operations().items():
        for moment in range(1, count + 1):
            # When each party dies at each of them, Then everybody has the same bits
            world = DurableWorld(tmp_path / f"{name}{moment}", data, monkeypatch, deaths={name: [moment]}).run()
            assert world.outputs() == quiet.outputs(), (name, world.moments())
            seen |= {what for told in world.moments().values() for what in told}
    assert {"note", "noted", "send to a", "ack to b"} <= seen
    assert any(what.startswith("committed steps.coordinator") for what in seen)


@pytest.mark.slow
@ARBITER
def test_an_attempt_that_ends_anywhere_is_gone_on_with_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arbiter: bool
) -> None:
    # Given an attempt that ends with a party's operation, for all parties at once
    data = pipeline(arbiter=arbiter)
    quiet = undisturbed(tmp_path / "quiet", data, monkeypatch)
    for name, count in quiet.operations().items():
        for moment in range(1, count + 1, 2):
            folder = tmp_path / f"{name}{moment}"
            DurableWorld(folder, data, monkeypatch, cut=(name, moment)).run()
            # When the next begins, on links that know nothing, Then it ends with the same bits
            again = DurableWorld(folder, data, monkeypatch, attempt=2).run()
            assert again.outputs() == quiet.outputs(), (name, moment, again.moments())


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("worlds")


@ARBITER
@OFTEN
@given(data=st.data())
def test_any_deaths_of_any_parties_change_no_bit(
    shared_folder: Path, monkeypatch: pytest.MonkeyPatch, arbiter: bool, data: st.DataObject
) -> None:
    # Given lives of some operations each, for all parties
    job = pipeline(arbiter=arbiter, rounds=2, talk=arbiter and data.draw(st.booleans(), label="talk"))
    quiet = undisturbed(shared_folder / f"quiet{next(NUMBERS)}", job, monkeypatch)
    lives = st.lists(st.integers(1, 12), max_size=4)
    deaths = {name: data.draw(lives, label=name) for name in quiet.spec.members}
    # When they are lived, Then everybody has the bits of an undisturbed run
    world = DurableWorld(shared_folder / f"deaths{next(NUMBERS)}", job, monkeypatch, deaths=deaths).run()
    assert world.outputs() == quiet.outputs(), world.moments()
