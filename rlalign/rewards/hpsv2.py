"""Human Preference Score v2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from rlalign.core.locations import ArchitecturePath, LocalPathOrHubId
from rlalign.core.registry import Before
from rlalign.networks.towers import published_towers
from rlalign.rewards.base import Reward, Scorer


class HpsV2(Reward):
    """The cosine of a picture and its caption in a CLIP ViT-H/14 trained on human choices, without
    the logit scale.

    About 0.2 to 0.35; leaderboards print 100 times that, and v2 and v2.1 are not comparable. The
    longest side is resized, the rest padded with black. The published scores were taken of tensors
    that were resized without antialiasing, as torchvision did then, and so are these; ``antialias``
    is the clean filter, whose scores are not comparable with them. The published checkpoint is a
    pickle, which ``rlalign convert`` turns into safetensors. Gradients reach the picture.

    Weights: HPS_v2_compressed.pt or HPS_v2.1_compressed.pt of hub id xswu/HPSv2, through rlalign
    convert.

    Source: Wu 2023, arXiv:2306.09341.
    """

    differentiable: ClassVar[bool] = True

    weights: LocalPathOrHubId = Field(
        description="the checkpoint's state_dict as a .safetensors file"
    )
    architecture: ArchitecturePath = "ViT-H-14"
    scale: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="factor of the cosine")
    antialias: Annotated[bool, Before(True)] = Field(
        default=False, description="resize with antialiasing, unlike the published scores"
    )

    def load(self, device: str) -> Scorer:
        """The scorer, its weights frozen. A missing or foreign file is a UserError."""
        place = f"rewards.{self.title}"
        how = {"resize_mode": "longest", "antialias": self.antialias}
        towers = published_towers(self.architecture, self.weights, place, device, **how)

        def scorer(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
            return self.scale * towers.cosine(media_BFCHW, prompts)

        return scorer
