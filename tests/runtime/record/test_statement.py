"""Statements: what is in them, who signed them, and that they stay small."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fate_llm.core.canonical import canonical_json
from fate_llm.core.errors import BadSignature, FateError, PeerViolation
from fate_llm.runtime.record.statement import check_statement, fold, read_statement
from fate_llm.runtime.record.transcript import ClosedRound, Message, Noted
from tests.runtime.record.conftest import IDENTITIES, ROSTER
from tests.runtime.record.parties import DIGEST, Job


def test_a_statement_has_everything_of_its_party() -> None:
    signed = Job().run().statement("a")
    found = read_statement(signed, ROSTER["a"])
    assert (found.version, found.job, found.specification, found.party) == (1, "job-1", DIGEST, "a")
    assert (found.attempts, found.ended, found.time, found.damaged) == (1, "success", 2000.0, 0)
    assert found.audit is not None
    assert (found.audit.n, found.audit.hash) == (7, "7" * 64)
    assert [(g.task, g.kind, g.round, g.protection, g.attempt) for g in found.sent] == [
        ("train", "round.term", 1, "plain", 1),
        ("train", "round.term", 2, "plain", 1),
    ]
    assert [(m.peer, m.ordinal, m.bytes) for m in found.sent[1].messages] == [("z", 1, 102)]
    assert [g.kind for g in found.received] == ["round.state", "round.state"]
    assert [(r.task, r.rounds, r.contributors) for r in found.rounds] == [("train", (1, 2), ("a", "b", "c"))]


def test_messages_of_one_round_are_one_group() -> None:
    found = read_statement(Job().run(3).statement("z"), ROSTER["z"])
    assert [(g.round, [m.peer for m in g.messages]) for g in found.received] == [
        (number, ["a", "b", "c"]) for number in (1, 2, 3)
    ]


def test_the_order_of_notes_does_not_matter() -> None:
    job, other = Job().run(), Job().run()
    other.messages["z"].reverse()
    other.rounds["z"].reverse()
    assert job.statement("z") == other.statement("z")


def test_any_change_is_refused() -> None:
    signed = Job().run().statement("a")
    changes: tuple[dict[str, Any], ...] = (
        {"ended": "failed"},
        {"attempts": 2},
        {"time": 2001.0},
        {"audit": None},
        {"sent": []},
        {"version": 1.0},
    )
    for change in changes:
        with pytest.raises(BadSignature):
            read_statement({**signed, "statement": {**signed["statement"], **change}}, ROSTER["a"])
    with pytest.raises(BadSignature):
        read_statement(signed, ROSTER["b"])


def test_a_signature_for_another_purpose_is_none() -> None:
    signed = Job().run().statement("a")
    content = canonical_json(signed["statement"])
    forged = {**signed, "signature": IDENTITIES["a"].sign(content, purpose="audit").hex()}
    with pytest.raises(BadSignature):
        read_statement(forged, ROSTER["a"])


@pytest.mark.parametrize(
    ("change", "word"),
    [({"job": "job-2"}, "job"), ({"digest": "0" * 64}, "specification"), ({"party": "b"}, "party")],
)
def test_a_statement_about_something_else_is_refused(change: dict[str, Any], word: str) -> None:
    signed = Job().run().statement("a", **change)
    with pytest.raises(PeerViolation, match=f"names another {word}"):
        check_statement(signed, ROSTER["a"], job="job-1", digest=DIGEST, party="a")


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        {"statement": {}, "signature": "0" * 128},
        {"statement": [], "signature": "0" * 128},
        {"statement": Job().statement("a")["statement"], "signature": "X"},
        {"statement": Job().statement("a")["statement"], "signature": "0" * 128, "more": 1},
        {"statement": {**Job().statement("a")["statement"], "version": 2}, "signature": "0" * 128},
        {"statement": {**Job().statement("a")["statement"], "party": "x" * 301}, "signature": "0" * 128},
    ],
)
def test_another_shape_is_refused(data: Any) -> None:
    with pytest.raises(PeerViolation, match="a statement that is none"):
        read_statement(data, ROSTER["a"])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(sorted(Job().run(1).statement("a")["statement"])), json_values)
def test_no_value_anywhere_breaks_the_reader(name: str, value: Any) -> None:
    signed = copy.deepcopy(Job().run(1).statement("a"))
    signed["statement"][name] = value
    try:
        read_statement(signed, ROSTER["a"])
    except FateError:
        return
    assert canonical_json(signed) == canonical_json(Job().run(1).statement("a"))


def test_many_messages_of_one_peer_are_folded() -> None:
    job = Job()
    for ordinal in range(1, 1001):
        job.tell("a", "z", "data.many", 0, ordinal=ordinal)
    job.tell("b", "z", "data.many", 0)
    sent = read_statement(job.statement("a"), ROSTER["a"]).sent[0]
    received = read_statement(job.statement("z"), ROSTER["z"]).received[0]
    assert sent.messages == ()
    assert (sent.folded[0].peer, sent.folded[0].count, sent.folded[0].bytes) == ("z", 1000, 100_000)
    # Both ends make the same of it, and one message less makes another.
    assert received.folded[0].digest == sent.folded[0].digest
    assert [m.peer for m in received.messages] == ["b"]
    del job.messages["z"][5]
    assert read_statement(job.statement("z"), ROSTER["z"]).received[0].folded[0].digest != sent.folded[0].digest


def test_a_fold_does_not_depend_on_order_but_on_everything_else() -> None:
    told = [(1, "a" * 64), (2, "b" * 64)]
    assert fold(told) == fold(told[::-1])
    assert len({fold(told), fold(told[:1]), fold([(1, "b" * 64), (2, "a" * 64)]), fold([])}) == 4


def test_a_hundred_rounds_with_a_hundred_parties_stay_small() -> None:
    messages = [
        Message(way, f"party-{peer}", "train", kind, number, 1, 4_000_000, f"{number:032x}{peer:032x}", "plain", 1)
        for number in range(1, 101)
        for peer in range(100)
        for way, kind in (("received", "round.term"), ("sent", "round.state"))
    ]
    parties = tuple(f"party-{peer}" for peer in range(100))
    rounds = [ClosedRound("train", number, parties, (), 1) for number in range(1, 101)]
    signed = Job().statement("z", transcript=Noted(tuple(messages), tuple(rounds)))
    assert len(canonical_json(signed)) < 3_000_000
    other = Job().statement("a", transcript=Noted(tuple(m for m in messages if m.peer == "party-5"), tuple(rounds)))
    assert len(canonical_json(other)) < 60_000
    assert len(read_statement(signed, ROSTER["z"]).received) == 100
