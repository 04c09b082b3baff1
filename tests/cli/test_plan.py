"""`plan`: what a pipeline will do, before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

import fate_llm.pipelines
from tests.cli.conftest import Run, Write, document
from tests.runtime.toys import toy_pipeline

QUICKSTART = Path(fate_llm.pipelines.__file__).parent / "quickstart.yaml"


@pytest.mark.usefixtures("with_toys")
def test_the_document_has_order_roles_inputs_and_totals(run: Run, write: Write) -> None:
    found = document(run("plan", write(toy_pipeline()), "--json"))
    assert found["name"] == "toys"
    assert found["order"] == ["words", "add"]
    add = found["tasks"][1]
    assert add["roles"] == {"a": ["guest"], "b": ["host"], "c": ["host"], "z": ["arbiter"]}
    assert add["inputs"]["b"] == {"data": ["words.dataset"]}
    assert (add["coordinator"], add["contributors"], add["quorum"]) == ("z", ["a", "b", "c"], 3)
    assert found["parties"]["a"]["tasks"] == ["words", "add"]


@pytest.mark.usefixtures("with_toys")
def test_people_see_tasks_and_parties(run: Run, write: Write) -> None:
    text = run("plan", write(toy_pipeline())).stdout
    assert "1. words  [words]" in text
    assert "2. add  [adder]" in text
    assert "b as host: data <- words.dataset" in text
    assert "Parties" in text


def test_the_quickstart_says_who_sends_what_and_what_the_arbiter_learns(run: Run) -> None:
    found = document(run("plan", QUICKSTART, "--json"))
    tune = next(task for task in found["tasks"] if task["component"] == "homo_llm_trainer")
    assert {(t["sender"], t["receiver"]) for t in tune["traffic"]} >= {
        ("bank-a", "consortium"),
        ("consortium", "bank-c"),
    }
    assert any("consortium learns every party's own terms" in line for line in tune["coordinator_learns"])
    text = run("plan", QUICKSTART).stdout
    assert "consortium learns" in text
    assert "bank-b -> consortium" in text


@pytest.mark.usefixtures("with_toys")
def test_a_value_of_the_command_line_counts(run: Run, write: Write) -> None:
    found = document(run("plan", write(toy_pipeline()), "--json", "--set", "job.quorum=2"))
    assert found["tasks"][1]["quorum"] == 2


def test_faults_come_instead_of_a_plan(run: Run, write: Write) -> None:
    found = document(run("plan", write("version: 2\n"), "--json", exit_code=2))
    assert found["ok"] is False
    assert run("plan", write("version: 2\n"), exit_code=2).stdout == ""
