"""All that a component sees."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fate_llm.core.errors import (
    ConfigurationError,
    DataError,
    InternalError,
    JobCancelled,
    PolicyError,
    UnknownPlugin,
)
from fate_llm.core.interfaces import SumKeep
from fate_llm.core.seeds import derive_seed
from fate_llm.core.values import Cohort, Payload, Role, Roster, SumFloor
from fate_llm.protocols.channel import JobChannel
from fate_llm.protocols.sums.secagg import SecAgg
from fate_llm.runtime.context import JobSetting, TaskContext, load_sum
from fate_llm.runtime.events import Event, EventLog
from fate_llm.runtime.jobfolder import PartyFolder
from fate_llm.runtime.sharing import Sharing
from fate_llm.security.identity import Identity
from fate_llm.security.signer import RosterSigner

MakeContext = Callable[..., TaskContext]


@pytest.fixture
def channels(make_channels: Callable[..., dict[str, JobChannel]]) -> dict[str, JobChannel]:
    return make_channels("az")


@pytest.fixture
def make_context(channels: dict[str, JobChannel], tmp_path: Path) -> MakeContext:
    sharing = Sharing()

    def make(
        party: str = "a", role: Role = Role.GUEST, observer: Callable[[Event], None] = lambda e: None, **more: Any
    ) -> TaskContext:
        folder = PartyFolder(tmp_path / "parties" / party)
        log = EventLog(now=lambda: 5.0, observers=(observer,))
        roster = Roster("a", (), "z")
        setting = JobSetting("job", party, roster, 7, 20.0, tmp_path, folder, channels[party], log, sharing, **more)
        cohort = Cohort(("a",), "z", 1)
        return TaskContext(setting, task="tune", role=role, cohort=cohort, params=None, inputs={}, outputs=("model",))

    return make


def test_an_output_is_a_path_that_is_free_in_a_folder_that_is_there(make_context: MakeContext) -> None:
    path = make_context().output("model")
    assert path.parts[-3:] == ("a", "tune", "model")
    assert path.parent.is_dir()
    assert not path.exists()


def test_an_output_that_was_not_declared_is_a_bug(make_context: MakeContext) -> None:
    with pytest.raises(InternalError, match="no output 'modle'"):
        make_context().output("modle")


def test_scratch_is_a_folder_of_party_and_task(make_context: MakeContext) -> None:
    assert make_context().scratch().is_dir()
    assert make_context().scratch() != make_context("z", Role.ARBITER).scratch()


def test_paths_start_at_the_pipeline(
    make_context: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = make_context()
    assert ctx.resolve("data/x.jsonl") == tmp_path / "data" / "x.jsonl"
    assert ctx.resolve("/data/x.jsonl") == Path("/data/x.jsonl")
    monkeypatch.setenv("HOME", "/home/of-somebody")
    assert ctx.resolve("~/x") == Path("/home/of-somebody/x")


def test_the_same_labels_give_the_same_seed_at_every_party(make_context: MakeContext) -> None:
    a, z = make_context(), make_context("z", Role.ARBITER)
    assert a.seed("tune", "split") == z.seed("tune", "split") == derive_seed(7, "tune", "split")
    assert a.seed("tune", "split") != a.seed("tunesplit")


def test_parties_of_a_process_share_objects_and_take_turns(make_context: MakeContext) -> None:
    a, z = make_context(), make_context("z", Role.ARBITER)
    assert a.shared("model", lambda: object()) is z.shared("model", lambda: object())
    with a.turn(), a.pause_turn(), z.turn():
        pass


def test_metrics_and_events_go_to_the_party_s_files(make_context: MakeContext, tmp_path: Path) -> None:
    seen: list[Event] = []
    ctx = make_context(observer=seen.append)
    ctx.log_metrics({"loss": 1.5}, step=2)
    ctx.emit("note", text="hello")
    folder = tmp_path / "parties" / "a"
    assert json.loads((folder / "metrics.jsonl").read_text()) == {"task": "tune", "step": 2, "loss": 1.5}
    assert seen == [Event("note", "a", "tune", 5.0, {"text": "hello"})]


def test_a_cancelled_job_is_noticed(make_context: MakeContext, channels: dict[str, JobChannel]) -> None:
    ctx = make_context()
    ctx.check_cancelled()
    channels["a"].cancel("enough")
    with pytest.raises(JobCancelled, match="enough"):
        ctx.check_cancelled()


def test_a_protection_that_nobody_has_is_an_error(make_context: MakeContext) -> None:
    assert load_sum("plain").hides_terms is False
    with pytest.raises(UnknownPlugin, match="no sum is called 'plian'"):
        make_context().contributor_rounds(1, protection="plian")


def test_a_sum_below_the_floor_of_the_party_is_refused_before_anything_is_said(
    make_context: MakeContext, channels: dict[str, JobChannel]
) -> None:
    ctx = make_context(floor="secagg")
    with pytest.raises(PolicyError, match="asks for 'secagg' at least"):
        ctx.contributor_rounds(1, protection="plain")
    with pytest.raises(PolicyError):
        ctx.channel.aggregate("lengths", {"n": 1.0}, protection="plain")
    assert channels["a"].sent_bytes() == 0
    make_context(floor="plain").contributor_rounds(1, protection="plain")


# --- protections with params ----------------------------------------------------------------------------------


def test_a_protection_is_made_with_its_params() -> None:
    made = load_sum("secagg", {"clip": 4.0, "threshold": 5})
    assert isinstance(made, SecAgg)
    assert made._params == SecAgg.Params(clip=4.0, threshold=5)
    assert load_sum("secagg").hides_terms


@pytest.mark.parametrize(
    ("params", "texts"),
    [
        ({"clop": 1}, ["protection_params.clop"]),
        ({"clip": -1, "threshold": "many"}, ["protection_params.clip", "protection_params.threshold"]),
    ],
)
def test_params_that_are_not_valid_are_named_all_at_once(
    make_context: MakeContext, params: dict[str, Any], texts: list[str]
) -> None:
    ctx = make_context()
    for call in (
        lambda: ctx.contributor_rounds(1, protection="secagg", protection_params=params),
        lambda: ctx.coordinator_rounds(1, protection="secagg", protection_params=params),
        lambda: ctx.holder_rounds(protection="secagg", protection_params=params),
        lambda: ctx.channel.aggregate("n", {"n": 1.0}, protection="secagg", protection_params=params),
    ):
        with pytest.raises(ConfigurationError) as caught:
            call()
        assert all(text in caught.value.message for text in texts)
        assert caught.value.hint.startswith("params of secagg: clip, largest_weight, threshold")


def test_params_of_a_protection_without_any_are_refused(make_context: MakeContext) -> None:
    with pytest.raises(ConfigurationError, match=r"protection_params\.clip") as caught:
        make_context().contributor_rounds(1, protection="plain", protection_params={"clip": 1.0})
    assert caught.value.hint == "params of plain: none"


def test_a_sum_is_bound_to_job_attempt_conversation_and_floor(make_context: MakeContext) -> None:
    # Given a party with a floor, an identity and a key holder in its roster
    identity = Identity(bytes(32))
    signer = RosterSigner(identity, {"a": identity.public})
    ctx = make_context(attempt=3, sum_floor=SumFloor(4, 5, 0.5), signer=signer)
    ctx._setting = dataclasses.replace(ctx._setting, roster=Roster("a", (), "z", "k"))
    # When it uses rounds twice
    scenes = [ctx._rounds("contributor", 1, load_sum("plain")).scene for _ in range(2)]
    # Then each has a conversation of its own, and all else is the same
    assert [scene.conversation for scene in scenes if scene is not None] == ["tune", "tune#2"]
    for scene in scenes:
        assert scene is not None
        assert (scene.job, scene.attempt, scene.me, scene.key_holder) == ("job", 3, "a", "k")
        assert scene.floor == SumFloor(4, 5, 0.5)
        assert scene.signer is signer
        assert scene.cohort == ctx.cohort
    assert make_context().channel.scene is not None
    assert make_context()._setting.sum_floor == SumFloor(3, None, None), "what a party asks that has said nothing"


def test_each_side_and_conversation_has_a_journal_of_its_sums(make_context: MakeContext, tmp_path: Path) -> None:
    setting = make_context()._setting
    note = SumKeep("answered", Payload({"attempt": 1}), lasting=True)
    for side in ("contributor", "coordinator"):
        for conversation in ("tune", "tune/final/1"):
            setting.sum_journal(side, conversation).keep(1, note)
    found = {path.name for path in (tmp_path / "parties" / "a" / "journal").iterdir()}
    assert len(found) == 4
    # And a secret is written by a party that outlives its process only, under its own key
    secret = SumKeep("drawn", Payload({"seed": "5eed"}), secret=True)
    setting.sum_journal("contributor", "tune").keep(1, secret)
    assert not list(tmp_path.rglob("drawn.entry"))
    durable = dataclasses.replace(setting, durable=True)
    durable.sum_journal("contributor", "tune").keep(1, secret)
    assert durable.sum_journal("contributor", "tune").load(1)["drawn"].fields == {"seed": "5eed"}
    other = dataclasses.replace(durable, sum_key=bytes(32))
    with pytest.raises(DataError):
        other.sum_journal("contributor", "tune").load(1)
    assert "sum_key" not in repr(setting)


def test_every_use_of_the_rounds_is_a_conversation_of_its_own(
    make_context: MakeContext, together: Callable[..., dict[str, object]]
) -> None:
    # Given two uses of the rounds one after the other, When both sides run them, Then each has its own result
    state = {"w": np.zeros(2, np.float32)}

    def contribute() -> list[float]:
        ctx, found = make_context(), []
        for step in (1.0, 3.0):
            rounds = ctx.contributor_rounds(1, protection="plain")
            rounds.start(state)
            for round in rounds:
                result = round.contribute({"w": np.full(2, step, np.float32)}, weight=1.0)
                found.append(float(result.state["w"][0]))
        return found

    def coordinate() -> None:
        ctx = make_context("z", Role.ARBITER)
        for _ in range(2):
            rounds = ctx.coordinator_rounds(1, protection="plain")
            begin = rounds.start()
            for round in rounds:
                total = round.collect()
                round.publish({name: value + total.mean[name] for name, value in begin.items()})

    ends = together({"a": contribute, "z": coordinate})
    assert ends == {"a": [1.0, 3.0], "z": None}


# --- a party that outlives its process ------------------------------------------------------------------------


def test_a_name_of_the_catalog_is_the_party_s_own_path(make_context: MakeContext, tmp_path: Path) -> None:
    ctx = make_context()
    ctx._setting = dataclasses.replace(ctx._setting, catalog={"loans-2025": str(tmp_path / "x"), "cards": "/data/c"})
    assert ctx.resolve("catalog:loans-2025") == tmp_path / "x"
    assert ctx.resolve("catalog:cards") == Path("/data/c")
    with pytest.raises(DataError, match="the catalog of a has no data set 'loans-2052'") as caught:
        ctx.resolve("catalog:loans-2052")
    assert caught.value.hint == "did you mean 'loans-2025'?"
    assert ctx.resolve("data/catalog:x") == tmp_path / "data" / "catalog:x"


def test_a_party_without_a_catalog_says_so(make_context: MakeContext) -> None:
    with pytest.raises(DataError) as caught:
        make_context().resolve("catalog:loans")
    assert "catalog is empty" in caught.value.hint


def test_rounds_have_a_journal_only_where_the_party_outlives_its_process(make_context: MakeContext) -> None:
    ctx = make_context()
    assert not ctx.contributor_rounds(1, protection="plain").journals
    ctx._setting = dataclasses.replace(ctx._setting, durable=True)
    assert ctx.contributor_rounds(1, protection="plain").journals


class Nothing:
    def save(self, folder: Path) -> None: ...

    def restore(self, folder: Path) -> None: ...


@pytest.mark.parametrize("name", ["", "a/b", "Memory", "hook-0-int8", ".."])
def test_what_is_kept_has_a_name_that_can_be_a_folder_s(make_context: MakeContext, name: str) -> None:
    ctx = make_context()
    ctx._setting = dataclasses.replace(ctx._setting, durable=True)
    with pytest.raises(InternalError, match="nothing can be kept as"):
        ctx.contributor_rounds(1, protection="plain", keep={name: Nothing()})
