"""Rewards for pieces of work: asked by a policy worker in the reward pools, with a pool's retries.

Each of a policy worker's seats has ``Pools`` of its own over the same actors, which do one call
after another. It prefers another actor than its neighbours do, so that they share the work. While
it waits for scores, the worker's next piece asks the policy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import ray
import torch
from ray.actor import ActorHandle

from rlalign.config import RuntimeSettings
from rlalign.core.records import Space
from rlalign.engine import Scores
from rlalign.engine.local import LiveRewards, let_others_ask
from rlalign.rewards.base import Reward
from rlalign.runtime.engine import Pools
from rlalign.runtime.roles import reward_role


@dataclass(frozen=True, kw_only=True)
class RewardActors:
    """Who scores for a policy worker."""

    rewards: tuple[Reward, ...]
    held_out: tuple[Reward, ...]
    actors: Mapping[str, Sequence[ActorHandle]]
    """Title -> its workers, the preferred one first."""
    runtime: RuntimeSettings

    def prefer(self, number: int) -> RewardActors:
        """The same for policy worker ``number``."""
        turned = {
            title: [*some[number % len(some) :], *some[: number % len(some)]]
            for title, some in self.actors.items()
        }
        return RewardActors(
            rewards=self.rewards, held_out=self.held_out, actors=turned, runtime=self.runtime
        )


class RemoteRewards(LiveRewards):
    """Rewards whose scorers are in other processes: a ``Rewards``. A question whose worker dies or
    hangs is asked again, elsewhere or when it is back."""

    def __init__(self, asked: RewardActors) -> None:
        super().__init__(asked.rewards, asked.held_out, scorers={})
        members = {reward_role(t): dict(enumerate(some)) for t, some in asked.actors.items()}
        self._pools = Pools(asked.runtime, members)
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(self._pools.adopt(members))

    def score_arrays(
        self, samples: Mapping[Space, np.ndarray], prompts: Sequence[str], *, held_out: bool = False
    ) -> Scores:
        let_others_ask()
        titles = [r.title for r in self.asked(held_out)]
        asked = self._pools.score(titles, ray.put(samples), tuple(prompts), drop=True)
        found = self._loop.run_until_complete(asked)
        for answer in found.values():
            self.reason = answer.reason or self.reason
        return self.counted({title: answer.score_B for title, answer in found.items()})

    def gradient_of(
        self, reward: Reward, samples_B: torch.Tensor, prompts: Sequence[str]
    ) -> tuple[np.ndarray, torch.Tensor]:
        given_B = samples_B.detach().float().cpu().numpy()
        asked = self._pools.gradient(reward.title, given_B, tuple(prompts))
        value_B, gradient = self._loop.run_until_complete(asked)
        return value_B, torch.from_numpy(np.array(gradient)).to(samples_B)
