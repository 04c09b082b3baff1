"""The demo: what its scripts write, and the whole of it as processes, which stand for the containers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fate_llm.pipelines import load_pipeline
from fate_llm.runtime.federation import load_party
from fate_llm.runtime.trust.catalog import load_catalog
from fate_llm.runtime.trust.policy import evaluate
from fate_llm.runtime.trust.policy_schema import load_policy
from tests.brokers import node_folder, require_rabbitmq

from . import compose
from .program import ROOT, demo_module, needs_service, program

DEMO = ROOT / "deploy" / "demo"
PATIENCE = 120.0  # seconds until a test that hangs is called so
BRIEF = """\
version: 1
name: brief
parties: {guest: bank-a, hosts: [bank-b, bank-c]}
tasks:
  data:
    component: reader
    params: {path: "catalog:requests", fields: {instruction: question, output: answer}}
  split: {component: splitter, inputs: {data: data.dataset}, params: {test: 0.2}}
job: {quorum: 3}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `prepare` writes for containers."""
    prepare = demo_module("prepare")
    folder: Path = tmp_path_factory.mktemp("demo") / "federation"
    api = dict.fromkeys(prepare.PARTIES, ("0.0.0.0", prepare.API_PORT))
    prepare.prepare(folder, broker="broker:5671", api=api)
    return folder


# --- What is written -------------------------------------------------------------------------------------------------


def test_the_homes_are_complete(made: Path) -> None:
    parties = demo_module("prepare").PARTIES
    for party in parties:
        home = made / "parties" / party
        settings, federation = load_party(home / "party.yaml")
        assert federation.members == parties
        assert (settings.api.host, settings.api.port) == ("0.0.0.0", 8470)
        assert settings.load_identity().public == federation.member(party).public
        assert settings.load_token()
        assert settings.load_sealing() is not None
        assert (home / "state").stat().st_mode & 0o777 == 0o700
        data = load_catalog(home / "catalog.yaml").path("requests")
        assert party.replace("-", "_") in data.name
        assert data.exists()
    assert len({load_party(made / "parties" / p / "party.yaml")[0].load_token() for p in parties}) == len(parties)


def test_every_policy_accepts_the_demo_and_no_more(made: Path, make_signed: Callable[..., Any]) -> None:
    for pipeline, verdict in ((DEMO / "pipeline.yaml", "accept"), (None, "refuse")):
        spec = load_pipeline(pipeline or DEMO / "pipeline.yaml", () if pipeline else ("tasks.tune.params.rounds=1000",))
        for party in demo_module("prepare").PARTIES:
            home = made / "parties" / party
            signed = make_signed(spec, made)
            found = evaluate(
                load_policy(home / "policy.yaml"), signed, party, load_catalog(home / "catalog.yaml"), time.time()
            )
            wrong = [finding for finding in found.findings if finding.outcome != "pass"]
            assert found.verdict == verdict, (party, wrong)


@pytest.fixture
def make_signed() -> Callable[..., Any]:
    from fate_llm.runtime.trust.home import open_home
    from fate_llm.runtime.trust.jobspec import make_specification

    def make(spec: Any, folder: Path) -> Any:
        home = open_home(folder / "parties" / "bank-a")
        found = make_specification(spec, federation=home.federation, job="demo-1", created=time.time())
        return found.sign(home.identity())

    return make


def test_compose_runs_prepare_with_words_that_it_knows() -> None:
    service = compose.load(DEMO / "compose.yaml", {})["services"]["setup"]
    prepare = demo_module("prepare")
    options = prepare.command_line().parse_args([str(word) for word in service["command"]])
    assert Path(service["entrypoint"][-1]).name == Path(prepare.__file__).name
    # it spreads to what is mounted there: a volume for every party and one for the broker
    targets = {volume.split(":")[1] for volume in service["volumes"] if volume.startswith(("bank", "broker"))}
    assert targets == {f"{options.spread}/{name}" for name in (*prepare.PARTIES, "broker")}
    assert options.broker == "broker:5671"
    assert set(compose.load(DEMO / "compose.yaml", {})["services"]) == {"setup", "broker", *prepare.PARTIES}


def test_files_are_spread_to_their_users(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = demo_module("prepare")
    owners: dict[str, int] = {}
    monkeypatch.setattr(os, "chown", lambda path, user, group: owners.update({str(path): user}))
    prepare.spread(made, tmp_path / "out")
    for name, user in (("bank-a", 10001), ("broker", 999)):
        files = [path for path in (tmp_path / "out" / name).rglob("*") if path.name != ".complete"]
        assert len(files) >= 6
        assert {owners[str(path)] for path in files} == {user}
        assert all(path.stat().st_mode & 0o077 == 0 for path in files)
    assert not (tmp_path / "out" / "bank-b" / "federation").exists()


def test_a_second_preparation_changes_nothing(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "bank-a").mkdir(parents=True)
    (out / "bank-a" / ".complete").touch()
    done = subprocess.run(
        [sys.executable, DEMO / "prepare.py", tmp_path / "new", "--broker", "b:5671", "--spread", out],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "stays" in done.stdout
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_the_broker_s_node_listens_on_loopback_with_tls_only(tmp_path: Path) -> None:
    require_rabbitmq()
    with node_folder() as folder:
        demo_module("processes")._prepare(folder)
        node = demo_module("processes").broker_node(folder)
        assert node._config["listeners.tcp"] == "none"
        assert node._config["listeners.ssl.default"] == f"127.0.0.1:{node.tls_port}"
        for key in ("ssl_options.certfile", "ssl_options.cacertfile", "definitions.local.path"):
            assert Path(node._config[key]).exists(), key


@pytest.mark.parametrize("name", ["up", "down"])
def test_the_scripts_are_good_shell(name: str) -> None:
    done = subprocess.run([program("shellcheck"), DEMO / name], capture_output=True, text=True, check=False)
    assert done.stdout == ""
    assert os.access(DEMO / name, os.X_OK)


@pytest.mark.parametrize("name", ["up", "down"])
def test_a_word_that_the_scripts_do_not_know_runs_nothing(name: str) -> None:
    done = subprocess.run([DEMO / name, "--procces"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"deploy/demo/{name}" in done.stderr


def test_the_scripts_run_docker_with_words_that_fit_the_file(tmp_path: Path) -> None:
    """A `docker` that notes what it is asked for stands in for the engine."""
    notes = tmp_path / "notes"
    docker = tmp_path / "docker"
    docker.write_text(f'#!/bin/sh\necho "$PWD $*" >>"{notes}"\n', encoding="utf-8")
    docker.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for name in ("up", "down"):
        subprocess.run([DEMO / name], env=environment, check=True, stdout=subprocess.DEVNULL)
    asked = [line.split() for line in notes.read_text(encoding="utf-8").splitlines()]
    known = compose.load(DEMO / "compose.yaml", {})["services"]
    assert all(words[0] == str(DEMO) for words in asked)
    assert [words[2] for words in asked if words[2][0] != "-"] == ["build", "run", "up", "exec"]
    named = {word for words in asked for word in words if word in known}
    assert named == {"setup", "bank-a"}
    (job,) = (words for words in asked if "exec" in words)
    mounted = [str(volume) for volume in known["bank-a"]["volumes"]]
    assert any(volume.split(":")[1] == job[job.index("submit") + 1] for volume in mounted)


def test_down_ends_what_a_demo_that_was_killed_has_left_and_nothing_else(tmp_path: Path) -> None:
    # Given services whose supervisor is gone, and a process that has one of their old numbers by now
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    left = subprocess.Popen([*sleep, str(tmp_path / "federation" / "parties" / "bank-a")])
    other = subprocess.Popen(sleep)
    note = {"pid": other.pid, "services": {"bank-a": left.pid, "bank-b": other.pid}}
    (tmp_path / "demo.json").write_text(json.dumps(note), encoding="utf-8")
    try:
        # When it is told to end
        assert demo_module("processes").down(tmp_path, delete=False) == 0
        # Then only its own service has
        assert left.wait(PATIENCE) == -signal.SIGKILL
        assert other.poll() is None
        assert not (tmp_path / "demo.json").exists()
    finally:
        for process in (left, other):
            process.kill()
            process.wait()


@pytest.mark.slow
def test_a_demo_that_cannot_start_says_why_and_leaves_nothing_running(tmp_path: Path) -> None:
    (tmp_path / "federation").mkdir()  # an empty one: no broker's files in it
    done = run(sys.executable, DEMO / "processes.py", "up", "--folder", tmp_path, "--no-job")
    assert done.returncode == 1
    assert "rabbitmq.conf" in done.stderr
    assert not processes_of(tmp_path)


# --- The whole of it, as processes -----------------------------------------------------------------------------------


def run(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    return subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=600,
        **options,
    )


def settings_of(folder: Path) -> dict[str, str]:
    lines = (folder / "demo.env").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines)


def health_of(home: str) -> subprocess.CompletedProcess[str]:
    """The health check of the images, word for word, as it would run in the container."""
    from .test_images import last, lineage, stages

    words = last(lineage(stages(ROOT)[1], "slim"), "HEALTHCHECK")
    return run(sys.executable, "-m", "fate_llm", *words[2:], env={"FATE_LLM_HOME": home})


def until(found: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (value := found()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited in vain until {what}")
        time.sleep(0.2)
    return value


def processes_of(folder: Path) -> list[str]:
    """Command lines of processes that have to do with a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_text(errors="replace").split("\0")
            except OSError:
                continue
            found += [" ".join(words)] if any(str(folder) in word for word in words) else []
    return found


@pytest.fixture(scope="module")
def running() -> Iterator[Path]:
    """The demo, up with a job that trains nothing; down at the end, with nothing left."""
    require_rabbitmq()
    with node_folder() as parent:
        folder = parent / "demo"
        (parent / "brief.yaml").write_text(BRIEF, encoding="utf-8")
        try:
            done = run(DEMO / "up", "--processes", "--folder", folder, "--pipeline", parent / "brief.yaml")
            logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in folder.glob("*.log"))
            assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs}"
            yield folder
        finally:
            ended = run(DEMO / "down", "--processes", "--folder", folder, "--delete")
            assert ended.returncode == 0, ended.stderr
            assert not folder.exists()
            until(lambda: not processes_of(folder), "no process is left")


@pytest.mark.slow
@needs_service
def test_all_services_answer_and_the_job_has_succeeded(running: Path) -> None:
    found = settings_of(running)
    for party in ("BANK_A", "BANK_B", "BANK_C"):
        with urllib.request.urlopen(f"{found[f'{party}_API']}/v1/health", timeout=10) as answer:
            assert json.load(answer)["status"] == "ok"
        shown = run(sys.executable, "-m", "fate_llm", "jobs", "list", "--home", found[f"{party}_HOME"], "--json")
        assert shown.returncode == 0, shown.stderr
        assert "success" in shown.stdout
    assert found["FATE_LLM_HOME"] == found["BANK_A_HOME"]


@pytest.mark.slow
@needs_service
def test_a_second_up_is_refused(running: Path) -> None:
    done = run(DEMO / "up", "--processes", "--folder", running, "--no-job")
    assert done.returncode == 2
    assert "runs already" in done.stderr


@pytest.mark.slow
@needs_service
def test_the_health_check_of_the_images_says_how_it_is(running: Path) -> None:
    # Given a service that is well, Then its health check passes
    home = settings_of(running)["BANK_B_HOME"]
    assert health_of(home).returncode == 0
    # When the service is killed while nobody starts it again, Then it does not pass
    note = json.loads((running / "demo.json").read_text())
    os.kill(note["pid"], signal.SIGSTOP)
    try:
        os.kill(note["services"]["bank-b"], signal.SIGKILL)
        failed = health_of(home)
    finally:
        os.kill(note["pid"], signal.SIGCONT)
    assert failed.returncode == 1, failed.stderr
    # and it passes again when the demo has started the service again
    until(lambda: health_of(home).returncode == 0, "it is well again")
    assert json.loads((running / "demo.json").read_text())["services"]["bank-b"] != note["services"]["bank-b"]


@pytest.mark.slow
@needs_service
def test_a_service_without_its_broker_says_so(running: Path) -> None:
    # Given a home with a broker that is not there
    home = settings_of(running)["BANK_C_HOME"]
    settings = yaml.safe_load((Path(home) / "party.yaml").read_text(encoding="utf-8"))
    pid = json.loads((running / "demo.json").read_text())["services"]["bank-c"]
    changed = {**settings, "broker": re.sub(r":\d+/", ":1/", settings["broker"])}
    assert changed != settings
    # When its service starts, Then it answers 503 with the reason, and the health check fails
    (Path(home) / "party.yaml").write_text(yaml.safe_dump(changed), encoding="utf-8")
    os.kill(pid, signal.SIGTERM)

    def reasons() -> str:
        try:
            urllib.request.urlopen(f"{settings_of(running)['BANK_C_API']}/v1/health", timeout=5).close()
        except urllib.error.HTTPError as error:
            return f"{error.code} {error.read().decode()}"
        except OSError:
            pass
        return ""

    try:
        said = until(reasons, "it says what is wrong")
        assert said.startswith("503 ")
        assert "broker" in said
        assert health_of(home).returncode == 1
    finally:
        (Path(home) / "party.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        os.kill(json.loads((running / "demo.json").read_text())["services"]["bank-c"], signal.SIGTERM)
    until(lambda: health_of(home).returncode == 0, "it is well again")
