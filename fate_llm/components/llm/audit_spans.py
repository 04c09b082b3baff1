"""The span test: which tokens are in a LoRA update, told from the update alone.

An adapted layer computes W·x + s·B·A·x. The gradient of A is s·Bᵀ·Δᵀ·X, so its rows are combinations of the inputs X
that the layer saw; that of B is s·Δᵀ·X·Aᵀ, combinations of A·X. In the first attention block an input is a function
of one token (its embedding, normalised), so whoever knows the model can try the whole vocabulary and see which
inputs lie in the span (the idea of DAGER, Petrov et al. 2024). It is exact while there are fewer distinct tokens than
independent rows; beyond that, and where an optimizer has changed the rows, the tokens of the batch still lie nearer
to the span than others do.

Inputs of a real model all point in about the same direction, which drowns that. Both sides are therefore whitened by
the second moment of the vocabulary's inputs: a linear map keeps what lies in a span, and makes all else look alike.

Attack code for a party's experiment on its own data; nothing here is used to train or to aggregate.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fate_llm.core.errors import ModelError
from fate_llm.core.values import Array, Arrays

if TYPE_CHECKING:
    import torch

__all__ = [
    "Findings",
    "FirstLayers",
    "Guess",
    "Lens",
    "Side",
    "Span",
    "distances",
    "find_first_layers",
    "findings",
    "make_lens",
    "row_basis",
    "second_moment",
    "span",
]

Side = Literal["A", "B"]
CHUNK = 4096  # tokens of the vocabulary tried at once: some 10 MB of inputs
SMALLEST = 1e-6  # of the largest singular value: below are only rounding errors of float32
RIDGE = 0.1  # of the median eigenvalue: directions that no token uses much are not blown up


@dataclass(frozen=True, slots=True, repr=False)
class FirstLayers:
    """The adapted layers that see single tokens, all of them the same input.

    modules: wire names without `.lora_A.weight`. vocabulary: how many tokens there are to try.
    inputs: the layers' input, float32 [n, width], of n token ids at one position.
    positions: positions that make a difference to the input; only the first when none does.
    """

    modules: tuple[str, ...]
    vocabulary: int
    inputs: Callable[[Array, int], Array]
    positions: range


class _SeenError(Exception):
    """The input is known: the rest of the forward pass is not needed."""


def find_first_layers(model: Any, batch: Mapping[str, torch.Tensor]) -> FirstLayers:
    """The layers to test, found by watching one forward pass of a batch [records, length].

    Raises:
        ModelError: the first adapted layer sees a mixture of tokens, or the model takes no positions.
    """
    import torch

    if "position_ids" not in inspect.signature(model.get_base_model().forward).parameters:
        raise ModelError(
            f"the span test needs a model that takes position_ids; {type(model.get_base_model()).__name__} does not"
        )
    seen = _watch(model, batch)
    names = tuple(name for name, tensor in seen if tensor is seen[0][1])
    first = model.get_submodule(seen[0][0])

    def inputs(tokens: Array, position: int) -> Array:
        ids = torch.from_numpy(np.asarray(tokens, dtype=np.int64)).to(model.device)[:, None]
        found = _stop_at(model, first, ids, torch.full_like(ids, position))
        return np.asarray(found[:, 0].float().cpu().numpy(), dtype=np.float32)

    longest = int(batch["attention_mask"].sum(dim=1).max())
    some = np.unique(batch["input_ids"].cpu().numpy())[:16]
    moves = longest > 1 and not np.array_equal(inputs(some, 0), inputs(some, 1))
    layers = FirstLayers(
        names, int(model.get_input_embeddings().weight.shape[0]), inputs, range(longest if moves else 1)
    )
    _require_single_tokens(layers, batch, seen[0][1].float().cpu().numpy())
    return layers


def _watch(model: Any, batch: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """Adapted layers in the order in which a forward pass reaches them, each with its input."""
    import torch

    seen: list[tuple[str, torch.Tensor]] = []
    adapted = [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]

    def note(name: str) -> Callable[..., None]:
        return lambda module, args: seen.append((name, args[0]))

    handles = [module.register_forward_pre_hook(note(name)) for name, module in adapted]
    try:
        with torch.no_grad(), _evaluating(model):
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _stop_at(model: Any, module: Any, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The module's input for token ids [n, 1]; nothing behind it is computed."""
    import torch

    found: list[torch.Tensor] = []

    def stop(module: Any, args: tuple[Any, ...]) -> None:
        found.append(args[0])
        raise _SeenError

    handle = module.register_forward_pre_hook(stop)
    try:
        with torch.no_grad(), _evaluating(model):
            model(input_ids=ids, position_ids=positions, use_cache=False)
    except _SeenError:
        pass
    finally:
        handle.remove()
    return found[0]


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


def _require_single_tokens(layers: FirstLayers, batch: Mapping[str, torch.Tensor], real: Array) -> None:
    """What the layers saw in the batch is what they see of each token alone. real: [records, length, width]."""
    ids, mask = batch["input_ids"].cpu().numpy(), batch["attention_mask"].cpu().numpy()
    for position in range(ids.shape[1]):
        rows = np.flatnonzero(mask[:, position])
        alone = layers.inputs(ids[rows, position], position)
        if not np.allclose(real[rows, position], alone, rtol=1e-2, atol=1e-2 * float(np.abs(alone).max())):
            raise ModelError(
                f"the first adapted layer, {layers.modules[0]}, sees mixtures of tokens: the span test does not apply",
                hint="Adapt a projection of the attention's input, such as q_proj or v_proj, in peft.target_modules.",
            )


# --- spans -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, repr=False)
class Lens:
    """How one side of an update is looked at.

    parts: wire names of arrays whose rows share a space of m dimensions; their whitening [m, m]; and the map
    [m, width] of a layer's input into that whitened space.
    """

    parts: tuple[tuple[tuple[str, ...], Array, Array], ...]


@dataclass(frozen=True, slots=True, repr=False)
class Span:
    """Subspaces in which inputs are looked for. parts: (map [m, width] of an input, orthonormal rows [k, m])."""

    parts: tuple[tuple[Array, Array], ...]

    @property
    def dimension(self) -> int:
        """Independent directions, of all parts together."""
        return sum(len(basis) for _, basis in self.parts)

    def distances(self, see: Callable[[Array], Array], count: int) -> Array:
        """Distance of each of `count` inputs to the span over its length, 0 to 1, in the part where it is least.

        A part that is the whole space says nothing of any token, and does not count; without any other, all are 1.
        see: inputs through a map, each of length 1.
        """
        outside = np.ones(count)
        for into, basis in self.parts:
            if len(basis) < basis.shape[1]:
                inside = see(into) @ basis.T
                np.minimum(outside, 1.0 - np.einsum("ij,ij->i", inside, inside), out=outside)
        return np.sqrt(np.maximum(outside, 0.0))


def second_moment(layers: FirstLayers, check: Callable[[], None]) -> Array:
    """Mean of x·xᵀ over the vocabulary's inputs at the first position, [width, width] float64."""
    total: Array | None = None
    for tokens in _chunks(layers.vocabulary):
        check()
        inputs = layers.inputs(tokens, layers.positions[0])
        part = (inputs.T @ inputs).astype(np.float64)
        total = part if total is None else total + part
    assert total is not None
    return np.asarray(total / layers.vocabulary)


def make_lens(layers: FirstLayers, moment: Array, state: Arrays, side: Side) -> Lens:
    """state: the global state that an update starts from; the coordinator has it. moment: see `second_moment`."""
    if side == "A":
        names, whitening = tuple(f"{module}.lora_A.weight" for module in layers.modules), _whitening(moment)
        return Lens(((names, whitening, whitening.astype(np.float32)),))
    parts = []
    for module in layers.modules:
        down = state[f"{module}.lora_A.weight"].astype(np.float64)
        whitening = _whitening(down @ moment @ down.T)
        parts.append(((f"{module}.lora_B.weight",), whitening, (whitening @ down).astype(np.float32)))
    return Lens(tuple(parts))


def _whitening(moment: Array) -> Array:
    """(moment + ridge)^(-1/2), symmetric."""
    values, vectors = np.linalg.eigh(moment)
    ridge = RIDGE * max(float(np.median(values)), float(np.finfo(np.float32).tiny))
    return np.asarray((vectors / np.sqrt(np.maximum(values, 0.0) + ridge)) @ vectors.T)


def row_basis(matrices: Sequence[Array]) -> Array:
    """Orthonormal rows [k, m] that span the rows of all matrices, each brought to spectral norm 1 before."""
    scaled = []
    for matrix in matrices:
        norm = float(np.linalg.norm(matrix, 2))
        if norm > 0:
            scaled.append(matrix / norm)
    if not scaled:
        return np.zeros((0, matrices[0].shape[1]), dtype=np.float32)
    _, strengths, rows = np.linalg.svd(np.concatenate(scaled), full_matrices=False)
    return np.asarray(rows[strengths > SMALLEST * strengths[0]], dtype=np.float32)


def span(update: Arrays, lens: Lens) -> Span:
    """The span that an update shows through a lens."""
    return Span(
        tuple(
            (into, row_basis([update[name].astype(np.float64) @ whitening for name in names]))
            for names, whitening, into in lens.parts
        )
    )


def distances(spans: Sequence[Span], layers: FirstLayers, check: Callable[[], None]) -> list[Array]:
    """Distance of every token of the vocabulary to each of the spans, at the position where it is least.

    check: called between pieces of the work.
    """
    found = [np.ones(layers.vocabulary) for _ in spans]
    for position in layers.positions:
        for tokens in _chunks(layers.vocabulary):
            check()
            inputs = layers.inputs(tokens, position)
            seen: dict[int, Array] = {}

            def see(into: Array, inputs: Array = inputs, seen: dict[int, Array] = seen) -> Array:
                if id(into) not in seen:
                    seen[id(into)] = _unit(inputs @ into.T)
                return seen[id(into)]

            for one, all_of_it in zip(spans, found, strict=True):
                part = all_of_it[tokens[0] : tokens[-1] + 1]
                np.minimum(part, one.distances(see, len(tokens)), out=part)
    return found


def _chunks(count: int) -> Iterator[Array]:
    return (np.arange(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))


def _unit(vectors: Array) -> Array:
    lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    return np.asarray(vectors / np.maximum(lengths, np.finfo(np.float32).tiny)[:, None])


# --- what was found ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Guess:
    """Tokens named by a threshold. named: how many; hits: those of the batch among them.

    blind: hits to be expected when as many tokens are drawn blindly.
    """

    named: int
    hits: int
    blind: float

    @property
    def precision(self) -> float | None:
        """None when no token was named."""
        return self.hits / self.named if self.named else None


@dataclass(frozen=True, slots=True)
class Findings:
    """How well distances tell the tokens of a batch from all others.

    tokens: distinct tokens of the batch. inside: those within the tolerance. nearest: as many as the batch has
    (more where distances are equal). auc: probability that a token of the batch is nearer than another.
    """

    tokens: int
    inside: Guess
    nearest: Guess
    auc: float

    @property
    def recall(self) -> float:
        return self.inside.hits / self.tokens

    @property
    def precision(self) -> float | None:
        return self.inside.precision


def findings(found: Array, true: Array, tolerance: float) -> Findings:
    """found: distance of every token. true: ids of the batch, each once and fewer than the vocabulary."""
    others = np.sort(np.delete(found, true))
    nearer, not_farther = (np.searchsorted(others, found[true], side=side) for side in ("left", "right"))
    auc = 1.0 - float((nearer + not_farther).mean()) / (2 * len(others))
    nearest = float(np.partition(found, len(true) - 1)[len(true) - 1])
    return Findings(len(true), _guess(found, true, tolerance), _guess(found, true, nearest), auc)


def _guess(found: Array, true: Array, threshold: float) -> Guess:
    named, hits = int((found <= threshold).sum()), int((found[true] <= threshold).sum())
    return Guess(named, hits, named * len(true) / len(found))
