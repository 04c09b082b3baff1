"""From a trained pipeline to the one that uses what it trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fate_llm.core.errors import PipelineInvalid
from fate_llm.core.interfaces import Drop, Keep
from fate_llm.pipelines.builder import Pipeline
from fate_llm.pipelines.check import check
from fate_llm.pipelines.predict import Prediction, derive_prediction

pytestmark = pytest.mark.usefixtures("registry")

Valid = Callable[[], dict[str, Any]]
BANKS = ("bank-a", "bank-b", "bank-c")


def outputs_of(*tasks: str, parties: tuple[str, ...] = BANKS) -> dict[str, dict[str, dict[str, str]]]:
    """What `submit` prints for these tasks: a model at each party."""
    return {party: {task: {"model": f"/jobs/1/{party}/{task}"} for task in tasks} for party in parties}


def derive(data: dict[str, Any], outputs: Any = None, **options: Any) -> Prediction:
    return derive_prediction(check(data), outputs_of("tune") if outputs is None else outputs, **options)


def test_a_trainer_becomes_what_its_rule_names(valid: Valid) -> None:
    # Given reader, splitter, trainer and scorer
    data = valid()
    data["tasks"]["tune"]["params"]["template"] = "chat"
    # When the prediction pipeline is derived
    found = derive(data)
    tasks = found.pipeline.to_dict()["tasks"]
    # Then the reader stays, the trainer is replaced, and reads what the splitter would have split
    assert found.kept == ("data",)
    assert found.replaced == ("tune",)
    assert list(tasks) == ["data", "tune"]
    assert tasks["tune"]["component"] == "answerer"
    assert tasks["tune"]["inputs"] == {"data": "data.dataset"}
    # And only the settings that the rule carries over are left
    assert tasks["tune"]["params"] == {"template": "chat"}


def test_each_party_gets_its_own_model(valid: Valid) -> None:
    overrides = derive(valid()).pipeline.to_dict()["overrides"]
    assert {party: tasks["tune"]["inputs"]["model"] for party, tasks in overrides.items()} == {
        party: {"path": f"/jobs/1/{party}/tune"} for party in BANKS
    }
    # And what differed between the parties differs still
    assert overrides["bank-b"]["data"] == {"params": {"path": "b.jsonl"}}
    assert "data" not in overrides["bank-a"]


def test_the_derived_pipeline_is_valid_yaml(valid: Valid) -> None:
    derived = derive(valid()).pipeline
    again = Pipeline.from_yaml(derived.to_yaml()).validate()
    assert again == derived
    assert again.spec().name == "demo-predict"


def test_the_new_name_may_be_given_and_stays_valid(valid: Valid) -> None:
    assert derive(valid(), name="ask").pipeline.name == "ask"
    data = valid()
    data["name"] = "a" * 55 + "-" + "b" * 8
    assert derive(data).pipeline.spec().name == "a" * 55 + "-predict"


def test_what_is_dropped_says_why(valid: Valid) -> None:
    assert derive(valid()).dropped == {"score": "scorer is for training"}


def test_what_rests_on_a_dropped_task_is_dropped(valid: Valid, registry: dict[str, dict[str, Any]]) -> None:
    # Given a reader that is for training only
    data = valid()
    data["tasks"]["extra"] = {
        "component": "answerer",
        "inputs": {"model": "tune.model", "data": "data.dataset"},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry["component"]["source"], "predict_rule", Drop())
        # Then nothing remains, and that is told
        with pytest.raises(PipelineInvalid) as caught:
            derive(data)
    assert [fault.code for fault in caught.value.faults] == ["nothing_to_predict"]


def test_a_required_input_from_training_takes_its_reader_along(valid: Valid) -> None:
    # Given an answerer that stays, and reads a data set that only a dropped task makes
    data = valid()
    data["experiment"] = True
    data["tasks"]["pool"] = {"component": "pool", "inputs": {"data": "split.train"}}
    data["tasks"]["ask"] = {
        "component": "answerer",
        "inputs": {"model": "tune.model", "data": "pool.dataset"},
        "parties": ["bank-a"],
    }
    assert derive(data).dropped == {
        "score": "scorer is for training",
        "pool": "pool is for training",
        "ask": "its input 'data' comes from training only",
    }


def test_a_task_that_stays_reads_the_trained_model_from_disk(valid: Valid) -> None:
    # Given an answerer that reads the model in the trained pipeline already
    data = valid()
    data["tasks"]["ask"] = {"component": "answerer", "inputs": {"model": "tune.model", "data": "split.test"}}
    found = derive(data)
    # Then it reads the folder, because its replacement makes no model
    assert found.kept == ("data", "ask")
    made = found.pipeline.to_dict()
    assert made["tasks"]["ask"]["inputs"] == {"data": "data.dataset"}
    assert made["overrides"]["bank-c"]["ask"]["inputs"] == {"model": {"path": "/jobs/1/bank-c/tune"}}


def test_of_many_inputs_the_trained_ones_remain(valid: Valid, registry: dict[str, dict[str, Any]]) -> None:
    # Given a scorer that stays, of a trained model and one on disk, with an optional history from training
    data = valid()
    data["tasks"]["score"]["inputs"] |= {"model": ["tune.model", {"path": "old"}], "history": "tune.metrics"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry["component"]["scorer"], "predict_rule", Keep())
        made = derive(data).pipeline.to_dict()
    # Then both models are folders now, and the history is left out
    assert made["tasks"]["score"]["inputs"] == {"data": "data.dataset"}
    assert made["overrides"]["bank-b"]["score"]["inputs"] == {
        "model": [{"path": "/jobs/1/bank-b/tune"}, {"path": "old"}]
    }


def test_passing_through_follows_each_partys_own_source(valid: Valid) -> None:
    # Given bank-c, whose splitter reads a folder of its own
    data = valid()
    data["overrides"]["bank-c"]["split"] = {"inputs": {"data": {"path": "mine"}}}
    made = derive(data).pipeline.to_dict()
    # Then its answers are about that folder, and the others' about what they read
    found = {party: tasks["tune"]["inputs"]["data"] for party, tasks in made["overrides"].items()}
    assert found == {"bank-a": "data.dataset", "bank-b": "data.dataset", "bank-c": {"path": "mine"}}
    assert "inputs" not in made["tasks"]["tune"]


def test_splitters_behind_each_other_are_passed_through(valid: Valid) -> None:
    data = valid()
    data["tasks"]["again"] = {"component": "divider", "inputs": {"data": "split.test"}}
    data["tasks"]["tune"]["inputs"]["test"] = "again.test"
    assert derive(data).pipeline.to_dict()["tasks"]["tune"]["inputs"] == {"data": "data.dataset"}


def test_roles_and_parties_are_kept_as_far_as_the_replacement_has_them(valid: Valid) -> None:
    data = valid()
    data["tasks"]["tune"] |= {
        "roles": ["guest", "host", "arbiter"],
        "parties": ["bank-a", "bank-b", "consortium"],
    }
    data["tasks"]["score"]["parties"] = ["bank-a", "bank-b", "consortium"]
    made = derive(data, outputs_of("tune", parties=("bank-a", "bank-b"))).pipeline.to_dict()
    assert made["tasks"]["tune"]["roles"] == ["guest", "host"]
    assert made["tasks"]["tune"]["parties"] == ["bank-a", "bank-b", "consortium"]
    assert "tune" not in made["overrides"]["bank-c"]


def test_params_of_a_party_are_carried_over_by_name(valid: Valid) -> None:
    data = valid()
    data["overrides"]["bank-b"]["tune"] = {"params": {"template": "alpaca", "steps": 3}}
    data["overrides"]["bank-c"]["tune"] = {"params": {"steps": 3}}
    made = derive(data).pipeline.to_dict()["overrides"]
    assert made["bank-b"]["tune"]["params"] == {"template": "alpaca"}
    assert "params" not in made["bank-c"]["tune"]


def test_stages_overrule_the_components(valid: Valid) -> None:
    # Given a scorer that is to stay, and an answerer for training only
    data = valid()
    data["tasks"]["score"] |= {"stage": "predict"}
    data["tasks"]["ask"] = {
        "component": "answerer",
        "inputs": {"model": "tune.model", "data": "split.test"},
        "stage": "train",
    }
    found = derive(data)
    assert found.kept == ("data", "score")
    assert found.dropped == {"ask": "stage: train"}
    assert found.pipeline.to_dict()["tasks"]["score"]["stage"] == "predict"


def test_every_lacking_output_is_told_at_once(valid: Valid) -> None:
    # Given a job in which two parties have no model
    with pytest.raises(PipelineInvalid) as caught:
        derive(valid(), outputs_of("tune", parties=("bank-b",)))
    # Then both are named
    assert [(fault.code, fault.path) for fault in caught.value.faults] == [("no_output", "tasks.tune")] * 2
    assert [fault.message.split()[0] for fault in caught.value.faults] == ["bank-a", "bank-c"]


def test_deriving_changes_nothing(valid: Valid) -> None:
    spec = check(valid())
    before = spec.to_data()
    derive_prediction(spec, outputs_of("tune"))
    assert spec.to_data() == before


def test_a_prediction_pipeline_is_its_own_prediction(valid: Valid) -> None:
    # Given a prediction pipeline, which trains nothing
    derived = derive(valid()).pipeline
    # Then deriving again keeps every task as it is
    again = derive_prediction(derived.spec(), {}, name=derived.name)
    assert again.pipeline.spec() == derived.spec()
    assert again.dropped == {}
