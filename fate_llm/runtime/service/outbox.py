"""What a service has to say while it cannot be said: in bounded memory, and the latest only.

States (`News`, `Report`) of one job to one party replace each other. `Question` and `Answer` are kept until nobody
waits for them. `Lines` are kept up to a number, the oldest go first. What is dropped is counted, never waited for: the
service says its states again, and a gap in lines shows by their numbers.

Pure: seconds that only grow come with each call. For one thread at a time.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Final

from .words import Answer, Lines, News, Question, Report, Word

__all__ = ["ASKED", "LARGEST", "MOST", "STATES", "Letter", "Outbox"]

STATES: Final = 60.0
"""Seconds that a state, or lines, may wait for their receiver at the broker: then a newer one has been said."""
ASKED: Final = 3600.0
"""Seconds that anybody waits for an answer, and so that a question or an answer is kept, here or at the broker."""
MOST: Final[dict[str, int]] = {"news": 10_000, "report": 10_000, "question": 200, "answer": 200, "lines": 200}
"""Letters of a kind to one receiver."""
LARGEST: Final = 64 * 1024 * 1024
"""Bytes of all letters that wait."""
_FIRST_TO_GO: Final = ("lines", "answer", "question", "report", "news")

_Key = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Letter:
    """A word on its way.

    expires: seconds that it may wait at the broker. until: seconds, as given to `Outbox`, after which nobody waits for
    it; None: never.
    """

    receiver: str
    kind: str
    body: bytes = field(repr=False)
    expires: float
    until: float | None
    key: _Key = field(repr=False)


class Outbox:
    """Letters in the order they were first put in; a state that replaces another takes its place.

    dropped: by kind, letters that were put in and will never leave: too many, too large together, or too old.
    """

    def __init__(self, *, largest: int = LARGEST) -> None:
        self.dropped: Counter[str] = Counter()
        self._largest = largest
        self._letters: OrderedDict[_Key, Letter] = OrderedDict()
        self._count: Counter[tuple[str, str]] = Counter()
        self._bytes = 0
        self._numbers = 0

    def __len__(self) -> int:
        return len(self._letters)

    @property
    def size(self) -> int:
        """Bytes that wait."""
        return self._bytes

    def put(self, receiver: str, word: Word, body: bytes, now: float) -> None:
        """Keep a word for `receiver`. body: its bytes."""
        asked = isinstance(word, Question | Answer)
        key = (receiver, word.kind, self._name(word))
        until, expires = (now + ASKED, ASKED) if asked else (None, STATES)
        self._keep(Letter(receiver, word.kind, body, expires, until, key))

    def take(self, now: float) -> Letter | None:
        """The next letter; it is no longer here."""
        while self._letters:
            key, letter = next(iter(self._letters.items()))
            self._remove(key)
            if letter.until is None or now < letter.until:
                return letter
            self.dropped[letter.kind] += 1
        return None

    def put_back(self, letter: Letter) -> None:
        """A letter that could not leave is the next again, unless there is a newer one in its place."""
        if letter.key not in self._letters:
            self._keep(letter)
            if letter.key in self._letters:
                self._letters.move_to_end(letter.key, last=False)

    def forget(self, receiver: str) -> None:
        """Drop what waits for one who is no longer there."""
        for key in [key for key in self._letters if key[0] == receiver]:
            self._drop(key)

    def _name(self, word: Word) -> str:
        """What a letter shares with those it replaces."""
        if isinstance(word, News | Report):
            return word.job
        if isinstance(word, Lines):
            self._numbers += 1
            return str(self._numbers)
        return word.question

    def _keep(self, letter: Letter) -> None:
        before = self._letters.get(letter.key)
        self._letters[letter.key] = letter
        self._bytes += len(letter.body) - (len(before.body) if before is not None else 0)
        self._count[letter.key[:2]] += before is None
        if self._count[letter.key[:2]] > MOST[letter.kind]:
            self._drop(next(key for key in self._letters if key[:2] == letter.key[:2]))
        for kind in _FIRST_TO_GO:
            for key in [key for key in self._letters if key[1] == kind] if self._bytes > self._largest else ():
                if self._bytes <= self._largest:
                    return
                self._drop(key)

    def _drop(self, key: _Key) -> None:
        self.dropped[self._remove(key).kind] += 1

    def _remove(self, key: _Key) -> Letter:
        letter = self._letters.pop(key)
        self._bytes -= len(letter.body)
        self._count[key[:2]] -= 1
        if not self._count[key[:2]]:
            del self._count[key[:2]]
        return letter
