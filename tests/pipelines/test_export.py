"""The JSON Schema for editors."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from fate_llm.core import plugins
from fate_llm.pipelines.export import json_schema
from fate_llm.pipelines.schema import PipelineSpec

pytestmark = pytest.mark.usefixtures("registry")

Valid = Callable[[], dict[str, Any]]


@pytest.fixture
def schema(registry: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The schema of all fakes that can be loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugins, "names", lambda kind: sorted(n for n, plugin in registry[kind].items() if plugin))
        return json_schema()


def faults(schema: dict[str, Any], data: Any) -> list[str]:
    """Where the schema refuses the data."""
    return sorted(".".join(map(str, error.absolute_path)) for error in Draft202012Validator(schema).iter_errors(data))


def test_it_is_a_valid_schema_in_plain_json(schema: dict[str, Any]) -> None:
    Draft202012Validator.check_schema(schema)
    assert json.loads(json.dumps(schema)) == schema


def test_it_accepts_a_valid_pipeline(schema: dict[str, Any], valid: Valid) -> None:
    assert faults(schema, valid()) == []


def test_every_key_of_the_language_is_described(schema: dict[str, Any]) -> None:
    assert set(schema["properties"]) == set(PipelineSpec.model_fields)
    for name in ("Parties", "TaskSpec", "TaskOverride", "JobSettings"):
        for key, described in schema["$defs"][name]["properties"].items():
            assert described.get("description"), f"{name}.{key}"


def test_every_component_is_there_under_its_name(schema: dict[str, Any]) -> None:
    assert set(schema["$defs"]["TaskSpec"]["properties"]["component"]["enum"]) == {
        "answerer",
        "divider",
        "pool",
        "scorer",
        "source",
        "trainer",
    }
    assert set(schema["$defs"]["source"]["properties"]) == {"path", "limit", "fields"}
    assert "source.Fields" in schema["$defs"]


def test_names_of_plugins_can_be_completed(schema: dict[str, Any]) -> None:
    params = schema["$defs"]["trainer"]["properties"]
    assert params["aggregator"]["enum"] == ["mean", "median"]
    assert params["protection"]["enum"] == ["open", "sealed"]
    assert schema["$defs"]["trainer.HookRef"]["properties"]["name"]["enum"] == ["byte", "clip", "half", "press"]


@pytest.mark.parametrize(
    ("path", "value", "place"),
    [
        (("tasks", "tune", "params", "rounds"), 0, "tasks.tune.params.rounds"),
        (("tasks", "tune", "params", "unknown"), 1, "tasks.tune.params"),
        (("tasks", "tune", "params", "aggregator"), "meen", "tasks.tune.params.aggregator"),
        (("tasks", "tune", "component"), "divider", "tasks.tune.params"),
        (("tasks", "tune", "component"), "tuner", "tasks.tune.component"),
        (("tasks", "tune", "inputs", "tset"), "split.test", "tasks.tune.inputs"),
        (("tasks", "data", "params", "fields"), {"qestion": "x"}, "tasks.data.params.fields"),
        (("job", "sed"), 1, "job"),
        (("job", "round_deadline"), "10 m", "job.round_deadline"),
        (("version",), 2, "version"),
        (("name",), "Bad Name", "name"),
        (("parties", "gest"), "x", "parties"),
    ],
)
def test_it_refuses_what_the_checker_refuses(
    schema: dict[str, Any], valid: Valid, path: tuple[str, ...], value: Any, place: str
) -> None:
    data = copy.deepcopy(valid())
    where = data
    for step in path[:-1]:
        where = where[step]
    where[path[-1]] = value
    assert place in faults(schema, data)


def test_params_that_only_overrides_give_are_no_fault(schema: dict[str, Any], valid: Valid) -> None:
    data = valid()
    del data["tasks"]["data"]["params"]["path"]
    assert faults(schema, data) == []


@pytest.mark.parametrize("duration", ["30s", "10m", 5, 0.5])
def test_durations_are_text_or_numbers(schema: dict[str, Any], valid: Valid, duration: object) -> None:
    assert faults(schema, {**valid(), "job": {"round_deadline": duration}}) == []
