"""The size of a picture as JPEG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field

from rlalign.core.media import as_uint8, encode_image, to_image
from rlalign.rewards.base import Reward, Scorer


class Jpeg(Reward):
    """Compressibility or incompressibility: minus or plus the kilobytes (1000 bytes) of the picture
    as JPEG.

    Pixels are rounded to uint8; a video's score is the mean over its frames. Source: Black 2023,
    arXiv:2305.13301, section 5.
    """

    differentiable: ClassVar[bool] = False

    direction: Literal["compressible", "incompressible"] = Field(
        default="compressible",
        description="compressible rewards small files, incompressible large ones",
    )
    quality: int = Field(default=95, ge=1, le=100, description="JPEG quality")

    def load(self, device: str) -> Scorer:
        """A scorer on the CPU, whatever the device."""
        sign = -1.0 if self.direction == "compressible" else 1.0

        def scorer(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
            return sign * kilobytes(media_BFCHW, self.quality)

        return scorer


def kilobytes(media_BFCHW: torch.Tensor, quality: int) -> torch.Tensor:
    """(B,) float32 mean size of the frames as JPEG, in units of 1000 bytes; media in [0, 1]."""
    sizes = []
    for frames in as_uint8(media_BFCHW):
        total = sum(len(encode_image(to_image(f), "jpeg", quality=quality)) for f in frames)
        sizes.append(total / len(frames) / 1000.0)
    return torch.tensor(sizes, dtype=torch.float32)
