"""All jobs of a party's service, in the hands of one thread: events go to the machines, and what they ask for is done.

A machine is stored after every event, before anything that it asks for happens, so that a service that is killed goes
on from the database. What one machine asks of another of this party (the guest leads a job and takes part in it) is
done after the present event, never inside it.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from fate_llm.core.errors import (
    ConfigurationError,
    FateError,
    PolicyError,
    UnknownJob,
    WrongState,
)
from fate_llm.pipelines import check
from fate_llm.pipelines.graph import waits_for
from fate_llm.pipelines.schema import PipelineSpec
from fate_llm.security.randomness import random_id

from ..job import job_name
from ..jobfolder import JobFolder
from ..store.rows import JobRow
from ..trust.jobspec import Reuse, SignedSpecification, make_specification, verify
from . import lead, part, views
from .cases import Case
from .hall import Hall
from .housekeeping import Housekeeping
from .leading import Leading
from .logbook import Logbook
from .questions import Asked, Questions
from .taking_part import TakingPart
from .track import Track
from .words import Answer, JobState, Lines, News, PartState, Question, Report, Trouble, Word
from .workers import Over, Said

__all__ = ["Desk"]

_LOOK = 2.0  # seconds between looks at the roster's file
_REFUSE_AGAIN = 30.0  # seconds between two refusals of one invitation
_AGAIN = 2.0  # seconds until a job that an error has stopped half-way is taken up again
_MOST_OPEN = 500  # jobs of one initiator that have not ended here
_PAGE = 200  # rows of the database that are looked at together
_SHOWN = (*JobState, PartState.APPROVAL, PartState.REFUSED)  # states that a list of jobs has


class Desk:
    """Not thread-safe: only the engine's thread calls it."""

    def __init__(self, hall: Hall) -> None:
        self._hall = hall
        self._cases: dict[str, Case] = {}
        self._later: deque[Callable[[], None]] = deque()
        self._questions = Questions(hall)
        self._lines = Logbook(hall)
        self._taking = TakingPart(hall, self._lines, later=self._later.append, find=self._case, say=self._say_to_lead)
        self._leading = Leading(hall, later=self._later.append, say=self._say_to_party)
        self._refused: dict[tuple[str, str], float] = {}
        self._unsure: dict[str, float] = {}
        self._housekeeping = Housekeeping(hall)
        self._looked = 0.0
        self._away: float | None = None  # since when there is no broker

    # --- the engine ---

    def load(self) -> None:
        """Take up all jobs that had not ended."""
        for job in dict.fromkeys(row.job for row in self._hall.store.unfinished_jobs()):
            try:
                if self._case(job) is None:
                    self._hall.say(f"job {job} cannot be taken up: its part is not in the database")
            except FateError as error:  # of a component that is gone, say; the others go on
                self._hall.say(f"job {job} cannot be taken up: {error.message}")
        holding = (PartState.RUNNING, PartState.RESERVED)  # these have their room before anybody asks for some
        for case in sorted(self._cases.values(), key=lambda case: case.part.state not in holding):
            self._later.append(partial(self._take_up, case))

    def _take_up(self, case: Case) -> None:
        """Tell a job's machines that they were loaded; what may not have been done is asked for again."""
        self._taking.take_up(case)
        if case.lead is not None:
            self._leading.handle(case, lead.Restarted(self._hall.now()))

    def next(self) -> Callable[[], None] | None:
        """What was left for after the present entry."""
        return self._later.popleft() if self._later else None

    def settle(self) -> None:
        """Do all that was left for later."""
        while (entry := self.next()) is not None:
            entry()

    def tick(self) -> None:
        """Time has passed."""
        now = self._hall.now()
        if now - self._looked >= _LOOK:
            self._looked = now
            self._renew_roster()
            self._housekeeping.tick(now)
        self._away = None if self._hall.post.connected else self._away or now
        for case in tuple(self._cases.values()):
            self._later.append(partial(self._tick, case, now))

    def _tick(self, case: Case, now: float) -> None:
        """An entry for each job: an error in one is not the others'."""
        if self._cases.get(case.job) is not case:
            return
        if case.unsure:
            self._again(case, now)
            return
        if self._away is None or now - self._away >= case.part.lost_after:  # without a broker nobody's silence counts
            self._taking.tick(case, now)
            if case.lead is not None:
                self._leading.handle(case, lead.Tick(now))
        self._lines.tick(case, now)
        if case.over:
            del self._cases[case.job]

    def _again(self, case: Case, now: float) -> None:
        """An error has stopped this job half-way: go on from the database, as after a kill."""
        if now - self._unsure.get(case.job, -_AGAIN) < _AGAIN:
            return
        self._unsure = {job: at for job, at in self._unsure.items() if now - at < _AGAIN} | {case.job: now}
        if (row := self._hall.store.job(case.job)) is not None:
            self._hall.say(f"{case.job}: goes on from the database")
            self._take_up(self._load(row))

    def _renew_roster(self) -> None:
        try:
            if self._hall.roster.renew():
                self._hall.post.reload(self._hall.roster.present)
                self._hall.audit.append("partner_added", parties=sorted(self._hall.roster.present.parties))
                self._hall.say("the roster has changed: " + ", ".join(self._hall.roster.present.members))
        except ConfigurationError as error:
            self._hall.say(f"the roster cannot be read again: {error.message}")

    # --- what others say ---

    def heard(self, sender: str, word: Word) -> None:
        """A word of another service. What does not fit is left alone: it comes again, or it was never meant."""
        if isinstance(word, News):
            self._heard_news(sender, word)
        elif isinstance(word, Report):
            self._heard_report(sender, word)
        elif isinstance(word, Question):
            self._hall.post.send(sender, self._questions.answer(sender, word))
        elif isinstance(word, Answer):
            self._questions.heard(sender, word)
        else:
            self._heard_lines(sender, word)

    def _heard_news(self, sender: str, news: News) -> None:
        case = self._case(news.job) or self._invited(sender, news)
        if case is None or sender != case.initiator:
            return
        case.parts = news.parts or case.parts
        self._lines.reported(case, news.lines_heard)
        self._taking.handle(case, part.Told(news, self._hall.now()))

    def _invited(self, sender: str, news: News) -> Case | None:
        """A job that is new here; None for one that is not believed, whose sender is told why."""
        if news.specification is None or news.state.ended:
            return None
        try:
            signed = SignedSpecification.from_data(news.specification)
            if (signed.specification.job, signed.digest) != (news.job, news.digest):
                raise PolicyError("the invitation names another job or digest than its specification")
            if signed.specification.initiator != sender:
                raise PolicyError(f"{sender} invites to a job of {signed.specification.initiator}")
            spec = verify(signed, self._hall.roster.present, self._hall.now())
            if self._hall.me not in spec.members:
                raise PolicyError(f"{self._hall.me} takes no part in the job")
            if sum(case.initiator == sender for case in self._cases.values()) >= _MOST_OPEN:
                raise PolicyError(f"{_MOST_OPEN} jobs of {sender} have not ended at {self._hall.me}")
        except FateError as error:
            self._refuse(sender, news, error)
            return None
        return self._open(signed, spec)  # what our own disk does not take is no refusal: the invitation comes again

    def _refuse(self, sender: str, news: News, error: FateError) -> None:
        now = self._hall.now()
        if now - self._refused.get((sender, news.job), -_REFUSE_AGAIN) < _REFUSE_AGAIN:
            return
        self._refused = {key: at for key, at in self._refused.items() if now - at < _REFUSE_AGAIN}
        self._refused[sender, news.job] = now
        self._hall.audit.append(
            "decision", job=news.job, digest=news.digest, verdict="refuse", code=error.code, why=error.message[:500]
        )
        trouble = Trouble(code=error.code, message=error.message[:2000], hint=error.hint[:2000], party=self._hall.me)
        self._hall.post.send(
            sender,
            Report(
                job=news.job,
                digest=news.digest,
                serial=0,
                state=PartState.REFUSED,
                attempt=news.attempt,
                trouble=trouble,
                reason=error.message[:2000],
            ),
        )

    def _heard_report(self, sender: str, report: Report) -> None:
        case = self._case(report.job)
        if case is not None and case.lead is not None:
            self._leading.heard(case, sender, report)

    def _heard_lines(self, sender: str, word: Lines) -> None:
        case = self._case(word.job)
        if case is not None and case.lead is not None:
            self._lines.came(case, sender, word)

    # --- workers ---

    def said(self, news: Said | Over) -> None:
        """A worker says something, or is gone."""
        case = self._case(news.job)
        if case is not None:
            self._taking.said(case, news)

    # --- between the two machines of this party, and to others ---

    def _say_to_lead(self, case: Case, report: Report) -> None:
        if case.initiator == self._hall.me:
            self._later.append(partial(self._heard_report, self._hall.me, report))
        else:
            self._hall.post.send(case.initiator, report)

    def _say_to_party(self, case: Case, receiver: str, news: News) -> None:
        if receiver == self._hall.me:
            self._later.append(partial(self._heard_news, receiver, news))
        else:
            heard = self._lines.heard_of(case, receiver)
            self._hall.post.send(receiver, news.model_copy(update={"lines_heard": heard}))

    # --- cases ---

    def _case(self, job: str) -> Case | None:
        """A job of this party, from memory or from the database; None for one that it does not know."""
        if job in self._cases:
            return self._cases[job]
        row = self._hall.store.job(job)
        return None if row is None else self._load(row)

    def _load(self, row: JobRow) -> Case:
        """A job as the database has it."""
        signed = SignedSpecification.from_data(row.specification)
        case = self._make(signed, check(signed.specification.pipeline), row.created)
        case.part = part.PartMachine.from_data(row.machine)
        case.track = Track(case.tasks, case.part.tasks)
        case.line = self._hall.store.last_line(row.job, self._hall.me)
        case.tidied = row.ended
        case.load_ending()
        leading = self._hall.store.job(row.job, lead=True)
        if leading is not None:
            case.lead, case.concluded = lead.LeadMachine.from_data(leading.machine), leading.ended
        self._cases[row.job] = case
        return case

    def _open(self, signed: SignedSpecification, spec: PipelineSpec, *, leads: bool = False) -> Case:
        """A job that is new to this party; all of it is stored, or nothing."""
        case = self._make(signed, spec, self._hall.now())
        with self._hall.store.transaction():
            self._taking.store(case)
            if leads:
                case.lead = self._leading.machine(case)
                self._leading.store(case)
        self._cases[case.job] = case
        return case

    def _make(self, signed: SignedSpecification, spec: PipelineSpec, created: float) -> Case:
        settings = self._hall.home.settings
        specification = signed.specification
        said = "lost_after" in spec.job.model_fields_set
        lost_after = max(spec.job.lost_after if said else settings.lost_after, 3 * settings.heartbeat)
        path = self._hall.jobs / specification.job
        path.mkdir(mode=0o700, exist_ok=True)
        machine = part.PartMachine(
            specification.job,
            signed.digest,
            self._hall.me,
            specification.initiator,
            lost_after=lost_after,
            heartbeat=settings.heartbeat,
            restarts_allowed=specification.attempts.restarts,
        )
        case = Case(signed, spec, JobFolder(path), self._hall.me, machine, Track(()), created)
        case.track = Track(case.tasks)
        return case

    def _known(self, job: str) -> Case:
        case = self._case(job)
        if case is None:
            raise UnknownJob(f"this party has no job {job[:200]!r}")
        return case

    def _led(self, job: str, what: str) -> tuple[Case, lead.LeadMachine]:
        case = self._known(job)
        if case.lead is None:
            raise WrongState(
                f"{what} {job} is for {case.initiator}, who leads it", hint="Ask that party, or cancel your part."
            )
        return case, case.lead

    # --- calls of the API ---

    def submit(
        self, pipeline: Mapping[str, Any], *, priority: int | None, labels: Mapping[str, str], key: str | None
    ) -> dict[str, Any]:
        """A new job of this party's."""
        unique = random_id(4) if key is None else hashlib.sha256(key.encode("ascii")).hexdigest()[:12]
        if key is not None and (known := self._hall.store.led_job(unique)) is not None:
            return self.job(known)
        return self._begin(check(dict(pipeline)), unique, priority=priority, labels=labels)

    def _begin(
        self,
        spec: PipelineSpec,
        unique: str,
        *,
        priority: int | None,
        labels: Mapping[str, str],
        reuse: Reuse | None = None,
    ) -> dict[str, Any]:
        if spec.parties.guest != self._hall.me:
            raise PolicyError(
                f"the guest of the pipeline is {spec.parties.guest}, and this is {self._hall.me}",
                hint="Each party's service leads the jobs whose guest it is.",
            )
        now = self._hall.now()
        job = job_name(spec.name, now=now, unique=unique)
        found = make_specification(
            spec,
            job=job,
            federation=self._hall.roster.present,
            created=now,
            priority=priority,
            labels=labels,
            reuse=reuse,
        )
        signed = found.sign(self._hall.identity)
        self._hall.audit.append("submitted", job=job, digest=signed.digest, parties=list(spec.members))
        case = self._open(signed, verify(signed, self._hall.roster.present, now), leads=True)
        self._leading.handle(case, lead.Submitted(now))
        self.settle()
        return self.job(job)

    def cancel(self, job: str, *, reason: str, by: str) -> dict[str, Any]:
        """Stop a job: at once here, and everywhere as soon as the lead hears of it."""
        case = self._known(job)
        now, who = self._hall.now(), by or self._hall.me
        state = case.part.wanted if case.lead is None else case.lead.state
        if state.ended or case.part.over:
            raise WrongState(f"{job} has ended: {state}")
        self._hall.audit.append("cancelled", job=job, digest=case.signed.digest, by=who, reason=reason)
        if case.lead is not None:
            self._leading.handle(case, lead.Cancel(reason, who, now))
        else:
            self._taking.handle(case, part.Cancel(reason, who, now))
        self.settle()
        return self.job(job)

    def resume(self, job: str, *, reason: str, by: str) -> dict[str, Any]:
        """Go on with a job that has ended without success; a party that does not lead it asks the lead."""
        case = self._known(job)
        now, who = self._hall.now(), by or self._hall.me
        state = case.part.wanted if case.lead is None else case.lead.state
        if not state.ended or state.value == "success":
            raise WrongState(
                f"{job} is {state}", hint="Only a job that has failed, timed out or was cancelled can be resumed."
            )
        self._hall.audit.append("resumed", job=job, digest=case.signed.digest, by=who, reason=reason)
        if case.lead is not None:
            self._leading.handle(case, lead.Resume(who, reason, now))
        else:
            self._taking.handle(case, part.Wish("resume", who, reason, now))
        self.settle()
        return self.job(job)

    def rerun(self, job: str, *, from_task: str, by: str) -> dict[str, Any]:
        """A new job that takes over the outputs of all tasks that do not read from `from_task`."""
        case, machine = self._led(job, "to run again")
        if from_task not in case.spec.tasks:
            raise ConfigurationError(
                f"{job} has no task {from_task[:100]!r}", hint=f"Its tasks: {', '.join(case.spec.tasks)}"
            )
        if not machine.state.ended:
            raise WrongState(f"{job} is {machine.state}", hint="Cancel it first, or wait for its end.")
        again = _downstream(case.spec, from_task)
        kept = tuple(task for task in case.spec.tasks if task not in again)
        missing = [task for task in kept if not self._leading.finished(case, task)]
        if missing:
            raise WrongState(
                f"{', '.join(missing)} had not finished in {job}, and cannot be taken over",
                hint="Name an earlier task, or resume the job.",
            )
        reuse = Reuse(job=job, tasks=kept) if kept else None
        labels = {**case.signed.specification.labels, "rerun_of": job}
        priority = case.signed.specification.priority
        return self._begin(case.spec, random_id(4), priority=priority, labels=labels, reuse=reuse)

    def decide(self, job: str, *, decision: str, digest: str, by: str, reason: str) -> dict[str, Any]:
        """A person of this party says yes or no."""
        case = self._known(job)
        if decision not in ("approve", "refuse"):
            raise ConfigurationError(f"a decision is `approve` or `refuse`, not {decision!r}")
        if case.part.state is not PartState.APPROVAL:
            raise WrongState(
                f"{job} does not wait for a decision here: our part is {case.part.state}, the job {case.part.wanted}"
            )
        who = by or self._hall.me
        row = self._hall.store.decide(job, decision, who, reason, digest=digest)  # type: ignore[arg-type]
        self._hall.audit.append("approval", job=job, digest=row.digest, decision=decision, by=who, reason=reason)
        event = part.Approved if decision == "approve" else part.Denied
        self._taking.handle(case, event(who, reason, self._hall.now()))
        self.settle()
        return self.job(job)

    def approvals(self) -> list[dict[str, Any]]:
        """What waits for a person."""
        found = []
        for row in self._hall.store.approvals():
            case = self._case(row.job)
            if case is not None and case.part.state is PartState.APPROVAL:
                found.append(views.approval(row))
        return found

    def jobs(self, *, states: tuple[str, ...], limit: int) -> list[dict[str, Any]]:
        """The newest jobs, one entry each."""
        if unknown := [state for state in states if state not in _SHOWN]:
            raise ConfigurationError(
                f"no job is in a state called {unknown[0][:100]!r}", hint=f"States: {', '.join(_SHOWN)}"
            )
        found: dict[str, dict[str, Any]] = {}
        seen: set[str] = set()
        before: float | None = None
        while len(found) < limit and (page := self._hall.store.jobs(limit=_PAGE, before=before)):
            for row in page:
                if row.job not in seen:  # of two rows of a job the lead's comes first
                    seen.add(row.job)
                    shown = views.summary(row)
                    if not states or shown["state"] in states:
                        found[row.job] = shown
            before = page[-1].created
        return list(found.values())[:limit]

    def job(self, job: str) -> dict[str, Any]:
        """All that this party may see of one job."""
        case = self._known(job)
        row = self._hall.store.job(job, lead=True) or self._hall.store.job(job)
        assert row is not None
        return views.job(case, row)

    def lines(self, job: str, *, after: int, limit: int) -> dict[str, Any]:
        """Events of a job, in the order in which they came here."""
        case = self._known(job)
        self._lines.tick(case, self._hall.now())
        found = self._hall.store.lines(job, after=after, limit=limit)
        return views.lines(case, found, after)

    def dossier(self, job: str) -> dict[str, Any]:
        """The signed record of a job that has ended."""
        found = self._taking.dossier(self._known(job))
        if found is None:
            raise WrongState(f"{job} has no dossier yet", hint="It is there when the job has ended at all parties.")
        return found

    def ask_all(self, pipeline: Mapping[str, Any]) -> Asked:
        """Ask every party what a pipeline would cost it."""
        spec = check(dict(pipeline))
        if spec.parties.guest != self._hall.me:
            raise PolicyError(f"the guest of the pipeline is {spec.parties.guest}, and this is {self._hall.me}")
        return self._questions.ask(spec)

    def plan_of(self, asked: Asked) -> dict[str, Any]:
        """What was answered so far."""
        return self._questions.page(asked)

    def look(self) -> None:
        """Does the database answer?"""
        self._hall.store.check()

    def metrics(self) -> str:
        """Prometheus text."""
        return views.metrics(self._hall.me, self._hall.store.count_jobs(), self._hall.post, self._hall.workers)


def _downstream(spec: PipelineSpec, task: str) -> set[str]:
    """A task and all that read from it, however far."""
    edges = waits_for(spec)
    found = {task}
    while True:
        more = {name for name, before in edges.items() if name not in found and found & set(before)}
        if not more:
            return found
        found |= more
