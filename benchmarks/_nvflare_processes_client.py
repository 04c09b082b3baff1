"""NVFlare's side of an echo round, at a site: send back what came."""

from __future__ import annotations

import nvflare.client as flare

__all__ = ["main"]


def main() -> None:
    flare.init()
    while flare.is_running():
        model = flare.receive()
        if model is None:
            break
        flare.send(flare.FLModel(params=model.params, params_type=model.params_type))


if __name__ == "__main__":
    main()
