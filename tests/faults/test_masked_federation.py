"""Secure aggregation in the loop: a trainer of eight organisations over RabbitMQ, and two machines that fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from fate_llm.pipelines import check
from fate_llm.protocols.channel import JobChannel
from fate_llm.runtime.assign import assignments
from fate_llm.runtime.events import EventLog
from fate_llm.runtime.jobfolder import JobFolder
from fate_llm.runtime.local import LocalJob
from tests.components.tiny_model import make_tiny_model, write_records
from tests.faults.matrix import Hold, Matrix, open_matrix, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
OWNERS = tuple("abcdefgh")
ROUNDS = 3
TOKENS = 4096.0
ADAPTER = ("tune", "model/adapter_model.safetensors")
POLICY = """
version: 1
initiators: [a]
components: {reader: {}, homo_llm_trainer: {}}
models: ["catalog:*"]
data: {"*": {}}
protection: {least: secagg, contributors: 3, clip: 1.0}
privacy: {require: none}
schedule: always
resources: {cpus: 2, memory: 16GiB, gpus: 0, hours: 1}
show: {logs: all, losses: true, progress: true}
manual: []
"""


def pipeline(model: str, records: str, *, protection: str, deadline: str) -> dict[str, Any]:
    params = {"clip": 1.0, "largest_weight": TOKENS} if protection == "secagg" else {}
    return {
        "version": 1,
        "name": "consortium",
        "parties": {"guest": "a", "hosts": list(OWNERS[1:]), "arbiter": "z"},
        "tasks": {
            "data": {
                "component": "reader",
                "params": {"path": records, "fields": {"instruction": "question", "output": "answer"}},
            },
            "tune": {
                "component": "homo_llm_trainer",
                "inputs": {"train": "data.dataset"},
                "params": {
                    "model": {"path": model},
                    "rounds": ROUNDS,
                    "local_steps": 2,
                    "batch_size": 2,
                    "learning_rate": 0.01,
                    "peft": {"r": 2},
                    "protection": protection,
                    "protection_params": params,
                },
            },
        },
        "job": {"seed": 7, "round_deadline": deadline, "quorum": 6, "lost_after": "900s"},
    }


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Matrix]:
    folder = tmp_path_factory.mktemp("masked")
    # Nine services and nine workers, eight of which import torch, on a machine that may have two cores and other work.
    patient = pytest.MonkeyPatch()
    for module in ("tests.faults.matrix", "tests.services"):
        patient.setattr(f"{module}.PATIENCE", 480.0)
    parties = (*OWNERS, "z")
    with open_matrix(folder, *parties, policies=dict.fromkeys(parties, POLICY)) as matrix:
        for number, (_, live) in enumerate(matrix.services.parties.items()):
            records = write_records(live.home / "records.jsonl", 8 + 2 * number, word=f"bank{number}")
            entries = {
                "records": {"path": str(records), "kind": "dataset"},
                "tiny": {"path": str(tiny), "kind": "model"},
            }
            (live.home / "catalog.yaml").write_text(yaml.safe_dump({"version": 1, "entries": entries}))
        yield matrix
    patient.undo()


@pytest.fixture
def masked(federation: Matrix) -> Iterator[Matrix]:
    yield federation
    federation.quiet()


def plain_run(folder: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, late: dict[int, str]) -> dict[str, np.ndarray]:
    """The adapter of a plain run in one process, in which the terms of some parties (by round) never arrive."""
    send = JobChannel.send

    def lossy(self: JobChannel, receiver: str, **message: Any) -> int:
        if message["kind"] == "round.term" and self.party in late.get(message["round"], ""):
            return 0
        return send(self, receiver, **message)

    monkeypatch.setattr(JobChannel, "send", lossy)
    data = pipeline(str(tiny), "catalog:records", protection="plain", deadline="60s")
    for number, party in enumerate(OWNERS):
        records = write_records(folder / f"{party}.jsonl", 8 + 2 * number, word=f"bank{number}")
        data.setdefault("overrides", {})[party] = {"data": {"params": {"path": str(records)}}}
    spec = check(data)
    job = LocalJob(
        job_id="plain",
        roster=spec.roster,
        assignments=assignments(spec),
        seed=spec.job.seed,
        patience=spec.job.round_deadline,
        base=folder,
        folder=JobFolder.create(folder / "jobs", "plain"),
        events=EventLog(now=lambda: 0.0, observers=()),
    )
    outcome = job.run()
    assert outcome.status == "success", outcome.errors
    return load_file(Path(outcome.outputs["a"]["tune"]["model"]) / "adapter_model.safetensors")


def test_one_dies_in_a_round_one_comes_back_and_the_adapter_is_that_of_the_plain_run(
    masked: Matrix, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given: eight contributors (threshold 6). In round 2 g's machine stands still and h's is killed: both are about to
    # send their masked vectors, and their shares are with all others
    services, doors = masked.services, masked.doors
    slow, dying = (
        Hold(party, "worker", "keep", "its vector is masked, and neither kept nor sent", "masked/2") for party in "gh"
    )
    later = Hold("z", "worker", "collect", "round 2 is summed", "2", "after")
    for hold in (slow, dying, later):
        doors.shut(hold)
    job = masked.submit(pipeline("catalog:tiny", "catalog:records", protection="secagg", deadline="180s"))
    doors.reached(slow)
    doors.reached(dying)
    # When: h is killed with its service; the round ends without both; then h is started again, and g goes on
    services["h"].kill()
    doors.open(dying)
    doors.reached(later)
    services["h"].start().ready()
    until(lambda: [e for e in services["h"].events(job) if e["event"] == "resumed"], "h goes on")
    doors.open(slow)
    doors.open(later)
    views = services.ended_everywhere(job)
    # Then: the job ends in its first attempt; round 2 counts the six others, round 3 all
    assert {(view["state"], view["attempt"]) for view in views.values()} == {("success", 1)}, views
    closed = [e for e in services["z"].events(job) if e["event"] == "round_closed" and e["conversation"] == "tune"]
    counted = {event["round"]: "".join(event["contributors"]) for event in closed}
    assert counted == {1: "abcdefgh", 2: "abcdef", 3: "abcdefgh"}
    files = {services.output(job, party, *ADAPTER) for party in OWNERS}
    assert len(files) == 1, "all end with one adapter"
    (tmp_path / "masked.safetensors").write_bytes(files.pop())
    adapter = load_file(tmp_path / "masked.safetensors")
    plain = plain_run(tmp_path, tiny, monkeypatch, {2: "gh"})
    assert adapter.keys() == plain.keys()
    # Each round's mean is within n * step * largest weight / weights of the plain one; training carries that on.
    apart = max(float(np.abs(adapter[name] - plain[name]).max()) for name in plain)
    moved = max(float(np.abs(plain[name]).max()) for name in plain if "lora_B" in name)
    assert moved > 1e-3
    assert apart < 1e-5, apart


def test_what_the_others_are_told_holds_no_party_s_own_numbers(masked: Matrix) -> None:
    # Given the job above; its policies show all logs and losses
    (job,) = masked.jobs
    own = masked.services["b"].events(job)
    losses = {repr(event["local_loss"]) for event in own if event["event"] == "round"}
    assert len(losses) == ROUNDS, "b itself sees its own losses"
    # When the guest reads what b's events say; Then b's own losses and token counts are not in it
    lines = [line for line in masked.services["a"].client.lines(job, limit=5000)["lines"] if line["party"] == "b"]
    text = repr(lines)
    assert lines, "b's events are shown"
    assert not [loss for loss in losses if loss in text]
    assert "tokens" not in text and "local_loss" not in text


def test_the_records_of_it_hold(masked: Matrix) -> None:
    (job,) = masked.jobs
    for party in (*OWNERS, "z"):
        masked.check_dossier(job, party)
    found = masked.services["a"].client.dossier(job)
    assert "secagg" in repr(found)
    masked.check_records()
