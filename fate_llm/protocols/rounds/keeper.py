"""What one side of the rounds writes down when a round is finished, and takes up again after its process was killed.

A commit is the round's state, what the side must know of the conversation, how far it had said and heard, and every
object that is `Kept`. What was consumed for the round is acknowledged after the commit is on disk, never before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fate_llm.core.errors import InternalError
from fate_llm.core.interfaces import Kept, RoundJournal, Saved, UpdateHook
from fate_llm.core.names import is_name
from fate_llm.core.values import Arrays

from ..channel import JobChannel
from ..ledger import Account

__all__ = ["JOINED", "Keeper", "kept_objects"]

JOINED = "joined"  # a field of a contributor's commit before its first round
_OF_HOOKS = "hook-"


class Keeper:
    """The journal of one side of one conversation. Without a journal nothing is written, nor acknowledged, here."""

    def __init__(
        self,
        channel: JobChannel,
        conversation: str,
        account: Account | None,
        journal: RoundJournal | None,
        kept: Mapping[str, Kept],
    ) -> None:
        self._channel, self._conversation, self._account, self._journal = channel, conversation, account, journal
        self._kept = kept
        self._mark = 0

    @property
    def journals(self) -> bool:
        return self._journal is not None

    def open(self) -> Saved | None:
        """The rounds of the conversation begin: the last one committed, with all that is kept restored, or None."""
        if self._account is not None:
            self._mark = self._account.mark()
        saved = None if self._journal is None else self._journal.load()
        if saved is None:
            return None
        if not saved.fields.get(JOINED):
            self._restore(saved)
        if self._account is not None:
            self._channel.resume(self._account, saved.positions)
            if not self._inside:
                self._account.used = Counter(saved.fields.get("used", {}))
        return saved

    def _restore(self, saved: Saved) -> None:
        lacking = sorted(self._kept.keys() - saved.keep.keys())
        if lacking:
            raise InternalError(f"the journal of {self._conversation} has nothing of {', '.join(lacking)}")
        for name, thing in self._kept.items():
            thing.restore(saved.keep[name])

    def commit(self, number: int, fields: Mapping[str, Any], state: Arrays) -> None:
        """Round `number` is finished: on disk when this returns, and what was consumed for it is acknowledged.

        With the field `JOINED` nothing is kept besides: the first round has not begun.
        """
        if self._journal is None:
            return
        kept = {} if fields.get(JOINED) else self._kept
        if self._account is None:
            self._journal.commit(number, fields, state, {}, kept)
            return
        used = {} if self._inside else {"used": dict(self._account.used)}
        positions = self._account.positions(self._conversation)
        self._journal.commit(number, {**fields, **used}, state, positions, kept)
        self._channel.acknowledge(self._account, self._mark)

    @property
    def _inside(self) -> bool:
        """A sum inside a task does not speak for the task."""
        return "/" in self._conversation


def kept_objects(keep: Mapping[str, Kept], hooks: Sequence[UpdateHook]) -> dict[str, Kept]:
    """All that is kept, by name: what the component names, and every hook that is `Kept`. hooks: in their order.

    Raises:
        InternalError: a name that cannot be a folder's, or belongs to hooks.
    """
    for name in keep:
        if not is_name(name) or name.startswith(_OF_HOOKS):
            raise InternalError(f"nothing can be kept as {name!r}: small letters, digits, - _ . and not {_OF_HOOKS}...")
    found = {
        f"{_OF_HOOKS}{index}-{type(hook).__name__.lower()}": hook
        for index, hook in enumerate(hooks)
        if isinstance(hook, Kept)
    }
    return {**keep, **found}
