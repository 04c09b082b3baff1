"""Nothing private is in any log: planted secrets are looked for in all that a job leaves behind."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import sqlite3
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import zstandard

from fate_llm.core import plugins
from fate_llm.core.seeds import derive_seed
from fate_llm.pipelines import check
from fate_llm.runtime.job import Submission
from fate_llm.runtime.record.audit import AuditLog
from fate_llm.runtime.record.transcript import Transcript, read_transcript
from fate_llm.security.identity import Identity
from tests.canaries import Found, find_canaries, floats
from tests.runtime import toys
from tests.runtime.record.conftest import passed
from tests.runtime.record.parties import Job

PROMPT = 'Patient Grünwald-7731 asks: "may I take\tibuprofen\\with warfarin?" & <b>when</b>'
KEY = Identity(hashlib.sha256(b"canary").digest()).to_bytes()
GRADIENT = np.random.default_rng(3).normal(size=100).astype(np.float32)
CANARIES = {"prompt": PROMPT.encode(), "key": KEY, "gradient": floats(GRADIENT)}
INNOCENT = "Another patient asks: may I take ibuprofen with water?"


def found_in(folder: Path, content: bytes, name: str = "file") -> set[tuple[str, str]]:
    """Canaries and spellings in a file of this content, among others."""
    (folder / "other").write_text(INNOCENT * 50 + json.dumps(list(range(1000))))
    (folder / name).write_bytes(content)
    return {(found.canary, found.spelling) for found in find_canaries(folder, CANARIES)}


@pytest.mark.parametrize(
    ("content", "canary"),
    [
        (PROMPT.encode(), "prompt"),
        (b"...truncated: " + PROMPT.encode()[20:55] + b"...", "prompt"),
        (json.dumps({"message": PROMPT}).encode(), "prompt"),
        (json.dumps({"message": json.dumps(PROMPT)}, ensure_ascii=False).encode(), "prompt"),
        (repr(PROMPT).encode(), "prompt"),
        (repr(PROMPT.encode()).encode(), "prompt"),
        (ascii(PROMPT).encode(), "prompt"),
        (html.escape(PROMPT).encode(), "prompt"),
        (b"%22may%20I%20take%09ibuprofen%5Cwith%20warfarin", "prompt"),
        (PROMPT.encode("utf-16"), "prompt"),
        (PROMPT.encode().hex().encode(), "prompt"),
        *((base64.b64encode(b"x" * shift + PROMPT.encode()), "prompt") for shift in range(3)),
        (base64.urlsafe_b64encode(KEY), "key"),
        (KEY, "key"),
        (KEY.hex().upper().encode(), "key"),
        (repr(KEY).encode(), "key"),
        (str(list(KEY)).encode(), "key"),
        (json.dumps(list(KEY), separators=(",", ":")).encode(), "key"),
        (b"\0" * 3 + floats(GRADIENT) + b"\0", "gradient"),
        (floats(GRADIENT[17:30]), "gradient"),
        (GRADIENT.astype(np.float64).tobytes(), "gradient"),
        (GRADIENT.astype(np.float16).tobytes(), "gradient"),
        (GRADIENT.astype(ml_dtypes.bfloat16).tobytes(), "gradient"),
        (json.dumps([float(value) for value in GRADIENT[5:7]]).encode(), "gradient"),
        (str(GRADIENT[3]).encode(), "gradient"),
        (base64.b64encode(floats(GRADIENT)), "gradient"),
        (zstandard.compress(PROMPT.encode()), "prompt"),
        (b"header" + zstandard.compress(b"x" * 5000 + KEY), "key"),
        (gzip.compress(gzip.compress(floats(GRADIENT))), "gradient"),
    ],
)
def test_a_canary_is_found_however_it_is_spelled(tmp_path: Path, content: bytes, canary: str) -> None:
    assert canary in {name for name, _ in found_in(tmp_path, content)}


def test_where_and_how_is_named(tmp_path: Path) -> None:
    assert found_in(tmp_path, KEY.hex().encode()) == {("key", "hex")}
    assert found_in(tmp_path, zstandard.compress(KEY.hex().encode() * 9)) == {("key", "zstd/hex")}
    assert found_in(tmp_path, b'"Patient Gr\\u00fcnwald') == {("prompt", "json")}
    (tmp_path / "deep" / ".hidden").mkdir(parents=True)
    (tmp_path / "file").unlink()
    (tmp_path / "deep" / ".hidden" / "x").write_bytes(KEY)
    assert find_canaries(tmp_path, CANARIES) == [Found("deep/.hidden/x", "key", "raw")]


def test_zips_names_of_files_and_databases_are_looked_into(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w.npy", floats(GRADIENT))
    (tmp_path / f"{KEY.hex()}.txt").touch()
    database = sqlite3.connect(tmp_path / "fate.db")
    database.execute("create table lines (text)")
    database.executemany("insert into lines values (?)", [(INNOCENT * 40,), (PROMPT,), (INNOCENT * 400 + PROMPT,)])
    database.commit()
    database.close()
    found = {(Path(one.path).suffix, one.canary) for one in find_canaries(tmp_path, CANARIES)}
    assert found == {(".npz", "gradient"), (".txt", "key"), (".db", "prompt")}


def test_what_is_not_there_is_not_found(tmp_path: Path) -> None:
    other = np.random.default_rng(4).normal(size=10_000).astype(np.float32)
    content = b"".join(
        [
            INNOCENT.encode() * 100,
            other.tobytes(),
            json.dumps([float(value) for value in other]).encode(),
            base64.b64encode(bytes(range(256)) * 4)[200:],
            b"\x28\xb5\x2f\xfd\x1f\x8b\x08PK\x03\x04 broken",
        ]
    )
    assert found_in(tmp_path, content) == set()


def test_paths_that_may_hold_them_are_skipped_and_only_those(tmp_path: Path) -> None:
    for name in ("parties/a/train/model", "parties/a/train/deep/x", "parties/a/log.txt", "parties/a/trainer"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(KEY)
    found = find_canaries(tmp_path, CANARIES, skip=("parties/*/train/**",))
    assert [one.path for one in found] == ["parties/a/log.txt", "parties/a/trainer"]


def test_a_search_for_nothing_or_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="looks for nothing"):
        find_canaries(tmp_path, {})
    with pytest.raises(AssertionError, match="wrong place"):
        find_canaries(tmp_path, CANARIES)
    (tmp_path / "x").touch()
    with pytest.raises(AssertionError, match="found anywhere"):
        find_canaries(tmp_path, {"short": b"abc"})


# --- jobs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "_installed", toys.installed)


def run(data: dict[str, Any], base: Path, job: str) -> Path:
    """Run a job in the local runtime; its folder."""
    submission = Submission(check(data), job_id=job, base=base, workdir=base / "jobs", now=lambda: 1000.0, observers=())
    submission.run()
    return base / "jobs" / job


def test_the_logs_of_a_job_hold_nothing_of_its_data_or_updates(tmp_path: Path) -> None:
    # Given a job that reads a secret text and sums up random updates
    (tmp_path / "secret.txt").write_text(PROMPT)
    tasks = {
        "words": {"component": "words", "params": {"path": "secret.txt", "times": 2}},
        "add": {"component": "adder", "inputs": {"data": "words.dataset"}},
        "step": {"component": "stepper", "params": {"rounds": 2, "size": 64}},
    }
    folder = run(toys.toy_pipeline(**tasks), tmp_path, "job-1")
    assert json.loads((folder / "manifest.json").read_text())["status"] == "success"
    updates = {
        f"update of {party} in round {number}": floats(
            np.random.default_rng([derive_seed(5, "step", party), number]).normal(size=64).astype(np.float32)
        )
        for party in ("a", "b", "c")
        for number in (1, 2)
    }
    # Then the text is in the outputs of its task, where it belongs, and in nothing else
    canaries = {"prompt": PROMPT.encode(), **updates}
    there = {one.path for one in find_canaries(folder, canaries)}
    assert there == {f"parties/{party}/words/dataset" for party in ("a", "b", "c")}
    assert find_canaries(folder, canaries, skip=("parties/*/words/**",)) == []
    # And a tensor would have been found: the model is.
    model = (folder / "parties/b/step/model").read_bytes()[: 4 * 64]
    assert "parties/b/step/model" in {one.path for one in find_canaries(folder, {"model": model})}


def test_what_a_reader_says_of_bad_records_holds_nothing_of_them(tmp_path: Path) -> None:
    # Given records with faults of many kinds, each with the secret in it
    bad: list[Any] = [
        {"question": PROMPT},
        {"question": PROMPT, "answer": 5},
        {"question": [PROMPT], "answer": PROMPT},
        {"messages": [{"role": PROMPT, "content": PROMPT}]},
        PROMPT,
        [PROMPT],
        {"question": PROMPT, "answer": ""},
    ]
    lines = [json.dumps(one, ensure_ascii=False) for one in bad] + [f'{{"question": "{PROMPT}"', PROMPT]
    for number, line in enumerate(lines):
        (tmp_path / f"{number}.jsonl").write_text(f"{line}\n" * 3)
        data = toys.toy_pipeline(read={"component": "reader", "params": {"path": f"{number}.jsonl"}})
        folder = run(data, tmp_path, f"job-{number}")
        assert json.loads((folder / "manifest.json").read_text())["status"] == "failed", line
        # Then no log, event or manifest quotes it
        assert find_canaries(folder, {"prompt": PROMPT.encode()}) == [], line


def test_what_a_reader_says_of_a_file_without_a_header_holds_nothing_of_it(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text(f"{'x' * 8},Patient Grünwald-7731 takes warfarin\n" * 3)
    data = toys.toy_pipeline(read={"component": "reader", "params": {"path": "data.csv"}})
    folder = run(data, tmp_path, "job-1")
    assert find_canaries(folder, {"record": "Patient Grünwald-7731 takes warfarin".encode()}) == []


def test_the_record_holds_nothing_of_a_message(tmp_path: Path) -> None:
    # Given a message of which the channel tells form and digest, When all of the record is written
    told = passed(form={"w": ["float32", [100]]})
    with AuditLog.open(tmp_path / "audit", Identity(KEY), "a", lambda: 0.0) as log:
        log.left("job-1", told)
    with Transcript(tmp_path / "transcript.jsonl") as transcript:
        transcript.note(told)
    assert len(read_transcript(tmp_path / "transcript.jsonl").messages) == 1
    (tmp_path / "dossier.json").write_text(json.dumps(Job().run().dossier()))
    # Then neither the update nor the key that signed is in it
    assert find_canaries(tmp_path, CANARIES) == []
