"""Terms that are encoded on the wire: in the order of the stages, refused like other terms, settled by the outcome."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest

from fate_llm.core.errors import ConfigurationError, InternalError, PeerViolation, ProtectionError
from fate_llm.core.interfaces import (
    Form,
    Frozen,
    HookStage,
    SumContribute,
    SumExpired,
    SumReceived,
    SumScene,
    SumSend,
    UpdateHook,
    WireHook,
)
from fate_llm.core.values import Cohort, Payload, RoundResult, Total, Update
from fate_llm.protocols.channel import JobChannel
from fate_llm.protocols.rounds.driver import ContributorDriver, CoordinatorDriver, Setting
from fate_llm.protocols.rounds.wire import Wire, WiredSum
from fate_llm.protocols.sums.plain import PlainSum

Make = Callable[..., dict[str, JobChannel]]
LAYOUT = {"w": (3,)}
TERM = Payload({"weight": 2.0, "sums": {}}, {"w": np.array([1, 2, 3], np.float32)})


class Doubled(WireHook):
    """Sends float64 of the double, and notes all it is told."""

    stage: ClassVar[HookStage] = HookStage.ENCODE
    Params: ClassVar[type[Frozen]] = Frozen

    def __init__(self, notes: list[Any] | None = None) -> None:
        self.notes = [] if notes is None else notes

    def form(self, form: Form) -> Form | None:
        return {name: (np.dtype(np.float64), shape) for name, (_, shape) in form.items()}

    def encode(self, payload: Payload, round_number: int) -> Payload:
        self.notes.append(("encode", round_number))
        return replace(payload, tensors={n: a.astype(np.float64) * 2 for n, a in payload.tensors.items()})

    def decode(self, payload: Payload, form: Form) -> Payload:
        self.notes.append(("decode", float(payload.tensors["w"][0])))
        if any(array.dtype != np.float64 for array in payload.tensors.values()):
            raise PeerViolation("doubled: a tensor is no float64")
        return replace(payload, tensors={n: (a / 2).astype(np.float32) for n, a in payload.tensors.items()})

    def settle(self, *, counted: bool) -> None:
        self.notes.append(("settle", counted))


class Reversed(WireHook):
    """Sends the bytes of every tensor from the last to the first; to undo that it needs the form."""

    stage: ClassVar[HookStage] = HookStage.PACK
    Params: ClassVar[type[Frozen]] = Frozen

    def __init__(self) -> None:
        self.forms: list[Form] = []

    def form(self, form: Form) -> Form | None:
        return None

    def encode(self, payload: Payload, round_number: int) -> Payload:
        tensors = {n: np.frombuffer(a.tobytes()[::-1], np.uint8) for n, a in payload.tensors.items()}
        return replace(payload, tensors=tensors)

    def decode(self, payload: Payload, form: Form) -> Payload:
        self.forms.append(form)
        back = {n: a.tobytes()[::-1] for n, a in payload.tensors.items()}
        return replace(payload, tensors={n: np.frombuffer(back[n], d).reshape(s) for n, (d, s) in form.items()})

    def settle(self, *, counted: bool) -> None: ...


class Hiding(PlainSum):
    hides_terms: ClassVar[bool] = True


# --- the chain ------------------------------------------------------------------------------------------------


def test_a_term_is_encoded_then_packed_and_unpacked_then_decoded_however_they_are_listed() -> None:
    for hooks in ([Doubled(), Reversed()], [Reversed(), Doubled()]):
        wire = Wire(hooks)
        sent = wire.encode(TERM, 1)
        assert sent.tensors["w"].tobytes() == np.array([2.0, 4.0, 6.0]).tobytes()[::-1]
        found = wire.decode(sent, LAYOUT)
        assert found.fields == TERM.fields
        assert found.tensors["w"].tolist() == [1.0, 2.0, 3.0]
        assert found.tensors["w"].dtype == np.float32


def test_each_hook_is_told_the_form_of_what_it_decodes() -> None:
    packing = Reversed()
    for hooks, dtype in (([packing], np.float32), ([packing, Doubled()], np.float64)):
        Wire(hooks).decode(Wire(hooks).encode(TERM, 1), LAYOUT)
        assert packing.forms.pop() == {"w": (np.dtype(dtype), (3,))}


def test_two_hooks_of_one_stage_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="Doubled and Doubled both stand at ENCODE"):
        Wire([Doubled(), Reversed(), Doubled()])


def test_a_hook_that_only_claims_to_be_on_the_wire_is_a_bug() -> None:
    class Claims:
        stage: ClassVar[HookStage] = HookStage.PACK
        Params: ClassVar[type[Frozen]] = Frozen

        def before_send(self, update: Update, round_number: int) -> Update:
            return update

        def after_sum(self, total: Total, round_number: int) -> Total:
            return total

    with pytest.raises(InternalError, match="Claims stands at PACK and is no WireHook"):
        Wire([Claims()])


def test_nothing_follows_a_hook_whose_sizes_vary() -> None:
    class Odd(Doubled):
        def form(self, form: Form) -> Form | None:
            return None

    wire = Wire([Odd(), Reversed()])
    with pytest.raises(InternalError, match="nothing can be encoded after Odd"):
        wire.decode(TERM, LAYOUT)


def test_without_wire_hooks_the_sum_is_the_sum() -> None:
    plain, hiding = PlainSum(), Hiding()
    assert Wire([]).around(plain, lambda: 1) is plain
    assert Wire([]).around(hiding, lambda: 1) is hiding


def test_terms_that_are_hidden_are_not_written_anew() -> None:
    with pytest.raises(ProtectionError, match="Doubled, Reversed would write terms anew"):
        Wire([Reversed(), Doubled()]).around(Hiding(), lambda: 1)


# --- the sum --------------------------------------------------------------------------------------------------


def wired(hook: UpdateHook, number: int = 1) -> Any:
    return Wire([hook]).around(PlainSum(), lambda: number)


def test_the_sum_of_encoded_terms_is_the_sum_of_the_terms() -> None:
    cohort, notes = Cohort(("a", "b"), "z", 2), []
    secure_sum = wired(Doubled(notes), number=7)
    assert isinstance(secure_sum, WiredSum)
    server = secure_sum.server(SumScene(cohort, "z", LAYOUT))
    assert server.awaiting == {"a", "b"}
    for party, value in (("a", 1.0), ("b", 4.0)):
        update = Update({"w": np.full(3, value, np.float32)}, 1.0)
        (send,) = secure_sum.party(SumScene(cohort, party, LAYOUT)).handle(SumContribute(update))
        assert isinstance(send, SumSend)
        assert send.body.tensors["w"].tolist() == [2 * value] * 3
        actions = server.handle(SumReceived(party, send.body))
    assert actions[0].total.mean["w"].tolist() == [2.5] * 3
    assert [note for note in notes if note[0] == "encode"] == [("encode", 7)] * 2


def test_terms_nobody_waits_for_are_refused_unread() -> None:
    # Given a sum that has its term of a
    notes: list[Any] = []
    secure_sum = wired(Doubled(notes))
    server = secure_sum.server(SumScene(Cohort(("a", "b"), "z", 1), "z", LAYOUT))
    encoded = Doubled().encode(TERM, 1)
    server.handle(SumReceived("a", encoded))
    before = list(notes)
    # When a sends another, or a stranger sends one, Then neither is decoded
    for sender, text in (("a", "second term"), ("x", "not a contributor")):
        with pytest.raises(PeerViolation, match=text):
            server.handle(SumReceived(sender, encoded))
    server.handle(SumExpired())
    with pytest.raises(PeerViolation, match="after the end"):
        server.handle(SumReceived("b", encoded))
    assert notes == before


def test_a_term_that_cannot_be_decoded_changes_nothing() -> None:
    server = wired(Doubled()).server(SumScene(Cohort(("a", "b"), "z", 1), "z", LAYOUT))
    with pytest.raises(PeerViolation, match="no float64"):
        server.handle(SumReceived("a", TERM))
    assert server.awaiting == {"a", "b"}


def test_terms_are_kept_as_they_were_before_the_wire() -> None:
    server = wired(Doubled()).server(SumScene(Cohort(("a",), "z", 1), "z", LAYOUT), keep_terms=True)
    (done,) = server.handle(SumReceived("a", Doubled().encode(TERM, 1)))
    assert done.total.terms["a"].arrays["w"].tolist() == [1.0, 2.0, 3.0]


# --- whole rounds ---------------------------------------------------------------------------------------------


def setting(channel: JobChannel, cohort: Cohort, hooks: list[UpdateHook], **changes: Any) -> Setting:
    given = Setting(channel, "tune", cohort, 3, 20.0, PlainSum(), lambda event, **fields: None, hooks)
    return replace(given, **changes)


def coordinate(given: Setting) -> list[Total]:
    driver, totals = CoordinatorDriver(given), []
    state = driver.start()
    for round in driver:
        totals.append(round.collect())
        round.publish(state)
    given.channel.announce_done()
    return totals


def contribute(given: Setting, me: str, before: Callable[[int], None] = lambda number: None) -> list[RoundResult]:
    driver, results = ContributorDriver(given, me), []
    driver.start({"w": np.zeros(3, np.float32)})
    for round in driver:
        before(round.number)
        results.append(round.contribute({"w": np.full(3, round.number, np.float32)}, weight=1.0))
    return results


def test_every_round_is_encoded_sent_decoded_and_settled(make_channels: Make, together: Any) -> None:
    channels, cohort = make_channels("abz"), Cohort(("a", "b"), "z", 2)
    notes: dict[str, list[Any]] = {"a": [], "b": [], "z": []}
    ends = together(
        {
            "a": lambda: contribute(setting(channels["a"], cohort, [Doubled(notes["a"])]), "a"),
            "b": lambda: contribute(setting(channels["b"], cohort, [Doubled(notes["b"])]), "b"),
            "z": lambda: coordinate(setting(channels["z"], cohort, [Doubled(notes["z"])])),
        }
    )
    assert [total.mean["w"].tolist() for total in ends["z"]] == [[float(n)] * 3 for n in (1, 2, 3)]
    assert notes["a"] == notes["b"] == [(what, n) for n in (1, 2, 3) for what, n in (("encode", n), ("settle", True))]
    assert notes["z"] == [("decode", 2.0 * n) for n in (1, 2, 3) for _ in "ab"]


def test_a_party_without_the_hook_is_left_out_and_the_round_does_not_wait_for_it(
    make_channels: Make, together: Any
) -> None:
    # Given b, whose terms are not encoded, When the rounds run with a quorum of one
    channels, cohort = make_channels("abz"), Cohort(("a", "b"), "z", 1)
    ignored: list[Any] = []

    def emit(event: str, **fields: Any) -> None:
        ignored.extend([(fields["party"], fields["why"])] if event == "ignored" else [])

    ends = together(
        {
            "a": lambda: contribute(setting(channels["a"], cohort, [Doubled()]), "a"),
            "b": lambda: contribute(setting(channels["b"], cohort, []), "b"),
            "z": lambda: coordinate(setting(channels["z"], cohort, [Doubled()], emit=emit)),
        }
    )
    # Then it is named with the reason, and the others go on (a deadline of 20 s never passes)
    assert [total.contributors for total in ends["z"]] == [("a",)] * 3
    assert ignored == [("b", "doubled: a tensor is no float64")] * 3


def test_a_term_that_was_sent_and_did_not_count_is_settled_as_such(make_channels: Make, together: Any) -> None:
    # Given b, whose encoding is another's: refused in every round
    channels, cohort = make_channels("abz"), Cohort(("a", "b"), "z", 1)
    notes: list[Any] = []

    class Broken(Doubled):
        def encode(self, payload: Payload, round_number: int) -> Payload:
            super().encode(payload, round_number)
            return payload

    together(
        {
            "a": lambda: contribute(setting(channels["a"], cohort, [Doubled()]), "a"),
            "b": lambda: contribute(setting(channels["b"], cohort, [Broken(notes)]), "b"),
            "z": lambda: coordinate(setting(channels["z"], cohort, [Doubled()])),
        }
    )
    assert notes == [(what, value) for n in (1, 2, 3) for what, value in (("encode", n), ("settle", False))]


def test_a_party_overtaken_by_a_round_encodes_nothing(make_channels: Make, together: Any) -> None:
    channels, cohort = make_channels("abz"), Cohort(("a", "b"), "z", 1)
    notes: list[Any] = []
    left = threading.Event()

    def until_all_is_over(number: int) -> None:
        assert left.wait(10)
        with channels["b"]._changed:
            assert channels["b"]._changed.wait_for(lambda: "z" in channels["b"].left, 10)

    def coordinator() -> list[Total]:
        totals = coordinate(setting(channels["z"], cohort, [Doubled()], rounds=1, patience=0.3))
        left.set()
        return totals

    together(
        {
            "a": lambda: contribute(setting(channels["a"], cohort, [Doubled()], rounds=1), "a"),
            "b": lambda: contribute(setting(channels["b"], cohort, [Doubled(notes)], rounds=1), "b", until_all_is_over),
            "z": coordinator,
        }
    )
    assert notes == [("settle", False)]


def test_both_drivers_refuse_encodings_of_hidden_terms(make_channels: Make) -> None:
    channels, cohort = make_channels("az"), Cohort(("a",), "z", 1)
    for make in (CoordinatorDriver, lambda given: ContributorDriver(given, "a")):
        with pytest.raises(ProtectionError, match="would write terms anew"):
            make(setting(channels["a"], cohort, [Doubled()], secure_sum=Hiding()))
