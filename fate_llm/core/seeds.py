"""Seeds for everything that must be repeatable.

Never for keys, masks or noise: those come from the system.
"""

from __future__ import annotations

import hashlib

__all__ = ["derive_seed"]


def derive_seed(seed: int, *labels: str) -> int:
    """A 31-bit seed that depends on the job's seed and on every label (party, task, purpose) only.

    31 bits, because that is what every random number generator in use accepts.
    """
    text = "\x1f".join([str(seed), *labels]).encode("utf-8")
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big") >> 1
