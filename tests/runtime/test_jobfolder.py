"""The folder of a job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fate_llm.core.canonical import digest_folder
from fate_llm.core.errors import ConfigurationError
from fate_llm.runtime.jobfolder import JobFolder, PartyFolder, write_json


def test_json_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"b": 1, "a": "ä"})
    with pytest.raises(TypeError):
        write_json(path, {"bad": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ä", "b": 1}


def test_a_job_never_writes_into_another_jobs_folder(tmp_path: Path) -> None:
    JobFolder.create(tmp_path / "deep" / "er", "job-1")
    with pytest.raises(ConfigurationError, match="job-1 cannot be made"):
        JobFolder.create(tmp_path / "deep" / "er", "job-1")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError):
        JobFolder.create(tmp_path / "file", "job-2")


def test_the_manifest_grows_by_keys(tmp_path: Path) -> None:
    folder = JobFolder.create(tmp_path, "job")
    folder.update_manifest(status="running", seed=7)
    folder.update_manifest(status="success")
    assert json.loads((folder.path / "manifest.json").read_text()) == {"status": "success", "seed": 7}


def test_outputs_have_a_parent_and_do_not_exist_yet(tmp_path: Path) -> None:
    party = JobFolder.create(tmp_path, "job").party("bank-a")
    path = party.output("tune", "model")
    assert path == tmp_path / "job" / "parties" / "bank-a" / "tune" / "model"
    assert path.parent.is_dir()
    assert not path.exists()
    assert party.output("tune", "model") == path
    assert party.scratch("tune").is_dir()
    assert party.scratch("tune") == party.scratch("tune")


def test_digests_name_every_output(tmp_path: Path) -> None:
    job = JobFolder.create(tmp_path, "job")
    path = job.party("a").output("tune", "model")
    path.write_text("x")
    outputs = {"a": {"tune": {"model": str(path)}}}
    assert job.digests(outputs) == {"a/tune/model": digest_folder(path)}


def test_lines_of_many_threads_stay_whole(tmp_path: Path, together: Any) -> None:
    folder = PartyFolder(tmp_path / "p")

    def write(name: str) -> None:
        for number in range(50):
            folder.append("events.jsonl", {"from": name, "n": number, "text": "x" * 500})

    together({name: (lambda name=name: write(name)) for name in "abcd"})
    lines = [json.loads(line) for line in (tmp_path / "p" / "events.jsonl").read_text().splitlines()]
    assert len(lines) == 200
    assert [line["n"] for line in lines if line["from"] == "c"] == list(range(50))
