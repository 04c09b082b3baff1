"""The outbox: the latest state only, bounded, in order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fate_llm.runtime.service.outbox import ASKED, MOST, STATES, Outbox
from fate_llm.runtime.service.words import (
    Answer,
    JobState,
    Lines,
    News,
    PartState,
    Question,
    Report,
    Word,
)

DIGEST = "0" * 64


def news(job: str = "j") -> News:
    return News(job=job, digest=DIGEST, serial=1, state=JobState.RUNNING)


def report(job: str = "j") -> Report:
    return Report(job=job, digest=DIGEST, serial=1, state=PartState.RUNNING)


def lines(job: str = "j") -> Lines:
    return Lines(job=job, digest=DIGEST, lines=())


def question(name: str = "q") -> Question:
    return Question(question=name, specification={})


def emptied(outbox: Outbox, now: float = 0.0) -> list[tuple[str, str, bytes]]:
    found = []
    while (letter := outbox.take(now)) is not None:
        found.append((letter.receiver, letter.kind, letter.body))
    assert (len(outbox), outbox.size) == (0, 0)
    return found


def test_letters_leave_in_the_order_they_came() -> None:
    outbox = Outbox()
    for at, word in enumerate([news("a"), report("a"), lines(), question(), Answer(question="q"), lines()]):
        outbox.put("b", word, b"%d" % at, 0.0)
    assert [body for _, _, body in emptied(outbox)] == [b"0", b"1", b"2", b"3", b"4", b"5"]


def test_the_latest_state_takes_the_place_of_the_one_before() -> None:
    # Given states of two jobs to two parties, When newer ones come
    outbox = Outbox()
    for body in (b"old", b"newer"):
        for receiver in "bc":
            for job in ("j", "k"):
                outbox.put(receiver, news(job), body + job.encode(), 0.0)
                outbox.put(receiver, report(job), body + job.encode(), 0.0)
    # Then only these leave, and each once
    found = emptied(outbox)
    assert len(found) == 8 and {body for _, _, body in found} == {b"newerj", b"newerk"}
    assert found[:2] == [("b", "news", b"newerj"), ("b", "report", b"newerj")]
    assert not outbox.dropped


def test_lines_add_up_to_a_number_and_the_oldest_go() -> None:
    outbox = Outbox()
    for at in range(MOST["lines"] + 3):
        outbox.put("b", lines(), b"%d" % at, 0.0)
    outbox.put("c", lines(), b"c", 0.0)
    found = emptied(outbox)
    assert found[0] == ("b", "lines", b"3") and found[-1] == ("c", "lines", b"c")
    assert len(found) == MOST["lines"] + 1 and outbox.dropped == {"lines": 3}


@pytest.mark.parametrize("word", [question(), Answer(question="q")])
def test_who_is_not_waited_for_is_not_answered(word: Word) -> None:
    outbox = Outbox()
    outbox.put("b", word, b"x", 100.0)
    outbox.put("b", news(), b"state", 100.0)
    letter = outbox.take(99.0 + ASKED)
    assert letter is not None and (letter.kind, letter.expires) == (word.kind, ASKED)
    outbox.put_back(letter)
    assert emptied(outbox, 100.0 + ASKED) == [("b", "news", b"state")]
    assert outbox.dropped == {word.kind: 1}


def test_states_are_kept_as_long_as_it_takes_and_wait_a_minute_at_the_broker() -> None:
    outbox = Outbox()
    outbox.put("b", news(), b"x", 0.0)
    letter = outbox.take(30 * 86400.0)
    assert letter is not None and letter.expires == STATES


def test_what_could_not_leave_is_the_next_again() -> None:
    outbox = Outbox()
    for job in ("j", "k"):
        outbox.put("b", news(job), job.encode(), 0.0)
    letter = outbox.take(0.0)
    assert letter is not None
    outbox.put_back(letter)
    assert [body for _, _, body in emptied(outbox)] == [b"j", b"k"]


def test_what_could_not_leave_does_not_come_back_over_a_newer_one() -> None:
    outbox = Outbox()
    outbox.put("b", news(), b"old", 0.0)
    letter = outbox.take(0.0)
    outbox.put("b", news(), b"new", 0.0)
    assert letter is not None
    outbox.put_back(letter)
    assert [body for _, _, body in emptied(outbox)] == [b"new"]


def test_all_together_are_bounded_and_news_go_last() -> None:
    outbox = Outbox(largest=1000)
    outbox.put("b", news("j"), bytes(400), 0.0)
    outbox.put("b", question(), bytes(300), 0.0)
    outbox.put("b", lines(), bytes(300), 0.0)
    outbox.put("b", report("j"), bytes(300), 0.0)
    assert outbox.dropped == {"lines": 1} and outbox.size == 1000
    outbox.put("b", news("k"), bytes(301), 0.0)
    assert outbox.dropped == {"lines": 1, "question": 1, "report": 1}
    assert [kind for _, kind, _ in emptied(outbox)] == ["news", "news"]


def test_one_that_is_too_large_for_all_the_room_is_dropped() -> None:
    outbox = Outbox(largest=10)
    outbox.put("b", news(), bytes(11), 0.0)
    assert (len(outbox), outbox.size, outbox.dropped) == (0, 0, {"news": 1})


def test_what_waits_for_one_who_left_is_forgotten() -> None:
    outbox = Outbox()
    for receiver in "bcb":
        outbox.put(receiver, lines(), b"x", 0.0)
    outbox.forget("b")
    assert [receiver for receiver, _, _ in emptied(outbox)] == ["c"]
    assert outbox.dropped == {"lines": 2}


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["news", "report", "lines", "question", "take", "back"]),
        st.integers(0, 3),
        st.binary(max_size=9),
    )
)


@given(STEPS)
def test_whatever_happens_the_account_is_right(steps: list[tuple[str, int, bytes]]) -> None:
    outbox = Outbox(largest=20)
    put, gone, replaced = 0, 0, 0
    out = None
    make = {"news": news, "report": report, "lines": lines, "question": question}
    for kind, name, body in steps:
        before = len(outbox) + outbox.dropped.total()
        if kind in make:
            outbox.put("b", make[kind](str(name)), body, 0.0)
            put += 1
            replaced += before + 1 - len(outbox) - outbox.dropped.total()
        elif kind == "take":
            out = outbox.take(0.0)
            gone += out is not None
        elif out is not None:
            outbox.put_back(out)
            back = len(outbox) + outbox.dropped.total() - before
            gone, out = gone - back, None
        assert outbox.size <= 20
        assert len(outbox) == put - gone - replaced - outbox.dropped.total()
        assert outbox.size == sum(len(letter.body) for letter in outbox._letters.values())
        assert sum(outbox._count.values()) == len(outbox)
