"""The rounds as pure machines: every transition, then arbitrary schedules against a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fate_llm.core.errors import FateError, InternalError, PeerViolation, ProtectionError, QuorumLost
from fate_llm.core.interfaces import SumAction, SumEvent, SumReceived, SumScene, SumSend
from fate_llm.core.values import Cohort, Payload, Total, Update
from fate_llm.protocols.rounds import machine as machines
from fate_llm.protocols.rounds.machine import (
    ANSWER,
    HELLO,
    STATE,
    TERM,
    Collected,
    ContributorMachine,
    ContributorPhase,
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
)
from fate_llm.protocols.sums.plain import PlainSum

PATIENCE = 10.0
MakeCohort = Callable[..., Cohort]


def state(value: float = 0.0, size: int = 2) -> dict[str, np.ndarray]:
    return {"w": np.full(size, value, np.float32)}


def update(value: float, weight: float = 1.0) -> Update:
    return Update(state(value), weight, {"loss": value * weight, "tokens": weight})


def freeze(value: Any) -> Any:
    """Everything inside a value as comparable data, array contents included."""
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, Mapping):
        return [(freeze(k), freeze(v)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return [freeze(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(freeze(item) for item in value)
    if isinstance(value, BaseException):
        return (type(value).__name__, str(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return (type(value).__name__, freeze(fields))
    if hasattr(value, "__dict__") and not isinstance(value, type):
        return (type(value).__name__, freeze(vars(value)))
    return value


def coordinator(cohort: Cohort, *, rounds: int = 2, **settings: Any) -> CoordinatorMachine:
    return CoordinatorMachine(cohort, rounds, PATIENCE, PlainSum(), **settings)


def contributor(cohort: Cohort, me: str = "a", *, rounds: int = 2) -> ContributorMachine:
    return ContributorMachine(cohort, me, rounds, PlainSum())


def hello(cohort: Cohort, party: str, size: int = 2) -> Heard:
    (tell,) = contributor(cohort, party).handle(Join(state(size=size)))
    assert isinstance(tell, Tell)
    return Heard(party, HELLO, 0, tell.payload)


def term(cohort: Cohort, party: str, number: int, value: float = 1.0, weight: float = 1.0) -> Heard:
    sides = PlainSum().party(SumScene(cohort, party, {"w": (2,)}))
    (send,) = sides.handle(machines.SumContribute(update(value, weight)))
    assert isinstance(send, SumSend)
    return Heard(party, TERM, number, send.body)


def news(number: int, value: float = 0.0, **changes: Any) -> Heard:
    fields = {"sums": {}, "contributors": [], "stop": False, **changes}
    return Heard("z", STATE, number, Payload(fields, state(value)))


def opened(cohort: Cohort, **settings: Any) -> CoordinatorMachine:
    machine = coordinator(cohort, **settings)
    for party in cohort.contributors:
        machine.handle(hello(cohort, party), 0.0)
    assert machine.phase is CoordinatorPhase.OPEN
    return machine


def summed(cohort: Cohort, **settings: Any) -> CoordinatorMachine:
    machine = opened(cohort, **settings)
    for party in cohort.contributors:
        machine.handle(term(cohort, party, 1), 1.0)
    assert machine.phase is CoordinatorPhase.SUMMED
    return machine


def kinds(actions: list[Any]) -> list[str]:
    return [type(action).__name__ for action in actions]


# --- the coordinator, transition by transition --------------------------------------------------------------


def test_it_begins_when_all_have_said_hello(make_cohort: MakeCohort) -> None:
    cohort = make_cohort(3)
    machine = coordinator(cohort)
    assert machine.handle(hello(cohort, "b"), 0.0) == []
    assert machine.handle(hello(cohort, "c"), 0.0) == []
    actions = machine.handle(hello(cohort, "a"), 3.0)
    assert kinds(actions) == ["Begin", "Tell", "Tell", "Tell"]
    assert {a.receiver for a in actions[1:]} == {"a", "b", "c"}
    assert (machine.phase, machine.number, machine.deadline) == (CoordinatorPhase.OPEN, 1, 3.0 + PATIENCE)


def test_it_begins_with_a_quorum_when_the_time_is_over(make_cohort: MakeCohort) -> None:
    cohort = make_cohort(3, quorum=2)
    machine = coordinator(cohort)
    machine.handle(Tick(), 5.0)
    machine.handle(hello(cohort, "a"), 6.0)
    machine.handle(hello(cohort, "c"), 6.0)
    assert machine.handle(Tick(), 5.0 + PATIENCE - 0.001) == []
    assert kinds(machine.handle(Tick(), 5.0 + PATIENCE)) == ["Begin", "Tell", "Tell"]


@pytest.mark.parametrize(("present", "text"), [("bc", "a did not send the first state"), ("a", "missing: b, c")])
def test_it_fails_to_begin_without_the_first_state_or_the_quorum(
    make_cohort: MakeCohort, present: str, text: str
) -> None:
    cohort = make_cohort(3, quorum=2)
    machine = coordinator(cohort)
    for party in present:
        machine.handle(hello(cohort, party), 0.0)
    (failed,) = machine.handle(Tick(), PATIENCE)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, QuorumLost)
    assert text in failed.error.message
    assert machine.phase is CoordinatorPhase.FAILED


@pytest.mark.parametrize(("gone", "text"), [("a", "a did not send the first state (crashed)"), ("bc", "b (crashed)")])
def test_it_fails_at_once_when_it_can_never_begin(make_cohort: MakeCohort, gone: str, text: str) -> None:
    cohort = make_cohort(3, quorum=2)
    machine = coordinator(cohort)
    actions = [action for party in gone for action in machine.handle(Gone(party, "crashed"), 0.0)]
    (failed,) = actions
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, QuorumLost)
    assert text in failed.error.message


def test_it_begins_without_a_party_that_is_gone(make_cohort: MakeCohort) -> None:
    cohort = make_cohort(3, quorum=2)
    machine = coordinator(cohort)
    machine.handle(hello(cohort, "a"), 0.0)
    machine.handle(hello(cohort, "b"), 0.0)
    assert kinds(machine.handle(Gone("c", "crashed"), 0.0)) == ["Begin", "Tell", "Tell"]


def test_other_trainable_parameters_end_the_job_before_it_begins(make_cohort: MakeCohort) -> None:
    cohort = make_cohort(2)
    machine = coordinator(cohort)
    machine.handle(hello(cohort, "a"), 0.0)
    (failed,) = machine.handle(hello(cohort, "b", size=3), 0.0)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, PeerViolation)
    assert "parameters of b differ from those of a" in failed.error.message


def bad_hellos(cohort: Cohort) -> dict[str, Heard]:
    good = hello(cohort, "a")
    nan = {"w": np.array([1, np.nan], np.float32)}
    return {
        "no layout": dataclasses.replace(good, payload=Payload({}, state())),
        "layout is a number": dataclasses.replace(good, payload=Payload({"layout": 1}, state())),
        "state does not fit": dataclasses.replace(good, payload=Payload(good.payload.fields, state(size=3))),
        "state is NaN": dataclasses.replace(good, payload=Payload(good.payload.fields, nan)),
        "state is float64": dataclasses.replace(
            good, payload=Payload(good.payload.fields, {"w": np.zeros(2, np.float64)})
        ),
        "stranger": dataclasses.replace(good, sender="stranger"),
        "coordinator": dataclasses.replace(good, sender="z"),
    }


@pytest.mark.parametrize("which", sorted(bad_hellos(Cohort(("a", "b"), "z", 2))))
def test_a_bad_hello_is_refused_and_changes_nothing(make_cohort: MakeCohort, which: str) -> None:
    cohort = make_cohort(2)
    machine = coordinator(cohort)
    before = freeze(machine)
    with pytest.raises(PeerViolation):
        machine.handle(bad_hellos(cohort)[which], 0.0)
    assert freeze(machine) == before


def test_a_round_closes_when_all_terms_are_in(make_cohort: MakeCohort) -> None:
    cohort = make_cohort(3)
    machine = opened(cohort)
    machine.handle(term(cohort, "c", 1, value=4.0, weight=1.0), 1.0)
    machine.handle(term(cohort, "a", 1, value=1.0, weight=2.0), 1.0)
    (collected,) = machine.handle(term(cohort, "b", 1, value=2.0, weight=1.0), 1.0)
    assert isinstance(collected, Collected)
    assert collected.total.mean["w"] == pytest.approx([2.0, 2.0])
    assert collected.total.contributors == ("a", "b", "c")


def test_a_round_closes_with_a_quorum_when_the_time_is_over(make_cohort: MakeCohort) -> None:
    cohort = make_cohort(3, quorum=2)
    machine = opened(cohort)
    machine.handle(term(cohort, "a", 1), 1.0)
    machine.handle(term(cohort, "c", 1), 1.0)
    assert machine.handle(Tick(), PATIENCE - 0.001) == []
    (collected,) = machine.handle(Tick(), PATIENCE)
    assert isinstance(collected, Collected)
    assert (collected.total.contributors, collected.total.missing) == (("a", "c"), ("b",))


def test_a_round_below_the_quorum_fails_when_the_time_is_over(make_cohort: MakeCohort) -> None:
    cohort = make_cohort(3, quorum=2)
    machine = opened(cohort)
    machine.handle(term(cohort, "a", 1), 1.0)
    (failed,) = machine.handle(Tick(), PATIENCE)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, QuorumLost)
    assert "round 1: 1 of 3 parties contributed" in failed.error.message


def test_a_round_fails_at_once_when_too_few_are_left(make_cohort: MakeCohort) -> None:
    cohort = make_cohort(3, quorum=3)
    machine = opened(cohort)
    machine.handle(term(cohort, "a", 1), 1.0)
    (failed,) = machine.handle(Gone("b", "out of memory"), 2.0)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, QuorumLost)
    assert "b (out of memory)" in failed.error.message


def test_who_left_after_contributing_counts(make_cohort: MakeCohort) -> None:
    cohort = make_cohort(3, quorum=3)
    machine = opened(cohort)
    machine.handle(term(cohort, "a", 1), 1.0)
    assert machine.handle(Gone("a", "done"), 1.0) == []
    machine.handle(term(cohort, "b", 1), 1.0)
    (collected,) = machine.handle(term(cohort, "c", 1), 1.0)
    assert isinstance(collected, Collected)
    assert len(collected.total.contributors) == 3


def test_a_round_closes_when_those_missing_are_gone(make_cohort: MakeCohort) -> None:
    cohort = make_cohort(3, quorum=2)
    machine = opened(cohort)
    machine.handle(term(cohort, "a", 1), 1.0)
    machine.handle(term(cohort, "b", 1), 1.0)
    (collected,) = machine.handle(Gone("c", "crashed"), 2.0)
    assert isinstance(collected, Collected)
    assert collected.total.missing == ("c",)


def test_those_who_leave_between_rounds_end_the_next_at_once(make_cohort: MakeCohort) -> None:
    cohort = make_cohort(2, quorum=2)
    machine = summed(cohort)
    assert machine.handle(Gone("b", "crashed"), 2.0) == []
    actions = machine.handle(Publish(state(1.0)), 3.0)
    assert kinds(actions) == ["Tell", "Failed"]  # a gets the state of round 1, then the end is told
    assert machine.phase is CoordinatorPhase.FAILED


def test_a_refused_term_leaves_its_party_out_of_the_round_only(make_cohort: MakeCohort) -> None:
    cohort = make_cohort(3, quorum=2)
    machine = opened(cohort)
    lie = Heard("b", TERM, 1, Payload({"weight": -1.0, "sums": {}}, state()))
    (ignored,) = machine.handle(lie, 1.0)
    assert isinstance(ignored, Ignored)
    assert "weight" in ignored.why
    # a second, honest term of the same round does not help
    assert kinds(machine.handle(term(cohort, "b", 1), 1.0)) == ["Ignored"]
    machine.handle(term(cohort, "a", 1), 1.0)
    (collected,) = machine.handle(term(cohort, "c", 1), 1.0)
    assert collected.total.missing == ("b",)  # type: ignore[union-attr]
    # in the next round it counts again
    machine.handle(Publish(state(1.0)), 2.0)
    for party in "abc":
        actions = machine.handle(term(cohort, party, 2), 3.0)
    assert actions[-1].total.contributors == ("a", "b", "c")  # type: ignore[union-attr]


def test_a_second_term_of_the_same_round_is_ignored_and_the_first_counts(make_cohort: MakeCohort) -> None:
    cohort = make_cohort(2)
    machine = opened(cohort)
    machine.handle(term(cohort, "a", 1, value=1.0), 1.0)
    assert kinds(machine.handle(term(cohort, "a", 1, value=9.0), 1.0)) == ["Ignored"]
    (collected,) = machine.handle(term(cohort, "b", 1, value=3.0), 1.0)
    assert collected.total.mean["w"] == pytest.approx([2.0, 2.0])  # type: ignore[union-attr]


def test_late_terms_count_for_no_round(make_cohort: MakeCohort) -> None:
    cohort = make_cohort(3, quorum=2)
    machine = opened(cohort)
    for party in "ab":
        machine.handle(term(cohort, party, 1), 1.0)
    machine.handle(Tick(), PATIENCE)
    late = term(cohort, "c", 1, value=100.0)
    assert kinds(machine.handle(late, 11.0)) == ["Ignored"]  # summed
    machine.handle(Publish(state(1.0)), 12.0)
    assert kinds(machine.handle(late, 12.0)) == ["Ignored"]  # the next round is open
    for party in "abc":
        actions = machine.handle(term(cohort, party, 2, value=2.0), 13.0)
    (collected,) = actions
    assert collected.total.mean["w"] == pytest.approx([2.0, 2.0])  # type: ignore[union-attr]
    assert collected.total.contributors == ("a", "b", "c")  # type: ignore[union-attr]


def test_a_term_of_a_round_to_come_is_refused(make_cohort: MakeCohort) -> None:
    cohort = make_cohort(2)
    machine = opened(cohort)
    before = freeze(machine)
    with pytest.raises(PeerViolation, match="term of round 2 in round 1"):
        machine.handle(term(cohort, "a", 2), 1.0)
    assert freeze(machine) == before


def test_a_late_hello_gets_the_newest_state_and_joins(make_cohort: MakeCohort) -> None:
    cohort = make_cohort(3, quorum=2)
    machine = coordinator(cohort, rounds=3)
    for party in "ab":
        machine.handle(hello(cohort, party), 0.0)
    machine.handle(Tick(), PATIENCE)
    for party in "ab":
        machine.handle(term(cohort, party, 1), 11.0)
    machine.handle(Tick(), 2 * PATIENCE)
    machine.handle(Publish(state(5.0)), 21.0)
    (tell,) = machine.handle(hello(cohort, "c"), 22.0)
    assert isinstance(tell, Tell)
    assert (tell.receiver, tell.kind, tell.round) == ("c", STATE, 1)
    assert tell.payload.tensors["w"] == pytest.approx([5.0, 5.0])
    for party in "abc":
        actions = machine.handle(term(cohort, party, 2), 23.0)
    assert actions[-1].total.contributors == ("a", "b", "c")  # type: ignore[union-attr]
    assert {a.receiver for a in machine.handle(Publish(state(6.0)), 24.0)} == {"a", "b", "c"}  # type: ignore[union-attr]


def test_a_late_hello_with_other_parameters_is_refused(make_cohort: MakeCohort) -> None:
    cohort = make_cohort(3, quorum=2)
    machine = coordinator(cohort)
    for party in "ab":
        machine.handle(hello(cohort, party), 0.0)
    machine.handle(Tick(), PATIENCE)
    before = freeze(machine)
    with pytest.raises(PeerViolation, match="parameters of c differ"):
        machine.handle(hello(cohort, "c", size=5), 12.0)
    assert freeze(machine) == before


def test_publish_opens_the_next_round_with_a_deadline_of_its_own(make_cohort: MakeCohort) -> None:
    machine = summed(make_cohort(2))
    tells = machine.handle(Publish(state(1.0)), 7.0)
    assert [(t.receiver, t.round, t.payload.fields["stop"]) for t in tells] == [
        ("a", 1, False),
        ("b", 1, False),
    ]  # type: ignore[union-attr]
    assert (machine.phase, machine.number, machine.deadline) == (CoordinatorPhase.OPEN, 2, 7.0 + PATIENCE)


def test_publish_can_stop_early(make_cohort: MakeCohort) -> None:
    machine = summed(make_cohort(2), rounds=50)
    tells = machine.handle(Publish(state(1.0), stop=True), 7.0)
    assert all(t.payload.fields["stop"] for t in tells)  # type: ignore[union-attr]
    assert machine.phase is CoordinatorPhase.FINISHED


def test_the_last_round_finishes(make_cohort: MakeCohort) -> None:
    machine = summed(make_cohort(2), rounds=1)
    machine.handle(Publish(state(1.0)), 7.0)
    assert machine.phase is CoordinatorPhase.FINISHED
    assert machine.handle(Tick(), 1e9) == []


@pytest.mark.parametrize("bad", [state(size=3), {"v": np.zeros(2, np.float32)}, {"w": np.zeros(2)}])
def test_a_state_of_another_layout_is_not_published(make_cohort: MakeCohort, bad: dict[str, np.ndarray]) -> None:
    machine = summed(make_cohort(2))
    before = freeze(machine)
    with pytest.raises(InternalError):
        machine.handle(Publish(bad), 2.0)
    assert freeze(machine) == before


def test_all_weights_zero_is_a_named_failure(make_cohort: MakeCohort) -> None:
    cohort = make_cohort(2)
    machine = opened(cohort)
    machine.handle(term(cohort, "a", 1, weight=0.0), 1.0)
    (failed,) = machine.handle(term(cohort, "b", 1, weight=0.0), 1.0)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, ProtectionError)


def test_one_weight_zero_does_not_move_the_mean(make_cohort: MakeCohort) -> None:
    cohort = make_cohort(2)
    machine = opened(cohort)
    machine.handle(term(cohort, "a", 1, value=7.0, weight=0.0), 1.0)
    (collected,) = machine.handle(term(cohort, "b", 1, value=2.0, weight=3.0), 1.0)
    assert collected.total.mean["w"] == pytest.approx([2.0, 2.0])  # type: ignore[union-attr]


def test_an_unfilled_quorum_of_zero_still_needs_one_party(make_cohort: MakeCohort) -> None:
    cohort = make_cohort(2, quorum=0)
    machine = opened(cohort)
    (failed,) = machine.handle(Tick(), PATIENCE)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, QuorumLost)


COORDINATOR_EVENTS = {
    HELLO: lambda cohort: hello(cohort, "a"),
    TERM: lambda cohort: term(cohort, "a", 1),
    STATE: lambda cohort: news(1),
    ANSWER: lambda cohort: Heard("z", ANSWER, 1, Payload({"ask": 1})),
    "round.unknown": lambda cohort: Heard("a", "round.unknown", 1, Payload()),
    Gone: lambda cohort: Gone("a", "x"),
    Tick: lambda cohort: Tick(),
    Publish: lambda cohort: Publish(state(1.0)),
    Join: lambda cohort: Join(state()),
    Offer: lambda cohort: Offer(update(1.0)),
    Rejoin: lambda cohort: Rejoin(1, state()),
    Resume: lambda cohort: resume(cohort, 1),
}


def resume(cohort: Cohort, number: int, **changes: Any) -> Resume:
    layout = hello(cohort, "a").payload.fields["layout"]
    layouts = dict.fromkeys(cohort.contributors, layout)
    given = Resume(number, state(3.0), {"loss": 1.0}, cohort.contributors, False, layouts)
    return dataclasses.replace(given, **changes)


@pytest.mark.parametrize(
    ("phase", "key"),
    [(p, k) for p in CoordinatorPhase for k in COORDINATOR_EVENTS if k not in machines._COORDINATOR[p]],
    ids=str,
)
def test_a_pair_that_is_not_in_the_coordinators_table_changes_nothing(
    make_cohort: MakeCohort, phase: CoordinatorPhase, key: Any
) -> None:
    cohort = make_cohort(2)
    machine = {CoordinatorPhase.OPEN: opened, CoordinatorPhase.SUMMED: summed}.get(phase, coordinator)(cohort)
    machine.phase = phase
    before = freeze(machine)
    with pytest.raises(PeerViolation if isinstance(key, str) else InternalError, match="not allowed while"):
        machine.handle(COORDINATOR_EVENTS[key](cohort), 100.0)  # type: ignore[arg-type]
    assert freeze(machine) == before


# --- a contributor, transition by transition ----------------------------------------------------------------


def joined(cohort: Cohort, me: str = "a", *, rounds: int = 3) -> ContributorMachine:
    machine = contributor(cohort, me, rounds=rounds)
    machine.handle(Join(state()))
    machine.handle(news(0))
    assert machine.phase is ContributorPhase.TRAINING
    return machine


def test_only_the_first_contributor_sends_its_state(make_cohort: MakeCohort) -> None:
    cohort = make_cohort(2)
    assert set(hello(cohort, "a").payload.tensors) == {"w"}
    assert hello(cohort, "b").payload.tensors == {}
    assert hello(cohort, "a").payload.fields == hello(cohort, "b").payload.fields


def test_a_state_that_is_not_float32_is_not_offered(make_cohort: MakeCohort) -> None:
    machine = contributor(make_cohort(2))
    with pytest.raises(ProtectionError, match="float64"):
        machine.handle(Join({"w": np.zeros(2)}))
    assert machine.phase is ContributorPhase.NEW


def test_a_contributor_goes_round_by_round(make_cohort: MakeCohort) -> None:
    machine = contributor(make_cohort(2), rounds=2)
    assert kinds(machine.handle(Join(state()))) == ["Tell"]
    (ready,) = machine.handle(news(0, 0.5))
    assert isinstance(ready, Ready)
    assert ready.finished == 0
    assert ready.state["w"][0] == 0.5
    for number in (1, 2):
        (tell,) = machine.handle(Offer(update(1.0)))
        assert isinstance(tell, Tell)
        assert (tell.receiver, tell.kind, tell.round) == ("z", TERM, number)
        (done,) = machine.handle(news(number, float(number), sums={"loss": 1.0}, contributors=["a", "b"]))
        assert isinstance(done, RoundDone)
        result = done.result
        assert (result.number, result.contributors, dict(result.sums), result.stop) == (
            number,
            ("a", "b"),
            {"loss": 1.0},
            False,
        )
    assert machine.phase is ContributorPhase.FINISHED


def test_a_contributor_that_joins_late_starts_at_the_present_round(make_cohort: MakeCohort) -> None:
    machine = contributor(make_cohort(2), rounds=5)
    machine.handle(Join(state()))
    (ready,) = machine.handle(news(3, 1.0))
    assert isinstance(ready, Ready)
    assert ready.finished == 3
    assert machine.number == 4


def test_a_contributor_that_was_overtaken_takes_the_newest_state_and_sends_nothing(
    make_cohort: MakeCohort,
) -> None:
    machine = joined(make_cohort(2))
    assert not machine.overtaken
    assert machine.handle(news(2, 2.0)) == []
    assert machine.handle(news(1, 1.0)) == []  # an older one does not replace it
    assert machine.overtaken
    late, done = machine.handle(Offer(update(9.0)))
    assert isinstance(late, Ignored)
    assert isinstance(done, RoundDone)
    assert (done.result.number, float(done.result.state["w"][0])) == (2, 2.0)
    assert (machine.phase, machine.number, machine.overtaken) == (ContributorPhase.TRAINING, 3, False)


def test_an_older_state_does_not_end_the_wait(make_cohort: MakeCohort) -> None:
    machine = joined(make_cohort(2))
    machine.handle(Offer(update(1.0)))
    machine.handle(news(1))
    machine.handle(Offer(update(1.0)))
    assert kinds(machine.handle(news(1))) == ["Ignored"]
    assert (machine.phase, machine.number) == (ContributorPhase.WAITING, 2)
    (done,) = machine.handle(news(2))
    assert isinstance(done, RoundDone)


def test_a_stop_ends_the_rounds(make_cohort: MakeCohort) -> None:
    machine = joined(make_cohort(2), rounds=3)
    machine.handle(Offer(update(1.0)))
    (done,) = machine.handle(news(1, stop=True))
    assert isinstance(done, RoundDone)
    assert done.result.stop
    assert machine.phase is ContributorPhase.FINISHED


def test_a_stop_that_comes_while_training_ends_the_rounds(make_cohort: MakeCohort) -> None:
    machine = joined(make_cohort(2), rounds=3)
    machine.handle(news(1, stop=True))
    assert machine.handle(Offer(update(1.0)))[-1].result.stop  # type: ignore[union-attr]
    assert machine.phase is ContributorPhase.FINISHED


def bad_news() -> dict[str, Heard]:
    good = news(1)
    return {
        "not from the coordinator": dataclasses.replace(good, sender="b"),
        "no stop": Heard("z", STATE, 1, Payload({"sums": {}, "contributors": []}, state())),
        "stop is a number": news(1, stop=1),
        "sums is a list": news(1, sums=[1]),
        "sums hold text": news(1, sums={"loss": "low"}),
        "sums hold infinity": news(1, sums={"loss": float("inf")}),
        "contributors is a number": news(1, contributors=3),
        "contributors are strangers": news(1, contributors=["stranger"]),
        "one field more": news(1, more=1),
        "another shape": Heard("z", STATE, 1, Payload(good.payload.fields, state(size=3))),
        "another name": Heard("z", STATE, 1, Payload(good.payload.fields, {"v": np.zeros(2, np.float32)})),
        "NaN": Heard("z", STATE, 1, Payload(good.payload.fields, {"w": np.array([0, np.nan], np.float32)})),
        "float64": Heard("z", STATE, 1, Payload(good.payload.fields, {"w": np.zeros(2)})),
        "a round beyond the last": news(4),
    }


@pytest.mark.parametrize("which", sorted(bad_news()))
@pytest.mark.parametrize("phase", [ContributorPhase.JOINING, ContributorPhase.TRAINING, ContributorPhase.WAITING])
def test_a_bad_state_is_refused_and_changes_nothing(
    make_cohort: MakeCohort, which: str, phase: ContributorPhase
) -> None:
    cohort = make_cohort(2)
    machine = contributor(cohort, rounds=3)
    machine.handle(Join(state()))
    if phase is not ContributorPhase.JOINING:
        machine.handle(news(0))
    if phase is ContributorPhase.WAITING:
        machine.handle(Offer(update(1.0)))
    assert machine.phase is phase
    before = freeze(machine)
    with pytest.raises(PeerViolation):
        machine.handle(bad_news()[which])
    assert freeze(machine) == before


def test_an_update_that_cannot_be_sent_leaves_the_round_open(make_cohort: MakeCohort) -> None:
    machine = joined(make_cohort(2))
    before = freeze(machine)
    with pytest.raises(ProtectionError):
        machine.handle(Offer(Update(state(float("nan")), 1.0)))
    assert freeze(machine) == before


@pytest.mark.parametrize(
    ("phase", "key"),
    [
        (p, k)
        for p in ContributorPhase
        for k in (HELLO, TERM, STATE, ANSWER, Join, Rejoin, Resume, Offer, Gone, Publish)
        if k not in machines._CONTRIBUTOR[p]
    ],
    ids=str,
)
def test_a_pair_that_is_not_in_the_contributors_table_changes_nothing(
    make_cohort: MakeCohort, phase: ContributorPhase, key: Any
) -> None:
    cohort = make_cohort(2)
    machine = contributor(cohort) if phase is ContributorPhase.NEW else joined(cohort)
    machine.phase = phase
    before = freeze(machine)
    event = COORDINATOR_EVENTS[key](cohort)
    if isinstance(event, Heard):
        event = dataclasses.replace(event, sender="z")
    with pytest.raises(PeerViolation if isinstance(key, str) else InternalError, match="not allowed while"):
        machine.handle(event)  # type: ignore[arg-type]
    assert freeze(machine) == before


def test_messages_of_a_sum_with_more_than_one_stage_go_both_ways(make_cohort: MakeCohort) -> None:
    """A sum may answer a contributor before it ends: the machines carry it through, round by round."""

    class Echo(PlainSum):
        class _Server:
            def __init__(self, inner: Any, cohort: Cohort) -> None:
                self.inner, self.cohort, self.asked = inner, cohort, False

            @property
            def awaiting(self) -> frozenset[str]:
                return frozenset(self.inner.awaiting)

            able = property(lambda self: self.inner.able)
            least, stage = 1, 0

            def handle(self, event: SumEvent) -> list[SumAction]:
                if isinstance(event, SumReceived) and not self.asked:
                    self.asked = True
                    return [SumSend(p, Payload({"ask": 1})) for p in self.cohort.contributors]
                return list(self.inner.handle(event))

        def server(self, scene: SumScene, **options: Any) -> Any:
            return self._Server(super().server(scene), scene.cohort)

    cohort = make_cohort(2)
    machine = CoordinatorMachine(cohort, 1, PATIENCE, Echo())
    for party in "ab":
        machine.handle(hello(cohort, party), 0.0)
    tells = machine.handle(term(cohort, "a", 1), 1.0)
    assert [(t.receiver, t.kind, t.round) for t in tells] == [("a", ANSWER, 1), ("b", ANSWER, 1)]  # type: ignore[union-attr]
    party = joined(cohort, rounds=3)
    party.handle(Offer(update(1.0)))
    late = Heard("z", ANSWER, 9, Payload({"ask": 1}))
    assert kinds(party.handle(late)) == ["Ignored"]
    with pytest.raises(PeerViolation, match="sends nothing to contributors"):
        party.handle(Heard("z", ANSWER, 1, Payload({"ask": 1})))


# --- arbitrary schedules ------------------------------------------------------------------------------------


class World:
    """Both kinds of machine, a bag of messages delivered in any order, twice or never, and a model."""

    def __init__(self, count: int, quorum: int, rounds: int) -> None:
        self.cohort = Cohort(tuple("abcde"[:count]), "z", quorum)
        self.rounds = rounds
        self.coordinator = coordinator(self.cohort, rounds=rounds)
        self.parties = {p: contributor(self.cohort, p, rounds=rounds) for p in self.cohort.contributors}
        self.bag: list[tuple[str, Heard]] = []
        self.now = 0.0
        self.sent: dict[tuple[str, int], tuple[float, float]] = {}
        self.counted: set[tuple[str, int]] = set()
        self.log: list[tuple[Any, float, Any]] = []
        self.last = 0
        self.gone: set[str] = set()
        self.error: FateError | None = None

    def tell_coordinator(self, event: Any) -> None:
        before = freeze(self.coordinator)
        try:
            actions = self.coordinator.handle(event, self.now)
        except (PeerViolation, InternalError) as refusal:
            assert freeze(self.coordinator) == before, f"{event} was refused and changed something"
            self.log.append((event, self.now, freeze(refusal)))
            return
        self.log.append((event, self.now, freeze(actions)))
        assert self.coordinator.number - self.last in (0, 1), "rounds roll forward one by one"
        self.last = self.coordinator.number
        for action in actions:
            if isinstance(action, Tell):
                self.bag.append((action.receiver, Heard("z", action.kind, action.round, action.payload)))
            elif isinstance(action, Collected):
                self.check(action.total)
            elif isinstance(action, Failed):
                assert self.error is None
                self.error = action.error

    def check(self, total: Total) -> None:
        number = self.coordinator.number
        terms = [(party, number) for party in total.contributors]
        assert len(terms) >= max(1, self.cohort.quorum)
        assert set(terms) <= self.sent.keys(), "a term was counted that nobody sent for this round"
        assert not set(terms) & self.counted, "a term was counted twice"
        self.counted |= set(terms)
        assert set(total.contributors) | set(total.missing) == set(self.cohort.contributors)
        weights = np.array([self.sent[t][1] for t in terms])
        values = np.array([self.sent[t][0] for t in terms])
        expected = float((weights * values).sum() / weights.sum())
        assert abs(float(total.mean["w"][0]) - expected) <= total.error_bound + 1e-12
        assert total.sums["tokens"] == pytest.approx(weights.sum())

    def tell_party(self, party: str, event: Any) -> None:
        machine = self.parties[party]
        before, number = freeze(machine), machine.number
        try:
            actions = machine.handle(event, self.now)
        except (PeerViolation, InternalError):
            assert freeze(machine) == before, f"{event} was refused and changed something"
            return
        assert machine.number >= number, "a contributor never goes back"
        for action in actions:
            if isinstance(action, Tell):
                self.bag.append(("z", Heard(party, action.kind, action.round, action.payload)))

    def act(self, party: str, value: int) -> None:
        """What the party's own loop would do next."""
        machine = self.parties[party]
        if party in self.gone:
            return
        if machine.phase is ContributorPhase.NEW:
            self.tell_party(party, Join(state()))
        elif machine.phase is ContributorPhase.TRAINING:
            number, overtaken = machine.number, machine.overtaken
            term_of = (float(value % 17 - 8), float(value % 5 + 1))
            if not overtaken:
                assert (party, number) not in self.sent, "a party contributes once to a round"
                self.sent[party, number] = term_of
            self.tell_party(party, Offer(update(*term_of)))

    def deliver(self, index: int, *, keep: bool) -> None:
        if self.bag:
            index %= len(self.bag)
            receiver, message = self.bag[index] if keep else self.bag.pop(index)
            if receiver == "z":
                self.tell_coordinator(message)
            elif receiver not in self.gone:
                self.tell_party(receiver, message)

    def lie(self, value: int) -> None:
        """A message that an honest party would not send now."""
        party = self.cohort.contributors[value % len(self.cohort.contributors)]
        lies = [
            Heard("stranger", TERM, self.coordinator.number, Payload({"weight": 1.0, "sums": {}}, state())),
            Heard(party, TERM, self.coordinator.number + 1, Payload({"weight": 1.0, "sums": {}}, state())),
            Heard(party, TERM, 0, Payload({"weight": 1.0, "sums": {}}, state(99.0))),
            Heard(party, STATE, 1, Payload()),
            Heard(party, HELLO, 0, Payload({"layout": 5})),
        ]
        self.tell_coordinator(lies[value % len(lies)])
        self.tell_party(party, Heard(self.cohort.contributors[0], STATE, self.rounds, news(1).payload))
        self.tell_party(party, Heard("z", STATE, self.rounds + 5, news(1).payload))

    def step(self, kind: int, value: int) -> None:
        party = self.cohort.contributors[value % len(self.cohort.contributors)]
        if kind <= 3:
            self.deliver(value, keep=False)
        elif kind == 4:
            self.deliver(value, keep=True)
        elif kind <= 7:
            self.act(party, value)
        elif kind == 8:
            self.tell_coordinator(Publish(state(float(value % 3))))
        elif kind == 9:
            self.now += value % 7
            self.tell_coordinator(Tick())
        elif kind == 10 and value % 4 == 0 and self.bag:
            self.bag.pop(value % len(self.bag))
        elif kind == 11 and value % 9 == 0:
            self.gone.add(party)
            self.tell_coordinator(Gone(party, "crashed"))
        elif kind == 12:
            self.lie(value)

    def run_out(self) -> None:
        """No more messages: only time passes and the coordinator's loop goes on."""
        for _ in range(2 * self.rounds + 3):
            if self.coordinator.phase is CoordinatorPhase.SUMMED:
                self.tell_coordinator(Publish(state(1.0)))
            self.now += PATIENCE
            self.tell_coordinator(Tick())


ENDS = (CoordinatorPhase.FINISHED, CoordinatorPhase.FAILED)
STEPS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 10_000)), min_size=20, max_size=120)


@given(count=st.integers(1, 4), lacking=st.integers(0, 3), rounds=st.integers(1, 3), steps=STEPS)
@settings(deadline=None, max_examples=60)
def test_arbitrary_schedules_keep_the_rules(
    count: int, lacking: int, rounds: int, steps: list[tuple[int, int]]
) -> None:
    world = World(count, max(1, count - lacking), rounds)
    for kind, value in steps:
        world.step(kind, value)
    world.run_out()
    assert world.coordinator.phase in ENDS
    assert (world.error is not None) == (world.coordinator.phase is CoordinatorPhase.FAILED)
    # the same events give the same actions
    again = coordinator(world.cohort, rounds=rounds)
    for event, now, expected in world.log:
        try:
            actions: Any = again.handle(event, now)
        except (PeerViolation, InternalError) as refusal:
            actions = refusal
        assert freeze(actions) == expected


@given(quorum=st.integers(1, 3), seed=st.lists(st.integers(0, 10_000), min_size=60, max_size=60))
@settings(deadline=None, max_examples=40)
def test_in_any_order_without_loss_every_run_finishes_with_everybody(quorum: int, seed: list[int]) -> None:
    # Given three parties and a bag that loses nothing, time standing still
    world = World(3, quorum, 3)
    turn = 0
    # When messages come in any order and parties act when they can
    while world.coordinator.phase not in ENDS:
        value = seed[turn % len(seed)]
        turn += 1
        assert turn < 1000, "the rounds do not end"
        for party in world.cohort.contributors:
            world.act(party, value)
        world.deliver(value, keep=value % 5 == 0 and turn % 2 == 0)
        if world.coordinator.phase is CoordinatorPhase.SUMMED:
            world.tell_coordinator(Publish(state(1.0)))
    # Then all rounds ended with all terms
    assert world.coordinator.phase is CoordinatorPhase.FINISHED
    assert world.counted == {(party, number) for party in "abc" for number in (1, 2, 3)}


@given(missing=st.sampled_from("abc"), number=st.integers(1, 2))
@settings(deadline=None, max_examples=6)
def test_a_party_that_missed_a_round_comes_back_in_the_next(missing: str, number: int) -> None:
    cohort = Cohort(("a", "b", "c"), "z", 2)
    machine = opened(cohort, rounds=3)
    seen: list[tuple[str, ...]] = []
    for current in (1, 2, 3):
        now = 100.0 * current
        for party in "abc":
            if (party, current) != (missing, number):
                machine.handle(term(cohort, party, current), now)
        machine.handle(Tick(), now + PATIENCE)
        assert machine.phase is CoordinatorPhase.SUMMED
        assert machine._total is not None
        seen.append(machine._total.contributors)
        tells = machine.handle(Publish(state(float(current))), now + PATIENCE)
        assert missing in {t.receiver for t in tells if isinstance(t, Tell)}
        machine.deadline = 100.0 * (current + 1) + PATIENCE if current < 3 else None
    assert [missing in contributors for contributors in seen] == [n != number for n in (1, 2, 3)]


def test_the_random_schedules_reach_every_phase() -> None:
    """Guards the property above against becoming empty: a plain schedule shows every kind of step."""
    world = World(2, 1, 2)
    reached = set()
    for index in range(400):
        world.step([5, 0, 6, 1, 8, 9][index % 6], index)
        reached.add(world.coordinator.phase)
    assert {CoordinatorPhase.OPEN, CoordinatorPhase.SUMMED, CoordinatorPhase.FINISHED} <= reached
    assert world.counted
    assert any(isinstance(event, Heard) for event, _, _ in world.log)


# --- after a kill -------------------------------------------------------------------------------------------


def told(actions: list[Any]) -> list[tuple[str, str, int]]:
    return [(tell.receiver, tell.kind, tell.round) for tell in actions if isinstance(tell, Tell)]


def test_a_coordinator_goes_on_after_its_commit_and_tells_the_last_state_again(make_cohort: MakeCohort) -> None:
    # Given a coordinator that had committed round 1 of 2, and knew all but one of three
    cohort = make_cohort(3)
    layouts = {p: resume(cohort, 1).layouts[p] for p in "ab"}
    machine = coordinator(cohort)
    actions = machine.handle(resume(cohort, 1, layouts=layouts), 100.0)
    # Then it tells those it knew, and round 2 is open for the whole of the patience
    assert told(actions) == [("a", STATE, 1), ("b", STATE, 1)]
    assert actions[0].payload.fields == {"sums": {"loss": 1.0}, "contributors": ["a", "b", "c"], "stop": False}
    assert (machine.phase, machine.number, machine.deadline) == (CoordinatorPhase.OPEN, 2, 100.0 + PATIENCE)
    # and who says hello now gets the same
    assert told(machine.handle(hello(cohort, "c"), 101.0)) == [("c", STATE, 1)]
    for party in "abc":
        actions = machine.handle(term(cohort, party, 2), 102.0)
    assert isinstance(actions[-1], Collected)


@pytest.mark.parametrize("changes", [{"number": 2}, {"number": 1, "stop": True}], ids=["all rounds", "stopped"])
def test_a_coordinator_that_had_ended_tells_everybody_its_end(make_cohort: MakeCohort, changes: Any) -> None:
    # Nobody can say hello to it any more, so those it did not know are told as well
    cohort = make_cohort(3)
    machine = coordinator(cohort)
    actions = machine.handle(dataclasses.replace(resume(cohort, 1, layouts={}), **changes), 0.0)
    assert told(actions) == [(p, STATE, changes["number"]) for p in "abc"]
    assert machine.phase is CoordinatorPhase.FINISHED


def test_who_has_left_is_not_told_and_what_it_had_sent_counts(make_cohort: MakeCohort) -> None:
    cohort = make_cohort(3, quorum=1)
    machine = coordinator(cohort)
    actions = machine.handle(resume(cohort, 1, left=frozenset("bc")), 0.0)
    assert told(actions) == [("a", STATE, 1)]
    for event in (term(cohort, "b", 2), term(cohort, "a", 2), Gone("b", "broke"), Gone("c", "broke")):
        actions = machine.handle(event, 1.0)
    assert isinstance(actions[-1], Collected)
    assert actions[-1].total.contributors == ("a", "b")


def test_too_few_left_for_the_quorum_fail_it_at_once(make_cohort: MakeCohort) -> None:
    cohort = make_cohort(2)
    machine = coordinator(cohort)
    machine.handle(resume(cohort, 1, left=frozenset("b")), 0.0)
    actions = machine.handle(Gone("b", "broke"), 0.0)
    assert isinstance(actions[-1], Failed) and isinstance(actions[-1].error, QuorumLost)


@pytest.mark.parametrize(
    ("event", "phase", "number"),
    [
        (Rejoin(1, state()), ContributorPhase.TRAINING, 2),
        (Rejoin(2, state()), ContributorPhase.FINISHED, 3),
        (Rejoin(1, state(), over=True), ContributorPhase.FINISHED, 3),
    ],
    ids=["in the middle", "after the last", "stopped"],
)
def test_a_contributor_goes_on_after_its_commit(
    make_cohort: MakeCohort, event: Rejoin, phase: ContributorPhase, number: int
) -> None:
    machine = contributor(make_cohort(2))
    assert machine.handle(event) == []
    assert (machine.phase, machine.number) == (phase, number)


def test_a_state_with_our_own_term_is_one_that_an_earlier_life_had_sent(make_cohort: MakeCohort) -> None:
    # Given a contributor that trains for round 1, whose state comes and counts it
    machine = joined(make_cohort(2))
    assert machine.handle(news(1, 5.0, contributors=["a", "b"])) == []
    assert machine.answered and not machine.overtaken
    # When it offers, Then its term goes out as in its first life, and it goes on with that state
    tell, done = machine.handle(Offer(update(1.0)))
    assert isinstance(tell, Tell) and (tell.kind, tell.round) == (TERM, 1)
    assert isinstance(done, RoundDone) and done.result.number == 1
    assert (machine.phase, machine.number, machine.answered) == (ContributorPhase.TRAINING, 2, False)


@pytest.mark.parametrize(
    "heard", [[news(1)], [news(2, contributors=["a", "b"])], [news(1), news(2, contributors=["a"])]], ids=str
)
def test_other_states_replace_our_term(make_cohort: MakeCohort, heard: list[Heard]) -> None:
    machine = joined(make_cohort(2))
    for event in heard:
        machine.handle(event)
    assert machine.overtaken and not machine.answered
    actions = machine.handle(Offer(update(1.0)))
    assert [type(action) for action in actions] == [Ignored, RoundDone]
    assert actions[1].result.number == heard[-1].round


def test_a_state_that_comes_late_in_a_first_life_changes_nothing(make_cohort: MakeCohort) -> None:
    # A coordinator that was killed tells the last state again: to who has it, that is an older one
    machine = joined(make_cohort(2))
    machine.handle(Offer(update(1.0)))
    machine.handle(news(1))
    before = freeze(machine)
    assert machine.handle(news(1, contributors=["a", "b"])) == []
    assert freeze(machine) == before


def test_who_joins_after_a_stop_has_finished(make_cohort: MakeCohort) -> None:
    machine = contributor(make_cohort(2))
    machine.handle(Join(state()))
    (ready,) = machine.handle(news(1, sums={"loss": 2.0}, stop=True))
    assert isinstance(ready, Ready) and (ready.finished, ready.sums) == (1, {"loss": 2.0})
    assert machine.phase is ContributorPhase.FINISHED
