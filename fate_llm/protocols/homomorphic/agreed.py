"""What the sides of one sum under CKKS must agree on, and what each refuses by its own policy.

Everything signed is bound to one digest of it (`Agreed.binding`): job, attempt, conversation, round, roster, cohort,
key holder and parameters. Nothing made for one round is of use in another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from fate_llm.core.canonical import canonical_json, digest
from fate_llm.core.errors import ConfigurationError, InternalError, PolicyError, ProtectionError
from fate_llm.core.interfaces import Signer, SumScene
from fate_llm.core.values import Array, Arrays
from fate_llm.security.fixed_point import WIDE_BITS, FixedPoint

__all__ = [
    "CHUNK",
    "CONTEXT",
    "FLOOD",
    "LEAST",
    "LIMBS",
    "LIMB_BITS",
    "OPENED",
    "SEED_BYTES",
    "UPLOAD",
    "WINDOW",
    "Agreed",
    "context_statement",
    "layout_digest",
    "opened_statement",
    "upload_statement",
]

LEAST: Final = 3  # contributors that a sum hides among each other; no policy lowers it
CHUNK: Final = 64  # ciphertexts in a message: 8.4 MB
WINDOW: Final = 2  # chunks under way that have not been answered
LIMB_BITS: Final = 16
LIMBS: Final = WIDE_BITS // LIMB_BITS  # whole numbers that carry a weight or an additive number
FLOOD: Final = 16  # steps: noise on every opened value is less, on either side
SEED_BYTES: Final = 32
_ID: Final = "ckks/1"
CONTEXT, UPLOAD, OPENED = "ckks context", "ckks upload", "ckks opened"  # purposes of signatures


@dataclass(frozen=True)
class Agreed:
    """One scene under one set of parameters. In a key holder's, round, layout and state are not of one sum.

    Raises:
        ConfigurationError: no key holder. ProtectionError: a key holder, cohort or clip with which nothing is hidden.
        PolicyError: this party's policy asks for more. InternalError: nobody to sign.
    """

    scene: SumScene
    clip: float
    largest_weight: float
    shared_key: bool

    def __post_init__(self) -> None:
        scene, cohort = self.scene, self.scene.cohort
        if scene.key_holder is None:
            raise ConfigurationError(
                "the protection ckks needs a party in the role key_holder, and none is named",
                hint="Name one under `parties: key_holder:`; it is neither the arbiter nor, by default, a data owner.",
            )
        if scene.key_holder == cohort.coordinator:
            raise ProtectionError(
                f"{scene.key_holder} would add the ciphertexts and hold their key: it could open every one",
                hint="Give the role key_holder to a party that does not coordinate.",
            )
        if scene.key_holder in cohort.contributors and not self.shared_key:
            raise ProtectionError(
                f"{scene.key_holder} contributes and would hold the key",
                hint="Give the role key_holder to another party, or set protection_params: {shared_key: true}.",
            )
        if scene.signer is None:
            raise InternalError("a sum under ckks needs identities: its scene has no signer")
        floor = scene.floor
        if floor.clip is not None and self.clip > floor.clip:
            raise PolicyError(
                f"protection_params.clip is {self.clip:g}; the policy of {scene.me} allows {floor.clip:g}"
            )
        self._check_size(len(cohort.contributors), self.least_of(cohort.contributors))
        _ = self.fixed.scale

    def _check_size(self, count: int, least: int) -> None:
        if count >= least:
            return
        fault = PolicyError if self.scene.floor.contributors > LEAST else ProtectionError
        raise fault(
            f"{count} parties contribute to a sum under ckks, {least} are needed: {self.least} that neither add "
            "nor open",
            hint="Fewer parties are not hidden among each other: the total tells of each. Add parties.",
        )

    @property
    def signer(self) -> Signer:
        if self.scene.signer is None:  # __post_init__ has looked
            raise InternalError("a sum under ckks without a signer")
        return self.scene.signer

    @property
    def key_holder(self) -> str:
        if self.scene.key_holder is None:  # __post_init__ has looked
            raise InternalError("a sum under ckks without a key holder")
        return self.scene.key_holder

    @property
    def least(self) -> int:
        """Contributors that a total must have by this party's own lights; who adds or opens does not count."""
        return max(LEAST, self.scene.floor.contributors)

    def least_of(self, parties: Collection[str], floors: Collection[int] = ()) -> int:
        """How many contributors a total must have when these parties are in it, of whom some ask for `floors`."""
        inside = {self.scene.cohort.coordinator, self.key_holder} & set(parties)
        return max([self.least, *floors]) + len(inside)

    @cached_property
    def fixed(self) -> FixedPoint:
        """How values become whole numbers; ConfigurationError for a clip of no use."""
        return FixedPoint(len(self.scene.cohort.contributors), self.clip)

    def binding(self, round: int) -> str:
        """Digest of all that one round's sum is bound to."""
        cohort, scene = self.scene.cohort, self.scene
        return digest(
            {
                "protocol": _ID,
                "job": scene.job,
                "attempt": scene.attempt,
                "conversation": scene.conversation,
                "round": round,
                "roster": self.signer.roster,
                "contributors": list(cohort.contributors),
                "coordinator": cohort.coordinator,
                "key_holder": self.key_holder,
                "clip": self.clip,
                "largest_weight": self.largest_weight,
                "shared_key": self.shared_key,
            }
        )

    @cached_property
    def layout(self) -> str:
        return layout_digest(self.scene.layout)

    @cached_property
    def state(self) -> str:
        """Digest of the global state that terms are differences to."""
        return _state_digest(self.scene.state)


def layout_digest(layout: Mapping[str, Sequence[int]]) -> str:
    return digest({name: list(shape) for name, shape in layout.items()})


def _state_digest(state: Arrays) -> str:
    found = hashlib.sha256()
    for name in sorted(state):
        array: Array = state[name]
        head = canonical_json([name, array.dtype.str, list(array.shape)])
        found.update(len(head).to_bytes(8, "big") + head)
        found.update(array.tobytes() if not array.flags.c_contiguous else array.reshape(-1).data)
    return found.hexdigest()


def context_statement(binding: str, context: str) -> bytes:
    """What the key holder signs: these are the keys of this round. context: digest."""
    return canonical_json({"binding": binding, "context": context})


def upload_statement(binding: str, context: str, form: str, floor: int, chunk: int, ciphertexts: str) -> bytes:
    """What a contributor signs of each chunk. form: digest of what its term consists of; floor: its policy's."""
    return canonical_json(
        {
            "binding": binding,
            "context": context,
            "form": form,
            "floor": floor,
            "chunk": chunk,
            "ciphertexts": ciphertexts,
        }
    )


def opened_statement(binding: str, total: str, chunk: int, numbers: Sequence[str], words: str) -> bytes:
    """What the key holder signs of each chunk that it opened. total: digest of what sum it is; words: digest."""
    return canonical_json(
        {"binding": binding, "total": total, "chunk": chunk, "numbers": list(numbers), "words": words}
    )
