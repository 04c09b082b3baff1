"""Names on the broker, and what each party may do there: the one place that knows them.

One virtual host per federation. Every party has one exchange, which only it may publish to, and inboxes, which only
it may read: a standing one for control, and one per job. A receiver binds its inboxes to the senders' exchanges; a
routing key starts with the receiver's name and a slash, and a party may bind its own keys only, so that it cannot
have a copy of what others are sent. Nobody may use the default exchange.

    exchange  fate.from.<party>            topic, durable; made with the party's permissions
    queue     fate.to.<party>/control      durable; bound with key <party>/control
    queue     fate.to.<party>/job/<job>    durable, expires when unused; bound with key <party>/job/<job>

A slash cannot be part of a party's name (`core.names`), so no party's name starts another's keys.

Where every party has a broker of its own, that broker has all the exchanges and its own party's inboxes; the
exchange of another party is fed by RabbitMQ's federation from that party's broker, where the link logs in as

    user      link/<party>                 may read what is addressed to <party>, and make the link's own queue
    queue     federation: fate.from.<owner> -> <party>          what waits for <party>; made by the plug-in

Who sent a message is what its exchange says. `user_id` alone does not: a party may have its broker dead-letter what it
received, user_id and all, into its own exchange.

What permissions cannot do (RabbitMQ has none for it): any user of the virtual host may ask whether a queue or exchange
of a given name is there, and how many messages a queue has. Names of jobs are not secrets.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = [
    "Permissions",
    "TopicPermission",
    "control_inbox",
    "control_key",
    "exchange_of",
    "inbox_arguments",
    "job_inbox",
    "job_key",
    "link_permissions_of",
    "link_topic_permission_of",
    "link_user",
    "permissions_of",
    "topic_permissions_of",
]


def exchange_of(party: str) -> str:
    """The exchange that `party` publishes to."""
    return f"fate.from.{party}"


def control_inbox(party: str) -> str:
    """The standing inbox of `party`."""
    return f"fate.to.{party}/control"


def job_inbox(party: str, job: str) -> str:
    """The inbox of `party` in one job."""
    return f"fate.to.{party}/job/{job}"


def inbox_arguments(*, quorum: bool) -> dict[str, str]:
    """What a standing inbox is declared with, by whoever comes first: the others must say the same."""
    return {"x-queue-type": "quorum" if quorum else "classic"}


def control_key(receiver: str) -> str:
    """Routing key of what goes to the standing inbox of `receiver`."""
    return f"{receiver}/control"


def job_key(receiver: str, job: str) -> str:
    """Routing key of what goes to the inbox of `receiver` in one job."""
    return f"{receiver}/job/{job}"


@dataclass(frozen=True, slots=True)
class Permissions:
    """Three regular expressions over names of queues and exchanges, as RabbitMQ's `set_permissions` takes them."""

    configure: str
    write: str
    read: str


@dataclass(frozen=True, slots=True)
class TopicPermission:
    """What keys a user may publish with (write) and bind with (read) on one topic exchange."""

    exchange: str
    write: str
    read: str


def permissions_of(party: str, members: tuple[str, ...]) -> Permissions:
    """What the broker's user of `party` may do.

    configure: make and delete its own inboxes. write: publish to its own exchange; binding an own queue needs it too.
    read: consume its own inboxes, and bind to the exchanges of `members` (with which keys: `topic_permissions_of`).
    The members are named one by one: at an exchange without an entry there, RabbitMQ allows every key.
    """
    own_inboxes = rf"fate\.to\.{re.escape(party)}/.*"
    own_exchange = re.escape(exchange_of(party))
    exchanges = "|".join(re.escape(exchange_of(member)) for member in members)
    return Permissions(
        configure=f"^{own_inboxes}$",
        write=f"^({own_exchange}|{own_inboxes})$",
        read=f"^({own_inboxes}|{exchanges})$",
    )


def topic_permissions_of(party: str, members: tuple[str, ...]) -> list[TopicPermission]:
    """One entry for each member's exchange: without an entry, RabbitMQ allows every key."""
    own_keys = f"^{re.escape(party)}/.*$"
    return [
        TopicPermission(exchange_of(member), write="^.*$" if member == party else "^$", read=own_keys)
        for member in members
    ]


def link_user(party: str) -> str:
    """Who the broker of `party` logs in as at other parties' brokers; no party can have this name."""
    return f"link/{party}"


def link_permissions_of(party: str, owner: str) -> Permissions:
    """What `link_user(party)` may do at the broker of `owner`: keep and read the link's queue, nothing else.

    The names are those of RabbitMQ's federation plug-in, when the cluster name of a party's broker is the party's.
    """
    link = rf"federation: {re.escape(exchange_of(owner))} -> {re.escape(party)}( [AB])?"
    return Permissions(configure=f"^{link}$", write=f"^{link}$", read=f"^({link}|{re.escape(exchange_of(owner))})$")


def link_topic_permission_of(party: str, owner: str) -> TopicPermission:
    """The link may bind what is addressed to `party`, and publish nothing."""
    return TopicPermission(exchange_of(owner), write="^$", read=f"^{re.escape(party)}/.*$")
