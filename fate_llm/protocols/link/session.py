"""What a restarted process needs to go on in the same attempt: the agreement's secrets, sealed, and its epoch."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

from fate_llm.core.errors import ConfigurationError
from fate_llm.security.agreement import Agreement
from fate_llm.security.identity import Identity, PublicIdentity
from fate_llm.security.sealing import open_at_rest, seal_at_rest

from .journal import sync_folder, unwritable, write_all

__all__ = ["Session"]

_EPOCH = struct.Struct(">Q")


class Session:
    """The agreement of one party in one attempt. epoch: 1 for the first process, one more for each that goes on.

    first_epoch: of the agreement (not of the keys), when there is none to go on with: it grows with each new start.

    The file is replaced whole and is on disk before this returns: an epoch is never used twice, because a counter that
    starts again under the same epoch would meet its old nonces.

    One process at a time: the folder is locked until `close`.

    Raises:
        BadSeal: the file is another job's, or not this party's. ConfigurationError: another process has the folder.
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
        self._lock: int | None = _locked(path.with_suffix(".lock"))
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            self._begin(me, identity, roster, first_epoch)
            undo.pop_all()

    def _begin(
        self, me: str, identity: Identity, roster: Mapping[str, PublicIdentity], first_epoch: Callable[[], int]
    ) -> None:
        path, context = self._path, self._label
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
        """Write down what has been agreed since.

        Raises:
            FederationError: the disk does not take it; the file is as it was.
        """
        sealed = seal_at_rest(self._key, _EPOCH.pack(self.epoch) + self.agreement.to_bytes(), label=self._label)
        partial = self._path.with_suffix(".partial")
        try:
            file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                write_all(file, [sealed])
                os.fsync(file)
            finally:
                os.close(file)
            os.replace(partial, self._path)
            sync_folder(self._path.parent)
        except OSError as error:
            raise unwritable(self._path.parent, error) from None

    def close(self, *, remove: bool = False) -> None:
        """Let another process have the folder. remove: the attempt is over, its keys are not needed any more."""
        lock, self._lock = self._lock, None
        if lock is None:
            return
        if remove:
            for suffix in ("", ".partial", ".lock"):
                self._path.with_suffix(suffix).unlink(missing_ok=True)
        os.close(lock)


def _locked(path: Path) -> int:
    """The lock of a folder, held until the file is closed, also by the death of the process.

    Raises:
        ConfigurationError: another process has it.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise ConfigurationError(
                f"another process works in {path.parent}: two with the same keys would give them away",
                hint="End that process first, or start a new attempt of the job.",
            ) from None
        if os.fstat(file).st_nlink:
            return file
        os.close(file)  # its last owner removed it between our opening and locking it
