"""Certificates of a federation's brokers and clients: one authority of its own, ECDSA on P-256, X.509 v3 (RFC 5280).

Pure: bytes in, bytes out; the time is passed in, serial numbers and keys come from the operating system.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fate_llm.core.errors import ConfigurationError

__all__ = ["Authority", "KeyPair", "make_authority"]

_KEPT = "They are the two files that `fate_llm federation init` wrote into the folder authority."
_SKEW = timedelta(hours=1)  # a certificate is valid this long before it was made: clocks of parties differ


@dataclass(frozen=True, slots=True, repr=False)
class KeyPair:
    """PEM of a certificate, and of its private key (PKCS 8, not encrypted)."""

    certificate: bytes
    key: bytes


class Authority:
    """Signs the certificates of one federation. Its `repr` shows no key."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate, self._key = certificate, key

    @classmethod
    def from_pair(cls, pair: KeyPair) -> Authority:
        """The authority whose files were kept, to issue further certificates.

        Raises:
            ConfigurationError: not a certificate and the key that belongs to it.
        """
        try:
            certificate = x509.load_pem_x509_certificate(pair.certificate)
            key = serialization.load_pem_private_key(pair.key, password=None)
        except (ValueError, TypeError):
            raise ConfigurationError("the authority's files are no PEM certificate and key", hint=_KEPT) from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise ConfigurationError("the authority's key does not belong to its certificate", hint=_KEPT)
        return cls(certificate, key)

    @property
    def pair(self) -> KeyPair:
        """What is written to files; the key stays with who set the federation up."""
        return _as_pem(self._certificate, self._key)

    def issue_server(self, name: str, hosts: Sequence[str], *, now: datetime, days: int) -> KeyPair:
        """For a broker that is reached under `hosts` (names or addresses); it shows it to other brokers as well."""
        return self._issue(name, hosts, (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH), now, days)

    def issue_client(self, name: str, *, now: datetime, days: int) -> KeyPair:
        """For a party that shows who it is to its broker."""
        return self._issue(name, (), (ExtendedKeyUsageOID.CLIENT_AUTH,), now, days)

    def _issue(
        self, name: str, hosts: Sequence[str], usages: Sequence[x509.ObjectIdentifier], now: datetime, days: int
    ) -> KeyPair:
        key = ec.generate_private_key(ec.SECP256R1())
        issuer = self._key.public_key()
        builder = (
            _builder(_named(name), self._certificate.subject, key, now, days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer), critical=False)
        )
        if hosts:
            builder = builder.add_extension(x509.SubjectAlternativeName([_general(h) for h in hosts]), critical=False)
        return _as_pem(builder.sign(self._key, hashes.SHA256()), key)


def make_authority(name: str, *, now: datetime, days: int) -> Authority:
    """A new authority, which may sign certificates of brokers and clients but no further authorities."""
    key = ec.generate_private_key(ec.SECP256R1())
    builder = (
        _builder(_named(name), _named(name), key, now, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
    )
    return Authority(builder.sign(key, hashes.SHA256()), key)


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _as_pem(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> KeyPair:
    return KeyPair(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
