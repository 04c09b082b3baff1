"""`fate_llm audit` as people, auditors and programs call it."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from fate_llm.runtime.record.audit import AuditLog, audit_files
from fate_llm.security.audit_chain import verify
from tests.cli.conftest import Run, document, only_error
from tests.runtime.record.conftest import IDENTITIES, ROSTER, passed
from tests.runtime.record.parties import Job

EVIL = "</td><script>alert(1)</script>"


def federation(*parties: str) -> dict[str, Any]:
    broker = {"host": "broker.example", "port": 5671}
    members = {party: {"identity": ROSTER[party].to_text(), "broker": broker} for party in parties}
    return {"version": 1, "name": "loans", "vhost": "fate.loans", "topology": "shared", "parties": members}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The home of party a, whose log has lines of two jobs."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "federation.yaml").write_text(yaml.safe_dump(federation("a", "b", "c", "z")))
    settings = {
        "version": 1,
        "party": "a",
        "federation": "federation.yaml",
        "identity": "identity.key",
        "broker": "amqps://a@broker.example/fate.loans",
    }
    (folder / "party.yaml").write_text(yaml.safe_dump(settings))
    with AuditLog.open(folder / "state" / "audit", IDENTITIES["a"], "a", lambda: 1_700_000_000.5) as log:
        findings = [{"rule": "models", "outcome": "pass"}, {"rule": "data", "outcome": "refuse"}]
        log.append("decision", job="job-1", verdict="refuse", findings=findings, policy="0" * 64)
        log.left("job-2", passed())
        log.left("job-2", passed(peer="b", kind="data.notes", protection="", form={}, round=0))
        log.append("approval", job="job-2", task="=cmd|' /C calc'!A0", decision="approve", reason=f"{EVIL}\n\x1b[31m")
    return folder


@pytest.fixture
def last_file(home: Path) -> Path:
    return audit_files(home / "state" / "audit")[-1]


def change_a_line(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"verdict":"refuse"', b'"verdict":"accept"'))


# --- show ---------------------------------------------------------------------------------------------------------


def test_show_says_one_sentence_for_each_line(run: Run, home: Path) -> None:
    lines = run("audit", "show", "--home", home).stdout.splitlines()
    assert len(lines) == 5
    assert "the log of a begins, key ed25519:" in lines[0]
    assert "2023-11-14T22:13:20.500Z  decision" in lines[1]
    assert "job job-1: the policy says refuse; not passed: data" in lines[1]
    assert (
        "round.term left for z: job job-2, task train, round 1; 1000 bytes, 1 tensors of float32, 6 values; "
        "protection: plain" in lines[2]
    )
    assert "data.notes left for b" in lines[3]
    assert lines[3].endswith("no tensors; protection: none needed")
    assert "\x1b" not in lines[4]


def test_show_takes_the_home_from_the_environment(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FATE_LLM_HOME", str(home))
    assert len(run("audit", "show").stdout.splitlines()) == 5


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        (["--job", "job-2"], [3, 4, 5]),
        (["--kind", "left"], [3, 4]),
        (["--job", "job-1", "--kind", "left"], []),
        (["--last", "2"], [4, 5]),
        (["--job", "job-2", "--last", "1"], [5]),
    ],
)
def test_show_as_json_has_the_lines_asked_for(run: Run, home: Path, options: list[str], numbers: list[int]) -> None:
    found = document(run("audit", "show", "--home", home, "--json", *options))
    assert (found["ok"], found["faults"]) == (True, [])
    assert [line["n"] for line in found["lines"]] == numbers
    assert all(set(line) == {"n", "time", "kind", "fields", "hash"} for line in found["lines"])


def test_show_of_an_unknown_kind_names_the_nearest(run: Run, home: Path) -> None:
    error = only_error(run("audit", "show", "--home", home, "--kind", "lefft", "--json", exit_code=2))
    assert error["hint"] == "did you mean 'left'?"


def test_a_home_without_a_log_says_where_it_looked(run: Run, home: Path) -> None:
    for path in (home / "state" / "audit").iterdir():
        path.unlink()
    error = only_error(run("audit", "verify", "--home", home, "--json", exit_code=2))
    assert str(home / "state" / "audit") in error["message"]


# --- verify -------------------------------------------------------------------------------------------------------


def test_verify_prints_head_and_count(run: Run, home: Path) -> None:
    found = document(run("audit", "verify", "--home", home, "--json"))
    assert (found["ok"], found["count"], found["head"]["n"], found["faults"]) == (True, 5, 5, [])
    assert found["files"] == ["audit-000001.jsonl"]
    text = run("audit", "verify", "--home", home).stdout
    assert "5 lines in 1 files" in text
    assert f"head  line 5, {found['head']['hash']}" in text
    assert ROSTER["a"].to_text() in text
    assert run("audit", "verify", "--home", home, "--head", found["head"]["hash"]).exit_code == 0


def test_verify_names_a_changed_line_and_ends_with_5(run: Run, home: Path, last_file: Path) -> None:
    change_a_line(last_file)
    done = run("audit", "verify", "--home", home, exit_code=5)
    assert "FAULT: audit-000001.jsonl:2: the signature does not fit" in done.stderr
    found = document(run("audit", "verify", "--home", home, "--json", exit_code=5))
    assert found["ok"] is False
    assert [(fault["line"], fault["kind"]) for fault in found["faults"]] == [(2, "changed")]


def test_verify_names_removed_and_reordered_lines(run: Run, home: Path, last_file: Path) -> None:
    lines = last_file.read_bytes().splitlines(keepends=True)
    last_file.write_bytes(b"".join([*lines[:2], *lines[3:]]))
    assert "line 3 is missing before it [removed]" in run("audit", "verify", "--home", home, exit_code=5).stderr
    last_file.write_bytes(b"".join([*lines[:2], lines[3], lines[2], lines[4]]))
    assert ":4: line 3 stands after line 4 [reordered]" in run("audit", "verify", "--home", home, exit_code=5).stderr


def test_verify_finds_a_cut_end_by_a_head_that_was_noted(run: Run, home: Path, last_file: Path) -> None:
    head = document(run("audit", "verify", "--home", home, "--json"))["head"]["hash"]
    lines = last_file.read_bytes().splitlines(keepends=True)
    last_file.write_bytes(b"".join(lines[:-1]))
    assert run("audit", "verify", "--home", home).exit_code == 0
    done = run("audit", "verify", "--home", home, "--head", head, exit_code=5)
    assert "[cut]" in done.stderr


@pytest.mark.parametrize("head", ["abc", "G" * 64, "A" * 64])
def test_a_head_that_is_no_hash_is_refused(run: Run, home: Path, head: str) -> None:
    error = only_error(run("audit", "verify", "--home", home, "--head", head, "--json", exit_code=2))
    assert "64 lower case hex digits" in error["message"]


# --- export -------------------------------------------------------------------------------------------------------


def test_exported_lines_can_be_verified_again(run: Run, home: Path) -> None:
    run("audit", "export", "--home", home, "log.jsonl")
    with Path("log.jsonl").open("rb") as stream:
        assert verify(stream, ROSTER["a"]) == []
    run("audit", "export", "--home", home, "job.jsonl", "--job", "job-2")
    found = [json.loads(line) for line in Path("job.jsonl").read_text().splitlines()]
    assert [line["n"] for line in found] == [3, 4, 5]
    assert Path("log.jsonl").stat().st_mode & 0o777 == 0o600


def test_a_table_has_a_row_for_each_line_and_no_formula(run: Run, home: Path) -> None:
    run("audit", "export", "--home", home, "log.csv")
    with Path("log.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["n"] for row in rows] == ["1", "2", "3", "4", "5"]
    left = rows[2]
    assert (left["party"], left["task"], left["message"], left["bytes"]) == ("z", "train", "round.term", "1000")
    assert (left["tensors"], left["values"], left["protection"], left["digest"]) == ("1", "6", "plain", "d" * 64)
    cells = [cell for row in rows for cell in row.values()]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]
    assert rows[4]["task"] == "'=cmd|' /C calc'!A0"


class Tags(HTMLParser):
    """Names of the tags of a page, its attributes and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_needs_nothing_else_and_runs_nothing(run: Run, home: Path) -> None:
    run("audit", "export", "--home", home, "log.html")
    page = Tags()
    page.feed(Path("log.html").read_text())
    assert set(page.tags) == {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "h1",
        "h2",
        "p",
        "table",
        "tr",
        "th",
        "td",
    }
    assert set(page.attributes) == {"lang", "charset"}
    assert EVIL in page.text
    assert "The whole log was verified" in page.text
    assert "5 of 5 lines" in page.text
    assert "round.term left for z" in page.text


def test_a_page_of_a_broken_log_says_so(run: Run, home: Path, last_file: Path) -> None:
    change_a_line(last_file)
    done = run("audit", "export", "--home", home, "log.html", "--job", "job-2", exit_code=5)
    assert "FAULT: audit-000001.jsonl:2" in done.stderr
    page = Tags()
    page.feed(Path("log.html").read_text())
    assert "FAULT: audit-000001.jsonl:2" in page.text
    assert "was verified" not in page.text
    assert "3 of 5 lines: those of job job-2" in page.text


def test_export_overwrites_nothing_and_knows_three_formats(run: Run, home: Path) -> None:
    Path("log.csv").write_text("mine")
    error = only_error(run("audit", "export", "--home", home, "log.csv", "--json", exit_code=2))
    assert "exists, and is not overwritten" in error["message"]
    assert Path("log.csv").read_text() == "mine"
    error = only_error(run("audit", "export", "--home", home, "log.htm", "--json", exit_code=2))
    assert error["hint"] == "did you mean 'html'?"
    only_error(run("audit", "export", "--home", home, "nowhere/log.csv", "--json", exit_code=2))
    assert sorted(path.name for path in Path().iterdir()) == ["home", "log.csv"]
    found = document(run("audit", "export", "--home", home, "other.csv", "--json"))
    assert found == {"ok": True, "file": "other.csv", "lines": 5, "faults": []}


# --- dossiers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def dossier(home: Path) -> Path:
    path = home.parent / "dossier.json"
    path.write_text(json.dumps(Job().run().dossier()))
    return path


def test_a_dossier_is_verified_with_nothing_but_the_roster(run: Run, home: Path, dossier: Path) -> None:
    done = run("audit", "dossier", "verify", dossier, "--roster", home / "federation.yaml")
    assert "everything fits" in done.stdout
    assert len([line for line in done.stdout.splitlines() if line.startswith("train ")]) == 6
    found = document(run("audit", "dossier", "verify", dossier, "--roster", home / "federation.yaml", "--json"))
    assert (found["ok"], found["job"], len(found["table"])) == (True, "job-1", 6)
    # And where there is a roster in the present folder, that one
    Path("federation.yaml").write_text((home / "federation.yaml").read_text())
    run("audit", "dossier", "verify", dossier)


def test_a_false_dossier_ends_with_5_and_names_what_does_not_fit(run: Run, home: Path, dossier: Path) -> None:
    found = json.loads(dossier.read_text())
    found["statements"]["b"]["statement"]["policy"] = "0" * 64
    dossier.write_text(json.dumps(found))
    done = run("audit", "dossier", "verify", dossier, "--roster", home / "federation.yaml", exit_code=5)
    assert "FAULT: the statement of b is not what it signed [statement_signature]" in done.stdout
    assert "everything fits" not in done.stdout
    options = ["--roster", home / "federation.yaml", "--json"]
    faults = document(run("audit", "dossier", "verify", dossier, *options, exit_code=5))["faults"]
    assert [(fault["kind"], fault["party"]) for fault in faults] == [("statement_signature", "b")]


def test_a_roster_with_other_keys_is_not_satisfied(run: Run, home: Path, dossier: Path) -> None:
    roster = federation("a", "b", "c", "z")
    parties = roster["parties"]
    parties["b"]["identity"], parties["c"]["identity"] = parties["c"]["identity"], parties["b"]["identity"]
    (home / "other.yaml").write_text(yaml.safe_dump(roster))
    run("audit", "dossier", "verify", dossier, "--roster", home / "other.yaml", exit_code=5)


def test_show_of_a_dossier_needs_no_roster_and_says_what_that_is_worth(run: Run, dossier: Path) -> None:
    done = run("audit", "dossier", "show", dossier)
    assert "job            job-1, started by a, ended: success" in done.stdout
    assert "dossier verify" in done.stdout.splitlines()[-1]
    found = document(run("audit", "dossier", "show", dossier, "--json"))
    assert found["parties"] == dict.fromkeys("abcz", "success")


def test_names_in_a_dossier_cannot_write_to_the_terminal(run: Run, home: Path) -> None:
    job = Job().run()
    told = job.messages["a"][0]
    job.messages["a"].append(told.__class__("sent", "z", "\x1b[2J", "round.term", 1, 1, 1, "0" * 64, "\x07", 1))
    path = home / "dossier.json"
    path.write_text(json.dumps(job.dossier()))
    assert not set(run("audit", "dossier", "show", path).stdout) & {"\x1b", "\x07"}


def test_what_is_no_dossier_is_refused(run: Run, home: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for content in ("{}", "nothing"):
        path.write_text(content)
        error = only_error(run("audit", "dossier", "show", path, "--json", exit_code=2))
        assert error["code"] == "data_invalid"
