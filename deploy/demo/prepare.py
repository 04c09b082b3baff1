"""Makes the demo's federation: keys, certificates, rosters, policies and catalogues of three parties and a broker.

`fate_llm federation init` writes the files; then every party gets the demo's policy, a catalogue with its share of the
demo's data, and an address for its API. In containers the files are spread over volumes, each given to who runs there.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import importlib.resources
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

__all__ = ["API_PORT", "BROKER_USER", "PARTIES", "PARTY_USER", "command_line", "prepare", "spread"]

PARTIES = ("bank-a", "bank-b", "bank-c")
API_PORT = 8470
PARTY_USER = 10001
"""User and group of the party's image."""
BROKER_USER = 999
"""User and group `rabbitmq` of the broker's image."""

_HERE = Path(__file__).resolve().parent
_COMPLETE = ".complete"  # the last file that is written to the volumes


def prepare(
    folder: Path,
    *,
    broker: str,
    api: Mapping[str, tuple[str, int]],
    config_folder: str = "/etc/rabbitmq",
    disk_free: str = "1GB",
) -> None:
    """Write everything into `folder`, which is new. broker: HOST:PORT. api: host and port by party.

    Raises:
        subprocess.CalledProcessError: `federation init` refused; it has said why.
    """
    words = ["federation", "init", "--name", "demo", "--broker", broker, "--out", str(folder)]
    words += [word for party in PARTIES for word in ("--party", party)]
    words += ["--config-folder", config_folder, "--disk-free", disk_free]
    subprocess.run([sys.executable, "-m", "fate_llm", *words], check=True, stdout=subprocess.DEVNULL)
    for party in PARTIES:
        home = folder / "parties" / party
        (home / "state").mkdir(mode=0o700, exist_ok=True)
        host, port = api[party]
        settings = yaml.safe_load((home / "party.yaml").read_text(encoding="utf-8"))
        settings["api"] = {**settings.get("api", {}), "host": host, "port": port}
        _write(home / "party.yaml", settings)
        _write(home / "catalog.yaml", _catalog(party))
        shutil.copyfile(_HERE / "policy.yaml", home / "policy.yaml")


def _catalog(party: str) -> dict[str, Any]:
    data = importlib.resources.files("fate_llm.pipelines.data") / f"{party.replace('-', '_')}.jsonl"
    entry = {"path": str(data), "kind": "dataset", "description": "Requests of customers, and the desk for each."}
    return {"version": 1, "entries": {"requests": entry}}


def _write(path: Path, value: Any) -> None:
    path.write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")


def spread(folder: Path, out: Path) -> None:
    """Copy each party's home to `out`/<party>, the broker's files to `out`/broker, and give them to their users."""
    places = {folder / "parties" / party: (out / party, PARTY_USER) for party in PARTIES}
    places[folder / "brokers" / "shared"] = (out / "broker", BROKER_USER)
    for source, (target, user) in places.items():
        shutil.copytree(source, target, dirs_exist_ok=True)
        for path in (target, *target.rglob("*")):
            os.chmod(path, 0o700 if path.is_dir() else 0o600)
            os.chown(path, user, user)
    (out / PARTIES[0] / _COMPLETE).touch(mode=0o600)


def command_line() -> argparse.ArgumentParser:
    """What compose.yaml runs."""
    parser = argparse.ArgumentParser(description="Make the files of the demo's federation.")
    parser.add_argument("folder", type=Path, help="where they are made; new")
    parser.add_argument("--broker", required=True, metavar="HOST:PORT")
    parser.add_argument("--api-host", default="127.0.0.1")
    parser.add_argument("--spread", type=Path, metavar="FOLDER", help="copy them to the volumes mounted here")
    return parser


def main() -> int:
    """Make the files."""
    options = command_line().parse_args()
    if options.spread is not None and (options.spread / PARTIES[0] / _COMPLETE).exists():
        print("the federation is there already, and stays")
        return 0
    prepare(options.folder, broker=options.broker, api=dict.fromkeys(PARTIES, (options.api_host, API_PORT)))
    if options.spread is not None:
        spread(options.folder, options.spread)
    print(f"made a federation of {', '.join(PARTIES)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
