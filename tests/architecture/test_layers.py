"""Imports go one way (ARCHITECTURE section 3). Every import counts, also those inside functions."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import fate_llm.core

ROOT = Path(fate_llm.core.__file__).parents[1]
MAY_IMPORT = {
    "": {"pipelines", "runtime", "cli"},  # __init__ and __main__ are the front doors; nothing imports them
    "core": set(),
    "security": {"core"},
    "protocols": {"core", "security"},
    "components": {"core", "security", "protocols"},
    "pipelines": {"core"},
    "runtime": {"core", "security", "protocols", "pipelines"},
    "cli": {"core", "security", "protocols", "pipelines", "runtime"},
}
THIRD_PARTY = {
    "": set(),
    "core": {"pydantic", "numpy"},
    "security": {"numpy", "cryptography", "tenseal", "dp_accounting"},
    "protocols": {"numpy", "pydantic", "safetensors", "zstandard", "ml_dtypes", "pika"},
    "pipelines": {"pydantic", "pydantic_core", "yaml"},
    "runtime": {
        "alembic",
        "fastapi",
        "fsspec",
        "httpx2",
        "matplotlib",
        "numpy",
        "pydantic",
        "pydantic_core",
        "safetensors",
        "sqlalchemy",
        "starlette",
        "uvicorn",
    },
    "cli": {"click", "rich"},
}
ONLY_IN = {
    "pika": ("protocols/transports/rabbitmq.py",),
    "tenseal": ("security/ckks.py",),
    "torch": ("components/",),
    "transformers": ("components/",),
    "peft": ("components/",),
    "accelerate": ("components/",),
    "click": ("cli/",),
    "sqlalchemy": ("runtime/store/",),
    "alembic": ("runtime/store/",),
    "fastapi": ("runtime/service/",),
    "starlette": ("runtime/service/",),
    "uvicorn": ("runtime/service/",),
    "httpx2": ("runtime/service/client.py",),
    "fsspec": ("runtime/artifacts/",),
}
NEVER = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "jsonpickle"}
IMPURE = {"time", "random", "secrets", "threading", "datetime", "asyncio", "socket", "os", "uuid"}
PURE = (
    "protocols/rounds/machine.py",
    "protocols/sums/",
    "protocols/secagg/",
    "protocols/homomorphic/",
    "runtime/service/lead.py",
    "runtime/service/part.py",
    "runtime/service/slots.py",
)


def modules() -> list[Path]:
    found = sorted(p for p in ROOT.rglob("*.py") if "__pycache__" not in p.parts)
    assert len(found) > 20, "no modules found: the test looks at the wrong place"
    return found


def layer(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else ""


def only_for_types(node: ast.If) -> bool:
    return "TYPE_CHECKING" in {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}


def import_nodes(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node
    children: list[ast.AST] = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.If) and only_for_types(node):
        children = list(node.orelse)
    for child in children:
        yield from import_nodes(child)


def named(node: ast.Import | ast.ImportFrom, path: Path) -> Iterator[str]:
    """Absolute dotted names that an import statement may load."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    package = ["fate_llm", *path.relative_to(ROOT).parts[:-1]]
    base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
    module = ".".join(part for part in (base, node.module or "") if part)
    yield module
    yield from (f"{module}.{alias.name}" for alias in node.names)


@cache
def imports_of(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(name for node in import_nodes(tree) for name in named(node, path))


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports_of(path)} - {"fate_llm", ""}


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_folder_has_a_place_in_the_order() -> None:
    assert {layer(path) for path in modules()} <= MAY_IMPORT.keys()


def test_dependencies_point_one_way() -> None:
    wrong = []
    for path in modules():
        used = {name.split(".")[1] for name in imports_of(path) if name.startswith("fate_llm.")}
        folders = used & (MAY_IMPORT.keys() - {""})
        wrong += [f"{shown(path)} imports {bad}" for bad in folders - MAY_IMPORT[layer(path)] - {layer(path)}]
    assert not wrong, "\n".join(wrong)


def test_third_party_imports_are_those_of_the_table() -> None:
    wrong = []
    for path in modules():
        allowed = THIRD_PARTY.get(layer(path))
        if allowed is not None:  # components may use what their extras install
            foreign = tops(path) - sys.stdlib_module_names - allowed
            wrong += [f"{shown(path)} imports {name}" for name in foreign]
    assert not wrong, "\n".join(wrong)


def test_some_libraries_are_used_in_one_place_only() -> None:
    wrong = [
        f"{shown(path)} imports {name}"
        for path in modules()
        for name, places in ONLY_IN.items()
        if name in tops(path) and not shown(path).startswith(places)
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_that_unpickles_is_imported_anywhere() -> None:
    wrong = [f"{shown(path)} imports {bad}" for path in modules() for bad in tops(path) & NEVER]
    assert not wrong, "\n".join(wrong)


def test_machines_are_pure() -> None:
    machines = [path for path in modules() if shown(path).startswith(PURE)]
    assert len(machines) >= 2, "no machines found"
    wrong = [f"{shown(path)} imports {bad}" for path in machines for bad in tops(path) & IMPURE]
    assert not wrong, "\n".join(wrong)


def test_there_are_no_import_rings() -> None:
    names = {}
    for path in modules():
        parts = ["fate_llm", *path.relative_to(ROOT).with_suffix("").parts]
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph = {name: {n for n in imports_of(path) if n in names and n != name} for name, path in names.items()}
    # `from package import module` names the package as well; only what is defined in it makes an edge.
    for name, targets in graph.items():
        graph[name] = {t for t in targets if names[t].name != "__init__.py" or not name.startswith(t + ".")}
    ring = find_ring(graph)
    assert ring is None, " -> ".join(ring or ())


def find_ring(graph: dict[str, set[str]]) -> list[str] | None:
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str] | None:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return None
        for target in sorted(graph[name]):
            if ring := visit(target, [*trail, name]):
                return ring
        done.add(name)
        return None

    return next((ring for name in sorted(graph) if (ring := visit(name, []))), None)


def test_the_search_for_rings_finds_one() -> None:
    assert find_ring({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_ring({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


@pytest.mark.parametrize("heavy", ["torch", "transformers", "peft", "accelerate", "datasets"])
def test_component_modules_import_heavy_libraries_inside_functions_only(heavy: str) -> None:
    files = [path for path in modules() if path.parent == ROOT / "components"]
    assert files, "no component modules found"
    wrong = []
    for path in files:
        at_load = [
            n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, ast.Import | ast.ImportFrom)
        ]
        wrong += [shown(path) for n in at_load if heavy in {name.split(".")[0] for name in named(n, path)}]
    assert not wrong, "\n".join(wrong)


def test_loading_every_plugin_loads_no_torch() -> None:
    # Given a fresh interpreter, When the package and every plug-in of every kind are imported
    script = (
        "import sys, importlib, fate_llm\n"
        "from fate_llm.core import plugins\n"
        "count = 0\n"
        "for kind in plugins.KINDS:\n"
        "    for name in plugins.names(kind):\n"
        "        if name != 'rabbitmq': plugins.load(kind, name); count += 1\n"
        "heavy = sorted({'torch', 'transformers', 'peft', 'pika', 'accelerate'} & set(sys.modules))\n"
        "plugins.load('transport', 'rabbitmq')\n"
        "heavy += sorted({'torch', 'transformers', 'peft', 'accelerate'} & set(sys.modules))\n"
        "print(count, *heavy)\n"
    )
    environment = {"PYTHONPATH": str(ROOT.parent), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    # Then nothing heavy has come along
    assert done.returncode == 0, done.stderr
    count, *heavy = done.stdout.split()
    assert int(count) >= 5
    assert not heavy


def test_every_module_can_be_named_from_outside() -> None:
    # A folder called ppc-gpt cannot be imported; every part of every path must be an identifier.
    for path in modules():
        parts = path.relative_to(ROOT).with_suffix("").parts
        assert all(part.isidentifier() for part in parts), shown(path)
    assert importlib.import_module("fate_llm.core.errors")
