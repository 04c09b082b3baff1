"""Rules of the house that a machine can check."""

from __future__ import annotations

import ast
import subprocess
import sysconfig
from pathlib import Path

import pytest

import fate_llm.core

ROOT = Path(fate_llm.core.__file__).parents[1]
LONGEST = 60
FORBIDDEN = {"utils.py", "util.py", "common.py", "helpers.py", "misc.py"}


def sources() -> list[tuple[str, str, ast.Module]]:
    found = []
    for path in sorted(p for p in ROOT.rglob("*.py") if "__pycache__" not in p.parts):
        text = path.read_text(encoding="utf-8")
        found.append((path.relative_to(ROOT).as_posix(), text, ast.parse(text)))
    assert len(found) > 20, "no modules found: the test looks at the wrong place"
    return found


def functions(tree: ast.Module) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def public_definitions(tree: ast.Module) -> set[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")}


def bound(body: list[ast.stmt]) -> set[str]:
    names = set()
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return names


def defined(tree: ast.Module) -> set[str]:
    """Names bound at the top of a module, or looked up by its `__getattr__` and named for type checkers."""
    names = public_definitions(tree) | bound(tree.body)
    if any(isinstance(node, ast.FunctionDef) and node.name == "__getattr__" for node in tree.body):
        for node in tree.body:
            if isinstance(node, ast.If):
                names |= bound(node.body)
    return names


def commands(tree: ast.Module) -> set[str]:
    """Functions that click runs: they are reached through the module's COMMAND, not by their name."""
    return {
        node.name
        for node in functions(tree)
        if any(ast.unparse(d).split("(")[0].endswith((".command", ".group")) for d in node.decorator_list)
    }


def exported(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            value = ast.literal_eval(node.value)
            assert isinstance(value, list)
            return value
    return None


def isort_key(name: str) -> tuple[int, str]:
    """The order of ruff's RUF022: constants, classes, the rest."""
    letters = name.lstrip("_")
    kind = 0 if letters.isupper() and len(letters) > 1 else 1 if letters[:1].isupper() else 2
    return kind, name


def test_no_function_is_longer_than_a_screen() -> None:
    wrong = []
    for name, _, tree in sources():
        for node in functions(tree):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            if length > LONGEST:
                wrong.append(f"{name}:{node.lineno} {node.name} has {length} lines")
    assert not wrong, "\n".join(wrong)


def test_every_function_says_what_it_returns() -> None:
    wrong = [
        f"{name}:{node.lineno} {node.name}"
        for name, _, tree in sources()
        for node in functions(tree)
        if node.returns is None
    ]
    assert not wrong, "\n".join(wrong)


def test_only_the_command_line_prints() -> None:
    wrong = [
        f"{name}:{node.lineno}"
        for name, _, tree in sources()
        if not name.startswith("cli/") and not name.startswith("pipelines/data/")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not wrong, "\n".join(wrong)


def test_no_module_is_a_drawer_for_everything() -> None:
    wrong = [name for name, _, _ in sources() if Path(name).name in FORBIDDEN]
    assert not wrong, "\n".join(wrong)


def test_every_module_says_what_is_public() -> None:
    wrong = []
    for name, _, tree in sources():
        names = exported(tree)
        if names is None:
            if public_definitions(tree):
                wrong.append(f"{name} has public names and no __all__")
            continue
        missing = sorted(set(names) - defined(tree))
        wrong += [f"{name}: __all__ names {missing}, which it does not define"] if missing else []
        wrong += [f"{name}: __all__ is not sorted"] if names != sorted(names, key=isort_key) else []
        wrong += [f"{name}: __all__ names something twice"] if len(set(names)) != len(names) else []
        unlisted = sorted(public_definitions(tree) - set(names) - commands(tree))
        wrong += [f"{name}: {unlisted} look public and are not in __all__"] if unlisted else []
    assert not wrong, "\n".join(wrong)


def test_every_module_starts_with_a_sentence() -> None:
    wrong = [name for name, _, tree in sources() if not ast.get_docstring(tree)]
    assert not wrong, "\n".join(wrong)


def is_broad(handler: ast.ExceptHandler) -> bool:
    caught = handler.type
    names = [caught] if not isinstance(caught, ast.Tuple) else caught.elts
    return any(n is None or (isinstance(n, ast.Name) and n.id in ("Exception", "BaseException")) for n in names)


def test_broad_excepts_stand_at_a_boundary_and_say_so() -> None:
    wrong = []
    for name, text, tree in sources():
        lines = text.splitlines()
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler) and is_broad(node):
                above = lines[node.lineno - 2].strip()
                if not (above.startswith("#") and "boundary" in above.lower()):
                    wrong.append(f"{name}:{node.lineno}")
    assert not wrong, "\n".join(wrong)


def test_no_check_is_left_to_assert_on_what_a_peer_sent() -> None:
    # Asserts vanish under `python -O`: in the codec and the sums there is none.
    watched = ("protocols/tensors.py", "protocols/envelope.py", "protocols/strict_json.py", "protocols/sums/")
    seen = [(name, tree) for name, _, tree in sources() if name.startswith(watched)]
    assert len(seen) >= 4
    wrong = [name for name, tree in seen for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert not wrong, "\n".join(wrong)


def test_no_test_asserts_how_long_something_took() -> None:
    """Time belongs in `benchmarks/`: an assertion on seconds fails on a busy machine and holds on a fast one."""
    found = []
    for path in sorted((ROOT.parent / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assert) and {"perf_counter", "process_time"} & names_in(node.test):
                found.append(f"{path.name}:{node.lineno}")
    assert not found


def names_in(tree: ast.AST) -> set[str]:
    named = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return named | {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_the_linter_sees_every_file() -> None:
    """The four links at the root once hid the folders of the same names from it."""
    ruff = Path(sysconfig.get_path("scripts"), "ruff")
    if not ruff.exists():
        pytest.skip("ruff is not installed")
    shown = subprocess.run([ruff, "check", "--show-files", ROOT.parent], capture_output=True, text=True, check=True)
    seen = {Path(line).resolve() for line in shown.stdout.splitlines()}
    folders = [ROOT, ROOT.parent / "tests", ROOT.parent / "benchmarks"]
    assert {path.resolve() for folder in folders for path in folder.rglob("*.py")} <= seen
