"""The coordinator of a sum under CKKS, as a pure machine.

    GATHERING --all ready, or time over--> COLLECTING --all uploaded, or time over--> OPENING --all opened--> CLOSED

Rules:
1. Who takes part is settled before anything is encrypted; with it, which additive numbers there are.
2. An upload counts when all of it is there, each message signed by its party. What is not whole when the time is over
   is dropped: nothing of it was added.
3. As many parties upload at once as memory is set aside for; the others wait for their turn, and a time that is over
   ends the turns of those who had one.
4. Before a sum goes to the key holder it is written down whose it is. A coordinator that was killed adds the same
   uploads again and asks for the same, or for nothing.
5. What is handled as of an earlier life (`kept`) may come early: answers of the key holder before they are asked for.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final

import numpy as np

from fate_llm.core.errors import InternalError, PeerViolation, QuorumLost, RoundTimeout
from fate_llm.core.interfaces import SumAction, SumEvent, SumExpired, SumFinished, SumKeep, SumReceived, SumSend
from fate_llm.core.values import Array, Payload
from fate_llm.security.ckks import CIPHERTEXT_BYTES, CipherTotal, PublicContext

from .agreed import (
    CONTEXT,
    LEAST,
    OPENED,
    UPLOAD,
    WINDOW,
    Agreed,
    context_statement,
    opened_statement,
    upload_statement,
)
from .messages import (
    Form,
    TotalOf,
    ciphertexts_digest,
    message,
    pack,
    read,
    read_names,
    read_signature,
    read_wide,
    unpack,
    words_digest,
)
from .terms import read_total

__all__ = ["Server"]

_ROOM: Final = 512 * 2**20  # bytes for uploads that are not whole yet; two always have a turn
_KEYS: Final = "keys"  # names that things are kept under
_PARTIES: Final = "parties"
_SURVIVORS: Final = "survivors"


class _Phase(IntEnum):
    GATHERING = 0
    COLLECTING = 1
    OPENING = 2
    CLOSED = 3


@dataclass
class _Upload:
    """One party's. floor: least contributors by its policy. shown: digest and signature of each chunk that came."""

    floor: int
    names: tuple[str, ...]
    ready: bool = True
    turn: bool = False
    whole: bool = False
    shown: list[list[str]] = field(default_factory=list)
    vectors: list[Any] = field(default_factory=list)


class Server:
    """Satisfies `core.interfaces.SumServer`. room: bytes for uploads that are not whole yet."""

    def __init__(self, agreed: Agreed, kept: Mapping[str, Payload], *, room: int = _ROOM) -> None:
        self._agreed, self._room = agreed, room
        self._binding = agreed.binding(agreed.scene.round)
        self._phase = _Phase.GATHERING
        self._turns = 0  # how often the time was over while others waited for their turn
        self._uploads: dict[str, _Upload] = {}
        self._dropped: set[str] = set()
        self._asked = False
        self._keys: Payload | None = None
        self._context: PublicContext | None = None
        self._form: Form | None = None
        self._sum: CipherTotal | None = None
        self._total: TotalOf | None = None
        self._numbers: list[int] = []
        self._words: list[Array] = []
        self._early: list[SumReceived] = []
        self._again = bool(kept)
        self._settled: tuple[str, ...] | None = None
        self._restore(kept)

    def _restore(self, kept: Mapping[str, Payload]) -> None:
        if _KEYS in kept:
            self._keys = kept[_KEYS]
            self._context = PublicContext(kept[_KEYS].tensors["context"].tobytes())
        if _PARTIES in kept:
            fields = kept[_PARTIES].fields
            for party, floor in fields["floors"]:
                self._uploads[party] = _Upload(floor, tuple(fields["names"]), ready=False)
            self._collect(tuple(fields["names"]))
        if _SURVIVORS in kept:
            self._settled = tuple(kept[_SURVIVORS].fields["parties"])
            self._dropped |= set(self._uploads) - set(self._settled)

    # --- what the rounds ask ---------------------------------------------------------------------------------

    @property
    def stage(self) -> int:
        return int(self._phase) + self._turns

    @property
    def able(self) -> frozenset[str]:
        known = self._agreed.scene.cohort.contributors if self._phase is _Phase.GATHERING else self._uploads
        return frozenset(known) - self._dropped

    @property
    def least(self) -> int:
        able = self.able
        return self._agreed.least_of(able, [u.floor for party, u in self._uploads.items() if party in able])

    @property
    def awaiting(self) -> frozenset[str]:
        if self._phase is _Phase.GATHERING:
            return self.able - self._uploads.keys()
        if self._phase is _Phase.COLLECTING:
            absent = {p for p in self.able if not self._uploads[p].whole and not self._waits(p)}
            return frozenset(absent | ({self._agreed.key_holder} if self._keys is None else set()))
        return frozenset({self._agreed.key_holder} if self._phase is _Phase.OPENING else ())

    def _waits(self, party: str) -> bool:
        """Whether it is not this party's turn yet."""
        upload = self._uploads[party]
        return upload.ready and not upload.turn and not upload.whole

    # --- events ----------------------------------------------------------------------------------------------

    def handle(self, event: SumEvent) -> list[SumAction]:
        """Raises:
        PeerViolation: a message that is not for now, or not whole; nothing has changed. QuorumLost: too few parties.
        RoundTimeout: the key holder does not answer. ProtectionError: the total is none.
        """
        if self._phase is _Phase.CLOSED:
            raise PeerViolation(f"{type(event).__name__} after the end of the sum")
        if isinstance(event, SumExpired):
            return self._expired()
        if not isinstance(event, SumReceived):
            raise PeerViolation(f"{type(event).__name__} is not for the coordinator of a sum")
        if event.from_holder:
            return self._from_holder(event)
        sender = event.sender
        if sender not in self._agreed.scene.cohort.contributors:
            raise PeerViolation(f"{sender} is not a contributor of this sum")
        if sender not in self.able:
            raise PeerViolation(f"{sender} is not part of this sum any more")
        return self._ready(event) if event.body.fields.get("stage") == "ready" else self._upload(event)

    def _ready(self, event: SumReceived) -> list[SumAction]:
        sender = event.sender
        fields = read(event.body, sender, "ready")
        self._check_view(fields, sender)
        names, floor = read_names(fields["names"], sender), fields["floor"]
        if self._phase is _Phase.GATHERING and sender not in self._uploads:
            self._uploads[sender] = _Upload(floor, names)
        elif self._phase is _Phase.COLLECTING and not self._uploads[sender].ready:  # of an earlier life
            self._uploads[sender].ready = True
        else:
            raise PeerViolation(f"{sender} is ready a second time")
        actions = self._ask()
        if self._phase is _Phase.GATHERING:
            return [*actions, *(self._begin() if not self.awaiting else [])]
        return [*actions, *self._grant()]

    def _check_view(self, fields: Mapping[str, Any], sender: str) -> None:
        """That a party speaks of the sum that this one is."""
        mine = {"binding": self._binding, "layout": self._agreed.layout, "state": self._agreed.state}
        says = {
            "binding": "other parties, parameters, job or round",
            "layout": "other parameter names or shapes",
            "state": "another global state",
        }
        for name, value in mine.items():
            if fields[name] != value:
                raise PeerViolation(f"{sender} takes part in another sum: {says[name]}")

    def _ask(self) -> list[SumAction]:
        if self._asked:
            return []
        self._asked = True
        ask = message("ask", binding=self._binding, round=self._agreed.scene.round)
        return [SumSend(self._agreed.key_holder, ask, to_holder=True)]

    def _begin(self) -> list[SumAction]:
        """Everybody is ready, or nobody else will be: settle who takes part, and which numbers there are."""
        self._require(self._uploads)
        self._dropped |= set(self._agreed.scene.cohort.contributors) - self._uploads.keys()
        announced = Counter(name for upload in self._uploads.values() for name in upload.names)
        names = tuple(sorted(name for name, count in announced.items() if count >= LEAST))  # fewer: their own numbers
        read_names(names, "all parties together")
        floors = [[party, upload.floor] for party, upload in self._uploads.items()]
        keep = SumKeep(_PARTIES, Payload({"floors": floors, "names": list(names)}))
        self._collect(names)
        return [keep, *self._grant()]

    def _collect(self, names: tuple[str, ...]) -> None:
        values = sum(int(np.prod(shape, dtype=np.int64)) for shape in self._agreed.scene.layout.values())
        self._form = Form(self._agreed.layout, self._agreed.state, values, names)
        self._phase = _Phase.COLLECTING

    def _require(self, parties: Collection[str]) -> None:
        """Raise QuorumLost unless a sum of these parties hides each of them, and the quorum is there."""
        contributors, quorum = self._agreed.scene.cohort.contributors, max(1, self._agreed.scene.cohort.quorum)
        least = self._agreed.least_of(parties, [self._uploads[party].floor for party in parties])
        if len(parties) < max(quorum, least):
            needed = f"the quorum is {quorum}" if quorum >= least else f"the protection needs {least}"
            missing = ", ".join(party for party in contributors if party not in parties)
            raise QuorumLost(f"{len(parties)} of {len(contributors)} parties contributed, {needed}; missing: {missing}")

    def _grant(self) -> list[SumAction]:
        """Give those who wait a turn, as far as there is room."""
        if self._keys is None or self._form is None:
            return []
        room = max(2, self._room // (self._form.ciphertexts * CIPHERTEXT_BYTES))
        busy = sum(u.turn and not u.whole for party, u in self._uploads.items() if party in self.able)
        waiting = [p for p in self._agreed.scene.cohort.contributors if p in self.able and self._waits(p)]
        return [self._turn(party, self._keys, self._form) for party in waiting[: max(0, room - busy)]]

    def _turn(self, party: str, keys: Payload, form: Form) -> SumAction:
        self._uploads[party].turn = True
        return SumSend(party, message("context", keys.tensors, names=list(form.names), **keys.fields))

    # --- uploads ---------------------------------------------------------------------------------------------

    def _upload(self, event: SumReceived) -> list[SumAction]:
        sender, form, context, keys = event.sender, self._form, self._context, self._keys
        fields = read(event.body, sender, "upload")
        upload = self._uploads.get(sender)
        if upload is None or form is None or context is None or keys is None or not upload.ready or upload.whole:
            raise PeerViolation(f"{sender} uploads what it was not asked for")
        if not (upload.turn or self._again):
            raise PeerViolation(f"{sender} uploads what it was not asked for")
        chunk = len(upload.shown)
        if fields["chunk"] != chunk:
            raise PeerViolation(f"{sender} uploads chunk {fields['chunk']} where {chunk} is due")
        ciphertexts = unpack(fields["sizes"], fields["ciphertexts"], form.span(chunk), sender)
        digest = ciphertexts_digest(ciphertexts)
        said = upload_statement(self._binding, context.digest, form.digest, upload.floor, chunk, digest)
        self._agreed.signer.verify(sender, read_signature(fields["signature"], sender), said, purpose=UPLOAD)
        vectors = [context.load(ciphertext) for ciphertext in ciphertexts]
        turn = [] if upload.turn else [self._turn(sender, keys, form)]  # an earlier life had given it one
        upload.vectors += vectors
        upload.shown.append([digest, fields["signature"]])
        have = chunk + 1
        if have == form.chunks:
            self._add(upload)
        reply = [SumSend(sender, message("next", have=have))] if have + WINDOW <= form.chunks else []
        return [*turn, *reply, *self._go_on()]

    def _add(self, upload: _Upload) -> None:
        if self._sum is None:
            self._sum = CipherTotal()
        self._sum.add(upload.vectors)
        upload.vectors, upload.whole = [], True

    def _go_on(self) -> list[SumAction]:
        if all(self._uploads[party].whole for party in self.able):
            return self._ask_to_open()
        return self._grant()

    def _expired(self) -> list[SumAction]:
        holder = self._agreed.key_holder
        if self._phase is _Phase.GATHERING:
            return self._begin()
        if self._phase is _Phase.OPENING:
            raise RoundTimeout(f"the key holder {holder} does not open the sum of round {self._agreed.scene.round}")
        if self._keys is None:
            raise RoundTimeout(f"the key holder {holder} gives no keys for round {self._agreed.scene.round}")
        for party in self.awaiting:
            self._dropped.add(party)
            self._uploads[party].vectors = []
        granted = self._grant()
        self._turns += bool(granted)
        return granted or self._ask_to_open()

    # --- the key holder --------------------------------------------------------------------------------------

    def _from_holder(self, event: SumReceived) -> list[SumAction]:
        if event.sender != self._agreed.key_holder:
            raise PeerViolation(f"{event.sender} is not the key holder of this sum")
        if event.body.fields.get("stage") == "keys":
            return self._take_keys(event)
        if self._phase is _Phase.OPENING:
            return self._opened(event)
        if self._again and self._form is not None and len(self._early) < self._form.chunks:
            self._early.append(event)
            return []
        raise PeerViolation(f"{event.sender} opens what it was not asked for")

    def _take_keys(self, event: SumReceived) -> list[SumAction]:
        fields = read(event.body, event.sender, "keys")
        raw = fields["context"].tobytes()
        if self._context is not None:
            if self._again and raw == self._context.to_bytes():
                return []  # told to an earlier life
            raise PeerViolation(f"{event.sender} sends keys a second time")
        if not self._asked or fields["binding"] != self._binding:
            raise PeerViolation(f"{event.sender} sends keys of another sum")
        said = context_statement(self._binding, hashlib.sha256(raw).hexdigest())
        signature = read_signature(fields["signature"], event.sender)
        self._agreed.signer.verify(event.sender, signature, said, purpose=CONTEXT)
        self._context = PublicContext(raw)
        kept = {"binding": self._binding, "signature": fields["signature"]}
        self._keys = Payload(kept, {"context": np.frombuffer(raw, np.uint8)})
        return [SumKeep(_KEYS, self._keys), *self._grant()]

    def _ask_to_open(self) -> list[SumAction]:
        """All that will come is there: settle whose sum it is, and have it opened."""
        survivors = [p for p in self._agreed.scene.cohort.contributors if p in self.able and self._uploads[p].whole]
        self._require(survivors)
        if self._settled is not None and list(self._settled) != survivors:
            gone = [party for party in self._settled if party not in survivors]
            raise QuorumLost(f"the sum that was to be opened is not whole any more; missing: {', '.join(gone)}")
        if self._context is None or self._form is None or self._sum is None:
            raise InternalError("a sum is to be opened that was not made")
        floors = {party: self._uploads[party].floor for party in survivors}
        self._total = TotalOf(self._form, self._context.digest, floors)
        self._phase = _Phase.OPENING
        keep = SumKeep(_SURVIVORS, Payload({"parties": survivors}))
        first = [self._part(chunk) for chunk in range(min(WINDOW, self._form.chunks))]
        early, self._early = self._early, []
        return [keep, *first, *(action for event in early for action in self._opened(event))]

    def _part(self, chunk: int) -> SumAction:
        """One chunk of the sum, to be opened."""
        form, summed, total = self._form, self._sum, self._total
        if form is None or summed is None or total is None:
            raise InternalError("a sum is to be opened that was not made")
        sizes, tensor = pack(summed.take(*form.span(chunk)))
        body = message(
            "open",
            {"ciphertexts": tensor},
            round=self._agreed.scene.round,
            chunk=chunk,
            total=total.fields(),
            uploads={party: self._uploads[party].shown[chunk] for party in total.floors},
            sizes=sizes,
        )
        return SumSend(self._agreed.key_holder, body, to_holder=True)

    def _opened(self, event: SumReceived) -> list[SumAction]:
        form, total, sender = self._form, self._total, event.sender
        fields = read(event.body, sender, "opened")
        if form is None or total is None or fields["chunk"] != len(self._words):
            raise PeerViolation(f"{sender} opens chunk {fields['chunk']} where {len(self._words)} is due")
        chunk, words = len(self._words), fields["words"]
        numbers = [read_wide(text, sender) for text in fields["numbers"]]
        if len(numbers) != form.numbers_in(chunk) or words.size != form.values_in(chunk):
            raise PeerViolation(f"{sender} opens {len(numbers)} numbers and {words.size} values; others are due")
        said = opened_statement(self._binding, total.digest, chunk, fields["numbers"], words_digest(words))
        signature = read_signature(fields["signature"], sender)
        self._agreed.signer.verify(sender, signature, said, purpose=OPENED)
        self._words.append(words)
        self._numbers += numbers
        if chunk + 1 == form.chunks:
            return self._finish(form, total)
        return [self._part(chunk + WINDOW)] if chunk + WINDOW < form.chunks else []

    def _finish(self, form: Form, total: TotalOf) -> list[SumAction]:
        by = tuple(total.floors)
        missing = [party for party in self._agreed.scene.cohort.contributors if party not in by]
        found = read_total(np.concatenate(self._words), self._numbers, form.names, self._agreed, by, missing)
        self._phase, self._words, self._sum = _Phase.CLOSED, [], None
        return [SumFinished(found)]
