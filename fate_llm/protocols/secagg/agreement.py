"""What all parties of a masked sum must agree on before anything is masked, and what one party's policy asks of it.

Cohort and threshold come from the signed roster, never from who is there. A coordinator that contributes could take
its own term out of the sum: it does not count, neither among the parties nor for the threshold.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from fate_llm.core.canonical import canonical_json, digest
from fate_llm.core.errors import ConfigurationError, InternalError, PolicyError
from fate_llm.core.interfaces import Signer, SumScene
from fate_llm.core.values import Arrays
from fate_llm.security.fixed_point import FixedPoint

from ..envelope import body_digest
from ..tensors import write_tensors

__all__ = ["Agreement", "agree", "state_digest", "usual_threshold"]

_VERSION = 1


def usual_threshold(parties: int) -> int:
    """floor(2n/3) + 1 of n: with fewer than n/3 corrupt parties, a malicious coordinator opens no term.

    Source: Bonawitz et al., Practical Secure Aggregation, CCS 2017, section 6.2 (active adversary).
    """
    return 2 * parties // 3 + 1


@dataclass(frozen=True, slots=True)
class Agreement:
    """The common ground of one round's sum.

    contributors: in roster order; their points of the secret shares are their places from 1 on. threshold: shares that
    open a secret. counted: parties but the coordinator that every set has to have, by policy and threshold. digest: 32
    bytes over everything here and job, attempt, conversation, round, identities, layout and global state. rounding: 32
    bytes for the rounding of this party's values, the same in every run: masks cancel, so that equal terms give equal
    bits. It hides nothing.
    """

    contributors: tuple[str, ...]
    coordinator: str
    me: str
    threshold: int
    counted: int
    fixed_point: FixedPoint
    largest_weight: float
    digest: bytes
    rounding: bytes
    signer: Signer

    def point(self, party: str) -> int:
        return self.contributors.index(party) + 1

    def agreed(self, parties: tuple[str, ...]) -> bool:
        """Whether so many can open a secret, and no other set can have as many honest parties behind it.

        The threshold is one higher where the coordinator contributes: that one signs whatever it likes.
        """
        return len(parties) >= self.threshold

    def enough(self, parties: tuple[str, ...]) -> bool:
        """Whether they are agreed, and as many as this party's policy wants in a sum."""
        others = [party for party in parties if party != self.coordinator]
        return self.agreed(parties) and len(others) >= self.counted

    @property
    def least(self) -> int:
        """Parties that every sum needs."""
        return max(self.threshold, self.counted + (self.coordinator in self.contributors))


def state_digest(state: Arrays) -> str:
    """SHA-256 (64 hex digits) over the global state that the terms are differences to, by sorted name."""
    return body_digest(write_tensors(dict(sorted(state.items()))))


def agree(scene: SumScene, state: str, *, clip: float, largest_weight: float, threshold: int | None) -> Agreement:
    """The common ground as this party sees it. state: its `state_digest`. threshold: of parties but the coordinator;
    None: the usual one.

    Raises:
        PolicyError: fewer parties, a lower threshold or a larger clip than this party's policy allows, or a threshold
            of at most half, which no policy can allow.
        ConfigurationError: a threshold above the number of parties, or a clip that leaves no precision.
    """
    if scene.signer is None:
        raise InternalError("a masked sum needs this party's identity and the roster of all")
    contributors, coordinator = scene.cohort.contributors, scene.cohort.coordinator
    counted = [party for party in contributors if party != coordinator]
    own = int(coordinator in contributors)
    wanted = usual_threshold(len(counted)) if threshold is None else threshold
    _check_floor(scene, len(counted), wanted, clip)
    text = {
        "version": _VERSION,
        "job": scene.job,
        "attempt": scene.attempt,
        "conversation": scene.conversation,
        "round": scene.round,
        "identities": scene.signer.roster,
        "contributors": list(contributors),
        "coordinator": coordinator,
        "threshold": wanted + own,
        "clip": float(clip).hex(),
        "largest_weight": float(largest_weight).hex(),
        "layout": digest({name: list(shape) for name, shape in scene.layout.items()}),
        "state": state,
    }
    draws = [scene.conversation, scene.round, scene.me, state]
    return Agreement(
        contributors,
        coordinator,
        scene.me,
        wanted + own,
        max(wanted, scene.floor.contributors),
        FixedPoint(len(contributors), clip),
        float(largest_weight),
        hashlib.sha256(b"fate_llm/1 secagg agreement\0" + canonical_json(text)).digest(),
        hashlib.sha256(b"fate_llm/1 secagg rounding\0" + canonical_json(draws)).digest(),
        scene.signer,
    )


def _check_floor(scene: SumScene, parties: int, threshold: int, clip: float) -> None:
    floor = scene.floor
    note = "" if scene.cohort.coordinator not in scene.cohort.contributors else " besides the coordinator"
    if parties < floor.contributors:
        raise PolicyError(
            f"a masked sum of {parties} parties{note}; {scene.me} takes part from {floor.contributors} on",
            hint="Among two parties each learns the other's term from the sum. More parties have to contribute.",
        )
    least = usual_threshold(parties) if floor.threshold is None else floor.threshold
    if threshold < least:
        raise PolicyError(
            f"a threshold of {threshold} of {parties} parties; {scene.me} takes part from {least} on",
            hint="Leave `threshold` out of protection_params; only a party's own policy accepts a lower one.",
        )
    if 2 * threshold <= parties:
        raise PolicyError(
            f"a threshold of {threshold} of {parties} parties: no policy allows less than {parties // 2 + 1}",
            hint="Two halves of the parties could each open another set; both together show a single party's term.",
        )
    if threshold > parties:
        raise ConfigurationError(f"a threshold of {threshold} among {parties} parties can never be reached")
    if floor.clip is not None and clip > floor.clip:
        raise PolicyError(f"values up to {clip:g} would be summed; the policy of {scene.me} allows {floor.clip:g}")
