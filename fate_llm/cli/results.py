"""What `submit` prints at the end: where everything lies, the tables, and sample answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fate_llm.runtime.job import JobResult

__all__ = ["print_result"]

_COLUMNS = {
    "label": "model",
    "loss": "loss",
    "perplexity": "perplexity",
    "exact_match": "exact match",
    "rougeL": "ROUGE-L",
    "bleu": "BLEU",
    "records": "records",
}


def print_result(result: JobResult, *, guest: str, console: Console | None = None) -> None:
    """Print the result of a job as seen from the guest."""
    console = console or Console(highlight=False)
    for task, content in result.metrics.items():
        if rows := content.get("models"):
            console.print(f"{task}: held-out records of all parties", soft_wrap=True, markup=False)
            console.print(_scores(rows))
        _samples(console, result, guest, task)
    for task, outputs in result.outputs.get(guest, {}).items():
        if "model" in outputs:
            console.print(f"model of {task}: {outputs['model']}", soft_wrap=True, markup=False)
    color = {"success": "green", "cancelled": "yellow"}.get(result.status, "red")
    console.print(f"[{color}]{result.status}[/]: {escape(str(result.folder))}", soft_wrap=True)
    if result.error is not None:
        console.print(f"[{result.error.code}] {result.error.message}", soft_wrap=True, markup=False)
        if result.error.hint:
            console.print(f"hint: {result.error.hint}", soft_wrap=True, markup=False)


def _scores(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table()
    columns = {key: name for key, name in _COLUMNS.items() if key in rows[0]}
    for key, name in columns.items():
        table.add_column(name, justify="left" if key == "label" else "right")
    for row in rows:
        table.add_row(*(_cell(key, row.get(key)) for key in columns))
    return table


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if key in ("exact_match", "rougeL", "bleu"):
        return f"{100 * value:.1f} %"
    return f"{value:.3f}" if isinstance(value, float) else escape(str(value))


def _samples(console: Console, result: JobResult, guest: str, task: str) -> None:
    """The guest's own sample answers, model by model."""
    report = result.outputs.get(guest, {}).get(task, {}).get("report")
    path = Path(report) / "report.json" if report else None
    if path is None or not path.is_file():
        return
    for sample in json.loads(path.read_text()).get("samples", []):
        console.print(f"\n  question:  {sample['question']}", soft_wrap=True, markup=False)
        for name, answer in sample["answers"].items():
            console.print(f"  {name + ':':<10} {answer}", soft_wrap=True, markup=False)
        console.print(f"  expected:  {sample['reference']}\n", soft_wrap=True, markup=False)
