"""What an operator runs first: looks at a broker and a federation from one party's place, and says what to mend.

Every check is tried, not guessed; what cannot be tried, because something before it failed, is `not checked`. Nothing
is left on the broker, and nothing of anybody's is touched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fate_llm.core.errors import FederationError
from fate_llm.protocols.transports.rabbitmq import BrokerAddress, BrokerProbe
from fate_llm.security.randomness import random_bytes

from .doctor_broker import (
    Place,
    check_alarms,
    check_facts,
    check_largest,
    check_permissions,
    check_refusals,
    check_speed,
    find_exchange,
)
from .doctor_network import ManagementApi, Nodes, check_plugins, check_reachable, check_tls, read_nodes, skew_check
from .doctor_parties import Asker, Membership
from .doctor_report import Check, Report, failed, ok, skipped, warning

__all__ = ["CHECKS", "Clocks", "Patient", "examine"]

CHECKS = (
    "reachable",
    "tls",
    "login",
    "exchange",
    "permissions",
    "refusals",
    "largest_message",
    "heartbeat",
    "frame_max",
    "plugins",
    "alarms",
    "clock",
    "round_trip",
    "throughput",
)
"""What is looked at on every broker, in the order that it is shown."""

_SESSION = 16  # bytes


@dataclass(frozen=True, slots=True)
class Clocks:
    """wall: nanoseconds since 1970. ticks: seconds that only grow."""

    wall: Callable[[], int] = time.time_ns
    ticks: Callable[[], float] = time.monotonic


@dataclass(frozen=True, slots=True)
class Patient:
    """What is looked at. me: None without a roster. linked: every party has a broker of its own.

    management: None when the management API is not to be asked. seconds: for which one answer is waited.
    """

    address: BrokerAddress
    party: str
    me: Membership | None = None
    linked: bool = False
    management: ManagementApi | None = None
    seconds: float = 5.0
    clocks: Clocks = field(default_factory=Clocks)


class _Stop(Exception):
    """What follows cannot be tried."""


def examine(patient: Patient) -> Report:
    """All checks. What a broker or party does wrong is in the report, and raises nothing.

    Raises:
        ConfigurationError: a certificate file of ours that cannot be read.
    """
    found: list[Check] = []
    why = ""
    try:
        _run(patient, found)
    except _Stop as stop:
        why = f"not before this is mended: {stop}"
    others = [] if patient.me is None else [f"{party}: answers" for party in _others(patient)]
    asked = {check.name for check in found}
    names = [*CHECKS, *(name for name in others if name not in asked)]
    if patient.me is not None:
        names.insert(0, "identity")
    return Report.complete(found, names, why)


def _others(patient: Patient) -> tuple[str, ...]:
    return () if patient.me is None else tuple(party for party in patient.me.pins if party != patient.party)


def _run(patient: Patient, found: list[Check]) -> None:
    """Add checks to `found`, to the end or until something stands in the way."""
    if patient.me is not None:
        found.append(_check_identity(patient.me))
    nodes = _ask_management(patient, found)
    reached, node = check_reachable(patient.address, seconds=patient.seconds, ticks=patient.clocks.ticks)
    found.append(reached)
    if node is None:
        raise _Stop("reachable")
    found.append(check_tls(patient.address, node, seconds=patient.seconds, now=patient.clocks.wall() / 1e9))
    _stop_if_failed(found[-1])
    place = Place(
        patient.address,
        patient.party,
        _others(patient),
        random_bytes(_SESSION),
        patient.seconds,
        patient.clocks.ticks,
        node,
    )
    place = _log_in(place, found)
    try:
        with _stops_at(found, "alarms"):
            found.append(check_alarms(place, nodes.alarms if nodes is not None else ()))
        _stop_if_failed(found[-1])
        _try_out(place, found)
        if patient.me is not None:
            with _stops_at(found, "parties"):
                found += Asker(place, patient.me, clock=patient.clocks.wall).ask_all()
    finally:
        _clean(place, found)


def _clean(place: Place, found: list[Check]) -> None:
    try:
        place.clean()
    except FederationError as error:
        text = f"an inbox {place.inbox} may be left: {error.message}"
        found.append(warning("cleaning up", text, "Nothing: the broker removes it itself after ten minutes."))


@contextmanager
def _stops_at(found: list[Check], name: str) -> Iterator[None]:
    """An error of the broker's is the check `name`, failed, and nothing follows."""
    try:
        yield
    except FederationError as error:
        found.append(failed(name, error.message, error.hint))
        raise _Stop(name) from None


def _stop_if_failed(check: Check) -> None:
    if check.status == "failed":
        raise _Stop(check.name)


def _log_in(place: Place, found: list[Check]) -> Place:
    with _stops_at(found, "login"):
        probe = place.probe()
    try:
        with _stops_at(found, "exchange"):
            found += check_facts(probe.facts)
            exchange, usable = find_exchange(probe, place)
            found.append(exchange)
    finally:
        probe.close()
    if usable is None:
        raise _Stop("exchange")
    return usable


def _try_out(place: Place, found: list[Check]) -> None:
    tries: dict[str, Callable[[BrokerProbe, Place], Check]] = {
        "permissions": check_permissions,
        "refusals": check_refusals,
        "largest_message": check_largest,
    }
    for name, check in tries.items():
        with _stops_at(found, name):
            probe = place.probe()
            try:
                found.append(check(probe, place))
            finally:
                probe.close()
    for one in found:
        if one.name == "permissions":
            _stop_if_failed(one)
    with _stops_at(found, "round_trip"):
        found += check_speed(place)
    if place.borrowed:
        raise _Stop("exchange")


def _check_identity(me: Membership) -> Check:
    pinned = me.pins[me.party]
    if pinned != me.identity.public:
        do = "Put the key of this party beside party.yaml, or have the roster name the new one at every party."
        return failed("identity", f"our key is not the one that the roster pins for {me.party}", do)
    return ok("identity", f"our key is the one that the roster pins: {pinned.fingerprint}")


def _ask_management(patient: Patient, found: list[Check]) -> Nodes | None:
    """Plug-ins and clock."""
    nodes = None
    if patient.management is not None:
        clock = patient.clocks.wall
        nodes = read_nodes(patient.management, patient.address, seconds=patient.seconds, clock=lambda: clock() / 1e9)
    found.append(check_plugins(nodes, linked=patient.linked))
    if nodes is None or nodes.skew is None:
        found.append(skipped("clock", "only the management API tells the broker's time", "Give --management URL."))
    else:
        found.append(skew_check("clock", nodes.skew, sure=0.6))
    return nodes
