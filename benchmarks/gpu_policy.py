"""Stable Diffusion 1.5's size with random weights as a policy that any process can load, and a
reward that takes its time and no core."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from full_size import stable_diffusion_15

from rlalign.networks.embeddings import Reader
from rlalign.policies.base import PipelineRecipe
from rlalign.policies.stable_diffusion import StableDiffusionFamily


class Random(PipelineRecipe):
    """The published sizes. Source: none, a benchmark's own."""

    family = StableDiffusionFamily
    small: ClassVar[bool] = False

    def build_parts(self, device: str, parts: Any, reader: Reader | None = None) -> Any:
        with torch.device(device), torch.random.fork_rng():
            torch.manual_seed(0)
            pipeline = stable_diffusion_15(self.small)
        return self.family(self, pipeline, device)


class SmallRandom(Random):
    """Small networks of the same classes. Source: none, a benchmark's own."""

    small: ClassVar[bool] = True


def slow_score(media_BFCHW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """The mean of each picture, a second later: as a reward on another machine."""
    time.sleep(1.0)
    return media_BFCHW.mean((1, 2, 3, 4))
