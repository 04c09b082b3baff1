"""Killed at every step, started again out of what was kept: one sum, one answer, the same bytes a second time."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fate_llm.core.errors import PeerViolation, QuorumLost, UnsafeRequest
from fate_llm.core.interfaces import SumContribute, SumExpired, SumKeep, SumReceived, SumSend
from fate_llm.core.values import Payload, Total, Update
from fate_llm.protocols.secagg.messages import PublicKeys
from fate_llm.protocols.secagg.party import MaskingParty, Phase, _Secrets
from fate_llm.security.pairwise import MaskKey
from tests.masking import Masking, action_bytes, body_bytes, make_update, names_of, same_total
from tests.protocols.secagg.checks import (
    answers_of,
    check_exact,
    check_nothing_redrawn,
    check_other_survivors_after_a_crash,
    dies,
    machine_secrets,
    nothing_opened,
    present_in,
    said_once,
)


@cache
def undisturbed(own: bool, lost: str = "") -> tuple[Masking, Total]:
    masking = _masking(own, lost)
    return masking, masking.run()


def _masking(own: bool, lost: str = "", **settings: Any) -> Masking:
    change = dies(["p003"], lost) if lost else (lambda message: [message])
    return Masking(5 if own else 4, own=own, change=change, **settings)


def points(who: str, own: bool, lost: str = "") -> list[tuple[str, int, int]]:
    """Every moment at which `who` can be killed: after each event, and before and between its actions."""
    masking, _ = undisturbed(own, lost)
    events = [actions for one, _, actions in masking.log if one == who]
    return [(who, number, done) for number, actions in enumerate(events) for done in range(len(actions) + 1)]


# --- a party ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["", "masked", "shares", pytest.param("consent", marks=pytest.mark.slow)])
def test_a_party_killed_at_any_step(lost: str) -> None:
    plain, total = undisturbed(False, lost)
    names = plain.names[:3] if lost else plain.names[1:2]
    for kill in [point for name in names for point in points(name, False, lost)]:
        masking = _masking(False, lost, kill=kill)
        masking.run()
        assert masking.kill is None and masking.lives == {kill[0]: 1}, kill
        assert not masking.refused, (kill, masking.refused)
        said_once(masking)
        assert len(answers_of(masking, kill[0])) <= 1
        assert masking.total is not None and same_total(masking.total, total), kill


def test_a_party_that_trained_again_with_another_outcome_sends_what_it_had_masked() -> None:
    """A GPU does not compute the same twice. Two vectors under the same masks would show their difference."""
    check_nothing_redrawn()


def test_a_party_that_trained_again_before_its_vector_was_kept_sends_the_new_one() -> None:
    """Nothing of the old one had left."""
    plain, _ = undisturbed(False)
    later = make_update(1, weight=7.0)
    other = Update({name: -array for name, array in later.arrays.items()}, 7.0, later.sums)
    masking = _masking(False, kill=("p001", 1, 1), later={"p001": other})
    total = masking.run()
    masking.updates["p001"] = other
    assert same_total(total, masking.exact(masking.names))
    assert plain.total is not None and not same_total(total, plain.total)
    said_once(masking)


def test_a_crash_of_many_parties_at_once() -> None:
    for step in range(0, 30, 3):
        masking = _masking(False)
        masking.contribute()
        for _ in range(step):
            if masking.queue:
                masking.deliver(masking.queue.popleft())
        for name in masking.names:
            masking.restart(name)
        masking.finish()
        check_exact(masking)
        said_once(masking)


def test_a_party_killed_again_and_again() -> None:
    masking = _masking(False)
    masking.contribute()
    while masking.total is None and masking.queue:
        message = masking.queue.popleft()
        masking.deliver(message)
        if not message.to_server:
            masking.restart(message.receiver)
    check_exact(masking)
    assert all(masking.lives[name] >= 3 for name in masking.names[:3])
    said_once(masking)


def test_other_lists_after_a_crash_are_refused() -> None:
    check_other_survivors_after_a_crash()


def test_other_keys_after_the_vector_was_masked_are_refused() -> None:
    """The coordinator brings a corrupt party's second pair of keys once the victim has crashed: another transcript,
    under which the same masks would be needed again."""
    masking, _ = undisturbed(False)
    other = Masking(4, updates=dict(masking.updates))
    # Given p003 with other randomness in a second course of the same round
    given = hashlib.sha256(b"other randomness").digest()
    other.contribute("p000", "p001", "p002")
    event = SumContribute(other.updates["p003"], given)
    other._act("p003", event, other.parties["p003"].handle(event))
    other.finish()
    # When p001 comes back with what it had kept in the first course, and is told of the second
    machine = other.secure_sum.party(other.scene("p001"))
    assert isinstance(machine, MaskingParty)
    machine.handle(SumContribute(other.updates["p001"], bytes(32), masking.kept["p001"]))
    told = [m for m in other.sent if not m.to_server and m.receiver == "p001"]
    machine.handle(SumReceived("z", told[0].body))
    # Then it says nothing under it
    with pytest.raises(UnsafeRequest, match="was masked under"):
        machine.handle(SumReceived("z", told[1].body))
    assert machine.phase is Phase.SHARED


def test_what_is_kept_and_what_of_it_is_secret() -> None:
    masking, _ = undisturbed(False)
    keeps = [(a.name, a.secret, a.lasting) for w, _, acts in masking.log for a in acts if w == "p001" and _kept(a)]
    assert keeps == [
        ("seed", True, False),
        ("masked", False, False),
        ("consent", False, False),
        ("answered", False, True),
    ]
    for name in masking.names:
        secrets = {masking.seed(name)}
        for message in masking.sent:  # the seed goes nowhere
            assert not any(secret in body_bytes(message.body) for secret in secrets)
    server = [(a.name, a.secret, a.lasting) for w, _, acts in masking.log for a in acts if w == "z" and _kept(a)]
    assert server == [(name, False, False) for name in ("keys", "shares", "masked", "consent")]


def _kept(action: object) -> bool:
    return isinstance(action, SumKeep)


def test_nothing_is_said_before_what_it_rests_on_is_kept() -> None:
    """In every list of actions the keeping comes first: a kill in between leaves more on disk than was said."""
    masking, _ = undisturbed(False)
    for _, _, actions in masking.log:
        kinds = [isinstance(action, SumKeep) for action in actions]
        assert kinds == sorted(kinds, reverse=True)
        assert not any(kinds) or len(kinds) > 1


def test_secrets_are_forgotten_with_the_answer() -> None:
    """Nothing that a party's masks follow from is left in it once it has answered."""
    masking = _masking(False)
    masking.contribute()
    secrets = machine_secrets(masking, "p000")
    private = {masking.seed("p000"), secrets.channel.secret, secrets.mask.secret, secrets.self_seed}
    machine = masking.parties["p000"]
    assert isinstance(machine, MaskingParty)
    while machine.phase is not Phase.ANSWERED:
        held = _bytes_in([getattr(machine, name) for name in machine.__slots__])
        assert private & held or machine.phase is Phase.NEW
        masking.deliver(masking.queue.popleft())
    held = _bytes_in([getattr(machine, name) for name in machine.__slots__])
    assert not private & held
    shares = next(m for m in masking.messages("unmask", to_server=True)).body.tensors["shares"]
    assert not {row.tobytes() for row in shares} & held


def _bytes_in(value: object) -> set[bytes]:
    """All bytes that an object leads to through containers, dataclasses and keys."""
    if isinstance(value, bytes):
        return {value, value[:66], value[66:]}
    if isinstance(value, MaskKey):
        return {value.secret}
    if isinstance(value, dict):
        value = list(value.values())
    elif isinstance(value, _Secrets | PublicKeys | Payload):
        value = [getattr(value, name) for name in value.__slots__]
    if isinstance(value, list | tuple):
        return set[bytes]().union(*(_bytes_in(one) for one in value))
    return set()


def test_a_round_that_was_closed_gives_nothing_any_more() -> None:
    """Of a closed round the journal has what is lasting, and that is no secret."""
    masking, _ = undisturbed(False)
    answered = masking.kept["p001"]["answered"]
    assert set(answered.fields) == {"attempt", "survivors"} and not answered.tensors
    machine = masking.secure_sum.party(masking.scene("p001"))
    assert machine.handle(SumContribute(masking.updates["p001"], bytes(32), {"answered": answered})) == []
    with pytest.raises(PeerViolation):
        machine.handle(SumReceived("z", Payload({"stage": "survivors", "parties": list(masking.names)})))


# --- the coordinator --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "lost"),
    [
        (False, ""),
        (False, "masked"),
        (False, "consent"),
        (True, "masked"),
        pytest.param(True, "", marks=pytest.mark.slow),
        pytest.param(True, "consent", marks=pytest.mark.slow),
    ],
)
def test_a_coordinator_killed_at_any_step(own: bool, lost: str) -> None:
    _, total = undisturbed(own, lost)
    for kill in points("z", own, lost):
        masking = _masking(own, lost, kill=kill)
        found = masking.run()
        assert masking.kill is None and masking.lives == {"z": 1}, kill
        assert same_total(found, total), kill
        assert not masking.refused, (kill, masking.refused)
        said_once(masking)


def test_a_coordinator_that_hears_everything_in_another_order_tells_the_same() -> None:
    """Consents end early: with the first three in one life, and with the same three in the next, whatever order."""
    for number in range(6):
        masking = _masking(False)
        masking.contribute()
        while not list(masking.messages("consents", to_server=False)):
            masking.deliver(masking.queue.popleft())
        masking.pump() if number % 2 else None
        heard = masking.heard["z"]
        # Links keep their order, and nothing between them is certain.
        order = sorted(range(len(heard)), key=lambda at: (["keys", "shares", "masked", "consent", "unmask"].index(
            heard[at].stage), hashlib.sha256(f"{number} {heard[at].sender}".encode()).digest()))  # fmt: skip
        masking.heard["z"] = [heard[at] for at in order]
        masking.total = None
        masking.restart("z")
        masking.finish()
        check_exact(masking)
        said_once(masking)


@settings(max_examples=25, deadline=None)
@given(steps=st.integers(0, 40), choices=st.lists(st.integers(0, 9), max_size=40), twice=st.booleans())
def test_what_parties_had_said_comes_again_interleaved_in_any_way(steps: int, choices: list[int], twice: bool) -> None:
    """Each link keeps its order; after a kill what one party said last may come before what another said first."""
    masking = _masking(False)
    masking.contribute()
    for _ in range(steps):
        if masking.queue and masking.total is None:
            masking.deliver(masking.queue.popleft())
    links = {name: [m for m in masking.heard.get("z", []) if m.sender == name] for name in masking.names}
    order: list[Any] = []
    for choice in [*choices, *range(100)]:
        link = links[masking.names[choice % 4]]
        order += [link.pop(0)] * (1 + twice) if link else []
    masking.heard["z"] = order
    masking.restart("z")
    masking.finish()
    assert not masking.refused
    check_exact(masking)
    said_once(masking)


def test_a_party_that_is_not_heard_again_is_waited_for_once() -> None:
    """A coordinator that had told who is in cannot go on without one of them; it does not wait for ever either."""
    masking = _masking(False)
    masking.contribute()
    masking.pump()
    server = masking.secure_sum.server(masking.scene("z"), kept=masking.kept["z"])
    for message in list(masking.messages("keys", to_server=True))[:3]:
        server.handle(SumReceived(message.sender, message.body))
    assert server.handle(SumExpired()) == []
    with pytest.raises(QuorumLost, match="p003 had answered"):
        server.handle(SumExpired())


def test_an_early_message_that_differs_is_refused() -> None:
    masking = _masking(False)
    masking.contribute()
    masking.pump()
    server = masking.secure_sum.server(masking.scene("z"), kept=masking.kept["z"])
    masked = {m.sender: m for m in masking.messages("masked", to_server=True)}
    event = SumReceived("p000", masked["p000"].body)
    assert server.handle(event) == [] == server.handle(event)
    with pytest.raises(PeerViolation, match="too early"):
        server.handle(SumReceived("p000", masked["p001"].body))
    fresh = masking.secure_sum.server(masking.scene("z"))
    with pytest.raises(PeerViolation, match="too early"):  # nothing was kept: nobody can have got so far
        fresh.handle(event)


def test_a_survivor_whose_consent_came_too_late_is_still_heard_after_a_crash() -> None:
    """Three consents of four are enough. After a kill the fourth comes first, is not needed, and must not cost that
    party its place: of the three another is lost before it can answer."""
    masking = _masking(False)
    masking.contribute()
    while not list(masking.messages("consents", to_server=False)):
        masking.deliver(masking.queue.popleft())
    parties = next(masking.messages("consents", to_server=False)).body.fields["parties"]
    late = next(name for name in masking.names if name not in parties)
    consent = next(m for m in masking.messages("consent", to_server=True) if m.sender == late)
    masking.change = dies([parties[0]], "unmask")
    heard = masking.heard["z"]
    first = next(at for at, m in enumerate(heard) if m.stage == "consent")
    masking.heard["z"] = [*heard[:first], consent, *heard[first:]]
    masking.restart("z")
    masking.finish()
    assert not masking.refused
    check_exact(masking)
    said_once(masking)


def test_a_coordinator_with_its_stages_kept_waits_for_the_same_parties() -> None:
    """It had told the others already who is in: a time that is over does not make it another sum."""
    masking = _masking(False)
    masking.contribute()
    masking.pump()
    kept = {name: masking.kept["z"][name] for name in ("keys", "shares")}
    server = masking.secure_sum.server(masking.scene("z"), kept=kept)
    keys = list(masking.messages("keys", to_server=True))
    for message in keys[:3]:
        assert server.handle(SumReceived(message.sender, message.body)) == []
    assert server.handle(SumExpired()) == [] and server.awaiting == {"p003"}
    actions = server.handle(SumReceived("p003", keys[3].body))
    assert all(isinstance(action, SumSend) for action in actions)  # nothing is kept a second time
    before = list(masking.messages("keys", to_server=False))
    assert [body_bytes(a.body) for a in actions] == [body_bytes(m.body) for m in before]


def test_both_sides_killed_at_once() -> None:
    for step in range(0, 30, 2):
        masking = _masking(False)
        masking.contribute()
        for _ in range(step):
            if masking.queue and masking.total is None:
                masking.deliver(masking.queue.popleft())
        masking.restart("z")
        masking.restart("p002")
        masking.restart("p000")
        masking.finish()
        check_exact(masking)
        said_once(masking)


# --- attempts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answered", [0, 1, 2, 3, 4, 5, 6])
def test_two_attempts_never_give_two_sums_of_one_round(answered: int) -> None:
    """Of six (threshold 5) some had answered when the attempt ended; those answer in no other one."""
    names = names_of(6)
    first = Masking(6, change=dies(names[answered:], "unmask"))
    first.contribute()
    opened = answered >= 5
    if opened:
        first.finish()
    else:
        with pytest.raises(QuorumLost):
            first.finish()
    lasting = {name: {"answered": first.kept[name]["answered"]} for name in names[:answered] if answers_of(first, name)}
    assert len(lasting) == min(answered, len(answers(first)))
    second = Masking(6, attempt=2, kept=dict(lasting))
    try:
        second.run()
    except QuorumLost:
        nothing_opened(second)
    else:
        assert not opened and answered <= 1
        assert second.total is not None
        check_exact(second, [name for name in names if name not in lasting])
    assert not (opened and second.total)
    for name in lasting:
        assert not answers_of(second, name)


def answers(masking: Masking) -> set[str]:
    return {one.sender for one in masking.messages("unmask", to_server=True)}


def test_nothing_of_an_attempt_is_the_same_in_the_next() -> None:
    """Keys, commitments, shares, vectors: fresh for each attempt, although every update is the same."""
    first, second = _masking(False), _masking(False, attempt=2)
    first.run()
    second.run()
    before = {
        array[row].tobytes() for m in first.sent for array in m.body.tensors.values() for row in range(len(array))
    }
    for message in second.sent:
        for name, array in message.body.tensors.items():
            if name != "words":
                assert not any(array[row].tobytes() in before for row in range(len(array))), (message.stage, name)
    assert first.total is not None and second.total is not None
    assert same_total(second.total, first.total)  # masks cancel, and rounding is that of the round: the same bits
    assert present_in(second) == list(second.names)


def test_the_answer_of_a_later_life_is_the_first_one_byte_for_byte() -> None:
    masking, _ = undisturbed(False)
    for name in ("p000", "p001", "p002"):
        machine = masking.secure_sum.party(masking.scene(name))
        said = list(machine.handle(SumContribute(make_update(50), bytes(32), masking.kept[name])))
        said[0:1] = []  # keys name the additive numbers of the term, which are the same ones in a real second life
        for message in masking.sent:
            if not message.to_server and message.receiver == name:
                said += machine.handle(SumReceived("z", message.body))
        assert not any(isinstance(action, SumKeep) for action in said)
        before = [m for m in masking.sent if m.to_server and m.sender == name][1:]
        assert [body_bytes(a.body) for a in said if isinstance(a, SumSend)] == [body_bytes(m.body) for m in before]
        assert all(action_bytes(action) for action in said)
