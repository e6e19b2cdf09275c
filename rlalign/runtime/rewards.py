"""Rewards for pieces of work: asked by a policy worker in the reward pools, with a pool's retries.

Every policy worker has pools of its own over the same actors, which do one call after another. It
prefers another actor than its neighbours do, so that they share the work.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray.actor import ActorHandle

from rlalign.config import RuntimeSettings
from rlalign.engine import Scores
from rlalign.engine.local import LiveRewards
from rlalign.rewards.base import Reward
from rlalign.runtime.pool import Pool, call_with_retries
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
        self._actors = asked.actors
        self._runtime = asked.runtime
        self._loop = asyncio.new_event_loop()
        self._pools: dict[str, Pool] = {}

    def score_bytes(
        self, media_BFCHW: np.ndarray, prompts: Sequence[str], *, held_out: bool = False
    ) -> Scores:
        media = ray.put(media_BFCHW)
        raw = {}
        for reward in [*self._rewards, *(self._held_out if held_out else [])]:
            raw[reward.title], reason = self._ask(
                reward.title, "score_or_drop", media, tuple(prompts)
            )
            self.reason = reason or self.reason
        return self.counted(raw)

    def gradient_of(
        self, reward: Reward, media_BFCHW: torch.Tensor, prompts: Sequence[str]
    ) -> tuple[np.ndarray, torch.Tensor]:
        media = media_BFCHW.detach().float().cpu().numpy()
        value_B, gradient = self._ask(reward.title, "gradient", media, tuple(prompts))
        return value_B, torch.from_numpy(np.array(gradient)).to(media_BFCHW)

    def _ask(self, title: str, method: str, *arguments: Any) -> Any:
        return self._loop.run_until_complete(self._answer(title, method, *arguments))

    async def _answer(self, title: str, method: str, *arguments: Any) -> Any:
        if title not in self._pools:  # a pool belongs to the loop that runs
            self._pools[title] = Pool(
                reward_role(title),
                self._actors[title],
                patience_seconds=self._runtime.recovery_seconds,
                start_seconds=self._runtime.start_seconds,
            )
        pool = self._pools[title]
        seconds = self._runtime.unit_timeout_seconds

        def call(actor: ActorHandle) -> Any:
            return pool.answer(actor, getattr(actor, method).remote(*arguments), seconds)

        return await call_with_retries(f"a question to reward {title}", pool, call, self._runtime)
