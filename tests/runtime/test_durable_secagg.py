"""Secure aggregation when parties are killed at any operation: the same bits, nothing said twice in two ways, and never
two sums of one round."""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fate_llm.core.errors import QuorumLost
from tests.runtime.durable_world import DurableWorld
from tests.runtime.toys import toy_pipeline

ARBITER = pytest.mark.parametrize("arbiter", [True, False], ids=["an arbiter", "the guest coordinates"])
OFTEN = settings(
    deadline=None,
    max_examples=int(os.environ.get("FATE_DEATHS", "8")),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
NUMBERS = itertools.count()
CLIP = 16.0  # the steppers' steps are normal numbers


def pipeline(*, arbiter: bool = True, rounds: int = 2) -> dict[str, Any]:
    how = {"protection": "secagg", "protection_params": {"clip": CLIP, "largest_weight": 1.0}}
    data = toy_pipeline(steps={"component": "stepper", "params": {"rounds": rounds, **how}})
    data["parties"]["hosts"] = ["b", "c"] if arbiter else ["b", "c", "d"]
    if not arbiter:
        del data["parties"]["arbiter"]
    return data


def undisturbed(folder: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> DurableWorld:
    world = DurableWorld(folder, data, monkeypatch).run()
    assert len(set(world.outputs().values())) == 1, "all parties have the same model"
    return world


def check_said_once(*worlds: DurableWorld) -> None:
    """Whatever a party said of a round in one attempt, it said in the same words in all of its lives."""
    for world in worlds:
        for name, passed in world.passed.items():
            said: dict[Any, set[str]] = defaultdict(set)
            for one in passed:
                if one.direction == "sent" and one.kind in ("round.term", "round.answer", "round.state"):
                    said[one.peer, one.task, one.kind, one.round, one.ordinal].add(one.digest)
            twice = {key: len(digests) for key, digests in said.items() if len(digests) > 1}
            assert not twice, (name, twice, world.moments())


def check_nothing_secret_is_left(world: DurableWorld) -> None:
    """Of the sums that are over, the parties have kept only that they were answered."""
    left = {path.name for path in world.folder.rglob("*.sums/**/*.entry")}
    assert left <= {"answered.entry"}, left


@pytest.mark.slow
@pytest.mark.timeout(600)
@ARBITER
def test_a_death_at_every_single_operation_changes_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arbiter: bool
) -> None:
    data = pipeline(arbiter=arbiter, rounds=1)
    quiet = undisturbed(tmp_path / "quiet", data, monkeypatch)
    seen = set()
    # Given the last contributor and whoever coordinates: the others do as the last one does
    for name in ("c", "z") if arbiter else ("d", "a"):
        for moment in range(1, quiet.operations()[name] + 1):
            # When it dies at each of its operations, Then everybody has the same bits
            world = DurableWorld(tmp_path / f"{name}{moment}", data, monkeypatch, deaths={name: [moment]}).run()
            assert world.outputs() == quiet.outputs(), (name, world.moments())
            check_said_once(world)
            check_nothing_secret_is_left(world)
            seen |= {what.rpartition(" ")[0] for told in world.moments().values() for what in told}
    assert {f"{verb} {name}" for verb in ("keep", "kept") for name in ("seed", "masked", "consent", "answered")} <= seen
    assert {f"{verb} {name}" for verb in ("keep", "kept") for name in ("keys", "shares")} <= seen


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_attempt_that_ends_anywhere_is_gone_on_with_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pipeline(rounds=2)
    quiet = undisturbed(tmp_path / "quiet", data, monkeypatch)
    ends = {"the same bits": 0, "refused": 0}
    for name in ("b", "z"):
        for moment in range(1, quiet.operations()[name] + 1, 2):
            # Given an attempt that ends with an operation, for all parties at once
            folder = tmp_path / f"{name}{moment}"
            first = DurableWorld(folder, data, monkeypatch, cut=(name, moment)).run()
            # When the next begins, on links that know nothing
            again = DurableWorld(folder, data, monkeypatch, attempt=2).run()
            check_said_once(first, again)
            # Then it ends with the same bits, unless a round was answered that nobody has on disk: that one is never
            # answered again
            errors = {party: run.error for party, run in again.runs.items() if run.error is not None}
            if not errors:
                assert again.outputs() == quiet.outputs(), (name, moment)
                ends["the same bits"] += 1
                continue
            assert isinstance(errors["z"], QuorumLost), (errors, name, moment)
            answered = list(folder.rglob("lasting/*/answered.entry"))
            assert answered, (errors, name, moment)
            ends["refused"] += 1
    assert ends["the same bits"] > ends["refused"] > 0, ends


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("worlds")


@ARBITER
@OFTEN
@given(data=st.data())
def test_any_deaths_of_any_parties_change_no_bit(
    shared_folder: Path, monkeypatch: pytest.MonkeyPatch, arbiter: bool, data: st.DataObject
) -> None:
    job = pipeline(arbiter=arbiter, rounds=1)
    quiet = undisturbed(shared_folder / f"quiet{next(NUMBERS)}", job, monkeypatch)
    lives = st.lists(st.integers(1, 25), max_size=3)
    deaths = {name: data.draw(lives, label=name) for name in quiet.spec.members}
    world = DurableWorld(shared_folder / f"deaths{next(NUMBERS)}", job, monkeypatch, deaths=deaths).run()
    assert world.outputs() == quiet.outputs(), world.moments()
    check_said_once(world)
    check_nothing_secret_is_left(world)
