"""The chain: what is whole is found whole, and every way to change it is found and named."""

from __future__ import annotations

import hashlib
import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fate_llm.core.canonical import canonical_json
from fate_llm.core.errors import BadSignature, InternalError
from fate_llm.security.audit_chain import (
    GENESIS,
    MAX_FAULTS,
    MAX_LINE,
    ChainReader,
    Head,
    genesis_line,
    make_line,
    read_line,
    verify,
)
from fate_llm.security.identity import Identity

ME = Identity(bytes(range(32)))
OTHER = Identity(bytes(range(1, 33)))


def hash_of(line: bytes) -> str:
    return hashlib.sha256(line.removesuffix(b"\n")).hexdigest()


def chain(count: int, *, identity: Identity = ME, word: str = "x") -> list[bytes]:
    """`count` lines, the genesis among them."""
    lines = [genesis_line(identity, party="a", program="1.2", time=10.0)]
    while len(lines) < count:
        head = Head(len(lines), hash_of(lines[-1]))
        lines.append(make_line(identity, head, time=10.0 + len(lines), kind="left", fields={"word": word}))
    return lines


def found(lines: list[bytes], **options: Any) -> list[tuple[int, str]]:
    return [(fault.line, fault.kind) for fault in verify(lines, ME.public, **options)]


CHAIN = chain(8)


def test_a_whole_chain_has_no_fault_with_or_without_its_newlines() -> None:
    assert found(CHAIN) == []
    assert found([line.rstrip(b"\n") for line in CHAIN]) == []


def test_a_line_says_what_the_format_promises() -> None:
    # Given the second line, read as plain JSON
    content = json.loads(CHAIN[1])
    # Then it has these keys, its hash chains, and its signature is over all but itself
    assert sorted(content) == ["fields", "kind", "n", "previous", "signature", "time"]
    assert content["previous"] == hash_of(CHAIN[0])
    signature = bytes.fromhex(content.pop("signature"))
    ME.public.verify(signature, canonical_json(content), purpose="audit")
    first = json.loads(CHAIN[0])
    assert (first["n"], first["kind"], first["previous"]) == (1, GENESIS, "0" * 64)
    assert first["fields"] == {"party": "a", "identity": ME.public.to_text(), "program": "1.2"}


def test_the_reader_gives_entries_the_head_and_the_count() -> None:
    reader = ChainReader(ME.public)
    entries = [reader.take(line) for line in CHAIN]
    assert [entry and entry.n for entry in entries] == list(range(1, 9))
    last = entries[-1]
    assert last is not None
    assert (last.time, last.kind, last.fields) == (17.0, "left", {"word": "x"})
    assert reader.head == last.head == Head(8, hash_of(CHAIN[-1]))
    assert reader.count == 8


@pytest.mark.parametrize("place", range(8))
def test_a_changed_line_is_named(place: int) -> None:
    changed = json.loads(CHAIN[place])
    changed["time"] += 1
    lines = [*CHAIN[:place], canonical_json(changed) + b"\n", *CHAIN[place + 1 :]]
    assert found(lines) == [(place + 1, "changed")]


@pytest.mark.parametrize("place", range(8))
def test_a_removed_line_is_named_at_the_one_after_it(place: int) -> None:
    lines = CHAIN[:place] + CHAIN[place + 1 :]
    # The last one leaves no gap: only a head that was remembered shows it.
    assert found(lines) == ([(place + 1, "removed")] if place < 7 else [])
    assert (0, "cut") in found(lines, expected_head=hash_of(CHAIN[place]))


def test_several_removed_lines_are_counted() -> None:
    (fault,) = verify(CHAIN[:2] + CHAIN[5:], ME.public)
    assert str(fault) == "line 3: lines 3 to 5 are missing before it [removed]"


@pytest.mark.parametrize("place", range(1, 7))
def test_two_lines_in_the_other_order_are_named(place: int) -> None:
    lines = list(CHAIN)
    lines[place], lines[place + 1] = lines[place + 1], lines[place]
    assert found(lines) == [(place + 2, "reordered")]


def test_a_genesis_in_the_middle_is_out_of_order() -> None:
    assert found([*CHAIN[1:4], CHAIN[0], *CHAIN[4:]]) == [(4, "reordered")]


def test_a_block_that_was_moved_is_named_line_by_line() -> None:
    assert found(CHAIN[:2] + CHAIN[4:6] + CHAIN[2:4] + CHAIN[6:]) == [(5, "reordered"), (6, "reordered")]


@pytest.mark.parametrize("place", range(1, 8))
def test_an_inserted_line_of_somebody_else_is_named(place: int) -> None:
    head = Head(place, hash_of(CHAIN[place - 1]))
    forged = make_line(OTHER, head, time=1.0, kind="left", fields={})
    assert found([*CHAIN[:place], forged, *CHAIN[place:]]) == [(place + 1, "inserted")]


def test_noise_between_lines_is_named_and_costs_no_other_line() -> None:
    assert found([*CHAIN[:3], b"\x00\xff noise\n", *CHAIN[3:]]) == [(4, "inserted")]
    assert found([*CHAIN[:3], b"[" * 100_000, *CHAIN[4:]]) == [(4, "unreadable")]


def test_a_copy_of_a_line_is_named() -> None:
    assert found([*CHAIN[:5], CHAIN[2], *CHAIN[5:]]) == [(6, "inserted")]


def test_a_second_beginning_is_named_once() -> None:
    assert found(CHAIN[:3] + chain(4, word="y")) == [(4, "genesis")]


def test_a_chain_that_goes_on_from_a_copy_is_named_where_it_parts() -> None:
    # Given two chains of the same party with a common beginning, as after an old backup was put back
    head = Head(3, hash_of(CHAIN[2]))
    other = make_line(ME, head, time=99.0, kind="left", fields={"word": "other"})
    # Then a line of the one after a line of the other does not follow
    assert found([*CHAIN[:3], other, *CHAIN[4:]]) == [(5, "forked")]


def test_a_head_anywhere_in_the_chain_is_found_and_another_is_not() -> None:
    assert found(CHAIN, expected_head=hash_of(CHAIN[0])) == []
    assert found(CHAIN, expected_head=hash_of(CHAIN[-1])) == []
    assert found(CHAIN[:5], expected_head=hash_of(CHAIN[5])) == [(0, "cut")]


def test_an_empty_log_and_one_of_another_party_are_no_chain() -> None:
    assert found([]) == [(0, "genesis")]
    assert {kind for _, kind in found(chain(3, identity=OTHER))} == {"changed"}


def test_a_genesis_that_names_another_key_is_named() -> None:
    fields = {"party": "a", "identity": OTHER.public.to_text(), "program": "1"}
    line = make_line(ME, Head(), time=0.0, kind=GENESIS, fields=fields)
    assert found([line]) == [(1, "genesis")]


def test_a_chain_whose_first_line_is_of_another_kind_is_named() -> None:
    assert (1, "genesis") in found([make_line(ME, Head(), time=0.0, kind="left", fields={})])
    second = make_line(ME, Head(1, hash_of(CHAIN[0])), time=0.0, kind=GENESIS, fields={})
    assert (2, "genesis") in found([CHAIN[0], second])


@pytest.mark.parametrize(
    "change",
    [
        lambda c: {**c, "n": True},
        lambda c: {**c, "n": 0},
        lambda c: {**c, "n": "2"},
        lambda c: {**c, "time": "now"},
        lambda c: {**c, "kind": 5},
        lambda c: {**c, "fields": []},
        lambda c: {**c, "more": 1},
        lambda c: {k: v for k, v in c.items() if k != "time"},
        lambda c: {**c, "previous": c["previous"].upper() + "0"},
        lambda c: {**c, "signature": "ZZ"},
        lambda c: {**c, "signature": None},
        lambda c: [c],
    ],
)
def test_a_line_of_another_shape_is_unreadable(change: Any) -> None:
    with pytest.raises(ValueError):
        read_line(canonical_json(change(json.loads(CHAIN[1]))), ME.public)


def test_the_same_content_in_another_spelling_is_not_the_line() -> None:
    # A signature over parsed content would fit all of these.
    content = json.loads(CHAIN[1])
    for other in (json.dumps(content).encode(), CHAIN[1].rstrip(b"\n").replace(b'"x"', b'"\\u0078"')):
        with pytest.raises(ValueError, match="canonical"):
            read_line(other, ME.public)
    with pytest.raises(BadSignature):
        read_line(CHAIN[1].rstrip(b"\n"), OTHER.public)


def test_every_flipped_bit_of_a_line_is_found() -> None:
    raw = CHAIN[1].rstrip(b"\n")
    for place in range(len(raw)):
        flipped = raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]
        assert found([CHAIN[0], flipped, CHAIN[2]]), place


@given(st.lists(st.integers(0, 7), max_size=12))
@settings(max_examples=80, deadline=None)
def test_any_other_arrangement_of_lines_has_a_fault(order: list[int]) -> None:
    lines = [CHAIN[place] for place in order]
    whole = order == list(range(len(order))) and order != []
    assert (found(lines) == []) == whole


def test_faults_and_memory_are_bounded() -> None:
    count = 3 * MAX_FAULTS
    faults = verify((b"noise" for _ in range(count)), ME.public)
    assert len(faults) == MAX_FAULTS + 1
    assert faults[-1].message == f"and {count - MAX_FAULTS} faults more"


def test_a_line_above_the_bound_is_neither_made_nor_read() -> None:
    with pytest.raises(InternalError, match="log a digest"):
        make_line(ME, Head(), time=0.0, kind="left", fields={"text": "x" * MAX_LINE})
    assert found([b"x" * (MAX_LINE + 1)]) == [(1, "unreadable")]


@pytest.mark.parametrize("value", [float("nan"), b"bytes", "\ud800", {1, 2}])
def test_what_json_does_not_know_is_our_own_error(value: Any) -> None:
    with pytest.raises(InternalError, match="not JSON"):
        make_line(ME, Head(), time=0.0, kind="left", fields={"value": value})


def test_line_breaks_in_values_make_no_lines() -> None:
    line = make_line(ME, Head(), time=0.0, kind="left", fields={"text": "a\nb\u2028c"})
    assert line.count(b"\n") == 1
    assert read_line(line.rstrip(b"\n"), ME.public).fields == {"text": "a\nb\u2028c"}


def test_random_damage_is_always_found() -> None:
    dice = random.Random(5)
    for _ in range(100):
        lines = [bytearray(line) for line in CHAIN]
        victim = dice.choice(lines)
        victim[dice.randrange(len(victim) - 1)] = dice.randrange(256)
        if [bytes(line) for line in lines] != CHAIN:
            assert found([bytes(line) for line in lines])
