"""What `fate_llm doctor` has found: one line for each thing that was looked at."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["Check", "Report", "Status", "failed", "ok", "skipped", "warning"]

Status = Literal["ok", "warning", "failed", "not checked"]
_WORST: tuple[Status, ...] = ("failed", "warning", "not checked", "ok")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. found: with figures. do: what to do about it; empty when it is well."""

    name: str
    status: Status
    found: str
    do: str = ""


def ok(name: str, found: str) -> Check:
    return Check(name, "ok", found)


def warning(name: str, found: str, do: str) -> Check:
    return Check(name, "warning", found, do)


def failed(name: str, found: str, do: str) -> Check:
    return Check(name, "failed", found, do)


def skipped(name: str, why: str, do: str = "") -> Check:
    return Check(name, "not checked", why, do)


@dataclass(frozen=True, slots=True)
class Report:
    """All checks in the order they are shown."""

    checks: tuple[Check, ...]

    @property
    def status(self) -> Status:
        """failed or warning when a check is, else ok: what could not be checked is no fault."""
        found = {check.status for check in self.checks}
        return "failed" if "failed" in found else "warning" if "warning" in found else "ok"

    def worst(self) -> Check | None:
        """The first of those that matter most; None when nothing failed and nothing is a warning."""
        return next((c for status in _WORST[:2] for c in self.checks if c.status == status), None)

    def counts(self) -> dict[Status, int]:
        """How many of each status, worst first, zeros left out."""
        found: dict[Status, int] = {status: sum(c.status == status for c in self.checks) for status in _WORST}
        return {status: count for status, count in found.items() if count}

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {"checks": [asdict(check) for check in self.checks], "status": self.status}

    @classmethod
    def complete(cls, found: Iterable[Check], names: Iterable[str], why: str) -> Report:
        """`found` with every one of `names` that is missing as not checked, in the order of `names`; then the rest."""
        by_name = {check.name: check for check in found}
        ordered = [by_name.pop(name) if name in by_name else skipped(name, why) for name in names]
        return cls((*ordered, *by_name.values()))
