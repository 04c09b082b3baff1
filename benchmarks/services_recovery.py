"""From a SIGKILL to the next finished round: workers, services and the broker of a federation of three parties.

One job with rounds of a known time for each victim. When a round has ended, the victim is killed in the middle of the
next one. A worker's service starts it again by itself; a service and a broker are started again at once, as a
supervisor would. A round has ended when guest and host both have its mean. What counts is the median of the seconds
from the kill to the end of the next round, and that over the median of the rounds that nothing disturbed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from _measure import Ratio, finish, make_parser, median
from _services import ARBITER, GUEST, HOST, Site, open_site, stepper

LIMITS = {
    "host worker": 10.0,
    "arbiter worker": 10.0,
    "guest service": 15.0,
    "host service": 15.0,
    "broker": 30.0,
}
"""Seconds from the kill to the end of the next round, of a round of half a second."""
PATIENCE = 120.0  # seconds until a round that does not come is called lost
QUIET = 2  # rounds between the end of a recovery and the next kill
INTO = 0.4  # of a round's work until the kill comes
_LOOK = 0.01


@dataclass(frozen=True, slots=True)
class Kill:
    """One. at, up, ended: seconds on the clock of the events: of the kill, when what was killed had been started again
    by us (a worker is not), and of the end of the next round, whose number is `number`.
    """

    at: float
    up: float
    ended: float
    number: int

    @property
    def seconds(self) -> float:
        return self.ended - self.at


def main() -> int:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--pause", type=float, default=0.5, help="seconds of work in a round")
    parser.add_argument("--kills", type=int, default=5, help="of each victim")
    parser.add_argument("--victims", nargs="*", default=list(LIMITS), choices=list(LIMITS), metavar="NAME")
    options = parser.parse_args()
    if options.quick:
        options.kills, options.victims = 1, ["host worker", "host service"]
    found: dict[str, dict[str, Any]] = {}
    with open_site(settings="") as site:
        for victim in options.victims:
            found[victim] = measured(options, site, victim)
            print(f"{victim}: " + line(found[victim]), flush=True)
    details = {"pause": options.pause, "victims": found}
    return finish(options, "services_recovery", ratios(found), details)


def measured(options: argparse.Namespace, site: Site, victim: str) -> dict[str, Any]:
    """A job in which the victim dies several times; seconds of the rounds and of the recoveries."""
    count = (options.kills + 1) * (QUIET + 2)
    job = site.services.submit(stepper(count, pause=options.pause))
    kills: list[Kill] = []
    _wait_for(site, job, QUIET + 1)
    for _ in range(options.kills):
        time.sleep(INTO * options.pause)
        kills.append(_kill(site, job, victim))
        _wait_for(site, job, kills[-1].number + QUIET)
    view = site.services.ended(job)
    if (view["state"], view["attempt"]) != ("success", 1):
        raise SystemExit(f"{victim}: {job} ended as {view['state']} in attempt {view['attempt']}: {view['trouble']}")
    own = undisturbed(ends(site, job), kills)
    seconds = median([kill.seconds for kill in kills])
    return {
        "seconds": seconds,
        "round_seconds": median(own),
        "rounds": seconds / median(own),
        "seconds_until_started_again": median([kill.up - kill.at for kill in kills]),
        "runs": [kill.seconds for kill in kills],
        "undisturbed": own,
    }


# --- rounds ------------------------------------------------------------------------------------------------------


def ends(site: Site, job: str) -> dict[int, float]:
    """When each round had ended at guest and host, as their workers noted it first."""
    return common_ends([site.services[party].events(job) for party in (GUEST, HOST)])


def common_ends(events: Sequence[Sequence[Mapping[str, Any]]]) -> dict[int, float]:
    """By round, the time at which the last party had its mean; a worker that was started again may say it again."""
    each: list[dict[int, float]] = []
    for own in events:
        first: dict[int, float] = {}
        for event in own:
            if event.get("event") == "round_state":
                first.setdefault(event["round"], event["time"])
        each.append(first)
    return {number: max(one[number] for one in each) for number in each[0] if all(number in one for one in each)}


def undisturbed(found: Mapping[int, float], kills: Sequence[Kill]) -> list[float]:
    """Seconds of the rounds in which nothing was killed, and which do not follow such a one.

    Raises:
        SystemExit: there is none.
    """
    spoilt = {kill.number for kill in kills} | {kill.number + 1 for kill in kills}
    own = [found[n] - found[n - 1] for n in sorted(found) if n - 1 in found and n not in spoilt]
    if not own:
        raise SystemExit("no round was left in peace")
    return own


def _wait_for(site: Site, job: str, number: int) -> float:
    """The end of a round; a later one does as well."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        found = ends(site, job)
        if found and max(found) >= number:
            return found[min(n for n in found if n >= number)]
        time.sleep(_LOOK)
    raise SystemExit(f"{job}: round {number} did not end within {PATIENCE:g} s; rounds that did: {sorted(found)}")


# --- kills -------------------------------------------------------------------------------------------------------


def _kill(site: Site, job: str, victim: str) -> Kill:
    """SIGKILL, what a supervisor does then, and the end of the next round."""
    last = max(ends(site, job))
    at = time.time()
    up = _VICTIMS[victim](site)
    return Kill(at, up, _wait_for(site, job, last + 1), last + 1)


def _kill_worker(party: str) -> Callable[[Site], float]:
    def kill(site: Site) -> float:
        if len(site.services[party].kill_worker()) != 1:
            raise SystemExit(f"{party} had not one worker")
        return time.time()

    return kill


def _kill_service(party: str) -> Callable[[Site], float]:
    def kill(site: Site) -> float:
        service = site.services[party]
        service.kill()
        service.start().ready()
        return time.time()

    return kill


def _kill_broker(site: Site) -> float:
    node = site.live.node(GUEST)
    node.kill()
    node.start(PATIENCE)
    return time.time()


_VICTIMS: dict[str, Callable[[Site], float]] = {
    "host worker": _kill_worker(HOST),
    "arbiter worker": _kill_worker(ARBITER),
    "guest service": _kill_service(GUEST),
    "host service": _kill_service(HOST),
    "broker": _kill_broker,
}


# --- what is said ------------------------------------------------------------------------------------------------


def ratios(found: Mapping[str, Mapping[str, Any]]) -> list[Ratio]:
    return [
        Ratio(f"{victim} killed, seconds to the end of the next round", one["seconds"], LIMITS[victim])
        for victim, one in found.items()
    ]


def line(found: Mapping[str, Any]) -> str:
    return (
        f"{found['seconds']:.2f} s from the kill to the end of the next round, {found['rounds']:.1f} rounds of "
        f"{found['round_seconds']:.2f} s; started again by us within {found['seconds_until_started_again']:.2f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
