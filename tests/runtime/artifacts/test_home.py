"""A party's stores are where its party.yaml says, or in its state folder."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest

from fate_llm.core.errors import ConfigurationError, MissingExtra, StoreLost
from fate_llm.runtime.artifacts import files
from fate_llm.runtime.artifacts.home import PartyStores, open_stores
from tests.runtime.artifacts.conftest import MakeFolder
from tests.runtime.artifacts.homes import make_home


def opened(home: Path, *, create: bool = True) -> PartyStores:
    return open_stores(home, now=lambda: 5.0, create=create)


def test_by_default_all_lies_in_the_state_folder(tmp_path: Path, make_folder: MakeFolder) -> None:
    home = make_home(tmp_path / "home")
    stores = opened(home)
    stores.artifacts.put(make_folder(a="b"), kind="report")
    stores.close()
    assert stores.party == "bank-a"
    assert stat.S_IMODE((home / "state").stat().st_mode) == 0o700
    assert {"fate.db", "artifacts"} <= {path.name for path in (home / "state").iterdir()}
    assert len(opened(home, create=False).artifacts.digests()) == 1


def test_party_yaml_says_where_else(tmp_path: Path) -> None:
    home = make_home(
        tmp_path / "home", store=f"sqlite:///{tmp_path}/other.db", artifacts=str(tmp_path / "kept"), state="memory"
    )
    opened(home).close()
    assert (tmp_path / "other.db").is_file()
    assert (tmp_path / "kept").is_dir()
    assert list((home / "memory").iterdir()) == []
    opened(make_home(tmp_path / "second", artifacts=f"file://{tmp_path}/by-url")).close()
    assert (tmp_path / "by-url").is_dir()


def test_who_only_looks_makes_nothing(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    before = sorted(home.rglob("*"))
    with pytest.raises(ConfigurationError, match=r"there is no database .*fate\.db") as error:
        opened(home, create=False)
    assert "party serve" in error.value.hint
    assert sorted(home.rglob("*")) == before


def test_a_folder_that_is_no_home(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"party\.yaml"):
        opened(tmp_path)
    home = make_home(tmp_path / "home")
    (home / "state").write_text("in the way")
    with pytest.raises(ConfigurationError, match="cannot be made: File exists"):
        opened(home)


def test_no_connection_is_left_when_the_artifacts_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = make_home(tmp_path / "home", artifacts="s3://bucket/x")

    def without(url: str) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(files, "url_to_fs", without)
    with pytest.raises(MissingExtra, match="s3fs"):
        opened(home)
    assert not (home / "state" / "fate.db-wal").exists()  # SQLite removes it when the last connection is closed


def test_a_database_that_is_away(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home", store="postgresql+psycopg://fate@127.0.0.1:1/fate")
    with pytest.raises(StoreLost, match=r"127\.0\.0\.1"):
        opened(home)
