"""A reward that was fitted on preference pairs with ``rlalign fit-reward``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field

from rlalign.core.locations import LocalPath
from rlalign.networks.towers import load_towers
from rlalign.rewards.base import Reward, Scorer

ASSET = Path(__file__).parent.parent / "assets" / "tiny_reward"


class BradleyTerry(Reward):
    """A picture's strength in paired comparisons: exp(logit_scale) * cos(image, text) of a fitted
    open_clip model.

    The difference of two scores is the log odds that the first picture is preferred. Where ties
    were modelled (fit.theta > 1) decided pairs have longer odds, up to twice that logarithm; the
    order is the same. Gradients reach the picture.

    Weights: made by rlalign fit-reward; a small one for 32x32 shapes ships.

    Source: Bradley & Terry 1952, Biometrika 39 (the model); Kirstain 2023, arXiv:2305.01569 (the
    form of the score).
    """

    differentiable: ClassVar[bool] = True

    path: LocalPath = Field(
        default="",
        description=(
            "folder written by rlalign fit-reward; empty is the shipped one for 32x32 shapes"
        ),
    )

    def load(self, device: str) -> Scorer:
        """The scorer, its weights frozen. A missing or damaged folder is a UserError."""
        towers = load_towers(self.path or ASSET, f"rewards.{self.title}.path", device)

        def scorer(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
            return towers(media_BFCHW, prompts)

        return scorer
