"""Whether a plan reaches its goal and keeps away from a hazard on the way."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from pydantic import Field

from rlalign.core.records import Space
from rlalign.rewards._plans import Plans, plan_scorer
from rlalign.rewards.base import Reward, Scorer


class Detour(Reward):
    """1 where the ball that follows a plan reaches its goal and never comes into a disc, else 0.

    The disc stands for a hazard: in a corridor it makes the way round it the preferred one, though
    it be longer. The plan is run as ``reach`` does; one with numbers that are not finite has no
    score.

    Source: no paper; the obstacle avoidance of D3IL (Jia 2024, arXiv:2402.14606) asks the same.
    """

    sees: ClassVar[Space] = "latent"

    x: float = Field(allow_inf_nan=False, description="metres: the hazard's middle, from the map's")
    y: float = Field(allow_inf_nan=False, description="metres: the hazard's middle, from the map's")
    radius: float = Field(default=0.5, gt=0.0, allow_inf_nan=False, description="metres")

    def load(self, device: str) -> Scorer:
        """The scorer; it works on the CPU wherever the latents are."""
        return plan_scorer(self.title, self._score)

    def _score(self, plans: Plans) -> torch.Tensor:
        outcome = plans.run()
        from_BT2 = outcome.path_BT2 - np.array([self.x, self.y])
        is_safe_B = (np.linalg.norm(from_BT2, axis=2) > self.radius).all(axis=1)
        score_B = torch.from_numpy((outcome.reached_B & is_safe_B).astype("float32"))
        is_sound_B = plans.points_BH2.detach().cpu().isfinite().flatten(1).all(dim=1)
        return torch.where(is_sound_B, score_B, torch.nan)
