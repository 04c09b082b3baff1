"""`fate_llm jobs`, `party approvals` and `submit --home`, before a service that says what a test wants."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fate_llm.cli import services
from fate_llm.core.errors import ServiceLost, UnknownJob
from tests.cli.conftest import Run, Write, document, only_error
from tests.runtime.toys import toy_pipeline

EVIL = "\x1b[2J\x1b[31mred\nsuccess: all is well\r\x07\u202e"
JOB = "toys-20260101-000000-abcd"
DIGEST = "ab" * 32


def job(**more: Any) -> dict[str, Any]:
    view = {"state": "running", "tasks": {"train": {"state": "running", "round": 2, "rounds": 5}}, "reason": ""}
    found = {
        "job": JOB,
        "name": "toys",
        "state": "running",
        "initiator": "a",
        "attempt": 1,
        "priority": 5,
        "created": 1_790_000_000.0,
        "ended": None,
        "trouble": None,
        "parts": {"a": view, "b": {**view, "state": "failed", "reason": EVIL}},
        "findings": [{"rule": "models", "outcome": "refuse", "found": EVIL, "allowed": EVIL}],
    }
    return {**found, **more}


def line(number: int, **more: Any) -> dict[str, Any]:
    usual = {"id": number, "party": "b", "seconds": 1.0, "event": "round", "task": "train", "fields": {}}
    return {**usual, **more}


class Service:
    """Notes what it is asked; answers with what `answers` has."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.answers: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.asked.append((name, args, kwargs))
            answer = self.answers[name]
            found = answer.pop(0) if isinstance(answer, list) and name in ("lines", "follow") else answer
            if isinstance(found, BaseException):
                raise found
            return found

        return call


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    found = Service()
    monkeypatch.setattr(services, "client_of", lambda home: found)
    return found


def harmless(text: str) -> None:
    assert not {sign for sign in text if not sign.isprintable()} - {"\n"}
    assert "success: all is well" not in text.splitlines()


def test_a_list_has_a_line_for_each_job(run: Run, service: Service) -> None:
    row = {"job": JOB, "state": "failed", "lead": True, "initiator": "a", "created": 1.0, "note": EVIL}
    service.answers["jobs"] = [row, {**row, "lead": False, "note": ""}]
    text = run("jobs", "list", "--state", "failed", "--state", "running", "--limit", "2").stdout
    assert service.asked == [("jobs", (), {"states": ("failed", "running"), "limit": 2})]
    assert len(text.splitlines()) == 2
    assert "leads" in text
    assert "of a" in text
    harmless(text)
    service.answers["jobs"] = []
    assert run("jobs", "list").stdout == "no jobs\n"
    assert document(run("jobs", "list", "--json")) == {"jobs": []}
    run("jobs", "list", "--limit", "0", exit_code=2)


def test_a_job_is_shown_party_by_party_and_no_partner_writes_on_our_terminal(run: Run, service: Service) -> None:
    trouble = {"code": EVIL, "message": EVIL, "hint": EVIL, "party": "b"}
    service.answers["job"] = job(trouble=trouble, ended=1_790_000_060.0)
    text = run("jobs", "show", JOB).stdout
    assert "2026-09-21 14:14:20" in text
    assert "train: running 2/5" in text
    assert "red success: all is well" in text, "what can be read is shown, on the line where it belongs"
    harmless(text)
    assert document(run("jobs", "show", JOB, "--json"))["trouble"]["message"] == EVIL


def test_logs_end_with_the_job_when_followed_and_at_once_when_not(run: Run, service: Service) -> None:
    first = {"lines": [line(1, fields={"loss": 1.5, "text": EVIL}), line(2, party="c")], "next": 2, "ended": False}
    quiet = {"lines": [], "next": 2, "ended": False}
    last = {"lines": [line(3, event=EVIL, task=EVIL)], "next": 3, "ended": True}
    over = {"lines": [], "next": 3, "ended": True}
    service.answers["lines"] = [first, quiet, last, over]
    text = run("jobs", "logs", JOB, "-f").stdout
    assert len(text.splitlines()) == 3
    assert "loss=1.5" in text
    harmless(text)
    assert [asked[2]["after"] for asked in service.asked] == [0, 2, 2, 3]
    assert all(asked[2]["wait"] > 0 for asked in service.asked)
    service.answers["lines"] = [first, quiet]
    found = [json.loads(row) for row in run("jobs", "logs", JOB, "--json", "--party", "c").stdout.splitlines()]
    assert [row["id"] for row in found] == [2]


@pytest.mark.parametrize(
    ("command", "more"),
    [("cancel", ["--reason", "enough"]), ("resume", ["--reason", "again"]), ("rerun", ["--from", "train"])],
)
def test_wishes_reach_the_service_with_who_has_them(
    run: Run, service: Service, monkeypatch: pytest.MonkeyPatch, command: str, more: list[str]
) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "eve")
    service.answers[command] = job(state="cancelled")
    assert run("jobs", command, JOB, *more).stdout == f"{JOB}: cancelled\n"
    name, arguments, options = service.asked[0]
    assert (name, arguments, options["by"]) == (command, (JOB,), "eve")
    assert more[1] in options.values()
    assert document(run("jobs", command, JOB, *more, "--json"))["state"] == "cancelled"


def test_a_rerun_names_a_task(run: Run, service: Service) -> None:
    run("jobs", "rerun", JOB, exit_code=2)
    assert service.asked == []


def test_a_dossier_is_written_once(run: Run, service: Service, tmp_path: Path) -> None:
    service.answers["dossier"] = {"version": 1, "statements": {"b": {}, "a": {}}}
    assert "signed by a, b" in run("jobs", "dossier", JOB, "d.json").stdout
    assert json.loads((tmp_path / "d.json").read_text())["version"] == 1
    assert "cannot be written: File exists" in run("jobs", "dossier", JOB, "d.json", exit_code=2).stderr
    assert "cannot be written" in run("jobs", "dossier", JOB, "nowhere/d.json", exit_code=2).stderr


def test_errors_of_the_service_are_those_of_the_command(run: Run, service: Service) -> None:
    service.answers["job"] = UnknownJob("this party has no job 'x'")
    assert only_error(run("jobs", "show", "x", "--json", exit_code=2))["code"] == "unknown_job"
    service.answers["jobs"] = ServiceLost("nobody answers")
    assert "party serve" in run("jobs", "list", exit_code=4).stderr


def test_without_a_home_or_a_service_it_says_what_to_do(run: Run, tmp_path: Path) -> None:
    assert "is no party's home" in run("jobs", "list", exit_code=2).stderr
    assert "is no party's home" in run("jobs", "list", "--home", tmp_path / "nowhere", exit_code=2).stderr


# --- approvals ------------------------------------------------------------------------------------------------------


@pytest.fixture
def waiting(service: Service) -> Service:
    summary = {"pipeline": "toys", "initiator": "a", "members": ["a", "b"], "tasks": ["train"]}
    findings = [{"rule": "manual.any", "outcome": "manual", "found": EVIL, "allowed": "a person decides"}]
    row = {"job": JOB, "digest": DIGEST, "asked": 1.0, "summary": summary, "findings": findings}
    service.answers |= {"approvals": [row], "decide": job()}
    return service


def test_what_waits_is_listed_and_shown_with_its_digest(run: Run, waiting: Service) -> None:
    assert JOB in run("party", "approvals").stdout
    assert document(run("party", "approvals", "list", "--json"))["approvals"][0]["digest"] == DIGEST
    text = run("party", "approvals", "show", JOB).stdout
    assert DIGEST in text
    assert "our tasks: train" in text
    harmless(text)
    waiting.answers["approvals"] = []
    assert "nothing waits" in run("party", "approvals", "list").stdout


def test_a_decision_is_about_what_was_shown(run: Run, waiting: Service) -> None:
    assert f"{JOB}: approved" in run("party", "approvals", "approve", JOB, "--digest", DIGEST[:8]).stdout
    name, arguments, options = waiting.asked[-1]
    assert (name, arguments, options["decision"], options["digest"]) == ("decide", (JOB,), "approve", DIGEST)
    assert f"{JOB}: refused" in run("party", "approvals", "refuse", JOB, "--reason", "no").stdout
    count = len(waiting.asked)
    assert "what waits is" in run("party", "approvals", "approve", JOB, "--digest", "cd", exit_code=2).stderr
    assert "does not wait" in run("party", "approvals", "refuse", "toys-2026", exit_code=2).stderr
    assert [asked[0] for asked in waiting.asked[count:]] == ["approvals", "approvals"], "nothing was decided"


def test_health_is_an_exit_code(run: Run, service: Service) -> None:
    service.answers["health"] = {"status": "ok", "reasons": []}
    assert run("party", "health").stdout == "ok\n"
    service.answers["health"] = {"status": "failed", "reasons": ["no connection to the broker"]}
    assert "no connection" in run("party", "health", exit_code=1).stdout
    service.answers["health"] = ServiceLost("nobody is there")
    assert document(run("party", "health", "--json", exit_code=1))["reasons"] == ["nobody is there"]


# --- submit ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("with_toys")
class TestSubmit:
    def test_a_job_is_followed_to_its_end(self, run: Run, write: Write, service: Service, tmp_path: Path) -> None:
        lines: Iterator[Any] = iter([("running", [line(1, event="task_started", fields={"component": EVIL})])])
        service.answers |= {"submit": job(), "follow": [lines], "job": job(state="success")}
        text = run("submit", write(toy_pipeline()), "--home", tmp_path).stdout
        assert f"fate_llm jobs show {JOB}" in text
        assert f"{JOB}  success" in text
        harmless(text)
        assert len(service.asked[0][2]["key"]) >= 8, "sent twice, it would run once"

    def test_its_trouble_is_the_exit_code(self, run: Run, write: Write, service: Service, tmp_path: Path) -> None:
        trouble = {"code": "policy_refused", "message": "b refuses", "hint": "", "party": "b"}
        failed = job(state="failed", trouble=trouble)
        service.answers |= {"submit": job(), "follow": [iter([])], "job": failed}
        assert document(run("submit", write(toy_pipeline()), "--home", tmp_path, "--json", exit_code=3)) == failed

    def test_detached_it_prints_the_id(self, run: Run, write: Write, service: Service, tmp_path: Path) -> None:
        service.answers["submit"] = job()
        assert run("submit", write(toy_pipeline()), "--home", tmp_path, "--detach").stdout == f"{JOB}\n"

    def test_ctrl_c_ends_the_watching_only(self, run: Run, write: Write, service: Service, tmp_path: Path) -> None:
        service.answers |= {"submit": job(), "follow": [KeyboardInterrupt()]}
        done = run("submit", write(toy_pipeline()), "--home", tmp_path, exit_code=130)
        assert "the job goes on" in done.stderr
        assert f"fate_llm jobs cancel {JOB}" in done.stderr
        assert [asked[0] for asked in service.asked] == ["submit", "follow"]

    def test_a_plan_has_a_page(self, run: Run, write: Write, service: Service, tmp_path: Path) -> None:
        costs = {
            "sent_bytes": 4_000_000,
            "received_bytes": None,
            "memory_bytes": 1024,
            "minutes": 1.25,
            "privacy": EVIL,
        }
        good = {"verdict": "accept", "findings": [], "estimates": costs, "trouble": None}
        findings = [{"rule": "models", "outcome": "refuse", "found": EVIL, "allowed": ""}]
        trouble = {"code": "timeout", "message": EVIL, "hint": ""}
        bad = {"verdict": "refuse", "findings": findings, "estimates": None, "trouble": trouble}
        service.answers["plan"] = {"name": "toys", "digest": DIGEST, "parties": {"a": good, "b": good}}
        text = run("submit", write(toy_pipeline()), "--home", tmp_path, "--plan").stdout
        assert "receives unknown" in text
        assert "time 1.2 min" in text
        harmless(text)
        service.answers["plan"]["parties"]["b"] = bad
        text = run("submit", write(toy_pipeline()), "--home", tmp_path, "--plan", exit_code=3).stdout
        assert "b: refuse" in text
        harmless(text)

    @pytest.mark.parametrize("options", [["--plan"], ["--detach"], ["--home", "x", "--broker", "amqp://localhost"]])
    def test_options_that_do_not_go_together(
        self, run: Run, write: Write, service: Service, options: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("FATE_LLM_HOME", raising=False)
        only_error(run("submit", write(toy_pipeline()), *options, "--json", exit_code=2))
        assert service.asked == []
