"""A whole sum computed a second time, from the document alone: `docs/explanation/secure-aggregation.md`.

Nothing of `fate_llm.security` or of the protocol's modules is used here: HKDF from HMAC, X25519 in Python's integers
(RFC 7748), AES-256 block by block (FIPS 197, counter mode by hand), Shamir with Python's integers, Ed25519 by another
interface of the library. What the machines had said is recomputed from the seeds, byte for byte.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import struct
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fate_llm.core.values import Update
from tests.masking import LAYOUT, Masking, identity_of, make_update
from tests.protocols.secagg.checks import dies

P25519 = 2**255 - 19
P521 = 2**521 - 1
LARGEST = 2.0**20


# --- the arithmetic, again --------------------------------------------------------------------------------------


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def sha(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def info_of(label: str, *parts: bytes) -> bytes:
    return b"".join(struct.pack(">I", len(part)) + part for part in (label.encode(), *parts))


def hkdf(secret: bytes, salt: bytes | None, info: bytes) -> bytes:
    """32 bytes: RFC 5869 has one block for them. salt None: the second half alone."""
    key = secret if salt is None else hmac.new(salt, secret, hashlib.sha256).digest()
    return hmac.new(key, info + b"\x01", hashlib.sha256).digest()


def x25519(secret: bytes, u: int = 9) -> bytes:
    """RFC 7748, section 5: the Montgomery ladder."""
    k = bytearray(secret)
    k[0] &= 248
    k[31] = k[31] & 127 | 64
    scalar = int.from_bytes(k, "little")
    x1, x2, z2, x3, z3, swap = u, 1, 0, u, 1, 0
    for t in range(254, -1, -1):
        bit = scalar >> t & 1
        if swap ^ bit:
            x2, x3, z2, z3 = x3, x2, z3, z2
        swap = bit
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        aa, bb, da, cb = a * a % P25519, b * b % P25519, d * a % P25519, c * b % P25519
        e = aa - bb
        x3, z3 = (da + cb) ** 2 % P25519, x1 * (da - cb) ** 2 % P25519
        x2, z2 = aa * bb % P25519, e * (aa + 121665 * e) % P25519
    if swap:
        x2, z2 = x3, z3
    return (x2 * pow(z2, P25519 - 2, P25519) % P25519).to_bytes(32, "little")


def keystream(key: bytes, count: int) -> bytes:
    """AES-256 of the counters 0, 1, 2, ...: each a block of its own."""
    blocks = -(-count // 16)
    cipher = Cipher(algorithms.AES256(key), modes.ECB()).encryptor()
    return b"".join(cipher.update(number.to_bytes(16, "big")) for number in range(blocks))[:count]


def mask_of(key: bytes, words: int, wide: int) -> tuple[list[int], list[int]]:
    padded = -(-4 * words // 16) * 16
    stream = keystream(key, padded + 16 * wide)
    narrow = [int.from_bytes(stream[4 * i : 4 * i + 4], "little") for i in range(words)]
    return narrow, [int.from_bytes(stream[padded + 16 * i : padded + 16 * i + 16], "little") for i in range(wide)]


def shamir(secret: bytes, threshold: int, points: list[int], random: bytes) -> list[bytes]:
    parts = (b"fate_llm/1 shamir coefficients", random, struct.pack(">I", threshold), secret)
    framed = b"".join(struct.pack(">I", len(part)) + part for part in parts)
    stream = hashlib.shake_256(framed).digest(66 * (threshold - 1))
    rest = [(int.from_bytes(stream[66 * i : 66 * i + 66], "big") & P521) % P521 for i in range(threshold - 1)]
    coefficients = [int.from_bytes(secret, "big"), *rest]
    return [(sum(c * x**i for i, c in enumerate(coefficients)) % P521).to_bytes(66, "big") for x in points]


def lagrange(shares: dict[int, bytes]) -> bytes:
    value = 0
    for x, share in shares.items():
        factor = math.prod((Fraction(-other, x - other) for other in shares if other != x), start=Fraction(1))
        value += int.from_bytes(share, "big") * factor.numerator * pow(factor.denominator, -1, P521)
    return (value % P521).to_bytes(66, "big")[-32:]


def sign(name: str, purpose: str, message: bytes) -> bytes:
    secret = hashlib.sha256(f"identity of {name}".encode()).digest()
    return Ed25519PrivateKey.from_private_bytes(secret).sign(b"fate_llm/1 " + purpose.encode() + b"\0" + message)


# --- the protocol, again ----------------------------------------------------------------------------------------


class Party:
    """What one party computes, out of its 32 bytes of randomness and the document."""

    def __init__(self, name: str, seed: bytes, agreement: bytes) -> None:
        def draw(label: str) -> bytes:
            return hkdf(seed, None, info_of(f"secagg {label}", agreement, name.encode()))

        self.name, self.agreement = name, agreement
        self.channel, self.mask = draw("channel key"), draw("mask key")
        self.self_seed = draw("self mask seed")
        self.polynomials = draw("polynomial of the seed"), draw("polynomial of the key")
        label = b"fate_llm/1 secagg commitment\0"
        self.commitment = sha(label, agreement, name.encode(), b"\0", self.self_seed)
        self.row = x25519(self.channel) + x25519(self.mask) + self.commitment

    def pair(self, other: Party, transcript: bytes, order: list[str]) -> bytes:
        shared = x25519(self.mask, int.from_bytes(other.row[32:64], "little"))
        names = sorted((self.name, other.name), key=order.index)
        return hkdf(shared, transcript, info_of("secagg pair mask", *(name.encode() for name in names)))

    def seal(self, other: Party, transcript: bytes, text: bytes) -> bytes:
        shared = x25519(self.channel, int.from_bytes(other.row[:32], "little"))
        key = hkdf(shared, transcript, info_of("secagg shares", self.name.encode(), other.name.encode()))
        return AESGCM(key).encrypt(bytes(12), text, transcript)


def scale_of(count: int) -> float:
    """The largest float64 s with count * (ceil(s) + 1) <= 2^31 - 1, for a clip of 1."""
    return float((2**31 - 1) // count - 1)


def quantised(update: Update, scale: float, rounding: bytes) -> list[int]:
    """floor(x f s + u) of every value, arrays by sorted name."""
    values = np.concatenate([update.arrays[name].reshape(-1) for name in sorted(update.arrays)])
    stream = keystream(rounding, 4 * values.size)
    factor = update.weight / LARGEST
    found = []
    for at, value in enumerate(values):
        u = int.from_bytes(stream[4 * at : 4 * at + 4], "little") * 2.0**-32
        found.append(math.floor(float(value) * (factor * scale) + u) % 2**32)
    return found


def wide_of(update: Update, names: list[str]) -> list[int]:
    numbers = [update.weight, *(update.sums.get(name, 0.0) for name in names)]
    return [round(Fraction(number) * 2**40) % 2**128 for number in numbers]


def state_digest(layout: dict[str, tuple[int, ...]]) -> str:
    """A safetensors file of the state: names sorted, header padded with spaces to 8 bytes."""
    header: dict[str, Any] = {}
    body = b""
    for name in sorted(layout):
        raw = np.full(layout[name], 0.5, "<f4").tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(layout[name]),
            "data_offsets": [len(body), len(body) + len(raw)],
        }
        body += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return sha(struct.pack("<Q", len(text)) + text + body).hex()


def agreement_of(masking: Masking, threshold: int) -> bytes:
    identities = {name: identity_of(name).public.to_text() for name in (*masking.names, "z")}
    text = {
        "version": 1,
        "job": "job-1",
        "attempt": masking.attempt,
        "conversation": "train",
        "round": masking.round,
        "identities": sha(canonical(identities)).hex(),
        "contributors": list(masking.names),
        "coordinator": masking.coordinator,
        "threshold": threshold,
        "clip": (1.0).hex(),
        "largest_weight": LARGEST.hex(),
        "layout": sha(canonical({name: list(shape) for name, shape in masking.layout.items()})).hex(),
        "state": state_digest(dict(masking.layout)),
    }
    return sha(b"fate_llm/1 secagg agreement\0", canonical(text))


def rounding_of(masking: Masking, name: str) -> bytes:
    """The key of the draws for rounding: everybody can know it, and it is the same in every run."""
    draws = ["train", masking.round, name, state_digest(dict(masking.layout))]
    return sha(b"fate_llm/1 secagg rounding\0", canonical(draws))


def said(masking: Masking, stage: str, name: str) -> Any:
    return next(m for m in masking.messages(stage, to_server=True) if m.sender == name).body


# --- the comparison ---------------------------------------------------------------------------------------------


class Course:
    """One finished sum, and what it should have been."""

    def __init__(self, masking: Masking, threshold: int, lost: list[str]) -> None:
        self.masking, self.threshold, self.lost = masking, threshold, lost
        self.order = list(masking.names)
        self.survivors = [name for name in self.order if name not in lost]
        self.agreement = agreement_of(masking, threshold)
        self.parties = {name: Party(name, masking.seed(name), self.agreement) for name in self.order}
        self.sums = {name: sorted(masking.updates[name].sums) for name in self.order}
        every = [one for names in self.sums.values() for one in names]
        self.names = sorted(one for one in set(every) if every.count(one) >= threshold)
        table = {name: [party.row.hex(), self.sums[name]] for name, party in self.parties.items()}
        text = canonical({"agreement": self.agreement.hex(), "order": self.order, "keys": table})
        self.transcript = sha(b"fate_llm/1 secagg keys\0", text)
        text = canonical({"transcript": self.transcript.hex(), "sharing": self.order})
        self.masking_id = sha(b"fate_llm/1 secagg sharing\0", text)
        self.shares = {name: self._shares(party) for name, party in self.parties.items()}

    def _shares(self, party: Party) -> list[bytes]:
        points = list(range(1, len(self.order) + 1))
        of_seed = shamir(party.self_seed, self.threshold, points, party.polynomials[0])
        of_key = shamir(party.mask, self.threshold, points, party.polynomials[1])
        return [a + b for a, b in zip(of_seed, of_key, strict=True)]

    def signed(self, stage: str, name: str, purpose: str, content: dict[str, Any]) -> Any:
        """What the party said at this stage, once it is sure that it signed that."""
        body = said(self.masking, stage, name)
        assert body.tensors["signature"].tobytes() == sign(name, purpose, canonical(content))
        return body

    def check_keys(self) -> None:
        for name, party in self.parties.items():
            text = {"agreement": self.agreement.hex(), "party": name, "keys": party.row.hex(), "sums": self.sums[name]}
            body = self.signed("keys", name, "secagg keys", text)
            assert body.fields == {"stage": "keys", "sums": self.sums[name]}
            assert body.tensors["keys"].tobytes() == party.row

    def check_shares(self) -> None:
        for name, party in self.parties.items():
            others = [other for other in self.order if other != name]
            texts = [self.shares[name][self.order.index(other)] for other in others]
            sealed = [party.seal(self.parties[o], self.transcript, t) for o, t in zip(others, texts, strict=True)]
            assert said(self.masking, "shares", name).tensors["sealed"].tobytes() == b"".join(sealed)

    def keys_of(self, name: str) -> list[tuple[bytes, int]]:
        """The keys of a party's masks, each with its sign."""
        party = self.parties[name]
        keys = [(hkdf(party.self_seed, None, info_of("secagg self mask", self.masking_id)), 1)]
        for other in self.order:
            if other != name:
                plus = self.order.index(name) < self.order.index(other)
                keys.append((party.pair(self.parties[other], self.masking_id, self.order), 1 if plus else -1))
        return keys

    def term(self, name: str) -> tuple[list[int], list[int]]:
        """A party's words and wide numbers without any mask."""
        update = self.masking.updates[name]
        words = quantised(update, scale_of(len(self.order)), rounding_of(self.masking, name))
        return words, wide_of(update, self.names)

    def check_vectors(self) -> None:
        for name in self.survivors:
            words, wide = self.term(name)
            for key, factor in self.keys_of(name):
                narrow, broad = mask_of(key, len(words), len(wide))
                words = [(a + factor * b) % 2**32 for a, b in zip(words, narrow, strict=True)]
                wide = [(a + factor * b) % 2**128 for a, b in zip(wide, broad, strict=True)]
            raw_words = b"".join(word.to_bytes(4, "little") for word in words)
            raw_wide = b"".join(number.to_bytes(16, "little") for number in wide)
            text = {"transcript": self.masking_id.hex(), "party": name, "vector": sha(raw_words, raw_wide).hex()}
            body = self.signed("masked", name, "secagg masked", text)
            assert body.tensors["words"].tobytes() == raw_words
            assert body.tensors["wide"].tobytes() == raw_wide

    def check_answers(self) -> list[str]:
        for name in self.survivors:
            text = {"transcript": self.masking_id.hex(), "survivors": self.survivors}
            self.signed("consent", name, "secagg survivors", text)
        answered = [m.sender for m in self.masking.messages("unmask", to_server=True)]
        for name in answered:
            at = self.order.index(name)
            rows = [self.shares[of][at][slice(0, 66) if of in self.survivors else slice(66, 132)] for of in self.order]
            text = {
                "transcript": self.masking_id.hex(),
                "party": name,
                "survivors": self.survivors,
                "shares": sha(*rows).hex(),
            }
            body = self.signed("unmask", name, "secagg unmask", text)
            assert body.tensors["shares"].tobytes() == b"".join(rows)
        return answered

    def check_opened(self, answered: list[str]) -> None:
        """The threshold's number of answers opens the right secret of each, by interpolation over the rationals."""
        for at, of in enumerate(self.order):
            given = {
                self.order.index(name) + 1: said(self.masking, "unmask", name).tensors["shares"][at].tobytes()
                for name in answered[: self.threshold]
            }
            secret = self.parties[of].self_seed if of in self.survivors else self.parties[of].mask
            assert lagrange(given) == secret

    def check_total(self) -> None:
        total, terms = self.masking.total, [self.term(name) for name in self.survivors]
        assert total is not None
        words = [sum(column) % 2**32 for column in zip(*(words for words, _ in terms), strict=True)]
        wide = [Fraction(sum(column) % 2**128, 2**40) for column in zip(*(wide for _, wide in terms), strict=True)]
        assert total.weight == wide[0]
        assert total.sums == {name: float(value) for name, value in zip(self.names, wide[1:], strict=True)}
        flat = np.concatenate([total.mean[name].reshape(-1) for name in sorted(LAYOUT)])
        for found, word in zip(flat, words, strict=True):
            signed = word - 2**32 if word >= 2**31 else word
            assert np.float32(signed / (scale_of(len(self.order)) * (float(wide[0]) / LARGEST))) == found
        assert total.contributors == tuple(self.survivors) and total.missing == tuple(self.lost)


@pytest.mark.parametrize(("count", "threshold", "lost"), [(4, 3, []), (5, 4, ["p002"]), (7, 5, ["p000", "p006"])])
def test_a_transcript_is_what_the_document_says(count: int, threshold: int, lost: list[str]) -> None:
    masking = Masking(count, change=dies(lost, "masked"), round=3, attempt=2)
    masking.run()
    course = Course(masking, threshold, lost)
    course.check_keys()
    course.check_shares()
    course.check_vectors()
    answered = course.check_answers()
    assert len(answered) >= threshold
    course.check_opened(answered)
    course.check_total()


def test_the_arithmetic_of_this_file_is_that_of_the_standards() -> None:
    """Vectors of RFC 7748, RFC 5869, FIPS 197."""
    scalar = bytes.fromhex("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4")
    u = int.from_bytes(bytes.fromhex("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c"), "little")
    found = x25519(scalar, u % 2**255)
    assert found.hex() == "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"
    key = bytes.fromhex("000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f")
    assert keystream(key, 16) == Cipher(algorithms.AES256(key), modes.ECB()).encryptor().update(bytes(16))
    ikm, salt = b"\x0b" * 22, bytes(range(13))
    okm = hkdf(ikm, salt, bytes.fromhex("f0f1f2f3f4f5f6f7f8f9"))
    assert okm.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"
    points = shamir(b"\x07" * 32, 3, [1, 2, 3, 4], bytes(32))
    assert lagrange({1: points[0], 3: points[2], 4: points[3]}) == b"\x07" * 32
    assert lagrange({1: points[0], 3: points[2]}) != b"\x07" * 32


def test_a_value_computed_by_hand() -> None:
    """One number of one party: 0.25 with a weight of half the largest, among three."""
    scale = scale_of(3)
    assert scale == 715827881.0
    update = Update({"a.weight": np.full((3, 5), 0.25, np.float32), "b": np.zeros(7, np.float32)}, LARGEST / 2)
    words = quantised(update, scale, bytes(32))
    assert set(words[:15]) <= {89478485, 89478486} and words[15:] == [0] * 7
    assert make_update(1).sums.keys() == {"loss_sum", "tokens", "test_loss_sum"}
