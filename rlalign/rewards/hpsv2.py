"""Human Preference Score v2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from rlalign.rewards.base import Reward, Scorer
from rlalign.towers import published_towers


class HpsV2(Reward):
    """The cosine of a picture and its caption in a CLIP ViT-H/14 trained on human choices, without the logit scale.

    About 0.2 to 0.35; leaderboards print 100 times that, and v2 and v2.1 are not comparable. The longest side is resized, the
    rest padded with black. The published checkpoint is a pickle, which rlalign does not read: save the tensors under its
    ``state_dict`` key with safetensors once. Gradients reach the picture.

    Source: Wu 2023, arXiv:2306.09341.
    """

    differentiable: ClassVar[bool] = True

    weights: str = Field(description="the checkpoint's state_dict as a .safetensors file")
    architecture: str = Field(default="ViT-H-14", description="any name that open_clip knows, or a JSON file")
    scale: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="factor of the cosine")

    def load(self, device: str) -> Scorer:
        """The scorer, its weights frozen. A missing or foreign file is a UserError."""
        place = f"rewards.{self.title}"
        towers = published_towers(self.architecture, self.weights, place, device, resize_mode="longest")

        def scorer(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
            return self.scale * towers.cosine(media_BFCHW, prompts)

        return scorer
