"""Words as bytes: every word comes back, and what is no word of this version is refused as a whole."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fate_llm.core.errors import ConfigurationError, PeerViolation
from fate_llm.runtime.service import wording
from fate_llm.runtime.service.wording import DEEPEST, read_word, write_word
from fate_llm.runtime.service.words import (
    Answer,
    Ending,
    Estimates,
    Finding,
    JobState,
    Line,
    Lines,
    News,
    PartState,
    PartView,
    Question,
    Report,
    TaskView,
    Trouble,
    Word,
)

DIGEST = "0123456789abcdef" * 4
WORDS: list[Word] = [
    News(
        job="j",
        digest=DIGEST,
        serial=2**53 - 1,
        state=JobState.RUNNING,
        attempt=2,
        finished=("read", "split"),
        parts={"bank-a": PartView(state=PartState.LOST, tasks={"train": TaskView(state="running", round=3, rounds=9)})},
        ending=Ending(
            state=JobState.FAILED, trouble=Trouble(code="timeout", message="ä\n\t\u2028"), dossier={"x": [1.5]}
        ),
        specification={"pipeline": {"tasks": [None, True, -1, 2**60, "text"]}},
    ),
    Report(
        job="j", digest=DIGEST, serial=0, state=PartState.APPROVAL, findings=(Finding(rule="data", outcome="manual"),)
    ),
    Question(question="q1", specification={}),
    Answer(question="q1", estimates=Estimates(sent_bytes=10, minutes=0.5), findings=()),
    Lines(job="j", digest=DIGEST, lines=(Line(number=1, seconds=1.25, event="round", fields={"loss": 0.1}),)),
]


@pytest.mark.parametrize("word", WORDS, ids=lambda word: word.kind)
def test_every_word_comes_back(word: Word) -> None:
    assert read_word(write_word(word)) == word


def test_every_kind_of_word_is_tried() -> None:
    assert {type(word) for word in WORDS} == {News, Report, Question, Answer, Lines}


def test_what_cannot_be_said_is_replaced() -> None:
    """Messages of errors, and events, have anything in them."""
    fields = {"a\0": "x\0y", "b": "\ud800", "c": float("nan"), "d": [float("inf"), 1.0]}
    found = read_word(
        write_word(Lines(job="j", digest=DIGEST, lines=(Line(number=1, seconds=0.0, event="\0", fields=fields),)))
    )
    assert isinstance(found, Lines)
    assert found.lines[0].event == "\ufffd"
    assert found.lines[0].fields == {"a\ufffd": "x\ufffdy", "b": "\ufffd", "c": None, "d": [None, 1.0]}


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def test_a_word_may_be_nested_so_deep_and_no_deeper() -> None:
    # Given what stands at level 3 of a question, so that its lists and the number in them are the levels 3 ... DEEPEST
    good = Question(question="q", specification={"x": nested(DEEPEST - 3)})
    assert read_word(write_word(good)) == good
    with pytest.raises(ConfigurationError, match=f"deeper than {DEEPEST} levels"):
        write_word(Question(question="q", specification={"x": nested(DEEPEST - 2)}))
    text = json.dumps({"kind": "question", "question": "q", "specification": {"x": nested(DEEPEST - 2)}})
    with pytest.raises(PeerViolation, match=f"deeper than {DEEPEST} levels"):
        read_word(text.encode())


def changed(word: Word, **fields: Any) -> bytes:
    return json.dumps({**json.loads(write_word(word)), **fields}).encode()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"news"',
        b"{}",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"kind":"news"}',
        b'{"kind":"order"}',
        changed(WORDS[2], question=7),
        changed(WORDS[2], question="x" * 2001),
        changed(WORDS[2], question="a\0b"),
        changed(WORDS[2], specification={"a\0": 1}),
        changed(WORDS[2], specification=[]),
        changed(WORDS[2], later=1),
        changed(WORDS[0], serial=-1),
        changed(WORDS[0], serial=2**53),
        changed(WORDS[0], serial="1"),
        changed(WORDS[0], serial=1.5),
        changed(WORDS[0], serial=True),
        changed(WORDS[0], digest=DIGEST.upper()),
        changed(WORDS[0], digest=DIGEST + "\n"),
        changed(WORDS[0], state="paused"),
        changed(WORDS[0], parts={str(number): {"state": "lost"} for number in range(1001)}),
        changed(WORDS[4], lines=[{"number": 1, "seconds": 0.0, "event": "e"}] * 501),
        write_word(WORDS[2]).replace(b'"q1"', b'"q1","question":"q2"'),
        write_word(WORDS[4]).replace(b"1.25", b"NaN"),
        write_word(WORDS[4]).replace(b"1.25", b"1e999"),
        write_word(WORDS[2]) + b"x",
        write_word(WORDS[2]).replace(b'"q1"', b'"\\ud800"'),
    ],
    ids=range(30),
)
def test_what_is_no_word_of_this_version_is_refused(body: bytes) -> None:
    with pytest.raises(PeerViolation, match="a word"):
        read_word(body)


def test_an_error_names_the_field_and_is_short() -> None:
    with pytest.raises(PeerViolation, match=r"news\.serial: .*; news\.digest|news\.digest: .*; news\.serial") as caught:
        read_word(changed(WORDS[0], serial="secret", digest="x" * 5000, **{f"field{n}": 1 for n in range(500)}))
    assert len(str(caught.value)) < 800 and "secret" not in str(caught.value) and "more" in str(caught.value)


def test_a_backslash_is_no_nul() -> None:
    word = Question(question="\\u0000", specification={})
    assert read_word(write_word(word)) == word


def test_a_word_has_so_many_values_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take much memory and time, and is refused before it is read: brackets count, also where no JSON is."""
    monkeypatch.setattr(wording, "MOST_VALUES", 20)
    good, much = (Question(question="q", specification={"x": [1] * count}) for count in (10, 30))
    assert read_word(write_word(good)) == good
    with pytest.raises(ConfigurationError, match="about 34 values; at most 20"):
        write_word(much)
    for body in (b"[" * 21, b"{" * 21, b"," * 21):
        with pytest.raises(PeerViolation, match="about 21 values; at most 20"):
            read_word(body)
