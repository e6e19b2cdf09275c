"""A policy that sleeps instead of computing: what is left of a run's time is coordination."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from rlalign.core.records import Plan
from rlalign.diffusion.paths import VariancePreserving
from rlalign.policies.base import OWN_SIZE, Condition, Family, PolicyRecipe, Words


class SleeperFamily(Family):
    """Latents (4, 8, 8), pictures of 8 x 8; one weight."""

    prediction = "epsilon"

    def __init__(self, seconds: float) -> None:
        self.path, self.device, self.seconds = VariancePreserving.scaled_linear(), "cpu", seconds
        self.network: Any = torch.nn.Linear(1, 1, bias=False)

    def encode(self, prompts: Sequence[str], plan: Plan = OWN_SIZE) -> Condition:
        empty = Words({"embeds_BLD": torch.zeros(len(prompts), 1, 1)})
        return Condition(caption=empty, empty=empty)

    def predict(self, x: torch.Tensor, timestep_B: torch.Tensor, words: Words) -> torch.Tensor:
        if not torch.is_grad_enabled():  # a rollout; the learner's passes take no time
            time.sleep(self.seconds)
        return x * self.network.weight[0, 0]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents[:, None, :3].sigmoid()

    def encode_media(self, media_BFCHW: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(media_BFCHW[:, 0], (0, 0, 0, 0, 0, 1))

    def latent_shape(self, plan: Plan) -> tuple[int, ...]:
        return (4, 8, 8)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)


class Sleeper(PolicyRecipe):
    """A denoiser that takes ``seconds`` a call and no CPU. Source: none, a benchmark's own."""

    family = SleeperFamily

    seconds: float = Field(
        default=0.1, ge=0, description="seconds that a call of the denoiser sleeps"
    )

    def build(self, device: str) -> SleeperFamily:
        return SleeperFamily(self.seconds)
