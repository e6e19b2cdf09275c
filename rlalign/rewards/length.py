"""How long a plan is."""

from __future__ import annotations

from typing import ClassVar

import torch

from rlalign.core.records import Space
from rlalign.rewards._plans import Plans, measure_length, plan_scorer
from rlalign.rewards.base import Reward, Scorer


class Length(Reward):
    """Minus the metres of a plan's line: the shorter the better, through walls or not.

    Source: no paper; the cost of shortest paths.
    """

    differentiable: ClassVar[bool] = True
    sees: ClassVar[Space] = "latent"

    def load(self, device: str) -> Scorer:
        """A scorer on whatever device the latents are."""
        return plan_scorer(self.title, self._score)

    def _score(self, plans: Plans) -> torch.Tensor:
        return -measure_length(plans.points_BH2)
