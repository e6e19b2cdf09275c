"""DDPO: denoising diffusion policy optimisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from rlalign.algorithms import _objectives as objectives
from rlalign.algorithms._memory import Memory
from rlalign.algorithms.base import (
    ADVANTAGE,
    AdvantageOver,
    Algorithm,
    Given,
    Loss,
    check_company,
    check_skipped,
    standardised,
    step_batch,
)
from rlalign.core.batches import StepBatch, StepPass
from rlalign.core.copies import AtRoundStart, Copy
from rlalign.core.records import Scored
from rlalign.diffusion.rollout import replay_log_prob
from rlalign.policies.base import Policy


class DDPO(Algorithm):
    """Policy gradient over denoising steps: clipped importance sampling, or the score function for
    one update a round.

    The reward comes at the end and every step of a trajectory gets the same advantage A.
    importance_sampling minimises max(-A r, -A clip(r, 1 - c, 1 + c)) with the ratio r of
    per-element log-probs; score_function minimises -A log p. With samples of an older policy
    (runtime.max_staleness) that ratio leaves the clip range before the first update; ``proximal``
    takes it to the policy that starts the round's updates, and weighs by that one's ratio to the
    samples' own.

    Source: Black 2023, arXiv:2305.13301, section 4.3 (equations for DDPO_SF and DDPO_IS); proximal:
    Hilton 2021, arXiv:2110.00641, section 3 (the decoupled objective).
    """

    form: Literal["importance_sampling", "score_function"] = Field(
        default="importance_sampling",
        description="score_function needs one update and one epoch a round",
    )
    clip_range: float = Field(
        default=1e-4, gt=0, lt=1, description="c, on the ratio of per-element log-probs"
    )
    advantage: AdvantageOver = Field(default="prompt", description=ADVANTAGE)
    advantage_clip: float = Field(
        default=5.0, gt=0, description="advantages are clipped to +- this"
    )
    buffer_size: int = Field(default=16, ge=1, description="rewards remembered per prompt")
    min_count: int = Field(
        default=16, ge=1, description="rewards of a prompt before its own statistics are used"
    )
    skip_last: int = Field(
        default=0,
        ge=0,
        description=(
            "final steps left out of the loss: sharp Gaussians that carry noise and no layout"
        ),
    )

    proximal: bool = Field(
        default=False,
        description=(
            "for stale samples: clip around the weights that start a round's updates, not the"
            " samples'"
        ),
    )

    @model_validator(mode="after")
    def _reachable(self) -> DDPO:
        if self.min_count > self.buffer_size:
            raise ValueError(
                f"min_count must be <= buffer_size ({self.buffer_size}), got {self.min_count}"
            )
        if self.proximal and self.form == "score_function":
            raise ValueError("proximal belongs to the form importance_sampling, which has a ratio")
        return self

    def ratio_limit(self, round: int) -> float | None:
        return self.clip_range / 10 if self.form == "importance_sampling" else None

    @property
    def normalises(self) -> bool:
        return self.advantage != "centred"

    def check(self, given: Given) -> None:
        super().check(given)
        check_skipped(self.name, given, self.skip_last)
        if self.advantage in ("group", "centred"):
            check_company(self.name, given)

    @property
    def strictly_on_policy(self) -> bool:
        return self.form == "score_function"

    @property
    def copies(self) -> Mapping[str, Copy]:
        return {"proximal": AtRoundStart()} if self.proximal else {}

    def make_batch(self, scored: Sequence[Scored], memory: Memory) -> StepBatch:
        value_B = standardised(
            scored, memory, self.advantage, size=self.buffer_size, min_count=self.min_count
        )
        return step_batch(
            scored,
            np.clip(value_B, -self.advantage_clip, self.advantage_clip),
            skip_last=self.skip_last,
        )

    def loss(self, batch: StepPass, policy: Policy) -> Loss:
        condition = policy.encode(batch.unit.prompts, batch.unit.plan).rows(len(batch.steps))
        replayed = (batch.unit, batch.before_BS, batch.after_BS, batch.steps, condition)

        # the proximal policy is the behaviour policy where no other is kept
        proximal_BS = batch.log_prob_BS
        if self.proximal:
            with torch.no_grad(), policy.as_snapshot("proximal"):
                proximal_BS, _ = replay_log_prob(policy, *replayed)

        # the loss of the policy as it is now
        log_prob_BS, found = replay_log_prob(policy, *replayed)
        via = found.gaussian.mean
        advantage_B1 = batch.advantage_B[:, None]
        if self.form == "score_function":
            value = objectives.score_function(log_prob_BS, advantage_B1).mean()
            return Loss(value=value, via=via)
        ratio_BS = objectives.ratio(log_prob_BS, proximal_BS)
        value_BS = objectives.clipped_surrogate(ratio_BS, advantage_B1, self.clip_range)
        metrics = objectives.ratio_metrics(ratio_BS, self.clip_range)

        # the weight corrects for the age of the samples
        if self.proximal:
            weight_BS = objectives.ratio(proximal_BS, batch.log_prob_BS)
            value_BS = weight_BS * value_BS
            metrics["maxima"]["ratio/behaviour_deviation"] = (weight_BS - 1).abs().max()
        return Loss(value=value_BS.mean(), via=via, **metrics)
