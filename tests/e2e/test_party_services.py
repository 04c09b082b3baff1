"""Whole federations of party services: processes of their own, a real broker, the command line and the HTTP API.

One federation of a (guest), b, c and z (arbiter) serves all tests of this module but the last; tests change policies,
and the fixture puts them back. Waiting is for what the services say, never for time.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from fate_llm.core import plugins
from fate_llm.core.errors import FateError, PolicyError, WrongState
from fate_llm.pipelines import check
from fate_llm.runtime.job import Submission
from fate_llm.runtime.record.audit import audit_files
from fate_llm.runtime.record.transcript import read_transcript
from fate_llm.runtime.service.post import Post
from fate_llm.runtime.service.words import JobState, Line, Lines, News, PartState, Report
from fate_llm.runtime.trust.home import open_home
from fate_llm.runtime.trust.jobspec import Reuse, SignedSpecification, make_specification
from tests.brokers import LiveFederation, live_federation
from tests.canaries import find_canaries
from tests.runtime import toys
from tests.services import OPEN_POLICY, LiveParty, LiveServices, live_services, workers_of

pytestmark = [pytest.mark.slow, pytest.mark.broker]

MEMBERS = ("a", "b", "c", "z")
POLICY = OPEN_POLICY % {"members": ", ".join(MEMBERS)}
SECRET = "Frau Ilse Kammerlander, IBAN AT61 1904 3002 3457 3201, owes 40 211 EUR"


def steps(**params: Any) -> dict[str, Any]:
    return toys.toy_pipeline(steps={"component": "stepper", "params": params})


def breaks(at: str, error: str = "PeerViolation", **job: Any) -> dict[str, Any]:
    data = toys.toy_pipeline(bad={"component": "breaker", "params": {"at": at, "error": error}})
    data["job"] |= job
    return data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> str:
    return toys.install(tmp_path_factory.mktemp("toys") / "site")


@pytest.fixture(scope="module")
def federation() -> Iterator[LiveFederation]:
    with live_federation(*MEMBERS, topology="shared") as live:
        yield live


@pytest.fixture(scope="module")
def running(federation: LiveFederation, site: str) -> Iterator[LiveServices]:
    for party in MEMBERS:
        home = federation.folder / "parties" / party
        (home / "notes.txt").write_text(SECRET)
        entries = {"notes": {"path": "notes.txt", "kind": "dataset"}} if party == "b" else {}
        (home / "catalog.yaml").write_text(yaml.safe_dump({"version": 1, "entries": entries}))
        lines = (home / "party.yaml").read_text()
        (home / "party.yaml").write_text(lines + "resources: {cpus: 2, memory: 8GiB}\n")
    settings = "heartbeat: 0.5\nlost_after: 60\n"
    with live_services(federation, toys=site, settings=settings, policies=dict.fromkeys(MEMBERS, POLICY)) as services:
        yield services


@pytest.fixture
def services(running: LiveServices, monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveServices]:
    """The federation with the open policy everywhere, whatever a test before has done."""
    monkeypatch.setattr(plugins, "_installed", toys.installed)
    yield running
    for party in running.parties.values():
        write_policy(party, POLICY)


def write_policy(party: LiveParty, text: str | None) -> None:
    path = party.home / "policy.yaml"
    path.unlink() if text is None else path.write_text(text)


def cli(party: LiveParty, *arguments: str, exit_code: int = 0) -> str:
    """What a command prints for one party's home."""
    done = subprocess.run(
        [sys.executable, "-m", "fate_llm", *arguments, "--home", str(party.home)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **party.environment},
    )
    assert done.returncode == exit_code, (arguments, done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def until_state(services: LiveServices, job: str, state: str, *, party: str = "a") -> None:
    live = services[party]
    live.until(lambda: live.client.job(job)["state"] == state, what=f"{job} to be {state}")


def until_part(services: LiveServices, job: str, party: str, state: str) -> None:
    live = services[party]

    def there() -> bool:
        with contextlib.suppress(FateError):
            return bool(live.client.job(job)["parts"][party]["state"] == state)
        return False

    live.until(there, what=f"the part of {party} in {job} to be {state}")


def audit_lines(party: LiveParty, job: str, kind: str) -> list[dict[str, Any]]:
    found = []
    for path in audit_files(party.home / "state/audit"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found += [line["fields"] for line in lines if line["kind"] == kind and line["fields"].get("job") == job]
    return found


def rounds_run(party: LiveParty, job: str) -> list[int]:
    return [event["round"] for event in party.events(job) if event["event"] == "round_closed"]


# --- 1. a job, and its record -----------------------------------------------------------------------------------------


def test_a_job_of_services_has_the_bits_and_the_record_that_it_should(services: LiveServices, tmp_path: Path) -> None:
    # Given the same pipeline run in one process
    data = steps(rounds=3, talk=True)
    here = Submission(check(data), job_id="here", base=tmp_path, workdir=tmp_path / "jobs", now=time.time).run()
    wanted = Path(here.outputs["a"]["steps"]["model"]).read_bytes()
    # When the services run it
    job = services.submit(data)
    views = services.ended_everywhere(job)
    # Then it has ended well everywhere, with the same bits
    assert {party: view["state"] for party, view in views.items()} == dict.fromkeys(MEMBERS, "success")
    for party in ("a", "b", "c"):
        assert services.output(job, party, "steps", "model") == wanted
    assert all(set(view["parts"]) == set(MEMBERS) for view in views.values())
    # And the dossiers are equal, and true for whoever has nothing but the roster
    dossiers = [services[party].client.dossier(job) for party in MEMBERS]
    assert all(found == dossiers[0] for found in dossiers)
    assert set(dossiers[0]["statements"]) == set(MEMBERS)
    roster = tmp_path / "federation.yaml"
    roster.write_bytes((services["b"].home / "federation.yaml").read_bytes())
    file = tmp_path / "dossier.json"
    assert "signed by a, b, c, z" in cli(services["b"], "jobs", "dossier", job, str(file))
    command = [sys.executable, "-m", "fate_llm", "audit", "dossier", "verify", str(file), "--roster", str(roster)]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["ok"] is True
    # A changed digest in it is found
    file.write_text(file.read_text().replace(dossiers[0]["statements"]["b"]["statement"]["job"], "another", 1))
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode != 0
    # And every message that anybody received is in its sender's audit log, noted as sent, with the same digest
    left = {
        (party, line["to"], line["task"], line["message"], line["round"], line["ordinal"]): line["digest"]
        for party in MEMBERS
        for line in audit_lines(services[party], job, "left")
    }
    heard = 0
    for party in MEMBERS:
        transcript = services[party].job_folder(job) / "parties" / party / "transcript.jsonl"
        for one in read_transcript(transcript).messages:
            if one.direction == "received":
                assert left[one.peer, party, one.task, one.kind, one.round, one.ordinal] == one.digest
                heard += 1
    assert heard > 20
    assert json.loads(cli(services["b"], "audit", "verify", "--json"))["ok"] is True


# --- 2. policies ------------------------------------------------------------------------------------------------------

REFUSALS = {
    "initiators": (POLICY.replace("initiators: [a, ", "initiators: ["), "initiators"),
    "components": (POLICY.replace("words: {}, ", ""), "components"),
    "params": (POLICY.replace("words: {}", "words: {params: {times: {max: 1}}}"), "params.words.times"),
    "privacy": (POLICY.replace("require: none", "require: differential_privacy"), "privacy"),
    "schedule": (POLICY.replace("schedule: always\n", ""), "schedule"),
    "resources": (POLICY.replace("cpus: 2", "cpus: 0.5"), "resources.cpus"),
    "broken": ("version: 1\nintiators: [a]\n", "policy or catalogue"),
    "missing": (None, "policy or catalogue"),
    "template": ("version: 1\n", "initiators"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_policy_refuses_before_anything_runs(services: LiveServices, kind: str) -> None:
    policy, rule = REFUSALS[kind]
    write_policy(services["b"], policy)
    job = services.submit(toys.toy_pipeline())
    found = services.ended(job)
    # Then the guest is told who refused, and which rule
    assert (found["state"], found["trouble"]["code"], found["trouble"]["party"]) == ("failed", "policy_refused", "b")
    assert rule in found["trouble"]["message"] or rule in found["parts"]["b"]["reason"], found["trouble"]
    # And nothing has run anywhere, and b's audit log has its decision
    for party in MEMBERS:
        services.ended(job, party=party)
        assert services[party].events(job) == []
        assert audit_lines(services[party], job, "left") == audit_lines(services[party], job, "started") == []
    (decision,) = audit_lines(services["b"], job, "decision")
    assert decision["verdict"] == "refuse"
    # And no path of b's is told to others
    assert str(services["b"].home) not in json.dumps([services[party].client.job(job) for party in ("a", "c", "z")])


# --- 3. people --------------------------------------------------------------------------------------------------------


def test_a_person_decides_and_a_restart_forgets_no_question(services: LiveServices) -> None:
    write_policy(services["b"], POLICY.replace("manual: []", "manual: [any]"))
    job = services.submit(toys.toy_pipeline())
    until_part(services, job, "b", "approval")
    assert services.state(job) == "invited"
    # When b's service is killed and started again, the question still waits
    services["b"].kill()
    services["b"].start().ready()
    assert job in cli(services["b"], "party", "approvals", "list")
    (row,) = [row for row in services["b"].client.approvals() if row["job"] == job]
    shown = cli(services["b"], "party", "approvals", "show", job)
    assert row["digest"] in shown
    assert "manual.any" in shown
    # A person who has looked at another digest is refused
    with pytest.raises(WrongState):
        services["b"].client.decide(job, decision="approve", digest="0" * 64)
    assert "what waits is" in cli(services["b"], "party", "approvals", "approve", job, "--digest", "00", exit_code=2)
    # And a yes lets it run
    cli(services["b"], "party", "approvals", "approve", job, "--reason", "looks fine", "--digest", row["digest"][:12])
    assert services.ended(job)["state"] == "success"
    (line,) = audit_lines(services["b"], job, "approval")
    assert (line["decision"], line["reason"], line["digest"]) == ("approve", "looks fine", row["digest"])
    assert "does not wait" in cli(services["b"], "party", "approvals", "approve", job, exit_code=2)


def test_a_no_ends_the_job_and_is_asked_about_again_when_it_is_resumed(services: LiveServices) -> None:
    write_policy(services["c"], POLICY.replace("manual: []", "manual: [any]"))
    job = services.submit(toys.toy_pipeline())
    until_part(services, job, "c", "approval")
    cli(services["c"], "party", "approvals", "refuse", job, "--reason", "not this week")
    found = services.ended(job)
    assert found["state"] == "failed"
    assert "not this week" in found["trouble"]["message"]
    services.ended(job, party="c")
    assert services["c"].client.approvals() == []
    # When the guest tries again, the old no does not answer for the person
    cli(services["a"], "jobs", "resume", job, "--reason", "next week")
    until_part(services, job, "c", "approval")
    cli(services["c"], "party", "approvals", "approve", job)
    assert services.ended(job)["state"] == "success"


def test_a_job_that_ends_while_people_are_asked_asks_no_more(services: LiveServices) -> None:
    write_policy(services["b"], POLICY.replace("manual: []", "manual: [new_initiator]").replace("[a, b", "[c, a, b"))
    data = toys.toy_pipeline()
    data["parties"] = {"guest": "c", "hosts": ["a", "b"], "arbiter": "z"}
    job = services.submit(data, party="c")
    until_part(services, job, "b", "approval")
    services["c"].client.cancel(job, reason="never mind")
    services.ended(job, party="b")
    assert services["b"].client.approvals() == []
    # And a job that was never let in does not make its initiator known
    second = services.submit(data, party="c")
    until_part(services, second, "b", "approval")
    services["c"].client.cancel(second)
    services.ended(second, party="b")


# --- 4. cancel --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("party", "moment"), [("a", "invited"), ("b", "invited"), ("a", "running"), ("b", "running"), ("z", "running")]
)
def test_every_party_may_cancel(services: LiveServices, party: str, moment: str) -> None:
    if moment == "invited":
        write_policy(services["c"], POLICY.replace("manual: []", "manual: [any]"))
    data = toys.toy_pipeline(wait={"component": "waiter"}) if moment == "running" else toys.toy_pipeline()
    job = services.submit(data)
    until_state(services, job, moment, party=party)
    if moment == "running":
        services[party].until(lambda: services["a"].events(job) and services["b"].events(job))
    assert "cancelled" in cli(services[party], "jobs", "cancel", job, "--reason", "enough") or party != "a"
    views = services.ended_everywhere(job)
    assert {view["state"] for view in views.values()} == {"cancelled"}
    assert "enough" in views["c"]["trouble"]["message"]
    assert all(job not in str(services[p].job_folder(job)) or workers_of(services[p].home) == [] for p in MEMBERS)
    with pytest.raises(WrongState, match="has ended"):
        services[party].client.cancel(job)


def test_ctrl_c_of_submit_leaves_the_job_running(services: LiveServices, tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(yaml.safe_dump(steps(rounds=4, pause=0.5)))
    script = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script += "from fate_llm.cli.main import main\nmain(sys.argv[1:])\n"
    arguments = ["submit", str(file), "--home", str(services["a"].home)]
    environment = {**os.environ, **services["a"].environment, "PYTHONUNBUFFERED": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", script, *arguments], env=environment, **pipes)
    assert process.stdout is not None
    first = process.stdout.readline()
    job = first.split()[1].rstrip(":")
    until_state(services, job, "running")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, (out, err)
    assert "the job goes on" in err
    assert f"fate_llm jobs cancel {job}" in err
    assert "Traceback" not in err
    assert services.ended(job)["state"] == "success"


# --- 5. failures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["b", "z"])
def test_a_failing_component_fails_the_job_everywhere_with_its_cause(services: LiveServices, at: str) -> None:
    job = services.submit(breaks(at, retries=1))
    for party, view in services.ended_everywhere(job).items():
        assert (view["state"], view["attempt"]) == ("failed", 2), party
        assert (view["trouble"]["party"], view["trouble"]["code"]) == (at, "peer_violation"), party
        assert "broken at" in view["trouble"]["message"]
        # What every party did is known at every party, also when its service looks it up later
        assert view["parts"][at]["state"] == "failed"
        assert "broken at" in services[party].client.job(job)["trouble"]["message"]
    assert services["b"].client.dossier(job)["ending"]["trouble"]["party"] == at


def test_what_quotes_data_stays_where_it_was_found(services: LiveServices) -> None:
    job = services.submit(breaks("b", "DataError"))
    views = services.ended_everywhere(job)
    assert views["a"]["trouble"]["code"] == "data_invalid"
    for party in ("a", "c", "z"):
        assert "broken at b" not in json.dumps([views[party], services[party].client.lines(job, limit=5000)])


def test_resume_goes_on_from_the_last_round(services: LiveServices) -> None:
    job = services.submit(steps(rounds=6, pause=0.4))
    services["a"].until(lambda: len(rounds_run(services["z"], job)) >= 2, what="two rounds")
    services["b"].client.cancel(job, reason="we need the machine")
    services.ended_everywhere(job)
    done = max(rounds_run(services["z"], job))
    assert done < 6
    assert "running" in cli(services["a"], "jobs", "resume", job) or services.state(job) != "cancelled"
    views = services.ended_everywhere(job)
    assert {view["state"] for view in views.values()} == {"success"}
    assert {view["attempt"] for view in views.values()} == {2}
    # Every round was closed; at most the one that was under way when it stopped was run twice
    closed = rounds_run(services["z"], job)
    assert set(closed) == set(range(1, 7))
    assert len(closed) <= 7
    fresh = services.submit(steps(rounds=6))
    services.ended(fresh)
    assert services.output(job, "c", "steps", "model") == services.output(fresh, "c", "steps", "model")


# --- 6. run again -----------------------------------------------------------------------------------------------------


def test_rerun_takes_over_what_was_made(services: LiveServices) -> None:
    job = services.submit(toys.toy_pipeline())
    assert services.ended(job)["state"] == "success"
    again = json.loads(cli(services["a"], "jobs", "rerun", job, "--from", "add", "--json"))["job"]
    views = services.ended_everywhere(again)
    assert {view["state"] for view in views.values()} == {"success"}, views["a"]["trouble"]
    for party in ("a", "b", "c"):
        assert services.output(again, party, "words", "dataset") == services.output(job, party, "words", "dataset")
        started = [event["task"] for event in services[party].events(again) if event["event"] == "task_started"]
        assert started == ["add"]
    error = cli(services["a"], "jobs", "rerun", job, "--from", "wrods", exit_code=2)
    assert "Its tasks: words, add" in error
    # When b has thrown its outputs away, nothing runs
    for path in (services["b"].home / "state/artifacts/manifests").glob("*.json"):
        path.unlink()
    third = services["a"].client.rerun(job, from_task="add")["job"]
    found = services.ended(third)
    assert found["state"] == "failed"
    assert "not kept here" in found["trouble"]["message"]
    assert services["a"].events(third) == []


# --- 7. room ----------------------------------------------------------------------------------------------------------


def test_jobs_wait_for_room_by_priority_and_what_never_fits_blocks_nobody(services: LiveServices) -> None:
    def sized(cpus: float, priority: int, rounds: int = 1) -> dict[str, Any]:
        data = steps(rounds=rounds, pause=0.3)
        data["job"] |= {"resources": {"cpus": cpus}, "priority": priority}
        return data

    for party in services.parties.values():
        write_policy(party, POLICY.replace("cpus: 2", "cpus: 99"))
    first = services.submit(sized(2, 5, rounds=6))
    until_state(services, first, "running")
    low, high = services.submit(sized(2, 1)), services.submit(sized(2, 9))
    never = services.submit(sized(50, 9))
    found = services.ended(never)
    assert (found["state"], found["trouble"]["code"]) == ("failed", "policy_refused")
    assert "50 CPU cores of 2" in found["trouble"]["message"]
    ends = {name: services.ended(job) for name, job in (("first", first), ("high", high), ("low", low))}
    assert {view["state"] for view in ends.values()} == {"success"}

    def moments(job: str) -> list[float]:
        lines = services["a"].client.lines(job, limit=5000)["lines"]
        return [line["seconds"] for line in lines if line["party"] == "a" and line["task"]]

    assert max(moments(first)) <= min(moments(high))
    assert max(moments(high)) <= min(moments(low))


# --- 8. plans ---------------------------------------------------------------------------------------------------------


def test_a_plan_is_one_page_and_runs_nothing(services: LiveServices, tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(yaml.safe_dump(toys.toy_pipeline()))
    services.ended(services.submit(toys.toy_pipeline()))
    before = {party: len(services[party].client.jobs(limit=1000)) for party in MEMBERS}
    page = cli(services["a"], "submit", str(file), "--plan")
    assert all(f"{party}: accept" in page for party in MEMBERS)
    assert page.count("privacy spent: no differential privacy") == 4
    assert page.count("peak memory") == 4
    assert " min" in page, "every task has been run here before"
    # When one refuses and one has a policy that cannot be read
    write_policy(services["b"], POLICY.replace("cpus: 2", "cpus: 0.5"))
    write_policy(services["c"], "version: 1\nintiators: [secret-partner]\n")
    page = cli(services["a"], "submit", str(file), "--plan", exit_code=3)
    assert "b: refuse" in page
    assert "refuse  resources.cpus" in page
    assert "c: refuse" in page
    assert "secret-partner" not in page
    assert str(services["c"].home) not in page
    # And nobody has a job of it
    assert before == {party: len(services[party].client.jobs(limit=1000)) for party in MEMBERS}
    # A party that is down is named
    services["c"].kill()
    try:
        found = json.loads(cli(services["a"], "submit", str(file), "--plan", "--json", exit_code=3))
    finally:
        services["c"].start().ready()
    assert found["parties"]["c"]["verdict"] == "unknown"
    assert "c did not answer" in found["parties"]["c"]["trouble"]["message"]


# --- 9. logs ----------------------------------------------------------------------------------------------------------


def test_logs_show_what_each_policy_shows(services: LiveServices) -> None:
    write_policy(services["b"], POLICY.replace("show: {logs: all, losses: true, progress: true}", "show: {}"))
    only = POLICY.replace("show: {logs: all, losses: true, progress: true}", "show: {progress: true}")
    write_policy(services["c"], only)
    job = services.submit(steps(rounds=2))
    text = cli(services["a"], "jobs", "logs", job, "-f", "--json")
    services.ended_everywhere(job)
    lines = [json.loads(line) for line in text.splitlines()]
    seen = {party: {line["event"] for line in lines if line["party"] == party} for party in MEMBERS}
    assert "task_started" in seen["a"]
    assert "task_started" in seen["z"]
    assert "worker_started" in seen["z"]
    assert seen["b"] == set()
    assert "task_started" in seen["c"]
    assert "worker_started" not in seen["c"]
    # A host sees its own, and nobody else's
    own = services["b"].client.lines(job, limit=5000)["lines"]
    assert {line["party"] for line in own} == {"b"}
    assert "task_finished" in {line["event"] for line in own}
    assert " b " not in cli(services["a"], "jobs", "logs", job, "--party", "b")


# --- 10. what others say ----------------------------------------------------------------------------------------------


@pytest.fixture
def evil(services: LiveServices) -> Iterator[Callable[[str], Post]]:
    """Posts under the keys of a party whose own service is down meanwhile."""
    posts: list[tuple[LiveParty, Post]] = []

    class Guard:
        def heard(self, sender: str, epoch: int, counter: int) -> bool:
            return True

    def of(name: str) -> Post:
        party = services[name]
        party.kill()
        home = open_home(party.home)
        post = Post(
            home.settings, home.federation, home.identity(), home.sealing(), Guard(), time.time_ns(), time.time_ns
        )
        posts.append((party, post))
        party.until(lambda: post.connected)
        return post

    yield of
    for party, post in posts:
        post.close()
        party.start().ready()


def counted(party: LiveParty) -> str:
    found = httpx2.get(url_of(party, "/v1/metrics"), headers=bearer(party), trust_env=False, timeout=30)
    return str(found.text)


def url_of(party: LiveParty, path: str) -> str:
    running = json.loads((party.home / "state/service.json").read_text())
    return f"http://{running['host']}:{running['port']}{path}"


def bearer(party: LiveParty) -> dict[str, str]:
    return {"authorization": f"Bearer {(party.home / 'api.token').read_text().strip()}"}


def invitation(signed: SignedSpecification, **more: Any) -> News:
    job = signed.specification.job
    usual: dict[str, Any] = {"digest": signed.digest, "serial": 1, "state": JobState.INVITED, "attempt": 1}
    return News(**{"job": job, "specification": signed.to_data(), **usual, **more})


def test_a_malicious_guest_gets_nothing(services: LiveServices, evil: Callable[[str], Post]) -> None:
    # Given an honest job of a, whose outputs c keeps
    honest = services.submit(toys.toy_pipeline())
    services.ended_everywhere(honest)
    post = evil("b")
    home = open_home(services["b"].home)
    data = toys.toy_pipeline()
    data["parties"] = {"guest": "b", "hosts": ["c"], "arbiter": "z"}
    data["overrides"] = {}
    now = time.time()

    def signed(name: str, **more: Any) -> SignedSpecification:
        made = make_specification(check(data), job=name, federation=home.federation, created=now, **more)
        return made.sign(home.identity())

    def answer(job: str) -> Report:
        """The last word of c about a job."""
        found: list[Report] = []

        def came() -> bool:
            heard = post.receive(0.2)
            if heard is not None and isinstance(heard[1], Report) and heard[1].job == job and heard[0] == "c":
                found.append(heard[1])
            return any(report.state is PartState.REFUSED for report in found)

        services["c"].until(came, what=f"an answer about {job}")
        return found[-1]

    before = [row["job"] for row in services["c"].client.jobs(limit=1000)]
    # When it changes what it has signed, replays what has expired, invites for somebody else, or to nothing of c's
    changed = signed("evil-changed").to_data()
    changed["specification"]["priority"] = 9
    digest = SignedSpecification.from_data(changed).digest
    post.send("c", invitation(signed("evil-changed"), specification=changed, digest=digest))
    assert "signature" in answer("evil-changed").reason
    old = make_specification(check(data), job="evil-old", federation=home.federation, created=now - 9 * 86400)
    post.send("c", invitation(old.sign(home.identity())))
    assert "expired" in answer("evil-old").reason
    others = make_specification(
        check(toys.toy_pipeline()), job="evil-others", federation=home.federation, created=now
    ).sign(home.identity())
    post.send("c", invitation(others))
    assert answer("evil-others").state is PartState.REFUSED
    data["parties"] = {"guest": "b", "hosts": ["a"], "arbiter": "z"}
    post.send("c", invitation(signed("evil-without")))
    assert "takes no part" in answer("evil-without").reason
    data["parties"] = {"guest": "b", "hosts": ["c"], "arbiter": "z"}
    post.send("c", invitation(signed("evil-digest"), digest="0" * 64))
    assert "another job or digest" in answer("evil-digest").reason
    # Then nothing of it is stored
    assert [row["job"] for row in services["c"].client.jobs(limit=1000)] == before
    assert not list((services["c"].home / "state/jobs").glob("evil-*"))
    # When it wants what another guest's job has made of c's data
    post.send("c", invitation(signed("evil-reuse", reuse=Reuse(job=honest, tasks=("words",)))))
    assert "not kept here" in answer("evil-reuse").reason
    # When it speaks of jobs that it does not lead, the jobs do not notice
    digest = services["c"].client.job(honest)["digest"]
    post.send("c", News(job=honest, digest=digest, serial=2**40, state=JobState.WAITING, attempt=7))
    post.send("c", Report(job=honest, digest=digest, serial=2**40, state=PartState.FAILED, attempt=7))
    post.send("c", Lines(job=honest, digest=digest, lines=(Line(number=1, seconds=0.0, event="forged"),)))
    # ... or jumps to an attempt beyond all measure, and ends it
    huge = signed("evil-huge")
    post.send("c", invitation(huge, attempt=2**31 - 1))
    until_part(services, "evil-huge", "c", "accepted")
    ending = {"state": JobState.CANCELLED}
    post.send("c", invitation(huge, attempt=2**31 - 1, serial=2, state=JobState.CANCELLED, ending=ending))
    services.ended("evil-huge", party="c")
    assert services["c"].client.job(honest)["attempt"] == 1
    assert services["c"].client.job(honest)["state"] == "success"
    assert services["c"].client.health()["status"] == "ok"
    # And a reporter that is no part of a job is not heard either
    post.send("a", Report(job="evil-huge", digest=digest, serial=1, state=PartState.FAILED, attempt=1))
    post.send("a", Lines(job=honest, digest=digest, lines=(Line(number=10**6, seconds=0.0, event="x" * 2000),)))
    assert services["a"].client.job(honest)["state"] == "success"


def test_a_host_that_reports_nonsense_harms_itself_only(services: LiveServices, evil: Callable[[str], Post]) -> None:
    job = services.submit(toys.toy_pipeline(wait={"component": "waiter"}))
    until_state(services, job, "running")
    post = evil("b")
    digest = services["a"].client.job(job)["digest"]
    tasks = {f"task {number} \x1b[2J": {"state": "running"} for number in range(900)}
    trouble = {"code": "no such code", "message": "\x1b[31mred\nsuccess: all is well", "party": "c"}
    report = Report(
        job=job,
        digest=digest,
        serial=2**52,
        state=PartState.FAILED,
        attempt=1,
        tasks=tasks,
        trouble=trouble,
        statement={"statement": {}, "signature": "00"},
    )
    services["a"].until(lambda: post.send("a", report) or services.state(job) == "failed")
    found = services["a"].client.job(job)
    assert found["parts"]["b"]["tasks"] == {}
    assert found["trouble"]["party"] == "b", "whatever it says, it is b's"
    shown = cli(services["a"], "jobs", "show", job) + cli(services["a"], "jobs", "list")
    assert "\x1b" not in shown
    assert "\nsuccess: all is well" not in shown
    services.ended(job, party="c")


# --- 11. canaries -----------------------------------------------------------------------------------------------------


def test_nothing_private_is_written_or_told_anywhere(services: LiveServices) -> None:
    data = toys.toy_pipeline()
    data["overrides"] = {"b": {"words": {"params": {"path": "catalog:notes"}}}}
    job = services.submit(data)
    # While it runs, neither command lines nor environments say more than the world may know
    canaries = {"data": SECRET.encode()}
    for party in services.parties.values():
        canaries[f"token of {party.name}"] = (party.home / "api.token").read_bytes().strip()
        canaries[f"password of {party.name}"] = (party.home / "broker.password").read_bytes().strip()
        canaries[f"identity of {party.name}"] = (party.home / "identity.key").read_bytes()
        canaries[f"sealing key of {party.name}"] = (party.home / "sealing.key").read_bytes()
    seen = b""

    def look() -> bool:
        nonlocal seen
        for party in services.parties.values():
            for pid in (party.process.pid if party.process else 0, *workers_of(party.home)):
                with contextlib.suppress(OSError):
                    seen += Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
        return bool(services["a"].client.job(job)["over"])

    services["a"].until(look)
    assert services.ended(job)["state"] == "success", services["a"].client.job(job)["trouble"]
    assert b"fate_llm.runtime.worker" in seen
    assert not [name for name, secret in canaries.items() if secret in seen]
    # The data has been read: the sum says so
    assert json.loads(services.output(job, "a", "add", "metrics"))["sum"] == len(SECRET) + 4
    # And nothing private is in any file of any party but where it belongs
    secrets = ["identity.key", "sealing.key", "api.token", "broker.password", "notes.txt"]
    own = ["state/jobs/*/parties/b/words/**", "state/artifacts/objects/**"]
    for party in services.parties.values():
        skip = [*secrets, *(own if party.name == "b" else [])]
        assert find_canaries(party.home, canaries, skip=skip) == []
        answers = json.dumps([party.client.job(job), party.client.lines(job, limit=5000), party.client.dossier(job)])
        assert not [name for name, secret in canaries.items() if secret.decode("latin-1") in answers]
        if party.name != "b":
            assert str(services["b"].home) not in answers


# --- 12, 13. looking at jobs, and the API as others use it ------------------------------------------------------------


@pytest.mark.parametrize("protection", ["plain", "secagg"])
def test_of_a_job_that_hides_terms_a_guest_sees_totals_whatever_policies_show(
    services: LiveServices, protection: str
) -> None:
    # Given hosts whose policies show everything, and that count numbers of their own in all of their events
    planted = {"a": 90_210_101, "b": 90_210_202, "c": 90_210_303}
    data = steps(rounds=2, protection=protection)
    if protection == "secagg":
        data["tasks"]["steps"]["params"]["protection_params"] = {"clip": 16.0, "largest_weight": 1.0}
    data["overrides"] = {party: {"steps": {"params": {"planted": mine}}} for party, mine in planted.items()}
    # (so that the pipeline itself, which every party has, is no place where they are found)
    job = services.submit(data)
    assert services.ended_everywhere(job)["a"]["state"] == "success"
    # When the guest reads all that it was told
    lines = cli(services["a"], "jobs", "logs", job, "--json")
    own = [json.loads(line) for line in lines.splitlines()]
    shown = {party: str([line for line in own if line["party"] == party]) for party in MEMBERS}
    # Then it sees the others' numbers where they are not hidden, and where they are only the total
    for party in ("b", "c"):
        assert (str(planted[party]) in shown[party]) == (protection == "plain")
        assert "'loss': 2.5" in shown[party]
        assert str(planted[party]) in str(services[party].events(job)), "its own file has them"
    assert str(planted["a"]) in shown["a"], "its own"


def test_every_party_lists_its_jobs(services: LiveServices) -> None:
    job = services.submit(toys.toy_pipeline())
    services.ended_everywhere(job)
    for party in MEMBERS:
        listed = services[party].client.jobs(limit=1000)
        names = [row["job"] for row in listed]
        assert len(names) == len(set(names))
        (row,) = [row for row in listed if row["job"] == job]
        assert (row["state"], row["lead"], row["initiator"]) == ("success", party == "a", "a")
        assert row["ended"] is not None
        assert all(row["state"] == "failed" for row in services[party].client.jobs(states=("failed",), limit=3))
    assert job in cli(services["b"], "jobs", "list", "--state", "success", "--limit", "1000")
    assert "success" in cli(services["z"], "jobs", "show", job)
    assert "States: pending" in cli(services["a"], "jobs", "list", "--state", "succeeded", exit_code=2)
    assert "no job is called" in cli(services["a"], "jobs", "show", "../../etc/passwd", exit_code=2)


def test_the_api_is_what_its_description_says(services: LiveServices) -> None:
    party = services["a"]
    with httpx2.Client(trust_env=False, timeout=60) as client:
        described = client.get(url_of(party, "/v1/openapi.json")).json()
        assert "/v1/jobs/{job}/rerun" in described["paths"]
        assert client.get(url_of(party, "/v1/jobs")).status_code == 401
        client.headers.update(bearer(party))
        # The same key gives the same job
        body = {"pipeline": toys.toy_pipeline(), "key": "one-and-only", "labels": {"ticket": "42"}, "priority": 7}
        first = client.post(url_of(party, "/v1/jobs"), json=body)
        assert first.status_code == 201, first.text
        job = first.json()["job"]
        assert client.post(url_of(party, "/v1/jobs"), json=body).json()["job"] == job
        found = client.get(url_of(party, f"/v1/jobs/{job}")).json()
        assert (found["priority"], found["labels"]) == (7, {"ticket": "42"})
        services.ended(job)
        lines = client.get(url_of(party, f"/v1/jobs/{job}/lines?limit=2")).json()
        rest = client.get(url_of(party, f"/v1/jobs/{job}/lines?after={lines['next']}&limit=5000")).json()
        ids = [line["id"] for line in lines["lines"] + rest["lines"]]
        assert ids == sorted(set(ids))
        for method, path, sent, status in (
            ("GET", "/v1/jobs/nothing", None, 404),
            ("GET", "/v1/jobs/nothing/dossier", None, 404),
            ("POST", f"/v1/jobs/{job}/cancel", {}, 409),
            ("POST", f"/v1/jobs/{job}/resume", {}, 409),
            ("POST", f"/v1/jobs/{job}/rerun", {"from_task": "nope"}, 400),
            ("POST", f"/v1/approvals/{job}", {"decision": "approve", "digest": "0" * 64}, 409),
            ("POST", "/v1/jobs", {"pipeline": {"version": 1}}, 400),
            ("POST", "/v1/jobs", {"pipeline": {}, "priority": 10}, 422),
            ("GET", "/v1/jobs?state=bogus", None, 400),
            ("PUT", "/v1/jobs", None, 405),
        ):
            answer = client.request(method, url_of(party, path), json=sent)
            assert (answer.status_code, answer.json()["ok"]) == (status, False), (path, answer.text)
            assert answer.json()["errors"][0]["code"]
        assert "fate_llm_jobs{" in client.get(url_of(party, "/v1/metrics")).text
    # The job of another guest is not this party's to lead
    with pytest.raises(PolicyError):
        services["b"].client.submit(toys.toy_pipeline())
    job_of_a = job
    with pytest.raises(WrongState, match="is for a"):
        services["b"].client.rerun(job_of_a, from_task="add")


# --- 14. the other topology -------------------------------------------------------------------------------------------


def test_a_broker_for_each_party(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "_installed", toys.installed)
    data = toys.toy_pipeline()
    data["parties"] = {"guest": "a", "hosts": ["b"]}
    with live_federation("a", "b", topology="per-party") as live:
        policy = OPEN_POLICY % {"members": "a, b"}
        with live_services(live, toys=site, policies={"a": policy, "b": policy}) as services:
            job = services.submit(data)
            views = services.ended_everywhere(job)
            assert {view["state"] for view in views.values()} == {"success"}
            assert services["a"].client.dossier(job) == services["b"].client.dossier(job)
