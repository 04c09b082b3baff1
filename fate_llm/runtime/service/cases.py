"""One job at this party: what was signed, the machines, and how far its tasks are."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fate_llm.core.values import SumFloor
from fate_llm.pipelines.schema import PipelineSpec
from fate_llm.pipelines.sums import hiding_tasks

from ..jobfolder import JobFolder, PartyFolder, write_json
from ..trust.jobspec import SignedSpecification
from ..trust.policy_schema import PROTECTIONS
from .lead import LeadMachine
from .part import PartMachine
from .track import Track
from .words import Ending, Line, PartView

__all__ = ["Accepted", "Case"]

_RESENT = 400  # lines of a party that are kept for being sent again
_ACCEPTED = "accepted.json"
_ENDED = "ended.json"


@dataclass(frozen=True, slots=True)
class Accepted:
    """Under what this party's policy let the job in. opens: names of the catalogue that it may open.

    policy: digest. not_before: seconds since 1970 before which it does not start. hours: that it may take, None for
    any. judged: when that was said, seconds since 1970. floor: the weakest protection that a sum may have. sum_floor:
    what it asks of sums that hide terms.
    """

    opens: tuple[str, ...] = ()
    policy: str = ""
    not_before: float = 0.0
    hours: float | None = None
    judged: float = 0.0
    floor: str = PROTECTIONS[-1]
    sum_floor: SumFloor = field(default_factory=SumFloor)


@dataclass(slots=True)
class Case:
    """part: this party's machine. lead: the job's, where this party is its guest.

    line: number of this party's last line. fresh: lines that are not in the database yet. shown: lines that the lead
    may see, and that it has not reported. reported: up to where it has them, None before it has said so. sent: the last
    one sent to it. came: at the lead, by party, the number up to which its lines have come without a gap.

    ending: how it ended for good. tidied, concluded: when all was done that is to be done at the end, by our part and
    by the lead; None before. unsure: an event was stopped half-way by an error, so that the database may know less than
    `part` or `lead`, or what they asked for was not done.
    """

    signed: SignedSpecification
    spec: PipelineSpec
    folder: JobFolder
    party: str
    part: PartMachine
    track: Track
    created: float
    lead: LeadMachine | None = None
    parts: Mapping[str, PartView] = field(default_factory=dict)
    line: int = 0
    fresh: list[Line] = field(default_factory=list)
    shown: deque[Line] = field(default_factory=lambda: deque(maxlen=_RESENT))
    reported: int | None = None
    sent: int = 0
    sent_at: float = 0.0
    came: dict[str, int] = field(default_factory=dict)
    ending: Ending | None = None
    tidied: float | None = None
    concluded: float | None = None
    unsure: bool = False
    waiting_since: float | None = None
    started: float | None = None
    _hiding: frozenset[str] | None = None

    @property
    def hiding(self) -> frozenset[str]:
        """The tasks whose sums hide their terms."""
        if self._hiding is None:
            self._hiding = hiding_tasks(self.spec)
        return self._hiding

    @property
    def job(self) -> str:
        return self.signed.specification.job

    @property
    def initiator(self) -> str:
        return self.signed.specification.initiator

    @property
    def own(self) -> PartyFolder:
        """This party's part of the job's folder."""
        return self.folder.party(self.party)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that this party takes part in."""
        return tuple(task for task in self.spec.tasks if self.party in self.spec.parties_of(task))

    @property
    def reused(self) -> tuple[str, ...]:
        """Tasks whose outputs of an earlier job are taken over."""
        reuse = self.signed.specification.reuse
        return () if reuse is None else reuse.tasks

    @property
    def transcript(self) -> Path:
        return self.own.path / "transcript.jsonl"

    @property
    def dossier_file(self) -> Path:
        return self.folder.path / "dossier.json"

    def accepted(self) -> Accepted:
        """What the policy said when it last let the job in; nothing may be opened before."""
        try:
            found = json.loads((self.folder.path / _ACCEPTED).read_text())
        except (OSError, ValueError):
            return Accepted()
        more = (found["hours"], found.get("judged", 0.0), found.get("floor", PROTECTIONS[-1]))
        sum_floor = SumFloor(**found.get("sum_floor", {}))
        return Accepted(tuple(found["opens"]), found["policy"], found["not_before"], *more, sum_floor)

    def accept(self, found: Accepted) -> None:
        """Note what the policy said."""
        write_json(self.folder.path / _ACCEPTED, asdict(found))

    @property
    def over(self) -> bool:
        """Nothing is to be done any more, by anybody here."""
        return self.part.over and self.tidied is not None and (self.lead is None or self.concluded is not None)

    def keep_ending(self, ending: Ending) -> None:
        """Note how it ended, and what every party said of its part."""
        self.ending = ending.model_copy(update={"dossier": None})
        parts = {party: view.model_dump(mode="json") for party, view in self.parts.items()}
        write_json(self.folder.path / _ENDED, {"ending": self.ending.model_dump(mode="json"), "parts": parts})

    def load_ending(self) -> None:
        """What `keep_ending` noted, if the job had ended."""
        try:
            found = json.loads((self.folder.path / _ENDED).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        self.ending = Ending.model_validate(found["ending"])
        self.parts = {party: PartView.model_validate(view) for party, view in found["parts"].items()}
