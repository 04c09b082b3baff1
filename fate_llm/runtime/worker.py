"""One party of a job in a process of its own: `python -m fate_llm.runtime.worker`, started by `runtime.processes` or by
the party's service.

The first line on stdin is the order (JSON, with this party's secret key: it is never on disk nor on a command line).
Later lines say `{"cancel": why}`, `{"lost": [party, code, why]}` (it will not be heard again) or `{"left": party}` (it
has ended in success and needs nothing more). On stdout goes one JSON line per event, and as the last one the end. What
libraries print goes to stderr.

An order with `durable` makes a party that outlives its process: killed at any moment and started again with the same
order, it goes on where it was. `orphan` says what the end of stdin means, that is, the death of whoever started us:
`cancel` the job, or `exit` at once, to be started again.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO, Any

from fate_llm.core.errors import FateError, InternalError, error_from
from fate_llm.core.values import SumFloor
from fate_llm.pipelines.check import check
from fate_llm.pipelines.schema import PipelineSpec
from fate_llm.protocols.channel import JobChannel, Passed
from fate_llm.protocols.link import SecureLink, Timing
from fate_llm.protocols.transports.rabbitmq import BrokerAddress, RabbitTransport
from fate_llm.security.identity import Identity, PublicIdentity
from fate_llm.security.signer import RosterSigner

from .assign import assignments
from .context import JobSetting
from .events import Event, EventLog
from .jobfolder import JobFolder, PartyFolder
from .journal import replace_json
from .local import one_malloc_arena
from .metrics import prometheus_text
from .party import PartyRun
from .record.recorder import Recorder
from .sharing import FileSlot, Sharing
from .trust.policy_schema import PROTECTIONS

__all__ = ["main", "work"]

Say = Callable[[Mapping[str, Any]], None]
_MILESTONES = frozenset({"task_started", "round_state", "round_closed", "task_finished"})
_PATIENT = {"meet": 900.0, "silence": 900.0, "linger": 300.0}  # the service says sooner who is lost, and who has left
_OUTAGE = 300.0  # seconds without a broker after which a job gives up, where its order does not say
_LAST_MAIL = 10.0  # seconds in which what a party that has left had sent may still be on its way
_LAST_WORDS = 10.0  # seconds without progress in which the others may take our error
_PREDECESSOR = 30.0  # seconds in which a process that was killed lets go of its folder
_PR_SET_PDEATHSIG = 1
_ENDED = "ended.json"


def main() -> int:
    """Run the order on stdin."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # libraries that print do not get between our lines
    lock = threading.Lock()

    def say(message: Mapping[str, Any]) -> None:
        try:
            with lock:
                answers.write(json.dumps(message, default=str) + "\n")
        except BrokenPipeError:  # whoever started us is gone; the end of stdin cancels
            return

    order = json.loads(sys.stdin.readline())
    if order.get("orphan") == "exit":
        _die_with_parent()
    try:
        say({"end": work(order, sys.stdin, say)})
    except FateError as error:
        say({"end": {"error": error.as_dict()}})
    # The process boundary: whatever it was, who started us gets an end and not a riddle.
    except Exception as error:
        say({"end": {"error": InternalError(f"{type(error).__name__}: {error}").as_dict()}})
        raise
    return 0


def work(order: Mapping[str, Any], commands: IO[str], say: Say) -> dict[str, Any]:
    """Run one party's part; what it ended with, as JSON values."""
    one_malloc_arena()
    spec = check(order["pipeline"])
    folder = JobFolder(Path(order["folder"])).party(order["party"])
    durable, journal = bool(order.get("durable")), folder.path / "link" / str(order["attempt"])
    known = _ended(folder, order["attempt"]) if durable else None
    if known is not None and not (journal / "session").exists():
        shutil.rmtree(folder.path / "link", ignore_errors=True)
        return known  # killed between its last word to the others and that to who started it
    keep: list[Callable[[], None]] = []
    recorder = _recorder(order)

    def observe(event: Event) -> None:
        if recorder is not None:
            recorder.heed(event)
        say({"event": [event.kind, event.party, event.task, event.seconds, dict(event.fields)]})
        if event.kind in _MILESTONES:
            for write in keep:
                write()

    events = EventLog(now=time.time, observers=(observe,))
    _wait_for_predecessor(journal / "session.lock")
    passed = None if recorder is None else recorder.passed
    transport, link, channel = _connect(order, journal, partial(events.emit, folder, order["party"], ""), passed)
    keep.append(partial(_keep_metrics, folder.path / "federation.prom", order["party"], transport, link))
    listen = partial(_listen, commands, channel, link, order.get("orphan", "cancel"))
    threading.Thread(target=listen, name="commands", daemon=True).start()
    if known is None:
        known = _run(order, spec, folder, channel, events)
        if durable:
            replace_json(folder.path / _ENDED, {"attempt": order["attempt"], "end": known})
    else:
        _say_again(channel, known)
    if known["error"] is not None and durable:
        _let_go(link)
    channel.close(finished=True)
    shutil.rmtree(folder.path / "link", ignore_errors=True)  # only empty folders are left of the journal
    keep[0]()
    return {
        **known,
        "traffic": {peer: asdict(counters) for peer, counters in channel.counters.items()},
        "link": {peer: asdict(counters) for peer, counters in link.counters.items()},
        "broker": asdict(transport.counters),
    }


def _recorder(order: Mapping[str, Any]) -> Recorder | None:
    """Where messages are put on record; None for a job that has no party's service behind it."""
    if not order.get("audit"):
        return None
    return Recorder(
        Path(order["audit"]["folder"]),
        Path(order["audit"]["transcript"]),
        identity=_identity(order),
        party=order["party"],
        job=order["job"],
        attempt=order["attempt"],
        now=time.time,
    )


def _identity(order: Mapping[str, Any]) -> Identity:
    return Identity.from_bytes(bytes.fromhex(order["identity"]))


def _roster(order: Mapping[str, Any]) -> dict[str, PublicIdentity]:
    return {name: PublicIdentity.from_text(text) for name, text in order["roster"].items()}


def _run(
    order: Mapping[str, Any], spec: PipelineSpec, folder: PartyFolder, channel: JobChannel, events: EventLog
) -> dict[str, Any]:
    """Run all tasks; how they ended, and what they left."""
    base, identity = Path(order["base"]), _identity(order)
    setting = JobSetting(
        order["job"],
        order["party"],
        spec.roster,
        spec.job.seed,
        float(order.get("patience", spec.job.round_deadline)),
        base,
        folder,
        channel,
        events,
        Sharing(FileSlot(Path(order["slot"]))),
        attempt=order["attempt"],
        durable=bool(order.get("durable")),
        catalog=order.get("catalog", {}),
        floor=order.get("floor", PROTECTIONS[0]),
        sum_floor=SumFloor(**order.get("sum_floor", {})),
        signer=RosterSigner(identity, _roster(order)),
        sum_key=identity.storage_key("sum journal"),
    )
    run = PartyRun(setting, assignments(spec)[order["party"]], order["finished"])
    run.run()
    return {
        "error": None if run.error is None else run.error.as_dict(),
        "failed_task": run.failed_task,
        "outputs": {task: {name: str(a.path) for name, a in found.items()} for task, found in run.outputs.items()},
    }


def _connect(
    order: Mapping[str, Any],
    journal: Path,
    observer: Callable[[str, Mapping[str, Any]], None],
    passed: Callable[[Passed], None] | None,
) -> tuple[RabbitTransport, SecureLink, JobChannel]:
    party, job, attempt = order["party"], order["job"], order["attempt"]
    durable = bool(order.get("durable"))
    roster = _roster(order)
    transport = RabbitTransport(
        BrokerAddress.from_url(order["broker"]),
        party=party,
        members=tuple(roster),
        job=f"{job}/{attempt}",
        outage=float(order.get("outage", _OUTAGE)),
        observer=observer,
    )
    gone: list[tuple[str, str, str]] = []
    made: list[JobChannel] = []

    def on_gone(*what: str) -> None:
        gone.append(what)  # type: ignore[arg-type]
        for channel in made:
            channel.lost(*what)

    link = SecureLink(
        transport,
        job=job,
        attempt=attempt,
        party=party,
        identity=_identity(order),
        roster=roster,
        folder=journal,
        timing=Timing(**{**(_PATIENT if durable else {}), **order.get("timing", {})}),
        observer=observer,
        on_gone=on_gone,
    )
    channel = JobChannel(
        link, job=job, party=party, members=tuple(roster), observer=observer, durable=durable, on_passed=passed
    )
    made.append(channel)
    for what in tuple(gone):  # before the channel was there
        channel.lost(*what)
    return transport, link, channel


def _listen(commands: IO[str], channel: JobChannel, link: SecureLink, orphan: str) -> None:
    for line in commands:
        message = json.loads(line)
        if "cancel" in message:
            channel.cancel(message["cancel"])
        elif "lost" in message:
            party, code, why = message["lost"]
            channel.lost(party, code, why)
            link.forget(party)
        elif "left" in message:
            _has_left(message["left"], channel, link)
    if orphan == "exit":
        os._exit(1)  # everything is on disk, and whoever comes next starts us again
    channel.cancel("whoever started this party is gone")


def _has_left(party: str, channel: JobChannel, link: SecureLink) -> None:
    """It needs nothing more; what it said last may still wait for us at the broker."""
    link.forget(party)
    timer = threading.Timer(_LAST_MAIL, channel.lost, (party, "done", "has finished its part"))
    timer.daemon = True
    timer.start()


def _ended(folder: PartyFolder, attempt: int) -> dict[str, Any] | None:
    """How an earlier process of this attempt ended, if it came so far."""
    path = folder.path / _ENDED
    if not path.exists():
        return None
    note = json.loads(path.read_text(encoding="utf-8"))
    found: dict[str, Any] = note["end"]
    return found if note["attempt"] == attempt else None


def _say_again(channel: JobChannel, end: Mapping[str, Any]) -> None:
    """An earlier process had ended, and may not have told everybody."""
    error = end["error"]
    if error is None:
        channel.announce_done()
    else:
        known = error_from(error["code"], error["message"], error["hint"])
        channel.announce_failure(known, task=end["failed_task"])


def _let_go(link: SecureLink) -> None:
    """After an error nobody is waited for who does not take it soon."""
    link.flush(_LAST_WORDS)
    for party, waiting in link.unreported().items():
        if waiting:
            link.forget(party)


def _wait_for_predecessor(lock: Path) -> None:
    """Give a process that was killed the time to let go of its folder; the link says so when it does not."""
    until = time.monotonic() + _PREDECESSOR
    while lock.exists() and time.monotonic() < until:
        with lock.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.1)
                continue
        return


def _die_with_parent() -> None:
    """Linux: the death of the thread that started us kills us, whatever we are doing. Elsewhere the end of stdin has to
    do.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _keep_metrics(path: Path, party: str, transport: RabbitTransport, link: SecureLink) -> None:
    """Replace the file whole, so that who reads it never sees half of it."""
    partial_file = path.with_suffix(".partial")
    partial_file.write_text(prometheus_text(party, transport, link), encoding="utf-8")
    os.replace(partial_file, path)


if __name__ == "__main__":
    sys.exit(main())
