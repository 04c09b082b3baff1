"""The durable channel: messages are held until what became of them is on disk, and are the same in every life."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from fate_llm.core.errors import FederationError, PeerFailed, RoundTimeout
from fate_llm.core.values import Payload
from fate_llm.protocols.channel import JobChannel, Passed
from fate_llm.protocols.envelope import Envelope, encode
from fate_llm.protocols.ledger import Account, base_task
from tests.runtime.durable_world import Inboxes, Life

MEMBERS = ("a", "b", "z")


class Post:
    """Channels of a job over inboxes that outlive them."""

    def __init__(self) -> None:
        self.inboxes = Inboxes()
        self.opened: list[JobChannel] = []

    def open(self, party: str, **settings: Any) -> JobChannel:
        life = Life(self.inboxes, party)
        channel = JobChannel(life, job="job", party=party, members=MEMBERS, durable=True, **settings)
        self.opened.append(channel)
        return channel

    def kept(self, party: str) -> int:
        with self.inboxes.changed:
            return len(self.inboxes.kept[party])

    def raw(self, envelope: Envelope) -> None:
        Life(self.inboxes, envelope.sender).send(envelope.receiver, encode(envelope))


@pytest.fixture
def post() -> Iterator[Post]:
    found = Post()
    yield found
    for channel in found.opened:
        channel.close()
        assert not channel._reader.is_alive()


def say(channel: JobChannel, number: int, *, round: int = 0, task: str = "t", kind: str = "data.x") -> None:
    channel.send("b", task=task, kind=kind, payload=Payload({"number": number}), round=round)


def hear(channel: JobChannel, account: Account | None = None, *, seconds: float = 10.0, **words: str) -> int:
    wanted = {"task": "t", "kind": "data.x", **words}
    found = channel.receive("a", deadline=channel.clock() + seconds, account=account, **wanted)
    return int(found.payload.fields["number"])


def silent(channel: JobChannel, account: Account | None = None) -> None:
    with pytest.raises(RoundTimeout):
        hear(channel, account, seconds=0.0)


def test_what_was_not_acknowledged_comes_again_in_order(post: Post) -> None:
    # Given a reader that consumes and is killed before anything is on its disk
    a, b = post.open("a"), post.open("b")
    for number in (1, 2, 3):
        say(a, number)
    assert [hear(b, b.account("t")) for _ in range(2)] == [1, 2]
    b.close()
    # When it comes again, Then all is in its mailboxes before anything else happens
    again = post.open("b")
    assert [hear(again, seconds=0.0) for _ in range(3)] == [1, 2, 3]


def test_what_is_acknowledged_was_consumed_since_the_mark(post: Post) -> None:
    a, b = post.open("a"), post.open("b")
    for number in (1, 2, 3):
        say(a, number)
    account = b.account("t")
    # Given a message consumed before the rounds, one in them, and one that has only arrived
    assert hear(b, account) == 1
    mark = account.mark()
    assert hear(b, account) == 2
    b.acknowledge(account, mark)
    b.acknowledge(account, mark)  # twice changes nothing
    b.close()
    # Then the one in the rounds is gone for good
    again = post.open("b")
    assert [hear(again), hear(again)] == [1, 3]


def test_one_role_never_acknowledges_what_another_consumed(post: Post) -> None:
    a, b = post.open("a"), post.open("b")
    say(a, 1, kind="round.term", round=1)
    say(a, 2, kind="round.state", round=1)
    coordinator, contributor = b.account("t"), b.account("t")
    assert hear(b, coordinator, kind="round.term") == 1
    assert hear(b, contributor, kind="round.state") == 2
    b.acknowledge(contributor, 0)
    assert post.kept("b") == 1
    assert contributor.positions("t")["heard"] == [["t", "round.state", "a", 1, 1]]
    assert coordinator.positions("t")["heard"] == [["t", "round.term", "a", 1, 1]]
    b.close()
    again = post.open("b")
    assert hear(again, kind="round.term") == 1


def test_a_sender_that_was_killed_says_the_same_again_and_it_is_dropped_and_acknowledged(post: Post) -> None:
    a, b = post.open("a"), post.open("b")
    say(a, 1, round=1)
    say(a, 2, round=1)
    assert [hear(b), hear(b)] == [1, 2]
    a.close()
    # When the next life of the sender begins anew, Then only what is new is heard
    again = post.open("a")
    for number in (1, 2, 3):
        say(again, number, round=1)
    say(again, 4, round=2)
    assert [hear(b), hear(b)] == [3, 4]
    assert b.counters["a"].duplicates == 2
    assert post.kept("b") == 4, "what was dropped is not held"


def test_a_role_goes_on_from_its_positions_at_both_ends(post: Post) -> None:
    # Given a sender and a reader that have committed after two messages, and die after the third
    a, b = post.open("a"), post.open("b")
    sender, reader = a.account("t"), b.account("t")
    for number in (1, 2):
        a.send("b", task="t", kind="data.x", payload=Payload({"number": number}), account=sender)
        hear(b, reader)
    positions = {"a": sender.positions("t"), "b": reader.positions("t")}  # and the process dies before it acknowledges
    say(a, 3)
    a.close(), b.close()
    # When both go on from there
    a, b = post.open("a"), post.open("b")
    a.resume(a.account("t"), positions["a"])
    b.resume(b.account("t"), positions["b"])
    assert post.kept("b") == 1, "what the positions cover is acknowledged now"
    say(a, 3)
    say(a, 4)
    # Then nothing is missing and nothing comes twice
    assert [hear(b), hear(b)] == [3, 4]
    silent(b)


def test_positions_of_a_task_s_rounds_speak_for_its_named_messages_and_not_for_its_sums() -> None:
    account = Account()
    for number, task in enumerate(("t", "t#2", "t/final/1", "other"), start=1):
        account.said((task, "data.x", "b"), (0, number))
    assert [entry[0] for entry in account.positions("t")["said"]] == ["t"]
    assert [entry[0] for entry in account.positions("t#2")["said"]] == ["t", "t#2"]
    assert [entry[0] for entry in account.positions("t/final/1")["said"]] == ["t/final/1"]
    assert [base_task(name) for name in ("t", "t#2", "t/final/1", "u-1.b")] == ["t", "t", "t", "u-1.b"]


def test_a_task_that_has_ended_holds_nothing_and_later_mail_of_it_is_dropped(post: Post) -> None:
    a, b = post.open("a"), post.open("b")
    account = b.account("t")
    for task in ("t", "t", "t#2", "t/final/1", "tt"):
        say(a, 1, task=task)
    hear(b, account)  # consumed for an account, consumed for none, and never consumed
    hear(b)
    hear(b, task="tt")  # everything has come
    b.finish_task("t")
    assert post.kept("b") == 1, "only what belongs to another task"
    say(a, 2, task="t/final/1")
    say(a, 2, task="tt")
    assert hear(b, task="tt") == 2
    assert post.kept("b") == 2
    silent(b)


def test_who_has_left_is_heard_again_by_the_next_life(post: Post) -> None:
    a, b = post.open("a"), post.open("b")
    say(a, 1)
    a.announce_done()
    assert hear(b) == 1
    with pytest.raises(PeerFailed, match="a has finished its part"):
        hear(b, seconds=10)
    b.finish_task("t")
    b.close()
    again = post.open("b")
    assert again.left["a"].code == "done"


def test_messages_to_oneself_are_heard_and_die_with_the_process(post: Post) -> None:
    b = post.open("b")
    account = b.account("t")
    b.send("b", task="t", kind="data.x", payload=Payload({"number": 1}), account=account)
    assert b.receive("b", task="t", kind="data.x", deadline=None, account=account).payload.fields == {"number": 1}
    assert account.positions("t") == {"said": [], "heard": []}
    assert account.release(0) == []


def test_two_threads_of_a_sender_never_share_an_ordinal(post: Post) -> None:
    a, b = post.open("a"), post.open("b")
    threads = [threading.Thread(target=say, args=(a, number)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(hear(b) for _ in range(20)) == list(range(20))


# --- for the record -----------------------------------------------------------------------------------------


def tensors() -> dict[str, np.ndarray]:
    return {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}


def test_both_ends_know_of_the_same_message_without_its_content(post: Post) -> None:
    sent: list[Passed] = []
    got: list[Passed] = []
    a, b = post.open("a", on_passed=sent.append), post.open("b", on_passed=got.append)
    fields = {"weight": 2.5, "nested": {"2": (1, 2), "10": [None, True]}, "text": "grün"}
    a.send("b", task="t", kind="round.term", payload=Payload(fields, tensors()), round=3, protection="plain+int8")
    b.receive("a", task="t", kind="round.term", deadline=None)
    (one,), (other,) = sent, got
    assert (one.direction, one.peer, other.direction, other.peer) == ("sent", "b", "received", "a")
    assert (one.task, one.kind, one.round, one.ordinal) == ("t", "round.term", 3, 1)
    assert one.form == {"w": ["float32", [2, 3]]}
    assert (one.protection, other.protection) == ("plain+int8", "")
    assert (one.digest, one.bytes, one.form) == (other.digest, other.bytes, other.form)
    assert "grün" not in repr(one)


@pytest.mark.parametrize("what", ["fields", "tensors", "round", "kind", "task", "receiver", "nothing"])
def test_the_digest_says_what_was_said_and_not_in_which_life(post: Post, what: str) -> None:
    passed: list[Passed] = []
    changed: dict[str, Any] = {
        "receiver": "z" if what == "receiver" else "b",
        "task": "u" if what == "task" else "t",
        "kind": "data.y" if what == "kind" else "data.x",
        "round": 1 if what == "round" else 0,
        "payload": Payload({"n": 2 if what == "fields" else 1}, {} if what == "tensors" else tensors()),
    }
    first = post.open("a", on_passed=passed.append)
    first.send("b", task="t", kind="data.x", payload=Payload({"n": 1}, tensors()))
    first.close()
    second = post.open("a", on_passed=passed.append)
    second.send("b", task="other", kind="data.x", payload=Payload())  # so that the sequence is another
    second.send(changed.pop("receiver"), **changed)
    assert (passed[0].digest == passed[-1].digest) is (what == "nothing")


def test_a_record_that_cannot_be_kept_stops_the_message(post: Post) -> None:
    def full(passed: Passed) -> None:
        if passed.kind == "data.x":
            raise FederationError("the audit log cannot be written")

    a = post.open("a", on_passed=full)
    with pytest.raises(FederationError, match="audit log"):
        say(a, 1)
    assert post.kept("b") == 0
    # and its place is not used up
    a.send("b", task="t", kind="data.y", payload=Payload({"number": 2}))
    assert hear(post.open("b"), kind="data.y") == 2


def test_duplicates_and_messages_to_oneself_are_not_in_the_record(post: Post) -> None:
    got: list[Passed] = []
    b = post.open("b", on_passed=got.append)
    raw = Envelope("job", "t", "a", "b", "data.x", 1, Payload({"number": 1}), ordinal=1)
    post.raw(raw)
    post.raw(dataclasses.replace(raw, sequence=2))
    post.raw(dataclasses.replace(raw, sequence=3, ordinal=2))
    b.send("b", task="t", kind="data.x", payload=Payload({}))
    assert [hear(b), hear(b)] == [1, 1]
    assert [passed.ordinal for passed in got] == [1, 2]


def test_what_is_refused_is_acknowledged_and_not_in_the_record(post: Post) -> None:
    got: list[Passed] = []
    b = post.open("b", on_passed=got.append)
    post.raw(Envelope("another job", "t", "a", "b", "data.x", 1, ordinal=1))
    post.raw(Envelope("job", "t", "a", "b", "data.x", 1, Payload({"number": 7}), ordinal=1))
    assert hear(b) == 7
    assert (len(got), b.counters["a"].refused, post.kept("b")) == (1, 1, 1)


def test_an_undurable_channel_tells_of_messages_as_well(make_channels: Callable[..., dict[str, JobChannel]]) -> None:
    passed: list[Passed] = []
    channels = make_channels("ab", on_passed=passed.append)
    say(channels["a"], 1)
    hear(channels["b"])
    assert [p.direction for p in passed] == ["sent", "received"]
    assert passed[0].digest == passed[1].digest
    assert (channels["a"].durable, channels["b"]._receipts) == (False, {})
    channels["b"].finish_task("t")  # nothing to do
    say(channels["a"], 2)
    assert hear(channels["b"]) == 2
