"""REINFORCE over denoising steps, in the literal form that the others are tested against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from rlalign.algorithms._memory import Memory
from rlalign.algorithms.base import Algorithm, Loss, rewards_of, step_batch
from rlalign.core.batches import StepBatch, StepPass
from rlalign.core.records import Scored
from rlalign.diffusion.rollout import replay_log_prob
from rlalign.policies.base import Policy


class Reinforce(Algorithm):
    """The score-function gradient of the expected reward, nothing normalised: sum over steps of
    grad log p times (r - b).

    Log-probs are joint here (summed over the D elements of a latent and over the K steps), rewards
    are raw; so the gradient is D K times that of DDPO's score_function with equal advantages. One
    update a round.

    Source: Williams 1992, doi:10.1007/BF00992696; Black 2023, arXiv:2305.13301, equation of
    DDPO_SF.
    """

    baseline: Literal["none", "mean"] = Field(
        default="mean",
        description=(
            "b: nothing, or the mean reward of the round; either leaves the expected gradient alone"
        ),
    )

    @property
    def strictly_on_policy(self) -> bool:
        return True

    def make_batch(self, scored: Sequence[Scored], memory: Memory) -> StepBatch:
        reward_B = rewards_of(scored)[0].astype(np.float64)
        kept = np.isfinite(reward_B)
        level = reward_B[kept].mean() if self.baseline == "mean" and kept.any() else 0.0
        return step_batch(scored, np.where(kept, reward_B - level, 0.0))

    def loss(self, batch: StepPass, policy: Policy) -> Loss:
        condition = policy.encode(batch.unit.prompts, batch.unit.plan).rows(len(batch.steps))
        log_prob_BS, found = replay_log_prob(
            policy, batch.unit, batch.before_BS, batch.after_BS, batch.steps, condition
        )
        elements = batch.before_BS[0, 0].numel()
        # the learner averages over (sample, step) pairs: with the number of steps it is a sum over
        # them
        joint_BS = log_prob_BS * (elements * batch.learned)
        value = (-batch.advantage_B[:, None] * joint_BS).mean()
        return Loss(value=value, via=found.gaussian.mean)
