"""The audit log on disk: several writers, crashes at any byte, full disks, changed files."""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fate_llm.core.canonical import canonical_json, digest
from fate_llm.core.errors import ConfigurationError, FateError, FederationError, InternalError, ProtectionError
from fate_llm.runtime.record import audit
from fate_llm.runtime.record.audit import KINDS, AuditLog, audit_files
from fate_llm.runtime.record.reading import LogReader
from fate_llm.security.audit_chain import MAX_LINE, Entry
from tests.cli.conftest import environment
from tests.runtime.record.conftest import IDENTITIES, ROSTER, OpenLog, passed


def entries(folder: Path) -> list[Entry]:
    """All lines of a log that is whole."""
    reader = LogReader(folder, ROSTER["a"])
    found = [entry for entry, _ in reader.entries()]
    assert reader.check() == []
    return found


def kinds(folder: Path) -> list[str]:
    return [entry.kind for entry in entries(folder)]


def test_a_new_log_begins_with_who_writes_it(open_log: OpenLog, tmp_path: Path) -> None:
    from fate_llm import __version__

    log = open_log()
    (first,) = entries(log.folder)
    assert first.fields == {"party": "a", "identity": ROSTER["a"].to_text(), "program": __version__}
    assert first.time == 1000.0
    assert log.head() == first.head


def test_lines_follow_each_other_over_closings(open_log: OpenLog) -> None:
    with open_log() as log:
        first = log.append("started", job="j", attempt=1)
    log = open_log()
    second = log.append("ended", job="j", state="success")
    found = entries(log.folder)
    assert [entry.kind for entry in found] == ["began", "started", "ended"]
    assert (found[1].hash, found[2].hash) == (first, second)
    assert found[2].fields == {"job": "j", "state": "success"}
    assert [entry.time for entry in found] == [1000.0, 1001.0, 1002.0]


def test_every_kind_but_the_first_can_be_written_and_no_other(open_log: OpenLog) -> None:
    log = open_log()
    for kind in set(KINDS) - {"began"}:
        log.append(kind)
    for wrong in ("began", "leaked", ""):
        with pytest.raises(InternalError, match="valid: approval, cancelled"):
            log.append(wrong)
    assert len(entries(log.folder)) == len(KINDS)


def test_fields_may_have_any_name(open_log: OpenLog) -> None:
    log = open_log()
    log.append("decision", kind="k", fields=1, time=2, n=3)
    assert entries(log.folder)[-1].fields == {"kind": "k", "fields": 1, "time": 2, "n": 3}


def test_what_is_no_json_is_refused_and_the_log_goes_on(open_log: OpenLog) -> None:
    log = open_log()
    with pytest.raises(InternalError, match="not JSON"):
        log.append("decision", value=object())
    log.append("decision", value=1)
    assert kinds(log.folder) == ["began", "decision"]


def test_files_are_for_the_owner_only(open_log: OpenLog) -> None:
    log = open_log()
    with audit_files(log.folder)[0].open("ab") as stream:
        stream.write(b"half")
    log.append("started")
    open_log()
    for path in (log.folder, *log.folder.iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) in (0o600, 0o700), path


# --- messages -----------------------------------------------------------------------------------------------------


def test_a_message_that_leaves_is_there_with_its_form_and_nothing_of_its_content(open_log: OpenLog) -> None:
    log = open_log()
    log.left("job-1", passed(form={"w": ("float32", (2, 3)), "b": ["int8", [4]]}))
    found = entries(log.folder)[-1]
    assert found.kind == "left"
    assert found.fields == {
        "to": "z",
        "job": "job-1",
        "task": "train",
        "message": "round.term",
        "round": 1,
        "ordinal": 1,
        "tensors": {
            "count": 2,
            "values": 10,
            "dtypes": {"float32": 1, "int8": 1},
            "form": {"w": ["float32", [2, 3]], "b": ["int8", [4]]},
        },
        "bytes": 1000,
        "digest": "d" * 64,
        "protection": "plain",
    }


def test_a_message_that_came_names_its_sender(open_log: OpenLog) -> None:
    log = open_log()
    log.received("job-1", passed(direction="received", peer="b"))
    found = entries(log.folder)[-1]
    assert (found.kind, found.fields["from"]) == ("received", "b")
    assert "to" not in found.fields


@pytest.mark.parametrize(
    "form",
    [
        {f"layer.{number}": ["bfloat16", [1000, 16]] for number in range(65)},
        {"n" * 10_000 + str(number): ["float32", [1]] for number in range(2)},
    ],
    ids=["many", "long-names"],
)
def test_a_large_form_is_a_summary_and_a_digest(open_log: OpenLog, form: dict[str, Any]) -> None:
    log = open_log()
    log.left("job-1", passed(form=form))
    found = entries(log.folder)[-1].fields["tensors"]
    assert set(found) == {"count", "values", "dtypes", "form_digest"}
    assert found["count"] == len(form)
    assert found["form_digest"] == digest(form)
    assert len(audit_files(log.folder)[0].read_bytes()) < 3000


def test_sixty_four_tensors_are_listed(open_log: OpenLog) -> None:
    log = open_log()
    log.left("job-1", passed(form={f"layer.{number}": ["float32", []] for number in range(64)}))
    found = entries(log.folder)[-1].fields["tensors"]
    assert len(found["form"]) == found["values"] == 64


# --- several writers ----------------------------------------------------------------------------------------------


def test_threads_and_two_openings_write_one_chain(open_log: OpenLog) -> None:
    logs = [open_log(segment=2000), open_log(segment=2000)]

    def write(log: AuditLog) -> None:
        for number in range(10):
            log.append("left", number=number)

    threads = [threading.Thread(target=write, args=(log,)) for log in logs for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = entries(logs[0].folder)
    assert len(found) == 41
    assert [entry.time for entry in found] == sorted(entry.time for entry in found)


WRITER = """
import sys, pathlib
from fate_llm.runtime.record.audit import AuditLog
from fate_llm.security.identity import Identity
log = AuditLog.open(pathlib.Path(sys.argv[1]), Identity(bytes.fromhex(sys.argv[2])), "a", lambda: 5.0)
number = 0
while number < int(sys.argv[3]):
    number += 1
    print(log.append("left", writer=sys.argv[4], number=number), flush=True)
"""


def writer(folder: Path, count: int, name: str) -> subprocess.Popen[str]:
    secret = IDENTITIES["a"].to_bytes().hex()
    command = [sys.executable, "-c", WRITER, str(folder), secret, str(count), name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())


@pytest.mark.slow
def test_processes_write_one_chain_and_what_was_written_survives_their_death(tmp_path: Path, open_log: OpenLog) -> None:
    # Given three processes that write for ever, When two are killed in the middle and one ends by itself
    folder = tmp_path / "audit"
    victims = [writer(folder, 10**9, name) for name in ("x", "y")]
    steady = writer(folder, 40, "s")
    said = {steady.communicate(timeout=60)[0]}
    for victim in victims:
        assert victim.stdout is not None
        said.add(victim.stdout.readline())
        victim.send_signal(signal.SIGKILL)
        said.add(victim.communicate(timeout=60)[0])
    # Then the chain is whole, and has every line that one of them was told of
    log = open_log(folder)
    log.append("ended")
    hashes = {entry.hash for entry in entries(folder)}
    told = {line for text in said for line in text.splitlines() if len(line) == 64}
    assert len(told) >= 42
    assert told <= hashes
    assert steady.returncode == 0


# --- rotation -----------------------------------------------------------------------------------------------------


def test_the_chain_goes_on_over_files(open_log: OpenLog) -> None:
    log = open_log(segment=1000)
    for number in range(20):
        log.append("left", number=number)
    files = audit_files(log.folder)
    assert len(files) > 3
    assert [path.name for path in files] == [f"audit-{n:06d}.jsonl" for n in range(1, len(files) + 1)]
    assert len(entries(log.folder)) == 21
    # And a file that is missing is a gap that is named with its place.
    files[1].unlink()
    (fault,) = LogReader(log.folder, ROSTER["a"]).check()
    assert (fault.file, fault.line, fault.kind) == ("audit-000003.jsonl", 1, "removed")


def test_an_empty_newest_file_changes_nothing(open_log: OpenLog) -> None:
    log = open_log(segment=400)
    log.append("started")
    log.close()
    count = len(audit_files(log.folder))
    (log.folder / f"audit-{count + 1:06d}.jsonl").touch()  # a crash right after it was made
    open_log(segment=400).append("ended")
    assert kinds(log.folder) == ["began", "started", "ended"]


# --- crashes ------------------------------------------------------------------------------------------------------


def three_lines(open_log: OpenLog) -> tuple[Path, bytes]:
    """A log of three lines in one file, closed; its file and its content."""
    with open_log() as log:
        log.append("started", job="j")
        log.append("left", job="j")
    (path,) = audit_files(log.folder)
    return path, path.read_bytes()


def test_a_line_cut_anywhere_is_taken_off_and_the_chain_says_so(open_log: OpenLog) -> None:
    path, whole = three_lines(open_log)
    start = whole.rstrip(b"\n").rfind(b"\n") + 1
    for end in range(start + 1, len(whole), 40):
        path.write_bytes(whole[:end])
        (path.parent / "audit.damaged").unlink(missing_ok=True)
        # When the log is opened
        with open_log() as log:
            log.append("ended")
        # Then the half line is kept, and its place is in the chain
        found = entries(path.parent)
        assert [entry.kind for entry in found] == ["began", "started", "repaired", "ended"]
        (kept,) = (path.parent / "audit.damaged").read_text().splitlines()
        assert base64.b64decode(json.loads(kept)["content"]) == whole[start:end]
        assert found[2].fields == {
            "file": path.name,
            "offset": start,
            "bytes": end - start,
            "digest": json.loads(kept)["digest"],
        }
        assert not (path.parent / "audit.repair").exists()


def test_a_first_line_cut_anywhere_is_begun_again(tmp_path: Path, open_log: OpenLog) -> None:
    path, whole = three_lines(open_log)
    first = whole[: whole.index(b"\n") + 1]
    for end in (1, 50, len(first) - 1):
        path.write_bytes(first[:end])
        open_log().close()
        assert kinds(path.parent) == ["began", "repaired"]


def test_blocks_that_never_reached_the_disk_are_taken_off(open_log: OpenLog) -> None:
    path, whole = three_lines(open_log)
    start = whole.rstrip(b"\n").rfind(b"\n") + 1
    for tail in (b"\0" * 100, b"\0" * 100 + whole[start + 100 :]):
        path.write_bytes(whole[:start] + tail)
        open_log().close()
        assert kinds(path.parent) == ["began", "started", "repaired"]


def test_another_process_sees_the_half_line_before_it_writes(open_log: OpenLog) -> None:
    log = open_log()
    log.append("started")
    with audit_files(log.folder)[0].open("ab") as stream:
        stream.write(b'{"half')
    log.append("ended")
    assert kinds(log.folder) == ["began", "started", "repaired", "ended"]


class Killed(BaseException):
    """Stands for SIGKILL: nobody catches it."""


@contextmanager
def killed_at(number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The `number`th call that changes something on disk does not come back; a write is half done then."""
    calls: list[str] = []

    def dying(module: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(module, name)

        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) == number:
                if name == "write_all":
                    real(arguments[0], [arguments[1][0][:20]])
                raise Killed
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    with monkeypatch.context() as patch:
        monkeypatch = patch
        for name in ("fsync", "replace", "unlink", "ftruncate"):
            dying(os, name)
        dying(audit, "write_all")
        yield calls


def test_a_crash_at_any_step_of_a_repair_loses_nothing(open_log: OpenLog, monkeypatch: pytest.MonkeyPatch) -> None:
    path, whole = three_lines(open_log)
    start = whole.rstrip(b"\n").rfind(b"\n") + 1
    half = whole[start:-5]
    deaths = 0
    for number in range(1, 30):
        for old in path.parent.iterdir():
            old.unlink()
        path.write_bytes(whole[:start] + half)
        # Given a repair that is killed at its n-th step
        with killed_at(number, monkeypatch) as calls:
            try:
                open_log().close()
            except Killed:
                deaths += 1
        # When the log is opened again
        with open_log() as log:
            log.append("ended")
        # Then the chain is whole, says what was cut off, and that is kept
        found = [entry for entry in entries(path.parent) if entry.kind == "repaired"]
        kept = [json.loads(line) for line in (path.parent / "audit.damaged").read_text().splitlines()]
        first = [one for one in kept if base64.b64decode(one["content"]) == half]
        assert first, number
        assert any(entry.fields["digest"] == first[0]["digest"] for entry in found), number
        # each once
        assert sorted(entry.fields["digest"] for entry in found) == sorted({one["digest"] for one in kept}), number
        if len(calls) < number:
            break
    assert deaths > 5


def test_a_line_written_between_the_steps_of_a_repair_is_kept(
    open_log: OpenLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1, 8):
        folder = open_log().folder.parent / f"log-{number}"
        log = open_log(folder)
        log.append("started")
        with audit_files(folder)[0].open("ab") as stream:
            stream.write(b'{"half')
        # Given another process that is killed in its repair, When one that knows the chain goes on writing
        with killed_at(number, monkeypatch), contextlib.suppress(Killed):
            open_log(folder)
        written = log.append("left", number=number)
        open_log(folder)
        # Then its line stays, whoever ends the repair
        found = entries(folder)
        assert written in [entry.hash for entry in found], number
        assert "repaired" in [entry.kind for entry in found], number


def test_a_crash_at_any_step_of_an_append_leaves_the_line_or_not(
    open_log: OpenLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log(segment=500)
    deaths = 0
    for number in range(1, 12):
        with killed_at(number % 4 or 1, monkeypatch):
            try:
                log.append("left", number=number)
            except Killed:
                deaths += 1
        log.close()
        log = open_log(segment=500)
        entries(log.folder)
    assert deaths > 3


# --- what is refused ------------------------------------------------------------------------------------------------


def test_a_full_disk_is_an_error_and_leaves_nothing_behind(open_log: OpenLog) -> None:
    log = open_log()
    log.append("started")
    (path,) = audit_files(log.folder)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
        with pytest.raises(FederationError, match="what is not on record does not leave"):
            log.left("j", passed())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    log.append("ended")
    assert kinds(log.folder) == ["began", "started", "ended"]


def test_a_disk_that_fails_to_sync_is_an_error(open_log: OpenLog, monkeypatch: pytest.MonkeyPatch) -> None:
    log = open_log()

    def broken(file: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(FederationError, match="Input/output error"):
            log.append("started")
    log.append("ended")
    assert kinds(log.folder) == ["began", "ended"]


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path, open_log: OpenLog) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FederationError, match="Not a directory"):
        open_log(tmp_path / "file" / "audit")


def test_a_changed_end_is_not_written_to(open_log: OpenLog) -> None:
    path, whole = three_lines(open_log)
    first, second, third = whole.splitlines(keepends=True)
    for content in (
        first + second.replace(b'"j"', b'"k"') + third.replace(b'"j"', b'"k"'),
        first.replace(b'"party":"a"', b'"party":"a" '),
        first + second.replace(b'"j"', b'"k"') + third[:50],
        b"\n\n\n",
        b"x" * (MAX_LINE + 100),
    ):
        path.write_bytes(content)
        with pytest.raises(FateError) as caught:
            open_log()
        assert isinstance(caught.value, ProtectionError), content[:80]
        assert "was changed at byte" in caught.value.message
        assert "audit verify" in caught.value.hint
        assert path.read_bytes() == content
        assert not (path.parent / "audit.damaged").exists()


def test_a_repair_note_that_was_changed_is_not_believed(open_log: OpenLog) -> None:
    path, _ = three_lines(open_log)
    for content in (b"{", b"[]", b'{"file": "x"}'):
        (path.parent / "audit.repair").write_bytes(content)
        with pytest.raises(ProtectionError, match=r"audit\.repair was changed"):
            open_log()


def test_the_log_of_another_party_or_key_is_not_continued(tmp_path: Path, open_log: OpenLog) -> None:
    folder = open_log().folder
    before = audit_files(folder)[0].read_bytes()
    for identity, party in ((IDENTITIES["b"], "a"), (IDENTITIES["a"], "b")):
        with pytest.raises(ConfigurationError, match="is of a with the key"):
            AuditLog.open(folder, identity, party, lambda: 0.0)
    assert audit_files(folder)[0].read_bytes() == before


def test_a_closed_log_says_so_and_closes_twice(open_log: OpenLog) -> None:
    log = open_log()
    log.close()
    log.close()
    with pytest.raises(InternalError, match="closed"):
        log.append("started")


def test_a_link_in_place_of_a_file_is_not_followed(tmp_path: Path, open_log: OpenLog) -> None:
    folder = tmp_path / "audit"
    folder.mkdir()
    (folder / "audit-000001.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FederationError):
        open_log()
    assert not (tmp_path / "elsewhere").exists()


# --- reading --------------------------------------------------------------------------------------------------------


def test_a_reader_places_faults_by_file_and_line(open_log: OpenLog) -> None:
    log = open_log(segment=1200)
    for number in range(12):
        log.append("left", number=number)
    target = audit_files(log.folder)[2]
    lines = target.read_bytes().splitlines(keepends=True)
    content = json.loads(lines[1])
    content["fields"]["number"] = 99
    target.write_bytes(b"".join([lines[0], canonical_json(content) + b"\n", *lines[2:]]))
    reader = LogReader(log.folder, ROSTER["a"])
    (fault,) = reader.check()
    assert (fault.file, fault.line, fault.kind) == (target.name, 2, "changed")
    assert str(fault).startswith(f"{target.name}:2: ")
    assert reader.count == 13
    assert set(fault.as_dict()) == {"file", "line", "kind", "message"}


def test_a_reader_sees_a_half_line_and_a_cut_end(open_log: OpenLog) -> None:
    path, whole = three_lines(open_log)
    head = LogReader(path.parent, ROSTER["a"])
    head.check()
    path.write_bytes(whole + b'{"half')
    assert [fault.kind for fault in LogReader(path.parent, ROSTER["a"]).check()] == ["unfinished"]
    path.write_bytes(whole[: whole.rstrip(b"\n").rfind(b"\n") + 1])
    assert LogReader(path.parent, ROSTER["a"]).check() == []
    cut = LogReader(path.parent, ROSTER["a"], expected_head=head.head.hash).check()
    assert [fault.kind for fault in cut] == ["cut"]


def test_a_copy_without_its_lock_file_can_be_read(open_log: OpenLog) -> None:
    path, _ = three_lines(open_log)
    (path.parent / "audit.lock").unlink()
    assert kinds(path.parent) == ["began", "started", "left"]


def test_no_log_is_an_error_that_says_where(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigurationError, match="there is no audit log in"):
            LogReader(folder, ROSTER["a"])
