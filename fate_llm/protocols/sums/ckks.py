"""Homomorphic aggregation: the coordinator adds what it cannot read, and a key holder opens the sum.

`docs/explanation/homomorphic-aggregation.md` has the messages, what is assumed, and what is not protected: a
coordinator that lies about what it added is not found out. Against that one there is `secagg`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from pydantic import Field

from fate_llm.core.errors import ProtectionError
from fate_llm.core.interfaces import Frozen, SumScene
from fate_llm.core.values import Payload

from ..homomorphic.agreed import Agreed
from ..homomorphic.holder import Holder
from ..homomorphic.party import Party
from ..homomorphic.server import Server

__all__ = ["PLUGIN", "CkksSum"]


class CkksSum:
    """Terms travel encrypted under a key that the coordinator does not have; another party opens their sum."""

    hides_terms: ClassVar[bool] = True
    needs_key_holder: ClassVar[bool] = True
    summary: ClassVar[str] = "the coordinator adds ciphertexts, and a key holder opens the sum; neither sees a term"
    learns: ClassVar[Mapping[str, str]] = {
        "coordinator": (
            "the weighted mean of the updates, the total weight and the totals of the metric sums of those who "
            "contributed, and who they were; no party's update, weight or metric"
        ),
        "key_holder": (
            "the same totals, before they are divided; no party's update, weight or metric, as long as it sees no "
            "upload and the coordinator adds what it says. With shared_key the key holder contributes as well"
        ),
        "contributors": "the global state and the totals of the metric sums, each round; no other party's term",
        "key_holder with coordinator": "every party's update, weight and metric sums: together they open each upload",
    }

    class Params(Frozen):
        clip: float = Field(1.0, gt=0, description="Largest size of a single value of an update; others are cut to it.")
        largest_weight: float = Field(
            2.0**20, gt=0, description="Largest weight (tokens, records) of one party's update in a round."
        )
        shared_key: bool = Field(
            False,
            description="Whether the key holder may contribute itself: it then holds the key to what others upload.",
        )

    def __init__(self, params: Params | None = None) -> None:
        self._params = params or self.Params()

    @property
    def label(self) -> str:
        return "ckks+shared_key" if self._params.shared_key else "ckks"

    def _agree(self, scene: SumScene) -> Agreed:
        params = self._params
        return Agreed(scene, params.clip, params.largest_weight, params.shared_key)

    def party(self, scene: SumScene) -> Party:
        return Party(self._agree(scene))

    def server(
        self, scene: SumScene, *, keep_terms: bool = False, kept: Mapping[str, Payload] = MappingProxyType({})
    ) -> Server:
        if keep_terms:
            raise ProtectionError("homomorphic aggregation shows no single update; this aggregator needs them")
        return Server(self._agree(scene), kept)

    def holder(self, scene: SumScene, seed: bytes, kept: Mapping[str, Payload] = MappingProxyType({})) -> Holder:
        return Holder(self._agree(scene), seed, kept)


PLUGIN = CkksSum
