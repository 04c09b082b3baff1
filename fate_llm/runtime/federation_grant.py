"""Gives a party its place on a broker that is there already: the rabbitmqctl commands, and running them.

They can be run again at any time. A party's user can do nothing until the last of them: what may be read is said before
the permission to log in to the virtual host. They hold a password's hash, never the password.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fate_llm.protocols import broker_layout as layout
from fate_llm.security.randomness import random_bytes, random_id

from .broker import run_ctl
from .federation import Federation, read_password, write_new
from .federation_broker import SALT_BYTES, password_hash, place_of, user_entry

__all__ = ["CtlCommand", "grant_commands", "hash_of", "run_commands"]

_PASSWORD = 24  # bytes of randomness


@dataclass(frozen=True, slots=True)
class CtlCommand:
    """Words for rabbitmqctl, and what it reads on its standard input."""

    words: tuple[str, ...]
    text: str | None = None

    def shown(self, ctl: Sequence[str]) -> str:
        """As a person would type it into a shell."""
        line = shlex.join([*ctl, *self.words])
        return line if self.text is None else f"{line} <<'END'\n{self.text}\nEND"


def hash_of(path: Path) -> str:
    """A salted hash of the password in a file, which is made (mode 0600) with a new one when it is not there.

    Raises:
        ConfigurationError: the file cannot be written, or is not one that only its owner may read.
    """
    if not path.exists():
        write_new(path, f"{random_id(_PASSWORD)}\n".encode("ascii"))
    return password_hash(read_password(path), salt=random_bytes(SALT_BYTES))


def grant_commands(federation: Federation, party: str, *, hashed: str | None, quorum: bool = False) -> list[CtlCommand]:
    """What gives `party` its user, standing inbox and permissions, on the shared broker or on its own.

    hashed: the password, as `hash_of` gives it; None leaves a user that is there as it is, for when
    the roster has grown. quorum: the broker has several nodes.

    Raises:
        ConfigurationError: no such party in the roster.
    """
    federation.member(party)
    members, vhost = federation.members, federation.vhost
    place = place_of(federation, (party,), quorum=quorum)
    if hashed is not None:
        place["users"] = [user_entry(party, hashed)]
    rights = layout.permissions_of(party, members)
    return [
        CtlCommand(("import_definitions",), json.dumps(place, indent=2, sort_keys=True)),
        *(
            CtlCommand(("set_topic_permissions", "-p", vhost, party, topic.exchange, topic.write, topic.read))
            for topic in layout.topic_permissions_of(party, members)
        ),
        CtlCommand(("set_permissions", "-p", vhost, party, rights.configure, rights.write, rights.read)),
    ]


def run_commands(commands: Sequence[CtlCommand], ctl: Sequence[str]) -> None:
    """Run them one after the other with a rabbitmqctl, which may have sudo, ssh or docker exec before it.

    Raises:
        ConfigurationError: one failed; those after it were not run.
    """
    for command in commands:
        run_ctl(ctl, command.words, text=command.text)
