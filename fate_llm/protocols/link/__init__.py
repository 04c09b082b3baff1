"""The link between the parties of a job: sealed, exact, resumable; over any transport."""

from __future__ import annotations

from .link import LinkCounters, SecureLink, Timing

__all__ = ["LinkCounters", "SecureLink", "Timing"]
