"""Our side of the benchmarks of the federation layer: the roles of `_amqp_plain.py`, sealed end to end.

Every role is a process with the journal of a party in a folder of its own, as in a job. Times are those of the
monotonic clock, which all processes share.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from _amqp_plain import ExtraMemory, values

from fate_llm.core.values import Array, Arrays, Payload
from fate_llm.protocols.channel import JobChannel
from fate_llm.protocols.link import SecureLink
from fate_llm.protocols.transports.rabbitmq import BrokerAddress, RabbitTransport
from fate_llm.security.identity import Identity, PublicIdentity

__all__ = ["TENSORS", "main", "write_identities"]

PATIENCE = 120.0  # seconds without any message
TENSORS = 8  # that a round's bytes are divided among, at ours and at the peers
_TASK, _DOWN, _UP = "echo", "benchmark.state", "benchmark.update"


def write_identities(folder: Path, members: Sequence[str]) -> None:
    """A fresh key for every party, and the roster that all of them read."""
    identities = {party: Identity.generate() for party in members}
    for party, identity in identities.items():
        (folder / f"{party}.key").write_bytes(identity.to_bytes())
    roster = {party: identity.public.to_text() for party, identity in identities.items()}
    (folder / "roster.json").write_text(json.dumps(roster))


def open_link(options: argparse.Namespace) -> SecureLink:
    texts = json.loads((options.identities / "roster.json").read_text())
    roster = {party: PublicIdentity.from_text(texts[party]) for party in options.members}
    address = BrokerAddress.from_url(options.url, ca_file=options.ca)
    transport = RabbitTransport(address, party=options.party, members=tuple(options.members), job=options.job)
    return SecureLink(
        transport,
        job=options.job,
        attempt=1,
        party=options.party,
        identity=Identity.from_bytes((options.identities / f"{options.party}.key").read_bytes()),
        roster=roster,
        folder=options.folder / f"{options.job}-{options.party}",
    )


def _take(link: SecureLink) -> memoryview:
    """The next message, acknowledged.

    Raises:
        SystemExit: none came in time.
    """
    delivery = link.receive(PATIENCE)
    if delivery is None:
        raise SystemExit(f"{link.party}: no message within {PATIENCE:g} s")
    link.ack(delivery)
    return delivery.body


def _other(options: argparse.Namespace) -> str:
    return str(next(party for party in options.members if party != options.party))


# --- one large tensor from one to the other ----------------------------------------------------------------------


def throughput_send(options: argparse.Namespace) -> dict[str, Any]:
    tensor = values(options.size, seed=1)
    body = tensor.data.cast("B")
    digest = hashlib.sha256(body).hexdigest()
    memory = ExtraMemory()
    link = open_link(options)
    _take(link)  # the other side waits, and the keys are agreed on
    started, cpu = time.monotonic(), time.process_time()
    link.send(_other(options), [body])
    sent = time.monotonic()
    _take(link)  # the other side has journalled it
    cpu = time.process_time() - cpu
    extra = memory.mib()
    link.close(finished=True)
    return {"started": started, "confirmed": sent, "cpu": cpu, "extra_mib": extra, "digest": digest}


def throughput_receive(options: argparse.Namespace) -> dict[str, Any]:
    memory = ExtraMemory()
    link = open_link(options)
    link.send(_other(options), [b"ready"])
    cpu = time.process_time()
    body = _take(link)
    ended, cpu = time.monotonic(), time.process_time() - cpu
    link.send(_other(options), [b"done"])
    extra = memory.mib() - len(body) / 2**20
    link.close(finished=True)
    return {"ended": ended, "cpu": cpu, "extra_mib": extra, "digest": hashlib.sha256(body).hexdigest()}


# --- rounds between a coordinator and parties --------------------------------------------------------------------


def _state(options: argparse.Namespace) -> dict[str, Array]:
    """`size` bytes of float32 values in `TENSORS` tensors, or as many values in half the bytes as bf16."""
    flat = values(options.size, seed=1)
    chosen: Array = flat.astype(ml_dtypes.bfloat16) if options.dtype == "bf16" else flat
    return {f"tensor-{number}": part for number, part in enumerate(np.split(chosen, TENSORS))}


def _channel(options: argparse.Namespace) -> JobChannel:
    return JobChannel(open_link(options), job=options.job, party=options.party, members=options.members)


def coordinate(options: argparse.Namespace) -> dict[str, Any]:
    """Send the state to each party, wait for the state from each, as numpy arrays."""
    state = _state(options)
    channel = _channel(options)
    parties = [member for member in options.members if member != options.party]
    seconds: list[float] = []
    replies: list[Arrays] = []
    for number in range(1, options.rounds + 1):
        replies = []
        started = time.monotonic()
        for party in parties:
            channel.send(party, task=_TASK, kind=_DOWN, payload=Payload({}, state), round=number)
        for party in parties:
            end = channel.clock() + PATIENCE
            replies.append(channel.receive(party, task=_TASK, kind=_UP, deadline=end).payload.tensors)
        seconds.append(time.monotonic() - started)
    for reply in replies:
        if reply.keys() != state.keys() or not all(np.array_equal(reply[name], state[name]) for name in state):
            raise SystemExit("a party sent other values back")
    dtypes = sorted({str(tensor.dtype) for tensor in replies[0].values()})
    sent = channel.sent_bytes()
    channel.close(finished=True)
    tensor_bytes = sum(tensor.nbytes for tensor in state.values()) * len(parties) * options.rounds
    return {"seconds": seconds, "sent_bytes": sent, "tensor_bytes": tensor_bytes, "dtypes": dtypes}


def echo(options: argparse.Namespace) -> dict[str, Any]:
    """A party: send back whatever the coordinator sends, as often as there are rounds."""
    channel = _channel(options)
    coordinator = options.members[0]
    for number in range(1, options.rounds + 1):
        end = channel.clock() + PATIENCE
        got = channel.receive(coordinator, task=_TASK, kind=_DOWN, deadline=end)
        channel.send(coordinator, task=_TASK, kind=_UP, payload=Payload({}, got.payload.tensors), round=number)
    channel.close(finished=True)
    return {}


# --- small messages ----------------------------------------------------------------------------------------------


def ping(options: argparse.Namespace) -> dict[str, Any]:
    """Round trips of a small message in seconds: sent, confirmed, answered, answer received."""
    link = open_link(options)
    body, seconds = os.urandom(options.size), []
    _take(link)
    for _ in range(options.messages):
        started = time.monotonic()
        link.send(_other(options), [body])
        _take(link)
        seconds.append(time.monotonic() - started)
    link.close(finished=True)
    return {"seconds": seconds}


def pong(options: argparse.Namespace) -> dict[str, Any]:
    link = open_link(options)
    link.send(_other(options), [b"ready"])
    for _ in range(options.messages):
        link.send(_other(options), [_take(link)])
    link.close(finished=True)
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
    parser.add_argument("--identities", type=Path, required=True, help="folder with keys and the roster")
    parser.add_argument("--job", required=True)
    parser.add_argument("--party", required=True)
    parser.add_argument("--members", nargs="+", required=True, help="the coordinator first")
    parser.add_argument("--size", type=int, required=True, help="bytes of a message (as float32)")
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--messages", type=int, default=1)
    options = parser.parse_args()
    print(json.dumps(ROLES[options.role](options)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
