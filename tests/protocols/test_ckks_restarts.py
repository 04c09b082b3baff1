"""A side of a sum under CKKS is killed between any two of its actions, and started again with what it had kept.

As the rounds do it: a contributor and the coordinator hear again all that came in this round, the key holder only what
it had not finished. Who sends something again that had arrived is not heard twice: the channel knows it by its number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from fate_llm.core.errors import PeerViolation, ProtectionError, QuorumLost, UnsafeRequest
from fate_llm.core.interfaces import SumContribute, SumExpired, SumFinished, SumKeep, SumReceived
from fate_llm.core.values import Payload, Update
from fate_llm.protocols.homomorphic.agreed import Agreed
from fate_llm.protocols.homomorphic.server import Server
from fate_llm.security.ckks import SLOTS
from tests.protocols.homomorphic_sums import (
    COORDINATOR,
    HOLDER,
    Sum,
    quicken,
    require_within_bound,
    seed,
)

pytest.importorskip("tenseal")

LAYOUT = {"w": (2 * SLOTS + 500,)}
SCENES = {"": {"layout": LAYOUT, "state": {}}}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known keys, and a ciphertext in each message, so that every term has three."""
    quicken(monkeypatch)
    monkeypatch.setattr("fate_llm.protocols.homomorphic.messages.CHUNK", 1)


def term(party: str) -> Update:
    draw = np.random.default_rng(ord(party))
    return Update({"w": draw.uniform(-1, 1, LAYOUT["w"]).astype(np.float32)}, 2.0**20, {"n": float(ord(party))})


@dataclass
class Mortal(Sum):
    """A sum in which `victim` dies after `actions` actions of what its `event`th event made it do."""

    victim: str = ""
    event: int = -1
    actions: int = 0
    heard: dict[str, list[Any]] = field(default_factory=dict)
    passed: Counter[tuple[str, str, bool]] = field(default_factory=Counter)
    again: Counter[tuple[str, str, bool]] = field(default_factory=Counter)
    fed: dict[str, Update] = field(default_factory=dict)
    committed: Counter[tuple[str, str, bool]] = field(default_factory=Counter)
    died: bool = False

    def feed(self, side: str, event: Any) -> None:
        log = self.heard.setdefault(side, [])
        log.append(event)
        if side == HOLDER:  # it is committed before each event
            self.committed = Counter(self.again)
        actions = self.machine(side).handle(event)
        if side != self.victim or len(log) - 1 != self.event or self.died:
            self.do(side, actions)
            return
        self.do(side, actions[: self.actions])
        self.died = True
        self.restart(side)

    def machine(self, side: str) -> Any:
        return {COORDINATOR: self.server, HOLDER: self.holder}.get(side) or self.parties[side]

    def do(self, side: str, actions: list[Any]) -> None:
        for action in actions:
            if isinstance(action, SumKeep):
                self.kept.setdefault(side, {})[action.name] = action
            elif isinstance(action, SumFinished):
                self.total = action.total
            else:
                to_holder = action.to_holder
                key = (side, action.receiver, to_holder)
                self.again[key] += 1
                if self.again[key] > self.passed[key]:
                    self.passed[key] += 1
                    self.post(side, action.receiver, action.body, to_holder or side == HOLDER)

    def restart(self, side: str) -> None:
        kept = {name: keep.body for name, keep in self.kept.get(side, {}).items()}
        log, self.heard[side] = self.heard[side], []
        if side == HOLDER:
            self.holder = self.protection.holder(self.holder_scene(), b"!" * 32, kept)
            self.again = Counter(self.committed)
            self.feed(side, log[-1])  # what came before it was finished with
            return
        for key in [key for key in self.again if key[0] == side]:
            self.again[key] = 0
        if side == COORDINATOR:
            self.server = self.protection.server(self.scene(side), kept=kept)
        else:
            self.parties[side] = self.protection.party(self.scene(side))
            log[0] = SumContribute(self.fed[side], b"!" * 32, kept)
        for event in log:
            self.feed(side, event)

    def contribute(self, party: str, given: Update) -> None:
        self.fed[party] = given
        self.feed(party, SumContribute(given, seed(party)))

    def deliver(self, sender: str, receiver: str, body: Payload, holder: bool) -> None:
        if receiver == COORDINATOR:
            self.feed(COORDINATOR, SumReceived(sender, body, holder))
        else:
            self.feed(HOLDER if holder else receiver, SumReceived(sender, body))


def deaths() -> Iterator[tuple[str, int, int]]:
    """Every place where a side can die: in a run without deaths, after each number of actions of each event."""
    yield from ((COORDINATOR, event, actions) for event in range(16) for actions in range(4))
    yield from ((HOLDER, event, actions) for event in range(4) for actions in range(3))
    yield from (("b", event, actions) for event in range(3) for actions in range(3))


def run_with(victim: str, event: int, actions: int) -> None:
    terms = {p: term(p) for p in "abc"}
    run = Mortal(scenes=SCENES, victim=victim, event=event, actions=actions)
    total = run.of(terms)
    assert run.died, "nobody died: the test looks at an event that there is not"
    require_within_bound(total, list(terms.values()))
    assert (total.weight, total.sums["n"]) == (3 * 2.0**20, float(sum(map(ord, "abc"))))


SOME = list(deaths())[::5]


@pytest.mark.parametrize(("victim", "event", "actions"), SOME)
def test_the_sum_comes_out_whoever_dies_when(victim: str, event: int, actions: int) -> None:
    run_with(victim, event, actions)


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "event", "actions"), [death for death in deaths() if death not in SOME])
def test_the_sum_comes_out_whoever_dies_whenever(victim: str, event: int, actions: int) -> None:
    run_with(victim, event, actions)


def test_a_run_without_deaths_has_as_many_events_as_are_tried() -> None:
    run = Mortal(scenes=SCENES)
    run.of({p: term(p) for p in "abc"})
    assert {side: len(log) for side, log in run.heard.items()} == {COORDINATOR: 16, HOLDER: 4, "a": 3, "b": 3, "c": 3}


def finished() -> Mortal:
    run = Mortal(scenes=SCENES)
    run.of({p: term(p) for p in "abc"})
    return run


def kept(run: Sum, side: str, *names: str) -> dict[str, Payload]:
    return {name: keep.body for name, keep in run.kept[side].items() if not names or name in names}


def test_a_coordinator_that_hears_everything_again_says_the_same_bytes() -> None:
    run = finished()
    said = [m for m in run.sent if m[0] == COORDINATOR]
    server = run.protection.server(run.scene(COORDINATOR), kept=kept(run, COORDINATOR))
    again = [action for event in run.heard[COORDINATOR] for action in server.handle(event)]
    sends = [a for a in again if not isinstance(a, SumKeep | SumFinished)]
    assert len(sends) == len(said)
    for action, (_, receiver, body, _) in zip(sends, said, strict=True):
        assert (action.receiver, action.body.fields) == (receiver, body.fields)
        assert {n: t.tobytes() for n, t in action.body.tensors.items()} == {
            n: t.tobytes() for n, t in body.tensors.items()
        }


def test_a_key_holder_that_was_killed_opens_the_same_bytes_and_nothing_else() -> None:
    run = finished()
    holder = run.protection.holder(run.holder_scene(), b"!" * 32, kept(run, HOLDER))
    said = [m[2] for m in run.sent if m[2].fields["stage"] == "opened"]
    asked = [m[2] for m in run.sent if m[2].fields["stage"] == "open"]
    for request, answer in zip(asked, said, strict=True):
        (again,) = holder.handle(SumReceived(COORDINATOR, request))
        assert again.body.fields == answer.fields
        assert again.body.tensors["words"].tobytes() == answer.tensors["words"].tobytes()
    # another sum of the round is refused by the new life as well
    fields = dict(asked[0].fields)
    with pytest.raises(UnsafeRequest, match="another sum of it is not"):
        holder.handle(
            SumReceived(COORDINATOR, Payload({**fields, "sizes": asked[1].fields["sizes"]}, asked[1].tensors))
        )


def test_a_key_holder_without_its_keys_opens_nothing_more() -> None:
    run = finished()
    holder = run.protection.holder(run.holder_scene(), b"!" * 32, kept(run, HOLDER, "answered.1"))
    with pytest.raises(PeerViolation, match="no keys"):
        holder.handle(SumReceived(COORDINATOR, run.said("open")[0][2]))


def test_what_is_secret_is_kept_as_secret_and_what_must_last_as_lasting() -> None:
    run = finished()
    kinds = {
        side: {name: (keep.secret, keep.lasting) for name, keep in keeps.items()} for side, keeps in run.kept.items()
    }
    assert kinds == {
        HOLDER: {"keys": (True, False), "answered.1": (False, True)},
        COORDINATOR: {"keys": (False, False), "parties": (False, False), "survivors": (False, False)},
        **{p: {"seed": (True, False)} for p in "abc"},
    }
    secret = run.kept[HOLDER]["keys"].body
    assert set(secret.tensors) == {"context", "seed"}
    assert "context" not in run.kept[HOLDER]["answered.1"].body.tensors


def test_what_must_not_be_drawn_or_said_twice_is_written_down_before_it_is_said() -> None:
    order: list[tuple[str, str]] = []

    class Watched(Mortal):
        def do(self, side: str, actions: list[Any]) -> None:
            names = [
                a.name if isinstance(a, SumKeep) else a.body.fields["stage"]
                for a in actions
                if a.__class__ is not SumFinished
            ]
            order.extend((side, name) for name in names)
            super().do(side, actions)

    Watched(scenes=SCENES).of({p: term(p) for p in "abc"})
    places = [(COORDINATOR, "parties", "context"), (COORDINATOR, "keys", "context"), (COORDINATOR, "survivors", "open")]
    places += [(HOLDER, "answered.1", "opened"), (HOLDER, "keys", "keys"), ("a", "seed", "ready")]
    for side, kept_as, said in places:
        assert order.index((side, kept_as)) <= order.index((side, said))
    opened = [name for side, name in order if side == HOLDER]
    assert opened == ["keys", "keys", *["answered.1", "opened"] * 3]


def test_who_was_left_out_before_the_kill_is_left_out_after_it() -> None:
    # Given a sum of four, of whom `d` was too late, that is being opened
    run = Mortal(4, quorum=3, scenes=SCENES)
    terms = {p: term(p) for p in "abcd"}
    run.touch = lambda s, r, body: None if s == "d" and body.fields["stage"] == "upload" else body
    for party, given in terms.items():
        run.contribute(party, given)
    run.run()
    run.feed(COORDINATOR, SumExpired())
    assert [m[2].fields["stage"] for m in run.waiting] == ["open", "open"]
    # When the coordinator is killed, and hears `d` after all
    server = run.protection.server(run.scene(COORDINATOR), kept=kept(run, COORDINATOR))
    assert server.able == frozenset("abc")
    ready = next(e for e in run.heard[COORDINATOR] if e.sender == "d")
    with pytest.raises(PeerViolation, match="not part of this sum any more"):
        server.handle(ready)
    # Then it asks for the same sum, and for no other
    asks = []
    for event in run.heard[COORDINATOR]:
        if isinstance(event, SumReceived) and event.sender != "d":
            asks += [a for a in server.handle(event) if not isinstance(a, SumKeep) and a.to_holder]
    opened = [a.body for a in asks if a.body.fields["stage"] == "open"]
    assert [body.fields for body in opened] == [m[2].fields for m in run.waiting]


def test_a_sum_that_was_being_opened_is_not_one_of_fewer() -> None:
    # Given a sum of four that was being opened, of which three would be enough
    run = Mortal(4, quorum=3, scenes=SCENES)
    run.of({p: term(p) for p in "abcd"})
    # When the coordinator was killed, and one of them does not come again
    server = run.protection.server(run.scene(COORDINATOR), kept=kept(run, COORDINATOR))
    for event in run.heard[COORDINATOR]:
        if isinstance(event, SumReceived) and event.sender in "abck" and "words" not in event.body.tensors:
            server.handle(event)
    assert server.awaiting == {"d"}
    with pytest.raises(QuorumLost, match="not whole any more; missing: d"):
        server.handle(SumExpired())


def test_who_had_a_turn_before_the_kill_has_it_after_it() -> None:
    """What is said to a party has numbers: a coordinator that is there again says the same in the same order."""
    run = Mortal(5, scenes=SCENES)
    agreed = Agreed(run.scene(COORDINATOR), 1.0, 2.0**20, False)
    run.server = Server(agreed, {}, room=0)
    run.of({p: term(p) for p in "abcde"})
    server = Server(agreed, kept(run, COORDINATOR), room=0)
    heard = [event for event in run.heard[COORDINATOR] if event.sender != HOLDER]
    said: dict[str, list[str]] = {p: [] for p in "abcde"}
    # all are ready at once, and uploads come in another order than before; two at once have a turn
    for event in sorted(heard, key=lambda event: (event.body.fields["stage"] == "upload", -ord(event.sender))):
        for action in server.handle(event):
            if not isinstance(action, SumKeep) and not action.to_holder:
                said[action.receiver].append(action.body.fields["stage"])
    assert said == {p: ["context", "next"] for p in "abcde"}


def test_another_seed_than_the_kept_one_is_not_used() -> None:
    run = Sum(scenes=SCENES)
    run.contribute("a", term("a"))
    party = run.protection.party(run.scene("a"))
    actions = party.handle(SumContribute(term("a"), b"!" * 32, kept(run, "a")))
    assert actions[0].body.tensors["seed"].tobytes() == seed("a")
    assert (party._term.values == run.parties["a"]._term.values).all()


def test_kept_keys_that_are_damaged_are_refused() -> None:
    run = finished()
    body = run.kept[HOLDER]["keys"].body
    cut = Payload(body.fields, {**body.tensors, "context": body.tensors["context"][:-50]})
    with pytest.raises(ProtectionError, match="damaged"):
        run.protection.holder(run.holder_scene(), b"!" * 32, {"keys": cut})
