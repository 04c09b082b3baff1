"""Whole jobs of the real components under protections that hide terms, with a tiny random model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from fate_llm.cli.main import main

pytestmark = pytest.mark.slow
Write = Callable[[dict[str, Any]], Path]
OWNERS = ("bank-a", "bank-b", "bank-c")
HIDDEN = {"plain": {}, "secagg": {"largest_weight": 512}, "ckks": {"largest_weight": 512}}


@pytest.fixture
def submit(
    tmp_path: Path, write_pipeline: Write, pipeline: dict[str, Any]
) -> Callable[..., tuple[dict[str, Any], str]]:
    """Submit the pipeline with every sum under a protection; the document, and what was streamed."""

    def run(protection: str, *more: str) -> tuple[dict[str, Any], str]:
        data = json.loads(json.dumps(pipeline))
        for task in ("tune", "evaluate"):
            given = {"protection": protection, "protection_params": HIDDEN[protection]}
            data["tasks"][task]["params"] |= given
        if protection == "ckks":
            data["parties"]["key_holder"] = "notary"
        path = write_pipeline(data)
        done = CliRunner().invoke(main, ["submit", str(path), "--json", "--workdir", str(tmp_path / protection), *more])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout), done.stderr

    return run


def adapter(document: dict[str, Any], party: str) -> dict[str, np.ndarray]:
    return load_file(Path(document["outputs"][party]["tune"]["model"]) / "adapter_model.safetensors")


@pytest.mark.parametrize("protection", ["secagg", "ckks"])
def test_a_protected_job_ends_with_the_adapter_of_a_plain_one(submit: Any, protection: str) -> None:
    if protection == "ckks":
        pytest.importorskip("tenseal")
    plain, _ = submit("plain")
    hidden, _ = submit(protection)
    for party in OWNERS[1:]:
        first, other = adapter(hidden, "bank-a"), adapter(hidden, party)
        assert all(np.array_equal(first[name], other[name]) for name in first), "one adapter for all"
    wanted, found = adapter(plain, "bank-b"), adapter(hidden, "bank-b")
    # Training goes on from the first round's rounding, and AdamW makes it larger where gradients are near 0.
    assert max(float(np.abs(wanted[name] - found[name]).max()) for name in wanted) < 2e-4
    rows, others = (document["metrics"]["evaluate"]["models"] for document in (plain, hidden))
    assert [row["records"] for row in rows] == [row["records"] for row in others]
    for mine, other in zip(rows, others, strict=True):
        assert other["loss"] == pytest.approx(mine["loss"], abs=2e-3)
    assert hidden["metrics"]["tune"]["rounds"][2]["test_loss"] == pytest.approx(
        plain["metrics"]["tune"]["rounds"][2]["test_loss"], abs=2e-3
    )


def own_numbers(folder: Path, party: str) -> set[str]:
    """What a party's own files count of its records and losses, as they would be written in a line."""
    found: set[str] = set()
    for line in (folder / "parties" / party / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "round":
            found.add(f"{event['local_loss']:.3f}")
            found.add(f"{event['tokens']} tokens")
        if event["event"] == "encoded":
            found |= {f"tokens {event['tokens']}", f"rows {event['rows']},"}
        if event["event"] == "data" and "rows" in event:
            found.add(f"rows {event['rows']},")
    assert len(found) > 5
    return found


def test_the_streamed_progress_shows_totals_only(submit: Any, tmp_path: Path) -> None:
    # Given a job that shows its terms, whose stream has every party's own numbers
    _, open_stream = submit("plain")
    (folder,) = (tmp_path / "plain").iterdir()
    for party in OWNERS:
        seen = [number for number in own_numbers(folder, party) if number in open_stream]
        assert len(seen) > 3, "else what follows could not fail"
    # When the same job hides them
    document, stream = submit("secagg")
    (folder,) = (tmp_path / "secagg").iterdir()
    # Then none of them is streamed, and the mean loss of all is
    totals = [f"{row['loss']:.3f}" for row in document["metrics"]["tune"]["rounds"] if "loss" in row]
    for party in OWNERS:
        for number in own_numbers(folder, party) - set(totals):
            assert not re.search(rf"(?<![\d.]){re.escape(number)}", stream), number
    assert all(total in stream for total in totals)
    assert "trained" not in stream
