"""`fate_llm models`: what this party has trained with others, and copies of it to use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..output import home_option, json_option, print_json, reports_errors

if TYPE_CHECKING:
    from fate_llm.runtime.artifacts.models import ModelRecord, ModelRegistry

__all__ = ["COMMAND"]

_PATH = click.Path(path_type=Path)


@click.group()
def models() -> None:
    """List the models that this party has trained with others, show their lineage, and copy them out.

    A model is named by NAME (its newest version), NAME@VERSION or the first digits of its digest.
    """


@models.command("list")
@home_option
@json_option
@reports_errors
def list_models(home: Path, as_json: bool) -> None:
    """All registered models, newest first."""
    with _registry(home) as registry:
        found = registry.list()
    if as_json:
        print_json([record.model_dump(mode="json") for record in found])
        return
    if not found:
        click.echo("no models yet: they are registered when a job that trains one ends in success")
        return
    rows = [(r.label, r.kind, _day(r), r.digest[:12], r.job, ",".join(r.parties)) for r in found]
    _print_table(("model", "kind", "created", "digest", "job", "parties"), rows)


@models.command("show")
@click.argument("model")
@home_option
@json_option
@reports_errors
def show(model: str, home: Path, as_json: bool) -> None:
    """Everything that is known of a model: base, job, parties, data, privacy, metrics."""
    with _registry(home) as registry:
        found = registry.show(model)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    click.secho(found.label, bold=True)
    for name, value in found.model_dump(mode="json", exclude={"name", "version", "data", "metrics"}).items():
        click.echo(f"{name + ':':<15}{_day(found) if name == 'created' else _shown(value)}")
    for one in found.data:
        records = "" if one.records is None else f", {one.records} records"
        click.echo(f"{'data:':<15}{one.name} ({one.digest[:12]}{records})")
    for name, value in sorted(found.metrics.items()):
        if isinstance(value, int | float):
            click.echo(f"{'metric:':<15}{name} = {value:.6g}")


@models.command("export")
@click.argument("model")
@click.argument("out", type=_PATH)
@click.option("--merged", is_flag=True, help="An adapter merged into its base model: loads without peft.")
@home_option
@json_option
@reports_errors
def export(model: str, out: Path, merged: bool, home: Path, as_json: bool) -> None:
    """Copy a model into a new folder OUT, with a model card (README.md) and its lineage (lineage.json)."""
    _export(model, out, merged, home, as_json)


@models.command("merge")
@click.argument("model")
@click.argument("out", type=_PATH)
@home_option
@json_option
@reports_errors
def merge(model: str, out: Path, home: Path, as_json: bool) -> None:
    """Merge an adapter into its base model: a folder that transformers and serving engines load.

    The same as `export --merged`.
    """
    _export(model, out, True, home, as_json)


def _export(model: str, out: Path, merged: bool, home: Path, as_json: bool) -> None:
    with _registry(home) as registry:
        found = registry.export(model, out, merged=merged)
    form = "merged" if merged and found.kind == "adapter" else found.kind
    if as_json:
        print_json({"folder": str(out), "form": form, "model": found.model_dump(mode="json")})
    else:
        click.echo(f"{found.label} ({form}) written to {out}")


@contextmanager
def _registry(home: Path) -> Iterator[ModelRegistry]:
    """The registry of the party at `home`, as long as it is used."""
    import time

    from fate_llm.runtime.artifacts.home import open_stores

    stores = open_stores(home, now=time.time)
    try:
        yield stores.models
    finally:
        stores.close()


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[at]) for row in (head, *rows)) for at in range(len(head))]
    for row in (head, *rows):
        click.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _day(record: ModelRecord) -> str:
    from datetime import UTC, datetime

    return f"{datetime.fromtimestamp(record.created, UTC):%Y-%m-%d %H:%M}Z"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {item}" for key, item in value.items()) or "none"
    return str(value) or "not known"


COMMAND = models
