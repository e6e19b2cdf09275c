"""RWR: reward-weighted regression on one's own samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from rlalign.algorithms import _objectives as objectives
from rlalign.algorithms._memory import Memory
from rlalign.algorithms.base import (
    Algorithm,
    Given,
    Loss,
    check_company,
    final_latents,
    noised,
    per_unit,
    rewards_of,
)
from rlalign.core.batches import ImageBatch, ImagePass
from rlalign.core.records import Scored
from rlalign.policies.base import Policy


class RWR(Algorithm):
    """The denoising loss on the round's samples, each weighted by softmax(reward / temperature), or
    1 above a quantile.

    Minimises sum of w_i |target - prediction|^2 at uniform noise levels; weights have mean 1.
    ``temperature`` divides the reward: 0.2 is softmax(5 r). The published code's number of that
    name multiplies it: its 0.2 is a temperature of 5 here.

    Source: Lee 2023, arXiv:2302.12192; Black 2023, arXiv:2305.13301, section 4.2 (RWR and its
    sparse form).
    """

    eats = ImageBatch

    temperature: float = Field(
        default=0.2,
        gt=0,
        description="divides the reward: 0.2 is softmax(5 r); small trusts the best samples only",
    )
    sparse: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="quantile of rewards above which a sample has weight 1, else 0; 0 is softmax",
    )
    over: Literal["round", "prompt"] = Field(
        default="round", description="whose rewards are compared"
    )
    draws: int = Field(default=4, ge=1, description="times that each sample is noised")
    caption_dropout: float = Field(
        default=0.1, ge=0, le=1, description="share of empty captions, for guidance"
    )

    def check(self, given: Given) -> None:
        super().check(given)
        if self.over == "prompt":
            check_company(self.name, given)

    @property
    def times_noised(self) -> int:
        return self.draws

    def make_batch(self, scored: Sequence[Scored], memory: Memory) -> ImageBatch:
        # rewards are compared per prompt, or over all samples
        reward_B, prompt_B = rewards_of(scored)
        group_B = (
            np.asarray(prompt_B) if self.over == "prompt" else np.zeros(len(reward_B), dtype=int)
        )

        # samples without a reward have weight 0
        weight_B = np.zeros(len(reward_B))
        for group in np.unique(group_B):
            mine = (group_B == group) & np.isfinite(reward_B)
            if mine.any():
                weight_B[mine] = self._weights(
                    torch.from_numpy(reward_B[mine].astype(np.float64))
                ).numpy()
        return ImageBatch(
            units=tuple(s.unit for s in scored),
            clean=final_latents(scored),
            weight=per_unit(scored, weight_B),
            draws=self.draws,
        )

    def _weights(self, reward_N: torch.Tensor) -> torch.Tensor:
        if not self.sparse:
            return objectives.reward_weights(reward_N, self.temperature)
        chosen_N = (reward_N >= torch.quantile(reward_N, self.sparse)).double()
        return chosen_N / chosen_N.mean()

    def loss(self, batch: ImagePass, policy: Policy) -> Loss:
        level_B, noise, empty_B = noised(
            policy, batch.key, batch.clean_BCHW, batch.unit.plan, self.caption_dropout
        )
        condition = policy.encode(batch.unit.prompts, batch.unit.plan).dropped(empty_B)
        error_B = policy.error(batch.clean_BCHW, noise, level_B, condition)
        return Loss(
            value=(batch.weight_B * error_B).mean(),
            means={"denoising_error": error_B.detach().mean(), "weight/max": batch.weight_B.max()},
        )
