"""What is kept of a job beside the database, and what of it is shown; costs and orders; questions among offices."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fate_llm.core import plugins
from fate_llm.core.errors import DataError, InternalError
from fate_llm.core.values import SumFloor
from fate_llm.pipelines import check
from fate_llm.runtime.service import views
from fate_llm.runtime.service.cases import Accepted
from fate_llm.runtime.service.clerk import Clerk
from fate_llm.runtime.service.keeping import is_kept
from fate_llm.runtime.service.orders import estimate, fingerprint, localised
from fate_llm.runtime.service.words import Ending, JobState, PartState, PartView, Trouble
from fate_llm.runtime.store.rows import TaskRow
from tests.runtime import toys

from .offices import World, make_homes, pipeline, without_disk


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(plugins, "_installed", toys.installed)
    without_disk(monkeypatch)
    world = World(tmp_path, make_homes(tmp_path / "homes"))
    yield world
    world.close()


def test_what_was_accepted_and_how_it_ended_outlive_the_service(world: World) -> None:
    job = world.submit()
    world.all_run(job)
    case = world["b"].case(job)
    assert case.accepted().judged > 0
    accepted = Accepted(("loans",), "ab" * 32, 5.0, 2.5, 7.0, "secagg", SumFloor(4, 5, 0.5))
    case.accept(accepted)
    assert case.accepted() == accepted
    # A file of the version before, and one that a crash has damaged: nothing may be opened then
    path = case.folder.path / "accepted.json"
    old = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("judged", "sum_floor")}
    path.write_text(json.dumps(old))
    assert case.accepted().judged == 0.0
    assert case.accepted().sum_floor == SumFloor(3, None, None)
    path.write_text("{")
    assert case.accepted() == Accepted()
    # How it ended, with what every party did
    trouble = Trouble(code="timeout", message="z was silent", party="z")
    case.parts = {"z": PartView(state=PartState.LOST, trouble=trouble)}
    case.keep_ending(Ending(state=JobState.TIMED_OUT, trouble=trouble, dossier={"large": "thing"}))
    case.parts, case.ending = {}, None
    case.load_ending()
    assert case.ending == Ending(state=JobState.TIMED_OUT, trouble=trouble)
    assert case.parts["z"].trouble == trouble


def test_a_worker_is_told_what_it_needs_and_no_more(world: World) -> None:
    (world["b"].folder / "catalog.yaml").write_text(
        "version: 1\nentries:\n  notes: {path: notes.txt, kind: dataset}\n  secret: {path: secret.txt, kind: dataset}\n"
    )
    data = pipeline()
    data["overrides"] = {"b": {"words": {"params": {"path": "catalog:notes"}}}}
    job = world.submit(data)
    world.all_run(job)
    order = world["b"].workers.orders[job]
    assert order["catalog"] == {"notes": str(world["b"].folder / "notes.txt")}, "the other stays closed"
    assert world["a"].workers.orders[job]["catalog"] == {}
    assert order["orphan"] == "exit"
    assert order["durable"] is True
    assert set(order["roster"]) == {"a", "b", "z"}
    password = (world["b"].folder / "broker.password").read_text().strip()
    assert password in order["broker"]
    assert order["timing"]["silence"] >= 2 * world["b"].case(job).part.lost_after
    # Nothing of the order is on disk
    for path in (world["b"].folder / "state").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert password.encode() not in content, path
            assert order["identity"].encode() not in content, path


def test_a_worker_is_told_the_floor_of_its_party_s_own_policy(world: World) -> None:
    # Given a party that asks more of sums than the others
    path = world["b"].folder / "policy.yaml"
    rule = "protection: {least: plain, contributors: 2}"
    assert rule in path.read_text()
    mine = "protection: {least: plain, contributors: 2, threshold: 5, clip: 0.5}"
    path.write_text(path.read_text().replace(rule, mine))
    # When the job starts, Then its worker is told so, and no other
    job = world.submit()
    world.all_run(job)
    assert world["b"].workers.orders[job]["sum_floor"] == {"contributors": 2, "threshold": 5, "clip": 0.5}
    assert world["a"].workers.orders[job]["sum_floor"] == {"contributors": 2, "threshold": None, "clip": None}
    assert world["b"].case(job).accepted().sum_floor == SumFloor(2, 5, 0.5)


@pytest.mark.parametrize("error", [None, DataError("row 3")])
def test_what_sums_kept_goes_with_the_job(world: World, error: Any) -> None:
    job = world.submit()
    world.all_run(job)
    own = world["b"].case(job).own.path / "journal"
    for name in ("add.contributor", "add.contributor.sums", "add%2Ffinal%2F1.contributor.sums"):
        (own / name).mkdir(parents=True)
    for name in ("a", "z", "b"):
        world[name].work(job, error)
    world.ended(job)
    emptied = {name for folders in world["b"].clerk.emptied for name in folders}
    if error is None:
        assert emptied == {"link", "journal"}
    else:
        assert emptied == {"link", "add.contributor.sums", "add%2Ffinal%2F1.contributor.sums"}


@pytest.mark.usefixtures("world")
def test_what_a_job_would_cost_is_what_was_measured(tmp_path: Path) -> None:
    spec = check(pipeline())
    took = {fingerprint(spec, "b", "words"): 30.0}
    costs = estimate(spec, "b", {}, took.get, tmp_path)
    assert costs.minutes is None, "add has never run here"
    took[fingerprint(spec, "b", "add")] = 60.0
    assert estimate(spec, "b", {}, took.get, tmp_path).minutes == 1.5
    assert fingerprint(spec, "a", "words") != fingerprint(spec, "b", "words"), "b has other params"
    data = pipeline()
    data["tasks"]["words"]["params"]["path"] = "catalog:notes"
    data["tasks"]["words"]["params"]["notes"] = {"x": "catalog:other"}
    params = localised(check(data), {"notes": "/here/notes"}).tasks["words"].params
    assert params["path"] == "/here/notes"
    assert params["notes"] == {"x": "catalog:other"}


def test_rows_are_kept_when_all_their_outputs_are() -> None:
    assert is_kept(TaskRow("j", "t", 1, "success", None, None, {"a": "0" * 64}))
    assert is_kept(TaskRow("j", "t", 1, "success", None, None, {}))
    assert not is_kept(TaskRow("j", "t", 1, "success", None, None, {"a": "0" * 64, "b": "/a/path"}))


def test_metrics_are_escaped_and_whole() -> None:
    post: Any = SimpleNamespace(counts=Counter({'odd"\n\\': 2, "sent": 5}), connected=False)
    workers: Any = SimpleNamespace(running=lambda: {"j": 1})
    lines = views.metrics("a", {"running": 3, "failed": 1}, post, workers).splitlines()
    assert 'fate_llm_jobs{party="a",state="running"} 3' in lines
    assert 'fate_llm_words_total{party="a",what="odd\\"\\n\\\\"} 2' in lines
    assert 'fate_llm_broker_connected{party="a"} 0' in lines
    assert all(line.startswith(("#", "fate_llm_")) for line in lines)


def test_a_host_sees_the_cause_of_an_end_and_not_what_it_was_told_on_the_way(world: World) -> None:
    job = world.submit()
    world.all_run(job)
    case = world["b"].case(job)
    row = world["b"].store.job(job)
    assert row is not None
    case.part.wanted = JobState.FAILED
    own = Trouble(code="cancelled", message="the job has ended", party="b")
    case.parts = {"z": PartView(state=PartState.FAILED, trouble=Trouble(code="data_invalid", message="it", party="z"))}
    assert views.job(case, row)["trouble"]["party"] == "z"
    case.ending = Ending(state=JobState.FAILED, trouble=own.model_copy(update={"party": "a", "message": "the cause"}))
    assert views.job(case, row)["trouble"]["message"] == "the cause"
    assert views.summary(row)["state"] == "running"


# --- the clerk: what fails is told, and the next is done --------------------------------------------------------------


def test_the_clerk_goes_on_after_what_fails(tmp_path: Path) -> None:
    told: list[Any] = []
    said: list[str] = []
    clerk = Clerk(None, put=lambda call: told.append(call), say=said.append)  # type: ignore[arg-type]

    def full() -> None:
        raise OSError(28, "No space left on device")

    def ours() -> None:
        raise InternalError("a defect")

    clerk.do(full)
    clerk.do(ours)
    clerk.do(full, failed=lambda error: told.append(error))
    clerk.do(ours, lambda _: told.append("never"), failed=lambda error: told.append(error))
    clerk.do(lambda: 7, lambda result: told.append(result))
    clerk.close()
    for call in tuple(told):
        call()
    errors = [one for one in told if isinstance(one, InternalError)]
    assert [error.message for error in errors] == ["OSError: [Errno 28] No space left on device", "a defect"]
    assert told[-1] == 7
    assert "never" not in told
    assert len(said) == 2
