"""A party's public card: who it is, in one text to be handed over in any way and compared over the phone.

The card is signed by the identity that is in it, so that a slip of the hand is found; that it is the right party's
only the fingerprint says, read out by a person. The fingerprint is over everything that others pin: id, keys, broker
and federation, not over the program's version.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from fate_llm.core.canonical import canonical_json
from fate_llm.core.errors import BadSignature, ConfigurationError
from fate_llm.core.names import NAME_PATTERN
from fate_llm.pipelines.dialect import MAX_BYTES, Source, dump, parse
from fate_llm.runtime.federation import BrokerPlace, Federation, Member, Topology, dump_model, load_federation
from fate_llm.security.identity import Identity, PublicIdentity

from .documents import Strict, checked, replace_file

__all__ = ["Card", "card_of", "fingerprint_of", "parse_card", "pin", "same_fingerprint"]

_PURPOSE = "card"
_LARGEST = 16 * 1024  # bytes of a card
_HINT = "Ask that party for its card again: fate_llm party card"
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]


class _FederationName(Strict):
    name: Name
    vhost: Annotated[str, StringConstraints(max_length=100)]
    topology: Topology


class _CardFile(Strict):
    fate_llm_card: Literal[1]
    party: Name
    identity: Annotated[str, Field(max_length=100)]
    sealing: Annotated[str, Field(max_length=4000)]
    broker: BrokerPlace
    federation: _FederationName
    program: Annotated[str, Field(max_length=100)]
    fingerprint: Annotated[str, Field(max_length=100)]
    signature: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$")]


@dataclass(frozen=True, slots=True)
class Card:
    """A card whose signature has been proved. federation: name, virtual host and topology. program: its version."""

    party: str
    member: Member
    federation: Mapping[str, str]
    program: str

    @property
    def fingerprint(self) -> str:
        """Eight groups of five digits, to be read out over the phone."""
        return fingerprint_of(self.party, self.member, self.federation)


def fingerprint_of(party: str, member: Member, federation: Mapping[str, str] | Federation) -> str:
    """Eight groups of five digits (132 bits of SHA-256) over all that others pin of a party."""
    if isinstance(federation, Federation):
        federation = _named(federation)
    facts = {"party": party, "federation": dict(federation), **member.model_dump(mode="json", exclude_none=True)}
    number = int.from_bytes(hashlib.sha256(b"fate_llm/1 card\0" + canonical_json(facts)).digest(), "big") % 10**40
    digits = f"{number:040d}"
    return " ".join(digits[start : start + 5] for start in range(0, 40, 5))


def same_fingerprint(given: str, found: str) -> bool:
    """Whether what somebody typed is the fingerprint; spaces do not count."""
    return "".join(given.split()) == "".join(found.split())


def _named(federation: Federation) -> dict[str, str]:
    return {"name": federation.name, "vhost": federation.vhost, "topology": federation.topology}


def card_of(party: str, federation: Federation, identity: Identity, *, program: str) -> str:
    """The card of a party, as YAML. program: version of this program.

    Raises:
        ConfigurationError: the roster has no sealing key of it, or another identity than the key here.
    """
    member = federation.member(party)
    if member.sealing is None:
        raise ConfigurationError(
            f"the roster has no sealing key of {party}: others could say nothing to its service",
            hint="`fate_llm party init` makes one in a new home.",
        )
    if member.identity != identity.public.to_text():
        raise ConfigurationError(
            f"the identity key here is {identity.public.to_text()}, and the roster has {member.identity} for {party}",
            hint="One of them is of another home.",
        )
    facts = {
        "fate_llm_card": 1,
        "party": party,
        "identity": member.identity,
        "sealing": member.sealing,
        "broker": member.broker.model_dump(mode="json"),
        "federation": _named(federation),
        "program": program,
        "fingerprint": fingerprint_of(party, member, federation),
    }
    return dump({**facts, "signature": identity.sign(canonical_json(facts), purpose=_PURPOSE).hex()})


def parse_card(text: str, file: str | None = None) -> Card:
    """Read a card (YAML or JSON). file: for messages.

    Raises:
        ConfigurationError: it is no card; all faults at once.
        BadSignature: it is not signed by the identity that is in it: something was changed.
    """
    if len(text) > _LARGEST:
        raise ConfigurationError(f"a card has at most {_LARGEST} characters; this has {len(text)}", hint=_HINT)
    source = parse(text, file)
    found = checked(source, _CardFile, f"the card {file or ''}".rstrip())
    data = {"identity": found.identity, "sealing": found.sealing, "broker": found.broker.model_dump(mode="json")}
    member = checked(Source(data=data), Member, f"the card of {found.party}")
    facts = found.model_dump(mode="json", exclude={"signature"})
    try:
        PublicIdentity.from_text(found.identity).verify(
            bytes.fromhex(found.signature), canonical_json(facts), purpose=_PURPOSE
        )
    except BadSignature:
        raise BadSignature(
            f"the card of {found.party} was changed: its own key did not sign this", hint=_HINT
        ) from None
    card = Card(found.party, member, found.federation.model_dump(mode="json"), found.program)
    if found.fingerprint != card.fingerprint:
        raise ConfigurationError(
            f"the card of {found.party} says fingerprint {found.fingerprint}, and its contents give {card.fingerprint}",
            hint=_HINT,
        )
    return card


def pin(path: Path, card: Card, *, me: str, replace: bool = False) -> Federation:
    """Put a party's card into the roster at `path`; comments stay where that can be. me: this party.

    replace: a party that is there may get another key or broker. Returns the new roster, which is on disk then.

    Raises:
        ConfigurationError: the card is of another federation or another shared broker, the party is pinned with other
            facts, or it is this party itself; nothing has changed then.
    """
    before = load_federation(path)
    _check_federation(before, card)
    known = before.parties.get(card.party)
    if known == card.member:
        return before
    if known is not None and card.party == me:
        raise ConfigurationError(
            f"the card of {me}, which is this party, has other facts than its own roster", hint="Nothing to add here."
        )
    if known is not None and not replace:
        keys = ", ".join(name for name in ("identity", "sealing", "broker") if _differs(known, card.member, name))
        raise ConfigurationError(
            f"{card.party} is pinned with another {keys}; nothing was changed",
            hint="If it made new keys, hear it from its people by phone, then add the card with --replace.",
        )
    data = before.model_dump(mode="json", exclude_none=True)
    data["parties"][card.party] = card.member.model_dump(mode="json", exclude_none=True)
    after = checked(Source(data=data), Federation, f"the roster with the card of {card.party}")
    text = path.read_text(encoding="utf-8")
    changed = _edited(text, card, after)
    replace_file(path, (changed if changed is not None else dump_model(after)).encode("utf-8"))
    return after


def _differs(known: Member, new: Member, name: str) -> bool:
    return bool(getattr(known, name) != getattr(new, name))


def _check_federation(federation: Federation, card: Card) -> None:
    ours = _named(federation)
    differ = [
        f"{key} {card.federation[key]!r}, ours is {ours[key]!r}" for key in ours if card.federation[key] != ours[key]
    ]
    if differ:
        raise ConfigurationError(
            f"the card of {card.party} is for another federation: {'; '.join(differ)}",
            hint="Both sides run `fate_llm party init` with the same --federation and --topology.",
        )
    place = next(iter(federation.parties.values())).broker
    if federation.topology == "shared" and card.member.broker != place:
        there = card.member.broker
        raise ConfigurationError(
            f"{card.party} reaches the shared broker at {there.host}:{there.port} (tls: {there.tls}), "
            f"we at {place.host}:{place.port} (tls: {place.tls})",
            hint="A shared broker has one address for all: one of you makes its home anew.",
        )


def _edited(text: str, card: Card, after: Federation) -> str | None:
    """The file's text with the party's lines in it and everything else untouched; None where that does not come out."""
    source = parse(text, None)
    if len(text) > MAX_BYTES or source.faults or not isinstance(source.data, dict):
        return None
    lines = text.splitlines(keepends=True)
    starts = {path: mark.line - 1 for path, mark in source.marks.items() if mark.line is not None and path}
    begin = starts[("parties",)]
    siblings = sorted(line for path, line in starts.items() if len(path) == 2 and path[0] == "parties")
    ends = sorted(line for path, line in starts.items() if len(path) == 1 and line > begin)
    end = _trimmed(lines, ends[0] if ends else len(lines))
    first = lines[siblings[0]]
    indent = first[: len(first) - len(first.lstrip(" "))]
    block = dump({card.party: card.member.model_dump(mode="json", exclude_none=True)})
    new = [f"{indent}{line}" for line in block.splitlines(keepends=True)]
    at = starts.get(("parties", card.party))
    if at is None:
        made = [*lines[:end], *new, *lines[end:]]
    else:
        after_it = [line for line in siblings if line > at]
        made = [*lines[:at], *new, *lines[_trimmed(lines, after_it[0]) if after_it else end :]]
    if lines and end == len(lines) and not lines[-1].endswith("\n"):
        made = [*lines[:-1], lines[-1] + "\n", *made[len(lines) :]] if at is None else made
    changed = "".join(made)
    try:
        found = checked(parse(changed, None), Federation, "the roster")
    except ConfigurationError:
        return None
    return changed if found == after else None


def _trimmed(lines: list[str], end: int) -> int:
    """The end of what is said before `end`: blank lines and comments above the next thing belong to that."""
    while end > 0 and (not lines[end - 1].strip() or lines[end - 1].lstrip().startswith("#")):
        end -= 1
    return end
