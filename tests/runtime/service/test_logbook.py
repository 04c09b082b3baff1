"""Lines of a job: stored here, sent to the lead as far as the policy shows them, and none lost on the way."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from fate_llm.core.errors import ConfigurationError
from fate_llm.runtime.service.logbook import Logbook
from fate_llm.runtime.service.words import Line, Lines
from fate_llm.runtime.trust.policy_schema import Show

ALL = Show(logs="all", losses=True, progress=True)


@dataclass
class Book:
    """Lines of one party's database."""

    rows: dict[tuple[str, int], Line] = field(default_factory=dict)

    def append_lines(self, job: str, party: str, lines: Any) -> int:
        new = [line for line in lines if (party, line.number) not in self.rows]
        self.rows.update({(party, line.number): line for line in lines})
        return len(new)

    def last_line(self, job: str, party: str) -> int:
        return max((number for who, number in self.rows if who == party), default=0)

    def lines(self, job: str, *, party: str, limit: int) -> list[tuple[int, str, Line]]:
        found = sorted(number for who, number in self.rows if who == party)
        return [(number, party, self.rows[party, number]) for number in found][:limit]


class Side:
    """A party with its logbook; `mail` is what it has sent."""

    def __init__(self, me: str, show: Show | None = ALL, hiding: frozenset[str] = frozenset()) -> None:
        self.book, self.mail, self.told = Book(), deque[Lines](), 0
        self.me, self.show, self.hiding = me, show, hiding

        def policy() -> Any:
            if self.show is None:
                raise ConfigurationError("it is broken")
            return SimpleNamespace(show=self.show)

        def tell() -> None:
            self.told += 1

        hall: Any = SimpleNamespace(
            me=me,
            store=self.book,
            post=SimpleNamespace(send=lambda to, word: self.mail.append(word)),
            policy=policy,
            news=SimpleNamespace(tell=tell),
        )
        self.log = Logbook(hall)
        self.case = self.fresh_case()

    def fresh_case(self) -> Any:
        signed = SimpleNamespace(digest="0" * 64)
        spec = SimpleNamespace(members=("a", "b"))
        usual: dict[str, Any] = {
            "hiding": self.hiding,
            "line": 0,
            "fresh": [],
            "shown": deque(maxlen=400),
            "reported": None,
            "sent": 0,
        }
        return SimpleNamespace(job="j", initiator="a", signed=signed, spec=spec, sent_at=0.0, came={}, **usual)

    def fresh(self) -> Any:
        """The case as the service knows it after a start."""
        self.case = self.fresh_case()
        self.case.line = self.book.last_line("j", self.me)
        return self.case

    def numbers(self, party: str) -> list[int]:
        return sorted(number for who, number in self.book.rows if who == party)


def note(side: Side, count: int, *, event: str = "round", at: float = 0.0) -> None:
    for index in range(count):
        side.log.note(side.case, event, "train", at + index, {"round": index, "loss": 1.0})


def exchange(lead: Side, host: Side, now: float) -> None:
    """One exchange of all words, and the lead's report."""
    host.log.tick(host.case, now)
    while host.mail:
        lead.log.came(lead.case, "b", host.mail.popleft())
    host.log.reported(host.case, lead.log.heard_of(lead.case, "b"))


def test_lines_of_the_lead_itself_are_stored_and_not_sent() -> None:
    lead = Side("a")
    note(lead, 3)
    lead.log.tick(lead.case, 1.0)
    assert lead.numbers("a") == [1, 2, 3]
    assert not lead.mail
    assert lead.told == 1


def test_lines_of_another_party_reach_the_lead_once() -> None:
    lead, host = Side("a"), Side("b")
    for turn in range(3):
        note(host, 2)
        exchange(lead, host, 10.0 + turn)
    assert lead.numbers("b") == host.numbers("b") == [1, 2, 3, 4, 5, 6]
    assert not host.case.shown, "what was reported is forgotten"


def test_a_word_that_got_lost_is_sent_again() -> None:
    lead, host = Side("a"), Side("b")
    note(host, 2)
    host.log.tick(host.case, 10.0)
    host.mail.clear()  # lost
    note(host, 1)
    exchange(lead, host, 11.0)
    assert lead.numbers("b") == [], "after a gap nothing counts"
    exchange(lead, host, 30.0)
    assert lead.numbers("b") == [1, 2, 3]


def test_what_the_policy_hides_does_not_travel_and_leaves_no_gap() -> None:
    lead, host = Side("a"), Side("b", Show(logs=("round",)))
    note(host, 1)
    note(host, 1, event="data")
    note(host, 1)
    exchange(lead, host, 10.0)
    assert host.numbers("b") == [1, 2, 3]
    assert lead.numbers("b") == [1, 3]
    assert "loss" not in lead.book.rows["b", 1].fields


def test_no_policy_shows_a_number_of_its_own_of_a_job_that_hides_terms() -> None:
    # Given a party whose policy shows everything, in a job whose training hides its terms
    lead, host = Side("a"), Side("b", ALL, frozenset({"tune"}))
    own = {"rows": 90_210_001, "loss_tokens": 90_210_002, "skipped": 90_210_003}
    host.log.note(host.case, "data", "reader", 1.0, own)
    host.log.note(host.case, "encoded", "tune", 2.0, {"port": "train", **own})
    host.log.note(host.case, "step", "tune", 3.0, {"round": 1, "rounds": 2, "steps": 90_210_004, "loss": 90_210_005.5})
    row = {"round": 1, "rounds": 2, "loss": 2.5, "local_loss": 90_210_006.5, "tokens": 90_210_007}
    host.log.note(host.case, "round", "tune", 4.0, row)
    host.log.note(host.case, "round", "alone", 5.0, {**row, "loss": 90_210_008.5})
    host.log.note(host.case, "scored", "evaluate", 6.0, {"model": "base", "records": 90_210_009})
    host.log.note(host.case, "anything", "other", 7.0, {"text": "90210010 rows", "deep": {"n": [90_210_011]}})
    host.log.note(host.case, "party_failed", "tune", 8.0, {"code": "protection", "message": "the weight 90210012"})
    # When the lines reach the lead, and when the service was started again
    exchange(lead, host, 10.0)
    anew = Side("a")
    host.log.reported(host.fresh(), 0)
    exchange(anew, host, 20.0)
    # Then it has the totals and the state, and not one of the party's numbers
    for side in (lead, anew):
        told = {(line.event, line.task): line.fields for (who, _), line in side.book.rows.items() if who == "b"}
        assert "90210" not in str(side.book.rows)
        assert told == {
            ("round", "tune"): {"round": 1, "rounds": 2, "loss": 2.5},
            ("round", "alone"): {"round": 1, "rounds": 2},
            ("party_failed", "tune"): {"code": "protection"},
        }
    assert "90210007" in str(host.book.rows), "its own database has them"


def test_a_policy_that_cannot_be_read_shows_nothing() -> None:
    lead, host = Side("a"), Side("b", None)
    note(host, 2)
    exchange(lead, host, 10.0)
    assert lead.numbers("b") == []
    assert host.numbers("b") == [1, 2]


def test_a_service_that_was_started_again_sends_what_was_not_reported() -> None:
    lead, host = Side("a"), Side("b")
    note(host, 2)
    exchange(lead, host, 10.0)
    note(host, 3)
    host.log.tick(host.case, 11.0)
    host.mail.clear()
    # When the service dies and comes up again, knowing only its database
    host.case = host.fresh_case()
    host.case.line = host.book.last_line("j", "b")
    host.log.reported(host.case, lead.log.heard_of(lead.case, "b"))
    exchange(lead, host, 30.0)
    assert lead.numbers("b") == [1, 2, 3, 4, 5]
    note(host, 1)
    exchange(lead, host, 31.0)
    assert lead.numbers("b") == [1, 2, 3, 4, 5, 6]


def test_the_lead_started_again_knows_from_its_database() -> None:
    lead, host = Side("a"), Side("b")
    note(host, 2)
    exchange(lead, host, 10.0)
    lead.case = lead.fresh_case()
    assert lead.log.heard_of(lead.case, "b") == 2


@pytest.mark.parametrize("change", [{"digest": "1" * 64}, {"after": 5}])
def test_lines_of_another_job_or_after_a_gap_are_left(change: dict[str, Any]) -> None:
    lead = Side("a")
    word = Lines(job="j", digest="0" * 64, lines=(Line(number=6, seconds=1.0, event="x"),))
    lead.log.came(lead.case, "b", word.model_copy(update=change))
    assert lead.numbers("b") == []


def test_a_stranger_has_no_lines() -> None:
    lead = Side("a")
    word = Lines(job="j", digest="0" * 64, lines=(Line(number=1, seconds=1.0, event="x"),))
    lead.log.came(lead.case, "nobody", word)
    assert lead.book.rows == {}


def test_steps_are_thinned_and_texts_are_cut() -> None:
    side = Side("a")
    for index in range(100):
        side.log.note(side.case, "step", "train", 100.0 + index * 0.1, {"step": index})
    assert 4 <= len(side.case.fresh) <= 6
    side.log.note(side.case, "note", "", 200.0, {"text": "x" * 100_000, **{f"k{n}": n for n in range(300)}})
    last = side.case.fresh[-1]
    assert len(last.fields["text"]) == 2000
    assert len(last.fields) == 100


def test_many_lines_go_in_several_words() -> None:
    lead, host = Side("a"), Side("b")
    note(host, 350)
    host.log.tick(host.case, 10.0)
    assert len(host.mail) == 1
    exchange(lead, host, 10.5)
    exchange(lead, host, 11.0)
    assert lead.numbers("b") == list(range(1, 351))
