"""Events of a job's parties: into the database, and from each party to the lead as far as its policy shows them."""

from __future__ import annotations

import json
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
_LARGEST = 64 * 1024  # characters of all of a line's fields
_PAGE = 1000  # lines that are read or counted together
_KEPT = 20_000  # lines of a job, of all its parties


class Logbook:
    """For the engine's thread only."""

    def __init__(self, hall: Hall) -> None:
        self._hall = hall
        self._stepped: dict[str, float] = {}
        self._stored: dict[str, int] = {}

    def note(self, case: Case, event: str, task: str, seconds: float, fields: Mapping[str, Any]) -> None:
        """A new line of this party."""
        if event == "step" and seconds - self._stepped.get(case.job, 0.0) < _STEPS:
            return
        if event == "step":
            self._stepped[case.job] = seconds
        elif event == "job_ended":
            self._stepped.pop(case.job, None)
        case.line += 1
        line = Line(number=case.line, seconds=seconds, event=event, task=task, fields=_plain(fields))
        case.fresh.append(line)
        self._show(case, line)

    def _show(self, case: Case, line: Line) -> None:
        if case.initiator != self._hall.me and (visible := self._visible(case, line)) is not None:
            case.shown.append(visible)

    def _visible(self, case: Case, line: Line) -> Line | None:
        """What the lead may see of a line: never a message that may quote data."""
        code = line.fields.get("code")
        if isinstance(code, str) and "message" in line.fields:
            told = error_from(code, str(line.fields["message"]), "").told_others()
            line = line.model_copy(update={"fields": {**line.fields, "message": told["message"]}})
        return self._rules().visible(line, hiding=case.hiding)

    def _rules(self) -> Show:
        try:
            return self._hall.policy().show
        except ConfigurationError:  # said when it matters; until it is mended, nothing is shown
            return Show()

    def _forget_old(self, case: Case, count: int) -> None:
        """No job fills the disk with lines, whoever sends them."""
        self._stored[case.job] = self._stored.get(case.job, 0) + count
        if self._stored[case.job] >= _PAGE:
            del self._stored[case.job]
            self._hall.store.prune_lines(case.job, _KEPT)

    # --- at a party ---

    def tick(self, case: Case, now: float) -> None:
        """Store what is new, and send what the lead lacks."""
        if case.fresh:
            self._hall.store.append_lines(case.job, self._hall.me, case.fresh)
            self._forget_old(case, len(case.fresh))
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
        if case.reported is None and case.line:  # the service was started again: what was not reported, anew
            self._show_again(case, number)
        case.reported = max(case.reported or 0, number)
        while case.shown and case.shown[0].number <= case.reported:
            case.shown.popleft()

    def _show_again(self, case: Case, number: int) -> None:
        """The stored lines after `number`, before those that have come since the start."""
        first = case.shown[0].number if case.shown else case.line + 1
        shown: deque[Line] = deque(maxlen=case.shown.maxlen)
        page = self._hall.store.lines(case.job, party=self._hall.me, limit=_PAGE)
        while page:
            visible = [self._visible(case, line) for _, _, line in page if number < line.number < first]
            shown.extend(line for line in visible if line is not None)
            whole = len(page) == _PAGE
            page = (
                self._hall.store.lines(case.job, after=page[-1][0], party=self._hall.me, limit=_PAGE) if whole else []
            )
        shown.extend(case.shown)
        case.shown = shown

    # --- at the lead ---

    def came(self, case: Case, sender: str, word: Lines) -> None:
        """Lines of another party. After a gap they wait until what is missing has come."""
        known = self.heard_of(case, sender)
        if word.digest != case.signed.digest or sender not in case.spec.members or word.after > known:
            return
        lines = sorted((_bounded(line) for line in word.lines), key=lambda line: line.number)
        self._hall.store.append_lines(case.job, sender, lines)
        self._forget_old(case, len(lines))
        case.came[sender] = max(known, lines[-1].number if lines else 0)
        self._hall.news.tell()

    def heard_of(self, case: Case, party: str) -> int:
        """Up to where the lines of a party have come."""
        if party not in case.came:
            case.came[party] = self._hall.store.last_line(case.job, party)
        return case.came[party]


def _bounded(line: Line) -> Line:
    """A line of a partner as large as ours are, or without its fields."""
    size = len(json.dumps(line.fields, default=str))
    return line if size <= _LARGEST else line.model_copy(update={"fields": {"left_out": f"{size} characters"}})


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Values that fit into a word: texts are cut, at most a hundred of them."""
    cut = {key[:100]: value[:_LONGEST] if isinstance(value, str) else value for key, value in fields.items()}
    return dict(list(cut.items())[:100])
