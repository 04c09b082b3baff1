"""Every fault at once: its code, its line, its path, what was found and what is valid."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fate_llm.core.errors import Fault, PipelineInvalid
from fate_llm.pipelines.check import CODES, check, load_pipeline
from fate_llm.pipelines.faults import Faults, field_names
from fate_llm.pipelines.loader import load_text
from fate_llm.pipelines.schema import PipelineSpec

pytestmark = pytest.mark.usefixtures("registry")

FaultsOf = Callable[..., list[Fault]]
ROOT = Path(__file__).parents[2]


def test_a_valid_pipeline_has_no_fault(valid_text: str, faults_of: FaultsOf) -> None:
    assert faults_of(valid_text) == []


def test_five_faults_give_five_messages(tmp_path: Path, valid_text: str) -> None:
    # Given a file with five different faults
    text = valid_text.replace("name: demo", "name: Demo")
    text = text.replace("{component: divider", "{component: dividr")
    text = text.replace("train: split.train, test", "train: data.dataset, tset")
    text = text.replace("rounds: 4", "rounds: 0")
    text = text.replace("seed: 7", "sed: 7")
    path = tmp_path / "five.yaml"
    path.write_text(text)
    # When it is checked
    with pytest.raises(PipelineInvalid) as caught:
        load_pipeline(path)
    # Then all are told at once, in the order of the lines, each with what is valid
    assert [(f.code, f.file, f.line, f.path) for f in caught.value.faults] == [
        ("invalid_name", str(path), 2, "name"),
        ("unknown_component", str(path), 6, "tasks.split.component"),
        ("input_unexpected", str(path), 9, "tasks.tune.inputs.tset"),
        ("invalid_value", str(path), 10, "tasks.tune.params.rounds"),
        ("unknown_key", str(path), 15, "job.sed"),
    ]
    assert "did you mean 'divider'?" in str(caught.value)
    assert all(fault.hint for fault in caught.value.faults)


SINGLE: list[tuple[str, str, str, str, int, str, str]] = [
    # replaced, by, code, path, line, part of the message, part of the hint
    ("version: 1", "version: 2", "invalid_value", "version", 1, "found 2", "should be 1"),
    ("version: 1", "version: '1'", "invalid_value", "version", 1, "'1'", "did you mean '1'?"),
    ("version: 1\n", "", "missing_key", "version", 1, "'version' is required", "add `version: ...`"),
    ("name: demo\n", "", "missing_key", "name", 1, "'name' is required", "add"),
    ("name: demo", "name: my job", "invalid_name", "name", 2, "'my job'", "lower case"),
    ("name: demo", "name: 3", "invalid_value", "name", 2, "found 3", "text"),
    ("name: demo", "nam: demo\nname: demo", "unknown_key", "nam", 2, "'nam'", "did you mean 'name'?"),
    ("name: demo", "name: demo\ntask: {}", "unknown_key", "task", 3, "'task'", "did you mean 'tasks'?"),
    ("guest: bank-a, ", "", "missing_key", "parties.guest", 3, "'guest' is required", "add"),
    ("guest: bank-a", "gest: x, guest: bank-a", "unknown_key", "parties.gest", 3, "'gest'", "'guest'"),
    ("guest: bank-a", "guest: Bank A", "invalid_name", "parties.guest", 3, "'Bank A'", "lower case"),
    ("arbiter: cons", "arbiter: -cons", "invalid_name", "parties.arbiter", 3, "'-consortium'", "starts"),
    ("[bank-b, bank-c]", "bank-b", "invalid_value", "parties.hosts", 3, "'bank-b'", "list"),
    (
        "[bank-b, bank-c]",
        "[bank-b, bank-c, bank-b]",
        "duplicate_party",
        "parties.hosts[2]",
        3,
        "twice",
        "once",
    ),
    ("[bank-b,", "[bank-a, bank-b,", "duplicate_party", "parties.hosts[0]", 3, "also the guest", "once"),
    ("seed: 7", "seed: -1", "invalid_value", "job.seed", 15, "found -1", "greater than or equal to 0"),
    ("seed: 7", "seed: true", "invalid_value", "job.seed", 15, "found True", "integer"),
    ("10m", "10 m", "invalid_value", "job.round_deadline", 15, "'10 m'", "30s, 10m, 2h"),
    ("10m", "0", "invalid_value", "job.round_deadline", 15, "found 0", "more than 0"),
    ("10m", "31d", "invalid_value", "job.round_deadline", 15, "'31d'", "at most 30 days"),
    ("quorum: 3", "quorum: 4", "quorum_too_large", "job.quorum", 15, "found 4", "at most 3"),
    ("quorum: 3", "quorum: 0", "invalid_value", "job.quorum", 15, "found 0", "greater"),
    ("quorum: 3", "retry: 3", "unknown_key", "job.retry", 15, "'retry'", "did you mean 'retries'?"),
    (
        "component: source",
        "component: sorce",
        "unknown_component",
        "tasks.data.component",
        5,
        "'sorce'",
        "'source'",
    ),
    (
        "component: source",
        "component: shut",
        "plugin_unavailable",
        "tasks.data.component",
        5,
        "library",
        "pip",
    ),
    ("component: source, ", "", "missing_key", "tasks.data.component", 5, "'component'", "add"),
    ("split: {comp", "Split One: {comp", "invalid_name", "tasks.Split One", 6, "'Split One'", "lower"),
    (
        "{data: data.dataset}",
        "{data: dta.dataset}",
        "unknown_task",
        "tasks.split.inputs.data",
        6,
        "'dta'",
        "did you mean 'data'?",
    ),
    (
        "{data: data.dataset}",
        "{data: data.datase}",
        "unknown_output",
        "tasks.split.inputs.data",
        6,
        "no output 'datase'",
        "did you mean 'dataset'?",
    ),
    (
        "{data: data.dataset}",
        "{data: data.report}",
        "kind_mismatch",
        "tasks.split.inputs.data",
        6,
        "data.report is report, the input takes dataset",
        "valid: data.dataset",
    ),
    (
        "{data: data.dataset}",
        "{data: dataset}",
        "invalid_value",
        "tasks.split.inputs.data",
        6,
        "'dataset'",
        "task.out",
    ),
    ("{data: data.dataset}", "{data: 3}", "invalid_value", "tasks.split.inputs.data", 6, "found 3", "text"),
    (
        "{data: data.dataset}",
        "{data: {pth: x}}",
        "unknown_key",
        "tasks.split.inputs.data.pth",
        6,
        "'pth'",
        "'path'",
    ),
    (
        "{data: data.dataset}",
        "{data: [data.dataset]}",
        "input_single",
        "tasks.split.inputs.data",
        6,
        "a list",
        "one",
    ),
    (
        "{data: data.dataset}",
        "{data: data.dataset, dat: data.dataset}",
        "input_unexpected",
        "tasks.split.inputs.dat",
        6,
        "divider has no input 'dat'",
        "did you mean 'data'?",
    ),
    (
        "inputs: {data: data.dataset}, ",
        "",
        "input_missing",
        "tasks.split.inputs",
        6,
        "'data' is required",
        "Records.",
    ),
    (
        "{model: tune.model, data",
        "{model: [], data",
        "input_missing",
        "tasks.score.inputs",
        11,
        "'model'",
        "Models.",
    ),
    (
        "{data: data.dataset}",
        "{data: split.train}",
        "cycle",
        "tasks.split.inputs",
        6,
        "split -> split",
        "cut",
    ),
    ("test: 0.2", "test: 1", "invalid_value", "tasks.split.params.test", 6, "found 1", "less than 1"),
    ("test: 0.2", "by: categry", "invalid_value", "tasks.split.params.by", 6, "'categry'", "'category'"),
    ("test: 0.2", "tset: 0.2", "unknown_key", "tasks.split.params.tset", 6, "'tset'", "did you mean 'test'?"),
    ("{test: 0.2}", "[]", "invalid_value", "tasks.split.params", 6, "a list", "mapping"),
    ("rounds: 4, ", "", "missing_key", "tasks.tune.params.rounds", 10, "'rounds' is required", "add"),
    (
        "rounds: 4",
        "rounds: 4, steps: 1, epochs: 1",
        "invalid_value",
        "tasks.tune.params",
        10,
        "steps or epochs",
        "",
    ),
    (
        "rounds: 4",
        "rounds: 4, model: 3",
        "invalid_value",
        "tasks.tune.params.model",
        10,
        "found 3",
        "mapping",
    ),
    (
        "aggregator: mean",
        "aggregator: meen",
        "unknown_plugin",
        "tasks.tune.params.aggregator",
        10,
        "no aggregator is called 'meen'",
        "did you mean 'mean'?",
    ),
    (
        "protection: open",
        "protection: opn",
        "unknown_plugin",
        "tasks.tune.params.protection",
        10,
        "no sum is called 'opn'",
        "did you mean 'open'?",
    ),
    (
        "protection: open",
        "hooks: [{name: clip}, {name: clap}]",
        "unknown_plugin",
        "tasks.tune.params.hooks[1].name",
        10,
        "no hook is called 'clap'",
        "did you mean 'clip'?",
    ),
    (
        "mean, protection: open",
        "median, protection: sealed",
        "aggregator_needs_plaintext",
        "tasks.tune.params.aggregator",
        10,
        "'median' needs every party's update, and 'sealed' hides",
        "another aggregator",
    ),
    (
        "median, protection: open",
        "median, protection: locked",
        "plugin_unavailable",
        "tasks.tune.params.protection",
        10,
        "needs a library",
        "pip install",
    ),
    (
        "data: split.test}}",
        "data: split.test}, params: {share: true}}",
        "needs_experiment",
        "tasks.score",
        11,
        "share shows models",
        "experiment: true",
    ),
    (
        "data: split.test}}",
        "data: split.test}, params: {protections: [open, shred]}}",
        "unknown_plugin",
        "tasks.score.params.protections[1]",
        11,
        "'shred'",
        "valid: locked, open, sealed",
    ),
    (
        "tune:\n",
        "tune:\n    rols: [guest]\n",
        "unknown_key",
        "tasks.tune.rols",
        8,
        "'rols'",
        "did you mean 'roles'?",
    ),
    ("tune:\n", "tune:\n    roles: [gest]\n", "invalid_value", "tasks.tune.roles[0]", 8, "'gest'", "'guest'"),
    (
        "params: {test: 0.2}",
        "roles: [guest, host, arbiter]",
        "role_not_supported",
        "tasks.split.roles[2]",
        6,
        "divider has no side for 'arbiter'",
        "guest, host",
    ),
    (
        "tune:\n",
        "tune:\n    parties: [bank-a, bank-b, bank-c, bank-d]\n",
        "unknown_party",
        "tasks.tune.parties[3]",
        8,
        "'bank-d'",
        "did you mean 'bank-",
    ),
    (
        "params: {test: 0.2}",
        "parties: [bank-a, bank-b, bank-c, bank-b]",
        "duplicate_party",
        "tasks.split.parties[3]",
        6,
        "'bank-b' is listed twice",
        "once",
    ),
    (
        "tune:\n",
        "tune:\n    stage: training\n",
        "invalid_value",
        "tasks.tune.stage",
        8,
        "'training'",
        "'train'",
    ),
    ("  bank-c:", "  bank-d:", "unknown_party", "overrides.bank-d", 14, "'bank-d'", "did you mean"),
    (
        "{data: {params: {path: c.jsonl}}}",
        "{dta: {params: {path: c.jsonl}}}",
        "unknown_task",
        "overrides.bank-c.dta",
        14,
        "'dta'",
        "did you mean 'data'?",
    ),
    (
        "  bank-c: ",
        "  consortium: {split: {params: {}}}\n  bank-c: ",
        "override_unused",
        "overrides.consortium.split",
        14,
        "'consortium' does not run 'split'",
        "it runs at bank-a, bank-b, bank-c",
    ),
    (
        "path: c.jsonl",
        "path: c.jsonl, limit: 0",
        "invalid_value",
        "overrides.bank-c.data.params.limit",
        14,
        "found 0",
        "greater than or equal to 1",
    ),
    (
        "path: c.jsonl",
        "path: c.jsonl, fields: {qestion: x}",
        "unknown_key",
        "overrides.bank-c.data.params.fields.qestion",
        14,
        "'qestion'",
        "did you mean 'question'?",
    ),
    (
        "{params: {path: c.jsonl}}",
        "{parms: {}}",
        "unknown_key",
        "overrides.bank-c.data.parms",
        14,
        "'parms'",
        "did you mean 'params'?",
    ),
    (
        "{data: {params: {path: c.jsonl}}}",
        "{tune: {params: {epochs: 1, steps: 2}}}",
        "invalid_value",
        "overrides.bank-c.tune.params",
        14,
        "steps or epochs",
        "",
    ),
    ("job: {", "env: ['a b']\njob: {", "invalid_value", "env[0]", 15, "'a b'", "pattern"),
    ("job: {", "include: x.yaml\njob: {", "invalid_value", "include", 15, "'x.yaml'", "list"),
    ("job: {", "experiment: yes\njob: {", "invalid_value", "experiment", 15, "'yes'", "boolean"),
]


@pytest.mark.parametrize(
    ("old", "new", "code", "path", "line", "message", "hint"),
    SINGLE,
    ids=[f"{row[2]}-{row[3]}" for row in SINGLE],
)
def test_one_mistake_is_one_fault(
    valid_text: str,
    faults_of: FaultsOf,
    old: str,
    new: str,
    code: str,
    path: str,
    line: int,
    message: str,
    hint: str,
) -> None:
    # Given the valid pipeline with one mistake
    text = valid_text.replace("mean, protection", "median, protection") if old.startswith("median") else valid_text
    assert old in text
    # When it is checked
    found = [fault for fault in faults_of(text.replace(old, new, 1)) if fault.code == code]
    # Then exactly that is told, and where
    assert [(fault.path, fault.line) for fault in found] == [(path, line)]
    assert message in found[0].message
    assert hint in found[0].hint


FOLLOW_UPS = {
    "parties.hosts",
    # Taking a task, or the parties, away leaves others without it; that is told too, and is no other mistake.
    "unknown_component",
    "plugin_unavailable",
    "missing_key",
    "invalid_name",
    "unknown_task",
    "unknown_party",
}


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [(row[0], row[1], row[2]) for row in SINGLE if not FOLLOW_UPS & {row[2], row[3]}],
    ids=[f"{row[2]}-{row[3]}" for row in SINGLE if not FOLLOW_UPS & {row[2], row[3]}],
)
def test_one_mistake_gives_no_other_fault(valid_text: str, faults_of: FaultsOf, old: str, new: str, code: str) -> None:
    text = valid_text.replace("mean, protection", "median, protection") if old.startswith("median") else valid_text
    assert [fault.code for fault in faults_of(text.replace(old, new, 1))] == [code]


def test_a_misspelt_component_is_told_once(valid_text: str, faults_of: FaultsOf) -> None:
    # Given a first task whose component nobody has, on which all others rest
    found = faults_of(valid_text.replace("component: source", "component: sorce"))
    # Then what rests on it is not called wrong
    assert [fault.code for fault in found] == ["unknown_component"]


def test_every_code_that_is_used_is_explained() -> None:
    # Given the codes that the sources of the package pass to a fault
    import re

    used: set[str] = set()
    for path in sorted((ROOT / "fate_llm" / "pipelines").glob("*.py")):
        text = path.read_text()
        calls = r'(?:\.add|_note|_refuse|_fault|_only|_place_fault|Fault|Found)\(\s*"([a-z_]+)"'
        used |= set(re.findall(calls, text))
    assert len(used) > 25
    # Then the table has each, and a meaning for each
    assert used <= CODES.keys()
    assert all(text.endswith(".") and len(text) < 100 for text in CODES.values())
    assert list(CODES) == sorted(CODES)


# --- Parties that differ -------------------------------------------------------------------------


def test_a_param_may_be_given_to_each_party_alone(valid: Callable[[], dict[str, Any]], faults_of: FaultsOf) -> None:
    # Given a required param that only overrides give
    data = valid()
    del data["tasks"]["data"]["params"]
    data["overrides"]["bank-a"] = {"data": {"params": {"path": "a.jsonl"}}}
    # Then nothing is wrong
    assert faults_of(data) == []


def test_a_param_that_some_party_lacks_names_the_party(
    valid: Callable[[], dict[str, Any]], faults_of: FaultsOf
) -> None:
    data = valid()
    del data["tasks"]["data"]["params"]
    faults = faults_of(data)
    assert [(fault.code, fault.path) for fault in faults] == [("missing_key", "tasks.data.params.path")]
    assert faults[0].message.endswith("at bank-a")


def test_a_wrong_value_that_every_party_overrides_is_no_fault(
    valid: Callable[[], dict[str, Any]], faults_of: FaultsOf
) -> None:
    data = valid()
    data["tasks"]["data"]["params"]["limit"] = 0
    for party in ("bank-a", "bank-b", "bank-c"):
        data["overrides"].setdefault(party, {}).setdefault("data", {}).setdefault("params", {})["limit"] = 1
    assert faults_of(data) == []
    del data["overrides"]["bank-b"]["data"]["params"]["limit"]
    assert [fault.path for fault in faults_of(data)] == ["tasks.data.params.limit"]


def test_an_input_on_disk_may_stand_for_a_task_at_one_party(
    valid: Callable[[], dict[str, Any]], faults_of: FaultsOf
) -> None:
    # Given a reader that bank-c does not run
    data = valid()
    data["tasks"]["data"]["parties"] = ["bank-a", "bank-b"]
    del data["overrides"]["bank-c"]
    # Then bank-c lacks its data
    faults = faults_of(data)
    assert [(fault.code, fault.path) for fault in faults] == [("input_not_produced", "tasks.split.inputs.data")]
    assert "data.dataset is not produced at bank-c" in faults[0].message
    # Unless a folder on its disk is given
    data["overrides"]["bank-c"] = {"split": {"inputs": {"data": {"path": "mine"}}}}
    assert faults_of(data) == []


def test_an_output_of_one_role_is_missing_at_the_others(
    valid: Callable[[], dict[str, Any]], faults_of: FaultsOf
) -> None:
    # Given a pool whose data set only the guest has
    data = valid()
    data["experiment"] = True
    data["tasks"]["pool"] = {"component": "pool", "inputs": {"data": "split.train"}}
    data["tasks"]["tune"]["inputs"]["train"] = "pool.dataset"
    # Then hosts cannot train on it
    faults = faults_of(data)
    assert [fault.code for fault in faults] == ["input_not_produced"]
    assert "bank-b, bank-c" in faults[0].message
    # And the guest alone can
    data["tasks"]["tune"]["parties"] = ["bank-a"]
    data["tasks"]["score"]["parties"] = ["bank-a"]
    assert faults_of(data) == []


def local_models(data: dict[str, Any]) -> dict[str, Any]:
    """Beside the federated model, one that only bank-a has."""
    data["tasks"]["alone"] = {**copy.deepcopy(data["tasks"]["tune"]), "parties": ["bank-a"]}
    data["tasks"]["score"]["inputs"]["model"] = ["tune.model", "alone.model"]
    return data


def test_of_many_sources_a_party_uses_those_it_has(valid: Callable[[], dict[str, Any]], faults_of: FaultsOf) -> None:
    data = local_models(valid())
    assert faults_of(data) == []
    # But each party needs one of them
    data["tasks"]["score"]["inputs"]["model"] = ["alone.model"]
    faults = faults_of(data)
    assert [(fault.code, fault.path) for fault in faults] == [("input_not_produced", "tasks.score.inputs.model")]
    assert "bank-b, bank-c" in faults[0].message


def test_of_many_sources_each_has_to_exist_somewhere(valid: Callable[[], dict[str, Any]], faults_of: FaultsOf) -> None:
    data = local_models(valid())
    data["tasks"]["score"]["parties"] = ["bank-b", "bank-c", "consortium"]
    faults = faults_of(data)
    assert [(fault.code, fault.path) for fault in faults] == [("input_not_produced", "tasks.score.inputs.model[1]")]


def test_an_input_missing_at_one_party_names_it(valid: Callable[[], dict[str, Any]], faults_of: FaultsOf) -> None:
    data = valid()
    del data["tasks"]["split"]["inputs"]
    for party in ("bank-a", "bank-b"):
        data["overrides"].setdefault(party, {})["split"] = {"inputs": {"data": "data.dataset"}}
    faults = faults_of(data)
    assert [fault.code for fault in faults] == ["input_missing"]
    assert faults[0].message.endswith("at bank-c")


def test_references_in_overrides_are_checked_too(valid: Callable[[], dict[str, Any]], faults_of: FaultsOf) -> None:
    data = valid()
    data["overrides"]["bank-b"]["split"] = {"inputs": {"data": "tune.modl", "more": "data.dataset"}}
    assert {(fault.code, fault.path) for fault in faults_of(data)} == {
        ("unknown_output", "overrides.bank-b.split.inputs.data"),
        ("input_unexpected", "overrides.bank-b.split.inputs.more"),
        ("cycle", "tasks.split.inputs"),
    }


def test_circles_are_told_each_once(valid: Callable[[], dict[str, Any]], faults_of: FaultsOf) -> None:
    data = valid()
    for first, second in (("a", "b"), ("c", "d")):
        data["tasks"][first] = {"component": "divider", "inputs": {"data": f"{second}.train"}}
        data["tasks"][second] = {"component": "divider", "inputs": {"data": f"{first}.train"}}
    found = [(fault.code, fault.path, fault.message) for fault in faults_of(data)]
    assert found == [
        ("cycle", "tasks.a.inputs", "tasks wait for each other: a -> b -> a"),
        ("cycle", "tasks.c.inputs", "tasks wait for each other: c -> d -> c"),
    ]


def test_a_task_nobody_runs_is_a_fault(valid: Callable[[], dict[str, Any]], faults_of: FaultsOf) -> None:
    data = valid()
    data["tasks"]["extra"] = {"component": "source", "params": {"path": "x"}, "parties": ["consortium"]}
    assert [(fault.code, fault.path) for fault in faults_of(data)] == [("task_runs_nowhere", "tasks.extra")]


def test_an_experiment_may_say_so(valid: Callable[[], dict[str, Any]], faults_of: FaultsOf) -> None:
    data = valid()
    data["tasks"]["score"]["params"] = {"share": True}
    assert [fault.code for fault in faults_of(data)] == ["needs_experiment"]
    data["experiment"] = True
    assert faults_of(data) == []


def test_an_experiment_at_one_party_counts(valid: Callable[[], dict[str, Any]], faults_of: FaultsOf) -> None:
    data = valid()
    data["overrides"]["bank-b"]["score"] = {"params": {"share": True}}
    assert [fault.code for fault in faults_of(data)] == ["needs_experiment"]


@pytest.mark.parametrize(
    ("aggregator", "protection", "codes"),
    [
        ("mean", "open", []),
        ("mean", "sealed", []),
        ("median", "open", []),
        ("median", "sealed", ["aggregator_needs_plaintext"]),
        ("mean", "locked", []),
    ],
)
def test_plaintext_rules_and_protections(
    valid: Callable[[], dict[str, Any]],
    faults_of: FaultsOf,
    aggregator: str,
    protection: str,
    codes: list[str],
) -> None:
    data = valid()
    data["tasks"]["tune"]["params"] |= {"aggregator": aggregator, "protection": protection}
    assert [fault.code for fault in faults_of(data)] == codes


def test_a_default_counts_in_the_rule(valid: Callable[[], dict[str, Any]], faults_of: FaultsOf) -> None:
    # Given a protection that hides and an aggregator that only one party's override names
    data = valid()
    data["tasks"]["tune"]["params"] = {"rounds": 1, "protection": "sealed"}
    assert faults_of(data) == []
    data["overrides"]["bank-b"]["tune"] = {"params": {"aggregator": "median"}}
    faults = faults_of(data)
    assert [fault.path for fault in faults] == ["overrides.bank-b.tune.params.aggregator"]


def test_one_organisation_may_hold_several_roles(valid: Callable[[], dict[str, Any]], faults_of: FaultsOf) -> None:
    data = valid()
    for parties in (
        {"guest": "bank-a", "hosts": ["bank-b", "bank-c"], "arbiter": "bank-a"},
        {"guest": "bank-a", "hosts": ["bank-b", "bank-c"], "arbiter": "bank-b", "key_holder": "bank-c"},
        {"guest": "bank-a", "hosts": ["bank-b", "bank-c"]},
    ):
        assert faults_of({**data, "parties": parties}) == []


def test_a_guest_alone_is_a_pipeline(valid: Callable[[], dict[str, Any]], faults_of: FaultsOf) -> None:
    data = valid()
    del data["overrides"]
    data |= {"parties": {"guest": "bank-a"}, "job": {}}
    assert faults_of(data) == []


# --- Robustness ----------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [None, [], "text", 3])
def test_what_is_no_mapping_is_one_fault(raw: object) -> None:
    with pytest.raises(PipelineInvalid) as caught:
        check(raw)
    assert [fault.code for fault in caught.value.faults] == ["not_a_pipeline"]


def test_checking_changes_nothing(valid: Callable[[], dict[str, Any]]) -> None:
    data = valid()
    data["tasks"]["tune"]["zz"] = 1
    data["parties"]["hosts"].append("Bank D")
    before = copy.deepcopy(data)
    with pytest.raises(PipelineInvalid):
        check(data)
    assert data == before


def test_a_fault_of_pydantic_is_not_told_twice(valid_text: str, faults_of: FaultsOf) -> None:
    # Given a union both of whose branches fail
    faults = faults_of(valid_text.replace("rounds: 4", "rounds: 4, model: {pth: x}"))
    # Then the branches become one fault at the union
    assert [(fault.code, fault.path) for fault in faults] == [("invalid_value", "tasks.tune.params.model")]


def test_faults_at_one_place_are_kept_apart_and_in_order() -> None:
    faults = Faults({})
    faults.add("cycle", ("a",), "first")
    faults.add("cycle", ("a",), "first")
    faults.add("cycle", ("a",), "second")
    late = Fault("x", "z.yaml", 9, "", "", "")
    early = Fault("x", "z.yaml", 2, "", "", "")
    merged = faults.merge([late, early])
    assert merged[:2] == (early, late)
    assert [fault.message for fault in merged[2:]] == ["first", "second"]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ((), "version"),
        (("parties",), "guest"),
        (("tasks", "x"), "component"),
        (("overrides", "p", "t"), "params"),
        (("tasks", "x", "inputs", "data"), "path"),
        (("job",), "seed"),
    ],
)
def test_valid_keys_are_known_at_every_depth(path: tuple[str, ...], name: str) -> None:
    assert name in field_names(PipelineSpec, path)


def test_no_keys_are_known_where_there_are_none() -> None:
    assert field_names(PipelineSpec, ("name",)) == set()


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.sampled_from(["x", "Bad Name", "data.dataset", "bank-a", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["data", "params", "inputs", "component", "bank-a", "x y"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)
PLACES = st.sampled_from(
    [
        ("version",),
        ("name",),
        ("parties",),
        ("parties", "guest"),
        ("parties", "hosts"),
        ("tasks",),
        ("tasks", "data"),
        ("tasks", "split", "inputs"),
        ("tasks", "split", "inputs", "data"),
        ("tasks", "tune", "params"),
        ("tasks", "tune", "params", "hooks"),
        ("tasks", "tune", "params", "model"),
        ("tasks", "tune", "roles"),
        ("tasks", "tune", "parties"),
        ("tasks", "new"),
        ("overrides",),
        ("overrides", "bank-b"),
        ("overrides", "bank-b", "data"),
        ("overrides", "bank-b", "data", "params"),
        ("job",),
        ("env",),
        ("include",),
        ("more",),
    ]
)


@settings(max_examples=120, deadline=None)
@given(junk=st.lists(st.tuples(PLACES, JUNK), min_size=1, max_size=3))
def test_junk_anywhere_gives_a_pipeline_or_faults(
    valid: Callable[[], dict[str, Any]], faults_of: FaultsOf, junk: list[tuple[tuple[str, ...], Any]]
) -> None:
    # Given the valid pipeline with anything at all in some places
    data = valid()
    for path, value in junk:
        where: Any = data
        for step in path[:-1]:
            where = where.get(step) if isinstance(where, dict) else None
        if isinstance(where, dict):
            where[path[-1]] = value
    # When it is checked, it is a pipeline or a list of faults whose codes are known
    found = faults_of(data)
    assert found or check(data)
    assert {fault.code for fault in found} <= CODES.keys()


def chain(length: int) -> str:
    """A pipeline of four parties in which each of `length` tasks feeds the next."""
    lines = ["version: 1", "name: large", "parties: {guest: a, hosts: [b, c, d], arbiter: z}", "tasks:"]
    lines += ["  data: {component: source, params: {path: x, fields: {question: q, answer: a}}}"]
    for number in range(length - 1):
        before = "data.dataset" if number == 0 else f"t{number - 1}.train"
        lines += [f"  t{number}:", "    component: divider", f"    inputs: {{data: {before}}}"]
        lines += ["    params: {test: 0.1, by: category}"]
    lines += ["overrides:"]
    lines += [f"  {party}: {{data: {{params: {{path: {party}.jsonl}}}}}}" for party in "bcd"]
    return "\n".join(lines) + "\n"


def calls_of(work: Callable[[], object]) -> int:
    """How many Python functions are called: a measure of work that no other load disturbs."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


def test_the_work_of_checking_grows_with_the_number_of_tasks() -> None:
    # Given chains of 20 and 40 tasks at four parties
    def checked(length: int) -> int:
        source = load_text(chain(length))
        assert len(check(source.data, source.marks).tasks) == length
        return calls_of(lambda: check(source.data, source.marks))

    checked(5)  # what is done once per process
    # When they are checked, twice the tasks are about twice the work
    assert checked(40) < 2.5 * checked(20)
