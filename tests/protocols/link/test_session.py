"""What survives of the agreement: an epoch is used once, by one process, whatever fails in between."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fate_llm.core.errors import BadSeal, ConfigurationError, FederationError
from fate_llm.protocols.link.session import Session
from fate_llm.security.identity import Identity

A, B = Identity(bytes([1]) * 32), Identity(bytes([2]) * 32)
ROSTER = {"a": A.public, "b": B.public}


def session(folder: Path, **settings: Any) -> Session:
    known: dict[str, Any] = {
        "me": "a",
        "identity": A,
        "roster": ROSTER,
        "context": b"job 1",
        "first_epoch": lambda: 77,
    }
    return Session(folder / "session", **{**known, **settings})


def test_each_process_has_an_epoch_of_its_own_and_the_agreement_stays(tmp_path: Path) -> None:
    first = session(tmp_path)
    hello = first.agreement.hello("b")
    assert (first.epoch, first.agreement.epoch) == (1, 77)
    first.close()
    for epoch in (2, 3):
        again = session(tmp_path, first_epoch=lambda: 99)
        assert (again.epoch, again.agreement.epoch) == (epoch, 77)
        assert again.agreement.hello("b") == hello
        again.close()


def test_what_was_agreed_and_saved_is_there_again(tmp_path: Path) -> None:
    a, b = session(tmp_path / "a"), session(tmp_path / "b", me="b", identity=B)
    (reply,) = a.agreement.hear("b", b.agreement.hello("a"))
    a.save()
    b.agreement.hear("a", reply)
    a.close()
    again = session(tmp_path / "a")
    secret, other = again.agreement.secret("b"), b.agreement.secret("a")
    assert secret is not None
    assert other is not None
    assert secret.key == other.key
    again.close()
    b.close()


def test_the_file_is_for_its_owner_and_shows_no_key(tmp_path: Path) -> None:
    one = session(tmp_path)
    path = tmp_path / "session"
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()} == {0o600}
    assert one.agreement._pairs["b"].secrets[:16] not in path.read_bytes()
    assert one.agreement._pairs["b"].mine[:16] not in path.read_bytes()
    one.close()


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"context": b"job 2"}, BadSeal),
        ({"me": "b", "identity": B}, BadSeal),
        ({"identity": B, "roster": {"a": B.public, "b": A.public}}, BadSeal),
        ({"roster": {"a": A.public, "c": B.public}}, ConfigurationError),
    ],
)
def test_a_session_of_another_job_or_party_is_refused_and_the_lock_let_go(
    tmp_path: Path, settings: dict[str, Any], error: type[Exception]
) -> None:
    session(tmp_path).close()
    before = (tmp_path / "session").read_bytes()
    with pytest.raises(error):
        session(tmp_path, **settings)
    assert (tmp_path / "session").read_bytes() == before
    session(tmp_path).close()


@pytest.mark.parametrize("at", [0, 4, 20, -1])
def test_a_changed_file_is_refused(tmp_path: Path, at: int) -> None:
    session(tmp_path).close()
    raw = bytearray((tmp_path / "session").read_bytes())
    raw[at] ^= 1
    (tmp_path / "session").write_bytes(raw)
    with pytest.raises(BadSeal):
        session(tmp_path)


def test_two_processes_on_one_folder_are_refused(tmp_path: Path) -> None:
    one = session(tmp_path)
    with pytest.raises(ConfigurationError, match="another process") as caught:
        session(tmp_path)
    assert str(tmp_path) in caught.value.message
    one.save()  # replacing the file does not give the lock away
    with pytest.raises(ConfigurationError):
        session(tmp_path)
    one.close()
    one.close()
    two = session(tmp_path)
    assert two.epoch == 2
    two.close(remove=True)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_removed_while_we_waited_for_it_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a process that opens the lock just before its owner removes it
    owner = session(tmp_path)
    real, opened = os.open, []

    def late(path: Any, *arguments: Any) -> int:
        file = real(path, *arguments)
        if str(path).endswith(".lock") and not opened:
            opened.append(file)
            owner.close(remove=True)
        return file

    monkeypatch.setattr(os, "open", late)
    late_one = session(tmp_path)
    # Then it holds the lock that a third one meets
    assert opened
    with pytest.raises(ConfigurationError):
        session(tmp_path)
    late_one.close()


def test_an_epoch_is_on_disk_before_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given every step of saving in order
    steps: list[str] = []

    def note(file: int) -> None:
        steps.append(f"sync {Path(os.readlink(f'/proc/self/fd/{file}')).name}")

    real = os.replace
    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", lambda a, b: (steps.append("replace"), real(a, b)))
    folder = tmp_path / "link"
    session(folder).close()
    # Then the content is safe before it gets its name, and the name before anything is sealed
    assert steps == ["sync session.partial", "replace", "sync link"]


def test_a_crash_while_saving_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session(tmp_path).close()
    before = (tmp_path / "session").read_bytes()

    def full(file: int, views: Sequence[memoryview]) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", full)
        with pytest.raises(FederationError, match="No space left"):
            session(tmp_path)
    assert (tmp_path / "session").read_bytes() == before
    again = session(tmp_path)
    assert again.epoch == 2
    again.close()


def test_a_partial_file_of_a_crash_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "session.partial").write_bytes(b"x" * 100_000)
    session(tmp_path).close()
    again = session(tmp_path)
    assert again.epoch == 2
    again.close(remove=True)
    assert list(tmp_path.iterdir()) == []
