"""What a worker puts on record: every message before it leaves, every message that came, who was counted in a round."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fate_llm.protocols.channel import Passed
from fate_llm.security.identity import Identity

from ..events import Event
from .audit import AuditLog
from .transcript import Transcript

__all__ = ["Recorder"]

_SETTLED = frozenset({"round_state", "round_closed", "task_finished"})


class Recorder:
    """One worker's access to its party's audit log and to the job's transcript.

    folder: of the audit log. transcript: file of the job. now: seconds since the epoch.

    Raises:
        FederationError: a disk takes nothing; no message leaves without its line.
    """

    def __init__(
        self,
        folder: Path,
        transcript: Path,
        *,
        identity: Identity,
        party: str,
        job: str,
        attempt: int,
        now: Callable[[], float],
    ) -> None:
        self._job = job
        self._audit = AuditLog.open(folder, identity, party, now)
        try:
            self._transcript = Transcript(transcript, attempt=attempt)
        # The boundary of opening: whatever goes wrong, nothing stays locked.
        except BaseException:
            self._audit.close()
            raise

    def passed(self, passed: Passed) -> None:
        """A message is about to leave, or has come. Raising stops one that is about to leave."""
        self._transcript.note(passed)
        if passed.direction == "sent":
            self._audit.left(self._job, passed)

    def heed(self, event: Event) -> None:
        """An event of the worker. What came is on disk before the round that it belonged to is acknowledged."""
        self._transcript.heed(event.kind, event.task, event.fields)
        if event.kind in _SETTLED:
            self._transcript.sync()

    def close(self) -> None:
        """Closing twice is fine."""
        self._transcript.close()
        self._audit.close()
