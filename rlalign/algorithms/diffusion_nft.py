"""DiffusionNFT: reinforcement on the forward process, without likelihoods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    final_latents,
    per_unit,
    relative_to_groups,
    rewards_of,
)
from rlalign.core.batches import ImageBatch, ImagePass
from rlalign.core.copies import Copy, Decay
from rlalign.core.records import Scored, is_guided
from rlalign.core.registry import Before, UserError
from rlalign.diffusion.noise import generator, normal
from rlalign.diffusion.paths import coefficients
from rlalign.policies.base import Policy


class DiffusionNFT(Algorithm):
    """Pulls the prediction towards good samples and pushes it from bad ones, relative to the policy
    that sampled them.

    With r = clip(A, +-5) / 10 + 1/2 the loss is r |x+ - x0|^2 / w+ + (1 - r) |x- - x0|^2 / w- where
    x+ = (1 - beta) old + beta new and x- = (1 + beta) old - beta new are implicit clean
    predictions, and w is the detached mean absolute error. Samples may come from any solver
    (plan.eta 0 is best); no guidance. ``old`` is a slow copy of the weights: after round n it moves
    by 1 - min(slope max(n - after, 0), most).

    Source: Zheng 2025, arXiv:2509.16117, eq. 7-10.
    """

    eats = ImageBatch

    beta: float = Field(
        default=1.0, gt=0, description="how far the implicit policies are from the old one"
    )
    kl_weight: float = Field(
        default=1e-4, ge=0, description="weight of the squared velocity difference to the reference"
    )
    advantage_clip: float = Field(
        default=5.0, gt=0, description="advantages are clipped to +- this"
    )
    advantage_std: Literal["global", "group"] = Field(
        default="global", description="whose standard deviation divides"
    )
    decay_slope: float = Field(
        default=0.001, ge=0, description="how the old policy's decay grows per round"
    )
    decay_most: float = Field(default=0.5, ge=0, lt=1, description="and where it stops")
    decay_after: Annotated[float, Before(0.0)] = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="rounds before it grows, in which the old policy is the newest",
    )
    draws: int = Field(
        default=4,
        ge=1,
        description="times that each sample is noised, at levels of the plan's own grid",
    )
    self_normalised: bool = Field(
        default=True, description="divide by w; off is the plain squared error"
    )

    @property
    def copies(self) -> Mapping[str, Copy]:
        return {"behaviour": Decay(self._decay)}

    def _decay(self, round: int) -> float:
        """What the old policy keeps of itself after round ``round`` >= 1."""
        return min(self.decay_slope * max(round - self.decay_after, 0.0), self.decay_most)

    @property
    def normalises(self) -> bool:
        return True

    def check(self, given: Given) -> None:
        super().check(given)
        check_company(self.name, given)
        if is_guided(given.plan.guidance):
            raise UserError(
                f"plan.guidance must be <= 1 for {self.name}, whose loss compares unguided"
                f" predictions, got {given.plan.guidance:g}: guided samples are another policy's"
                " than the one it improves"
            )

    @property
    def times_noised(self) -> int:
        return self.draws

    def make_batch(self, scored: Sequence[Scored], memory: Memory) -> ImageBatch:
        reward_B, _ = rewards_of(scored)
        value_B = relative_to_groups(scored, self.advantage_std)
        share_B = (
            np.clip(value_B, -self.advantage_clip, self.advantage_clip) / (2 * self.advantage_clip)
            + 0.5
        )
        return ImageBatch(
            units=tuple(s.unit for s in scored),
            clean=final_latents(scored),
            weight=per_unit(scored, np.where(np.isfinite(reward_B), share_B, np.nan)),
            draws=self.draws,
        )

    def loss(self, batch: ImagePass, policy: Policy) -> Loss:
        clean = batch.clean_BCHW
        unit = batch.unit
        levels = policy.path.at(unit.plan).levels(unit.plan.steps)[:-1]

        # every draw of a unit takes another level of the plan, while there are enough
        order = generator(*batch.key[:-1], "levels").permutation(len(levels))
        level = levels[int(order[batch.number % len(levels)])].expand(len(clean))

        # the clean latents with noise of that level
        alpha, sigma = coefficients(policy.path, level, clean)
        x = alpha * clean + sigma * normal((*batch.key, "noise"), clean.shape).to(clean)

        # what the behaviour policy and the reference predict
        condition = policy.encode(unit.prompts, unit.plan)
        with torch.no_grad():
            with policy.as_snapshot("behaviour"):
                old, _ = policy.denoise(x, level, condition, 1.0)
            theirs_clean = None
            theirs_noise = None
            if self.kl_weight:
                with policy.as_reference():
                    theirs_clean, theirs_noise = policy.denoise(x, level, condition, 1.0)
        new, noise = policy.denoise(x, level, condition, 1.0)

        # samples without a reward count as average, and their loss as 0
        kept_B = torch.isfinite(batch.weight_B)
        share_B = torch.where(kept_B, batch.weight_B, torch.full_like(batch.weight_B, 0.5))
        loss_B = objectives.forward_reinforcement(
            new, old, clean, share_B, beta=self.beta, self_normalised=self.self_normalised
        )
        value = self.advantage_clip * (loss_B * kept_B).mean()
        means = {"nft/loss": loss_B.detach().mean()}

        # the distance to the reference
        if theirs_clean is not None and theirs_noise is not None:
            gap = ((noise - new) - (theirs_noise - theirs_clean)).square().mean()
            value = value + self.kl_weight * gap
            means["kl/velocity_mse"] = gap.detach()
        return Loss(value=value, means=means)
