"""Recorded events give the same actions again; and any order of events, honest or not, keeps what is promised."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fate_llm.core.canonical import canonical_json
from fate_llm.core.errors import FateError, ProtectionError, QuorumLost
from fate_llm.core.interfaces import SumContribute, SumEvent, SumExpired, SumReceived
from fate_llm.core.values import Payload, Update
from fate_llm.protocols.secagg.party import MaskingParty, Phase
from fate_llm.protocols.secagg.server import MaskingServer
from fate_llm.protocols.strict_json import read_json
from fate_llm.protocols.tensors import read_tensors, write_tensors
from tests.masking import Masking, Message, action_bytes, body_bytes, same_total
from tests.protocols.secagg.checks import chi_square, dies, present_in, said_once

# --- replay -----------------------------------------------------------------------------------------------------


def written(event: SumEvent) -> list[bytes]:
    """An event as it would lie in a file."""
    if isinstance(event, SumExpired):
        return [b"expired"]
    if isinstance(event, SumReceived):
        return [b"received", event.sender.encode(), *_body(event.body)]
    term = Payload({"weight": event.update.weight, "sums": dict(event.update.sums)}, event.update.arrays)
    kept = [part for name, body in event.kept.items() for part in (name.encode(), *_body(body))]
    return [b"contribute", event.seed, *_body(term), *kept]


def _body(body: Payload) -> list[bytes]:
    return [canonical_json(dict(body.fields)), b"".join(bytes(part) for part in write_tensors(body.tensors))]


def read(parts: list[bytes]) -> SumEvent:
    if parts[0] == b"expired":
        return SumExpired()
    if parts[0] == b"received":
        return SumReceived(parts[1].decode(), _payload(parts[2:4]))
    term = _payload(parts[2:4])
    update = Update(term.tensors, term.fields["weight"], term.fields["sums"])
    kept = {parts[at].decode(): _payload(parts[at + 1 : at + 3]) for at in range(4, len(parts), 3)}
    return SumContribute(update, parts[1], kept)


def _payload(parts: list[bytes]) -> Payload:
    return Payload(read_json(parts[0]), read_tensors(memoryview(parts[1])))


@pytest.mark.parametrize("through_bytes", [False, True])
@pytest.mark.parametrize(
    "settings_",
    [{}, {"own": True, "count": 5}, {"change": dies(["p003"], "masked")}, {"kill": ("p001", 2, 1)}, {"layout": {}}],
    ids=["plain", "own", "drop-out", "killed", "numbers"],
)
def test_a_recorded_log_replays_to_identical_actions(settings_: dict[str, Any], through_bytes: bool) -> None:
    masking = Masking(**settings_)
    # Among the events there is also one that is refused
    masking.contribute()
    message = masking.until("shares", "p002")
    masking.queue.appendleft(message)
    body = Payload({"stage": "shares", "parties": ["p000"]}, message.body.tensors)
    wrong = Message(masking.coordinator, "p002", body, False)
    with pytest.raises(ProtectionError):
        masking.deliver(wrong)
    masking.finish()
    machines: dict[str, Any] = {}
    compared = 0
    for who, event, actions in masking.log:
        if who not in machines or isinstance(event, SumContribute):
            scene = masking.scene(masking.coordinator if who == "z" else who)
            machines[who] = masking.secure_sum.server(scene) if who == "z" else masking.secure_sum.party(scene)
        again = read(written(event)) if through_bytes else event
        try:
            found: list[Any] = machines[who].handle(again)
        except FateError as error:
            found = [error]
        assert [action_bytes(action) for action in found] == [action_bytes(action) for action in actions]
        compared += len(found)
    assert compared > 20


def test_no_machine_reads_a_clock_or_draws() -> None:
    """Two courses of the same round are the same to the byte."""
    one, other = Masking(4), Masking(4)
    one.run()
    other.run()
    assert [body_bytes(m.body) for m in one.sent] == [body_bytes(m.body) for m in other.sent]


# --- anything in any order --------------------------------------------------------------------------------------


class Adversary(RuleBasedStateMachine):
    """Five parties (threshold 4), a network that reorders, doubles and loses, crashes, and a coordinator that lies."""

    @initialize(late=st.booleans(), told=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=5))
    def begin(self, late: bool, told: list[tuple[int, int]]) -> None:
        """late: all vectors are in, and the coordinator has told these parties (first) of a set without one."""
        self.masking = Masking(5)
        self.masking.contribute()
        self.lost: set[str] = set()
        self.over = False
        while late and not list(self.masking.messages("survivors", to_server=False)):
            self.masking.deliver(self.masking.queue.popleft())
        for receiver, without in told if late else []:
            self.ask_for_another_set(receiver, "survivors", without)

    def _try(self, message: Message) -> None:
        try:
            self.masking.deliver(message)
        except (ProtectionError, QuorumLost):
            if message.to_server:
                self.over = True

    @precondition(lambda self: self.masking.queue)
    @rule(choice=st.integers(0, 60), times=st.integers(1, 40))
    def deliver(self, choice: int, times: int) -> None:
        for number in range(times):
            if not self.masking.queue:
                return
            ways = list(dict.fromkeys((m.sender, m.receiver, m.to_server) for m in self.masking.queue))
            way = ways[(choice + number) % len(ways)]
            message = next(m for m in self.masking.queue if (m.sender, m.receiver, m.to_server) == way)
            self.masking.queue.remove(message)
            if message.sender not in self.lost and message.receiver not in self.lost:
                self._try(message)

    @rule(choice=st.integers(0, 200))
    def deliver_an_old_one_again(self, choice: int) -> None:
        self._try(self.masking.sent[choice % len(self.masking.sent)])

    @precondition(lambda self: not self.over and self.masking.total is None and not self.masking.queue)
    @rule()
    def time_is_over(self) -> None:
        try:
            self.masking._act("z", SumExpired(), self.masking._handle("z", SumExpired()))
        except (ProtectionError, QuorumLost):
            self.over = True

    @precondition(lambda self: len(self.lost) < 2)
    @rule(number=st.integers(0, 4))
    def lose_a_party(self, number: int) -> None:
        self.lost.add(self.masking.names[number])

    @rule(number=st.integers(0, 4))
    def kill_a_party(self, number: int) -> None:
        name = self.masking.names[number]
        with contextlib.suppress(ProtectionError):
            self.masking.restart(name)

    @precondition(lambda self: not self.over)
    @rule()
    def kill_the_coordinator(self) -> None:
        try:
            self.masking.restart("z")
        except (ProtectionError, QuorumLost):
            self.over = True

    @rule(receiver=st.integers(0, 4), stage=st.sampled_from(["shares", "survivors"]), without=st.integers(0, 5))
    def ask_for_another_set(self, receiver: int, stage: str, without: int) -> None:
        """The coordinator tells one party of a set without somebody, well made and large enough."""
        name, told = self._told(receiver, stage)
        if told is None:
            return
        before = told.fields["parties"]
        parties = [one for one in before if one != self.masking.names[without % 5] or without == 5]
        others = [one for one in before if one != name]
        tensors = {}
        if stage == "shares":
            tensors["sealed"] = told.tensors["sealed"][[others.index(one) for one in parties if one != name]]
        self._try(Message("z", name, Payload({"stage": stage, "parties": parties}, tensors), False))

    def _told(self, receiver: int, stage: str) -> tuple[str, Payload | None]:
        name = self.masking.names[receiver]
        if stage == "survivors":
            machine = self.masking.parties[name]
            assert isinstance(machine, MaskingParty)
            return name, Payload({"parties": list(machine._sharing)}) if machine._sharing else None
        told = [m for m in self.masking.sent if not m.to_server and m.stage == stage and m.receiver == name]
        return name, told[0].body if told else None

    @rule(receiver=st.integers(0, 4), leave_out=st.integers(0, 9))
    def show_what_others_signed(self, receiver: int, leave_out: int) -> None:
        """Every signature there is, for whatever set it was, under the set that this party has signed."""
        name = self.masking.names[receiver]
        given = {m.sender: m.body.tensors["signature"] for m in self.masking.messages("consent", to_server=True)}
        parties = [one for at, one in enumerate(given) if at != leave_out]
        signatures = np.concatenate([given[one] for one in parties]) if parties else np.zeros((0, 64), np.uint8)
        body = Payload({"stage": "consents", "parties": parties}, {"signatures": signatures})
        self._try(Message("z", name, body, False))

    @rule(receiver=st.integers(0, 4), among=st.lists(st.integers(0, 4), max_size=6))
    def ask_for_nonsense(self, receiver: int, among: list[int]) -> None:
        parties = [self.masking.names[number] for number in among]
        body = Payload({"stage": "survivors", "parties": parties})
        self._try(Message("z", self.masking.names[receiver], body, False))

    # --- what holds whatever happens --------------------------------------------------------------------------

    @invariant()
    def nobody_answers_twice(self) -> None:
        given: dict[str, set[bytes]] = {}
        for message in self.masking.messages("unmask", to_server=True):
            given.setdefault(message.sender, set()).add(body_bytes(message.body))
        assert all(len(one) == 1 for one in given.values())

    @invariant()
    def both_shares_of_a_party_are_never_open(self) -> None:
        """Of one transcript: fewer than the threshold of one of the two kinds, for every party."""
        of_seed: dict[tuple[bytes, str], set[str]] = {}
        of_key: dict[tuple[bytes, str], set[str]] = {}
        sets: dict[bytes, set[tuple[str, ...]]] = {}
        for name in {m.sender for m in self.masking.messages("unmask", to_server=True)}:
            machine = self.masking.parties[name]
            assert isinstance(machine, MaskingParty)
            if machine.phase is not Phase.ANSWERED:
                continue  # it was killed, and says the same when it is asked again
            sets.setdefault(machine._masking, set()).add(machine._survivors)
            for party in machine._sharing:
                kind = of_seed if party in machine._survivors else of_key
                kind.setdefault((machine._masking, party), set()).add(name)
        assert all(len(one) == 1 for one in sets.values())
        assert not of_seed.keys() & of_key.keys()

    @invariant()
    def a_total_is_the_exact_sum_over_enough(self) -> None:
        masking = self.masking
        if masking.total is None:
            return
        assert len(masking.total.contributors) >= 4
        assert same_total(masking.total, masking.exact(masking.total.contributors, present_in(masking)))

    @invariant()
    def vectors_are_masked_once(self) -> None:
        vectors: dict[str, set[bytes]] = {}
        for message in self.masking.messages("masked", to_server=True):
            vectors.setdefault(message.sender, set()).add(body_bytes(message.body))
        assert all(len(one) == 1 for one in vectors.values())

    def teardown(self) -> None:
        if hasattr(self, "masking") and isinstance(self.masking.server, MaskingServer) and not self.over:
            assert self.masking.server.least == 4


TestAdversary = Adversary.TestCase
TestAdversary.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)


def test_an_honest_course_keeps_all_of_it() -> None:
    """The invariants are not empty: an undisturbed course reaches the end under them."""
    machine = Adversary()
    machine.begin(False, [])
    while machine.masking.queue:
        machine.deliver(0, 5)
        for check in (
            machine.nobody_answers_twice,
            machine.both_shares_of_a_party_are_never_open,
            machine.a_total_is_the_exact_sum_over_enough,
            machine.vectors_are_masked_once,
        ):
            check()
    assert machine.masking.total is not None
    assert sum(1 for _ in machine.masking.messages("unmask", to_server=True)) >= 4
    said_once(machine.masking)
    words = next(machine.masking.messages("masked", to_server=True)).body.tensors["words"]
    assert abs(chi_square(words)) < 8
