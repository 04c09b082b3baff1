"""What party services add to a job, and what they keep of it: small jobs of a federation of three, over one broker.

Seconds: from giving a job to the guest's service until it says that the job is over at all parties, less the time of
the same pipeline as three worker processes that nobody serves (`fate_llm submit --broker`), which start, meet, work and
end in the same way. Both sides take turns; then so many of each at once. Leaks: resident memory, open descriptors,
threads and children of each service, files in its state, rows in its database, queues at the broker.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from fnmatch import fnmatch
from typing import Any

from _measure import Ratio, finish, make_parser, median
from _services import ARBITER, GUEST, PARTIES, Site, Vitals, kinds_of_files, open_site, queues, rows, stepper, vitals

from fate_llm.pipelines import check
from fate_llm.runtime.service.client import ServiceClient
from fate_llm.runtime.submit import over_broker, prepare
from fate_llm.security.randomness import random_id

ADDED_LIMIT = 1.0  # seconds a job
GROWTH_LIMIT = 100.0  # KiB of resident memory a job
HANDLES_LIMIT = 8  # descriptors or threads; a pool may fill, a leak would be one or more for each job
ROUNDS = 2
TURN = 5  # jobs of the services before one without them
SETTLE = 30.0  # seconds in which a service has tidied up behind its jobs
_MARKS = ("worker_started", "task_started", "task_finished", "worker_ended", "job_ended")
_PHASES = ("agreeing", "starting", "working", "leaving", "ending", "telling")
_OF_A_SERVICE = ("service.json", "service.lock", "fate.db", "fate.db-*", "audit/audit*", "artifacts/*", "*.json")
_OF_A_JOB = ("dossier.json", "accepted.json", "ended.json", "machine.lock")
_OF_A_PART = ("log.txt", "stderr.txt", "events.jsonl", "federation.prom", "transcript.jsonl", "ended.json")
_OF_A_TASK = ("finished.json", "steps/model")


def main() -> int:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--sequential", type=int, default=50, help="jobs one after the other")
    parser.add_argument("--together", type=int, default=50, help="jobs of which --slots run at once")
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--alone", type=int, default=12, help="jobs without services at once, in all")
    options = parser.parse_args()
    if options.quick:
        options.sequential, options.together, options.slots, options.alone = 3, 2, 2, 2
    with open_site(settings=f"resources: {{cpus: {options.slots}}}\n") as site:
        details = _measured(options, site)
    _print(details)
    return finish(options, "services_jobs", ratios(details), details)


def _measured(options: argparse.Namespace, site: Site) -> dict[str, Any]:
    _alone(site)  # files of the interpreter that everybody reads are in memory from here on
    served, alone, samples = _one_by_one(options.sequential, site)
    several, wall = _at_once(options.together, options.slots, lambda: _served(site))
    rest, wall_alone = _at_once(options.alone, options.slots, lambda: _alone(site))
    children = _settled(site)
    samples.append(_sample(site, len(served) + len(several)))
    jobs = [found["job"] for found in (*served, *several)]
    return {
        "one_by_one": summary([found["seconds"] for found in served], alone),
        "phases": {name: median([found["phases"][name] for found in served]) for name in _PHASES},
        "at_once": {
            "slots": options.slots,
            **summary([found["seconds"] for found in several], rest),
            "seconds_a_job": wall / len(several),
            "alone_seconds_a_job": wall_alone / len(rest),
        },
        "samples": samples,
        "growth": {party: growth(samples, party) for party in PARTIES},
        "children_at_the_end": children,
        "files_of_a_job": {party: _files(site, party, jobs) for party in PARTIES},
        "rows": {party: rows(site.state(party)) for party in PARTIES},
        "queues_of_jobs": [name for name in queues(site) if any(job in name for job in jobs)],
        "runs": {"served": served, "served_at_once": several, "alone": alone, "alone_at_once": rest},
    }


# --- the two sides -----------------------------------------------------------------------------------------------


def _one_by_one(count: int, site: Site) -> tuple[list[dict[str, Any]], list[float], list[dict[str, Any]]]:
    served: list[dict[str, Any]] = []
    alone: list[float] = []
    samples: list[dict[str, Any]] = []
    for number in range(1, count + 1):
        served.append(_served(site))
        samples.append(_sample(site, number))
        if number % TURN == 1:
            alone.append(_alone(site))
    return served, alone, samples


def _at_once(count: int, slots: int, run: Callable[[], Any]) -> tuple[list[Any], float]:
    """What each returned, and the seconds of all."""
    begun = time.monotonic()
    with ThreadPoolExecutor(slots) as pool:
        found = list(pool.map(lambda _: run(), range(count)))
    return found, time.monotonic() - begun


def _served(site: Site) -> dict[str, Any]:
    """One job of the guest's service.

    Raises:
        SystemExit: it did not succeed.
    """
    client = ServiceClient.of_home(site.services[GUEST].home)
    try:
        begun = time.time()  # the clock of the events
        job = client.submit(stepper(ROUNDS), key=random_id(16))["job"]  # as `fate_llm submit` does
        lines = [line for _, more in client.follow(job) for line in more]
        ended = time.time()
        if (state := client.job(job)["state"]) != "success":
            raise SystemExit(f"{job}: {state}: {client.job(job)['trouble']}")
    finally:
        client.close()
    return {"job": job, "seconds": ended - begun, "phases": phases(lines, begun, ended)}


def _alone(site: Site) -> float:
    """Seconds of the same job without services.

    Raises:
        SystemExit: it did not succeed.
    """
    begun = time.monotonic()
    spec = check(stepper(ROUNDS))
    runtime = over_broker(spec, site.brokers())
    found = prepare(spec, base=site.folder, workdir=site.folder / "jobs", runtime=runtime).run()
    if found.status != "success":
        raise SystemExit(f"without services: {found.status}: {found.error}")
    return time.monotonic() - begun


def phases(lines: Sequence[Mapping[str, Any]], begun: float, ended: float) -> dict[str, float]:
    """Seconds of each phase, as the guest saw it: until its worker is started, until that begins its task, until it
    has done it, until the process is gone, until the job is over, until who asked has been told.

    Raises:
        SystemExit: a line is missing.
    """
    own = {line["event"]: line["seconds"] for line in lines if line["party"] == GUEST}
    missing = [mark for mark in _MARKS if mark not in own]
    if missing:
        raise SystemExit(f"the guest's lines lack {', '.join(missing)}")
    moments = [begun, *(own[mark] for mark in _MARKS), ended]
    return {name: moments[at + 1] - moments[at] for at, name in enumerate(_PHASES)}


def summary(served: Sequence[float], alone: Sequence[float]) -> dict[str, float]:
    """Percentiles of both sides in seconds, and the difference and the ratio of their medians."""
    found = {f"{side}_p{rank}": percentile(taken, rank) for side, taken in
             (("served", served), ("alone", alone)) for rank in (50, 95)}  # fmt: skip
    return {
        **found,
        "added": found["served_p50"] - found["alone_p50"],
        "over_alone": found["served_p50"] / found["alone_p50"],
    }


def percentile(values: Sequence[float], rank: int) -> float:
    """Nearest rank."""
    return sorted(values)[-(-rank * len(values) // 100) - 1]


# --- what stays --------------------------------------------------------------------------------------------------


def _sample(site: Site, jobs: int) -> dict[str, Any]:
    return {"jobs": jobs, **{party: asdict(_vitals(site, party)) for party in PARTIES}}


def _vitals(site: Site, party: str) -> Vitals:
    process = site.services[party].process
    assert process is not None
    return vitals(process.pid)


def _settled(site: Site) -> dict[str, int]:
    """Children of each service, as soon as there are none and no job has a queue left, or when time is over."""
    end = time.monotonic() + SETTLE
    while True:
        children = {party: _vitals(site, party).children for party in PARTIES}
        if time.monotonic() > end or (not any(children.values()) and not any("toys-" in name for name in queues(site))):
            return children
        time.sleep(0.5)


def growth(samples: Sequence[Mapping[str, Any]], party: str) -> dict[str, float]:
    """Of one service. By least squares over the later half of the jobs, when its pools are full: KiB of memory and
    seconds of CPU time a job. Descriptors and threads: how many the last sample has more than the first of all.
    """
    later = samples[len(samples) // 2 :]
    jobs = [sample["jobs"] for sample in later]
    slopes = {
        f"{key}_a_job": slope(jobs, [sample[party][key] for sample in later]) for key in ("rss_kib", "cpu_seconds")
    }
    more = {key: samples[-1][party][key] - samples[0][party][key] for key in ("descriptors", "threads")}
    return {**slopes, **more}


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the straight line with the least squares; 0 when all points have the same `x`."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((one - mean_x) ** 2 for one in x)
    return sum((one - mean_x) * (other - mean_y) for one, other in zip(x, y, strict=True)) / spread if spread else 0.0


def _files(site: Site, party: str, jobs: Sequence[str]) -> dict[str, Any]:
    counts = kinds_of_files(site.state(party), dict.fromkeys(jobs, "JOB"))
    found = {name: count for name, count in counts.items() if name.startswith("jobs/")}
    return {
        "kinds": {name: count / len(jobs) for name, count in sorted(found.items())},
        "others": {name: count for name, count in sorted(counts.items()) if name not in found},
        "unexpected": unexpected(counts, party),
    }


def unexpected(names: Mapping[str, int], party: str) -> list[str]:
    """Files that no service should have after its jobs."""
    part = [f"jobs/JOB/parties/{party}/{name}" for name in (*_OF_A_PART, *_OF_A_TASK)]
    patterns = [*_OF_A_SERVICE, *(f"jobs/JOB/{name}" for name in _OF_A_JOB), *part]
    if party == ARBITER:
        patterns.remove(f"jobs/JOB/parties/{party}/steps/model")
    flat = [pattern for pattern in patterns if "/" not in pattern]
    deep = [pattern for pattern in patterns if "/" in pattern]
    return sorted(n for n in names if not any(fnmatch(n, p) for p in (deep if "/" in n else flat)))


# --- what is said ------------------------------------------------------------------------------------------------


def ratios(details: Mapping[str, Any]) -> list[Ratio]:
    grown: Mapping[str, Mapping[str, float]] = details["growth"]
    files: Mapping[str, Mapping[str, Any]] = details["files_of_a_job"]
    left = sum(len(found["unexpected"]) for found in files.values())
    children = sum(details["children_at_the_end"].values())
    worst = {key: max(found[key] for found in grown.values()) for key in ("rss_kib_a_job", "descriptors", "threads")}
    return [
        Ratio("seconds that services add to a job", details["one_by_one"]["added"], ADDED_LIMIT),
        Ratio("KiB of memory that a service grows by a job", worst["rss_kib_a_job"], GROWTH_LIMIT),
        Ratio("descriptors that a service has more at the end", worst["descriptors"], HANDLES_LIMIT),
        Ratio("threads that a service has more at the end", worst["threads"], HANDLES_LIMIT),
        Ratio(
            "processes, queues and unexpected kinds of files left", children + len(details["queues_of_jobs"]) + left, 0
        ),
    ]


def _print(details: Mapping[str, Any]) -> None:
    for what in ("one_by_one", "at_once", "phases"):
        print(f"{what}: " + ", ".join(f"{name} {value:.3g}" for name, value in details[what].items()))
    count = len(details["samples"])
    for at in sorted({0, count // 2 - 1, count - 2, count - 1} & set(range(count))):
        sample = details["samples"][at]
        for party in PARTIES:
            print(f"after {sample['jobs']} jobs, {party}: " + ", ".join(f"{k} {v}" for k, v in sample[party].items()))
    for party, grown in details["growth"].items():
        print(f"{party} grows: " + ", ".join(f"{name} {value:.3g}" for name, value in grown.items()))
    for party, found in details["files_of_a_job"].items():
        print(f"{party}: {sum(found['kinds'].values()):g} files a job, unexpected: {found['unexpected'] or 'none'}")
        print(f"{party}: rows " + ", ".join(f"{name} {number}" for name, number in details["rows"][party].items()))


if __name__ == "__main__":
    sys.exit(main())
