"""How commands print: text for people, or exactly one JSON document; errors with their code, hint and exit code."""

from __future__ import annotations

import functools
import json
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from fate_llm.core.errors import ConfigurationError, FateError, InternalError, JobCancelled, PipelineInvalid

__all__ = [
    "error_document",
    "home_option",
    "json_option",
    "pipeline_argument",
    "print_json",
    "print_usage_error",
    "reports_errors",
    "set_option",
]

Command = TypeVar("Command", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print exactly one JSON document on stdout.")
set_option = click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a value, e.g. job.seed=8; may be repeated.",
)
home_option = click.option(
    "--home",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="FATE_LLM_HOME",
    default=Path(),
    metavar="FOLDER",
    help="This party's home.  [env FATE_LLM_HOME; default: the present folder]",
)
pipeline_argument = click.argument("pipeline", type=click.Path(path_type=Path, dir_okay=False))


def print_json(value: Any) -> None:
    """One JSON document on stdout. JSON has no NaN and no infinity: they become null."""
    click.echo(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False, default=str))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_usage_error(error: click.UsageError) -> None:
    """The JSON document for a command line that cannot be read."""
    place = f"{error.ctx.command_path} --help" if error.ctx is not None else "fate_llm --help"
    print_json(error_document(ConfigurationError(error.format_message(), hint=f"`{place}` shows what there is.")))


def error_document(error: FateError) -> dict[str, Any]:
    """{"ok": false, "errors": [{"code", "file", "line", "path", "message", "hint"}]}."""
    if isinstance(error, PipelineInvalid):
        return {"ok": False, "errors": [fault.as_dict() for fault in error.faults]}
    return {"ok": False, "errors": [{"file": None, "line": None, "path": "", **error.as_dict()}]}


def reports_errors(command: Command) -> Command:
    """Turn an error of ours into text on stderr (or the JSON document on stdout) and its exit code."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except FateError as error:
            _end(error, as_json=bool(kwargs.get("as_json")))
        except KeyboardInterrupt:
            _end(JobCancelled("stopped by Ctrl-C", hint=""), as_json=bool(kwargs.get("as_json")))
        # The boundary of the process: whoever reads JSON gets a document whatever happens.
        except Exception as error:
            if not kwargs.get("as_json"):
                raise
            traceback.print_exc()
            hint = "This is a bug in fate_llm: please report it."
            _end(InternalError(f"{type(error).__name__}: {error}", hint=hint), as_json=True)

    return wrapped  # type: ignore[return-value]


def _end(error: FateError, *, as_json: bool) -> NoReturn:
    if as_json:
        print_json(error_document(error))
    else:
        _explain(error)
    sys.exit(error.exit_code)


def _explain(error: FateError) -> None:
    if isinstance(error, PipelineInvalid):
        for fault in error.faults:
            click.echo(str(fault), err=True)
        count = len(error.faults)
        click.secho(f"{count} fault{'s' if count != 1 else ''}; nothing was run", fg="red", err=True)
        return
    click.secho(f"error [{error.code}]: {error.message}", fg="red", err=True)
    if error.hint:
        click.echo(f"hint: {error.hint}", err=True)
