"""HunyuanVideo: any checkpoint in the format of diffusers' HunyuanVideoPipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field

from rlalign.diffusion.condition import Words
from rlalign.networks.pipelines.fitting import check_settings
from rlalign.policies.base import JOINT_TARGETS, ClipFamily, ClipRecipe


class HunyuanVideoFamily(ClipFamily):
    """A live HunyuanVideo pipeline: a flow's transformer that is told a language model's hidden
    states with their mask, CLIP's pooled vector and how much guidance it is to imitate.

    Latents are (B, 16, F', H / 8, W / 8); the transformer makes its tokens of 2 x 2 itself.
    """

    pipeline_classes: ClassVar[tuple[str, ...]] = ("HunyuanVideoPipeline",)
    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "transformer": ("HunyuanVideoTransformer3DModel",),
        "vae": ("AutoencoderKLHunyuanVideo",),
        "tokenizer": (),
        "text_encoder": (),
        "tokenizer_2": (),
        "text_encoder_2": ("CLIPTextModel",),
    }
    own_pixels: ClassVar[tuple[int, int]] = (720, 1280)
    even_levels: ClassVar[bool] = True
    lora_targets = JOINT_TARGETS

    recipe: HunyuanVideo

    @classmethod
    def check(cls, pipeline: Any, path: str) -> None:
        super().check(pipeline, path)
        alone = {"patch_size_t": (1,), "image_condition_type": (None,)}
        check_settings(pipeline, path, cls.part, alone)

    def read(self, text: str) -> Mapping[str, torch.Tensor]:
        embeds_BLD, pooled_BD, mask_BL = self.pipeline.encode_prompt(
            text, device=self.device, max_sequence_length=self.recipe.text_tokens
        )
        return {"embeds_BLD": embeds_BLD, "mask_BL": mask_BL.bool(), "pooled_BD": pooled_BD}

    def predict(self, x: torch.Tensor, timestep_B: torch.Tensor, words: Words) -> torch.Tensor:
        guidance_B = None
        if self.network.config.guidance_embeds:
            told = 1000.0 * self.recipe.embedded_guidance
            guidance_B = torch.full((len(x),), told, device=x.device)
        return self.network(
            hidden_states=x,
            timestep=timestep_B.float(),
            encoder_hidden_states=words["embeds_BLD"],
            encoder_attention_mask=words["mask_BL"],
            pooled_projections=words["pooled_BD"],
            guidance=guidance_B,
            return_dict=False,
        )[0]


class HunyuanVideo(ClipRecipe):
    """A HunyuanVideo checkpoint (transformer of clips, rectified flow) from a folder or a hub id.

    Source: Kong 2024, arXiv:2412.03603.
    """

    family = HunyuanVideoFamily
    beside_words: ClassVar[tuple[str, ...]] = ("embedded_guidance",)

    embedded_guidance: float = Field(
        default=6.0,
        ge=0.0,
        description=(
            "the guidance that the transformer is told, as a call's guidance_scale: the same in"
            " training and in use"
        ),
    )
    text_tokens: int = Field(
        default=256,
        ge=1,
        le=1024,
        description=(
            "tokens of the language model, as a call's max_sequence_length; masked beyond a"
            " prompt's end"
        ),
    )
