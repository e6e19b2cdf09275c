"""How much a clip moves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from rlalign.core.registry import UserError
from rlalign.rewards.base import Reward, Scorer


class DynamicDegree(Reward):
    """The mean change from frame to frame of the pixels that change most, 0 (a frozen clip) to 1.
    Gradients reach the clip.

    Of each pair of neighbouring frames the absolute differences of brightness (the mean of the
    channels) are taken, of them the largest ``share``, and of these the mean; the score is the mean
    over the pairs. Jitter and flicker count as motion: pair it with ``smoothness``. It needs clips
    of 2 frames or more.

    Source: dynamic degree of VBench (Huang 2023, arXiv:2311.17982), the mean of the largest 5 % of
    optical flow (RAFT), of which it then says only whether enough frames exceed a limit. Here pixel
    differences stand for the flow, without weights, and the mean itself is the score.
    """

    differentiable: ClassVar[bool] = True
    of_clips: ClassVar[bool] = True

    share: float = Field(
        default=0.05, gt=0.0, le=1.0, description="share of the pixels that count: what moves most"
    )

    def load(self, device: str) -> Scorer:
        """A scorer on whatever device the media are."""

        def scorer(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
            frames, _, height, width = media_BFCHW.shape[1:]
            if frames < 2:
                raise UserError(
                    f"rewards.{self.title} needs clips of 2 frames or more, got {frames}; leave it"
                    " out where a policy makes pictures"
                )
            brightness_BFN = media_BFCHW.float().mean(dim=2).flatten(2)
            change_BFN = brightness_BFN.diff(dim=1).abs()
            count = math.ceil(self.share * height * width)
            return change_BFN.topk(count, dim=2).values.mean(dim=(1, 2))

        return scorer
