"""The JSON Schema of pipelines, with every component's params in it, for editors and other tools."""

from __future__ import annotations

from typing import Any

from fate_llm.core import plugins

from .schema import PipelineSpec, load_component

__all__ = ["json_schema"]


def json_schema() -> dict[str, Any]:
    """Draft 2020-12. A component's params lie under `$defs` by its name; a task's `component` selects them.

    Required params are not required of a task, because a party's overrides may give them.
    """
    schema = PipelineSpec.model_json_schema()
    definitions: dict[str, Any] = schema["$defs"]
    names = plugins.names("component")
    for name in names:
        definitions.update(_params(name))
    task = definitions["TaskSpec"]
    task["properties"]["component"]["enum"] = names
    task["allOf"] = [_condition(name) for name in names]
    _list_plugins(schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "fate_llm pipeline", **schema}


def _params(name: str) -> dict[str, Any]:
    """Definitions of one component: its params under its own name, what they use under `name.Model`."""
    component = load_component(name)
    schema = component.Params.model_json_schema(ref_template=f"#/$defs/{name}.{{model}}")
    inner = {f"{name}.{model}": definition for model, definition in schema.pop("$defs", {}).items()}
    schema.pop("required", None)
    schema["title"] = name
    return {name: schema, **inner}


def _condition(name: str) -> dict[str, Any]:
    return {
        "if": {"properties": {"component": {"const": name}}, "required": ["component"]},
        "then": {
            "properties": {
                "params": {"$ref": f"#/$defs/{name}"},
                "inputs": {"propertyNames": {"enum": sorted(load_component(name).inputs)}},
            }
        },
    }


def _list_plugins(node: Any) -> None:
    """Fields that name a plug-in list the names that exist here."""
    if isinstance(node, dict):
        if isinstance(node.get("plugin"), str) and node.get("type") == "string":
            node["enum"] = plugins.names(node.pop("plugin"))
        for value in node.values():
            _list_plugins(value)
    elif isinstance(node, list):
        for value in node:
            _list_plugins(value)
