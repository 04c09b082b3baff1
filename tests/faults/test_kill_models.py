"""Cells of the kill matrix with a real trainer: the adapter has the bits of an undisturbed run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.components.real_model import real_model_folder
from tests.components.tiny_model import make_tiny_model, write_records
from tests.faults.matrix import Cell, Hold, Matrix, open_matrix
from tests.services import LiveServices

pytestmark = pytest.mark.slow
ADAPTER = ("tune", "model/adapter_model.safetensors")
POLICY = """
version: 1
initiators: [a]
components: {reader: {}, homo_llm_trainer: {}}
models: ["catalog:*"]
data: {"*": {}}
protection: {least: plain, contributors: 2}
privacy: {require: none}
schedule: always
resources: {cpus: 2, memory: 16GiB, gpus: 0, hours: 1}
show: {logs: all, losses: true, progress: true}
manual: []
"""
UPLOAD = Hold(
    "b", "worker", "seal", "its update of round 2 is sealed, on disk, and not sent", "round.term/2/1", "after"
)
TRAINING = {  # two steps in each round
    party: Hold(party, "worker", "emit", "it has made the first optimizer step of round 2", "step/3") for party in "ab"
}
TINY = {
    "guest worker, training": Cell("guest worker", "local training", TRAINING["a"]),
    "host worker, upload": Cell("host worker", "upload", UPLOAD),
    "arbiter worker, aggregation": Cell("arbiter worker", "aggregation"),
    "guest service, training": Cell("guest service", "local training", TRAINING["b"]),
    "guest service, upload": Cell("guest service", "upload", UPLOAD),
    "guest service, aggregation": Cell("guest service", "aggregation"),
}


def pipeline(model: str, **params: Any) -> dict[str, Any]:
    usual = {"rounds": 3, "local_steps": 2, "batch_size": 2, "learning_rate": 0.01, "peft": {"r": 2, "dropout": 0.1}}
    return {
        "version": 1,
        "name": "tuning",
        "parties": {"guest": "a", "hosts": ["b"], "arbiter": "z"},
        "tasks": {
            "data": {
                "component": "reader",
                "params": {"path": "catalog:records", "fields": {"instruction": "question", "output": "answer"}},
            },
            "tune": {
                "component": "homo_llm_trainer",
                "inputs": {"train": "data.dataset"},
                "params": {"model": {"path": f"catalog:{model}"}, **usual, **params},
            },
        },
        "job": {"seed": 7, "round_deadline": "200s"},
    }


def catalogue(services: LiveServices, models: dict[str, Path]) -> None:
    """Records of each party, and the models, under names."""
    for number, (party, live) in enumerate(services.parties.items()):
        records = write_records(live.home / "records.jsonl", 12 + 4 * number, word=f"bank{party}")
        entries: dict[str, Any] = {"records": {"path": str(records), "kind": "dataset"}}
        entries |= {name: {"path": str(path), "kind": "model"} for name, path in models.items()}
        (live.home / "catalog.yaml").write_text(yaml.safe_dump({"version": 1, "entries": entries}))


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    folder = tmp_path_factory.mktemp("models")
    tiny = make_tiny_model(folder / "tiny")
    with open_matrix(folder, "a", "b", "z", policies=dict.fromkeys(("a", "b", "z"), POLICY)) as matrix:
        catalogue(matrix.services, {"tiny": tiny})
        yield matrix


@pytest.fixture
def matrix(federation: Matrix) -> Iterator[Matrix]:
    yield federation
    federation.quiet()


@pytest.fixture(scope="module")
def undisturbed(federation: Matrix) -> bytes:
    """The adapter of a run in which nobody dies."""
    found = quiet_run(federation, pipeline("tiny"))
    federation.hang_up()
    return found


def quiet_run(matrix: Matrix, job_of: dict[str, Any]) -> bytes:
    job = matrix.submit(job_of)
    views = matrix.services.ended_everywhere(job)
    assert {view["state"] for view in views.values()} == {"success"}, views
    first, second = (matrix.services.output(job, party, *ADAPTER) for party in ("a", "b"))
    assert first == second
    return first


@pytest.mark.parametrize("name", TINY)
def test_a_trainer_s_adapter_after_a_kill(matrix: Matrix, undisturbed: bytes, name: str) -> None:
    matrix.run(TINY[name], pipeline("tiny"), model=ADAPTER, want=undisturbed)


def test_a_real_model_s_adapter_after_a_kill(matrix: Matrix) -> None:
    # Given: SmolLM2-135M, and what two rounds make of it
    catalogue(matrix.services, {"smol": Path(real_model_folder())})
    data = pipeline("smol", rounds=2, local_steps=2, batch_size=1, max_length=48)
    want = quiet_run(matrix, data)
    # When the host's worker dies in its local training of the second round; then the bits are the same
    matrix.run(Cell("host worker", "local training", TRAINING["b"]), data, model=ADAPTER, want=want)


def test_the_records_of_all_of_it_hold(matrix: Matrix) -> None:
    matrix.check_records()
