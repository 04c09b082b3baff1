"""A party's stores, found by its home folder: for the service, and for commands that look at what it keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fate_llm.core.errors import ConfigurationError

from ..federation import PartySettings, load_party
from ..store.engine import sqlite_url
from ..store.store import Store
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
    settings, _ = load_party(home / "party.yaml")
    state = settings.state
    if create:
        try:
            state.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"the folder {state} cannot be made: {error.strerror}") from None
    store = Store.open(settings.store or sqlite_url(state / "fate.db"), now=now, create=create)
    try:
        artifacts = ArtifactStore(_place(home, settings))
    # The boundary of opening: whatever goes wrong, no connection is left behind.
    except BaseException:
        store.close()
        raise
    return PartyStores(settings.party, store, artifacts, ModelRegistry(store, artifacts))


def _place(home: Path, settings: PartySettings) -> str | Path:
    """Where the artifacts are: a URL, or a folder that a relative path leads to from party.yaml."""
    if settings.artifacts is None:
        return settings.state / "artifacts"
    return settings.artifacts if "://" in settings.artifacts else home.absolute() / settings.artifacts
