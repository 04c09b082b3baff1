"""Jobs under protections that hide terms: who signs, who takes part, what is repeated, and what others see."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from pydantic import Field

from fate_llm.core import plugins
from fate_llm.core.errors import FederationError
from fate_llm.core.interfaces import Context, Drop, Estimate, Frozen, PlanView, Port, PredictRule
from fate_llm.core.values import ArtifactKind
from fate_llm.runtime.events import Event
from fate_llm.runtime.job import JobResult, Submission
from fate_llm.runtime.jobfolder import PartyFolder
from tests.runtime.toys import toy_pipeline

MakeJob = Callable[..., Submission]
PLANTED = {"a": 90_210_101, "b": 90_210_202, "c": 90_210_303}  # of each party, in all that it counts


class Secretive:
    """Adds up numbers that nobody else may see, and says them in all of its own events."""

    class Params(Frozen):
        rounds: int = 2
        fail: str = Field("", description="party/round that fails before it contributes, in the first attempt only.")
        protection: str = Field("secagg", json_schema_extra={"plugin": "sum"})
        protection_params: dict[str, Any] = Field(default_factory=dict)

        @property
        def how(self) -> dict[str, Any]:
            return {"protection": self.protection, "protection_params": self.protection_params}

    inputs: ClassVar[Mapping[str, Port]] = {}
    outputs: ClassVar[Mapping[str, Port]] = {"metrics": Port(ArtifactKind.METRICS, "The totals.")}
    predict_rule: ClassVar[PredictRule] = Drop()
    failed: ClassVar[set[Path]] = set()

    def needs_experiment(self, params: Any) -> str | None:
        return None

    def estimate(self, view: PlanView) -> Estimate:
        return Estimate()

    def guest(self, ctx: Context) -> None:
        mine, params = PLANTED[ctx.party], ctx.params
        ctx.emit("data", rows=mine)
        ctx.emit("encoded", port="train", tokens=mine, text=f"{mine} tokens")
        rounds = ctx.contributor_rounds(params.rounds, **params.how)
        state = rounds.start({"x": np.zeros(3, np.float32)})
        for current in rounds:
            ctx.emit("step", step=current.number, steps=mine, round=current.number, loss=float(mine))
            self._fail(ctx, current.number)
            update = {"x": np.full(3, mine % 1000 / 1000, np.float32)}
            result = current.contribute(update, weight=float(mine % 100), sums={"n": float(mine)})
            state = result.state
            ctx.emit("round", round=current.number, loss=result.sums["n"], local_loss=float(mine), tokens=mine)
        total = ctx.channel.aggregate("final", {"n": float(mine)}, **params.how)
        ctx.output("metrics").write_text(json.dumps({"x": [float(v) for v in state["x"]], "n": total["n"]}))

    host = guest

    def arbiter(self, ctx: Context) -> None:
        rounds = ctx.coordinator_rounds(ctx.params.rounds, **ctx.params.how)
        state = rounds.start()
        for current in rounds:
            state = {"x": state["x"] + current.collect().mean["x"]}
            current.publish(state)
        ctx.channel.aggregate("final", None, **ctx.params.how)

    def key_holder(self, ctx: Context) -> None:
        ctx.holder_rounds(**ctx.params.how)
        ctx.channel.hold("final", **ctx.params.how)

    def _fail(self, ctx: Context, number: int) -> None:
        marker = ctx.resolve("failed")
        if ctx.params.fail == f"{ctx.party}/{number}" and not marker.exists():
            marker.touch()
            raise FederationError("the line is down")


@pytest.fixture(autouse=True)
def _installed(_toys: None, monkeypatch: pytest.MonkeyPatch) -> None:
    before = plugins._installed

    def more(kind: str) -> dict[str, EntryPoint]:
        point = EntryPoint("secretive", f"{__name__}:Secretive", "fate_llm.components")
        return {**before(kind), **({"secretive": point} if kind == "component" else {})}

    monkeypatch.setattr(plugins, "_installed", more)


def pipeline(*, parties: Mapping[str, Any] | None = None, job: Mapping[str, Any] | None = None, **params: Any) -> Any:
    data = toy_pipeline(add={"component": "secretive", "params": params})
    data["job"] |= {"round_deadline": 20, **(job or {})}
    data["parties"] |= parties or {}
    return data


def outcome(result: JobResult) -> dict[str, Any]:
    """What every contributor found, all the same."""
    found = [json.loads(Path(result.outputs[party]["add"]["metrics"]).read_text()) for party in PLANTED]
    assert found[0] == found[1] == found[2]
    return dict(found[0])


def expected(rounds: int = 2) -> tuple[float, float]:
    weights = {party: mine % 100 for party, mine in PLANTED.items()}
    mean = sum(weights[party] * (mine % 1000 / 1000) for party, mine in PLANTED.items()) / sum(weights.values())
    return rounds * mean, float(sum(PLANTED.values()))


@pytest.mark.parametrize("protection", ["plain", "secagg", "ckks"])
def test_a_job_finds_the_same_under_every_protection(make_job: MakeJob, protection: str) -> None:
    if protection == "ckks":
        pytest.importorskip("tenseal")
    params = {} if protection == "plain" else {"protection_params": {"largest_weight": 128}}
    data = pipeline(protection=protection, parties={"key_holder": "k"} if protection == "ckks" else None, **params)
    result = make_job(data).run().raise_for_status()
    mean, total = expected()
    found = outcome(result)
    assert found["x"] == pytest.approx([mean] * 3, abs=1e-5)
    assert found["n"] == pytest.approx(total, rel=1e-6)
    holders = {"k"} if protection == "ckks" else set()
    assert {party for party, tasks in result.outputs.items() if "add" in tasks} == {*PLANTED}
    assert ({path.name for path in (result.folder / "parties").iterdir()}) == {*PLANTED, "z", *holders}


def test_a_key_holder_has_nothing_to_do_where_no_sum_needs_it(make_job: MakeJob) -> None:
    result = make_job(pipeline(parties={"key_holder": "k"})).run().raise_for_status()
    lines = (result.folder / "parties" / "k" / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["party_finished"]


# --- what others see ---------------------------------------------------------------------------------------


def test_what_is_streamed_has_totals_and_no_number_of_a_party(make_job: MakeJob) -> None:
    heard: list[Event] = []
    result = make_job(pipeline(), heard.append).run().raise_for_status()
    shown = str([event.as_dict() for event in heard])
    for mine in PLANTED.values():
        assert str(mine) not in shown
    losses = [event.fields["loss"] for event in heard if event.kind == "round"]
    assert losses == [pytest.approx(expected()[1], rel=1e-6)] * 6
    assert {event.kind for event in heard} >= {"task_started", "round", "round_closed", "task_finished"}
    # And the party's own files have them
    own = (result.folder / "parties" / "b" / "events.jsonl").read_text()
    assert str(PLANTED["b"]) in own


def test_the_planted_numbers_are_found_where_nothing_hides_them(make_job: MakeJob) -> None:
    heard: list[Event] = []
    make_job(pipeline(protection="plain"), heard.append).run().raise_for_status()
    shown = str([event.as_dict() for event in heard])
    assert all(str(mine) in shown for mine in PLANTED.values()), "else the test above could not fail"


def test_the_files_of_others_do_not_have_them(make_job: MakeJob) -> None:
    result = make_job(pipeline()).run().raise_for_status()
    for party, mine in PLANTED.items():
        texts = [str(mine), float(mine).hex(), mine.to_bytes(8, "little").hex()]
        for other in {*PLANTED, "z"} - {party}:
            held = b"".join(p.read_bytes() for p in (result.folder / "parties" / other).rglob("*") if p.is_file())
            for text in texts:
                assert text.encode() not in held
            assert np.float64(mine).tobytes() not in held


# --- attempts ----------------------------------------------------------------------------------------------


def test_what_was_not_answered_is_tried_again(make_job: MakeJob) -> None:
    # Given a party that fails before it has sent anything of the first round
    result = make_job(pipeline(fail="b/1", job={"retries": 1})).run()
    # Then the second attempt, with other keys and identities, ends well
    assert result.status == "success"
    assert outcome(result)["n"] == pytest.approx(expected()[1], rel=1e-6)


def test_a_round_that_was_answered_is_not_answered_in_another_attempt(make_job: MakeJob) -> None:
    # Given a party that fails in the second round: all have answered the first one
    heard: list[Event] = []
    result = make_job(pipeline(fail="b/2", job={"retries": 1}), heard.append).run()
    # Then the attempt that would begin anew is refused, and nobody gets a second sum of the first round
    assert [event.kind for event in heard if event.kind == "retry"] == ["retry"]
    assert result.status == "failed"
    again = heard[[event.kind for event in heard].index("retry") :]
    assert not [event for event in again if event.kind in ("round", "round_closed", "round_state")]


def test_what_lasts_of_an_answer_is_on_disk_and_nothing_else(make_job: MakeJob) -> None:
    result = make_job(pipeline()).run().raise_for_status()
    kept = [path for path in (result.folder / "parties").rglob("*") if ".sums" in str(path) and path.is_file()]
    assert kept
    assert {path.parent.parent.name for path in kept} == {"lasting"}
    assert {path.relative_to(result.folder / "parties").parts[0] for path in kept} == {*PLANTED}


def test_a_folder_of_sums_stands_beside_those_of_rounds(tmp_path: Path) -> None:
    from fate_llm.runtime.sum_journal import sum_folder

    place = sum_folder(PartyFolder(tmp_path / "a").path, "add/final/1", "contributor")
    assert place == tmp_path / "a" / "journal" / "add%2Ffinal%2F1.contributor.sums"


# --- refusals ----------------------------------------------------------------------------------------------


def test_params_that_only_a_component_s_code_gives_are_refused_by_name(make_job: MakeJob) -> None:
    class Careless(Secretive):
        class Params(Secretive.Params):
            @property
            def how(self) -> dict[str, Any]:
                return {"protection": "secagg", "protection_params": {"clop": 1, "clip": -1}}

    point = EntryPoint("secretive", f"{__name__}:_CARELESS", "fate_llm.components")
    globals()["_CARELESS"] = Careless
    before = plugins._installed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            plugins,
            "_installed",
            lambda kind: {**before(kind), **({"secretive": point} if kind == "component" else {})},
        )
        result = make_job(pipeline()).run()
    assert result.error is not None
    assert result.error.code == "configuration"
    assert "protection_params.clop" in result.error.message
    assert "protection_params.clip" in result.error.message
    assert "clip" in result.error.hint and "threshold" in result.error.hint
