"""A party's log as a chain: each line signs its content and the hash of the line before it.

A line is one canonical JSON object and a newline: {"fields", "kind", "n", "previous", "signature", "time"}. `n` counts
from 1; `previous` is the SHA-256 of the line before, 64 zeros in the first; the signature is the party's, over the
canonical JSON of all but itself. The first line is the genesis (kind `began`): party, identity, program version. The
*head* of a chain is the number and the hash of its last line; who remembers a head can tell later whether the chain
still holds everything up to there.

What verification finds, without the secret key, in one pass and constant memory:

    changed      the line is not what was signed        inserted    a line that was not written here
    unreadable   bytes that are no line                  reordered   a line after one that it precedes
    removed      numbers that are missing                forked      follows another line than the one before it
    genesis      it does not begin as it must            cut         the remembered head is not in it

A party that has its own key can write its whole log anew: only a head that others remember shows that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from fate_llm.core.canonical import canonical_json
from fate_llm.core.errors import BadSignature, InternalError

from .identity import SIGNATURE_BYTES, Identity, PublicIdentity

__all__ = [
    "GENESIS",
    "MAX_FAULTS",
    "MAX_LINE",
    "ChainFault",
    "ChainReader",
    "Entry",
    "Head",
    "genesis_line",
    "make_line",
    "read_line",
    "verify",
]

GENESIS: Final = "began"  # the kind of the first line
MAX_LINE: Final = 4 * 1024 * 1024  # bytes, without the newline
MAX_FAULTS: Final = 1000  # after which no more are listed
_PURPOSE: Final = "audit"
_NOTHING: Final = "0" * 64
_KEYS: Final = {"fields", "kind", "n", "previous", "signature", "time"}


@dataclass(frozen=True, slots=True)
class Head:
    """The end of a chain. hash: SHA-256 (64 hex digits) of its last line, of `n`. Before the first line: n is 0."""

    n: int = 0
    hash: str = _NOTHING


@dataclass(frozen=True, slots=True)
class Entry:
    """One line that was read. time: seconds since the epoch, by the clock of the party. hash: of the line."""

    n: int
    time: float
    kind: str
    fields: Mapping[str, Any]
    previous: str
    hash: str

    @property
    def head(self) -> Head:
        return Head(self.n, self.hash)


@dataclass(frozen=True, slots=True)
class ChainFault:
    """One thing wrong with a chain. line: its place, from 1, of what was read; 0 for the chain as a whole."""

    line: int
    kind: str
    message: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.message} [{self.kind}]" if self.line else f"{self.message} [{self.kind}]"


def genesis_line(identity: Identity, *, party: str, program: str, time: float) -> bytes:
    """The first line of a party's chain. program: the version that writes it."""
    fields = {"party": party, "identity": identity.public.to_text(), "program": program}
    return make_line(identity, Head(), time=time, kind=GENESIS, fields=fields)


def make_line(identity: Identity, head: Head, *, time: float, kind: str, fields: Mapping[str, Any]) -> bytes:
    """The line that follows `head`, with its newline.

    Raises:
        InternalError: fields that are no JSON, or a line above MAX_LINE.
    """
    content = {"fields": dict(fields), "kind": kind, "n": head.n + 1, "previous": head.hash, "time": time}
    try:
        signed = canonical_json(content)
        line = canonical_json({**content, "signature": identity.sign(signed, purpose=_PURPOSE).hex()})
    except (TypeError, ValueError) as error:
        raise InternalError(f"a line of kind {kind!r} is not JSON: {type(error).__name__}: {error}") from None
    if len(line) > MAX_LINE:
        raise InternalError(
            f"a line of kind {kind!r} has {len(line)} bytes; a log takes {MAX_LINE}: log a digest of it"
        )
    return line + b"\n"


def verify(lines: Iterable[bytes], public: PublicIdentity, *, expected_head: str | None = None) -> list[ChainFault]:
    """All that is wrong with a chain; nothing when it is whole.

    lines: with or without their newlines. expected_head: hash of a line that must be in it; cutting a chain at its end
    leaves no other trace.
    """
    reader = ChainReader(public, expected_head=expected_head)
    for line in lines:
        reader.take(line)
    return reader.finish()


@dataclass(slots=True)
class ChainReader:
    """Reads a chain line by line. Give all lines to `take`, then ask `finish` for the faults.

    head: of the last good line. count: lines taken.
    """

    public: PublicIdentity
    expected_head: str | None = None
    head: Head = field(default=Head(), init=False)
    count: int = field(default=0, init=False)
    _faults: list[ChainFault] = field(default_factory=list, init=False, repr=False)
    # numbers not seen: first, last, and the line after them
    _gaps: list[tuple[int, int, int]] = field(default_factory=list, init=False, repr=False)
    _bad: int = field(default=0, init=False, repr=False)  # lines since the last good one, not signed as they are
    _remembered: bool = field(default=False, init=False, repr=False)
    _more: int = field(default=0, init=False, repr=False)

    def take(self, line: bytes) -> Entry | None:
        """One more line, with or without its newline; None (and a fault) when the party did not sign it like this."""
        self.count += 1
        try:
            entry = read_line(line.removesuffix(b"\n"), self.public)
        except BadSignature as error:
            self._add("changed", error.message)
        except ValueError as error:
            self._add("unreadable", f"{error}; nothing of it was used")
        else:
            self._place(entry)
            self._remembered = self._remembered or entry.hash == self.expected_head
            return entry
        self._bad += 1
        return None

    def finish(self) -> list[ChainFault]:
        """All faults by line, at most MAX_FAULTS and one that counts the rest."""
        found = list(self._faults)
        for first, last, line in self._gaps:
            lines = f"line {first} is" if first == last else f"lines {first} to {last} are"
            found.append(ChainFault(line, "removed", f"{lines} missing before it"))
        if self.count == 0:
            found.append(ChainFault(0, "genesis", "the log has no line, not even the first"))
        if self.expected_head is not None and not self._remembered:
            text = f"the line {self.expected_head} is not in it: its end was cut off, or it was written anew"
            found.append(ChainFault(0, "cut", text))
        found.sort(key=lambda fault: fault.line)
        if self._more:
            found.append(ChainFault(self.count, "more", f"and {self._more} faults more"))
        return found

    def _place(self, entry: Entry) -> None:
        """Where a good line stands in the order, and what that says of the lines before it."""
        if (entry.kind == GENESIS) != (entry.n == 1):
            self._add("genesis", f"number {entry.n} is of kind {entry.kind!r}; {GENESIS!r} is the first line, only")
        if entry.n <= self.head.n:
            self._out_of_order(entry)
            return
        missing = entry.n - self.head.n - 1
        if missing == 0:
            self._follows(entry)
        elif missing > self._bad and len(self._gaps) < MAX_FAULTS:
            self._gaps.append((self.head.n + 1 + self._bad, entry.n - 1, self.count))
        if entry.n == 1 and entry.fields.get("identity") != self.public.to_text():
            self._add("genesis", f"the log is of {entry.fields.get('identity')!r}, not of {self.public.to_text()}")
        self.head, self._bad = entry.head, 0

    def _follows(self, entry: Entry) -> None:
        if entry.previous != self.head.hash:
            self._add("forked", f"it follows another line {self.head.n} than the one in this log")
        else:  # nothing is missing without what stands between them
            first = self.count - self._bad
            self._faults = [
                replace(fault, kind="inserted", message=f"it does not belong there: {fault.message}")
                if first <= fault.line < self.count
                else fault
                for fault in self._faults
            ]

    def _out_of_order(self, entry: Entry) -> None:
        for place, (first, last, line) in enumerate(self._gaps):
            if first <= entry.n <= last:
                rest = [(first, entry.n - 1, line), (entry.n + 1, last, line)]
                self._gaps[place : place + 1] = [gap for gap in rest if gap[0] <= gap[1]]
                self._add("reordered", f"line {entry.n} stands after line {self.head.n}")
                return
        if entry.kind == GENESIS and entry.n == 1:
            self._add("genesis", "a second beginning: what follows is another log")
            self.head, self._bad = entry.head, 0
        else:
            self._add("inserted", f"line {entry.n} again, after line {self.head.n}: a copy, or of another log")

    def _add(self, kind: str, message: str) -> None:
        if len(self._faults) < MAX_FAULTS:
            self._faults.append(ChainFault(self.count, kind, message))
        else:
            self._more += 1


def read_line(raw: bytes, public: PublicIdentity) -> Entry:
    """One line, without its newline, that `public` signed.

    Raises:
        BadSignature: somebody else signed it, or it was changed. ValueError: it is no line of a chain.
    """
    if len(raw) > MAX_LINE:
        raise ValueError(f"{len(raw)} bytes; a line has at most {MAX_LINE}")
    try:
        content = json.loads(raw)
        if not isinstance(content, dict) or content.keys() != _KEYS or canonical_json(content) != raw:
            raise ValueError
    except (ValueError, RecursionError):
        raise ValueError("not one canonical JSON object of the keys of a line") from None
    signature = content.pop("signature")
    if not _is_hex(signature, 2 * SIGNATURE_BYTES) or not _is_hex(content["previous"], 64):
        raise ValueError("its signature or hash is not of lower case hex digits")
    natural = type(content["n"]) is int and content["n"] >= 1
    known = type(content["time"]) in (int, float) and isinstance(content["kind"], str)
    if not (natural and known and isinstance(content["fields"], dict)):
        raise ValueError("its number, time, kind or fields have another type")
    public.verify(bytes.fromhex(signature), canonical_json(content), purpose=_PURPOSE)
    return Entry(**content, hash=hashlib.sha256(raw).hexdigest())


def _is_hex(text: object, digits: int) -> bool:
    return isinstance(text, str) and len(text) == digits and set(text) <= set("0123456789abcdef")
