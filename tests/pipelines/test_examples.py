"""The pipelines that the package ships, against the components that it has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

import fate_llm.pipelines as public
from fate_llm.pipelines import Pipeline, derive_prediction, json_schema, load_pipeline, make_plan

FOLDER = Path(public.__file__).parent
EXAMPLES = sorted(FOLDER.glob("*.yaml"))


def test_there_are_examples() -> None:
    assert {"quickstart.yaml", "compare.yaml", "secure_aggregation.yaml"} <= {path.name for path in EXAMPLES}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_valid_and_can_be_planned(path: Path) -> None:
    # Given an example as it is shipped
    spec = load_pipeline(path)
    # Then it plans, every task once, and reads back from its own YAML
    plan = make_plan(spec, base=path.parent)
    assert sorted(task.name for task in plan.tasks) == sorted(spec.tasks)
    read = Pipeline.from_yaml(path)
    assert Pipeline.from_yaml(read.to_yaml()) == read
    assert read.spec() == spec


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_satisfies_the_exported_schema(path: Path) -> None:
    validator = Draft202012Validator(json_schema())
    assert [error.message for error in validator.iter_errors(Pipeline.from_yaml(path).to_dict())] == []


def test_the_quickstart_becomes_a_prediction() -> None:
    # Given the outputs of a finished quickstart
    spec = load_pipeline(FOLDER / "quickstart.yaml")
    outputs = {
        party: {task: {name: f"/job/{party}/{task}/{name}" for name in spec.component(task).outputs}}
        for party in spec.roster.data_owners
        for task in ("tune",)
    }
    # When the prediction pipeline is derived
    found = derive_prediction(spec, outputs)
    # Then it trains nothing, and every bank reads its own model
    assert found.replaced == ("tune",)
    overrides = found.pipeline.to_dict()["overrides"]
    assert all(
        overrides[party]["tune"]["inputs"]["model"] == {"path": f"/job/{party}/tune/model"}
        for party in spec.roster.data_owners
    )


def test_public_names_are_there_and_sorted() -> None:
    assert public.__all__ == sorted(public.__all__)
    assert all(hasattr(public, name) for name in public.__all__)


def test_building_and_checking_import_no_torch() -> None:
    # Given a fresh interpreter that reads, checks, plans and exports
    code = (
        "import sys; from fate_llm.pipelines import *; "
        f"p = load_pipeline({str(FOLDER / 'quickstart.yaml')!r}); make_plan(p); json_schema(); "
        "print(sorted({'torch', 'transformers', 'pika', 'click', 'fate_llm.runtime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # Then nothing heavy, and nothing of the layers above, was imported
    assert done.stdout.strip() == "[]"
