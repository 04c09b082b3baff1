"""One rank of a party in a made-up federation: `torchrun ... ranked_party.py FOLDER PARAMS MODEL_DATA [PLACE NUMBER]`.

Rank 0 kills itself (SIGKILL) at PLACE NUMBER, see `journaled_rounds`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from fate_llm.components.homo_llm_trainer import HomoLlmTrainer
from fate_llm.core.values import Artifact, ArtifactKind
from fate_llm.runtime.launch import _die_with_parent
from tests.components.journaled_rounds import Federation, run_party


def main(folder: str, params: str, data: str, place: str = "", number: str = "0") -> None:
    _die_with_parent()

    def kill(where: str, at: int) -> None:
        if (where, at) == (place, int(number)) and os.environ.get("RANK", "0") == "0":
            os.kill(os.getpid(), signal.SIGKILL)

    inputs = {name: Artifact(ArtifactKind.DATASET, Path(data) / name, name, "bank-a") for name in ("train", "test")}
    run_party(
        Path(folder), Federation(kill=kill), HomoLlmTrainer.Params.model_validate_json(params), inputs, journal=True
    )
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(json.dumps({"ended": folder}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
