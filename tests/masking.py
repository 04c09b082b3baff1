"""Masked sums without a network: their machines, identities, and messages that a test may lose or change."""

from __future__ import annotations

import functools
import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fate_llm.core.canonical import canonical_json, digest
from fate_llm.core.errors import BadSignature, FateError, PeerViolation
from fate_llm.core.interfaces import (
    SecureSum,
    SumContribute,
    SumEvent,
    SumExpired,
    SumFinished,
    SumKeep,
    SumParty,
    SumReceived,
    SumScene,
    SumSend,
    SumServer,
)
from fate_llm.core.values import Array, Cohort, Payload, SumFloor, Total, Update
from fate_llm.protocols.secagg.agreement import Agreement
from fate_llm.protocols.secagg.terms import Words, encode, encode_numbers, read_total, sum_names
from fate_llm.protocols.sums.secagg import SecAgg
from fate_llm.security.identity import Identity

__all__ = [
    "LAYOUT",
    "Masking",
    "Message",
    "TestSigner",
    "action_bytes",
    "body_bytes",
    "identity_of",
    "make_update",
    "names_of",
    "same_total",
    "true_mean",
]

LAYOUT = {"a.weight": (3, 5), "b": (7,)}


def names_of(count: int) -> tuple[str, ...]:
    return tuple(f"p{number:03d}" for number in range(count))


@functools.cache
def identity_of(name: str) -> Identity:
    """The same each time, so that transcripts can be repeated."""
    return Identity(hashlib.sha256(f"identity of {name}".encode()).digest())


@functools.cache
def _roster(parties: tuple[str, ...]) -> str:
    return digest({party: identity_of(party).public.to_text() for party in parties})


@functools.lru_cache(maxsize=1 << 14)
def _sign(party: str, message: bytes, purpose: str) -> bytes:
    return identity_of(party).sign(message, purpose=purpose)


@functools.lru_cache(maxsize=1 << 14)  # what was found true is so; errors are not remembered
def _verify(party: str, signature: bytes, message: bytes, purpose: str) -> None:
    identity_of(party).public.verify(signature, message, purpose=purpose)


@dataclass(frozen=True, slots=True)
class TestSigner:
    """Satisfies `core.interfaces.Signer` for parties whose identities follow from their names."""

    me: str
    parties: tuple[str, ...]

    @property
    def roster(self) -> str:
        return _roster(self.parties)

    def sign(self, message: bytes, *, purpose: str) -> bytes:
        return _sign(self.me, message, purpose)

    def verify(self, party: str, signature: bytes, message: bytes, *, purpose: str) -> None:
        if party not in self.parties:
            raise BadSignature(f"{party} is not in the roster")
        _verify(party, signature, message, purpose)


TestSigner.__test__ = False  # type: ignore[attr-defined]  # pytest: a tool, no test


def make_update(
    number: int, *, layout: Mapping[str, tuple[int, ...]] = LAYOUT, size: float = 0.3, weight: float | None = None
) -> Update:
    """Some party's term: values up to `size`, a weight, and sums of which not everybody has all."""
    draw = np.random.Generator(np.random.PCG64(number))
    arrays = {name: draw.uniform(-size, size, shape).astype(np.float32) for name, shape in layout.items()}
    sums = {"loss_sum": float(draw.uniform(0, 1000)), "tokens": float(draw.integers(1, 1000))}
    if number % 4:  # enough of four or eight have it, too few of three or five
        sums["test_loss_sum"] = float(draw.uniform(0, 10))
    return Update(arrays, float(100 + number) if weight is None else weight, sums)


def true_mean(updates: Sequence[Update]) -> dict[str, Array]:
    """The weighted mean in float64."""
    weight = sum(update.weight for update in updates)
    return {
        name: sum(update.arrays[name].astype(np.float64) * update.weight for update in updates) / weight
        for name in updates[0].arrays
    }


def body_bytes(body: Payload) -> bytes:
    """All that a receiver could see of a message, in one piece."""
    tensors = [(name, array.dtype.str, list(array.shape)) for name, array in sorted(body.tensors.items())]
    content = b"".join(np.ascontiguousarray(array).tobytes() for _, array in sorted(body.tensors.items()))
    return canonical_json([dict(body.fields), tensors]) + b"\0" + content


def action_bytes(action: object) -> bytes:
    """All of what a machine wants done, or of the error that it ended with, in one piece."""
    if isinstance(action, SumSend):
        return canonical_json(["send", action.receiver, action.to_holder]) + body_bytes(action.body)
    if isinstance(action, SumKeep):
        return canonical_json(["keep", action.name, action.secret, action.lasting]) + body_bytes(action.body)
    if isinstance(action, SumFinished):
        total = action.total
        numbers = [total.weight.hex(), {name: value.hex() for name, value in total.sums.items()}]
        who = [list(total.contributors), list(total.missing), total.error_bound.hex()]
        return canonical_json(["finished", numbers, who]) + body_bytes(Payload({}, total.mean))
    assert isinstance(action, FateError)
    return canonical_json([type(action).__name__, action.message])


def same_total(one: Total, other: Total) -> bool:
    """To the bit."""
    return action_bytes(SumFinished(one)) == action_bytes(SumFinished(other))


@dataclass(frozen=True, slots=True)
class Message:
    """On its way. to_server: else to the party `receiver`."""

    sender: str
    receiver: str
    body: Payload
    to_server: bool

    @property
    def stage(self) -> str:
        return str(self.body.fields["stage"])


Change = Callable[[Message], Sequence[Message]]


@dataclass(slots=True)
class Masking:
    """One masked sum of `count` parties and a coordinator `z` (or of the first party, `own`).

    change: what becomes of each message; the same one by default. Kept actions lie in `kept` by party (`z`: server).
    log: every event with the actions that it gave (or the one error), by machine. kill: a machine, the number of its
    event from 0 and how many of that event's actions are still done; then it is killed, starts again out of what it
    has kept, and hears again all that it had heard. later: terms that parties offer after such a restart.
    """

    count: int = 4
    own: bool = False
    secure_sum: SecureSum = field(default_factory=SecAgg)
    layout: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: dict(LAYOUT))
    floor: SumFloor = field(default_factory=SumFloor)
    quorum: int = 1
    scene_of: dict[str, dict[str, Any]] = field(default_factory=dict)  # what a party believes differently
    updates: dict[str, Update] = field(default_factory=dict)
    change: Change = lambda message: [message]
    round: int = 1
    attempt: int = 1
    kill: tuple[str, int, int] | None = None
    later: dict[str, Update] = field(default_factory=dict)
    kept: dict[str, dict[str, Payload]] = field(default_factory=dict)
    parties: dict[str, SumParty] = field(default_factory=dict)
    server: SumServer = field(init=False)
    queue: deque[Message] = field(default_factory=deque)
    total: Total | None = None
    refused: list[tuple[str, str, Exception]] = field(default_factory=list)  # who, stage, why
    sent: list[Message] = field(default_factory=list)
    log: list[tuple[str, SumEvent, list[Any]]] = field(default_factory=list)
    lives: dict[str, int] = field(default_factory=dict)
    heard: dict[str, list[Message]] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.names = names_of(self.count)
        for number, name in enumerate(self.names):
            self.updates.setdefault(name, make_update(number, layout=self.layout))
            self.parties[name] = self.secure_sum.party(self.scene(name))
        self.server = self.secure_sum.server(self.scene(self.coordinator), kept=self.kept.get("z", {}))

    @property
    def coordinator(self) -> str:
        return names_of(self.count)[0] if self.own else "z"

    def scene(self, me: str) -> SumScene:
        names = names_of(self.count)
        state = {name: np.full(shape, 0.5, np.float32) for name, shape in self.layout.items()}
        values: dict[str, Any] = {
            "cohort": Cohort(names, self.coordinator, self.quorum),
            "me": me,
            "layout": self.layout,
            "state": state,
            "job": "job-1",
            "attempt": self.attempt,
            "conversation": "train",
            "round": self.round,
            "signer": TestSigner(me, (*names, "z")),
            "floor": self.floor,
        }
        return SumScene(**{**values, **self.scene_of.get(me, {})})

    def seed(self, name: str) -> bytes:
        """The operating system's randomness: other bytes in every life of a party."""
        life = self.lives.get(name, 0)
        return hashlib.sha256(f"{name} {self.round} {self.attempt} {life}".encode()).digest()

    # --- driving ----------------------------------------------------------------------------------------------

    def contribute(self, *names: str) -> None:
        """These parties (all, if none is named) offer their terms."""
        for name in names or self.names:
            update = self.later.get(name, self.updates[name]) if self.lives.get(name) else self.updates[name]
            event = SumContribute(update, self.seed(name), dict(self.kept.get(name, {})))
            self._act(name, event, self._handle(name, event))

    def _handle(self, who: str, event: SumEvent) -> list[Any]:
        try:
            return list((self.server if who == "z" else self.parties[who]).handle(event))
        except FateError as error:
            self.log.append((who, event, [error]))
            raise

    def _act(self, who: str, event: SumEvent, actions: list[Any]) -> None:
        number = sum(one == who for one, _, _ in self.log)
        self.log.append((who, event, actions))
        if self.kill is not None and self.kill[:2] == (who, number):
            actions, self.kill = actions[: self.kill[2]], None
            self._do(who, actions)
            self.restart(who)
        else:
            self._do(who, actions)

    def _do(self, who: str, actions: list[Any]) -> None:
        for action in actions:
            if isinstance(action, SumKeep):
                self.kept.setdefault(who, {})[action.name] = action.body
            elif isinstance(action, SumFinished):
                assert self.total is None or same_total(self.total, action.total)
                self.total = action.total
            elif isinstance(action, SumSend):
                sender = self.coordinator if who == "z" else who
                message = Message(sender, action.receiver, action.body, who != "z")
                self.sent.append(message)
                self.queue.extend(self.change(message))

    def restart(self, who: str) -> None:
        """Kill a machine; a new one starts out of what is kept, and hears again all that was heard, in order."""
        self.lives[who] = self.lives.get(who, 0) + 1
        if who == "z":
            self.total = None
            self.server = self.secure_sum.server(self.scene(self.coordinator), kept=dict(self.kept.get("z", {})))
        else:
            self.parties[who] = self.secure_sum.party(self.scene(who))
            self.contribute(who)
        heard, self.heard[who] = self.heard.get(who, []), []
        for message in heard:
            self.deliver(message)

    def deliver(self, message: Message) -> None:
        """One message to its machine; what is refused is noted."""
        who = "z" if message.to_server else message.receiver
        if who == "z" and self.total is not None:
            return  # a round that is over does not hear its sum's messages any more
        self.heard.setdefault(who, []).append(message)
        event = SumReceived(message.sender, message.body)
        try:
            actions = self._handle(who, event)
        except PeerViolation as error:
            self.refused.append((who, message.stage, error))
            return
        self._act(who, event, actions)

    def pump(self) -> None:
        """Deliver until nothing is on its way. Errors that end a party's part (ProtectionError) come out."""
        while self.queue:
            self.deliver(self.queue.popleft())

    def step(self, choice: int) -> None:
        """Deliver the first message of one of the ways between two parties that have some; `choice` says which."""
        ways = list(dict.fromkeys((one.sender, one.receiver, one.to_server) for one in self.queue))
        way = ways[choice % len(ways)]
        message = next(one for one in self.queue if (one.sender, one.receiver, one.to_server) == way)
        self.queue.remove(message)
        self.deliver(message)

    def until(self, stage: str, receiver: str) -> Message:
        """Deliver until the next one is this message (receiver `z`: of any party); it is taken out and returned."""
        while self.queue:
            message = self.queue.popleft()
            if message.stage == stage and (message.to_server if receiver == "z" else message.receiver == receiver):
                return message
            self.deliver(message)
        raise AssertionError(f"no message {stage!r} for {receiver}")

    def expire(self) -> None:
        """The stage's time is over at the server, then deliver what follows."""
        event = SumExpired()
        self._act("z", event, self._handle("z", event))
        self.pump()

    def finish(self) -> Total:
        """Let stages run out until there is a total."""
        for _ in range(8):
            self.pump()
            if self.total is not None:
                return self.total
            self.expire()
        raise AssertionError("no total")

    def run(self, *names: str) -> Total:
        self.contribute(*names)
        return self.finish()

    def messages(self, stage: str, *, to_server: bool) -> Iterator[Message]:
        return (one for one in self.sent if one.stage == stage and one.to_server is to_server)

    # --- what must come out -----------------------------------------------------------------------------------

    def agreement(self, me: str) -> Agreement:
        assert isinstance(self.secure_sum, SecAgg)
        return self.secure_sum._agree(self.scene(me))

    def exact(self, survivors: Sequence[str], present: Sequence[str] | None = None) -> Total:
        """The total by adding Python's integers without any mask, of the terms of the parties' first lives.

        present: U1, whose names of additive numbers count; all by default.
        """
        agreement = self.agreement(self.names[-1])
        by = [name for name in self.names if name in survivors]
        given = {name: sorted(self.updates[name].sums) for name in present or self.names}
        names = sum_names(given, agreement.threshold)
        size = sum(int(np.prod(shape)) for shape in self.layout.values())
        words, wide = [0] * size, [0] * (len(names) + 1)
        for name in by:
            term, _ = encode(self.updates[name], self.agreement(name))
            words = [(a + int(b)) % 2**32 for a, b in zip(words, term, strict=True)]
            numbers = encode_numbers(self.updates[name], names, self.count)
            wide = [(a + b) % 2**128 for a, b in zip(wide, numbers, strict=True)]
        missing = [name for name in self.names if name not in survivors]
        total = Words(np.array(words, np.dtype("<u4")), wide)
        return read_total(total, self.layout, names, agreement, by, missing)
