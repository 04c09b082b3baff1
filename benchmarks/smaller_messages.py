"""What the wire hooks save and cost: bytes over those of float32, and milliseconds for 10 million values.

Noise: normal values, every thousandth a hundred times as large. With --adapter also the values of an adapter that a
job has trained (its PEFT folder).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
from _measure import Ratio, finish, make_parser, median

from fate_llm.core import plugins
from fate_llm.core.values import Arrays, Payload
from fate_llm.protocols.tensors import read_tensors, write_tensors

COMBINATIONS = (("zstd",), ("bf16",), ("bf16", "zstd"), ("int8",), ("int8", "zstd"))
VALUES = 10_000_000


def noise(count: int) -> Arrays:
    values = np.random.default_rng(7).normal(size=count).astype(np.float32)
    values[::1000] *= 100
    return {"values": values}


def adapter(folder: Path) -> Arrays:
    content = (folder / "adapter_model.safetensors").read_bytes()
    return {name: array.astype(np.float32) for name, array in read_tensors(memoryview(content)).items()}


def size(payload: Payload) -> int:
    return sum(len(part) for part in write_tensors(payload.tensors))


def once(names: tuple[str, ...], arrays: Arrays) -> tuple[float, float, float]:
    """Bytes over plain ones, and seconds of encoding and of decoding, with fresh hooks."""
    hooks = [plugins.load("hook", name) for name in names]
    made = [hook(hook.Params(), **({"seed": 7} if hook.draws else {})) for hook in hooks]
    payload = Payload({}, arrays)
    form = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    forms = []
    began = time.perf_counter()
    for hook in made:
        forms.append(form)
        payload = hook.encode(payload, 1)
        form = hook.form(form) or form
    encoded, sent = time.perf_counter(), size(payload)
    for hook, before in zip(reversed(made), reversed(forms), strict=True):
        payload = hook.decode(payload, before)
    ended = time.perf_counter()
    return sent / size(Payload({}, arrays)), encoded - began, ended - encoded


def main() -> int:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--adapter", type=Path, default=None, help="PEFT folder of a trained adapter")
    parser.add_argument("--repeats", type=int, default=5, help="how often each is timed; medians count")
    options = parser.parse_args()
    inputs = {"noise": noise(10_000 if options.quick else VALUES)}
    if options.adapter is not None:
        inputs["adapter"] = adapter(options.adapter)
    details: dict[str, dict[str, dict[str, float]]] = {}
    for what, arrays in inputs.items():
        scale = VALUES / sum(array.size for array in arrays.values())
        for names in COMBINATIONS:
            runs = [once(names, arrays) for _ in range(1 if options.quick else options.repeats)]
            ratio, encode, decode = (median(column) for column in zip(*runs, strict=True))
            found = {"bytes": ratio, "encode_ms": 1000 * encode * scale, "decode_ms": 1000 * decode * scale}
            details.setdefault(what, {})[" ".join(names)] = found
            shown = f"{100 * ratio:.0f} % of the bytes, {found['encode_ms']:.0f} and {found['decode_ms']:.0f} ms"
            print(f"{what}, {' '.join(names)}: {shown}", flush=True)
    ratios = [
        Ratio(f"bytes of noise with {name} over float32", details["noise"][name]["bytes"], limit)
        for name, limit in (("bf16", 0.51), ("int8", 0.26), ("zstd", 1.0))
    ]
    return finish(options, "smaller_messages", ratios, {**details, "repeats": options.repeats})


if __name__ == "__main__":
    sys.exit(main())
