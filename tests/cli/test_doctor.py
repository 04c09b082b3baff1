"""`fate_llm doctor` as people and programs call it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fate_llm import __version__
from fate_llm.cli.commands.doctor import _show
from fate_llm.protocols.broker_layout import control_inbox
from fate_llm.runtime.broker import BrokerNode
from fate_llm.runtime.doctor import CHECKS
from fate_llm.runtime.doctor_report import Check, Report, failed, ok, skipped, warning
from fate_llm.runtime.federation import read_password
from tests.brokers import admin, broker, leftovers, vhost  # noqa: F401
from tests.cli.conftest import Run, document, environment, only_error
from tests.runtime.granted import Granted, granted, prefixed

A, B = prefixed(2)
STATUSES = {"ok", "warning", "failed", "not checked"}


@pytest.fixture
def nobody() -> str:
    """A URL behind which nothing listens, with a password that must never be seen."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    return f"amqp://bank-a:geheim@127.0.0.1:{port}/v?plaintext=loopback"


@pytest.fixture(scope="module")
def place(broker: BrokerNode, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Granted]:  # noqa: F811
    with granted(broker, tmp_path_factory.mktemp("granted"), (A, B)) as found:
        yield found


def checked(found: Any) -> dict[str, dict[str, str]]:
    """The checks of the JSON document by name, in the promised shape."""
    assert list(found) == ["checks", "status"]
    assert all(list(check) == ["name", "status", "found", "do"] for check in found["checks"])
    assert {check["status"] for check in found["checks"]} <= STATUSES
    assert all(check["do"] for check in found["checks"] if check["status"] in ("failed", "warning"))
    return {check["name"]: check for check in found["checks"]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "one of them"),
        (["--broker", "amqps://x@y", "--as", "party.yaml"], "one of them"),
        (["--as", "party.yaml", "--party", "a"], "--party goes with --broker"),
        (["--broker", "amqps://x@y", "--answer"], "--answer goes with --as"),
        (["--as", "party.yaml", "--answer", "--management", "https://x"], "without --management"),
        (["--broker", "amqp://bank-a:geheim@far.example/v"], "in clear"),
        (["--broker", "amqps://Bank:geheim@far.example/v"], "no party's id"),
        (["--broker", "amqps://bank-a:geheim@far.example/v", "--party", "Bank A"], "no party's id"),
        (["--broker", "amqps://bank-a:geheim@far.example/v", "--management", "http://m:geheim@far.example"], "clear"),
        (["--as", "missing.yaml"], "cannot be read"),
    ],
)
def test_what_makes_no_sense_is_a_fault_of_the_line(arguments: list[str], words: str, run: Run) -> None:
    error = only_error(run("doctor", *arguments, "--json", exit_code=2))
    assert words in error["message"] and error["hint"] and error["code"] == "configuration"
    assert "geheim" not in str(error)
    assert words in run("doctor", *arguments, exit_code=2).stderr


def test_a_home_stands_for_its_party_file(run: Run, tmp_path: Path) -> None:
    home = str(tmp_path)
    assert f"{home}/party.yaml" in only_error(run("doctor", "--home", home, "--json", exit_code=2))["message"]
    both = only_error(run("doctor", "--home", home, "--as", f"{home}/party.yaml", "--json", exit_code=2))
    assert "say the same" in both["message"]


def test_no_broker_ends_with_4_and_a_whole_document(run: Run, nobody: str) -> None:
    done = run("doctor", "--broker", nobody, "--json", exit_code=4)
    found = checked(document(done))
    assert tuple(found) == CHECKS and document(done)["status"] == "failed"
    assert found["reachable"]["status"] == "failed" and found["login"]["status"] == "not checked"
    assert "geheim" not in done.output


def test_people_read_a_line_each_and_the_worst_last(run: Run, nobody: str) -> None:
    done = run("doctor", "--broker", nobody, exit_code=4)
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("failed")] == [next(x for x in lines if " reachable " in x)]
    assert lines[-1].startswith("1 failed, ") and "First: reachable: " in lines[-1]
    assert sum(line.lstrip().startswith("->") for line in lines) >= 1
    assert "geheim" not in done.output


@pytest.mark.parametrize(
    ("checks", "last"),
    [
        ((ok("tls", "fine"), skipped("clock", "cannot")), "nothing is wrong: 1 not checked, 1 ok"),
        (
            (ok("a", "b"), warning("w", "old", "renew"), failed("f", "bad", "mend")),
            "1 failed, 1 warning, 1 ok. First: f: bad.",
        ),
        ((warning("w", "old", "renew"), ok("a", "b")), "1 warning, 1 ok. First: w: old. renew"),
    ],
)
def test_the_last_line_is_the_worst(checks: tuple[Check, ...], last: str, capsys: pytest.CaptureFixture[str]) -> None:
    _show(Report(checks))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(last) and len(lines) == len(checks) + 2 + sum(bool(check.do) for check in checks)


@pytest.mark.slow
def test_a_development_broker_ends_with_0(run: Run, broker: BrokerNode, vhost: str) -> None:  # noqa: F811
    url = broker.url(vhost=vhost) + "?plaintext=loopback"
    api = broker.management_url()
    done = run("doctor", "--broker", url, "--party", "bank-a", "--management", api, "--seconds", "20", "--json")
    found = checked(document(done))
    assert document(done)["status"] == "warning"
    assert found["clock"]["status"] == found["throughput"]["status"] == "ok"
    assert "fate.from.bank-a" in found["exchange"]["found"]
    assert leftovers(broker, vhost) == {"queues": [], "exchanges": [], "connections": []}


@pytest.mark.slow
def test_two_parties_ask_and_answer(run: Run, place: Granted) -> None:
    """As operators do it: one process answers until it is told to end, another asks."""
    files = {party: place.party_file(party) for party in (A, B)}
    command = [sys.executable, "-m", "fate_llm", "doctor", "--as", str(files[B]), "--answer", "--json"]
    command += ["--seconds", "20"]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as answering:
        try:
            wait_for_reader(place, B)
            done = run("doctor", "--as", files[A], "--seconds", "20", "--json")
            answering.send_signal(signal.SIGTERM)
            said, _ = answering.communicate(timeout=60)
        finally:
            answering.kill()
    found = checked(document(done))
    assert answering.returncode == 0
    assert found["identity"]["status"] == found[f"{B}: answers"]["status"] == "ok"
    assert found[f"{B}: throughput"]["status"] == "ok" and __version__ in found[f"{B}: answers"]["found"]
    counted = json.loads(said)
    assert counted["party"] == B and set(counted["counts"]) == {"answered"}
    secrets = [read_password(place.folder / party) for party in (A, B)]
    assert not any(secret in done.output + said for secret in secrets)
    assert leftovers(place.node, place.vhost)["queues"] == sorted(control_inbox(party) for party in (A, B))


def wait_for_reader(place: Granted, party: str) -> None:
    """Until somebody reads the standing inbox: asked of the broker itself, which counts at once."""
    from fate_llm.protocols.transports.rabbitmq import BrokerProbe

    probe = BrokerProbe(place.address(party))
    try:
        for _ in range(600):
            if probe.consumers(control_inbox(party)) == 1:
                return
            probe._connection.sleep(0.1)
        raise AssertionError("nobody answers")
    finally:
        probe.close()


@pytest.mark.slow
def test_a_silent_party_is_a_warning_and_a_refused_password_a_failure(
    run: Run,
    place: Granted,
) -> None:
    place_file = place.folder / f"home-{A}" / "party.yaml"
    source = place_file if place_file.exists() else place.party_file(A)
    found = checked(document(run("doctor", "--as", source, "--seconds", "2", "--json")))
    assert found[f"{B}: answers"]["status"] == "warning" and "--answer" in found[f"{B}: answers"]["do"]
    admin(place.node, "PUT", f"users/{A}", {"password": "another", "tags": ""})
    done = run("doctor", "--as", source, "--seconds", "2", "--json", exit_code=4)
    assert checked(document(done))["login"]["status"] == "failed"
    assert read_password(place.folder / A) not in done.output
