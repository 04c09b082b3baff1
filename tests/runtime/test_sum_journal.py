"""The journal of a sum: what was said is known for ever, what is secret is gone when its round is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fate_llm.core.errors import DataError, FederationError, InternalError
from fate_llm.core.interfaces import SumJournal, SumKeep
from fate_llm.core.values import Payload
from fate_llm.runtime.journal import has_rounds, journal_folder
from fate_llm.runtime.sum_journal import SumFolder, sum_folder

KEY = bytes(range(32))
SECRET = b"the seed that nobody may see 32."


def opened(folder: Path, *, attempt: int = 1, durable: bool = True, **more: Any) -> SumFolder:
    place = {"job": "job-1", "conversation": "tune", "side": "contributor", "key": KEY}
    return SumFolder(folder, attempt=attempt, durable=durable, **{**place, **more})


def secret(name: str = "drawn", text: bytes = SECRET) -> SumKeep:
    return SumKeep(name, Payload({"seed": text.hex()}, {"raw": np.frombuffer(text, np.uint8)}), secret=True)


def vector(name: str = "masked", start: int = 0, size: int = 1000) -> SumKeep:
    words = np.arange(start, start + size, dtype=np.uint32)
    return SumKeep(name, Payload({"start": start}, {"words": words, "wide": np.zeros((2, 16), np.uint8)}))


def answered(attempt: int = 1, name: str = "answered") -> SumKeep:
    return SumKeep(name, Payload({"attempt": attempt}), lasting=True)


def names(found: Mapping[str, Payload]) -> list[str]:
    return sorted(found)


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return sum_folder(tmp_path, "tune", "contributor")


# --- What is kept ----------------------------------------------------------------------------------------


def test_looking_makes_no_folder(folder: Path) -> None:
    journal: SumJournal = opened(folder)
    assert journal.load(1) == {}
    journal.close(1)
    assert not folder.exists()


def test_the_next_process_finds_fields_and_tensors_as_they_were(folder: Path) -> None:
    # Given a secret, a vector and a note of one round
    journal = opened(folder)
    for action in (secret(), vector(start=7), answered()):
        journal.keep(3, action)
    # When another process of the attempt looks
    found = opened(folder).load(3)
    # Then all is there
    assert names(found) == ["answered", "drawn", "masked"]
    assert found["drawn"].fields == {"seed": SECRET.hex()}
    assert found["drawn"].tensors["raw"].tobytes() == SECRET
    words = found["masked"].tensors["words"]
    assert words.dtype == np.uint32
    assert np.array_equal(words, np.arange(7, 1007, dtype=np.uint32))
    assert words.flags.aligned
    assert not words.flags.writeable
    assert found["masked"].tensors["wide"].shape == (2, 16)
    assert found["answered"].fields == {"attempt": 1}


def test_rounds_and_conversations_are_apart(folder: Path, tmp_path: Path) -> None:
    opened(folder).keep(1, vector(start=1))
    opened(folder).keep(2, vector(start=2))
    assert opened(folder).load(1)["masked"].fields == {"start": 1}
    assert opened(folder).load(2)["masked"].fields == {"start": 2}
    assert opened(folder).load(0) == {}
    sides = {sum_folder(tmp_path, name, side) for name in ("t", "t/n/1", "t#2") for side in ("contributor", "holder")}
    assert len(sides) == 6
    assert all(place.name.endswith(".sums") for place in sides)
    assert journal_folder(tmp_path, "t", "contributor") not in sides


def test_what_comes_under_a_name_again_replaces_it(folder: Path) -> None:
    journal = opened(folder)
    journal.keep(1, secret(text=b"a" * 32))
    journal.keep(1, secret(text=b"b" * 32))
    journal.keep(1, answered(1))
    journal.keep(1, answered(2))
    found = opened(folder).load(1)
    assert found["drawn"].fields == {"seed": (b"b" * 32).hex()}
    assert found["answered"].fields == {"attempt": 2}
    assert len(files(folder)) == 2


def test_a_name_may_be_anything_and_stays_in_its_folder(folder: Path) -> None:
    journal = opened(folder)
    given = ["..", "a/b", "../../x", "ü ö", "%2E", ".entry", "x.partial", "x.gone"]
    for number, name in enumerate(given):
        journal.keep(1, vector(name, start=number))
    found = opened(folder).load(1)
    assert {name: payload.fields["start"] for name, payload in found.items()} == dict(zip(given, range(8), strict=True))
    assert {Path(file).parent.as_posix() for file in files(folder)} == {"attempt-1/round-00001"}


@pytest.mark.parametrize("name", ["", "x" * 201, "ü" * 40])
def test_a_name_that_cannot_be_a_file_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(InternalError, match="1 to 200 characters"):
        opened(folder).keep(1, vector(name))
    assert not folder.exists()


def test_what_lasts_is_no_secret_and_stays_what_it_is(folder: Path) -> None:
    journal = opened(folder)
    with pytest.raises(InternalError, match="secret and lasting"):
        journal.keep(1, SumKeep("x", Payload(), secret=True, lasting=True))
    journal.keep(1, answered())
    with pytest.raises(InternalError, match="replaced by what lasts only"):
        journal.keep(1, SumKeep("answered", Payload({"attempt": 9})))
    assert opened(folder).load(1)["answered"].fields == {"attempt": 1}


def test_a_journal_of_rounds_beside_it_is_not_disturbed(folder: Path, tmp_path: Path) -> None:
    opened(folder).keep(1, answered(name="current"))
    opened(folder).keep(1, vector("current"[::-1]))
    assert not has_rounds(tmp_path, "tune")


# --- Secrets ---------------------------------------------------------------------------------------------


def bytes_below(folder: Path) -> bytes:
    return b"".join((folder / file).read_bytes() for file in files(folder))


def test_a_secret_is_on_disk_sealed_only(folder: Path, tmp_path: Path) -> None:
    journal = opened(folder)
    journal.keep(1, secret())
    journal.keep(1, secret(text=b"another seed that nobody may se"))
    held = bytes_below(tmp_path)
    assert SECRET not in held
    assert SECRET.hex().encode() not in held
    assert b"another seed" not in held
    for place in folder.rglob("*"):
        assert place.stat().st_mode & 0o077 == 0, place


@pytest.mark.parametrize(
    "other",
    [{"key": bytes(32)}, {"job": "job-2"}, {"conversation": "tune/final/1"}, {"side": "holder"}],
)
def test_a_secret_opens_for_its_own_job_conversation_side_and_key_only(folder: Path, other: dict[str, Any]) -> None:
    opened(folder).keep(1, secret())
    with pytest.raises(DataError, match=r"drawn\.entry is damaged"):
        opened(folder, **other).load(1)


@pytest.mark.parametrize("kind", [secret, vector, answered])
def test_an_entry_does_not_stand_in_for_that_of_another_round_or_name(
    folder: Path, kind: Callable[..., SumKeep]
) -> None:
    action = kind()
    opened(folder).keep(1, action)
    (file,) = folder.rglob("*.entry")
    place = file.parent.with_name("round-00002")
    place.mkdir()
    shutil.copy(file, place / file.name)
    shutil.copy(file, file.with_name("other.entry"))
    with pytest.raises(DataError, match="is damaged"):
        opened(folder).load(2)
    with pytest.raises(DataError, match=r"other\.entry is damaged"):
        opened(folder).load(1)


def test_a_sealed_entry_of_another_attempt_does_not_open(folder: Path) -> None:
    opened(folder, attempt=1).keep(1, secret())
    os.rename(folder / "attempt-1", folder / "attempt-2")
    with pytest.raises(DataError, match="does not open"):
        opened(folder, attempt=2).load(1)


# --- The end of rounds and attempts ----------------------------------------------------------------------


def test_a_round_that_closes_leaves_what_lasts(folder: Path) -> None:
    journal = opened(folder)
    for number in (1, 2, 3):
        for action in (secret(), vector(start=number), answered()):
            journal.keep(number, action)
    journal.close(2)
    assert files(folder) == [
        "attempt-1/round-00003/drawn.entry",
        "attempt-1/round-00003/masked.entry",
        "lasting/round-00001/answered.entry",
        "lasting/round-00002/answered.entry",
        "lasting/round-00003/answered.entry",
    ]
    assert names(journal.load(2)) == ["answered"]
    assert names(journal.load(3)) == ["answered", "drawn", "masked"]
    journal.close(2)
    journal.keep(2, vector(start=9))  # a round that closes is not shut for ever
    assert names(opened(folder).load(2)) == ["answered", "masked"]


def test_what_is_erased_is_overwritten_before_it_goes(folder: Path, tmp_path: Path) -> None:
    # Given a second name for each file, through which its place on disk stays readable
    journal = opened(folder)
    journal.keep(1, secret())
    journal.keep(1, vector(size=600_000))  # more than one block
    links = []
    for number, file in enumerate(sorted(folder.rglob("*.entry"))):
        links.append(tmp_path / f"link-{number}")
        os.link(file, links[-1])
    sizes = [link.stat().st_size for link in links]
    # When one is replaced, and the round closes
    journal.keep(1, secret(text=b"n" * 32))
    os.link(folder / "attempt-1/round-00001/drawn.entry", tmp_path / "newer")
    journal.close(1)
    # Then nothing of them is left
    assert [link.stat().st_size for link in links] == sizes
    for link in (*links, tmp_path / "newer"):
        assert not any(link.read_bytes())


def test_another_attempt_finds_what_lasts_and_erases_the_rest(folder: Path) -> None:
    # Given an attempt that had answered round 1 and was in round 2
    first = opened(folder, attempt=1)
    for number in (1, 2):
        first.keep(number, secret())
        first.keep(number, vector())
    first.keep(1, answered(1))
    # When the next attempt looks at any round
    second = opened(folder, attempt=2)
    assert second.load(7) == {}
    # Then nothing else is left
    assert files(folder) == ["lasting/round-00001/answered.entry"]
    assert second.load(1)["answered"].fields == {"attempt": 1}
    # And what it says itself replaces it
    second.keep(1, answered(2))
    assert opened(folder, attempt=3).load(1)["answered"].fields == {"attempt": 2}


def test_an_attempt_that_writes_before_it_looks_erases_as_well(folder: Path) -> None:
    opened(folder, attempt=1).keep(1, secret())
    opened(folder, attempt=2).keep(1, vector())
    assert files(folder) == ["attempt-2/round-00001/masked.entry"]


# --- A side that does not outlive its process ------------------------------------------------------------


def test_without_durability_only_what_lasts_is_written(folder: Path) -> None:
    journal = opened(folder, durable=False)
    for action in (secret(), vector(), answered()):
        journal.keep(1, action)
    assert files(folder) == ["lasting/round-00001/answered.entry"]
    journal.close(1)
    # And an attempt in another process, with another key, knows it
    found = opened(folder, attempt=2, durable=False, key=bytes(32)).load(1)
    assert {name: payload.fields for name, payload in found.items()} == {"answered": {"attempt": 1}}


# --- Kills and broken disks ------------------------------------------------------------------------------


class Killed(BaseException):
    """What ends the process here."""


OPERATIONS = ("mkdir", "open", "fsync", "rename", "replace", "rmdir", "unlink", "write", "writev")


def killing(monkeypatch: pytest.MonkeyPatch, moment: int) -> list[str]:
    """The `moment`-th operation on files ends the process before it happens; all are listed."""
    seen: list[str] = []

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **more: Any) -> Any:
            seen.append(name)
            if len(seen) >= moment:
                raise Killed
            return call(*args, **more)

        return operation

    for name in OPERATIONS:
        monkeypatch.setattr(os, name, counted(name, getattr(os, name)))
    return seen


def at_each_moment(folder: Path, prepare: Callable[[], None], act: Callable[[], None]) -> list[Callable[[], None]]:
    """`act`, killed before each of its operations on files, on what `prepare` leaves; one call for each moment."""

    def start() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        prepare()

    start()
    with pytest.MonkeyPatch.context() as patch:
        seen = killing(patch, 10**9)
        act()

    def killed_at(moment: int) -> None:
        start()
        with pytest.MonkeyPatch.context() as patch:
            killing(patch, moment)
            with pytest.raises(Killed):
                act()

    assert len(seen) > 3
    return [lambda moment=moment: killed_at(moment) for moment in range(1, len(seen) + 1)]  # type: ignore[misc]


@pytest.mark.parametrize("kind", [secret, vector])
def test_a_kill_at_any_operation_leaves_the_entry_before_or_this_one(
    folder: Path, kind: Callable[..., SumKeep]
) -> None:
    before = kind("x", b"1" * 32) if kind is secret else kind("x", 1)
    after = kind("x", b"2" * 32) if kind is secret else kind("x", 2)
    found = []
    for kill in at_each_moment(folder, lambda: opened(folder).keep(5, before), lambda: opened(folder).keep(5, after)):
        kill()
        journal = opened(folder)
        found.append(dict(journal.load(5)["x"].fields))
        assert files(folder) == ["attempt-1/round-00005/x.entry"], "nothing half is left"
        journal.keep(5, after)
        assert opened(folder).load(5)["x"].fields == after.body.fields
    assert found[0] == before.body.fields
    assert found[-1] == after.body.fields


def test_a_kill_at_the_first_entry_leaves_it_or_nothing(folder: Path) -> None:
    found = []
    for kill in at_each_moment(folder, lambda: None, lambda: opened(folder).keep(1, answered())):
        kill()
        found.append(len(opened(folder).load(1)))
    assert sorted(found) == found, "once it is there it stays"
    assert found[0] == 0
    assert found[-1] == 1


def test_a_kill_while_a_round_is_erased_leaves_it_whole_or_nothing_of_it(folder: Path) -> None:
    def prepare() -> None:
        for action in (secret(), vector(), answered()):
            opened(folder).keep(1, action)
        opened(folder).keep(2, vector())

    found = []
    for kill in at_each_moment(folder, prepare, lambda: opened(folder).close(1)):
        kill()
        journal = opened(folder)
        left = names(journal.load(1))
        assert left in (["answered", "drawn", "masked"], ["answered"])
        found.append(len(left))
        # And when the next process goes on, nothing of it stays anywhere
        journal.close(1)
        assert files(folder) == ["attempt-1/round-00002/masked.entry", "lasting/round-00001/answered.entry"]
    assert found[0] == 3
    assert found[-1] == 1


def test_a_kill_while_another_attempt_is_erased_ends_in_nothing_of_it(folder: Path) -> None:
    def prepare() -> None:
        for action in (secret(), vector(), answered()):
            opened(folder, attempt=1).keep(1, action)

    def look() -> None:
        opened(folder, attempt=2).load(1)

    for kill in at_each_moment(folder, prepare, look):
        kill()
        assert names(opened(folder, attempt=2).load(1)) == ["answered"]
        assert files(folder) == ["lasting/round-00001/answered.entry"]


def test_the_file_is_on_disk_before_its_name_and_its_name_before_keep_returns(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = killing(monkeypatch, 10**9)
    opened(folder).keep(1, vector())
    after = seen[max(index for index, name in enumerate(seen) if name == "writev") :]
    assert after[:2] == ["writev", "fsync"]
    assert after[2:] == ["replace", "open", "fsync"]
    assert seen.count("mkdir") == 4
    assert seen.count("fsync") == 4 + 2, "each folder that was made is known to the one above it"


@pytest.mark.parametrize("operation", ["mkdir", "fsync", "replace", "writev"])
def test_a_disk_that_does_not_take_it_is_named_and_what_was_there_stays(
    folder: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    opened(folder).keep(1, vector("old", start=1))

    def full(*args: Any, **more: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, operation, full)
        with pytest.raises(FederationError, match=r"round 2 of a sum .* No space left on device") as raised:
            opened(folder).keep(2, vector("new"))
    assert str(folder) in raised.value.message
    assert names(opened(folder).load(1)) == ["old"]
    assert opened(folder).load(2) == {}


def test_a_disk_that_does_not_let_go_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(folder).keep(1, secret())

    def refused(*args: Any, **more: Any) -> Any:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refused)
        with pytest.raises(FederationError, match="Read-only file system"):
            opened(folder).close(1)
        with pytest.raises(FederationError, match="Read-only file system"):
            opened(folder, attempt=2).load(1)
    assert names(opened(folder).load(1)) == ["drawn"]


@pytest.mark.parametrize("kind", [secret, vector, answered])
@pytest.mark.parametrize("harm", ["cut", "bit", "empty", "foreign", "longer"])
def test_a_disk_that_lost_what_it_had_confirmed_is_found_out(
    folder: Path, kind: Callable[..., SumKeep], harm: str
) -> None:
    opened(folder).keep(1, kind())
    (file,) = folder.rglob("*.entry")
    content = file.read_bytes()
    changed = bytearray(content)
    changed[-1] ^= 1
    file.write_bytes(
        {
            "cut": content[:-8],
            "bit": bytes(changed),
            "empty": b"",
            "foreign": b"{}" * 40,
            "longer": content + b"\0" * 8,
        }[harm]
    )
    with pytest.raises(DataError, match=f"{file.name} is damaged") as raised:
        opened(folder).load(1)
    assert "answers nothing" in raised.value.hint


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_no_flipped_bit_goes_unseen(tmp_path: Path, at: int, bit: int) -> None:
    folder = sum_folder(tmp_path, "tune", "contributor")
    shutil.rmtree(folder, ignore_errors=True)
    opened(folder).keep(1, vector(size=20))
    (file,) = folder.rglob("*.entry")
    content = bytearray(file.read_bytes())
    content[at % len(content)] ^= 1 << bit
    file.write_bytes(content)
    with pytest.raises(DataError):
        opened(folder).load(1)


def test_a_large_vector_is_written_without_a_copy_of_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = np.ones(1 << 20, np.uint32)
    seen: list[Any] = []
    write = os.writev

    def watched(file: int, parts: list[memoryview]) -> int:
        seen.extend(parts)
        return write(file, parts)

    monkeypatch.setattr(os, "writev", watched)
    opened(folder).keep(1, SumKeep("masked", Payload({}, {"words": words})))
    (large,) = [part for part in seen if len(part) == words.nbytes]
    assert np.shares_memory(np.frombuffer(large, np.uint32), words)
