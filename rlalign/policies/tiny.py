"""The embedded model: a Stable Diffusion pipeline of a few million parameters that draws coloured
shapes, shipped in assets."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from rlalign.core.locations import LocalPathOrHubId
from rlalign.networks.pipelines.fitting import try_out
from rlalign.networks.pipelines.schedulers import say_steps
from rlalign.policies.base import PolicyRecipe
from rlalign.policies.stable_diffusion import (
    TRIAL_SIDE,
    NegativePrompt,
    StableDiffusionPolicy,
    load_stable_diffusion,
)

ASSET = Path(__file__).parent.parent / "assets" / "tiny"


class Tiny(PolicyRecipe):
    """The shipped 32x32 text-to-image model of coloured shapes, in Stable Diffusion's format; made
    by ``rlalign pretrain``.

    Source: Ho 2020, arXiv:2006.11239 (training); Rombach 2022, arXiv:2112.10752 (architecture).
    """

    path: LocalPathOrHubId = Field(
        default="", description="another folder of the same format; empty is the shipped one"
    )
    negative_prompt: NegativePrompt = ""

    def load(self, device: str) -> StableDiffusionPolicy:
        """The shipped weights, float32."""
        path = self.path or str(ASSET)
        pipeline = load_stable_diffusion(path, self.denoiser_dtype)
        policy = StableDiffusionPolicy(
            pipeline, device, **self.lora_settings, negative_prompt=self.negative_prompt
        )
        return try_out(self.ready(policy), path, TRIAL_SIDE)

    def announce(self) -> None:
        say_steps(self.path or str(ASSET))
