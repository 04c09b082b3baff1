"""The roster of a federation (`federation.yaml`), and what one party keeps for itself (`party.yaml`).

The roster is the same at every party, and its digest says so: who takes part, the public identity that all others pin,
where each party's broker is, and whether there is one broker for all (`shared`) or one for each (`per-party`). It holds
no secret. `party.yaml` names the files of one party that are secret: its identity key and its password at the broker,
each readable by its owner only.
"""

from __future__ import annotations

import ipaddress
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import quote, urlencode, urlsplit

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from fate_llm.core.canonical import digest
from fate_llm.core.errors import ConfigurationError, Fault
from fate_llm.core.names import NAME_PATTERN, nearest
from fate_llm.pipelines.dialect import Source, dump, parse
from fate_llm.pipelines.faults import Faults, found_by_pydantic
from fate_llm.security.identity import Identity, PublicIdentity

__all__ = [
    "BrokerPlace",
    "Federation",
    "Member",
    "PartySettings",
    "Topology",
    "dump_model",
    "is_loopback",
    "load_federation",
    "load_party",
    "make_federation",
    "read_password",
    "read_secret",
    "write_new",
]

Topology = Literal["shared", "per-party"]
Model = TypeVar("Model", bound=BaseModel)
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]

_MOST_SECRET = 4096  # bytes of a secret file


def is_loopback(host: str) -> bool:
    """True for a host that is this machine and is reached over no network."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class BrokerPlace(_Strict):
    """Where a broker is reached by its clients and by other parties' brokers."""

    host: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.:-]{0,251}[A-Za-z0-9])?$|^::1?$")]
    port: Annotated[int, Field(ge=1, le=65535)] = 5671
    tls: bool = True

    @model_validator(mode="after")
    def _plain_text_stays_here(self) -> BrokerPlace:
        if not self.tls and not is_loopback(self.host):
            raise ValueError(f"tls is off and {self.host} is another machine: without TLS only loopback is allowed")
        return self

    def url(self, user: str, vhost: str) -> str:
        """`amqps://USER@HOST:PORT/VHOST`, without a password."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        scheme = "amqps" if self.tls else "amqp"
        return f"{scheme}://{quote(user, safe='')}@{host}:{self.port}/{quote(vhost, safe='')}"


class Member(_Strict):
    """One party: the identity all others pin, and its broker (the same for all when it is shared)."""

    identity: str
    broker: BrokerPlace

    @field_validator("identity")
    @classmethod
    def _is_a_public_key(cls, text: str) -> str:
        try:
            PublicIdentity.from_text(text)
        except ConfigurationError as error:
            raise ValueError(error.message) from None
        return text

    @property
    def public(self) -> PublicIdentity:
        return PublicIdentity.from_text(self.identity)


class Federation(_Strict):
    """The roster. parties: by id, at least two, in the order that is written."""

    version: Literal[1]
    name: Name
    vhost: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]
    topology: Topology
    parties: Annotated[Mapping[Name, Member], Field(min_length=2, max_length=1000)]

    @model_validator(mode="after")
    def _nobody_twice(self) -> Federation:
        first: dict[str, str] = {}
        for party, member in self.parties.items():
            other = first.setdefault(member.identity, party)
            if other != party:
                raise ValueError(f"{party} and {other} have the same identity: each party makes its own")
        places = {member.broker for member in self.parties.values()}
        if self.topology == "shared" and len(places) > 1:
            raise ValueError("a shared broker has one address, and the parties name several")
        if self.topology == "per-party" and len(places) < len(self.parties):
            raise ValueError("two parties name the same broker; with one broker per party each has its own")
        return self

    @property
    def members(self) -> tuple[str, ...]:
        """Ids in the order of the file."""
        return tuple(self.parties)

    def member(self, party: str) -> Member:
        """One party's entry.

        Raises:
            ConfigurationError: nobody in the roster has this id.
        """
        if party not in self.parties:
            raise ConfigurationError(
                f"no party {party!r} in federation {self.name!r}", hint=nearest(party, self.parties)
            )
        return self.parties[party]

    def identities(self) -> dict[str, PublicIdentity]:
        """Public identity of every party."""
        return {party: member.public for party, member in self.parties.items()}

    def digest(self) -> str:
        """SHA-256 (64 hex digits) over the content; equal wherever the roster says the same, however it is written."""
        return digest(self.model_dump(mode="json"))


class PartySettings(_Strict):
    """What one party's process needs. Paths in the file are relative to it; here they are absolute.

    broker: URL without a password. password: file with the password. ca: who signs brokers, None for the system's
    authorities. certificate, key: what is shown to a broker that asks for it.
    """

    version: Literal[1]
    party: Name
    federation: Path
    identity: Path
    broker: str
    password: Path | None = None
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    @field_validator("federation", "identity", "password", "ca", "certificate", "key", mode="before")
    @classmethod
    def _as_path(cls, value: Any) -> Any:
        return Path(value) if isinstance(value, str) and value else value

    @field_validator("broker")
    @classmethod
    def _without_password(cls, text: str) -> str:
        try:
            found = urlsplit(text)
            host, secret, _ = found.hostname, found.password, found.port
        except ValueError:
            raise ValueError("not a URL; it is amqps://USER@HOST:PORT/VHOST") from None
        if secret is not None:
            raise ValueError("the URL has a password in it: put it into the file that `password` names")
        if found.scheme not in {"amqp", "amqps"} or not host:
            raise ValueError("a broker's URL is amqps://USER@HOST:PORT/VHOST")
        return text

    @model_validator(mode="after")
    def _both_or_none(self) -> PartySettings:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together: give both or none")
        return self

    def load_identity(self) -> Identity:
        """The secret identity.

        Raises:
            ConfigurationError: the file is missing, open to others, or not a key.
        """
        return Identity.from_bytes(read_secret(self.identity, "identity key"))

    def load_password(self) -> str | None:
        """The password at the broker, None when no file is named.

        Raises:
            ConfigurationError: the file is missing, open to others, empty, or not text.
        """
        return None if self.password is None else read_password(self.password)

    def broker_url(self) -> str:
        """The broker's URL with the certificates' files as options, still without the password."""
        files = {"cacertfile": self.ca, "certfile": self.certificate, "keyfile": self.key}
        options = [(name, str(path)) for name, path in files.items() if path is not None]
        if not options or self.broker.startswith("amqp:"):
            return self.broker
        return f"{self.broker}{'&' if '?' in self.broker else '?'}{urlencode(options)}"


def load_federation(path: Path) -> Federation:
    """Read a roster.

    Raises:
        ConfigurationError: it cannot be read, or is wrong; all faults at once, each with file and line.
    """
    return _load(path, Federation, "federation")


def load_party(path: Path) -> tuple[PartySettings, Federation]:
    """Read a party's file and the roster it names; the secrets are read when they are asked for.

    Raises:
        ConfigurationError: one cannot be read or is wrong, the roster lacks the party, or the broker is another.
    """
    found = _load(path, PartySettings, "party")
    folder = path.absolute().parent
    named = {key: folder / value for key, value in found if isinstance(value, Path)}
    settings = found.model_copy(update=named)
    federation = load_federation(settings.federation)
    federation.member(settings.party)
    return settings, federation


def _load(path: Path, model: type[Model], what: str) -> Model:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"the {what} file {path} cannot be read: {error.strerror}", hint=_MAKE_ONE) from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"the {what} file {path} is not UTF-8 text", hint=_MAKE_ONE) from None
    return _checked(parse(text, str(path)), model, f"the {what} file {path}")


def make_federation(data: Mapping[str, Any]) -> Federation:
    """A roster from plain values.

    Raises:
        ConfigurationError: all that is wrong with them.
    """
    return _checked(Source(data=data), Federation, "the federation")


def _checked(source: Source, model: type[Model], what: str) -> Model:
    faults = Faults(source.marks)
    if not source.faults:
        try:
            return model.model_validate(source.data)
        except ValidationError as error:
            for one in found_by_pydantic(error, source.data, model):
                faults.add(one.code, one.path, one.message, one.hint)
    found = faults.merge(source.faults)
    lines = "\n".join(_shown(fault) for fault in found)
    count = f"{len(found)} fault{'s' if len(found) != 1 else ''}"
    raise ConfigurationError(f"{count} in {what}\n{lines}", hint="Each line names the place and what is valid.")


def _shown(fault: Fault) -> str:
    return str(fault).removeprefix("<pipeline>: ")


_MAKE_ONE = "`fate_llm federation init` writes a federation's files."


def dump_model(model: BaseModel) -> str:
    """YAML of a roster or a party's file, as `load_federation` and `load_party` read it; no key that is None."""
    return dump(model.model_dump(mode="json", exclude_none=True))


def read_secret(path: Path, what: str) -> bytes:
    """The bytes of a file that only its owner may read (mode 0600).

    Raises:
        ConfigurationError: it cannot be read, is larger than 4096 bytes, or has another mode.
    """
    try:
        with path.open("rb") as stream:
            mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
            if mode != 0o600:
                raise ConfigurationError(
                    f"the {what} file {path} has mode {mode:04o}; it must be 0600, readable by its owner only",
                    hint=f"chmod 600 {path}; and if others could read it, make a new one.",
                )
            content = stream.read(_MOST_SECRET + 1)
    except OSError as error:
        raise ConfigurationError(f"the {what} file {path} cannot be read: {error.strerror}", hint=_MAKE_ONE) from None
    if len(content) > _MOST_SECRET:
        raise ConfigurationError(f"the {what} file {path} has more than {_MOST_SECRET} bytes: it is another file")
    return content


def read_password(path: Path) -> str:
    """The one line of a password file.

    Raises:
        ConfigurationError: the file is missing, open to others, empty, or not one line of text.
    """
    try:
        text = read_secret(path, "password").decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        text = ""
    if not text or len(text.splitlines()) != 1:
        raise ConfigurationError(
            f"the password file {path} is not one line of text", hint="Write the password into it, and nothing else."
        )
    return text


def write_new(path: Path, content: bytes) -> None:
    """Write a file that was not there, for its owner only (mode 0600), whole or not at all.

    Raises:
        ConfigurationError: it exists, or cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as stream:
            os.fchmod(stream.fileno(), 0o600)
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.link(partial, path)  # fails where something is: `rename` would replace it
    except FileExistsError:
        raise ConfigurationError(f"{path} exists, and is not overwritten", hint="Name another place.") from None
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror}", hint="Name another place.") from None
    finally:
        partial.unlink(missing_ok=True)
