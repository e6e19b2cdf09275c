"""How smoothly a clip moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from rlalign.core.registry import UserError
from rlalign.rewards.base import Reward, Scorer


class Smoothness(Reward):
    """One minus the mean absolute difference between each frame and the mean of its two neighbours,
    0 to 1. Gradients reach the clip.

    1 is a clip without any change, or one that fades at an even rate: a frozen clip is perfect, so
    pair it with ``dynamic_degree``. It needs clips of 3 frames or more.

    Source: motion smoothness of VBench (Huang 2023, arXiv:2311.17982), which leaves out every other
    frame and compares it with what a learnt frame interpolator (AMT) makes of the rest. Here the
    interpolator is the mean of the two neighbours, without weights, and every inner frame counts.
    So a sharp edge that moves evenly is not perfect here.
    """

    differentiable: ClassVar[bool] = True
    of_clips: ClassVar[bool] = True

    def load(self, device: str) -> Scorer:
        """A scorer on whatever device the media are."""

        def scorer(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
            frames = media_BFCHW.shape[1]
            if frames < 3:
                raise UserError(
                    f"rewards.{self.title} needs clips of 3 frames or more, got {frames}; leave it"
                    " out where a policy makes pictures"
                )
            media = media_BFCHW.float()
            between = (media[:, :-2] + media[:, 2:]) / 2.0
            return 1.0 - (media[:, 1:-1] - between).abs().flatten(1).mean(dim=1)

        return scorer
