"""Work of a service that takes long: copying outputs, signing statements, registering models, tidying up.

One thread, one thing after the other, so that the engine never waits for a disk. Each result goes back through `put`.
What a crash interrupts is done again when the service comes up: everything here may be done twice.
"""

from __future__ import annotations

import queue
import shutil
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fate_llm.core.errors import FateError, InternalError
from fate_llm.core.values import ArtifactKind
from fate_llm.protocols.transports.rabbitmq import BrokerAddress, delete_inboxes

from ..artifacts.store import ArtifactStore

__all__ = ["Clerk"]


class Clerk:
    """put: hands a call to the engine's thread. say: the operator's log."""

    def __init__(
        self,
        artifacts: ArtifactStore,
        *,
        put: Callable[[Callable[[], None]], None],
        say: Callable[[str], None],
    ) -> None:
        self._artifacts = artifacts
        self._put, self._say = put, say
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="clerk", daemon=True)
        self._thread.start()

    def do(
        self,
        work: Callable[[], Any],
        then: Callable[[Any], None] | None = None,
        failed: Callable[[FateError], None] | None = None,
    ) -> None:
        """Do some work here; what it returns is given to `then` in the engine's thread.

        Its errors are given to `failed` there, and without it go to the log.
        """

        def entry() -> None:
            try:
                result = work()
            # The boundary of one piece of work, when somebody waits for its end: a full disk is no silence.
            except Exception as error:
                if failed is None:
                    raise
                ours = error if isinstance(error, FateError) else InternalError(f"{type(error).__name__}: {error}")
                self._put(lambda: failed(ours))
                return
            if then is not None:
                self._put(lambda: then(result))

        self._queue.put(entry)

    def keep(
        self, outputs: Mapping[str, str], kinds: Mapping[str, ArtifactKind], then: Callable[[dict[str, str]], None]
    ) -> None:
        """Store the outputs of a task by their content; `then` is told their digests by name."""

        def work() -> dict[str, str]:
            return {name: self._artifacts.put(Path(path), kind=kinds[name]).digest for name, path in outputs.items()}

        self.do(work, then)

    def tidy(self, address: BrokerAddress, party: str, inboxes: list[str], folders: list[Path]) -> None:
        """Remove what killed workers left: their inboxes at the broker, and the journals of their links."""

        def work() -> None:
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
            for job in inboxes:
                delete_inboxes(address, [party], job)

        self.do(work)

    def close(self) -> None:
        """Finish what is waiting, and stop."""
        self._queue.put(None)
        self._thread.join(30.0)

    def _run(self) -> None:
        while (entry := self._queue.get()) is not None:
            try:
                entry()
            except FateError as error:
                self._say(f"{error.code}: {error.message}")
            # The boundary of one piece of work: the next has nothing to do with what went wrong here.
            except Exception as error:
                self._say(f"internal error: {type(error).__name__}: {error}\n{traceback.format_exc()}")
