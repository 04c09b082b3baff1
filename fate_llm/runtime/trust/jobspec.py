"""What a job is, to the last byte: the specification that the guest signs and every party checks for itself.

Rules:
1. The digest is SHA-256 of the canonical JSON of `to_data()`; the signature is over the same bytes.
2. Nothing of a specification is used before the signature of its initiator, as the roster here pins it, is proved.
3. Who takes part is in it with their keys: all parties mean the same parties, or the job does not start.
4. Size, number and depth of values are bounded before anything is made of them. Unknown fields are refused.
5. It names components, which have to be installed here; it never holds code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

from pydantic import ConfigDict, Field, StringConstraints, ValidationError

from fate_llm.core.canonical import canonical_json, digest
from fate_llm.core.errors import ConfigurationError, PolicyError
from fate_llm.core.interfaces import Frozen
from fate_llm.core.names import NAME_PATTERN
from fate_llm.pipelines.check import check
from fate_llm.pipelines.dialect import MAX_DEPTH, MAX_VALUES
from fate_llm.pipelines.schema import PipelineSpec, Version
from fate_llm.protocols.strict_json import read_json
from fate_llm.runtime.federation import Federation
from fate_llm.security.identity import SIGNATURE_BYTES, Identity, PublicIdentity

__all__ = [
    "MAX_SPECIFICATION",
    "PURPOSE",
    "AttemptPolicy",
    "JobMember",
    "JobSpecification",
    "Reuse",
    "SignedSpecification",
    "make_specification",
    "verify",
]

MAX_SPECIFICATION = 1 << 20
"""Bytes of a signed specification as canonical JSON."""

PURPOSE = "job specification"
_EARLY = 300.0  # seconds that clocks may differ
_LONGEST = 31 * 86400.0  # seconds from `created` to `expires`
_HINT = "It comes from another version, or was changed on its way; nothing of it was used."

Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
JobId = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,126}[a-z0-9]$")]
Seconds = Annotated[float, Field(ge=0, lt=2**40)]


class _Strict(Frozen):
    model_config = ConfigDict(strict=True)


class JobMember(_Strict):
    """A party's public keys, as the initiator's roster has them."""

    identity: str = Field(max_length=100)
    sealing: str = Field(max_length=4000)


class AttemptPolicy(_Strict):
    """retries: attempts after the first. restarts: how often a party starts its worker again without any progress."""

    retries: int = Field(0, ge=0, le=100)
    restarts: int = Field(10, ge=0, le=1000)


class Reuse(_Strict):
    """Tasks whose outputs of an earlier job are taken over instead of being made again."""

    job: JobId
    tasks: tuple[Name, ...] = Field(max_length=1000, strict=False)


class JobSpecification(_Strict):
    """One job. created, expires: seconds since 1970; after `expires` no party accepts it any more.

    members: every party of the pipeline. pipeline: its plain values, includes and variables resolved. labels: for
    people, they decide nothing.
    """

    version: Version = 1
    job: JobId
    initiator: Name
    created: Seconds
    expires: Seconds
    attempts: AttemptPolicy = AttemptPolicy()
    priority: int = Field(5, ge=0, le=9)
    members: dict[Name, JobMember] = Field(min_length=1, max_length=1000)
    pipeline: dict[str, Any]
    reuse: Reuse | None = None
    labels: dict[Name, Annotated[str, Field(max_length=1000)]] = Field(default_factory=dict, max_length=50)

    def to_data(self) -> dict[str, Any]:
        """Plain JSON values, every field of it."""
        return self.model_dump(mode="json")

    def canonical(self) -> bytes:
        """The bytes that are signed."""
        return canonical_json(self.to_data())

    @cached_property
    def digest(self) -> str:
        """SHA-256 (64 hex digits) of the canonical bytes: what a party accepts is exactly this."""
        return digest(self.to_data())

    def sign(self, identity: Identity) -> SignedSpecification:
        """This specification with the signature of its initiator."""
        return SignedSpecification(self, identity.sign(self.canonical(), purpose=PURPOSE))


@dataclass(frozen=True)
class SignedSpecification:
    """A specification and a signature (64 bytes), which `verify` proves."""

    specification: JobSpecification
    signature: bytes

    @property
    def digest(self) -> str:
        return self.specification.digest

    def to_data(self) -> dict[str, Any]:
        """{"specification": {...}, "signature": hex}."""
        return {"specification": self.specification.to_data(), "signature": self.signature.hex()}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> SignedSpecification:
        """What `to_data` gave; its shape is checked, nobody's signature is.

        Raises:
            ConfigurationError: too large, too deep, or not of this shape; the message names the field.
        """
        _bound(data)
        if set(data) != {"specification", "signature"}:
            raise ConfigurationError(
                f"a signed specification has `specification` and `signature`, not {_listed(data)}", hint=_HINT
            )
        signature = data["signature"]
        if not isinstance(signature, str) or re.fullmatch(rf"[0-9a-f]{{{2 * SIGNATURE_BYTES}}}", signature) is None:
            raise ConfigurationError(f"signature: {2 * SIGNATURE_BYTES} lower case hex digits are valid", hint=_HINT)
        try:
            found = JobSpecification.model_validate(data["specification"])
        except ValidationError as error:
            raise ConfigurationError(f"a job specification that is none: {_faults(error)}", hint=_HINT) from None
        return cls(found, bytes.fromhex(signature))

    @classmethod
    def from_bytes(cls, raw: bytes) -> SignedSpecification:
        """The same from JSON text; its length is looked at first.

        Raises:
            ConfigurationError: too large, no JSON of one meaning, or not of this shape.
        """
        if len(raw) > MAX_SPECIFICATION:
            raise ConfigurationError(
                f"a specification of {len(raw)} bytes; at most {MAX_SPECIFICATION} are valid", hint=_HINT
            )
        try:
            data = read_json(raw)
        except ValueError as error:
            raise ConfigurationError(f"a specification that is no JSON: {error}", hint=_HINT) from None
        if not isinstance(data, dict):
            raise ConfigurationError("a specification is a JSON object", hint=_HINT)
        return cls.from_data(data)

    def verify_signature(self, public: PublicIdentity) -> None:
        """Return when this party signed exactly this specification.

        Raises:
            BadSignature: it did not.
        """
        public.verify(self.signature, self.specification.canonical(), purpose=PURPOSE)


def make_specification(
    pipeline: PipelineSpec,
    *,
    job: str,
    federation: Federation,
    created: float,
    priority: int | None = None,
    reuse: Reuse | None = None,
    labels: Mapping[str, str] | None = None,
) -> JobSpecification:
    """The specification of a checked pipeline, whose guest initiates it. created: seconds since 1970.

    Raises:
        ConfigurationError: a party is not in the federation or has no sealing key, an id, priority or label is none, or
            the whole is too large.
        PolicyError: an experiment, which shows data to others.
    """
    if pipeline.experiment:
        raise PolicyError(_EXPERIMENT, hint="Take `experiment: true` out, or run it with `fate_llm submit` locally.")
    members: dict[str, JobMember] = {}
    for party in pipeline.members:
        member = federation.member(party)
        if member.sealing is None:
            raise ConfigurationError(
                f"the roster has no sealing key of {party}: nothing can be said to its service",
                hint=f"Ask {party} for its card (fate_llm party card), then: fate_llm federation add CARD --replace",
            )
        members[party] = JobMember(identity=member.identity, sealing=member.sealing)
    data = {key: value for key, value in pipeline.to_data().items() if key not in ("include", "env")}
    try:
        found = JobSpecification(
            job=job,
            initiator=pipeline.parties.guest,
            created=float(created),
            expires=float(created) + pipeline.job.approval_deadline,
            attempts=AttemptPolicy(retries=pipeline.job.retries),
            priority=pipeline.job.priority if priority is None else priority,
            members=members,
            pipeline=data,
            reuse=reuse,
            labels=dict(labels or {}),
        )
    except ValidationError as error:
        raise ConfigurationError(
            f"no job can be specified like this: {_faults(error)}", hint="Mend what is named."
        ) from None
    _bound({"specification": found.to_data(), "signature": "0" * 2 * SIGNATURE_BYTES})
    return found


def verify(signed: SignedSpecification, federation: Federation, now: float, *, accepted: bool = False) -> PipelineSpec:
    """The checked pipeline of a specification that may be believed.

    federation: our own roster. now: seconds since 1970. accepted: this party has accepted the very digest before, so
    that it does not expire any more (a job may run for longer than parties had to accept it).

    Raises:
        BadSignature: not signed by the key that our roster pins for its initiator.
        PolicyError: the initiator is a stranger or not the pipeline's guest, members differ from our pins, it has
            expired or comes from the future, or it is an experiment.
        PipelineInvalid: its pipeline has faults.
    """
    found = signed.specification
    if found.initiator not in federation.parties:
        raise PolicyError(f"{found.initiator!r} starts a job and is not in our roster", hint=_STRANGER)
    signed.verify_signature(federation.member(found.initiator).public)
    _check_times(found, min(now, found.expires) if accepted else now)
    _check_members(found, federation)
    pipeline = check(found.pipeline)
    if pipeline.include:
        raise PolicyError("the pipeline includes files of another machine", hint="The guest's service resolves them.")
    if pipeline.parties.guest != found.initiator:
        raise PolicyError(
            f"{found.initiator} starts a job whose guest is {pipeline.parties.guest}",
            hint="Only the guest of a pipeline starts it.",
        )
    if set(found.members) != set(pipeline.members):
        differ = ", ".join(sorted(set(found.members) ^ set(pipeline.members)))
        raise PolicyError(f"members and the pipeline's parties differ: {differ}", hint=_HINT)
    if found.reuse is not None and (unknown := sorted(set(found.reuse.tasks) - set(pipeline.tasks))):
        raise PolicyError(f"reuse names tasks that the pipeline has not: {', '.join(unknown)}", hint=_HINT)
    if pipeline.experiment:
        raise PolicyError(_EXPERIMENT, hint="Its guest takes `experiment: true` out, or runs it locally.")
    return pipeline


_EXPERIMENT = "an experiment shows parties' data to others, and runs in the local runtime only"
_STRANGER = "If it is a partner, exchange cards: fate_llm federation add CARD"


def _check_times(found: JobSpecification, now: float) -> None:
    if found.created > now + _EARLY:
        ahead = found.created - now
        raise PolicyError(
            f"{found.job} was made {ahead:.0f} s in our future; at most {_EARLY:.0f} s are allowed",
            hint="Compare the clocks of both machines: fate_llm doctor",
        )
    if now > found.expires:
        raise PolicyError(
            f"{found.job} expired {now - found.expires:.0f} s ago", hint="Its guest submits it again as a new job."
        )
    if not found.created < found.expires <= found.created + _LONGEST:
        raise PolicyError(
            f"{found.job} is valid for {found.expires - found.created:.0f} s; valid is more than 0, at most 31 days",
            hint="Its guest mends job.approval_deadline.",
        )


def _check_members(found: JobSpecification, federation: Federation) -> None:
    """Every member's keys are those that we pin."""
    for party, member in found.members.items():
        if party not in federation.parties:
            raise PolicyError(f"{party!r} takes part and is not in our roster", hint=_STRANGER)
        pinned = federation.member(party)
        differ = [what for what in ("identity", "sealing") if getattr(member, what) != getattr(pinned, what)]
        if differ:
            raise PolicyError(
                f"{found.initiator} means another {party} than we do: other keys than our pin ({', '.join(differ)})",
                hint=f"Compare the fingerprint of {party} with both, by phone: fate_llm federation show",
            )


def _bound(data: Mapping[str, Any]) -> None:
    """Refuse what is too large before a model is made of it."""
    _count(data)
    try:
        size = len(canonical_json(data))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"a specification that is no JSON: {error}", hint=_HINT) from None
    if size > MAX_SPECIFICATION:
        raise ConfigurationError(f"a specification of {size} bytes; at most {MAX_SPECIFICATION} are valid", hint=_HINT)


def _count(data: Any) -> None:
    pending: list[tuple[Any, int]] = [(data, 0)]
    count = 0
    while pending:
        value, depth = pending.pop()
        count += 1
        if count > MAX_VALUES or depth > MAX_DEPTH:
            raise ConfigurationError(
                f"a specification has at most {MAX_VALUES} values in {MAX_DEPTH} levels; this one has more", hint=_HINT
            )
        if isinstance(value, Mapping):
            pending += [(item, depth + 1) for item in value.values()]
        elif isinstance(value, (list, tuple)):
            pending += [(item, depth + 1) for item in value]


def _faults(error: ValidationError) -> str:
    texts = [f"{'.'.join(map(str, one['loc'])) or 'it'}: {one['msg']}" for one in error.errors(include_url=False)]
    return "; ".join(text[:200] for text in texts[:5]) + (f"; and {len(texts) - 5} more" if len(texts) > 5 else "")


def _listed(data: Mapping[str, Any]) -> str:
    return ", ".join(repr(str(key)[:40]) for key in sorted(data, key=str)[:6]) or "nothing"
