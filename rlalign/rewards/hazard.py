"""How much of a plan's line lies away from a hazard."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from rlalign.core.records import Space
from rlalign.rewards._plans import Plans, mean_along, places_on, plan_scorer
from rlalign.rewards.base import Reward, Scorer


class Hazard(Reward):
    """Share of a plan's line outside of a disc, 0 to 1, with a soft rim and so with gradients:
    ``detour`` without its simulator, through walls or not.

    A place at a distance d from the disc's middle counts sigmoid((d - radius) / softness). A long
    stretch of the line counts more than a short one.

    Source: no paper; obstacle costs of trajectory optimisation are alike (CHOMP, Ratliff 2009).
    """

    differentiable: ClassVar[bool] = True
    sees: ClassVar[Space] = "latent"

    x: float = Field(allow_inf_nan=False, description="metres: the hazard's middle, from the map's")
    y: float = Field(allow_inf_nan=False, description="metres: the hazard's middle, from the map's")
    radius: float = Field(default=0.5, gt=0.0, allow_inf_nan=False, description="metres")
    softness: float = Field(
        default=0.1, gt=0.0, allow_inf_nan=False, description="metres: how soft the rim is"
    )
    parts: int = Field(
        default=4, ge=1, description="places on each segment between way points that are looked at"
    )

    def load(self, device: str) -> Scorer:
        """A scorer on whatever device the latents are."""
        return plan_scorer(self.title, self._score)

    def _score(self, plans: Plans) -> torch.Tensor:
        places_BN2 = places_on(plans.points_BH2, self.parts)
        from_BN2 = places_BN2 - places_BN2.new_tensor([self.x, self.y])
        distance_BN = (from_BN2.square().sum(dim=2) + 1e-12).sqrt()
        safe_BN = torch.sigmoid((distance_BN - self.radius) / self.softness)
        return mean_along(plans.points_BH2, safe_BN)
