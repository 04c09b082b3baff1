"""Dossiers: a true one has no fault, and each way to lie, alone, is found and named."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fate_llm.core.canonical import canonical_json
from fate_llm.core.errors import ConfigurationError, DataError, FateError
from fate_llm.runtime.record.dossier import MAX_DOSSIER, Report, compose, load, pins_of, verify
from fate_llm.runtime.record.transcript import ClosedRound
from fate_llm.runtime.service.words import Ending, JobState, Trouble
from tests.runtime.record.conftest import IDENTITIES, ROSTER
from tests.runtime.record.parties import Job, signed_specification


def kinds(report: Report) -> list[str]:
    return [fault.kind for fault in report.faults]


def only(report: Report) -> Any:
    """The one fault."""
    assert len(report.faults) == 1, [str(fault) for fault in report.faults]
    return report.faults[0]


def test_a_true_dossier_has_no_fault_and_says_who_contributed_what() -> None:
    dossier = Job().run().dossier()
    report = verify(dossier, ROSTER)
    assert report.faults == ()
    assert report.remarks == ()
    assert (report.job, report.initiator, report.ending) == ("job-1", "a", "success")
    assert report.parties == dict.fromkeys("abcz", "success")
    assert [(row.task, row.round, row.party, row.coordinator) for row in report.table] == [
        ("train", number, party, "z") for number in (1, 2) for party in "abc"
    ]
    sent = dossier["statements"]["b"]["statement"]["sent"][0]
    row = report.table[1]
    assert row.digest == sent["messages"][0]["digest"]
    assert (row.bytes, row.protection, row.counted, row.known) == (101, "plain", True, "both")
    assert row.policy == dossier["statements"]["b"]["statement"]["policy"]


def test_it_survives_being_a_file(tmp_path: Path) -> None:
    dossier = Job().run().dossier()
    path = tmp_path / "dossier.json"
    path.write_text(json.dumps(dossier, indent=1))
    assert verify(load(path), ROSTER) == verify(dossier, ROSTER)


def test_where_the_guest_coordinates_its_own_term_never_travels() -> None:
    report = verify(Job("abc", coordinator="a").run().dossier(), ROSTER)
    assert report.faults == ()
    own = [row for row in report.table if row.party == "a"]
    assert [(row.round, row.known, row.counted, row.digest) for row in own] == [
        (1, "own", True, ""),
        (2, "own", True, ""),
    ]


# --- signatures -----------------------------------------------------------------------------------------------------


def test_a_specification_that_was_changed_is_named() -> None:
    dossier = Job().run().dossier()
    dossier["specification"]["specification"]["created"] = 1001.0
    report = verify(dossier, ROSTER)
    assert kinds(report)[0] == "specification_signature"
    # And no statement speaks of it any more.
    assert kinds(report).count("statement") == 4


def test_a_specification_that_somebody_else_signed_is_named() -> None:
    dossier = Job().run().dossier()
    dossier["specification"] = signed_specification(dossier["specification"]["specification"], by="b")
    assert only(verify(dossier, ROSTER)).kind == "specification_signature"


def test_a_field_of_a_later_version_is_signed_as_well() -> None:
    # Given a specification with a field that this program does not know
    job = Job().run()
    dossier = job.dossier()
    specification = {**dossier["specification"]["specification"], "later": {"x": 1}}
    dossier["specification"] = signed_specification(specification)
    from fate_llm.core.canonical import digest

    dossier["statements"] = {p: job.statement(p, digest=digest(specification)) for p in "abcz"}
    assert verify(dossier, ROSTER).faults == ()
    dossier["specification"]["specification"]["later"]["x"] = 2
    assert "specification_signature" in kinds(verify(dossier, ROSTER))


@pytest.mark.parametrize("party", ["a", "b", "c", "z"])
def test_a_statement_that_was_changed_is_named_with_its_party(party: str) -> None:
    dossier = Job().run().dossier()
    dossier["statements"][party]["statement"]["policy"] = "0" * 64
    fault = only(verify(dossier, ROSTER))
    assert (fault.kind, fault.party) == ("statement_signature", party)


def test_a_statement_that_another_party_signed_is_named() -> None:
    job = Job().run()
    dossier = job.dossier()
    dossier["statements"]["b"] = dossier["statements"]["c"]
    assert [(f.kind, f.party) for f in verify(dossier, ROSTER).faults] == [("statement_signature", "b")]


def test_another_roster_is_not_satisfied() -> None:
    dossier = Job().run().dossier()
    stranger = {**ROSTER, "b": ROSTER["c"]}
    assert {(f.kind, f.party) for f in verify(dossier, stranger).faults} == {
        ("member", "b"),
        ("statement_signature", "b"),
    }
    without = {party: public for party, public in ROSTER.items() if party != "b"}
    assert [(f.kind, f.party) for f in verify(dossier, without).faults] == [("stranger", "b")]
    assert ("stranger", "a") in {(f.kind, f.party) for f in verify(dossier, {"b": ROSTER["b"]}).faults}


def test_a_statement_of_a_stranger_is_named() -> None:
    job = Job("ab").run()
    dossier = job.dossier()
    dossier["statements"]["c"] = Job().run().statement("c")
    assert [(f.kind, f.party) for f in verify(dossier, ROSTER).faults] == [("stranger", "c")]


# --- missing statements ---------------------------------------------------------------------------------------------


def test_a_party_without_a_statement_is_a_fault_of_a_success_and_a_remark_elsewhere() -> None:
    job = Job().run()
    fault = only(verify(job.dossier(without="b"), ROSTER))
    assert (fault.kind, fault.party) == ("statement_missing", "b")
    report = verify(job.dossier(without="b", state=JobState.TIMED_OUT), ROSTER)
    assert report.faults == ()
    assert report.remarks == ("b gave no statement: what it sent and received is not confirmed",)
    assert report.parties["b"] == ""
    assert {row.known for row in report.table if row.party == "b"} == {"receiver"}


def test_a_success_that_a_party_does_not_confirm_is_a_fault() -> None:
    job = Job().run()
    dossier = job.dossier()
    digest = dossier["statements"]["b"]["statement"]["specification"]
    dossier["statements"]["b"] = job.statement("b", ended="failed", digest=digest)
    fault = only(verify(dossier, ROSTER))
    assert (fault.kind, fault.party) == ("ending", "b")


def test_attempts_that_are_kept_quiet_are_named() -> None:
    dossier = Job().run().dossier()
    dossier["attempts"] = 0
    assert kinds(verify(dossier, ROSTER)) == ["attempts"] * 4


def test_nobody_states_anything() -> None:
    report = verify(Job().run().dossier(without="abcz", state=JobState.FAILED), ROSTER)
    assert (report.faults, report.table, len(report.remarks)) == ((), (), 4)


# --- messages -------------------------------------------------------------------------------------------------------


def test_a_message_that_its_sender_does_not_know_is_named() -> None:
    job = Job().run()
    job.messages["b"] = [m for m in job.messages["b"] if not (m.kind == "round.term" and m.round == 2)]
    report = verify(job.dossier(), ROSTER)
    assert {(f.kind, f.party, f.round) for f in report.faults} == {("not_sent", "b", 2), ("term_missing", "b", 2)}
    (row,) = [row for row in report.table if (row.party, row.round) == ("b", 2)]
    assert row.known == "receiver"


@pytest.mark.parametrize("liar", ["b", "z"])
def test_two_ends_that_name_other_digests_are_named(liar: str) -> None:
    job = Job().run()
    job.messages[liar] = [
        m.__class__(m.direction, m.peer, m.task, m.kind, m.round, m.ordinal, m.bytes, "0" * 64, m.protection, 1)
        if m.round == 2 and m.kind == "round.term" and m.peer == ("z" if liar == "b" else "b")
        else m
        for m in job.messages[liar]
    ]
    fault = only(verify(job.dossier(), ROSTER))
    assert (fault.kind, fault.party, fault.round) == ("differs", "b", 2)


def test_what_was_sent_and_never_received_is_a_remark() -> None:
    job = Job().run()
    job.messages["c"] = [m for m in job.messages["c"] if not (m.direction == "received" and m.round == 2)]
    report = verify(job.dossier(), ROSTER)
    assert report.faults == ()
    assert len(report.remarks) == 1
    assert report.remarks[0].startswith("1 message of z not among what c received")


def test_what_was_sent_again_with_other_bits_is_no_fault() -> None:
    # Given a party that was killed after sending, whose GPU gave other bits the second time
    job = Job().run()
    first = next(m for m in job.messages["b"] if m.kind == "round.term")
    again = first.__class__("sent", "z", "train", "round.term", 1, 1, 101, "0" * 64, "plain", 1)
    job.messages["b"].append(again)
    report = verify(job.dossier(), ROSTER)
    assert report.faults == ()
    assert [(row.known, row.counted) for row in report.table if (row.party, row.round) == ("b", 1)] == [
        ("sender", False),
        ("both", True),
    ]


def test_many_folded_messages_are_compared() -> None:
    def many(job: Job) -> Job:
        for ordinal in range(1, 600):
            job.tell("a", "b", "data.many", 0, ordinal=ordinal)
        return job

    assert verify(many(Job().run()).dossier(), ROSTER).faults == ()
    # One of them is another at the receiver
    job = many(Job().run())
    last = job.messages["b"][-1]
    job.messages["b"][-1] = last.__class__(
        "received", "a", last.task, last.kind, 0, last.ordinal, last.bytes, "0" * 64, "", 1
    )
    assert only(verify(job.dossier(), ROSTER)).kind == "differs"
    # The last ones came too late
    job = many(Job().run())
    del job.messages["b"][-10:]
    report = verify(job.dossier(), ROSTER)
    assert report.faults == ()
    assert report.remarks[0].startswith("10 messages of a")
    # The receiver says that it got what was never sent
    job = many(Job().run())
    del job.messages["a"][-400:]
    assert "not_sent" in kinds(verify(job.dossier(), ROSTER)) or "differs" in kinds(verify(job.dossier(), ROSTER))


def test_messages_with_strangers_are_named() -> None:
    job = Job("ab").run()
    job.messages["a"].append(job.messages["a"][0].__class__("sent", "c", "t", "k", 0, 1, 1, "1" * 64, "", 1))
    job.messages["b"].append(job.messages["b"][0].__class__("received", "c", "t", "k", 0, 1, 1, "2" * 64, "", 1))
    assert kinds(verify(job.dossier(), ROSTER)) == ["stranger", "stranger"]


def test_two_ends_that_name_other_protections_are_named() -> None:
    job = Job().run()
    job.messages["z"] = [
        m.__class__(m.direction, m.peer, m.task, m.kind, m.round, m.ordinal, m.bytes, m.digest, "secagg", 1)
        if (m.peer, m.kind) == ("b", "round.term")
        else m
        for m in job.messages["z"]
    ]
    report = verify(job.dossier(), ROSTER)
    assert kinds(report) == ["protection", "protection"]
    assert "b sent it under plain, z received it under secagg" in report.faults[0].message


# --- rounds -----------------------------------------------------------------------------------------------------------


def test_a_counted_party_without_a_term_is_named() -> None:
    job = Job().run()
    for party in ("b", "z"):
        job.messages[party] = [
            m
            for m in job.messages[party]
            if not (m.kind == "round.term" and m.round == 2 and {party, m.peer} == {"b", "z"})
        ]
    fault = only(verify(job.dossier(), ROSTER))
    assert (fault.kind, fault.party, fault.task, fault.round) == ("term_missing", "b", "train", 2)


def test_a_counted_term_that_the_coordinator_did_not_receive_is_named() -> None:
    job = Job().run()
    job.messages["z"] = [
        m for m in job.messages["z"] if not (m.peer == "c" and m.round == 1 and m.kind == "round.term")
    ]
    fault = only(verify(job.dossier(), ROSTER))
    assert (fault.kind, fault.party, fault.round) == ("term_missing", "c", 1)
    assert "z received no term of it" in fault.message


def test_a_coordinator_that_counts_a_party_that_is_none_is_named() -> None:
    job = Job("ab").run()
    for party in job.parties:
        job.rounds[party] = [ClosedRound("train", 1, ("a", "b", "ghost"), (), 1), job.rounds[party][1]]
    assert [f.kind for f in verify(job.dossier(), ROSTER).faults] == ["stranger"]


def test_parties_that_were_told_of_other_contributors_are_named() -> None:
    job = Job().run()
    job.rounds["c"][1] = ClosedRound("train", 2, ("a", "c"), ("b",), 1)
    fault = only(verify(job.dossier(), ROSTER))
    assert (fault.kind, fault.round) == ("rounds_differ", 2)
    assert "a says a, b, c; b says a, b, c; c says a, c; z says a, b, c" in fault.message


def test_views_of_other_attempts_are_a_remark() -> None:
    job = Job().run()
    job.rounds["c"][1] = ClosedRound("train", 2, ("a", "c"), ("b",), 2)
    report = verify(job.dossier(), ROSTER)
    assert report.faults == ()
    assert "in other attempts" in report.remarks[0]


def test_a_party_cannot_call_itself_coordinator_to_be_excused() -> None:
    # Given b, which sent no term in round 2, was counted, and says that it told states and received terms
    job = Job().run()
    job.messages["b"] = [m for m in job.messages["b"] if not (m.kind == "round.term" and m.round == 2)]
    job.messages["z"] = [m for m in job.messages["z"] if not (m.kind == "round.term" and (m.peer, m.round) == ("b", 2))]
    state, term = (
        job.messages["b"][0].__class__(way, "c", "train", kind, 2, 1, 1, "3" * 64, "", 1)
        for way, kind in (("sent", "round.state"), ("received", "round.term"))
    )
    job.messages["b"] += [state, term]
    assert ("term_missing", "b") in {(f.kind, f.party) for f in verify(job.dossier(), ROSTER).faults}


def test_a_party_that_was_not_counted_is_in_the_table_and_no_fault() -> None:
    job = Job().run()
    for party in job.parties:
        job.rounds[party][1] = ClosedRound("train", 2, ("a", "b"), ("c",), 1)
    report = verify(job.dossier(), ROSTER)
    assert report.faults == ()
    assert [(row.party, row.counted) for row in report.table if row.round == 2] == [
        ("a", True),
        ("b", True),
        ("c", False),
    ]


def test_where_nobody_noted_the_end_of_a_round_it_is_not_known_who_was_counted() -> None:
    job = Job().run()
    for party in job.parties:
        job.rounds[party] = []
    report = verify(job.dossier(), ROSTER)
    assert report.faults == ()
    assert {row.counted for row in report.table} == {None}


def test_lines_lost_in_a_power_cut_are_a_remark() -> None:
    job = Job().run()
    dossier = job.dossier()
    from fate_llm.runtime.record.transcript import Noted

    digest = dossier["statements"]["b"]["statement"]["specification"]
    noted = Noted(tuple(job.messages["b"]), tuple(job.rounds["b"]), damaged=2)
    dossier["statements"]["b"] = job.statement("b", transcript=noted, digest=digest)
    report = verify(dossier, ROSTER)
    assert report.faults == ()
    assert report.remarks == ("b lost 2 lines of its notes in a power cut",)


# --- shape ------------------------------------------------------------------------------------------------------------


def test_composing_leaves_an_inner_dossier_out() -> None:
    trouble = Trouble(code="timeout", message="m", party="b")
    ending = Ending(state=JobState.FAILED, trouble=trouble, dossier={"x": "y"})
    made = compose(signed_specification(), {}, ending, 3)
    assert made["ending"] == {
        "state": "failed",
        "trouble": {"code": "timeout", "message": "m", "hint": "", "party": "b"},
        "dossier": None,
    }
    assert (made["version"], made["attempts"], made["statements"]) == (1, 3, {})


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"version": 2}, "version"),
        ({"attempts": -1}, "attempts"),
        ({"ending": {"state": "splendid"}}, "ending.state"),
        ({"specification": {}}, "specification.specification"),
        ({"statements": []}, "statements"),
        ({"more": 1}, "more"),
    ],
)
def test_another_shape_is_refused_by_the_name_of_the_field(change: dict[str, Any], place: str) -> None:
    with pytest.raises(DataError, match=f"not a dossier: {place}"):
        verify({**Job().run().dossier(), **change}, ROSTER)


def test_a_specification_without_what_is_needed_is_refused() -> None:
    dossier = Job().run().dossier()
    for name in ("job", "initiator", "members"):
        broken = copy.deepcopy(dossier)
        del broken["specification"]["specification"][name]
        with pytest.raises(DataError, match=name):
            verify(broken, ROSTER)


def test_files_that_are_no_dossier_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "dossier.json"
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load(path)
    for content in (b"", b"{", b"[]", b'{"a": 1, "a": 2}', b'{"a": NaN}', b"\xff"):
        path.write_bytes(content)
        with pytest.raises(DataError):
            load(path)
    with path.open("wb") as stream:
        stream.truncate(MAX_DOSSIER + 1)
    with pytest.raises(DataError, match="more than"):
        load(path)


def test_the_identities_that_it_names_itself() -> None:
    assert pins_of(Job().run().dossier()) == ROSTER
    inner: dict[str, Any] = {"members": {"a": {}}}
    broken: dict[str, Any]
    for broken in ({}, {"specification": None}, {"specification": {"specification": inner}}):
        with pytest.raises(DataError, match="not a dossier"):
            pins_of(broken)


DOSSIER = Job().run(1).dossier()


def paths(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [before, *(path for key, item in items for path in paths(item, (*before, key)))]
    return [before]


@given(
    st.sampled_from(paths(DOSSIER)[1:]),
    st.none() | st.integers() | st.text(max_size=3) | st.just({}) | st.just([]) | st.just("0" * 64) | st.floats(),
)
def test_no_value_anywhere_goes_unnoticed_or_breaks_it(place: tuple[Any, ...], value: Any) -> None:
    # Given a dossier with another value at any place
    changed = copy.deepcopy(DOSSIER)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    before, inner[place[-1]] = inner[place[-1]], value
    # Then it is refused or has a fault, unless it is in what is the guest's own word
    try:
        report = verify(changed, ROSTER)
    except FateError:
        return
    same = type(before) is type(value) and before == value
    assert report.faults or same or place[0] in ("ending", "attempts"), place


def test_every_flipped_letter_of_what_is_signed_is_found() -> None:
    text = canonical_json(DOSSIER).decode()
    start, end = text.index('"specification"'), text.index('"version":1}', text.index('"statements"'))
    assert len(IDENTITIES) == 4
    for place in range(start, end, 97):
        letter = "1" if text[place] != "1" else "2"
        try:
            changed = json.loads(text[:place] + letter + text[place + 1 :])
        except ValueError:
            continue
        try:
            assert verify(changed, ROSTER).faults, text[place - 20 : place + 20]
        except FateError:
            continue
