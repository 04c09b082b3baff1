"""`schema`: the language for editors and other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import fate_llm.pipelines
from tests.cli.conftest import Run, document

FOLDER = Path(fate_llm.pipelines.__file__).parent
EXAMPLES = sorted(FOLDER.glob("*.yaml"))


@pytest.fixture
def validator(run: Run) -> jsonschema.Draft202012Validator:
    schema = document(run("schema"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def example(name: str = "quickstart") -> Any:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def test_there_are_examples() -> None:
    assert {path.stem for path in EXAMPLES} >= {"quickstart", "compare"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_accepts_our_pipelines(path: Path, validator: jsonschema.Draft202012Validator) -> None:
    validator.validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("version",), 2),
        (("nonsense",), 1),
        (("tasks", "data", "component"), "redaer"),
        (("tasks", "data", "params", "nonsense"), 1),
        (("tasks", "split", "params", "test"), "much"),
        (("tasks", "tune", "params", "aggregator"), "fedvag"),
        (("tasks", "tune", "inputs", "nonsense"), "split.train"),
        (("job", "round_deadline"), "soon"),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else None,
)
def test_it_refuses_what_validate_refuses(
    path: tuple[str, ...], value: Any, validator: jsonschema.Draft202012Validator
) -> None:
    data = example()
    where = data
    for step in path[:-1]:
        where = where[step]
    where[path[-1]] = value
    assert not validator.is_valid(data)


def test_with_json_it_is_the_same(run: Run) -> None:
    assert document(run("schema", "--json")) == document(run("schema"))
