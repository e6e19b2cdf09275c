"""Minus a quadratic cost of latents: what a linear-quadratic regulator keeps small."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from rlalign.core.records import Space
from rlalign.core.registry import UserError
from rlalign.rewards.base import Reward, Scorer


class Quadratic(Reward):
    """Minus the sum over a latent's channels c and places of weights[c] (x[c] - target[c])^2.

    It sees latents: of a plan (C, H) the channels are its states and controls, and the sum over H
    is the regulator's cost. 0 is the largest score where no weight is negative.

    Source: Kalman 1960, Contributions to the theory of optimal control (the cost).
    """

    sees: ClassVar[Space] = "latent"
    differentiable: ClassVar[bool] = True

    weights: tuple[float, ...] = Field(
        default=(1.0,), min_length=1, description="cost of each channel, or one for all"
    )
    target: tuple[float, ...] = Field(
        default=(0.0,), min_length=1, description="where a channel costs nothing, or one for all"
    )

    def load(self, device: str) -> Scorer:
        """A scorer on whatever device the latents are."""

        def scorer(latents_BC: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
            latents_BCN = latents_BC.flatten(2)
            weights_C1 = self._each("weights", self.weights, latents_BCN)
            target_C1 = self._each("target", self.target, latents_BCN)
            return -(weights_C1 * (latents_BCN - target_C1) ** 2).sum((1, 2))

        return scorer

    def _each(self, name: str, values: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
        """(C, 1) numbers, one for each channel."""
        channels = like.shape[1]
        if len(values) not in (1, channels):
            raise UserError(
                f"rewards.{self.title}.{name} must be 1 number or {channels}, one for each channel"
                f" of the policy's latents, got {len(values)}"
            )
        return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
