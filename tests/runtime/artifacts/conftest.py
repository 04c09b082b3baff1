"""Artifact stores on disk and in an fsspec file system that is not the disk, and folders to put into them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from fate_llm.runtime.artifacts.store import ArtifactStore

MakeFolder = Callable[..., Path]

_NAMES = itertools.count()


@pytest.fixture(params=["disk", "file", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where the artifacts are: a folder, the same as a URL, and a file system of fsspec's."""
    if request.param == "disk":
        yield str(tmp_path / "artifacts")
    elif request.param == "file":
        yield f"file://{tmp_path}/artifacts"
    else:
        name = f"/test-{next(_NAMES)}"
        yield f"memory:/{name}"
        memory = fsspec.filesystem("memory")
        if memory.exists(name):
            memory.rm(name, recursive=True)


@pytest.fixture
def artifacts(place: str) -> ArtifactStore:
    return ArtifactStore(place)


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """A folder of the files given: text by relative name."""

    def make(name: str = "out", **files: str) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for relative, content in files.items():
            path = folder / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return folder

    return make


@pytest.fixture
def make_model(make_folder: MakeFolder) -> MakeFolder:
    """What a trainer writes, as far as the registry looks at it."""

    def make(name: str = "model", *, weights: str = "weights", kind: str = "adapter", **about: Any) -> Path:
        said = {"format": 1, "kind": kind, "base": {"hub": "acme/tiny"}, "base_path": "somewhere", **about}
        main = "adapter_config.json" if kind == "adapter" else "config.json"
        files = {"fate_model.json": json.dumps(said), main: "{}", "weights.safetensors": weights}
        return make_folder(name, **files)

    return make


def everything_in(place: str) -> dict[str, bytes]:
    """All files of a place by path, read behind the store's back."""
    system, root = fsspec.url_to_fs(place)
    if not system.exists(root):
        return {}
    return {path.removeprefix(root): system.cat_file(path) for path in system.find(root)}
