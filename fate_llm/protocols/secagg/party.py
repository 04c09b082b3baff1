"""A contributor's side of one masked sum.

    NEW --own term--> KEYS --keys of U1--> SHARED --shares of U2--> MASKED --survivors U3--> CONSENTED
    CONSENTED --signatures of U4--> ANSWERED
    NEW --own term, but an earlier attempt was answered--> DECLINED

Rules:
1. Events in, actions out; a message that is refused has changed nothing. All that is drawn comes out of one seed.
2. What must not be drawn or said twice is kept before it is said: the seed, the masked vector, the set agreed to, the
   answer. A party that was killed says the same again, byte for byte, or nothing.
3. The same message again is ignored. Another one in its place is refused: one list of keys, one of shares, one set of
   survivors, one answer for each round and attempt.
4. Of each party either the share of its self-mask's seed is opened (it survived) or that of its mask key (it did not),
   never both, and only after enough survivors have signed one and the same set.
5. Who has answered a round in one attempt answers it in no other one.
6. Secrets live in this object and, sealed, with whoever keeps them; nothing of them is in a message in clear before
   the answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from fate_llm.core.canonical import canonical_json
from fate_llm.core.errors import BadSeal, BadSignature, InconsistentView, InternalError, PeerViolation, UnsafeRequest
from fate_llm.core.interfaces import SumAction, SumContribute, SumEvent, SumKeep, SumReceived, SumScene, SumSend
from fate_llm.core.values import Payload, Update
from fate_llm.security.identity import SIGNATURE_BYTES
from fate_llm.security.masks import add_masks
from fate_llm.security.pairwise import PUBLIC_BYTES, MaskKey, derive, expand, open_once, seal_once
from fate_llm.security.shamir import SHARE_BYTES, split

from .agreement import Agreement
from .messages import (
    COMMITMENT_BYTES,
    SEALED_BYTES,
    PublicKeys,
    commitment,
    fields_of,
    keys_text,
    masked_text,
    pack,
    parties_in,
    rows,
    stage_of,
    survivors_text,
    transcript_of,
    transcript_with,
    unmask_text,
)
from .terms import check_update, encode, encode_numbers, sum_names, wide_to_bytes

__all__ = ["MaskingParty", "Phase", "pair_mask", "seal_key", "self_mask"]

_ROW = 2 * PUBLIC_BYTES + COMMITMENT_BYTES


class Phase(StrEnum):
    NEW = "new"
    KEYS = "keys"
    SHARED = "shared"
    MASKED = "masked"
    CONSENTED = "consented"
    ANSWERED = "answered"
    DECLINED = "declined"


def self_mask(seed: bytes, transcript: bytes) -> bytes:
    """The key of a party's self-mask. seed: 32 bytes, shared out among all."""
    return expand(seed, "secagg self mask", transcript)


def pair_mask(mine: MaskKey, theirs: bytes, transcript: bytes, pair: tuple[str, str]) -> bytes:
    """The key of the mask that a pair has in common. pair: in roster order; the first adds it.

    Raises:
        PeerViolation: a public key of low order or none.
    """
    names = [name.encode() for name in pair]
    return derive(mine.agree(theirs), *names, salt=transcript, label="secagg pair mask")


def seal_key(shared: bytes, transcript: bytes, sender: str, receiver: str) -> bytes:
    """The key that seals the shares of one party for another, once. shared: of their channel keys."""
    names = [sender.encode(), receiver.encode()]
    return derive(shared, *names, salt=transcript, label="secagg shares")


@dataclass(slots=True)
class _Secrets:
    """All that a party draws for one round, out of 32 bytes."""

    channel: MaskKey
    mask: MaskKey
    self_seed: bytes
    polynomials: tuple[bytes, bytes]

    @classmethod
    def of(cls, seed: bytes, agreement: Agreement) -> _Secrets:
        def draw(label: str) -> bytes:
            return expand(seed, f"secagg {label}", agreement.digest, agreement.me.encode())

        return cls(
            MaskKey(draw("channel key")),
            MaskKey(draw("mask key")),
            draw("self mask seed"),
            (draw("polynomial of the seed"), draw("polynomial of the key")),
        )


@dataclass(slots=True)
class MaskingParty:
    """Satisfies `core.interfaces.SumParty`. agree: the common ground, which this party's policy may refuse.

    clipped: how many values of the own term were cut to the clip.
    """

    scene: SumScene
    agree: Callable[[], Agreement]
    sparse: bool
    phase: Phase = Phase.NEW
    clipped: int = 0
    _agreement: Agreement | None = None
    _update: Update | None = None
    _secrets: _Secrets | None = None
    _kept: Mapping[str, Payload] = field(default_factory=dict)
    _words: Any = None
    _keys: dict[str, PublicKeys] = field(default_factory=dict)
    _transcript: bytes = b""
    _masking: bytes = b""  # the transcript with U2
    _sharing: tuple[str, ...] = ()  # U2
    _shares: dict[str, bytes] = field(default_factory=dict)  # by whose secret: of the seed, then of the key
    _own_shares: bytes = b""
    _channels: dict[str, bytes] = field(default_factory=dict)  # secrets shared with the other parties of U1
    _survivors: tuple[str, ...] = ()  # U3
    _seen: dict[str, str] = field(default_factory=dict)  # digests of the messages accepted, by stage

    def handle(self, event: SumEvent) -> list[SumAction]:
        """Apply one event.

        Raises:
            PeerViolation: a message that does not fit, nothing has changed. UnsafeRequest, InconsistentView: one that
                no honest coordinator sends; nothing was opened. PolicyError: too few parties are left for this one's
                policy; nothing was opened. ProtectionError: our own term cannot be part of this sum; nothing was sent.
        """
        if isinstance(event, SumContribute):
            return self._contribute(event)
        if isinstance(event, SumReceived):
            return self._received(event)
        raise InternalError(f"{type(event).__name__} is not for a contributor of a masked sum")

    # --- the own term -----------------------------------------------------------------------------------------

    def _contribute(self, event: SumContribute) -> list[SumAction]:
        if self.phase is not Phase.NEW:
            raise InternalError("this sum has its term already; every round has a sum of its own")
        answered = event.kept.get("answered")
        if answered is not None and answered.fields["attempt"] != self.scene.attempt:
            self.phase = Phase.DECLINED
            told = {"stage": "declined", "attempt": answered.fields["attempt"]}
            return [SumSend(self.scene.cohort.coordinator, Payload(told))]
        if answered is not None and "seed" not in event.kept:
            self.phase = Phase.ANSWERED  # the round is closed: its secrets are gone
            return []
        agreement = self.agree()
        check_update(event.update, self.scene.layout, largest_weight=agreement.largest_weight, sparse=self.sparse)
        encode_numbers(event.update, sorted(event.update.sums), len(agreement.contributors))
        seed = event.kept["seed"].tensors["seed"].tobytes() if "seed" in event.kept else event.seed
        secrets = _Secrets.of(seed, agreement)
        words, clipped = encode(event.update, agreement)
        self._agreement, self._secrets, self._words, self.clipped = agreement, secrets, words, clipped
        self._update = Update({}, event.update.weight, dict(event.update.sums))
        self._kept = event.kept
        self.phase = Phase.KEYS
        keep = SumKeep("seed", Payload({}, {"seed": np.frombuffer(seed, np.uint8)}), secret=True)
        return [*([] if "seed" in event.kept else [keep]), self._send(self._advertise(agreement, secrets))]

    def _advertise(self, agreement: Agreement, secrets: _Secrets) -> Payload:
        row = secrets.channel.public + secrets.mask.public + commitment(agreement, self.me, secrets.self_seed)
        sums = sorted(self._update.sums) if self._update is not None else []
        signature = agreement.signer.sign(keys_text(agreement, self.me, row, sums), purpose="secagg keys")
        tensors = {"keys": pack([row], _ROW), "signature": pack([signature], SIGNATURE_BYTES)}
        return Payload({"stage": "keys", "sums": sums}, tensors)

    @property
    def me(self) -> str:
        return self.scene.me

    def _send(self, body: Payload) -> SumSend:
        return SumSend(self.scene.cohort.coordinator, body)

    # --- what the coordinator says ----------------------------------------------------------------------------

    def _received(self, event: SumReceived) -> list[SumAction]:
        if event.sender != self.scene.cohort.coordinator:
            raise PeerViolation(f"{event.sender} is not the coordinator of this sum")
        stage = stage_of(event.body)
        if stage not in _STEPS:
            raise PeerViolation(f"{stage!r} is not for a contributor")
        if self.phase is Phase.DECLINED:
            return []
        seen, shown = self._seen.get(stage), _digest(event.body)
        if seen is not None:
            if seen == shown:
                return []
            raise UnsafeRequest(f"a second, different message {stage!r} for one round")
        phase, step = _STEPS[stage]
        if self.phase is not phase or self._agreement is None or self._secrets is None:
            raise PeerViolation(f"{stage!r} is not expected while {self.phase}")
        actions = step(self, event.body, self._agreement, self._secrets)
        self._seen[stage] = shown
        return actions

    def _on_keys(self, body: Payload, agreement: Agreement, secrets: _Secrets) -> list[SumAction]:
        fields = fields_of(body, {"parties", "sums"}, {"keys", "signatures"})
        parties = parties_in(fields["parties"], agreement.contributors, agreement, "the parties with keys")
        keys = self._read_keys(parties, fields["sums"], body, agreement)
        mine = keys[self.me]
        if mine.channel != secrets.channel.public or mine.mask != secrets.mask.public:
            raise InconsistentView("the list has other keys for us than those that we sent")
        every = [key for one in keys.values() for key in (one.channel, one.mask)]
        if len(set(every)) != len(every):
            raise UnsafeRequest("two public keys in the list are the same")
        transcript = transcript_of(agreement, keys)
        channels = {party: secrets.channel.agree(one.channel) for party, one in keys.items() if party != self.me}
        sealed = self._seal_shares(channels, transcript, agreement, secrets)
        self._channels = channels
        self._keys, self._transcript, self.phase = keys, transcript, Phase.SHARED
        return [self._send(Payload({"stage": "shares"}, {"sealed": pack(sealed, SEALED_BYTES)}))]

    def _read_keys(
        self, parties: tuple[str, ...], sums: object, body: Payload, agreement: Agreement
    ) -> dict[str, PublicKeys]:
        if not isinstance(sums, list) or len(sums) != len(parties):
            raise PeerViolation("the names of additive numbers are not one list for each party")
        table = rows(body.tensors["keys"], len(parties), _ROW, "keys")
        signatures = rows(body.tensors["signatures"], len(parties), SIGNATURE_BYTES, "signatures")
        keys: dict[str, PublicKeys] = {}
        for party, row, names, signature in zip(parties, table, sums, signatures, strict=True):
            keys[party] = PublicKeys.read(row, names, signature)
            try:
                agreement.signer.verify(
                    party, signature, keys_text(agreement, party, row, names), purpose="secagg keys"
                )
            except BadSignature:
                raise InconsistentView(
                    f"the keys shown for {party} are not signed by it for this round as we know it: either they are "
                    "not its keys, or it was told of another model, roster or parameters"
                ) from None
        return keys

    def _seal_shares(
        self, channels: Mapping[str, bytes], transcript: bytes, agreement: Agreement, secrets: _Secrets
    ) -> list[bytes]:
        """For each other party of U1 its two shares, sealed; our own stay here."""
        parties = sorted((self.me, *channels), key=agreement.contributors.index)
        points = [agreement.point(party) for party in parties]
        seeds, mask_keys = (
            split(secret, threshold=agreement.threshold, points=points, random=random)
            for secret, random in zip((secrets.self_seed, secrets.mask.secret), secrets.polynomials, strict=True)
        )
        sealed: list[bytes] = []
        for party, of_seed, of_key in zip(parties, seeds, mask_keys, strict=True):
            if party == self.me:
                self._own_shares = of_seed + of_key
                continue
            key = seal_key(channels[party], transcript, self.me, party)
            sealed.append(seal_once(key, of_seed + of_key, transcript))
        return sealed

    def _on_shares(self, body: Payload, agreement: Agreement, secrets: _Secrets) -> list[SumAction]:
        fields = fields_of(body, {"parties"}, {"sealed"})
        parties = parties_in(fields["parties"], list(self._keys), agreement, "the parties with shares")
        others = [party for party in parties if party != self.me]
        shares = {self.me: self._own_shares}
        for party, sealed in zip(
            others, rows(body.tensors["sealed"], len(others), SEALED_BYTES, "sealed shares"), strict=True
        ):
            key = seal_key(self._channels[party], self._transcript, party, self.me)
            try:
                shares[party] = open_once(key, sealed, self._transcript)
            except BadSeal:
                raise BadSeal(
                    f"the shares of {party} for us do not open: they were changed or belong elsewhere"
                ) from None
        masking = transcript_with(self._transcript, parties)
        actions = self._mask(parties, masking, agreement, secrets)
        self._shares, self._sharing, self._masking, self.phase = shares, parties, masking, Phase.MASKED
        self._words = None
        return actions

    def _mask(
        self, parties: tuple[str, ...], masking: bytes, agreement: Agreement, secrets: _Secrets
    ) -> list[SumAction]:
        """The masked vector: the one kept when there is one, which is then all that is ever sent."""
        kept = self._kept.get("masked")
        if kept is not None:
            if kept.fields["transcript"] != masking.hex():
                raise UnsafeRequest("other keys or shares than those that our vector of this round was masked under")
            return [self._send(Payload({"stage": "masked"}, kept.tensors))]
        assert self._update is not None
        names = sum_names({party: one.sums for party, one in self._keys.items()}, agreement.threshold)
        wide = encode_numbers(self._update, names, len(agreement.contributors))
        plus = [self_mask(secrets.self_seed, masking)]
        minus: list[bytes] = []
        order = agreement.contributors.index
        for party in parties:
            if party == self.me:
                continue
            first = order(self.me) < order(party)
            pair = (self.me, party) if first else (party, self.me)
            (plus if first else minus).append(pair_mask(secrets.mask, self._keys[party].mask, masking, pair))
        add_masks(self._words, wide, plus=plus, minus=minus)
        packed = wide_to_bytes(wide)
        signature = agreement.signer.sign(masked_text(masking, self.me, self._words, packed), purpose="secagg masked")
        tensors = {"words": self._words, "wide": packed, "signature": pack([signature], SIGNATURE_BYTES)}
        keep = SumKeep("masked", Payload({"transcript": masking.hex()}, tensors))
        return [keep, self._send(Payload({"stage": "masked"}, tensors))]

    def _on_survivors(self, body: Payload, agreement: Agreement, secrets: _Secrets) -> list[SumAction]:
        fields = fields_of(body, {"parties"}, set())
        survivors = parties_in(fields["parties"], self._sharing, agreement, "the survivors")
        kept = self._kept.get("consent")
        if kept is not None and kept.fields["survivors"] != list(survivors):
            raise UnsafeRequest("other survivors than those that we have signed for this round")
        signature = agreement.signer.sign(survivors_text(self._masking, survivors), purpose="secagg survivors")
        self._survivors, self.phase = survivors, Phase.CONSENTED
        keep = SumKeep("consent", Payload({"survivors": list(survivors)}))
        send = self._send(Payload({"stage": "consent"}, {"signature": pack([signature], SIGNATURE_BYTES)}))
        return [*([] if kept is not None else [keep]), send]

    def _on_consents(self, body: Payload, agreement: Agreement, secrets: _Secrets) -> list[SumAction]:
        self._check_consents(body, agreement)
        kept = self._kept.get("answered")
        if kept is not None and kept.fields["survivors"] != list(self._survivors):
            raise UnsafeRequest("this round was answered for other survivors")
        shares = [
            self._shares[party][:SHARE_BYTES] if party in self._survivors else self._shares[party][SHARE_BYTES:]
            for party in self._sharing
        ]
        text = unmask_text(self._masking, self.me, self._survivors, shares)
        signature = agreement.signer.sign(text, purpose="secagg unmask")
        tensors = {"shares": pack(shares, SHARE_BYTES), "signature": pack([signature], SIGNATURE_BYTES)}
        answered = {"attempt": self.scene.attempt, "survivors": list(self._survivors)}
        self.phase = Phase.ANSWERED
        self._secrets, self._shares, self._own_shares, self._channels, self._kept = None, {}, b"", {}, {}
        keep = SumKeep("answered", Payload(answered), lasting=True)
        return [*([] if kept is not None else [keep]), self._send(Payload({"stage": "unmask"}, tensors))]

    def _check_consents(self, body: Payload, agreement: Agreement) -> None:
        """Refuse unless enough survivors have signed the set that we have signed."""
        fields = fields_of(body, {"parties"}, {"signatures"})
        parties = fields["parties"]
        if (
            not isinstance(parties, list)
            or not all(isinstance(party, str) and party in self._survivors for party in parties)
            or len(set(parties)) != len(parties)
        ):
            raise UnsafeRequest("the signatures are not of survivors, each once")
        text = survivors_text(self._masking, self._survivors)
        signatures = rows(body.tensors["signatures"], len(parties), SIGNATURE_BYTES, "signatures")
        for party, signature in zip(parties, signatures, strict=True):
            try:
                agreement.signer.verify(party, signature, text, purpose="secagg survivors")
            except BadSignature:
                raise InconsistentView(f"{party} has not signed the survivors that we were told") from None
        if not agreement.agreed(tuple(parties)):
            raise InconsistentView(
                f"{len(parties)} survivors have signed the set, at least {agreement.threshold} are needed"
            )


def _digest(body: Payload) -> str:
    """Over all of a message, to tell the same again from another. Raises PeerViolation for endless nesting."""
    try:
        found = hashlib.sha256(canonical_json(dict(body.fields)))
    except RecursionError:
        raise PeerViolation("the fields of a message of a masked sum are nested too deeply") from None
    for name in sorted(body.tensors):
        found.update(name.encode() + b"\0" + body.tensors[name].tobytes())
    return found.hexdigest()


_Step = Callable[[MaskingParty, Payload, Agreement, _Secrets], list[SumAction]]
_STEPS: Mapping[str, tuple[Phase, _Step]] = {
    "keys": (Phase.KEYS, MaskingParty._on_keys),
    "shares": (Phase.SHARED, MaskingParty._on_shares),
    "survivors": (Phase.MASKED, MaskingParty._on_survivors),
    "consents": (Phase.CONSENTED, MaskingParty._on_consents),
}
