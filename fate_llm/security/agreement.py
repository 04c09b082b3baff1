"""How two parties come to a secret that the broker between them does not have.

For each pair both parties send one *hello*: names, epoch, an ephemeral X25519 key and an ephemeral ML-KEM-768 key,
signed. The party whose name sorts first (the *first*) answers the other's hello with a *reply*: its own hello
again, the digest of the hello it answers, and the ciphertext of a secret encapsulated to the other's ML-KEM key,
signed. Then both have

    transcript = SHA-256(label, context, both identities, both hellos, ciphertext), each part after its length
    key        = HKDF-SHA256(ikm = x25519 secret || ML-KEM secret, salt = transcript, info = label)

Known relatives: signed ephemeral Diffie-Hellman where each signature covers the names and identities of both (as in
SIGMA and ISO/IEC 9798-3 key agreement), with the hybrid of X25519 (RFC 7748) and ML-KEM-768 (FIPS 203) as in X-Wing
and in TLS's X25519MLKEM768. It is none of them byte for byte: here the whole transcript enters the derivation.

Proved to whoever has a secret: who the peer is, as far as Ed25519 holds; that it meant this receiver, this context
(job, attempt, roster) and its own hello. The second party knows too that the first made its reply for the hello of
now. *Not* proved by these messages: to the first, that the second is there now and has the same key (an old hello
of it would do): the first sealed frame that opens shows both, so nothing is believed before. Traffic recorded
today stays closed if either X25519 or ML-KEM-768 holds (confidentiality is post-quantum); signatures are classical:
who can break Ed25519 *while the parties agree* can stand between them. Ephemeral secrets are dropped as soon as the
pair has its key; Python does not promise that the memory is overwritten.

Rules:
 1. A message that is refused changes nothing. Sizes are checked before anything is parsed, signatures before
    anything is used.
 2. Messages may be lost, repeated and reordered. Whoever lacks something sends its hello again and is answered.
 3. Epochs of a peer only rise. One epoch has one hello. A higher epoch replaces the hello as long as there is no
    secret; afterwards the peer has lost it, and that is an error (`PeerRestarted`), never a silent new agreement.
    The first party agrees on whatever hello it hears first: one that lay at the broker while its sender started
    again without its keys ends in the same error, and the next attempt of the job, another context, is free of it.
 4. The caller stores `to_bytes` *before* it sends what `hello` or `hear` returned and before it acknowledges what
    was heard: an encapsulation is drawn once and must not be drawn again after a crash.

A pure machine: no clock, no I/O, one thread at a time. Keys come from the operating system; only the randomness
inside ML-KEM's encapsulation comes from the cryptographic library, which offers no way to pass it in.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fate_llm.core.errors import ConfigurationError, InternalError, MissingExtra, PeerRestarted, PeerViolation
from fate_llm.core.names import is_name, nearest

from .identity import SIGNATURE_BYTES, Identity, PublicIdentity
from .randomness import random_bytes

__all__ = ["MAX_MESSAGE", "Agreement", "PairSecret"]

MAX_MESSAGE: Final = 4096  # bytes; the longest valid one has 2744
_MAGIC: Final = b"FLNK\x01"  # the last byte is the version of messages
_STATE: Final = b"FLAG\x01"
_HELLO: Final = 1
_REPLY: Final = 2
_PURPOSES: Final = {_HELLO: "link hello", _REPLY: "link reply"}
_LABEL_TRANSCRIPT: Final = b"fate_llm/1 link transcript"
_LABEL_KEY: Final = b"fate_llm/1 pair key"
_LABEL_STATE: Final = b"fate_llm/1 agreement state"
_EPOCHS: Final = 1 << 64
_X25519: Final = 32
_KEM_KEY: Final = 1184
_KEM_SEED: Final = 64
_CIPHERTEXT: Final = 1088
_DIGEST: Final = 32
_SESSION: Final = 8
_HELLO_REST: Final = 8 + _X25519 + _KEM_KEY + SIGNATURE_BYTES  # after the names
_REPLY_REST: Final = _DIGEST + _CIPHERTEXT + SIGNATURE_BYTES  # after the names and the hello inside


@dataclass(frozen=True, repr=False)
class PairSecret:
    """What two parties share. key: 32 bytes, never used itself, only to derive. session: 8 bytes, public, names
    the agreement in logs. peer_epoch: of the peer's process when it made its hello."""

    key: bytes
    session: bytes
    peer_epoch: int

    def __repr__(self) -> str:
        return f"PairSecret(session={self.session.hex()}, peer_epoch={self.peer_epoch})"


@dataclass(frozen=True, repr=False)
class _Hello:
    """One hello. body: the bytes that are signed; message: with the signature."""

    epoch: int
    x25519: bytes
    kem: bytes
    body: bytes
    message: bytes


@dataclass(frozen=True, repr=False)
class _Pair:
    """Everything about one peer; replaced as a whole, so that a refusal leaves the old one.

    secrets: X25519 secret and ML-KEM seed, empty once `agreed`. heard: the peer's hello message. reply: the reply
    message, sent by the first or heard from it; there together with `agreed`.
    """

    mine: bytes
    secrets: bytes
    heard: bytes = b""
    reply: bytes = b""
    agreed: PairSecret | None = None


class Agreement:
    """The keys of one party with each other party of one job attempt."""

    def __init__(
        self, *, me: str, identity: Identity, roster: Mapping[str, PublicIdentity], context: bytes, epoch: int
    ) -> None:
        """roster: every party of the job, this one included. context: canonical bytes that name job, attempt and
        roster, the same for all. epoch: grows with each start of this party's process; 0 to 2^64 - 1.

        Raises:
            ConfigurationError: a roster without this party or with another key for it, with a key twice, with a
                name that is none, or with nobody else.
            InternalError: an epoch out of range.
        """
        if not 0 <= epoch < _EPOCHS:
            raise InternalError(f"the epoch {epoch}: 0 to 2^64 - 1")
        _check_roster(me, identity, roster)
        self._me = me
        self._identity = identity
        self._roster = dict(roster)
        self._context = bytes(context)
        self._epoch = epoch
        self._pairs = {peer: self._fresh(peer) for peer in sorted(roster) if peer != me}

    @property
    def epoch(self) -> int:
        """The epoch in this party's hellos: that of the process that made the keys, also after `from_bytes`."""
        return self._epoch

    def hello(self, receiver: str) -> bytes:
        """This party's signed ephemeral keys for `receiver`; the same bytes each time.

        Raises:
            InternalError: nobody of that name to talk to.
        """
        return self._pair(receiver).mine

    def secret(self, peer: str) -> PairSecret | None:
        """What is shared with `peer`, or None as long as messages are missing.

        Raises:
            InternalError: nobody of that name to talk to.
        """
        return self._pair(peer).agreed

    def hear(self, sender: str, message: bytes) -> list[bytes]:
        """Take one message that came as `sender`'s; returns the messages to send back to it, if any.

        Raises:
            PeerViolation: what no honest party of this job says now. BadSignature: not signed by it, or signed for
                another job, attempt, roster or receiver. PeerRestarted: it has lost the secret of this pair.
        """
        if sender not in self._pairs:
            raise PeerViolation(f"a key message of {sender[:64]!r}, who is no peer of {self._me} in this job")
        if len(message) > MAX_MESSAGE:
            raise PeerViolation(f"a key message of {len(message)} bytes from {sender}; at most {MAX_MESSAGE}")
        pair = self._pairs[sender]
        kind = _kind(sender, self._me, message)
        if kind == _HELLO:
            after, answers = self._hear_hello(sender, pair, self._read_hello(sender, message))
        else:
            after, answers = self._hear_reply(sender, pair, message), []
        self._pairs[sender] = after
        return answers

    def to_bytes(self) -> bytes:
        """All of it, secrets included: to be sealed at rest and given to `from_bytes` after a restart."""
        parts = [_STATE, self._binding(), struct.pack(">Q", self._epoch)]
        for peer, pair in self._pairs.items():
            agreed = pair.agreed
            shared = agreed.key + agreed.session + struct.pack(">Q", agreed.peer_epoch) if agreed else b""
            parts += [peer.encode("ascii"), pair.mine, pair.secrets, pair.heard, pair.reply, shared]
        return _packed(parts)

    @classmethod
    def from_bytes(
        cls, state: bytes, *, me: str, identity: Identity, roster: Mapping[str, PublicIdentity], context: bytes
    ) -> Agreement:
        """What `to_bytes` wrote, for the same party, identity, roster and context; it keeps its epoch.

        `state` must come out of the party's own seal: it is trusted.

        Raises:
            ConfigurationError: as the constructor; bytes of another version, job, attempt, roster or party.
        """
        parts = _unpacked(state)
        if parts is None or len(parts) < 3 or parts[0] != _STATE or len(parts[2]) != 8:
            raise ConfigurationError("these bytes are not the link keys that this version of fate_llm stored")
        found = cls(me=me, identity=identity, roster=roster, context=context, epoch=_natural(parts[2]))
        peers, names = parts[3:], [name.encode("ascii") for name in found._pairs]
        if parts[1] != found._binding() or peers[::6] != names or len(peers) != 6 * len(names):
            raise ConfigurationError(
                "the stored link keys belong to another job, attempt, roster or party",
                hint="Start a new attempt of the job: it agrees on new keys.",
            )
        for start in range(0, len(peers), 6):
            peer, mine, secrets, heard, reply, shared = peers[start : start + 6]
            agreed = PairSecret(shared[:32], shared[32:40], _natural(shared[40:])) if shared else None
            found._pairs[peer.decode("ascii")] = _Pair(mine, secrets, heard, reply, agreed)
        return found

    def __repr__(self) -> str:
        agreed = sum(pair.agreed is not None for pair in self._pairs.values())
        return f"Agreement({self._me}, epoch {self._epoch}, {agreed} of {len(self._pairs)} agreed)"

    def _pair(self, peer: str) -> _Pair:
        try:
            return self._pairs[peer]
        except KeyError:
            raise InternalError(f"no keys with {peer!r}: {nearest(peer, self._pairs)}") from None

    def _fresh(self, peer: str) -> _Pair:
        secrets = random_bytes(_X25519 + _KEM_SEED)
        x25519, kem = _private_keys(secrets)
        public = x25519.public_key().public_bytes_raw() + kem.public_key().public_bytes_raw()
        body = _start(_HELLO, self._me, peer) + struct.pack(">Q", self._epoch) + public
        return _Pair(mine=self._sign(_HELLO, peer, body), secrets=secrets)

    def _hear_hello(self, sender: str, pair: _Pair, hello: _Hello) -> tuple[_Pair, list[bytes]]:
        after = self._with_hello(sender, pair, hello)
        if self._me > sender:
            return after, [] if after.agreed else [after.mine]
        if after.agreed is None:
            after = self._encapsulated(sender, after, hello)
        return after, [after.reply]

    def _with_hello(self, sender: str, pair: _Pair, hello: _Hello) -> _Pair:
        """The pair once `hello` was heard (rule 3)."""
        if not pair.heard:
            return replace(pair, heard=hello.message)
        before = _hello_of(pair.heard)
        if hello.body == before.body:
            return pair
        if hello.epoch == before.epoch:
            raise PeerViolation(f"{sender} sent two different hellos in its epoch {hello.epoch}")
        if hello.epoch < before.epoch:
            raise PeerViolation(f"a hello of {sender} from epoch {hello.epoch}, after one from epoch {before.epoch}")
        if pair.agreed is not None:
            raise PeerRestarted(
                f"{sender} started again (epoch {hello.epoch} after {before.epoch}) without the keys of this job"
            )
        return replace(pair, heard=hello.message)

    def _encapsulated(self, peer: str, pair: _Pair, hello: _Hello) -> _Pair:
        """What the first party does with the second's hello."""
        kem_secret, ciphertext = MLKEM768PublicKey.from_public_bytes(hello.kem).encapsulate()
        body = _start(_REPLY, self._me, peer) + pair.mine + hashlib.sha256(hello.body).digest() + ciphertext
        return self._agreed(peer, pair, hello, self._sign(_REPLY, peer, body), kem_secret)

    def _hear_reply(self, sender: str, pair: _Pair, message: bytes) -> _Pair:
        """What the second party does with the first's reply."""
        if self._me < sender:
            raise PeerViolation(f"a key reply from {sender}, who has to wait for the one of {self._me}")
        start = len(_start(_REPLY, sender, self._me))
        end = start + len(_start(_HELLO, sender, self._me)) + _HELLO_REST
        if len(message) != end + _REPLY_REST:
            raise PeerViolation(f"a key reply of {len(message)} bytes from {sender}; it has {end + _REPLY_REST}")
        self._verify(_REPLY, sender, message)
        if _kind(sender, self._me, message[start:end]) != _HELLO:
            raise PeerViolation(f"a key reply from {sender} without its hello inside")
        hello = self._read_hello(sender, message[start:end])
        after = self._with_hello(sender, pair, hello)
        if message[end : end + _DIGEST] != hashlib.sha256(_unsigned(pair.mine)).digest():
            raise PeerViolation(
                f"{sender} answered another hello than the present one of {self._me}",
                hint=f"{self._me} started again without its keys: restore its job folder, or start a new attempt.",
            )
        if after.agreed is not None:
            if _unsigned(message) != _unsigned(pair.reply):
                raise PeerViolation(f"{sender} answered the same hello twice, with different content")
            return after
        ciphertext = message[end + _DIGEST : end + _DIGEST + _CIPHERTEXT]
        _, kem = _private_keys(pair.secrets)
        return self._agreed(sender, after, hello, message, kem.decapsulate(ciphertext))

    def _agreed(self, peer: str, pair: _Pair, hello: _Hello, reply: bytes, kem_secret: bytes) -> _Pair:
        """The pair with its key, and without the ephemeral secrets."""
        x25519, _ = _private_keys(pair.secrets)
        x25519_secret = x25519.exchange(X25519PublicKey.from_public_bytes(hello.x25519))
        ciphertext = _unsigned(reply)[-_CIPHERTEXT:]
        mine, theirs = _unsigned(pair.mine), hello.body
        first, second = sorted((self._me, peer))
        identities = [self._roster[first].raw, self._roster[second].raw]
        hellos = [mine, theirs] if first == self._me else [theirs, mine]
        transcript = _digest([_LABEL_TRANSCRIPT, self._context, *identities, *hellos, ciphertext])
        key = HKDF(algorithm=SHA256(), length=32, salt=transcript, info=_LABEL_KEY).derive(x25519_secret + kem_secret)
        agreed = PairSecret(key=key, session=transcript[:_SESSION], peer_epoch=hello.epoch)
        return replace(pair, secrets=b"", reply=reply, agreed=agreed)

    def _read_hello(self, sender: str, message: bytes) -> _Hello:
        """A hello whose kind and names are right already.

        Raises:
            PeerViolation: another length, keys that are none, or this party's own. BadSignature.
        """
        length = len(_start(_HELLO, sender, self._me)) + _HELLO_REST
        if len(message) != length:
            raise PeerViolation(f"a hello of {len(message)} bytes from {sender}; it has {length}")
        self._verify(_HELLO, sender, message)
        hello = _hello_of(message)
        mine = _hello_of(self._pairs[sender].mine)
        if hello.x25519 == mine.x25519 or hello.kem == mine.kem:
            raise PeerViolation(f"the hello of {sender} offers the keys of {self._me}: it was reflected")
        _check_keys(sender, hello)
        return hello

    def _sign(self, kind: int, receiver: str, body: bytes) -> bytes:
        """`body` and the signature over it, the context and both identities."""
        signed = self._signed(self._identity.public, self._roster[receiver], body)
        return body + self._identity.sign(signed, purpose=_PURPOSES[kind])

    def _verify(self, kind: int, sender: str, message: bytes) -> None:
        signed = self._signed(self._roster[sender], self._identity.public, _unsigned(message))
        self._roster[sender].verify(message[-SIGNATURE_BYTES:], signed, purpose=_PURPOSES[kind])

    def _signed(self, sender: PublicIdentity, receiver: PublicIdentity, body: bytes) -> bytes:
        return _packed([self._context, sender.raw, receiver.raw, body])

    def _binding(self) -> bytes:
        """What stored state belongs to."""
        keys = [part for name in sorted(self._roster) for part in (name.encode("ascii"), self._roster[name].raw)]
        return _digest([_LABEL_STATE, self._me.encode("ascii"), self._context, *keys])


def _check_roster(me: str, identity: Identity, roster: Mapping[str, PublicIdentity]) -> None:
    hint = "Compare the roster with every party's `fate_llm` identity."
    wrong = sorted(name for name in roster if not is_name(name))
    if wrong:
        raise ConfigurationError(f"the roster names {wrong[0]!r}: small letters, digits, `_`, `-`, `.`", hint=hint)
    if me not in roster or len(roster) < 2:
        raise ConfigurationError(f"the roster has {sorted(roster)}: it needs {me!r} and somebody else", hint=hint)
    if roster[me] != identity.public:
        raise ConfigurationError(
            f"the roster pins {roster[me].to_text()} for {me}, whose identity here is {identity.public.to_text()}",
            hint=hint,
        )
    owner: dict[PublicIdentity, str] = {}
    for name in sorted(roster):
        if roster[name] in owner:
            raise ConfigurationError(f"{owner[roster[name]]} and {name} have the same key in the roster", hint=hint)
        owner[roster[name]] = name


def _start(kind: int, sender: str, receiver: str) -> bytes:
    """Magic, version, kind, and both names, each after its length in one byte."""
    names = (name.encode("ascii") for name in (sender, receiver))
    return _MAGIC + bytes([kind]) + b"".join(bytes([len(name)]) + name for name in names)


def _kind(sender: str, receiver: str, message: bytes) -> int:
    """The kind of a message that starts as one from `sender` to `receiver` does.

    Raises:
        PeerViolation: it does not.
    """
    for kind in (_HELLO, _REPLY):
        if message.startswith(_start(kind, sender, receiver)):
            return kind
    if not message.startswith(_MAGIC):
        raise PeerViolation(f"bytes from {sender} that are no key message of version {_MAGIC[-1]}")
    raise PeerViolation(f"a key message from {sender} that names another kind, sender or receiver than it has")


def _hello_of(message: bytes) -> _Hello:
    """The parts of a hello whose length was checked."""
    body = _unsigned(message)
    kem, x25519 = body[-_KEM_KEY:], body[-_KEM_KEY - _X25519 : -_KEM_KEY]
    epoch = _natural(body[-_KEM_KEY - _X25519 - 8 : -_KEM_KEY - _X25519])
    return _Hello(epoch=epoch, x25519=x25519, kem=kem, body=body, message=message)


def _check_keys(sender: str, hello: _Hello) -> None:
    """Refuse public keys with which no secret can be agreed, before anything rests on them."""
    try:
        # Clamped scalars are multiples of 8: a point of low order gives zeros with this one as with any other,
        # and the library raises when the result is zeros.
        X25519PrivateKey.from_private_bytes(bytes(_X25519)).exchange(X25519PublicKey.from_public_bytes(hello.x25519))
    except ValueError:
        raise PeerViolation(f"the hello of {sender} has an X25519 key of low order") from None
    try:
        MLKEM768PublicKey.from_public_bytes(hello.kem)
    except ValueError:
        raise PeerViolation(f"the hello of {sender} has an ML-KEM-768 key that is none") from None


def _unsigned(message: bytes) -> bytes:
    return message[:-SIGNATURE_BYTES]


def _private_keys(secrets: bytes) -> tuple[X25519PrivateKey, MLKEM768PrivateKey]:
    if len(secrets) != _X25519 + _KEM_SEED:
        raise InternalError("the ephemeral secrets of this pair are gone: its key was agreed before")
    x25519, kem = secrets[:_X25519], secrets[_X25519:]
    try:
        return X25519PrivateKey.from_private_bytes(x25519), MLKEM768PrivateKey.from_seed_bytes(kem)
    except UnsupportedAlgorithm:
        raise MissingExtra(
            "the installed `cryptography` has no ML-KEM-768",
            hint="Install the wheel of `cryptography` that fate_llm asks for, not one of the distribution.",
        ) from None


def _natural(raw: bytes) -> int:
    return int.from_bytes(raw, "big")


def _digest(parts: Iterable[bytes]) -> bytes:
    return hashlib.sha256(_packed(parts)).digest()


def _packed(parts: Iterable[bytes]) -> bytes:
    """Each part after its length in 4 bytes, so that no two lists of parts give the same bytes."""
    return b"".join(struct.pack(">I", len(part)) + part for part in parts)


def _unpacked(packed: bytes) -> list[bytes] | None:
    """The parts again, or None when the lengths do not fit."""
    parts, at = [], 0
    while at < len(packed):
        start = at + 4
        at = start + _natural(packed[at:start])
        if at > len(packed) or start > len(packed):
            return None
        parts.append(packed[start:at])
    return parts
