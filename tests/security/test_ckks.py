"""Whole numbers under CKKS: exact, whoever adds them in whatever order; and what is refused."""

from __future__ import annotations

import hashlib
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fate_llm.core.errors import InternalError, MissingExtra, PeerViolation, ProtectionError
from fate_llm.security import ckks
from fate_llm.security.ckks import (
    CIPHERTEXT_BYTES,
    CONTEXT_BYTES,
    LARGEST,
    RING,
    SCALE,
    SLOTS,
    CipherTotal,
    PublicContext,
    SecretContext,
)

tenseal = pytest.importorskip("tenseal")


@pytest.fixture(scope="module")
def secret() -> SecretContext:
    return SecretContext.generate()


@pytest.fixture(scope="module")
def public(secret: SecretContext) -> PublicContext:
    return PublicContext(secret.public.to_bytes())


@pytest.fixture(scope="module")
def other() -> SecretContext:
    return SecretContext.generate()


def summed(public: PublicContext, terms: Any) -> list[bytes]:
    total = CipherTotal()
    for term in terms:
        total.add([public.load(c) for c in public.encrypt(np.asarray(term, np.int64))])
    return total.take(0, 10**6)


# --- sums --------------------------------------------------------------------------------------------------------


def test_a_sum_of_random_numbers_is_exact(secret: SecretContext, public: PublicContext) -> None:
    draw = np.random.default_rng(1)
    terms = draw.integers(-(LARGEST // 8), LARGEST // 8, (8, 2 * SLOTS + 5))
    opened = secret.open(summed(public, terms)).reshape(-1)
    assert (opened[: terms.shape[1]] == terms.sum(0)).all()
    assert opened.dtype == np.int64
    assert not opened[terms.shape[1] :].any(), "what is not there is 0"


@pytest.mark.parametrize("pattern", ["all", "one", "alternating", "half", "negative"])
def test_the_largest_sums_are_exact_whatever_the_numbers_are(
    secret: SecretContext, public: PublicContext, pattern: str
) -> None:
    """The encoding of numbers that are alike has one coefficient of their size: nothing wraps around there either."""
    numbers = np.zeros(SLOTS, np.int64)
    match pattern:
        case "all":
            numbers[:] = LARGEST // 4
        case "one":
            numbers[17] = LARGEST // 4
        case "alternating":
            numbers[:] = LARGEST // 4
            numbers[::2] *= -1
        case "half":
            numbers[: SLOTS // 2] = LARGEST // 4
        case _:
            numbers[:] = -(LARGEST // 4)
    opened = secret.open(summed(public, [numbers] * 4))[0]
    assert (opened == 4 * numbers).all()


def test_a_hundred_terms_are_still_exact(secret: SecretContext, public: PublicContext) -> None:
    numbers = np.random.default_rng(3).integers(-(LARGEST // 100), LARGEST // 100, SLOTS)
    vector = public.encrypt(numbers)
    total = CipherTotal()
    for _ in range(100):
        total.add([public.load(vector[0])])
    assert total.terms == 100
    assert (secret.open(total.take(0, 1))[0] == 100 * numbers).all()


@given(terms=st.lists(st.lists(st.integers(-(2**28), 2**28), min_size=1, max_size=6), min_size=1, max_size=6))
@settings(deadline=None, max_examples=15)
def test_any_numbers_add_up(secret: SecretContext, public: PublicContext, terms: list[list[int]]) -> None:
    opened = secret.open(summed(public, terms))[0]
    wanted = np.zeros(SLOTS, np.int64)
    for term in terms:
        wanted[: len(term)] += term
    assert (opened == wanted).all()


def test_the_order_of_adding_changes_no_bit(public: PublicContext) -> None:
    vectors = [public.encrypt(np.arange(10) * k) for k in range(4)]
    seen = set()
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        total = CipherTotal()
        for place in order:
            total.add([public.load(c) for c in vectors[place]])
        seen.add(tuple(total.take(0, 1)))
    assert len(seen) == 1


def test_the_error_of_a_sum_is_far_below_a_half(secret: SecretContext, public: PublicContext) -> None:
    """What the module says of its error: 1.0e-5 * sqrt(m) on average."""
    raw = summed(public, np.random.default_rng(4).integers(-(2**28), 2**28, (8, SLOTS)))[0]
    found = np.asarray(tenseal.ckks_vector_from(secret._context, raw).decrypt())
    error = found - np.rint(found)
    assert 1e-6 < error.std() < 3e-5 * np.sqrt(8)
    assert np.abs(error).max() < 1e-3


def test_bytes_a_number(public: PublicContext) -> None:
    (ciphertext,) = public.encrypt(np.zeros(SLOTS, np.int64))
    assert len(ciphertext) / SLOTS <= 33
    assert len(ciphertext) <= CIPHERTEXT_BYTES
    assert len(public.to_bytes()) <= CONTEXT_BYTES
    assert public.encrypt(np.zeros(0, np.int64)) == []


def test_the_same_numbers_are_other_bytes_each_time(public: PublicContext) -> None:
    assert public.encrypt(np.arange(5))[0] != public.encrypt(np.arange(5))[0]


# --- keys --------------------------------------------------------------------------------------------------------


def secret_pieces(secret: SecretContext) -> list[bytes]:
    """Runs of 48 bytes that are in the secret context and not in the public one."""
    whole, open_part = secret.to_bytes(), secret.public.to_bytes()
    pieces = [whole[start : start + 48] for start in range(0, len(whole) - 48, 4096)]
    found = [piece for piece in pieces if piece not in open_part]
    assert len(found) > 20
    return found


def test_the_public_half_holds_nothing_of_the_secret_one(secret: SecretContext, public: PublicContext) -> None:
    raw = public.to_bytes()
    assert not any(piece in raw for piece in secret_pieces(secret))
    context = tenseal.context_from(raw)
    assert not context.is_private()
    assert context.has_public_key()
    assert not context.has_galois_keys()
    assert not context.has_relin_keys()
    with pytest.raises(ValueError, match="secret_key"):
        tenseal.ckks_vector_from(context, public.encrypt(np.arange(3))[0]).decrypt()


def test_the_library_leaves_the_secret_key_out_by_default(secret: SecretContext) -> None:
    """We name every argument; should the default change, we want to know."""
    raw = secret._context.serialize()
    assert not tenseal.context_from(raw).is_private()
    assert not any(piece in raw for piece in secret_pieces(secret))


def test_every_key_is_new() -> None:
    seen = {SecretContext.generate().public.digest for _ in range(3)}
    assert len(seen) == 3


def test_keys_that_were_kept_open_the_same(secret: SecretContext, public: PublicContext) -> None:
    again = SecretContext(secret.to_bytes())
    assert again.public.to_bytes() == public.to_bytes()
    assert (again.open(public.encrypt(np.arange(9)))[0][:9] == np.arange(9)).all()


def test_nothing_secret_is_shown(secret: SecretContext, public: PublicContext) -> None:
    digest = hashlib.sha256(public.to_bytes()).hexdigest()
    assert public.digest == digest
    assert repr(public) == f"PublicContext({digest[:16]}...)"
    assert repr(secret) == f"SecretContext(for PublicContext({digest[:16]}...))"


def test_the_parameters_are_those_of_128_bits_and_more(public: PublicContext) -> None:
    found = public._context.seal_context().data.key_context_data()
    assert found.parms().poly_modulus_degree() == RING == 8192
    assert found.total_coeff_modulus_bit_count() <= 152, "the limit for 192 bits at this ring"
    assert public._context.global_scale == SCALE


# --- what is refused ---------------------------------------------------------------------------------------------


def test_a_sum_under_other_keys_is_found_out(public: PublicContext, other: SecretContext) -> None:
    with pytest.raises(ProtectionError, match="other keys"):
        other.open(public.encrypt(np.arange(100)))


def test_a_sum_with_one_term_under_other_keys_is_found_out(secret: SecretContext, other: SecretContext) -> None:
    public = secret.public
    total = CipherTotal()
    total.add([public.load(c) for c in public.encrypt(np.arange(100))])
    total.add([public.load(c) for c in other.public.encrypt(np.arange(100))])
    with pytest.raises(ProtectionError):
        secret.open(total.take(0, 1))


@pytest.mark.parametrize("place", [140, 5000, 70_000, 130_000])
def test_a_changed_ciphertext_is_refused_or_found_out(secret: SecretContext, public: PublicContext, place: int) -> None:
    raw = bytearray(public.encrypt(np.arange(100))[0])
    raw[place] ^= 0x5A
    with pytest.raises((PeerViolation, ProtectionError)):
        secret.open([bytes(raw)])


def test_numbers_that_are_not_whole_are_not_released(secret: SecretContext, public: PublicContext) -> None:
    made = tenseal.ckks_vector(public._context, tenseal.plain_tensor(np.full(SLOTS, 7.5))).serialize()
    with pytest.raises(ProtectionError, match="not whole"):
        secret.open([made])


def test_numbers_beyond_the_largest_are_not_released(secret: SecretContext, public: PublicContext) -> None:
    with pytest.raises(ProtectionError, match="above 2147483647"):
        secret.open(summed(public, [[LARGEST], [LARGEST]]))
    with pytest.raises(ProtectionError, match="cannot be encrypted"):
        public.encrypt(np.array([LARGEST + 1]))
    with pytest.raises(ProtectionError, match="cannot be encrypted"):
        public.encrypt(np.array([-LARGEST - 1]))
    assert secret.open(public.encrypt(np.array([LARGEST, -LARGEST])))[0][:2].tolist() == [LARGEST, -LARGEST]


@pytest.mark.parametrize("wrong", [np.zeros((2, 2), np.int64), np.zeros(3), np.zeros(3, bool)])
def test_only_whole_numbers_in_one_dimension_are_encrypted(public: PublicContext, wrong: Any) -> None:
    with pytest.raises(InternalError):
        public.encrypt(wrong)


def test_bytes_that_are_no_ciphertext(public: PublicContext, secret: SecretContext) -> None:
    good = public.encrypt(np.arange(3))[0]
    bad = [b"", b"x", good[:-1], good[: len(good) // 2], good + b"1", public.to_bytes(), bytes(CIPHERTEXT_BYTES + 1)]
    for raw in bad:
        with pytest.raises(PeerViolation, match="CKKS ciphertext"):
            public.load(raw)
        with pytest.raises(PeerViolation, match="CKKS ciphertext"):
            secret.open([raw])


@pytest.mark.parametrize("form", ["shorter", "another scale", "two ciphertexts", "of three polynomials"])
def test_ciphertexts_of_another_form(public: PublicContext, secret: SecretContext, form: str) -> None:
    context = public._context
    match form:
        case "shorter":
            vector = tenseal.ckks_vector(context, [1.0, 2.0])
        case "another scale":
            vector = tenseal.ckks_vector(context, [1.0] * SLOTS, 2.0**28)
        case "two ciphertexts":
            vector = tenseal.ckks_vector(context, [1.0] * (SLOTS + 1))
        case _:
            small = tenseal.ckks_vector(context, [1.0] * SLOTS, 2.0**13)
            loose = tenseal.context_from(secret.to_bytes())
            loose.auto_relin = loose.auto_rescale = loose.auto_mod_switch = False
            vector = tenseal.ckks_vector_from(loose, small.serialize())
            vector.mul_(tenseal.ckks_vector_from(loose, small.serialize()))
    raw = vector.serialize()
    with pytest.raises(PeerViolation, match="CKKS ciphertext"):
        public.load(raw)


def test_contexts_that_are_not_ours(secret: SecretContext) -> None:
    def context(ring: int = RING, bits: tuple[int, ...] = (60, 60), scale: float = SCALE) -> Any:
        made = tenseal.context(tenseal.SCHEME_TYPE.CKKS, ring, coeff_mod_bit_sizes=list(bits))
        made.global_scale = scale
        return made

    def public_of(made: Any) -> bytes:
        return bytes(made.serialize(save_galois_keys=False, save_relin_keys=False))

    with_galois = context()
    with_galois.generate_galois_keys()
    bfv = tenseal.context(tenseal.SCHEME_TYPE.BFV, RING, plain_modulus=1032193, coeff_mod_bit_sizes=[60, 60])
    cases = [
        (secret.to_bytes(), "at most"),
        (bytes(with_galois.serialize()), "at most"),
        (public_of(context(4096, (54, 54))), "other parameters: ring 4096"),
        (public_of(context(bits=(60, 40))), "other parameters"),
        (public_of(context(scale=2.0**40)), "other parameters"),
        (public_of(bfv), "no CKKS context: no global scale"),
        (secret.public.to_bytes()[:-7], "no CKKS context"),
        (b"", "no CKKS context"),
        (bytes(100), "no CKKS context"),
    ]
    for raw, message in cases:
        with pytest.raises(PeerViolation, match=message):
            PublicContext(raw)


def test_a_context_with_its_secret_key_is_refused_even_if_small_enough(
    secret: SecretContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fate_llm.security.ckks.CONTEXT_BYTES", 10**6)
    with pytest.raises(PeerViolation, match="secret key"):
        PublicContext(secret.to_bytes())
    keys = secret._context.copy()
    keys.generate_relin_keys()
    with pytest.raises(PeerViolation, match="more than"):
        PublicContext(bytes(keys.serialize()))


def test_kept_keys_that_are_damaged(secret: SecretContext, public: PublicContext) -> None:
    for raw in (b"", secret.to_bytes()[:-100], public.to_bytes()):
        with pytest.raises(ProtectionError, match="damaged"):
            SecretContext(raw)


def test_a_form_that_is_known_is_not_looked_into_again_and_another_one_is(public: PublicContext) -> None:
    """However many good ones came before, a bad one is refused."""
    context = PublicContext(public.to_bytes())
    good = [context.encrypt(np.arange(k))[0] for k in range(1, 4)]
    assert [context._forms.known(raw) for raw in good] == [False] * 3
    for raw in good:
        context.load(raw)
        assert context._forms.known(raw)
    for place in (*range(0, 133, 5), -1):
        raw = bytearray(good[0])
        raw[place] ^= 0x10
        assert not context._forms.known(bytes(raw))
    with pytest.raises(PeerViolation, match="at the scale"):
        context.load(tenseal.ckks_vector(context._context, [1.0] * SLOTS, 2.0**28).serialize())
    with pytest.raises(PeerViolation, match="of 2 numbers"):
        context.load(tenseal.ckks_vector(context._context, [1.0, 2.0]).serialize())


def test_a_form_that_cannot_be_read_off_its_ends_is_looked_into_every_time() -> None:
    forms = ckks._Forms()
    assert not forms.known(b"")
    forms.learn(bytes(200))
    assert not forms.known(bytes(200))


def test_a_term_of_another_length_is_not_added(public: PublicContext) -> None:
    total = CipherTotal()
    one = [public.load(c) for c in public.encrypt(np.zeros(1, np.int64))]
    total.add(one)
    with pytest.raises(InternalError, match="2 ciphertexts in a sum of 1"):
        total.add([*one, *one])
    assert total.terms == 1


def test_more_terms_than_there_is_room_for(public: PublicContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fate_llm.security.ckks.MOST_TERMS", 1)
    total = CipherTotal()
    total.add([])
    with pytest.raises(InternalError, match="more than 1 terms"):
        total.add([])


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch, public: PublicContext) -> None:
    monkeypatch.setattr(ckks, "_tenseal", ckks._tenseal.__wrapped__)
    monkeypatch.setitem(sys.modules, "tenseal", None)
    for call in (SecretContext.generate, lambda: PublicContext(public.to_bytes())):
        with pytest.raises(MissingExtra) as found:
            call()
        assert found.value.hint == "pip install 'fate_llm[he]'"
