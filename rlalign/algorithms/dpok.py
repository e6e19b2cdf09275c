"""DPOK: policy gradient over denoising steps with KL to the pretrained model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from rlalign.algorithms import _objectives as objectives
from rlalign.algorithms._memory import Memory
from rlalign.algorithms.base import (
    ADVANTAGE,
    AdvantageOver,
    Algorithm,
    Given,
    Loss,
    check_company,
    standardised,
    step_batch,
)
from rlalign.core.batches import StepBatch, StepPass
from rlalign.core.records import Plan, Scored
from rlalign.diffusion.rollout import Denoised, by_step, replay
from rlalign.policies.base import Condition, Policy


class DPOK(Algorithm):
    """Maximises E[reward] - beta KL(policy || pretrained), the KL by its upper bound over denoising
    steps.

    By lemma 4.2 KL(p(x_0)) <= sum over steps of E[KL(step || pretrained step)]; ``kl_form``
    gaussian is that sum exactly, |mean - mean_ref|^2 / (2 std^2), noise is the published code's
    |noise - noise_ref|^2 without its factors. Both terms are averaged over elements and steps, so
    ``kl_weight`` is beta: advantage units per nat of the joint bound.

    Source: Fan 2023, arXiv:2305.16381, lemma 4.2 and algorithm 1.
    """

    kl_weight: float = Field(
        default=0.01, ge=0, description="beta, advantage units per nat of the joint KL (gaussian)"
    )
    kl_form: Literal["gaussian", "noise"] = Field(
        default="gaussian",
        description="exact per-step Gaussian KL, or the squared difference of noise predictions",
    )
    reward_weight: float = Field(default=1.0, gt=0, description="factor of the reward term")
    clip_range: float = Field(
        default=1e-4, gt=0, lt=1, description="c, on the ratio of per-element log-probs"
    )
    clip: Literal["ratio", "surrogate"] = Field(
        default="ratio",
        description="clip the ratio itself, as published, or PPO's pessimistic surrogate",
    )
    advantage: AdvantageOver = Field(default="group", description=ADVANTAGE)
    advantage_clip: float = Field(
        default=5.0, gt=0, description="advantages are clipped to +- this"
    )
    value_lr: float = Field(
        default=0.0,
        ge=0,
        description="learning rate of a value network V(x_t, t, caption) as baseline; 0 is none",
    )
    replay: int = Field(
        default=0, ge=0, description="earlier rounds whose transitions are used again"
    )
    seed: int = Field(default=0, ge=0, description="decides the value network's first weights")

    def ratio_limit(self, round: int) -> float | None:
        # transitions of earlier rounds were made under other weights
        return self.clip_range / 10 if round == 1 or not self.replay else None

    @property
    def normalises(self) -> bool:
        return self.advantage != "centred"

    def check(self, given: Given) -> None:
        super().check(given)
        if self.advantage in ("group", "centred"):
            check_company(self.name, given)

    def critic(self, policy: Policy, plan: Plan) -> tuple[torch.nn.Module, float] | None:
        if not self.value_lr:
            return None
        from rlalign.networks.critic import ValueNetwork

        elements = int(np.prod(policy.latent_shape(plan)))
        width = policy.encode([policy.family.trial_prompt], plan).caption.summary_BD.shape[-1]
        network = ValueNetwork(
            elements=elements, caption_width=width, steps=plan.steps, seed=self.seed
        )
        return network.to(policy.device), self.value_lr

    def make_batch(self, scored: Sequence[Scored], memory: Memory) -> StepBatch:
        value_B = standardised(scored, memory, self.advantage)
        fresh = step_batch(scored, np.clip(value_B, -self.advantage_clip, self.advantage_clip))
        return memory.with_earlier(fresh, self.replay) if self.replay else fresh

    def loss(self, batch: StepPass, policy: Policy, critic: torch.nn.Module | None = None) -> Loss:
        # each step under the reference and under the policy
        condition = policy.encode(batch.unit.prompts, batch.unit.plan).rows(len(batch.steps))
        with torch.no_grad(), policy.as_reference():
            theirs = replay(policy, batch.unit, batch.before_BS, batch.steps, condition)
        mine = replay(policy, batch.unit, batch.before_BS, batch.steps, condition)

        # the surrogate of the reward
        log_prob = mine.gaussian.log_prob(by_step(batch.after_BS))
        ratio = objectives.ratio(log_prob, batch.log_prob_BS.transpose(0, 1).flatten())
        advantage, extra, means = self._advantage(batch, critic, condition)
        clip = objectives.clamped_ratio if self.clip == "ratio" else objectives.clipped_surrogate
        metrics = objectives.ratio_metrics(ratio, self.clip_range)

        # the distance to the reference
        kl, trained_kl = self._kl(mine, theirs)
        value = (
            self.reward_weight * clip(ratio, advantage, self.clip_range).mean()
            + self.kl_weight * trained_kl.mean()
        )
        means = {**metrics["means"], **means, "kl/per_step_gaussian": kl.detach().mean()}
        return Loss(value=value + extra, means=means, maxima=metrics["maxima"])

    def _kl(self, mine: Denoised, theirs: Denoised) -> tuple[torch.Tensor, torch.Tensor]:
        """The per-step Gaussian KL, which is logged, and the form that is trained, nats (or
        squares) per element."""
        kl = objectives.gaussian_kl(mine.gaussian.mean, theirs.gaussian.mean, mine.gaussian.std)
        return kl, kl if self.kl_form == "gaussian" else objectives.noise_kl(
            mine.noise, theirs.noise
        )

    def _advantage(
        self, batch: StepPass, critic: torch.nn.Module | None, condition: Condition
    ) -> tuple[torch.Tensor, torch.Tensor | float, dict[str, torch.Tensor]]:
        """(S * B,) advantages, the value network's own loss, and its metrics.

        With a value network the advantage is the batch's (a standardised reward) less the value,
        which learns to predict it.
        """
        advantage = batch.advantage_B.repeat(len(batch.steps))
        if critic is None:
            return advantage, 0.0, {}
        rows = batch.before_BS.shape[0]
        x = by_step(batch.before_BS)
        step_B = torch.tensor(batch.steps, device=x.device).repeat_interleave(rows)
        value = critic(x, step_B, condition.caption.summary_BD)
        error = ((value - advantage) ** 2).mean()
        return advantage - value.detach(), error, {"value/error": error.detach()}
