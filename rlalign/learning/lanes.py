"""What one thread of a learner computes with: a policy, and the value network beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from rlalign.core.batches import Pass, moved
from rlalign.networks.replicas import replicate
from rlalign.policies.base import Policy


class PassLoss(Protocol):
    """What the learner calls: a loss with its metrics for one pass (an Algorithm's ``loss``). With
    a value network it is given as the keyword ``critic``."""

    def __call__(self, batch: Any, policy: Policy, /, **critic: Any) -> Any: ...


@dataclass(frozen=True)
class Lane:
    """A policy with its value network, on the learner's weights and with gradients of its own."""

    policy: Policy
    critic: torch.nn.Module | None = None

    def replica(self) -> Lane:
        """A second lane on the same weights."""
        critic = None if self.critic is None else replicate(self.critic)
        return Lane(self.policy.replica(), critic)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The policy's trainable weights, then its critic's, in a fixed order."""
        critic = {} if self.critic is None else dict(self.critic.named_parameters())
        return {**self.policy.trainable(), **{f"critic/{n}": p for n, p in critic.items()}}

    def loss_of(self, one: Pass, loss: PassLoss) -> Any:
        """The loss of one pass."""
        batch = moved(one, self.policy.device)
        if self.critic is None:
            return loss(batch, self.policy)
        return loss(batch, self.policy, critic=self.critic)
