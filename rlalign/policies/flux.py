"""FLUX.1-dev and FLUX.1-schnell: any checkpoint in the format of diffusers' FluxPipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field

from rlalign.core.registry import UserError
from rlalign.diffusion.condition import Words
from rlalign.networks.pipelines.fitting import check_packed
from rlalign.networks.pipelines.packing import pack, positions, unpack
from rlalign.policies.base import JOINT_TARGETS, PipelineFamily, PipelineRecipe

T5_TOKENS = 512
"""What a pipeline's call takes as ``max_sequence_length`` when it is not told."""
SCHNELL_T5_TOKENS = 256
"""What FLUX.1-schnell was trained with."""


class FluxFamily(PipelineFamily):
    """A live FLUX.1 pipeline: a flow's transformer that is told T5's tokens, CLIP's pooled vector
    and, in the guidance-distilled dev, how much guidance it is to imitate.

    Latents are (B, C, H, W); the transformer's tokens of 2 x 2 stay inside ``predict``.
    """

    pipeline_classes: ClassVar[tuple[str, ...]] = ("FluxPipeline",)
    comfyui_keys = "lora_transformer_"
    own_side: ClassVar[int] = 128
    even_levels: ClassVar[bool] = True
    lora_targets = JOINT_TARGETS

    recipe: Flux

    def __init__(self, recipe: Flux, pipeline: Any, device: str) -> None:
        super().__init__(recipe, pipeline, device)
        if self.network.config.guidance_embeds and recipe.embedded_guidance is None:
            raise UserError(
                f"policy.embedded_guidance must be a number for {self.folder!r}, whose transformer"
                " is told a guidance (guidance_embeds), got null; 3.5 is the pipeline's own"
            )

    @classmethod
    def check(cls, pipeline: Any, path: str) -> None:
        check_packed(pipeline, path)

    @property
    def patch(self) -> int:
        """The config's is that of a token which is packed already."""
        return 2

    @property
    def channels(self) -> int:
        return self.vae.config.latent_channels

    @property
    def told_guidance(self) -> float | None:
        """What the transformer hears; None where it hears none."""
        return self.recipe.embedded_guidance if self.network.config.guidance_embeds else None

    @property
    def text_tokens(self) -> int:
        """Rows of T5's embeddings."""
        own = T5_TOKENS if self.network.config.guidance_embeds else SCHNELL_T5_TOKENS
        return self.recipe.text_tokens or own

    def read(self, text: str) -> Mapping[str, torch.Tensor]:
        embeds_BLD, pooled_BD, _ = self.pipeline.encode_prompt(
            text, None, device=self.device, max_sequence_length=self.text_tokens
        )
        return {"embeds_BLD": embeds_BLD, "pooled_BD": pooled_BD}

    def predict(self, x: torch.Tensor, timestep_B: torch.Tensor, words: Words) -> torch.Tensor:
        embeds_BLD = words["embeds_BLD"]
        told = self.told_guidance
        guidance_B = None if told is None else torch.full((len(x),), told, device=x.device)
        # places stay float32: bfloat16 keeps whole numbers up to 256 alone
        tokens = self.network(
            hidden_states=pack(x),
            timestep=timestep_B.float() / 1000,
            guidance=guidance_B,
            pooled_projections=words["pooled_BD"],
            encoder_hidden_states=embeds_BLD,
            txt_ids=torch.zeros(embeds_BLD.shape[1], 3, device=x.device),
            img_ids=positions(x),
            return_dict=False,
        )[0]
        return unpack(tokens, x.shape)


class Flux(PipelineRecipe):
    """A FLUX.1 checkpoint (transformer, rectified flow), dev or schnell, from a folder or a hub id.

    Source: Black Forest Labs 2024, arXiv:2506.15742 (section 2).
    """

    family = FluxFamily
    beside_words: ClassVar[tuple[str, ...]] = ("embedded_guidance",)

    embedded_guidance: float | None = Field(
        default=3.5,
        ge=0.0,
        description=(
            "the guidance that dev's transformer is told, as a call's guidance_scale: the same in"
            " training and in use; schnell's is told none"
        ),
    )
    text_tokens: int | None = Field(
        default=None,
        ge=1,
        le=512,
        description="tokens of T5, as a call's max_sequence_length; null: dev 512, schnell 256",
    )
