"""Secure aggregation: the coordinator learns the sum of all terms, and nothing else of any of them.

The complete-graph protocol of Bonawitz et al., *Practical Secure Aggregation for Privacy-Preserving Machine Learning*,
CCS 2017, in its form for a malicious coordinator (section 6.2). `docs/explanation/secure-aggregation.md` has the
messages, what is proved, what is assumed and what is not protected.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Literal

from pydantic import Field

from fate_llm.core.errors import InternalError, ProtectionError
from fate_llm.core.interfaces import Frozen, SumHolder, SumScene
from fate_llm.core.values import Payload

from ..secagg.agreement import Agreement, agree, state_digest
from ..secagg.party import MaskingParty
from ..secagg.server import MaskingServer

__all__ = ["PLUGIN", "SecAgg"]


class SecAgg:
    """Terms travel masked; the masks cancel in the sum of those who are still there."""

    hides_terms: ClassVar[bool] = True
    needs_key_holder: ClassVar[bool] = False
    label: ClassVar[str] = "secagg"
    summary: ClassVar[str] = "the coordinator sees the weighted mean and the metric sums of all, and no party's own"
    learns: ClassVar[Mapping[str, str]] = {
        "coordinator": (
            "the weighted mean of the updates, the total weight and the totals of the metric sums of those who "
            "contributed, and who they were; no party's update, weight or metric, unless it colludes with the "
            "threshold's number of parties"
        ),
        "contributors": (
            "the global state and the totals of the metric sums, each round; all parties but one together learn the "
            "term of that one from the total"
        ),
    }

    class Params(Frozen):
        clip: float = Field(1.0, gt=0, description="Largest size of a single value of an update; others are cut to it.")
        largest_weight: float = Field(
            2.0**20, gt=0, description="Largest weight (tokens, records) of one party's update in a round."
        )
        threshold: int | None = Field(
            None,
            ge=1,
            description="Parties that must stay to the end, the coordinator not counted; null: floor(2n/3) + 1.",
        )
        sparse: Literal["refuse", "allow"] = Field(
            "refuse", description="Whether updates may touch only few rows of a table, which the sum then shows."
        )

    def __init__(self, params: Params | None = None) -> None:
        self._params = params or self.Params()

    def _agree(self, scene: SumScene, state: str | None = None) -> Agreement:
        params = self._params
        return agree(
            scene,
            state_digest(scene.state) if state is None else state,
            clip=params.clip,
            largest_weight=params.largest_weight,
            threshold=params.threshold,
        )

    def party(self, scene: SumScene) -> MaskingParty:
        state = state_digest(scene.state)  # when the round begins, not when all wait for the term
        return MaskingParty(scene, lambda: self._agree(scene, state), self._params.sparse == "allow")

    def server(
        self, scene: SumScene, *, keep_terms: bool = False, kept: Mapping[str, Payload] = MappingProxyType({})
    ) -> MaskingServer:
        if keep_terms:
            raise ProtectionError("secure aggregation shows no single update; this aggregator needs them")
        return MaskingServer(scene, self._agree(scene), kept)

    def holder(self, scene: SumScene, seed: bytes, kept: Mapping[str, Payload] = MappingProxyType({})) -> SumHolder:
        raise InternalError("secure aggregation has no key holder")


PLUGIN = SecAgg
