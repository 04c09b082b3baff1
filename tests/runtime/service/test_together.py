"""All machines of a federation together, over a network and services that fail: the proof of the scheduler.

A world of parties with services, each with its machines, slots and workers. Words get lost, doubled, delayed and
reordered. Any service may be killed at any step: before an event is stored, between that and any of its actions, after
them; it comes up later with what it had stored. Workers die, fail and cannot be stopped at once; people approve, deny,
cancel and resume. What must hold always is asserted where it happens, what must hold at the end in `World.check_end`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fate_llm.core.errors import DataError, FateError, JobCancelled, PeerFailed
from fate_llm.runtime.service import lead as leads
from fate_llm.runtime.service import part as parts
from fate_llm.runtime.service.lead import LeadMachine
from fate_llm.runtime.service.part import PartMachine
from fate_llm.runtime.service.slots import Grant, Room, SlotAction, Slots
from fate_llm.runtime.service.words import Ending, Finding, JobState, News, PartState, Report, TaskView

EXAMPLES = int(os.environ.get("FATE_LLM_FUZZ_EXAMPLES", "0"))
ROUNDS = 3  # of the one task of a job
LOST_AFTER = 60.0
PATIENCE = 4000  # steps of a second until a world that is well again must have come to rest


class Killed(Exception):
    """The service is gone, here and now."""


@dataclass
class Faults:
    """What the network and the machines do wrong. Shares of words, of actions, and of worker's steps."""

    lose: float = 0.0
    double: float = 0.0
    delay: float = 3.0
    kill: float = 0.0
    die: float = 0.0
    outage: int = 8
    repeat: float = 0.0


@dataclass
class Job:
    """What the world knows of a job. policy: verdicts by party. people: what a person says when asked."""

    name: str
    lead: str
    members: tuple[str, ...]
    need: Room = field(default_factory=lambda: Room(cpus=1))
    priority: int = 5
    retries: int = 0
    policy: dict[str, str] = field(default_factory=dict)
    people: dict[str, bool] = field(default_factory=dict)
    fails: dict[tuple[str, int], FateError] = field(default_factory=dict)
    expires: float = 200.0
    resumed: int = 0
    endings: list[Ending] = field(default_factory=list)

    @property
    def digest(self) -> str:
        return self.name.encode().hex().ljust(64, "0")


@dataclass
class Worker:
    attempt: int
    stopping: bool = False
    lost: bool = False


@dataclass
class Disk:
    """What survives a kill at one party: machines, slots, what people said, rounds of the journal."""

    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    leads: dict[str, dict[str, Any]] = field(default_factory=dict)
    slots: dict[str, Any] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    closed: dict[str, Ending] = field(default_factory=dict)
    rounds: dict[tuple[str, int], int] = field(default_factory=dict)


class Service:
    """One party: the driver of its machines, as short as it can be."""

    def __init__(self, world: World, party: str) -> None:
        self.world, self.party, self.disk = world, party, Disk()
        self.disk.slots = Slots(Room(cpus=1), patience=30.0).to_data()
        self.up = True
        self.back_at = 0.0
        self.parts: dict[str, PartMachine] = {}
        self.leads: dict[str, LeadMachine] = {}
        self.workers: dict[str, Worker] = {}
        self.mail: list[tuple[Any, str, Any]] = []  # events of our own that come a moment later

    @property
    def slots(self) -> Slots:
        return Slots.from_data(self.disk.slots)

    def kill(self) -> None:
        self.up = False
        self.back_at = self.world.now + self.world.random.randint(0, self.world.faults.outage)
        self.parts, self.leads, self.workers, self.mail = {}, {}, {}, []

    def start(self) -> None:
        self.up = True
        self.parts = {job: PartMachine.from_data(data) for job, data in self.disk.parts.items()}
        self.leads = {job: LeadMachine.from_data(data) for job, data in self.disk.leads.items()}
        if self.world.forgetful:  # slots that live in memory: who holds room asks first
            self.disk.slots = Slots(self.slots.capacity, self.slots.patience).to_data()
            holds = (PartState.RUNNING, PartState.RESERVED)
            self.parts = dict(sorted(self.parts.items(), key=lambda item: item[1].state not in holds))
        for job in tuple(self.leads):
            self.tell_lead(job, leads.Restarted(self.world.now))
        for job in tuple(self.parts):
            if not (self.parts[job].over and job in self.disk.closed):
                self.tell_part(job, parts.Restarted(self.world.now))

    def may_die(self) -> None:
        if self.world.random.random() < self.world.faults.kill:
            raise Killed

    def handle(self, machine: Any, event: Any, stored: dict[str, dict[str, Any]]) -> list[Any]:
        before = machine.to_data()
        actions: list[Any] = machine.handle(event)
        if any(isinstance(action, parts.Ignored) for action in actions):
            assert machine.to_data() == before, f"{event} was ignored and changed something"
        self.may_die()
        if actions or not isinstance(event, parts.Tick):
            stored[machine.job] = machine.to_data()
        self.may_die()
        return actions

    def tell_part(self, job: str, event: Any) -> None:
        self.do_all(job, self.handle(self.parts[job], event, self.disk.parts), self.part_action)

    def tell_lead(self, job: str, event: Any) -> None:
        self.do_all(job, self.handle(self.leads[job], event, self.disk.leads), self.lead_action)

    def do_all(self, job: str, actions: list[Any], do: Callable[[str, Any], None]) -> None:
        for action in actions:
            do(job, action)
            if self.world.random.random() < self.world.faults.repeat:
                do(job, action)
            self.may_die()

    # --- what actions mean here ---

    def part_action(self, job: str, action: Any) -> None:
        now, case = self.world.now, self.world.jobs[job]
        match action:
            case parts.Decide():
                verdict = case.policy.get(self.party, "accept")
                outcome = {"accept": "pass", "manual": "manual", "refuse": "refuse"}[verdict]
                finding = Finding(rule="any", outcome=outcome)  # type: ignore[arg-type]
                self.mail.append((self.tell_part, job, parts.Decided(verdict, (finding,), now)))  # type: ignore[arg-type]
            case parts.AskHuman():
                self.disk.asked.add(job)
            case parts.Reserve(since):
                self.with_slots(lambda slots: slots.request(job, case.need, case.priority, now, since=since))
            case parts.Release():
                self.with_slots(lambda slots: slots.release(job, now))
            case parts.StartWorker(attempt):
                self.start_worker(case, attempt)
            case parts.StopWorker():
                if job in self.workers:
                    self.workers[job].stopping = True
            case parts.TellWorker(message):
                if job in self.workers:
                    self.workers[job].lost |= "lost" in message
            case parts.MakeStatement(attempt):
                told = {"party": self.party, "attempt": attempt}
                self.mail.append((self.tell_part, job, parts.Statement(told, now, attempt)))
            case parts.Say(report):
                self.world.send(self.party, case.lead, report)
            case parts.Close(ending):
                self.disk.closed[job] = ending
            case _:
                assert isinstance(action, parts.Note | parts.Ignored)

    def lead_action(self, job: str, action: Any) -> None:
        match action:
            case leads.Say(receiver, news, invite):
                content = {"signed": self.world.jobs[job].digest} if invite else None
                self.world.send(self.party, receiver, news.model_copy(update={"specification": content}))
            case leads.MakeDossier(_, _, attempt, statements):
                assert all(found["attempt"] <= attempt for found in statements.values())
                event = leads.Dossier({"statements": dict(statements)}, self.world.now, attempt)
                self.mail.append((self.tell_lead, job, event))
            case leads.Ended(ending):
                self.world.ended(self.world.jobs[job], ending)
            case _:
                assert isinstance(action, leads.Note | leads.Ignored)

    def with_slots(self, change: Callable[[Slots], list[SlotAction]]) -> None:
        slots = self.slots
        actions = change(slots)
        self.may_die()
        self.disk.slots = slots.to_data()
        self.may_die()
        for action in actions:
            granted = isinstance(action, Grant)
            event = parts.Granted(self.world.now) if granted else parts.NoRoom(action.reason, self.world.now)  # type: ignore[union-attr]
            self.mail.append((self.tell_part, action.job, event))

    def start_worker(self, case: Job, attempt: int) -> None:
        running = self.workers.get(case.name)
        assert running is None or running.attempt == attempt, "two attempts at once at one party"
        verdict = case.policy.get(self.party, "accept")
        assert verdict == "accept" or (
            verdict == "manual" and case.people[self.party] and case.name not in self.disk.asked
        )
        assert case.name in self.slots.held, "a worker without room"
        started = [number for name, number in self.disk.rounds if name == case.name]
        assert attempt >= max(started, default=0), "attempts go back"
        self.disk.rounds.setdefault((case.name, attempt), 0)
        self.workers[case.name] = Worker(attempt)

    # --- time passes ---

    def step(self) -> None:
        mail, self.mail = self.mail, []
        for tell, job, event in mail:
            tell(job, event)
        for job in tuple(self.leads):
            self.tell_lead(job, leads.Tick(self.world.now))
        for job in tuple(self.parts):
            if not self.parts[job].over:
                self.tell_part(job, parts.Tick(self.world.now))
        for job in tuple(self.workers):
            self.step_worker(self.world.jobs[job], self.workers[job])
        for job in sorted(self.disk.asked):
            if self.world.random.random() < 0.2:
                self.answer(self.world.jobs[job])

    def answer(self, case: Job) -> None:
        self.disk.asked.discard(case.name)
        if self.parts[case.name].state is PartState.APPROVAL:
            yes = case.people[self.party]
            self.tell_part(case.name, (parts.Approved if yes else parts.Denied)("ann", "", self.world.now))

    def step_worker(self, case: Job, worker: Worker) -> None:
        chance, now = self.world.random.random, self.world.now
        at = self.disk.rounds[case.name, worker.attempt]
        if chance() < self.world.faults.die:
            del self.workers[case.name]
            self.tell_part(case.name, parts.WorkerDied(worker.attempt, "killed by signal 9", now))
            return
        error = case.fails.get((self.party, worker.attempt))
        if worker.stopping or worker.lost:
            if chance() < 0.5:
                self.end_worker(
                    case, worker, JobCancelled("told to") if worker.stopping else PeerFailed("another failed")
                )
        elif error is not None and at >= 1:
            self.end_worker(case, worker, error)
        elif at == ROUNDS:
            self.end_worker(case, worker, None)
        elif all(self.world.at(case, party, worker.attempt) >= at for party in case.members) and chance() < 0.5:
            self.disk.rounds[case.name, worker.attempt] = at + 1
            view = TaskView(state="running", round=at + 1, rounds=ROUNDS)
            self.tell_part(case.name, parts.Progress({"train": view}, now))

    def end_worker(self, case: Job, worker: Worker, error: FateError | None) -> None:
        del self.workers[case.name]
        state = "failed" if error else "success"
        view = {"state": state, "round": self.disk.rounds[case.name, worker.attempt], "rounds": ROUNDS}
        end = {"error": error and error.as_dict(), "tasks": {"train": view}}
        self.tell_part(case.name, parts.WorkerEnded(worker.attempt, end, self.world.now))

    def hear(self, sender: str, word: News | Report) -> None:
        now = self.world.now
        if isinstance(word, Report):
            if word.job in self.leads:
                self.tell_lead(word.job, leads.Heard(word, sender, now))
            return
        case = self.world.jobs[word.job]
        assert sender == case.lead
        if word.job not in self.parts:
            if word.specification is None:
                return
            assert word.specification == {"signed": case.digest}
            made = PartMachine(case.name, case.digest, self.party, sender, lost_after=LOST_AFTER, heartbeat=2.0)
            self.parts[case.name] = made
        self.tell_part(word.job, parts.Told(word, now))


class World:
    """Parties a, b, c, ... with their services, the network between them, and one clock."""

    def __init__(self, count: int, seed: int, faults: Faults) -> None:
        self.random, self.faults, self.now = Random(seed), faults, 1000.0
        self.services = {party: Service(self, party) for party in "abcdef"[:count]}
        self.forgetful = seed % 2 == 1
        self.jobs: dict[str, Job] = {}
        self.wire: list[tuple[float, str, str, str]] = []
        self.history: list[tuple[str, str, str]] = []

    def guarded(self, service: Service, call: Callable[[], None]) -> None:
        try:
            call()
        except Killed:
            service.kill()

    def submit(self, case: Job) -> None:
        self.jobs[case.name] = case
        machine = LeadMachine(
            case.name,
            case.digest,
            case.lead,
            case.members,
            {"train": case.members},
            self.now + case.expires,
            retries=case.retries,
            lost_after=LOST_AFTER,
            heartbeat=2.0,
            room_patience=10.0,
            settle=6.0,
        )
        service = self.services[case.lead]
        service.leads[case.name] = machine
        self.guarded(service, lambda: service.tell_lead(case.name, leads.Submitted(self.now)))
        if case.name not in service.disk.leads:  # killed before it was stored: whoever submits tries again
            service.disk.leads[case.name] = machine.to_data()

    def send(self, sender: str, receiver: str, word: News | Report) -> None:
        text = word.model_dump_json()
        self.history.append((sender, receiver, text))
        copies = 2 if self.random.random() < self.faults.double else 1
        for _ in range(copies):
            if sender == receiver or self.random.random() >= self.faults.lose:
                due = self.now + self.random.random() * self.faults.delay
                self.wire.append((due, sender, receiver, text))

    def deliver(self, sender: str, receiver: str, text: str) -> None:
        service = self.services[receiver]
        if service.up:
            kind = News if '"kind":"news"' in text else Report
            word = kind.model_validate_json(text)
            self.guarded(service, lambda: service.hear(sender, word))

    def step(self) -> None:
        self.now += 1.0
        due = [entry for entry in self.wire if entry[0] <= self.now]
        self.wire = [entry for entry in self.wire if entry[0] > self.now]
        self.random.shuffle(due)
        for _, sender, receiver, text in due:
            self.deliver(sender, receiver, text)
        for service in self.services.values():
            if service.up:
                self.guarded(service, service.step)
            elif self.now >= service.back_at:
                self.guarded(service, service.start)

    def at(self, case: Job, party: str, attempt: int) -> int:
        return self.services[party].disk.rounds.get((case.name, attempt), 0)

    def ended(self, case: Job, ending: Ending) -> None:
        if not case.endings or case.endings[-1] != ending:
            case.endings.append(ending)
        assert len(case.endings) <= 1 + case.resumed, "it ended twice, and nobody resumed it"

    def heal(self) -> None:
        self.faults = Faults(delay=1.0)

    @property
    def at_rest(self) -> bool:
        if any(not service.up or service.workers or service.mail for service in self.services.values()):
            return False
        if any(not machine.final for service in self.services.values() for machine in service.leads.values()):
            return False
        return all(machine.over for service in self.services.values() for machine in service.parts.values())

    def rest(self, patience: int = PATIENCE) -> None:
        for _ in range(patience):
            self.step()
            if self.at_rest and not self.wire:
                return
        raise AssertionError(self.story())

    def story(self) -> str:
        lines = [f"not at rest at {self.now}"]
        for name, service in self.services.items():
            lines += [f"{name} leads {m.job}: {m.state} {m.attempt} final={m.final}" for m in service.leads.values()]
            lines += [f"{name} part {m.job}: {m.state} {m.attempt} closed={m.closed}" for m in service.parts.values()]
            lines += [f"{name} up={service.up} workers={service.workers} slots={service.disk.slots}"]
        return "\n".join(lines)

    def lead_of(self, case: Job) -> LeadMachine:
        return self.services[case.lead].leads[case.name]

    def check_end(self) -> None:
        for case in self.jobs.values():
            lead = self.lead_of(case)
            assert lead.ending is not None and case.endings and case.endings[-1] == lead.ending
            machines = [s.parts[case.name] for s in self.services.values() if case.name in s.parts]
            # Everywhere the same end
            for machine in machines:
                assert machine.attempt == lead.attempt, self.story()
                assert self.services[machine.party].disk.closed[case.name] == lead.ending
            successes = [m for m in machines if m.state is PartState.SUCCESS]
            if lead.state is JobState.SUCCESS:
                assert len(successes) == len(case.members) and lead.trouble is None
                assert all(self.at(case, party, lead.attempt) == ROUNDS for party in case.members)
                assert lead.ending.dossier is not None
                assert set(lead.ending.dossier["statements"]) == set(case.members)
            else:
                assert len(successes) < len(case.members) or lead.state is not JobState.FAILED
                assert lead.trouble is not None and lead.trouble.message
        # and nothing is left behind
        for service in self.services.values():
            assert not service.workers
            assert not service.slots.held and not service.slots.waiting
            assert set(service.disk.closed) >= set(service.parts)

    def check_deaf(self) -> None:
        """What was said once and is said again, in any order, wakes nobody."""
        states = {
            (name, job): (machine.state, machine.attempt)
            for name, service in self.services.items()
            for job, machine in service.parts.items()
        }
        # A wish that was lost on its way is the exception: it is still one when it arrives after all.
        old = [entry for entry in self.history if '"wish":"resume"' not in entry[2]]
        replay = self.random.sample(old, min(60, len(old)))
        for entry in replay:
            self.deliver(*entry)
        self.rest(200)
        after = {
            (name, job): (machine.state, machine.attempt)
            for name, service in self.services.items()
            for job, machine in service.parts.items()
        }
        assert {key: after[key] for key in states} == states
        self.check_end()


def world_of(count: int, seed: int, faults: Faults, **job: Any) -> tuple[World, Job]:
    world = World(count, seed, faults)
    case = Job("j1", "a", tuple(world.services), **job)
    world.submit(case)
    return world, case


def many(fast: int) -> Any:
    """How many examples: few in the fast tier, as many as FATE_LLM_FUZZ_EXAMPLES says else."""
    return settings(
        max_examples=EXAMPLES or fast,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow],
    )


# --- one job ----------------------------------------------------------------------------------------------------


def test_when_nothing_goes_wrong_all_succeed_in_the_first_attempt() -> None:
    world, case = world_of(3, 1, Faults())
    world.rest()
    world.check_end()
    assert world.lead_of(case).state is JobState.SUCCESS
    assert world.lead_of(case).attempt == 1
    assert all(machine.restarts == 0 for s in world.services.values() for machine in s.parts.values())


@many(20)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 4), people=st.booleans())
def test_short_outages_cost_nothing(seed: int, count: int, people: bool) -> None:
    """Lost words, killed services, dead workers: without an attempt more, the job succeeds."""
    # Given faults of every kind, none of which lasts
    faults = Faults(lose=0.2, double=0.2, kill=0.004, die=0.01, outage=6, repeat=0.1)
    manual = {"policy": {"a": "manual"}, "people": {"a": True}} if people else {}
    world, case = world_of(count, seed, faults, **manual)
    # When they go on until the job is over
    for _ in range(300):
        world.step()
        if world.lead_of(case).final if "j1" in world.services["a"].leads else False:
            break
    world.heal()
    world.rest()
    # Then it has succeeded everywhere, and no attempt was lost to a failure
    world.check_end()
    lead = world.lead_of(case)
    assert lead.state is JobState.SUCCESS, world.story()
    assert lead.retried == 0
    world.check_deaf()


OWN = {"a": DataError("row 3 has no text"), "b": FateError("out of luck"), "c": FateError("bad day")}


@many(40)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 4),
    kill=st.sampled_from([0.0, 0.002, 0.01, 0.05]),
    die=st.sampled_from([0.0, 0.02, 0.3]),
    lose=st.sampled_from([0.0, 0.2, 0.6]),
    outage=st.sampled_from([3, 30, 150]),
    delay=st.sampled_from([0.5, 4.0, 40.0]),
    retries=st.integers(0, 2),
    policies=st.lists(st.sampled_from(["accept", "accept", "accept", "manual", "refuse"]), min_size=4, max_size=4),
    yes=st.booleans(),
    failing=st.sets(st.tuples(st.sampled_from("abc"), st.integers(1, 3)), max_size=3),
    script=st.lists(
        st.tuples(st.integers(0, 250), st.sampled_from(["cancel", "resume", "kill"]), st.sampled_from("abcd")),
        max_size=4,
    ),
)
def test_whatever_happens_all_end_alike(
    seed: int,
    count: int,
    kill: float,
    die: float,
    lose: float,
    outage: int,
    delay: float,
    retries: int,
    policies: list[str],
    yes: bool,
    failing: set[tuple[str, int]],
    script: list[tuple[int, str, str]],
) -> None:
    # Given a job, and everything that can go wrong with it
    faults = Faults(lose=lose, double=0.1, delay=delay, kill=kill, die=die, outage=outage, repeat=0.1)
    world, case = world_of(
        count,
        seed,
        faults,
        retries=retries,
        policy=dict(zip("abcd", policies, strict=True)),
        people=dict.fromkeys("abcd", yes),
        fails={(party, attempt): OWN[party] for party, attempt in failing},
    )
    # When it goes on for a while, with people who interfere
    for second in range(260):
        for what, party in [(w, p) for at, w, p in script if at == second and p in world.services]:
            interfere(world, case, what, party)
        world.step()
    # Then all come to rest in the same end when the faults are over, with nothing left behind
    world.heal()
    world.rest()
    world.check_end()
    world.check_deaf()
    # and a job that nobody refuses and nothing fails can be resumed to success
    lead = world.lead_of(case)
    if lead.state is not JobState.SUCCESS and (yes or "manual" not in policies) and "refuse" not in policies:
        case.fails = {}
        case.resumed += 1
        world.services["a"].tell_lead(case.name, leads.Resume("ann", "mended", world.now))
        world.rest()
        world.check_end()
        assert world.lead_of(case).state is JobState.SUCCESS, world.story()


def interfere(world: World, case: Job, what: str, party: str) -> None:
    service = world.services[party]
    machine = service.parts.get(case.name)
    if what == "kill":
        service.kill()
    elif service.up and machine is not None and what == "cancel":
        event = parts.Cancel("enough", "bob", world.now)
        world.guarded(service, lambda: service.tell_part(case.name, event))
    elif service.up and machine is not None:
        case.resumed += int(machine.wanted.ended)
        wish = parts.Wish("resume", "bob", "again", world.now)
        world.guarded(service, lambda: service.tell_part(case.name, wish))


# --- many jobs --------------------------------------------------------------------------------------------------


def crowd(world: World, count: int, **job: Any) -> list[Job]:
    """Jobs that need all of every machine, led by one party after the other."""
    names = tuple(world.services)
    cases = []
    for number in range(count):
        lead = names[number % len(names)]
        members = (lead, *(name for name in names if name != lead))
        cases.append(Job(f"j{number}", lead, members, **job))
        world.submit(cases[-1])
    return cases


@many(6)
@given(seed=st.integers(0, 2**32), count=st.integers(2, 3), jobs=st.integers(2, 5))
def test_jobs_that_hold_each_the_room_that_others_need_all_succeed(seed: int, count: int, jobs: int) -> None:
    # Given jobs that ask for room at the same moment, in another order at each party
    world = World(count, seed, Faults(delay=4.0, lose=0.1, kill=0.001, outage=4))
    cases = crowd(world, jobs)
    # When time goes by
    world.rest()
    # Then each had its turn, without a failure
    world.check_end()
    assert all(world.lead_of(case).state is JobState.SUCCESS for case in cases), world.story()
    assert all(world.lead_of(case).retried == 0 for case in cases)


def test_a_job_that_can_never_have_room_is_refused_with_the_reason() -> None:
    world, case = world_of(2, 5, Faults(), need=Room(cpus=1, gpus=2))
    world.rest()
    world.check_end()
    lead = world.lead_of(case)
    assert lead.state is JobState.FAILED and lead.trouble is not None
    assert lead.trouble.code == "policy_refused" and "2 GPUs of 0" in lead.trouble.message


def test_a_job_that_waits_for_a_person_blocks_nobody() -> None:
    # Given one job whose people say nothing yet, and one behind it
    world, first = world_of(2, 7, Faults(), policy={"b": "manual"}, people={"b": True}, expires=1e6)
    world.services["b"].answer = lambda case: None  # type: ignore[method-assign]
    second = Job("j2", "a", ("a", "b"))
    for _ in range(20):
        world.step()
    world.submit(second)
    # When time goes by, Then the second runs to its end, and the first still waits, whoever is killed meanwhile
    for _ in range(60):
        world.step()
    assert world.lead_of(second).state is JobState.SUCCESS
    assert world.lead_of(first).state is JobState.INVITED
    for service in world.services.values():
        service.kill()
    for _ in range(700):  # longer than lost_after: waiting for a person is no silence
        world.step()
    assert world.lead_of(first).state is JobState.INVITED
    assert world.services["b"].parts["j1"].state is PartState.APPROVAL
    # When the person says yes at last, Then it runs
    del world.services["b"].answer  # type: ignore[attr-defined]
    world.rest()
    world.check_end()
    assert world.lead_of(first).state is JobState.SUCCESS


# --- silence ----------------------------------------------------------------------------------------------------


def until(world: World, reached: Callable[[], bool], steps: int = 300) -> None:
    for _ in range(steps):
        if reached():
            return
        world.step()
    raise AssertionError(world.story())


@pytest.mark.parametrize("party", ["a", "b"])
def test_a_machine_that_never_comes_back_ends_the_job_everywhere_and_says_so(party: str) -> None:
    # Given a running job
    world, case = world_of(3, 11, Faults(delay=0.5))
    until(world, lambda: all(s.parts["j1"].state is PartState.RUNNING for s in world.services.values() if s.parts))
    until(world, lambda: len([s for s in world.services.values() if s.workers]) == 3)
    # When one machine is gone for good
    world.services[party].kill()
    world.services[party].back_at = float("inf")
    gone = world.now
    others = [service for name, service in world.services.items() if name != party]
    until(world, lambda: not any(service.workers for service in others))
    # Then all others have stopped in the stated time, not before, and name it
    assert LOST_AFTER - 10 <= world.now - gone <= LOST_AFTER + 40
    for service in others:
        machine = service.parts["j1"]
        assert machine.state is PartState.CANCELLED and machine.trouble is not None
        if party == "a":
            assert machine.trouble.code == "timeout" and "no word from a" in machine.trouble.message
    if party == "b":
        until(world, lambda: world.lead_of(case).final)
        lead = world.lead_of(case)
        assert lead.state is JobState.TIMED_OUT and lead.trouble is not None
        assert lead.trouble.party == "b" and "no word from b for 60 s" in lead.trouble.message
        assert lead.parts["b"].state is PartState.LOST
    # and when it comes back after all, it hears of it
    world.services[party].back_at = world.now
    world.rest()
    world.check_end()


def test_a_lead_that_comes_back_late_may_try_again() -> None:
    world, case = world_of(3, 13, Faults(delay=0.5), retries=1)
    until(world, lambda: len([s for s in world.services.values() if s.workers]) == 3)
    world.services["a"].kill()
    world.services["a"].back_at = world.now + LOST_AFTER + 60
    world.rest()
    world.check_end()
    lead = world.lead_of(case)
    assert lead.state is JobState.SUCCESS and lead.attempt == 2
