"""The HTTP API: every call reaches the engine with its values, and nothing bad does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fate_llm.core import errors
from fate_llm.core.errors import Fault, InternalError, PipelineInvalid, UnknownJob, WrongState
from fate_llm.runtime.service.api import LARGEST_BODY, create_app, status_of

TOKEN = "a-token-of-some-length"
DIGEST = "0" * 64
CALLS = [
    ("post", "/v1/jobs", {"pipeline": {"version": 1}}),
    ("post", "/v1/plan", {"pipeline": {"version": 1}}),
    ("get", "/v1/jobs", None),
    ("get", "/v1/jobs/j", None),
    ("get", "/v1/jobs/j/lines", None),
    ("get", "/v1/jobs/j/dossier", None),
    ("post", "/v1/jobs/j/cancel", {}),
    ("post", "/v1/jobs/j/resume", {}),
    ("post", "/v1/jobs/j/rerun", {"from_task": "t"}),
    ("get", "/v1/approvals", None),
    ("post", "/v1/approvals/j", {"decision": "approve", "digest": DIGEST}),
    ("get", "/v1/metrics", None),
]


class Recorder:
    """Stands in for the engine: notes what it is asked, and answers or raises what a test says."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.error: Exception | None = None
        self.well = True

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.asked.append((name, args, kwargs))
            if self.error is not None:
                raise self.error
            answers: dict[str, Any] = {"jobs": [], "approvals": [], "metrics": "fate_llm_jobs 0\n"}
            return answers.get(name, {"called": name})

        return call

    def health(self) -> dict[str, Any]:
        return {"status": "ok" if self.well else "failed", "reasons": []}


@pytest.fixture
def engine() -> Recorder:
    return Recorder()


@pytest.fixture
def client(engine: Recorder) -> Iterator[TestClient]:
    with TestClient(create_app(engine, TOKEN), raise_server_exceptions=False) as client:
        client.headers["authorization"] = f"Bearer {TOKEN}"
        yield client


def request(client: TestClient, method: str, path: str, body: Any) -> httpx2.Response:
    return client.request(method, path, json=body) if body is not None else client.request(method, path)


@pytest.mark.parametrize(("method", "path", "body"), CALLS)
@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer x", f"Basic {TOKEN}", f"bearer {TOKEN}", f"Bearer {TOKEN}x"]
)
def test_nothing_is_done_without_the_token(
    engine: Recorder, client: TestClient, method: str, path: str, body: Any, header: str | None
) -> None:
    del client.headers["authorization"]
    if header is not None:
        client.headers["authorization"] = header
    answer = request(client, method, path, body)
    assert answer.status_code == 401
    assert answer.json()["errors"][0]["code"] == "unauthorised"
    assert engine.asked == []


@pytest.mark.parametrize(("method", "path", "body"), CALLS)
def test_every_call_reaches_the_engine(engine: Recorder, client: TestClient, method: str, path: str, body: Any) -> None:
    answer = request(client, method, path, body)
    assert answer.status_code in (200, 201)
    assert len(engine.asked) == 1


def test_the_values_of_a_call_arrive(engine: Recorder, client: TestClient) -> None:
    client.post("/v1/jobs", json={"pipeline": {"a": 1}, "priority": 3, "labels": {"x": "y"}, "key": "12345678"})
    client.get("/v1/jobs/a.b-c/lines?after=7&limit=9&wait=0.5")
    client.get("/v1/jobs?state=failed&state=running&limit=5")
    client.post("/v1/approvals/j", json={"decision": "refuse", "digest": DIGEST, "by": "me", "reason": "no"})
    client.post("/v1/jobs/j/rerun", json={"from_task": "t", "by": "me"})
    assert engine.asked == [
        ("submit", ({"a": 1},), {"priority": 3, "labels": {"x": "y"}, "key": "12345678"}),
        ("lines", ("a.b-c",), {"after": 7, "limit": 9, "wait": 0.5}),
        ("jobs", (), {"states": ("failed", "running"), "limit": 5}),
        ("decide", ("j",), {"decision": "refuse", "digest": DIGEST, "by": "me", "reason": "no"}),
        ("rerun", ("j",), {"from_task": "t", "by": "me"}),
    ]


def test_the_health_needs_no_token_and_says_when_it_is_not_well(engine: Recorder, client: TestClient) -> None:
    del client.headers["authorization"]
    assert client.get("/v1/health").status_code == 200
    engine.well = False
    assert client.get("/v1/health").status_code == 503


@pytest.mark.parametrize("error", [e for e in errors.all_errors() if e not in (PipelineInvalid, errors.FateError)])
def test_every_error_of_ours_has_its_status_and_code(
    engine: Recorder, client: TestClient, error: type[errors.FateError]
) -> None:
    engine.error = error("it went wrong") if error.__init__ is errors.FateError.__init__ else error("it", hint="h")
    answer = client.get("/v1/jobs/j")
    assert answer.status_code == status_of(engine.error)
    assert answer.json()["errors"][0]["code"] == error.code


@pytest.mark.parametrize(
    ("error", "status"), [(UnknownJob("x"), 404), (WrongState("x"), 409), (InternalError("x"), 500)]
)
def test_the_statuses_that_callers_rely_on(error: errors.FateError, status: int) -> None:
    assert status_of(error) == status


def test_faults_of_a_pipeline_come_one_by_one(engine: Recorder, client: TestClient) -> None:
    engine.error = PipelineInvalid([Fault("bad", None, 3, "tasks.x", "is wrong", "mend it")])
    answer = client.post("/v1/jobs", json={"pipeline": {}})
    assert answer.status_code == 400
    assert answer.json()["errors"] == [
        {"code": "bad", "file": None, "line": 3, "path": "tasks.x", "message": "is wrong", "hint": "mend it"}
    ]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("post", "/v1/jobs", {"pipeline": []}),
        ("post", "/v1/jobs", {"pipeline": {}, "priority": 10}),
        ("post", "/v1/jobs", {"pipeline": {}, "unknown": 1}),
        ("post", "/v1/jobs", {"pipeline": {}, "key": "short"}),
        ("post", "/v1/jobs", []),
        ("get", "/v1/jobs?limit=0", None),
        ("get", "/v1/jobs/j/lines?wait=3600", None),
        ("post", "/v1/approvals/j", {"decision": "approve"}),
        ("post", "/v1/approvals/j", {"decision": "perhaps", "digest": DIGEST}),
        ("post", "/v1/jobs/j/rerun", {}),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(
    engine: Recorder, client: TestClient, method: str, path: str, body: Any
) -> None:
    answer = request(client, method, path, body)
    assert answer.status_code == 422
    assert all(fault["path"] and fault["message"] for fault in answer.json()["errors"])
    assert engine.asked == []


def test_unknown_places_and_methods_are_ours_too(client: TestClient) -> None:
    for answer, status in ((client.get("/v1/nothing"), 404), (client.delete("/v1/jobs"), 405)):
        assert answer.status_code == status
        assert answer.json()["ok"] is False


def test_a_large_body_is_refused_before_it_is_read(engine: Recorder, client: TestClient) -> None:
    answer = client.post("/v1/jobs", content=b" " * (LARGEST_BODY + 1))
    assert answer.status_code == 413
    assert engine.asked == []


def test_the_largest_body_is_read(engine: Recorder, client: TestClient) -> None:
    text = json.dumps({"pipeline": {"a": ""}})
    body = text.replace('""', '"' + "x" * (LARGEST_BODY - len(text)) + '"')
    assert client.post("/v1/jobs", content=body, headers={"content-type": "application/json"}).status_code == 201
    assert len(engine.asked) == 1


def test_the_description_names_every_call(client: TestClient) -> None:
    found = client.get("/v1/openapi.json").json()
    described = {(method, path.replace("{job}", "j")) for path, methods in found["paths"].items() for method in methods}
    assert described == {(method, path) for method, path, _ in CALLS} | {("get", "/v1/health")}
    assert all(entry["summary"] for methods in found["paths"].values() for entry in methods.values())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=15,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    call=st.sampled_from(CALLS),
    body=JSON,
    raw=st.one_of(st.none(), st.binary(max_size=200)),
    job=st.text(min_size=1, max_size=30),
)
def test_no_request_crashes_the_service(client: TestClient, call: Any, body: Any, raw: bytes | None, job: str) -> None:
    """Whatever is sent, the answer is one of ours: never a 500, never something else than JSON."""
    from urllib.parse import quote

    method, path, _ = call
    path = path.replace("/j", "/" + quote(job, safe=""), 1) if path.endswith("/j") else path
    content = raw if raw is not None else json.dumps(body).encode()
    answer = client.request(method, path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code < 500
    if path != "/v1/metrics" and answer.status_code not in (307,):
        assert isinstance(answer.json(), dict)
