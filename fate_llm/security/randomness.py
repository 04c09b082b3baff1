"""The one place where unpredictable bytes come from. Never from a seed, never from a generator of numbers."""

from __future__ import annotations

import secrets

__all__ = ["random_bytes", "random_id"]


def random_bytes(count: int) -> bytes:
    """`count` bytes from the operating system."""
    return secrets.token_bytes(count)


def random_id(count: int = 8) -> str:
    """An unpredictable id of `count` bytes as 2 x `count` lower case hex digits."""
    return secrets.token_hex(count)
