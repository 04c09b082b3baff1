"""The manual says what there is, and what it shows works."""

from __future__ import annotations

import dataclasses
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
    return dict(commands(main, click.Context(main, info_name="fate_llm", **main.context_settings)))


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


def command_lines(pages: list[Path] = PAGES) -> list[tuple[Path, list[str]]]:
    """The words after `fate_llm`: in shell blocks, behind the prompt of a terminal (`$ fate_llm ...`), in backticks."""
    found = []
    for page in pages:
        if page.parent.name == "reference":
            continue
        text = page.read_text(encoding="utf-8")
        lines = [line for kind, block in BLOCK.findall(text) for line in typed(kind, block)]
        lines += re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))
        found += [(page, shlex.split(line, comments=True)[1:]) for line in lines if line.startswith("fate_llm ")]
    assert found, "no commands found: the test looks at the wrong place"
    return found


def typed(kind: str, block: str) -> list[str]:
    """The commands of a block: all lines of a shell block, those behind a prompt of another. `\\` goes on."""
    lines = block.replace("\\\n", " ").splitlines()
    if kind == "shell":
        return [re.sub(r"^\S+/(?=fate_llm )", "", line) for line in lines]
    return [match[1] for line in lines if (match := re.match(r"[\w-]*\$ (?:\S+/)?(fate_llm .*)", line))]


def resolved(words: list[str]) -> tuple[str, click.Command | None]:
    """The command of a command line, through its groups; `party approvals` without a subcommand is its `list`."""
    known, path, rest = all_commands(), f"fate_llm {words[0]}", words[1:]
    while isinstance(known.get(path), click.Group) and rest and not rest[0].startswith("-"):
        path, rest = f"{path} {rest[0]}", rest[1:]
    if path == "fate_llm party approvals" and rest:
        path += " list"
    return path, known.get(path)


def test_the_commands_shown_exist_with_their_options() -> None:
    for page, words in command_lines():
        if words == ["--help"]:
            continue
        path, command = resolved(words)
        assert command is not None, f"{shown(page)}: {path}"
        options = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
        given = [word.partition("=")[0] for word in words if word.startswith("-")]
        assert set(given) <= options | {"--help", "-h"}, f"{shown(page)}: {path} {given}"


def test_the_search_for_commands_finds_what_is_wrong() -> None:
    # Given what pages show in their three ways
    assert typed("shell", ".venv/bin/fate_llm plan x.yaml\nls") == ["fate_llm plan x.yaml", "ls"]
    assert typed("text", "bank-b$ fate_llm jobs list \\\n  --json\nfate_llm is said\n") == [
        "fate_llm jobs list    --json"
    ]
    # Then a command of two groups is found, and one that is not there is not
    assert resolved(["party", "approvals", "show", "JOB"])[1] is not None
    assert resolved(["party", "approvals", "--home", "x"])[0] == "fate_llm party approvals list"
    assert resolved(["party", "approvals", "shwo", "JOB"])[1] is None


def test_the_tutorial_of_three_organisations_uses_what_services_have() -> None:
    page = DOCS / "tutorial" / "three-organisations.md"
    used = {resolved(words)[0].removeprefix("fate_llm ") for _, words in command_lines([page])}
    assert used >= {
        *("federation dev-broker", "party init", "party card", "federation add", "federation show", "federation grant"),
        *("party serve", "party health", "doctor", "submit", "party approvals list", "party approvals approve"),
        *("jobs show", "jobs logs", "jobs dossier", "audit dossier verify", "audit verify", "models export"),
    }


def files_shown(page: Path, name: str) -> list[str]:
    """The yaml blocks of a page whose first line says that they are the file `name`."""
    found = [text for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")) if kind == "yaml"]
    return [text for text in found if text.startswith(f"# {name}\n")]


def test_the_policies_and_catalogues_shown_are_valid(tmp_path: Path) -> None:
    from fate_llm.runtime.trust.catalog import load_catalog
    from fate_llm.runtime.trust.policy_schema import load_policy

    (tmp_path / "bank_a.jsonl").write_text("{}\n")
    count = 0
    for page in PAGES:
        for name, load in (("policy.yaml", load_policy), ("catalog.yaml", load_catalog)):
            for text in files_shown(page, name):
                (tmp_path / name).write_text(text, encoding="utf-8")
                load(tmp_path / name)
                count += 1
    assert count >= 4


def test_the_job_of_the_tutorial_is_what_its_policy_accepts(tmp_path: Path) -> None:
    # Given the files that the tutorial shows, at three banks with keys of their own
    from fate_llm.runtime.federation import make_federation
    from fate_llm.runtime.service.words import Estimates
    from fate_llm.runtime.trust.catalog import load_catalog
    from fate_llm.runtime.trust.jobspec import make_specification
    from fate_llm.runtime.trust.policy import evaluate
    from fate_llm.runtime.trust.policy_schema import load_policy
    from fate_llm.security.identity import Identity
    from fate_llm.security.sealed_box import SealingKey

    page = DOCS / "tutorial" / "three-organisations.md"
    for name in ("policy.yaml", "catalog.yaml"):
        (text,) = files_shown(page, name)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (pipeline,) = [text for at, text in blocks("yaml") if at == page and "\nparties:" in text]
    banks = {party: Identity.generate() for party in ("bank-a", "bank-b", "bank-c")}
    place = {"host": "mq.example", "port": 5671, "tls": True}
    parties = {
        party: {
            "identity": identity.public.to_text(),
            "sealing": SealingKey.generate().public.to_text(),
            "broker": place,
        }
        for party, identity in banks.items()
    }
    roster = make_federation(
        {"version": 1, "name": "loans", "vhost": "fate.loans", "topology": "shared", "parties": parties}
    )

    def judged(text: str) -> tuple[str, set[str]]:
        spec = Pipeline.from_yaml(text).validate().spec()
        signed = make_specification(spec, job="lenders-1", federation=roster, created=1.0).sign(banks["bank-a"])
        policy, catalog = load_policy(tmp_path / "policy.yaml"), load_catalog(tmp_path / "catalog.yaml")
        known, costs = {"bank-a"}, Estimates(memory_bytes=2_310_000_000)
        found = evaluate(policy, signed, "bank-b", catalog, 2.0, costs, known=known, pipeline=spec)
        return found.verdict, {one.rule for one in found.refusals}

    # When bank-b's policy is asked about the job, and about the one with too many rounds
    # Then the first is accepted, and the second refused by the rule that the tutorial shows
    assert judged(pipeline) == ("accept", set())
    assert judged(pipeline.replace("rounds: 2", "rounds: 20")) == ("refuse", {"params.tune.rounds"})


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
        text = page.read_text(encoding="utf-8")
        if page.name == "three-organisations.md":  # whoever follows it types this name; the port is the broker's own
            text = text.replace("localhost:PORT", "").replace("@localhost", "").replace("`localhost`", "")
        found = wrong.search(text)
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


def table_of(page: Path, heading: str) -> list[list[str]]:
    """The rows of the first table below a heading, without its first two lines."""
    rows = re.findall(r"^\|(.*)\|$", section(page.read_text(encoding="utf-8"), heading), re.MULTILINE)[2:]
    return [[cell.strip() for cell in row.split(" | ")] for row in rows]


def test_the_architecture_s_table_of_imports_is_the_one_that_is_held() -> None:
    from tests.architecture.test_layers import ONLY_IN, THIRD_PARTY

    heading = next(line for line in (DOCS / "architecture.md").read_text().splitlines() if line.startswith("## 3."))
    rows = {row[0]: row[1] for row in table_of(DOCS / "architecture.md", heading)}
    also = {"pydantic_core": "pydantic", "yaml": "pyyaml", "dp_accounting": "dp-accounting"}
    for layer, libraries in THIRD_PARTY.items():
        if layer:
            missing = {name for name in libraries if also.get(name, name) not in rows[layer].lower()}
            assert not missing, f"{layer}: {sorted(missing)}"
    for library, places in ONLY_IN.items():
        for place in places:
            layer, _, inside = place.partition("/")
            assert library in rows[layer].lower(), f"{library} in {layer}"
            if inside:  # the place is named in the same cell, after the library
                assert f"`{inside}" in rows[layer].partition(library)[2], f"{library} only in {place}"


def test_the_architecture_names_every_package_and_folder_of_tests() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    tree = section(text, "## 2. The tree")
    for package in (path.parent for path in (ROOT / "fate_llm").glob("*/*/__init__.py")):
        if package.name not in {"data", "commands", "migrations"}:
            assert re.search(rf"^ +{package.name}/ ", tree, re.MULTILINE), package
    kinds = section(text, "## 13. Kinds of tests")
    named = set(re.findall(r"`tests/(\w+)/`", kinds))
    packages = {path.parent.name for path in (ROOT / "fate_llm").glob("*/__init__.py")}
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert folders - packages - {"benchmarks"} <= named <= folders


def test_the_numbers_of_crash_recovery_are_the_program_s() -> None:
    from fate_llm.runtime.service import part

    page = " ".join((DOCS / "explanation" / "crash-recovery.md").read_text(encoding="utf-8").split())
    first, most = part._BACKOFF
    assert f"after {first:g} s to {most:g} s" in page
    fresh = {field.name: field.default for field in dataclasses.fields(part.PartMachine)}
    assert fresh["restarts_allowed"] == 10 and "dies ten times" in page
    lost_after = JobSettings().lost_after
    assert f"`lost_after` ({lost_after / 60:g} minutes" in page


def test_every_code_that_an_explanation_names_exists() -> None:
    codes = {error.code for error in OURS}
    for name in ("crash-recovery", "parties-as-services"):
        text = (DOCS / "explanation" / f"{name}.md").read_text(encoding="utf-8")
        named = set(re.findall(r"`([a-z]+_(?:lost|restarted|refused))`", text))
        assert named <= codes, named - codes
    assert "message_lost" in codes
