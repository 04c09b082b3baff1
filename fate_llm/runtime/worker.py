"""One party of a job in a process of its own: `python -m fate_llm.runtime.worker`, started by `runtime.processes`.

The first line on stdin is the order (JSON, with this party's secret key: it is never on disk nor on a command line).
Later lines say `{"cancel": why}` or `{"lost": [party, code, why]}`; the end of stdin means that whoever started us is
gone, and cancels. On stdout goes one JSON line per event, and as the last one the end. What libraries print goes to
stderr.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO, Any

from fate_llm.core.errors import FateError, InternalError
from fate_llm.pipelines.check import check
from fate_llm.protocols.channel import JobChannel
from fate_llm.protocols.link import SecureLink, Timing
from fate_llm.protocols.transports.rabbitmq import BrokerAddress, RabbitTransport
from fate_llm.security.identity import Identity, PublicIdentity

from .assign import assignments
from .context import JobSetting
from .events import Event, EventLog
from .jobfolder import JobFolder, PartyFolder
from .local import one_malloc_arena
from .metrics import prometheus_text
from .party import PartyRun
from .sharing import FileSlot, Sharing

__all__ = ["main", "work"]

Say = Callable[[Mapping[str, Any]], None]
_MILESTONES = frozenset({"task_started", "round_state", "round_closed", "task_finished"})


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
    party, base = order["party"], Path(order["base"])
    folder = JobFolder(Path(order["folder"])).party(party)
    keep: list[Callable[[], None]] = []

    def observe(event: Event) -> None:
        say({"event": [event.kind, event.party, event.task, event.seconds, dict(event.fields)]})
        if event.kind in _MILESTONES:
            for write in keep:
                write()

    events = EventLog(now=time.time, observers=(observe,))
    observer = partial(events.emit, folder, party, "")
    transport, link, channel = _connect(order, folder, observer)
    keep.append(partial(_keep_metrics, folder.path / "federation.prom", party, transport, link))
    threading.Thread(target=_listen, args=(commands, channel, link), name="commands", daemon=True).start()
    setting = JobSetting(
        order["job"],
        party,
        spec.roster,
        spec.job.seed,
        spec.job.round_deadline,
        base,
        folder,
        channel,
        events,
        Sharing(FileSlot(Path(order["slot"]))),
    )
    run = PartyRun(setting, assignments(spec, base)[party], order["finished"])
    run.run()
    channel.close(finished=True)
    shutil.rmtree(folder.path / "link", ignore_errors=True)  # only empty folders are left of the journal
    keep[0]()
    return {
        "error": None if run.error is None else run.error.as_dict(),
        "outputs": {task: {name: str(a.path) for name, a in found.items()} for task, found in run.outputs.items()},
        "traffic": {peer: asdict(counters) for peer, counters in channel.counters.items()},
        "link": {peer: asdict(counters) for peer, counters in link.counters.items()},
        "broker": asdict(transport.counters),
    }


def _connect(
    order: Mapping[str, Any], folder: PartyFolder, observer: Callable[[str, Mapping[str, Any]], None]
) -> tuple[RabbitTransport, SecureLink, JobChannel]:
    party, job, attempt = order["party"], order["job"], order["attempt"]
    roster = {name: PublicIdentity.from_text(text) for name, text in order["roster"].items()}
    transport = RabbitTransport(
        BrokerAddress.from_url(order["broker"]),
        party=party,
        members=tuple(roster),
        job=f"{job}/{attempt}",
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
        identity=Identity.from_bytes(bytes.fromhex(order["identity"])),
        roster=roster,
        folder=folder.path / "link" / str(attempt),
        timing=Timing(**order.get("timing", {})),
        observer=observer,
        on_gone=on_gone,
    )
    channel = JobChannel(link, job=job, party=party, members=tuple(roster), observer=observer)
    made.append(channel)
    for what in tuple(gone):  # before the channel was there
        channel.lost(*what)
    return transport, link, channel


def _listen(commands: IO[str], channel: JobChannel, link: SecureLink) -> None:
    for line in commands:
        message = json.loads(line)
        if "cancel" in message:
            channel.cancel(message["cancel"])
        elif "lost" in message:
            party, code, why = message["lost"]
            channel.lost(party, code, why)
            link.forget(party)
    channel.cancel("whoever started this party is gone")


def _keep_metrics(path: Path, party: str, transport: RabbitTransport, link: SecureLink) -> None:
    """Replace the file whole, so that who reads it never sees half of it."""
    partial_file = path.with_suffix(".partial")
    partial_file.write_text(prometheus_text(party, transport, link), encoding="utf-8")
    os.replace(partial_file, path)


if __name__ == "__main__":
    sys.exit(main())
