"""The messages of a masked sum: what is in them, what is signed, and how they are read without believing them.

    to the coordinator                          from the coordinator
    keys      two public keys, a commitment     keys       the keys of U1
    shares    sealed shares for each of U1      shares     the sealed shares of U2 for the receiver
    masked    the masked words                  survivors  U3
    consent   a signature over U3               consents   the signatures of U4
    unmask    a share for each of U2
    declined  an earlier attempt was answered

Sets of parties are lists in roster order; whatever else, an unknown party, twice the same, another order, is refused.
Signatures are over the purpose, the agreement or transcript, and the content, under the identities of the roster.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fate_llm.core.canonical import canonical_json
from fate_llm.core.errors import PeerViolation, PolicyError, UnsafeRequest
from fate_llm.core.values import Array, Payload
from fate_llm.security.pairwise import PUBLIC_BYTES
from fate_llm.security.shamir import SHARE_BYTES

from .agreement import Agreement

__all__ = [
    "COMMITMENT_BYTES",
    "SEALED_BYTES",
    "PublicKeys",
    "as_bytes",
    "commitment",
    "fields_of",
    "keys_text",
    "masked_text",
    "pack",
    "parties_in",
    "rows",
    "shown",
    "stage_of",
    "survivors_text",
    "transcript_of",
    "transcript_with",
    "unmask_text",
]

COMMITMENT_BYTES = 32
SEALED_BYTES = 2 * SHARE_BYTES + 16
_NAMES, _NAME = 64, 200  # additive numbers of a party, characters of their names
STAGES = ("keys", "shares", "masked", "consent", "unmask", "declined", "survivors", "consents")


@dataclass(frozen=True, slots=True)
class PublicKeys:
    """What a party advertises for one round.

    channel, mask: X25519. commitment: to its self-mask's seed. sums: names of its additive numbers. signature: 64
    bytes over these and the agreement.
    """

    channel: bytes
    mask: bytes
    commitment: bytes
    sums: tuple[str, ...]
    signature: bytes

    @property
    def row(self) -> bytes:
        return self.channel + self.mask + self.commitment

    @classmethod
    def read(cls, row: bytes, sums: object, signature: bytes) -> PublicKeys:
        """Raises PeerViolation when the names are none."""
        if (
            not isinstance(sums, list)
            or len(sums) > _NAMES
            or not all(isinstance(name, str) and 0 < len(name) <= _NAME for name in sums)
            or sorted(set(sums)) != sums
        ):
            raise PeerViolation(f"the names of additive numbers are a sorted list of at most {_NAMES} texts")
        return cls(
            row[:PUBLIC_BYTES], row[PUBLIC_BYTES : 2 * PUBLIC_BYTES], row[-COMMITMENT_BYTES:], tuple(sums), signature
        )


def stage_of(body: Payload) -> str:
    """Which message this is. Raises PeerViolation for none of ours."""
    stage = body.fields.get("stage")
    if not isinstance(stage, str) or stage not in STAGES:
        raise PeerViolation(f"no message of a masked sum: stage {shown(stage)}")
    return stage


def shown(value: object) -> str:
    """A few letters of what a peer sent; what may be nested without end is not walked through."""
    if isinstance(value, str):
        return repr(value[:40])
    return str(value) if isinstance(value, int) and abs(value) < 1 << 32 else f"a {type(value).__name__}"


def fields_of(body: Payload, fields: set[str], tensors: set[str]) -> Mapping[str, Any]:
    """The fields, when they and the tensors are exactly these. Raises PeerViolation."""
    if body.fields.keys() != fields | {"stage"} or body.tensors.keys() != tensors:
        found = sorted(map(str, (*body.fields, *body.tensors)))[:8]
        raise PeerViolation(f"the message {body.fields.get('stage')!r} has {found}, not what belongs there")
    return body.fields


def pack(parts: Sequence[bytes], size: int) -> Array:
    """uint8 (k, size)."""
    return np.frombuffer(b"".join(parts), np.uint8).reshape(len(parts), size)


def rows(array: Array, count: int, size: int, what: str) -> list[bytes]:
    """The rows of a uint8 array of exactly this shape. Raises PeerViolation."""
    if array.dtype != np.uint8 or array.shape != (count, size):
        raise PeerViolation(f"{what} are {array.dtype}{list(array.shape)}, expected uint8{[count, size]}")
    return [row.tobytes() for row in array]


def as_bytes(array: Array, size: int, what: str) -> bytes:
    """The bytes of one row. Raises PeerViolation."""
    return rows(array, 1, size, what)[0]


def parties_in(value: object, among: Sequence[str], agreement: Agreement, what: str) -> tuple[str, ...]:
    """A set of parties that a coordinator names: known, distinct, in roster order, enough, and with us among them.

    Raises:
        UnsafeRequest: anything else. PolicyError: fewer than this party's policy wants.
    """
    if not isinstance(value, list) or not all(isinstance(party, str) for party in value):
        raise UnsafeRequest(f"{what}: not a list of parties")
    unknown = [party[:80] for party in value if party not in among]
    if unknown:
        raise UnsafeRequest(f"{what}: {unknown[0]!r} is not among those who could be there")
    if len(set(value)) != len(value):
        raise UnsafeRequest(f"{what}: a party is named twice")
    if sorted(value, key=agreement.contributors.index) != value:
        raise UnsafeRequest(f"{what}: not in the order of the roster")
    if agreement.me not in value:
        raise UnsafeRequest(f"{what}: we are not among them, although we are asked")
    if not agreement.agreed(tuple(value)):
        raise UnsafeRequest(f"{what}: {len(value)} parties, of a threshold of {agreement.threshold}")
    if not agreement.enough(tuple(value)):
        raise PolicyError(
            f"{what}: {len(value)} parties; the policy of {agreement.me} wants {agreement.least} in a sum"
        )
    return tuple(value)


def commitment(agreement: Agreement, party: str, seed: bytes) -> bytes:
    """Binds a party to its self-mask's seed (32 random bytes), so that a wrong share is found out."""
    label = b"fate_llm/1 secagg commitment\0"
    return hashlib.sha256(label + agreement.digest + party.encode() + b"\0" + seed).digest()


def keys_text(agreement: Agreement, party: str, row: bytes, sums: Sequence[str]) -> bytes:
    """What a party signs of its keys."""
    return canonical_json({"agreement": agreement.digest.hex(), "party": party, "keys": row.hex(), "sums": list(sums)})


def transcript_of(agreement: Agreement, keys: Mapping[str, PublicKeys]) -> bytes:
    """32 bytes over the agreement and all keys of U1, as they were shown to us."""
    text = {party: [one.row.hex(), list(one.sums)] for party, one in keys.items()}
    order = {"agreement": agreement.digest.hex(), "order": list(keys), "keys": text}
    return hashlib.sha256(b"fate_llm/1 secagg keys\0" + canonical_json(order)).digest()


def transcript_with(transcript: bytes, sharing: Sequence[str]) -> bytes:
    """32 bytes over that and U2: what masks are bound to."""
    text = canonical_json({"transcript": transcript.hex(), "sharing": list(sharing)})
    return hashlib.sha256(b"fate_llm/1 secagg sharing\0" + text).digest()


def masked_text(transcript: bytes, party: str, words: Array, wide: Array) -> bytes:
    """What a party signs of its masked vector."""
    vector = hashlib.sha256(np.ascontiguousarray(words).reshape(-1).view(np.uint8).data)
    vector.update(np.ascontiguousarray(wide).reshape(-1).data)
    return canonical_json({"transcript": transcript.hex(), "party": party, "vector": vector.hexdigest()})


def survivors_text(transcript: bytes, survivors: Sequence[str]) -> bytes:
    """What every survivor signs before anything is opened."""
    return canonical_json({"transcript": transcript.hex(), "survivors": list(survivors)})


def unmask_text(transcript: bytes, party: str, survivors: Sequence[str], shares: Sequence[bytes]) -> bytes:
    """What a party signs of the shares that it opens."""
    opened = hashlib.sha256(b"".join(shares)).hexdigest()
    return canonical_json(
        {"transcript": transcript.hex(), "party": party, "survivors": list(survivors), "shares": opened}
    )
