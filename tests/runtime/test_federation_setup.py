"""What `federation init` writes: for whom, with which certificates, and that it never writes over anything."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from fate_llm.core.errors import ConfigurationError
from fate_llm.runtime.federation import load_party
from fate_llm.runtime.federation_broker import BrokerLimits, password_hash, rabbitmq_conf
from fate_llm.runtime.federation_setup import Setup, plan_setup, set_up, write_files
from fate_llm.security.certificates import Authority, KeyPair, make_authority
from fate_llm.security.identity import Identity

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
PARTIES = ("bank.a", "bank-b", "bank-c")
PLACES = tuple(f"{party}={party}.example" for party in PARTIES)


def planned(topology: str = "shared", **changes: Any) -> Setup:
    options = {
        "name": "loans",
        "parties": PARTIES,
        "brokers": PLACES if topology == "per-party" else ["hub.example:5670"],
    }
    return plan_setup(topology=topology, **(options | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["shared", "per-party"])
def files(request: pytest.FixtureRequest) -> dict[str, bytes]:
    return set_up(planned(request.param), now=NOW)


def definitions(files: dict[str, bytes], owner: str) -> dict[str, Any]:
    found = json.loads(files[f"brokers/{owner}/definitions.json"])
    assert isinstance(found, dict)
    return found


# --- files -------------------------------------------------------------------------------------------------------


def test_every_party_gets_its_own_secrets_and_no_other_s(files: dict[str, bytes], tmp_path: Path) -> None:
    write_files(tmp_path / "out", files)
    secrets: set[bytes] = set()
    for party in PARTIES:
        settings, federation = load_party(tmp_path / "out" / "parties" / party / "party.yaml")
        assert settings.load_identity().public == federation.member(party).public
        own = {settings.load_identity().to_bytes(), (settings.load_password() or "").encode()}
        sealing = settings.load_sealing()
        assert sealing is not None and sealing.public == federation.member(party).sealing_key
        own |= {files[f"parties/{party}/client.key"], sealing.to_bytes(), (settings.load_token() or "").encode()}
        assert len(own) == 5 and not own & secrets
        secrets |= own
        assert settings.broker.startswith(f"amqps://{party}@") and settings.broker.endswith("/fate.loans")
    assert not [name for name in files if name.startswith("parties/") and files[name] == files["authority/ca.key"]]


def test_all_files_are_for_their_owner_only(files: dict[str, bytes], tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_files(tmp_path / "new" / "out", files)
    finally:
        os.umask(before)
    found = list((tmp_path / "new" / "out").rglob("*"))
    assert {p.relative_to(tmp_path / "new" / "out").as_posix() for p in found if p.is_file()} == set(files)
    assert {stat.S_IMODE(path.stat().st_mode) for path in found if path.is_file()} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in found if path.is_dir()} == {0o700}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_a_folder_with_anything_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_files(tmp_path / "out", {"a/b": b"1"})  # empty is fine
    with pytest.raises(ConfigurationError, match="is not empty"):
        write_files(tmp_path / "out", {"a/b": b"2"})
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(ConfigurationError, match="is not empty"):
            write_files(tmp_path / name, {"a": b"2"})
    assert (tmp_path / "out" / "a" / "b").read_bytes() == b"1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "out"]


def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError):
        write_files(tmp_path / "out", {"a": b"1", "a/b": b"2"})
    assert list(tmp_path.iterdir()) == []


def test_two_set_ups_share_no_secret() -> None:
    first, second = (set_up(planned(), now=NOW) for _ in range(2))
    same = {name for name in first if first[name] == second[name]}
    assert same == {f"brokers/shared/{name}" for name in ("rabbitmq.conf", "enabled_plugins")} | {
        f"parties/{party}/{name}.yaml" for party in PARTIES for name in ("party", "policy", "catalog")
    }


def test_a_party_that_gives_its_identity_keeps_its_key() -> None:
    theirs = Identity.generate()
    setup = planned(parties=["bank.a", f"bank-b={theirs.public.to_text()}"])
    found = set_up(setup, now=NOW)
    assert "parties/bank.a/identity.key" in found
    assert "parties/bank-b/identity.key" not in found
    assert setup.federation.member("bank-b").public == theirs.public
    assert not [name for name, content in found.items() if theirs.to_bytes() in content]


# --- definitions -------------------------------------------------------------------------------------------------


def test_the_hashes_are_those_of_the_passwords(files: dict[str, bytes]) -> None:
    owners = {name.split("/")[1] for name in files if name.startswith("brokers/")}
    for party in PARTIES:
        owner = party if party in owners else "shared"
        (user,) = [user for user in definitions(files, owner)["users"] if user["name"] == party]
        raw = base64.b64decode(user["password_hash"])
        password = files[f"parties/{party}/broker.password"].strip()
        assert raw[4:] == hashlib.sha256(raw[:4] + password).digest()
        assert user["tags"] == []
        assert password not in files[f"brokers/{owner}/definitions.json"]


def test_a_hash_is_rabbitmq_s() -> None:
    # The example of RabbitMQ's own documentation (Passwords: computing password hash).
    found = password_hash("test12", salt=bytes.fromhex("908DC60A"))
    assert found == "kI3GCqW5JLMJa4iX1lo7X4D6XbYqlLgxIs30+P6tENUV2POR"
    with pytest.raises(ValueError, match="3 bytes"):
        password_hash("x", salt=b"123")


def test_the_brokers_have_exactly_the_users_they_need() -> None:
    shared = definitions(set_up(planned(), now=NOW), "shared")
    assert [user["name"] for user in shared["users"]] == sorted(PARTIES)
    assert "parameters" not in shared and "policies" not in shared
    assert [queue["name"] for queue in shared["queues"]] == [f"fate.to.{party}/control" for party in PARTIES]
    files = set_up(planned("per-party"), now=NOW)
    for owner in PARTIES:
        found = definitions(files, owner)
        links = [f"link/{party}" for party in PARTIES if party != owner]
        assert [user["name"] for user in found["users"]] == sorted([owner, *links])
        assert {entry["user"] for entry in found["permissions"]} == {owner, *links}
        assert [queue["name"] for queue in found["queues"]] == [f"fate.to.{owner}/control"]
        assert {upstream["name"] for upstream in found["parameters"]} == set(PARTIES) - {owner}


def test_each_exchange_is_fed_by_its_own_broker_only() -> None:
    found = definitions(set_up(planned("per-party"), now=NOW), "bank-b")
    exchanges = [exchange["name"] for exchange in found["exchanges"]]
    feeds = {
        exchange: [
            p["definition"]["federation-upstream"] for p in found["policies"] if re.search(p["pattern"], exchange)
        ]
        for exchange in (*exchanges, "fate.from.bankxa")
    }
    assert feeds == {
        "fate.from.bank.a": ["bank.a"],
        "fate.from.bank-b": [],
        "fate.from.bank-c": ["bank-c"],
        "fate.from.bankxa": [],
    }


def test_a_link_confirms_end_to_end_and_verifies_who_answers() -> None:
    files = set_up(planned("per-party"), now=NOW)
    for upstream in definitions(files, "bank-b")["parameters"]:
        value = upstream["value"]
        assert value["ack-mode"] == "on-confirm" and value["max-hops"] == 1
        assert value["prefetch-count"] * 4 <= 64  # MiB
        assert value["uri"].startswith("amqps://link%2Fbank-b:")
        assert f"@{upstream['name']}.example:5671/fate.loans?" in value["uri"]
        assert "verify=verify_peer" in value["uri"]
        assert f"server_name_indication={upstream['name']}.example" in value["uri"]


def test_a_link_logs_in_with_a_password_that_only_its_own_broker_holds() -> None:
    files = set_up(planned("per-party"), now=NOW)
    seen: set[bytes] = set()
    for owner in PARTIES:
        for upstream in definitions(files, owner)["parameters"]:
            password = re.findall(r":([0-9a-f]{48})@", upstream["value"]["uri"])[0].encode()
            there = definitions(files, upstream["name"])["users"]
            (user,) = [user for user in there if user["name"] == f"link/{owner}"]
            raw = base64.b64decode(user["password_hash"])
            assert raw[4:] == hashlib.sha256(raw[:4] + password).digest()
            assert [name for name, content in files.items() if password in content] == [
                f"brokers/{owner}/definitions.json"
            ]
            seen.add(password)
    assert len(seen) == 6


def test_a_cluster_has_quorum_queues_and_its_parties_are_told() -> None:
    files = set_up(planned(nodes=3), now=NOW)
    assert all(queue["arguments"] == {"x-queue-type": "quorum"} for queue in definitions(files, "shared")["queues"])
    assert b"?queues=quorum" in files["parties/bank.a/party.yaml"]


# --- rabbitmq.conf -----------------------------------------------------------------------------------------------


def settings(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return dict(line.split(" = ") for line in lines)


def test_the_configuration_is_tls_only_and_bounded() -> None:
    federation = planned("per-party").federation
    found = settings(rabbitmq_conf(federation, "bank-b", BrokerLimits(folder="/opt/mq/"), port=5999))
    assert found["listeners.tcp"] == "none" and found["listeners.ssl.default"] == "5999"
    assert found["cluster_name"] == "bank-b"
    assert found["ssl_options.verify"] == "verify_peer"
    assert found["ssl_options.fail_if_no_peer_cert"] == "false"
    assert {found["ssl_options.versions.1"], found["ssl_options.versions.2"]} == {"tlsv1.2", "tlsv1.3"}
    assert found["ssl_options.keyfile"] == "/opt/mq/server.key"
    assert found["heartbeat"] == "30" and int(found["max_message_size"]) == 16 * 2**20
    strict = BrokerLimits(client_certificates=True)
    assert settings(rabbitmq_conf(federation, None, strict, port=1))["ssl_options.fail_if_no_peer_cert"] == "true"


# --- certificates ------------------------------------------------------------------------------------------------


def certificate(pem: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem)


def test_a_broker_s_certificate_is_for_its_host_and_signed_by_the_authority(files: dict[str, bytes]) -> None:
    owners = {name.split("/")[1] for name in files if name.startswith("brokers/")}
    for owner in owners:
        host = "hub.example" if owner == "shared" else f"{owner}.example"
        store = Store([certificate(files[f"brokers/{owner}/ca.pem"])])
        leaf = certificate(files[f"brokers/{owner}/server.pem"])
        verify = PolicyBuilder().store(store).time(NOW)
        verify.build_server_verifier(x509.DNSName(host)).verify(leaf, [])
        with pytest.raises(VerificationError):
            verify.build_server_verifier(x509.DNSName("other.example")).verify(leaf, [])
        key = serialization.load_pem_private_key(files[f"brokers/{owner}/server.key"], None)
        assert key.public_key() == leaf.public_key()


def test_a_party_s_certificate_makes_no_server(files: dict[str, bytes]) -> None:
    for party in PARTIES:
        leaf = certificate(files[f"parties/{party}/client.pem"])
        usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
        assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        leaf.verify_directly_issued_by(certificate(files["authority/ca.pem"]))


def test_certificates_are_p_256_and_end_when_said() -> None:
    found = set_up(planned(valid_days=30), now=NOW)
    pems = [content for name, content in found.items() if name.endswith(".pem")]
    for leaf in map(certificate, pems):
        assert leaf.not_valid_after_utc == NOW + timedelta(days=30)
        assert leaf.not_valid_before_utc == NOW - timedelta(hours=1)
        key = leaf.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name == "secp256r1"
    assert len({leaf.serial_number for leaf in map(certificate, set(pems))}) == len(set(pems))


def test_an_address_is_no_name() -> None:
    pair = make_authority("x", now=NOW, days=1).issue_server("::1", ["::1", "10.0.0.7", "b.example"], now=NOW, days=1)
    names = certificate(pair.certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(one) for one in names.get_values_for_type(x509.IPAddress)] == ["::1", "10.0.0.7"]
    assert names.get_values_for_type(x509.DNSName) == ["b.example"]


def test_an_authority_goes_on_from_its_files_and_from_no_others() -> None:
    authority, other = (make_authority(name, now=NOW, days=1) for name in ("x", "y"))
    again = Authority.from_pair(authority.pair).issue_client("a", now=NOW, days=1)
    certificate(again.certificate).verify_directly_issued_by(certificate(authority.pair.certificate))
    with pytest.raises(ConfigurationError, match="does not belong"):
        Authority.from_pair(KeyPair(authority.pair.certificate, other.pair.key))
    for broken in (KeyPair(b"", authority.pair.key), KeyPair(authority.pair.certificate, b"x")):
        with pytest.raises(ConfigurationError, match="no PEM"):
            Authority.from_pair(broken)
    assert "PRIVATE" not in repr(authority) + repr(authority.pair)


# --- what an operator types --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("h.example", "h.example", 5671), ("h:5", "h", 5), ("[::1]:7", "::1", 7), ("10.0.0.7", "10.0.0.7", 5671)],
)
def test_a_broker_is_a_host_and_perhaps_a_port(text: str, host: str, port: int) -> None:
    place = planned(brokers=[text]).federation.member("bank-b").broker
    assert (place.host, place.port, place.tls) == (host, port, True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parties": ["a", "b", "a"]}, "named twice"),
        ({"parties": ["a", "a=ed25519:x"]}, "named twice"),
        ({"parties": ["a"]}, "at least 2"),
        ({"parties": ["a", "b=x"]}, "parties.b.identity"),
        ({"parties": ["a", "B"]}, "not a valid id"),
        ({"name": "no name"}, "not a valid id"),
        ({"brokers": ["a", "b"]}, "does not fit a shared"),
        ({"brokers": ["bank-b=h"]}, "does not fit a shared"),
        ({"brokers": ["h:port"]}, "does not fit"),
        ({"brokers": ["h:1:2"]}, "does not fit"),
        ({"brokers": ["h:70000"]}, "port"),
        ({"topology": "per-party", "brokers": ["hub.example"]}, "does not fit a per-party"),
        ({"topology": "per-party", "brokers": PLACES[:2]}, "do not agree: bank-c"),
        ({"topology": "per-party", "brokers": [*PLACES, "bank-d=h"]}, "do not agree: bank-d"),
        ({"topology": "per-party", "brokers": [*PLACES, PLACES[0]]}, "does not fit"),
        ({"config_folder": "relative"}, "relative"),
        ({"config_folder": "/a\nlisteners.tcp.default = 5672"}, "no such thing"),
        ({"disk_free": "much"}, "no such thing"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_made(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        planned(changes.pop("topology", "shared"), **changes)
    assert said in str(caught.value)


def test_certificates_have_a_time_that_is_one() -> None:
    with pytest.raises(ConfigurationError, match="0 days"):
        set_up(planned(valid_days=0), now=NOW)
