"""Reading and writing parameters that DeepSpeed's ZeRO holds: cut up among the ranks, and in a copy of its own.

Rules:
1. ZeRO steps on a float32 copy and writes the model's parameters from it: what is loaded into the parameters alone is
   undone by the next step. Every load refreshes that copy.
2. In stage 3 a parameter is empty between uses; it is gathered before it is written.
3. Every rank makes these calls, in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["load_zero", "read_zero", "whole_size"]


def whole_size(parameter: torch.nn.Parameter) -> int:
    """Number of values of a parameter, also while ZeRO has cut it up."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def read_zero(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The whole parameter in float32, from the copy that ZeRO steps on."""
    from deepspeed.utils import safe_get_full_fp32_param  # type: ignore[import-not-found]

    found: torch.Tensor | None = safe_get_full_fp32_param(parameter)
    return parameter.detach() if found is None else found.detach()


def load_zero(engine: Any, parameters: Sequence[torch.nn.Parameter], values: Sequence[torch.Tensor]) -> None:
    """Write the values into the parameters and into the copy that ZeRO steps on. engine: the DeepSpeed engine."""
    import torch

    cut_up = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    with _gathered(cut_up), torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            if not cut_up or torch.distributed.get_rank() == 0:
                parameter.copy_(value)
    if hasattr(engine.optimizer, "refresh_fp32_params"):
        engine.optimizer.refresh_fp32_params()
    if not cut_up:
        _load_exact(parameters, values)


def _gathered(parameters: Sequence[torch.nn.Parameter]) -> AbstractContextManager[None]:
    """Whole inside; what rank 0 has written there is everyone's afterwards."""
    if not parameters:
        return nullcontext()
    import deepspeed  # type: ignore[import-not-found]

    found: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0)
    return found


def _load_exact(parameters: Sequence[torch.nn.Parameter], values: Sequence[torch.Tensor]) -> None:
    """A parameter in bfloat16 has rounded the value: its float32 copy gets it whole."""
    import torch
    from deepspeed.utils import safe_set_full_fp32_param  # type: ignore[import-not-found]

    for parameter, value in zip(parameters, values, strict=True):
        if parameter.dtype != torch.float32:
            safe_set_full_fp32_param(parameter, value.to(parameter.device))
