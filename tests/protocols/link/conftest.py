"""Fixtures of the link's tests."""

from __future__ import annotations

from tests.protocols.link.worlds import make_world, world

__all__ = ["make_world", "world"]
