"""A child process: NVFlare's HEModelEncryptor, fed as its filter is in a job, on arrays of the size asked for.

Run by the peer's interpreter, which needs nvflare and tenseal. The context is what its provisioning makes (HEBuilder,
defaults), and one of the same parameters without its secret key; each array becomes a CKKS vector, and its bytes are
what its own serialisation of models writes.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from importlib.metadata import version
from typing import Any

import numpy as np

__all__ = ["main"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--values", type=int, required=True)
    parser.add_argument("--tensors", type=int, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    answer = {mode: _measure(mode, options) for mode in ("secret", "public")}
    print(json.dumps({**answer, "version": version("nvflare"), "tenseal": version("tenseal")}))
    return 0


def _measure(mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """mode: the key that encrypts. CPU seconds of each run but the first, and bytes."""
    import tenseal
    from nvflare.apis.fl_context import FLContext
    from nvflare.app_opt.he.homomorphic_encrypt import serialize_nested_dict
    from nvflare.app_opt.he.model_encryptor import HEModelEncryptor
    from nvflare.lighter.impl.he import HEBuilder

    builder = HEBuilder()
    builder.initialize(None, None)
    context = tenseal.context_from(builder.get_serialized_context(is_client=True))
    if mode == "public":
        context = tenseal.context(builder.scheme_type, 8192, coeff_mod_bit_sizes=builder.coeff_mod_bit_sizes)
        context.global_scale = 2**builder.scale_bits
        context = tenseal.context_from(context.serialize(save_galois_keys=False))
    encryptor = HEModelEncryptor(weigh_by_local_iter=True)
    encryptor.tenseal_context = context
    encryptor.encrypt_layers, encryptor.n_iter = [True], 1.0  # as its START_RUN and the trainer's meta set them
    draw = np.random.default_rng(7)
    sizes = [len(part) for part in np.array_split(np.arange(options.values), options.tensors)]
    seconds, count = [], 0
    for _ in range(options.repeats + 1):
        model = {f"layer{place}": draw.uniform(-1, 1, size).astype(np.float32) for place, size in enumerate(sizes)}
        started = time.process_time()
        made, _ = encryptor.encryption(model, FLContext())
        written = serialize_nested_dict(made)
        seconds.append(time.process_time() - started)
        count = sum(len(raw) for raw in written.values())
    return {"seconds": seconds[1:], "bytes": count, "holds_the_secret_key": context.is_private()}


if __name__ == "__main__":
    sys.exit(main())
