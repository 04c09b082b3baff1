"""Sealed chunks: against an independent derivation, every address and bit counts, no nonce twice, nothing released."""

from __future__ import annotations

import hmac
import tracemalloc

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from fate_llm.core.errors import BadSeal, InternalError
from fate_llm.security.agreement import Agreement, PairSecret
from fate_llm.security.identity import Identity
from fate_llm.security.sealing import TAG_BYTES, ReceiveKeys, SendKeys, open_at_rest, seal_at_rest

SECRET = PairSecret(key=bytes(range(32)), session=b"session!", peer_epoch=1)
HEADER = b'{"job":"j","chunk":7}'
CONTENT = bytes(range(200)) + b"the content"


def sender(epoch: int = 3, *, stream: str = "data", secret: PairSecret = SECRET) -> SendKeys:
    return SendKeys(secret, sender="anna", receiver="bert", epoch=epoch, stream=stream)


def receiver(*, stream: str = "data", secret: PairSecret = SECRET) -> ReceiveKeys:
    return ReceiveKeys(secret, sender="anna", receiver="bert", stream=stream)


def sealed(number: int = 7, epoch: int = 3) -> bytes:
    return bytes(sender(epoch).seal(number, HEADER, CONTENT))


def refused(keys: ReceiveKeys, chunk: bytes, *, epoch: int = 3, number: int = 7, header: bytes = HEADER) -> BadSeal:
    """It opens in neither way, and a buffer given holds nothing afterwards."""
    with pytest.raises(BadSeal):
        keys.open(epoch, number, header, chunk)
    out = bytearray(b"\xaa" * (len(CONTENT) + 5))
    with pytest.raises(BadSeal) as caught:
        keys.open(epoch, number, header, chunk, memoryview(out))
    assert not any(out), "some of the content was released"
    return caught.value


def test_the_cipher_is_that_of_the_specification() -> None:
    """McGrew and Viega, The Galois/Counter Mode, test cases 13 and 14, through the primitive that is used."""
    cipher = AESGCM(bytes(32))
    assert cipher.encrypt(bytes(12), b"", None).hex() == "530f8afbc74536b9a963b4f1c4cb738b"
    expected = "cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919"
    assert cipher.encrypt(bytes(12), bytes(16), None).hex() == expected


@pytest.mark.parametrize("stream", ["data", "control"])
@pytest.mark.parametrize(("number", "epoch"), [(0, 0), (7, 3), (2**64 - 1, 2**64 - 1)])
def test_one_chunk_against_an_independent_derivation(stream: str, number: int, epoch: int) -> None:
    texts = b"".join(len(text).to_bytes(4, "big") + text for text in (b"anna", b"bert", stream.encode()))
    info = b"fate_llm/1 chunk key\0" + texts + epoch.to_bytes(8, "big")
    key = hmac.digest(hmac.digest(bytes(32), SECRET.key, "sha256"), info + b"\x01", "sha256")
    expected = AESGCM(key).encrypt(number.to_bytes(12, "big"), CONTENT, HEADER)
    chunk = sender(epoch, stream=stream).seal(number, HEADER, CONTENT)
    assert chunk == expected and len(chunk) == len(CONTENT) + TAG_BYTES
    assert receiver(stream=stream).open(epoch, number, HEADER, chunk) == CONTENT


def test_chunks_open_in_any_order_more_than_once_and_across_epochs() -> None:
    first, second, keys = sender(1), sender(2), receiver()
    chunks = {
        (epoch, number): keys_of.seal(number, HEADER, b"%d/%d" % (epoch, number))
        for epoch, keys_of in ((1, first), (2, second))
        for number in (1, 2, 5)
    }
    for epoch, number in [(2, 5), (1, 1), (2, 1), (1, 5), (1, 5), (2, 2), (1, 2)]:
        assert keys.open(epoch, number, HEADER, chunks[epoch, number]) == b"%d/%d" % (epoch, number)


# --- what does not open -----------------------------------------------------------------------------------------


def test_every_changed_bit_of_a_chunk_is_refused() -> None:
    keys, chunk = receiver(), sealed()
    for bit in range(8 * len(chunk)):
        changed = bytearray(chunk)
        changed[bit // 8] ^= 1 << bit % 8
        refused(keys, bytes(changed))
    assert keys.open(3, 7, HEADER, chunk) == CONTENT


def test_every_changed_bit_of_a_header_is_refused() -> None:
    keys, chunk = receiver(), sealed()
    for bit in range(8 * len(HEADER)):
        changed = bytearray(HEADER)
        changed[bit // 8] ^= 1 << bit % 8
        refused(keys, chunk, header=bytes(changed))
    for header in (b"", HEADER[:-1], HEADER + b"\0"):
        refused(keys, chunk, header=header)


def test_a_chunk_of_another_length_is_refused() -> None:
    keys, chunk = receiver(), sealed()
    for length in range(len(chunk)):
        refused(keys, chunk[:length])
    refused(keys, chunk + b"\0")
    refused(keys, b"\0" + chunk)
    assert "-16 bytes" in refused(keys, b"").message


@pytest.mark.parametrize(("epoch", "number"), [(3, 8), (3, 6), (2, 7), (4, 7), (7, 3), (3 + 2**32, 7), (3, 7 + 2**32)])
def test_another_number_or_epoch_is_refused(epoch: int, number: int) -> None:
    error = refused(receiver(), sealed(), epoch=epoch, number=number)
    assert error.code == "bad_seal"
    assert (
        f"chunk {number} " in error.message and f"epoch {epoch} " in error.message and "anna -> bert" in error.message
    )


@pytest.mark.parametrize(("epoch", "number"), [(-1, 7), (2**64, 7), (3, -1), (3, 2**64), (3, 2**96), (3, 2**200)])
def test_numbers_that_no_honest_sender_has_are_refused_as_what_a_peer_sent(epoch: int, number: int) -> None:
    refused(receiver(), sealed(), epoch=epoch, number=number)


def test_the_other_direction_stream_pair_or_secret_is_refused() -> None:
    chunk = sealed()
    reverse = ReceiveKeys(SECRET, sender="bert", receiver="anna")
    third = ReceiveKeys(SECRET, sender="anna", receiver="cleo")
    other = PairSecret(key=bytes(31) + b"\1", session=SECRET.session, peer_epoch=1)
    for keys in (reverse, third, receiver(stream="control"), receiver(secret=other)):
        refused(keys, chunk)
    # A chunk sent back to its sender under the sender's own claim
    refused(ReceiveKeys(SECRET, sender="bert", receiver="anna"), chunk)


def test_names_do_not_run_into_each_other() -> None:
    chunk = SendKeys(SECRET, sender="ab", receiver="c", epoch=3).seal(7, HEADER, CONTENT)
    refused(ReceiveKeys(SECRET, sender="a", receiver="bc"), bytes(chunk))


ADDRESS = st.tuples(
    st.sampled_from([bytes(32), bytes(31) + b"\1"]),
    st.sampled_from([("a", "b"), ("b", "a"), ("a", "c"), ("ab", "c"), ("a", "bc")]),
    st.sampled_from(["data", "control"]),
    st.integers(0, 3) | st.just(2**64 - 1),
    st.integers(0, 3) | st.just(2**64 - 1),
    st.sampled_from([b"", b"h", b"h\0"]),
)


@given(ADDRESS, ADDRESS)
def test_a_chunk_opens_at_its_own_address_only(
    where: tuple[bytes, tuple[str, str], str, int, int, bytes],
    there: tuple[bytes, tuple[str, str], str, int, int, bytes],
) -> None:
    key, (a, b), stream, epoch, number, header = where
    chunk = SendKeys(PairSecret(key, b"", 0), sender=a, receiver=b, epoch=epoch, stream=stream).seal(
        number, header, CONTENT
    )
    key, (a, b), stream, epoch, number, header = there
    keys = ReceiveKeys(PairSecret(key, b"", 0), sender=a, receiver=b, stream=stream)
    if where == there:
        assert keys.open(epoch, number, header, chunk) == CONTENT
    else:
        with pytest.raises(BadSeal):
            keys.open(epoch, number, header, chunk)


def test_epochs_that_somebody_makes_up_cost_no_memory_and_push_no_key_out() -> None:
    keys, chunk = receiver(), sealed()
    keys.open(3, 7, HEADER, chunk)
    ready = keys._ciphers[3]
    for epoch in range(100, 200):
        with pytest.raises(BadSeal):
            keys.open(epoch, 7, HEADER, chunk)
    assert keys._ciphers == {3: ready}
    for epoch in range(4, 30):  # starts that did happen: the latest used stay
        keys.open(epoch, 7, HEADER, sealed(epoch=epoch))
        keys.open(3, 7, HEADER, chunk)
    assert keys._ciphers[3] is ready and list(keys._ciphers) == [27, 28, 29, 3]


# --- nonces -----------------------------------------------------------------------------------------------------


def test_a_number_is_used_once_and_numbers_only_rise() -> None:
    keys = sender()
    keys.seal(5, HEADER, CONTENT)
    for number in (5, 4, 0, -1):
        with pytest.raises(InternalError, match=f"chunk {number} after chunk 5 of epoch 3"):
            keys.seal(number, HEADER, CONTENT)
    keys.seal(6, HEADER, CONTENT)
    keys.seal(2**64 - 1, HEADER, CONTENT)
    for number in (2**64 - 1, 2**64, 2**96):
        with pytest.raises(InternalError):
            keys.seal(number, HEADER, CONTENT)


def test_a_number_whose_sealing_failed_is_used_up() -> None:
    keys = sender()
    with pytest.raises(TypeError):
        keys.seal(1, 5, CONTENT)
    with pytest.raises(InternalError):
        keys.seal(1, HEADER, CONTENT)
    keys.seal(2, HEADER, CONTENT)


def test_numbers_of_directions_streams_and_epochs_are_counted_apart() -> None:
    """The same number of the same content never gives the same bytes, since the keys differ."""
    chunks = {
        bytes(SendKeys(SECRET, sender=a, receiver=b, epoch=epoch, stream=stream).seal(1, HEADER, CONTENT))
        for a, b in (("anna", "bert"), ("bert", "anna"))
        for epoch in (0, 1, 256)
        for stream in ("data", "control")
    }
    assert len(chunks) == 12


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sender": "bert"}, "different names"),
        ({"sender": ""}, "different names"),
        ({"receiver": ""}, "different names"),
        ({"stream": "other"}, "valid: data, control"),
        ({"epoch": -1}, "epoch"),
        ({"epoch": 2**64}, "epoch"),
    ],
)
def test_keys_that_cannot_be_are_our_own_bug(change: dict, says: str) -> None:
    given_ = {"sender": "anna", "receiver": "bert", "epoch": 1, "stream": "data"} | change
    with pytest.raises(InternalError, match=says):
        SendKeys(SECRET, **given_)
    if "epoch" not in change:
        del given_["epoch"]
        with pytest.raises(InternalError, match=says):
            ReceiveKeys(SECRET, **given_)


# --- buffers ----------------------------------------------------------------------------------------------------


def test_a_buffer_is_filled_in_place_and_the_rest_of_it_is_left_alone() -> None:
    room = bytearray(b"\xaa" * 400)
    chunk = sender().seal(7, HEADER, CONTENT, memoryview(room)[10:])
    assert isinstance(chunk, memoryview) and chunk.obj is room
    assert bytes(chunk) == sealed() == bytes(room[10 : 10 + len(chunk)])
    assert room[:10] == b"\xaa" * 10 and room[10 + len(chunk) :] == b"\xaa" * (400 - 10 - len(chunk))
    back = bytearray(b"\xbb" * 300)
    content = receiver().open(3, 7, HEADER, chunk, memoryview(back))
    assert isinstance(content, memoryview) and content.obj is back
    assert content == CONTENT and back[len(CONTENT) :] == b"\xbb" * (300 - len(CONTENT))


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 4096])
def test_every_size_goes_there_and_back_both_ways(size: int) -> None:
    content, out, back = CONTENT * 20, bytearray(size + TAG_BYTES), bytearray(size)
    content = content[:size]
    chunk = sender().seal(7, b"", content, out)
    assert bytes(chunk) == sender().seal(7, b"", content)
    assert bytes(receiver().open(3, 7, b"", chunk, memoryview(back))) == content == bytes(back)
    assert receiver().open(3, 7, b"", bytes(chunk)) == content


def test_tensors_are_sealed_and_opened_where_they_lie() -> None:
    tensor = np.arange(1000, dtype=np.float32).reshape(10, 100)
    back = np.full_like(tensor, -1)
    chunk = sender().seal(1, HEADER, memoryview(tensor), bytearray(tensor.nbytes + TAG_BYTES))
    receiver().open(3, 1, HEADER, chunk, memoryview(back))
    assert np.array_equal(tensor, back)
    assert bytes(receiver().open(3, 1, HEADER, chunk)) == tensor.tobytes()
    assert tensor[0].tobytes()[:64] not in bytes(chunk)
    # and on failure nothing of it stands there
    wrong = bytearray(chunk)
    wrong[-1] ^= 1
    with pytest.raises(BadSeal):
        receiver().open(3, 1, HEADER, wrong, memoryview(back))
    assert not back.any()


def test_buffers_that_cannot_be_used_are_refused_before_a_number_is_taken() -> None:
    keys = sender()
    wrong = {
        "needed": bytearray(len(CONTENT) + TAG_BYTES - 1),
        "read-only": memoryview(bytes(400)),
        "gaps": memoryview(bytearray(800))[::2],
    }
    for says, out in wrong.items():
        with pytest.raises(InternalError, match=says):
            keys.seal(7, HEADER, CONTENT, out)
    assert keys.seal(7, HEADER, CONTENT) == sealed()
    for says in ("read-only", "gaps"):
        with pytest.raises(InternalError, match=says):
            receiver().open(3, 7, HEADER, sealed(), memoryview(wrong[says]))


def test_a_chunk_longer_than_the_room_for_it_is_refused_as_what_a_peer_sent() -> None:
    out = bytearray(b"\xaa" * (len(CONTENT) - 1))
    with pytest.raises(BadSeal):
        receiver().open(3, 7, HEADER, sealed(), memoryview(out))
    assert not any(out)


def test_a_chunk_above_the_bound_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = sealed()
    monkeypatch.setattr("fate_llm.security.sealing.LARGEST", len(CONTENT) - 1)
    with pytest.raises(InternalError, match="at most"):
        sender().seal(7, HEADER, CONTENT)
    refused(receiver(), chunk)


def test_a_chunk_is_sealed_and_opened_without_a_copy() -> None:
    """Given 4 MiB and buffers for them, then neither side takes memory; without buffers it shows (the control)."""
    size = 4 << 20
    content, out, back = bytearray(size), bytearray(size + TAG_BYTES), bytearray(size)
    keys, other = sender(), receiver()

    def peak(number: int, *, in_place: bool) -> int:
        tracemalloc.start()
        try:
            if in_place:
                keys.seal(number, HEADER, content, out)
                other.open(3, number, HEADER, out, memoryview(back))
            else:
                other.open(3, number, HEADER, keys.seal(number, HEADER, content))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(1, in_place=True) < 64 * 1024
    assert peak(2, in_place=False) > 2 * size


def test_nothing_that_is_printed_shows_a_key() -> None:
    keys = sender()
    keys.seal(9, HEADER, CONTENT)
    assert repr(keys) == "SendKeys(anna -> bert (data), epoch 3, last 9)"
    assert repr(receiver(stream="control")) == "ReceiveKeys(anna -> bert (control))"


# --- together with the agreement --------------------------------------------------------------------------------


def test_two_parties_talk_and_go_on_after_one_of_them_started_again() -> None:
    # Given: agreed keys
    identities = {name: Identity.generate() for name in ("anna", "bert")}
    roster = {name: identity.public for name, identity in identities.items()}

    def start(me: str, epoch: int) -> Agreement:
        return Agreement(me=me, identity=identities[me], roster=roster, context=b"j", epoch=epoch)

    anna, bert = start("anna", 1), start("bert", 1)
    [reply] = anna.hear("bert", bert.hello("anna"))
    bert.hear("anna", reply)
    secret, theirs = anna.secret("bert"), bert.secret("anna")
    assert secret is not None and theirs is not None
    opened = ReceiveKeys(theirs, sender="anna", receiver="bert")
    old = SendKeys(secret, sender="anna", receiver="bert", epoch=1).seal(1, HEADER, b"before")
    assert opened.open(1, 1, HEADER, old) == b"before"
    # When: anna's process starts again from its sealed file, in its next epoch
    storage = identities["anna"].storage_key("agreement")
    file = seal_at_rest(storage, anna.to_bytes(), label=b"agreement of job j")
    state = open_at_rest(storage, file, label=b"agreement of job j")
    anna = Agreement.from_bytes(state, me="anna", identity=identities["anna"], roster=roster, context=b"j")
    secret = anna.secret("bert")
    assert secret is not None
    # Then: it counts from 1 again under a key of its own, and bert opens both
    new = SendKeys(secret, sender="anna", receiver="bert", epoch=2).seal(1, HEADER, b"before")
    assert bytes(new) != bytes(old)
    assert opened.open(2, 1, HEADER, new) == opened.open(1, 1, HEADER, old) == b"before"


# --- files ------------------------------------------------------------------------------------------------------
KEY, LABEL = bytes(range(32)), b"journal of job j"


@pytest.mark.parametrize("content", [b"", b"x", CONTENT])
def test_a_file_goes_there_and_back_and_is_never_the_same_twice(content: bytes) -> None:
    files = {seal_at_rest(KEY, content, label=LABEL) for _ in range(20)}
    assert len(files) == 20 and len({file[4:16] for file in files}) == 20, "a nonce came twice"
    for file in files:
        assert open_at_rest(KEY, file, label=LABEL) == content
        assert len(file) == 4 + 12 + len(content) + TAG_BYTES
        assert content not in file or len(content) < 2
    assert open_at_rest(KEY, memoryview(file), label=LABEL) == content


def test_a_file_is_the_cipher_with_its_label_as_associated_data() -> None:
    file = seal_at_rest(KEY, CONTENT, label=LABEL)
    assert AESGCM(KEY).decrypt(file[4:16], file[16:], b"FLS\x01" + LABEL) == CONTENT


def test_a_changed_cut_or_exchanged_file_is_refused() -> None:
    file = seal_at_rest(KEY, CONTENT, label=LABEL)
    wrong = [file[:length] for length in range(len(file))] + [file + b"\0", file * 2]
    for place in range(len(file)):
        changed = bytearray(file)
        changed[place] ^= 1 << place % 8
        wrong.append(bytes(changed))
    for content in wrong:
        with pytest.raises(BadSeal) as caught:
            open_at_rest(KEY, content, label=LABEL)
        assert "backup" in caught.value.hint
    for key, label in ((bytes(32), LABEL), (KEY, b""), (KEY, LABEL + b"2")):
        with pytest.raises(BadSeal):
            open_at_rest(key, file, label=label)


@pytest.mark.parametrize("length", [0, 16, 24, 31, 33])
def test_a_key_for_files_of_another_length_is_our_own_bug(length: int) -> None:
    """AES-128 and AES-192 would be taken by the library without a word."""
    with pytest.raises(InternalError, match=f"{length} bytes"):
        seal_at_rest(bytes(length), b"", label=LABEL)
    with pytest.raises(InternalError, match=f"{length} bytes"):
        open_at_rest(bytes(length), b"", label=LABEL)
