"""What the API shows of jobs: plain JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fate_llm.core.errors import JobCancelled

from ..store.rows import ApprovalRow, JobRow
from .cases import Case
from .post import Post
from .words import JobState, Line, PartView, Trouble
from .workers import Workers

__all__ = ["approval", "job", "lines", "metrics", "summary"]


def summary(row: JobRow) -> dict[str, Any]:
    """One line of a list."""
    state = row.state if row.lead else _standing(row)
    note = "" if row.trouble is None else row.trouble["message"]
    if not row.lead and row.state in ("approval", "refused"):
        state, note = row.state, note or str(row.machine.get("reason", ""))
    return {
        "job": row.job,
        "name": row.name,
        "state": state,
        "lead": row.lead,
        "initiator": row.initiator,
        "attempt": row.attempt,
        "created": row.created,
        "ended": row.ended,
        "note": note[:200],
    }


def _standing(row: JobRow) -> str:
    """`PartMachine.standing` of a machine as it is stored."""
    machine = row.machine
    wanted = str(machine.get("wanted", row.state))
    given_up = machine.get("alone") and machine.get("end") and machine.get("attempt") == machine.get("wanted_attempt")
    return JobState.TIMED_OUT.value if given_up and not JobState(wanted).ended else wanted


def job(case: Case, row: JobRow) -> dict[str, Any]:
    """All that this party may see of a job."""
    machine = case.part
    own = PartView(state=machine.state, tasks=machine.tasks, trouble=machine.trouble, reason=machine.reason)
    parts = dict(case.parts) if case.lead is None else case.lead.parts
    parts[case.party] = own
    state = machine.standing if case.lead is None else case.lead.state
    trouble = row.trouble
    if case.lead is None and case.ending is not None and state.ended:
        trouble = None if case.ending.trouble is None else case.ending.trouble.model_dump(mode="json")
    elif case.lead is None and (told := _cause(parts, case.party)) is not None:
        trouble = told.model_dump(mode="json")
    return {
        "job": case.job,
        "name": case.spec.name,
        "state": state.value,
        "lead": case.lead is not None,
        "initiator": case.initiator,
        "digest": case.signed.digest,
        "attempt": machine.attempt if case.lead is None else case.lead.attempt,
        "priority": case.signed.specification.priority,
        "labels": dict(case.signed.specification.labels),
        "created": case.created,
        "ended": row.ended if state.ended else None,
        "over": case.over,
        "trouble": trouble,
        "parts": {name: parts[name].model_dump(mode="json") for name in case.spec.members if name in parts},
        "findings": [finding.model_dump(mode="json") for finding in machine.findings],
        "restarts": machine.restarts,
        "folder": str(case.folder.path),
    }


def _cause(parts: Mapping[str, PartView], party: str) -> Trouble | None:
    """What went wrong as far as a party knows: its own trouble first, but what stopped others before being stopped."""
    own = [parts[party], *(parts[other] for other in parts if other != party)]
    told = [part.trouble for part in own if part.trouble is not None]
    return min(told, key=lambda trouble: trouble.code == JobCancelled.code, default=None)


def lines(case: Case, found: Sequence[tuple[int, str, Line]], after: int) -> dict[str, Any]:
    """Lines and where to go on. ended: no more will come, or only when a lead that was given up comes back."""
    state = case.part.standing if case.lead is None else case.lead.state
    over = case.part.over if case.lead is None else case.lead.final
    over = over or (case.lead is None and state is not case.part.wanted)  # a lead that was given up
    shown = [{"id": number, "party": party, **line.model_dump(mode="json")} for number, party, line in found]
    return {"lines": shown, "next": found[-1][0] if found else after, "state": state.value, "ended": over}


def approval(row: ApprovalRow) -> dict[str, Any]:
    """A question to the people of this party."""
    return {
        "job": row.job,
        "digest": row.digest,
        "asked": row.asked,
        "findings": row.findings,
        "summary": row.summary,
    }


def metrics(party: str, counts: Mapping[str, int], post: Post, workers: Workers) -> str:
    """Prometheus text format 0.0.4."""
    label = f'party="{party}"'
    text = [
        "# HELP fate_llm_jobs Jobs that this party takes part in, by the state of its part.",
        _type("jobs", "gauge"),
    ]
    text += [f'fate_llm_jobs{{{label},state="{state}"}} {count}' for state, count in sorted(counts.items())]
    text += ["# HELP fate_llm_workers Worker processes that run.", _type("workers", "gauge")]
    text += [f"fate_llm_workers{{{label}}} {len(workers.running())}"]
    text += ["# HELP fate_llm_words_total Words to and from other services.", _type("words_total", "counter")]
    for what, count in sorted(post.counts.items()):
        text.append(f'fate_llm_words_total{{{label},what="{_escaped(what)}"}} {count}')
    text += ["# HELP fate_llm_broker_connected Whether the broker takes words.", _type("broker_connected", "gauge")]
    text += [f"fate_llm_broker_connected{{{label}}} {int(post.connected)}"]
    return "\n".join(text) + "\n"


def _type(name: str, kind: str) -> str:
    return f"# TYPE fate_llm_{name} {kind}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
