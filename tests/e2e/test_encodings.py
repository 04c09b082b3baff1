"""The tiny job with each encoding of the wire: about the same adapter, fewer bytes sent."""

from __future__ import annotations

import json
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
PARTIES = ("bank-a", "bank-b", "bank-c")
# Hooks, most bytes of updates against the plain job's, most distance of the adapters over the distance trained.
CASES = [
    (("zstd",), 0.85, 0.0),
    (("bf16",), 0.55, 0.005),
    (("int8",), 0.32, 0.005),
    (("zstd", "bf16"), 0.42, 0.005),
    (("int8", "zstd"), 0.29, 0.005),
]


class Job:
    """A finished job: its adapter, and what each party sent."""

    def __init__(self, document: dict[str, Any], folder: Path) -> None:
        assert document["status"] == "success"
        folders = [Path(document["outputs"][party]["tune"]["model"]) for party in PARTIES]
        adapters = [load_file(path / "adapter_model.safetensors") for path in folders]
        for other in adapters[1:]:
            assert all(np.array_equal(adapters[0][name], other[name]) for name in other), "one adapter for all"
        self.adapter = adapters[0]
        manifest = json.loads((folder / "jobs" / document["job_id"] / "manifest.json").read_text())
        self.sent = manifest["traffic"]

    def distance(self, other: Job | None = None) -> float:
        """Euclidean distance of B (which starts at zero) from another's, or from the start."""
        names = [name for name in self.adapter if "lora_B" in name]
        assert names
        gaps = [self.adapter[n].astype(np.float64) - (other.adapter[n] if other else 0) for n in names]
        return float(np.sqrt(sum(np.square(gap).sum() for gap in gaps)))


@pytest.fixture
def submit(pipeline: dict[str, Any], write_pipeline: Write, tmp_path: Path) -> Callable[..., Job]:
    """The tiny job with 3 rounds of an adapter large enough that tensors, not headers, are what travels."""
    del pipeline["tasks"]["evaluate"], pipeline["tasks"]["tune"]["inputs"]["test"]
    params = pipeline["tasks"]["tune"]["params"]
    params |= {"rounds": 3, "evaluate_every": 0, "peft": {"r": 64, "alpha": 64}}

    def run(*names: str) -> Job:
        params["hooks"] = [{"name": name} for name in names]
        arguments = ["submit", str(write_pipeline(pipeline)), "--json", "--quiet", "--workdir", str(tmp_path / "jobs")]
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, done.output
        return Job(json.loads(done.stdout), tmp_path)

    return run


def update_bytes(job: Job) -> int:
    """What bank-b sent to the coordinator: three updates, a hello and the closing sums (some 600 bytes each)."""
    return int(job.sent["bank-b"]["consortium"]["sent_bytes"])


@pytest.fixture
def plain(submit: Callable[..., Job]) -> Job:
    return submit()


@pytest.mark.parametrize(("names", "most_bytes", "most_distance"), CASES, ids=["+".join(case[0]) for case in CASES])
def test_an_encoding_sends_fewer_bytes_and_ends_close_by(
    submit: Callable[..., Job], plain: Job, names: tuple[str, ...], most_bytes: float, most_distance: float
) -> None:
    encoded = submit(*names)
    trained = plain.distance()
    assert trained > 0
    distance, ratio = encoded.distance(plain) / trained, update_bytes(encoded) / update_bytes(plain)
    assert ratio <= most_bytes
    assert distance <= most_distance
    if most_distance:
        assert distance > 0, "the encoding was not used"
    # What the coordinator sends is as it was
    states = [job.sent["consortium"]["bank-b"]["sent_bytes"] for job in (plain, encoded)]
    assert abs(states[0] - states[1]) < 200


def test_the_same_seed_gives_the_same_bits_however_values_are_rounded(submit: Callable[..., Job]) -> None:
    one, two = submit("int8", "zstd"), submit("int8", "zstd")
    assert all(np.array_equal(one.adapter[name], two.adapter[name]) for name in one.adapter)
    assert update_bytes(one) == update_bytes(two)
