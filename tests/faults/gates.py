"""Stops a real process of a party exactly at a stage of a job, until a test lets it go on or kills it.

`install(folder)` writes a `sitecustomize` that Python runs first in every service and every worker; it wraps the
functions that `WORKER` and `SERVICE` name. A wrapped call asks for a file,

    <folder>/gates/<party>.<service or worker>      {"spot": ..., "label": ..., "when": "before" | "after"}

and stops there for as long as the file is there, after it has written `<file>.reached` with its process id. What runs
is the command that an operator runs, and all of its code; without a file nothing is done.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

__all__ = ["SERVICE", "WORKER", "arm", "install"]

Label = Callable[[tuple[Any, ...], dict[str, Any]], str]
_LINK, _ROUNDS, _SERVICE = "fate_llm.protocols.link", "fate_llm.protocols.rounds.driver", "fate_llm.runtime.service"
_PAUSE = 0.005  # seconds between looks at a gate
_sending = threading.local()  # what the thread is sending, and how many chunks of it were sealed


def _number(args: tuple[Any, ...], _: dict[str, Any]) -> str:
    return str(args[1])


def _message(_: tuple[Any, ...], settings: dict[str, Any]) -> str:
    return f"{settings['kind']}/{settings.get('round', 0)}"


def _event(args: tuple[Any, ...], settings: dict[str, Any]) -> str:
    return f"{args[1]}/{settings.get('step', '')}"


def _action(args: tuple[Any, ...], _: dict[str, Any]) -> str:
    return type(args[2]).__name__


def _kept(args: tuple[Any, ...], _: dict[str, Any]) -> str:
    return f"{args[2].name}/{args[1]}"


def _chunk(_: tuple[Any, ...], __: dict[str, Any]) -> str:
    _sending.chunks = getattr(_sending, "chunks", 0) + 1
    return f"{getattr(_sending, 'message', '')}/{_sending.chunks}"


WORKER: dict[str, tuple[str, str, str, Label | None]] = {
    "agree": (f"{_LINK}.link", "SecureLink", "_agree", None),
    "work": ("fate_llm.runtime.context", "TaskContext", "turn", None),
    "emit": ("fate_llm.runtime.context", "TaskContext", "emit", _event),
    "send": ("fate_llm.protocols.channel", "JobChannel", "send", _message),
    "seal": (f"{_LINK}.peer", "Peer", "seal", _chunk),
    "collect": (_ROUNDS, "CoordinatorDriver", "_collect", _number),
    "commit": ("fate_llm.runtime.journal", "RoundFolder", "commit", _number),
    "keep": ("fate_llm.runtime.sum_journal", "SumFolder", "keep", _kept),
    "done": ("fate_llm.protocols.channel", "JobChannel", "announce_done", None),
    "close": ("fate_llm.protocols.channel", "JobChannel", "close", None),
}
"""What is called, by spot: module, class, method, and what a gate's label is compared with (None: which call it is)."""

SERVICE: dict[str, tuple[str, str, str, Label | None]] = {
    "lead": (f"{_SERVICE}.leading", "Leading", "_do", _action),
    "judge": (f"{_SERVICE}.taking_part", "TakingPart", "_judge", None),
    "start": (f"{_SERVICE}.taking_part", "TakingPart", "_started", None),
    "sign": (f"{_SERVICE}.taking_part", "TakingPart", "_sign", None),
    "close": (f"{_SERVICE}.taking_part", "TakingPart", "_close", None),
    "write": ("fate_llm.runtime.store.engine", "Database", "begin", None),
}


def install(folder: Path) -> None:
    """Make every Python process with `folder` in its PYTHONPATH stop at gates in it."""
    (folder / "gates").mkdir()
    code = f"from tests.faults.gates import arm\narm({str(folder / 'gates')!r})\n"
    (folder / "sitecustomize.py").write_text(code)


def arm(folder: str) -> None:
    """Wrap what may stop in this process, when it is a party's service or worker."""
    words = sys.orig_argv
    if "fate_llm.runtime.worker" in words:
        party, kind, spots = os.environ.get("FATE_TEST_PARTY", ""), "worker", WORKER
    elif "serve" in words and "--home" in words:
        party, kind, spots = Path(words[words.index("--home") + 1]).name, "service", SERVICE
        os.environ["FATE_TEST_PARTY"] = party  # its workers inherit it
    else:
        return
    gate = Path(folder) / f"{party}.{kind}"
    for spot, (module, owner, name, label) in spots.items():
        place = getattr(importlib.import_module(module), owner)
        wrap = _wrap_writing if spot == "write" else _wrap
        setattr(place, name, wrap(getattr(place, name), spot, label, gate))


def _wrap(call: Callable[..., Any], spot: str, label: Label | None, gate: Path) -> Callable[..., Any]:
    counts: Counter[str] = Counter()

    @wraps(call)
    def guarded(*args: Any, **settings: Any) -> Any:
        counts[spot] += 1
        here = str(counts[spot]) if label is None else label(args, settings)
        if spot == "send":
            _sending.message, _sending.chunks = here, 0
        _stop(gate, spot, here, "before")
        found = call(*args, **settings)
        _stop(gate, spot, here, "after")
        return found

    return guarded


def _wrap_writing(call: Callable[..., Any], spot: str, _: Label | None, gate: Path) -> Callable[..., Any]:
    """A transaction stops with its rows written and nothing committed."""

    @contextlib.contextmanager
    def guarded(*args: Any, write: bool) -> Iterator[Any]:
        with call(*args, write=write) as connection:
            yield connection
            if write:
                _stop(gate, spot, "", "before")

    return guarded


def _stop(gate: Path, spot: str, here: str, when: str) -> None:
    """Stay here while there is a gate for this spot, this call of it, and this side of the call."""
    try:
        asked = json.loads(gate.read_text())
    except (OSError, ValueError):
        return
    if asked["spot"] != spot or asked["when"] != when or asked["label"] not in ("", here):
        return
    gate.with_name(f"{gate.name}.reached").write_text(str(os.getpid()))
    while gate.exists():
        time.sleep(_PAUSE)
