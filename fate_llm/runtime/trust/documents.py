"""Files that a person writes for a party: YAML of one shape, every fault with its line, at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from fate_llm.core.errors import ConfigurationError, Fault
from fate_llm.pipelines.dialect import MAX_BYTES, Source, parse
from fate_llm.pipelines.faults import Faults, found_by_pydantic
from fate_llm.security.randomness import random_id

__all__ = ["Strict", "checked", "make_document", "parse_document", "read_document", "refusal", "replace_file"]

Model = TypeVar("Model", bound=BaseModel)


class Strict(BaseModel):
    """Base of these files: frozen, no unknown key, nothing is converted."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def read_document(path: Path, model: type[Model], what: str, *, hint: str) -> Model:
    """Read a YAML file. what: for messages, such as "the roster". hint: what makes such a file.

    Raises:
        ConfigurationError: it cannot be read, is larger than a pipeline may be, or is wrong; all faults at once, each
            with file and line.
    """
    return checked(parse_document(path, what, hint=hint), model, f"{what} {path}")


def parse_document(path: Path, what: str, *, hint: str) -> Source:
    """The values of a YAML file and where each is written; faults of the reading are in it, not raised.

    Raises:
        ConfigurationError: the file cannot be read, or is no text.
    """
    try:
        with path.open("rb") as stream:
            text = stream.read(MAX_BYTES + 1).decode("utf-8-sig")
    except OSError as error:
        raise ConfigurationError(f"{what} {path} cannot be read: {error.strerror}", hint=hint) from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"{what} {path} is not UTF-8 text", hint=hint) from None
    return parse(text, str(path))


def make_document(data: Mapping[str, Any], model: type[Model], what: str) -> Model:
    """The same from plain values.

    Raises:
        ConfigurationError: all that is wrong with them.
    """
    return checked(Source(data=data), model, what)


def checked(source: Source, model: type[Model], what: str) -> Model:
    """The model out of values that have been read.

    Raises:
        ConfigurationError: with all faults, each with file and line where there is one.
    """
    faults = Faults(source.marks)
    if not source.faults:
        try:
            return model.model_validate(source.data)
        except ValidationError as error:
            for one in found_by_pydantic(error, source.data, model):
                faults.add(one.code, one.path, one.message, one.hint)
    raise refusal(faults.merge(source.faults), what)


def refusal(found: tuple[Fault, ...], what: str) -> ConfigurationError:
    """The error that lists faults."""
    lines = "\n".join(str(fault).removeprefix("<pipeline>: ") for fault in found)
    count = f"{len(found)} fault{'s' if len(found) != 1 else ''}"
    return ConfigurationError(f"{count} in {what}\n{lines}", hint="Each line names the place and what is valid.")


def replace_file(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Write a file anew, whole or not at all, whoever reads it meanwhile.

    Raises:
        ConfigurationError: it cannot be written; what was there is untouched.
    """
    partial = path.with_name(f".{path.name}.{random_id(4)}.partial")
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode), "wb") as stream:
            os.fchmod(stream.fileno(), mode)
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be written: {error.strerror}", hint="Look at its folder's rights."
        ) from None
    finally:
        partial.unlink(missing_ok=True)
