"""How much of a plan's line keeps clear of walls."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from rlalign.core.records import Space
from rlalign.data.mazes.maps import RADIUS
from rlalign.rewards._plans import Plans, mean_along, places_on, plan_scorer, room_at
from rlalign.rewards.base import Reward, Scorer


class Clear(Reward):
    """Share of a plan's line on which the ball touches no wall, 0 to 1, with soft edges and so with
    gradients.

    A place counts sigmoid((room - margin) / softness), room being its distance to the nearest wall
    and negative within one. A long stretch of the line counts more than a short one. Way points
    alone (``parts: 0``) are a weaker question: plans learn to jump across walls between them.

    Source: no paper; collision costs of trajectory optimisation are alike (CHOMP, Ratliff 2009).
    """

    differentiable: ClassVar[bool] = True
    sees: ClassVar[Space] = "latent"

    parts: int = Field(
        default=8,
        ge=0,
        description="places on each segment that are looked at; 0: the way points alone",
    )
    margin: float = Field(
        default=RADIUS,
        allow_inf_nan=False,
        description="metres to a wall at which a place counts half; the ball's radius",
    )
    softness: float = Field(
        default=0.03,
        gt=0.0,
        allow_inf_nan=False,
        description="metres over which a place goes from clear to not",
    )

    def load(self, device: str) -> Scorer:
        """A scorer on whatever device the latents are."""
        return plan_scorer(self.title, self._score)

    def _score(self, plans: Plans) -> torch.Tensor:
        points_BH2 = plans.points_BH2
        places_BN2 = places_on(points_BH2, self.parts) if self.parts else points_BH2
        room_BN = room_at(plans.maze, places_BN2)
        clear_BN = torch.sigmoid((room_BN - self.margin) / self.softness)
        return mean_along(points_BH2, clear_BN) if self.parts else clear_BN.mean(dim=1)
