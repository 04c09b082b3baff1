"""What a party signs about its part of a job when it ends: what it said and heard, under which policy.

    {"statement": {...}, "signature": hex}     Ed25519 over the canonical JSON of the statement, purpose "statement"

Messages stand in groups of one attempt, task, kind, round and protection; in a group each has its peer, ordinal, bytes
and digest. More than 256 of one peer in one group are folded into their number, their bytes and one digest, so that a
statement of 100 rounds with 100 parties has about 2 MB.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError

from fate_llm.core.canonical import canonical_json
from fate_llm.core.canonical import digest as digest_of
from fate_llm.core.errors import PeerViolation
from fate_llm.core.interfaces import Frozen
from fate_llm.security.audit_chain import Head
from fate_llm.security.identity import Identity, PublicIdentity

from .transcript import ClosedRound, Message, Noted

__all__ = [
    "Ended",
    "Folded",
    "Group",
    "LogHead",
    "Statement",
    "Told",
    "check_statement",
    "fold",
    "read_statement",
    "statement",
]

PURPOSE: Final = "statement"
MOST_LISTED: Final = 256  # messages of one peer in one group
_HINT: Final = "The party sends its statement again; until then its part of the job counts as not stated."

Text = Annotated[str, Field(max_length=300)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=2**63, strict=True)]


class Told(Frozen):
    """One message of a group."""

    peer: Text
    ordinal: Count
    bytes: Count
    digest: Digest


class Folded(Frozen):
    """Many messages of one peer in one group. digest: over their ordinals and digests, in order; see `fold`."""

    peer: Text
    count: Count
    bytes: Count
    digest: Digest


class Group(Frozen):
    """Messages that differ only in peer and ordinal."""

    attempt: Count
    task: Text
    kind: Text
    round: Count
    protection: Text
    messages: tuple[Told, ...] = ()
    folded: tuple[Folded, ...] = ()


class Ended(Frozen):
    """Rounds of a task in which the same parties were counted."""

    attempt: Count
    task: Text
    rounds: tuple[Count, ...]
    contributors: tuple[Text, ...] = Field(max_length=1000)
    missing: tuple[Text, ...] = Field((), max_length=1000)


class LogHead(Frozen):
    """The end of the party's audit log when it signed: from then on, cutting the log off before it shows."""

    n: Count
    hash: Digest


class Statement(Frozen):
    """One party's account of one job.

    specification, policy: digests of what it accepted and under which rules. attempts: how many there were. ended: the
    end of its own part. time: seconds since the epoch. damaged: lines of its notes that a power cut took.
    """

    version: Literal[1] = 1
    job: Text
    specification: Digest
    party: Text
    policy: Digest
    attempts: Count
    ended: Text
    time: float
    sent: tuple[Group, ...] = ()
    received: tuple[Group, ...] = ()
    rounds: tuple[Ended, ...] = ()
    damaged: Count = 0
    audit: LogHead | None = None


def statement(
    identity: Identity,
    *,
    job: str,
    digest: str,
    party: str,
    policy: str,
    attempts: int,
    ended: str,
    transcript: Noted,
    time: float,
    audit: Head | None = None,
) -> dict[str, Any]:
    """The signed statement of a party as plain JSON values.

    digest: of the job's specification. policy: digest of this party's. audit: the head of its log at this moment.
    """
    found = Statement(
        job=job,
        specification=digest,
        party=party,
        policy=policy,
        attempts=attempts,
        ended=ended,
        time=time,
        sent=_groups(m for m in transcript.messages if m.direction == "sent"),
        received=_groups(m for m in transcript.messages if m.direction == "received"),
        rounds=_ended(transcript.rounds),
        damaged=transcript.damaged,
        audit=None if audit is None else LogHead(n=audit.n, hash=audit.hash),
    )
    content = found.model_dump(mode="json")
    return {"statement": content, "signature": identity.sign(canonical_json(content), purpose=PURPOSE).hex()}


def fold(told: Sequence[tuple[int, str]]) -> str:
    """One digest for many messages, given as (ordinal, digest) in any order."""
    return digest_of(sorted([ordinal, each] for ordinal, each in told))


def read_statement(data: object, public: PublicIdentity) -> Statement:
    """A statement that `public` signed.

    Raises:
        PeerViolation: it has another shape. BadSignature: somebody else signed it, or it was changed.
    """
    try:
        signed = _Signed.model_validate(data)
        found = Statement.model_validate(signed.statement)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "it"
        raise PeerViolation(f"a statement that is none: {place}: {first['msg']}", hint=_HINT) from None
    try:
        content = canonical_json(signed.statement)
    except (ValueError, TypeError, RecursionError):
        raise PeerViolation("a statement that is no JSON", hint=_HINT) from None
    public.verify(bytes.fromhex(signed.signature), content, purpose=PURPOSE)
    return found


def check_statement(data: object, public: PublicIdentity, *, job: str, digest: str, party: str) -> Statement:
    """The statement of `party` about this job and no other.

    Raises:
        PeerViolation: it has another shape, or speaks of something else. BadSignature: `party` did not sign it.
    """
    found = read_statement(data, public)
    for what, said, meant in (
        ("party", found.party, party),
        ("job", found.job, job),
        ("specification", found.specification, digest),
    ):
        if said != meant:
            raise PeerViolation(f"the statement of {party} about {job} names another {what}: {said}", hint=_HINT)
    return found


class _Signed(Frozen):
    statement: dict[str, Any]
    signature: str = Field(pattern=r"^[0-9a-f]{128}$")


def _ended(rounds: Iterable[ClosedRound]) -> tuple[Ended, ...]:
    by_parties: dict[tuple[str, int, tuple[str, ...], tuple[str, ...]], list[int]] = defaultdict(list)
    for closed in rounds:
        by_parties[closed.task, closed.attempt, closed.contributors, closed.missing].append(closed.round)
    return tuple(
        Ended(attempt=attempt, task=task, rounds=tuple(sorted(numbers)), contributors=contributors, missing=missing)
        for (task, attempt, contributors, missing), numbers in sorted(by_parties.items())
    )


@dataclass(frozen=True, slots=True, order=True)
class _Place:
    task: str
    round: int
    kind: str
    attempt: int
    protection: str


def _groups(messages: Iterable[Message]) -> tuple[Group, ...]:
    by_place: dict[_Place, dict[str, list[Message]]] = defaultdict(lambda: defaultdict(list))
    for said in messages:
        place = _Place(said.task, said.round, said.kind, said.attempt, said.protection)
        by_place[place][said.peer].append(said)
    return tuple(_group(place, by_place[place]) for place in sorted(by_place))


def _group(place: _Place, peers: Mapping[str, Sequence[Message]]) -> Group:
    listed: list[Told] = []
    folded: list[Folded] = []
    for peer in sorted(peers):
        said = sorted(peers[peer], key=lambda m: (m.ordinal, m.digest))
        if len(said) <= MOST_LISTED:
            listed += [Told(peer=peer, ordinal=m.ordinal, bytes=m.bytes, digest=m.digest) for m in said]
        else:
            total = fold([(m.ordinal, m.digest) for m in said])
            folded.append(Folded(peer=peer, count=len(said), bytes=sum(m.bytes for m in said), digest=total))
    return Group(
        attempt=place.attempt,
        task=place.task,
        kind=place.kind,
        round=place.round,
        protection=place.protection,
        messages=tuple(listed),
        folded=tuple(folded),
    )
