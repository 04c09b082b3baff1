"""Rounds as two pure machines: who may say what, and when.

    coordinator                                        contributor
    STARTING --hello from all or time over--> OPEN     JOINING --state--> TRAINING
    OPEN --all terms or time over--> SUMMED            TRAINING --own term--> WAITING
    SUMMED --publish--> OPEN (next) or FINISHED        WAITING --state of this round or later--> TRAINING or FINISHED
    any --quorum lost, first state missing--> FAILED

    A side that was killed starts where its journal says: resume takes STARTING to OPEN or FINISHED, and tells the last
    state again; rejoin takes NEW to TRAINING or FINISHED.

Rules:
1. Events in, actions out. No clock, no thread, no randomness: time comes with the event.
2. A pair of phase and event that is not in the table is an error, and nothing has changed.
3. A term counts for exactly one round; a late one is ignored and its party takes part in the next round.
4. A party that is lost, late or refused is left out of the round, never out of the job.
5. A published round only rolls forward: nothing opens it again.
6. When too few parties are left for the quorum, the rounds fail at once: nobody trains for a round that
   cannot end.
7. A state or hello is checked whole (names, shapes, float32, finite) before anything is changed by it.
8. A contributor in whose present round a state comes that counts its term, before it has offered one, had sent that
   term in an earlier life: it offers it again, which changes nothing at the coordinator, and goes on with that state.
9. A sum may have several stages; each is waited for as long as a round. What a sum wants kept is written down before
   anything that follows is told.
10. Answers of the present round that come while its contributor still trains belong to its earlier life: they are
    handed to the sum, in their order, as soon as the term is offered.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np

from fate_llm.core.canonical import digest
from fate_llm.core.errors import FateError, InternalError, PeerViolation, ProtectionError, QuorumLost
from fate_llm.core.interfaces import (
    Layout,
    SecureSum,
    SumAction,
    SumContribute,
    SumExpired,
    SumFinished,
    SumKeep,
    SumParty,
    SumReceived,
    SumScene,
    SumSend,
    SumServer,
)
from fate_llm.core.values import Arrays, Cohort, Payload, RoundResult, Total, Update, require_finite

__all__ = [
    "ANSWER",
    "ASK",
    "HELLO",
    "OPENED",
    "STATE",
    "TERM",
    "Begin",
    "Collected",
    "ContributorMachine",
    "ContributorPhase",
    "CoordinatorMachine",
    "CoordinatorPhase",
    "Failed",
    "Gone",
    "Heard",
    "Ignored",
    "Join",
    "Offer",
    "Publish",
    "Ready",
    "Rejoin",
    "Resume",
    "RoundDone",
    "Tell",
    "Tick",
    "Write",
    "layout_of",
]

# To the coordinator: HELLO and TERM, and OPENED from the key holder of a sum that has one. From it: STATE and ANSWER,
# and ASK to the key holder. No kind goes both ways or comes from two roles, because a party may have several, which
# hear and speak in mailboxes of one party.
HELLO, TERM, OPENED = "round.hello", "round.term", "round.opened"
STATE, ANSWER, ASK = "round.state", "round.answer", "round.ask"
_EARLY = 4096  # answers of a sum that are kept while its contributor trains


# --- events -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Heard:
    """A message of the rounds' conversation arrived. kind: HELLO, TERM, OPENED, STATE or ANSWER."""

    sender: str
    kind: str
    round: int
    payload: Payload


@dataclass(frozen=True, slots=True)
class Gone:
    """A party ended, failed or left; it sends nothing more."""

    party: str
    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class Publish:
    """From the coordinator's own loop: the new global state."""

    state: Arrays
    stop: bool = False


@dataclass(frozen=True, slots=True)
class Resume:
    """To a coordinator, before anything else: the last round it had committed, and may have published.

    sums, contributors, stop: as the state was told. layouts: by party, of those who had said hello. left: parties that
    need not be told; that they are gone is heard after what they had sent, as ever. kept: what the sum of the round
    after it had wanted kept.
    """

    number: int
    state: Arrays
    sums: Mapping[str, float]
    contributors: tuple[str, ...]
    stop: bool
    layouts: Mapping[str, str]
    left: frozenset[str] = frozenset()
    kept: Mapping[str, Payload] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rejoin:
    """To a contributor, before anything else: the last round it had finished, and its state.

    over: the coordinator had stopped the rounds there.
    """

    number: int
    state: Arrays
    over: bool = False


@dataclass(frozen=True, slots=True)
class Join:
    """From a contributor's own loop: my first state (sent only by the first contributor of the roster)."""

    state: Arrays


@dataclass(frozen=True, slots=True)
class Offer:
    """From a contributor's own loop: my term of the present round. seed, kept: see `SumContribute`."""

    update: Update
    seed: bytes = b""
    kept: Mapping[str, Payload] = field(default_factory=dict)


CoordinatorEvent = Heard | Gone | Tick | Publish | Resume
ContributorEvent = Heard | Join | Rejoin | Offer | Tick


# --- actions ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tell:
    receiver: str
    kind: str
    round: int
    payload: Payload


@dataclass(frozen=True, slots=True)
class Write:
    """What the sum of a round wants on disk before anything that follows is done."""

    round: int
    keep: SumKeep


@dataclass(frozen=True, slots=True)
class Begin:
    """The coordinator has the first global state."""

    state: Arrays


@dataclass(frozen=True, slots=True)
class Collected:
    total: Total


@dataclass(frozen=True, slots=True)
class Ignored:
    """A message was left out of the round: late, refused, or not for now."""

    party: str
    round: int
    why: str


@dataclass(frozen=True, slots=True)
class Failed:
    error: FateError


@dataclass(frozen=True, slots=True)
class Ready:
    """A contributor may train from this state; `finished` rounds are over, `sums` are those of the last of them."""

    state: Arrays
    finished: int
    sums: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RoundDone:
    result: RoundResult


Action = Tell | Write | Begin | Collected | Ignored | Failed | Ready | RoundDone


def layout_of(state: Arrays) -> dict[str, tuple[int, ...]]:
    """Shapes by name."""
    return {name: tuple(array.shape) for name, array in state.items()}


def _layout_digest(state: Arrays) -> str:
    return digest({name: list(shape) for name, shape in layout_of(state).items()})


def _not_float32(state: Arrays) -> str | None:
    return next((name for name, array in state.items() if array.dtype != np.float32), None)


def _check_values(state: Arrays, *, what: str) -> None:
    if other := _not_float32(state):
        raise PeerViolation(f"{what} must be float32, and {other[:80]} is {state[other].dtype}")
    try:
        require_finite(state, what=what)
    except ProtectionError as error:
        raise PeerViolation(error.message) from None


# --- the coordinator ----------------------------------------------------------------------------------------


class CoordinatorPhase(StrEnum):
    STARTING = "starting"
    OPEN = "open"
    SUMMED = "summed"
    FINISHED = "finished"
    FAILED = "failed"


@dataclass(slots=True)
class CoordinatorMachine:
    """The coordinator's side of all rounds of one task. patience: seconds a start or round may last."""

    cohort: Cohort
    rounds: int
    patience: float
    secure_sum: SecureSum
    keep_terms: bool = False
    scene: SumScene | None = None
    phase: CoordinatorPhase = CoordinatorPhase.STARTING
    number: int = 0
    deadline: float | None = None
    state: Arrays = field(default_factory=dict)
    gone: dict[str, str] = field(default_factory=dict)
    _layouts: dict[str, str] = field(default_factory=dict)
    _refused: set[str] = field(default_factory=set)
    _sum: SumServer | None = None
    _stage: int = 0
    _news: Payload = field(default_factory=Payload)
    _total: Total | None = None

    def handle(self, event: CoordinatorEvent, now: float) -> list[Action]:
        """Apply one event at time `now` (seconds, any origin). Returns what the driver must do, in order.

        Raises:
            PeerViolation: a party said what is not allowed now; nothing has changed.
            InternalError: our own loop called out of turn; nothing has changed.
        """
        key = event.kind if isinstance(event, Heard) else type(event)
        step = _COORDINATOR[self.phase].get(key)
        if step is None:
            fault = PeerViolation if isinstance(event, Heard) else InternalError
            raise fault(f"{key if isinstance(key, str) else key.__name__} is not allowed while {self.phase}")
        return step(self, event, now)

    @property
    def news(self) -> Payload:
        """The last state as it is told: fields sums, contributors and stop, and the tensors."""
        return self._news

    @property
    def layouts(self) -> Mapping[str, str]:
        """Who has said hello, and of what layout."""
        return dict(self._layouts)

    def _resume(self, event: Resume, now: float) -> list[Action]:
        self.state = event.state
        self._layouts = {p: event.layouts[p] for p in self.cohort.contributors if p in event.layouts}
        over = event.stop or event.number >= self.rounds
        known = self.cohort.contributors if over else tuple(self._layouts)  # who comes late finds nobody any more
        receivers = [party for party in known if party not in event.left]
        tells = self._tell_state(event.number, event.sums, event.contributors, event.stop, receivers)
        if over:
            self.number, self.phase = event.number, CoordinatorPhase.FINISHED
            return [*tells, *self._over()]
        self._open(event.number + 1, now, event.kept)
        return tells

    def _over(self) -> list[Action]:
        """The key holder is not asked any more."""
        holder = self._holder
        return [] if holder is None else [Tell(holder, ASK, self.number, Payload({"stage": "over"}))]

    def _tell_state(
        self, number: int, sums: Mapping[str, float], by: tuple[str, ...], stop: bool, receivers: Iterable[str]
    ) -> list[Action]:
        self._news = Payload({"sums": dict(sums), "contributors": list(by), "stop": stop}, self.state)
        return [Tell(party, STATE, number, self._news) for party in receivers if party not in self.gone]

    def _hello(self, event: Heard, now: float) -> list[Action]:
        sender = self._contributor(event.sender)
        layout = event.payload.fields.get("layout")
        if not isinstance(layout, str):
            raise PeerViolation(f"the hello of {sender} has no layout")
        first = self.cohort.contributors[0]
        if sender == first and _layout_digest(event.payload.tensors) != layout:
            raise PeerViolation(f"the first state of {sender} does not fit its layout")
        if sender == first:
            _check_values(event.payload.tensors, what=f"the first state of {sender}")
            self.state = event.payload.tensors
        self._layouts[sender] = layout
        return self._maybe_begin(now, over=False)

    def _maybe_begin(self, now: float, *, over: bool) -> list[Action]:
        if self.deadline is None:
            self.deadline = now + self.patience
        first, contributors = self.cohort.contributors[0], self.cohort.contributors
        came = [p for p in contributors if p in self._layouts and p not in self.gone]
        absent = [p for p in contributors if p not in self._layouts and p not in self.gone]
        possible = came if over else [*came, *absent]
        if first not in self._layouts and (over or first in self.gone):
            return self._fail(QuorumLost(f"{first} did not send the first state{self._why(first)}"))
        if len(possible) < self._quorum:
            reasons = ", ".join(p + self._why(p) for p in contributors if p not in possible)
            text = f"{len(possible)} parties came, the quorum is {self._quorum}; missing: {reasons}"
            return self._fail(QuorumLost(text))
        if absent and not over:
            return []
        other = [p for p, layout in self._layouts.items() if layout != self._layouts[first]]
        if other:
            return self._fail(
                PeerViolation(
                    f"the trainable parameters of {', '.join(other)} differ from those of {first}",
                    hint="All parties need the same model, the same peft settings and the same versions.",
                )
            )
        self._news = Payload({"sums": {}, "contributors": [], "stop": False}, self.state)
        tells = [Tell(p, STATE, 0, self._news) for p in self._layouts]
        self._open(1, now)
        return [Begin(self.state), *tells]

    @property
    def _quorum(self) -> int:
        return max(1, self.cohort.quorum)

    def _why(self, party: str) -> str:
        return f" ({self.gone[party]})" if party in self.gone else ""

    def _open(self, number: int, now: float, kept: Mapping[str, Payload] | None = None) -> None:
        self.number = number
        self.phase = CoordinatorPhase.OPEN
        self.deadline = now + self.patience
        self._stage = 0
        self._refused = set()
        scene = self.scene or SumScene(self.cohort, self.cohort.coordinator, {})
        scene = replace(scene, layout=layout_of(self.state), state=self.state, round=number)
        self._sum = self.secure_sum.server(scene, keep_terms=self.keep_terms, kept=kept or {})

    def _late_hello(self, event: Heard, now: float) -> list[Action]:
        sender = self._contributor(event.sender)
        if event.payload.fields.get("layout") != _layout_digest(self.state):
            raise PeerViolation(f"the trainable parameters of {sender} differ from the job's")
        self._layouts[sender] = str(event.payload.fields["layout"])
        return [Tell(sender, STATE, self.number - 1, self._news)]

    def _term(self, event: Heard, now: float) -> list[Action]:
        sender = self._of_the_sum(event)
        if event.round > self.number:
            raise PeerViolation(f"{sender} sent a term of round {event.round} in round {self.number}")
        if event.round < self.number:
            return [Ignored(sender, event.round, f"late: round {self.number} is open")]
        if sender in self._refused:
            return [Ignored(sender, event.round, "an earlier term of this round was refused")]
        assert self._sum is not None
        try:
            actions = self._sum.handle(SumReceived(sender, event.payload, event.kind == OPENED))
        except PeerViolation as refusal:
            self._refused.add(sender)
            return [Ignored(sender, event.round, refusal.message), *self._close_if_alone(now)]
        except FateError as error:
            return self._fail(error)
        return [*self._after_sum(actions, now), *self._close_if_alone(now)]

    def _late_term(self, event: Heard, now: float) -> list[Action]:
        return [Ignored(self._of_the_sum(event), event.round, "late: the round is closed")]

    def _of_the_sum(self, event: Heard) -> str:
        if event.kind != OPENED:
            return self._contributor(event.sender)
        if event.sender != self._holder:
            raise PeerViolation(f"{event.sender} is not the key holder of this task")
        return event.sender

    @property
    def _holder(self) -> str | None:
        return self.scene.key_holder if self.scene is not None and self.secure_sum.needs_key_holder else None

    def _close_if_alone(self, now: float) -> list[Action]:
        """End the stage when nobody is left who could still answer, or too few for the quorum."""
        if self.phase is not CoordinatorPhase.OPEN:
            return []
        assert self._sum is not None
        awaiting = self._sum.awaiting
        lost = awaiting & (self._refused | self.gone.keys())
        possible, least = len(self._sum.able - lost), self._sum.least
        if possible < least:
            known = [p for p in self.cohort.contributors if p in lost or p not in self._sum.able]
            named = ", ".join(p + self._why(p) for p in known)
            needed = f"the quorum is {least}" if least == self._quorum else f"the protection needs {least}"
            text = f"round {self.number}: {possible} parties are left, {needed}; lost: {named}"
            return self._fail(QuorumLost(text))
        return self._expire(now) if not awaiting - lost else []

    def _expire(self, now: float) -> list[Action]:
        assert self._sum is not None
        stage = self._sum.stage
        self.deadline = now + self.patience  # a sum may rather wait on than go to its next stage
        try:
            actions = self._after_sum(self._sum.handle(SumExpired()), now)
            return [*actions, *(self._close_if_alone(now) if self._sum.stage != stage else [])]
        except QuorumLost as error:
            known = "; ".join(f"{p}: {why}" for p, why in self.gone.items())
            text = f"round {self.number}: {error.message}" + (f" ({known})" if known else "")
            return self._fail(QuorumLost(text))
        except FateError as error:
            return self._fail(error)

    def _after_sum(self, actions: list[SumAction], now: float) -> list[Action]:
        assert self._sum is not None
        if self._sum.stage != self._stage:  # a wait of its own
            self._stage, self.deadline = self._sum.stage, now + self.patience
        done: list[Action] = []
        for action in actions:
            if isinstance(action, SumFinished):
                self.phase = CoordinatorPhase.SUMMED
                self._total = action.total
                done.append(Collected(action.total))
            elif isinstance(action, SumKeep):
                done.append(Write(self.number, action))
            else:
                done.append(Tell(action.receiver, ASK if action.to_holder else ANSWER, self.number, action.body))
        return done

    def _tick_starting(self, event: Tick, now: float) -> list[Action]:
        return self._maybe_begin(now, over=self.deadline is not None and now >= self.deadline)

    def _tick_open(self, event: Tick, now: float) -> list[Action]:
        assert self.deadline is not None
        return self._expire(now) if now >= self.deadline else []

    def _gone_starting(self, event: Gone, now: float) -> list[Action]:
        self.gone[event.party] = event.reason
        return self._maybe_begin(now, over=False)

    def _gone_open(self, event: Gone, now: float) -> list[Action]:
        self.gone[event.party] = event.reason
        return self._close_if_alone(now)

    def _gone_else(self, event: Gone, now: float) -> list[Action]:
        self.gone[event.party] = event.reason
        return []

    def _publish(self, event: Publish, now: float) -> list[Action]:
        assert self._total is not None
        if layout_of(event.state) != layout_of(self.state):
            raise InternalError("the state published has other names or shapes than the state before")
        if _not_float32(event.state):
            raise InternalError("the state published must be float32")
        self.state = event.state
        stop = event.stop or self.number >= self.rounds
        tells = self._tell_state(
            self.number, self._total.sums, self._total.contributors, event.stop, tuple(self._layouts)
        )
        if stop:
            self.phase = CoordinatorPhase.FINISHED
            return [*tells, *self._over()]
        self._open(self.number + 1, now)
        return [*tells, *self._close_if_alone(now)]  # some may have left since the last round was summed

    def _fail(self, error: FateError) -> list[Action]:
        self.phase = CoordinatorPhase.FAILED
        return [Failed(error)]

    def _nothing(self, event: Tick, now: float) -> list[Action]:
        return []

    def _contributor(self, sender: str) -> str:
        if sender not in self.cohort.contributors:
            raise PeerViolation(f"{sender} is not a contributor of this task")
        return sender


_Step = Callable[[Any, Any, float], list[Action]]
_COORDINATOR: dict[CoordinatorPhase, dict[str | type, _Step]] = {
    CoordinatorPhase.STARTING: {
        HELLO: CoordinatorMachine._hello,
        Gone: CoordinatorMachine._gone_starting,
        Tick: CoordinatorMachine._tick_starting,
        Resume: CoordinatorMachine._resume,
    },
    CoordinatorPhase.OPEN: {
        HELLO: CoordinatorMachine._late_hello,
        TERM: CoordinatorMachine._term,
        OPENED: CoordinatorMachine._term,
        Gone: CoordinatorMachine._gone_open,
        Tick: CoordinatorMachine._tick_open,
    },
    CoordinatorPhase.SUMMED: {
        HELLO: CoordinatorMachine._late_hello,
        TERM: CoordinatorMachine._late_term,
        OPENED: CoordinatorMachine._late_term,
        Gone: CoordinatorMachine._gone_else,
        Tick: CoordinatorMachine._nothing,
        Publish: CoordinatorMachine._publish,
    },
    CoordinatorPhase.FINISHED: {
        TERM: CoordinatorMachine._late_term,
        OPENED: CoordinatorMachine._late_term,
        Gone: CoordinatorMachine._gone_else,
        Tick: CoordinatorMachine._nothing,
    },
    CoordinatorPhase.FAILED: {},
}


# --- a contributor ------------------------------------------------------------------------------------------


class ContributorPhase(StrEnum):
    NEW = "new"
    JOINING = "joining"
    TRAINING = "training"
    WAITING = "waiting"
    FINISHED = "finished"


@dataclass(slots=True)
class ContributorMachine:
    """One contributor's side of all rounds of one task."""

    cohort: Cohort
    me: str
    rounds: int
    secure_sum: SecureSum
    scene: SumScene | None = None
    phase: ContributorPhase = ContributorPhase.NEW
    number: int = 0
    _layout: Layout = field(default_factory=dict)
    _sum: SumParty | None = None
    _early: list[Heard] = field(default_factory=list)
    _newest: Heard | None = None
    _answered: Heard | None = None

    def handle(self, event: ContributorEvent, now: float = 0.0) -> list[Action]:
        """Apply one event; see CoordinatorMachine.handle."""
        key = event.kind if isinstance(event, Heard) else type(event)
        step = _CONTRIBUTOR[self.phase].get(key)
        if step is None:
            fault = PeerViolation if isinstance(event, Heard) else InternalError
            raise fault(f"{key if isinstance(key, str) else key.__name__} is not allowed while {self.phase}")
        if isinstance(event, Heard) and event.sender != self.cohort.coordinator:
            raise PeerViolation(f"{event.sender} is not the coordinator of this task")
        return step(self, event, now)

    def _join(self, event: Join, now: float) -> list[Action]:
        if other := _not_float32(event.state):
            raise ProtectionError(f"the first state must be float32, and {other} is {event.state[other].dtype}")
        self._layout = layout_of(event.state)
        fields = {"layout": _layout_digest(event.state)}
        first = self.me == self.cohort.contributors[0]
        self.phase = ContributorPhase.JOINING
        return [Tell(self.cohort.coordinator, HELLO, 0, Payload(fields, event.state if first else {}))]

    def _rejoin(self, event: Rejoin, now: float) -> list[Action]:
        self._layout = layout_of(event.state)
        self._begin(self.rounds + 1 if event.over else event.number + 1, event.state)
        return []

    def _first_state(self, event: Heard, now: float) -> list[Action]:
        self._check_state(event)
        fields = event.payload.fields
        self._begin(self.rounds + 1 if fields["stop"] else event.round + 1, event.payload.tensors)
        return [Ready(event.payload.tensors, event.round, dict(fields["sums"]))]

    def _begin(self, number: int, state: Arrays) -> None:
        over = number > self.rounds
        self.phase = ContributorPhase.FINISHED if over else ContributorPhase.TRAINING
        self.number = number
        self._newest = self._answered = None
        self._early = []
        scene = self.scene or SumScene(self.cohort, self.me, {})
        scene = replace(scene, layout=self._layout, state=state, round=number)
        self._sum = None if over else self.secure_sum.party(scene)

    def _check_state(self, event: Heard) -> None:
        fields = event.payload.fields
        if layout_of(event.payload.tensors) != self._layout:
            raise PeerViolation(f"the state of round {event.round} has other names or shapes than our parameters")
        if fields.keys() != {"sums", "contributors", "stop"} or not _is_news(fields, self.cohort):
            raise PeerViolation(f"the state of round {event.round} lacks sums, contributors or stop")
        if event.round > self.rounds:
            raise PeerViolation(f"a state of round {event.round}; the task has {self.rounds}")
        _check_values(event.payload.tensors, what=f"the state of round {event.round}")

    @property
    def overtaken(self) -> bool:
        """A round ended without us while we trained: what we offer will not be sent."""
        return self._newest is not None

    @property
    def answered(self) -> bool:
        """The present round ended with our term, which an earlier life of ours had sent: nothing else matters now."""
        return self._answered is not None

    def _replaced(self, event: Heard, now: float) -> list[Action]:
        """Remember the newest state, it replaces our own term; or the one that our own term is part of."""
        self._check_state(event)
        counted = event.round == self.number and self.me in event.payload.fields["contributors"]
        if counted and self._newest is None:
            self._answered = event
        elif event.round >= self.number and (self._newest is None or event.round > self._newest.round):
            self._newest = event
        return []

    def _offer(self, event: Offer, now: float) -> list[Action]:
        if self._newest is not None:
            late = Ignored(self.me, self.number, f"late: round {self._newest.round} is already over")
            return [late, *self._finish(self._newest)]
        assert self._sum is not None
        tells = self._tell(self._sum.handle(SumContribute(event.update, event.seed, event.kept)))
        early, self._early = self._early, []
        if self._answered is not None:
            return [*tells, *self._finish(self._answered)]
        self.phase = ContributorPhase.WAITING
        for answer in early:
            try:
                tells += self._sum_message(answer, now)
            except PeerViolation as refusal:
                tells.append(Ignored(answer.sender, answer.round, refusal.message))
        return tells

    def _tell(self, actions: list[SumAction]) -> list[Action]:
        done: list[Action] = []
        for action in actions:
            if isinstance(action, SumSend):
                done.append(Tell(action.receiver, TERM, self.number, action.body))
            elif isinstance(action, SumKeep):
                done.append(Write(self.number, action))
        return done

    def _answer_early(self, event: Heard, now: float) -> list[Action]:
        """An answer to what an earlier life of this party had sent in the present round."""
        if event.round != self.number or len(self._early) >= _EARLY:
            return [Ignored(event.sender, event.round, f"round {self.number} has not been offered a term")]
        self._early.append(event)
        return []

    def _sum_message(self, event: Heard, now: float) -> list[Action]:
        if event.round != self.number:
            return [Ignored(event.sender, event.round, f"round {self.number} is open")]
        assert self._sum is not None
        return self._tell(self._sum.handle(SumReceived(event.sender, event.payload)))

    def _state(self, event: Heard, now: float) -> list[Action]:
        self._check_state(event)
        if event.round < self.number:
            return [Ignored(event.sender, event.round, "an older state")]
        return self._finish(event)

    def _finish(self, event: Heard) -> list[Action]:
        fields = event.payload.fields
        stop = bool(fields["stop"])
        result = RoundResult(
            event.payload.tensors, event.round, dict(fields["sums"]), tuple(fields["contributors"]), stop
        )
        self._begin(self.rounds + 1 if stop else event.round + 1, event.payload.tensors)
        return [RoundDone(result)]

    def _nothing(self, event: ContributorEvent, now: float) -> list[Action]:
        return []


def _is_news(fields: Mapping[str, Any], cohort: Cohort) -> bool:
    sums, contributors, stop = fields["sums"], fields["contributors"], fields["stop"]
    return (
        isinstance(sums, dict)
        and all(type(value) in (int, float) and abs(value) <= sys.float_info.max for value in sums.values())
        and isinstance(contributors, list)
        and all(party in cohort.contributors for party in contributors)
        and type(stop) is bool
    )


_CONTRIBUTOR: dict[ContributorPhase, dict[str | type, _Step]] = {
    ContributorPhase.NEW: {Join: ContributorMachine._join, Rejoin: ContributorMachine._rejoin},
    ContributorPhase.JOINING: {STATE: ContributorMachine._first_state, Tick: ContributorMachine._nothing},
    ContributorPhase.TRAINING: {
        STATE: ContributorMachine._replaced,
        ANSWER: ContributorMachine._answer_early,
        Offer: ContributorMachine._offer,
        Tick: ContributorMachine._nothing,
    },
    ContributorPhase.WAITING: {
        STATE: ContributorMachine._state,
        ANSWER: ContributorMachine._sum_message,
        Tick: ContributorMachine._nothing,
    },
    ContributorPhase.FINISHED: {
        STATE: ContributorMachine._nothing,
        ANSWER: ContributorMachine._nothing,
        Tick: ContributorMachine._nothing,
    },
}
