"""Events of a job's parties: into the database, and from each party to the lead as far as its policy shows them."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from fate_llm.core.errors import ConfigurationError, error_from

from ..trust.policy_schema import Show
from .cases import Case
from .hall import Hall
from .words import Line, Lines

__all__ = ["Logbook"]

_RESEND = 5.0  # seconds until lines that the lead has not reported are sent again
_MOST = 200  # lines in one word
_STEPS = 2.0  # seconds between two lines of mere steps
_LONGEST = 2000  # characters of a text in a line


class Logbook:
    """For the engine's thread only."""

    def __init__(self, hall: Hall) -> None:
        self._hall = hall
        self._stepped: dict[str, float] = {}

    def note(self, case: Case, event: str, task: str, seconds: float, fields: Mapping[str, Any]) -> None:
        """A new line of this party."""
        if event == "step" and seconds - self._stepped.get(case.job, 0.0) < _STEPS:
            return
        if event == "step":
            self._stepped[case.job] = seconds
        case.line += 1
        line = Line(number=case.line, seconds=seconds, event=event, task=task, fields=_plain(fields))
        case.fresh.append(line)
        self._show(case, line)

    def _show(self, case: Case, line: Line) -> None:
        if case.initiator != self._hall.me and (visible := self._visible(line)) is not None:
            case.shown.append(visible)

    def _visible(self, line: Line) -> Line | None:
        """What the lead may see of a line: never a message that may quote data."""
        code = line.fields.get("code")
        if isinstance(code, str) and "message" in line.fields:
            told = error_from(code, str(line.fields["message"]), "").told_others()
            line = line.model_copy(update={"fields": {**line.fields, "message": told["message"]}})
        return self._rules().visible(line)

    def _rules(self) -> Show:
        try:
            return self._hall.policy().show
        except ConfigurationError:  # said when it matters; until it is mended, nothing is shown
            return Show()

    # --- at a party ---

    def tick(self, case: Case, now: float) -> None:
        """Store what is new, and send what the lead lacks."""
        if case.fresh:
            self._hall.store.append_lines(case.job, self._hall.me, case.fresh)
            case.fresh.clear()
            self._hall.news.tell()
        if case.initiator == self._hall.me or not case.shown:
            return
        if now - case.sent_at >= _RESEND:  # what was sent and not reported by now got lost
            case.sent = case.reported or 0
        unsent = [line for line in case.shown if line.number > case.sent]
        if unsent:
            lines, before = tuple(unsent[:_MOST]), [line.number for line in case.shown if line.number <= case.sent]
            after = before[-1] if before else case.reported or 0
            case.sent, case.sent_at = lines[-1].number, now
            word = Lines(job=case.job, digest=case.signed.digest, after=after, lines=lines)
            self._hall.post.send(case.initiator, word)

    def reported(self, case: Case, number: int) -> None:
        """The lead has our lines up to this number."""
        if case.initiator == self._hall.me:
            return
        if case.reported is None and not case.shown:  # the service was started again: what was not reported, anew
            found = self._hall.store.lines(case.job, party=self._hall.me, limit=5000)
            visible = [self._visible(line) for _, _, line in found if line.number > number]
            case.shown = deque((line for line in visible if line is not None), maxlen=case.shown.maxlen)
        case.reported = max(case.reported or 0, number)
        while case.shown and case.shown[0].number <= case.reported:
            case.shown.popleft()

    # --- at the lead ---

    def came(self, case: Case, sender: str, word: Lines) -> None:
        """Lines of another party. After a gap they wait until what is missing has come."""
        known = self.heard_of(case, sender)
        if word.digest != case.signed.digest or sender not in case.spec.members or word.after > known:
            return
        lines = sorted(word.lines, key=lambda line: line.number)
        self._hall.store.append_lines(case.job, sender, lines)
        case.came[sender] = max(known, lines[-1].number if lines else 0)
        self._hall.news.tell()

    def heard_of(self, case: Case, party: str) -> int:
        """Up to where the lines of a party have come."""
        if party not in case.came:
            case.came[party] = self._hall.store.last_line(case.job, party)
        return case.came[party]


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Values that fit into a word: texts are cut, at most a hundred of them."""
    cut = {key[:100]: value[:_LONGEST] if isinstance(value, str) else value for key, value in fields.items()}
    return dict(list(cut.items())[:100])
