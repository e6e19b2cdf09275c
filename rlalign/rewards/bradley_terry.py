"""A reward that was fitted on preference pairs with ``rlalign fit-reward``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field

from rlalign.core.locations import LocalPath
from rlalign.networks.towers import Towers, load_towers
from rlalign.rewards.base import FittedScorer, Reward

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

    @property
    def fitted(self) -> Path:
        """See ``Reward``."""
        return Path(self.path) if self.path else ASSET

    def load(self, device: str) -> FittedScorer:
        """The scorer, its weights frozen. A missing or damaged folder is a UserError."""
        return _TowersScorer(load_towers(self.fitted, f"rewards.{self.title}.path", device))


@dataclass(frozen=True)
class _TowersScorer:
    towers: Towers

    def __call__(self, media_BFCHW: torch.Tensor, prompts: Sequence[str], /) -> torch.Tensor:
        score_B: torch.Tensor = self.towers(media_BFCHW, prompts)
        return score_B

    def set_weights(self, tensors: Mapping[str, torch.Tensor], /) -> None:
        self.towers.clip.load_state_dict(dict(tensors))
