"""A contributor of a sum under CKKS, as a pure machine.

    NEW --contribute--> READY --context--> SENDING --next, until all chunks are sent--> SENT

Rules:
1. A term is checked whole, clipped and made into whole numbers before anything is said; what is not finite is refused.
2. Nothing is encrypted but under keys that the key holder of the roster signed for exactly this sum.
3. One message of ciphertexts follows another only when the coordinator has taken one: at most two are under way.
4. Each message of ciphertexts is signed by itself. A party that was killed makes the same whole numbers again, out of
   the seed that it kept, and encrypts them anew: those of either life fit together.

Not pure in one point: TenSEAL draws encryption randomness by itself. The same events give the same messages but for
the ciphertexts, which say the same.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum
from typing import Final

import numpy as np

from fate_llm.core.errors import InconsistentView, InternalError, PeerViolation
from fate_llm.core.interfaces import SumAction, SumContribute, SumEvent, SumKeep, SumReceived, SumSend
from fate_llm.core.values import Payload
from fate_llm.security.ckks import SLOTS, PublicContext

from .agreed import CONTEXT, SEED_BYTES, UPLOAD, WINDOW, Agreed, context_statement, upload_statement
from .messages import Form, ciphertexts_digest, message, pack, read, read_names, read_signature
from .terms import Term, encode

__all__ = ["Party"]

_SEED: Final = "seed"  # the name it is kept under


class _Phase(StrEnum):
    NEW = "new"
    READY = "ready"
    SENDING = "sending"
    SENT = "sent"


class Party:
    """Satisfies `core.interfaces.SumParty`."""

    def __init__(self, agreed: Agreed) -> None:
        """Raises:
        ProtectionError: this party does not contribute.
        """
        scene = agreed.scene
        if scene.me not in scene.cohort.contributors:
            raise InternalError(f"{scene.me} is not a contributor of this sum")
        self._agreed = agreed
        self._binding = agreed.binding(scene.round)
        self._phase = _Phase.NEW
        self._term = Term(0, {}, np.zeros(0, np.int32))
        self._form: Form | None = None
        self._context: PublicContext | None = None
        self._sent = 0

    def handle(self, event: SumEvent) -> list[SumAction]:
        """Raises:
        PeerViolation: a message that is not for now; nothing has changed. InconsistentView: the coordinator tells
            this party of another sum than the one it takes part in. ProtectionError: a term that cannot be sent.
        """
        if isinstance(event, SumContribute):
            return self._contribute(event)
        if not isinstance(event, SumReceived):
            raise PeerViolation(f"{type(event).__name__} is not for a contributor of a sum")
        if event.sender != self._agreed.scene.cohort.coordinator:
            raise PeerViolation(f"{event.sender} is not the coordinator of this sum")
        if self._phase is _Phase.READY:
            return self._begin(event)
        if self._phase is _Phase.SENDING:
            return self._next(event)
        raise PeerViolation(f"{event.sender} says something while this party's term is {self._phase}")

    def _contribute(self, event: SumContribute) -> list[SumAction]:
        if self._phase is not _Phase.NEW:
            raise InternalError("this sum has its term already; every round has a sum of its own")
        agreed = self._agreed
        kept = event.kept.get(_SEED)
        seed = event.seed if kept is None else kept.tensors[_SEED].tobytes()
        if len(seed) != SEED_BYTES:
            raise InternalError(f"a seed of {len(seed)} bytes; {SEED_BYTES} are needed")
        term = encode(event.update, agreed, seed)
        self._term, self._phase = term, _Phase.READY
        ready = message(
            "ready",
            binding=self._binding,
            layout=agreed.layout,
            state=agreed.state,
            names=sorted(term.sums),
            floor=agreed.least,
        )
        keep = SumKeep(_SEED, Payload({}, {_SEED: np.frombuffer(seed, np.uint8)}), secret=True)
        return [keep, SumSend(agreed.scene.cohort.coordinator, ready)]

    def _begin(self, event: SumReceived) -> list[SumAction]:
        agreed = self._agreed
        fields = read(event.body, event.sender, "context")
        if fields["binding"] != self._binding:
            raise InconsistentView(
                f"{event.sender} brings keys for another sum than round {agreed.scene.round} of "
                f"{agreed.scene.conversation} as {agreed.scene.me} knows it: other parties, parameters, job or round"
            )
        names = read_names(fields["names"], event.sender)
        raw = fields["context"].tobytes()
        said = context_statement(self._binding, hashlib.sha256(raw).hexdigest())
        signature = read_signature(fields["signature"], event.sender)
        agreed.signer.verify(agreed.key_holder, signature, said, purpose=CONTEXT)
        self._context = PublicContext(raw)
        self._form = Form(agreed.layout, agreed.state, self._term.values.size, names)
        self._phase = _Phase.SENDING
        return [self._chunk() for _ in range(min(WINDOW, self._whole.chunks))]

    def _next(self, event: SumReceived) -> list[SumAction]:
        have = read(event.body, event.sender, "next")["have"]
        if not 0 < have <= self._sent:
            raise PeerViolation(f"{event.sender} says that it has {have} chunks of {self._sent} that were sent")
        return [self._chunk()] if have + WINDOW > self._sent else []

    @property
    def _whole(self) -> Form:
        if self._form is None:
            raise InternalError("a term that was not given")
        return self._form

    def _chunk(self) -> SumSend:
        """The next one: encrypted now, so that never more than two are in memory."""
        if self._context is None:
            raise InternalError("a chunk without keys")
        agreed, form, chunk = self._agreed, self._whole, self._sent
        start, stop = form.span(chunk)
        part = self._term.slots(form.names, start * SLOTS, stop * SLOTS)
        ciphertexts = self._context.encrypt(part)
        said = upload_statement(
            self._binding, self._context.digest, form.digest, agreed.least, chunk, ciphertexts_digest(ciphertexts)
        )
        sizes, tensor = pack(ciphertexts)
        signature = agreed.signer.sign(said, purpose=UPLOAD).hex()
        self._sent += 1
        if self._sent == form.chunks:
            self._phase = _Phase.SENT
            self._term = Term(0, {}, np.zeros(0, np.int32))
        body = message("upload", {"ciphertexts": tensor}, chunk=chunk, sizes=sizes, signature=signature)
        return SumSend(agreed.scene.cohort.coordinator, body)
