"""Jobs with a process per party over a real broker: the same results as in one process, and clear ends."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest

from fate_llm.core.errors import (
    BrokerLost,
    BrokerRefused,
    ConfigurationError,
    DataError,
    InternalError,
    JobCancelled,
    PeerFailed,
    PolicyError,
)
from fate_llm.pipelines import check
from fate_llm.runtime.broker import BrokerNode, free_port
from fate_llm.runtime.events import Event
from fate_llm.runtime.federation import Topology
from fate_llm.runtime.job import JobResult, Submission
from fate_llm.runtime.processes import ProcessRuntime
from fate_llm.runtime.submit import over_broker
from tests.brokers import broker, leftovers, live_federation, vhost  # noqa: F401
from tests.runtime.conftest import MakeJob
from tests.runtime.toys import install, toy_pipeline

pytestmark = pytest.mark.slow

STEPS: dict[str, Any] = {"steps": {"component": "stepper", "params": {"rounds": 3}}}
Run = Callable[..., JobResult]


def stepper(**params: Any) -> dict[str, Any]:
    return toy_pipeline(steps={"component": "stepper", "params": {"rounds": 3, **params}})


@pytest.fixture
def url(broker: BrokerNode, vhost: str) -> str:  # noqa: F811
    return f"{broker.url(vhost=quote(vhost, safe=''))}?plaintext=loopback".replace("%25", "%")


@pytest.fixture
def submission(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Submission]:
    monkeypatch.setenv("PYTHONPATH", install(tmp_path / "site"))

    def make(data: dict[str, Any], *observers: Callable[[Event], None], **brokers: str) -> Submission:
        spec = check(data)
        return Submission(
            spec,
            job_id="job-1",
            base=tmp_path,
            workdir=tmp_path / "jobs",
            now=time.time,
            observers=observers,
            runtime=ProcessRuntime({party: brokers.get(party, url) for party in spec.members}, timing={"linger": 2.0}),
        )

    return make


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path, broker: BrokerNode, vhost: str) -> Iterator[None]:  # noqa: F811
    """No process, queue or connection survives a job, whatever way it ended."""
    yield
    assert not children(tmp_path), "a party's process is left"
    found = leftovers(broker, vhost)
    assert (found["queues"], found["connections"]) == ([], [])


def children(folder: Path) -> list[str]:
    """Workers that were given this test's PYTHONPATH, whosever children they are by now."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words, variables = path.read_bytes(), path.with_name("environ").read_bytes()
        except OSError:
            continue
        if b"fate_llm.runtime.worker" in words and str(folder).encode() in variables:
            found.append(path.parent.name)
    return found


def model(result: JobResult, party: str = "a") -> bytes:
    return Path(result.outputs[party]["steps"]["model"]).read_bytes()


def test_a_job_ends_as_in_one_process_bit_by_bit(submission: Callable[..., Submission], make_job: MakeJob) -> None:
    # Given the same pipeline in one process and in four
    alone = make_job(stepper(), job_id="alone").run()
    seen: list[Event] = []
    together = submission(stepper(), seen.append).run()
    # Then every party has the same bits, and the supervisor has heard all of them
    assert alone.status == together.status == "success", together.error
    assert model(alone) == model(together) == model(together, "b") == model(together, "c")
    assert {event.party for event in seen if event.kind == "party_finished"} == {"a", "b", "c", "z"}
    # And the messages are counted alike: the same envelopes went through the broker
    here, there = (json.loads((job.folder / "manifest.json").read_text()) for job in (alone, together))
    assert there["runtime"] == "processes"
    for sender, receiver in (("a", "z"), ("z", "b")):
        assert there["traffic"][sender][receiver]["sent"] == here["traffic"][sender][receiver]["sent"]


def test_masked_sums_in_processes_are_the_plain_ones_within_their_bound(
    submission: Callable[..., Submission], make_job: MakeJob
) -> None:
    # Given the same pipeline in the open in one process, and masked in four with identities of their own
    alone = make_job(stepper(), job_id="alone").run()
    masked = submission(stepper(protection="secagg", protection_params={"clip": 16.0, "largest_weight": 1.0})).run()
    assert alone.status == masked.status == "success", masked.error
    # Then everybody has the same state, and it is the plain one but for the grid
    assert model(masked) == model(masked, "b") == model(masked, "c")
    mine, other = (
        np.frombuffer(model(job).rpartition(b'{"')[0], np.float32).astype(np.float64) for job in (alone, masked)
    )
    assert not np.array_equal(mine, other)
    assert np.abs(mine - other).max() < 1e-6
    # And what is left of the sums says that they were answered, and nothing else
    assert {path.name for path in masked.folder.rglob("*.entry")} == {"answered.entry"}


def test_each_party_leaves_metrics_and_no_journal(submission: Callable[..., Submission]) -> None:
    result = submission(stepper()).run()
    text = (result.folder / "parties/b/federation.prom").read_text()
    assert 'fate_llm_link_messages_sent_total{party="b",peer="z"}' in text
    assert 'fate_llm_broker_confirmed_total{party="b"}' in text
    assert not (result.folder / "parties/b/link").exists()
    secrets = [path for path in result.folder.rglob("*") if path.is_file() and b"guest:guest" in path.read_bytes()]
    assert not secrets, "the broker's password is nowhere in the job's folder"


def test_an_error_at_one_party_ends_all_and_is_the_cause(submission: Callable[..., Submission]) -> None:
    data = toy_pipeline(meet={"component": "breaker", "params": {"at": "b"}})
    result = submission(data).run()
    assert result.status == "failed"
    assert isinstance(result.error, DataError)
    assert result.error.message == "broken at b"


def test_a_bug_in_a_component_is_an_internal_error(submission: Callable[..., Submission]) -> None:
    data = toy_pipeline(meet={"component": "breaker", "params": {"at": "c", "error": "ValueError"}})
    result = submission(data).run()
    assert isinstance(result.error, InternalError)
    assert "ValueError: broken at c" in result.error.message
    assert "broken at c" in (result.folder / "parties/c/log.txt").read_text()


@pytest.mark.parametrize("victim", ["b", "a"])
def test_a_killed_party_ends_the_job_at_once_with_its_name(submission: Callable[..., Submission], victim: str) -> None:
    result = submission(stepper(die=f"{victim}/2")).run()
    assert result.status == "failed"
    assert isinstance(result.error, PeerFailed)
    assert f"the process of {victim} ended without a word (killed by signal 9)" in result.error.message
    errors = json.loads((result.folder / "manifest.json").read_text())["errors"]
    assert victim in errors["z"]["message"], "the others know who"


def test_a_killed_party_and_a_retry_give_the_same_bits(
    submission: Callable[..., Submission], make_job: MakeJob
) -> None:
    alone = make_job(stepper(), job_id="alone").run()
    data = stepper(die="c/2")
    data["job"]["retries"] = 1
    result = submission(data).run()
    assert result.status == "success", result.error
    assert model(result) == model(alone)


def test_a_cancelled_job_stops_everywhere(submission: Callable[..., Submission]) -> None:
    jobs: list[Submission] = []

    def stop(event: Event) -> None:
        if event.kind == "note" and event.fields.get("text") == "waiting":
            threading.Thread(target=jobs[0].cancel, args=("enough",)).start()

    data = toy_pipeline(wait={"component": "waiter"})
    jobs.append(submission(data, stop))
    result = jobs[0].run()
    assert result.status == "cancelled"
    assert isinstance(result.error, JobCancelled)
    assert "enough" in result.error.message


def test_ctrl_c_ends_all_processes(submission: Callable[..., Submission], monkeypatch: pytest.MonkeyPatch) -> None:
    from fate_llm.runtime.processes import ProcessJob

    original = ProcessJob._wait
    waited: list[bool] = []

    def interrupted(self: ProcessJob, readers: list[threading.Thread]) -> None:
        class Reader:
            def is_alive(self) -> bool:
                return not waited

            def join(self, timeout: float) -> None:
                waited.append(True)
                raise KeyboardInterrupt

        original(self, [Reader(), *readers])  # type: ignore[list-item]

    monkeypatch.setattr(ProcessJob, "_wait", interrupted)
    monkeypatch.setattr("fate_llm.runtime.processes._LAST_WORDS", 20.0)
    with pytest.raises(KeyboardInterrupt):
        submission(stepper(pause=0.2)).run()


def test_the_parties_end_when_their_starter_is_killed(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import subprocess
    import sys

    monkeypatch.setenv("PYTHONPATH", install(tmp_path / "site"))
    (tmp_path / "p.json").write_text(json.dumps(stepper(pause=1.0, rounds=50)))
    script = (
        "import json, sys, time; from pathlib import Path; from fate_llm.pipelines import check\n"
        "from fate_llm.runtime.job import Submission; from fate_llm.runtime.processes import ProcessRuntime\n"
        "spec = check(json.loads(Path(sys.argv[1]).read_text())); base = Path(sys.argv[1]).parent\n"
        "def say(event): print(event.kind, flush=True)\n"
        "Submission(spec, job_id='j', base=base, workdir=base / 'jobs', now=time.time, observers=(say,),\n"
        "    runtime=ProcessRuntime({p: sys.argv[2] for p in spec.members})).run()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "p.json"), url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ)) as starter:
        assert starter.stdout is not None
        assert any(line.strip() == "round_state" for line in starter.stdout)
        starter.kill()
    until = time.monotonic() + 60
    while children(tmp_path) and time.monotonic() < until:
        time.sleep(0.1)
    assert not children(tmp_path)


def test_a_wrong_password_is_said_at_once_and_not_repeated(submission: Callable[..., Submission], url: str) -> None:
    wrong = url.replace("guest:guest", "guest:secret-word")
    result = submission(stepper(), b=wrong).run()
    assert result.status == "failed"
    assert isinstance(result.error, BrokerRefused)
    assert "refuses user 'guest'" in result.error.message
    assert "secret-word" not in (result.folder / "manifest.json").read_text()


def test_a_broker_that_is_not_there_is_an_error(submission: Callable[..., Submission], make_job: MakeJob) -> None:
    nowhere = f"amqp://guest:guest@127.0.0.1:{free_port()}/%2F?plaintext=loopback"
    result = submission(stepper(), a=nowhere, b=nowhere, c=nowhere, z=nowhere).run()
    assert isinstance(result.error, BrokerLost)
    assert "cannot be reached" in result.error.message


def test_an_experiment_stays_in_the_local_runtime(submission: Callable[..., Submission]) -> None:
    with pytest.raises(PolicyError, match="is an experiment"):
        submission({**stepper(), "experiment": True})


def test_whose_broker_is_whose() -> None:
    spec = check(stepper())
    one, two = "amqps://u:p@h/v", "amqps://u:p@other/v?queues=quorum"
    assert over_broker(spec, [one])._brokers == dict.fromkeys("abcz", one)  # type: ignore[attr-defined]
    found = over_broker(spec, [one, f"b={two}"])._brokers  # type: ignore[attr-defined]
    assert found == {"a": one, "b": two, "c": one, "z": one}
    with pytest.raises(ConfigurationError, match="no broker for b, c, z"):
        over_broker(spec, [f"a={one}"])
    with pytest.raises(ConfigurationError, match="more than one broker"):
        over_broker(spec, [one, two])
    with pytest.raises(ConfigurationError, match="a broker for 'bank', who is no party"):
        over_broker(spec, [one, f"bank={two}"])
    with pytest.raises(ConfigurationError, match="in clear"):
        over_broker(spec, ["amqp://u:p@example.org/v"])


@pytest.mark.parametrize("topology", ["shared", "per-party"])
def test_both_topologies_with_the_rights_that_init_gives(
    topology: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_job: MakeJob
) -> None:
    # Given the brokers that `federation init` describes, TLS only, each party with its own user
    monkeypatch.setenv("PYTHONPATH", install(tmp_path / "site"))
    data = stepper(size=2_000_000)
    data["parties"] = {"guest": "a", "hosts": ["b"]}
    alone = make_job(data, job_id="alone").run()
    with live_federation("a", "b", topology=topology) as brokers:
        files = [f"{party}={brokers.folder / 'parties' / party / 'party.yaml'}" for party in "ab"]
        # When a job runs over them
        spec = check(data)
        job = Submission(
            spec,
            job_id="job-1",
            base=tmp_path,
            workdir=tmp_path / "jobs",
            now=time.time,
            runtime=over_broker(spec, files),
        )
        result = job.run()
        # Then it ends with the same bits, and nothing of it is left on any broker
        assert result.status == "success", result.error
        assert model(result) == model(alone) == model(result, "b")
        for node in brokers.nodes.values():
            kept = [name for name in leftovers(node, brokers.federation.vhost)["queues"] if "/job/" in name]
            assert not kept
