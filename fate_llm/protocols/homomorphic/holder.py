"""The key holder of the sums of one conversation, as a pure machine: it makes keys, and opens sums.

Rules:
1. Keys are for one round. A request for a later round makes new ones, and the old ones are erased.
2. A sum is opened that names enough contributors, each with its signature over what it uploaded for this round.
   Whether the ciphertexts are the sum of these uploads cannot be seen; who adds them is trusted with that.
3. A round is opened once: what was opened is written down before the answer leaves, for good. The same request gets the
   same bytes again; another one of the round is refused, now and in every later attempt of the job.
4. What comes out must be sums of whole numbers within the bound, or nothing is released and the keys are dropped.
5. Released are the totals of weight and additive numbers, and the values with noise on them. Secret keys never leave.

The noise comes out of the seed that is kept with the keys. The keys themselves are drawn by TenSEAL.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from fate_llm.core.errors import InconsistentView, InternalError, PeerViolation, ProtectionError, UnsafeRequest
from fate_llm.core.interfaces import SumAction, SumKeep, SumReceived, SumSend
from fate_llm.core.values import Array, Payload
from fate_llm.security.ckks import LARGEST, SecretContext

from .agreed import (
    CONTEXT,
    LIMBS,
    OPENED,
    SEED_BYTES,
    UPLOAD,
    Agreed,
    context_statement,
    opened_statement,
    upload_statement,
)
from .messages import TotalOf, ciphertexts_digest, message, read, read_signature, unpack, words_digest
from .terms import check_total, flood, numbers_from

__all__ = ["Holder"]

_KEYS: Final = "keys"  # names that things are kept under
_ANSWERED: Final = "answered"
_MOST_ROUNDS: Final = 2**31


@dataclass(frozen=True)
class _Keys:
    """Of one round. seed: for the noise."""

    round: int
    seed: bytes
    secret: SecretContext


@dataclass(frozen=True)
class _Answered:
    """A round that was opened. total: digest of which sum; chunks: digests of its ciphertexts."""

    attempt: int
    total: str
    chunks: tuple[str, ...]


class Holder:
    """Satisfies `core.interfaces.SumHolder`."""

    def __init__(self, agreed: Agreed, seed: bytes, kept: Mapping[str, Payload]) -> None:
        if agreed.scene.me != agreed.key_holder:
            raise InternalError(f"{agreed.scene.me} is not the key holder of this sum")
        if len(seed) != SEED_BYTES:
            raise InternalError(f"a seed of {len(seed)} bytes; {SEED_BYTES} are needed")
        self._agreed = agreed
        self._seed = seed
        self._keys = _keys_from(kept[_KEYS]) if _KEYS in kept else None
        self._answered = {
            int(name.partition(".")[2]): _answered_from(body)
            for name, body in kept.items()
            if name.startswith(f"{_ANSWERED}.")
        }

    @property
    def idle(self) -> bool:
        return True

    def handle(self, event: SumReceived) -> list[SumAction]:
        """Raises:
        PeerViolation: what is not for now, or not whole; nothing was opened or changed.
        UnsafeRequest: another opening of a round, or one of too few terms. InconsistentView: the coordinator speaks
            of another sum than this party takes part in. ProtectionError: what opens is no sum within the bound.
        """
        if not isinstance(event, SumReceived) or event.sender != self._agreed.scene.cohort.coordinator:
            raise PeerViolation("only the coordinator of this sum speaks to its key holder")
        stage = event.body.fields.get("stage")
        if stage == "open":
            return self._open(event)
        return self._ask(event)

    def _ask(self, event: SumReceived) -> list[SumAction]:
        fields = read(event.body, event.sender, "ask")
        number, binding = fields["round"], self._binding(fields["round"], event.sender)
        if fields["binding"] != binding:
            raise InconsistentView(
                f"{event.sender} asks for keys of another sum than round {number} of "
                f"{self._agreed.scene.conversation} as {self._agreed.scene.me} knows it"
            )
        self._check_answered(number)
        if self._keys is not None and number < self._keys.round:
            raise PeerViolation(f"{event.sender} asks for keys of round {number}; round {self._keys.round} has begun")
        actions: list[SumAction] = []
        if self._keys is None or number > self._keys.round:
            seed = hashlib.sha256(b"fate_llm/1 ckks holder\0" + self._seed + binding.encode("ascii")).digest()
            self._keys = _Keys(number, seed, SecretContext.generate())
            actions.append(SumKeep(_KEYS, _keys_body(self._keys), secret=True))
        public = self._keys.secret.public
        said = context_statement(binding, public.digest)
        signature = self._agreed.signer.sign(said, purpose=CONTEXT).hex()
        tensor = {"context": np.frombuffer(public.to_bytes(), np.uint8)}
        return [*actions, self._send(message("keys", tensor, binding=binding, signature=signature))]

    def _open(self, event: SumReceived) -> list[SumAction]:
        fields = read(event.body, event.sender, "open")
        number, chunk = fields["round"], fields["chunk"]
        binding = self._binding(number, event.sender)
        keys = self._keys
        if keys is None or keys.round != number:
            raise PeerViolation(f"{event.sender} wants round {number} opened, for which there are no keys")
        total = TotalOf.read(fields["total"], event.sender)
        if total.context != keys.secret.public.digest:
            raise PeerViolation(
                f"{event.sender} wants a sum opened that is under other keys than those of round {number}"
            )
        if not 0 <= chunk < total.form.chunks:
            raise PeerViolation(f"{event.sender} wants chunk {chunk} of {total.form.chunks} opened")
        self._check_contributors(total, number)
        self._check_uploads(fields["uploads"], total, binding, chunk, event.sender)
        ciphertexts = unpack(fields["sizes"], fields["ciphertexts"], total.form.span(chunk), event.sender)
        answered = self._record(number, total, chunk, ciphertexts_digest(ciphertexts))
        numbers, words = self._opened(keys, ciphertexts, total, chunk, binding)
        said = opened_statement(binding, total.digest, chunk, numbers, words_digest(words))
        signature = self._agreed.signer.sign(said, purpose=OPENED).hex()
        answer = message("opened", {"words": words}, chunk=chunk, numbers=numbers, signature=signature)
        fresh = self._answered.get(number) != answered
        self._answered[number] = answered
        keep = [SumKeep(f"{_ANSWERED}.{number}", _answered_body(answered), lasting=True)] if fresh else []
        return [*keep, self._send(answer)]

    def _send(self, body: Payload) -> SumSend:
        return SumSend(self._agreed.scene.cohort.coordinator, body)

    def _binding(self, number: int, sender: str) -> str:
        if not 1 <= number <= _MOST_ROUNDS:
            raise PeerViolation(f"{sender} speaks of round {number}; rounds count from 1")
        return self._agreed.binding(number)

    def _check_answered(self, number: int) -> None:
        known = self._answered.get(number)
        if known is not None and known.attempt != self._agreed.scene.attempt:
            raise UnsafeRequest(
                f"round {number} of {self._agreed.scene.conversation} was opened in attempt {known.attempt}; a second "
                "total, over other parties, would show the difference",
                hint="Submit the job anew: an answered round is never repeated, and the coordinator had not kept it.",
            )

    def _check_contributors(self, total: TotalOf, number: int) -> None:
        agreed, parties = self._agreed, list(total.floors)
        known = [party for party in agreed.scene.cohort.contributors if party in total.floors]
        if parties != known:
            raise UnsafeRequest(f"round {number}: the sum is said to be of parties that do not contribute to it")
        least = agreed.least_of(parties, total.floors.values())
        if len(parties) < least:
            raise UnsafeRequest(
                f"round {number}: a sum of {len(parties)} parties is to be opened; at least {least} must be in it"
            )

    def _check_uploads(self, uploads: Mapping[str, Any], total: TotalOf, binding: str, chunk: int, sender: str) -> None:
        """Each contributor's signature over its part of this chunk."""
        if uploads.keys() != total.floors.keys():
            raise UnsafeRequest(f"{sender} does not show what each contributor of the sum has uploaded")
        form = total.form.digest
        for party, upload in uploads.items():
            match upload:
                case [str(ciphertexts), str(text)]:
                    signature = read_signature(text, sender)
                case _:
                    raise PeerViolation(f"{sender} shows no upload of {party}")
            said = upload_statement(binding, total.context, form, total.floors[party], chunk, ciphertexts)
            self._agreed.signer.verify(party, signature, said, purpose=UPLOAD)

    def _record(self, number: int, total: TotalOf, chunk: int, ciphertexts: str) -> _Answered:
        """What will have been opened; UnsafeRequest when the round was opened otherwise."""
        self._check_answered(number)
        known = self._answered.get(number) or _Answered(self._agreed.scene.attempt, total.digest, ())
        if known.total != total.digest or (chunk < len(known.chunks) and known.chunks[chunk] != ciphertexts):
            raise UnsafeRequest(f"round {number} was opened; another sum of it is not")
        if chunk > len(known.chunks):
            raise PeerViolation(f"chunk {chunk} of round {number} is to be opened before chunk {len(known.chunks)}")
        chunks = known.chunks if chunk < len(known.chunks) else (*known.chunks, ciphertexts)
        return _Answered(known.attempt, known.total, chunks)

    def _opened(
        self, keys: _Keys, ciphertexts: Sequence[bytes], total: TotalOf, chunk: int, binding: str
    ) -> tuple[list[str], Array]:
        """Numbers (as 32 hexadecimal digits) and flooded values (int32) of one chunk."""
        form = total.form
        head, values = form.numbers_in(chunk) * LIMBS, form.values_in(chunk)
        try:
            sums = keys.secret.open(ciphertexts).reshape(-1)
            check_total(sums, head, values, terms=len(total.floors), fixed=self._agreed.fixed)
        except ProtectionError:
            self._keys = None  # whoever made this up gets no second look
            raise
        numbers = [f"{number:032x}" for number in numbers_from(sums[:head])]
        noise = flood(keys.seed, f"{binding} {total.digest} {chunk}".encode("ascii"), values)
        words = np.clip(sums[head : head + values] + noise, -LARGEST, LARGEST).astype(np.dtype("<i4"))
        return numbers, words


def _keys_body(keys: _Keys) -> Payload:
    tensors = {
        "context": np.frombuffer(keys.secret.to_bytes(), np.uint8),
        "seed": np.frombuffer(keys.seed, np.uint8),
    }
    return Payload({"round": keys.round}, tensors)


def _keys_from(body: Payload) -> _Keys:
    secret = SecretContext(body.tensors["context"].tobytes())
    return _Keys(int(body.fields["round"]), body.tensors["seed"].tobytes(), secret)


def _answered_body(answered: _Answered) -> Payload:
    return Payload({"attempt": answered.attempt, "total": answered.total, "chunks": list(answered.chunks)})


def _answered_from(body: Payload) -> _Answered:
    fields = body.fields
    return _Answered(int(fields["attempt"]), str(fields["total"]), tuple(fields["chunks"]))
