"""DDPO: denoising diffusion policy optimisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from rlalign import objectives
from rlalign.algorithms.base import AdvantageOver, Algorithm, DifferentiableScorer, Loss, standardised, step_batch
from rlalign.batches import StepBatch, StepPass
from rlalign.diffusion.rollout import replay_log_prob
from rlalign.memory import Memory
from rlalign.policies.base import Policy
from rlalign.records import Scored


class DDPO(Algorithm):
    """Policy gradient over denoising steps: clipped importance sampling, or the score function for one update a round.

    The reward comes at the end and every step of a trajectory gets the same advantage A. importance_sampling minimises
    max(-A r, -A clip(r, 1 - c, 1 + c)) with the ratio r of per-element log-probs; score_function minimises -A log p.

    Source: Black 2023, arXiv:2305.13301, section 4.3 (equations for DDPO_SF and DDPO_IS).
    """

    form: Literal["importance_sampling", "score_function"] = Field(
        default="importance_sampling", description="score_function needs one update and one epoch a round"
    )
    clip_range: float = Field(default=1e-4, gt=0, lt=1, description="c, on the ratio of per-element log-probs")
    advantage: AdvantageOver = Field(
        default="prompt",
        description="whose statistics: running per prompt, the round's samples of a prompt, or the round",
    )
    advantage_clip: float = Field(default=5.0, gt=0, description="advantages are clipped to +- this")
    buffer_size: int = Field(default=16, ge=1, description="rewards remembered per prompt")
    min_count: int = Field(default=16, ge=1, description="rewards of a prompt before its own statistics are used")
    skip_last: int = Field(
        default=0, ge=0, description="final steps left out of the loss: sharp Gaussians that carry noise and no layout"
    )

    @model_validator(mode="after")
    def _reachable(self) -> DDPO:
        if self.min_count > self.buffer_size:
            raise ValueError(f"min_count must be <= buffer_size ({self.buffer_size}), got {self.min_count}")
        return self

    @property
    def ratio_limit(self) -> float | None:
        return self.clip_range / 10 if self.form == "importance_sampling" else None

    @property
    def strictly_on_policy(self) -> bool:
        return self.form == "score_function"

    def make_batch(self, scored: Sequence[Scored], memory: Memory) -> StepBatch:
        value_B = standardised(scored, memory, self.advantage, size=self.buffer_size, min_count=self.min_count)
        return step_batch(scored, np.clip(value_B, -self.advantage_clip, self.advantage_clip), skip_last=self.skip_last)

    def loss(self, batch: StepPass, policy: Policy, scorer: DifferentiableScorer | None = None) -> Loss:
        condition = policy.encode(batch.unit.prompts).rows(len(batch.steps))
        log_prob_BS, _ = replay_log_prob(policy, batch.unit, batch.latents_BK1, batch.steps, condition)
        advantage_B1 = batch.advantage_B[:, None]
        if self.form == "score_function":
            return Loss(value=objectives.score_function(log_prob_BS, advantage_B1).mean())
        ratio_BS = objectives.ratio(log_prob_BS, batch.log_prob_BS)
        return Loss(
            value=objectives.clipped_surrogate(ratio_BS, advantage_B1, self.clip_range).mean(),
            **objectives.ratio_metrics(ratio_BS, self.clip_range),
        )
