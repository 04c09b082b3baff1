"""The part of a sum that is on the wire: a term is encoded as it leaves its party, and decoded as it is received.

The rounds see a sum like any other, so that a term that cannot be decoded is refused as one that cannot be added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from fate_llm.core.errors import ConfigurationError, InternalError, ProtectionError
from fate_llm.core.interfaces import (
    Form,
    Frozen,
    Layout,
    SecureSum,
    SumAction,
    SumContribute,
    SumEvent,
    SumHolder,
    SumParty,
    SumReceived,
    SumScene,
    SumSend,
    SumServer,
    UpdateHook,
    WireHook,
)
from fate_llm.core.values import Payload

__all__ = ["Wire", "WiredSum"]


class Wire:
    """The wire hooks among a task's hooks, in the order of their stages. None: terms travel as they are."""

    def __init__(self, hooks: Iterable[UpdateHook]) -> None:
        self._hooks: list[WireHook] = []
        for hook in sorted((h for h in hooks if h.stage.on_the_wire), key=lambda h: h.stage):
            if not isinstance(hook, WireHook):
                raise InternalError(f"{type(hook).__name__} stands at {hook.stage.name} and is no WireHook")
            if self._hooks and self._hooks[-1].stage is hook.stage:
                pair = f"{type(self._hooks[-1]).__name__} and {type(hook).__name__}"
                raise ConfigurationError(f"hooks: {pair} both stand at {hook.stage.name}", hint="Keep one of them.")
            self._hooks.append(hook)

    def around(self, secure_sum: SecureSum, round_now: Callable[[], int]) -> SecureSum:
        """The same sum over encoded terms. round_now: number of the present round, for the hooks.

        Raises:
            ProtectionError: the sum hides its terms, which must travel as the protection made them.
        """
        if not self._hooks:
            return secure_sum
        if secure_sum.hides_terms:
            names = ", ".join(type(hook).__name__ for hook in self._hooks)
            raise ProtectionError(
                f"hooks: {names} would write terms anew that the protection hides",
                hint="Leave these hooks out, or use a protection that shows terms if every party agrees.",
            )
        return WiredSum(secure_sum, self, round_now)

    def encode(self, payload: Payload, round_number: int) -> Payload:
        """A term as it travels."""
        for hook in self._hooks:
            payload = hook.encode(payload, round_number)
        return payload

    def decode(self, payload: Payload, layout: Layout) -> Payload:
        """A term as it was encoded: float32 of this layout.

        Raises:
            PeerViolation: it is no such term; no more memory was taken than such terms take.
        """
        for hook, form in reversed(list(zip(self._hooks, self._forms(layout), strict=True))):
            payload = hook.decode(payload, form)
        return payload

    def settle(self, *, counted: bool) -> None:
        """Tell the hooks whether the term of the last round was counted."""
        for hook in self._hooks:
            hook.settle(counted=counted)

    def _forms(self, layout: Layout) -> list[Form]:
        """What each hook is given."""
        forms: list[Form] = [{name: (np.dtype(np.float32), tuple(shape)) for name, shape in layout.items()}]
        for hook in self._hooks[:-1]:
            made = hook.form(forms[-1])
            if made is None:
                raise InternalError(f"nothing can be encoded after {type(hook).__name__}, whose sizes vary")
            forms.append(made)
        return forms


@dataclass(frozen=True, slots=True)
class WiredSum:
    """A sum that shows its terms (one message of each party), over encoded terms.

    `Total.error_bound` is against the exact sum of the terms as they were decoded.
    """

    Params: ClassVar[type[Frozen]] = Frozen
    hides_terms: ClassVar[bool] = False
    needs_key_holder: ClassVar[bool] = False
    summary: ClassVar[str] = "as the sum inside; terms are encoded on the wire"
    learns: ClassVar[Mapping[str, str]] = {}

    inner: SecureSum
    wire: Wire
    round_now: Callable[[], int]

    @property
    def label(self) -> str:
        return self.inner.label

    def party(self, scene: SumScene) -> SumParty:
        return _Party(self.inner.party(scene), self.wire, self.round_now)

    def server(
        self, scene: SumScene, *, keep_terms: bool = False, kept: Mapping[str, Payload] = MappingProxyType({})
    ) -> SumServer:
        return _Server(self.inner.server(scene, keep_terms=keep_terms, kept=kept), self.wire, scene.layout)

    def holder(self, scene: SumScene, seed: bytes, kept: Mapping[str, Payload] = MappingProxyType({})) -> SumHolder:
        raise InternalError("a sum that shows its terms has no key holder")


@dataclass(frozen=True, slots=True)
class _Party:
    inner: SumParty
    wire: Wire
    round_now: Callable[[], int]

    def handle(self, event: SumEvent) -> list[SumAction]:
        actions = self.inner.handle(event)
        return [self._encoded(a) if isinstance(event, SumContribute) else a for a in actions]

    def _encoded(self, action: SumAction) -> SumAction:
        if not isinstance(action, SumSend):
            return action
        return replace(action, body=self.wire.encode(action.body, self.round_now()))


@dataclass(frozen=True, slots=True)
class _Server:
    inner: SumServer
    wire: Wire
    layout: Layout

    @property
    def awaiting(self) -> frozenset[str]:
        return self.inner.awaiting

    @property
    def able(self) -> frozenset[str]:
        return self.inner.able

    @property
    def least(self) -> int:
        return self.inner.least

    @property
    def stage(self) -> int:
        return self.inner.stage

    def handle(self, event: SumEvent) -> list[SumAction]:
        if isinstance(event, SumReceived) and event.sender in self.inner.awaiting:  # others are refused unread
            event = replace(event, body=self.wire.decode(event.body, self.layout))
        return self.inner.handle(event)
