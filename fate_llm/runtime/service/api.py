"""The local HTTP API of a party's service: JSON over loopback, for the command line, notebooks and boards.

Everything but `/v1/health` and the description needs the party's token (`Authorization: Bearer ...`). Nothing here
decides anything: each call is handed to the engine, which answers or raises one of our errors; its class gives the
status, and the body is the document that `--json` prints.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal, Protocol

from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fate_llm import __version__
from fate_llm.core.errors import (
    ConfigurationError,
    FateError,
    FederationError,
    PipelineInvalid,
    PolicyError,
    RoundTimeout,
    Unauthorised,
    UnknownJob,
    WrongState,
)
from fate_llm.core.interfaces import Frozen

__all__ = [
    "LARGEST_BODY",
    "Asked",
    "Calls",
    "Decision",
    "Rerun",
    "Submission",
    "Wish",
    "create_app",
    "status_of",
]

LARGEST_BODY = 2 * 1024 * 1024  # bytes of a request; a pipeline has some thousand
_LONGEST_WAIT = 30.0
Text = Annotated[str, Field(max_length=500)]


class Submission(Frozen):
    """A pipeline as `load_pipeline` resolved it. key: the same key again gives the same job, not another."""

    pipeline: dict[str, Any]
    priority: int | None = Field(None, ge=0, le=9)
    labels: dict[Annotated[str, Field(max_length=100)], Text] = Field(default_factory=dict, max_length=20)
    key: str | None = Field(None, pattern=r"^[A-Za-z0-9_-]{8,64}$")


class Asked(Frozen):
    """A pipeline that is only asked about."""

    pipeline: dict[str, Any]


class Wish(Frozen):
    """Who wants it, and why."""

    reason: Text = ""
    by: Text = ""


class Rerun(Frozen):
    """from_task: this task and all that read from it run again; the others' outputs are used as they are."""

    from_task: Text
    by: Text = ""


class Decision(Frozen):
    """digest: of the specification that was looked at, so that nobody approves another."""

    decision: Literal["approve", "refuse"]
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    by: Text = ""
    reason: Text = ""


class Calls(Protocol):
    """What the engine does for the API. Each may raise a FateError; each returns plain JSON values."""

    def submit(
        self, pipeline: dict[str, Any], *, priority: int | None, labels: dict[str, str], key: str | None
    ) -> dict[str, Any]: ...
    def plan(self, pipeline: dict[str, Any]) -> dict[str, Any]: ...
    def jobs(self, *, states: tuple[str, ...], limit: int) -> list[dict[str, Any]]: ...
    def job(self, job: str) -> dict[str, Any]: ...
    def lines(self, job: str, *, after: int, limit: int, wait: float) -> dict[str, Any]: ...
    def dossier(self, job: str) -> dict[str, Any]: ...
    def cancel(self, job: str, *, reason: str, by: str) -> dict[str, Any]: ...
    def resume(self, job: str, *, reason: str, by: str) -> dict[str, Any]: ...
    def rerun(self, job: str, *, from_task: str, by: str) -> dict[str, Any]: ...
    def approvals(self) -> list[dict[str, Any]]: ...
    def decide(self, job: str, *, decision: str, digest: str, by: str, reason: str) -> dict[str, Any]: ...
    def health(self) -> dict[str, Any]: ...
    def metrics(self) -> str: ...


_STATUS: tuple[tuple[type[FateError], int], ...] = (
    (UnknownJob, 404),
    (WrongState, 409),
    (ConfigurationError, 400),
    (Unauthorised, 401),
    (PolicyError, 403),
    (RoundTimeout, 504),
    (FederationError, 502),
)


def status_of(error: FateError) -> int:
    """The HTTP status of an error of ours; 500 for what is not the caller's doing."""
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def create_app(calls: Calls, token: str) -> FastAPI:
    """The application. token: what callers must show; compared in constant time."""
    app = FastAPI(
        title="fate_llm party service",
        version=__version__,
        description=(__doc__ or "").strip(),
        docs_url=None,
        redoc_url=None,
        openapi_url="/v1/openapi.json",
    )
    app.add_middleware(_Bounded)
    _add_errors(app)

    def allowed(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode("utf-8", "replace"), f"Bearer {token}".encode()):
            raise Unauthorised("the request does not carry this party's token")

    _add_open(app, calls)
    _add_jobs(app, calls, [Depends(allowed)])
    _add_people(app, calls, [Depends(allowed)])
    return app


def _add_open(app: FastAPI, calls: Calls) -> None:
    @app.get("/v1/health", summary="Whether the service can work", tags=["service"])
    def health() -> JSONResponse:
        found = calls.health()
        return JSONResponse(found, 200 if found["status"] == "ok" else 503)


def _add_jobs(app: FastAPI, calls: Calls, allowed: list[Any]) -> None:
    @app.post("/v1/jobs", status_code=201, summary="Submit a pipeline", tags=["jobs"], dependencies=allowed)
    def submit(body: Submission) -> dict[str, Any]:
        return calls.submit(body.pipeline, priority=body.priority, labels=body.labels, key=body.key)

    @app.post("/v1/plan", summary="Ask every party what it would cost", tags=["jobs"], dependencies=allowed)
    def plan(body: Asked) -> dict[str, Any]:
        return calls.plan(body.pipeline)

    @app.get("/v1/jobs", summary="The jobs of this party, newest first", tags=["jobs"], dependencies=allowed)
    def jobs(
        state: Annotated[list[str] | None, Query()] = None, limit: Annotated[int, Query(ge=1, le=1000)] = 100
    ) -> dict[str, Any]:
        return {"jobs": calls.jobs(states=tuple(state or ()), limit=limit)}

    @app.get("/v1/jobs/{job}", summary="One job, party by party", tags=["jobs"], dependencies=allowed)
    def job(job: str) -> dict[str, Any]:
        return calls.job(job)

    @app.get("/v1/jobs/{job}/lines", summary="What happened, as far as shown", tags=["jobs"], dependencies=allowed)
    def lines(
        job: str,
        after: Annotated[int, Query(ge=0)] = 0,
        limit: Annotated[int, Query(ge=1, le=5000)] = 500,
        wait: Annotated[float, Query(ge=0, le=_LONGEST_WAIT)] = 0.0,
    ) -> dict[str, Any]:
        return calls.lines(job, after=after, limit=limit, wait=wait)

    @app.get("/v1/jobs/{job}/dossier", summary="The signed record of a job", tags=["jobs"], dependencies=allowed)
    def dossier(job: str) -> dict[str, Any]:
        return calls.dossier(job)

    @app.post("/v1/jobs/{job}/cancel", summary="Stop a job at all parties", tags=["jobs"], dependencies=allowed)
    def cancel(job: str, body: Wish) -> dict[str, Any]:
        return calls.cancel(job, reason=body.reason, by=body.by)

    @app.post("/v1/jobs/{job}/resume", summary="Go on with a job that ended", tags=["jobs"], dependencies=allowed)
    def resume(job: str, body: Wish) -> dict[str, Any]:
        return calls.resume(job, reason=body.reason, by=body.by)

    @app.post(
        "/v1/jobs/{job}/rerun",
        status_code=201,
        summary="A new job from one task on",
        tags=["jobs"],
        dependencies=allowed,
    )
    def rerun(job: str, body: Rerun) -> dict[str, Any]:
        return calls.rerun(job, from_task=body.from_task, by=body.by)


def _add_people(app: FastAPI, calls: Calls, allowed: list[Any]) -> None:
    @app.get("/v1/approvals", summary="What waits for a human", tags=["approvals"], dependencies=allowed)
    def approvals() -> dict[str, Any]:
        return {"approvals": calls.approvals()}

    @app.post("/v1/approvals/{job}", summary="Approve or refuse a job", tags=["approvals"], dependencies=allowed)
    def decide(job: str, body: Decision) -> dict[str, Any]:
        return calls.decide(job, decision=body.decision, digest=body.digest, by=body.by, reason=body.reason)

    @app.get("/v1/metrics", summary="Prometheus text", tags=["service"], dependencies=allowed)
    def metrics() -> PlainTextResponse:
        return PlainTextResponse(calls.metrics(), media_type="text/plain; version=0.0.4")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(FateError)
    async def ours(request: Request, error: FateError) -> JSONResponse:
        return JSONResponse(_document(error), status_of(error))

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        places = [(".".join(map(str, found["loc"])), found["msg"]) for found in error.errors()[:20]]
        errors = [_fault("configuration", text, path=path) for path, text in places]
        return JSONResponse({"ok": False, "errors": errors}, 422)

    @app.exception_handler(HTTPException)
    async def unrouted(request: Request, error: HTTPException) -> JSONResponse:
        text = f"{request.method} {request.url.path[:200]}: {error.detail}"
        return JSONResponse({"ok": False, "errors": [_fault("configuration", text)]}, error.status_code)


def _fault(code: str, message: str, *, path: str = "") -> dict[str, Any]:
    hint = "GET /v1/openapi.json describes every call."
    return {"file": None, "line": None, "path": path, "code": code, "message": message, "hint": hint}


def _document(error: FateError) -> dict[str, Any]:
    if isinstance(error, PipelineInvalid):
        return {"ok": False, "errors": [fault.as_dict() for fault in error.faults]}
    return {"ok": False, "errors": [{"file": None, "line": None, "path": "", **error.as_dict()}]}


class _Bounded:
    """Refuses a request body above `LARGEST_BODY` before more than that of it is in memory."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        taken: list[Message] = []
        size = 0
        while True:
            message = await receive()
            taken.append(message)
            size += len(message.get("body", b""))
            if size > LARGEST_BODY:
                text = f"a request of more than {LARGEST_BODY} bytes"
                answer = JSONResponse({"ok": False, "errors": [_fault("configuration", text)]}, 413)
                await answer(scope, receive, send)
                return
            if not message.get("more_body", False):
                break
        await self._app(scope, _replay(taken, receive), send)


def _replay(taken: list[Message], receive: Receive) -> Callable[[], Awaitable[Message]]:
    waiting = iter(taken)

    async def again() -> Message:
        for message in waiting:
            return message
        return await receive()

    return again
