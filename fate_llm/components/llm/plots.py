"""Plots of losses, where matplotlib is installed (extra `[eval]`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["loss_plot"]


def loss_plot(histories: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> bool:
    """Draw test and training loss per round of every history into a PNG; False when nothing can be drawn.

    histories: rows of `round`, `loss` and `test_loss` (nats per token), by name.
    """
    if not histories or importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, rows in histories.items():
        for key, style in (("loss", "--"), ("test_loss", "-")):
            points = [(row["round"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), style, marker="o", label=f"{name} {key}")
    axes.set_xlabel("round")
    axes.set_ylabel("loss (nats per token)")
    axes.legend()
    figure.savefig(path, dpi=120)
    return True
