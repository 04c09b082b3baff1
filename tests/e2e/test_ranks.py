"""A party of two ranks among others, over a real broker, started and started again as a service does it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fate_llm.core.canonical import digest_folder
from fate_llm.pipelines import check
from fate_llm.runtime.broker import BrokerNode
from fate_llm.runtime.jobfolder import JobFolder
from fate_llm.runtime.launch import LaunchSettings, command
from fate_llm.security.identity import Identity
from tests.faults.links import loopback

pytestmark = pytest.mark.slow
ENDS = 280.0  # seconds after which a job that has not ended hangs
LAUNCH = {"bank-a": LaunchSettings(nproc=2), "bank-b": LaunchSettings()}
Event = Callable[["Party", str, dict[str, Any]], None]


class Party:
    """One party's worker; started again when it dies without a word."""

    def __init__(self, order: dict[str, Any], errors: Path, at: Event) -> None:
        self.order, self.errors, self.at = order, errors, at
        self.launch = LAUNCH[order["party"]]
        self.end: dict[str, Any] | None = None
        self.lives = 0
        self.over = False
        self.tell_left: list[str] = []
        self.process: subprocess.Popen[str] | None = None
        self.thread = threading.Thread(target=self._live, daemon=True)

    def _live(self) -> None:
        while self.end is None and not self.over and self.lives < 5:
            self.lives += 1
            with self.errors.open("ab") as errors:
                self.process = subprocess.Popen(
                    command(self.launch),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    start_new_session=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
            self.tell({**self.order, "launch": self.launch.order()})
            for name in self.tell_left:
                self.tell({"left": name})
            assert self.process.stdout is not None
            for line in self.process.stdout:
                message = json.loads(line)
                if "end" in message:
                    self.end = message["end"]
                elif "event" in message:
                    self.at(self, message["event"][0], message["event"][4])
            self.process.wait()
            self._close_pipes()

    def tell(self, message: dict[str, Any]) -> None:
        assert self.process is not None and self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):  # it has died, and the next is told
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def ranks(self) -> list[int]:
        """Process ids of the ranks that torchrun has started."""
        assert self.process is not None
        found = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in found]

    def close(self) -> None:
        self.over = True
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.thread.join(ENDS)

    def _close_pipes(self) -> None:
        assert self.process is not None
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                assert pipe is not None
                pipe.close()


def run(
    folder: Path, data: dict[str, Any], node: BrokerNode, at: Event = lambda party, kind, fields: None
) -> dict[str, Party]:
    """All parties to their ends."""
    spec = check(data)
    job = JobFolder(folder / "job")
    keys = {name: Identity(bytes([number]) * 32) for number, name in enumerate(spec.members, start=1)}
    parties: dict[str, Party] = {}
    for name in spec.members:
        job.party(name)
        order = {
            "job": folder.name,
            "attempt": 1,
            "party": name,
            "pipeline": spec.to_data(),
            "base": str(folder.parent),
            "folder": str(job.path),
            "slot": str(folder / f"{name}.lock"),
            "broker": loopback(node.url()),
            "identity": keys[name].to_bytes().hex(),
            "roster": {other: key.public.to_text() for other, key in keys.items()},
            "finished": {},
            "timing": {"linger": 60.0},
            "durable": True,
            "orphan": "exit",
        }
        parties[name] = Party(order, folder / f"{name}.stderr", at)
    try:
        for party in parties.values():
            party.thread.start()
        for name, party in parties.items():
            party.thread.join(ENDS)
            for other in parties.values():
                other.tell_left.append(name)
                if other is not party and other.end is None:
                    other.tell({"left": name})
        said = "\n".join(path.read_text()[-1500:] for path in folder.glob("*.stderr"))
        assert all(party.end is not None for party in parties.values()), said
    finally:
        for party in parties.values():
            party.close()
    return parties


@pytest.fixture
def two_banks(pipeline: dict[str, Any]) -> dict[str, Any]:
    """Reader and trainer at two banks; the guest coordinates."""
    pipeline["parties"] = {"guest": "bank-a", "hosts": ["bank-b"]}
    del pipeline["overrides"]["bank-c"], pipeline["tasks"]["evaluate"]
    pipeline["tasks"]["tune"]["params"] |= {"rounds": 3, "peft": {"r": 2, "dropout": 0.1}}
    pipeline["job"]["round_deadline"] = "250s"
    return pipeline


@pytest.fixture(autouse=True)
def no_rank_is_left() -> Iterator[None]:
    yield
    left = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if b"fate_llm.runtime.launch" in path.read_bytes() and path.parent.stat().st_uid == os.getuid():
                left.append(path.parent.name)
    assert not left, f"ranks are left: {left}"


def model(folder: Path, party: str) -> str:
    return digest_folder(folder / "job" / "parties" / party / "tune" / "model")


def test_killed_ranks_go_on_bit_for_bit(tmp_path: Path, two_banks: dict[str, Any], broker: BrokerNode) -> None:
    whole = run(make(tmp_path / "whole"), two_banks, broker)
    assert [party.end["error"] for party in whole.values() if party.end] == [None, None]
    assert model(tmp_path / "whole", "bank-a") == model(tmp_path / "whole", "bank-b")
    killed: list[str] = []

    def at(party: Party, kind: str, fields: dict[str, Any]) -> None:
        if party.order["party"] != "bank-a" or kind != "round_state":
            return
        assert party.process is not None
        if fields["round"] == 1 and not killed:
            killed.append("rank 1")
            os.kill(party.ranks()[1], signal.SIGKILL)
        elif fields["round"] == 2 and len(killed) == 1:
            killed.append("torchrun")
            os.kill(party.process.pid, signal.SIGKILL)

    cut = run(make(tmp_path / "cut"), two_banks, broker, at)

    assert [party.end["error"] for party in cut.values() if party.end] == [None, None]
    assert killed == ["rank 1", "torchrun"]
    assert cut["bank-a"].lives == 3
    for party in ("bank-a", "bank-b"):
        assert model(tmp_path / "cut", party) == model(tmp_path / "whole", party)


def test_what_does_not_fit_the_ranks_ends_the_job(
    tmp_path: Path, two_banks: dict[str, Any], broker: BrokerNode
) -> None:
    two_banks["tasks"]["tune"]["params"] |= {"batch_size": 3}
    ended = run(make(tmp_path / "job"), two_banks, broker)
    error = (ended["bank-a"].end or {})["error"]
    assert error["code"] == "configuration"
    assert "batch_size 3" in error["message"] and "2 ranks" in error["message"]
    assert (ended["bank-b"].end or {})["error"]["code"] in ("peer_failed", "quorum_lost")


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder
