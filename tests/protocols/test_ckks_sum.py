"""Sums under CKKS, machine by machine: they come out right, whoever drops out, in whatever order messages come."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fate_llm.core.errors import InternalError, PeerViolation, ProtectionError, QuorumLost, RoundTimeout
from fate_llm.core.interfaces import SumContribute, SumExpired, SumReceived
from fate_llm.core.values import Update
from fate_llm.protocols.homomorphic.agreed import FLOOD, Agreed
from fate_llm.protocols.homomorphic.server import Server
from fate_llm.protocols.homomorphic.terms import encode, flood, limbs, numbers_from
from fate_llm.protocols.sums.ckks import CkksSum
from fate_llm.security.ckks import SLOTS
from tests.protocols.homomorphic_sums import (
    COORDINATOR,
    HOLDER,
    LAYOUT,
    NAMES,
    Sum,
    exact_mean,
    flat,
    quicken,
    require_within_bound,
    scene_of,
    seed,
    update,
)

pytest.importorskip("tenseal")


TERMS = {p: update(0.1 * k, -0.2, 1 / 3, weight=float(k), n=2.0 * k) for k, p in enumerate("abc", 1)}
LONG = {"w": (2 * SLOTS + 9,)}


@pytest.fixture(autouse=True)
def quick_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    quicken(monkeypatch)


@pytest.fixture
def one_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ciphertext in each message, so that small terms have several."""
    monkeypatch.setattr("fate_llm.protocols.homomorphic.messages.CHUNK", 1)


def long_term(party: str, weight: float = 1.0) -> Update:
    draw = np.random.default_rng(ord(party))
    return Update({"w": draw.uniform(-1, 1, LONG["w"]).astype(np.float32)}, weight, {"n": 1.0})


def long_sum(count: int = 3, **settings: Any) -> Sum:
    return Sum(count, scenes={"": {"layout": LONG, "state": {}}}, **settings)


# --- what comes out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, 4, 5, 8])
def test_the_mean_of_all_comes_out_within_its_bound(count: int) -> None:
    draw = np.random.default_rng(count)
    terms = {
        p: update(*draw.uniform(-1, 1, 3), weight=float(draw.integers(1, 2**20)), n=float(draw.uniform(-1e6, 1e6)))
        for p in NAMES[:count]
    }
    total = Sum(count).of(terms)
    require_within_bound(total, terms.values())
    assert total.weight == sum(t.weight for t in terms.values())
    assert total.sums["n"] == pytest.approx(sum(t.sums["n"] for t in terms.values()), abs=1e-9)
    assert (total.contributors, total.missing, dict(total.terms)) == (tuple(terms), (), {})
    assert {name: (a.dtype, a.shape) for name, a in total.mean.items()} == {
        name: (np.dtype(np.float32), shape) for name, shape in LAYOUT.items()
    }
    assert list(total.mean) == list(LAYOUT)


def test_the_opened_sum_is_exact_up_to_the_noise_that_was_put_on_it() -> None:
    # Given the whole numbers that each party makes of its term
    run = Sum()
    run.of(TERMS)
    rounded = [encode(TERMS[p], agreed(p), seed(p)).values.astype(np.int64) for p in "abc"]
    (opened,) = run.said("opened")
    # Then what is opened is their sum, and noise
    noise = opened[2].tensors["words"].astype(np.int64) - sum(rounded)
    assert np.abs(noise).max() < FLOOD
    assert noise.any()
    # And weight and numbers have none
    assert [int(text, 16) for text in opened[2].fields["numbers"]] == [6 << 40, 12 << 40]


def agreed(party: str, count: int = 3) -> Agreed:
    return Agreed(scene_of(party, count), 1.0, 2.0**20, False)


def test_the_error_of_full_weights_is_below_float32s_own_grid() -> None:
    """The figure asked for: at most 1e-7 for values up to 1, here with the noise in it."""
    terms = {p: update(0.9, -0.3, 0.7, weight=2.0**20) for p in NAMES}
    total = Sum(8).of(terms)
    largest = max(
        abs(Fraction(float(v)) - w) for v, w in zip(flat(total.mean), exact_mean(terms.values()), strict=True)
    )
    assert largest <= 1e-7
    assert total.error_bound <= 2e-7
    require_within_bound(total, terms.values())


def test_small_weights_say_how_much_worse_they_are() -> None:
    total = Sum().of({p: update(weight=1.0) for p in "abc"})
    require_within_bound(total, [update(weight=1.0)])
    assert 1e-3 < total.error_bound < 0.1
    better = Sum(params=CkksSum.Params(largest_weight=1.0)).of({p: update(weight=1.0) for p in "abc"})
    assert better.error_bound < 2e-7
    require_within_bound(better, [update(weight=1.0)])


@given(
    values=st.lists(st.floats(-2, 2, width=32), min_size=3, max_size=3),
    weights=st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 2.0**20)), min_size=3, max_size=3).filter(any),
    numbers=st.lists(st.floats(-1e12, 1e12), min_size=3, max_size=3),
    choices=st.lists(st.integers(0, 50), max_size=40),
)
@settings(deadline=None, max_examples=10)
def test_any_terms_in_any_order_of_messages(
    values: list[float], weights: list[float], numbers: list[float], choices: list[int]
) -> None:
    turns = iter(choices)
    terms = {p: update(v, weight=w, n=n) for p, v, w, n in zip("abc", values, weights, numbers, strict=True)}
    total = Sum(order=lambda waiting: next(turns, 0) % waiting).of(terms)
    require_within_bound(total, terms.values())
    assert total.weight == pytest.approx(sum(weights), rel=1e-6)
    assert total.sums["n"] == pytest.approx(sum(numbers), rel=1e-12, abs=1e-9)


def test_values_are_cut_to_the_clip() -> None:
    terms = {p: update(5.0, -7.0, 0.25, weight=2.0**20) for p in "abc"}
    total = Sum(params=CkksSum.Params(clip=0.5)).of(terms)
    require_within_bound(total, terms.values(), clip=0.5)
    assert total.mean["w"] == pytest.approx([0.5, -0.5, 0.25], abs=total.error_bound)


def test_the_record_says_when_the_key_is_shared() -> None:
    assert (CkksSum().label, CkksSum(CkksSum.Params(shared_key=True)).label) == ("ckks", "ckks+shared_key")


def test_all_at_the_clip_do_not_wrap_around() -> None:
    """The largest sum that there can be, and noise on top of it."""
    for count in (3, 8):
        total = Sum(count).of({p: update(1.0, -1.0, 1.0, weight=2.0**20) for p in NAMES[:count]})
        assert total.mean["w"] == pytest.approx([1.0, -1.0, 1.0], abs=1e-6)


def test_a_weight_of_zero_counts_for_nothing_and_all_of_zero_are_no_mean() -> None:
    terms = {**TERMS, "a": update(1.0, 1.0, 1.0, weight=0.0)}
    require_within_bound(Sum().of(terms), terms.values())
    with pytest.raises(ProtectionError, match="add up to 0"):
        Sum().of({p: update(weight=0.0) for p in "abc"})


def test_numbers_without_arrays_and_a_name_that_not_all_have() -> None:
    """What fewer than three parties have would show their own numbers: it is in no total."""
    run = Sum(4, scenes={"": {"layout": {}, "state": {}}})
    given = {
        p: Update({}, 1.0, {"y": -3.5, **({"x": 1e-9} if p != "a" else {}), **({"z": 1.0} if p in "bc" else {})})
        for p in "abcd"
    }
    total = run.of(given)
    assert total.sums == pytest.approx({"x": 3e-9, "y": -14.0}, abs=1e-11)
    assert (dict(total.mean), total.weight, total.error_bound) == ({}, 4.0, 0.0)


@pytest.mark.parametrize("layout", [{"s": ()}, {"e": (0,), "w": (2,)}, {"b": (1,), "a": (1, 1)}])
def test_shapes_of_every_kind(layout: dict[str, tuple[int, ...]]) -> None:
    def term(k: int) -> Update:
        return Update({n: np.full(s, 0.1 * k, np.float32) for n, s in layout.items()}, 2.0**20)

    run = Sum(scenes={"": {"layout": layout, "state": {}}})
    total = run.of({p: term(k) for k, p in enumerate("abc")})
    assert {n: a.shape for n, a in total.mean.items()} == layout
    assert flat(total.mean) == pytest.approx(0.1, abs=1e-6)


def test_a_term_of_several_messages(one_a_chunk: None) -> None:
    terms = {p: long_term(p, weight=2.0**20) for p in "abc"}
    run = long_sum()
    total = run.of(terms)
    require_within_bound(total, terms.values())
    assert len(run.said("upload")) == 3 * 3
    assert [m[2].fields["chunk"] for m in run.said("open")] == [0, 1, 2]
    assert len(run.said("next")) == 3, "two of three are sent unasked"


def test_never_more_than_two_messages_of_a_term_are_under_way(one_a_chunk: None) -> None:
    """So that memory is bounded, at a party as on the way."""
    layout = {"w": (6 * SLOTS,)}
    run = Sum(scenes={"": {"layout": layout, "state": {}}})
    for party in "abc":
        run.contribute(party, Update({"w": np.zeros(6 * SLOTS, np.float32)}, 1.0))
    most = 0
    while run.waiting:
        run.step()
        under_way = [m for m in run.waiting if m[2].fields["stage"] in ("upload", "open", "opened")]
        for party in (*"abc", COORDINATOR):
            most = max(most, sum(m[0] == party for m in under_way))
    assert most == 2
    assert run.total is not None


def test_bytes_of_an_upload() -> None:
    """33 a value at most, and what every message has besides."""
    values = 10 * SLOTS - 16
    run = Sum(scenes={"": {"layout": {"w": (values,)}, "state": {}}})
    run.of({p: Update({"w": np.zeros(values, np.float32)}, 1.0) for p in "abc"})
    for _, _, body, _ in run.said("upload"):
        assert body.tensors["ciphertexts"].nbytes <= 33 * (values + 16)


# --- who is missing ----------------------------------------------------------------------------------------------


def stop_at(run: Sum, party: str, stage: str) -> None:
    """From its first message of this stage on, nothing of `party` arrives."""
    gone: list[str] = []

    def touch(sender: str, receiver: str, body: Any) -> Any:
        if sender == party and body.fields["stage"] == stage:
            gone.append(party)
        return None if gone and sender == party else body

    run.touch = touch


@pytest.mark.parametrize("stage", ["ready", "upload"])
@pytest.mark.parametrize("party", ["a", "d"])
def test_who_drops_out_is_left_out_whole(stage: str, party: str) -> None:
    terms = {p: update(0.1, weight=float(k + 1), n=1.0) for k, p in enumerate("abcd")}
    run = Sum(4, quorum=3)
    stop_at(run, party, stage)
    total = run.of(terms)
    rest = {p: t for p, t in terms.items() if p != party}
    require_within_bound(total, rest.values())
    assert (total.contributors, total.missing) == (tuple(rest), (party,))
    assert (total.weight, total.sums["n"]) == (sum(t.weight for t in rest.values()), 3.0)


def test_who_drops_out_in_the_middle_of_its_upload_is_left_out_whole(one_a_chunk: None) -> None:
    terms = {p: long_term(p) for p in "abcd"}
    run = long_sum(4, quorum=3)
    run.touch = lambda s, r, body: None if s == "b" and body.fields.get("chunk", 0) >= 2 else body
    total = run.of(terms)
    assert (total.contributors, total.missing) == (("a", "c", "d"), ("b",))
    require_within_bound(total, [terms[p] for p in "acd"])
    assert len(run.said("upload", "b")) == 2


def test_who_did_not_contribute_in_time_is_missing() -> None:
    run = Sum(4, quorum=3)
    total = run.of({p: TERMS[p] for p in "abc"})
    assert (total.contributors, total.missing) == (("a", "b", "c"), ("d",))


@pytest.mark.parametrize(("count", "quorum", "there"), [(4, 4, "abc"), (4, 1, "ab"), (3, 0, "ab"), (3, 3, "a")])
def test_too_few_are_no_sum(count: int, quorum: int, there: str) -> None:
    run = Sum(count, quorum=quorum)
    with pytest.raises(QuorumLost, match="missing: "):
        run.of(dict.fromkeys(there, TERMS["a"]))
    assert run.total is None
    assert not run.said("open")


def test_too_few_whole_uploads_are_not_opened() -> None:
    run = Sum(4, quorum=1)
    run.touch = lambda s, r, body: None if s in "cd" and body.fields["stage"] == "upload" else body
    with pytest.raises(QuorumLost, match=r"2 of 4 parties contributed, the protection needs 3; missing: c, d"):
        run.of(dict.fromkeys("abcd", TERMS["a"]))
    assert not run.said("open")


@pytest.mark.parametrize(("stage", "message"), [("keys", "gives no keys"), ("opened", "does not open")])
def test_a_key_holder_that_is_gone(stage: str, message: str) -> None:
    run = Sum()
    stop_at(run, HOLDER, stage)
    with pytest.raises(RoundTimeout, match=message):
        run.of(TERMS)


def test_what_the_rounds_see_of_the_server() -> None:
    run = Sum(4, quorum=3)
    server = run.server
    assert (server.stage, server.least, server.able) == (0, 3, frozenset("abcd"))
    assert server.awaiting == frozenset("abcd")
    for party in "abc":
        run.contribute(party, TERMS[party])
    run.run()
    assert server.awaiting == frozenset("d")
    run.act(COORDINATOR, server.handle(SumExpired()))
    assert (server.stage, server.able, server.awaiting) == (1, frozenset("abc"), frozenset("abc"))
    while not run.said("open"):
        run.step()
    assert (server.stage, server.awaiting) == (2, {HOLDER})
    run.run()
    assert (server.stage, server.awaiting) == (3, frozenset())


def test_while_keys_are_missing_the_key_holder_is_awaited() -> None:
    run = Sum()
    run.touch = lambda s, r, body: None if s == HOLDER else body
    for party in "abc":
        run.contribute(party, TERMS[party])
    run.run()
    assert (run.server.stage, run.server.awaiting) == (1, {HOLDER})


def test_after_the_end_nothing_is_heard() -> None:
    run = Sum()
    run.of(TERMS)
    for event in (SumReceived("a", run.said("ready", "a")[0][2]), SumExpired()):
        with pytest.raises(PeerViolation, match="after the end"):
            run.server.handle(event)


# --- turns -------------------------------------------------------------------------------------------------------


def test_two_upload_at_once_where_memory_is_short() -> None:
    terms = {p: update(0.1 * k, weight=2.0**20) for k, p in enumerate("abcde")}
    run = Sum(5)
    run.server = Server(agreed(COORDINATOR, 5), {}, room=0)
    for party, term in terms.items():
        run.contribute(party, term)
    while run.waiting:
        run.step()
        uploading = [p for p, u in run.server._uploads.items() if u.turn and not u.whole]
        assert len(uploading) <= 2
    assert run.total is not None
    require_within_bound(run.total, terms.values())


def test_who_has_a_turn_and_does_nothing_costs_one_wait_and_no_other_partys_place() -> None:
    terms = {p: update(0.1 * k, weight=2.0**20) for k, p in enumerate("abcde")}
    run = Sum(5, quorum=3)
    run.server = Server(Agreed(run.scene(COORDINATOR), 1.0, 2.0**20, False), {}, room=0)
    run.touch = lambda s, r, body: None if s in "ab" and body.fields["stage"] == "upload" else body
    for party, term in terms.items():
        run.contribute(party, term)
    run.run()
    assert (run.server.awaiting, run.server.stage) == ({"a", "b"}, 1)
    run.act(COORDINATOR, run.server.handle(SumExpired()))
    assert run.server.stage == 2, "a new wait begins"
    run.run()
    assert run.total is not None
    assert (run.total.contributors, run.total.missing) == (("c", "d", "e"), ("a", "b"))
    require_within_bound(run.total, [terms[p] for p in "cde"])


# --- a party's own term ------------------------------------------------------------------------------------------

BAD = {
    "another name": Update({"x": np.zeros(3, np.float32), "v": np.zeros((2, 2), np.float32)}, 1.0),
    "a name less": Update({"w": np.zeros(3, np.float32)}, 1.0),
    "another shape": replace(update(), arrays={**update().arrays, "v": np.zeros(4, np.float32)}),
    "float64": replace(update(), arrays={**update().arrays, "w": np.zeros(3)}),
    "NaN": update(float("nan"), 0, 0),
    "infinity": update(1, float("-inf"), 0),
    "negative weight": update(weight=-1.0),
    "a weight that is NaN": update(weight=float("nan")),
    "a weight above the largest": update(weight=2.0**20 + 1),
    "a weight too small to be known": update(weight=1e-7),
    "a sum that is NaN": update(n=float("nan")),
    "a sum that is infinite": update(n=float("inf")),
    "a sum that overflows with others": update(n=1e26),
}


@pytest.mark.parametrize("which", sorted(BAD))
def test_a_bad_term_is_refused_before_anything_is_said(which: str) -> None:
    run = Sum()
    with pytest.raises(ProtectionError):
        run.contribute("a", BAD[which])
    assert not run.sent
    assert run.of(TERMS).contributors == ("a", "b", "c"), "a good one is still taken"


def test_one_term_a_round_and_a_whole_seed() -> None:
    run = Sum()
    with pytest.raises(InternalError, match="31 bytes"):
        run.parties["a"].handle(SumContribute(TERMS["a"], bytes(31)))
    run.contribute("a", TERMS["a"])
    with pytest.raises(InternalError, match="has its term"):
        run.contribute("a", TERMS["a"])


def test_the_term_is_not_written_to() -> None:
    term = update(0.5, 0.25, 0.125, weight=2.0)
    for array in term.arrays.values():
        array.flags.writeable = False
    before = {name: array.copy() for name, array in term.arrays.items()}
    Sum().of(dict.fromkeys("abc", term))
    assert all((term.arrays[name] == before[name]).all() for name in before)


def test_the_same_events_give_the_same_messages_but_for_the_ciphertexts() -> None:
    def messages(ciphertexts: bool) -> Iterator[Any]:
        run = Sum()
        run.contribute("a", TERMS["a"])
        for _, _, body, _ in run.sent:
            yield {**body.fields}, {n: t.tobytes() for n, t in body.tensors.items() if ciphertexts}

    assert list(messages(False)) == list(messages(False))


# --- arithmetic --------------------------------------------------------------------------------------------------


@given(numbers=st.lists(st.lists(st.integers(0, 2**128 - 1), min_size=2, max_size=2), min_size=1, max_size=9))
def test_limbs_add_up_to_the_sum_of_numbers(numbers: list[list[int]]) -> None:
    total = sum(limbs(each) for each in numbers)
    assert isinstance(total, np.ndarray)
    assert total.max() <= len(numbers) * 0xFFFF
    assert numbers_from(total) == [sum(column) % 2**128 for column in zip(*numbers, strict=True)]


def test_the_noise_is_even_on_both_sides_and_new_for_every_label() -> None:
    first, second = flood(b"s" * 32, b"1", 100_000), flood(b"s" * 32, b"2", 100_000)
    for noise in (first, second):
        assert np.abs(noise).max() == FLOOD - 1
        assert abs(noise.mean()) < 5 * noise.std() / np.sqrt(noise.size)
        # of a triangular distribution of FLOOD steps to either side
        assert noise.var() == pytest.approx((FLOOD**2 - 1) / 6, rel=0.02)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02
    assert (flood(b"s" * 32, b"1", 100_000) == first).all()
    assert (flood(b"t" * 32, b"1", 100) != first[:100]).any()


def test_the_noise_is_far_above_the_error_that_it_drowns() -> None:
    """In steps: the error of a sum of eight is about 3e-5, that of a sum of a hundred 1e-4."""
    assert flood(b"s" * 32, b"x", 4096).std() > 5e4 * 1e-4


def test_what_the_plan_shows() -> None:
    assert CkksSum.hides_terms
    assert CkksSum.needs_key_holder
    assert set(CkksSum.learns) == {"coordinator", "key_holder", "contributors", "key_holder with coordinator"}
    assert "key holder" in CkksSum.summary
    with pytest.raises(ProtectionError, match="no single update"):
        CkksSum().server(scene_of(COORDINATOR), keep_terms=True)


def test_a_larger_cohort_has_larger_steps() -> None:
    assert agreed("a", 8).fixed.step > agreed("a", 3).fixed.step
