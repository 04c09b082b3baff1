"""Before a job exists: what would every party say to a pipeline, and what would it cost?"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from fate_llm.core.errors import FateError
from fate_llm.pipelines.schema import PipelineSpec
from fate_llm.pipelines.sums import hiding_tasks
from fate_llm.security.randomness import random_id

from ..trust.jobspec import SignedSpecification, make_specification, verify
from ..trust.policy import evaluate
from .hall import Hall
from .keeping import known_initiators
from .orders import estimate
from .words import Answer, Estimates, Question, Trouble

__all__ = ["Asked", "Questions"]

_MOST = 100  # questions of our own that are remembered


@dataclass(slots=True)
class Asked:
    """A question of our own. answers: by party. done: set when all have answered."""

    question: str
    name: str
    digest: str
    parties: tuple[str, ...]
    answers: dict[str, Answer] = field(default_factory=dict)
    done: threading.Event = field(default_factory=threading.Event)


class Questions:
    """Nothing of a question is kept beyond its answer."""

    def __init__(self, hall: Hall) -> None:
        self._hall = hall
        self._asked: dict[str, Asked] = {}

    def ask(self, spec: PipelineSpec) -> Asked:
        """Ask all parties of a pipeline, this one included."""
        now = self._hall.now()
        found = make_specification(spec, job=f"plan-{random_id(8)}", federation=self._hall.roster.present, created=now)
        signed = found.sign(self._hall.identity)
        asked = Asked(found.job, spec.name, signed.digest, spec.members)
        while len(self._asked) >= _MOST:
            del self._asked[next(iter(self._asked))]
        self._asked[asked.question] = asked
        question = Question(question=asked.question, specification=signed.to_data())
        for party in spec.members:
            if party == self._hall.me:
                self.heard(party, self.answer(party, question))
            else:
                self._hall.post.send(party, question)
        return asked

    def heard(self, sender: str, answer: Answer) -> None:
        """An answer to a question of ours; the first of each party counts."""
        asked = self._asked.get(answer.question)
        if asked is not None and sender in asked.parties:
            asked.answers.setdefault(sender, answer)
            if len(asked.answers) == len(asked.parties):
                asked.done.set()

    def answer(self, sender: str, question: Question) -> Answer:
        """What this party says to a job that does not exist yet."""
        try:
            signed = SignedSpecification.from_data(question.specification)
            spec = verify(signed, self._hall.roster.present, self._hall.now())
        except FateError as error:
            return _trouble(question, error.code, error.message, error.hint)
        try:
            if self._hall.me not in spec.members:
                return _trouble(question, "policy_refused", f"{self._hall.me} takes no part in the job")
            if signed.specification.initiator != sender:
                return _trouble(question, "policy_refused", f"{sender} asks for {signed.specification.initiator}")
            policy, catalog = self._hall.policy(), self._hall.catalog()
            costs = estimate(spec, self._hall.me, catalog.paths(), self._seconds, self._hall.jobs)
            found = evaluate(
                policy,
                signed,
                self._hall.me,
                catalog,
                self._hall.now(),
                costs,
                known=known_initiators(self._hall) if "new_initiator" in policy.manual else (),
                pipeline=spec,
            )
        except FateError as error:  # ours: nobody else learns what our files say, nor where they are
            self._hall.say(f"{question.question[:100]} of {sender} cannot be judged: {error.message}")
            return _trouble(question, error.code, f"the policy or catalogue of {self._hall.me} is not whole")
        if sender != self._hall.me and hiding_tasks(spec):  # memory and time speak of this party's records
            costs = Estimates(sent_bytes=costs.sent_bytes, received_bytes=costs.received_bytes)
        return Answer(question=question.question, findings=found.findings, estimates=costs)

    def _seconds(self, print_: str) -> float | None:
        row = self._hall.store.finished_task(print_)
        return None if row is None or row.started is None or row.ended is None else row.ended - row.started

    def page(self, asked: Asked) -> dict[str, Any]:
        """All answers so far. Who did not answer is said so."""
        self._asked.pop(asked.question, None)
        parties = {party: self._shown(asked, party) for party in asked.parties}
        return {"name": asked.name, "digest": asked.digest, "parties": parties}

    def _shown(self, asked: Asked, party: str) -> dict[str, Any]:
        answer = asked.answers.get(party)
        if answer is None:
            why = self._hall.post.unreachable(party) if party != self._hall.me else ""
            text = why or f"{party} did not answer in time"
            trouble = {"code": "timeout", "message": text, "hint": "Look whether its service runs: fate_llm doctor"}
            return {"verdict": "unknown", "findings": [], "estimates": None, "trouble": trouble}
        outcomes = {finding.outcome for finding in answer.findings}
        verdict = "refuse" if "refuse" in outcomes or answer.trouble else "manual" if "manual" in outcomes else "accept"
        return {"verdict": verdict, **answer.model_dump(mode="json", exclude={"kind", "question"})}


def _trouble(question: Question, code: str, message: str, hint: str = "") -> Answer:
    trouble = Trouble(code=code, message=message[:2000], hint=hint[:2000])
    return Answer(question=question.question, trouble=trouble)
