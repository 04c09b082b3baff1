"""The contract of every weighted sum: the same result within the stated error, nothing by halves.

First what sums that show their terms promise (one message of each party), then what every sum does.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fate_llm.core import plugins
from fate_llm.core.errors import FateError, PeerViolation, ProtectionError, QuorumLost
from fate_llm.core.interfaces import (
    SecureSum,
    SumContribute,
    SumExpired,
    SumFinished,
    SumKeep,
    SumReceived,
    SumScene,
    SumSend,
    SumServer,
)
from fate_llm.core.values import Cohort, Payload, Total, Update
from tests.masking import TestSigner

NAMES = plugins.names("sum")
OPEN = [name for name in NAMES if not plugins.load("sum", name).hides_terms]
LAYOUT = {"w": (2,)}


def test_there_is_a_sum() -> None:
    assert NAMES, "no sum found"


@pytest.fixture(params=OPEN)
def secure_sum(request: pytest.FixtureRequest) -> Any:
    return plugins.load("sum", request.param)()


def cohort(count: int, quorum: int | None = None) -> Cohort:
    return Cohort(tuple("abcdef"[:count]), "z", count if quorum is None else quorum)


def vector(*values: float) -> dict[str, np.ndarray]:
    return {"w": np.array(values, np.float32)}


class Run:
    """One sum: parties and server, with messages going straight through in any order given."""

    def __init__(self, secure_sum: SecureSum, who: Cohort, layout: Any, **options: Any) -> None:
        self.server = secure_sum.server(SumScene(who, who.coordinator, layout), **options)
        self.parties = {p: secure_sum.party(SumScene(who, p, layout)) for p in who.contributors}
        self.total: Total | None = None

    def messages(self, party: str, update: Update) -> list[SumReceived]:
        actions = self.parties[party].handle(SumContribute(update))
        return [SumReceived(party, a.body) for a in actions if isinstance(a, SumSend)]

    def feed(self, event: Any) -> None:
        pending = self.server.handle(event)
        for action in pending:
            if isinstance(action, SumFinished):
                assert self.total is None
                self.total = action.total
            elif action.receiver in self.parties:
                for answer in self.parties[action.receiver].handle(SumReceived("z", action.body)):
                    assert isinstance(answer, SumSend)
                    self.feed(SumReceived(action.receiver, answer.body))

    def of(self, updates: dict[str, Update], order: Any = None) -> Total:
        for party in order or updates:
            for event in self.messages(party, updates[party]):
                self.feed(event)
        if self.total is None:
            self.feed(SumExpired())
        assert self.total is not None
        return self.total


def exact_mean(updates: list[Update], name: str) -> list[Fraction]:
    weight = sum(Fraction(u.weight) for u in updates)
    flat = [[Fraction(float(v)) for v in u.arrays[name].reshape(-1)] for u in updates]
    return [
        sum(Fraction(u.weight) * row[i] for u, row in zip(updates, flat, strict=True)) / weight
        for i in range(len(flat[0]))
    ]


SHAPES = st.sampled_from([{"w": (2,)}, {"w": ()}, {"w": (3, 2), "v": (1,)}, {"e": (0,), "w": (4,)}])
VALUES = st.floats(-1e6, 1e6, width=32)
WEIGHTS = st.one_of(st.integers(1, 10**6).map(float), st.floats(1e-6, 1e6), st.just(0.0))


@st.composite
def problems(draw: Any) -> tuple[Any, list[Update]]:
    layout = draw(SHAPES)
    count = draw(st.integers(1, 5))
    weights = draw(st.lists(WEIGHTS, min_size=count, max_size=count).filter(any))
    return layout, [
        Update({n: draw(hnp.arrays(np.float32, s, elements=VALUES)) for n, s in layout.items()}, w, {"n": w})
        for w in weights
    ]


@pytest.mark.parametrize("name", OPEN)
@given(problem=problems(), data=st.data())
@settings(deadline=None, max_examples=60)
def test_the_result_is_exact_within_its_bound_and_the_same_in_any_order(name: str, problem: Any, data: Any) -> None:
    layout, updates = problem
    who, secure_sum = cohort(len(updates)), plugins.load("sum", name)()
    given_by = dict(zip(who.contributors, updates, strict=True))
    total = Run(secure_sum, who, layout).of(given_by)
    for key in layout:
        assert isinstance(total.mean[key], np.ndarray)
        assert total.mean[key].dtype == np.float32
        assert total.mean[key].shape == layout[key]
        exact = exact_mean(updates, key)
        for value, wanted in zip(total.mean[key].reshape(-1), exact, strict=True):
            assert abs(Fraction(float(value)) - wanted) <= Fraction(total.error_bound)
    assert total.weight == pytest.approx(sum(u.weight for u in updates))
    assert total.sums["n"] == pytest.approx(sum(u.weight for u in updates))
    # any order of arrival gives the same bits
    order = data.draw(st.permutations(list(who.contributors)))
    other = Run(secure_sum, who, layout).of(given_by, order)
    assert {n: a.tobytes() for n, a in other.mean.items()} == {n: a.tobytes() for n, a in total.mean.items()}
    assert (other.weight, other.sums, other.contributors) == (total.weight, total.sums, total.contributors)


def test_the_bound_is_useful(secure_sum: SecureSum) -> None:
    total = Run(secure_sum, cohort(3), LAYOUT).of({p: Update(vector(1.0, -1.0), 3.0) for p in "abc"})
    assert total.error_bound < 1e-4


def test_nine_to_one_weights_reproduce_the_pooled_mean(secure_sum: SecureSum) -> None:
    # Given ten records, nine of them at one party (a peer's plain aggregator returned the sum of the terms)
    records = np.arange(10, dtype=np.float32)
    updates = {
        "a": Update(vector(records[:9].mean(), 0), 9.0),
        "b": Update(vector(records[9:].mean(), 0), 1.0),
    }
    total = Run(secure_sum, cohort(2), LAYOUT).of(updates)
    assert total.mean["w"][0] == pytest.approx(records.mean(), abs=total.error_bound + 1e-6)
    quarters = {"a": Update(vector(1, 2), 0.25), "b": Update(vector(3, 4), 0.75)}
    assert Run(secure_sum, cohort(2), LAYOUT).of(quarters).mean["w"] == pytest.approx([2.5, 3.5], abs=1e-3)


def test_sums_of_numbers_need_no_arrays(secure_sum: SecureSum) -> None:
    updates = {"a": Update({}, 1.0, {"x": 1.0, "y": 2.0}), "b": Update({}, 1.0, {"x": 3.0})}
    total = Run(secure_sum, cohort(2), {}).of(updates)
    assert total.sums == pytest.approx({"x": 4.0, "y": 2.0})
    assert total.mean == {}


def test_the_terms_are_not_written_to(secure_sum: SecureSum) -> None:
    updates = {p: Update(vector(1, 2), 2.0, {"n": 1.0}) for p in "ab"}
    for update in updates.values():
        update.arrays["w"].flags.writeable = False
    total = Run(secure_sum, cohort(2), LAYOUT).of(updates)
    assert not any(np.shares_memory(total.mean["w"], u.arrays["w"]) for u in updates.values())


def test_one_weight_of_zero_counts_for_nothing_and_all_of_zero_is_refused(secure_sum: SecureSum) -> None:
    updates = {"a": Update(vector(9, 9), 0.0), "b": Update(vector(1, 2), 3.0)}
    assert Run(secure_sum, cohort(2), LAYOUT).of(updates).mean["w"] == pytest.approx([1, 2], abs=1e-3)
    with pytest.raises(ProtectionError):
        Run(secure_sum, cohort(2), LAYOUT).of({p: Update(vector(1, 2), 0.0) for p in "ab"})


# --- who is missing -----------------------------------------------------------------------------------------


def test_the_sum_of_those_who_came_when_the_time_is_over(secure_sum: SecureSum) -> None:
    total = Run(secure_sum, cohort(3, quorum=2), LAYOUT).of(
        {"c": Update(vector(3, 3), 1.0), "a": Update(vector(1, 1), 1.0)}
    )
    assert total.mean["w"] == pytest.approx([2, 2], abs=1e-3)
    assert (total.contributors, total.missing) == (("a", "c"), ("b",))


def test_too_few_are_refused_when_the_time_is_over(secure_sum: SecureSum) -> None:
    run = Run(secure_sum, cohort(3, quorum=2), LAYOUT)
    with pytest.raises(QuorumLost):
        run.of({"a": Update(vector(1, 1), 1.0)})
    assert run.total is None


def test_a_quorum_of_zero_needs_somebody(secure_sum: SecureSum) -> None:
    with pytest.raises(QuorumLost):
        secure_sum.server(SumScene(cohort(2, quorum=0), "z", LAYOUT)).handle(SumExpired())


def test_awaiting_names_those_whose_answer_is_missing(secure_sum: SecureSum) -> None:
    run = Run(secure_sum, cohort(3), LAYOUT)
    assert run.server.awaiting == {"a", "b", "c"}
    for event in run.messages("b", Update(vector(1, 1), 1.0)):
        run.feed(event)
    assert "b" not in run.server.awaiting


def test_after_the_end_nothing_is_added(secure_sum: SecureSum) -> None:
    run = Run(secure_sum, cohort(3, quorum=2), LAYOUT)
    late = run.messages("c", Update(vector(100, 100), 1.0, {"n": 1.0}))
    total = run.of({p: Update(vector(1, 1), 1.0, {"n": 1.0}) for p in "ab"})
    for event in (*late, SumExpired()):
        with pytest.raises(PeerViolation):
            run.server.handle(event)
    assert (total.mean["w"] == 1).all()
    assert total.sums["n"] == pytest.approx(2.0)
    assert run.server.awaiting == frozenset()


# --- what is refused ----------------------------------------------------------------------------------------


def test_a_party_gives_one_term(secure_sum: SecureSum) -> None:
    run = Run(secure_sum, cohort(2), LAYOUT)
    run.messages("a", Update(vector(1, 1), 1.0))
    with pytest.raises(FateError):
        run.messages("a", Update(vector(2, 2), 1.0))


BAD_UPDATES = {
    "another name": Update({"v": np.zeros(2, np.float32)}, 1.0),
    "a name more": Update({**vector(1, 1), "v": np.zeros(2, np.float32)}, 1.0),
    "no arrays": Update({}, 1.0),
    "another shape": Update(vector(1, 2, 3), 1.0),
    "another shape of the same size": Update({"w": np.zeros((2, 1), np.float32)}, 1.0),
    "float64": Update({"w": np.zeros(2)}, 1.0),
    "int32": Update({"w": np.zeros(2, np.int32)}, 1.0),
    "NaN": Update(vector(1, float("nan")), 1.0),
    "infinity": Update(vector(1, float("-inf")), 1.0),
    "negative weight": Update(vector(1, 1), -1.0),
    "weight NaN": Update(vector(1, 1), float("nan")),
    "weight infinite": Update(vector(1, 1), float("inf")),
    "weight that overflows": Update(vector(1, 1), 1e300),
    "weight that vanishes": Update(vector(1, 1), 1e-300),
    "values that overflow with their weight": Update(vector(3e38, 1), 10.0),
    "values that overflow with others": Update(vector(3e38, 1), 1.0),
    "a sum that is NaN": Update(vector(1, 1), 1.0, {"n": float("nan")}),
    "a sum that is infinite": Update(vector(1, 1), 1.0, {"n": float("inf")}),
    "a sum that overflows with others": Update(vector(1, 1), 1.0, {"n": 1.7e308}),
}


@pytest.mark.parametrize("which", sorted(BAD_UPDATES))
def test_a_party_refuses_a_bad_update_of_its_own(secure_sum: SecureSum, which: str) -> None:
    run = Run(secure_sum, cohort(2), LAYOUT)
    with pytest.raises(ProtectionError):
        run.messages("a", BAD_UPDATES[which])
    assert run.messages("a", Update(vector(1, 1), 1.0)), "a good one is still taken"


def forged(update: Update) -> Payload:
    """The message of a plain party that does not check."""
    return Payload({"weight": update.weight, "sums": dict(update.sums)}, update.arrays)


GOOD = Update(vector(1, 1), 1.0, {"n": 1.0})
LIES = {
    **{name: forged(update) for name, update in BAD_UPDATES.items()},
    "no weight": Payload({"sums": {}}, GOOD.arrays),
    "a field more": Payload({"weight": 1.0, "sums": {}, "more": 1}, GOOD.arrays),
    "weight is text": Payload({"weight": "1", "sums": {}}, GOOD.arrays),
    "weight is true": Payload({"weight": True, "sums": {}}, GOOD.arrays),
    "weight of 400 digits": Payload({"weight": 10**400, "sums": {}}, GOOD.arrays),
    "sums is a list": Payload({"weight": 1.0, "sums": [1]}, GOOD.arrays),
    "sums hold text": Payload({"weight": 1.0, "sums": {"n": "1"}}, GOOD.arrays),
    "a sum of 400 digits": Payload({"weight": 1.0, "sums": {"n": -(10**400)}}, GOOD.arrays),
    "nothing": Payload(),
}


@pytest.mark.parametrize("which", sorted(LIES))
def test_a_lie_is_refused_and_changes_nothing(secure_sum: SecureSum, which: str) -> None:
    # Given a sum in which `a` lies first
    run = Run(secure_sum, cohort(3, quorum=2), LAYOUT)
    with pytest.raises(PeerViolation):
        run.server.handle(SumReceived("a", LIES[which]))
    # Then the sum is what it would have been
    honest = Run(secure_sum, cohort(3, quorum=2), LAYOUT)
    updates = {p: Update(vector(i, 1), 1.0, {"n": 1.0}) for i, p in enumerate("abc")}
    one, other = run.of(updates), honest.of(updates)
    assert (one.mean["w"] == other.mean["w"]).all()
    assert (one.sums, one.weight, one.contributors) == (other.sums, other.weight, other.contributors)


def test_a_second_term_and_a_strangers_term_are_refused(secure_sum: SecureSum) -> None:
    run = Run(secure_sum, cohort(3, quorum=2), LAYOUT)
    (first,) = run.messages("a", GOOD)[:1]
    run.feed(first)
    for lie in (first, SumReceived("stranger", first.body), SumReceived("z", first.body)):
        with pytest.raises(PeerViolation):
            run.server.handle(lie)
    total = run.of(dict.fromkeys("bc", GOOD))
    assert (total.contributors, total.weight) == (("a", "b", "c"), pytest.approx(3.0))


@pytest.mark.parametrize("side", ["server", "party"])
def test_an_event_that_is_not_for_this_side_is_refused(secure_sum: SecureSum, side: str) -> None:
    run = Run(secure_sum, cohort(2), LAYOUT)
    machine: Any = run.server if side == "server" else run.parties["a"]
    events: list[Any] = [object(), SumContribute(GOOD) if side == "server" else SumExpired()]
    for event in events:
        with pytest.raises(FateError):
            machine.handle(event)
    assert run.of(dict.fromkeys("ab", GOOD)).contributors == ("a", "b")


def test_keep_terms_hands_the_terms_on_or_is_refused(secure_sum: SecureSum) -> None:
    updates = {p: Update(vector(i, 2 * i), 1.0 + i) for i, p in enumerate("abc")}
    if secure_sum.hides_terms:
        with pytest.raises(ProtectionError):
            secure_sum.server(SumScene(cohort(3), "z", LAYOUT), keep_terms=True)
        return
    total = Run(secure_sum, cohort(3), LAYOUT, keep_terms=True).of(updates)
    assert set(total.terms) == set("abc")
    assert all((total.terms[p].arrays["w"] == updates[p].arrays["w"]).all() for p in "abc")
    assert Run(secure_sum, cohort(3), LAYOUT).of(updates).terms == {}


def test_every_order_of_three_gives_the_same_bits(secure_sum: SecureSum) -> None:
    updates = {p: Update(vector(0.1 * (i + 1), 1 / 3), 0.7 * (i + 1)) for i, p in enumerate("abc")}
    seen = {
        Run(secure_sum, cohort(3), LAYOUT).of(updates, order).mean["w"].tobytes()
        for order in itertools.permutations("abc")
    }
    assert len(seen) == 1


def test_a_server_is_what_the_seam_says(secure_sum: SecureSum) -> None:
    server: SumServer = secure_sum.server(SumScene(cohort(2), "z", LAYOUT))
    assert isinstance(server.awaiting, frozenset)
    assert secure_sum.summary
    assert isinstance(secure_sum.hides_terms, bool)


# --- every sum, whatever it hides ---------------------------------------------------------------------------


LARGEST_WEIGHT = 1e3
FIVE = cohort(5, quorum=3)


def made(name: str) -> SecureSum:
    """With room for the weights of these tests, where a sum asks for that."""
    plugin = plugins.load("sum", name)
    wanted = {"largest_weight": LARGEST_WEIGHT} if "largest_weight" in plugin.Params.model_fields else {}
    found: SecureSum = plugin(plugin.Params(**wanted))
    return found


class Whole:
    """One sum of any kind: parties, server and key holder, with all their messages.

    lost: messages that never arrive, as (party, its how-manieth).
    """

    def __init__(self, secure_sum: SecureSum, who: Cohort = FIVE, layout: Any = LAYOUT, lost: Any = ()) -> None:
        self.secure_sum, self.who, self.layout = secure_sum, who, layout
        self.parties = {party: secure_sum.party(self.scene(party)) for party in who.contributors}
        self.server = secure_sum.server(self.scene("z"))
        self.holder = secure_sum.holder(self.scene("k"), b"k" * 32) if secure_sum.needs_key_holder else None
        self.lost, self.said = set(lost), dict.fromkeys(who.contributors, 0)
        self.queue: deque[tuple[str, SumReceived]] = deque()
        self.total: Total | None = None
        self.refused: list[PeerViolation] = []

    def scene(self, me: str) -> SumScene:
        state = {name: np.zeros(shape, np.float32) for name, shape in self.layout.items()}
        members = (*self.who.contributors, "z", "k")
        holder = "k" if self.secure_sum.needs_key_holder else None
        return SumScene(self.who, me, self.layout, state, signer=TestSigner(me, members), key_holder=holder)

    def act(self, who: str, actions: Any) -> None:
        for action in actions:
            if isinstance(action, SumFinished):
                assert self.total is None
                self.total = action.total
            elif isinstance(action, SumSend) and who in self.parties:
                self.said[who] += 1
                if (who, self.said[who]) not in self.lost:
                    self.queue.append(("z", SumReceived(who, action.body)))
            elif isinstance(action, SumSend):
                self.queue.append(
                    ("z", SumReceived("k", action.body, from_holder=True))
                    if who == "k"
                    else ("k" if action.to_holder else action.receiver, SumReceived("z", action.body))
                )
            else:
                assert isinstance(action, SumKeep)

    def offer(self, party: str, update: Update) -> None:
        seed = hashlib.sha256(party.encode()).digest()
        self.act(party, self.parties[party].handle(SumContribute(update, seed)))

    def pump(self) -> None:
        while self.queue:
            who, event = self.queue.popleft()
            machine: Any = {"z": self.server, "k": self.holder, **self.parties}[who]
            try:
                actions = machine.handle(event)
            except PeerViolation as refusal:
                self.refused.append(refusal)
                continue
            self.act(who, actions)

    def of(self, updates: dict[str, Update]) -> Total:
        for party, update in updates.items():
            self.offer(party, update)
            self.pump()
        for _ in range(8):
            if self.total is None:
                self.act("z", self.server.handle(SumExpired()))
                self.pump()
        assert self.total is not None
        return self.total


@pytest.fixture(params=NAMES)
def any_sum(request: pytest.FixtureRequest) -> SecureSum:
    return made(request.param)


UNIT = st.floats(-1, 1, width=32)


@st.composite
def small_problems(draw: Any) -> tuple[Any, list[Update]]:
    layout = draw(SHAPES)
    count = draw(st.integers(3, 6))
    weights = draw(st.lists(st.one_of(st.just(0.0), st.floats(0.5, 1e3)), min_size=count, max_size=count).filter(any))
    return layout, [
        Update({n: draw(hnp.arrays(np.float32, s, elements=UNIT)) for n, s in layout.items()}, w, {"n": w})
        for w in weights
    ]


@pytest.mark.parametrize("name", NAMES)
@given(problem=small_problems())
@settings(deadline=None, max_examples=10)
def test_every_total_is_the_mean_within_its_own_bound(name: str, problem: Any) -> None:
    layout, updates = problem
    who = cohort(len(updates))
    total = Whole(made(name), who, layout).of(dict(zip(who.contributors, updates, strict=True)))
    for key in layout:
        assert (total.mean[key].dtype, total.mean[key].shape) == (np.float32, layout[key])
        for value, wanted in zip(total.mean[key].reshape(-1), exact_mean(updates, key), strict=True):
            assert abs(Fraction(float(value)) - wanted) <= Fraction(total.error_bound)
    assert total.weight == pytest.approx(sum(u.weight for u in updates), rel=1e-6)
    assert total.sums["n"] == pytest.approx(sum(u.weight for u in updates), rel=1e-6)
    assert (total.contributors, total.missing) == (who.contributors, ())


def test_every_bound_is_useful(any_sum: SecureSum) -> None:
    total = Whole(any_sum).of({p: Update(vector(0.5, -0.5), 300.0) for p in FIVE.contributors})
    assert total.error_bound < 1e-4
    assert total.mean["w"] == pytest.approx([0.5, -0.5], abs=total.error_bound)


def test_every_sum_weighs_nine_to_one(any_sum: SecureSum) -> None:
    updates = {p: Update(vector(0.9 if p == "a" else 0.1, 0), 360.0 if p == "a" else 10.0) for p in "abcde"}
    total = Whole(any_sum).of(updates)
    assert total.mean["w"][0] == pytest.approx(0.82, abs=total.error_bound)


def test_every_sum_adds_numbers_without_arrays(any_sum: SecureSum) -> None:
    # Given a number that all have, and one that all but one have
    updates = {p: Update({}, 1.0, {"x": float(i), **({"y": -2.5} if i else {})}) for i, p in enumerate("abcde")}
    total = Whole(any_sum, layout={}).of(updates)
    assert total.sums == pytest.approx({"x": 10.0, "y": -10.0}, rel=1e-6)
    assert total.mean == {}


def test_no_sum_that_hides_its_terms_shows_a_number_that_one_party_has(any_sum: SecureSum) -> None:
    updates = {p: Update({}, 1.0, {"x": 1.0, **({"y": -2.5} if i == 1 else {})}) for i, p in enumerate("abcde")}
    total = Whole(any_sum, layout={}).of(updates)
    assert ("y" in total.sums) is not any_sum.hides_terms


def test_no_sum_writes_to_its_terms(any_sum: SecureSum) -> None:
    updates = {p: Update(vector(0.1, 0.2), 2.0, {"n": 1.0}) for p in "abcde"}
    for update in updates.values():
        update.arrays["w"].flags.writeable = False
    total = Whole(any_sum).of(updates)
    assert not any(np.shares_memory(total.mean["w"], u.arrays["w"]) for u in updates.values())


def test_every_sum_leaves_out_who_is_late(any_sum: SecureSum) -> None:
    updates = {p: Update(vector(0.1 * i, 0), 2.0, {"n": 1.0}) for i, p in enumerate("abcde") if p != "c"}
    total = Whole(any_sum).of(updates)
    assert (total.contributors, total.missing) == (("a", "b", "d", "e"), ("c",))
    assert total.mean["w"][0] == pytest.approx((0 + 0.1 + 0.3 + 0.4) / 4, abs=total.error_bound)
    assert total.sums["n"] == pytest.approx(4.0)


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_every_sum_goes_on_without_who_falls_silent(any_sum: SecureSum, nth: int) -> None:
    # Given that d says nothing from its nth message on
    whole = Whole(any_sum, lost=[("d", number) for number in range(nth, 40)])
    updates = {p: Update(vector(0.1 * i, 0), 2.0, {"n": 1.0}) for i, p in enumerate("abcde")}
    total = whole.of(updates)
    # Then the total is that of those whom it names
    values = [updates[p].arrays["w"][0] for p in total.contributors]
    assert total.mean["w"][0] == pytest.approx(sum(values) / len(values), abs=total.error_bound)
    assert total.sums["n"] == pytest.approx(len(values))
    assert set(total.missing) == set("abcde") - set(total.contributors) <= {"d"}


def test_every_sum_refuses_too_few(any_sum: SecureSum) -> None:
    whole = Whole(any_sum)
    with pytest.raises(QuorumLost):
        whole.of({p: Update(vector(0.1, 0), 1.0) for p in "ab"})
    assert whole.total is None


def test_every_server_says_who_is_awaited_able_and_needed(any_sum: SecureSum) -> None:
    whole = Whole(any_sum)
    assert whole.server.awaiting == whole.server.able == set("abcde")
    assert 3 <= whole.server.least <= 5
    stage = whole.server.stage
    total = whole.of({p: Update(vector(0.1, 0), 1.0) for p in "abcde"})
    assert whole.server.awaiting == frozenset() and total.weight == pytest.approx(5.0)
    assert whole.server.stage >= stage
    with pytest.raises(PeerViolation):
        whole.server.handle(SumExpired())


def test_every_party_gives_one_term(any_sum: SecureSum) -> None:
    whole = Whole(any_sum)
    whole.offer("a", Update(vector(0.1, 0), 1.0))
    with pytest.raises(FateError):
        whole.offer("a", Update(vector(0.2, 0), 1.0))


OVERFLOWS = {"values that overflow with their weight", "values that overflow with others"}


@pytest.mark.parametrize("which", sorted(BAD_UPDATES.keys() - OVERFLOWS - {"weight that vanishes"}))
def test_every_party_refuses_a_bad_update_of_its_own(any_sum: SecureSum, which: str) -> None:
    whole = Whole(any_sum)
    with pytest.raises(ProtectionError):
        whole.offer("a", BAD_UPDATES[which])
    assert not whole.queue, "nothing was sent"
    whole.offer("a", Update(vector(0.1, 0), 1.0))
    assert whole.queue, "a good one is still taken"


@pytest.mark.parametrize("side", ["server", "party"])
def test_every_side_refuses_what_is_not_for_it(any_sum: SecureSum, side: str) -> None:
    whole = Whole(any_sum)
    machine: Any = whole.server if side == "server" else whole.parties["a"]
    events: list[Any] = [object(), SumContribute(GOOD, b"s" * 32) if side == "server" else SumExpired()]
    for event in (*events, SumReceived("stranger", Payload({"stage": "keys"})), SumReceived("z", Payload())):
        with pytest.raises(FateError):
            machine.handle(event)
    assert whole.of(dict.fromkeys("abcde", Update(vector(0.1, 0), 1.0))).contributors == tuple("abcde")


def test_every_sum_that_hides_its_terms_hands_none_on(any_sum: SecureSum) -> None:
    whole = Whole(any_sum)
    if any_sum.hides_terms:
        with pytest.raises(ProtectionError):
            any_sum.server(whole.scene("z"), keep_terms=True)
        assert whole.of(dict.fromkeys("abcde", Update(vector(0.1, 0), 1.0))).terms == {}


def test_every_sum_says_what_it_is(any_sum: SecureSum) -> None:
    assert any_sum.label.partition("+")[0] in NAMES
    assert any_sum.summary and isinstance(any_sum.hides_terms, bool) and isinstance(any_sum.needs_key_holder, bool)
    assert {"coordinator", "contributors"} <= any_sum.learns.keys()
    assert ("key_holder" in any_sum.learns) == any_sum.needs_key_holder
    if not any_sum.needs_key_holder:
        with pytest.raises(FateError):
            any_sum.holder(Whole(any_sum).scene("k"), b"k" * 32)
