"""The client of a service: every call as the API has it, every error as its class, whoever answers."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from fate_llm.core.errors import (
    ConfigurationError,
    PipelineInvalid,
    PolicyError,
    ServiceLost,
    Unauthorised,
    UnknownJob,
    WrongState,
)
from fate_llm.runtime.service.client import ServiceClient
from tests.runtime.service.offices import make_homes

Serve = Callable[..., tuple[ServiceClient, list[Any]]]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """serve((status, body), ...): a server that answers so, one after the other; what it was asked."""
    servers: list[HTTPServer] = []

    def start(*answers: tuple[int, Any]) -> tuple[ServiceClient, list[Any]]:
        asked: list[Any] = []
        waiting = iter(answers)

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                size = int(self.headers.get("content-length") or 0)
                body = json.loads(self.rfile.read(size)) if size else None
                asked.append((self.command, self.path, body, self.headers.get("authorization")))
                status, found = next(waiting)
                content = found if isinstance(found, bytes) else json.dumps(found).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = answer

            def log_message(self, *_: Any) -> None: ...

        server = HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return ServiceClient(f"http://127.0.0.1:{server.server_port}", "s3cret"), asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def refusal(code: str, **more: Any) -> dict[str, Any]:
    fault = {"file": None, "line": None, "path": "", "code": code, "message": "no", "hint": "yes"}
    return {"ok": False, "errors": [{**fault, **more}]}


def test_calls_are_what_the_api_describes(serve: Serve) -> None:
    client, asked = serve(*[(200, {"jobs": [], "approvals": []})] * 11)
    client.submit({"version": 1}, key="12345678")
    client.plan({"version": 1})
    client.jobs(states=("failed", "running"), limit=7)
    client.job("a.b-c")
    client.lines("j", after=3)
    client.dossier("j")
    client.cancel("j", reason="r", by="b")
    client.resume("j")
    client.rerun("j", from_task="t")
    client.approvals()
    client.decide("j", decision="approve", digest="0" * 64)
    client.close()
    assert [(method, path) for method, path, _, _ in asked] == [
        ("POST", "/v1/jobs"),
        ("POST", "/v1/plan"),
        ("GET", "/v1/jobs?state=failed&state=running&limit=7"),
        ("GET", "/v1/jobs/a.b-c"),
        ("GET", "/v1/jobs/j/lines?after=3&wait=0.0&limit=500"),
        ("GET", "/v1/jobs/j/dossier"),
        ("POST", "/v1/jobs/j/cancel"),
        ("POST", "/v1/jobs/j/resume"),
        ("POST", "/v1/jobs/j/rerun"),
        ("GET", "/v1/approvals"),
        ("POST", "/v1/approvals/j"),
    ]
    assert {authorization for *_, authorization in asked} == {"Bearer s3cret"}
    assert asked[0][2] == {"pipeline": {"version": 1}, "key": "12345678"}
    assert asked[10][2] == {"decision": "approve", "digest": "0" * 64, "by": "", "reason": ""}


@pytest.mark.parametrize("job", ["", "../../etc/passwd", "a/b?c", "J", "j\n", "x" * 201, "-a"])
def test_what_can_be_no_job_is_not_asked_for(serve: Serve, job: str) -> None:
    client, asked = serve()
    for call in (client.job, client.dossier, client.cancel, client.resume, client.lines):
        with pytest.raises(UnknownJob):
            call(job)  # type: ignore[operator]
    with pytest.raises(UnknownJob):
        client.decide(job, decision="approve", digest="0" * 64)
    assert asked == []
    client.close()


def test_a_job_is_followed_until_it_has_ended_and_all_was_read(serve: Serve) -> None:
    def page(lines: list[int], following: int, *, ended: bool) -> tuple[int, Any]:
        return 200, {"lines": lines, "next": following, "state": "running", "ended": ended}

    client, asked = serve(page([1, 2], 2, ended=False), page([3], 3, ended=True), page([], 3, ended=True))
    assert [lines for _, lines in client.follow("j")] == [[1, 2], [3], []]
    assert ["after=0" in asked[0][1], "after=2" in asked[1][1], "after=3" in asked[2][1]] == [True] * 3
    client.close()


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (404, refusal("unknown_job"), UnknownJob),
        (409, refusal("wrong_state"), WrongState),
        (401, refusal("unauthorised"), Unauthorised),
        (403, refusal("policy_refused"), PolicyError),
        (400, refusal("unknown_key", path="tasks.a", line=3, file="p.yaml"), PipelineInvalid),
        (400, {"ok": False, "errors": []}, ConfigurationError),
        (400, {}, ConfigurationError),
        (500, b"<html>oops", ServiceLost),
        (200, [1, 2], ServiceLost),
        (200, b"", ServiceLost),
    ],
)
def test_an_error_has_the_class_of_its_code(serve: Serve, status: int, body: Any, kind: type[Exception]) -> None:
    client, _ = serve((status, body))
    with pytest.raises(kind):
        client.job("j")
    client.close()


def test_health_is_an_answer_also_when_it_is_bad(serve: Serve) -> None:
    client, _ = serve((503, {"status": "failed", "reasons": ["no broker"]}))
    assert client.health()["reasons"] == ["no broker"]
    client.close()


def test_nobody_there(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    client = ServiceClient(f"http://127.0.0.1:{port}", "s3cret")
    with pytest.raises(ServiceLost, match="does not answer") as caught:
        client.job("j")
    assert "s3cret" not in str(caught.value)
    client.close()
    with pytest.raises(ConfigurationError, match="no party's home"):
        ServiceClient.of_home(tmp_path)


def test_a_home_says_where_its_service_is(tmp_path: Path, serve: Serve) -> None:
    home = make_homes(tmp_path) / "parties/a"
    with pytest.raises(ServiceLost, match="no service runs"):
        ServiceClient.of_home(home)
    for content in ("", "[]", "{}", '{"port": 1}'):
        (home / "state/service.json").write_text(content)
        with pytest.raises(ServiceLost):
            ServiceClient.of_home(home)
    client, asked = serve((200, {"status": "ok"}))
    port = int(str(client._http.base_url).rsplit(":", 1)[1].rstrip("/"))
    client.close()
    for host in ("127.0.0.1", "0.0.0.0"):
        (home / "state/service.json").write_text(json.dumps({"host": host, "port": port}))
        found = ServiceClient.of_home(home)
        assert str(port) in str(found._http.base_url)
        found.close()
    (home / "state/service.json").write_text(json.dumps({"host": "::1", "port": 1}))
    found = ServiceClient.of_home(home)
    assert "[::1]" in str(found._http.base_url)
    found.close()
    found = ServiceClient.of_home(home / "party.yaml")
    found.close()
    assert asked == []
