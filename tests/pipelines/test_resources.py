"""What params name outside a job is found, marked or not; sizes and needs of a job."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ConfigDict, Field

from fate_llm.components.homo_llm_trainer import HomoLlmTrainer
from fate_llm.components.reader import ReaderParams
from fate_llm.core.errors import Fault
from fate_llm.core.interfaces import Frozen
from fate_llm.pipelines.check import check
from fate_llm.pipelines.resources import Resource, looks_like_path, resources_of
from fate_llm.pipelines.schema import JobSettings, parse_size


@dataclass
class Place:
    where: str


class Inner(Frozen):
    file: str = Field("", json_schema_extra={"resource": "data"})


class Params(Frozen):
    model_config = ConfigDict(extra="allow", arbitrary_types_allowed=True)
    data: tuple[str, ...] = Field((), json_schema_extra={"resource": "data"})
    inner: tuple[Inner, ...] = ()
    place: Any = None


def found(**values: Any) -> list[tuple[str, str, str]]:
    return [(one.kind, one.text, ".".join(map(str, one.path))) for one in resources_of(Params(**values))]


def test_marked_fields_are_found_at_any_depth() -> None:
    assert found(data=("a.csv", "catalog:b"), inner=(Inner(file="c"), Inner())) == [
        ("data", "path:a.csv", "data.0"),
        ("data", "catalog:b", "data.1"),
        ("data", "path:c", "inner.0.file"),
    ]


@pytest.mark.parametrize(
    "value", [{"a": "/x"}, ["/x"], {"/x"}, Place("/x"), {"/x": 1}, Path("/x"), b"/x", {"a": [{"b": Inner(file="/x")}]}]
)
def test_nothing_is_hidden_by_its_shape(value: Any) -> None:
    assert [text for _, text, _ in found(place=value)] == ["path:/x"]
    assert [text for _, text, _ in found(surplus=value)] == ["path:/x"]


def test_a_bare_path_object_is_a_path() -> None:
    assert found(place=Path("x")) == [("", "path:x", "place")]


def test_our_own_components_say_what_they_open() -> None:
    reader = ReaderParams(path="catalog:loans", tokenizer="/models/x")
    assert [(one.kind, one.text) for one in resources_of(reader)] == [
        ("data", "catalog:loans"),
        ("model", "path:/models/x"),
    ]
    assert reader.path == next(iter(resources_of(reader))).text and next(iter(resources_of(reader))).name == "loans"


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ({"package": "llm_x"}, "package:llm_x"),
        ({"path": "models/x"}, "path:models/x"),
        ({"path": "catalog:x"}, "catalog:x"),
        ({"hub": "org/x"}, "hub:org/x"),
        ({"hub": "org/x", "revision": "abc"}, "hub:org/x@abc"),
    ],
)
def test_models_by_the_kind_of_their_name(model: dict[str, str], text: str) -> None:
    params = HomoLlmTrainer.Params.model_validate({"model": model, "local_steps": 1})
    assert [(one.kind, one.text) for one in resources_of(params)] == [("model", text)]
    assert Resource("model", text, ()).is_path is text.startswith("path:")


@given(st.text(alphabet="abc /\\.~:", max_size=12))
def test_what_opens_another_folder_looks_like_a_path(text: str) -> None:
    # Whatever leads out of the folder that it is joined to is found
    joined = Path("/job/base") / text
    leaves = not joined.is_relative_to("/job/base") or ".." in joined.parts
    assert looks_like_path(text) or not leaves


# --- sizes and needs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"), [(1, 1), ("512", 512), ("1kB", 1000), ("1KiB", 1024), ("1.5 GiB", 3 * 2**29), ("2TB", 2 * 10**12)]
)
def test_sizes(text: Any, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", [0, -1, True, 1.5, "", "GiB", "1 gib", "-1MB", "1e3", None, "9999999TiB", "0.1"])
def test_what_is_no_size(text: Any) -> None:
    with pytest.raises(ValueError, match="a size is"):
        parse_size(text)


def test_a_need_is_of_all_parties_or_of_one() -> None:
    job = JobSettings.model_validate(
        {"resources": {"cpus": 2, "memory": "1GiB", "at": {"hub": {"cpus": 0.5}}}, "priority": 9}
    )
    assert (job.need_of("bank").cpus, job.need_of("bank").memory, job.need_of("bank").gpus) == (2.0, 2**30, 0)
    assert (job.need_of("hub").cpus, job.need_of("hub").memory) == (0.5, None)
    plain = JobSettings()
    assert (plain.need_of("x").cpus, plain.lost_after, plain.approval_deadline, plain.priority) == (1, 600, 604800, 5)


def test_settings_of_a_job_survive_their_round_trip(
    registry: dict[str, Any], valid: Callable[[], dict[str, Any]]
) -> None:
    data = valid()
    data["job"] |= {"resources": {"memory": "2GiB", "at": {"bank-b": {"gpus": 1}}}, "lost_after": "20m"}
    spec = check(data)
    assert check(spec.to_data()) == spec
    assert spec.to_data()["job"]["resources"] == {"memory": 2**31, "at": {"bank-b": {"gpus": 1}}}


def test_a_need_of_nobody_is_a_fault(
    registry: dict[str, Any], valid_text: str, faults_of: Callable[..., list[Fault]]
) -> None:
    text = valid_text.replace("quorum: 3}", "quorum: 3, resources: {at: {bank-x: {gpus: 1}}}}")
    (fault,) = faults_of(text)
    assert (fault.code, fault.path) == ("unknown_party", "job.resources.at.bank-x") and "bank-" in fault.hint
    assert fault.line == text.splitlines().index(text.splitlines()[-1]) + 1
    for wrong in ("{cpus: 0}", "{gpus: 1.5}", "{memory: lots}", "{ram: 1}"):
        faults = faults_of(valid_text.replace("quorum: 3}", f"quorum: 3, resources: {wrong}}}"))
        assert [one.path.rpartition(".")[0] for one in faults] == ["job.resources"]
