"""What cannot pass is said at once, with the right words and without the password."""

from __future__ import annotations

import contextlib
import datetime
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import quote

import pika
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fate_llm.core.errors import BrokerLost, BrokerRefused, FateError
from fate_llm.protocols.broker_layout import exchange_of, job_inbox, permissions_of
from fate_llm.protocols.transports.rabbitmq import BrokerAddress, RabbitTransport
from fate_llm.runtime.broker import BrokerNode, TlsFiles, free_port
from tests.brokers import admin, node_folder, require_rabbitmq

from .links import CutProxy, loopback, nothing_on, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]
SECRET = "correct-horse-battery"
SOON = 5.0  # seconds for a refusal


def refused(url: str, kind: type[FateError] = BrokerRefused, *, meet: float = 30.0, **more: str) -> FateError:
    """The error of connecting, which came soon and does not have the password in it, nor in what it was raised from."""
    began = time.monotonic()
    with pytest.raises(kind) as caught:
        RabbitTransport(BrokerAddress.from_url(url, **more), party="a", members=("a", "b"), job="j", meet=meet)
    assert time.monotonic() - began < SOON
    error: BaseException | None = caught.value
    while error is not None:
        assert SECRET not in str(error) + repr(error)
        error = None if error.__suppress_context__ else error.__context__
    assert SECRET not in caught.value.hint
    return caught.value


def make_user(broker: BrokerNode, vhost: str, name: str, configure: str, write: str, read: str) -> str:
    """A user of that virtual host; its address."""
    admin(broker, "PUT", f"users/{name}", {"password": SECRET, "tags": ""})
    admin(broker, "PUT", f"permissions/{vhost}/{name}", {"configure": configure, "write": write, "read": read})
    return loopback(broker.url(user=name, password=SECRET, vhost=vhost))


@pytest.fixture
def user(broker: BrokerNode, vhost: str) -> Iterator[Callable[..., str]]:
    """Makes the user `a` with permissions."""

    def make(configure: str, write: str, read: str) -> str:
        return make_user(broker, vhost, "a", configure, write, read)

    yield make
    admin(broker, "DELETE", "users/a")


def test_a_wrong_password(broker: BrokerNode, vhost: str, user: Callable[..., str]) -> None:
    user(".*", ".*", ".*")
    wrong = loopback(broker.url(user="a", password=f"{SECRET}-not", vhost=vhost))
    error = refused(wrong)
    assert "refuses user 'a' or its password" in error.message and "grant" in error.hint
    unknown = refused(loopback(broker.url(user="nobody", password=SECRET, vhost=vhost)))
    assert "refuses user 'nobody' or its password" in unknown.message
    nothing_on(broker, vhost)


def test_a_missing_virtual_host_and_one_that_is_closed_to_the_user(
    broker: BrokerNode, vhost: str, user: Callable[..., str]
) -> None:
    user(".*", ".*", ".*")
    for name in ("missing", "/"):
        error = refused(loopback(broker.url(user="a", password=SECRET, vhost=name)))
        assert f"no virtual host {name!r}" in error.message and "grant" in error.hint
    nothing_on(broker)


def test_a_missing_permission_to_declare_the_inbox(broker: BrokerNode, vhost: str, user: Callable[..., str]) -> None:
    for member in "ab":
        admin(broker, "PUT", f"exchanges/{vhost}/{exchange_of(member)}", {"type": "topic", "durable": True})
    error = refused(user("^$", ".*", ".*"))
    assert "ACCESS_REFUSED" in error.message and job_inbox("a", "j") in error.message
    assert "lacks a permission" in error.hint
    error = refused(user("^fate.to.a/.*$", ".*", "^fate.to.a/.*$"))  # may not bind to the exchanges
    assert "ACCESS_REFUSED" in error.message and exchange_of("a") in error.message
    broker.ctl("delete_queue", "--vhost", vhost, job_inbox("a", "j"))
    nothing_on(broker, vhost)


def test_an_exchange_that_is_missing_and_may_not_be_made(
    broker: BrokerNode, vhost: str, user: Callable[..., str]
) -> None:
    allowed = permissions_of("a", ("a", "b"))
    url = user(allowed.configure, allowed.write, allowed.read)
    error = refused(url)
    assert exchange_of("a") in error.message and "missing" in error.message
    assert "fate_llm federation grant --party a" in error.hint
    admin(broker, "PUT", f"exchanges/{vhost}/{exchange_of('a')}", {"type": "topic", "durable": True})
    assert exchange_of("b") in refused(url).message
    nothing_on(broker, vhost)


def test_the_permissions_of_the_layout_are_enough(broker: BrokerNode, vhost: str, user: Callable[..., str]) -> None:
    for member in "ab":
        admin(broker, "PUT", f"exchanges/{vhost}/{exchange_of(member)}", {"type": "topic", "durable": True})
    allowed = permissions_of("a", ("a", "b"))
    address = BrokerAddress.from_url(user(allowed.configure, allowed.write, allowed.read))
    transport = RabbitTransport(address, party="a", members=("a", "b"), job="j")
    transport.send("a", [b"to myself"])
    delivery = transport.receive(10)
    assert delivery is not None and bytes(delivery.body) == b"to myself"
    transport.ack(delivery)
    transport.close(finished=True)
    nothing_on(broker, vhost)


@pytest.mark.parametrize("taken", [{"x-queue-type": "quorum"}, {"x-expires": 60_000}, {}])
def test_an_inbox_that_is_there_with_other_settings(broker: BrokerNode, vhost: str, taken: dict[str, object]) -> None:
    path = f"queues/{vhost}/{quote(job_inbox('a', 'j'), safe='')}"
    admin(broker, "PUT", path, {"durable": True, "arguments": taken})
    error = refused(loopback(broker.url(vhost=vhost)))
    assert "PRECONDITION_FAILED" in error.message and job_inbox("a", "j") in error.message
    assert "an operator deletes it" in error.hint
    admin(broker, "DELETE", path)
    nothing_on(broker, vhost)


def test_permissions_taken_away_while_it_runs_end_it_with_words(
    broker: BrokerNode, vhost: str, user: Callable[..., str]
) -> None:
    transport = RabbitTransport(
        BrokerAddress.from_url(user(".*", ".*", ".*")), party="a", members=("a",), job="j", outage=20.0
    )
    admin(broker, "DELETE", "users/a")  # the broker closes its connections by itself
    broker.ctl("close_all_connections", "--vhost", vhost, "deleted")
    with pytest.raises(BrokerRefused, match="refuses user 'a' or its password") as caught:
        transport.receive(15)
    assert SECRET not in str(caught.value)
    with pytest.raises(BrokerRefused):
        transport.send("a", [b"x"])
    transport.close(finished=True)
    make_user(broker, vhost, "a", "", "", "")  # for the fixture
    broker.ctl("delete_queue", "--vhost", vhost, job_inbox("a", "j"))
    nothing_on(broker, vhost)


def test_nobody_listens(broker: BrokerNode) -> None:
    url = f"amqp://a:{SECRET}@127.0.0.1:{free_port()}/v?plaintext=loopback"
    error = refused(url, BrokerLost, meet=1.0)
    assert "cannot be reached" in error.message and "refused" in error.message.lower() and "doctor" in error.hint


def test_somebody_listens_and_says_nothing(broker: BrokerNode) -> None:
    with CutProxy(broker.port) as proxy:
        proxy.cut()
        url = f"amqp://a:{SECRET}@127.0.0.1:{proxy.port}/v?plaintext=loopback"
        error = refused(url, BrokerLost, meet=2.0)
        assert "cannot be reached" in error.message


# --- TLS ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Issued:
    certificate: Path
    key: Path


class Authority:
    """Issues certificates into a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._key = folder, ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.file = self._write(f"{name}.pem", self._sign(self._name, self._key.public_key(), 1, None))

    def issue(self, name: str, host: str, *, days: int = 1) -> Issued:
        """For one host. days: until it ends; below 0, it has ended."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        secret = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        path = self._folder / f"{name}.key"
        path.write_bytes(secret)
        return Issued(self._write(f"{name}.pem", self._sign(subject, key.public_key(), days, host)), path)

    def _write(self, name: str, certificate: x509.Certificate) -> Path:
        path = self._folder / name
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return path

    def _sign(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, days: int, host: str | None
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=10))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=host is None, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        if host is not None:
            try:
                named: x509.GeneralName = x509.IPAddress(ip_address(host))
            except ValueError:
                named = x509.DNSName(host)
            usage = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            builder = builder.add_extension(x509.SubjectAlternativeName([named]), critical=False)
            builder = builder.add_extension(x509.ExtendedKeyUsage(usage), critical=False)
        return builder.sign(self._key, hashes.SHA256())


@dataclass(frozen=True)
class Tls:
    """A node that speaks TLS and wants client certificates, and who signs them."""

    node: BrokerNode
    authority: Authority
    client: Issued
    folder: Path

    def url(self, host: str = "localhost", port: int | None = None, **options: object) -> str:
        named = {
            "cacertfile": self.authority.file,
            "certfile": self.client.certificate,
            "keyfile": self.client.key,
            **options,
        }
        query = "&".join(f"{key}={value}" for key, value in named.items() if value is not None)
        return f"amqps://guest:guest@{host}:{port or self.node.tls_port}/?{query}"


@pytest.fixture(scope="module")
def tls() -> Iterator[Tls]:
    require_rabbitmq()
    with node_folder() as folder:
        authority = Authority(folder, "authority")
        server = authority.issue("server", "localhost")
        files = TlsFiles(authority.file, server.certificate, server.key, client_certificates=True)
        with BrokerNode(folder / "tls", name="tls", tls=files) as node:
            yield Tls(node, authority, authority.issue("client", "client"), folder)


def test_tls_that_verifies_works(tls: Tls) -> None:
    transport = RabbitTransport(BrokerAddress.from_url(tls.url()), party="a", members=("a",), job="j")
    body = bytes(range(256)) * 8000
    transport.send("a", [body])
    delivery = transport.receive(10)
    assert delivery is not None and bytes(delivery.body) == body
    transport.ack(delivery)
    transport.close(finished=True)
    named = RabbitTransport(
        BrokerAddress.from_url(tls.url("127.0.0.1", server_name="localhost")), party="a", members=("a",), job="j"
    )
    named.close(finished=True)
    nothing_on(tls.node)


def test_a_wrong_authority(tls: Tls) -> None:
    stranger = Authority(tls.folder, "stranger")
    for option in (stranger.file, None):  # None: those of the system
        error = refused(tls.url(cacertfile=option))
        assert "does not verify" in error.message and "cacertfile" in error.hint
    nothing_on(tls.node)


def test_another_host(tls: Tls) -> None:
    error = refused(tls.url("127.0.0.1"))
    assert "does not verify" in error.message and "127.0.0.1" in error.message and "host" in error.hint


def test_a_client_certificate_that_is_missing_or_unknown(tls: Tls) -> None:
    error = refused(tls.url(certfile=None, keyfile=None))
    assert "certificate" in error.message and "certfile" in error.hint
    stranger = Authority(tls.folder, "other").issue("intruder", "client")
    error = refused(tls.url(certfile=stranger.certificate, keyfile=stranger.key))
    assert "certificate" in error.message
    nothing_on(tls.node)


def test_certificates_that_cannot_be_read(tls: Tls, tmp_path: Path) -> None:
    error = refused(tls.url(cacertfile=tmp_path / "missing.pem"), FateError)
    assert error.code == "configuration" and "missing.pem" in error.message


def test_plain_and_tls_ports_mixed_up(tls: Tls) -> None:
    error = refused(tls.url(port=tls.node.port))
    assert "no TLS connection" in error.message and "TLS port" in error.hint
    plain = f"amqp://guest:{SECRET}@127.0.0.1:{tls.node.tls_port}/?plaintext=loopback"
    assert "cannot be reached" in refused(plain, BrokerLost, meet=1.0).message


def test_an_expired_certificate(tmp_path: Path) -> None:
    """Whoever listens with it: what is said before the certificate counts for nothing."""
    authority = Authority(tmp_path, "authority")
    old = authority.issue("old", "localhost", days=-1)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(old.certificate, old.key)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            client, _ = listener.accept()
            with client, contextlib.suppress(OSError):
                context.wrap_socket(client, server_side=True).close()

        serving = start(serve)
        port = listener.getsockname()[1]
        error = refused(f"amqps://guest:{SECRET}@localhost:{port}/?cacertfile={authority.file}")
        assert "does not verify" in error.message and "expired" in error.message
        serving.result(10)


def test_a_tls_connection_that_is_cut_comes_back(tls: Tls) -> None:
    """An end of the stream in the middle of TLS is no refusal."""
    with CutProxy(tls.node.tls_port) as proxy:
        transport = RabbitTransport(
            BrokerAddress.from_url(tls.url(port=proxy.port)), party="a", members=("a",), job="j", outage=20.0
        )
        for at in range(3):
            proxy.drop_connections()
            transport.send("a", [b"%d" % at])
            came = []
            while b"%d" % at not in came:  # one whose acknowledgement was cut off comes again
                delivery = transport.receive(15)
                assert delivery is not None and delivery.redelivered >= (bytes(delivery.body) != b"%d" % at)
                transport.ack(delivery)
                came.append(bytes(delivery.body))
            assert transport.flush(10)
        assert transport.counters.reconnects >= 3
        transport.close(finished=True)
    nothing_on(tls.node)


assert ssl.HAS_TLSv1_3 and pika.__version__  # what the words above were seen with
