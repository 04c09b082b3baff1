"""All that a party's service works with, opened together and closed together."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from fate_llm.core.errors import ConfigurationError
from fate_llm.security.identity import Identity

from ..artifacts.models import ModelRegistry
from ..artifacts.store import ArtifactStore
from ..federation import Federation, load_federation
from ..record.audit import AuditLog
from ..store.store import Store
from ..trust.catalog import Catalog, FingerprintCache
from ..trust.home import Home
from ..trust.policy_schema import Policy
from .clerk import Clerk
from .post import Post
from .workers import Over, Said, Workers

__all__ = ["Fresh", "Hall", "News", "Roster", "open_hall"]

Put = Callable[[Callable[[], None]], None]


class News:
    """Wakes whoever waits for something new to show."""

    def __init__(self) -> None:
        self.version = 0
        self._changed = threading.Condition()

    def tell(self) -> None:
        with self._changed:
            self.version += 1
            self._changed.notify_all()

    def wait(self, version: int, timeout: float) -> None:
        """Return when there is something newer than `version`, or after `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self.version > version, timeout)


Read = TypeVar("Read")


def _look(path: Path | None) -> tuple[int, int, int]:
    """Another value whenever the file has been written."""
    try:
        found = None if path is None else path.stat()
    except OSError:
        found = None
    return (0, 0, 0) if found is None else (found.st_mtime_ns, found.st_size, found.st_ino)


class Fresh(Generic[Read]):
    """What a file says, read again only when it was written: policy and catalogue change while the service runs."""

    def __init__(self, path: Path | None, read: Callable[[], Read]) -> None:
        self._path, self._read = path, read
        self._known: tuple[tuple[int, int, int], Read] | None = None

    def __call__(self) -> Read:
        """Raises what reading raises, each time."""
        stamp = _look(self._path)
        if self._known is None or self._known[0] != stamp:
            self._known = None
            self._known = (stamp, self._read())
        return self._known[1]


class Roster:
    """The federation as its file says now: a partner may be added while the service runs."""

    def __init__(self, path: Path, present: Federation) -> None:
        self.present = present
        self._path = path
        self._stamp = _look(path)

    def renew(self) -> bool:
        """Read the file again when it has changed; whether the roster is another now.

        Raises:
            ConfigurationError: it cannot be read, or is wrong; the roster stays as it was.
        """
        stamp = _look(self._path)
        if stamp == self._stamp:
            return False
        self._stamp = stamp
        found = load_federation(self._path)
        changed, self.present = found != self.present, found
        return changed


@dataclass(frozen=True, slots=True)
class Hall:
    """put: hands a call to the engine's thread. say: a line for the operator's log; nothing private."""

    home: Home
    me: str
    identity: Identity
    roster: Roster
    store: Store
    post: Post
    workers: Workers
    audit: AuditLog
    artifacts: ArtifactStore
    models: ModelRegistry
    clerk: Clerk
    fingerprints: FingerprintCache
    now: Callable[[], float]
    say: Callable[[str], None]
    news: News
    policy: Fresh[Policy]
    catalog: Fresh[Catalog]
    _undo: contextlib.ExitStack = field(repr=False)

    @property
    def jobs(self) -> Path:
        """The folder of all jobs' folders."""
        return self.home.state / "jobs"

    def close(self) -> None:
        """Close all, the last opened first. Closing twice is fine."""
        self._undo.close()


def open_hall(
    home: Home,
    *,
    now: Callable[[], float],
    put: Put,
    said: Callable[[Said | Over], None],
    say: Callable[[str], None],
) -> Hall:
    """Open everything of a home.

    Raises:
        ConfigurationError, StoreLost, FederationError: something of it cannot be used; nothing stays open then.
    """
    state = home.make_state()
    (state / "jobs").mkdir(mode=0o700, exist_ok=True)
    identity, sealing = home.identity(), home.sealing()
    if home.settings.api.token is None:
        raise ConfigurationError(
            f"{home.folder / 'party.yaml'} names no token file of the API",
            hint="api: {token: api.token}, a file of mode 0600 with one long random line.",
        )
    with contextlib.ExitStack() as undo:
        store = Store.open(home.store_url, now=now)
        undo.callback(store.close)
        audit = AuditLog.open(state / "audit", identity, home.party, now)
        undo.callback(audit.close)
        artifacts = ArtifactStore(home.artifacts_url)
        models = ModelRegistry(store, artifacts)
        clerk = Clerk(artifacts, put=put, say=say)
        undo.callback(clerk.close)

        def observe(event: str, fields: Mapping[str, Any]) -> None:
            say(f"post: {event} " + " ".join(f"{key}={value}" for key, value in fields.items()))

        epoch = store.next_epoch(time.time_ns())
        post = Post(home.settings, home.federation, identity, sealing, store, epoch, time.time_ns, observe)
        undo.callback(post.close)
        workers = Workers(said)
        undo.callback(workers.close)
        return Hall(
            home,
            home.party,
            identity,
            Roster(home.settings.federation, home.federation),
            store,
            post,
            workers,
            audit,
            artifacts,
            models,
            clerk,
            FingerprintCache(state / "fingerprints.json"),
            now,
            say,
            News(),
            Fresh(home.settings.policy, home.policy),
            Fresh(home.settings.catalog, home.catalog),
            undo.pop_all(),
        )
