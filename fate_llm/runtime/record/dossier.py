"""A job's dossier: what was agreed, and what every party says it said and heard, each with its own signature.

    {"version": 1, "specification": {"specification", "signature"}, "statements": {party: ...}, "ending": {...},
     "attempts": n}

The guest's service puts it together; nobody has to trust it for that. `verify` needs the file and the roster, and
nothing of the guest's own words counts: the specification is signed by its initiator, each statement by its party, and
what one party says of another is held against what the other says of itself.

1. What a party received is what the other says it sent: same task, kind, round, ordinal and digest.
2. Who was counted in a round is the same at all parties, and for each there is a term that both ends know.
3. A job that ended well has a statement of every party, each of a success.
4. What was sent and is in nobody's list of received messages came too late or to a party that had died: a remark.

A signature is checked over the JSON as it is in the file: a later program version that knows more fields still can.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from pydantic import ConfigDict, Field, ValidationError

from fate_llm.core.canonical import canonical_json
from fate_llm.core.canonical import digest as digest_of
from fate_llm.core.errors import BadSignature, ConfigurationError, DataError, PeerViolation
from fate_llm.core.interfaces import Frozen
from fate_llm.protocols.rounds.machine import STATE, TERM
from fate_llm.protocols.strict_json import read_json
from fate_llm.runtime.service.words import Ending
from fate_llm.runtime.trust.jobspec import PURPOSE
from fate_llm.security.identity import PublicIdentity

from .statement import Ended, Group, Statement, check_statement, fold

__all__ = ["Contribution", "DossierFault", "Report", "compose", "load", "pins_of", "verify"]

MAX_DOSSIER: Final = 64 * 1024 * 1024  # bytes of the file
_SUCCESS: Final = "success"
_FAREWELL: Final = "control."  # kinds of messages by which a party leaves; who has left before does not hear them
_HINT: Final = "A dossier is the JSON that the guest's service wrote at the end of a job; ask for it again."

_Key = tuple[str, str, int, str, str]  # task, kind, round, sender, receiver


@dataclass(frozen=True, slots=True)
class DossierFault:
    """One thing that does not fit. kind: stable. party, task, round: where it is about one, else empty and 0."""

    kind: str
    message: str
    party: str = ""
    task: str = ""
    round: int = 0

    def __str__(self) -> str:
        return f"{self.message} [{self.kind}]"


@dataclass(frozen=True, slots=True)
class Contribution:
    """What one party put into one round.

    digest: of the message; empty for a coordinator's own term, which never travelled. counted: whether it is part of
    the round's sum; None where no party noted who was. known: by whom the message is stated: both, sender, receiver,
    own.
    """

    task: str
    round: int
    party: str
    coordinator: str
    digest: str
    bytes: int
    protection: str
    policy: str
    counted: bool | None
    known: str


@dataclass(frozen=True, slots=True)
class Report:
    """What `verify` found. ending: what the dossier says; each party's own word is in `parties`."""

    job: str
    specification: str
    initiator: str
    ending: str
    parties: Mapping[str, str]
    faults: tuple[DossierFault, ...]
    remarks: tuple[str, ...]
    table: tuple[Contribution, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Specification(Frozen):
    """The part of a job specification that is needed here; whatever else is in it is signed as well."""

    model_config = ConfigDict(extra="ignore")

    job: str = Field(max_length=300)
    initiator: str = Field(max_length=300)
    members: dict[str, dict[str, Any]] = Field(max_length=1000)


class _SignedSpecification(Frozen):
    specification: dict[str, Any]
    signature: str = Field(pattern=r"^[0-9a-f]{128}$")


class _Dossier(Frozen):
    version: int = Field(ge=1, le=1)
    specification: _SignedSpecification
    statements: dict[str, Any] = Field(max_length=1000)
    ending: Ending
    attempts: int = Field(ge=0)


def compose(
    specification: Mapping[str, Any], statements: Mapping[str, Mapping[str, Any]], ending: Ending, attempts: int
) -> dict[str, Any]:
    """The dossier of a job as plain JSON values.

    specification: `SignedSpecification.to_data`. statements: what parties signed, by party, checked by
    `check_statement`; one that gave none is left out. ending: of the job; a dossier in it is left out.
    """
    return {
        "version": 1,
        "specification": dict(specification),
        "statements": {party: dict(statements[party]) for party in sorted(statements)},
        "ending": ending.model_copy(update={"dossier": None}).model_dump(mode="json"),
        "attempts": attempts,
    }


def load(path: Path) -> dict[str, Any]:
    """A dossier's file.

    Raises:
        ConfigurationError: it cannot be read. DataError: it is larger than 64 MiB, or is not JSON of one meaning.
    """
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_DOSSIER + 1)
    except OSError as error:
        raise ConfigurationError(
            f"the dossier {path} cannot be read: {error.strerror}", hint="Name the file."
        ) from None
    if len(raw) > MAX_DOSSIER:
        raise DataError(f"the dossier {path} has more than {MAX_DOSSIER} bytes: it is another file", hint=_HINT)
    try:
        found = read_json(raw)
    except ValueError as error:
        raise DataError(f"the dossier {path} is not JSON: {error}", hint=_HINT) from None
    if not isinstance(found, dict):
        raise DataError(f"the dossier {path} is no JSON object", hint=_HINT)
    return found


def verify(dossier: Mapping[str, Any], roster: Mapping[str, PublicIdentity]) -> Report:
    """Everything in a dossier that does not fit, and who contributed what.

    roster: the identities that we pin, of all who took part.

    Raises:
        DataError: it is not a dossier; the message names the field.
    """
    try:
        found = _Dossier.model_validate(dossier)
        agreed = _Specification.model_validate(found.specification.specification)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "it"
        raise DataError(f"this is not a dossier: {place}: {first['msg']}", hint=_HINT) from None
    return _Verifier(found, agreed, roster).run()


@dataclass(slots=True)
class _Said:
    """What one end says of the messages of one key."""

    listed: dict[tuple[int, str], int] = field(default_factory=dict)  # ordinal, digest: bytes
    groups: list[list[tuple[int, str]]] = field(default_factory=list)  # the same by group
    folded: dict[str, tuple[int, int]] = field(default_factory=dict)  # fold: count, bytes
    protections: set[str] = field(default_factory=set)

    @property
    def count(self) -> int:
        return len(self.listed) + sum(count for count, _ in self.folded.values())


class _Verifier:
    def __init__(self, dossier: _Dossier, agreed: _Specification, roster: Mapping[str, PublicIdentity]) -> None:
        self._dossier = dossier
        self._agreed = agreed
        self._roster = roster
        self._digest = digest_of(dossier.specification.specification)
        self._statements: dict[str, Statement] = {}
        self._sent: dict[_Key, _Said] = {}
        self._received: dict[_Key, _Said] = {}
        self._faults: list[DossierFault] = []
        self._remarks: list[str] = []

    def run(self) -> Report:
        self._check_specification()
        self._read_statements()
        self._check_ending()
        for party, said in self._statements.items():
            for group in said.sent:
                _collect(self._sent, group, sender=party)
            for group in said.received:
                _collect(self._received, group, receiver=party)
        self._check_messages()
        self._check_rounds()
        return Report(
            job=self._agreed.job,
            specification=self._digest,
            initiator=self._agreed.initiator,
            ending=self._dossier.ending.state.value,
            parties={p: self._statements[p].ended if p in self._statements else "" for p in self._agreed.members},
            faults=tuple(self._faults),
            remarks=tuple(self._remarks),
            table=tuple(self._table()),
        )

    def _fault(self, kind: str, message: str, *, party: str = "", task: str = "", round: int = 0) -> None:
        self._faults.append(DossierFault(kind, message, party, task, round))

    # --- who signed what ------------------------------------------------------------------------------------------

    def _check_specification(self) -> None:
        initiator, signed = self._agreed.initiator, self._dossier.specification
        if initiator not in self._roster:
            self._fault("stranger", f"the job was started by {initiator!r}, who is not in the roster", party=initiator)
        else:
            try:
                content = canonical_json(signed.specification)
                self._roster[initiator].verify(bytes.fromhex(signed.signature), content, purpose=PURPOSE)
            except BadSignature:
                text = f"the job specification is not what {initiator} signed"
                self._fault("specification_signature", text, party=initiator)
        for party, member in self._agreed.members.items():
            if party not in self._roster:
                self._fault("stranger", f"{party!r} took part and is not in the roster", party=party)
            elif member.get("identity") != self._roster[party].to_text():
                self._fault("member", f"the specification means another {party} than the roster", party=party)

    def _read_statements(self) -> None:
        for party, data in self._dossier.statements.items():
            if party not in self._agreed.members:
                self._fault("stranger", f"there is a statement of {party!r}, who is no party of the job", party=party)
            elif party in self._roster:
                try:
                    public = self._roster[party]
                    found = check_statement(data, public, job=self._agreed.job, digest=self._digest, party=party)
                except BadSignature:
                    self._fault("statement_signature", f"the statement of {party} is not what it signed", party=party)
                except PeerViolation as error:
                    self._fault("statement", error.message, party=party)
                else:
                    self._statements[party] = found

    def _check_ending(self) -> None:
        success = self._dossier.ending.state.value == _SUCCESS
        for party in self._agreed.members:
            found = self._statements.get(party)
            if found is None and party not in self._dossier.statements:
                if success:
                    self._fault("statement_missing", f"the job ended well, and {party} stated nothing", party=party)
                else:
                    self._remarks.append(f"{party} gave no statement: what it sent and received is not confirmed")
            elif found is not None and success and found.ended != _SUCCESS:
                text = f"the dossier says that the job ended well, and {party} says {found.ended!r}"
                self._fault("ending", text, party=party)
            if found is not None and found.attempts > self._dossier.attempts:
                text = f"the dossier speaks of {self._dossier.attempts} attempts, and {party} of {found.attempts}"
                self._fault("attempts", text, party=party)
            if found is not None and found.damaged:
                self._remarks.append(f"{party} lost {found.damaged} lines of its notes in a power cut")

    # --- messages ---------------------------------------------------------------------------------------------------

    def _check_messages(self) -> None:
        late: dict[tuple[str, str], int] = defaultdict(int)
        for key, heard in self._received.items():
            sender, receiver = key[3], key[4]
            if sender not in self._agreed.members:
                self._fault("stranger", f"{receiver} heard {sender!r}, who is no party of the job", party=receiver)
            elif sender in self._statements:
                self._match(key, self._sent.get(key, _Said()), heard)
        for key, said in self._sent.items():
            if key[4] not in self._agreed.members:
                self._fault("stranger", f"{key[3]} sent to {key[4]!r}, who is no party of the job", party=key[3])
            elif key[4] in self._statements and not key[1].startswith(_FAREWELL):
                late[key[3], key[4]] += max(0, said.count - self._received.get(key, _Said()).count)
        self._remarks += [
            f"{count} message{'s' * (count > 1)} of {sender} not among what {receiver} received: too late, or twice"
            for (sender, receiver), count in late.items()
            if count
        ]

    def _match(self, key: _Key, said: _Said, heard: _Said) -> None:
        task, kind, number, sender, receiver = key
        where = f"task {task}, round {number}, {kind}"
        ordinals = {ordinal for ordinal, _ in said.listed}
        for ordinal, each in sorted(heard.listed.keys() - said.listed.keys()):
            if ordinal in ordinals:
                text = f"{where}: {receiver} received {each[:16]}... from {sender}, which sent another"
                self._fault("differs", text, party=sender, task=task, round=number)
            elif not said.folded:
                text = f"{where}: {receiver} received {each[:16]}... from {sender}, which says nothing of it"
                self._fault("not_sent", text, party=sender, task=task, round=number)
        known = said.folded.keys() | {fold(group) for group in said.groups if heard.folded}
        for total, (count, _) in heard.folded.items():
            if total not in known and said.count <= count:
                text = f"{where}: the {count} messages that {receiver} received from {sender} are not those it sent"
                self._fault("differs", text, party=sender, task=task, round=number)
        ours, theirs = said.protections - {""}, heard.protections - {""}
        if ours and theirs and not ours & theirs:
            text = f"{where}: {sender} sent it under {_listed(ours)}, {receiver} received it under {_listed(theirs)}"
            self._fault("protection", text, party=sender, task=task, round=number)

    # --- rounds -----------------------------------------------------------------------------------------------------

    def _coordinators(self) -> dict[str, set[str]]:
        """By task: who terms went to and who told states, as others say; as they say themselves where nobody does."""
        others: dict[str, set[str]] = defaultdict(set)
        own: dict[str, set[str]] = defaultdict(set)
        for messages, told in ((self._sent, {TERM: others, STATE: own}), (self._received, {TERM: own, STATE: others})):
            for task, kind, _, sender, receiver in messages:
                if kind in told:
                    told[kind][task].add(receiver if kind == TERM else sender)
        return {**own, **others}

    def _check_rounds(self) -> None:
        coordinators = self._coordinators()
        for (task, number), said in self._closed().items():
            self._compare_views(task, number, said)
            for party in sorted(_union(said)):
                self._check_term(task, number, party, coordinators.get(task, set()))

    def _compare_views(self, task: str, number: int, said: Mapping[str, Ended]) -> None:
        """All who note the end of a round in one attempt were told of the same contributors."""
        counted = {party: frozenset(ended.contributors) for party, ended in said.items()}
        if len(set(counted.values())) < 2:
            return
        views = "; ".join(f"{party} says {_listed(who)}" for party, who in sorted(counted.items()))
        text = f"task {task}, round {number}: parties were told of other contributors: {views}"
        by_attempt: dict[int, set[frozenset[str]]] = defaultdict(set)
        for party, ended in said.items():
            by_attempt[ended.attempt].add(counted[party])
        if any(len(each) > 1 for each in by_attempt.values()):
            self._fault("rounds_differ", text, task=task, round=number)
        else:
            self._remarks.append(f"{text}, in other attempts")

    def _check_term(self, task: str, number: int, party: str, coordinators: set[str]) -> None:
        where = f"task {task}, round {number}"
        if party not in self._agreed.members:
            self._fault("stranger", f"{where} counted {party!r}, who is no party of the job", task=task, round=number)
            return
        if party in coordinators:
            return  # its own term never left it
        sent = any((task, TERM, number, party, other) in self._sent for other in coordinators)
        heard = any((task, TERM, number, party, other) in self._received for other in coordinators)
        if not sent and party in self._statements:
            text = f"{where} counted {party}, which says that it sent no term"
            self._fault("term_missing", text, party=party, task=task, round=number)
        elif not heard and coordinators & self._statements.keys():
            text = f"{where} counted {party}, and {_listed(coordinators)} received no term of it"
            self._fault("term_missing", text, party=party, task=task, round=number)
        elif not sent and not heard:
            self._remarks.append(f"{where} counted {party}, and nobody who could know states its term")

    def _closed(self) -> dict[tuple[str, int], dict[str, Ended]]:
        """By task and round: what each party says of its end."""
        found: dict[tuple[str, int], dict[str, Ended]] = defaultdict(dict)
        for party, said in self._statements.items():
            for ended in said.rounds:
                for number in ended.rounds:
                    found[ended.task, number][party] = ended
        return dict(sorted(found.items()))

    def _table(self) -> Iterator[Contribution]:
        closed = {place: _union(said) for place, said in self._closed().items()}
        coordinators = self._coordinators()
        for key in sorted({key for key in (*self._sent, *self._received) if key[1] == TERM}):
            task, _, number, party, other = key
            said, heard = self._sent.get(key, _Said()), self._received.get(key, _Said())
            for each in sorted(said.listed | heard.listed):
                known = "both" if each in said.listed and each in heard.listed else "receiver"
                known = known if each in heard.listed else "sender"
                counted = party in closed[task, number] and known != "sender" if (task, number) in closed else None
                size = (heard.listed | said.listed)[each]
                under = said.protections | heard.protections
                yield self._row(task, number, party, other, each[1], size, under, counted, known)
        for (task, number), parties in closed.items():
            for party in sorted(parties & coordinators.get(task, set())):
                yield self._row(task, number, party, party, "", 0, set(), True, "own")

    def _row(
        self,
        task: str,
        number: int,
        party: str,
        coordinator: str,
        digest: str,
        size: int,
        protections: set[str],
        counted: bool | None,
        known: str,
    ) -> Contribution:
        policy = self._statements[party].policy if party in self._statements else ""
        under = ", ".join(sorted(protections - {""}))
        return Contribution(task, number, party, coordinator, digest, size, under, policy, counted, known)


def _collect(found: dict[_Key, _Said], group: Group, *, sender: str = "", receiver: str = "") -> None:
    """Add a group of the statement of `sender` or of `receiver`; the messages name the other."""

    def place(peer: str) -> _Said:
        return found.setdefault((group.task, group.kind, group.round, sender or peer, receiver or peer), _Said())

    by_peer: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for told in group.messages:
        said = place(told.peer)
        said.listed[told.ordinal, told.digest] = told.bytes
        said.protections.add(group.protection)
        by_peer[told.peer].append((told.ordinal, told.digest))
    for peer, listed in by_peer.items():
        place(peer).groups.append(listed)
    for many in group.folded:
        said = place(many.peer)
        said.folded[many.digest] = (many.count, many.bytes)
        said.protections.add(group.protection)


def _listed(names: set[str] | frozenset[str]) -> str:
    return ", ".join(sorted(names)) or "nobody"


def _union(said: Mapping[str, Ended]) -> set[str]:
    return {party for ended in said.values() for party in ended.contributors}


def pins_of(dossier: Mapping[str, Any]) -> dict[str, PublicIdentity]:
    """The identities that a dossier itself names. To look at it: what fits them proves nothing of who they are."""
    found: dict[str, PublicIdentity] = {}
    try:
        members = dossier["specification"]["specification"]["members"].items()
        for party, member in members:
            found[party] = PublicIdentity.from_text(member["identity"])
    except (LookupError, TypeError, AttributeError, ConfigurationError):
        raise DataError("this is not a dossier: its specification names no members with keys", hint=_HINT) from None
    return found
