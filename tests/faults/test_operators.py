"""Somebody with access to the broker deletes queues, or puts frames of his own into an inbox."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import pika
import pytest

from fate_llm.core.errors import PeerFailed
from fate_llm.protocols.broker_layout import exchange_of, job_inbox, job_key
from fate_llm.protocols.link.frames import CHUNK, HEADER, TAG, Header, Kind, read_header
from fate_llm.runtime.broker import BrokerNode
from tests.brokers import admin

from .links import MIB, CutProxy, Pair, Timing, content, digest, loopback, nothing_on, start, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def delete_inbox(broker: BrokerNode, vhost: str, party: str, job: str) -> None:
    admin(broker, "DELETE", f"queues/{vhost}/{quote(job_inbox(party, job), safe='')}")


def test_an_inbox_deleted_with_frames_in_it_and_while_a_transfer_runs(
    broker: BrokerNode, vhost: str, pairs: Callable[..., Pair]
) -> None:
    # Given a receiver that is slow to fetch, so that its inbox holds confirmed frames
    with CutProxy(broker.port) as line:
        pair = pairs(loopback(broker.url(vhost=vhost)), loopback(broker.url(vhost=vhost), port=line.port))
        body = content(6, 64 * MIB)
        line.bandwidth = 6 * MIB
        sending = start(pair.links["a"].send, "b", [body])
        for times, share in enumerate((6, 24), 1):
            until(
                lambda share=share: (p := pair.links["b"].progress("a")) and p.received >= share * MIB, 60, pair.story
            )
            # When an operator deletes it
            delete_inbox(broker, vhost, "b", pair.job)
            until(lambda times=times: len(pair.events("inbox_deleted", "b")) == times, 30, pair.story)
        line.bandwidth = None
        # Then what was in it is sent again, and nothing is missing in the end
        assert digest(pair.take("b", 60).body) == digest(body)
        sending.result(30)
        assert len(pair.events("inbox_deleted", "b")) == 2
        assert pair.links["a"].counters["b"].chunks_sent_again > 0
        assert pair.links["b"].counters["a"].messages_received == 1
        assert pair.links["b"].counters["a"].refused == 0
        assert pair.transports["b"].counters.reconnects == 0  # the connection had no part in it
        assert not pair.gone
        pair.echo()
        pair.finish()
    nothing_on(broker, vhost)


def test_an_inbox_deleted_while_nothing_is_under_way(
    broker: BrokerNode, vhost: str, pairs: Callable[..., Pair]
) -> None:
    pair = pairs(loopback(broker.url(vhost=vhost)))
    pair.echo()
    for party in "ab":
        delete_inbox(broker, vhost, party, pair.job)
    pair.echo(b"still here")
    assert len(pair.events("inbox_deleted")) == 2
    pair.finish()
    nothing_on(broker, vhost)


def test_a_dead_party_whose_inbox_is_deleted_is_found_silent_and_nobody_waits_for_it(
    broker: BrokerNode, vhost: str, pairs: Callable[..., Pair]
) -> None:
    timing = Timing(meet=30.0, silence=3.0, keepalive=1.0, probe=0.5, report=0.05, linger=1.0)
    pair = pairs(loopback(broker.url(vhost=vhost)), timing=timing)
    pair.echo()
    pair.links["b"].close()
    delete_inbox(broker, vhost, "b", pair.job)
    # Given more on its way than waits anywhere, of which nothing can be delivered
    sending = start(pair.links["a"].send, "b", [bytes(20 * MIB)])
    began = time.monotonic()
    with pytest.raises(PeerFailed, match="b cannot be sent to: has given no sign of life for 3 s"):
        sending.result(20)
    assert time.monotonic() - began < 10
    assert [(who, code) for who, code, _ in pair.gone] == [("b", "silent")]
    pair.links["a"].close(finished=True)
    nothing_on(broker, vhost)


class Forger:
    """A client of pika's own that may publish to everything, and reads along."""

    def __init__(self, broker: BrokerNode, vhost: str, job: str) -> None:
        self._connection = pika.BlockingConnection(pika.URLParameters(broker.url(vhost=vhost)))
        self._channel = self._connection.channel()
        self._job = job
        self._queue = self._channel.queue_declare("", exclusive=True).method.queue
        self._channel.queue_bind(self._queue, exchange_of("a"), job_key("b", job))

    def overheard(self) -> list[bytes]:
        """Frames that a has sent to b."""
        found = []
        while (got := self._channel.basic_get(self._queue, auto_ack=True))[0] is not None:
            found.append(got[2])
        return found

    def put(self, body: bytes, *, exchange: str | None = None, key: str | None = None) -> None:
        """Into b's inbox: as if a had sent it, or past all exchanges."""
        self._channel.basic_publish(
            exchange_of("a") if exchange is None else exchange, key or job_key("b", self._job), body
        )

    def close(self) -> None:
        self._connection.close()


@pytest.fixture
def forged(broker: BrokerNode, vhost: str, pairs: Callable[..., Pair]) -> Iterator[tuple[Pair, Forger, Any]]:
    """A pair that has talked, who forges, and b's counters of a."""
    pair = pairs(loopback(broker.url(vhost=vhost)))
    forger = Forger(broker, vhost, pair.job)
    pair.echo()
    yield pair, forger, pair.links["b"].counters["a"]
    forger.close()
    pair.echo(b"the job goes on", timeout=30)
    assert not pair.gone
    pair.finish()
    nothing_on(broker, vhost)


def settled(pair: Pair, forger: Forger, count: int, *, refused: int, duplicates: int = 0) -> None:
    """b has looked at every forged frame, and counted it."""
    counters = pair.links["b"].counters["a"]
    told = pair.events
    until(lambda: len(told("refused", "b")) >= count and counters.duplicates >= duplicates, 20, pair.story)
    assert (counters.refused, len(told("refused", "b"))) == (refused, count), pair.story()


def test_random_bytes_are_refused_and_counted(forged: tuple[Pair, Forger, Any]) -> None:
    pair, forger, _ = forged
    sizes = [0, 1, HEADER - 1, HEADER, 4096, CHUNK + HEADER + TAG + 1, 8 * MIB]
    for size in sizes:
        forger.put(os.urandom(size))
    settled(pair, forger, len(sizes), refused=len(sizes))
    assert {fields["code"] for fields in pair.events("refused", "b")} == {"bad_envelope"}


def test_a_replayed_frame_is_dropped_silently(forged: tuple[Pair, Forger, Any]) -> None:
    pair, forger, counters = forged
    frames = forger.overheard()
    sealed = [frame for frame in frames if read_header(frame).kind is not Kind.AGREE]
    assert any(read_header(frame).kind is Kind.DATA for frame in sealed)
    before = counters.duplicates
    for frame in frames:
        forger.put(frame)
    settled(pair, forger, 0, refused=0, duplicates=before + len(sealed))
    assert counters.messages_received == 1


def test_a_frame_of_another_job_is_refused(
    forged: tuple[Pair, Forger, Any], broker: BrokerNode, vhost: str, pairs: Callable[..., Pair]
) -> None:
    pair, forger, counters = forged
    other = pairs(loopback(broker.url(vhost=vhost)))
    eavesdropper = Forger(broker, vhost, other.job)
    other.echo(b"of another job")
    frames = [frame for frame in eavesdropper.overheard() if read_header(frame).kind is Kind.DATA]
    assert frames
    for frame in frames:
        forger.put(frame)
    settled(pair, forger, len(frames), refused=len(frames))
    assert "another session" in pair.events("refused", "b")[0]["message"]
    assert counters.messages_received == 1
    eavesdropper.close()
    other.finish()


def test_changed_and_invented_frames_are_refused_whatever_they_claim(forged: tuple[Pair, Forger, Any]) -> None:
    pair, forger, counters = forged
    seen = next(f for f in forger.overheard() if read_header(f).kind is Kind.DATA)
    known = read_header(seen)
    flipped = bytearray(seen)
    flipped[-1] ^= 1
    claims = [
        Header(Kind.DATA, known.session, known.epoch, known.number + 1, known.message + 1, size, 0, 0)
        for size in (100, 2**40, 2**62)  # more memory than there is
    ]
    later = Header(Kind.DATA, known.session, known.epoch + 1, known.number + 1, known.message + 1, 100, 0, 0)
    report = Header(Kind.CONTROL, known.session, known.epoch + 9, 2**50, received=2**50)
    invented = [header.to_bytes() + os.urandom(100 + TAG) for header in [*claims, later]]
    for frame in [bytes(flipped), *invented, report.to_bytes() + os.urandom(17 + TAG)]:
        forger.put(frame)
    settled(pair, forger, 6, refused=6)
    codes = [fields["code"] for fields in pair.events("refused", "b")]
    assert codes[:2] == ["conflicting_duplicate", "bad_seal"]
    assert set(codes[2:]) <= {"bad_seal", "bad_envelope"}  # some are too large to be true
    assert counters.messages_received == 1


def test_a_forged_frame_ahead_of_its_turn_does_not_keep_the_true_one_out(forged: tuple[Pair, Forger, Any]) -> None:
    pair, forger, counters = forged
    known = read_header(next(f for f in forger.overheard() if read_header(f).kind is Kind.DATA))
    for ahead in (2, 3, 50):
        header = Header(Kind.DATA, known.session, known.epoch, known.number + ahead, known.message + 1, 100, 0, 0)
        forger.put(header.to_bytes() + os.urandom(100 + TAG))
    body = content(7, 12 * MIB)
    sending = start(pair.links["a"].send, "b", [body])
    assert digest(pair.take("b", 30).body) == digest(body)
    sending.result(10)
    assert counters.refused >= 1 and counters.messages_received == 2


def test_a_frame_of_nobody_is_refused(forged: tuple[Pair, Forger, Any]) -> None:
    pair, forger, _ = forged
    frame = next(f for f in forger.overheard() if read_header(f).kind is Kind.DATA)
    forger.put(frame, exchange="", key=job_inbox("b", pair.job))
    settled(pair, forger, 1, refused=0)
    assert "not a party" in pair.events("refused", "b")[0]["message"]
