"""The embedded model: a Stable Diffusion pipeline of a few million parameters that draws coloured shapes, shipped in assets."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from rlalign.policies.base import PolicyRecipe
from rlalign.policies.stable_diffusion import StableDiffusionPolicy, load_pipeline

ASSET = Path(__file__).parent.parent / "assets" / "tiny"


class Tiny(PolicyRecipe):
    """The shipped 32x32 text-to-image model of coloured shapes, in Stable Diffusion's format; made by ``rlalign pretrain``.

    Source: Ho 2020, arXiv:2006.11239 (training); Rombach 2022, arXiv:2112.10752 (architecture).
    """

    path: str = Field(default="", description="another folder of the same format; empty is the shipped one")

    def load(self, device: str) -> StableDiffusionPolicy:
        """The shipped weights, float32."""
        pipeline = load_pipeline(self.path or str(ASSET), safety_checker=None)
        return self.ready(StableDiffusionPolicy(pipeline, device, lora_rank=self.lora_rank, lora_alpha=self.lora_alpha))
