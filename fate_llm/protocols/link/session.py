"""What a restarted process needs to go on in the same attempt: the agreement's secrets, sealed, and its epoch."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

from fate_llm.security.agreement import Agreement
from fate_llm.security.identity import Identity, PublicIdentity
from fate_llm.security.sealing import open_at_rest, seal_at_rest

__all__ = ["Session"]

_EPOCH = struct.Struct(">Q")


class Session:
    """The agreement of one party in one attempt. epoch: 1 for the first process, one more for each that goes on.

    first_epoch: of the agreement (not of the keys), when there is none to go on with: it grows with each new start.

    The file is replaced whole and is on disk before this returns: an epoch is never used twice, because a counter that
    starts again under the same epoch would meet its old nonces.

    Raises:
        BadSeal: the file is another job's, or not this party's.
    """

    def __init__(
        self,
        path: Path,
        *,
        me: str,
        identity: Identity,
        roster: Mapping[str, PublicIdentity],
        context: bytes,
        first_epoch: Callable[[], int],
    ) -> None:
        self._path = path
        self._key = identity.storage_key("link session")
        self._label = context
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            content = open_at_rest(self._key, path.read_bytes(), label=context)
            self.epoch = _EPOCH.unpack_from(content)[0] + 1
            state = content[_EPOCH.size :]
            self.agreement = Agreement.from_bytes(state, me=me, identity=identity, roster=roster, context=context)
        else:
            self.epoch = 1
            epoch = first_epoch()
            self.agreement = Agreement(me=me, identity=identity, roster=roster, context=context, epoch=epoch)
        self.save()

    def save(self) -> None:
        """Write down what has been agreed since."""
        sealed = seal_at_rest(self._key, _EPOCH.pack(self.epoch) + self.agreement.to_bytes(), label=self._label)
        partial = self._path.with_suffix(".partial")
        file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(file, sealed)
            os.fsync(file)
        finally:
            os.close(file)
        os.replace(partial, self._path)

    def remove(self) -> None:
        """The attempt is over: its keys are not needed any more."""
        self._path.unlink(missing_ok=True)
