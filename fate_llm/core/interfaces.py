"""The seams: small protocols, each with one contract suite (`tests/contracts/`) run on every implementation.

Transport      moves frames between parties            fate_llm/protocols/transports/
SecureSum      a weighted sum without showing terms    fate_llm/protocols/sums/
Aggregator     how a total changes the global state    fate_llm/components/aggregators/
UpdateHook     before sending, after summing           fate_llm/components/hooks/
WireHook       an update hook that changes how a term travels, not what is summed
Component      what a pipeline line names              fate_llm/components/
Context        all that a component sees               fate_llm/runtime/context.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import numpy as np
from pydantic import BaseModel, ConfigDict

from .values import Arrays, Artifact, ArtifactKind, Cohort, Payload, Role, Roster, RoundResult, SumFloor, Total, Update

__all__ = [
    "Aggregator",
    "Buffer",
    "Channel",
    "Component",
    "Context",
    "ContributorRound",
    "ContributorRounds",
    "CoordinatorRound",
    "CoordinatorRounds",
    "Delivery",
    "Drop",
    "Estimate",
    "Form",
    "Frozen",
    "HookStage",
    "Keep",
    "Kept",
    "Layout",
    "PassThrough",
    "PlanView",
    "Port",
    "PredictRule",
    "Progress",
    "Replace",
    "RoundJournal",
    "Saved",
    "SecureSum",
    "Signer",
    "SumAction",
    "SumContribute",
    "SumEvent",
    "SumExpired",
    "SumFinished",
    "SumHolder",
    "SumJournal",
    "SumKeep",
    "SumParty",
    "SumReceived",
    "SumScene",
    "SumSend",
    "SumServer",
    "Traffic",
    "Transport",
    "UpdateHook",
    "WireHook",
]

T = TypeVar("T")
Buffer = bytes | bytearray | memoryview
Layout = Mapping[str, tuple[int, ...]]
Form = Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]


class Frozen(BaseModel):
    """Base of every schema: unknown fields are refused, values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


# --- Transport ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Delivery:
    """One frame as it arrived.

    `tag` belongs to the transport that made it; a tag dies with its connection. verified: the transport has proved
    that these are the bytes that the sender sent.
    """

    sender: str
    body: memoryview
    tag: object
    redelivered: bool = False
    verified: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes of a message that is coming in: received so far, and expected in all."""

    received: int
    expected: int


class Transport(Protocol):
    """Moves opaque frames between the parties of a job, at least once.

    Nothing acknowledged is lost to the sender's side of the contract; what is not acknowledged comes again after a
    reconnect; duplicates are visible (not hidden); order is kept per sender and receiver, unless a fault breaks it.
    """

    @property
    def connected(self) -> bool:
        """Whether frames can travel right now. Silence of others means nothing while they cannot."""
        ...

    def send(self, receiver: str, parts: Sequence[Buffer]) -> int:
        """Take over one frame (the parts, joined) for `receiver`; returns its bytes.

        Waits while too much is under way to that receiver. The parts may be written to again afterwards.
        """
        ...

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything sent so far is safe; False when it is not within `timeout` seconds."""
        ...

    def receive(self, timeout: float | None) -> Delivery | None:
        """The next frame, or None after `timeout` seconds (None: wait until a frame or `close`)."""
        ...

    def ack(self, delivery: Delivery) -> None:
        """What the delivery carried is safe here; it will not come again."""
        ...

    def forget(self, receiver: str) -> None:
        """`receiver` has left: what is still under way to it does not matter any more."""
        ...

    def progress(self, sender: str) -> Progress | None:
        """How far a frame from `sender` has come that is not whole yet; None when none is, or it cannot be told."""
        ...

    def close(self, *, finished: bool = False) -> None:
        """Stop; a waiting `receive` returns or raises TransportClosed. Closing twice is fine.

        finished: this party is done with the job: nothing of it stays behind on the way or on disk.
        """
        ...


class Channel(Protocol):
    """Named, typed conversation with the other parties of a task."""

    def send(self, receiver: str, name: str, payload: Payload) -> None: ...

    def receive(self, sender: str, name: str, *, timeout: float | None = None) -> Payload: ...

    def broadcast(self, name: str, payload: Payload) -> None:
        """To every other member of the task's cohort."""
        ...

    def gather(self, name: str, *, timeout: float | None = None) -> dict[str, Payload]:
        """One payload from every other contributor of the cohort, in roster order."""
        ...

    def aggregate(
        self,
        name: str,
        sums: Mapping[str, float] | None,
        *,
        protection: str,
        protection_params: Mapping[str, Any] = MappingProxyType({}),
    ) -> dict[str, float]:
        """Add up numbers outside the rounds; everyone gets the sums.

        Contributors pass their own additive numbers, the coordinator's side passes None.
        """
        ...

    def hold(self, name: str, *, protection: str, protection_params: Mapping[str, Any] = MappingProxyType({})) -> None:
        """As key holder: take part in the `aggregate` of this name."""
        ...


# --- SecureSum ----------------------------------------------------------------------------------------------


class Signer(Protocol):
    """Signs for this party, and checks what others signed, under the identities that the roster pins."""

    @property
    def roster(self) -> str:
        """Digest (64 hex digits) over every party's name and identity."""
        ...

    def sign(self, message: bytes, *, purpose: str) -> bytes:
        """64 bytes; the same input gives the same bytes."""
        ...

    def verify(self, party: str, signature: bytes, message: bytes, *, purpose: str) -> None:
        """Return when `party` signed this.

        Raises:
            BadSignature: it did not, or is not in the roster.
        """
        ...


@dataclass(frozen=True, slots=True)
class SumScene:
    """What one sum is bound to: the same at all its parties, but for `me`, `signer` and `floor`.

    layout: shapes by name that every term must have. state: the global state that the terms are differences to.
    conversation: of one task, `TASK` or `TASK/NAME/USE`. attempt: of the job. floor: of this party's own policy.
    """

    cohort: Cohort
    me: str
    layout: Layout
    state: Arrays = field(default_factory=dict)
    job: str = ""
    attempt: int = 1
    conversation: str = ""
    round: int = 1
    signer: Signer | None = None
    floor: SumFloor = field(default_factory=SumFloor)
    key_holder: str | None = None


@dataclass(frozen=True, slots=True)
class SumContribute:
    """To a contributor's machine: here is this party's term.

    seed: 32 bytes of the operating system's randomness; whatever the machine draws comes out of them. kept: by name,
    what an earlier life of this side had kept of this round (`SumKeep`); then `seed` is not used.
    """

    update: Update
    seed: bytes = b""
    kept: Mapping[str, Payload] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SumReceived:
    """A message of the sum's conversation arrived. from_holder: from the key holder as such, not as a contributor."""

    sender: str
    body: Payload
    from_holder: bool = False


@dataclass(frozen=True, slots=True)
class SumExpired:
    """The time for the present stage is over, or everyone still missing is known to be gone."""


@dataclass(frozen=True, slots=True)
class SumSend:
    """Send this message of the sum's conversation. to_holder: to the key holder as such, not as a contributor."""

    receiver: str
    body: Payload
    to_holder: bool = False


@dataclass(frozen=True, slots=True)
class SumKeep:
    """Have this on disk before any later action is done; an earlier one of the same name is replaced.

    secret: sealed there, and erased when the round closes. lasting: it stays when the round is closed, and later
    attempts of the job see it.
    """

    name: str
    body: Payload
    secret: bool = False
    lasting: bool = False


@dataclass(frozen=True, slots=True)
class SumFinished:
    """The server has the total."""

    total: Total


SumEvent = SumContribute | SumReceived | SumExpired
SumAction = SumSend | SumKeep | SumFinished


class SumParty(Protocol):
    """A contributor's side of one sum: a pure machine."""

    def handle(self, event: SumEvent) -> list[SumAction]: ...


class SumServer(Protocol):
    """The coordinator's side of one sum: a pure machine.

    awaiting: who has not answered in the present stage. able: whose terms can still be part of the total. least: how
    many of them there must be to end the present stage. stage: grows with the next stage, which is a wait of its own.

    A term or message that the protocol does not allow raises PeerViolation and changes nothing. Fewer terms
    than the cohort's quorum when the time is over raise QuorumLost.
    """

    @property
    def awaiting(self) -> frozenset[str]: ...

    @property
    def able(self) -> frozenset[str]: ...

    @property
    def least(self) -> int: ...

    @property
    def stage(self) -> int: ...

    def handle(self, event: SumEvent) -> list[SumAction]: ...


class SumHolder(Protocol):
    """The key holder's side of all sums of one conversation: a pure machine. It hears and answers the coordinator.

    idle: nothing of what it has heard is waiting for more. What it keeps belongs to the whole conversation.
    """

    @property
    def idle(self) -> bool: ...

    def handle(self, event: SumReceived) -> list[SumAction]: ...


class SecureSum(Protocol):
    """How a weighted sum is computed; made with its `Params`.

    hides_terms: the coordinator learns the total and no term. needs_key_holder: a party in that role takes part.
    summary: one line for lists. label: how the record names it, with what weakens it. learns: by role, what it sees
    and what it does not, for the plan.
    """

    Params: ClassVar[type[Frozen]]
    hides_terms: ClassVar[bool]
    needs_key_holder: ClassVar[bool]
    summary: ClassVar[str]
    learns: ClassVar[Mapping[str, str]]

    @property
    def label(self) -> str: ...

    def party(self, scene: SumScene) -> SumParty: ...

    def server(
        self, scene: SumScene, *, keep_terms: bool = False, kept: Mapping[str, Payload] = MappingProxyType({})
    ) -> SumServer:
        """keep_terms: hand the single updates on in `Total.terms`; ProtectionError where terms are hidden.

        kept: by name, what an earlier life of the coordinator had kept of this round.
        """
        ...

    def holder(self, scene: SumScene, seed: bytes, kept: Mapping[str, Payload] = MappingProxyType({})) -> SumHolder:
        """seed, kept: as in `SumContribute`. InternalError where no key holder is needed."""
        ...


class SumJournal(Protocol):
    """What one side of a conversation must not draw or say a second time, although its process was killed."""

    def load(self, round: int) -> Mapping[str, Payload]:
        """What was kept of a round: all of this attempt, and what is lasting of earlier ones."""
        ...

    def keep(self, round: int, action: SumKeep) -> None:
        """On disk when this returns.

        Raises:
            FederationError: the disk does not take it; nothing that was to follow may be done.
        """
        ...

    def close(self, round: int) -> None:
        """This round and those before are over: all but what is lasting is erased."""
        ...


# --- Aggregator and hooks -----------------------------------------------------------------------------------


@runtime_checkable
class Aggregator(Protocol):
    """How a round's total changes the global state.

    One instance lives through a job and may keep its own state.
    """

    needs_plaintext: ClassVar[bool]
    Params: ClassVar[type[Frozen]]

    def step(self, state: Arrays, total: Total) -> Arrays:
        """The next global state (float32 by name). Neither argument is written to.

        Raises ProtectionError on other names or shapes than the state's, and on values that are not finite.
        """
        ...


class HookStage(IntEnum):
    """Where a hook stands; hooks run in this order, whatever order the pipeline lists them in."""

    COMPRESS = 10
    CLIP = 20
    WEIGHT = 30
    NOISE = 40
    CHECK = 50
    ENCODE = 60  # how a value is written: bf16, int8
    PACK = 70  # how the bytes are written, without loss: zstd

    @property
    def on_the_wire(self) -> bool:
        """Hooks of this stage are WireHooks; at most one of each such stage fits into a round."""
        return self >= HookStage.ENCODE


@runtime_checkable
class UpdateHook(Protocol):
    """Changes an update before it is sent, or a total after it is summed; never its input."""

    stage: ClassVar[HookStage]
    Params: ClassVar[type[Frozen]]

    def before_send(self, update: Update, round_number: int) -> Update: ...

    def after_sum(self, total: Total, round_number: int) -> Total: ...


@runtime_checkable
class WireHook(UpdateHook, Protocol):
    """Changes how a term travels: encoded by its party right before it is sent, decoded before the sum sees it.

    All parties of a task use the same ones. A term that a protection hides cannot be written anew, so both together
    are refused. Classes derive from this one for the parts that do nothing here.

    draws: it rounds at random and is made with a seed, `hook(params, seed=...)`, of this job, party and task.
    """

    draws: ClassVar[bool] = False

    def form(self, form: Form) -> Form | None:
        """Dtypes and shapes that `encode` makes of tensors of `form`; None: the values decide.

        Raises:
            ConfigurationError: tensors of this form cannot be encoded.
        """
        ...

    def encode(self, payload: Payload, round_number: int) -> Payload:
        """The term as it travels; `payload` and its fields stay as they are.

        Raises:
            ProtectionError: values that cannot be written this way; nothing has left the party.
        """
        ...

    def decode(self, payload: Payload, form: Form) -> Payload:
        """What `encode` was given, up to its rounding: tensors of exactly this form, in its order. Keeps nothing of it.

        Whether the values can be summed (finite, not too large) is for the sum to say.

        Raises:
            PeerViolation: anything else; found out before memory beyond that of `form` is taken.
        """
        ...

    def settle(self, *, counted: bool) -> None:
        """The round of the last `encode` is over. counted: the term is part of its total."""

    def before_send(self, update: Update, round_number: int) -> Update:
        return update

    def after_sum(self, total: Total, round_number: int) -> Total:
        return total


# --- Rounds -------------------------------------------------------------------------------------------------


class ContributorRound(Protocol):
    number: int

    def contribute(self, arrays: Arrays, *, weight: float, sums: Mapping[str, float] | None = None) -> RoundResult: ...


@runtime_checkable
class Kept(Protocol):
    """Something that a party which was killed needs again as it was at the end of its last finished round."""

    def save(self, folder: Path) -> None:
        """Write all of it into `folder`, which exists and is empty."""
        ...

    def restore(self, folder: Path) -> None:
        """Become what `save` wrote there; the folder stays as it is."""
        ...


@dataclass(frozen=True, slots=True)
class Saved:
    """The last finished round of one side of a conversation, as its journal has it.

    fields: JSON values. tensors: the round's state. positions: how far this side had said and heard when it was
    written; empty when that was in another attempt, whose messages are gone. keep: folders by name, as `Kept.save` left
    them.
    """

    number: int
    fields: Mapping[str, Any]
    tensors: Arrays
    positions: Mapping[str, Any]
    keep: Mapping[str, Path]


class RoundJournal(Protocol):
    """Where one side of a conversation writes down its finished rounds. Whatever ends the process: old or new."""

    def load(self) -> Saved | None:
        """The last round committed, or None. What was half written is removed."""
        ...

    def commit(
        self,
        number: int,
        fields: Mapping[str, Any],
        tensors: Arrays,
        positions: Mapping[str, Any],
        keep: Mapping[str, Kept],
    ) -> None:
        """On disk as a whole when this returns; numbers grow.

        Raises:
            FederationError: the disk does not take it; what was committed before stays.
        """
        ...


class ContributorRounds(Protocol):
    """A contributor's rounds.

    `start` agrees on the first global state; iterating yields the rounds that are left. A round is finished, and where
    there is a journal on disk, when the loop asks for the next one.

    journals: whether a party that is killed goes on from its last finished round. resumed: the round that this run
    went on after; 0 when it began anew. Both are known after `start`, which restores what is kept.
    """

    @property
    def journals(self) -> bool: ...

    @property
    def resumed(self) -> int: ...

    def start(self, state: Arrays) -> Arrays: ...

    def __iter__(self) -> Iterator[ContributorRound]: ...


class CoordinatorRound(Protocol):
    number: int

    def collect(self) -> Total: ...

    def publish(self, state: Arrays, *, stop: bool = False) -> None: ...


class CoordinatorRounds(Protocol):
    """The coordinator's rounds.

    `start` returns the first global state, as the first contributor sent it, or the one of the last round that was
    published before this party was killed, and restores what is kept. A round is on disk before it is published.
    """

    def start(self) -> Arrays: ...

    def __iter__(self) -> Iterator[CoordinatorRound]: ...


# --- Components ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Port:
    """A typed input or output of a component. many: a list of references may be given."""

    kind: ArtifactKind
    doc: str
    required: bool = True
    many: bool = False
    roles: frozenset[Role] = frozenset({Role.GUEST, Role.HOST})


@dataclass(frozen=True, slots=True)
class Traffic:
    """Messages that a task will send: `times` messages of `bytes_each` to receiver (None: unknown)."""

    sender: str
    receiver: str
    what: str
    times: int
    bytes_each: int | None


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a task will cost, or None where it cannot be told before it runs.

    memory_bytes: peak resident memory of a contributor's process, if this task ran alone in it.
    coordinator_memory_bytes: the same of a coordinator that does not contribute. notes: what the estimate rests on.
    """

    traffic: tuple[Traffic, ...] = ()
    memory_bytes: int | None = None
    coordinator_memory_bytes: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PlanView:
    """What a component knows when it estimates: names and this machine's files, nothing of another party's.

    base: folder that relative paths start from. params: validated `Params` by party.
    upstream: for each input port, the (component, params) that makes it, by party.
    """

    task: str
    roster: Roster
    cohort: Cohort
    params: Mapping[str, Any]
    upstream: Mapping[str, Mapping[str, tuple[str, Any]]] = field(default_factory=dict)
    base: Path = Path()


@dataclass(frozen=True, slots=True)
class Keep:
    """In a prediction pipeline the task stays, with these params set."""

    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Drop:
    """In a prediction pipeline the task is left out, and what reads from it is an error."""


@dataclass(frozen=True, slots=True)
class PassThrough:
    """In a prediction pipeline the task is left out; who read an output reads that input's source."""

    source: str


@dataclass(frozen=True, slots=True)
class Replace:
    """In a prediction pipeline the task becomes `component`: `artifact` is the trained output it is given.

    inputs: its input ports to the trained task's ports whose sources it reads. params: carried over by name.
    """

    component: str
    artifact: str
    inputs: Mapping[str, str]
    params: tuple[str, ...] = ()


PredictRule = Keep | Drop | PassThrough | Replace


class Context(Protocol):
    """All that a component sees. Nothing here names a broker, a mask, a retry or another component."""

    party: str
    role: Role
    task: str
    roster: Roster
    cohort: Cohort
    params: Any
    inputs: Mapping[str, Artifact | tuple[Artifact, ...]]
    channel: Channel

    def output(self, name: str) -> Path:
        """Where to write an output: a path in the job folder that does not exist yet (its parent does)."""
        ...

    def scratch(self) -> Path:
        """A folder of this party and task for checkpoints; outlives the task, not an output."""
        ...

    def resolve(self, path: str) -> Path:
        """A path of the pipeline: relative ones start at the pipeline file's folder."""
        ...

    def seed(self, *labels: str) -> int:
        """31-bit seed of this job and these labels. Parties that pass the same labels get the same seed."""
        ...

    def contributor_rounds(
        self,
        count: int,
        *,
        protection: str,
        protection_params: Mapping[str, Any] = MappingProxyType({}),
        hooks: Sequence[UpdateHook] = (),
        keep: Mapping[str, Kept] = MappingProxyType({}),
    ) -> ContributorRounds:
        """keep: by name, what else a killed party needs to go on. Hooks that are `Kept` are kept without asking."""
        ...

    def coordinator_rounds(
        self,
        count: int,
        *,
        protection: str,
        protection_params: Mapping[str, Any] = MappingProxyType({}),
        hooks: Sequence[UpdateHook] = (),
        keep_terms: bool = False,
        keep: Mapping[str, Kept] = MappingProxyType({}),
    ) -> CoordinatorRounds: ...

    def holder_rounds(self, *, protection: str, protection_params: Mapping[str, Any] = MappingProxyType({})) -> None:
        """As key holder: answer the coordinator until its rounds are over."""
        ...

    def turn(self) -> AbstractContextManager[None]:
        """Hold the machine for computing; parties of one process take turns."""
        ...

    def pause_turn(self) -> AbstractContextManager[None]:
        """Inside `turn`: let others compute while this party waits."""
        ...

    def shared(self, key: str, factory: Callable[[], T]) -> T:
        """One object for all parties of this process, made by the first who asks. Nobody writes into it."""
        ...

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Append to this party's metrics (JSON Lines)."""
        ...

    def emit(self, event: str, **fields: Any) -> None:
        """Tell the party's observers (progress display, log) what happens. Fields hold nothing private."""
        ...

    def check_cancelled(self) -> None:
        """Raise JobCancelled when the job was stopped."""
        ...


class Component(Protocol):
    """What a pipeline line names. One file in `fate_llm/components/`; `Params` is its only schema.

    The class's docstring is the manual's text. A role takes part when the class has a method of its name:
    `guest(ctx)`, `host(ctx)`, `arbiter(ctx)`, `key_holder(ctx)`. Torch is imported inside those only.
    """

    Params: ClassVar[type[Frozen]]
    inputs: ClassVar[Mapping[str, Port]]
    outputs: ClassVar[Mapping[str, Port]]
    predict_rule: ClassVar[PredictRule]

    def needs_experiment(self, params: Any) -> str | None:
        """Why these params are for experiments only (they show one party's data to another), or None."""
        ...

    def estimate(self, view: PlanView) -> Estimate: ...
