"""The journal of rounds: old or new, never half, whatever ends the process in between."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fate_llm.core.errors import DataError, FederationError
from fate_llm.core.interfaces import Saved
from fate_llm.runtime.journal import RoundFolder, has_rounds, journal_folder, replace_json, sync_tree


class Note:
    """Something kept: a text in a folder of its own."""

    def __init__(self, text: str = "") -> None:
        self.text = text

    def save(self, folder: Path) -> None:
        assert not list(folder.iterdir())
        (folder / "deep").mkdir()
        (folder / "deep" / "text").write_text(self.text)

    def restore(self, folder: Path) -> None:
        self.text = (folder / "deep" / "text").read_text()


def commit(journal: RoundFolder, number: int) -> None:
    state = {"w": np.full(3, number, np.float32)}
    journal.commit(number, {"n": number}, state, {"heard": [number]}, {"note": Note(f"of {number}")})


def number_of(saved: Saved | None) -> int:
    """The round, after a look at all of it."""
    assert saved is not None
    assert saved.fields == {"n": saved.number}
    assert saved.tensors["w"].tolist() == [saved.number] * 3
    note = Note()
    note.restore(saved.keep["note"])
    assert note.text == f"of {saved.number}"
    return saved.number


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return journal_folder(tmp_path, "tune", "contributor")


@pytest.fixture
def journal(folder: Path) -> RoundFolder:
    return RoundFolder(folder, attempt=1)


def rounds(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_without_a_commit_there_is_nothing(journal: RoundFolder, folder: Path) -> None:
    assert journal.load() is None
    assert not folder.exists(), "looking makes no folder"


def test_the_last_commit_is_found_and_the_one_before_stays(journal: RoundFolder, folder: Path) -> None:
    for number in (0, 1, 2, 5):
        commit(journal, number)
    assert number_of(RoundFolder(folder, attempt=1).load()) == 5
    assert rounds(folder) == ["current", "round-00002", "round-00005"]


def test_rounds_are_ordered_by_number_however_many(journal: RoundFolder, folder: Path) -> None:
    for number in (99_998, 99_999, 100_000):
        commit(journal, number)
    assert number_of(journal.load()) == 100_000
    assert rounds(folder) == ["current", "round-100000", "round-99999"]


def test_positions_hold_inside_an_attempt_only(journal: RoundFolder, folder: Path) -> None:
    commit(journal, 1)
    here, there = journal.load(), RoundFolder(folder, attempt=2).load()
    assert here is not None and there is not None
    assert (here.positions, there.positions) == ({"heard": [1]}, {})
    assert number_of(there) == 1


class Killed(BaseException):
    """What ends the process here."""


OPERATIONS = ("mkdir", "open", "fsync", "rename", "replace", "rmdir", "unlink", "writev")


def killing(monkeypatch: pytest.MonkeyPatch, moment: int) -> list[str]:
    """The `moment`-th operation on files ends the process before it happens; all are listed."""
    seen: list[str] = []

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **settings: Any) -> Any:
            seen.append(name)
            if len(seen) >= moment:
                raise Killed
            return call(*args, **settings)

        return operation

    for name in OPERATIONS:
        monkeypatch.setattr(os, name, counted(name, getattr(os, name)))
    return seen


def test_a_kill_between_any_two_operations_leaves_the_old_round_or_the_new_one(
    tmp_path: Path, journal: RoundFolder, folder: Path
) -> None:
    # Given two rounds on disk, and how many operations on files the third takes
    commit(journal, 1)
    commit(journal, 2)
    patches = pytest.MonkeyPatch()
    shutil.copytree(folder, tmp_path / "before")
    seen = killing(patches, 10**9)
    commit(journal, 3)
    patches.undo()
    assert {"fsync", "rename", "replace"} <= set(seen)
    found = []
    for moment in range(1, len(seen) + 1):
        # When the process is killed at each of them
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "before", folder)
        with pytest.MonkeyPatch.context() as patch:
            killing(patch, moment)
            with pytest.raises(Killed):
                commit(journal, 3)
        # Then the next one finds one of both, whole, and can go on
        after = RoundFolder(folder, attempt=1)
        found.append(number_of(after.load()))
        for number in range(found[-1] + 1, 5):
            commit(after, number)
        assert number_of(after.load()) == 4
        assert rounds(folder) == ["current", "round-00003", "round-00004"], "nothing half written stays"
    assert sorted(set(found)) == [2, 3]
    assert found == sorted(found), "once it is the new one, it stays so"


@pytest.mark.parametrize("operation", ["fsync", "rename", "replace", "writev"])
def test_a_disk_that_does_not_take_it_is_named_and_the_old_round_stays(
    journal: RoundFolder, folder: Path, operation: str
) -> None:
    commit(journal, 1)

    def full(*args: Any, **settings: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, operation, full)
        with pytest.raises(FederationError, match=r"round 2 cannot be written .*No space left") as caught:
            commit(journal, 2)
    assert str(folder) in caught.value.message
    assert number_of(journal.load()) == 1
    commit(journal, 2)
    assert number_of(journal.load()) == 2


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("state.safetensors", b""),
        ("state.safetensors", None),
        ("meta.json", b"{"),
        ("meta.json", b"[]"),
        ("meta.json", b'{"version": 9}'),
        ("keep/note/deep/text", b"of"),
        ("keep/note/deep/text", None),
    ],
)
def test_a_disk_that_lost_what_it_had_confirmed_is_found_out(
    journal: RoundFolder, folder: Path, file: str, content: bytes | None
) -> None:
    commit(journal, 1)
    path = folder / "round-00001" / file
    path.write_bytes(content) if content is not None else path.unlink()
    with pytest.raises(DataError, match=r"round-00001 is damaged: "):
        journal.load()


def test_a_state_changed_inside_is_found_out(journal: RoundFolder, folder: Path) -> None:
    commit(journal, 1)
    path = folder / "round-00001" / "state.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(DataError, match="damaged"):
        journal.load()


def test_conversations_have_folders_of_their_own(tmp_path: Path) -> None:
    names = ["tune", "tune#2", "tune/final/1", "tune/../x/1", "tune/" + "long" * 100 + "/1", "tune.coordinator"]
    paths = {journal_folder(tmp_path, name, side) for name in names for side in ("contributor", "coordinator")}
    assert len(paths) == 2 * len(names)
    assert all(path.parent == tmp_path / "journal" and len(path.name) < 255 for path in paths)


@pytest.mark.parametrize("conversation", ["tune", "tune#2", "tune/final/1", "tune/" + "long" * 100 + "/1"])
def test_a_task_has_rounds_once_one_of_its_conversations_has_finished_one(tmp_path: Path, conversation: str) -> None:
    journal = RoundFolder(journal_folder(tmp_path, conversation, "coordinator"), attempt=1)
    assert not has_rounds(tmp_path, "tune")
    commit(journal, 0)
    assert not has_rounds(tmp_path, "tune"), "the first round has not begun"
    commit(journal, 1)
    assert has_rounds(tmp_path, "tune")
    assert not has_rounds(tmp_path, "tun")


def test_json_is_replaced_whole_and_the_owner_s(tmp_path: Path) -> None:
    path = tmp_path / "note.json"
    replace_json(path, {"n": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(OSError, match="Input/output"):
            replace_json(path, {"n": 2})
    assert json.loads(path.read_text()) == {"n": 1}
    assert path.stat().st_mode & 0o777 == 0o600


def test_everything_below_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    files = [tmp_path / "a" / "one", tmp_path / "a" / "b" / "two"]
    for file in files:
        file.write_text("x")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "nowhere")
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
    sync_tree(tmp_path / "a")
    assert set(synced) == {str(path) for path in (*files, tmp_path / "a", tmp_path / "a" / "b")}
    synced.clear()
    sync_tree(files[0])
    assert synced == [str(files[0]), str(tmp_path / "a")]
