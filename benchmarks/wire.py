"""Bytes on the wire per round over bytes of tensors, and the speed of the codec over that of copying.

The round: three parties and an arbiter exchange the adapter of SmolLM2-135M (rank 8 on q and v) over the in-memory
transport with the real envelopes. The codec: a 64 MiB update is encoded, joined into one frame and decoded, without
its digest, against `bytes(view)` of as many bytes; the digest is reported beside it. So is, without a limit, an update
of thousands of tensors of 18 KiB: there the cost is that of names and not of bytes.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from _measure import Ratio, finish, make_parser, median

from fate_llm.components.llm.adapters import PeftSettings, planned_layout
from fate_llm.components.llm.modelref import ModelShapes
from fate_llm.core.values import Array, Cohort, Payload
from fate_llm.protocols.channel import JobChannel
from fate_llm.protocols.envelope import Envelope, body_digest, decode, encode
from fate_llm.protocols.rounds.driver import ContributorDriver, CoordinatorDriver, Setting
from fate_llm.protocols.sums.plain import PlainSum
from fate_llm.protocols.tensors import tensor_bytes
from fate_llm.protocols.transports.memory import MemoryNetwork

WIRE_LIMIT, SPEED_LIMIT = 1.02, 0.5
PARTIES = ("bank-a", "bank-b", "bank-c")
ARBITER = "consortium"
MIB = 2**20
NO_DIGEST = "0" * 64
LIMITED = ("lora of a 7B model", "four large tensors")


def main() -> int:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--repeats", type=int, default=15, help="how often each is timed; its median counts")
    options = parser.parse_args()
    size, repeats = (1, 2) if options.quick else (64, options.repeats)
    state = random_arrays(smollm2_layout())
    per_round, start = bytes_per_round(state)
    tensors = 2 * len(PARTIES) * tensor_bytes(state)
    print(f"{len(state)} tensors, {tensor_bytes(state):,} bytes; a round: {per_round:,} bytes for {tensors:,}")
    codec = {name: _codec(layout, repeats) for name, layout in codec_layouts(size).items()}
    for name, found in codec.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in found.items()))
    ratios = [Ratio("bytes on the wire over bytes of tensors", per_round / tensors, WIRE_LIMIT)]
    for name in LIMITED:
        ratios.append(Ratio(f"codec speed over bytes(view), {name}", codec[name]["speed"], SPEED_LIMIT, least=True))
    details = {"round_bytes": per_round, "tensor_bytes": tensors, "start_bytes": start, "codec": codec}
    return finish(options, "wire", ratios, details)


# --- a round -----------------------------------------------------------------------------------------------------


def smollm2_layout() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the trained parameters: 30 layers, hidden size 576, 3 of 9 heads for keys and values."""
    weights: dict[str, tuple[int, ...]] = {}
    for layer in range(30):
        weights[f"model.layers.{layer}.self_attn.q_proj.weight"] = (576, 576)
        weights[f"model.layers.{layer}.self_attn.v_proj.weight"] = (192, 576)
    layout = planned_layout(ModelShapes(weights), PeftSettings.model_validate({}))
    assert layout is not None
    return layout


def random_arrays(layout: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    draw = np.random.default_rng(7)
    return {name: draw.standard_normal(shape, dtype=np.float32) for name, shape in layout.items()}


def bytes_per_round(state: dict[str, Array]) -> tuple[int, int]:
    """Bytes of all frames of one round, and of what comes before the first: from runs of one and of two rounds."""
    one, two = _bytes_of_run(state, rounds=1), _bytes_of_run(state, rounds=2)
    return two - one, 2 * one - two


def _bytes_of_run(state: dict[str, Array], *, rounds: int) -> int:
    network, members = MemoryNetwork(), (*PARTIES, ARBITER)
    channels = {p: JobChannel(network.connect(p), job="wire", party=p, members=members) for p in members}
    cohort = Cohort(PARTIES, ARBITER, len(PARTIES))
    settings = {p: Setting(channels[p], "tune", cohort, rounds, 60.0, PlainSum(), _silent) for p in members}
    calls: list[tuple[Callable[..., None], tuple[Any, ...]]] = [(_coordinate, (settings[ARBITER],))]
    calls += [(_contribute, (settings[p], p, state)) for p in PARTIES]
    threads = [threading.Thread(target=call, args=arguments, daemon=True) for call, arguments in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sent = sum(channel.sent_bytes() for channel in channels.values())
    for channel in channels.values():
        channel.close()
    return sent


def _silent(event: str, **fields: Any) -> None:
    return


def _contribute(setting: Setting, party: str, state: dict[str, Array]) -> None:
    rounds = ContributorDriver(setting, party)
    rounds.start(state)
    losses = {"train_loss_sum": 1234.567890123, "train_tokens": 4321.0}
    for round in rounds:
        round.contribute(state, weight=4321.0, sums=losses)


def _coordinate(setting: Setting) -> None:
    rounds = CoordinatorDriver(setting)
    rounds.start()
    for round in rounds:
        round.publish(round.collect().mean)


# --- the codec ---------------------------------------------------------------------------------------------------


def codec_layouts(size: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """Three updates of `size` MiB: adapters of a 7B model (256 KiB each), of a small model (18 KiB), and blocks."""
    return {
        "lora of a 7B model": {_name(n): (16, 4096) for n in range(4 * size)},
        "lora of a small model": {_name(n): (8, 576) for n in range(size * MIB // (4 * 8 * 576))},
        "four large tensors": {_name(n): (size, 65536) for n in range(4)},
    }


def _name(number: int) -> str:
    layer, projection, side = number // 8, "qkvo"[number // 2 % 4], "AB"[number % 2]
    return f"base_model.model.model.layers.{layer}.self_attn.{projection}_proj.lora_{side}.weight"


def _codec(layout: dict[str, tuple[int, ...]], repeats: int) -> dict[str, float]:
    """Medians in milliseconds, and the speed of the codec over that of a copy."""
    arrays = random_arrays(layout)
    envelope = Envelope("job", "tune", "bank-a", "consortium", "rounds.term", 1, Payload({"weight": 1.0}, arrays))
    view = memoryview(np.random.default_rng(7).bytes(tensor_bytes(arrays)))

    def there_and_back() -> None:
        decode(memoryview(b"".join(encode(envelope, digest=NO_DIGEST))), verify=False)

    copy, codec, digest = _alternate([lambda: bytes(view), there_and_back, lambda: body_digest([view])], repeats)
    return {
        "tensors": len(arrays),
        "copy_ms": 1000 * copy,
        "codec_ms": 1000 * codec,
        "digest_ms": 1000 * digest,
        "speed": copy / codec,
    }


def _alternate(calls: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each call, taken in turn; a first turn does not count."""
    times: list[list[float]] = [[] for _ in calls]
    for number in range(repeats + 1):
        for call, found in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if number:
                found.append(time.perf_counter() - start)
    return [median(found) for found in times]


if __name__ == "__main__":
    sys.exit(main())
