"""A party as a process of its own, to be killed: `python -m tests.faults.party ORDER`, ORDER being JSON.

order: url, party, job, folder, seed (hex of the identity), roster (name to public key), work. A sender's work is
{"to": name, "messages": [[seed, size], ...]}; a receiver's is {"from": name, "count": n, "book": file}: it writes the
digest of every message to the book, on disk before it acknowledges. `finish`: close the link in order at the end.
Each step is one line on standard output.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from fate_llm.protocols.link import SecureLink
from fate_llm.security.identity import Identity, PublicIdentity

from .links import connect, content, digest


def say(*words: object) -> None:
    print(*words, flush=True)


def send(link: SecureLink, work: dict[str, Any]) -> None:
    for seed, size in work["messages"]:
        say("sending", seed)
        link.send(work["to"], [content(seed, size)])
        say("sent", seed)
    say("flushed", link.flush(60))


def receive(link: SecureLink, work: dict[str, Any]) -> None:
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            progress = link.progress(work["from"])
            if progress is not None:
                say("progress", progress.received)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    for _ in range(work["count"]):
        delivery = link.receive(60)
        if delivery is None:
            say("nothing")
            break
        with Path(work["book"]).open("a", encoding="ascii") as book:
            book.write(f"{digest(delivery.body)}\n")
            book.flush()
            os.fsync(book.fileno())
        link.ack(delivery)
        say("got", digest(delivery.body))
    stop.set()
    watcher.join()


def main() -> None:
    order = json.loads(sys.argv[1])
    _, link = connect(
        order["party"],
        order["url"],
        job=order["job"],
        folder=Path(order["folder"]),
        identity=Identity.from_bytes(bytes.fromhex(order["seed"])),
        roster={name: PublicIdentity.from_text(text) for name, text in order["roster"].items()},
    )
    say("up")
    work = order["work"]
    (send if "to" in work else receive)(link, work)
    link.close(finished=order["finish"])
    say("closed")


if __name__ == "__main__":
    main()
