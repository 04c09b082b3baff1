"""The manual says what there is, and what it shows works."""

from __future__ import annotations

import re
import shlex
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import fate_llm.core
from fate_llm.cli.main import main
from fate_llm.cli.manual import pages, write
from fate_llm.core import errors, plugins
from fate_llm.core.errors import all_errors
from fate_llm.pipelines import CODES, Pipeline, check
from fate_llm.pipelines.schema import JobSettings, Parties, PipelineSpec, TaskOverride, TaskSpec
from fate_llm.protocols.rounds import machine
from fate_llm.runtime.describe import describe_component, describe_params

ROOT = Path(fate_llm.core.__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *DOCS.rglob("*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
OURS = [error for error in all_errors() if error.__module__ == errors.__name__]


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def read(name: str) -> str:
    return (DOCS / "reference" / f"{name}.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[tuple[Path, str]]:
    found = [(page, text) for page in PAGES for kind, text in BLOCK.findall(page.read_text()) if kind == language]
    assert found, f"no {language} blocks found: the test looks at the wrong place"
    return found


def section(text: str, heading: str) -> str:
    """The part of a page below a heading, up to the next of its level."""
    level = heading.partition(" ")[0]
    found = re.search(rf"^{re.escape(heading)}\n(.*?)(?=^{level} |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"no heading {heading!r}"
    return found[1]


# --- The reference -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(pages()))
def test_the_reference_is_what_the_code_says(name: str) -> None:
    written = (DOCS / "reference" / name).read_text(encoding="utf-8")
    assert written == pages()[name], f"docs/reference/{name} is old: run `make docs`"


def test_nothing_else_lies_in_the_reference(tmp_path: Path) -> None:
    write(tmp_path / "reference")
    made = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "reference").iterdir()}
    assert made == pages()
    assert {path.name for path in (DOCS / "reference").iterdir()} == set(made)


def commands(group: click.Group, context: click.Context) -> Iterator[tuple[str, click.Command]]:
    for name in group.list_commands(context):
        found = group.get_command(context, name)
        assert found is not None
        inner = click.Context(found, info_name=name, parent=context)
        yield inner.command_path, found
        if isinstance(found, click.Group):
            yield from commands(found, inner)


def all_commands() -> dict[str, click.Command]:
    assert isinstance(main, click.Group)
    return dict(commands(main, click.Context(main, info_name="fate_llm")))


def test_every_command_and_option_is_in_it() -> None:
    text = read("commands")
    found = all_commands()
    assert len(found) >= 8
    for path, command in found.items():
        part = section(text, f"## {path}")
        for option in command.params:
            if isinstance(option, click.Option):
                assert all(name in part for name in option.opts), f"{path} {option.opts}"


@pytest.mark.parametrize("name", plugins.names("component"))
def test_every_component_port_and_parameter_is_in_it(name: str) -> None:
    part = section(read("components"), f"## {name}")
    found = describe_component(name)
    for port in (*found["inputs"], *found["outputs"], *found["params"]):
        assert f"| `{port['name']}` |" in part, f"{name}: {port['name']}"


@pytest.mark.parametrize("kind", sorted(set(plugins.KINDS) - {"component"}))
def test_every_plug_in_is_in_it(kind: str) -> None:
    text = read("plugins")
    for name in plugins.names(kind):
        part = section(text, f"### {name}")
        for setting in describe_params(params) if (params := getattr(plugins.load(kind, name), "Params", None)) else []:
            assert f"`{setting['name']}`" in part


def test_every_error_and_fault_is_in_it() -> None:
    text = read("errors")
    for error in OURS:
        part = section(text, f"## {error.code}")
        assert f"exit code {error.exit_code}" in part
        assert error.default_hint in part
    faults = read("pipeline")
    for code in CODES:
        assert f"| `{code}` |" in faults


@pytest.mark.parametrize("model", [PipelineSpec, Parties, TaskSpec, TaskOverride, JobSettings])
def test_every_key_of_a_pipeline_is_in_it(model: Any) -> None:
    text = read("pipeline")
    for name in model.model_fields:
        assert f"| `{name}` |" in text


# --- What pages show ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{shown(page)}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, target


def test_every_page_is_reached_from_the_index() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    linked = {(DOCS / target).resolve() for target in LINK.findall(index)}
    assert linked >= {page for page in DOCS.rglob("*.md") if page != DOCS / "README.md"}
    assert "(docs/README.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_pipelines_shown_are_valid() -> None:
    found = [(page, text) for page, text in blocks("yaml") if text.startswith("version: 1")]
    assert found
    for page, text in found:
        pipeline = Pipeline.from_yaml(text)
        assert pipeline.validate() is pipeline, shown(page)


def test_the_python_shown_compiles() -> None:
    for page, text in blocks("python"):
        compile(text, shown(page), "exec")


def test_the_pipeline_of_the_readme_is_the_quickstart_s(monkeypatch: pytest.MonkeyPatch) -> None:
    # Everything up to `submit` runs: building, checking and planning.
    (text,) = [text for page, text in blocks("python") if page.name == "README.md" and page.parent == ROOT]
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    before, _, after = text.partition("job = ")
    assert after.startswith("p.submit()")
    exec(compile(before, "README.md", "exec"), names)
    assert names["p"].validate().name == "quickstart"


def plug_ins() -> dict[str, types.ModuleType]:
    """The plug-ins that pages show in full, by the name of the file that the page says."""
    found = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            if match[1] == "python" and "PLUGIN = " in match[2]:
                name = re.findall(r"`fate_llm/components/(?:\w+/)*(\w+)\.py`", text[: match.start()])[-1]
                module = types.ModuleType(name)
                exec(compile(match[2], shown(page), "exec"), module.__dict__)
                found[name] = module
    return found


def test_the_aggregator_shown_does_what_it_says() -> None:
    import numpy as np

    from fate_llm.core.interfaces import Aggregator
    from fate_llm.core.values import Total

    rule = plug_ins()["half_step"].PLUGIN
    state = {"w": np.ones(2, np.float32)}
    stepped = rule().step(state, Total({"w": np.full(2, 4, np.float32)}, 1.0, {}, ("a",)))
    assert isinstance(rule(), Aggregator)
    assert stepped["w"].tolist() == [3.0, 3.0]
    assert stepped["w"].dtype == np.float32


def test_the_component_shown_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fate_llm.runtime.submit import prepare
    from tests.runtime.toys import Installed

    counter = plug_ins()["counter"].PLUGIN
    monkeypatch.setattr(
        plugins, "_installed", lambda kind: {"counter": Installed(counter)} if kind == "component" else {}
    )
    for party, count in (("a", 2), ("b", 3)):
        (tmp_path / f"{party}.jsonl").write_text('{"question": "q", "answer": "a"}\n' * count)
    spec = check(
        {
            "version": 1,
            "name": "count",
            "parties": {"guest": "a", "hosts": ["b"], "arbiter": "z"},
            "tasks": {
                "data": {"component": "reader", "params": {"path": "a.jsonl"}},
                "count": {"component": "counter", "inputs": {"data": "data.dataset"}},
            },
            "overrides": {"b": {"data": {"params": {"path": "b.jsonl"}}}},
        }
    )
    result = prepare(spec, base=tmp_path, workdir=tmp_path / "jobs").run().raise_for_status()
    assert result.metrics["count"] == {"rows": 5.0}
    assert describe_component("counter")["params"][0]["name"] == "protection"


def command_lines() -> list[tuple[Path, list[str]]]:
    """`fate_llm ...` in shell blocks and in backticks."""
    found = []
    for page in PAGES:
        if page.parent.name == "reference":
            continue
        text = page.read_text(encoding="utf-8")
        lines = [line for kind, block in BLOCK.findall(text) if kind == "shell" for line in block.splitlines()]
        lines += re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))
        found += [(page, shlex.split(line, comments=True)[1:]) for line in lines if line.startswith("fate_llm ")]
    assert len(found) > 5
    return found


def test_the_commands_shown_exist_with_their_options() -> None:
    known = all_commands()
    for page, words in command_lines():
        command, path = known.get(f"fate_llm {words[0]}"), f"fate_llm {words[0]}"
        if isinstance(command, click.Group) and len(words) > 1:
            command, path = known.get(f"{path} {words[1]}"), f"{path} {words[1]}"
        if words == ["--help"]:
            continue
        assert command is not None, f"{shown(page)}: {path}"
        options = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
        given = [word.partition("=")[0] for word in words if word.startswith("-")]
        assert set(given) <= options | {"--help", "-h"}, f"{shown(page)}: {path} {given}"


def test_the_make_targets_shown_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [line for kind, block in BLOCK.findall(text) if kind == "shell" for line in block.splitlines()]
        lines += re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))
        named = {line.split()[1] for line in lines if line.startswith("make ")}
        assert named <= targets, f"{shown(page)}: {sorted(named - targets)}"


def test_the_tree_of_the_readme_is_the_tree() -> None:
    tree = section((ROOT / "README.md").read_text(encoding="utf-8"), "## The tree")
    named = re.findall(r"^\| `([\w/.]+)` \|", tree, re.MULTILINE)
    assert len(named) >= 8
    for path in named:
        assert (ROOT / path).exists(), path
    packages = {f"fate_llm/{p.parent.name}/" for p in (ROOT / "fate_llm").glob("*/__init__.py")}
    assert packages <= set(named)


def test_the_extras_of_the_readme_are_those_of_the_package() -> None:
    import configparser

    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = set(config["options.extras_require"])
    table = section((ROOT / "README.md").read_text(encoding="utf-8"), "## Installation in layers")
    assert set(re.findall(r"\[(\w+)\]", table)) == extras


def test_pages_name_no_machine() -> None:
    wrong = re.compile(r"/(?:work|root|home|tmp|mnt|opt)/|localhost|\b\d{1,3}(?:\.\d{1,3}){3}\b")
    for page in PAGES:
        found = wrong.search(page.read_text(encoding="utf-8"))
        assert found is None, f"{shown(page)}: {found and found[0]}"


def test_the_changelog_has_this_version() -> None:
    from fate_llm import __version__

    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# --- Explanations against the code -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("title", "table"),
    [("**Coordinator**", machine._COORDINATOR), ("**Contributor**", machine._CONTRIBUTOR)],
    ids=["coordinator", "contributor"],
)
def test_the_tables_of_the_rounds_are_those_of_the_machines(
    title: str, table: dict[Any, dict[str | type, Callable[..., Any]]]
) -> None:
    text = (DOCS / "explanation" / "rounds.md").read_text(encoding="utf-8")
    part = text.partition(title)[2].partition("\n**")[0]
    written = re.findall(r"^\| (\w+) \| (\w+) \| ", part, re.MULTILINE)[1:]
    wanted = [
        (phase.value, (event.rpartition(".")[2] if isinstance(event, str) else event.__name__).lower())
        for phase, events in table.items()
        for event in events
    ]
    assert sorted(written) == sorted(wanted)


def test_every_event_of_the_machines_is_named_in_both_drawings() -> None:
    text = (DOCS / "explanation" / "rounds.md").read_text(encoding="utf-8")
    for phase in (*machine.CoordinatorPhase, *machine.ContributorPhase):
        assert phase.value in text.lower(), phase
