"""Records of one length, so that every batch has the same shape whatever order a Trainer draws them in."""

from __future__ import annotations

import json
import random
from pathlib import Path

__all__ = ["write_records"]


def write_records(file: Path, rows: int, *, seed: int) -> Path:
    """`rows` questions and answers as JSON lines; they differ in digits only, and in no digit's place."""
    draw = random.Random(seed)
    with file.open("w", encoding="utf-8") as stream:
        for _ in range(rows):
            number, amount = draw.randrange(10**5, 10**6), draw.randrange(10**3, 10**4)
            record = {
                "instruction": f"Which reference does transfer {number} carry?",
                "output": f"It carries the reference {draw.randrange(10**5, 10**6)} over {amount} euros.",
            }
            stream.write(json.dumps(record) + "\n")
    return file
