"""The driver of the rounds: lends the pure machines a channel and a clock, and runs the hooks.

A component iterates over rounds and calls `contribute` or `collect` and `publish`; everything about
deadlines, quorum, late parties, protection and journals happens behind these three.

Where there is a journal, a contributor commits the state it begins with, and each round when its loop asks for the next
one; the coordinator commits before it tells anybody of a round's state. `docs/explanation/rounds.md` says what happens
after a kill at any moment.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fate_llm.core.errors import InternalError, PeerFailed, PeerViolation
from fate_llm.core.interfaces import (
    Kept,
    RoundJournal,
    Saved,
    SecureSum,
    SumJournal,
    SumKeep,
    SumReceived,
    SumScene,
    SumSend,
    UpdateHook,
)
from fate_llm.core.values import (
    Arrays,
    Cohort,
    Payload,
    RoundResult,
    Total,
    Update,
    require_finite,
    require_same_layout,
)
from fate_llm.security.randomness import random_bytes

from ..channel import JobChannel, Left
from ..ledger import Account
from .keeper import JOINED, Keeper, kept_objects
from .machine import (
    ANSWER,
    ASK,
    HELLO,
    OPENED,
    STATE,
    TERM,
    Action,
    Begin,
    Collected,
    ContributorEvent,
    ContributorMachine,
    ContributorPhase,
    CoordinatorEvent,
    CoordinatorMachine,
    CoordinatorPhase,
    Failed,
    Gone,
    Heard,
    Ignored,
    Join,
    Offer,
    Publish,
    Ready,
    Rejoin,
    Resume,
    RoundDone,
    Tell,
    Tick,
    Write,
)
from .wire import Wire

__all__ = ["ContributorDriver", "CoordinatorDriver", "HolderDriver", "Setting"]

Emit = Callable[..., None]
_LATE_MAIL = 4  # messages per contributor that are still heard when a round's time is over


@dataclass(frozen=True, slots=True)
class Setting:
    """What both sides of one task's rounds need.

    patience: seconds a round may stay open at the coordinator. hooks: in any order; they run by their stage.
    emit: told of `round_state`, `round_closed`, `resumed` and `ignored`, nothing private. protection: the name of
    secure_sum, for the record. account: of this party in this role, on a durable channel. journal, keep: where finished
    rounds are written down, and what goes there besides. scene: what its sums are bound to, but for round, layout and
    state. sum_journal: of this side. random: of the operating system, for the seeds of sums.
    """

    channel: JobChannel
    task: str
    cohort: Cohort
    rounds: int
    patience: float
    secure_sum: SecureSum
    emit: Emit
    hooks: Sequence[UpdateHook] = ()
    protection: str = ""
    account: Account | None = None
    journal: RoundJournal | None = None
    keep: Mapping[str, Kept] = field(default_factory=dict)
    scene: SumScene | None = None
    sum_journal: SumJournal | None = None
    random: Callable[[int], bytes] = random_bytes

    def kept_of(self, round: int) -> Mapping[str, Payload]:
        """What this side's sum of a round had wanted kept."""
        return {} if self.sum_journal is None else self.sum_journal.load(round)

    def write(self, round: int, keep: SumKeep) -> None:
        if self.sum_journal is not None:
            self.sum_journal.keep(round, keep)

    def close_sums(self, round: int) -> None:
        """The rounds up to this one are over: the secrets of their sums are erased."""
        if self.sum_journal is not None:
            self.sum_journal.close(round)

    def ordered_hooks(self) -> list[UpdateHook]:
        return sorted(self.hooks, key=lambda hook: hook.stage)

    def keeper(self) -> Keeper:
        kept = kept_objects(self.keep, self.ordered_hooks()) if self.journal is not None else {}
        return Keeper(self.channel, self.task, self.account, self.journal, kept)

    def tell(self, action: Tell) -> None:
        self.channel.send(
            action.receiver,
            task=self.task,
            kind=action.kind,
            payload=action.payload,
            round=action.round,
            protection=self._label(action),
            account=self.account,
        )

    def _label(self, action: Tell) -> str:
        """How what it carries is protected: nothing is before the first round."""
        if action.kind == HELLO or action.round == 0:
            return ""
        wire = [type(hook).__name__.lower() for hook in self.ordered_hooks() if hook.stage.on_the_wire]
        return "+".join([self.protection, *(wire if action.kind == TERM else ())])


class CoordinatorDriver:
    """Satisfies `core.interfaces.CoordinatorRounds`."""

    def __init__(self, setting: Setting, *, keep_terms: bool = False) -> None:
        self._setting = setting
        secure_sum = Wire(setting.hooks).around(setting.secure_sum, lambda: self._machine.number)
        self._machine = CoordinatorMachine(
            setting.cohort, setting.rounds, setting.patience, secure_sum, keep_terms=keep_terms, scene=setting.scene
        )
        self._keeper = setting.keeper()
        holder = setting.scene.key_holder if setting.scene is not None and secure_sum.needs_key_holder else None
        self._senders = (*setting.cohort.contributors, *(() if holder is None else (holder,)))

    @property
    def sums(self) -> dict[str, float]:
        """The additive numbers of the last round that was published."""
        return dict(self._machine.news.fields["sums"])

    def start(self) -> Arrays:
        """Wait for the contributors; the first global state. After a kill: the last one that may have been published,
        which everybody is told again.

        Raises:
            QuorumLost: too few came in time, or not the one that brings the state.
            PeerViolation: their trainable parameters differ.
        """
        if self._machine.phase is not CoordinatorPhase.STARTING:
            raise InternalError(f"the rounds have been started: it is {self._present()}")
        saved = self._keeper.open()
        if saved is not None:
            return self._resume(saved)
        begin = self._run_until(Begin)
        assert isinstance(begin, Begin)
        return begin.state

    def _resume(self, saved: Saved) -> Arrays:
        setting, fields = self._setting, saved.fields
        resume = Resume(
            saved.number,
            saved.tensors,
            fields["sums"],
            tuple(fields["contributors"]),
            fields["stop"],
            fields["layouts"],
            frozenset(setting.channel.left),
            setting.kept_of(saved.number + 1),
        )
        setting.emit("resumed", round=saved.number, rounds=setting.rounds)
        setting.close_sums(saved.number)  # we may have been killed between the commit and this
        self._apply(self._handle(resume))
        return saved.tensors

    def _commit(self, number: int) -> None:
        """What everybody is told next is on disk before: it is never told differently."""
        news = self._machine.news
        self._keeper.commit(number, {**news.fields, "layouts": dict(self._machine.layouts)}, news.tensors)

    def __iter__(self) -> Iterator[_CoordinatorRound]:
        while self._machine.phase in (CoordinatorPhase.OPEN, CoordinatorPhase.SUMMED):
            number = self._machine.number
            yield _CoordinatorRound(self, number)
            if self._is_at(number, CoordinatorPhase.OPEN) or self._is_at(number, CoordinatorPhase.SUMMED):
                raise InternalError(f"round {number} must be collected and published before the next")

    def _is_at(self, number: int, phase: CoordinatorPhase) -> bool:
        return self._machine.number == number and self._machine.phase is phase

    def _collect(self, number: int) -> Total:
        if not self._is_at(number, CoordinatorPhase.OPEN):
            raise InternalError(f"round {number} cannot be collected: it is {self._present()}")
        collected = self._run_until(Collected)
        assert isinstance(collected, Collected)
        total = collected.total
        for hook in self._setting.ordered_hooks():
            total = hook.after_sum(total, self._machine.number)
        self._setting.emit(
            "round_closed",
            conversation=self._setting.task,
            round=self._machine.number,
            rounds=self._setting.rounds,
            contributors=list(total.contributors),
            missing=list(total.missing),
            error_bound=total.error_bound,
        )
        return total

    def _present(self) -> str:
        return f"round {self._machine.number}, {self._machine.phase}"

    def _publish(self, number: int, state: Arrays, stop: bool) -> None:
        if not self._is_at(number, CoordinatorPhase.SUMMED):
            raise InternalError(f"round {number} cannot be published: it is {self._present()}")
        require_finite(state, what="the new global state")
        actions = self._handle(Publish(state, stop))
        self._commit(number)
        self._setting.close_sums(number)
        self._apply(actions)

    def _run_until(self, wanted: type[Begin | Collected]) -> Action:
        """Feed the machine from the channel until it asks for `wanted`."""
        setting, machine = self._setting, self._machine
        # A first tick starts the clock. Later on, what has come is heard before the time that has passed.
        pending = self._handle(Tick()) if machine.deadline is None else []
        late = 0
        while True:
            found = self._apply(pending, wanted)
            if found is not None:
                return found
            # Mail goes before the clock, but a party that keeps sending must not keep a round open.
            late += machine.deadline is not None and setting.channel.clock() >= machine.deadline
            if late > _LATE_MAIL * len(self._senders):
                pending, late = self._handle(Tick()), 0
                continue
            message = setting.channel.next(
                task=setting.task,
                kinds=(HELLO, TERM, OPENED),
                senders=self._senders,
                deadline=machine.deadline,
                known_left=machine.gone,
                account=setting.account,
            )
            event: CoordinatorEvent
            if message is None:
                event = Tick()
            elif isinstance(message, Left):
                event = Gone(message.party, message.reason)
            else:
                event = Heard(message.sender, message.kind, message.round, message.payload)
            pending = self._handle(event)

    def _handle(self, event: CoordinatorEvent) -> list[Action]:
        try:
            return self._machine.handle(event, self._setting.channel.clock())
        except PeerViolation as refusal:
            assert isinstance(event, Heard)
            return [Ignored(event.sender, event.round, refusal.message)]

    def _apply(self, actions: list[Action], wanted: type | None = None) -> Action | None:
        found: Action | None = None
        for action in actions:
            if isinstance(action, Begin):
                self._commit(0)
            if isinstance(action, Tell):
                self._tell(action)
            elif isinstance(action, Write):
                self._setting.write(action.round, action.keep)
            elif isinstance(action, Failed):
                raise action.error
            elif isinstance(action, Ignored):
                _report(self._setting, action)
            elif wanted is not None and isinstance(action, wanted):
                found = action
        return found

    def _tell(self, action: Tell) -> None:
        try:
            self._setting.tell(action)
        except PeerFailed as error:  # the machine hears that it has left with the next wait
            _report(self._setting, Ignored(action.receiver, action.round, error.message))


@dataclass(frozen=True, slots=True)
class _CoordinatorRound:
    _driver: CoordinatorDriver
    number: int

    def collect(self) -> Total:
        """The total of this round: waits for all, or for the deadline and then at least the quorum."""
        return self._driver._collect(self.number)

    def publish(self, state: Arrays, *, stop: bool = False) -> None:
        """Send the new global state to everyone; stop: there are no more rounds."""
        self._driver._publish(self.number, state, stop)


class ContributorDriver:
    """Satisfies `core.interfaces.ContributorRounds`."""

    def __init__(self, setting: Setting, me: str) -> None:
        self._setting = setting
        self._wire = Wire(setting.hooks)
        secure_sum = self._wire.around(setting.secure_sum, lambda: self._machine.number)
        self._machine = ContributorMachine(setting.cohort, me, setting.rounds, secure_sum, setting.scene)
        self._state: Arrays = {}
        self._keeper = setting.keeper()
        self._resumed = 0
        self._finished: RoundResult | None = None  # and not committed
        self.sums: Mapping[str, float] = {}  # of the last round that is known

    @property
    def journals(self) -> bool:
        """Whether this party goes on from its last finished round when it is killed."""
        return self._keeper.journals

    @property
    def resumed(self) -> int:
        """The round that this run went on after; 0 when it began anew."""
        return self._resumed

    def start(self, state: Arrays) -> Arrays:
        """Offer this party's first state; the agreed one (the first contributor's) comes back. After a kill: the state
        of the last round that this party had finished.

        Raises:
            PeerFailed: the coordinator ended. RoundTimeout, MessageLost: it did not answer. JobCancelled.
        """
        require_finite(state, what="the first state")
        saved = self._keeper.open()
        if saved is not None:
            return self._rejoin(state, saved)
        pending = self._machine.handle(Join(state))
        ready = self._run_until(pending, Ready, "the first global state")
        assert isinstance(ready, Ready)
        require_same_layout(state, ready.state, what="the first global state")
        self._state, self.sums = ready.state, ready.sums
        self._setting.close_sums(ready.finished)
        # The state to begin with is told once: a coordinator that is killed tells only the last one again.
        over = self._machine.phase is ContributorPhase.FINISHED
        self._keeper.commit(ready.finished, {"over": over, "sums": dict(ready.sums), JOINED: True}, ready.state)
        return ready.state

    def _rejoin(self, state: Arrays, saved: Saved) -> Arrays:
        require_same_layout(state, saved.tensors, what="the state in the journal")
        self._machine.handle(Rejoin(saved.number, saved.tensors, saved.fields["over"]))
        self._state, self.sums = saved.tensors, saved.fields["sums"]
        self._resumed = 0 if saved.fields.get(JOINED) else saved.number
        self._setting.close_sums(saved.number)
        self._setting.emit("resumed", round=saved.number, rounds=self._setting.rounds)
        return saved.tensors

    def _commit(self) -> None:
        finished, self._finished = self._finished, None
        if finished is not None and self._keeper.journals:
            self._keeper.commit(finished.number, {"over": finished.stop, "sums": dict(self.sums)}, finished.state)
            self._setting.close_sums(finished.number)

    def __iter__(self) -> Iterator[_ContributorRound]:
        while self._machine.phase is not ContributorPhase.FINISHED:
            if self._machine.phase is not ContributorPhase.TRAINING:
                raise InternalError(f"rounds cannot go on while {self._machine.phase}: call start, then contribute")
            yield _ContributorRound(self, self._machine.number)
            self._commit()

    def _contribute(self, number: int, arrays: Arrays, weight: float, sums: Mapping[str, float]) -> RoundResult:
        if self._machine.phase is not ContributorPhase.TRAINING or self._machine.number != number:
            raise InternalError(
                f"round {number} has its update already: it is round {self._machine.number}, {self._machine.phase}"
            )
        require_same_layout(self._state, arrays, what=f"the update of round {number}")
        require_finite(arrays, what=f"the update of round {number}")
        self._hear_waiting()
        update = Update(arrays, weight, sums)
        if not self._machine.overtaken:  # a hook keeps account of what is sent, and this would not be
            for hook in self._setting.ordered_hooks():
                update = hook.before_send(update, number)
        offer = Offer(update, self._setting.random(32), self._setting.kept_of(number))
        pending = self._machine.handle(offer)
        del update, offer  # a term may be as large as the model
        done = self._run_until(pending, RoundDone, f"the global state of round {number}")
        assert isinstance(done, RoundDone)
        self._wire.settle(counted=done.result.number == number and self._machine.me in done.result.contributors)
        self._state, self.sums, self._finished = done.result.state, done.result.sums, done.result
        if not self._keeper.journals:  # else when it is committed
            self._setting.close_sums(done.result.number)
        self._setting.emit(
            "round_state",
            conversation=self._setting.task,
            round=done.result.number,
            rounds=self._setting.rounds,
            contributors=list(done.result.contributors),
            sent_bytes=self._setting.channel.sent_bytes(),
        )
        return done.result

    def _hear_waiting(self) -> None:
        """Hear what came while we trained: rounds may have ended without us, or with a term of our earlier life.

        What comes after that one is left for the next round: only what a commit covers may be consumed before it.
        """
        coordinator = self._setting.cohort.coordinator  # that it has left since is no news: its last state counts
        while not self._machine.answered:
            event = self._next(deadline=self._setting.channel.clock(), known_left=(coordinator,), stretch=False)
            if event is None:
                return
            self._perform(self._handle(event))

    def _next(
        self, *, deadline: float | None, known_left: Collection[str] = (), stretch: bool = True
    ) -> ContributorEvent | None:
        setting = self._setting
        coordinator = setting.cohort.coordinator
        message = setting.channel.next(
            task=setting.task,
            kinds=(STATE, ANSWER),
            senders=(coordinator,),
            deadline=deadline,
            known_left=known_left,
            stretch=stretch,
            account=setting.account,
        )
        if message is None:
            return None
        if isinstance(message, Left):
            raise PeerFailed(f"task {setting.task}, round {self._machine.number}: {coordinator} {message.reason}")
        return Heard(message.sender, message.kind, message.round, message.payload)

    def _run_until(self, pending: list[Action], wanted: type[Ready | RoundDone], what: str) -> Action:
        # The coordinator may wait `patience` for others before it answers; twice that is beyond doubt, unless it was
        # killed meanwhile, and opened the round anew.
        # Each answer to a sum of several stages begins a wait of its own.
        limit = (4 if self._setting.channel.durable else 2) * self._setting.patience
        deadline = self._setting.channel.clock() + limit
        while True:
            found = self._perform(pending, wanted)
            if found is not None:
                return found
            event = self._next(deadline=deadline)
            if event is None:
                coordinator = self._setting.cohort.coordinator
                text = f"task {self._setting.task}: {what} did not come from {coordinator} within {limit:g} s"
                raise self._setting.channel.overdue(coordinator, text)
            pending = self._handle(event)
            if any(isinstance(action, Tell) for action in pending):
                deadline = self._setting.channel.clock() + limit

    def _handle(self, event: ContributorEvent) -> list[Action]:
        try:
            return self._machine.handle(event)
        except PeerViolation as refusal:
            assert isinstance(event, Heard)
            return [Ignored(event.sender, event.round, refusal.message)]

    def _perform(self, actions: list[Action], wanted: type | None = None) -> Action | None:
        found: Action | None = None
        for action in actions:
            if isinstance(action, Tell):
                self._setting.tell(action)
            elif isinstance(action, Write):
                self._setting.write(action.round, action.keep)
            elif isinstance(action, Ignored):
                _report(self._setting, action)
            elif wanted is not None and isinstance(action, wanted):
                found = action
        return found


@dataclass(frozen=True, slots=True)
class _ContributorRound:
    _driver: ContributorDriver
    number: int

    def contribute(self, arrays: Arrays, *, weight: float, sums: Mapping[str, float] | None = None) -> RoundResult:
        """Give this party's difference to the round's state; returns when the round's new state is known.

        arrays: float32 by name. weight: at least 0. sums: additive numbers, see Update.

        Raises:
            ProtectionError: names, shapes or values that cannot be summed; nothing was sent.
            PeerFailed, RoundTimeout, MessageLost, JobCancelled: the round did not end.
        """
        return self._driver._contribute(self.number, arrays, weight, sums or {})


class HolderDriver:
    """The key holder's side of one conversation: it answers the coordinator until that has no more rounds."""

    def __init__(self, setting: Setting) -> None:
        if setting.scene is None:
            raise InternalError("a key holder needs the scene of its sums")
        self._setting, self._scene = setting, setting.scene
        self._keeper = setting.keeper()

    def run(self) -> None:
        """Serve the sums; returns when the coordinator says that it was the last one.

        Raises:
            PeerFailed: the coordinator ended before. ProtectionError: it asked for what may not be opened.
            JobCancelled.
        """
        setting = self._setting
        saved = self._keeper.open()
        machine = setting.secure_sum.holder(self._scene, setting.random(32), setting.kept_of(0))
        heard = 0 if saved is None else saved.number
        while True:
            message = setting.channel.next(
                task=setting.task,
                kinds=(ASK,),
                senders=(setting.cohort.coordinator,),
                deadline=None,
                account=setting.account,
            )
            assert message is not None
            if isinstance(message, Left):
                raise PeerFailed(f"task {setting.task}, key holder: {message.party} {message.reason}")
            if message.payload.fields.get("stage") == "over":
                setting.close_sums(0)
                return
            try:
                actions = machine.handle(SumReceived(message.sender, message.payload))
            except PeerViolation as refusal:
                _report(setting, Ignored(message.sender, message.round, refusal.message))
                continue
            for action in actions:
                if isinstance(action, SumKeep):
                    setting.write(0, action)
                elif isinstance(action, SumSend):
                    setting.tell(Tell(action.receiver, OPENED, message.round, action.body))
            if machine.idle:  # every commit has a number of its own
                heard += 1
                self._keeper.commit(heard, {"over": False, "sums": {}}, {})


def _report(setting: Setting, action: Ignored) -> None:
    setting.emit("ignored", party=action.party, round=action.round, why=action.why)
