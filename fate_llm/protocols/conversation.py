"""A component's view of the channel: one task, one cohort, messages by name.

Satisfies `core.interfaces.Channel`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from fate_llm.core.interfaces import RoundJournal, SecureSum, SumJournal, SumScene
from fate_llm.core.values import Cohort, Payload

from .channel import JobChannel
from .ledger import Account
from .rounds.driver import ContributorDriver, CoordinatorDriver, Emit, HolderDriver, Setting

__all__ = ["TaskChannel"]

_USER = "data."  # keeps a component's names apart from those of the rounds


def _no_journal(conversation: str) -> None:
    return None


def _no_sum_journal(side: str, conversation: str) -> None:
    return None


@dataclass(frozen=True, slots=True)
class TaskChannel:
    """patience: the round deadline in seconds; a wait lasts twice that when the caller names no time-out.

    load_sum: a SecureSum by its name and params. account: of the role whose view this is, on a durable channel.
    journal: by conversation, where a coordinator writes down what it publishes; contributors hear it again. scene: of
    the task's sums. sum_journal: by side (contributor, coordinator, holder) and conversation.
    """

    channel: JobChannel
    task: str
    cohort: Cohort
    patience: float
    load_sum: Callable[[str, Mapping[str, Any]], SecureSum]
    emit: Emit
    account: Account = field(default_factory=Account)
    journal: Callable[[str], RoundJournal | None] = _no_journal
    scene: SumScene | None = None
    sum_journal: Callable[[str, str], SumJournal | None] = _no_sum_journal

    def send(self, receiver: str, name: str, payload: Payload) -> None:
        """Send one payload to a member of the cohort."""
        self.channel.send(receiver, task=self.task, kind=_USER + name, payload=payload, account=self.account)

    def receive(self, sender: str, name: str, *, timeout: float | None = None) -> Payload:
        """The next payload of this name from `sender`.

        timeout: seconds, by default twice the job's round deadline. Raises RoundTimeout, PeerFailed,
        JobCancelled.
        """
        return self._receive(sender, name, self._deadline(timeout))

    def _deadline(self, timeout: float | None) -> float:
        return self.channel.clock() + (2 * self.patience if timeout is None else timeout)

    def _receive(self, sender: str, name: str, deadline: float) -> Payload:
        envelope = self.channel.receive(
            sender,
            task=self.task,
            kind=_USER + name,
            deadline=deadline,
            what=f"{name!r} from {sender}",
            account=self.account,
        )
        return envelope.payload

    def broadcast(self, name: str, payload: Payload) -> None:
        """Send one payload to every other member of the cohort."""
        for member in self.cohort.members:
            if member != self.channel.party:
                self.send(member, name, payload)

    def gather(self, name: str, *, timeout: float | None = None) -> dict[str, Payload]:
        """One payload from every other contributor, in roster order; `timeout` is for all together."""
        deadline = self._deadline(timeout)
        others = [party for party in self.cohort.contributors if party != self.channel.party]
        return {party: self._receive(party, name, deadline) for party in others}

    def aggregate(
        self,
        name: str,
        sums: Mapping[str, float] | None,
        *,
        protection: str,
        protection_params: Mapping[str, Any] = MappingProxyType({}),
    ) -> dict[str, float]:
        """Add up numbers over the contributors; see `core.interfaces.Channel.aggregate`.

        One round without arrays.

        A name may be used again: each use is a conversation of its own, so that no late number counts in the
        next.
        """
        side = "coordinator" if sums is None else "contributor"
        setting = self._sum_of(name, protection, protection_params, side)
        if sums is None:
            return self._collect(setting)
        rounds = ContributorDriver(setting, self.channel.party)
        rounds.start({})
        for round in rounds:
            return dict(round.contribute({}, weight=1.0, sums=sums).sums)
        return dict(rounds.sums)  # we come late, after a kill: the coordinator had ended it

    def hold(self, name: str, *, protection: str, protection_params: Mapping[str, Any] = MappingProxyType({})) -> None:
        """As key holder: take part in the `aggregate` of this name."""
        HolderDriver(self._sum_of(name, protection, protection_params, "holder")).run()

    def _sum_of(self, name: str, protection: str, params: Mapping[str, Any], side: str) -> Setting:
        """The next sum of this name, seen from one side."""
        self.account.used[name] += 1
        conversation = f"{self.task}/{name}/{self.account.used[name]}"
        secure_sum = self.load_sum(protection, params)
        return Setting(
            channel=self.channel,
            task=conversation,
            cohort=self.cohort,
            rounds=1,
            patience=self.patience,
            secure_sum=secure_sum,
            emit=lambda event, **fields: None,
            protection=secure_sum.label,
            account=self.account,
            journal=self.journal(conversation) if side == "coordinator" else None,
            scene=None if self.scene is None else replace(self.scene, conversation=conversation),
            sum_journal=self.sum_journal(side, conversation),
        )

    def _collect(self, setting: Setting) -> dict[str, float]:
        coordinator = CoordinatorDriver(setting)
        coordinator.start()
        for round in coordinator:
            total = round.collect()
            round.publish({})
            return dict(total.sums)
        return coordinator.sums  # it had been published before this party was killed
