"""The home of a party, as far as its stores look at it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fate_llm.security.identity import Identity

__all__ = ["make_home"]


def make_home(home: Path, **settings: Any) -> Path:
    """party.yaml of bank-a, and a roster with bank-b. settings: more keys of party.yaml."""
    home.mkdir(parents=True)
    keys = {party: Identity.from_bytes(bytes([at]) * 32) for at, party in enumerate(("bank-a", "bank-b"), start=1)}
    broker = {"host": "broker.example", "port": 5671}
    parties = {party: {"identity": key.public.to_text(), "broker": broker} for party, key in keys.items()}
    roster = {"version": 1, "name": "loans", "vhost": "loans", "topology": "shared", "parties": parties}
    (home / "federation.yaml").write_text(yaml.safe_dump(roster, sort_keys=False))
    party = {
        "version": 1,
        "party": "bank-a",
        "federation": "federation.yaml",
        "identity": "identity.key",
        "broker": "amqps://bank-a@broker.example:5671/loans",
    }
    (home / "party.yaml").write_text(yaml.safe_dump({**party, **settings}, sort_keys=False))
    return home
