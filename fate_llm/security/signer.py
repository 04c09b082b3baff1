"""Signatures between the parties of a job, under the identities that its roster pins."""

from __future__ import annotations

from collections.abc import Mapping

from fate_llm.core.canonical import digest
from fate_llm.core.errors import BadSignature, InternalError

from .identity import Identity, PublicIdentity

__all__ = ["RosterSigner"]


class RosterSigner:
    """Satisfies `core.interfaces.Signer`: signs as one party of the roster, and checks what the others signed.

    roster: every party's public identity by name, this party's included.

    Raises:
        InternalError: the identity is of no party of the roster: nobody could check what it signs.
    """

    def __init__(self, identity: Identity, roster: Mapping[str, PublicIdentity]) -> None:
        if identity.public not in roster.values():
            raise InternalError("an identity that is in no line of the roster signs nothing that could be checked")
        self._identity = identity
        self._roster = dict(roster)
        self._digest = digest({name: public.to_text() for name, public in self._roster.items()})

    @property
    def roster(self) -> str:
        """SHA-256 (64 hex digits) over every name with its identity, in the order of the names."""
        return self._digest

    def sign(self, message: bytes, *, purpose: str) -> bytes:
        """64 bytes; the same input gives the same bytes."""
        return self._identity.sign(message, purpose=purpose)

    def verify(self, party: str, signature: bytes, message: bytes, *, purpose: str) -> None:
        """Return when `party` signed this message for this purpose.

        Raises:
            BadSignature: it did not, or is not in the roster.
        """
        if party not in self._roster:
            raise BadSignature(f"a signature of {party[:100]!r}, who is in no line of this job's roster")
        self._roster[party].verify(signature, message, purpose=purpose)

    def __repr__(self) -> str:
        return f"RosterSigner({self._identity.public.to_text()}, {len(self._roster)} parties)"
