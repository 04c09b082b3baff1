"""What a broker of a federation is configured with: rabbitmq.conf, enabled_plugins, definitions.json, as text.

With one broker per party (`per-party`), RabbitMQ's federation plug-in links them over TLS: on A's broker the exchange
`fate.from.B` is fed from B's broker. Federation, not shovels, because it copies bindings upstream key by key: only
what is addressed to an inbox that exists at A waits at B for A, and B's mandatory publishing tells B at once when there
is no such inbox. A shovel would move a queue bound to every key of A, and what no inbox takes there would be lost after
B had its confirm. The link acknowledges at B after A's broker has confirmed (`on-confirm`).
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import quote, urlencode

from fate_llm.protocols import broker_layout as layout

from .federation import Federation

__all__ = [
    "CONFIG_FOLDER",
    "DISK_FREE",
    "SALT_BYTES",
    "BrokerLimits",
    "broker_definitions",
    "broker_plugins",
    "password_hash",
    "place_of",
    "rabbitmq_conf",
    "user_entry",
]

CONFIG_FOLDER = "/etc/rabbitmq"
"""Where Debian's broker looks for its configuration."""

DISK_FREE = "2GB"
"""Publishing pauses below this."""

_LINK_PREFETCH = 16  # messages on their way over a link: with chunks of 4 MiB, at most 64 MiB in each broker
_LINK_PAUSE = 5  # seconds between a link's attempts
SALT_BYTES = 4
"""Of RabbitMQ's password hashes."""


@dataclass(frozen=True, slots=True)
class BrokerLimits:
    """What an operator may want otherwise. folder: where the files lie on the broker's machine."""

    folder: str = CONFIG_FOLDER
    client_certificates: bool = False
    memory_share: float = 0.5
    disk_free: str = DISK_FREE
    message_bytes: int = 16 * 1024 * 1024


def password_hash(password: str, *, salt: bytes) -> str:
    """RabbitMQ's salted SHA-256: base64 of salt (4 bytes, from the operating system) and digest."""
    if len(salt) != SALT_BYTES:
        raise ValueError(f"a salt of {len(salt)} bytes; the format has {SALT_BYTES}")
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode("utf-8")).digest()).decode("ascii")


def user_entry(name: str, hashed: str) -> dict[str, Any]:
    """A user in definitions: without tags, so that it can do nothing but use a broker."""
    return {"name": name, "password_hash": hashed, "hashing_algorithm": "rabbit_password_hashing_sha256", "tags": []}


def broker_plugins(federation: Federation) -> tuple[str, ...]:
    """Plug-ins beyond the bare broker."""
    return ("rabbitmq_federation",) if federation.topology == "per-party" else ()


def rabbitmq_conf(federation: Federation, owner: str | None, limits: BrokerLimits, *, port: int) -> str:
    """The broker's configuration. owner: the party whose broker it is; None for the shared one."""
    where = f"the broker of {owner}" if owner else "the shared broker"
    return _CONF.format(
        title=f"Federation {federation.name}: {where}. RabbitMQ 3.10 or newer.",
        cluster=owner or f"fate.{federation.name}",
        port=port,
        folder=limits.folder.rstrip("/"),
        demand=str(limits.client_certificates).lower(),
        memory=limits.memory_share,
        disk=limits.disk_free,
        message=limits.message_bytes,
    )


_CONF = """\
# {title}

# The name that links between brokers use for this one: users' permissions at the others rest on it.
cluster_name = {cluster}

# TLS only; no listener without it. TLS 1.2 or newer.
listeners.tcp = none
listeners.ssl.default = {port}
ssl_options.cacertfile = {folder}/ca.pem
ssl_options.certfile = {folder}/server.pem
ssl_options.keyfile = {folder}/server.key
ssl_options.versions.1 = tlsv1.3
ssl_options.versions.2 = tlsv1.2

# A certificate that a client shows has to be of this federation's authority; true below: it has to show one.
ssl_options.verify = verify_peer
ssl_options.fail_if_no_peer_cert = {demand}

# Users, permissions, exchanges and standing inboxes. What has not changed since the last start is not loaded again,
# so that a password changed with rabbitmqctl stays. To apply a changed file: restart, or
# rabbitmqctl import_definitions {folder}/definitions.json
definitions.import_backend = local_filesystem
definitions.local.path = {folder}/definitions.json
definitions.skip_if_unchanged = true

# Seconds: a peer that is silent for two of them is gone. Clients serve theirs from a thread that does nothing else.
heartbeat = 30

# Publishers are stopped, not refused, when memory or disk runs short, and go on by themselves afterwards.
vm_memory_high_watermark.relative = {memory}
disk_free_limit.absolute = {disk}

# Bytes. Messages are chunks of a few MiB; nothing we send is near this.
max_message_size = {message}

# Bytes. Larger messages are split into frames of this size, between which other channels and heartbeats get their
# turn. Larger frames are no faster, and make heartbeats wait behind them.
frame_max = 131072

# A party needs one connection with a channel or two; a link between brokers has three.
channel_max = 64
"""


def broker_definitions(
    federation: Federation,
    owner: str | None,
    passwords: Mapping[str, str],
    limits: BrokerLimits,
    *,
    quorum: bool = False,
    salt: Callable[[int], bytes],
    links: Mapping[str, str] | None = None,
) -> str:
    """definitions.json of a broker: everything that is there before the first client comes.

    owner: the party whose broker it is; None for the shared one. passwords: by user, of all users of this broker.
    quorum: the broker has several nodes. salt: random bytes of the operating system. links: by other party, the
    password of `layout.link_user(owner)` at that party's broker.
    """
    inboxes = federation.members if owner is None else (owner,)
    partners = [] if owner is None else [party for party in federation.members if party != owner]
    found = place_of(federation, inboxes, quorum=quorum)
    found["users"] = [
        user_entry(user, password_hash(password, salt=salt(SALT_BYTES))) for user, password in sorted(passwords.items())
    ]
    rights = [_of_party(federation, party) for party in inboxes]
    if owner is not None:
        rights += [_of_link(party, owner) for party in partners]
        found["parameters"] = [_upstream(federation, owner, p, (links or {})[p], limits) for p in partners]
        found["policies"] = [_policy(federation, party) for party in partners]
    place = {"vhost": federation.vhost}
    found["permissions"] = [{"user": user, **place, **asdict(permissions)} for user, permissions, _ in rights]
    found["topic_permissions"] = [
        {"user": user, **place, **asdict(topic)} for user, _, topics in rights for topic in topics
    ]
    return json.dumps(found, indent=2, sort_keys=True) + "\n"


def place_of(federation: Federation, inboxes: tuple[str, ...], *, quorum: bool) -> dict[str, Any]:
    """Virtual host, exchanges of all members, and the standing inboxes with bindings of `inboxes`."""
    place = {"vhost": federation.vhost}
    kept = {"durable": True, "auto_delete": False}
    exchanges = [
        {"name": layout.exchange_of(party), **place, **kept, "type": "topic", "internal": False, "arguments": {}}
        for party in federation.members
    ]
    queues = [
        {"name": layout.control_inbox(party), **place, **kept, "arguments": layout.inbox_arguments(quorum=quorum)}
        for party in inboxes
    ]
    bindings = [
        {
            "source": layout.exchange_of(sender),
            **place,
            "destination": layout.control_inbox(receiver),
            "destination_type": "queue",
            "routing_key": layout.control_key(receiver),
            "arguments": {},
        }
        for receiver in inboxes
        for sender in federation.members
    ]
    return {"vhosts": [{"name": federation.vhost}], "exchanges": exchanges, "queues": queues, "bindings": bindings}


_Rights = tuple[str, layout.Permissions, list[layout.TopicPermission]]


def _of_party(federation: Federation, party: str) -> _Rights:
    members = federation.members
    return party, layout.permissions_of(party, members), layout.topic_permissions_of(party, members)


def _of_link(party: str, owner: str) -> _Rights:
    topics = [layout.link_topic_permission_of(party, owner)]
    return layout.link_user(party), layout.link_permissions_of(party, owner), topics


def _upstream(federation: Federation, owner: str, party: str, password: str, limits: BrokerLimits) -> dict[str, Any]:
    """How the broker of `owner` reaches the one of `party`, whose certificate must name the host of the roster."""
    place, folder = federation.member(party).broker, limits.folder.rstrip("/")
    host = f"[{place.host}]" if ":" in place.host else place.host
    user = f"{quote(layout.link_user(owner), safe='')}:{quote(password, safe='')}"
    options = {
        "cacertfile": f"{folder}/ca.pem",
        "certfile": f"{folder}/server.pem",
        "keyfile": f"{folder}/server.key",
        "verify": "verify_peer",
        "server_name_indication": place.host,
        "heartbeat": "30",
        "connection_timeout": "10000",
    }
    vhost = quote(federation.vhost, safe="")
    value = {
        "uri": f"amqps://{user}@{host}:{place.port}/{vhost}?{urlencode(options, safe='/')}",
        "ack-mode": "on-confirm",
        "trust-user-id": True,
        "max-hops": 1,
        "prefetch-count": _LINK_PREFETCH,
        "reconnect-delay": _LINK_PAUSE,
    }
    return {"component": "federation-upstream", "vhost": federation.vhost, "name": party, "value": value}


def _policy(federation: Federation, party: str) -> dict[str, Any]:
    """The exchange of `party` is fed from its own broker, and from no other."""
    exchange = layout.exchange_of(party).replace(".", r"\.")
    return {
        "vhost": federation.vhost,
        "name": f"from {party}",
        "pattern": f"^{exchange}$",
        "apply-to": "exchanges",
        "priority": 0,
        "definition": {"federation-upstream": party},
    }
