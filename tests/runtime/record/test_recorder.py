"""What a worker puts on record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fate_llm.core.errors import FederationError, InternalError
from fate_llm.protocols.channel import Passed
from fate_llm.runtime.events import Event
from fate_llm.runtime.record.audit import audit_files
from fate_llm.runtime.record.recorder import Recorder
from fate_llm.runtime.record.transcript import read_transcript
from fate_llm.security.identity import Identity

IDENTITY = Identity(b"\x01" * 32)


def passed(direction: str, ordinal: int = 1) -> Passed:
    return Passed(
        direction=direction,  # type: ignore[arg-type]
        peer="z",
        task="train",
        kind="round.term",
        round=1,
        ordinal=ordinal,
        bytes=100,
        form={"x": ("float32", (2,))},
        digest="ab" * 32,
        protection="plain",
    )


def recorder(tmp_path: Path, attempt: int = 1) -> Recorder:
    return Recorder(
        tmp_path / "audit",
        tmp_path / "transcript.jsonl",
        identity=IDENTITY,
        party="a",
        job="j",
        attempt=attempt,
        now=lambda: 12.5,
    )


def audit_lines(tmp_path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for path in audit_files(tmp_path / "audit") for line in path.read_text().splitlines()]


def test_what_leaves_is_in_the_audit_log_and_both_directions_in_the_transcript(tmp_path: Path) -> None:
    found = recorder(tmp_path)
    found.passed(passed("sent"))
    found.passed(passed("received", 2))
    found.heed(Event("round_state", "a", "train", 1.0, {"round": 1, "rounds": 2, "contributors": ["a", "b"]}))
    found.close()
    left = [line for line in audit_lines(tmp_path) if line["kind"] == "left"]
    assert len(left) == 1
    assert left[0]["fields"]["to"] == "z"  # type: ignore[index]
    noted = read_transcript(tmp_path / "transcript.jsonl")
    assert [(said.direction, said.ordinal) for said in noted.messages] == [("sent", 1), ("received", 2)]
    assert noted.rounds[0].contributors == ("a", "b")


def test_a_worker_that_was_started_again_goes_on(tmp_path: Path) -> None:
    for attempt in (1, 1, 2):
        found = recorder(tmp_path, attempt)
        found.passed(passed("sent"))
        found.close()
    assert len([line for line in audit_lines(tmp_path) if line["kind"] == "left"]) == 3
    assert len(read_transcript(tmp_path / "transcript.jsonl").messages) == 1, "the same message counts once"


def test_nothing_leaves_when_it_cannot_be_put_on_record(tmp_path: Path) -> None:
    found = recorder(tmp_path)
    found.close()
    with pytest.raises((FederationError, InternalError)):
        found.passed(passed("sent"))


def test_a_transcript_that_cannot_be_opened_leaves_the_log_free(tmp_path: Path) -> None:
    (tmp_path / "transcript.jsonl").mkdir()
    with pytest.raises(FederationError):
        recorder(tmp_path)
    (tmp_path / "transcript.jsonl").rmdir()
    recorder(tmp_path).close()
