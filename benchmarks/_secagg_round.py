"""One round of secure aggregation in this process: the machines of all parties, no network, no journal, no clock.

Every call of a machine is timed and its memory counted by whose it is. Seconds are of this thread's CPU: nothing here
waits, and other programs on the machine take no part of them.

As a program: one round, and a JSON object as the last line, the same as of `_flower_secagg.py`.
"""

from __future__ import annotations

import argparse
import json
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fate_llm.core.errors import FateError
from fate_llm.core.interfaces import (
    Layout,
    SumAction,
    SumContribute,
    SumEvent,
    SumExpired,
    SumFinished,
    SumReceived,
    SumScene,
    SumSend,
)
from fate_llm.core.values import Array, Arrays, Cohort, Payload, Total, Update
from fate_llm.protocols.envelope import Envelope, encode
from fate_llm.protocols.sums.secagg import SecAgg
from fate_llm.security.identity import Identity
from fate_llm.security.signer import RosterSigner

__all__ = ["COORDINATOR", "LARGEST_WEIGHT", "STAGES", "Federation", "Round", "run_round", "seconds_of"]

STAGES = ("keys", "shares", "masked", "consent", "unmask")
COORDINATOR = "arbiter"
LARGEST_WEIGHT = 2000.0
_WIDTH = 1000  # values of a row
_TENSORS = 10
_NO_DIGEST = "0" * 64  # of a frame: the transport's, not the protocol's


def seconds_of(call: Callable[[], object]) -> float:
    """CPU seconds of this thread."""
    started = time.thread_time()
    call()
    return time.thread_time() - started


def parties_of(count: int) -> tuple[str, ...]:
    return tuple(f"party-{number:03d}" for number in range(1, count + 1))


def layout_of(parameters: int) -> Layout:
    """Ten matrices of rows of 1000 values, `parameters` values together."""
    rows, rest = divmod(parameters, _TENSORS * _WIDTH)
    if rest or not rows:
        raise SystemExit(f"{parameters} parameters: a multiple of {_TENSORS * _WIDTH} is needed")
    return {f"layer-{number}.weight": (rows, _WIDTH) for number in range(_TENSORS)}


def _arrays(flat: Array, layout: Layout) -> Arrays:
    found, start = {}, 0
    for name, shape in layout.items():
        size = int(np.prod(shape))
        found[name] = flat[start : start + size].reshape(shape)
        start += size
    return found


class Federation:
    """Identities, a global state, and an update for each party: all of them windows of one array, one value apart."""

    def __init__(self, count: int, parameters: int) -> None:
        self.parties = parties_of(count)
        self.parameters = parameters
        self.layout = layout_of(parameters)
        draw = np.random.default_rng(7)
        self._values = draw.normal(0.0, 0.02, parameters + count).astype(np.float32)
        self._state = _arrays(draw.normal(0.0, 0.05, parameters).astype(np.float32), self.layout)
        members = (*self.parties, COORDINATOR)
        self._identities = {name: Identity(bytes([number]) * 32) for number, name in enumerate(members, 1)}
        self._roster = {name: identity.public for name, identity in self._identities.items()}
        self._cohort = Cohort(self.parties, COORDINATOR, 1)
        self._sum = SecAgg(SecAgg.Params(clip=1.0, largest_weight=LARGEST_WEIGHT))

    def scene(self, me: str) -> SumScene:
        signer = RosterSigner(self._identities[me], self._roster)
        return SumScene(self._cohort, me, self.layout, self._state, "benchmark", 1, "tune", 1, signer)

    def party(self, me: str) -> Any:
        return self._sum.party(self.scene(me))

    def server(self) -> Any:
        return self._sum.server(self.scene(COORDINATOR))

    def update(self, party: str) -> Update:
        start = self.parties.index(party)
        flat = self._values[start : start + self.parameters]
        weight = 1000.0 + start
        return Update(_arrays(flat, self.layout), weight, {"loss_sum": 2.5 * weight, "tokens": weight})

    def check(self, total: Total) -> None:
        """The total is the weighted mean of its contributors, within the bound it states; every 97th value counts.

        Raises:
            SystemExit: it is not: what was measured is no sum.
        """
        starts = [self.parties.index(party) for party in total.contributors]
        weights = [1000.0 + start for start in starts]
        places = np.arange(0, self.parameters, 97)
        exact = sum(w * self._values[places + s].astype(np.float64) for w, s in zip(weights, starts, strict=True))
        flat = np.concatenate([total.mean[name].reshape(-1) for name in self.layout])
        error = float(np.abs(flat[places] - exact / sum(weights)).max())
        if error > total.error_bound or abs(total.weight - sum(weights)) > 1e-6:
            raise SystemExit(f"the sum is wrong: off by {error:g}, the bound is {total.error_bound:g}")


@dataclass
class Round:
    """What one round took.

    seconds: of each party and of the coordinator, by stage. frames: bytes of all frames to and from a party; content:
    without their envelopes; sent: content of those from it. extra: peak bytes that a machine has held; when watched.
    """

    seconds: dict[str, dict[str, float]] = field(
        default_factory=lambda: defaultdict(lambda: dict.fromkeys(STAGES, 0.0))
    )
    frames: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    content: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    sent: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    extra: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    total: Total | None = None
    _held: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def of(self, who: str) -> float:
        return sum(self.seconds[who].values())

    @property
    def all_seconds(self) -> float:
        return sum(map(self.of, tuple(self.seconds)))

    def count(self, party: str, sender: str, receiver: str, body: Payload) -> None:
        content = _content_bytes(sender, receiver, body)
        self.frames[party] += _frame_bytes(sender, receiver, body)
        self.content[party] += content
        self.sent[party] += content if sender == party else 0

    def call(self, who: str, stage: str, machine: Any, event: SumEvent, watch: bool) -> list[SumAction]:
        before = 0
        if watch:
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
        started = time.thread_time()
        actions: list[SumAction] = machine.handle(event)
        self.seconds[who][stage] += time.thread_time() - started
        if watch:
            after, peak = tracemalloc.get_traced_memory()
            self.extra[who] = max(self.extra[who], self._held[who] + peak - before)
            self._held[who] += after - before
        return actions


def run_round(federation: Federation, *, silent: Mapping[str, int] | None = None, watch: bool = False) -> Round:
    """A whole round, the parties in sequence. silent: how many parties fall silent before they say something in a
    stage, by stage. watch: count memory, which makes the seconds worthless.

    Raises:
        FateError: too few are left.
    """
    if watch:
        tracemalloc.start()
    try:
        return _run_round(federation, dict(silent or {}), watch)
    finally:
        if watch:
            tracemalloc.stop()


def _run_round(federation: Federation, silent: Mapping[str, int], watch: bool) -> Round:
    found = Round()
    started = time.thread_time()
    server = federation.server()
    found.seconds[COORDINATOR]["keys"] += time.thread_time() - started
    machines = {party: federation.party(party) for party in federation.parties}
    events: dict[str, SumEvent] = {
        party: SumContribute(federation.update(party), bytes([number]) * 32)
        for number, party in enumerate(federation.parties, 1)
    }
    for index, stage in enumerate(STAGES):
        lost = list(events)[len(events) - silent.get(stage, 0) :]
        answers: list[SumAction] = []
        for party, event in [(p, e) for p, e in events.items() if p not in lost]:
            for body in _bodies(found.call(party, stage, machines[party], event, watch)):
                found.count(party, party, COORDINATOR, body)
                if server.stage == index and found.total is None:  # else it has heard enough
                    answers += _heard(found, server, stage, party, body, watch)
        if server.stage == index and found.total is None:
            answers += found.call(COORDINATOR, stage, server, SumExpired(), watch)
        found.total = next((action.total for action in answers if isinstance(action, SumFinished)), found.total)
        sends = [action for action in answers if isinstance(action, SumSend)]
        events = {s.receiver: SumReceived(COORDINATOR, s.body) for s in sends if s.receiver not in lost}
        for send in sends:
            found.count(send.receiver, COORDINATOR, send.receiver, send.body)
    if found.total is None:
        raise SystemExit("the round ended without a total")
    return found


def _heard(found: Round, server: Any, stage: str, party: str, body: Payload, watch: bool) -> list[SumAction]:
    actions = found.call(COORDINATOR, stage, server, SumReceived(party, body), watch)
    for action in actions:
        if isinstance(action, SumFinished):
            found.total = action.total
    return actions


def _bodies(actions: list[SumAction]) -> list[Payload]:
    return [action.body for action in actions if isinstance(action, SumSend)]


def _frame_bytes(sender: str, receiver: str, body: Payload) -> int:
    envelope = Envelope("benchmark", "tune", sender, receiver, "rounds.term", 1, body, 1, 1, None, 1)
    return sum(memoryview(part).nbytes for part in encode(envelope, digest=_NO_DIGEST))


def _content_bytes(sender: str, receiver: str, body: Payload) -> int:
    """Of a frame, without what every frame has: names of job, sender and receiver, the digest."""
    return _frame_bytes(sender, receiver, body) - _frame_bytes(sender, receiver, Payload())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parties", type=int, required=True)
    parser.add_argument("--parameters", type=int, required=True)
    parser.add_argument("--silent", choices=STAGES, help="one party does not answer in this stage nor after it")
    options = parser.parse_args()
    federation = Federation(options.parties, options.parameters)
    found, ended, bound = Round(), "with a sum", None
    try:
        found = run_round(federation, silent={options.silent: 1} if options.silent else {})
    except FateError as error:
        ended = f"with {error.code}: {error.message}"[:200]
    if found.total is not None:
        federation.check(found.total)
        bound = found.total.error_bound
    seconds = {who: found.of(who) for who in tuple(found.seconds)}
    server = seconds.pop(COORDINATOR, 0.0)
    answer = {"client_seconds": seconds, "server_seconds": server, "ended": ended, "error_bound": bound}
    print(json.dumps({**answer, "sent": found.sent, "content": found.content}))


if __name__ == "__main__":
    main()
