"""The desk of a service: jobs of three offices, killed between any two steps, told nonsense, and hit by errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fate_llm.core import plugins
from fate_llm.core.errors import ConfigurationError, PeerViolation, PolicyError, StoreLost, UnknownJob, WrongState
from fate_llm.pipelines import check
from fate_llm.runtime.record.audit import audit_files
from fate_llm.runtime.service import desk as desks
from fate_llm.runtime.service import questions
from fate_llm.runtime.service.words import (
    Ending,
    Estimates,
    JobState,
    Line,
    Lines,
    News,
    PartState,
    Question,
    Report,
    TaskView,
)
from fate_llm.runtime.trust.jobspec import Reuse, SignedSpecification, make_specification
from tests.runtime import toys

from .offices import MEMBERS, POLICY, Office, World, bug, make_homes, pipeline, without_disk


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_homes(tmp_path_factory.mktemp("homes"))


@pytest.fixture
def world(tmp_path: Path, homes: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(plugins, "_installed", toys.installed)
    without_disk(monkeypatch)
    world = World(tmp_path, homes)
    yield world
    world.close()


def audited(office: Office, job: str) -> list[str]:
    found = []
    for path in audit_files(office.folder / "state/audit"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found += [line["kind"] for line in lines if line["fields"].get("job") == job]
    return found


def states(world: World, job: str) -> set[str]:
    return {world[name].view(job)["state"] for name in MEMBERS}


# --- a job --------------------------------------------------------------------------------------------------------


def test_a_job_from_its_invitation_to_its_dossier(world: World) -> None:
    job = world.submit(labels={"ticket": "42"}, priority=7)
    world.run(job)
    assert states(world, job) == {"success"}
    for name in MEMBERS:
        view = world[name].view(job)
        assert set(view["parts"]) == set(MEMBERS)
        assert view["parts"]["b"]["tasks"] == {
            "words": {"state": "success", "round": 0, "rounds": 0},
            "add": {"state": "success", "round": 0, "rounds": 0},
        }
        assert (view["priority"], view["labels"], view["trouble"]) == (7, {"ticket": "42"}, None)
        assert world[name].desk.dossier(job)["statements"].keys() == set(MEMBERS)
        kinds = audited(world[name], job)
        assert kinds == (["submitted"] if name == "a" else []) + ["decision", "started", "ended"]
    world.no_errors()


def test_who_was_killed_at_any_step_goes_on(world: World) -> None:
    """Every office is killed and opened again after every step of a whole job; it ends the same."""
    job = world.submit()
    for turn in range(400):
        name = MEMBERS[turn % 3]
        world[name].again()
        world.step()
        for other in MEMBERS:
            office = world[other]
            if job in office.workers.orders and office.part(job) == "running":
                office.work(job)
        if all(world[name].case(job).over for name in MEMBERS):
            break
    assert states(world, job) == {"success"}
    assert world["a"].desk.dossier(job) == world["b"].desk.dossier(job) == world["z"].desk.dossier(job)
    rows = [world[name].store.job(job) for name in MEMBERS]
    assert all(row is not None and row.ended is not None for row in rows)
    world.no_errors()


@pytest.mark.parametrize("what", ["_decide", "_reserve", "_start", "_sign", "_close"])
def test_a_kill_between_what_is_stored_and_what_is_done(world: World, what: str) -> None:
    """The action is not done, the service dies, and it is done after the start."""
    job = world.submit()
    office = world["b"]
    actions = office.desk._taking._do
    hit = []

    def dies(*_: Any) -> None:
        hit.append(what)
        office.up = False
        raise KeyboardInterrupt

    for kind, action in list(actions.items()):
        if getattr(action, "__name__", "") == what:
            actions[kind] = dies
    for _ in range(100):
        try:
            world.step()
            for other in MEMBERS:
                if world[other].up and job in world[other].workers.orders:
                    world[other].work(job)
        except KeyboardInterrupt:
            office.up = True
            office.again()
            break
    assert hit == [what]
    for _ in range(100):
        world.step()
        for other in MEMBERS:
            if job in world[other].workers.orders:
                world[other].work(job)
    assert states(world, job) == {"success"}
    assert "ended" in audited(office, job)
    assert office.store.unfinished_jobs() == []


def test_what_the_clerk_had_not_done_when_the_service_died_is_done_again(world: World) -> None:
    job = world.submit()
    world.all_run(job)
    office = world["b"]
    for name in ("a", "z"):
        world[name].work(job)
    office.work(job)
    assert office.clerk.waiting, "outputs are to be kept"
    office.again()
    world.ended(job)
    rows = {row.task: row.outputs for row in office.store.tasks(job)}
    assert all(len(digest) == 64 for outputs in rows.values() for digest in outputs.values()), rows
    # And a kill after the end was told, before it was tidied up
    job = world.submit()
    world.all_run(job)
    for name in MEMBERS:
        world[name].work(job)
    world.until(lambda: office.case(job).part.over or office.clerk.waiting)
    office.again()
    world.ended(job)
    assert office.clerk.tidied


def test_room_is_kept_over_a_restart(world: World) -> None:
    for name in MEMBERS:
        path = world[name].folder / "party.yaml"
        path.write_text(path.read_text() + "resources: {cpus: 1}\n")
        world[name].again()
    old, new = world.submit(), world.submit()
    world.until(lambda: any(job in world["b"].workers.orders for job in (old, new)))
    (holder,) = world["b"].workers.orders
    world["b"].again()
    assert list(world["b"].workers.orders) == [holder], "and nobody gets its room"
    world.step()
    assert list(world["b"].workers.orders) == [holder]


# --- errors -------------------------------------------------------------------------------------------------------


def test_an_error_of_one_job_stops_no_other(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    bad, good = world.submit(), world.submit()
    usual = world["b"].desk._taking.tick

    def tick(case: Any, now: float) -> None:
        if case.job == bad:
            bug()
        usual(case, now)

    monkeypatch.setattr(world["b"].desk._taking, "tick", tick)
    world.run(good)
    assert world["b"].errors
    assert states(world, good) == {"success"}


def test_a_database_that_was_away_costs_nothing_but_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    job = world.submit()
    office, usual = world["b"], world["b"].store.save_job
    for after in (1, 2, 4, 7):
        calls = []

        def save(row: Any, after: int = after, calls: list[int] = calls) -> None:
            calls.append(1)
            if len(calls) == after:
                raise StoreLost("the database is away")
            usual(row)

        monkeypatch.setattr(office.store, "save_job", save)
        for _ in range(8):
            world.step()
    monkeypatch.setattr(office.store, "save_job", usual)
    for _ in range(30):
        world.step()
        for name in MEMBERS:
            if job in world[name].workers.orders:
                world[name].work(job)
    assert any(isinstance(error, StoreLost) for error in office.errors)
    assert states(world, job) == {"success"}


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), ConfigurationError("the file is gone")])
def test_a_worker_that_cannot_be_started_fails_the_part(world: World, fault: Exception) -> None:
    world["b"].workers.fault = fault
    job = world.submit()
    world.until(lambda: states(world, job) == {"failed"}, steps=400)
    trouble = world["z"].view(job)["trouble"]
    assert trouble["party"] == "b"
    assert "No space left" in trouble["message"] or "file is gone" in trouble["message"]


def test_a_job_whose_component_is_gone_stops_no_other(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    lost, fine = world.submit(pipeline(w={"component": "waiter"})), world.submit()
    world.all_run(fine)
    left = {name: toys.Installed(toy) for name, toy in toys.TOYS.items() if name != "waiter"}
    monkeypatch.setattr(plugins, "_installed", lambda kind: left if kind == "component" else {})
    world["b"].again()
    assert any(lost in line and "cannot be taken up" in line for line in world["b"].log)
    assert fine in world["b"].workers.orders


def test_a_submission_is_stored_whole_or_not_at_all(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world["a"].desk._leading, "store", bug)
    with pytest.raises(Exception, match="a defect"):
        world.submit()
    world["a"].again()
    assert world["a"].desk.jobs(states=(), limit=10) == []
    assert world["a"].store.unfinished_jobs() == []


# --- what people ask ------------------------------------------------------------------------------------------------


def test_the_same_key_is_the_same_job(world: World) -> None:
    assert world.submit(key="a-key-of-mine") == world.submit(key="a-key-of-mine") != world.submit(key="another-key")


def test_a_list_finds_what_is_old(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desks, "_PAGE", 3)
    first = world.submit()
    world["a"].desk.cancel(first, reason="", by="")
    rest = []
    for _ in range(4):
        world.time += 1
        rest.append(world.submit())
    assert [row["job"] for row in world["a"].desk.jobs(states=("cancelled",), limit=5)] == [first]
    assert [row["job"] for row in world["a"].desk.jobs(states=(), limit=3)] == rest[:0:-1]
    assert len(world["a"].desk.jobs(states=(), limit=100)) == 5
    with pytest.raises(ConfigurationError, match="called 'running wild'"):
        world["a"].desk.jobs(states=("running wild",), limit=5)


def test_what_does_not_fit_is_refused_and_changes_nothing(world: World) -> None:
    job = world.submit()
    desk = world["a"].desk
    with pytest.raises(UnknownJob):
        desk.job("nothing")
    with pytest.raises(WrongState, match="Only a job that has"):
        try:
            desk.resume(job, reason="", by="")
        except WrongState as error:
            raise WrongState(error.hint) from None
    with pytest.raises(WrongState, match="is invited"):
        desk.rerun(job, from_task="add", by="")
    with pytest.raises(ConfigurationError, match="no task 'nope'"):
        desk.rerun(job, from_task="nope", by="")
    with pytest.raises(WrongState, match="no dossier yet"):
        desk.dossier(job)
    with pytest.raises(WrongState, match="does not wait for a decision"):
        desk.decide(job, decision="approve", digest="0" * 64, by="", reason="")
    with pytest.raises(ConfigurationError, match="maybe"):
        desk.decide(job, decision="maybe", digest="0" * 64, by="", reason="")
    data = pipeline()
    data["parties"] = {"guest": "b", "hosts": ["a"], "arbiter": "z"}
    with pytest.raises(PolicyError, match="the guest of the pipeline is b"):
        world.submit(data)
    with pytest.raises(PolicyError, match="the guest of the pipeline is b"):
        desk.ask_all(data)
    world.run(job)
    before = audited(world["a"], job)
    for call in (desk.cancel, desk.resume):
        with pytest.raises(WrongState):
            call(job, reason="", by="")
    assert audited(world["a"], job) == before, "what was refused is no decision"


def test_a_part_that_is_cancelled_ends_the_job_and_a_wish_goes_on_with_it(world: World) -> None:
    job = world.submit()
    world.all_run(job)
    world["b"].desk.cancel(job, reason="the disk is full", by="eve")
    assert world["b"].workers.stopped
    world["b"].over(job)  # too late for a success
    world.until(lambda: world["a"].view(job)["state"] == "cancelled")
    for name in ("a", "z"):
        world[name].over(job, PeerViolation("stopped"))
    world.ended(job)
    assert "eve: the disk is full" in world["z"].view(job)["trouble"]["message"]
    world["b"].desk.resume(job, reason="there is room again", by="eve")
    world.all_run(job)
    world.run(job)
    assert states(world, job) == {"success"}
    assert world["z"].view(job)["attempt"] == 2


def test_a_rerun_takes_over_outputs_at_once_and_only_of_the_same_job(world: World) -> None:
    job = world.submit()
    world.run(job)
    again = world["a"].desk.rerun(job, from_task="add", by="")["job"]
    world.all_run(again)
    order = world["b"].workers.orders[again]
    assert list(order["finished"]) == ["words"]
    assert Path(order["finished"]["words"]["dataset"]).read_text() == "dataset of words at b"
    world.run(again)
    assert states(world, again) == {"success"}
    whole = world["a"].desk.rerun(job, from_task="words", by="")["job"]
    world.all_run(whole)
    assert world["b"].workers.orders[whole]["finished"] == {}


def foreign(world: World, guest: str, data: dict[str, Any], name: str, **more: Any) -> SignedSpecification:
    """What another guest signs."""
    data = {**data, "parties": {"guest": guest, "hosts": ["a" if guest == "b" else "b"], "arbiter": "z"}}
    hall = world[guest].hall
    made = make_specification(check(data), job=name, federation=hall.roster.present, created=world.now(), **more)
    return made.sign(hall.identity)


def invite(world: World, guest: str, receiver: str, signed: SignedSpecification, **more: Any) -> None:
    usual: dict[str, Any] = {"digest": signed.digest, "serial": 1, "state": JobState.INVITED, "attempt": 1}
    specification = signed.to_data()
    news = News(**{"job": signed.specification.job, "specification": specification, **usual, **more})
    world.post(guest, receiver, news)
    world.step()


def test_nobody_takes_over_what_another_s_job_has_made(world: World) -> None:
    job = world.submit()
    world.run(job)
    signed = foreign(world, "b", pipeline(), "thief-1", reuse=Reuse(job=job, tasks=("words",)))
    invite(world, "b", "z", signed)
    invite(world, "b", "a", signed)
    assert world["a"].part("thief-1") == "refused"
    assert "not kept here" in world["a"].case("thief-1").part.reason
    # Nor the same guest with another pipeline, or with what something that runs again feeds
    data = pipeline()
    data["tasks"]["words"]["params"]["word"] = "xyz"
    for name, spec, tasks in (("thief-2", data, ("words",)), ("thief-3", pipeline(), ("add",))):
        hall = world["a"].hall
        made = make_specification(
            check(spec),
            job=name,
            federation=hall.roster.present,
            created=world.now(),
            reuse=Reuse(job=job, tasks=tasks),
        )
        invite(world, "a", "b", made.sign(hall.identity))
        assert world["b"].part(name) == "refused", name


# --- people ---------------------------------------------------------------------------------------------------------


def test_a_yes_that_was_stored_when_the_service_died_counts(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    (world["b"].folder / "policy.yaml").write_text(POLICY.replace("manual: []", "manual: [any]"))
    job = world.submit()
    world.until(lambda: world["b"].part(job) == "approval")
    (row,) = world["b"].desk.approvals()
    monkeypatch.setattr(world["b"].desk._taking, "handle", bug)
    with pytest.raises(Exception, match="a defect"):
        world["b"].desk.decide(job, decision="approve", digest=row["digest"], by="eve", reason="")
    world["b"].again()
    assert world["b"].part(job) != "approval"
    world.run(job)


def test_a_no_of_an_earlier_attempt_is_no_answer_to_the_next(world: World) -> None:
    (world["b"].folder / "policy.yaml").write_text(POLICY.replace("manual: []", "manual: [any]"))
    job = world.submit()
    world.until(lambda: world["b"].part(job) == "approval")
    (row,) = world["b"].desk.approvals()
    world["b"].desk.decide(job, decision="refuse", digest=row["digest"], by="eve", reason="no")
    world.ended(job)
    assert world["b"].desk.approvals() == []
    world.time += 10
    world["a"].desk.resume(job, reason="", by="")
    world.until(lambda: world["b"].part(job) == "approval")
    world["b"].again()
    (row,) = world["b"].desk.approvals()
    world["b"].desk.decide(job, decision="approve", digest=row["digest"], by="eve", reason="")
    world.run(job)


def test_a_job_that_was_never_let_in_makes_nobody_known(world: World) -> None:
    (world["b"].folder / "policy.yaml").write_text(POLICY.replace("manual: []", "manual: [new_initiator]"))
    for _ in range(2):
        job = world.submit()
        world.until(lambda job=job: world["b"].part(job) == "approval")  # type: ignore[misc]
        world["a"].desk.cancel(job, reason="", by="")
        world.ended(job)
        assert world["b"].desk.approvals() == []
    job = world.submit()
    world.until(lambda: world["b"].part(job) == "approval")
    (row,) = world["b"].desk.approvals()
    world["b"].desk.decide(job, decision="approve", digest=row["digest"], by="eve", reason="")
    world.run(job)
    job = world.submit()
    world.run(job)


# --- what others say --------------------------------------------------------------------------------------------------


def last_report(world: World, office: str, job: str) -> Report:
    return [word for _, word in world[office].sent if isinstance(word, Report) and word.job == job][-1]


def test_invitations_that_are_not_believed_are_answered_once_and_not_stored(world: World) -> None:
    signed = foreign(world, "b", pipeline(), "evil-1")
    changed = signed.to_data()
    changed["specification"]["priority"] = 9
    digest = SignedSpecification.from_data(changed).digest
    for _ in range(5):
        invite(world, "b", "z", signed, specification=changed, digest=digest)
    reports = [word for _, word in world["z"].sent if isinstance(word, Report)]
    assert len(reports) == 1
    assert "signature" in reports[0].reason
    for name, more in (("evil-2", {"digest": "0" * 64}), ("evil-3", {"job": "another"})):
        signed = foreign(world, "b", pipeline(), name)
        invite(world, "b", "z", signed, **more)
        assert "another job or digest" in last_report(world, "z", more.get("job", name)).reason
    invite(world, "b", "z", foreign(world, "a", pipeline(), "evil-4"))
    assert "b invites to a job of a" in last_report(world, "z", "evil-4").reason
    data = pipeline()
    signed = foreign(world, "b", data, "evil-5")
    world.time += 8 * 86400
    invite(world, "b", "z", signed)
    assert "expired" in last_report(world, "z", "evil-5").reason
    assert world["z"].store.jobs() == []
    assert list((world["z"].folder / "state/jobs").iterdir()) == []
    invite(world, "b", "z", foreign(world, "b", pipeline(), "evil-6"), state=JobState.CANCELLED)
    assert world["z"].store.jobs() == [], "nobody is invited to what has ended"


def test_one_initiator_has_not_all_the_place(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desks, "_MOST_OPEN", 2)
    for number in range(3):
        invite(world, "b", "z", foreign(world, "b", pipeline(), f"many-{number}"))
    assert "2 jobs of b have not ended" in last_report(world, "z", "many-2").reason
    assert len(world["z"].store.jobs()) == 2


def test_an_attempt_beyond_measure_costs_nothing(world: World) -> None:
    signed = foreign(world, "b", pipeline(), "huge")
    invite(world, "b", "z", signed, attempt=2**31 - 1)
    assert world["z"].part("huge") == "accepted"
    ending = Ending(state=JobState.CANCELLED)
    invite(world, "b", "z", signed, attempt=2**31 - 1, serial=2, state=JobState.CANCELLED, ending=ending)
    for _ in range(3):
        invite(world, "b", "z", signed, attempt=2**31 - 1, serial=2, state=JobState.CANCELLED, ending=ending)
    world.until(lambda: world["z"].view("huge")["over"])
    assert [len(inboxes) for inboxes in world["z"].clerk.tidied] == [100]
    world.no_errors()


def test_who_does_not_lead_a_job_says_nothing_about_it(world: World) -> None:
    job = world.submit()
    world.all_run(job)
    digest = world["z"].view(job)["digest"]
    world.post("b", "z", News(job=job, digest=digest, serial=2**40, state=JobState.FAILED, attempt=1))
    world.post("b", "z", Report(job=job, digest=digest, serial=2**40, state=PartState.FAILED, attempt=1))
    world.post("b", "z", Lines(job=job, digest=digest, lines=(Line(number=1, seconds=0.0, event="forged"),)))
    world.step()
    assert world["z"].view(job)["state"] == "running"
    assert "forged" not in json.dumps(world["z"].desk.lines(job, after=0, limit=5000))
    tasks = {f"t{number}": TaskView(state="running") for number in range(900)}
    world.post("z", "a", Report(job=job, digest=digest, serial=2**40, state=PartState.RUNNING, attempt=1, tasks=tasks))
    world.step()
    assert set(world["a"].view(job)["parts"]["z"]["tasks"]) <= {"words", "add"}


def test_lines_of_a_partner_do_not_fill_the_disk(world: World) -> None:
    job = world.submit()
    world.all_run(job)
    digest = world["a"].view(job)["digest"]
    fields = {"x": ["y" * 1000] * 1000}
    world.step(10)
    number = world["a"].store.last_line(job, "b") + 1
    world.post(
        "b", "a", Lines(job=job, digest=digest, lines=(Line(number=number, seconds=0.0, event="e", fields=fields),))
    )
    world.step()
    found = [line for line in world["a"].desk.lines(job, after=0, limit=5000)["lines"] if line["number"] == number]
    forged = [line["fields"].keys() for line in found if (line["party"], line["event"]) == ("b", "e")]
    assert forged == [{"left_out"}]


# --- questions --------------------------------------------------------------------------------------------------------


def test_a_question_is_answered_by_everybody_and_kept_by_nobody(world: World) -> None:
    (world["b"].folder / "policy.yaml").write_text("version: 1\nintiators: [secret-partner]\n")
    asked = world["a"].desk.ask_all(pipeline())
    world.step()
    world.step()
    assert asked.done.is_set()
    page = world["a"].desk.plan_of(asked)["parties"]
    assert {party: answer["verdict"] for party, answer in page.items()} == {"a": "accept", "b": "refuse", "z": "accept"}
    assert "secret" not in json.dumps(page)
    assert str(world["b"].folder) not in json.dumps(page)
    assert page["a"]["estimates"]["privacy"] == "no differential privacy"
    assert all(world[name].store.jobs() == [] for name in MEMBERS)


def test_who_does_not_answer_is_named(world: World) -> None:
    world["b"].kill()
    asked = world["a"].desk.ask_all(pipeline())
    world.step()
    page = world["a"].desk.plan_of(asked)["parties"]
    assert (page["b"]["verdict"], page["b"]["trouble"]["code"]) == ("unknown", "timeout")
    assert "b did not answer" in page["b"]["trouble"]["message"]


def test_a_question_of_a_stranger_or_for_somebody_else_tells_nothing(world: World) -> None:
    signed = foreign(world, "a", pipeline(), "plan-1")
    world.post("b", "z", Question(question="q", specification=signed.to_data()))
    world.post("b", "z", Question(question="r", specification={"specification": {}, "signature": "00"}))
    world.step()
    answers = [word for _, word in world["z"].sent if word.kind == "answer"]
    assert [answer.findings for answer in answers if hasattr(answer, "findings")] == [(), ()]


def test_of_a_job_that_hides_terms_nobody_else_is_told_memory_or_time(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = Estimates(sent_bytes=11, received_bytes=12, memory_bytes=90_210_013, minutes=90_214.0)
    monkeypatch.setattr(questions, "estimate", lambda *_: costs)
    told = []
    for hiding in (frozenset[str](), frozenset({"add"})):
        monkeypatch.setattr(questions, "hiding_tasks", lambda spec, hiding=hiding: hiding)
        asked = world["a"].desk.ask_all(pipeline())
        world.until(asked.done.is_set)
        page = world["a"].desk.plan_of(asked)["parties"]
        assert page["a"]["estimates"]["memory_bytes"] == 90_210_013, "its own"
        told.append(page["b"]["estimates"])
    assert (told[0]["memory_bytes"], told[0]["minutes"]) == (90_210_013, 90_214.0)
    assert (told[1]["memory_bytes"], told[1]["minutes"]) == (None, None)
    assert (told[1]["sent_bytes"], told[1]["received_bytes"]) == (11, 12)
