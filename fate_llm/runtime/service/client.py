"""Talks to a party's own service, for the command line and for programs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2

from fate_llm.core.errors import (
    ConfigurationError,
    FateError,
    Fault,
    PipelineInvalid,
    ServiceLost,
    UnknownJob,
    error_from,
)

__all__ = ["ServiceClient"]

_PATIENCE = 120.0  # seconds for an answer; a plan asks every party
_LONGEST_WAIT = 25.0
_JOB = re.compile(r"[a-z0-9][a-z0-9_.-]{0,199}")


class ServiceClient:
    """url: http://127.0.0.1:8470. token: the content of the party's token file.

    Every call raises the error that the service answered with, as the class its code belongs to; ServiceLost when
    nobody answers there.
    """

    def __init__(self, url: str, token: str) -> None:
        self._http = httpx2.Client(
            base_url=url, headers={"authorization": f"Bearer {token}"}, timeout=_PATIENCE, trust_env=False
        )
        self._url = url

    @classmethod
    def of_home(cls, home: Path) -> ServiceClient:
        """The service of a party's home folder: where it said that it listens, with the token from there.

        Raises:
            ConfigurationError: no such home. ServiceLost: no service runs there.
        """
        from ..trust.home import open_home

        found = open_home(home)
        running = found.state / "service.json"
        try:
            port, host = (json.loads(running.read_text())[key] for key in ("port", "host"))
        except (OSError, ValueError, KeyError, TypeError):
            raise ServiceLost(f"no service runs for {home}: {running} is not there") from None
        shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        return cls(f"http://{f'[{shown}]' if ':' in shown else shown}:{port}", found.settings.load_token() or "")

    def submit(self, pipeline: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        """A new job; see `POST /v1/jobs`."""
        return self._post("/v1/jobs", {"pipeline": dict(pipeline), **more})

    def plan(self, pipeline: Mapping[str, Any]) -> dict[str, Any]:
        """What every party says to a pipeline before it is a job."""
        return self._post("/v1/plan", {"pipeline": dict(pipeline)})

    def jobs(self, *, states: tuple[str, ...] = (), limit: int = 100) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._get("/v1/jobs", {"state": list(states), "limit": limit})["jobs"]
        return found

    def job(self, job: str) -> dict[str, Any]:
        return self._get(_path(job))

    def lines(self, job: str, *, after: int = 0, wait: float = 0.0, limit: int = 500) -> dict[str, Any]:
        """{"lines": [...], "next": what to give as `after`, "state": the job's}."""
        return self._get(_path(job, "lines"), {"after": after, "wait": wait, "limit": limit})

    def follow(self, job: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """The job's state and new lines, until it has ended and all lines were given."""
        after = 0
        while True:
            found = self.lines(job, after=after, wait=_LONGEST_WAIT)
            after = found["next"]
            yield found["state"], found["lines"]
            if found["ended"] and not found["lines"]:
                return

    def dossier(self, job: str) -> dict[str, Any]:
        return self._get(_path(job, "dossier"))

    def cancel(self, job: str, *, reason: str = "", by: str = "") -> dict[str, Any]:
        return self._post(_path(job, "cancel"), {"reason": reason, "by": by})

    def resume(self, job: str, *, reason: str = "", by: str = "") -> dict[str, Any]:
        return self._post(_path(job, "resume"), {"reason": reason, "by": by})

    def rerun(self, job: str, *, from_task: str, by: str = "") -> dict[str, Any]:
        return self._post(_path(job, "rerun"), {"from_task": from_task, "by": by})

    def approvals(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._get("/v1/approvals")["approvals"]
        return found

    def decide(self, job: str, *, decision: str, digest: str, by: str = "", reason: str = "") -> dict[str, Any]:
        body = {"decision": decision, "digest": digest, "by": by, "reason": reason}
        return self._post(f"/v1/approvals/{_escaped(job)}", body)

    def health(self) -> dict[str, Any]:
        """Also when it is not well: the answer says why."""
        return self._call("GET", "/v1/health", refuse=False)

    def close(self) -> None:
        self._http.close()

    def _get(self, path: str, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return self._call("GET", path, params=params)

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._call("POST", path, json=dict(body))

    def _call(self, method: str, path: str, *, refuse: bool = True, **more: Any) -> dict[str, Any]:
        try:
            answer = self._http.request(method, path, **more)
            found = answer.json()
        except httpx2.HTTPError as error:
            raise ServiceLost(f"the service at {self._url} does not answer: {error}") from None
        except ValueError:
            raise ServiceLost(f"what answers at {self._url} is no service of ours") from None
        if not isinstance(found, dict):
            raise ServiceLost(f"what answers at {self._url} is no service of ours")
        if refuse and answer.status_code >= 400:
            raise _error(found)
        return found


def _error(document: Mapping[str, Any]) -> FateError:
    errors = document.get("errors") or [{}]
    if any(error.get("path") for error in errors):
        faults = [Fault(**{key: error.get(key) for key in Fault.__slots__}) for error in errors]
        return PipelineInvalid(faults)
    first = errors[0]
    if not first.get("code"):
        return ConfigurationError("the service refused, and did not say why")
    return error_from(str(first["code"]), str(first.get("message", "")), str(first.get("hint", "")))


def _escaped(job: str) -> str:
    """A job's id as a part of a path.

    Raises:
        UnknownJob: no job can be called so.
    """
    if _JOB.fullmatch(job) is None:
        raise UnknownJob(f"no job is called {job[:200]!r}: an id is made of small letters, digits, `_`, `-` and `.`")
    return job


def _path(job: str, *more: str) -> str:
    return "/".join(["/v1/jobs", _escaped(job), *more])
