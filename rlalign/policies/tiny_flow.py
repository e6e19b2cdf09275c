"""The embedded flow model: a Stable Diffusion 3 pipeline of a few million parameters that draws
coloured shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from rlalign.core.locations import LocalPathOrHubId
from rlalign.core.registry import Before
from rlalign.networks.pipelines.fitting import try_out
from rlalign.policies.base import PolicyRecipe
from rlalign.policies.sd3 import StableDiffusion3Policy, load_stable_diffusion_3
from rlalign.policies.stable_diffusion import NegativePrompt

ASSET = Path(__file__).parent.parent / "assets" / "tiny_flow"


class TinyFlow(PolicyRecipe):
    """The shipped 32x32 flow-matching transformer of coloured shapes, in Stable Diffusion 3's
    format.

    Made by ``rlalign pretrain configs/pretrain_tiny_flow.yaml``.

    Source: Lipman 2022, arXiv:2210.02747 (training); Esser 2024, arXiv:2403.03206 (architecture).
    """

    path: LocalPathOrHubId = Field(
        default="", description="another folder of the same format; empty is the shipped one"
    )
    negative_prompt: NegativePrompt = ""
    t5_tokens: Annotated[int, Before(0)] = Field(
        default=256,
        ge=0,
        le=512,
        description=(
            "rows of zeros in T5's place, as a call's max_sequence_length; 0 is a fifth of the time"
        ),
    )

    def load(self, device: str) -> StableDiffusion3Policy:
        """The shipped weights, float32; captions are read by the two CLIP encoders alone."""
        path = self.path or str(ASSET)
        pipeline = load_stable_diffusion_3(path, self.denoiser_dtype)
        policy = StableDiffusion3Policy(
            pipeline,
            device,
            **self.lora_settings,
            negative_prompt=self.negative_prompt,
            t5_tokens=self.t5_tokens,
        )
        return try_out(self.ready(policy), path, policy.network.config.patch_size)
