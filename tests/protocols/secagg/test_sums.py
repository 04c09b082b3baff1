"""Masked sums that go well, or end for want of parties: exact to the bit, within the stated bound, nothing opened."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fate_llm.core.errors import (
    ConfigurationError,
    FateError,
    InternalError,
    PeerViolation,
    PolicyError,
    ProtectionError,
    QuorumLost,
)
from fate_llm.core.interfaces import SumContribute, SumExpired, SumReceived
from fate_llm.core.values import Payload, SumFloor, Update
from fate_llm.protocols.secagg.agreement import usual_threshold
from fate_llm.protocols.secagg.party import MaskingParty, Phase
from fate_llm.protocols.secagg.terms import Words, read_total
from fate_llm.protocols.sums.secagg import SecAgg
from tests.masking import LAYOUT, Masking, body_bytes, make_update, names_of, same_total, true_mean
from tests.protocols.secagg.checks import STAGES, check_exact, dies, nothing_opened, present_in, said_once, within_bound


def of_size(count: int) -> Any:
    return pytest.param(count, marks=pytest.mark.slow) if count >= 100 else count


# --- exact ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, 4, 8, of_size(32), of_size(100)])
def test_the_total_is_the_integer_sum_to_the_bit(count: int) -> None:
    masking = Masking(count)
    total = check_exact(masking)
    within_bound(total, list(masking.updates.values()))
    assert total.contributors == masking.names and total.missing == ()
    assert not masking.refused
    said_once(masking)
    for name, mean in true_mean(list(masking.updates.values())).items():
        assert np.abs(total.mean[name] - mean).max() <= total.error_bound
        assert total.mean[name].dtype == np.float32 and total.mean[name].shape == LAYOUT[name]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("count", [4, 8])
def test_drop_outs_at_every_stage_down_to_the_threshold(count: int, stage: str) -> None:
    for dropped in range(1, count - usual_threshold(count) + 1):
        for lost in (names_of(count)[:dropped], names_of(count)[-dropped:]):
            masking = Masking(count, change=dies(lost, stage))
            counted = stage in ("consent", "unmask")  # then its vector is in
            total = masking.run()
            survivors = [name for name in masking.names if counted or name not in lost]
            check_exact(masking, survivors)
            assert total.missing == tuple(name for name in masking.names if name not in survivors)
            assert present_in(masking) == [n for n in masking.names if stage != "keys" or n not in lost]


@pytest.mark.slow
@pytest.mark.parametrize("count", [32, 100])
def test_drop_outs_of_a_large_cohort(count: int) -> None:
    most = count - usual_threshold(count)
    lost = names_of(count)[1 : 1 + most]
    by_stage = {name: STAGES[number % 5] for number, name in enumerate(lost)}

    def change(message: Any) -> list[Any]:
        stage = by_stage.get(message.sender) if message.to_server else None
        return [] if stage is not None and STAGES.index(message.stage) >= STAGES.index(stage) else [message]

    masking = Masking(count, change=change)
    masking.run()
    check_exact(masking, [n for n in masking.names if by_stage.get(n) in (None, "consent", "unmask")])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("count", "own"), [(3, False), (4, False), (8, False), (4, True)])
def test_below_the_threshold_nothing_is_opened(count: int, own: bool, stage: str) -> None:
    counted = count - own
    lost = names_of(count)[-(counted - usual_threshold(counted) + 1) :]
    masking = Masking(count, own=own, change=dies(lost, stage))
    masking.contribute()
    with pytest.raises(QuorumLost, match=r"p00\d") as caught:
        masking.finish()
    assert masking.total is None
    assert all(name in caught.value.message for name in lost)
    if stage != "unmask":
        nothing_opened(masking)
    answered = {one.sender for one in masking.messages("unmask", to_server=True) if one.sender not in lost}
    assert len(answered) < usual_threshold(counted) + own


def test_the_quorum_of_a_job_counts_terms_and_not_those_who_answer_first() -> None:
    """Consent and answers end early; a quorum above the threshold must not be taken from those who were quick."""
    check_exact(Masking(4, quorum=4))
    check_exact(Masking(4, quorum=4, change=dies(["p001"], "consent")))  # its vector is in
    masking = Masking(4, quorum=4)
    least = [masking.server.least]
    masking.contribute()
    for stage in ("shares", "masked", "consent", "unmask"):
        masking.queue.appendleft(masking.until(stage, "z"))
        least.append(masking.server.least)
    assert least == [4, 4, 4, 3, 3]
    masking = Masking(8, quorum=7, change=dies(names_of(8)[:2], "masked"))
    masking.contribute()
    with pytest.raises(QuorumLost, match="7 are needed"):
        masking.finish()
    nothing_opened(masking)


SCHEDULES = {
    "count": st.integers(3, 6),
    "own": st.booleans(),
    "deaths": st.dictionaries(st.integers(1, 5), st.sampled_from(STAGES), max_size=2),
    "choices": st.lists(st.integers(0, 40), max_size=60),
    "twice": st.booleans(),
}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(**SCHEDULES)
def test_random_schedules(**schedule: Any) -> None:
    _schedule(**schedule)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(**SCHEDULES)
def test_many_random_schedules(**schedule: Any) -> None:
    _schedule(**schedule)


def _schedule(count: int, own: bool, deaths: dict[int, str], choices: list[int], twice: bool) -> None:
    """Any order between different ways, duplicates, deaths, stages cut short: the exact sum of enough, or nothing."""
    count += own
    when = {names_of(count)[number]: stage for number, stage in deaths.items() if number < count}

    def change(message: Any) -> list[Any]:
        stage = when.get(message.sender) if message.to_server else None
        if stage is not None and STAGES.index(message.stage) >= STAGES.index(stage):
            return []
        return [message, message] if twice else [message]

    masking = Masking(count, own=own, change=change)
    try:
        masking.contribute()
        for choice in choices:
            if choice == 40 and masking.total is None:
                masking._act("z", SumExpired(), masking.server.handle(SumExpired()))
            elif masking.queue:
                masking.step(choice)
        total = masking.finish()
    except QuorumLost:
        assert masking.total is None
        return
    assert same_total(total, masking.exact(total.contributors, present_in(masking)))
    assert len(total.contributors) >= masking.server.least >= 3
    assert set(total.contributors) | set(total.missing) == set(masking.names)
    said_once(masking)


# --- what is summed ---------------------------------------------------------------------------------------------


def test_additive_numbers_are_exact_and_those_who_lack_one_add_nothing() -> None:
    masking = Masking(8)
    total = masking.run()
    sums = [update.sums for update in masking.updates.values()]
    assert total.sums.keys() == {"loss_sum", "tokens", "test_loss_sum"}
    assert total.sums["tokens"] == sum(one["tokens"] for one in sums)  # whole numbers: no error at all
    assert total.weight == sum(update.weight for update in masking.updates.values())
    for name, value in total.sums.items():
        true = sum(Fraction(one.get(name, 0.0)) for one in sums)
        assert abs(Fraction(value) - true) <= Fraction(8, 2**41) + abs(true) / 2**52


def test_a_number_that_few_have_is_no_part_of_the_sum() -> None:
    """The loss on a test set that one party alone has would be shown as it is. The threshold counts, of U1."""
    for owners, counted in ((1, False), (2, False), (3, True), (4, True)):
        updates = {}
        for number, name in enumerate(names_of(4)):
            sums = {"loss_sum": 2.0} | ({"rare": 9.0} if number < owners else {})
            updates[name] = Update(make_update(number).arrays, 3.0, sums)
        total = check_exact(Masking(4, updates=dict(updates)))
        assert total.sums == {"loss_sum": 8.0} | ({"rare": 9.0 * owners} if counted else {})
        # A party that is lost after its keys still counts: the names were settled with them.
        lost = Masking(4, updates=dict(updates), change=dies(["p000"], "masked"))
        assert ("rare" in lost.run().sums) is counted


def test_numbers_alone_are_a_sum_too() -> None:
    masking = Masking(4, layout={})
    total = check_exact(masking)
    assert total.mean == {} and total.error_bound == 0.0
    nothing = {name: Update({}, 0.0, {"n": 1.0}) for name in names_of(3)}
    assert Masking(3, layout={}, updates=nothing).run().sums == {"n": 3.0}  # no weight is needed where there is no mean


def test_a_coordinator_that_contributes_does_not_count_itself() -> None:
    masking = Masking(4, own=True)
    check_exact(masking)
    assert masking.server.least == 4  # three others, and itself
    with pytest.raises(PolicyError, match="2 parties besides"):
        Masking(3, own=True)
    assert Masking(3).server.least == 3


def test_an_arbiter_counts_for_nothing() -> None:
    with pytest.raises(PolicyError, match="2 parties"):
        Masking(2)


@pytest.mark.parametrize("count", [3, 8, of_size(32), of_size(100)])
def test_everybody_at_the_clip_with_the_largest_weight_still_fits(count: int) -> None:
    """The worst case of the ring: one step more for each, and it would wrap around."""
    for sign in (1.0, -1.0):
        updates = {
            name: Update({k: np.full(s, sign, np.float32) for k, s in LAYOUT.items()}, 2.0**20, {})
            for name in names_of(count)
        }
        masking = Masking(count, updates=updates)
        total = check_exact(masking)
        for mean in total.mean.values():
            assert np.abs(mean - sign).max() <= total.error_bound < 1e-6
        scale = masking.agreement("p000").fixed_point.scale
        assert count * (math.ceil(scale) + 1) <= 2**31 - 1 < count * (math.ceil(scale) + 3)


def test_a_value_above_the_clip_is_cut_and_counted() -> None:
    above = np.nextafter(np.float32(1), np.float32(2))
    arrays = {"a.weight": np.full((3, 5), above, np.float32), "b": np.full(7, -3.4e38, np.float32)}
    masking = Masking(3, updates={"p000": Update(arrays, 100.0, {})})
    check_exact(masking)
    machine = masking.parties["p000"]
    assert isinstance(machine, MaskingParty) and machine.clipped == 22
    within_bound(masking.run() if masking.total is None else masking.total, list(masking.updates.values()))


@pytest.mark.parametrize("clip", [2.0**-100, 1e-3, 0.7, 1.0, 1e4])
def test_other_clips(clip: float) -> None:
    updates = {name: make_update(number, size=min(2 * clip, 1e30)) for number, name in enumerate(names_of(4))}
    masking = Masking(4, secure_sum=SecAgg(SecAgg.Params(clip=clip)), updates=updates)
    within_bound(check_exact(masking), list(updates.values()), clip)


def test_a_clip_that_leaves_no_precision_is_refused_at_set_up() -> None:
    with pytest.raises(ConfigurationError, match="clip"):
        Masking(4, secure_sum=SecAgg(SecAgg.Params(clip=1e9)))


@pytest.mark.parametrize("value", [1e-45, 1e-38, -1e-45, 0.0, -0.0])
def test_values_below_a_step_are_rounded_and_not_lost_on_average(value: float) -> None:
    updates = {n: Update({k: np.full(s, value, np.float32) for k, s in LAYOUT.items()}, 1.0) for n in names_of(3)}
    within_bound(check_exact(Masking(3, updates=updates)), list(updates.values()))


@settings(max_examples=25, deadline=None)
@given(
    weights=st.lists(st.floats(0.0, 2.0**20), min_size=4, max_size=4).filter(lambda w: sum(w) > 1e-3),
    size=st.floats(1e-6, 2.0),
)
def test_weights_and_sizes_within_the_bound_returned(weights: list[float], size: float) -> None:
    updates = {
        n: make_update(i, size=size, weight=w) for i, (n, w) in enumerate(zip(names_of(4), weights, strict=True))
    }
    total = check_exact(Masking(4, updates=updates))
    within_bound(total, list(updates.values()))


def test_a_weight_of_nothing_and_the_largest_one() -> None:
    updates = {"p000": make_update(0, weight=0.0), "p001": make_update(1, weight=2.0**20)}
    masking = Masking(4, updates=updates)
    within_bound(check_exact(masking), list(masking.updates.values()))


def test_weights_that_add_up_to_nothing_have_no_mean() -> None:
    masking = Masking(3, updates={name: make_update(i, weight=0.0) for i, name in enumerate(names_of(3))})
    with pytest.raises(ProtectionError, match="add up to 0"):
        masking.run()


# --- what is refused before anything leaves ---------------------------------------------------------------------

TOO_LARGE = 2.0**127 / 4 / 2**40  # for four terms of 128 bits with 40 after the point
WRONG: dict[str, tuple[Update, str]] = {
    "NaN": (
        Update({**make_update(0).arrays, "b": np.array([0, 1, 2, np.nan, 0, 0, 0], np.float32)}, 1.0),
        "not finite",
    ),
    "inf": (
        Update({**make_update(0).arrays, "b": np.array([0, np.inf, 2, 0, 0, 0, 0], np.float32)}, 1.0),
        "not finite",
    ),
    "-inf": (Update({**make_update(0).arrays, "b": np.full(7, -np.inf, np.float32)}, 1.0), "7 of 7"),
    "weight above": (make_update(0, weight=math.nextafter(2.0**20, math.inf)), "largest_weight|weight"),
    "weight below": (make_update(0, weight=-1e-300), "weight"),
    "weight NaN": (make_update(0, weight=math.nan), "weight"),
    "sum NaN": (Update(make_update(0).arrays, 1.0, {"loss_sum": math.nan}), "not finite"),
    "sum inf": (Update(make_update(0).arrays, 1.0, {"loss_sum": -math.inf}), "not finite"),
    "sum at the bound": (Update(make_update(0).arrays, 1.0, {"loss_sum": TOO_LARGE}), "too large"),
    "dtype": (Update({**make_update(0).arrays, "b": np.zeros(7)}, 1.0), "float64"),
    "shape": (Update({**make_update(0).arrays, "b": np.zeros((1, 7), np.float32)}, 1.0), r"\[1, 7\]"),
    "name missing": (Update({"b": np.zeros(7, np.float32)}, 1.0), "a.weight"),
    "name too many": (Update({**make_update(0).arrays, "c": np.zeros(1, np.float32)}, 1.0), "c"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_term_that_cannot_be_summed_is_refused_before_anything_is_said(case: str) -> None:
    update, text = WRONG[case]
    masking = Masking(4, updates={"p000": update})
    with pytest.raises(ProtectionError, match=text):
        masking.contribute("p000")
    assert not masking.sent and not masking.kept
    machine = masking.parties["p000"]
    assert isinstance(machine, MaskingParty) and machine.phase is Phase.NEW
    # The machine is as it was: a good term is taken, and the sum is exact.
    masking.updates["p000"] = make_update(0)
    check_exact(masking)


def test_a_number_just_below_the_bound_is_summed_by_all() -> None:
    most = math.nextafter(TOO_LARGE, 0.0)
    masking = Masking(4, updates={n: Update(make_update(0).arrays, 1.0, {"n": most}) for n in names_of(4)})
    assert masking.run().sums["n"] == pytest.approx(4 * most, rel=1e-15)


def test_few_rows_of_a_table_are_refused_unless_allowed() -> None:
    """A row that one party alone has touched is in the sum as it is."""
    layout = {"embedding": (16, 4), "bias": (16,)}
    table = np.zeros((16, 4), np.float32)
    table[3] = 0.5
    sparse = Update({"embedding": table, "bias": np.zeros(16, np.float32)}, 100.0)
    with pytest.raises(ProtectionError, match="touches few of 16 rows"):
        Masking(3, layout=layout, updates={"p001": sparse}).contribute("p001")
    check_exact(Masking(3, layout=layout, updates={"p001": sparse}, secure_sum=SecAgg(SecAgg.Params(sparse="allow"))))
    table[:8] = 0.5
    check_exact(Masking(3, layout=layout, updates={"p001": sparse}))  # half of them is not few
    table[:] = 0.0
    check_exact(Masking(3, layout=layout, updates={"p001": sparse}))  # nothing at all shows no row


def test_the_machines_want_their_own_events() -> None:
    masking = Masking(3)
    with pytest.raises(InternalError, match="SumExpired"):
        masking.parties["p000"].handle(SumExpired())
    masking.contribute("p000")
    with pytest.raises(InternalError, match="its term already"):
        masking.parties["p000"].handle(SumContribute(make_update(0), bytes(32)))
    with pytest.raises(FateError, match="SumContribute"):
        masking.server.handle(SumContribute(make_update(0), bytes(32)))
    with pytest.raises(ProtectionError, match="single update"):
        SecAgg().server(masking.scene("z"), keep_terms=True)
    with pytest.raises(InternalError, match="key holder"):
        SecAgg().holder(masking.scene("z"), bytes(32))
    with pytest.raises(InternalError, match="identity"):
        SecAgg().server(Masking(3, scene_of={"p000": {"signer": None}}).scene("p000"))


# --- what a party's own policy asks for -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "floor", "text"),
    [
        ({}, SumFloor(contributors=9), "from 9 on"),
        ({"threshold": 5}, SumFloor(), "threshold of 5 of 8.*from 6 on"),
        ({"threshold": 5}, SumFloor(threshold=6), "threshold of 5"),
        ({}, SumFloor(threshold=7), "threshold of 6.*from 7 on"),
        ({"clip": 1.0}, SumFloor(clip=0.5), "allows 0.5"),
        ({"threshold": 4}, SumFloor(threshold=1), "no policy allows less than 5"),
        ({"threshold": 1}, SumFloor(threshold=1), "no policy allows"),
    ],
)
def test_what_a_policy_does_not_allow_is_not_taken_part_in(params: dict[str, Any], floor: SumFloor, text: str) -> None:
    """One party's policy binds that party: it says nothing, whatever the pipeline and all others want."""
    secure_sum, lenient = SecAgg(SecAgg.Params(**params)), SumFloor(threshold=5)
    masking = Masking(8, secure_sum=SecAgg(), scene_of={"p002": {"floor": floor}}, floor=lenient)
    masking.secure_sum = secure_sum
    masking.parties["p002"] = secure_sum.party(masking.scene("p002"))
    with pytest.raises(PolicyError, match=text):
        masking.contribute("p002")
    assert not masking.sent and not masking.kept


def test_a_lower_threshold_when_every_policy_allows_it() -> None:
    secure_sum = SecAgg(SecAgg.Params(threshold=5))
    masking = Masking(8, secure_sum=secure_sum, floor=SumFloor(threshold=5), change=dies(names_of(8)[:3], "masked"))
    masking.run()
    check_exact(masking, names_of(8)[3:])
    with pytest.raises(ConfigurationError, match="never be reached"):
        Masking(8, secure_sum=SecAgg(SecAgg.Params(threshold=9)))


def test_a_policy_for_more_parties_binds_every_stage() -> None:
    """Seven of eight are enough for the threshold; a party that wants seven in every sum leaves one of six."""
    floor = SumFloor(contributors=7)
    masking = Masking(8, scene_of={"p000": {"floor": floor}}, change=dies(["p006", "p007"], "masked"))
    masking.contribute()
    with pytest.raises(PolicyError, match="6 parties; the policy of p000 wants 7"):
        masking.finish()
    assert not any(one.sender == "p000" for one in masking.messages("unmask", to_server=True))


def test_a_policy_does_not_count_the_coordinator() -> None:
    """Four besides the coordinator are wanted; when one of them is lost, four are left only with it."""
    floor = SumFloor(contributors=4)
    masking = Masking(5, own=True, scene_of={"p001": {"floor": floor}}, change=dies(["p004"], "masked"))
    masking.contribute()
    with pytest.raises(PolicyError, match="4 parties; the policy of p001 wants 5"):
        masking.finish()
    assert not any(one.sender == "p001" for one in masking.messages("unmask", to_server=True))
    # With all of them there it takes part, although the coordinator, whose policy wants less, ends the consents early.
    check_exact(Masking(5, own=True, scene_of={"p001": {"floor": floor}}))
    check_exact(Masking(8, scene_of={"p001": {"floor": SumFloor(contributors=8)}}))


def test_costs_are_as_stated() -> None:
    """4 bytes for each parameter and at most 1 KiB for each peer, in all stages together."""
    masking = Masking(8, layout={"w": (100_000,)})
    masking.run()
    for name in masking.names:
        out = sum(len(body_bytes(m.body)) for m in masking.sent if m.to_server and m.sender == name)
        back = sum(len(body_bytes(m.body)) for m in masking.sent if not m.to_server and m.receiver == name)
        assert out + back <= 4 * 100_000 + 1024 * 8


def test_a_late_message_and_a_stranger_change_nothing() -> None:
    masking = Masking(4, change=dies(["p003"], "keys"))
    masking.contribute()
    masking.pump()
    late = next(one for one in masking.sent if one.sender == "p003")
    masking.expire()
    with pytest.raises(FateError, match=r"late|after the end"):
        masking.server.handle(SumReceived("p003", late.body))
    with pytest.raises(FateError, match=r"not a contributor|after the end"):
        masking.server.handle(SumReceived("nobody", Payload({"stage": "keys"})))
    check_exact(masking, names_of(3))


def test_equal_terms_give_equal_bits_in_every_run() -> None:
    """Masks cancel, and the draws for rounding are those of round, party and state: not of attempt, job or keys."""
    one = Masking(4).run()
    for changes in ({"attempt": 2}, {"job": "job-2"}):
        scenes = dict.fromkeys((*names_of(4), "z"), changes)
        assert same_total(Masking(4, scene_of=scenes).run(), one)
    other = Masking(4, round=2).run()
    assert not same_total(other, one)  # else the errors of many rounds would add up instead of averaging out
    assert all(np.abs(other.mean[name] - one.mean[name]).max() <= 2 * one.error_bound for name in one.mean)


def test_who_was_left_out_of_a_stage_takes_no_part_in_the_next() -> None:
    other = Masking(4)
    other.run()
    for first, stage in (("keys", "shares"), ("shares", "masked")):
        masking = Masking(4, change=dies(["p003"], first))
        masking.contribute()
        masking.pump()
        masking._act("z", SumExpired(), masking._handle("z", SumExpired()))
        late = next(m for m in other.messages(stage, to_server=True) if m.sender == "p003")
        with pytest.raises(PeerViolation, match="takes no part"):
            masking.server.handle(SumReceived("p003", late.body))
        masking.finish()
        check_exact(masking, names_of(3))


def test_the_coordinator_s_policy_counts_terms_and_not_answers() -> None:
    """All eight vectors are in; seven answers are more than enough, whatever its policy wants in a sum."""
    masking = Masking(8, scene_of={"z": {"floor": SumFloor(contributors=8)}}, change=dies(["p007"], "consent"))
    check_exact(masking)
    masking = Masking(8, scene_of={"z": {"floor": SumFloor(contributors=8)}}, change=dies(["p007"], "masked"))
    masking.contribute()
    with pytest.raises(QuorumLost, match="8 are needed"):
        masking.finish()
    nothing_opened(masking)


def test_a_total_with_a_mask_still_on_is_none() -> None:
    agreement = Masking(4).agreement("p000")
    for weight in (5 * 2**60, 2**127, 2**128 - 2**40):  # five of the largest weight, far too much, minus one
        with pytest.raises(ProtectionError, match="cannot have"):
            read_total(Words(np.zeros(22, np.uint32), [weight]), LAYOUT, [], agreement, names_of(4), [])
