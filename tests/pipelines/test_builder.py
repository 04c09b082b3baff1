"""The Python builder: reads like the YAML, and turns into it and back without loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fate_llm.core.errors import ConfigurationError, MissingExtra, PipelineInvalid, UnknownPlugin
from fate_llm.core.values import Role
from fate_llm.pipelines import builder
from fate_llm.pipelines.builder import Output, Pipeline, set_submitter

pytestmark = pytest.mark.usefixtures("registry")


def demo() -> Pipeline:
    """The same pipeline as the fixture `valid_text`, in Python."""
    p = Pipeline(
        "demo",
        guest="bank-a",
        hosts=["bank-b", "bank-c"],
        arbiter="consortium",
        seed=7,
        round_deadline="10m",
        quorum=3,
    )
    data = p.task("data", "source", path="a.jsonl")
    split = p.task("split", "divider", inputs={"data": data.dataset}, test=0.2)
    tune = p.task(
        "tune",
        "trainer",
        inputs={"train": split.train, "test": split.test},
        rounds=4,
        aggregator="mean",
        protection="open",
    )
    p.task("score", "scorer", inputs={"model": tune.model, "data": split.test})
    p.for_party("bank-b", data={"path": "b.jsonl"})
    p.for_party("bank-c", data={"path": "c.jsonl"})
    return p


# --- Building ------------------------------------------------------------------------------------


def test_python_and_yaml_say_the_same(valid_text: str) -> None:
    # Given one pipeline written both ways
    built, read = demo(), Pipeline.from_yaml(valid_text)
    # Then they are equal, valid, and give the same text
    assert built == read
    assert built.validate() is built
    assert built.spec() == read.spec()


def test_outputs_are_attributes_and_items() -> None:
    p = Pipeline("x", guest="a")
    data = p.task("my-data", "source", path="x")
    assert data.dataset == data["dataset"] == "my-data.dataset"
    assert isinstance(data.dataset, Output)
    assert dir(data) == ["dataset", "report"]
    assert repr(data) == "<task my-data [source] -> dataset, report>"
    assert repr(data.dataset) == "<output my-data.dataset>"


def test_an_unknown_output_names_the_nearest() -> None:
    data = Pipeline("x", guest="a").task("data", "source", path="x")
    with pytest.raises(AttributeError, match=r"'data' .source. has no output 'datset': did you mean 'dataset'"):
        _ = data.datset
    with pytest.raises(KeyError, match="did you mean 'dataset'"):
        _ = data["datset"]
    assert not hasattr(data, "_repr_html_")
    assert not hasattr(data, "__len__")


def test_params_may_have_the_names_of_arguments() -> None:
    # Given settings called like arguments of `task`
    p = Pipeline("x", guest="a")
    p.task("data", "source", params={"inputs": 1, "name": 2}, limit=3)
    # Then they are settings all the same
    assert p.to_dict()["tasks"]["data"]["params"] == {"inputs": 1, "name": 2, "limit": 3}


def test_roles_parties_and_stage_are_written() -> None:
    p = Pipeline("x", guest="a", hosts=("b",))
    p.task("data", "source", roles=[Role.GUEST, "host"], parties=("a",), stage="predict", path="x")
    assert p.to_dict()["tasks"]["data"] == {
        "component": "source",
        "params": {"path": "x"},
        "roles": ["guest", "host"],
        "parties": ["a"],
        "stage": "predict",
    }


def test_calls_for_one_party_add_up() -> None:
    p = demo()
    returned = p.for_party("bank-b", {"split": {"test": 0.1}}, inputs={"split": {"data": {"path": "mine"}}})
    assert returned is p
    p.for_party("bank-b", data={"limit": 5})
    assert p.to_dict()["overrides"]["bank-b"] == {
        "data": {"params": {"path": "b.jsonl", "limit": 5}},
        "split": {"params": {"test": 0.1}, "inputs": {"data": {"path": "mine"}}},
    }
    p.validate()


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda p: p.task("data", "source", path="x"), ConfigurationError, "a task 'data' already"),
        (lambda p: p.task("Bad Name", "source"), ConfigurationError, "'Bad Name' is not a valid id"),
        (lambda p: p.task("x", "sorce"), UnknownPlugin, "'sorce'"),
        (lambda p: p.task("x", "shut"), MissingExtra, "needs a library"),
        (
            lambda p: p.task("x", "source", params={"path": 1}, path=2),
            ConfigurationError,
            "given twice.*path",
        ),
        (lambda p: p.task("x", "source", path=object()), ConfigurationError, "tasks.x.params.path: a object"),
        (
            lambda p: p.task("x", "source", fields={1: 2}),
            ConfigurationError,
            "tasks.x.params.fields: the key 1",
        ),
        (lambda p: p.task("x", "source", fields=[{"a": {1}}]), ConfigurationError, r"fields\[0\].a: a set"),
        (
            lambda p: p.for_party("b", data={"x": b"1"}),
            ConfigurationError,
            "overrides.b.data.params.x: a bytes",
        ),
        (
            lambda p: Pipeline("x", guest="a", job={"seed": 1}, seed=2),
            ConfigurationError,
            "given twice.*seed",
        ),
    ],
)
def test_what_cannot_be_written_is_refused_at_once(
    build: Callable[[Pipeline], Any], error: type[Exception], message: str
) -> None:
    p = demo()
    before = p.to_dict()
    with pytest.raises(error, match=message):
        build(p)
    assert p.to_dict() == before


def test_settings_are_copied(tmp_path: Path) -> None:
    # Given settings that change afterwards
    fields = {"question": "q"}
    p = Pipeline("x", guest="a")
    p.task("data", "source", path=PurePosixPath("x/y.jsonl"), fields=fields)
    fields["question"] = "changed"
    p.to_dict()["tasks"].clear()
    # Then the pipeline does not; paths are text
    assert p.to_dict()["tasks"]["data"]["params"] == {"path": "x/y.jsonl", "fields": {"question": "q"}}


def test_every_setting_of_a_pipeline_is_written() -> None:
    p = Pipeline(
        "x",
        guest="a",
        hosts=["b"],
        arbiter="c",
        key_holder="d",
        description="why",
        experiment=True,
        job={"seed": 3},
        retries=2,
    )
    assert p.to_dict() == {
        "version": 1,
        "name": "x",
        "description": "why",
        "parties": {"guest": "a", "hosts": ["b"], "arbiter": "c", "key_holder": "d"},
        "tasks": {},
        "job": {"seed": 3, "retries": 2},
        "experiment": True,
    }


# --- Checking and running ------------------------------------------------------------------------


def test_all_faults_come_at_once() -> None:
    p = demo()
    p.for_party("bank-z", data={"path": "z"})
    p.task("more", "trainer", inputs={"train": "split.trian"}, rounds=0)
    with pytest.raises(PipelineInvalid) as caught:
        p.validate()
    assert {fault.code for fault in caught.value.faults} == {
        "unknown_party",
        "unknown_output",
        "invalid_value",
    }
    assert all(fault.file is None and fault.line is None for fault in caught.value.faults)


def test_an_unknown_job_setting_is_a_fault() -> None:
    p = Pipeline("x", guest="a", sed=3)
    p.task("data", "source", path="x")
    with pytest.raises(PipelineInvalid, match="did you mean 'seed'"):
        p.validate()


def test_faults_of_a_file_have_lines(tmp_path: Path, valid_text: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(valid_text.replace("rounds: 4", "rounds: 0"))
    with pytest.raises(PipelineInvalid) as caught:
        Pipeline.from_yaml(path).validate()
    assert [(fault.file, fault.line) for fault in caught.value.faults] == [(str(path), 10)]


def test_the_plan_is_made_from_the_files_folder(
    tmp_path: Path, valid_text: str, registry: dict[str, dict[str, Any]]
) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(valid_text)
    registry["component"]["trainer"].views.clear()
    read = Pipeline.from_yaml(str(path))
    assert [task.name for task in read.plan().tasks] == ["data", "split", "tune", "score"]
    assert read.folder == tmp_path == registry["component"]["trainer"].views[0].base
    assert demo().folder == Path()


@pytest.fixture
def submitter() -> Iterator[list[tuple[Pipeline, dict[str, Any]]]]:
    """Calls of a runtime that takes everything; the one before comes back afterwards."""
    calls: list[tuple[Pipeline, dict[str, Any]]] = []
    before = builder._submitter

    def take(pipeline: Pipeline, **options: Any) -> str:
        calls.append((pipeline, options))
        return "job-1"

    set_submitter(take)
    yield calls
    set_submitter(before)


def test_submitting_goes_to_the_runtime(submitter: list[tuple[Pipeline, dict[str, Any]]]) -> None:
    p = demo()
    assert p.submit(workdir="jobs") == "job-1"
    assert submitter == [(p, {"workdir": "jobs"})]


def test_nothing_invalid_is_submitted(submitter: list[tuple[Pipeline, dict[str, Any]]]) -> None:
    p = demo()
    p.task("more", "divider")
    with pytest.raises(PipelineInvalid):
        p.submit()
    assert submitter == []


def test_without_a_runtime_submitting_says_what_to_do(submitter: object) -> None:
    set_submitter(None)
    with pytest.raises(MissingExtra, match="nothing is here") as caught:
        demo().submit()
    assert "import fate_llm" in caught.value.hint


# --- Text ----------------------------------------------------------------------------------------


def test_yaml_is_the_same_every_time() -> None:
    text = demo().to_yaml()
    assert text == demo().to_yaml() == Pipeline.from_yaml(text).to_yaml()
    assert text.startswith("version: 1\nname: demo\nparties:\n  guest: bank-a\n")


def test_the_order_of_keys_is_kept() -> None:
    text = "name: x\nversion: 1\ntasks:\n  z: {component: source}\n  a: {component: source}\n"
    read = Pipeline.from_yaml(text)
    assert list(read.to_dict()) == ["name", "version", "tasks"]
    assert list(read.to_dict()["tasks"]) == ["z", "a"]
    assert read.to_yaml().index("z:") < read.to_yaml().index("a:")


def test_a_spec_becomes_a_builder_again(valid_text: str) -> None:
    spec = Pipeline.from_yaml(valid_text).spec()
    assert Pipeline.from_spec(spec, folder=Path("x")).spec() == spec
    assert Pipeline.from_spec(spec, folder=Path("x")).folder == Path("x")


def test_text_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(PipelineInvalid) as caught:
        Pipeline.from_yaml("a: [\nb: !x 1\n")
    assert caught.value.faults[0].code == "yaml_syntax"
    with pytest.raises(PipelineInvalid, match="No such file"):
        Pipeline.from_yaml("no/such/file.yaml")


def test_environment_and_overrides_are_taken() -> None:
    text = "env: [WHO]\nname: ${WHO}\njob: {seed: 1}\n"
    read = Pipeline.from_yaml(text, sets=["job.seed=2"], environ={"WHO": "eve"})
    assert read.to_dict() == {"env": ["WHO"], "name": "eve", "job": {"seed": 2}}


def test_a_text_with_a_dollar_survives() -> None:
    p = Pipeline("x", guest="a", description="costs ${PRICE}, or $${x}")
    assert Pipeline.from_yaml(p.to_yaml()) == p


def test_pipelines_compare_by_what_they_say() -> None:
    assert demo() == demo()
    assert demo() != Pipeline("demo", guest="bank-a")
    assert demo() != "demo"
    with pytest.raises(TypeError):
        hash(demo())


def test_the_repr_is_one_line() -> None:
    assert repr(Pipeline("x", guest="a")) == "Pipeline('x', guest='a'; tasks: none yet)"
    assert "tasks: data [source], split [divider]" in repr(demo())


def test_the_notebook_table_is_escaped() -> None:
    p = Pipeline("x", guest="a")
    p.task("data", "source", path="<script>alert('&')</script>")
    shown = p._repr_html_()
    assert "<script>" not in shown
    assert "&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;" in shown
    assert shown.count("<tr>") == 2


@pytest.mark.parametrize(
    "text",
    [
        "tasks: 3\n",
        "tasks: {a: 3, b: {component: [1]}}\n",
        "tasks: {a: {inputs: 3, params: [1]}}\n",
        "parties: x\nname: [1]\n",
    ],
)
def test_odd_pipelines_can_be_looked_at(text: str) -> None:
    # Given what is no pipeline at all
    read = Pipeline.from_yaml(text)
    # Then it can be shown, and is refused when it is checked
    assert repr(read).startswith("Pipeline(")
    assert read._repr_html_().startswith("<p>")
    with pytest.raises(PipelineInvalid):
        read.validate()


def test_odd_pipelines_cannot_be_added_to() -> None:
    with pytest.raises(ConfigurationError, match="tasks of this pipeline is no mapping"):
        Pipeline.from_yaml("tasks: 3\nname: x\n").task("data", "source")


NAMES = st.from_regex(r"[a-z0-9]([a-z0-9_.-]{0,10}[a-z0-9])?", fullmatch=True)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
PARAMS = st.dictionaries(st.text(min_size=1, max_size=8), VALUES, max_size=3)


@settings(max_examples=60, deadline=None)
@given(
    name=NAMES,
    parties=st.lists(NAMES, min_size=1, max_size=4, unique=True),
    tasks=st.dictionaries(NAMES, PARAMS, max_size=4),
    description=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40),
    experiment=st.booleans(),
    seed=st.integers(0, 2**62),
)
def test_what_is_built_is_read_back_exactly(
    name: str, parties: list[str], tasks: dict[str, Any], description: str, experiment: bool, seed: int
) -> None:
    # Given any pipeline that can be built, valid or not
    p = Pipeline(name, guest=parties[0], hosts=parties[1:], description=description, experiment=experiment, seed=seed)
    before = None
    for task, params in tasks.items():
        inputs = {"data": before.train} if before is not None else {"data": {"path": task}}
        before = p.task(task, "divider", inputs=inputs, params=params)
        p.for_party(parties[-1], {task: params})
    # When it is written and read
    text = p.to_yaml()
    read = Pipeline.from_yaml(text)
    # Then it is the same, byte for byte and in the same order
    assert read == p
    assert read.to_yaml() == text
    assert list(read.to_dict()["tasks"]) == list(tasks)
