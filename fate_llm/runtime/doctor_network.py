"""What can be seen of a broker from outside, without logging in: TCP, TLS, and its management API."""

from __future__ import annotations

import base64
import http.client
import socket
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import unquote, urlsplit

from fate_llm.core.errors import ConfigurationError
from fate_llm.protocols.strict_json import read_json
from fate_llm.protocols.transports.rabbitmq import BrokerAddress

from .doctor_report import Check, failed, ok, skipped, warning
from .federation import is_loopback

__all__ = [
    "LARGEST_SKEW",
    "ManagementApi",
    "Nodes",
    "check_plugins",
    "check_reachable",
    "check_tls",
    "read_nodes",
    "skew_check",
]

LARGEST_SKEW = 30.0
"""Seconds by which two clocks may differ before it is said."""

_DAYS = 30  # left of a certificate
_LARGEST_ANSWER = 16 * 1024 * 1024  # bytes of the management API's
_PLUGINS = ("federation", "shovel", "management")
_OPEN = "Does the broker run there, and does the firewall let this machine through to that port?"


def check_reachable(address: BrokerAddress, *, seconds: float, ticks: Callable[[], float]) -> tuple[Check, int | None]:
    """The check, and the number of the first node that takes a connection (`BrokerAddress.nodes`)."""
    silent, first, told = [], None, []
    for number, (host, port) in enumerate(address.nodes):
        began = ticks()
        try:
            socket.create_connection((host, port), timeout=seconds).close()
        except OSError as error:
            silent.append(f"{host}:{port}: {error.strerror or error}")
            continue
        first = number if first is None else first
        told.append(f"{host}:{port} in {ticks() - began:.3f} s")
    if first is None:
        return failed("reachable", "; ".join(silent), _OPEN), None
    if silent:
        return warning("reachable", "; ".join([*told, *silent]), f"A node of the cluster is away. {_OPEN}"), first
    return ok("reachable", "; ".join(told)), first


def check_tls(address: BrokerAddress, number: int, *, seconds: float, now: float) -> Check:
    """Version, cipher, and whether and how long the broker's certificate counts. now: seconds since 1970."""
    if not address.tls:
        found = "NO TLS: passwords and messages are in clear; only because the address says plaintext=loopback"
        return warning("tls", found, "For anything but trying out, use amqps:// and certificates.")
    options = address.parameters(number).ssl_options
    assert options is not None  # as tls is on
    host, port = address.nodes[number]
    name = options.server_hostname or host
    try:
        with (
            socket.create_connection((host, port), timeout=seconds) as plain,
            options.context.wrap_socket(plain, server_hostname=name) as wrapped,
        ):
            version, (cipher, _, _), shown = wrapped.version(), wrapped.cipher() or ("?", "", 0), wrapped.getpeercert()
    except ssl.SSLCertVerificationError as error:
        do = "Name the authority that signed it (ca in party.yaml, ?cacertfile= in the address), or the host it is for."
        return failed("tls", f"the certificate does not verify for {name}: {error.verify_message}", do)
    except ssl.SSLError as error:
        do = "Is this its TLS port, does it speak TLS 1.2 or 1.3, and does it know our certificate if it wants one?"
        return failed("tls", f"no TLS: {error.reason or error}", do)
    except OSError as error:
        do = "Is this the broker's TLS port, and not the one without TLS?"
        return failed("tls", f"no TLS: {error.strerror or error}", do)
    days = (ssl.cert_time_to_seconds(str((shown or {})["notAfter"])) - now) / 86400
    found = f"{version}, {cipher}; the certificate verifies for {name} and ends in {days:.0f} days"
    if days < _DAYS:
        return warning("tls", found, "Have a new certificate made and installed at the broker before then.")
    return ok("tls", found)


@dataclass(frozen=True, slots=True)
class ManagementApi:
    """Where a broker's management API is, and as whom it is asked. password is never shown."""

    host: str
    port: int
    tls: bool
    user: str
    password: str = field(repr=False)

    @classmethod
    def from_url(cls, url: str, address: BrokerAddress) -> ManagementApi:
        """`https://user:password@host:15671`; without a user, the one of the broker's address.

        Raises:
            ConfigurationError: another form, or in clear to another machine. The password is not repeated.
        """
        hint = "valid: https://user:password@host:15671; without TLS only on this machine: http://"
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            raise ConfigurationError("--management is no URL", hint=hint) from None
        if parts.scheme not in ("http", "https") or not host or parts.path not in ("", "/", "/api", "/api/"):
            raise ConfigurationError("--management is not the URL of a management API", hint=hint)
        if parts.scheme == "http" and not is_loopback(host):
            raise ConfigurationError(f"--management by http:// to {host} would send a password in clear", hint=hint)
        user = unquote(parts.username) if parts.username else address.user
        password = unquote(parts.password or "") if parts.username else address.password
        tls = parts.scheme == "https"
        return cls(host, port or (15671 if tls else 15672), tls, user, password)

    def get(self, path: str, *, address: BrokerAddress, seconds: float) -> tuple[int, str | None, Any]:
        """Status, the Date header, and the JSON document of one GET; the document is None when the status is not 200.

        Raises:
            OSError, http.client.HTTPException, ValueError: no such answer.
        """
        if self.tls:
            context = ssl.create_default_context(cafile=address.ca_file)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            line: http.client.HTTPConnection = http.client.HTTPSConnection(
                self.host, self.port, timeout=seconds, context=context
            )
        else:
            line = http.client.HTTPConnection(self.host, self.port, timeout=seconds)
        try:
            login = base64.b64encode(f"{self.user}:{self.password}".encode()).decode("ascii")
            line.request("GET", path, headers={"authorization": f"Basic {login}", "accept": "application/json"})
            answer = line.getresponse()
            text = answer.read(_LARGEST_ANSWER + 1)
            if len(text) > _LARGEST_ANSWER:
                raise ValueError(f"more than {_LARGEST_ANSWER} bytes")
            return answer.status, answer.getheader("date"), read_json(text) if answer.status == 200 else None
        finally:
            line.close()


@dataclass(frozen=True, slots=True)
class Nodes:
    """What the management API says. fault: why it says nothing. skew: the broker's clock less ours, seconds.

    plugins: those that all running nodes have; None: it does not say, as in the first seconds after a start.
    """

    fault: str = ""
    skew: float | None = None
    plugins: frozenset[str] | None = None
    alarms: tuple[str, ...] = ()


def read_nodes(api: ManagementApi, address: BrokerAddress, *, seconds: float, clock: Callable[[], float]) -> Nodes:
    """Ask the API for its nodes. clock: seconds since 1970."""
    where = f"the management API at {api.host}:{api.port}"
    before = clock()
    try:
        status, date, found = api.get("/api/nodes", address=address, seconds=seconds)
        # The header counts whole seconds: half of one is added, on the average.
        skew = parsedate_to_datetime(date).timestamp() + 0.5 - (before + clock()) / 2 if date else None
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Nodes(f"{where} does not answer: {type(error).__name__}: {str(error)[:200]}")
    if status != 200:
        return Nodes(f"{where} says {status} to user {api.user!r}: it needs the tag `monitoring`", skew)
    nodes = [node for node in found if isinstance(node, Mapping)] if isinstance(found, list) else []
    if not nodes:
        return Nodes(f"{where} lists no node", skew)
    told = [node.get("enabled_plugins") for node in nodes if node.get("running") is not False]
    sets = [frozenset(map(str, one)) for one in told if isinstance(one, list)]
    plugins = frozenset.intersection(*sets) if sets and len(sets) == len(told) else None
    words = {"mem_alarm": "memory", "disk_free_alarm": "disk"}
    alarms = [f"{word} at {node.get('name')}" for node in nodes for key, word in words.items() if node.get(key) is True]
    away = [f"{node.get('name')} does not run" for node in nodes if node.get("running") is False]
    return Nodes("", skew, plugins, (*alarms, *away))


def check_plugins(nodes: Nodes | None, *, linked: bool) -> Check:
    """linked: the federation has a broker for each party, so that this one needs the plug-in that links them."""
    if nodes is None:
        do = "Give --management https://user:password@host:15671, with a user that has the tag monitoring."
        return skipped("plugins", "only the management API can tell", do)
    if nodes.fault:
        return skipped("plugins", nodes.fault, "Mend --management, or look with `rabbitmq-plugins list`.")
    if nodes.plugins is None:
        return skipped("plugins", "the management API does not say", "Run the doctor again in some seconds.")
    has = {name: f"rabbitmq_{name}" in nodes.plugins for name in _PLUGINS}
    has["auth_mechanism_ssl"] = "rabbitmq_auth_mechanism_ssl" in nodes.plugins
    found = ", ".join(f"{name} {'on' if there else 'off'}" for name, there in has.items())
    if linked and not has["federation"]:
        return failed("plugins", found, "At the broker: rabbitmq-plugins enable rabbitmq_federation")
    return ok("plugins", found)


def skew_check(name: str, skew: float, *, sure: float) -> Check:
    """skew: their clock less ours; sure: by how much that may be wrong; seconds."""
    way = "ahead of" if skew > 0 else "behind"
    found = f"{abs(skew):.3g} s {way} ours, plus or minus {sure:.2g} s"
    if abs(skew) - sure > LARGEST_SKEW:
        do = "Set both clocks by NTP: certificates, deadlines and logs are read by them."
        return warning(name, found, do)
    return ok(name, found)
