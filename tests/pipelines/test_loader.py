"""From files to values: the environment, includes, `--set`, and the place of every fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fate_llm.core.errors import PipelineInvalid
from fate_llm.pipelines.check import load_pipeline
from fate_llm.pipelines.dialect import Mark
from fate_llm.pipelines.loader import COMMAND_LINE, MAX_INCLUDES, load_file, load_text

pytestmark = pytest.mark.usefixtures("registry")

Write = Callable[[str, str], Path]


# --- Environment ---------------------------------------------------------------------------------


def test_listed_variables_are_put_in() -> None:
    # Given a text that lists what it names
    text = "env: [DATA, USER]\na: ${DATA}/x.jsonl\nb: ['hello ${USER} and ${USER}']\n"
    # When it is read with these variables
    source = load_text(text, environ={"DATA": "/srv", "USER": "eve", "OTHER": "1"})
    # Then their values stand in the texts
    assert source.faults == []
    assert source.data == {"env": ["DATA", "USER"], "a": "/srv/x.jsonl", "b": ["hello eve and eve"]}


def test_a_variable_without_quotes_between_brackets_gets_a_hint() -> None:
    faults = load_text("env: [A]\nb: {path: ${A}/x}\n", environ={"A": "x"}).faults
    assert [(fault.code, fault.line) for fault in faults] == [("yaml_syntax", 2)]
    assert "needs quotes" in faults[0].hint


def test_a_value_of_the_environment_stays_text() -> None:
    # Given a value that would be a mapping, a number and another variable
    source = load_text("env: [A, B, C]\na: ${A}\nb: ${B}\nc: ${C}\n", environ={"A": "{x: 1}", "B": "12", "C": "${A}"})
    # Then each is text as it is
    assert source.data == {"env": ["A", "B", "C"], "a": "{x: 1}", "b": "12", "c": "${A}"}


def test_two_dollars_write_the_characters_themselves() -> None:
    assert load_text("a: $${HOME} $5 $HOME\n").data == {"a": "${HOME} $5 $HOME"}


@pytest.mark.parametrize(
    ("text", "code", "hint"),
    [
        ("env: [HOUSE]\na: ${HOME}\n", "env_not_listed", "did you mean 'HOUSE'?"),
        ("env: []\na: ${HOME}\n", "env_not_listed", "list it under `env`"),
        ("env: HOME\na: ${HOME}\n", "env_not_listed", "list it under `env`"),
        ("env: [NOPE]\na: ${NOPE}\n", "env_unset", "export NOPE="),
        ("env: [HOME]\na: ${HOME\n", "env_syntax", "$${"),
        ("env: [HOME]\na: ${}\n", "env_not_listed", "valid: HOME"),
    ],
)
def test_other_variables_are_faults_with_their_line(text: str, code: str, hint: str) -> None:
    source = load_text(text, environ={"HOME": "/home/eve", "HOUSE": "/"})
    assert [(fault.code, fault.line, fault.path) for fault in source.faults] == [(code, 2, "a")]
    assert hint in source.faults[0].hint


def test_the_environment_is_only_what_is_passed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "from the process")
    source = load_text("env: [SECRET]\na: ${SECRET}\n")
    assert [fault.code for fault in source.faults] == ["env_unset"]


def test_variables_are_not_put_into_keys() -> None:
    source = load_text("env: [A]\n'${A}': 1\n", environ={"A": "x"})
    assert list(source.data) == ["env", "${A}"]


# --- Includes ------------------------------------------------------------------------------------


def test_included_files_lie_beneath_the_file(write: Write) -> None:
    # Given two included files, the second over the first, and the file over both
    write("one.yaml", "a: 1\nb: {x: 1, y: 1}\nlist: [1, 2]\n")
    write("two.yaml", "b: {y: 2, z: 2}\nc: 2\n")
    path = write("main.yaml", "include: [one.yaml, two.yaml]\nb:\n  z: 3\nlist: [3]\n")
    # When the file is read
    source = load_file(path)
    # Then mappings are merged key by key, everything else is replaced, and `include` is done with
    assert source.faults == []
    assert source.data == {"a": 1, "b": {"x": 1, "y": 2, "z": 3}, "list": [3], "c": 2}


def test_a_merged_value_is_marked_where_it_comes_from(write: Write) -> None:
    one = write("parts/one.yaml", "b:\n  x: 1\n  list: [1, 2]\n")
    main = write("main.yaml", "include: [parts/one.yaml]\nb:\n  list: [3]\n")
    marks = load_file(main).marks
    assert marks[("b", "x")] == Mark(str(one), 2)
    assert marks[("b",)] == Mark(str(main), 2)
    assert marks[("b", "list", 0)] == Mark(str(main), 3)
    assert ("b", "list", 1) not in marks


def test_includes_start_at_the_including_file(write: Write) -> None:
    write("parts/deep/three.yaml", "c: 3\n")
    write("parts/two.yaml", "include: [deep/three.yaml]\nb: 2\n")
    assert load_file(write("main.yaml", "include: [parts/two.yaml]\na: 1\n")).data == {"c": 3, "b": 2, "a": 1}


def test_each_file_has_an_environment_list_of_its_own(write: Write) -> None:
    # Given an included file that names a variable which only the including file lists
    part = write("part.yaml", "a: 1\nb: ${HOME}\n")
    main = write("main.yaml", "include: [part.yaml]\nenv: [HOME]\nc: ${HOME}\n")
    # Then the fault lies in the included file
    source = load_file(main, environ={"HOME": "/h"})
    assert [(fault.code, fault.file, fault.line) for fault in source.faults] == [("env_not_listed", str(part), 2)]
    assert source.data["c"] == "/h"


def test_faults_of_all_files_come_together(write: Write) -> None:
    one = write("one.yaml", "a: !x 1\n")
    two = write("two.yaml", "b: [\n")
    main = write("main.yaml", "include: [one.yaml, two.yaml, none.yaml]\nc: .inf\n")
    found = {(fault.code, fault.file, fault.line) for fault in load_file(main).faults}
    assert found == {
        ("yaml_tag", str(one), 1),
        ("yaml_syntax", str(two), 2),
        ("file_unreadable", str(main), 1),
        ("yaml_number", str(main), 2),
    }


def test_a_file_that_includes_itself_is_refused(write: Write) -> None:
    write("a.yaml", "include: [b.yaml]\n")
    b = write("b.yaml", "x: 1\ninclude: [a.yaml]\n")
    faults = load_file(b.parent / "a.yaml").faults
    assert [(fault.code, fault.file, fault.line) for fault in faults] == [("include_cycle", str(b), 2)]


def test_one_file_may_be_included_twice_side_by_side(write: Write) -> None:
    write("a.yaml", "x: 1\n")
    source = load_file(write("main.yaml", "include: [a.yaml, a.yaml]\n"))
    assert source.faults == []
    assert source.data == {"x": 1}


def test_the_number_of_included_files_is_bounded(write: Write) -> None:
    # Given files that each include the next one twice, exponential work
    for number in range(12):
        write(f"f{number}.yaml", f"include: [f{number + 1}.yaml, f{number + 1}.yaml]\n")
    write("f12.yaml", "x: 1\n")
    faults = load_file(write("main.yaml", "include: [f0.yaml]\n")).faults
    assert faults
    assert all(fault.code == "include_cycle" and str(MAX_INCLUDES) in fault.message for fault in faults)


def test_text_without_a_folder_cannot_include(write: Write) -> None:
    part = write("part.yaml", "x: 1\n")
    assert [fault.code for fault in load_text("include: [part.yaml]\n").faults] == ["file_unreadable"]
    assert load_text("include: [part.yaml]\n", folder=part.parent).data == {"x": 1}


def test_an_include_that_is_no_list_of_names_is_left_for_the_checks() -> None:
    assert load_text("include: part.yaml\n").data == {"include": "part.yaml"}
    assert load_text("include: [3]\n").data == {"include": [3]}


# --- Files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "not_a_pipeline"),
        (b"# only a comment\n", "not_a_pipeline"),
        (b"- a\n- b\n", "not_a_pipeline"),
        (b"just text", "not_a_pipeline"),
        (b"a: \xff\xfe", "file_unreadable"),
        (b"a: 1\n" + b"#" * 600_000, "file_too_large"),
    ],
)
def test_what_is_no_pipeline_is_one_fault(tmp_path: Path, content: bytes, code: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_bytes(content)
    with pytest.raises(PipelineInvalid) as caught:
        load_pipeline(path)
    assert [(fault.code, fault.file) for fault in caught.value.faults] == [(code, str(path))]
    assert caught.value.exit_code == 2


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert load_file(path).data == {"a": 1}


@pytest.mark.parametrize("name", ["none.yaml", "."])
def test_a_file_that_is_not_there_is_a_fault(tmp_path: Path, name: str) -> None:
    assert [fault.code for fault in load_file(tmp_path / name).faults] == ["file_unreadable"]


# --- Overrides of the command line ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("job.seed=9", ("job", "seed"), 9),
        ("tasks.tune.params.rounds=2", ("tasks", "tune", "params", "rounds"), 2),
        ("tasks.tune.params.new=1e-3", ("tasks", "tune", "params", "new"), 1e-3),
        ("tasks.tune.params=", ("tasks", "tune", "params"), None),
        ("tasks.tune.params={rounds: 1}", ("tasks", "tune", "params"), {"rounds": 1}),
        ("parties.hosts.0=bank-x", ("parties", "hosts", 0), "bank-x"),
        ("overrides.bank-a.tune.params.rounds=2", ("overrides", "bank-a", "tune", "params", "rounds"), 2),
        ("description=a = b", ("description",), "a = b"),
        ("experiment=true", ("experiment",), True),
        (" name =x", ("name",), "x"),
    ],
)
def test_a_value_is_set(valid_text: str, override: str, path: tuple[str | int, ...], value: object) -> None:
    # When one override is applied
    source = load_text(valid_text, [override])
    # Then the value stands there, and is marked as coming from the command line
    assert source.faults == []
    where = source.data
    for step in path:
        where = where[step]
    assert where == value
    assert source.marks[path] == Mark(COMMAND_LINE, None)


def test_a_mapping_that_the_language_lets_out_is_opened() -> None:
    text = "tasks: {tune: {component: trainer}}\n"
    source = load_text(text, ["job.seed=1", "tasks.tune.params.rounds=2", "overrides.b.tune.params.x=3"])
    assert source.faults == []
    assert source.data == {
        "tasks": {"tune": {"component": "trainer", "params": {"rounds": 2}}},
        "job": {"seed": 1},
        "overrides": {"b": {"tune": {"params": {"x": 3}}}},
    }


def test_names_with_dots_are_found() -> None:
    text = "tasks: {a.b: {params: {x: 1}}, a: {params: {x: 1}}}\n"
    source = load_text(text, ["tasks.a.b.params.x=2"])
    assert source.data == {"tasks": {"a.b": {"params": {"x": 2}}, "a": {"params": {"x": 1}}}}


def test_later_overrides_win(valid_text: str) -> None:
    assert load_text(valid_text, ["job.seed=1", "job.seed=2"]).data["job"]["seed"] == 2


def test_a_set_value_is_no_place_for_variables(valid_text: str) -> None:
    source = load_text(valid_text, ["description=${HOME}"], {"HOME": "/h"})
    assert source.data["description"] == "${HOME}"


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("seed", "is not key=value", "for example"),
        ("=1", "is not key=value", "for example"),
        ("tasks.tunn.params.rounds=2", "there is no 'tasks.tunn'", "did you mean 'tune'?"),
        ("tasks.tunn=2", "there is no task 'tunn'", "did you mean 'tune'?"),
        ("taks.tune.params.rounds=2", "there is no 'taks'", "did you mean 'tasks'?"),
        ("name.first=x", "'name' is a single value", "did you mean"),
        ("parties.hosts.7=x", "has 2 items, none is 7", "start at 0"),
        ("parties.hosts.first=x", "none is 'first'", "start at 0"),
        ("parties.hosts.7.x=x", "there is no 'parties.hosts[7]'", ""),
        ("tasks.score.inputs.model.0.x=1", "is a single value", ""),
        ("tasks.tune.params.hooks.5.name=x", "there is no 'tasks.tune.params.hooks[5]'", ""),
        ("job.seed=[1", "the value '[1'", "YAML"),
        ("job.seed=!!python/name:os.system x", "the tag", "YAML"),
    ],
)
def test_a_wrong_override_is_a_fault(valid_text: str, override: str, message: str, hint: str) -> None:
    # Given a list of hooks beside the rest
    text = valid_text.replace("protection: open}", "protection: open, hooks: [{name: clip}]}")
    before = load_text(text).data
    # When the override is applied
    source = load_text(text, [override])
    # Then it is one fault of the command line, and nothing is changed
    assert [(fault.code, fault.file, fault.line) for fault in source.faults] == [("set_invalid", COMMAND_LINE, None)]
    assert message in source.faults[0].message
    assert hint in source.faults[0].hint
    assert source.data == before


def test_faults_of_a_set_value_name_the_command_line(write: Write, valid_text: str) -> None:
    path = write("p.yaml", valid_text)
    with pytest.raises(PipelineInvalid) as caught:
        load_pipeline(path, ["tasks.tune.params.rounds=0", "job.sed=3"])
    assert {(fault.file, fault.line, fault.path) for fault in caught.value.faults} == {
        (COMMAND_LINE, None, "tasks.tune.params.rounds"),
        (COMMAND_LINE, None, "job.sed"),
    }


@settings(max_examples=100, deadline=None)
@given(overrides=st.lists(st.text(alphabet="tasks.une=01[]{}:'\"!&* -", max_size=25) | st.text(), max_size=3))
def test_no_override_makes_the_loader_fail(valid_text: str, overrides: list[str]) -> None:
    source = load_text(valid_text, overrides)
    assert isinstance(source.data, dict)


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(alphabet=st.characters(exclude_categories=["Cs"]))
    | st.text(alphabet="version: 1\nname{}[],tasks\n  ${}&*!-'\"")
)
def test_a_file_loads_or_is_invalid_and_nothing_else(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    # Given any text at all in a file
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8", newline="")
    # When it is loaded, then the only error is a list of faults
    with pytest.raises(PipelineInvalid) as caught:
        load_pipeline(path)
    assert caught.value.faults
