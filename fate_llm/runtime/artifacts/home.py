"""A party's stores, found by its home folder: for the service, and for commands that look at what it keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..store.store import Store
from ..trust.home import open_home
from .models import ModelRegistry
from .store import ArtifactStore

__all__ = ["PartyStores", "open_stores"]


@dataclass(frozen=True)
class PartyStores:
    """What is open of one party. Close it at the end."""

    party: str
    store: Store
    artifacts: ArtifactStore
    models: ModelRegistry

    def close(self) -> None:
        """Close the database."""
        self.store.close()


def open_stores(home: Path, *, now: Callable[[], float], create: bool = False) -> PartyStores:
    """Open the database and the artifacts that HOME/party.yaml names; by default both lie in its `state` folder.

    create: make a database in a file that is not there; only the service does.

    Raises:
        ConfigurationError: party.yaml or what it names is not there or wrong. MissingExtra: a driver or plug-in is not
            installed. StoreLost: the database or the place of the artifacts cannot be used.
    """
    found = open_home(home)
    if create:
        found.make_state()
    store = Store.open(found.store_url, now=now, create=create)
    try:
        artifacts = ArtifactStore(found.artifacts_url)
    # The boundary of opening: whatever goes wrong, no connection is left behind.
    except BaseException:
        store.close()
        raise
    return PartyStores(found.party, store, artifacts, ModelRegistry(store, artifacts))
