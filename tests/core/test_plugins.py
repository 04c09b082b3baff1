"""The folder is the registry."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from fate_llm.core import plugins
from fate_llm.core.errors import InternalError, UnknownPlugin


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A kind of plug-in of its own, with an empty folder."""
    package = tmp_path / "some_plugins"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(plugins.KINDS, "thing", "some_plugins")
    forget()
    yield package
    forget()
    for name in [n for n in sys.modules if n.split(".")[0] == "some_plugins"]:
        del sys.modules[name]


def forget() -> None:
    plugins._in_folder.cache_clear()
    plugins._installed.cache_clear()


def test_a_file_is_enough(folder: Path) -> None:
    (folder / "median.py").write_text("PLUGIN = 'the median'\n")
    (folder / "_private.py").write_text("raise RuntimeError\n")
    (folder / "helpers").mkdir()
    (folder / "helpers" / "__init__.py").write_text("raise RuntimeError\n")
    assert plugins.names("thing") == ["median"]
    assert plugins.load("thing", "median") == "the median"


def test_listing_imports_nothing(folder: Path) -> None:
    (folder / "broken.py").write_text("raise RuntimeError('imported')\n")
    assert plugins.names("thing") == ["broken"]
    assert "some_plugins.broken" not in sys.modules


def test_an_unknown_name_is_an_error_with_the_nearest(folder: Path) -> None:
    (folder / "median.py").write_text("PLUGIN = 1\n")
    with pytest.raises(UnknownPlugin, match="no thing is called 'meidan'") as caught:
        plugins.load("thing", "meidan")
    assert caught.value.hint == "did you mean 'median'?"


@pytest.mark.parametrize("path", ["os.system", "os", "some_plugins.median", ".median", "..core", "median.PLUGIN", ""])
def test_a_path_is_never_imported(folder: Path, path: str) -> None:
    (folder / "median.py").write_text("PLUGIN = 1\n")
    with pytest.raises(UnknownPlugin):
        plugins.load("thing", path)


def test_an_installed_entry_point_is_found_but_takes_no_name_of_ours(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "median.py").write_text("PLUGIN = 'ours'\n")
    points = [
        metadata.EntryPoint("theirs", "json:dumps", "fate_llm.things"),
        metadata.EntryPoint("median", "json:loads", "fate_llm.things"),
    ]
    monkeypatch.setattr(metadata, "entry_points", lambda *, group: points if group == "fate_llm.things" else [])
    assert plugins.names("thing") == ["median", "theirs"]
    assert plugins.load("thing", "median") == "ours"
    assert plugins.load("thing", "theirs").__name__ == "dumps"


def test_an_unknown_kind_is_a_bug_of_ours() -> None:
    with pytest.raises(InternalError):
        plugins.names("nonsense")


@pytest.mark.parametrize("kind", sorted(plugins.KINDS))
def test_every_file_of_ours_has_its_plugin(kind: str) -> None:
    names = plugins.names(kind)
    assert names, f"no {kind} found"
    for name in names:
        assert plugins.load(kind, name) is not None
