"""What a store keeps is there after it was opened again, the same on both databases."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest

from fate_llm.core.errors import ConfigurationError, InternalError, StoreLost, UnknownJob, WrongState
from fate_llm.runtime.store.store import ApprovalRow, JobRow, Store, TaskRow
from tests.runtime.store.conftest import Clock, OpenStore, job_row, line

DIGEST = "a" * 64
ODD = {"text": 'quote " and \\, NUL \0, half \ud800, \U0001f600', "list": [1, 2.5, None, True, {"deep": {}}], "": ""}


# --- jobs and tasks ----------------------------------------------------------------------------------------------


def test_a_job_is_there_after_the_store_was_opened_again(open_store: OpenStore) -> None:
    rows = [
        job_row("a", specification=ODD, machine={"n": 2**60}),
        job_row("a", lead=True, state="invited", attempt=0),
        job_row("b", ended=150.25, state="failed", trouble={"code": "timeout", "message": "m"}),
    ]
    first = open_store()
    for row in rows:
        first.save_job(row)
    first.close()
    store = open_store()
    assert [store.job("a"), store.job("a", lead=True), store.job("b")] == rows
    assert store.job("c") is None
    assert store.job("b", lead=True) is None


def test_saving_replaces_all_of_a_row_and_only_that_row(store: Store) -> None:
    store.save_job(job_row("a", trouble={"code": "x"}, ended=3.0))
    store.save_job(job_row("a", lead=True))
    changed = job_row("a", state="success", updated=200.0, machine={}, trouble=None, name="other", priority=9)
    store.save_job(changed)
    assert store.job("a") == changed
    assert store.job("a", lead=True) == job_row("a", lead=True)


def test_jobs_come_newest_first_and_by_pages(store: Store) -> None:
    for at, state in enumerate(["running", "success", "queued", "success"]):
        store.save_job(job_row(f"job-{at}", created=float(at), state=state, ended=9.0 if state == "success" else None))
    assert [row.job for row in store.jobs()] == ["job-3", "job-2", "job-1", "job-0"]
    assert [row.job for row in store.jobs(limit=2)] == ["job-3", "job-2"]
    assert [row.job for row in store.jobs(before=2.0)] == ["job-1", "job-0"]
    assert [row.job for row in store.jobs(states={"success"})] == ["job-3", "job-1"]
    assert store.jobs(states=[]) == []
    assert [row.job for row in store.unfinished_jobs()] == ["job-0", "job-2"]
    store.save_job(job_row("job-0", lead=True, created=0.0, state="ready"))
    assert [(row.job, row.lead) for row in store.jobs(before=1.0)] == [("job-0", True), ("job-0", False)]
    assert [row.lead for row in store.jobs(lead=True)] == [True]
    assert store.count_jobs() == {"running": 1, "success": 2, "queued": 1}


def test_tasks_come_in_the_order_they_were_started(store: Store) -> None:
    train = TaskRow("a", "train", 2, "running", 20.0, None, {}, "f" * 64)
    read = TaskRow("a", "read", 1, "success", 10.0, 11.0, {"data": DIGEST, "note": "/some/path"}, "e" * 64)
    later = TaskRow("a", "evaluate", 1, "waiting", None, None)
    for row in (later, train, read, replace(train, job="b")):
        store.save_task(row)
    assert store.tasks("a") == [read, train, later]
    store.save_task(replace(train, state="success", ended=30.0, outputs={"model": "b" * 64}))
    assert [row.state for row in store.tasks("a")] == ["success", "success", "waiting"]
    assert store.tasks("c") == []


def test_a_finished_task_is_found_by_its_fingerprint(store: Store) -> None:
    done = TaskRow("a", "train", 1, "success", 1.0, 2.0, {"model": DIGEST}, "f" * 64)
    store.save_task(done)
    store.save_task(replace(done, job="b", ended=3.0, state="failed"))
    store.save_task(replace(done, job="c", task="other", fingerprint=""))
    assert store.finished_task("f" * 64) == done
    store.save_task(newer := replace(done, job="d", ended=4.0))
    assert store.finished_task("f" * 64) == newer
    assert store.finished_task("") is None
    assert store.finished_task("0" * 64) is None


def test_an_ended_job_can_be_forgotten_and_a_running_one_not(store: Store) -> None:
    for job in ("a", "b"):
        store.save_job(job_row(job, ended=1.0, state="success"))
        store.save_task(TaskRow(job, "t", 1, "success", 1.0, 2.0))
        store.append_lines(job, "p", [line(1), line(2)])
        store.prune_lines(job, keep=1)
        store.ask_approval(ApprovalRow(job, DIGEST, 1.0, [], {}))
    store.save_job(job_row("a", lead=True))
    with pytest.raises(WrongState, match="job a is running"):
        store.delete_job("a")
    assert store.tasks("a")
    store.save_job(job_row("a", lead=True, ended=2.0))
    store.delete_job("a")
    assert [row.job for row in store.jobs()] == ["b"]
    assert (store.tasks("a"), store.lines("a"), store.approval("a", DIGEST), store.last_line("a", "p")) == (
        [],
        [],
        None,
        0,
    )
    assert store.tasks("b") and store.lines("b") and store.approval("b", DIGEST) and store.last_line("b", "p") == 2
    with pytest.raises(UnknownJob, match="no job 'a'"):
        store.delete_job("a")


def test_digests_in_use_are_those_of_tasks_and_models(store: Store) -> None:
    store.save_task(TaskRow("a", "t", 1, "success", 1.0, 2.0, {"model": DIGEST, "report": "/path/" + "b" * 64}))
    store.add_model(name="m", digest="c" * 64, job="a", task="t", created=1.0, content={})
    assert store.used_digests() == {DIGEST, "c" * 64}


# --- transactions ------------------------------------------------------------------------------------------------


def everything(store: Any) -> None:
    """One of each kind of step."""
    store.save_job(job_row("t"))
    store.save_task(TaskRow("t", "train", 1, "running", 1.0, None))
    store.append_lines("t", "p", [line(1)])
    store.ask_approval(ApprovalRow("t", DIGEST, 1.0, [], {}))
    assert store.heard("p", 1, 1)
    assert store.take_lease("t", "me", 10)
    store.add_model(name="t", digest=DIGEST, job="t", task="train", created=1.0, content={})


def left_of_it(store: Store) -> list[bool]:
    return [
        store.job("t") is not None,
        bool(store.tasks("t")),
        bool(store.lines("t")),
        bool(store.approvals()),
        not store.heard("p", 1, 1),
        store.lease_holder("t") is not None,
        bool(store.models()),
    ]


def test_after_an_exception_nothing_of_a_transaction_is_there(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), store.transaction() as tx:
        everything(tx)
        _ = 1 / 0
    assert not any(left_of_it(store))


def test_a_transaction_is_there_as_a_whole(open_store: OpenStore) -> None:
    with open_store().transaction() as tx:
        everything(tx)
        assert tx.job("t") is not None  # what it wrote, it sees
    assert all(left_of_it(open_store()))


def test_steps_on_the_store_belong_to_the_transaction_of_their_thread(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), store.transaction():
        everything(store)
        _ = 1 / 0
    assert not any(left_of_it(store))


def test_a_step_that_the_database_refused_cannot_be_ignored(store: Store) -> None:
    # NaN is no JSON: the step fails, somebody catches it, and still nothing is kept.
    with pytest.raises(InternalError, match="nothing of it is stored"), store.transaction() as tx:
        tx.save_job(job_row("a"))
        with pytest.raises(InternalError, match="refused"):
            tx.save_job(job_row("b", machine={"x": float("nan")}))
        with pytest.raises(InternalError, match="failed at an earlier step"):
            tx.job("a")
    assert store.jobs() == []


def test_a_refusal_of_ours_can_be_handled_inside_a_transaction(store: Store) -> None:
    with store.transaction() as tx:
        tx.save_job(job_row("a"))
        with pytest.raises(WrongState):
            tx.decide("a", "approve", "me", "")
    assert store.job("a") is not None


def test_transactions_do_not_nest_and_do_not_outlive_their_block(store: Store) -> None:
    with store.transaction() as tx:
        with pytest.raises(InternalError, match="open in this thread"), store.transaction():
            pass
        tx.save_job(job_row("a"))
    assert store.job("a") is not None
    with pytest.raises(InternalError, match="has ended"):
        tx.save_job(job_row("b"))
    with store.transaction() as again:
        assert again.job("a") is not None


def test_many_threads_write_at_once_and_nothing_is_lost(open_store: OpenStore, together: Any) -> None:
    # Two stores on one database stand for two processes: the service, and a command.
    stores = [open_store(), open_store()]

    def work(who: int) -> bool:
        store = stores[who % 2]
        for at in range(8):
            with store.transaction() as tx:
                found = tx.job("shared")
                count = 0 if found is None else found.machine["count"]
                if tx.take_lease("count", f"{who}", 1000):  # on a server, rows are locked by who writes first
                    fresh = tx.job("shared")
                    count = 0 if fresh is None else fresh.machine["count"]
                    tx.save_job(job_row("shared", machine={"count": count + 1}))
                    tx.release_lease("count", f"{who}")
                tx.append_lines("shared", f"p{who}", [line(at)])
        return True

    ends = together({f"w{who}": lambda who=who: work(who) for who in range(6)})
    assert ends == {f"w{who}": True for who in range(6)}
    assert len(stores[0].lines("shared")) == 48
    found = stores[0].job("shared")
    assert found is not None and found.machine["count"] == 48


def test_a_reader_is_not_stopped_by_a_long_transaction(store: Store, together: Any) -> None:
    store.save_job(job_row("a"))
    with store.transaction() as tx:
        tx.save_job(job_row("a", state="success"))
        seen = together({"reader": lambda: store.job("a")})["reader"]
    assert seen == job_row("a")  # what was committed
    assert store.job("a") == job_row("a", state="success")


# --- replay protection, epochs, leases ---------------------------------------------------------------------------


def test_a_message_is_heard_once_and_only_forwards(open_store: OpenStore) -> None:
    store = open_store()
    said = [(1, 1), (1, 1), (1, 3), (1, 2), (2, 0), (1, 9), (2, 0), (2**64 - 1, 2**64 - 1), (2**63, 0)]
    assert [store.heard("a", *one) for one in said] == [True, False, True, False, True, False, False, True, False]
    assert store.heard("b", 1, 1)
    store.close()
    again = open_store()
    assert not again.heard("a", 2**64 - 1, 2**64 - 1)
    assert not again.heard("b", 1, 1)
    assert again.heard("b", 1, 10)  # by value, not as text
    assert not again.heard("b", 1, 9)


@pytest.mark.parametrize(("epoch", "counter"), [(-1, 1), (1, -1), (2**64, 0), (0, 2**64)])
def test_numbers_that_no_message_can_have_are_never_new(store: Store, epoch: int, counter: int) -> None:
    assert not store.heard("a", epoch, counter)
    assert store.heard("a", 0, 0)


def test_of_many_who_hear_the_same_one_takes_it(open_store: OpenStore, together: Any) -> None:
    stores = [open_store(), open_store()]
    for counter in range(5):
        ends = together({f"t{at}": lambda at=at, n=counter: stores[at % 2].heard("a", 1, n) for at in range(4)})
        assert sorted(ends.values()) == [False, False, False, True]


def test_epochs_grow_over_restarts_and_clocks_that_go_back(open_store: OpenStore, clock: Clock) -> None:
    store = open_store()
    first = store.next_epoch()
    assert first == 1_000 * 10**9
    assert store.next_epoch() == first + 1
    clock.now = 10.0
    store.close()
    store = open_store()
    assert store.next_epoch() == first + 2
    assert store.next_epoch(time_ns=5 * 10**18) == 5 * 10**18
    clock.now = 2_000.0
    assert store.next_epoch() == 5 * 10**18 + 1


def test_a_lease_is_held_by_one_and_ends_by_itself(store: Store, clock: Clock) -> None:
    assert store.take_lease("scheduler", "a", 10)
    assert not store.take_lease("scheduler", "b", 10)
    assert store.take_lease("other", "b", 10)
    clock.now += 9
    assert store.take_lease("scheduler", "a", 10)  # held longer
    clock.now += 9.5
    assert store.lease_holder("scheduler") == "a"
    assert not store.take_lease("scheduler", "b", 10)
    clock.now += 0.5
    assert store.lease_holder("scheduler") is None
    assert store.take_lease("scheduler", "b", 10)
    store.release_lease("scheduler", "a")  # not its holder any more
    assert not store.take_lease("scheduler", "a", 10)
    store.release_lease("scheduler", "b")
    assert store.take_lease("scheduler", "a", 10)


def test_of_many_who_want_a_lease_one_gets_it(open_store: OpenStore, together: Any) -> None:
    stores = [open_store(), open_store()]
    ends = together({f"t{at}": lambda at=at: stores[at % 2].take_lease("l", f"t{at}", 10) for at in range(6)})
    assert sum(ends.values()) == 1
    (winner,) = [name for name, got in ends.items() if got]
    assert stores[0].lease_holder("l") == winner


# --- approvals ---------------------------------------------------------------------------------------------------

QUESTION = ApprovalRow("a", DIGEST, 10.0, [{"rule": "r", "outcome": "manual"}], {"minutes": 3.5})


def test_a_question_waits_until_it_is_decided(open_store: OpenStore, clock: Clock) -> None:
    store = open_store()
    store.ask_approval(QUESTION)
    store.ask_approval(replace(QUESTION, job="b", asked=5.0))
    assert [row.job for row in store.approvals()] == ["b", "a"]
    store.close()
    store = open_store()
    decided = store.decide("a", "approve", "eva", "seen the data")
    expected = replace(QUESTION, decided=clock.now, decision="approve", by="eva", reason="seen the data")
    assert decided == expected == store.approval("a", DIGEST)
    assert [row.job for row in store.approvals()] == ["b"]
    assert [row.job for row in store.approvals(waiting=False)] == ["b", "a"]


def test_asking_again_neither_doubles_a_question_nor_undoes_a_decision(store: Store, clock: Clock) -> None:
    store.ask_approval(QUESTION)
    store.ask_approval(replace(QUESTION, asked=20.0, findings=[]))
    assert store.approvals() == [replace(QUESTION, findings=[])]
    store.decide("a", "refuse", "eva", "no")
    store.ask_approval(replace(QUESTION, asked=clock.now))
    assert store.approvals() == []
    # Asked after the decision, it is a new question: a job that is resumed is looked at again.
    store.ask_approval(later := replace(QUESTION, asked=clock.now + 1))
    assert store.approvals() == [later]


def test_nothing_is_decided_twice_or_without_a_question(store: Store) -> None:
    store.ask_approval(QUESTION)
    with pytest.raises(ConfigurationError, match="no question about job 'b' waits") as error:
        store.decide("b", "approve", "eva", "")
    assert "'a'" in error.value.hint or "a" in error.value.hint
    with pytest.raises(WrongState, match="is not about digest"):
        store.decide("a", "approve", "eva", "", digest="b" * 64)
    with pytest.raises(WrongState, match="'approve' or 'refuse'"):
        store.decide("a", "yes", "eva", "")  # type: ignore[arg-type]
    store.decide("a", "refuse", "eva", "", digest=DIGEST)
    with pytest.raises(WrongState, match="no question"):
        store.decide("a", "approve", "eva", "")
    found = store.approval("a", DIGEST)
    assert found is not None and found.decision == "refuse"


def test_two_questions_about_one_job_need_the_digest(store: Store) -> None:
    store.ask_approval(QUESTION)
    store.ask_approval(replace(QUESTION, digest="b" * 64))
    with pytest.raises(WrongState, match="2 questions"):
        store.decide("a", "approve", "eva", "")
    store.decide("a", "approve", "eva", "", digest="b" * 64)
    assert [row.digest for row in store.approvals()] == [DIGEST]


# --- lines -------------------------------------------------------------------------------------------------------


def test_lines_come_in_the_order_of_their_arrival_and_once(store: Store) -> None:
    assert store.append_lines("a", "p", [line(1), line(2)]) == 2
    assert store.append_lines("a", "q", [line(1)]) == 1
    assert store.append_lines("a", "p", [line(2), line(3), line(3)]) == 1
    assert store.append_lines("a", "p", []) == 0
    assert store.append_lines("b", "p", [line(1)]) == 1
    found = store.lines("a")
    assert [(party, one.number) for _, party, one in found] == [("p", 1), ("p", 2), ("q", 1), ("p", 3)]
    ids = [number for number, _, _ in found]
    assert ids == sorted(set(ids))
    assert [one.number for _, _, one in store.lines("a", party="p")] == [1, 2, 3]
    assert store.lines("a", after=ids[1]) == found[2:]
    assert store.lines("a", after=ids[-1]) == []
    assert store.lines("a", limit=2) == found[:2]
    assert (store.last_line("a", "p"), store.last_line("a", "z")) == (3, 0)


def test_a_repeated_number_keeps_what_was_first(store: Store) -> None:
    store.append_lines("a", "p", [line(1, event="first")])
    store.append_lines("a", "p", [line(1, event="other")])
    assert [one.event for _, _, one in store.lines("a")] == ["first"]


def test_what_a_partner_puts_into_a_line_stops_nothing(store: Store) -> None:
    deep: Any = 1
    for _ in range(5000):
        deep = [deep]
    odd = line(1, event="NUL \0 here", fields={**ODD, "nan": float("nan"), "inf": [-float("inf")], "deep": deep})
    assert store.append_lines("a", "p", [odd, line(2)]) == 2
    found = store.lines("a")[0][2]
    assert found.event == odd.event
    assert found.fields["text"] == ODD["text"]
    assert found.fields["nan"] is None and found.fields["inf"] == [None]
    assert str(found.fields["deep"]).count("[") < 30


def test_pruned_lines_do_not_come_back(open_store: OpenStore) -> None:
    store = open_store()
    for number in range(1, 7):
        store.append_lines("a", "p" if number % 2 else "q", [line(number)])
    store.append_lines("b", "p", [line(1)])
    last = store.lines("a")[-1][0]
    assert store.prune_lines("a", keep=2) == 4
    assert [one.number for _, _, one in store.lines("a")] == [5, 6]
    assert store.prune_lines("a", keep=2) == 0
    assert store.append_lines("a", "p", [line(n) for n in (1, 3, 5, 7)]) == 1
    assert store.prune_lines("a", keep=0) == 3
    assert store.lines("a") == []
    store.close()
    store = open_store()
    assert store.append_lines("a", "q", [line(n) for n in range(1, 9)]) == 2  # 7 and 8
    assert min(number for number, _, _ in store.lines("a")) > last  # no id is given twice
    assert store.last_line("a", "p") == 7
    assert len(store.lines("b")) == 1


def test_who_follows_lines_by_id_misses_none(open_store: OpenStore, together: Any) -> None:
    # Writers in two "processes"; the reader only ever goes forward.
    stores = [open_store(), open_store()]
    seen: list[tuple[str, int]] = []
    done = threading.Event()

    def write(who: int) -> None:
        for number in range(15):
            stores[who % 2].append_lines("a", f"p{who}", [line(number)])

    def read() -> None:
        after = 0
        while True:
            last_look = done.is_set()
            found = stores[1].lines("a", after=after, limit=7)
            seen.extend((party, one.number) for _, party, one in found)
            after = found[-1][0] if found else after
            if last_look and not found:
                return

    def write_all() -> None:
        together({f"w{who}": lambda who=who: write(who) for who in range(3)})
        done.set()

    together({"writers": write_all, "reader": read})
    assert sorted(seen) == sorted((f"p{who}", number) for who in range(3) for number in range(15))


# --- models ------------------------------------------------------------------------------------------------------


def add(store: Store, name: str = "m", digest: str = DIGEST, job: str = "a", created: float = 1.0) -> int:
    return store.add_model(name=name, digest=digest, job=job, task="t", created=created, content={"k": 1}).version


def test_versions_of_a_name_count_up_and_the_same_output_is_the_same_version(store: Store) -> None:
    assert [add(store), add(store, job="b"), add(store), add(store, digest="b" * 64), add(store, name="n")] == [
        1,
        2,
        1,
        3,
        1,
    ]
    assert [row.version for row in store.models(name="m")] == [3, 2, 1]
    assert {row.name for row in store.models(digest="aaaa")} == {"m", "n"}
    assert store.models(digest="%") == [] and store.models(digest="_" * 64) == []
    assert store.remove_model("m", 2) and not store.remove_model("m", 2)
    assert [row.version for row in store.models(name="m")] == [3, 1]


def test_versions_are_given_once_when_many_register(open_store: OpenStore, together: Any) -> None:
    stores = [open_store(), open_store()]
    ends = together({f"t{at}": lambda at=at: add(stores[at % 2], job=f"j{at}") for at in range(6)})
    assert sorted(ends.values()) == [1, 2, 3, 4, 5, 6]


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a\0b", "half \ud800"])
def test_text_that_is_none_is_refused_by_both_databases(store: Store, text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"jobs\.name: .* holds a character"):
        store.save_job(job_row("a", name=text))
    with pytest.raises(ConfigurationError, match=r"jobs\.job"):
        store.job(text)
    with pytest.raises(ConfigurationError, match=r"senders\.sender"):
        store.heard(text, 1, 1)
    store.ask_approval(QUESTION)
    with pytest.raises(ConfigurationError, match=r"approvals\.reason"):
        store.decide("a", "approve", "eva", text)
    assert store.approvals() == [QUESTION]
    assert store.jobs() == []


def test_quotes_and_wildcards_are_only_text(store: Store) -> None:
    names = ["'; DROP TABLE jobs; --", '"', "%", "_", "\\", "é\U0001f600", "", " a "]
    for name in names:
        store.save_job(job_row(name, name=name))
    assert {row.job for row in store.jobs()} == set(names)
    for name in names:
        found = store.job(name)
        assert found is not None and found.name == name


def test_a_value_that_is_no_json_leaves_what_was_there(store: Store) -> None:
    store.save_job(job_row("a"))
    for bad in ({"x": float("inf")}, {"x": {1, 2}}):
        with pytest.raises(InternalError, match="refused what it was given"):
            store.save_job(job_row("a", machine=bad))
    assert store.job("a") == job_row("a")


def test_a_closed_store_says_so(store: Store) -> None:
    store.check()
    store.close()
    store.close()
    with pytest.raises(StoreLost, match="was closed"):
        store.check()
    with pytest.raises(StoreLost, match="was closed"), store.transaction():
        pass


def test_rows_are_values() -> None:
    with pytest.raises(AttributeError):
        job_row().state = "x"  # type: ignore[misc]
    assert isinstance(job_row(), JobRow)
