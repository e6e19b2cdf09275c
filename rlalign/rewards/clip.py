"""How well a picture fits its caption, by CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from rlalign.core.locations import ArchitecturePath, LocalPathOrHubId
from rlalign.networks.towers import published_towers
from rlalign.rewards.base import Reward, Scorer


class Clip(Reward):
    """The cosine of a picture and its caption in an open_clip model, times ``scale``. Gradients
    reach the picture.

    Typical values of ViT-L/14: 0.15 to 0.35. Pictures are resized by torch's antialiased bicubic
    filter, so that gradients pass.

    Weights: hub id timm/vit_large_patch14_clip_224.openai (safetensors), the default; any model in
    open_clip's format.

    Source: Radford 2021, arXiv:2103.00020; as a score: Hessel 2021, arXiv:2104.08718 (CLIPScore,
    without its clipping at 0).
    """

    differentiable: ClassVar[bool] = True

    architecture: ArchitecturePath = "ViT-L-14-quickgelu"
    weights: LocalPathOrHubId = Field(
        default="timm/vit_large_patch14_clip_224.openai",
        description="a .safetensors file, or a hub id with open_clip_model.safetensors",
    )
    scale: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="factor of the cosine")

    def load(self, device: str) -> Scorer:
        """The scorer, its weights frozen. A missing or foreign file is a UserError."""
        towers = published_towers(self.architecture, self.weights, f"rewards.{self.title}", device)

        def scorer(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
            return self.scale * towers.cosine(media_BFCHW, prompts)

        return scorer
