"""What a component is, told by its class: for `components describe` and for the manual."""

from __future__ import annotations

import inspect
import json
from typing import Any

from fate_llm.core import plugins
from fate_llm.core.values import Role

__all__ = ["describe_component", "describe_params"]


def describe_component(name: str) -> dict[str, Any]:
    """{"name", "text", "roles", "inputs", "outputs", "params"} of a component, without importing torch.

    Raises:
        UnknownPlugin: nobody has a component of that name.
    """
    component = plugins.load("component", name)
    return {
        "name": name,
        "text": inspect.getdoc(component) or "",
        "roles": [role.value for role in Role if callable(getattr(component, role.value, None))],
        "inputs": [_port(port_name, port) for port_name, port in component.inputs.items()],
        "outputs": [_port(port_name, port) for port_name, port in component.outputs.items()],
        "params": describe_params(component.Params),
    }


def _port(name: str, port: Any) -> dict[str, Any]:
    return {
        "name": name,
        "kind": port.kind.value,
        "required": port.required,
        "many": port.many,
        "roles": sorted(role.value for role in port.roles),
        "doc": port.doc,
    }


def describe_params(model: Any, prefix: str = "") -> list[dict[str, Any]]:
    """{"name", "type", "required", "default", "bounds", "meaning"} of every field, nested models flattened."""
    schema = model.model_json_schema()
    return _fields(schema, schema, prefix)


def _fields(root: dict[str, Any], schema: dict[str, Any], prefix: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    required = set(schema.get("required", ()))
    for name, field in schema.get("properties", {}).items():
        inner = _resolve(root, field)
        rows.append(
            {
                "name": prefix + name,
                "type": _type(root, field),
                "required": name in required,
                "default": None if name in required else _default(field),
                "bounds": _bounds(root, field),
                "meaning": field.get("description") or inner.get("description", ""),
            }
        )
        below = _resolve(root, inner["items"]) if "items" in inner else inner
        if "properties" in below:
            rows += _fields(root, below, f"{prefix}{name}{'[]' if below is not inner else ''}.")
    return rows


def _default(field: dict[str, Any]) -> str:
    """JSON of the default; a schema does not show what a factory makes, which is always something empty."""
    empty: dict[str, Any] = {"object": {}, "array": []}
    return json.dumps(field.get("default", empty.get(field.get("type", ""))), ensure_ascii=False)


def _resolve(root: dict[str, Any], field: dict[str, Any]) -> dict[str, Any]:
    """The definition behind a reference, also inside `anyOf` with null."""
    first = _options(field)[0]
    reference = first.get("$ref")
    if reference is None:
        return first
    found: dict[str, Any] = root["$defs"][reference.rpartition("/")[2]]
    return found


def _options(field: dict[str, Any]) -> list[dict[str, Any]]:
    """What a value may be, besides null."""
    return [option for option in field.get("anyOf", ()) if option.get("type") != "null"] or [field]


def _type(root: dict[str, Any], field: dict[str, Any]) -> str:
    if len(_options(field)) > 1:
        return " or ".join(_type(root, option) for option in _options(field))
    inner = _resolve(root, field)
    if "enum" in inner:
        return " | ".join(map(str, inner["enum"]))
    if "const" in inner:
        return str(inner["const"])
    if inner.get("type") == "array":
        return f"list of {_type(root, inner.get('items', {}))}"
    if "properties" in inner:
        return "mapping"
    kind = str(inner.get("type", "any"))
    return {"object": "mapping", "integer": "whole number", "string": "text"}.get(kind, kind)


_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "more than",
    "maximum": "at most",
    "exclusiveMaximum": "less than",
    "minLength": "length at least",
    "maxLength": "length at most",
    "minItems": "items at least",
    "pattern": "matching",
}


def _bounds(root: dict[str, Any], field: dict[str, Any]) -> str:
    inner = _resolve(root, field)
    found = [f"{text} {inner[key]}" for key, text in _BOUNDS.items() if key in inner]
    if "plugin" in field:
        found.append(f"name of a plug-in: {field['plugin']}")
    return ", ".join(found)
