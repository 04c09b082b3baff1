"""A party's home: what is made, what is opened, and what is refused."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest

from fate_llm.core.errors import ConfigurationError
from fate_llm.protocols.transports.rabbitmq import BrokerAddress
from fate_llm.runtime import federation as module
from fate_llm.runtime.federation import BrokerPlace
from fate_llm.runtime.federation_setup import write_files
from fate_llm.runtime.trust.catalog import EMPTY_CATALOG
from fate_llm.runtime.trust.home import Home, broker_place, new_home, open_home
from fate_llm.runtime.trust.policy_schema import make_policy
from fate_llm.security.identity import Identity
from fate_llm.security.sealed_box import SealingKey


def made(folder: Path, **options: Any) -> Home:
    given = {"party": "bank-a", "federation": "loans", "broker": BrokerPlace(host="hub.example")}
    write_files(folder, new_home(**(given | options)))
    return open_home(folder)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return made(tmp_path / "home")


def edit(home: Home, old: str, new: str, name: str = "party.yaml") -> None:
    path = home.folder / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_new_home_opens_with_everything(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    member = home.federation.member("bank-a")
    assert (home.party, home.federation.members, home.federation.vhost) == ("bank-a", ("bank-a",), "fate.loans")
    assert home.identity().public == member.public and home.sealing().public == member.sealing_key
    assert home.policy() == make_policy({"version": 1}) and home.catalog().entries == {}
    assert home.settings.broker == "amqps://bank-a@hub.example:5671/fate.loans"
    tokens = {home.settings.load_token(), home.settings.load_password()}
    assert len(tokens) == 2 and all(token and len(token) >= 32 for token in tokens)
    assert home.store_url == f"sqlite:///{home.folder}/state/fate.db"
    assert home.artifacts_url == str(home.folder / "state" / "artifacts")
    assert (home.settings.api.host, home.settings.api.port) == ("127.0.0.1", 0)
    assert (home.settings.lost_after, home.settings.heartbeat) == (600.0, 5.0)


def test_no_two_homes_share_a_secret(tmp_path: Path) -> None:
    files = [new_home(party="a", federation="x", broker=BrokerPlace(host="h")) for _ in range(2)]
    same = {name for name in files[0] if files[0][name] == files[1][name]}
    assert same == {"party.yaml", "policy.yaml", "catalog.yaml"}


def test_the_state_is_for_its_owner_only(home: Home) -> None:
    home.state.mkdir(mode=0o755)
    assert home.make_state() == home.folder / "state"
    assert stat.S_IMODE(home.state.stat().st_mode) == 0o700
    home.state.rmdir()
    home.state.write_text("in the way")
    with pytest.raises(ConfigurationError, match="cannot be made"):
        home.make_state()


def test_settings_of_a_service_are_read(home: Home) -> None:
    edit(home, "#resources: {cpus: 8, memory: 32GiB, gpus: 1}", "resources: {cpus: 8, memory: 32GiB, gpus: 1}")
    edit(home, "#launch: {nproc: 2}", "launch: {nproc: 2, deepspeed: zero2.json}")
    edit(home, "#lost_after: 10m", "lost_after: 1m")
    edit(home, "#heartbeat: 5s", "heartbeat: 2s")
    edit(home, "#store: postgresql+psycopg://fate@localhost/fate", "store: postgresql+psycopg://fate@localhost/fate")
    edit(home, "#artifacts: s3://bucket/fate", "artifacts: s3://bucket/fate")
    edit(home, "state: state ", "state: /var/lib/fate ")
    found = open_home(home.folder / "party.yaml")
    settings = found.settings
    assert (settings.resources.cpus, settings.resources.memory, settings.resources.gpus) == (8.0, 2**35, 1)
    assert (settings.launch.nproc, settings.launch.deepspeed) == (2, home.folder / "zero2.json")
    assert (settings.lost_after, settings.heartbeat, settings.state) == (60.0, 2.0, Path("/var/lib/fate"))
    assert (found.store_url, found.artifacts_url) == ("postgresql+psycopg://fate@localhost/fate", "s3://bucket/fate")
    assert settings.api.token == home.folder / "api.token"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("port: 0", "port: 70000", "api.port"),
        ("port: 0", "prt: 0", "did you mean 'port'"),
        ("#heartbeat: 5s", "heartbeat: 5m", "three signs of life"),
        ("#lost_after: 10m", "lost_after: soon", "duration"),
        ("#launch: {nproc: 2}", "launch: {nproc: 65}", "nproc"),
        ("#resources: {cpus: 8, memory: 32GiB, gpus: 1}", "resources: {memory: much}", "a size is"),
        ("policy: policy.yaml", "policy: 5", "policy"),
    ],
)
def test_a_wrong_setting_is_named_with_its_line(old: str, new: str, said: str, home: Home) -> None:
    edit(home, old, new)
    with pytest.raises(ConfigurationError) as caught:
        open_home(home.folder)
    assert said in caught.value.message and "party.yaml:" in caught.value.message


def test_no_home_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is no party's home") as caught:
        open_home(tmp_path)
    assert "party init" in caught.value.hint


def test_keys_that_are_not_this_partys_are_refused(home: Home) -> None:
    (home.folder / "identity.key").write_bytes(Identity.generate().to_bytes())
    (home.folder / "sealing.key").write_bytes(SealingKey.generate().to_bytes())
    with pytest.raises(ConfigurationError, match=r"identity\.key is not the key that"):
        home.identity()
    with pytest.raises(ConfigurationError, match=r"sealing\.key does not fit"):
        home.sealing()


def test_a_home_of_before_opens_and_runs_no_service(home: Home) -> None:
    # Given a party file as it was written before there were services
    text = (home.folder / "party.yaml").read_text()
    (home.folder / "party.yaml").write_text(text.partition("# --- the service")[0])
    found = open_home(home.folder)
    assert found.policy() == make_policy({"version": 1}) and found.catalog() is EMPTY_CATALOG
    assert found.settings.load_sealing() is None and found.settings.load_token() is None
    with pytest.raises(ConfigurationError, match="names no `sealing`"):
        found.sealing()


@pytest.mark.parametrize(
    ("given", "tls", "host", "port"),
    [
        ("mq.example", True, "mq.example", 5671),
        ("mq.example:99", True, "mq.example", 99),
        ("[::1]:7", False, "::1", 7),
        ("localhost", False, "localhost", 5672),
    ],
)
def test_places_of_brokers(given: str, tls: bool, host: str, port: int) -> None:
    found = broker_place(given, tls=tls)
    assert (found.host, found.port, found.tls) == (host, port, tls)


@pytest.mark.parametrize(("given", "tls"), [("", True), ("a b", True), ("a:0", True), ("a:99999", True), ("a", False)])
def test_what_is_no_place(given: str, tls: bool) -> None:
    with pytest.raises(ConfigurationError, match="no address"):
        broker_place(given, tls=tls)


def test_the_brokers_url_is_one_that_the_transport_takes(tmp_path: Path) -> None:
    plain = made(tmp_path / "plain", broker=broker_place("localhost:7", tls=False), quorum=True)
    address = BrokerAddress.from_url(plain.settings.broker_url(), password=plain.settings.load_password())
    assert (address.host, address.port, address.user, address.queues) == ("localhost", 7, "bank-a", "quorum")
    pem = made(tmp_path / "pem", ca=b"ca", certificate=b"cert", key=b"key", password="given")
    assert "cacertfile=" in pem.settings.broker_url() and "keyfile=" in pem.settings.broker_url()
    assert pem.settings.load_password() == "given"


@pytest.mark.parametrize("wrong", [{"party": "Bank A"}, {"federation": "a/b"}, {"certificate": b"x"}])
def test_what_makes_no_home(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError):
        made(tmp_path / "home", **wrong)
    assert list(tmp_path.iterdir()) == []


# --- files that are secret -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "owner", "me", "private"),
    [
        (0o600, 1000, 1000, True),
        (0o400, 1000, 1000, True),
        (0o440, 0, 10001, True),  # mounted by an orchestrator, for our group
        (0o640, 0, 10001, True),
        (0o440, 1000, 1000, False),
        (0o440, 0, 0, False),
        (0o444, 0, 10001, False),
        (0o644, 0, 10001, False),
        (0o660, 0, 10001, False),
    ],
)
def test_which_files_count_as_secret(mode: int, owner: int, me: int, private: bool) -> None:
    import os

    found = os.stat_result((0o100000 | mode, 1, 1, 1, owner, 0, 5, 0, 0, 0))
    assert module._is_private(found, me=me) is private
