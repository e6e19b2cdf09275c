"""A reward of pictures over the frames of a clip."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from rlalign.core.registry import UserError


class Quantile(BaseModel):
    """A quantile of the frames' scores."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    quantile: float = Field(
        ge=0.0,
        le=1.0,
        description="share of the frames that score at most as much, linear between two of them",
    )


Frames = Literal["mean", "min", "first"] | Quantile
"""How the scores of a clip's frames make one."""


class FramesScorer:
    """A scorer that shows another one each frame alone, with the clip's prompt, and makes one score
    of theirs.

    Gradients pass where the other has them. A score that is missing (NaN) makes the clip's missing.
    """

    def __init__(
        self,
        title: str,
        scorer: Callable[[torch.Tensor, Sequence[str]], torch.Tensor],
        frames: Frames,
    ) -> None:
        self._title = title
        self._scorer: Any = scorer
        self._frames = frames

    def __call__(self, media_BFCHW: torch.Tensor, prompts: Sequence[str], /) -> torch.Tensor:
        how = self._frames
        if how == "first":
            return self._scorer(media_BFCHW[:, :1], prompts)
        batch, frames = media_BFCHW.shape[:2]
        pictures_N1CHW = media_BFCHW.flatten(0, 1)[:, None]
        score_N = self._scorer(pictures_N1CHW, [p for p in prompts for _ in range(frames)])
        if tuple(score_N.shape) != (batch * frames,):
            raise UserError(
                f"rewards.{self._title} must return shape ({batch * frames},) of as many frames,"
                f" got {tuple(score_N.shape)}"
            )
        score_BF = score_N.unflatten(0, (batch, frames))
        if isinstance(how, Quantile):
            return score_BF.float().quantile(how.quantile, dim=1)
        return score_BF.mean(dim=1) if how == "mean" else score_BF.amin(dim=1)

    def set_weights(self, tensors: Mapping[str, torch.Tensor], /) -> None:
        """Takes over weights, where the other scorer does."""
        self._scorer.set_weights(tensors)
