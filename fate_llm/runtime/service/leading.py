"""What a service does for the jobs that it leads: carries out what the lead's machine asks for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fate_llm.core.errors import FateError

from ..jobfolder import write_json
from ..record.dossier import compose
from ..record.statement import check_statement
from ..store.rows import JobRow
from . import lead
from .cases import Case
from .hall import Hall
from .words import Ending, News, Report

__all__ = ["Leading"]


class Leading:
    """later: a call that is made after the present event. say: to a party of the job."""

    def __init__(
        self,
        hall: Hall,
        *,
        later: Callable[[Callable[[], None]], None],
        say: Callable[[Case, str, News], None],
    ) -> None:
        self._hall, self._later, self._say = hall, later, say

    def machine(self, case: Case) -> lead.LeadMachine:
        """A new job's machine."""
        specification, spec, settings = case.signed.specification, case.spec, self._hall.home.settings
        return lead.LeadMachine(
            specification.job,
            case.signed.digest,
            self._hall.me,
            spec.members,
            {task: spec.parties_of(task) for task in spec.tasks},
            specification.expires,
            retries=specification.attempts.retries,
            lost_after=case.part.lost_after,
            heartbeat=settings.heartbeat,
        )

    def heard(self, case: Case, sender: str, report: Report) -> None:
        """A report. A statement in it that its party did not sign is left out, and so is asked for again; tasks that
        the party has no part in are left out, too: all parties are told the rest.
        """
        mine = {task: view for task, view in report.tasks.items() if _takes_part(case, sender, task)}
        if len(mine) < len(report.tasks):
            report = report.model_copy(update={"tasks": mine})
        if report.statement is not None and sender in case.signed.specification.members:
            try:
                public = self._hall.roster.present.member(sender).public
                check_statement(report.statement, public, job=case.job, digest=case.signed.digest, party=sender)
            except FateError as error:
                self._hall.say(f"{case.job}: the statement of {sender} is left out: {error.message}")
                report = report.model_copy(update={"statement": None})
        self.handle(case, lead.Heard(report, sender, self._hall.now()))

    def handle(self, case: Case, event: lead.Event) -> None:
        """One event: store the machine, then do what it asks for."""
        assert case.lead is not None
        before = case.lead.state
        actions = case.lead.handle(event)
        if isinstance(event, lead.Tick) and not actions:
            return
        unsure, case.unsure = case.unsure, True
        if not case.lead.final:
            case.concluded = None
        self.store(case)
        if case.lead.state is not before:
            self._hall.say(f"{case.job}: {before} -> {case.lead.state}")
            self._hall.news.tell()
        for action in actions:
            self._do(case, action)
        if any(isinstance(action, lead.Ended) for action in actions):
            case.concluded = self._hall.now()
            self.store(case)
        case.unsure = unsure

    def store(self, case: Case) -> None:
        """Write the machine to the database. It has ended when what it asked for at its end has been done."""
        machine, specification, now = case.lead, case.signed.specification, self._hall.now()
        assert machine is not None
        trouble = machine.trouble
        self._hall.store.save_job(
            JobRow(
                case.job,
                case.signed.digest,
                case.spec.name,
                case.initiator,
                True,
                machine.state.value,
                machine.attempt,
                specification.priority,
                case.created,
                now,
                case.concluded,
                case.signed.to_data(),
                machine.to_data(),
                None if trouble is None else trouble.model_dump(mode="json"),
            )
        )

    def finished(self, case: Case, task: str) -> bool:
        """Whether all parties that run a task have finished it, in whatever attempt."""
        assert case.lead is not None
        views = case.lead.parts
        done = [
            party in views and task in views[party].tasks and views[party].tasks[task].state == "success"
            for party in case.spec.parties_of(task)
        ]
        return task in case.lead.finished or all(done)

    def _do(self, case: Case, action: lead.Action) -> None:
        if isinstance(action, lead.Say):
            news = action.news
            if action.invite:
                news = news.model_copy(update={"specification": case.signed.to_data()})
            self._say(case, action.receiver, news)
        elif isinstance(action, lead.MakeDossier):
            ending = Ending(state=action.state, trouble=action.trouble)
            dossier = compose(case.signed.to_data(), action.statements, ending, action.attempt)
            self._later(partial(self.handle, case, lead.Dossier(dossier, self._hall.now(), attempt=action.attempt)))
        elif isinstance(action, lead.Ended):
            if action.ending.dossier is not None:
                write_json(case.dossier_file, action.ending.dossier)
            self._hall.say(f"{case.job}: ended, {action.ending.state}")
        elif isinstance(action, lead.Note):
            self._hall.say(f"{case.job}: {action.event} {dict(action.fields)}")


def _takes_part(case: Case, party: str, task: str) -> bool:
    return task in case.spec.tasks and party in case.spec.parties_of(task)
