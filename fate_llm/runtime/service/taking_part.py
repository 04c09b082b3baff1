"""What a service does for its own part of a job: carries out what the part's machine asks for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.parse import quote

from fate_llm.core.errors import ConfigurationError, FateError, StoreLost, error_from
from fate_llm.core.values import ArtifactKind
from fate_llm.protocols.transports.rabbitmq import BrokerAddress

from ..jobfolder import write_json
from ..launch import LaunchSettings, command
from ..record.statement import statement
from ..record.transcript import read_transcript
from ..store.rows import ApprovalRow, JobRow, TaskRow
from ..trust.jobspec import verify
from ..trust.policy import Evaluation, evaluate
from ..trust.policy_schema import PROTECTIONS
from . import part
from .cases import Accepted, Case
from .hall import Hall
from .keeping import Keeping, is_kept, known_initiators
from .logbook import Logbook
from .orders import estimate, fingerprint, worker_order
from .room import Rooms
from .words import Ending, Estimates, Finding, Report
from .workers import Over, Said

__all__ = ["TakingPart"]

_TIDIED = 100  # attempts whose inboxes are removed at the end, the latest ones: a lead may name any number


class TakingPart:
    """later: a call that is made after the present event. find: a job as it is now. say: to the lead."""

    def __init__(
        self,
        hall: Hall,
        lines: Logbook,
        *,
        later: Callable[[Callable[[], None]], None],
        find: Callable[[str], Case | None],
        say: Callable[[Case, Report], None],
    ) -> None:
        self._hall, self._lines, self._later, self._find, self._say = hall, lines, later, find, say
        self._keeping = Keeping(hall)
        self._rooms = Rooms(hall.home.settings.resources)
        self._waiting: dict[str, Case] = {}
        self._do: dict[type, Callable[[Case, Any], None]] = {
            part.Decide: self._decide,
            part.AskHuman: self._ask_human,
            part.Reserve: self._reserve,
            part.Release: self._release,
            part.StartWorker: self._start,
            part.StopWorker: self._stop,
            part.TellWorker: self._tell,
            part.MakeStatement: self._sign,
            part.Say: lambda case, action: self._say(case, action.report),
            part.Note: self._note,
            part.Ignored: lambda case, action: None,
            part.Close: self._close,
        }

    # --- events ---

    def handle(self, case: Case, event: part.Event) -> None:
        """One event: store the machine, then do what it asks for."""
        before = case.part.state
        actions = case.part.handle(event)
        if isinstance(event, part.Tick) and not actions:
            return
        unsure, case.unsure = case.unsure, True
        if not case.part.over:
            case.tidied = None
        if any(not isinstance(action, part.Ignored) for action in actions) or not actions:
            self.store(case)
        if case.part.state is not before:
            self._hall.say(f"{case.job}: our part {before} -> {case.part.state}")
            self._hall.news.tell()
        for action in actions:
            self._do[type(action)](case, action)
        case.unsure = unsure

    def take_up(self, case: Case) -> None:
        """The service came up again, or an error stopped this job half-way: all that is to be done, again."""
        self._waiting.pop(case.job, None)
        for row in self._hall.store.tasks(case.job):
            if row.state == "success" and not is_kept(row):
                self._keep(case, row)
        self.handle(case, part.Restarted(self._hall.now()))

    def _still(self, case: Case, event: part.Event) -> None:
        """An event that took its time, to the job as it is now."""
        now = self._find(case.job)
        if now is not None:
            self.handle(now, event)

    def tick(self, case: Case, now: float) -> None:
        """Time has passed: who waited for its hour gets room, who had too many hours is stopped."""
        self.handle(case, part.Tick(now))
        if case.waiting_since is not None and now >= case.accepted().not_before:
            self._request(case, case.waiting_since)
        hours = case.accepted().hours if case.started is not None else None
        if hours is not None and case.started is not None and now - case.started > hours * 3600:
            case.started = None
            reason = f"it has run for more than the {hours:g} hours that the policy of {self._hall.me} allows"
            self.handle(case, part.Cancel(reason, f"the policy of {self._hall.me}", now))

    def said(self, case: Case, news: Said | Over) -> None:
        """A worker says something, or is gone."""
        if news.attempt != case.part.attempt:
            return
        now = self._hall.now()
        if isinstance(news, Over):
            self._over(case, news, now)
            return
        event = news.event
        self._lines.note(case, event.kind, event.task, event.seconds, event.fields)
        if event.kind == "task_finished":
            self._finished(case, event.task, event.seconds)
        elif event.kind == "task_started":
            row = TaskRow(case.job, event.task, news.attempt, "running", event.seconds, None)
            self._hall.store.save_task(row)
        if case.track.note(event):
            self.handle(case, part.Progress(case.track.views, now))

    def _over(self, case: Case, news: Over, now: float) -> None:
        if news.end is None:
            self.handle(case, part.WorkerDied(news.attempt, news.how, now))
            return
        error = news.end.get("error")
        if error is not None:
            case.track.end("cancelled" if error.get("code") == "cancelled" else "failed")
            error = error_from(error["code"], error["message"], error.get("hint", "")).told_others()
        views = {task: view.model_dump(mode="json") for task, view in case.track.views.items()}
        self.handle(case, part.WorkerEnded(news.attempt, {"error": error, "tasks": views}, now))

    def store(self, case: Case) -> None:
        """Write the machine to the database. It has ended when what it asked for at its end has been done."""
        machine, now = case.part, self._hall.now()
        trouble = machine.trouble
        self._hall.store.save_job(
            JobRow(
                case.job,
                case.signed.digest,
                case.spec.name,
                case.initiator,
                False,
                machine.state.value,
                machine.attempt,
                case.signed.specification.priority,
                case.created,
                now,
                case.tidied,
                case.signed.to_data(),
                machine.to_data(),
                None if trouble is None else trouble.model_dump(mode="json"),
            )
        )

    # --- what the policy says ---

    def _decide(self, case: Case, action: part.Decide) -> None:
        if case.reused:  # after the outputs of the earlier job were kept, if that is being done
            self._hall.clerk.do(lambda: None, lambda _: self._decide_now(case, action))
        else:
            self._decide_now(case, action)

    def _decide_now(self, case: Case, action: part.Decide) -> None:
        if case.part.attempt != action.attempt:
            return
        now = self._hall.now()
        policy, verdict, findings = self._judge(case, now)
        told = [one.model_dump(mode="json") for one in findings if one.outcome != "pass"][:20]
        self._hall.audit.append(
            "decision",
            job=case.job,
            digest=case.signed.digest,
            attempt=action.attempt,
            verdict=verdict,
            findings=told,
            policy=policy,
        )
        self._later(partial(self._still, case, part.Decided(verdict, findings, now)))

    def _judge(self, case: Case, now: float) -> tuple[str, part.Verdict, tuple[Finding, ...]]:
        """Digest of the policy, and what it says."""
        try:
            policy, catalog = self._hall.policy(), self._hall.catalog()
            accepted = case.part.verdict is not None or case.part.attempt > 1
            verify(case.signed, self._hall.roster.present, now, accepted=accepted)
            found: Evaluation = evaluate(
                policy,
                case.signed,
                self._hall.me,
                catalog,
                now,
                self.estimates(case),
                known=known_initiators(self._hall) if "new_initiator" in policy.manual else (),
                pipeline=case.spec,
            )
        except StoreLost:
            raise  # asked again when the database is back
        except FateError as error:
            self._hall.say(f"{case.job}: cannot be judged: {error.message}")
            text = (
                error.message if not isinstance(error, ConfigurationError) else "its policy or catalogue is not whole"
            )
            return "", "refuse", (Finding(rule="policy", outcome="refuse", found=text[:2000]),)
        hours = None if policy.resources is None else policy.resources.hours
        floor = PROTECTIONS[0] if policy.protection is None else policy.protection.least
        start = found.not_before or 0.0
        case.accept(Accepted(found.opens, policy.digest, start, hours, now, floor, policy.sum_floor))
        missing = self._keeping.missing(case)
        if missing:
            text = f"outputs of {', '.join(missing)} are not kept here any more"
            finding = Finding(rule="reuse", outcome="refuse", found=text, allowed="outputs that are kept here")
            return policy.digest, "refuse", (finding, *found.findings[:199])
        return policy.digest, found.verdict, found.findings

    def estimates(self, case: Case) -> Estimates:
        """What the job would cost this party."""

        def seconds(print_: str) -> float | None:
            row = self._hall.store.finished_task(print_)
            return None if row is None or row.started is None or row.ended is None else row.ended - row.started

        return estimate(case.spec, self._hall.me, self._hall.catalog().paths(), seconds, case.folder.path)

    def _ask_human(self, case: Case, action: part.AskHuman) -> None:
        row = self._hall.store.approval(case.job, case.signed.digest)
        answered = row is not None and row.decided is not None and row.decided >= case.accepted().judged
        if row is not None and answered:  # stored, and not taken to the machine, when the service was killed
            event = part.Approved if row.decision == "approve" else part.Denied
            self._later(partial(self.handle, case, event(row.by, row.reason, self._hall.now())))
            return
        summary = {"pipeline": case.spec.name, "initiator": case.initiator, "tasks": list(case.tasks)}
        findings = [one.model_dump(mode="json") for one in action.findings]
        self._hall.store.ask_approval(
            ApprovalRow(case.job, case.signed.digest, self._hall.now(), findings, {**summary, **self._costs(case)})
        )

    def _costs(self, case: Case) -> dict[str, Any]:
        return {"estimates": self.estimates(case).model_dump(mode="json"), "members": list(case.spec.members)}

    # --- room ---

    def _reserve(self, case: Case, action: part.Reserve) -> None:
        if self._hall.now() < case.accepted().not_before:
            case.waiting_since = action.since
        else:
            self._request(case, action.since)

    def _request(self, case: Case, since: float) -> None:
        case.waiting_since = None
        self._waiting[case.job] = case
        priority = case.signed.specification.priority
        need = case.spec.job.need_of(self._hall.me)
        self._grant(self._rooms.request(case.job, need, priority, self._hall.now(), since=since))

    def _release(self, case: Case, action: part.Release) -> None:
        case.waiting_since = None
        self._waiting.pop(case.job, None)
        self._grant(self._rooms.release(case.job, self._hall.now()))

    def _grant(self, answers: Mapping[str, str]) -> None:
        """answers: by job, empty for room, or why there will never be any."""
        now = self._hall.now()
        for job, refusal in answers.items():
            if (case := self._waiting.pop(job, None)) is not None:
                event = part.NoRoom(refusal, now) if refusal else part.Granted(now)
                self._later(partial(self.handle, case, event))

    # --- the worker ---

    def _start(self, case: Case, action: part.StartWorker) -> None:
        now = self._hall.now()
        finished = [task for task in (*case.reused, *action.finished) if task in case.tasks]
        if not action.again:
            case.track.begin(finished)
            self._hall.audit.append("started", job=case.job, digest=case.signed.digest, attempt=action.attempt)
        case.started = case.started or now
        started = {"attempt": action.attempt, "again": action.again}
        self._lines.note(case, "worker_started", "", now, started)
        if case.reused:
            then = partial(self._started, case, action, finished)
            failed = partial(self._failed, case, action.attempt)
            self._hall.clerk.do(partial(self._keeping.take_over, case), lambda _: then(), failed)
        else:
            self._started(case, action, finished)

    def _started(self, case: Case, action: part.StartWorker, finished: list[str]) -> None:
        """Start the process, unless the job has been stopped meanwhile."""
        if case.part.attempt != action.attempt or case.part.state.ended:
            return
        try:
            self._start_now(case, action, finished)
        except FateError as error:
            self._failed(case, action.attempt, error)
        except OSError as error:  # no room for a process, or a full disk: tried again, not for ever
            died = part.WorkerDied(action.attempt, f"it could not be started: {error.strerror}", self._hall.now())
            self._later(partial(self._still, case, died))

    def _failed(self, case: Case, attempt: int, error: FateError) -> None:
        """An attempt cannot go on here, and there is no worker that could say so."""
        self._hall.say(f"{case.job}: {error.code}: {error.message}")
        if case.part.attempt == attempt and not case.part.state.ended:
            ended = part.WorkerEnded(attempt, {"error": error.told_others()}, self._hall.now())
            self._later(partial(self._still, case, ended))

    def _start_now(self, case: Case, action: part.StartWorker, finished: list[str]) -> None:
        settings, accepted = self._hall.home.settings, case.accepted()
        paths = self._hall.catalog().paths()
        order = worker_order(
            case.signed,
            party=self._hall.me,
            identity=self._hall.identity,
            attempt=action.attempt,
            folder=case.folder.path,
            broker=_with_password(settings.broker_url(), settings.load_password()),
            finished={task: self._keeping.outputs(case, task) for task in finished},
            catalog={name: path for name, path in paths.items() if name in accepted.opens},
            lost_after=case.part.lost_after,
            floor=accepted.floor,
            sum_floor=accepted.sum_floor,
            audit={"folder": str(self._hall.audit.folder), "transcript": str(case.transcript)},
        )
        launch = LaunchSettings(nproc=settings.launch.nproc, deepspeed=settings.launch.deepspeed)
        order["launch"] = launch.order()
        self._hall.workers.start(order, errors=case.own.path / "stderr.txt", command=command(launch))

    def _stop(self, case: Case, action: part.StopWorker) -> None:
        if case.job in self._hall.workers.running():
            self._hall.workers.stop(case.job, action.reason)
        else:
            died = part.WorkerDied(case.part.attempt, "it had not been started", self._hall.now())
            self._later(partial(self.handle, case, died))

    def _tell(self, case: Case, action: part.TellWorker) -> None:
        self._hall.workers.tell(case.job, action.message)

    def _finished(self, case: Case, task: str, seconds: float) -> None:
        """A task has ended in success: its outputs are kept by their content."""
        outputs, attempt = self._keeping.outputs(case, task), case.part.attempt
        rows = {row.task: row for row in self._hall.store.tasks(case.job)}
        started = rows[task].started if task in rows else None
        print_ = fingerprint(case.spec, self._hall.me, task)
        row = TaskRow(case.job, task, attempt, "success", started, seconds, outputs, print_)
        self._hall.store.save_task(row)
        self._keep(case, row)

    def _keep(self, case: Case, row: TaskRow) -> None:
        """Keep the outputs of a task, whose paths a row has, by their content."""
        ports = case.spec.component(row.task).outputs
        kinds: dict[str, ArtifactKind] = {name: ports[name].kind for name in row.outputs}
        self._hall.clerk.keep(
            row.outputs, kinds, lambda digests: self._hall.store.save_task(replace(row, outputs=digests))
        )

    # --- the end ---

    def _sign(self, case: Case, action: part.MakeStatement) -> None:
        ended = case.part.state.value
        head = self._hall.audit.head()

        def work() -> dict[str, Any]:
            return statement(
                self._hall.identity,
                job=case.job,
                digest=case.signed.digest,
                party=self._hall.me,
                policy=case.accepted().policy,
                attempts=action.attempt,
                ended=ended,
                transcript=read_transcript(case.transcript),
                time=self._hall.now(),
                audit=head,
            )

        def then(found: dict[str, Any]) -> None:
            self._still(case, part.Statement(found, self._hall.now(), attempt=action.attempt))

        self._hall.clerk.do(work, then)

    def _close(self, case: Case, action: part.Close) -> None:
        ending: Ending = action.ending
        case.keep_ending(ending)
        if ending.dossier is not None and case.initiator != self._hall.me:
            write_json(case.dossier_file, ending.dossier)
        trouble = None if ending.trouble is None else ending.trouble.model_dump(mode="json")
        self._hall.audit.append(
            "ended", job=case.job, digest=case.signed.digest, state=ending.state.value, trouble=trouble
        )
        self._lines.note(case, "job_ended", "", self._hall.now(), {"state": ending.state.value})
        self._lines.tick(case, self._hall.now())
        case.started = None
        attempts = range(max(1, case.part.attempt - _TIDIED + 1), case.part.attempt + 1)
        address = BrokerAddress.from_url(self._hall.home.settings.broker_url(), password=self._password())
        inboxes = [f"{case.job}/{attempt}" for attempt in attempts]
        folders = [case.own.path / "link"]
        if ending.state.value == "success":
            folders.append(case.own.path / "journal")
            self._hall.clerk.do(partial(self._keeping.register_models, case, ending))
        else:  # what its sums kept was for another attempt, and there is none
            folders += sorted((case.own.path / "journal").glob("*.sums"))
        self._hall.clerk.tidy(address, self._hall.me, inboxes, folders)
        self._hall.clerk.do(lambda: None, lambda _: self._tidied(case))
        self._hall.news.tell()

    def _tidied(self, case: Case) -> None:
        """All that was to be done has been done, or was told in the log; the job is not taken up again."""
        if case.part.over and self._find(case.job) is case:
            case.tidied = self._hall.now()
            self.store(case)
            self._hall.news.tell()

    def _password(self) -> str | None:
        return self._hall.home.settings.load_password()

    def dossier(self, case: Case) -> dict[str, Any] | None:
        """The signed record of a job that has ended, None before."""
        try:
            found: dict[str, Any] = json.loads(case.dossier_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return found

    def _note(self, case: Case, action: part.Note) -> None:
        self._lines.note(case, action.event, "", self._hall.now(), action.fields)
        self._hall.say(f"{case.job}: {action.event} {dict(action.fields)}")


def _with_password(url: str, password: str | None) -> str:
    """A broker's URL with the password in it; it goes to a worker through a pipe."""
    scheme, _, rest = url.partition("://")
    user, at, place = rest.partition("@")
    return url if password is None or not at else f"{scheme}://{user}:{quote(password, safe='')}@{place}"
