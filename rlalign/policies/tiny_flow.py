"""The embedded flow model: a Stable Diffusion 3 pipeline of a few million parameters that draws coloured shapes."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from rlalign.policies.base import PolicyRecipe
from rlalign.policies.sd3 import StableDiffusion3Policy
from rlalign.policies.stable_diffusion import load_pipeline

ASSET = Path(__file__).parent.parent / "assets" / "tiny_flow"


class TinyFlow(PolicyRecipe):
    """The shipped 32x32 flow-matching transformer of coloured shapes, in Stable Diffusion 3's format.

    Made by ``rlalign pretrain configs/pretrain_tiny_flow.yaml``.

    Source: Lipman 2022, arXiv:2210.02747 (training); Esser 2024, arXiv:2403.03206 (architecture).
    """

    path: str = Field(default="", description="another folder of the same format; empty is the shipped one")

    def load(self, device: str) -> StableDiffusion3Policy:
        """The shipped weights, float32; captions are read by the two CLIP encoders alone."""
        pipeline = load_pipeline(self.path or str(ASSET), "StableDiffusion3Pipeline")
        return self.ready(
            StableDiffusion3Policy(pipeline, device, lora_rank=self.lora_rank, lora_alpha=self.lora_alpha)
        )
