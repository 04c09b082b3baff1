"""What an audit of updates found, judged and written: report.json, report.md and a plot. Numbers only."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fate_llm.core.values import Array

from .audit_spans import Findings, Guess

__all__ = ["View", "distance_plot", "judge", "leaks", "row_of", "write_report"]

SURE = 1e-6  # a view leaks when chance finds as much less often than this, and less in every random trial
DOUBT = 0.5  # hits that chance may find among the nearest, and has not in a few trials
DEVIATIONS = 7.0  # of the random trials' auc; of 16 trials, chance exceeds that 2 times in a million
SMALLEST_SPREAD = 0.01


@dataclass(frozen=True, slots=True)
class View:
    """One update as somebody sees it, and what the span test makes of it.

    update: how it was made. name: plain, masked, sum or noised. dimension: of the span.
    random: what the same test finds in random numbers of the same shapes.
    """

    update: str
    name: str
    dimension: int
    findings: Findings
    random: tuple[Findings, ...]


def leaks(view: View) -> bool:
    """Whether the test finds more of the batch than chance does: by tokens named in either way, or by their order.

    Chance: hits are taken as Poisson distributed around those of blind draws and twice the mean of the random trials
    (tokens resemble each other, so that hits come in groups); the order by the spread of the random trials.
    """
    mine = view.findings
    inside = (mine.inside, [trial.inside for trial in view.random], 0.0)
    nearest = (mine.nearest, [trial.nearest for trial in view.random], DOUBT)
    return any(_beyond(*one) for one in (inside, nearest)) or _ordered(mine.auc, [trial.auc for trial in view.random])


def _ordered(auc: float, trials: Sequence[float]) -> bool:
    spread = max(float(np.std(trials, ddof=1)), SMALLEST_SPREAD)
    return auc > max(trials) and auc > _mean(trials) + DEVIATIONS * spread


def _beyond(guess: Guess, trials: Sequence[Guess], doubt: float) -> bool:
    hits = [trial.hits for trial in trials]
    return guess.hits > max(hits) and _poisson_tail(guess.hits, guess.blind + 2 * _mean(hits) + doubt) < SURE


def _poisson_tail(count: int, mean: float) -> float:
    """P(at least `count`) around `mean`, to rounding errors of 1e-15; mean above 0, count at least 1."""
    below = sum(math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in range(count))
    return max(0.0, 1.0 - below)


def row_of(view: View) -> dict[str, Any]:
    """One row of the report."""
    found = view.findings
    return {
        "update": view.update,
        "view": view.name,
        "dimension": view.dimension,
        "tokens": found.tokens,
        "named": found.inside.named,
        "found": found.inside.hits,
        "recall": round(found.recall, 4),
        "precision": None if found.precision is None else round(found.precision, 4),
        "nearest": _share(found),
        "auc": round(found.auc, 4),
        "chance_recall": round(_mean([trial.recall for trial in view.random]), 4),
        "chance_nearest": round(_mean([_share(trial) for trial in view.random]), 4),
        "chance_auc": [round(bound([trial.auc for trial in view.random]), 4) for bound in (min, _mean, max)],
        "leaks": leaks(view),
    }


def _share(found: Findings) -> float:
    """Tokens of the batch among the nearest; equal distances name more tokens than the batch has."""
    return round(found.nearest.precision or 0.0, 4)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def judge(views: Sequence[View]) -> tuple[str, str]:
    """(outcome, verdict): `leak`, `hidden` or `inconclusive`, and a sentence that claims what was measured.

    leak: a masked update shows more than random numbers do. inconclusive: the test finds nothing in plain updates
    either, so that its silence about masked ones says nothing.
    """
    masked = [view for view in views if view.name == "masked"]
    plain = [view for view in views if view.name == "plain"]
    if bad := [view for view in masked if leaks(view)]:
        what = "; ".join(f"{view.update}: {_found(view)}" for view in bad)
        return "leak", f"Masked updates show tokens of the batch ({what}). They must not be sent like this."
    open_ones = [view for view in plain if leaks(view)]
    if not open_ones:
        return "inconclusive", (
            "The test finds no more in the plain updates than chance might, so it says nothing about masked ones. "
            "A higher rank, fewer or shorter records make it stronger."
        )
    best = max(open_ones, key=lambda view: (view.findings.recall, _share(view.findings), view.findings.auc))
    text = f"The plain update ({best.update}) shows {_found(best)}; masked, no more than random numbers do."
    for view in views:
        if view.name == "sum":
            shows = f"still shows {_found(view)}" if leaks(view) else "shows no more than chance might"
            text += f" The sum of all parties {shows}: masks hide terms, not the sum."
    silent = [view.update for view in plain if not leaks(view)]
    if silent:
        kinds = " and ".join(silent)
        text += f" In plain updates of the kind {kinds} it finds no more than chance might; another attack may."
    return "hidden", text


def _found(view: View) -> str:
    """The better of the two ways of naming tokens, in words."""
    inside, nearest, tokens = view.findings.inside, view.findings.nearest, view.findings.tokens
    if inside.hits >= nearest.hits or nearest.named > tokens:
        return f"{inside.hits} of {tokens} tokens, with {inside.named - inside.hits} wrong ones beside them"
    return f"{nearest.hits} of {tokens} tokens among the {tokens} nearest (auc {view.findings.auc:.2f})"


def write_report(folder: Path, summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], plotted: bool) -> None:
    """report.json and report.md. summary: `outcome`, `verdict`, and what was tested, by name."""
    (folder / "report.json").write_text(json.dumps({**summary, "views": list(rows)}, indent=2) + "\n", encoding="utf-8")
    keys = ("update", "view", "dimension", "tokens", "named", "found", "recall", "precision", "nearest", "auc")
    lines = ["# What updates leak", "", f"**{summary['outcome']}**: {summary['verdict']}", ""]
    lines += ["| " + " | ".join(keys) + " |", "|" + " --- |" * len(keys)]
    lines += ["| " + " | ".join("" if row[key] is None else str(row[key]) for key in keys) + " |" for row in rows]
    lines += ["", "What the same test finds in random numbers:", ""]
    for row in {row["update"]: row for row in rows if row["view"] == "masked"}.values():
        low, mean, high = row["chance_auc"]
        lines.append(
            f"- {row['update']}: recall {row['chance_recall']}, nearest {row['chance_nearest']}, auc {mean} "
            f"({low} to {high})"
        )
    lines += ["", *_LEGEND]
    if plotted:
        lines += ["", "![distance of the batch's tokens to the span](distances.png)"]
    (folder / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


_LEGEND = (
    "- dimension: of the span; when it is all that the rank allows, there are more tokens than it can hold apart",
    "- tokens: distinct tokens of the batch, those of the template among them",
    "- named, found: tokens within the tolerance of the span, and those of the batch among them",
    "- recall, precision: found / tokens, found / named",
    "- nearest: share of the batch's tokens among as many tokens, the nearest to the span",
    "- auc: how often a token of the batch is nearer to the span than another token; compare with random numbers",
    "",
    "One attack was tried. What it does not find, another may.",
)


def distance_plot(distances: Mapping[str, Array], true: Mapping[str, Array], path: Path) -> bool:
    """Share of the batch's tokens within a distance of the span, by view; False without matplotlib.

    distances: of every token. true: ids of the batch.
    """
    if not distances or importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, found in distances.items():
        ordered = np.sort(found[true[name]])
        axes.step(ordered, np.arange(1, len(ordered) + 1) / len(ordered), where="post", label=name)
    axes.set_xlabel("distance to the span (0: the update shows the token)")
    axes.set_ylabel("share of the batch's tokens")
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    axes.legend()
    figure.savefig(path, dpi=120)
    return True
