"""A small job as its parties noted it: rounds between a, b, c and the arbiter z, and the statements of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fate_llm.core.canonical import canonical_json, digest
from fate_llm.runtime.record.dossier import compose
from fate_llm.runtime.record.statement import statement
from fate_llm.runtime.record.transcript import ClosedRound, Message, Noted
from fate_llm.runtime.service.words import Ending, JobState
from fate_llm.runtime.trust.jobspec import PURPOSE
from fate_llm.security.audit_chain import Head
from tests.runtime.record.conftest import IDENTITIES

CONTRIBUTORS = ("a", "b", "c")
SPECIFICATION = {
    "version": 1,
    "job": "job-1",
    "initiator": "a",
    "created": 1000.0,
    "members": {p: {"identity": i.public.to_text(), "sealing": "s"} for p, i in IDENTITIES.items()},
    "pipeline": {"version": 1},
}
DIGEST = digest(SPECIFICATION)


def signed_specification(data: Mapping[str, Any] = SPECIFICATION, *, by: str = "a") -> dict[str, Any]:
    signature = IDENTITIES[by].sign(canonical_json(dict(data)), purpose=PURPOSE)
    return {"specification": dict(data), "signature": signature.hex()}


class Job:
    """Collects what each party notes; `statements` signs it. What a test changes before is the lie it tells."""

    def __init__(self, contributors: Iterable[str] = CONTRIBUTORS, coordinator: str = "z") -> None:
        self.contributors = tuple(contributors)
        self.coordinator = coordinator
        self.parties = tuple(dict.fromkeys((*self.contributors, coordinator)))
        self.messages: dict[str, list[Message]] = {party: [] for party in self.parties}
        self.rounds: dict[str, list[ClosedRound]] = {party: [] for party in self.parties}

    def tell(self, sender: str, receiver: str, kind: str, number: int, *, ordinal: int = 1, word: str = "") -> None:
        """One message, noted by both ends."""
        known = digest([sender, receiver, kind, number, ordinal, word])
        under = "plain" if kind == "round.term" else ""
        for party, peer, way in ((sender, receiver, "sent"), (receiver, sender, "received")):
            protection = under if way == "sent" else ""
            said = Message(way, peer, "train", kind, number, ordinal, 100 + number, known, protection, 1)
            self.messages[party].append(said)

    def run(self, rounds: int = 2) -> Job:
        for number in range(1, rounds + 1):
            for party in self.contributors:
                if party != self.coordinator:
                    self.tell(party, self.coordinator, "round.term", number)
            for party in self.contributors:
                if party != self.coordinator:
                    self.tell(self.coordinator, party, "round.state", number)
            for party in self.parties:
                self.rounds[party].append(ClosedRound("train", number, self.contributors, (), 1))
        return self

    def statement(self, party: str, /, **changes: Any) -> dict[str, Any]:
        usual: dict[str, Any] = {
            "job": "job-1",
            "digest": DIGEST,
            "party": party,
            "policy": digest(["policy", party]),
            "attempts": 1,
            "ended": "success",
            "transcript": Noted(tuple(self.messages[party]), tuple(self.rounds[party])),
            "time": 2000.0,
            "audit": Head(7, "7" * 64),
        }
        return statement(IDENTITIES[party], **{**usual, **changes})

    def dossier(self, *, state: JobState = JobState.SUCCESS, without: Iterable[str] = ()) -> dict[str, Any]:
        kept = [party for party in IDENTITIES if party in self.parties and party not in without]
        members = {p: SPECIFICATION["members"][p] for p in self.parties}  # type: ignore[index]
        specification = {**SPECIFICATION, "members": members}
        about = {"digest": digest(specification)}
        statements = {party: self.statement(party, **about) for party in kept}
        return compose(signed_specification(specification), statements, Ending(state=state), 1)
