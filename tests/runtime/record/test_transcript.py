"""Transcripts: what was noted survives a kill at any byte, and counts once however often it was said."""

from __future__ import annotations

import json
import os
import resource
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from fate_llm.core.errors import FederationError, InternalError
from fate_llm.runtime.record.transcript import ClosedRound, Transcript, read_transcript
from tests.runtime.record.conftest import passed


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "job" / "transcript.jsonl"


def test_both_directions_are_noted_in_order(path: Path) -> None:
    with Transcript(path, attempt=2) as transcript:
        transcript.note(passed(kind="round.hello", round=0, protection=""))
        transcript.note(passed(direction="received", kind="round.state", round=0, digest="e" * 64, protection=""))
    noted = read_transcript(path)
    assert [(m.direction, m.kind, m.peer, m.digest[0], m.attempt) for m in noted.messages] == [
        ("sent", "round.hello", "z", "d", 2),
        ("received", "round.state", "z", "e", 2),
    ]
    assert (noted.rounds, noted.damaged) == ((), 0)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_line_has_the_keys_that_are_promised(path: Path) -> None:
    with Transcript(path) as transcript:
        transcript.note(passed())
        transcript.closed("train", 1, ["a", "b"], ["c"])
    message, closed = map(json.loads, path.read_text().splitlines())
    assert sorted(message) == [
        "attempt",
        "bytes",
        "digest",
        "direction",
        "kind",
        "ordinal",
        "peer",
        "protection",
        "round",
        "task",
    ]
    assert closed == {"attempt": 1, "closed": "train", "contributors": ["a", "b"], "missing": ["c"], "round": 1}


def test_what_is_said_again_after_a_restart_counts_once(path: Path) -> None:
    for attempt in (1, 1, 2):
        with Transcript(path, attempt=attempt) as transcript:
            transcript.note(passed())
            transcript.note(passed(direction="received"))
    noted = read_transcript(path)
    assert [(m.direction, m.attempt) for m in noted.messages] == [("sent", 1), ("received", 1)]


@pytest.mark.parametrize(
    "change", [{"peer": "b"}, {"task": "t"}, {"kind": "k"}, {"round": 2}, {"ordinal": 2}, {"digest": "f" * 64}]
)
def test_another_message_is_another(path: Path, change: dict[str, Any]) -> None:
    with Transcript(path) as transcript:
        transcript.note(passed())
        transcript.note(passed(**change))
    assert len(read_transcript(path).messages) == 2


def test_the_last_word_on_a_round_counts(path: Path) -> None:
    with Transcript(path) as transcript:
        transcript.closed("train", 1, ["a", "b"], ["c"])
        transcript.closed("train", 2, ["a"])
    with Transcript(path, attempt=2) as transcript:
        transcript.closed("train", 1, ["a", "b", "c"])
    assert read_transcript(path).rounds == (
        ClosedRound("train", 1, ("a", "b", "c"), (), 2),
        ClosedRound("train", 2, ("a",), (), 1),
    )


def test_events_of_the_rounds_are_heeded_and_no_others(path: Path) -> None:
    with Transcript(path) as transcript:
        transcript.heed("round_closed", "train", {"round": 1, "contributors": ["a"], "missing": ["b"]})
        transcript.heed("round_state", "train", {"round": 2, "contributors": ["a"], "sent_bytes": 5})
        transcript.heed("round_state", "train", {"round": 2, "contributors": ["b"], "conversation": "train#2"})
        transcript.heed("step", "train", {"loss": 1.0})
        transcript.heed("round_state", "train", {"round": 9})
    assert [(r.task, r.round, r.contributors, r.missing) for r in read_transcript(path).rounds] == [
        ("train", 1, ("a",), ("b",)),
        ("train", 2, ("a",), ()),
        ("train#2", 2, ("b",), ()),
    ]


def test_a_line_cut_anywhere_is_dropped_and_the_next_is_whole(path: Path) -> None:
    with Transcript(path) as transcript:
        transcript.note(passed())
        transcript.note(passed(ordinal=2))
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole)):
        path.write_bytes(whole[:end])
        assert len(read_transcript(path).messages) == 1
        with Transcript(path) as transcript:
            transcript.note(passed(ordinal=3))
        noted = read_transcript(path)
        assert [m.ordinal for m in noted.messages] == [1, 3]
        assert noted.damaged == 0


def test_a_long_cut_tail_is_dropped(path: Path) -> None:
    with Transcript(path) as transcript:
        transcript.note(passed())
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0" * 200_000)
    Transcript(path).close()
    assert path.read_bytes() == whole


def test_lines_that_a_power_cut_took_are_counted(path: Path) -> None:
    with Transcript(path) as transcript:
        transcript.note(passed())
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0\0\0\n" + b'{"closed": 5}\n' + b"[]\n" + whole.replace(b'"ordinal":1', b'"ordinal":2'))
    noted = read_transcript(path)
    assert [m.ordinal for m in noted.messages] == [1, 2]
    assert noted.damaged == 3


def test_no_file_is_an_empty_transcript(path: Path) -> None:
    noted = read_transcript(path)
    assert (noted.messages, noted.rounds, noted.damaged) == ((), (), 0)


def test_what_leaves_is_synced_and_what_came_when_asked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    with Transcript(path) as transcript:
        transcript.note(passed())
        assert len(synced) == 1
        transcript.note(passed(direction="received"))
        transcript.closed("train", 1, ["a"])
        assert len(synced) == 1
        transcript.sync()
        transcript.sync()
        assert len(synced) == 2


def test_a_full_disk_is_an_error_and_leaves_nothing_behind(path: Path) -> None:
    with Transcript(path) as transcript:
        transcript.note(passed())
        before = path.read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
            with pytest.raises(FederationError, match="nothing leaves without it"):
                transcript.note(passed(ordinal=2))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == before
        transcript.note(passed(ordinal=3))
    assert [m.ordinal for m in read_transcript(path).messages] == [1, 3]


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FederationError, match="cannot be written"):
        Transcript(tmp_path / "file" / "transcript.jsonl")


def test_a_closed_transcript_says_so(path: Path) -> None:
    transcript = Transcript(path)
    transcript.close()
    transcript.close()
    with pytest.raises(InternalError, match="closed"):
        transcript.note(passed())


def test_threads_may_write_at_once(path: Path) -> None:
    with Transcript(path) as transcript:

        def write(number: int) -> None:
            for ordinal in range(20):
                transcript.note(passed(direction="received", peer=str(number), ordinal=ordinal))

        threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(read_transcript(path).messages) == 80
