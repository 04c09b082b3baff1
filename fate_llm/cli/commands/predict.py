"""`fate_llm predict`: from a trained job to the pipeline that uses what it trained."""

from __future__ import annotations

from pathlib import Path

import click

from ..output import json_option, print_json, reports_errors

__all__ = ["COMMAND"]


@click.command()
@click.argument("job", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--output", "-o", type=click.Path(path_type=Path, dir_okay=False), help="Write here, not to stdout.")
@json_option
@reports_errors
def predict(job: Path, output: Path | None, as_json: bool) -> None:
    """Turn a finished job's pipeline into a prediction pipeline that uses the models it trained.

    Trainers become what their component names (a generator), splitters disappear, readers stay. Submit the result
    with the data to predict on: `fate_llm submit predict.yaml --set tasks.data.params.path=new.jsonl`.
    """
    from fate_llm.core.errors import ConfigurationError
    from fate_llm.runtime.prediction import prediction_pipeline

    text, left_out = prediction_pipeline(job)
    if output is not None:
        try:
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigurationError(
                f"{output} cannot be written: {error.strerror}", hint="Name another file."
            ) from None
    if as_json:
        print_json({"pipeline": text, "left_out": list(left_out), "file": None if output is None else str(output)})
        return
    if output is None:
        click.echo(text, nl=False)
    else:
        click.echo(f"written to {output}" + (f"; left out: {', '.join(left_out)}" if left_out else ""))


COMMAND = predict
