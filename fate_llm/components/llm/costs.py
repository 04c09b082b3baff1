"""What a training or scoring task will cost, told from headers of files alone, before anything runs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fate_llm.core import plugins
from fate_llm.core.errors import ModelError
from fate_llm.core.interfaces import Estimate, Form, PlanView, Traffic
from fate_llm.protocols.tensors import container_bytes

from .adapters import planned_layout
from .modelref import ModelShapes, locate, read_shapes

__all__ = ["PLAIN_PROCESS", "hidden_bytes", "scoring_cost", "sum_traffic", "training_cost"]

ENVELOPE = 600  # bytes of an envelope's header with its names, digest and sums: seen 420 to 720
WORD = 4  # bytes of a masked value
CIPHERTEXT, SLOTS = 131_217, 4096  # bytes of one, as TenSEAL writes it, and values in it
NUMBERS = 64  # slots that weight and metric sums take, about
PEER = 400  # bytes of one peer's keys, shares and signatures in a round each way: seen 350 to 450
HANDSHAKE = 1600  # bytes of the envelopes and names of a round of secure aggregation each way
CONTEXT = 264_000  # bytes of a public context of homomorphic aggregation
LIBRARIES = 650 * 2**20  # resident bytes of the interpreter with torch, transformers and peft
PLAIN_PROCESS = 90 * 2**20  # resident bytes of the interpreter with this package, without torch
PER_PARTY = 6 * 2**20  # a module tree of one's own, optimiser and trainer objects beside the tensors


def training_cost(view: PlanView) -> Estimate:
    """Messages and memory of a homo_llm_trainer task; unknown where the model's files are not on this machine."""
    params = next(iter(view.params.values()))
    shapes = _shapes(params, view)
    layout = planned_layout(shapes, params.peft) if shapes else None
    if shapes is None or layout is None:
        return Estimate(_exchanges(view, params.rounds, None), notes=("the model's shapes are not known here",))
    plain: Form = {name: (np.dtype(np.float32), shape) for name, shape in layout.items()}
    sent, more = _on_the_wire(plain, params.hooks)
    size, values = container_bytes(plain) + ENVELOPE, _count(layout)
    memory, note = _memory(view, params, shapes, values)
    # A coordinator holds the state, the sum, the mean and at most every early term, as float32.
    coordinator = PLAIN_PROCESS + size * (3 + len(view.cohort.contributors))
    protection = plugins.load("sum", params.protection)
    if not protection.hides_terms:
        exchanges = _exchanges(view, params.rounds, size, container_bytes(sent) + ENVELOPE)
        return Estimate(exchanges, memory, coordinator, (note, *more))
    update = hidden_bytes(protection, values) + ENVELOPE
    exchanges = (*_exchanges(view, params.rounds, size, update), *_protecting(view, protection, params.rounds, values))
    return Estimate(exchanges, memory, coordinator, (note, *more))


def hidden_bytes(protection: Any, values: int) -> int:
    """Bytes of a term of so many values, masked or encrypted."""
    if not protection.needs_key_holder:
        return values * WORD
    return math.ceil((values + NUMBERS) / SLOTS) * CIPHERTEXT


def _protecting(view: PlanView, protection: Any, rounds: int, values: int) -> Iterator[Traffic]:
    """What goes to and fro besides the terms: keys, shares and signatures among all, or a sum to be opened."""
    coordinator, holder = view.cohort.coordinator, view.roster.key_holder
    others = [party for party in view.cohort.contributors if party != coordinator]
    if not protection.needs_key_holder:
        size = PEER * len(view.cohort.contributors) + HANDSHAKE
        yield from (Traffic(party, coordinator, "keys, shares, signatures", rounds, size) for party in others)
        yield from (Traffic(coordinator, party, "keys, shares, signatures", rounds, size) for party in others)
        return
    yield from (Traffic(coordinator, party, "the key to encrypt with", rounds, CONTEXT) for party in others)
    sealed = hidden_bytes(protection, values) + ENVELOPE
    if values == 0:
        yield from (Traffic(party, coordinator, "encrypted sums", rounds, sealed) for party in others)
    if holder is not None:
        yield Traffic(holder, coordinator, "the key to encrypt with", rounds, CONTEXT)
        yield Traffic(coordinator, holder, "sum to be opened", rounds, sealed)
        yield Traffic(holder, coordinator, "opened sum", rounds, values * WORD + ENVELOPE)


def _on_the_wire(form: Form, hooks: Sequence[Any]) -> tuple[Form, tuple[str, ...]]:
    """Dtypes and shapes of an update as it travels, and what is not known beforehand. hooks: references by name."""
    notes: list[str] = []
    found = [(plugins.load("hook", ref.name), ref) for ref in hooks]
    for hook, ref in sorted(found, key=lambda item: item[0].stage):
        if not hook.stage.on_the_wire:
            continue
        made = hook(hook.Params(**ref.params), **({"seed": 0} if hook.draws else {}))
        after = made.form(form)
        if after is None:
            notes.append(f"updates are at most this large: what {ref.name} saves depends on the values")
        else:
            form = after
    return form, tuple(notes)


def scoring_cost(view: PlanView) -> Estimate:
    """Messages and memory of scoring models on a party's own records; the models' makers say how large they are."""
    params = next(iter(view.params.values()))
    makers = [made for key, found in view.upstream.items() if key.startswith("model") for made in found.values()]
    trained = [made for _, made in makers if hasattr(made, "model") and hasattr(made, "loading")]
    shapes = _shapes(trained[0], view) if trained else None
    tokens, note = _longest_batch(view, params, "data")
    if shapes is None or tokens is None:
        return Estimate(sum_traffic(view), None, PLAIN_PROCESS, (note if shapes else "the models are not known here",))
    activations = tokens * (20 * shapes.hidden + 2 * shapes.vocabulary) * 4
    memory = LIBRARIES + PER_PARTY + shapes.parameters * _width(params.loading.dtype) + activations
    return Estimate(sum_traffic(view), memory, PLAIN_PROCESS, (note,))


def _width(dtype: str) -> int:
    return {"bfloat16": 2, "float16": 2}.get(dtype, 4)


def _shapes(params: Any, view: PlanView) -> ModelShapes | None:
    try:
        return read_shapes(locate(params.model, lambda path: view.base / path))
    except ModelError:
        return None


def _count(layout: Mapping[str, tuple[int, ...]]) -> int:
    total = 0
    for shape in layout.values():
        size = 1
        for n in shape:
            size *= n
        total += size
    return total


def _exchanges(view: PlanView, rounds: int, size: int | None, update: int | None = None) -> tuple[Traffic, ...]:
    """Hello, the first state, a term and a state every round, and the closing sum, party by party.

    size: bytes of a state's message. update: bytes of an update's.
    """
    found: list[Traffic] = []
    coordinator = view.cohort.coordinator
    for index, party in enumerate(view.cohort.contributors):
        if party == coordinator:
            continue
        if index == 0:
            found.append(Traffic(party, coordinator, "first state", 1, size))
        else:
            found.append(Traffic(party, coordinator, "hello", 1, ENVELOPE))
        found.append(Traffic(coordinator, party, "first state", 1, size))
        found.append(Traffic(party, coordinator, "update", rounds, update))
        found.append(Traffic(coordinator, party, "new state", rounds, size))
    return (*found, *sum_traffic(view))


def sum_traffic(view: PlanView) -> tuple[Traffic, ...]:
    """Messages of one sum of numbers outside the rounds: two each way, and what its protection needs."""
    coordinator, params = view.cohort.coordinator, next(iter(view.params.values()))
    others = [party for party in view.cohort.contributors if party != coordinator]
    up = [Traffic(party, coordinator, "sums", 2, ENVELOPE) for party in others]
    down = [Traffic(coordinator, party, "sums", 2, ENVELOPE) for party in others]
    protection = plugins.load("sum", params.protection)
    return (*up, *down, *(_protecting(view, protection, 1, 0) if protection.hides_terms else ()))


def _memory(view: PlanView, params: Any, shapes: ModelShapes, trainable: int) -> tuple[int | None, str]:
    """Peak resident bytes of one party's own process."""
    tokens, note = _longest_batch(view, params, "train")
    if tokens is None:
        return None, note
    width = _width(params.loading.dtype)
    weights = shapes.parameters * width
    full = params.peft.method == "full"
    state = trainable * 4 * (4 if full else 6)  # weights or copies, gradient, two moments, global state, update
    per_layer = 14 * shapes.hidden + 5 * shapes.intermediate
    kept = per_layer * (2 if params.gradient_checkpointing else shapes.layers)
    logits = 3 * shapes.vocabulary * 4  # logits, their float32 copy, their gradient
    return LIBRARIES + PER_PARTY + weights + state + tokens * (kept * width + logits), note


def _longest_batch(view: PlanView, params: Any, port: str) -> tuple[int | None, str]:
    """Tokens of the widest batch: from the largest data file on this machine at 3.5 characters a token."""
    behind = [makers for key, makers in view.upstream.items() if key.partition(".")[0] == port]
    paths = [path for makers in behind for maker in makers.values() for path in _data_paths(maker, view)]
    longest = max((_longest_record(path) for path in paths), default=0)
    if not longest:
        return None, "memory: the data is not on this machine, so the length of a record is not known"
    length = min(params.max_length, int(longest / 3.5) + 12)
    return length * params.batch_size, f"memory: records of at most {length} tokens in batches of {params.batch_size}"


def _data_paths(maker: tuple[str, Any], view: PlanView) -> list[Path]:
    _, params = maker
    path = getattr(params, "path", None)
    file = view.base / path if isinstance(path, str) else None
    return [file] if file is not None and file.is_file() and file.suffix == ".jsonl" else []


def _longest_record(path: Path, most: int = 10_000) -> int:
    """Characters of values of the longest of the first records of a JSONL file."""
    longest = 0
    with path.open(encoding="utf-8", errors="replace") as stream:
        for _, line in zip(range(most), stream, strict=False):
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                longest = max(longest, sum(len(v) for v in record.values() if isinstance(v, str)))
    return longest
