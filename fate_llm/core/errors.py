"""Every error the framework raises on purpose, sorted by whose fault it is and what to do next.

    FateError                          stable code, exit code, hint
    |-- ConfigurationError     (2)     the pipeline, a parameter or an input is wrong: mend the file
    |   |-- PipelineInvalid            one or more faults in a pipeline, all of them listed
    |   |-- UnknownPlugin              a component, aggregator, hook or transport nobody has
    |   |-- DataError                  a data file or record is wrong
    |   |-- ModelError                 a model cannot be found, read or adapted
    |   |-- MissingExtra               a layer of the installation is missing
    |   |-- UnknownJob                 a service is asked for a job that it does not have
    |   `-- WrongState                 what is asked of a job does not fit how far it is
    |-- PolicyError            (3)     not allowed here: an experiment outside the local runtime, a floor not met
    |   `-- Unauthorised               a request to a service without its token
    |-- FederationError        (4)     something between the parties
    |   |-- PeerViolation              a party said what the protocol does not allow
    |   |   |-- BadEnvelope            bytes that are not a message
    |   |   |-- BadSeal                bytes that do not open under the keys of the link
    |   |   |-- BadSignature           not signed by the key that the roster pins
    |   |   |-- ConflictingDuplicate   the same sequence number with other content
    |   |   `-- PeerRestarted          a party's process started again without the secrets of the link
    |   |-- MessageLost                a gap in a party's sequence that never closed
    |   |-- PeerFailed                 another party ended with an error
    |   |-- RoundTimeout               a wait ran out
    |   |-- QuorumLost                 fewer parties than the quorum
    |   |-- BrokerLost                 the broker cannot be reached
    |   |-- BrokerRefused              the broker does not let us in, or not do what we need
    |   |-- ServiceLost                this party's own service cannot be reached
    |   `-- TransportClosed            the transport is no longer there
    |-- StoreLost              (4)     a party's database, or the place of its artifacts, is not there or takes nothing
    |-- ProtectionError        (5)     an update cannot be protected as asked (not finite, overflow, plaintext needed)
    |   |-- UnsafeRequest              a coordinator asks for what would open a party's term
    |   `-- InconsistentView           the parties of a sum were not told the same
    |-- JobCancelled           (130)   a person or a party stopped the job
    `-- InternalError          (70)    our own bug: an invariant does not hold

Codes are stable: they are never renamed nor reused, and `docs/reference/errors.md` has a heading for each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import ClassVar

__all__ = [
    "BadEnvelope",
    "BadSeal",
    "BadSignature",
    "BrokerLost",
    "BrokerRefused",
    "ConfigurationError",
    "ConflictingDuplicate",
    "DataError",
    "FateError",
    "Fault",
    "FederationError",
    "InconsistentView",
    "InternalError",
    "JobCancelled",
    "MessageLost",
    "MissingExtra",
    "ModelError",
    "PeerFailed",
    "PeerRestarted",
    "PeerViolation",
    "PipelineInvalid",
    "PolicyError",
    "ProtectionError",
    "QuorumLost",
    "RoundTimeout",
    "ServiceLost",
    "StoreLost",
    "TransportClosed",
    "Unauthorised",
    "UnknownJob",
    "UnknownPlugin",
    "UnsafeRequest",
    "WrongState",
    "all_errors",
    "error_from",
]


class FateError(Exception):
    """Base of all errors raised on purpose.

    `code` is stable, `exit_code` is what the command line ends with.
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1
    private: ClassVar[bool] = False
    """The message may quote a party's data: others are told the code only."""
    default_hint: ClassVar[str] = "The message says what happened; the party's log in the job folder has the story."

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint if hint is not None else self.default_hint

    def as_dict(self) -> dict[str, str]:
        """What `--json` prints: {"code", "message", "hint"}."""
        return {"code": self.code, "message": self.message, "hint": self.hint}

    def told_others(self) -> dict[str, str]:
        """What other parties are told of it: as `as_dict`, but never a message that may quote data."""
        if not self.private:
            return self.as_dict()
        message = "the message may quote data, and stays in that party's own log"
        return {"code": self.code, "message": message, "hint": "That party sees the message in its log."}


class ConfigurationError(FateError):
    """The pipeline, a parameter or an input is wrong; nothing has run."""

    code = "configuration"
    exit_code = 2
    default_hint = "Mend the setting the message names; `fate_llm validate` checks without running."


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong with a pipeline.

    code: stable kind of fault. file, line: where (line is 1-based, None when the pipeline was built in
    Python).
    path: dotted path inside the pipeline. message: what was found. hint: what is valid, nearest name first.
    """

    code: str
    file: str | None
    line: int | None
    path: str
    message: str
    hint: str

    def as_dict(self) -> dict[str, str | int | None]:
        return asdict(self)

    def __str__(self) -> str:
        place = f"{self.file or '<pipeline>'}" + (f":{self.line}" if self.line is not None else "")
        hint = f" ({self.hint})" if self.hint else ""
        return f"{place}: {self.path or '<root>'}: {self.message}{hint} [{self.code}]"


class PipelineInvalid(ConfigurationError):
    """A pipeline with one or more faults; all are reported at once in `faults`."""

    code = "pipeline_invalid"
    default_hint = "Each line names the place, what was found and what is valid."

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = tuple(faults)
        lines = "\n".join(str(fault) for fault in self.faults)
        count = len(self.faults)
        super().__init__(f"{count} fault{'s' if count != 1 else ''} in the pipeline\n{lines}")


class UnknownPlugin(ConfigurationError):
    """A component, aggregator, hook, sum or transport that is neither in our folders nor an entry point."""

    code = "unknown_plugin"
    default_hint = "`fate_llm components list` shows the names that exist."


class DataError(ConfigurationError):
    """A data file or a record in it is wrong; the message names file, row and field."""

    code = "data_invalid"
    private = True
    default_hint = "Mend the record, or name the right fields in the reader's `fields`."


class ModelError(ConfigurationError):
    """A model cannot be found or read, or does not have the parts that were named."""

    code = "model_invalid"
    default_hint = "A model is {package: NAME}, {path: FOLDER or FILE.gguf} or {hub: NAME}."


class MissingExtra(ConfigurationError):
    """The feature needs a layer of the installation that is not there."""

    code = "missing_extra"
    default_hint = "Install the extra that the message names."


class UnknownJob(ConfigurationError):
    """A service is asked for a job that it does not have, or may not show."""

    code = "unknown_job"
    default_hint = "`fate_llm jobs list` shows the jobs of this party."


class WrongState(ConfigurationError):
    """What is asked of a job does not fit how far it is: to resume one that runs, to decide what is decided."""

    code = "wrong_state"
    default_hint = "`fate_llm jobs show JOB` says how far it is."


class PolicyError(FateError):
    """What was asked is not allowed here."""

    code = "policy_refused"
    exit_code = 3
    default_hint = "Only a party's own policy can allow it; no pipeline can."


class Unauthorised(PolicyError):
    """A request to a party's service without its token."""

    code = "unauthorised"
    default_hint = "The token is in the file that party.yaml names under api.token; name the home: --home FOLDER"


class FederationError(FateError):
    """Something between the parties went wrong."""

    code = "federation"
    exit_code = 4
    default_hint = "The message names the party; its own log says more."


class PeerViolation(FederationError):
    """Another party said something that the protocol does not allow at this point."""

    code = "peer_violation"
    default_hint = "The party named runs another version, or is not what it claims to be."


class BadEnvelope(PeerViolation):
    """Bytes that are not a message of this version: refused before any of it was used."""

    code = "bad_envelope"


class BadSeal(PeerViolation):
    """Sealed bytes that do not open: changed, cut, replayed elsewhere, or sealed by somebody else."""

    code = "bad_seal"
    default_hint = "Nothing of it was used. If it goes on, somebody between the parties changes messages."


class BadSignature(PeerViolation):
    """A message that the key pinned in the roster for its sender did not sign."""

    code = "bad_signature"
    default_hint = "Compare the fingerprints of this party's key in both rosters, by phone; nothing of it was used."


class ConflictingDuplicate(PeerViolation):
    """A sequence number came twice with different content."""

    code = "conflicting_duplicate"


class PeerRestarted(PeerViolation):
    """A party whose keys were agreed offers new ones: its process started again without its secrets."""

    code = "peer_restarted"
    default_hint = (
        "Restore that party's job folder, or start a new attempt of the job: each attempt agrees on new keys."
    )


class MessageLost(FederationError):
    """A gap in the sequence of messages from a party did not close in time or in the allowed window."""

    code = "message_lost"
    default_hint = "The transport lost what it promised to keep; look at the broker, then resume the job."


class PeerFailed(FederationError):
    """Another party ended with an error and said so."""

    code = "peer_failed"
    default_hint = "The cause is in that party's log."


class RoundTimeout(FederationError):
    """A wait ran out: the message names party, task and round."""

    code = "timeout"
    default_hint = "Raise job.round_deadline, or look why the party named is slow."


class QuorumLost(FederationError):
    """Fewer parties contributed than job.quorum asks for."""

    code = "quorum_lost"
    default_hint = "Bring the missing parties back, or lower job.quorum if every party agrees."


class BrokerLost(FederationError):
    """The message broker cannot be reached, or has been away for longer than the job waits."""

    code = "broker_lost"
    default_hint = "Look whether the broker runs and can be reached from here: fate_llm doctor --broker URL"


class BrokerRefused(FederationError):
    """The message broker is there and says no: password, certificate, virtual host, permission."""

    code = "broker_refused"
    default_hint = "Ask the broker's operator; `fate_llm doctor --broker URL` says what is missing."


class ServiceLost(FederationError):
    """This party's own service cannot be reached, or answers as no service of ours does."""

    code = "service_lost"
    default_hint = "Start it: fate_llm party serve --home FOLDER"


class TransportClosed(FederationError):
    """The transport was closed while it was in use."""

    code = "transport_closed"


class StoreLost(FateError):
    """The party's database cannot be used now: the server is away, the disk is full, another program holds it."""

    code = "store_lost"
    exit_code = 4
    default_hint = "Nothing was stored. Look at the database and its disk; the service goes on when it is back."


class ProtectionError(FateError):
    """An update cannot be protected or summed as asked; nothing has left the party."""

    code = "protection_refused"
    exit_code = 5
    default_hint = "Look at the learning rate and the loss (not finite), or at the protection's settings."


class UnsafeRequest(ProtectionError):
    """A coordinator asks for what would open a single party's term; it was refused, and nothing was opened."""

    code = "unsafe_request"
    default_hint = "An honest coordinator never asks this. Ask its operator; do not run the job again before."


class InconsistentView(ProtectionError):
    """The parties of a sum were not told the same: other keys, survivors, model or parameters; nothing was opened."""

    code = "inconsistent_view"
    default_hint = "Compare versions, pipeline and model of the parties; if they agree, the coordinator does not."


class JobCancelled(FateError):
    """The job was stopped by a person or by another party."""

    code = "cancelled"
    exit_code = 130
    default_hint = "What was finished is in the job's folder."


class InternalError(FateError):
    """An invariant of our own code does not hold: a bug, please report it."""

    code = "internal"
    exit_code = 70
    private = True  # it holds what a library said, of whatever it was given
    default_hint = "This is a bug in fate_llm: please report it with the job's folder."


def error_from(code: str, message: str, hint: str) -> FateError:
    """An error that another process told us of (`FateError.as_dict`), as the class its code belongs to."""
    found = next((error for error in all_errors() if error.code == code), FateError)
    if found.__init__ is not FateError.__init__:  # one made from more than a message
        found = ConfigurationError if issubclass(found, ConfigurationError) else FateError
    return found(message, hint=hint)


def all_errors() -> list[type[FateError]]:
    """Every class of the tree, parents first: for the manual and for the tests."""
    found: list[type[FateError]] = []
    pending: list[type[FateError]] = [FateError]
    while pending:
        error = pending.pop(0)
        found.append(error)
        pending.extend(error.__subclasses__())
    return found
