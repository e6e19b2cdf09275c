"""How near a picture's brightness lies to a place in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from rlalign.rewards.base import Reward, Scorer

DARK = 1e-4
FARTHEST = -8.0


class Centroid(Reward):
    """Minus the squared distance of the brightness's centre of mass from a place; the picture spans
    -1 to 1 both ways.

    0 is the largest score; a black picture, which has no centre, gets -8, the distance between
    opposite corners. A video's score is the mean over its frames.

    Source: the first moments of an image (Hu 1962); no paper uses it as a reward.
    """

    differentiable: ClassVar[bool] = True

    x: float = Field(
        default=0.0, ge=-1.0, le=1.0, description="the place: -1 is the left edge, 1 the right one"
    )
    y: float = Field(
        default=0.0, ge=-1.0, le=1.0, description="the place: -1 is the lower edge, 1 the upper one"
    )

    def load(self, device: str) -> Scorer:
        """A scorer on whatever device the media are."""

        def scorer(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
            bright_BFHW = media_BFCHW.float().mean(2)
            height, width = bright_BFHW.shape[-2:]
            rows_H = torch.linspace(1.0, -1.0, height, device=bright_BFHW.device)
            columns_W = torch.linspace(-1.0, 1.0, width, device=bright_BFHW.device)
            mass_BF = bright_BFHW.sum((-1, -2))
            safe_BF = mass_BF.clamp(min=DARK * height * width)
            x_BF = (bright_BFHW.sum(-2) * columns_W).sum(-1) / safe_BF
            y_BF = (bright_BFHW.sum(-1) * rows_H).sum(-1) / safe_BF
            score_BF = -((x_BF - self.x) ** 2 + (y_BF - self.y) ** 2)
            dark_BF = mass_BF < DARK * height * width
            return torch.where(dark_BF, torch.full_like(score_BF, FARTHEST), score_BF).mean(1)

        return scorer
