"""GRPO on denoising steps: group-relative policy gradient, with Flow-GRPO's and GRPO-Guard's
settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

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
    check_skipped,
    relative_to_groups,
    step_batch,
)
from rlalign.core.batches import StepBatch, StepPass
from rlalign.core.records import Plan, Scored
from rlalign.core.registry import Before
from rlalign.diffusion.noise import unit_noise
from rlalign.diffusion.rollout import by_step, replay
from rlalign.policies.base import Policy


class GRPO(Algorithm):
    """Clipped ratios with advantages relative to the prompt's group of samples, for flow models
    (plan.rule flow_sde) and UNets.

    plan.window makes a few steps stochastic and trains only those (Flow-GRPO-Fast). ``guard`` is
    GRPO-Guard: the ratio is exp((log ratio + |mean - mean_old|^2 / (2 std^2)) std), whose exponent
    is centred at every step, and each step's loss is divided by its time step |dt|. ``kl_form``
    coded takes the KL times |dt|, as Flow-GRPO's code does: |mean - mean_ref|^2 / (2 g^2) with g^2
    = std^2 / |dt|. Time is a flow's own, from 1 to 0; on a UNet's path timesteps count as shares of
    all of them.

    Source: Liu 2025 (Flow-GRPO), arXiv:2505.05470, eq. 4-9; Shao 2024, arXiv:2402.03300; Wang 2025
    (GRPO-Guard), arXiv:2510.22319.
    """

    clip_range: float = Field(
        default=1e-4, gt=0, lt=1, description="c, on the ratio of per-element log-probs"
    )
    advantage_std: Literal["global", "group"] = Field(
        default="global",
        description=(
            "whose standard deviation divides: the round's, as in Flow-GRPO, or the group's"
        ),
    )
    advantage_clip: float = Field(
        default=5.0, gt=0, description="advantages are clipped to +- this"
    )
    kl_weight: float = Field(
        default=0.0, ge=0, description="weight of the KL to the pretrained model"
    )
    kl_form: Literal["gaussian", "coded"] = Field(
        default="gaussian",
        description="exact per-step Gaussian KL, or Flow-GRPO's, which is times the time step",
    )
    guard: bool = Field(default=False, description="GRPO-Guard's centred ratio and per-step weight")
    skip_last: int = Field(
        default=1,
        ge=0,
        description="final steps left out of the loss: their Gaussian is very sharp",
    )
    detach_uncond: Annotated[bool, Before(False)] = Field(
        default=False,
        description=(
            "under guidance, no gradient through the unconditional half, as in Flow-GRPO's code of"
            " July 2025; samples and ratios do not change"
        ),
    )

    def ratio_limit(self, round: int) -> float | None:
        return self.clip_range / 10

    @property
    def normalises(self) -> bool:
        return True

    def check(self, given: Given) -> None:
        super().check(given)
        check_skipped(self.name, given, self.skip_last)
        check_company(self.name, given)

    def make_batch(self, scored: Sequence[Scored], memory: Memory) -> StepBatch:
        value_B = relative_to_groups(scored, self.advantage_std)
        return step_batch(
            scored,
            np.clip(value_B, -self.advantage_clip, self.advantage_clip),
            skip_last=self.skip_last,
        )

    def loss(self, batch: StepPass, policy: Policy) -> Loss:
        rows = batch.before_BS.shape[0]
        steps = list(batch.steps)
        condition = policy.encode(batch.unit.prompts, batch.unit.plan).rows(len(steps))
        condition = replace(condition, detach_uncond=self.detach_uncond)

        # each step under the reference and under the policy
        theirs = None
        if self.kl_weight:
            with torch.no_grad(), policy.as_reference():
                theirs = replay(policy, batch.unit, batch.before_BS, steps, condition).gaussian
        mine = replay(policy, batch.unit, batch.before_BS, steps, condition).gaussian

        # the ratio to the policy that drew the samples
        drawn = by_step(batch.after_BS)
        log_ratio = mine.log_prob(drawn) - batch.log_prob_BS.transpose(0, 1).flatten()
        ratio = objectives.ratio(log_ratio, torch.zeros_like(log_ratio))

        # the guard corrects the ratio by the step's noise
        scale = torch.ones(())
        gap = time_steps(policy, batch.unit.plan)[steps].repeat_interleave(rows).to(log_ratio)
        if self.guard:
            shape = mine.mean.shape[1:]
            noise = torch.cat([unit_noise(batch.unit, k + 1, shape) for k in steps]).to(drawn)
            # the stored latent is that mean plus the keyed noise
            behaviour_mean = drawn - mine.std * noise
            std = mine.std.expand(len(drawn), *[1] * len(shape)).flatten()
            squared = ((mine.mean - behaviour_mean) ** 2).flatten(1).mean(1)
            ratio = objectives.guarded_ratio(log_ratio, squared, std)
            scale = 1.0 / gap

        # the surrogate of the reward, and the distance to the reference
        advantage = batch.advantage_B.repeat(len(steps))
        value = (scale * objectives.clipped_surrogate(ratio, advantage, self.clip_range)).mean()
        metrics = objectives.ratio_metrics(ratio, self.clip_range)
        if theirs is not None:
            kl = objectives.gaussian_kl(mine.mean, theirs.mean, mine.std)
            value = value + self.kl_weight * (kl if self.kl_form == "gaussian" else kl * gap).mean()
            metrics["means"]["kl/per_step_gaussian"] = kl.detach().mean()
        return Loss(value=value, via=mine.mean, **metrics)


def time_steps(policy: Policy, plan: Plan) -> torch.Tensor:
    """(K,) float64 |dt| of each denoising step, with the whole path as the unit of time: a flow's
    own, or timesteps / T."""
    levels = policy.path.at(plan).levels(plan.steps)
    return (levels[:-1] - levels[1:]).abs() / (policy.path.level_gap * policy.path.train_steps)
