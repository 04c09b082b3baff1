"""The roster of a federation (`federation.yaml`), and what one party keeps for itself (`party.yaml`).

The roster is the same at every party, and its digest says so: who takes part, the public identity that all others pin,
where each party's broker is, and whether there is one broker for all (`shared`) or one for each (`per-party`). It holds
no secret. `party.yaml` names the files of one party that are secret: its identity key, its sealing key, its password at
the broker and the token of its API, each readable by its owner only.
"""

from __future__ import annotations

import ipaddress
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote, urlencode, urlsplit

from pydantic import BaseModel, BeforeValidator, Field, StringConstraints, field_validator, model_validator

from fate_llm.core.canonical import digest
from fate_llm.core.errors import ConfigurationError
from fate_llm.core.names import NAME_PATTERN, nearest
from fate_llm.pipelines.dialect import dump
from fate_llm.pipelines.schema import Duration, Size
from fate_llm.security.identity import Identity, PublicIdentity
from fate_llm.security.sealed_box import SealingKey, SealingPublic

from .trust.documents import Strict, make_document, read_document

__all__ = [
    "ApiSettings",
    "BrokerPlace",
    "Federation",
    "LaunchSettings",
    "Member",
    "PartySettings",
    "ResourceSettings",
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
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]

_MOST_SECRET = 4096  # bytes of a secret file


def is_loopback(host: str) -> bool:
    """True for a host that is this machine and is reached over no network."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _as_path(value: Any) -> Any:
    return Path(value) if isinstance(value, str) and value else value


File = Annotated[Path, BeforeValidator(_as_path)]
"""A path, which YAML has as text."""


class BrokerPlace(Strict):
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


class Member(Strict):
    """One party: the identity all others pin, and its broker (the same for all when it is shared).

    sealing: the public key under which others' services write to its service; None where it runs none.
    """

    identity: str
    broker: BrokerPlace
    sealing: str | None = None

    @field_validator("identity")
    @classmethod
    def _is_a_public_key(cls, text: str) -> str:
        try:
            PublicIdentity.from_text(text)
        except ConfigurationError as error:
            raise ValueError(error.message) from None
        return text

    @field_validator("sealing")
    @classmethod
    def _is_a_sealing_key(cls, text: str | None) -> str | None:
        try:
            return text if text is None else SealingPublic.from_text(text).to_text()
        except ConfigurationError as error:
            raise ValueError(error.message) from None

    @property
    def public(self) -> PublicIdentity:
        return PublicIdentity.from_text(self.identity)

    @property
    def sealing_key(self) -> SealingPublic | None:
        return None if self.sealing is None else SealingPublic.from_text(self.sealing)


class Federation(Strict):
    """The roster. parties: by id, in the order that is written; a party that is being set up is alone in its own."""

    version: Literal[1]
    name: Name
    vhost: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]
    topology: Topology
    parties: Annotated[Mapping[Name, Member], Field(min_length=1, max_length=1000)]

    @model_validator(mode="after")
    def _nobody_twice(self) -> Federation:
        first: dict[str, str] = {}
        for party, member in self.parties.items():
            other = first.setdefault(member.identity, party)
            if other != party:
                raise ValueError(f"{party} and {other} have the same identity: each party makes its own")
        sealing = [member.sealing for member in self.parties.values() if member.sealing is not None]
        if len(set(sealing)) < len(sealing):
            raise ValueError("two parties have the same sealing key: each party makes its own")
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
        return digest(self.model_dump(mode="json", exclude_none=True))


class ApiSettings(Strict):
    """The party's own HTTP API, for its own people and programs. port: 0 takes any that is free. token: file."""

    host: Annotated[str, StringConstraints(min_length=1, max_length=253)] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    token: File | None = None


class ResourceSettings(Strict):
    """What of this machine jobs may fill. None: all that there is, which the service finds out. memory: bytes."""

    cpus: Annotated[float, Field(gt=0, le=10_000)] | None = None
    memory: Size | None = None
    gpus: Annotated[int, Field(ge=0, le=1_000)] = 0


class LaunchSettings(Strict):
    """How a worker is started. nproc: ranks, one for each GPU it uses. deepspeed: file of its configuration."""

    nproc: Annotated[int, Field(ge=1, le=64)] = 1
    deepspeed: File | None = None


class PartySettings(Strict):
    """What one party's processes need. Paths in the file are relative to it; here they are absolute.

    broker: URL without a password. password: file with the password. ca: who signs brokers, None for the system's
    authorities. certificate, key: what is shown to a broker that asks for it.

    For a service: sealing: secret half of the sealing key. policy, catalog: files. state: folder of all that it keeps.
    store, artifacts: URLs; None for places in `state`. lost_after: seconds after which a silent party is lost, where a
    job does not say. heartbeat: seconds between two signs of life.
    """

    version: Literal[1]
    party: Name
    federation: File
    identity: File
    broker: str
    password: File | None = None
    ca: File | None = None
    certificate: File | None = None
    key: File | None = None
    sealing: File | None = None
    policy: File | None = None
    catalog: File | None = None
    state: File = Path("state")
    store: str | None = None
    artifacts: str | None = None
    api: ApiSettings = ApiSettings()
    resources: ResourceSettings = ResourceSettings()
    launch: LaunchSettings = LaunchSettings()
    lost_after: Duration = 600.0
    heartbeat: Duration = 5.0

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
        if self.heartbeat * 3 > self.lost_after:
            raise ValueError(
                f"heartbeat is {self.heartbeat:g} s and lost_after {self.lost_after:g} s: "
                "at least three signs of life have to fit into it"
            )
        return self

    def at(self, folder: Path) -> PartySettings:
        """These settings with all paths absolute, relative ones from `folder` on."""

        def placed(model: BaseModel) -> dict[str, Any]:
            return {key: folder / value for key, value in model if isinstance(value, Path)}

        api = self.api.model_copy(update=placed(self.api))
        launch = self.launch.model_copy(update=placed(self.launch))
        return self.model_copy(update={**placed(self), "api": api, "launch": launch})

    def load_identity(self) -> Identity:
        """The secret identity.

        Raises:
            ConfigurationError: the file is missing, open to others, or not a key.
        """
        return Identity.from_bytes(read_secret(self.identity, "identity key"))

    def load_sealing(self) -> SealingKey | None:
        """The secret half of the sealing key, None when no file is named.

        Raises:
            ConfigurationError: the file is missing, open to others, or not a key.
        """
        return None if self.sealing is None else SealingKey.from_bytes(read_secret(self.sealing, "sealing key"))

    def load_token(self) -> str | None:
        """The bearer token of the API, None when no file is named.

        Raises:
            ConfigurationError: the file is missing, open to others, empty, or not one line of text.
        """
        return None if self.api.token is None else read_password(self.api.token, "token")

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
    return read_document(path, Federation, "the federation file", hint=_MAKE_ONE)


def load_party(path: Path) -> tuple[PartySettings, Federation]:
    """Read a party's file and the roster it names; the secrets are read when they are asked for.

    Raises:
        ConfigurationError: one cannot be read or is wrong, or the roster lacks the party.
    """
    settings = read_document(path, PartySettings, "the party file", hint=_MAKE_ONE).at(path.absolute().parent)
    federation = load_federation(settings.federation)
    federation.member(settings.party)
    return settings, federation


def make_federation(data: Mapping[str, Any]) -> Federation:
    """A roster from plain values.

    Raises:
        ConfigurationError: all that is wrong with them.
    """
    return make_document(data, Federation, "the federation")


_MAKE_ONE = "`fate_llm federation init` writes a federation's files, `fate_llm party init` those of one party."


def dump_model(model: BaseModel) -> str:
    """YAML of a roster or a party's file, as `load_federation` and `load_party` read it; no key that was not given."""
    return dump(model.model_dump(mode="json", exclude_none=True, exclude_unset=True))


def read_secret(path: Path, what: str) -> bytes:
    """The bytes of a file that nobody else may read: mode 0600 or 0400.

    A secret that an orchestrator mounts belongs to root, and is readable by this process's group alone (0440): that is
    accepted as well, where this process is not root.

    Raises:
        ConfigurationError: it cannot be read, is larger than 4096 bytes, or has another mode.
    """
    try:
        with path.open("rb") as stream:
            if not _is_private(os.fstat(stream.fileno()), me=os.geteuid()):
                mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
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


def _is_private(found: os.stat_result, *, me: int) -> bool:
    """Whether nobody but its owner, or what root lets our group see, can be read. me: our effective user."""
    mode = stat.S_IMODE(found.st_mode)
    mounted = found.st_uid == 0 and me != 0 and mode in (0o440, 0o640)
    return mode in (0o600, 0o400) or mounted


def read_password(path: Path, what: str = "password") -> str:
    """The one line of a password file. what: for messages.

    Raises:
        ConfigurationError: the file is missing, open to others, empty, or not one line of text.
    """
    try:
        text = read_secret(path, what).decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        text = ""
    if not text or len(text.splitlines()) != 1:
        raise ConfigurationError(
            f"the {what} file {path} is not one line of text", hint=f"Write the {what} into it, and nothing else."
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
