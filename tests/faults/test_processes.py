"""A party's process is killed with SIGKILL in the middle of a transfer, and started again on its folder."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fate_llm.runtime.broker import BrokerNode
from fate_llm.security.identity import Identity

from .links import MIB, content, digest, loopback, nothing_on, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]
ROOT = Path(__file__).resolve().parents[2]


class Party:
    """A process of `tests.faults.party`; `said` grows with what it prints."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.said: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.party", json.dumps(order)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        self._readers = [threading.Thread(target=self._read, args=(s,)) for s in ("stdout", "stderr")]
        for reader in self._readers:
            reader.start()

    def _read(self, name: str) -> None:
        for line in getattr(self.process, name):
            self.said.append(line.strip())

    def wait_for(self, start: str, seconds: float = 60.0) -> None:
        until(
            lambda: any(line.startswith(start) for line in self.said) or self.process.poll() is not None,
            seconds,
            lambda: f"no {start!r} in {self.said[-20:]}",
        )
        assert any(line.startswith(start) for line in self.said), f"ended before {start!r}: {self.said[-30:]}"

    def progressed(self) -> int:
        """Bytes of the message that is coming in."""
        return max((int(line.split()[1]) for line in list(self.said) if line.startswith("progress")), default=0)

    def kill(self) -> None:
        """SIGKILL, in the middle of whatever it does."""
        assert self.process.poll() is None, f"it had ended: {self.said[-20:]}"
        self.process.kill()
        self.end()

    def end(self, seconds: float = 60.0) -> int:
        code = self.process.wait(seconds)
        for reader in self._readers:
            reader.join(10)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        return code


@pytest.fixture
def party(broker: BrokerNode, vhost: str, tmp_path: Path) -> Iterator[Callable[..., Party]]:
    """Starts processes of parties a, b, c of one job, each on its own folder; none outlives the test."""
    identities = {name: Identity.generate() for name in "ab"}
    started: list[Party] = []

    def start(name: str, work: dict[str, Any], *, finish: bool = False) -> Party:
        order = {
            "url": loopback(broker.url(vhost=vhost)),
            "party": name,
            "job": "killed",
            "folder": str(tmp_path / name),
            "seed": identities[name].to_bytes().hex(),
            "roster": {who: identity.public.to_text() for who, identity in identities.items()},
            "work": work,
            "finish": finish,
        }
        started.append(Party(order))
        return started[-1]

    yield start
    for one in started:
        with contextlib.suppress(ProcessLookupError):
            one.process.kill()
        one.end()


def test_a_receiver_killed_in_the_middle_goes_on_where_it_was(
    party: Callable[..., Party], broker: BrokerNode, vhost: str, tmp_path: Path
) -> None:
    # Given a receiver that has one message in its book, and half of the next in its journal
    messages = [[1, MIB], [2, 64 * MIB], [3, 3 * MIB]]
    work = {"from": "a", "count": 3, "book": str(tmp_path / "book")}
    sender = party("a", {"to": "b", "messages": messages}, finish=True)
    receiver = party("b", work)
    until(lambda: receiver.progressed() > 24 * MIB, 60, lambda: str((sender.said, receiver.said[-10:])))
    # When it is killed and started again on its folder
    receiver.kill()
    again = party("b", work | {"count": 2}, finish=True)
    again.wait_for("closed")
    # Then each message is in the book once, in order, and the half that had come was not sent again
    assert again.end() == 0 and sender.end() == 0, (sender.said, again.said)
    book = (tmp_path / "book").read_text().split()
    assert book == [digest(content(seed, size)) for seed, size in messages]
    first = next(line for line in again.said if line.startswith("progress"))
    assert int(first.split()[1]) > 16 * MIB
    assert "flushed True" in sender.said
    nothing_on(broker, vhost)


def test_a_receiver_killed_after_its_note_and_before_the_acknowledgement_is_told_again(
    party: Callable[..., Party], broker: BrokerNode, vhost: str, tmp_path: Path
) -> None:
    """The contract of the seam: a message that its reader did not acknowledge comes again, whole."""
    book = tmp_path / "book"
    os.mkfifo(book)  # opening it waits for a reader, which never comes: the message is never acknowledged
    sender = party("a", {"to": "b", "messages": [[5, 5 * MIB]]}, finish=True)
    receiver = party("b", {"from": "a", "count": 1, "book": str(book)})
    sender.wait_for("flushed True")
    time.sleep(0.5)
    receiver.kill()
    book.unlink()
    again = party("b", {"from": "a", "count": 1, "book": str(book)}, finish=True)
    again.wait_for("closed")
    assert again.end() == 0 and sender.end() == 0, (sender.said, again.said)
    assert book.read_text().split() == [digest(content(5, 5 * MIB))]
    nothing_on(broker, vhost)


def test_a_sender_killed_in_the_middle_goes_on_with_a_new_message(
    party: Callable[..., Party], broker: BrokerNode, vhost: str, tmp_path: Path
) -> None:
    # Given a receiver with half a message, whose other half dies with its sender
    work = {"from": "a", "count": 4, "book": str(tmp_path / "book")}
    receiver = party("b", work, finish=True)
    sender = party("a", {"to": "b", "messages": [[1, MIB], [2, 256 * MIB]]})
    until(lambda: receiver.progressed() > 24 * MIB, 60, lambda: str((sender.said, receiver.said[-10:])))
    sender.kill()
    assert "sent 2" not in sender.said
    # When the sender is started again on its folder, and its application sends what was not sent, and more
    again = party("a", {"to": "b", "messages": [[2, 40 * MIB], [3, 100], [4, 3 * MIB]]}, finish=True)
    again.wait_for("closed")
    receiver.wait_for("closed")
    # Then the receiver has every message that was sent to its end, once, in order
    assert again.end() == 0 and receiver.end() == 0, (again.said, receiver.said[-10:])
    sizes = [(1, MIB), (2, 40 * MIB), (3, 100), (4, 3 * MIB)]
    assert (tmp_path / "book").read_text().split() == [digest(content(*one)) for one in sizes]
    nothing_on(broker, vhost)


def test_a_sender_killed_after_it_has_sent_leaves_the_rest_to_the_next(
    party: Callable[..., Party], broker: BrokerNode, vhost: str, tmp_path: Path
) -> None:
    """What was sent to its end lies in the outbox: the next process brings it home, without its application's help."""
    keys = party("b", {"from": "a", "count": 1, "book": str(tmp_path / "book")})
    sender = party("a", {"to": "b", "messages": [[1, MIB], [2, 30 * MIB]]})
    keys.wait_for("got")
    keys.kill()  # from here on the inbox only fills
    sender.wait_for("sent 2")
    sender.kill()
    broker.ctl("purge_queue", "--vhost", vhost, "fate.to.b/job/killed")  # even so
    again = party("a", {"to": "b", "messages": []}, finish=True)
    receiver = party("b", {"from": "a", "count": 1, "book": str(tmp_path / "book")}, finish=True)
    assert receiver.end() == 0 and again.end() == 0, (again.said, receiver.said)
    assert (tmp_path / "book").read_text().split() == [digest(content(1, MIB)), digest(content(2, 30 * MIB))]
    nothing_on(broker, vhost)


def test_both_killed_and_started_again(
    party: Callable[..., Party], broker: BrokerNode, vhost: str, tmp_path: Path
) -> None:
    work = {"from": "a", "count": 2, "book": str(tmp_path / "book")}
    receiver = party("b", work, finish=True)
    sender = party("a", {"to": "b", "messages": [[1, 256 * MIB]]})
    until(lambda: receiver.progressed() > 24 * MIB, 60, lambda: str((sender.said, receiver.said[-10:])))
    sender.kill()
    receiver.kill()
    receiver = party("b", work, finish=True)
    sender = party("a", {"to": "b", "messages": [[1, 32 * MIB], [2, 1]]}, finish=True)
    assert receiver.end() == 0 and sender.end() == 0, (sender.said, receiver.said[-10:])
    assert (tmp_path / "book").read_text().split() == [digest(content(1, 32 * MIB)), digest(content(2, 1))]
    nothing_on(broker, vhost)
