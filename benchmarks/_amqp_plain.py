"""Plain pika programs that move the same bytes as our link: the measure for the benchmarks of the federation layer.

Nothing clever on purpose: one blocking connection per process, persistent messages to durable queues, published and
confirmed one by one in chunks of 4 MiB, acknowledged one by one after they are journalled. Every role is a process and
prints its answer as one JSON object; times are those of the monotonic clock, which all processes share.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pika
from pika.adapters.blocking_connection import BlockingChannel

__all__ = ["CHUNK", "SYNC", "ExtraMemory", "Journal", "connect", "open_queue", "receive", "send", "values"]

CHUNK = 4 * 2**20  # bytes
PREFETCH = 16  # chunks a broker may push before one is acknowledged
PATIENCE = 120.0  # seconds without any chunk
SYNC = ("off", "none", "end", "chunk")
_PERSISTENT = pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent)


# --- what every role uses ----------------------------------------------------------------------------------------


def values(size: int, *, seed: int) -> npt.NDArray[np.float32]:
    """`size` bytes of float32 values that no compression makes smaller."""
    return np.random.default_rng(seed).standard_normal(size // 4, dtype=np.float32)


def connect(url: str, ca: Path | None) -> pika.BlockingConnection:
    """A connection of its own; ca: verifies an amqps broker."""
    parameters = pika.URLParameters(url)
    if ca is not None:
        parameters.ssl_options = pika.SSLOptions(ssl.create_default_context(cafile=str(ca)), parameters.host)
    return pika.BlockingConnection(parameters)


def open_queue(channel: BlockingChannel, queue: str) -> None:
    channel.queue_declare(queue, durable=True)


@dataclass(slots=True)
class Journal:
    """Appends what came to a file. sync: `off` no file, `none` never synced, `end` at the end, `chunk` after each.

    `chunk` is the policy of our link: nothing is acknowledged before it is on the disk.
    """

    path: Path
    sync: str
    _file: int = -1

    def append(self, body: bytes) -> None:
        if self.sync == "off":
            return
        if self._file < 0:
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.write(self._file, body)
        if self.sync == "chunk":
            os.fdatasync(self._file)

    def close(self) -> None:
        """The last thing that counts as journalling."""
        if self._file >= 0:
            if self.sync == "end":
                os.fdatasync(self._file)
            os.close(self._file)
            self._file = -1


def send(channel: BlockingChannel, queue: str, body: memoryview, properties: pika.BasicProperties) -> None:
    """Publish chunk by chunk; each is confirmed before the next leaves (the channel confirms)."""
    for start in range(0, len(body), CHUNK):
        channel.basic_publish("", queue, bytes(body[start : start + CHUNK]), properties, mandatory=True)


def receive(channel: BlockingChannel, queue: str, size: int) -> Iterator[tuple[str, bytes]]:
    """(sender, chunk) until `size` bytes have come; a chunk is acknowledged when the caller asks for the next one.

    Raises:
        SystemExit: nothing came for `PATIENCE` seconds.
    """
    missing = size
    for method, properties, body in channel.consume(queue, inactivity_timeout=PATIENCE):
        if method is None or properties is None or body is None:
            raise SystemExit(f"{queue}: {missing} of {size} bytes did not come within {PATIENCE:g} s")
        yield properties.app_id or "", body
        channel.basic_ack(method.delivery_tag or 0)
        missing -= len(body)
        if missing <= 0:
            return


class ExtraMemory:
    """Peak resident memory of this process above what it had when this was made, in MiB."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far (imports, making tensors) does not count
        self._before = _status("VmRSS")

    def mib(self) -> float:
        return _status("VmHWM") - self._before


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


# --- one large tensor from one to the other ----------------------------------------------------------------------


def throughput_send(options: argparse.Namespace) -> dict[str, Any]:
    tensor = values(options.size, seed=1)
    body = tensor.data.cast("B")
    digest = hashlib.sha256(body).hexdigest()
    memory = ExtraMemory()
    connection = connect(options.url, options.ca)
    channel = connection.channel()
    channel.confirm_delivery()
    for queue in ("ready", "tensor"):
        open_queue(channel, queue)
    for _ in receive(channel, "ready", 1):  # the other side waits
        pass
    started, cpu = time.monotonic(), time.process_time()
    send(channel, "tensor", body, _PERSISTENT)
    confirmed, cpu = time.monotonic(), time.process_time() - cpu
    extra = memory.mib()
    connection.close()
    return {"started": started, "confirmed": confirmed, "cpu": cpu, "extra_mib": extra, "digest": digest}


def throughput_receive(options: argparse.Namespace) -> dict[str, Any]:
    memory = ExtraMemory()
    connection = connect(options.url, options.ca)
    channel = connection.channel()
    channel.confirm_delivery()
    channel.basic_qos(prefetch_count=PREFETCH)
    for queue in ("ready", "tensor"):
        open_queue(channel, queue)
    send(channel, "ready", memoryview(b"r"), _PERSISTENT)
    cpu = time.process_time()
    journal = Journal(options.folder / "plain.journal", options.sync)
    for _, chunk in receive(channel, "tensor", options.size):
        journal.append(chunk)
    journal.close()
    ended, cpu = time.monotonic(), time.process_time() - cpu
    extra = memory.mib()
    connection.close()
    digest = hashlib.sha256(journal.path.read_bytes()).hexdigest() if options.sync != "off" else None
    return {"ended": ended, "cpu": cpu, "extra_mib": extra, "digest": digest}


# --- rounds between a coordinator and parties --------------------------------------------------------------------


def coordinate(options: argparse.Namespace) -> dict[str, Any]:
    """Send `size` bytes to each party, wait for as many from each; one connection, parties one after the other."""
    state = values(options.size, seed=1)
    body = state.data.cast("B")
    connection = connect(options.url, options.ca)
    channel = connection.channel()
    channel.confirm_delivery()
    channel.basic_qos(prefetch_count=PREFETCH)
    for queue in ("coordinator", *options.parties):
        open_queue(channel, queue)
    seconds = []
    replies = {party: bytearray(options.size) for party in options.parties}
    for number in range(options.rounds):
        started = time.monotonic()
        journal = Journal(options.folder / f"coordinator-{number % 2}.journal", options.sync)
        for party in options.parties:
            send(channel, party, body, _PERSISTENT)
        filled = dict.fromkeys(options.parties, 0)
        for party, chunk in receive(channel, "coordinator", options.size * len(options.parties)):
            journal.append(chunk)
            replies[party][filled[party] : filled[party] + len(chunk)] = chunk
            filled[party] += len(chunk)
        journal.close()
        seconds.append(time.monotonic() - started)
    for party, reply in replies.items():
        if memoryview(reply) != body:
            raise SystemExit(f"{party} sent other bytes back")
    connection.close()
    return {"seconds": seconds}


def echo(options: argparse.Namespace) -> dict[str, Any]:
    """A party: send back whatever the coordinator sends, as often as there are rounds."""
    connection = connect(options.url, options.ca)
    channel = connection.channel()
    channel.confirm_delivery()
    channel.basic_qos(prefetch_count=PREFETCH)
    for queue in ("coordinator", options.party):
        open_queue(channel, queue)
    own = pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent, app_id=options.party)
    kept = bytearray(options.size)
    for number in range(options.rounds):
        journal = Journal(options.folder / f"{options.party}-{number % 2}.journal", options.sync)
        filled = 0
        for _, chunk in receive(channel, options.party, options.size):
            journal.append(chunk)
            kept[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
        journal.close()
        send(channel, "coordinator", memoryview(kept), own)
    connection.close()
    return {}


# --- small messages ----------------------------------------------------------------------------------------------


def ping(options: argparse.Namespace) -> dict[str, Any]:
    """Round trips of a small message in seconds: sent, confirmed, answered, answer received."""
    connection = connect(options.url, options.ca)
    channel = connection.channel()
    channel.confirm_delivery()
    channel.basic_qos(prefetch_count=PREFETCH)
    for queue in ("ping", "pong"):
        open_queue(channel, queue)
    body = memoryview(os.urandom(options.size))
    answers = receive(channel, "pong", options.size * options.messages)
    seconds = []
    for _ in range(options.messages):
        started = time.monotonic()
        send(channel, "ping", body, _PERSISTENT)
        next(answers)
        seconds.append(time.monotonic() - started)
    for _ in answers:  # acknowledges the last one
        pass
    connection.close()
    return {"seconds": seconds}


def pong(options: argparse.Namespace) -> dict[str, Any]:
    connection = connect(options.url, options.ca)
    channel = connection.channel()
    channel.confirm_delivery()
    channel.basic_qos(prefetch_count=PREFETCH)
    for queue in ("ping", "pong"):
        open_queue(channel, queue)
    journal = Journal(options.folder / "pong.journal", options.sync)
    for _, body in receive(channel, "ping", options.size * options.messages):
        journal.append(body)
        send(channel, "pong", memoryview(body), _PERSISTENT)
    journal.close()
    connection.close()
    return {}


ROLES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "coordinate": coordinate,
    "echo": echo,
    "ping": ping,
    "pong": pong,
    "throughput-receive": throughput_receive,
    "throughput-send": throughput_send,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=sorted(ROLES))
    parser.add_argument("--url", required=True)
    parser.add_argument("--ca", type=Path, default=None, help="verify an amqps broker with this certificate")
    parser.add_argument("--folder", type=Path, required=True, help="where journals are written")
    parser.add_argument("--sync", choices=SYNC, default="none", help="what is journalled, and when it is synced")
    parser.add_argument("--size", type=int, required=True, help="bytes of a message")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--messages", type=int, default=1)
    parser.add_argument("--party", default="")
    parser.add_argument("--parties", nargs="+", default=[])
    options = parser.parse_args()
    print(json.dumps(ROLES[options.role](options)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
