"""The coordinator's side of one masked sum.

    KEYS --all or time over: U1--> SHARES --U2--> MASKED --U3--> CONSENT --enough: U4--> UNMASK --enough--> total

Rules:
1. A stage ends when all who can still answer have, or when its time is over and there are enough; the last two as soon
   as there are enough, since more would change nothing.
2. Which parties a stage ended with is kept before anybody is told: after a kill the stage ends with the same ones.
3. A message is checked whole (signature, shapes) before anything is changed by it. The same one again is ignored.
4. Masked vectors are added as they come. What is opened is checked against the keys and commitments that the parties
   had signed: a wrong share is found out, never added.
5. Too few parties at any stage: QuorumLost, and nothing was opened.
6. After a kill the parties' messages are heard again, each party's in their order, and between parties in any: what
   belongs to a later stage waits until that begins.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from fate_llm.core.errors import PeerViolation, ProtectionError, QuorumLost
from fate_llm.core.interfaces import (
    SumAction,
    SumEvent,
    SumExpired,
    SumFinished,
    SumKeep,
    SumReceived,
    SumScene,
    SumSend,
)
from fate_llm.core.values import Payload
from fate_llm.security.fixed_point import WIDE_BYTES
from fate_llm.security.identity import SIGNATURE_BYTES
from fate_llm.security.masks import add_masks
from fate_llm.security.pairwise import PUBLIC_BYTES, MaskKey
from fate_llm.security.shamir import SHARE_BYTES, combine

from .agreement import Agreement
from .messages import (
    COMMITMENT_BYTES,
    SEALED_BYTES,
    PublicKeys,
    as_bytes,
    commitment,
    fields_of,
    keys_text,
    masked_text,
    pack,
    rows,
    shown,
    stage_of,
    survivors_text,
    transcript_of,
    transcript_with,
    unmask_text,
)
from .party import pair_mask, self_mask
from .terms import Words, read_total, sum_names, wide_from

__all__ = ["MaskingServer"]

_ROW = 2 * PUBLIC_BYTES + COMMITMENT_BYTES
_STAGES = ("keys", "shares", "masked", "consent", "unmask")
_RING = 1 << 128
_PROBE = MaskKey(b"to see whether a key is any good")  # no secret: it only finds out keys of low order


@dataclass(slots=True)
class MaskingServer:
    """Satisfies `core.interfaces.SumServer`. kept: the parties with which stages had ended in an earlier life."""

    scene: SumScene
    agreement: Agreement
    kept: Mapping[str, Payload]
    stage: int = 0
    _expected: tuple[str, ...] = ()
    _received: dict[str, bytes] = field(default_factory=dict)  # of this stage: signatures, or nothing
    _digests: dict[str, bytes] = field(default_factory=dict)  # of this stage and those before, by party
    _keys: dict[str, PublicKeys] = field(default_factory=dict)
    _names: list[str] = field(default_factory=list)
    _sealed: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by sender and receiver
    _transcript: bytes = b""
    _masking: bytes = b""
    _sharing: tuple[str, ...] = ()
    _survivors: tuple[str, ...] = ()
    _total: Words | None = None
    _opened: dict[str, list[bytes]] = field(default_factory=dict)
    _closed: bool = False
    _early: dict[tuple[str, str], SumReceived] = field(default_factory=dict)  # after a kill, by sender and stage
    _waited_for: int = -1  # the stage of an earlier life whose time has run out once

    KEYS: ClassVar[int] = 0
    MASKED: ClassVar[int] = 2

    def __post_init__(self) -> None:
        self._expected = self._restored(self.agreement.contributors)

    @property
    def awaiting(self) -> frozenset[str]:
        return frozenset() if self._closed else frozenset(p for p in self._expected if p not in self._received)

    @property
    def able(self) -> frozenset[str]:
        return frozenset(self._expected)

    @property
    def least(self) -> int:
        """Quorum and policy count terms: once the masked vectors are in, only the threshold counts."""
        if self.stage > self.MASKED:
            return self.agreement.threshold
        return max(self.agreement.least, self.scene.cohort.quorum)

    def _enough(self, parties: tuple[str, ...]) -> bool:
        agreement = self.agreement
        return len(parties) >= self.least and (agreement.agreed if self.stage > self.MASKED else agreement.enough)(
            parties
        )

    def handle(self, event: SumEvent) -> list[SumAction]:
        """Apply one event.

        Raises:
            PeerViolation: a message that does not fit; nothing has changed. QuorumLost: too few parties are left.
            ProtectionError: what was opened fits no key: somebody lied, and there is no total.
        """
        if self._closed:
            raise PeerViolation(f"{type(event).__name__} after the end of the sum")
        if isinstance(event, SumReceived):
            return self._message(event)
        if isinstance(event, SumExpired):
            return self._expire()
        raise PeerViolation(f"{type(event).__name__} is not for the coordinator of a sum")

    # --- stages -----------------------------------------------------------------------------------------------

    def _restored(self, possible: tuple[str, ...]) -> tuple[str, ...]:
        """Who is waited for in this stage: all, or exactly those with whom it had ended before."""
        kept = self.kept.get(_STAGES[self.stage])
        return possible if kept is None else tuple(kept.fields["parties"])

    def _message(self, event: SumReceived) -> list[SumAction]:
        sender, stage = event.sender, stage_of(event.body)
        if sender not in self.agreement.contributors:
            raise PeerViolation(f"{sender} is not a contributor of this sum")
        if stage == "declined":
            attempt = shown(event.body.fields.get("attempt"))
            raise PeerViolation(f"{sender} has answered this round in attempt {attempt}, and answers it once only")
        if stage not in _STAGES:
            raise PeerViolation(f"{stage!r} is not for a coordinator")
        fingerprint = stage.encode() + _fingerprint(event.body)
        if self._digests.get(f"{stage} {sender}") == fingerprint:
            return []
        if stage == "consent" and sender in self._survivors and self._has_enough_consents(sender):
            return []  # its answer may still be needed
        early = stage in _STAGES[self.stage + 1 :]
        if early and _STAGES[self.stage] in self.kept:  # heard again, in another order than the first time
            before = self._early.setdefault((sender, stage), event)
            if before is event or _fingerprint(before.body) == _fingerprint(event.body):
                return []
        if stage != _STAGES[self.stage]:
            raise PeerViolation(
                f"{sender}: {stage!r} is {'too early' if early else 'late'}, it is {_STAGES[self.stage]!r}"
            )
        if sender not in self._expected:
            raise PeerViolation(f"{sender} takes no part in the stage {stage!r}")
        if sender in self._received:
            raise PeerViolation(f"{sender} sent a second, different message {stage!r}")
        read = (self._read_keys, self._read_shares, self._read_masked, self._read_consent, self._read_unmask)
        self._received[sender] = read[self.stage](sender, event.body)
        self._digests[f"{stage} {sender}"] = fingerprint
        return [*self._advance(), *self._hear_early()] if self._is_complete else []

    def _hear_early(self) -> list[SumAction]:
        """What had come for the stage that has just begun."""
        if self._closed:
            return []
        stage = _STAGES[self.stage]
        events = [event for (_, name), event in self._early.items() if name == stage]
        self._early = {key: event for key, event in self._early.items() if key[1] != stage}
        actions: list[SumAction] = []
        for event in events:
            with contextlib.suppress(PeerViolation):  # it would have been refused then as well
                actions += self._message(event) if not self._closed else []
        return actions

    def _has_enough_consents(self, sender: str) -> bool:
        """Whether this survivor's is one too many, now or in an earlier life."""
        consent = _STAGES.index("consent")
        return self.stage > consent or (self.stage == consent and sender not in self._expected)

    @property
    def _is_complete(self) -> bool:
        """Whether nothing more is waited for in this stage."""
        if not self.awaiting:
            return True
        late = self.stage > self.MASKED and _STAGES[self.stage] not in self.kept
        return late and self._enough(tuple(self._received))

    def _expire(self) -> list[SumAction]:
        if _STAGES[self.stage] not in self.kept or not self.awaiting:
            return self._advance()
        if self._waited_for == self.stage:
            lost = ", ".join(sorted(self.awaiting))
            raise QuorumLost(f"{lost} had answered before this party was killed, and is not heard again")
        self._waited_for = self.stage  # they had answered, and will be heard again
        return []

    def _advance(self) -> list[SumAction]:
        parties = tuple(party for party in self.agreement.contributors if party in self._received)
        if not self._enough(parties):
            missing = ", ".join(party for party in self.agreement.contributors if party not in parties)
            raise QuorumLost(
                f"{len(parties)} of {len(self.agreement.contributors)} parties came to the stage "
                f"{_STAGES[self.stage]!r} of a masked sum, {self.least} are needed; "
                f"missing: {missing}"
            )
        name = _STAGES[self.stage]
        end = (self._end_keys, self._end_shares, self._end_masked, self._end_consent, self._end_unmask)[self.stage]
        keep = [] if name in self.kept or name == "unmask" else [SumKeep(name, Payload({"parties": list(parties)}))]
        actions = end(parties)
        if name == "unmask":
            self._closed = True
            return actions
        self.stage += 1
        self._expected = self._restored(parties if self.stage <= self.MASKED else self._survivors)
        self._received = {}
        return [*keep, *actions]

    # --- keys -------------------------------------------------------------------------------------------------

    def _read_keys(self, sender: str, body: Payload) -> bytes:
        fields = fields_of(body, {"sums"}, {"keys", "signature"})
        row = as_bytes(body.tensors["keys"], _ROW, "keys")
        signature = as_bytes(body.tensors["signature"], SIGNATURE_BYTES, "a signature")
        keys = PublicKeys.read(row, fields["sums"], signature)
        text = keys_text(self.agreement, sender, row, keys.sums)
        self.agreement.signer.verify(sender, signature, text, purpose="secagg keys")
        self._check_public(sender, keys)
        self._keys[sender] = keys
        return signature

    def _check_public(self, sender: str, keys: PublicKeys) -> None:
        """Keys for which every honest party would refuse the list: this one party is left out instead."""
        for key in (keys.channel, keys.mask):
            _PROBE.agree(key)
        others = [key for one in self._keys.values() for key in (one.channel, one.mask)]
        if keys.channel == keys.mask or keys.channel in others or keys.mask in others:
            raise PeerViolation(f"{sender} has sent a public key that is there already")

    def _end_keys(self, parties: tuple[str, ...]) -> list[SumAction]:
        self._keys = {party: self._keys[party] for party in parties}
        self._transcript = transcript_of(self.agreement, self._keys)
        self._names = sum_names({party: one.sums for party, one in self._keys.items()}, self.agreement.threshold)
        body = Payload(
            {"stage": "keys", "parties": list(parties), "sums": [list(one.sums) for one in self._keys.values()]},
            {
                "keys": pack([one.row for one in self._keys.values()], _ROW),
                "signatures": pack([one.signature for one in self._keys.values()], SIGNATURE_BYTES),
            },
        )
        return [SumSend(party, body) for party in parties]

    # --- shares -----------------------------------------------------------------------------------------------

    def _read_shares(self, sender: str, body: Payload) -> bytes:
        fields_of(body, set(), {"sealed"})
        others = [party for party in self._keys if party != sender]
        sealed = rows(body.tensors["sealed"], len(others), SEALED_BYTES, "sealed shares")
        self._sealed[sender] = dict(zip(others, sealed, strict=True))
        return b""

    def _end_shares(self, parties: tuple[str, ...]) -> list[SumAction]:
        self._sharing = parties
        self._masking = transcript_with(self._transcript, parties)
        sends: list[SumAction] = []
        for receiver in parties:
            sealed = [self._sealed[sender][receiver] for sender in parties if sender != receiver]
            fields = {"stage": "shares", "parties": list(parties)}
            sends.append(SumSend(receiver, Payload(fields, {"sealed": pack(sealed, SEALED_BYTES)})))
        self._sealed = {}
        return sends

    # --- masked vectors ---------------------------------------------------------------------------------------

    def _read_masked(self, sender: str, body: Payload) -> bytes:
        fields_of(body, set(), {"words", "wide", "signature"})
        words, wide = body.tensors["words"], body.tensors["wide"]
        size = sum(int(np.prod(shape, dtype=np.int64)) for shape in self.scene.layout.values())
        if words.dtype != np.dtype("<u4") or words.shape != (size,):
            raise PeerViolation(f"the words of {sender} are {words.dtype}{list(words.shape)}, expected uint32[{size}]")
        rows(wide, len(self._names) + 1, WIDE_BYTES, "wide numbers")
        signature = as_bytes(body.tensors["signature"], SIGNATURE_BYTES, "a signature")
        text = masked_text(self._masking, sender, words, wide)
        self.agreement.signer.verify(sender, signature, text, purpose="secagg masked")
        if self._total is None:
            self._total = Words(np.zeros(size, np.dtype("<u4")), [0] * (len(self._names) + 1))
        np.add(self._total.words, words, out=self._total.words)
        self._total.wide = [(a + b) % _RING for a, b in zip(self._total.wide, wide_from(wide), strict=True)]
        return b""

    def _end_masked(self, parties: tuple[str, ...]) -> list[SumAction]:
        self._survivors = parties
        body = Payload({"stage": "survivors", "parties": list(parties)})
        return [SumSend(party, body) for party in parties]

    # --- consent and unmasking --------------------------------------------------------------------------------

    def _read_consent(self, sender: str, body: Payload) -> bytes:
        fields_of(body, set(), {"signature"})
        signature = as_bytes(body.tensors["signature"], SIGNATURE_BYTES, "a signature")
        text = survivors_text(self._masking, self._survivors)
        self.agreement.signer.verify(sender, signature, text, purpose="secagg survivors")
        return signature

    def _end_consent(self, parties: tuple[str, ...]) -> list[SumAction]:
        signatures = pack([self._received[party] for party in parties], SIGNATURE_BYTES)
        body = Payload({"stage": "consents", "parties": list(parties)}, {"signatures": signatures})
        return [SumSend(party, body) for party in self._survivors]

    def _read_unmask(self, sender: str, body: Payload) -> bytes:
        fields_of(body, set(), {"shares", "signature"})
        shares = rows(body.tensors["shares"], len(self._sharing), SHARE_BYTES, "shares")
        signature = as_bytes(body.tensors["signature"], SIGNATURE_BYTES, "a signature")
        text = unmask_text(self._masking, sender, self._survivors, shares)
        self.agreement.signer.verify(sender, signature, text, purpose="secagg unmask")
        self._opened[sender] = shares
        return b""

    def _end_unmask(self, parties: tuple[str, ...]) -> list[SumAction]:
        assert self._total is not None
        plus, minus = self._masks_left()
        add_masks(self._total.words, self._total.wide, plus=plus, minus=minus)
        missing = [party for party in self.agreement.contributors if party not in self._survivors]
        total = read_total(self._total, self.scene.layout, self._names, self.agreement, self._survivors, missing)
        self._total, self._opened = None, {}
        return [SumFinished(total)]

    def _masks_left(self) -> tuple[list[bytes], list[bytes]]:
        """The keys of the masks to be added and taken off: self-masks of survivors, pair masks with the dropped."""
        plus: list[bytes] = []
        minus: list[bytes] = []
        order = self.agreement.contributors.index
        for at, party in enumerate(self._sharing):
            shares = {self.agreement.point(sender): shares[at] for sender, shares in self._opened.items()}
            secret = self._combine(party, shares)
            if party in self._survivors:
                if commitment(self.agreement, party, secret) != self._keys[party].commitment:
                    raise ProtectionError(f"the shares of the self-mask of {party} do not fit what it had signed")
                minus.append(self_mask(secret, self._masking))
                continue
            key = MaskKey(secret)
            if key.public != self._keys[party].mask:
                raise ProtectionError(f"the shares of the mask key of {party} do not fit what it had signed")
            for other in self._survivors:
                first = order(other) < order(party)  # then it had added the mask
                pair = (other, party) if first else (party, other)
                mask = pair_mask(key, self._keys[other].mask, self._masking, pair)
                (minus if first else plus).append(mask)
        return plus, minus

    def _combine(self, party: str, shares: Mapping[int, bytes]) -> bytes:
        try:
            return combine(shares, threshold=self.agreement.threshold)
        except PeerViolation as error:
            raise ProtectionError(f"the shares of {party} fit no secret: {error.message}") from None


def _fingerprint(body: Payload) -> bytes:
    """The signature where there is one, as it covers the rest; the sealed shares else."""
    found = body.tensors.get("signature", body.tensors.get("sealed"))
    return b"" if found is None else found.tobytes()
