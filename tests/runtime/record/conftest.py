"""Identities, messages and logs for the tests of the record."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fate_llm.protocols.channel import Passed
from fate_llm.runtime.record.audit import AuditLog
from fate_llm.security.identity import Identity

IDENTITIES = {party: Identity(hashlib.sha256(party.encode()).digest()) for party in ("a", "b", "c", "z")}
ROSTER = {party: identity.public for party, identity in IDENTITIES.items()}
OpenLog = Callable[..., AuditLog]


def passed(**changes: Any) -> Passed:
    """A term of round 1 on its way to the arbiter, but for what is said."""
    usual: dict[str, Any] = {
        "direction": "sent",
        "peer": "z",
        "task": "train",
        "kind": "round.term",
        "round": 1,
        "ordinal": 1,
        "bytes": 1000,
        "form": {"w": ["float32", [2, 3]]},
        "digest": "d" * 64,
        "protection": "plain",
    }
    return Passed(**{**usual, **changes})


@pytest.fixture
def open_log(tmp_path: Path) -> Iterator[OpenLog]:
    """Opens the log of party a, again and again; its clock ticks once a look."""
    clock = itertools.count(1000)
    opened: list[AuditLog] = []

    def make(folder: Path | None = None, **options: Any) -> AuditLog:
        log = AuditLog.open(folder or tmp_path / "audit", IDENTITIES["a"], "a", lambda: float(next(clock)), **options)
        opened.append(log)
        return log

    yield make
    for log in opened:
        log.close()
