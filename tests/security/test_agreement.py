"""The agreement of keys: against an independent derivation, in any order of messages, and against liars."""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Callable, Mapping

import pytest
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fate_llm.core.errors import (
    BadSignature,
    ConfigurationError,
    InternalError,
    MissingExtra,
    PeerRestarted,
    PeerViolation,
)
from fate_llm.security import agreement as module
from fate_llm.security.agreement import MAX_MESSAGE, Agreement, PairSecret
from fate_llm.security.identity import Identity, PublicIdentity

NAMES = ("anna", "bert", "cleo")
IDENTITIES = {name: Identity.from_bytes(bytes([number]) * 32) for number, name in enumerate((*NAMES, "eve"), 1)}
ROSTER = {name: IDENTITIES[name].public for name in NAMES}
CONTEXT = b'{"attempt":1,"job":"j"}'
HEAD = b"FLNK\x01"


def party(
    me: str, *, epoch: int = 1, context: bytes = CONTEXT, roster: Mapping[str, PublicIdentity] = ROSTER
) -> Agreement:
    return Agreement(me=me, identity=IDENTITIES[me], roster=roster, context=context, epoch=epoch)


def again(old: Agreement, me: str) -> Agreement:
    return Agreement.from_bytes(old.to_bytes(), me=me, identity=IDENTITIES[me], roster=ROSTER, context=CONTEXT)


def agree(first: Agreement, second: Agreement) -> tuple[PairSecret, PairSecret]:
    """anna and bert, undisturbed."""
    [reply] = first.hear("bert", second.hello("anna"))
    assert second.hear("anna", reply) == []
    mine, theirs = first.secret("bert"), second.secret("anna")
    assert mine is not None and theirs is not None
    return mine, theirs


# --- an independent writer of messages: what a liar with a true identity can send ----------------------------------
def lengths(*parts: bytes) -> bytes:
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def start(kind: int, sender: str, receiver: str) -> bytes:
    return HEAD + bytes([kind, len(sender)]) + sender.encode() + bytes([len(receiver)]) + receiver.encode()


def signed(
    body: bytes, kind: int, sender: str, receiver: str, *, context: bytes = CONTEXT, signer: str | None = None
) -> bytes:
    purpose = {1: b"link hello", 2: b"link reply"}[kind]
    content = lengths(context, ROSTER[sender].raw, ROSTER[receiver].raw, body)
    key = Ed25519PrivateKey.from_private_bytes(IDENTITIES[signer or sender].to_bytes())
    return body + key.sign(b"fate_llm/1 " + purpose + b"\0" + content)


def make_hello(
    sender: str,
    receiver: str,
    *,
    epoch: int = 1,
    x25519: bytes | None = None,
    kem: bytes | None = None,
    context: bytes = CONTEXT,
    signer: str | None = None,
) -> bytes:
    x25519 = x25519 if x25519 is not None else X25519PrivateKey.generate().public_key().public_bytes_raw()
    kem = kem if kem is not None else MLKEM768PrivateKey.generate().public_key().public_bytes_raw()
    body = start(1, sender, receiver) + epoch.to_bytes(8, "big") + x25519 + kem
    return signed(body, 1, sender, receiver, context=context, signer=signer)


def make_reply(
    first: str, second: str, hello: bytes, answers: bytes, *, ciphertext: bytes = bytes(1088), signer: str | None = None
) -> bytes:
    body = start(2, first, second) + hello + hashlib.sha256(answers[:-64]).digest() + ciphertext
    return signed(body, 2, first, second, signer=signer)


def refused(
    machine: Agreement, sender: str, message: bytes, error: type[PeerViolation] = PeerViolation, says: str | None = None
) -> PeerViolation:
    """`message` is refused with exactly `error`, and nothing has changed."""
    before = machine.to_bytes()
    with pytest.raises(PeerViolation, match=says) as caught:
        machine.hear(sender, message)
    assert type(caught.value) is error, caught.value
    assert machine.to_bytes() == before
    assert caught.value.message and caught.value.hint
    return caught.value


# --- X25519 and HKDF apart from any library ------------------------------------------------------------------------
def ladder(scalar: bytes, point: bytes) -> bytes:
    """RFC 7748, section 5."""
    p, k = 2**255 - 19, int.from_bytes(scalar, "little")
    k = (k & ~7 & ~(1 << 255)) | 1 << 254
    x1 = int.from_bytes(point, "little") % 2**255
    x2, z2, x3, z3, swap = 1, 0, x1, 1, 0
    for bit in range(254, -1, -1):
        if swap != (swap := k >> bit & 1):
            x2, x3, z2, z3 = x3, x2, z3, z2
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        aa, bb = a * a, b * b
        x3, z3 = (d * a + c * b) ** 2 % p, x1 * (d * a - c * b) ** 2 % p
        x2, z2 = aa * bb % p, (aa - bb) * (aa + 121665 * (aa - bb)) % p
    if swap:
        x2, z2 = x3, z3
    return (x2 * pow(z2, p - 2, p) % p).to_bytes(32, "little")


def hkdf(ikm: bytes, salt: bytes, info: bytes) -> bytes:
    return hmac.digest(hmac.digest(salt, ikm, "sha256"), info + b"\x01", "sha256")


def stored(state: bytes) -> list[bytes]:
    parts = []
    while state:
        (length,) = struct.unpack_from(">I", state)
        parts.append(state[4 : 4 + length])
        state = state[4 + length :]
    return parts


# --- what is agreed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scalar", "point", "result"),
    [
        (
            "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
            "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
            "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552",
        ),
        (
            "4b66e9d4d1b4673c5ad22691957d6af5c11b6421e0ea01d42ca4169e7918ba0d",
            "e5210f12786811d3f4b7959d0538ae2c31dbe7106fc03c3efc4cd549c715a493",
            "95cbde9476e8907d7aade45cb4b873f88b595a68799fa152e6f8f7647aac7957",
        ),
    ],
)
def test_x25519_is_that_of_rfc_7748(scalar: str, point: str, result: str) -> None:
    """RFC 7748, 5.2, for the primitive used and for the check above."""
    secret, public = bytes.fromhex(scalar), bytes.fromhex(point)
    assert ladder(secret, public).hex() == result
    key = X25519PrivateKey.from_private_bytes(secret)
    assert key.exchange(X25519PublicKey.from_public_bytes(public)).hex() == result


def test_one_whole_transcript_against_an_independent_derivation() -> None:
    # Given: the ephemeral secrets out of what the parties store, before anything was heard
    anna, bert = party("anna", epoch=3), party("bert", epoch=2**40)
    secrets = {
        "anna": dict(zip(("peer", "mine", "secrets"), stored(anna.to_bytes())[3:6], strict=True)),
        "bert": dict(zip(("peer", "mine", "secrets"), stored(bert.to_bytes())[3:6], strict=True)),
    }
    assert [secrets[name]["peer"] for name in ("anna", "bert")] == [b"bert", b"anna"]
    # When
    hello_a, hello_b = anna.hello("bert"), bert.hello("anna")
    [reply] = anna.hear("bert", hello_b)
    bert.hear("anna", reply)
    # Then: the layout of the messages is the one written down
    head = len(start(1, "anna", "bert"))
    for hello, name, other, epoch in ((hello_a, "anna", "bert", 3), (hello_b, "bert", "anna", 2**40)):
        assert len(hello) == head + 8 + 32 + 1184 + 64
        x25519, seed = secrets[name]["secrets"][:32], secrets[name]["secrets"][32:]
        kem = MLKEM768PrivateKey.from_seed_bytes(seed).public_key().public_bytes_raw()
        body = start(1, name, other) + epoch.to_bytes(8, "big") + ladder(x25519, b"\x09" + bytes(31)) + kem
        assert hello == signed(body, 1, name, other)
    ciphertext = reply[-64 - 1088 : -64]
    assert reply == make_reply("anna", "bert", hello_a, hello_b, ciphertext=ciphertext)
    # ... and so is the key
    shared = ladder(secrets["bert"]["secrets"][:32], hello_a[head + 8 : head + 40])
    assert shared == ladder(secrets["anna"]["secrets"][:32], hello_b[head + 8 : head + 40])
    kem_secret = MLKEM768PrivateKey.from_seed_bytes(secrets["bert"]["secrets"][32:]).decapsulate(ciphertext)
    transcript = hashlib.sha256(
        lengths(
            b"fate_llm/1 link transcript",
            CONTEXT,
            ROSTER["anna"].raw,
            ROSTER["bert"].raw,
            hello_a[:-64],
            hello_b[:-64],
            ciphertext,
        )
    ).digest()
    key = hkdf(shared + kem_secret, transcript, b"fate_llm/1 pair key")
    assert anna.secret("bert") == PairSecret(key, transcript[:8], 2**40)
    assert bert.secret("anna") == PairSecret(key, transcript[:8], 3)


def test_every_pair_attempt_and_start_has_keys_of_its_own() -> None:
    keys = set()
    for context in (CONTEXT, CONTEXT, b"other"):
        machines = {name: party(name, context=context) for name in NAMES}
        for first, second in (("anna", "bert"), ("anna", "cleo"), ("bert", "cleo")):
            [reply] = machines[first].hear(second, machines[second].hello(first))
            machines[second].hear(first, reply)
            mine, theirs = machines[first].secret(second), machines[second].secret(first)
            assert mine is not None and theirs is not None and mine.key == theirs.key and len(mine.key) == 32
            keys |= {mine.key, mine.session}
    assert len(keys) == 18


def test_nothing_is_agreed_before_the_messages_are_there() -> None:
    anna, bert = party("anna"), party("bert")
    assert anna.secret("bert") is None
    assert bert.hear("anna", anna.hello("bert")) == [bert.hello("anna")]
    assert bert.secret("anna") is None
    [reply] = anna.hear("bert", bert.hello("anna"))
    assert anna.secret("bert") is not None and bert.secret("anna") is None
    bert.hear("anna", reply)
    assert bert.secret("anna") is not None
    assert anna.secret("cleo") is None


@st.composite
def schedules(draw: st.DrawFn) -> tuple[int, list[tuple[str, int]]]:
    parties = draw(st.sampled_from([2, 3]))
    acts = st.sampled_from(["deliver", "deliver", "deliver", "repeat", "drop", "hello", "restart", "lose"])
    return parties, draw(st.lists(st.tuples(acts, st.integers(0, 99)), max_size=40))


class Net:
    """Messages on their way between some parties; every step chooses freely among them."""

    def __init__(self, names: tuple[str, ...]) -> None:
        roster = {name: ROSTER[name] for name in names}
        self.roster = roster
        self.epochs = dict.fromkeys(names, 1)
        self.machines = {name: party(name, roster=roster) for name in names}
        self.flying: list[tuple[str, str, bytes]] = []
        for name in names:
            self.hellos(name)

    def hellos(self, name: str) -> None:
        self.flying += [(name, peer, self.machines[name].hello(peer)) for peer in self.roster if peer != name]

    def deliver(self, index: int, *, keep: bool = False) -> None:
        sender, receiver, message = self.flying[index] if keep else self.flying.pop(index)
        machine, before = self.machines[receiver], self.machines[receiver].to_bytes()
        try:
            answers = machine.hear(sender, message)
        except PeerViolation as error:
            # Only what was sent before a start without the secrets is refused, and as nothing worse than old.
            if max(self.epochs.values()) == 1 or isinstance(error, PeerRestarted | BadSignature):
                raise
            assert machine.to_bytes() == before
            return
        self.flying += [(receiver, sender, answer) for answer in answers]

    def lose(self, name: str) -> None:
        """The process starts without its secrets, while none of its pairs was agreed on either side, nor is a
        hello of before on its way to a first party, which would agree on it (tested apart)."""
        others = [other for other in self.roster if other != name]
        used = [self.machines[other].secret(name) or self.machines[name].secret(other) for other in others]
        coming = any(sender == name and receiver < name for sender, receiver, _ in self.flying)
        if not any(used) and not coming:
            self.epochs[name] += 1
            self.machines[name] = party(name, epoch=self.epochs[name], roster=self.roster)
            self.hellos(name)

    def step(self, act: str, number: int) -> None:
        names = sorted(self.roster)
        name = names[number % len(names)]
        if act == "hello":
            self.hellos(name)
        elif act == "lose":
            self.lose(name)
        elif act == "restart":
            state = self.machines[name].to_bytes()
            self.machines[name] = Agreement.from_bytes(
                state, me=name, identity=IDENTITIES[name], roster=self.roster, context=CONTEXT
            )
        elif self.flying:
            index = number % len(self.flying)
            if act == "drop":
                self.flying.pop(index)
            else:
                self.deliver(index, keep=act == "repeat")


@settings(deadline=None, max_examples=60)
@given(schedules())
def test_any_order_of_losses_repeats_and_restarts_ends_in_equal_keys(
    schedule: tuple[int, list[tuple[str, int]]],
) -> None:
    # Given
    count, steps = schedule
    net = Net(NAMES[:count])
    # When: anything happens, and a secret once agreed never changes
    agreed: dict[tuple[str, str], PairSecret] = {}
    for act, number in steps:
        net.step(act, number)
        for name, machine in net.machines.items():
            for peer in net.roster.keys() - {name}:
                secret = machine.secret(peer)
                assert agreed.get((name, peer), secret) == secret
                if secret is not None:
                    agreed[name, peer] = secret
    # Then: one more hello of everybody settles it, in a bounded number of messages
    for name in net.machines:
        net.hellos(name)
    delivered = 0
    while net.flying:
        net.deliver(0)
        delivered += 1
        assert delivered < 60 * (len(steps) + 6), "messages call for messages without end"
    keys = set()
    for name, machine in net.machines.items():
        for peer in net.roster.keys() - {name}:
            mine, theirs = machine.secret(peer), net.machines[peer].secret(name)
            assert mine is not None and theirs is not None
            assert (mine.key, mine.session) == (theirs.key, theirs.session)
            assert mine.peer_epoch == net.epochs[peer]
            keys.add(mine.key)
    assert len(keys) == count * (count - 1) // 2


def test_repeated_messages_are_harmless_and_answered_with_the_same_bytes() -> None:
    anna, bert = party("anna"), party("bert")
    [reply] = anna.hear("bert", bert.hello("anna"))
    bert.hear("anna", reply)
    states = anna.to_bytes(), bert.to_bytes()
    for _ in range(3):
        assert anna.hear("bert", bert.hello("anna")) == [reply], "the second may not have it"
        assert bert.hear("anna", reply) == []
        assert bert.hear("anna", anna.hello("bert")) == []
    assert (anna.to_bytes(), bert.to_bytes()) == states
    assert anna.hello("bert") == anna.hello("bert")


# --- messages that somebody on the way changed ----------------------------------------------------------------------


def case(kind: str) -> tuple[Agreement, str, bytes]:
    """A fresh receiver, the sender, and a good message of that kind."""
    anna, bert = party("anna"), party("bert")
    if kind == "hello to the first":
        return anna, "bert", bert.hello("anna")
    if kind == "hello to the second":
        return bert, "anna", anna.hello("bert")
    return bert, "anna", anna.hear("bert", bert.hello("anna"))[0]


KINDS = ["hello to the first", "hello to the second", "reply"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_bit_anywhere_is_refused(kind: str) -> None:
    machine, sender, message = case(kind)
    before = machine.to_bytes()
    for place in range(len(message)):
        changed = bytearray(message)
        changed[place] ^= 1 << (place * 5 + 3) % 8
        with pytest.raises(PeerViolation):
            machine.hear(sender, bytes(changed))
    assert machine.to_bytes() == before
    machine.hear(sender, message)
    assert machine.to_bytes() != before, "the message itself was good"


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_cut_or_lengthened_anywhere_is_refused(kind: str) -> None:
    machine, sender, message = case(kind)
    before = machine.to_bytes()
    for length in range(len(message)):
        with pytest.raises(PeerViolation) as caught:
            machine.hear(sender, message[:length])
        assert not isinstance(caught.value, BadSignature), "the length is looked at before the signature"
    for more in (b"\0", bytes(64), message):
        with pytest.raises(PeerViolation):
            machine.hear(sender, message + more)
    assert machine.to_bytes() == before


def test_a_message_above_the_bound_is_refused_before_it_is_read() -> None:
    anna, bert = party("anna"), party("bert")
    refused(anna, "bert", (bert.hello("anna") * 4)[: MAX_MESSAGE + 1], says=f"at most {MAX_MESSAGE}")
    refused(anna, "bert", (bert.hello("anna") * 4)[:MAX_MESSAGE], says="it has 1304")


def test_the_longest_names_fit_into_the_bound() -> None:
    long = {"a" * 64: IDENTITIES["anna"], "b" * 64: IDENTITIES["bert"]}
    roster = {name: identity.public for name, identity in long.items()}
    first, second = (
        Agreement(me=name, identity=identity, roster=roster, context=CONTEXT, epoch=2**64 - 1)
        for name, identity in long.items()
    )
    [reply] = first.hear("b" * 64, second.hello("a" * 64))
    assert len(reply) == 2744 <= MAX_MESSAGE
    second.hear("a" * 64, reply)
    assert second.secret("a" * 64) is not None


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200), st.booleans())
def test_noise_is_refused(noise: bytes, headed: bool) -> None:
    refused(party("anna"), "bert", HEAD + noise if headed else noise)


# --- messages that belong elsewhere ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_of_another_context_is_refused(kind: str) -> None:
    _, sender, message = case(kind)
    me = "anna" if sender == "bert" else "bert"
    refused(party(me, context=CONTEXT + b" "), sender, message, BadSignature)


def test_a_message_under_another_roster_is_refused_even_with_the_same_context() -> None:
    roster = ROSTER | {"anna": IDENTITIES["eve"].public}
    bert = Agreement(me="bert", identity=IDENTITIES["bert"], roster=roster, context=CONTEXT, epoch=1)
    refused(bert, "anna", party("anna").hello("bert"), BadSignature)
    refused(party("anna"), "bert", bert.hello("anna"), BadSignature)  # meant for another anna: identities are signed


def test_a_message_to_another_receiver_or_of_another_sender_is_refused() -> None:
    anna, bert, cleo = (party(name) for name in NAMES)
    refused(anna, "bert", bert.hello("cleo"), says="receiver")
    refused(anna, "cleo", bert.hello("anna"), says="sender")
    refused(cleo, "bert", bert.hello("anna"), says="receiver")
    [reply] = anna.hear("bert", bert.hello("anna"))
    refused(cleo, "anna", reply, says="receiver")
    refused(cleo, "bert", reply, says="sender")


@pytest.mark.parametrize("sender", ["eve", "anna", "", "x" * 1000])
def test_a_sender_who_is_no_peer_is_refused(sender: str) -> None:
    error = refused(party("anna"), sender, party("bert").hello("anna"), says="no peer")
    assert len(error.message) < 200


def test_own_messages_sent_back_are_refused() -> None:
    anna, bert = party("anna"), party("bert")
    refused(anna, "bert", anna.hello("bert"), says="sender")
    refused(anna, "anna", anna.hello("bert"), says="no peer")
    [reply] = anna.hear("bert", bert.hello("anna"))
    refused(anna, "bert", reply, says="sender")


@pytest.mark.parametrize("part", ["x25519", "kem"])
@pytest.mark.parametrize(("me", "sender"), [("anna", "bert"), ("bert", "anna")])
def test_own_keys_offered_by_the_peer_are_refused(me: str, sender: str, part: str) -> None:
    machine = party(me)
    body = machine.hello(sender)[:-64]
    own = {"x25519": body[-1184 - 32 : -1184], "kem": body[-1184:]}
    refused(machine, sender, make_hello(sender, me, **{part: own[part]}), says="reflected")


def test_keys_put_in_place_of_anothers_are_refused() -> None:
    """Given eve at the broker, or cleo with a true identity, when they speak as bert, then nobody listens."""
    refused(party("anna"), "bert", make_hello("bert", "anna", signer="anna"), BadSignature)
    for liar in ("eve", "cleo", "bert"):
        if liar != "bert":
            refused(party("anna"), "bert", make_hello("bert", "anna", signer=liar), BadSignature)
        bert, anna = party("bert"), party("anna")
        forged = make_reply("anna", "bert", anna.hello("bert"), bert.hello("anna"), signer=liar)
        refused(bert, "anna", forged, BadSignature)
        inner = make_hello("anna", "bert", signer=liar)
        refused(bert, "anna", make_reply("anna", "bert", inner, bert.hello("anna")), BadSignature)


def test_a_signature_of_a_hello_is_none_of_a_reply() -> None:
    anna, bert = party("anna"), party("bert")
    body = start(2, "anna", "bert") + anna.hello("bert") + hashlib.sha256(bert.hello("anna")[:-64]).digest()
    refused(bert, "anna", signed(body + bytes(1088), 1, "anna", "bert"), BadSignature)


def test_a_reply_of_the_wrong_side_or_without_a_hello_inside_is_refused() -> None:
    anna, bert = party("anna"), party("bert")
    wrong_side = make_reply("bert", "anna", bert.hello("anna"), anna.hello("bert"))
    refused(anna, "bert", wrong_side, says="has to wait")
    inner = bytearray(anna.hello("bert"))
    for place, says in ((5, "without its hello"), (7, "names another"), (0, "no key message")):
        changed = inner.copy()
        changed[place] ^= 3
        reply = make_reply("anna", "bert", bytes(changed), bert.hello("anna"))
        refused(bert, "anna", reply, says=says)
    refused(bert, "anna", bert.hello("anna")[:5] + b"\x03" + bert.hello("anna")[6:], says="another kind")


def test_a_reply_of_another_length_is_refused_even_when_its_sender_signed_it() -> None:
    anna, bert = party("anna"), party("bert")
    for ciphertext in (bytes(1087), bytes(1089), b""):
        reply = make_reply("anna", "bert", anna.hello("bert"), bert.hello("anna"), ciphertext=ciphertext)
        refused(bert, "anna", reply, says="a key reply of")


# --- keys with which nothing can be agreed --------------------------------------------------------------------------
LOW_ORDER = [
    *(number.to_bytes(32, "little") for number in (0, 1, 2**255 - 20, 2**255 - 19, 2**255 - 18)),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
]


@pytest.mark.parametrize("point", [point[:31] + bytes([point[31] | top]) for point in LOW_ORDER for top in (0, 128)])
def test_points_of_low_order_are_refused(point: bytes) -> None:
    assert ladder(bytes(range(32)), point) == bytes(32), "the list is what it says"
    for me, sender in (("anna", "bert"), ("bert", "anna")):
        refused(party(me), sender, make_hello(sender, me, x25519=point), says="low order")
    bert = party("bert")
    inner = make_hello("anna", "bert", x25519=point)
    refused(bert, "anna", make_reply("anna", "bert", inner, bert.hello("anna")), says="low order")


@pytest.mark.parametrize(("me", "sender"), [("anna", "bert"), ("bert", "anna")])
def test_an_encapsulation_key_that_is_none_is_refused(me: str, sender: str) -> None:
    """FIPS 203, 7.2: coefficients of 12 bits have to be below 3329."""
    refused(party(me), sender, make_hello(sender, me, kem=b"\xff" * 1184), says="ML-KEM-768 key")


def test_a_ciphertext_for_another_key_gives_different_keys_and_no_error() -> None:
    """ML-KEM rejects implicitly: the liar shuts itself out, and the first sealed frame shows it."""
    anna, bert = party("anna"), party("bert")
    bert.hear("anna", make_reply("anna", "bert", anna.hello("bert"), bert.hello("anna"), ciphertext=bytes(1088)))
    [_] = anna.hear("bert", bert.hello("anna"))
    mine, theirs = anna.secret("bert"), bert.secret("anna")
    assert mine is not None and theirs is not None and mine.key != theirs.key


def test_who_presents_anothers_ephemeral_keys_gets_other_keys() -> None:
    """Given cleo signs bert's ephemeral keys as its own, then anna's keys with both still differ."""
    anna, bert = party("anna"), party("bert")
    body = bert.hello("anna")[:-64]
    stolen = make_hello("cleo", "anna", x25519=body[-1184 - 32 : -1184], kem=body[-1184:])
    anna.hear("cleo", stolen)
    mine, _ = agree(anna, bert)
    other = anna.secret("cleo")
    assert other is not None and other.key != mine.key and other.session != mine.session


# --- epochs and restarts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("me", "sender"), [("anna", "bert"), ("bert", "anna")])
def test_two_hellos_of_one_epoch_and_older_epochs_are_refused(me: str, sender: str) -> None:
    machine = party(me)
    machine.hear(sender, make_hello(sender, me, epoch=5))
    refused(machine, sender, make_hello(sender, me, epoch=5), says="two different hellos")
    refused(machine, sender, make_hello(sender, me, epoch=4), says="epoch 4, after one from epoch 5")


def test_a_higher_epoch_replaces_the_hello_as_long_as_nothing_is_agreed() -> None:
    # Given: bert has heard anna's first start only
    anna, bert = party("anna", epoch=1), party("bert")
    bert.hear("anna", anna.hello("bert"))
    [old] = anna.hear("bert", bert.hello("anna"))
    # When: anna lost its keys and starts again
    anna = party("anna", epoch=2)
    assert bert.hear("anna", anna.hello("bert")) == [bert.hello("anna")], "so that anna can go on"
    # Then: the reply of before comes too late, and the new one counts
    refused(bert, "anna", old, says="epoch 1, after one from epoch 2")
    mine, theirs = agree(anna, bert)
    assert mine.key == theirs.key and theirs.peer_epoch == 2


def test_a_reply_brings_a_higher_epoch_with_it() -> None:
    bert = party("bert")
    bert.hear("anna", party("anna", epoch=1).hello("bert"))
    mine, theirs = agree(party("anna", epoch=2), bert)
    assert mine.key == theirs.key and theirs.peer_epoch == 2


def test_a_peer_that_lost_the_secret_is_named_and_the_secret_stays() -> None:
    anna, bert = party("anna"), party("bert")
    agreed = agree(anna, bert)
    error = refused(anna, "bert", party("bert", epoch=2).hello("anna"), PeerRestarted, says="bert started again")
    assert error.code == "peer_restarted" and "new attempt" in error.hint
    refused(bert, "anna", party("anna", epoch=2).hello("bert"), PeerRestarted, says="anna started again")
    [reply] = party("anna", epoch=3).hear("bert", bert.hello("anna"))
    refused(bert, "anna", reply, PeerRestarted, says="epoch 3 after 1")
    assert (anna.secret("bert"), bert.secret("anna")) == agreed
    refused(anna, "bert", make_hello("bert", "anna", epoch=9, signer="eve"), BadSignature)


def test_an_old_hello_heard_late_is_agreed_on_and_the_new_one_then_named() -> None:
    """What lay at the broker while its sender started again without its keys cannot be told from a fresh hello."""
    anna, old, new = party("anna"), party("bert", epoch=1), party("bert", epoch=2)
    [reply] = anna.hear("bert", old.hello("anna"))
    refused(anna, "bert", new.hello("anna"), PeerRestarted)
    refused(new, "anna", reply, says="another hello")
    assert new.secret("anna") is None


def test_a_reply_to_a_hello_of_before_is_refused() -> None:
    old = party("bert", epoch=1)
    anna = party("anna")
    [reply] = anna.hear("bert", old.hello("anna"))
    error = refused(party("bert", epoch=2), "anna", reply, says="another hello")
    assert "job folder" in error.hint


def test_two_replies_to_one_hello_are_refused() -> None:
    anna, bert = party("anna"), party("bert")
    agree(anna, bert)
    other = make_reply("anna", "bert", anna.hello("bert"), bert.hello("anna"), ciphertext=b"\x01" * 1088)
    refused(bert, "anna", other, says="twice")


def test_a_process_started_again_with_its_state_goes_on_in_the_same_epoch() -> None:
    # Given: before anything, half way, and agreed
    anna, bert = party("anna", epoch=7), party("bert", epoch=8)
    hellos = anna.hello("bert"), bert.hello("anna")
    anna, bert = again(anna, "anna"), again(bert, "bert")
    assert (anna.hello("bert"), bert.hello("anna")) == hellos
    assert (anna.epoch, bert.epoch) == (7, 8)
    [reply] = anna.hear("bert", hellos[1])
    anna = again(anna, "anna")
    assert anna.hear("bert", hellos[1]) == [reply]
    bert = again(bert, "bert")
    bert.hear("anna", reply)
    bert = again(bert, "bert")
    # Then
    mine, theirs = anna.secret("bert"), bert.secret("anna")
    assert mine is not None and theirs is not None and mine.key == theirs.key
    assert (mine.peer_epoch, theirs.peer_epoch) == (8, 7)
    assert bert.hear("anna", reply) == [] and bert.to_bytes() == again(bert, "bert").to_bytes()


def test_the_ephemeral_secrets_are_gone_once_the_pair_has_its_key() -> None:
    anna, bert = party("anna"), party("bert")
    secrets = [stored(machine.to_bytes())[5] for machine in (anna, bert)]
    assert [len(secret) for secret in secrets] == [96, 96]
    agree(anna, bert)
    for machine in (anna, bert):
        state = machine.to_bytes()
        for secret in secrets:
            assert secret[:32] not in state and secret[32:] not in state


Change = Callable[[bytes], bytes]


@pytest.mark.parametrize(
    "change",
    [
        lambda s: b"",
        lambda s: s + b"\0",
        lambda s: s + bytes(4),
        lambda s: s[:4] + b"FLAG\x02" + s[9:],
        lambda s: s * 2,
    ],
)
def test_a_state_that_is_none_is_refused(change: Change) -> None:
    state = party("anna").to_bytes()
    with pytest.raises(ConfigurationError):
        Agreement.from_bytes(change(state), me="anna", identity=IDENTITIES["anna"], roster=ROSTER, context=CONTEXT)


def test_a_state_cut_anywhere_is_refused() -> None:
    anna, bert = party("anna"), party("bert")
    agree(anna, bert)
    state = anna.to_bytes()
    ends, at = {0}, 0
    for part in stored(state):
        at += 4 + len(part)
        ends |= {at - len(part), at, at - 1}
    for length in sorted(ends | set(range(0, len(state), 211))):
        if length < len(state):
            with pytest.raises(ConfigurationError):
                Agreement.from_bytes(
                    state[:length], me="anna", identity=IDENTITIES["anna"], roster=ROSTER, context=CONTEXT
                )


def test_a_state_of_another_job_roster_or_party_is_refused() -> None:
    state = party("anna").to_bytes()
    fewer = {name: ROSTER[name] for name in ("anna", "bert")}
    renewed = ROSTER | {"cleo": IDENTITIES["eve"].public}
    renamed = {"anna": ROSTER["anna"], "bert": ROSTER["bert"], "dora": ROSTER["cleo"]}
    for me, roster, context in [
        ("anna", ROSTER, b"other"),
        ("anna", fewer, CONTEXT),
        ("anna", renewed, CONTEXT),
        ("anna", renamed, CONTEXT),
        ("bert", ROSTER, CONTEXT),
    ]:
        with pytest.raises(ConfigurationError, match="another job"):
            Agreement.from_bytes(state, me=me, identity=IDENTITIES[me], roster=roster, context=context)


# --- mistakes of the caller and the operator ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("roster", "says"),
    [
        ({"anna": ROSTER["anna"]}, "somebody else"),
        ({"bert": ROSTER["bert"], "cleo": ROSTER["cleo"]}, "needs 'anna'"),
        (ROSTER | {"anna": IDENTITIES["eve"].public}, "whose identity here is"),
        (ROSTER | {"cleo": ROSTER["bert"]}, "bert and cleo have the same key"),
        (ROSTER | {"Big": IDENTITIES["eve"].public}, "'Big'"),
    ],
)
def test_a_roster_that_cannot_be_is_refused(roster: dict[str, PublicIdentity], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says) as caught:
        party("anna", roster=roster)
    assert caught.value.hint


def test_what_only_our_own_bug_can_ask_for() -> None:
    for epoch in (-1, 2**64):
        with pytest.raises(InternalError, match="epoch"):
            party("anna", epoch=epoch)
    for name in ("anna", "eve", ""):
        with pytest.raises(InternalError):
            party("anna").hello(name)
        with pytest.raises(InternalError):
            party("anna").secret(name)


def test_a_library_without_ml_kem_is_an_error_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        @staticmethod
        def from_seed_bytes(data: bytes) -> None:
            raise UnsupportedAlgorithm("ML-KEM-768 is not supported by this backend.")

    monkeypatch.setattr(module, "MLKEM768PrivateKey", Old)
    with pytest.raises(MissingExtra, match="ML-KEM-768"):
        party("anna")


def test_nothing_that_is_printed_shows_a_secret() -> None:
    anna, bert = party("anna"), party("bert")
    mine, _ = agree(anna, bert)
    shown = f"{anna!r} {mine!r} {mine} {[mine]}"
    assert mine.session.hex() in shown and "1 of 2 agreed" in shown
    assert mine.key.hex() not in shown and repr(mine.key) not in shown
