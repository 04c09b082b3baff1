"""The contract of every update hook."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fate_llm.core import plugins
from fate_llm.core.errors import ConfigurationError, PeerViolation, ProtectionError
from fate_llm.core.interfaces import Frozen, HookStage, Kept, UpdateHook, WireHook
from fate_llm.core.values import Payload, Total, Update
from fate_llm.protocols.tensors import read_tensors, write_tensors

NAMES = plugins.names("hook")
# Params that make each hook do something to the update below; a hook that needs none may be left out.
PARAMS: dict[str, dict[str, Any]] = {"clip": {"norm": 1.0}}


def test_there_is_a_hook() -> None:
    assert NAMES, "no hook found"


@pytest.fixture(params=NAMES)
def hook(request: pytest.FixtureRequest) -> Any:
    return make(request.param)


def make(name: str, seed: int = 5) -> Any:
    made = plugins.load("hook", name)
    params = made.Params(**PARAMS.get(name, {}))
    return made(params, seed=seed) if getattr(made, "draws", False) else made(params)


def update() -> Update:
    arrays = {
        "w": np.array([3, 4], np.float32),
        "s": np.array(12, np.float32),
        "e": np.zeros((0, 2), np.float32),
    }
    for array in arrays.values():
        array.flags.writeable = False
    return Update(arrays, 2.0, {"loss": 1.0})


def contents(arrays: Any) -> dict[str, tuple[Any, ...]]:
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in arrays.items()}


def test_it_is_what_the_seam_says(hook: Any) -> None:
    assert isinstance(hook, UpdateHook)
    assert isinstance(hook.stage, HookStage)
    assert issubclass(hook.Params, Frozen)
    assert type(hook).__doc__
    with pytest.raises(ValueError, match="surely_unknown"):
        hook.Params(surely_unknown=1)


def test_it_does_not_change_its_input(hook: Any) -> None:
    given = update()
    before = contents(given.arrays)
    sent = hook.before_send(given, 1)
    assert contents(given.arrays) == before
    assert (given.weight, given.sums) == (2.0, {"loss": 1.0})
    total = Total(given.arrays, 2.0, {"loss": 1.0}, ("a",))
    hook.after_sum(total, 1)
    assert contents(total.mean) == before
    assert {n: (a.dtype, a.shape) for n, a in sent.arrays.items()} == {n: v[:2] for n, v in before.items()}
    assert all(isinstance(a, np.ndarray) for a in sent.arrays.values())


def test_an_update_of_zeros_stays_finite(hook: Any) -> None:
    zeros = Update({"w": np.zeros(4, np.float32)}, 1.0)
    assert np.isfinite(hook.before_send(zeros, 1).arrays["w"]).all()


@given(value=hnp.arrays(np.float32, (5,), elements=st.floats(-1e9, 1e9, width=32)), bound=st.floats(1e-6, 1e6))
@settings(deadline=None, max_examples=150)
def test_clip_never_leaves_more_than_its_bound_and_keeps_the_direction(value: np.ndarray, bound: float) -> None:
    clip = plugins.load("hook", "clip")
    given_update = Update({"w": value[:2], "v": value[2:]}, 1.0)
    sent = clip(clip.Params(norm=bound)).before_send(given_update, 1)
    before, after = (
        value.astype(np.float64),
        np.concatenate([sent.arrays["w"], sent.arrays["v"]]).astype(np.float64),
    )
    assert np.linalg.norm(after) <= bound
    if np.linalg.norm(before) <= bound:
        assert sent is given_update
    else:
        wanted = before * bound / np.linalg.norm(before)
        np.testing.assert_allclose(after, wanted, rtol=1e-5, atol=1e-6 * bound)


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan"), float("inf")])
def test_clip_refuses_a_bound_that_bounds_nothing(norm: float) -> None:
    with pytest.raises(ValueError):
        plugins.load("hook", "clip").Params(norm=norm)


# --- hooks of the wire ------------------------------------------------------------------------------------------

WIRE_NAMES = [name for name in NAMES if plugins.load("hook", name).stage.on_the_wire]
FLOAT32 = np.dtype(np.float32)


@pytest.fixture(params=WIRE_NAMES)
def wire_hook(request: pytest.FixtureRequest) -> Any:
    return make(request.param)


def payload(size: int = 9000) -> Payload:
    """A scalar, nothing, zeros, and values over many magnitudes; all read-only."""
    noise = np.random.default_rng(3).standard_normal(size).astype(np.float32)
    arrays = {
        "z": np.zeros((2, 3), np.float32),
        "w": (noise * np.float32(1e-3)).reshape(3, -1).T,  # not contiguous
        "s": np.array(-12.5, np.float32),
        "e": np.zeros((0, 2), np.float32),
        "b": np.array([1e30, -1e-30, 1e-45, -0.0, 0.0, 3.0], np.float32),
    }
    for array in arrays.values():
        array.flags.writeable = False
    return Payload({"weight": 2.0, "sums": {"loss": 1.0}}, arrays)


def form_of(given: Payload) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    return {name: (array.dtype, array.shape) for name, array in given.tensors.items()}


def over_the_wire(sent: Payload) -> Payload:
    """As the receiver sees it: read-only views into one buffer."""
    body = b"".join(write_tensors(sent.tensors))
    return Payload(sent.fields, read_tensors(memoryview(body)))


def test_a_hook_that_stands_on_the_wire_is_a_wire_hook_and_no_other_is() -> None:
    assert set(WIRE_NAMES) >= {"bf16", "int8", "zstd"}
    for name in NAMES:
        assert isinstance(make(name), WireHook) == (name in WIRE_NAMES), name


def test_a_wire_hook_leaves_updates_and_totals_alone(wire_hook: Any) -> None:
    given, total = update(), Total(update().arrays, 2.0, {}, ("a",))
    assert wire_hook.before_send(given, 1) is given
    assert wire_hook.after_sum(total, 1) is total


def test_what_was_encoded_can_be_decoded_and_the_input_stays(wire_hook: Any) -> None:
    given = payload()
    before = contents(given.tensors)
    sent = wire_hook.encode(given, 1)
    found = make_like(wire_hook).decode(over_the_wire(sent), form_of(given))
    assert contents(given.tensors) == before
    assert found.fields == given.fields == {"weight": 2.0, "sums": {"loss": 1.0}}
    assert list(found.tensors) == list(given.tensors), "a sum adds in an order of its own, never in the sender's"
    for name, array in given.tensors.items():
        other = found.tensors[name]
        assert (other.dtype, other.shape) == (array.dtype, array.shape), name
        assert np.isfinite(other).all()
        largest = float(np.abs(array).max(initial=0))
        assert np.abs(other.astype(np.float64) - array).max(initial=0) <= largest / 127 * (1 + 1e-6), name
    assert found.tensors["z"].max() == found.tensors["z"].min() == 0.0


def test_the_order_in_which_a_peer_lists_its_tensors_is_of_no_matter(wire_hook: Any) -> None:
    given, sent = payload(), wire_hook.encode(payload(), 1)
    turned = Payload(sent.fields, dict(reversed(list(sent.tensors.items()))))
    one, two = (wire_hook.decode(message, form_of(given)) for message in (sent, turned))
    assert list(two.tensors) == list(given.tensors)
    assert contents(one.tensors) == contents(two.tensors)


def make_like(hook: Any) -> Any:
    """The coordinator's: another object with another seed."""
    return make(type(hook).__module__.rpartition(".")[2], seed=99)


def test_packing_loses_nothing(wire_hook: Any) -> None:
    if wire_hook.stage is HookStage.PACK:
        given = payload()
        found = wire_hook.decode(over_the_wire(wire_hook.encode(given, 1)), form_of(given))
        assert contents(found.tensors) == contents(given.tensors)


def test_the_form_is_what_is_encoded(wire_hook: Any) -> None:
    given = payload()
    form = wire_hook.form(form_of(given))
    if form is not None:
        assert form_of(wire_hook.encode(given, 1)) == form


def test_a_term_without_arrays_passes(wire_hook: Any) -> None:
    empty = Payload({"weight": 1.0, "sums": {}})
    assert wire_hook.decode(over_the_wire(wire_hook.encode(empty, 1)), {}) == empty


def test_the_same_seed_and_round_give_the_same_bytes(wire_hook: Any) -> None:
    name = type(wire_hook).__module__.rpartition(".")[2]
    one, two, other = (make(name, seed).encode(payload(), 3) for seed in (5, 5, 6))
    assert contents(one.tensors) == contents(two.tensors)
    if wire_hook.draws:
        assert contents(one.tensors) != contents(other.tensors)
        assert contents(one.tensors) != contents(make(name).encode(payload(), 4).tensors)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_cannot_be_written_does_not_leave_the_party(wire_hook: Any, bad: float) -> None:
    given = Payload({}, {"w": np.array([1, bad, 2], np.float32)})
    if wire_hook.stage is HookStage.ENCODE:
        with pytest.raises(ProtectionError, match="w has"):
            wire_hook.encode(given, 1)
    else:
        found = wire_hook.decode(wire_hook.encode(given, 1), form_of(given))
        assert contents(found.tensors) == contents(given.tensors)


def test_an_encoding_is_of_float32_only(wire_hook: Any) -> None:
    if wire_hook.stage is HookStage.ENCODE:
        given = Payload({}, {"w": np.zeros(3, np.float64)})
        for call in (lambda: wire_hook.encode(given, 1), lambda: wire_hook.form(form_of(given))):
            with pytest.raises(ConfigurationError, match="w is float64"):
                call()


def broken(sent: Payload) -> dict[str, dict[str, np.ndarray]]:
    """Messages that no honest party sends, by what is wrong with them."""
    tensors = dict(sent.tensors)
    lacking = {name: array for name, array in tensors.items() if name != "w"}
    return {
        "nothing": {},
        "a name less": lacking,
        "a name more": {**tensors, "x": np.zeros(2, np.float32)},
        "another name": {**lacking, "v" * 1000: tensors["w"]},
        "plain float32": dict(payload().tensors),
        "another dtype": {**tensors, "w": tensors["w"].astype(np.int64)},
        "another shape": {**tensors, "w": tensors["w"].reshape(-1)[:-1]},
        "more of it": {**tensors, "w": np.concatenate([tensors["w"].reshape(-1)] * 2)},
        "values for nothing": {**tensors, "e": tensors["w"]},
        "a matrix of it": {**tensors, "w": tensors["w"].reshape(1, 1, -1)},
    }


def test_a_malformed_term_is_refused_by_a_peer_violation(wire_hook: Any) -> None:
    sent, form = wire_hook.encode(payload(), 1), form_of(payload())
    for what, tensors in broken(sent).items():
        with pytest.raises(PeerViolation) as refused:
            wire_hook.decode(Payload(sent.fields, tensors), form)
            pytest.fail(what)
        assert len(refused.value.message) < 400, "a peer's text is cut before it reaches a log"


@given(places=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4), data=st.data())
@settings(deadline=None, max_examples=150)
def test_a_changed_byte_is_refused_or_changes_a_value_and_nothing_else(places: Any, data: Any) -> None:
    """Digests find damage; this is about a peer that means it: no other error, no other shape."""
    hook = make(data.draw(st.sampled_from(WIRE_NAMES)))
    given_payload = payload(600)
    tensors = dict(hook.encode(given_payload, 1).tensors)
    name = data.draw(st.sampled_from(sorted(name for name, array in tensors.items() if array.size)))
    raw = bytearray(np.ascontiguousarray(tensors[name]).tobytes())
    for place, change in places:
        raw[place % len(raw)] ^= change
    tensors[name] = np.frombuffer(bytes(raw), tensors[name].dtype).reshape(tensors[name].shape)
    try:
        found = hook.decode(Payload({}, tensors), form_of(given_payload))
    except PeerViolation:
        return
    assert form_of(found) == form_of(given_payload)


# --- hooks that a killed party needs again ----------------------------------------------------------------------


def kept_hooks() -> list[str]:
    found = [name for name in NAMES if isinstance(make(name), Kept)]
    assert "int8" in found
    return found


@pytest.mark.parametrize("name", kept_hooks())
def test_a_kept_hook_goes_on_as_if_it_had_not_been_killed(name: str, tmp_path: Path) -> None:
    # Given two of the same, one of which is written down and read back by another after every round
    steady, mortal = make(name), make(name)
    for number in range(1, 5):
        values = np.random.default_rng(number).normal(size=(40, 130)).astype(np.float32)
        payload = Payload({}, {"w": values, "b": values[0]})
        one, other = steady.encode(payload, number), mortal.encode(payload, number)
        # Then all that they send is the same
        assert {n: a.tobytes() for n, a in one.tensors.items()} == {n: a.tobytes() for n, a in other.tensors.items()}
        for hook in (steady, mortal):
            hook.settle(counted=number != 2)
        folder = tmp_path / str(number)
        folder.mkdir()
        mortal.save(folder)
        mortal = make(name)
        mortal.restore(folder)


@pytest.mark.parametrize("name", kept_hooks())
def test_a_kept_hook_that_has_nothing_yet_can_be_written_down(name: str, tmp_path: Path) -> None:
    make(name).save(tmp_path)
    make(name).restore(tmp_path)
