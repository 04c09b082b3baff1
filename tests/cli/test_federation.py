"""`fate_llm federation`: what it prints, writes and runs."""

from __future__ import annotations

import json
import shlex
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pika
import pytest
from pika.exceptions import AMQPError

from fate_llm.runtime.federation import load_federation, load_party, read_password
from tests.brokers import node_folder, require_rabbitmq
from tests.cli.conftest import Run, document, environment, only_error

INIT = ("federation", "init", "--name", "loans", "--party", "bank-a", "--party", "bank-b")
PATIENCE = 120.0


@pytest.fixture
def roster(run: Run, tmp_path: Path) -> Path:
    run(*INIT, "--out", "fed")
    return tmp_path / "fed" / "federation.yaml"


@pytest.fixture
def ctl(tmp_path: Path) -> Path:
    """A stand-in for rabbitmqctl that writes down what it was called with, and fails at the word FAIL."""
    path = tmp_path / "ctl"
    path.write_text(
        f"#!{sys.executable}\n"
        "import json, pathlib, sys\n"
        "with open(pathlib.Path(__file__).parent / 'calls', 'a') as log:\n"
        "    log.write(json.dumps([sys.argv[1:], sys.stdin.read()]) + '\\n')\n"
        "sys.exit('no such user' if 'FAIL' in sys.argv else 0)\n"
    )
    path.chmod(0o755)
    return path


def calls(folder: Path) -> list[tuple[list[str], str]]:
    path = folder / "calls"
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


# --- init, show, identity ----------------------------------------------------------------------------------------


def test_init_writes_what_it_lists_and_says_who_gets_what(run: Run, tmp_path: Path) -> None:
    done = run(*INIT, "--out", "fed")
    federation = load_federation(tmp_path / "fed" / "federation.yaml")
    assert federation.digest() in done.stdout
    for party, member in federation.parties.items():
        assert party in done.stdout and member.public.fingerprint in done.stdout
    for part in ("fed/brokers", "fed/parties", "fed/authority", "/etc/rabbitmq"):
        assert part in done.stdout
    again = document(run(*INIT, "--out", "other", "--json"))
    assert sorted(again["files"]) == sorted(
        path.relative_to(tmp_path / "other").as_posix() for path in (tmp_path / "other").rglob("*") if path.is_file()
    )
    assert again["digest"] == load_federation(tmp_path / "other" / "federation.yaml").digest() != federation.digest()


def test_init_prints_no_secret(run: Run, tmp_path: Path) -> None:
    text = run(*INIT, "--out", "fed").stdout + run(*INIT, "--out", "other", "--json").stdout
    for path in (*tmp_path.rglob("*.password"), *tmp_path.rglob("*.key")):
        content = path.read_bytes()
        assert content.strip() and content.strip().decode("latin-1") not in text


def test_init_writes_over_nothing(run: Run, roster: Path) -> None:
    before = roster.read_bytes()
    error = only_error(run(*INIT, "--out", "fed", "--json", exit_code=2))
    assert (error["code"], "is not empty" in error["message"]) == ("configuration", True)
    assert roster.read_bytes() == before


def test_init_per_party_makes_a_broker_for_each(run: Run, tmp_path: Path) -> None:
    places = ("--broker", "bank-a=a.example", "--broker", "bank-b=b.example:5999")
    run(*INIT, "--topology", "per-party", *places, "--client-certificates", "--valid-days", "9", "--out", "fed")
    found = sorted(path.name for path in (tmp_path / "fed" / "brokers").iterdir())
    assert found == ["bank-a", "bank-b"]
    conf = (tmp_path / "fed" / "brokers" / "bank-b" / "rabbitmq.conf").read_text()
    assert "listeners.ssl.default = 5999" in conf and "fail_if_no_peer_cert = true" in conf
    assert "rabbitmq_federation" in (tmp_path / "fed" / "brokers" / "bank-a" / "enabled_plugins").read_text()


def test_init_refuses_what_does_not_fit_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    error = only_error(run(*INIT, "--topology", "per-party", "--out", "fed", "--json", exit_code=2))
    assert "bank-a, bank-b" in error["message"] and "--broker PARTY=HOST" in error["hint"]
    assert not (tmp_path / "fed").exists()


def test_a_party_makes_its_own_key_and_init_takes_its_public_half(run: Run, tmp_path: Path) -> None:
    done = run("federation", "identity", "--out", "mine.key")
    text = done.stdout.splitlines()[-1]
    assert stat.S_IMODE((tmp_path / "mine.key").stat().st_mode) == 0o600
    run("federation", "init", "--name", "x", "--party", f"bank-a={text}", "--party", "bank-b", "--out", "fed")
    assert not (tmp_path / "fed/parties/bank-a/identity.key").exists()
    (tmp_path / "mine.key").rename(tmp_path / "fed/parties/bank-a/identity.key")
    settings, federation = load_party(tmp_path / "fed/parties/bank-a/party.yaml")
    assert settings.load_identity().public == federation.member("bank-a").public
    assert federation.member("bank-a").public.fingerprint in done.stdout
    assert "exists" in only_error(run("federation", "identity", "--out", "fed", "--json", exit_code=2))["message"]


def test_show_checks_and_compares(run: Run, roster: Path) -> None:
    found = document(run("federation", "show", roster, "--json"))
    assert found["digest"] == load_federation(roster).digest() and list(found["parties"]) == ["bank-a", "bank-b"]
    assert found["digest"] in run("federation", "show", roster).stdout
    roster.write_text(roster.read_text().replace("topology: shared", "topology: ring"))
    done = run("federation", "show", roster, exit_code=2)
    line = roster.read_text().splitlines().index("topology: ring") + 1
    assert f"federation.yaml:{line}: topology" in done.stderr


# --- grant -------------------------------------------------------------------------------------------------------


def test_grant_prints_what_a_shell_can_run(run: Run, roster: Path, ctl: Path, tmp_path: Path) -> None:
    done = run("federation", "grant", "--party", "bank-a", "--federation", roster, "--ctl", f"{ctl} -n mq@host")
    assert calls(tmp_path) == []  # printing runs nothing
    subprocess.run(["sh", "-e"], input=done.stdout, text=True, check=True, timeout=60)
    by_shell = calls(tmp_path)
    (tmp_path / "calls").unlink()
    run("federation", "grant", "--party", "bank-a", "--federation", roster, "--ctl", f"{ctl} -n mq@host", "--apply")
    by_us = calls(tmp_path)
    assert [words for words, _ in by_shell] == [words for words, _ in by_us]
    assert all(words[:2] == ["-n", "mq@host"] for words, _ in by_us)
    assert [words[2] for words, _ in by_us] == ["import_definitions", *["set_topic_permissions"] * 2, "set_permissions"]
    shown, applied = json.loads(by_shell[0][1]), json.loads(by_us[0][1])
    assert shown.pop("users")[0]["name"] == applied.pop("users")[0]["name"] == "bank-a"  # salted anew
    assert shown == applied


def test_grant_makes_a_password_once(run: Run, roster: Path, tmp_path: Path) -> None:
    options = ("federation", "grant", "--party", "bank-a", "--federation", roster)
    done = run(*options)
    path = tmp_path / "bank-a.password"
    password = read_password(path)
    assert len(password) == 48 and password not in done.output and str(path.name) in done.stderr
    run(*options)
    assert read_password(path) == password
    path.chmod(0o644)
    assert "0600" in only_error(run(*options, "--json", exit_code=2))["message"]


def test_grant_can_leave_the_password_alone(run: Run, roster: Path, tmp_path: Path) -> None:
    found = document(
        run(
            "federation",
            "grant",
            "--party",
            "bank-b",
            "--federation",
            roster,
            "--keep-password",
            "--nodes",
            "3",
            "--json",
        )
    )
    place = json.loads(found["commands"][0]["stdin"])
    assert "users" not in place and place["queues"][0]["arguments"] == {"x-queue-type": "quorum"}
    assert found["password_file"] is None and found["applied"] is False
    assert not list(tmp_path.glob("*.password"))


def test_grant_stops_at_the_first_failure(run: Run, roster: Path, ctl: Path, tmp_path: Path) -> None:
    words = f"{ctl} FAIL"
    options = ("--party", "bank-a", "--federation", roster, "--ctl", words, "--apply", "--json")
    error = only_error(run("federation", "grant", *options, exit_code=2))
    assert "no such user" in error["message"] and "import_definitions" in error["message"]
    assert len(calls(tmp_path)) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--party", "bank-x"), "no party 'bank-x'"),
        (("--party", "bank-a", "--ctl", "'open"), "is no command"),
        (("--party", "bank-a", "--ctl", "no-such-program", "--apply"), "could not be run"),
    ],
)
def test_grant_says_what_is_wrong(options: tuple[str, ...], said: str, run: Run, roster: Path) -> None:
    done = run("federation", "grant", "--federation", roster, *options, "--json", exit_code=2)
    assert said in only_error(done)["message"]


# --- dev-broker --------------------------------------------------------------------------------------------------


@contextmanager
def dev_broker(*options: str) -> Iterator[subprocess.Popen[str]]:
    require_rabbitmq()
    command = [sys.executable, "-m", "fate_llm", "federation", "dev-broker", *options]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment(), **streams) as process:  # type: ignore[call-overload]
        try:
            yield process
        finally:
            process.kill()


def reachable(url: str) -> bool:
    try:
        pika.BlockingConnection(pika.URLParameters(url.partition("?")[0])).close()
    except AMQPError:
        return False
    return True


@pytest.mark.slow
def test_a_development_broker_runs_until_it_is_interrupted_and_leaves_nothing() -> None:
    with dev_broker() as process:
        assert process.stdout is not None
        lines = [process.stdout.readline().strip() for _ in range(4)]
        url = lines[-1]
        assert "rabbitmqctl" in shlex.split(lines[2].partition("--ctl`: ")[2])[0]
        assert url.startswith("amqp://") and url.endswith("/%2F?plaintext=loopback") and "127.0.0.1" in url
        assert f"--broker {shlex.quote(url)}" in lines[1]
        assert reachable(url)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=PATIENCE)
        assert (rest, errors.strip(), process.returncode) == ("", "stopped", 0)
    assert not reachable(url)


@pytest.mark.slow
def test_with_a_folder_its_data_and_password_stay() -> None:
    urls = []
    with node_folder() as home:
        for attempt in range(2):
            with dev_broker("--folder", str(home / "mine"), "--json") as process:
                assert process.stdout is not None
                text = ""
                while not text.endswith("}\n"):
                    text += process.stdout.readline()
                found = json.loads(text)
                urls.append(found["url"].partition("@")[0])
                assert found["folder"] == str(home / "mine") and reachable(found["url"])
                assert f"HOME={found['folder']}" in shlex.split(found["ctl"])
                connection = pika.BlockingConnection(pika.URLParameters(found["url"].partition("?")[0]))
                connection.channel().queue_declare("kept", durable=True, passive=attempt == 1)
                connection.close()
                process.terminate()
                rest, _ = process.communicate(timeout=PATIENCE)
                assert rest == "" and process.returncode == 0  # one document, however it ends
            assert not Path(f"/proc/{found['pid']}").exists()
    assert urls[0] == urls[1]


@pytest.mark.slow
def test_a_broker_that_ends_by_itself_is_an_error() -> None:
    with dev_broker("--json") as process:
        assert process.stdout is not None
        text = ""
        while not text.endswith("}\n"):
            text += process.stdout.readline()
        subprocess.run(["kill", "-KILL", str(json.loads(text)["pid"])], check=True)
        rest, errors = process.communicate(timeout=PATIENCE)
        assert (rest, process.returncode) == ("", 4)
        assert "the broker ended by itself" in errors
