"""Records of many lengths, as a reader would have written them."""

from __future__ import annotations

from pathlib import Path

from fate_llm.components.llm.records import Record, write_dataset

__all__ = ["dataset"]


def dataset(folder: Path, count: int) -> Path:
    """`count` records whose lengths differ; the same every time."""
    records = [
        Record.from_instruction(f"r{i}", instruction=f"say {'a' * (i * 7 % 23)}", output=f"{'b' * (i * 5 % 11)} {i}")
        for i in range(count)
    ]
    write_dataset(folder, records)
    return folder
