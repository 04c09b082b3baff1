"""Roster and party file: what is read back, what is refused and where, and which files count as secret."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fate_llm.core.errors import ConfigurationError
from fate_llm.runtime.federation import (
    BrokerPlace,
    Federation,
    dump_model,
    is_loopback,
    load_federation,
    load_party,
    make_federation,
    read_password,
    read_secret,
    write_new,
)
from fate_llm.security.identity import Identity

KEYS = {
    party: Identity.from_bytes(bytes([at]) * 32) for at, party in enumerate(("bank-a", "bank-b", "bank-c"), start=1)
}


def roster(topology: str = "shared", **changes: Any) -> dict[str, Any]:
    parties = {
        party: {
            "identity": identity.public.to_text(),
            "broker": {"host": "broker.example" if topology == "shared" else f"{party}.example", "port": 5671},
        }
        for party, identity in KEYS.items()
    }
    return {
        "version": 1,
        "name": "loans",
        "vhost": "fate.loans",
        "topology": topology,
        "parties": parties,
    } | changes


def write(path: Path, data: Any) -> Path:
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data, sort_keys=False))
    return path


def message(path: Path) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_federation(path)
    return caught.value.message


# --- the roster --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", ["shared", "per-party"])
def test_what_is_written_is_read_back(topology: str, tmp_path: Path) -> None:
    made = make_federation(roster(topology))
    found = load_federation(write(tmp_path / "federation.yaml", dump_model(made)))
    assert found == made
    assert found.members == ("bank-a", "bank-b", "bank-c")
    assert found.identities() == {party: identity.public for party, identity in KEYS.items()}


def test_the_digest_is_of_what_is_said_not_of_how(tmp_path: Path) -> None:
    data = roster()
    made = make_federation(data)
    shuffled = dict(reversed(data.items())) | {"parties": dict(reversed(data["parties"].items()))}
    for party in shuffled["parties"].values():
        party["broker"] = {"port": 5671, "tls": True, "host": party["broker"]["host"]}  # the default, written out
    found = load_federation(write(tmp_path / "other.yaml", "# a comment\n" + yaml.safe_dump(shuffled)))
    assert found.digest() == made.digest()
    assert len(made.digest()) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"name": "loan"},
        {"vhost": "fate.loan"},
        {"topology": "per-party"},
        {
            "parties": {
                **roster()["parties"],
                "bank-c": roster()["parties"]["bank-a"] | {"identity": Identity.generate().public.to_text()},
            }
        },
    ],
)
def test_any_change_changes_the_digest(change: dict[str, Any]) -> None:
    base = roster(change.get("topology", "shared"))
    assert make_federation(base | change).digest() != make_federation(roster()).digest()


def test_all_faults_come_at_once_with_their_lines(tmp_path: Path) -> None:
    text = (
        dump_model(make_federation(roster()))
        .replace("version: 1", "version: 2")
        .replace("topology: shared", "topology: star")
    )
    text = text.replace("port: 5671", "port: 0", 1).replace("name: loans", "name: Loans") + "owner: me\n"
    found = message(write(tmp_path / "f.yaml", text))
    lines = text.splitlines()
    for word in ("version", "name", "topology", "owner"):
        at = next(number for number, line in enumerate(lines, 1) if line.startswith(word))
        assert f"f.yaml:{at}: {word}" in found, found
    assert "parties.bank-a.broker.port" in found
    assert found.startswith("5 faults in the federation file")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("parties: [", "yaml_syntax"),
        ("name: a\nname: b\n", "duplicate_key"),
        ("!!python/object:os.system {}", "yaml_tag"),
        ("[]", "mapping"),
        ("", "mapping"),
        (roster(parties={}), "at least 1"),
        (roster(vhost="/"), "vhost"),
        (roster(vhost="a b"), "vhost"),
        (roster(version="1"), "version"),
    ],
)
def test_what_is_no_roster_is_refused(data: Any, said: str, tmp_path: Path) -> None:
    assert said in message(write(tmp_path / "f.yaml", data))


def test_a_missing_or_odd_file_is_named(tmp_path: Path) -> None:
    assert "federation.yaml cannot be read" in message(tmp_path / "federation.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in message(tmp_path / "binary.yaml")


def test_two_parties_do_not_share_an_identity() -> None:
    data = roster()
    data["parties"]["bank-c"]["identity"] = data["parties"]["bank-a"]["identity"]
    with pytest.raises(ConfigurationError, match="bank-c and bank-a have the same identity"):
        make_federation(data)


@pytest.mark.parametrize("text", ["", "ed25519:", "ed25519:AAAA", "rsa:x", KEYS["bank-a"].public.to_text()[:-1]])
def test_a_public_key_that_is_none_is_refused(text: str) -> None:
    data = roster()
    data["parties"]["bank-b"]["identity"] = text
    with pytest.raises(ConfigurationError, match=r"parties\.bank-b\.identity"):
        make_federation(data)


def test_the_brokers_fit_the_topology() -> None:
    with pytest.raises(ConfigurationError, match="one address, and the parties name several"):
        make_federation(roster("per-party") | {"topology": "shared"})
    with pytest.raises(ConfigurationError, match="two parties name the same broker"):
        make_federation(roster("shared") | {"topology": "per-party"})


@pytest.mark.parametrize("host", ["broker.example", "10.0.0.7", "localhost.example", "127.0.0.1.example"])
def test_without_tls_only_loopback_will_do(host: str) -> None:
    with pytest.raises(ValueError, match="only loopback is allowed"):
        BrokerPlace(host=host, tls=False)
    assert BrokerPlace(host=host).tls


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.1", "::1"])
def test_loopback_is_known_by_name_and_address(host: str) -> None:
    assert is_loopback(host)
    assert not BrokerPlace(host=host, tls=False).tls


@pytest.mark.parametrize("host", ["", "a b", "a/b", "user@host", "-x", "a?b", "host:5671;", "a" * 300])
def test_a_host_is_a_host(host: str) -> None:
    with pytest.raises(ValueError):
        BrokerPlace(host=host)


def test_a_url_has_no_password_and_is_encoded() -> None:
    assert BrokerPlace(host="b.example").url("bank-a", "fate.loans") == "amqps://bank-a@b.example:5671/fate.loans"
    assert BrokerPlace(host="::1", port=7, tls=False).url("link/a", "/") == "amqp://link%2Fa@[::1]:7/%2F"


def test_an_unknown_party_has_the_nearest() -> None:
    with pytest.raises(ConfigurationError) as caught:
        make_federation(roster()).member("bank-d")
    assert "no party 'bank-d'" in caught.value.message and "bank-" in caught.value.hint


@given(st.dictionaries(st.text(max_size=4), st.none() | st.integers() | st.text(max_size=4), max_size=4))
def test_nothing_but_a_configuration_error_comes_out(data: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        make_federation(data)


def test_a_roster_cannot_be_changed() -> None:
    found = make_federation(roster())
    with pytest.raises(ValueError, match="frozen"):
        found.name = "x"
    assert isinstance(found, Federation)


# --- the party's file --------------------------------------------------------------------------------------------


@pytest.fixture
def party_folder(tmp_path: Path) -> Path:
    write(tmp_path / "federation.yaml", dump_model(make_federation(roster())))
    write_new(tmp_path / "identity.key", KEYS["bank-a"].to_bytes())
    write_new(tmp_path / "broker.password", b"secret\n")
    settings = {
        "version": 1,
        "party": "bank-a",
        "federation": "federation.yaml",
        "identity": "identity.key",
        "broker": "amqps://bank-a@broker.example:5671/fate.loans",
        "password": "broker.password",
        "ca": "ca.pem",
    }
    write(tmp_path / "party.yaml", settings)
    return tmp_path


def change(folder: Path, **values: Any) -> Path:
    data = yaml.safe_load((folder / "party.yaml").read_text()) | values
    return write(folder / "party.yaml", {key: value for key, value in data.items() if value is not None})


def test_a_party_finds_its_files_beside_its_own(party_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    settings, federation = load_party(party_folder / "party.yaml")
    assert federation.name == "loans"
    assert settings.ca == party_folder / "ca.pem"
    assert settings.load_identity().public == KEYS["bank-a"].public
    assert settings.load_password() == "secret"


def test_the_url_for_the_transport_names_the_certificates(party_folder: Path) -> None:
    settings, _ = load_party(party_folder / "party.yaml")
    plain = "amqps://bank-a@broker.example:5671/fate.loans"
    ca = str(party_folder / "ca.pem").replace("/", "%2F")
    assert settings.broker_url() == f"{plain}?cacertfile={ca}"
    change(party_folder, ca=None, broker=plain + "?queues=quorum", certificate="c.pem", key="c.key")
    found = load_party(party_folder / "party.yaml")[0].broker_url()
    assert found.startswith(plain + "?queues=quorum&certfile=") and "keyfile=" in found
    change(party_folder, certificate=None, key=None, broker="amqp://x@127.0.0.1/a?plaintext=loopback")
    assert load_party(party_folder / "party.yaml")[0].broker_url() == "amqp://x@127.0.0.1/a?plaintext=loopback"


def test_a_broker_that_asks_for_no_password_needs_no_file(party_folder: Path) -> None:
    assert load_party(change(party_folder, password=None))[0].load_password() is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"broker": "amqps://a:secret@h/v"}, "has a password in it"),
        ({"broker": "http://h/v"}, "amqps://USER@HOST:PORT/VHOST"),
        ({"broker": "amqps:///v"}, "amqps://USER@HOST:PORT/VHOST"),
        ({"broker": "amqps://h:99999/v"}, "not a URL"),
        ({"certificate": "client.pem"}, "give both or none"),
        ({"party": "bank-x"}, "no party 'bank-x'"),
        ({"identity": ""}, "identity"),
        ({"identity": None}, "'identity' is required"),
        ({"passwort": "x"}, "unknown key 'passwort'"),
        ({"federation": "elsewhere.yaml"}, "elsewhere.yaml cannot be read"),
    ],
)
def test_a_wrong_party_file_says_what_is_wrong(values: dict[str, Any], said: str, party_folder: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_party(change(party_folder, **values))
    assert said in str(caught.value)


# --- secrets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o700, 0o440, 0o601])
def test_a_secret_that_others_may_see_is_refused(mode: int, party_folder: Path) -> None:
    settings, _ = load_party(party_folder / "party.yaml")
    for name, read in (("identity.key", settings.load_identity), ("broker.password", settings.load_password)):
        (party_folder / name).chmod(mode)
        with pytest.raises(ConfigurationError, match=rf"{name} has mode {mode:04o}; it must be 0600"):
            read()


def test_an_identity_of_another_length_is_refused(party_folder: Path) -> None:
    (party_folder / "identity.key").write_bytes(b"short")
    with pytest.raises(ConfigurationError, match="5 bytes"):
        load_party(party_folder / "party.yaml")[0].load_identity()


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\n", b"a\nb\n", b"\na"])
def test_a_password_is_one_line(content: bytes, tmp_path: Path) -> None:
    write_new(tmp_path / "p", content)
    with pytest.raises(ConfigurationError, match="not one line of text"):
        read_password(tmp_path / "p")


@pytest.mark.parametrize("content", [b"pass word", b"pass word\n", b"pass word\r\n"])
def test_a_password_is_what_stands_in_the_line(content: bytes, tmp_path: Path) -> None:
    write_new(tmp_path / "p", content)
    assert read_password(tmp_path / "p") == "pass word"


def test_a_secret_is_small_and_there(tmp_path: Path) -> None:
    write_new(tmp_path / "big", b"x" * 4097)
    with pytest.raises(ConfigurationError, match="more than 4096 bytes"):
        read_secret(tmp_path / "big", "key")
    with pytest.raises(ConfigurationError, match=r"key file .*none cannot be read"):
        read_secret(tmp_path / "none", "key")


def test_a_new_file_is_for_its_owner_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_new(tmp_path / "key", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def test_nothing_is_overwritten_and_nothing_half_remains(tmp_path: Path) -> None:
    write_new(tmp_path / "key", b"first")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for name in ("key", "link"):
        with pytest.raises(ConfigurationError, match="exists, and is not overwritten"):
            write_new(tmp_path / name, b"second")
    assert (tmp_path / "key").read_bytes() == b"first"
    with pytest.raises(ConfigurationError, match="cannot be written"):
        write_new(tmp_path / "no" / "key", b"x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "link"]
