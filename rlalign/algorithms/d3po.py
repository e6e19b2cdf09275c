"""D3PO: direct preference optimisation of denoising steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from pydantic import Field

from rlalign.algorithms import _objectives as objectives
from rlalign.algorithms._memory import Memory
from rlalign.algorithms._pairwise import PairwiseAlgorithm
from rlalign.algorithms.base import Loss, best_and_worst, step_batch
from rlalign.core.batches import StepBatch, StepPass
from rlalign.core.records import Scored
from rlalign.diffusion.rollout import replay_log_prob
from rlalign.policies.base import Policy


class D3PO(PairwiseAlgorithm):
    """-log sigmoid(beta log R_w - beta log R_l) at each step of two trajectories, R = clip(p /
    p_ref, 1 - c, 1 + c).

    The preference is the trajectories' (best against worst of the prompt's samples by the round's
    rewards; ties are left out). Ratios are of per-element log-probs against the reference; outside
    the range the gradient is exactly 0.

    Source: Yang 2023, arXiv:2311.13231, eq. 13.
    """

    beta: float = Field(default=0.1, gt=0, description="strength")
    clip_range: float = Field(
        default=0.1, gt=0, lt=1, description="c, on the ratio to the reference"
    )

    def make_batch(self, scored: Sequence[Scored], memory: Memory) -> StepBatch:
        """A step batch in which the best of a prompt's samples is preferred to the worst."""
        side_B = []
        for one in scored:
            mine_B = np.zeros(len(one.unit.prompts))
            for best, worst in best_and_worst(one.total_B, one.unit.prompt_ids):
                if one.total_B[best] > one.total_B[worst]:
                    mine_B[best] = 1.0
                    mine_B[worst] = -1.0
            side_B.append(mine_B)
        return step_batch(scored, np.zeros(len(np.concatenate(side_B))), side_B=side_B)

    def loss(self, batch: StepPass, policy: Policy) -> Loss:
        winners, losers = _sides(batch)
        if not winners:  # nothing but ties: no loss, and no gradient
            return Loss(
                value=torch.stack([p.sum() for p in policy.trainable().values()]).sum() * 0.0
            )

        # winners come first, losers second
        rows = winners + losers
        before = batch.before_BS[rows]
        after = batch.after_BS[rows]
        prompts = [batch.unit.prompts[i] for i in rows]
        condition = policy.encode(prompts, batch.unit.plan).rows(len(batch.steps))
        replayed = (batch.unit, before, after, batch.steps, condition)
        with torch.no_grad(), policy.as_reference():
            theirs, _ = replay_log_prob(policy, *replayed)
        mine, _ = replay_log_prob(policy, *replayed)

        # clipped as a logarithm: the ratio of a step far from the reference overflows, and its
        # gradient with it
        log_ratio = (mine - theirs).clamp(math.log1p(-self.clip_range), math.log1p(self.clip_range))
        won, lost = log_ratio.split(len(winners))
        logit = objectives.preference_logit(won, lost, self.beta)
        metrics = objectives.ratio_metrics(objectives.ratio(mine, theirs), self.clip_range)

        # these ratios are to the reference, not to the behaviour policy: they have names of their
        # own
        return Loss(
            value=objectives.preference_loss(logit).mean(),
            means={
                "preference/accuracy": (logit.detach() > 0).float().mean(),
                "reference_ratio/clip_fraction": metrics["means"]["ratio/clip_fraction"],
            },
            maxima={"reference_ratio/max_deviation": metrics["maxima"]["ratio/max_deviation"]},
        )


def _sides(batch: StepPass) -> tuple[list[int], list[int]]:
    """Rows of the winners, and of their losers in the same order."""
    assert batch.side_B is not None, "this batch compares nothing"
    side = batch.side_B.tolist()
    winner = {p: i for i, p in enumerate(batch.unit.prompt_ids) if side[i] > 0}
    loser = {p: i for i, p in enumerate(batch.unit.prompt_ids) if side[i] < 0}
    return list(winner.values()), [loser[p] for p in winner]
