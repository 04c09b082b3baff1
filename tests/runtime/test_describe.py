"""What a component is, told by its class."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import Field

from fate_llm.core import plugins
from fate_llm.core.errors import UnknownPlugin
from fate_llm.core.interfaces import Frozen
from fate_llm.runtime.describe import describe_component, describe_params
from tests.cli.conftest import python
from tests.runtime.toys import Words


def rows(model: type[Frozen]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in describe_params(model)}


def test_roles_ports_and_text_come_from_the_class() -> None:
    found = describe_component("adder")
    assert found["roles"] == ["guest", "host", "arbiter"]
    assert found["text"].startswith("Adds up")
    ports = {port["name"]: port for port in found["inputs"]}
    assert (ports["data"]["kind"], ports["data"]["required"], ports["data"]["many"]) == ("dataset", True, False)
    assert (ports["more"]["required"], ports["more"]["many"]) == (False, True)
    assert ports["data"]["roles"] == ["guest", "host"]
    assert [port["name"] for port in found["outputs"]] == ["model", "metrics"]


def test_every_setting_has_type_default_bounds_and_meaning() -> None:
    found = rows(Words.Params)
    assert found["times"] == {
        "name": "times",
        "type": "whole number",
        "required": False,
        "default": "1",
        "bounds": "at least 1, at most 10",
        "meaning": "How often.",
    }
    assert found["word"]["bounds"] == "length at least 1"
    assert found["path"]["type"] == "text"
    assert found["path"]["default"] == "null"


def test_settings_in_settings_are_listed_by_their_path() -> None:
    found = rows(Words.Params)
    assert found["inner"]["type"] == "mapping"
    assert found["inner.depth"]["bounds"] == "at least 0, less than 10"
    assert found["inner.kind"]["type"] == "a | b"
    assert found["many"]["type"] == "list of mapping"
    assert found["many[].depth"]["meaning"] == "How deep."


def test_what_a_factory_makes_is_shown_as_empty_not_as_null() -> None:
    found = rows(Words.Params)
    assert (found["notes"]["type"], found["notes"]["default"]) == ("mapping", "{}")
    assert found["many"]["default"] == "[]"


def test_several_types_are_all_named() -> None:
    assert rows(Words.Params)["size"]["type"] == "whole number or text"


def test_a_setting_without_default_is_required_and_a_plugin_s_name_is_called_so() -> None:
    class Some(Frozen):
        rule: str = Field(description="Which.", json_schema_extra={"plugin": "aggregator"})
        share: float | None = Field(None, gt=0, lt=1, description="How much.")

    found = rows(Some)
    assert (found["rule"]["required"], found["rule"]["default"]) == (True, None)
    assert found["rule"]["bounds"] == "name of a plug-in: aggregator"
    assert found["share"]["bounds"] == "more than 0, less than 1"


def test_an_unknown_component_has_the_nearest_name() -> None:
    with pytest.raises(UnknownPlugin) as caught:
        describe_component("redaer")
    assert caught.value.hint == "did you mean 'reader'?"


@pytest.mark.parametrize("name", plugins.names("component"))
def test_ours_say_everything(name: str) -> None:
    found = describe_component(name)
    assert found["roles"]
    assert len(found["text"].splitlines()[0]) > 20
    assert all(port["doc"].endswith(".") for port in (*found["inputs"], *found["outputs"]))
    for row in found["params"]:
        assert len(row["meaning"]) > 5, f"{name}: {row['name']} has no meaning"
        assert row["type"] != "any" or row["name"].endswith("params")


def test_describing_loads_no_torch() -> None:
    script = (
        "import sys\n"
        "from fate_llm.core import plugins\n"
        "from fate_llm.runtime.describe import describe_component\n"
        "for name in plugins.names('component'): describe_component(name)\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules), 'torch was loaded'\n"
    )
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
